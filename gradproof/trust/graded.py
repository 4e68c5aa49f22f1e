"""Graded faults: how small a fault in a gradient is still caught, by gradproof and by the usual checks.

On the same random networks, in one run: one input's or parameter's gradient is multiplied by 1 + a size, whole or in
one element alone, and every tool is asked. Run `python -m gradproof.trust.graded`.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from gradproof.draw.drawing import Drawn, draw_each
from gradproof.draw.joining import NODES, Deep, deep_networks
from gradproof.model.adapter import AdapterError
from gradproof.model.case import Case
from gradproof.model.dtypes import HALF, VALID_DTYPES
from gradproof.model.tensors import gradient_of
from gradproof.show.progress import tracked
from gradproof.subject.registry import load_adapter
from gradproof.trust.long_sums import told_apart
from gradproof.trust.peers import Place, Plant, Tool, leaves, tools_of
from gradproof.trust.sections import write_section
from gradproof.verdict.agreement import judge
from gradproof.verdict.equations import INSIDE
from gradproof.verdict.examination import Examination
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject, probe
from gradproof.verdict.kinks import probed_subject
from gradproof.verdict.sweep import Sweep

NETWORKS = 60
"""Networks drawn, some of which no fault can be planted in."""

SIZES = (1e-1, 3e-2, 1e-2, 3e-3, *(10.0**-k for k in range(3, 16)))
"""The faults' sizes: the gradient is multiplied by 1 more than these."""

RELIABLY = 0.95
"""The share of the networks in which a size of fault must be caught to count as caught."""

USABLE = 0.5
"""The share of the networks that a tool must pass with nothing planted; else what it catches says nothing."""

FRAMEWORKS = ("torch", "jax")

SHALLOW, DEEP = "1 to 8", f"about {NODES}"
"""Nodes of the networks drawn, and of those that are joined of them."""

SCALED, ELEMENT = "scaled", "one element"
"""What is planted: a factor in a whole gradient, or in a single element of it."""

CAUGHT, PASSED, FAILED = "caught", "passed", "failed"
"""What a tool says: an alarm, none, or an error that is no verdict."""

TOLD = """{drawn} random networks of {shallow} nodes and as many of {deep}, of seed {seed}, with {versions}. In each,
the gradient of one input or parameter is multiplied by 1 + size, in all elements ("scaled") or in one ("one element"),
and every tool is asked; false alarms and errors are its answers with nothing planted. The smallest size that is caught
in a network is found by bisection; a tool's is the smallest that it catches in at least {share} of the networks that
pass with nothing planted; "-" where fewer than half pass. All tools of a framework see the same networks. In half
precision these are networks in which the layer that reads the input or parameter rounds nothing but its results there
(class inside); the layer makes the same mistake when its arithmetic is found out. Left out are:

{left_out}"""


@dataclass(frozen=True)
class Scene:
    """One network with its numbers in one dtype, and where faults are planted in it.

    number: of the network, the same in every dtype. frameworks: whose gradients can be spoilt in it.
    """

    number: int
    case: Case
    place: Place
    frameworks: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What a tool said of one network.

    sound: "caught", "passed" or "failed", with nothing planted, after so many seconds.
    smallest: what is planted -> the smallest size that was caught, infinity where none was.
    """

    network: int
    sound: str
    seconds: float = 0.0
    smallest: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One tool in one dtype, on networks of so many nodes, and all that it said."""

    tool: str
    dtype: str
    nodes: str
    outcomes: tuple[Outcome, ...]

    def share(self, verdict: str) -> float:
        """The share of the networks with nothing planted of which it said so."""
        return sum(each.sound == verdict for each in self.outcomes) / max(len(self.outcomes), 1)

    def caught(self, planted: str, size: float) -> float:
        """Of the networks that pass with nothing planted, the share in which it catches a fault of this size."""
        passing = [each for each in self.outcomes if each.sound == PASSED]
        return sum(each.smallest[planted] <= size for each in passing) / max(len(passing), 1)

    def finest(self, planted: str) -> float | None:
        """The smallest size that is reliably caught; None where none is."""
        return min((size for size in SIZES if self.caught(planted, size) >= RELIABLY), default=None)

    @property
    def seconds(self) -> float:
        """The median time for a network with nothing planted."""
        return float(np.median([each.seconds for each in self.outcomes])) if self.outcomes else 0.0


@dataclass(frozen=True)
class Graded:
    """The result. left_out: (dtype, nodes) -> reason -> networks without a fault planted. versions: of frameworks."""

    seed: int
    drawn: int
    rows: tuple[Row, ...]
    left_out: Mapping[tuple[str, str], Mapping[str, int]]
    versions: Mapping[str, str]


Sample = Drawn | Deep
"""A network with what its numbers are drawn from."""


def graded(
    networks: int = NETWORKS,
    seed: int = 1,
    frameworks: Sequence[str] = FRAMEWORKS,
    dtypes: Sequence[str] = VALID_DTYPES,
    progress: Callable[[Sequence[Scene], str], Iterable[Scene]] = lambda scenes, what: scenes,
) -> Graded:
    """Plant faults in every network, and ask every tool for the smallest that it catches.

    networks: so many are drawn, and as many deep ones joined. frameworks: "torch", "jax" or both; a network is used
    where all of them agree with the reference, so that all tools see the same ones. progress: wraps the networks of a
    dtype as they are gone over.

    Raises AdapterError for a framework that is not installed.
    """
    adapters = {name: load_adapter(name) for name in frameworks}
    drawn: dict[str, Sequence[Sample]] = {SHALLOW: _drawn(networks, seed), DEEP: deep_networks(networks, seed)}
    layers = {node.layer.name for every in drawn.values() for each in every for node in each.network.nodes}
    rows: list[Row] = []
    left_out: dict[tuple[str, str], Counter[str]] = {}
    for dtype in dtypes:
        subjects = {name: probed_subject(adapter, dtype, layers=layers)[0] for name, adapter in adapters.items()}
        for nodes, every in drawn.items():
            scenes, left_out[dtype, nodes] = _scenes(every, dtype, list(subjects.values()))
            tools = [each for each in tools_of(subjects) if dtype in each.dtypes and not (each.steps and nodes is DEEP)]
            said: dict[str, list[Outcome]] = {tool.name: [] for tool in tools}
            for scene in progress(scenes, f"networks of {nodes} nodes, {dtype}"):
                for tool in (each for each in tools if each.framework in scene.frameworks):
                    said[tool.name].append(asked(tool, scene))
            rows += [Row(name, dtype, nodes, tuple(outcomes)) for name, outcomes in said.items()]
    versions = {name: adapter.version() for name, adapter in adapters.items()}
    return Graded(seed, networks, tuple(rows), left_out, versions)


def _drawn(networks: int, seed: int) -> list[Drawn]:
    drawn: list[Drawn] = []
    draw_each(drawn.append, networks, seed)
    return drawn


def asked(tool: Tool, scene: Scene) -> Outcome:
    """All that a tool says of a network; nothing is planted where it raises an alarm without."""
    started = time.perf_counter()
    sound = _judged(tool, scene, None)
    seconds = time.perf_counter() - started
    if sound != PASSED:
        return Outcome(scene.number, sound, seconds)
    smallest = {
        planted: smallest_caught(partial(_catches, tool, scene, everywhere))
        for planted, everywhere in ((SCALED, True), (ELEMENT, False))
    }
    return Outcome(scene.number, sound, seconds, smallest)


def smallest_caught(catches: Callable[[float], bool]) -> float:
    """The smallest of SIZES that is caught, infinity where none is. What is caught is taken to be so when larger."""
    caught, open_ = 0, len(SIZES)
    while caught < open_:
        middle = (caught + open_) // 2
        if catches(SIZES[middle]):
            caught = middle + 1
        else:
            open_ = middle
    return SIZES[caught - 1] if caught else math.inf


def _catches(tool: Tool, scene: Scene, everywhere: bool, size: float) -> bool:
    return _judged(tool, scene, Plant(scene.place, everywhere, size)) == CAUGHT


def _judged(tool: Tool, scene: Scene, plant: Plant | None) -> str:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            return CAUGHT if tool.judge(scene.case, plant) else PASSED
        except Exception:  # an error of the tool's own says nothing about the gradient
            return FAILED


def _scenes(drawn: Sequence[Sample], dtype: str, subjects: Sequence[Subject]) -> tuple[list[Scene], Counter[str]]:
    """The networks in which a fault can be planted, and how many are left out for which reason."""
    scenes: list[Scene] = []
    left_out: Counter[str] = Counter()
    for number, each in enumerate(drawn):
        found = _scene(number, each, dtype, subjects)
        if isinstance(found, str):
            left_out[found] += 1
        else:
            scenes.append(found)
    return scenes, left_out


def _scene(number: int, drawn: Sample, dtype: str, subjects: Sequence[Subject]) -> Scene | str:
    """The scene, or why there is none."""
    place = _place(drawn)
    if place is None:
        return "every gradient is zero"
    case = drawn.case(dtype)
    for subject in subjects:
        if not subject.supports(drawn.network, dtype):
            return f"{subject.adapter.name} lacks a layer"
    frameworks = []
    for subject in subjects:
        found = examine(subject, case)
        if found.known:
            return f"{subject.adapter.name} diverges as known"
        if _doubtful(place, found):
            return "the gradient is unverifiable or zero"
        if dtype not in HALF or _inside(place, found, subject):
            frameworks.append(subject.adapter.name)
    return Scene(number, case, place, tuple(frameworks)) if frameworks else "the layer rounds more than its results"


def _place(drawn: Sample) -> Place | None:
    """A gradient and an element of it, chosen where gradients are not zero, the same in every dtype."""
    generator = np.random.default_rng(drawn.seed)
    case = drawn.case("float64")
    gradients = Sweep(case, {}).gradients
    once = [name for name in leaves(case.network) if len(case.network.consumers[name]) == 1]
    spoilable = {name: places for name in once if (places := np.flatnonzero(gradients[name])).size}
    if not spoilable:
        return None
    victim = str(generator.choice(list(spoilable)))
    ((reader, argument),) = case.network.consumers[victim]
    return Place(victim, int(generator.choice(spoilable[victim])), case.network.node(reader), argument)


def _doubtful(place: Place, found: Examination) -> bool:
    """Whether nothing can be said of the gradient, or it is 0 to within rounding, so that a factor changes nothing."""
    check = next((each for each in found.checks if each.key == gradient_of(place.victim)), None)
    if check is None or found.equations is None or check.unverifiable or check.key not in found.trace.got:
        return True
    without = np.array(found.trace.got[check.key])
    without.flat[place.element] = 0
    return not judge(found.equations[check.key], without, found.case.dtype).kind


def _inside(place: Place, found: Examination, subject: Subject) -> bool:
    """Whether the layer whose gradient is spoilt rounds nothing but its results."""
    alone = found.equations.alone(place.node) if found.equations else None
    return alone is not None and subject.classes.of(alone, partial(probe, subject)) is INSIDE


def table(found: Graded) -> str:
    """The comparison in Markdown: one row per tool, dtype and depth."""
    head = ("tool", "dtype", "nodes", "networks", "false alarms", "errors", *(SCALED, ELEMENT), "s per network")
    lines = [_line(head), _line(["---"] * 3 + ["---:"] * 6)]
    for row in found.rows:
        shares = (f"{row.share(verdict):.0%}" for verdict in (CAUGHT, FAILED))
        finest = (_finest(row, planted) for planted in (SCALED, ELEMENT))
        cells = [row.tool, row.dtype, row.nodes, str(len(row.outcomes)), *shares, *finest, f"{row.seconds:.2g}"]
        lines.append(_line(cells))
    return "\n".join(lines)


def _finest(row: Row, planted: str) -> str:
    if row.share(PASSED) < USABLE:
        return "-"
    size = row.finest(planted)
    return "none" if size is None else f"{size:.0e}"


def shares_table(found: Graded) -> str:
    """Of the networks that pass with nothing planted, the share in which gradproof catches each size, in Markdown."""
    lines = [_line(["tool", "dtype", "nodes", "planted", *(f"{size:.0e}" for size in SIZES)])]
    lines.append(_line(["---"] * 4 + ["---:"] * len(SIZES)))
    for row in found.rows:
        for planted in (SCALED, ELEMENT) if row.tool.startswith("gradproof") else ():
            shares = (f"{row.caught(planted, size):.0%}" for size in SIZES)
            lines.append(_line([row.tool, row.dtype, row.nodes, planted, *shares]))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def told(found: Graded) -> str:
    """What was done and how the table is to be read, in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    counts = [f"- {dtype}, {nodes}: {_reasons(found.left_out[dtype, nodes])}" for dtype, nodes in found.left_out]
    return TOLD.format(
        drawn=found.drawn,
        seed=found.seed,
        versions=versions,
        left_out="\n".join(counts),
        share=f"{RELIABLY:.0%}",
        shallow=SHALLOW,
        deep=DEEP,
    )


def _reasons(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count} where {reason}" for reason, count in sorted(reasons.items())) or "none"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the tables; 2 where a framework is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m gradproof.trust.graded",
        description="How small a fault in a gradient is still caught: by gradproof, by gradcheck and check_grads, and "
        "by fixed tolerances, all on the same random networks. In each network the gradient of one input or parameter "
        "is multiplied by 1 + a size, whole or in one element, and every tool is asked; so is it with nothing planted.",
        epilog="Prints Markdown: one row per tool, dtype and depth, then the share caught for every size, then how "
        "often long sums kept in bfloat16 are told from sums in float32. A quick look: "
        "python -m gradproof.trust.graded --networks 5 --framework torch",
    )
    parser.add_argument(
        "--networks",
        type=_at_least_one,
        default=NETWORKS,
        help=f"to draw, and as many of {NODES} nodes (default {NETWORKS})",
    )
    parser.add_argument("--seed", type=int, default=1, help="what is drawn hangs on it (default 1)")
    parser.add_argument(
        "--framework",
        action="append",
        choices=FRAMEWORKS,
        help="whose gradients are spoilt, and whose own checks are asked; repeatable (default: both)",
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the tables into this page")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        found = graded(
            options.networks,
            options.seed,
            options.framework or FRAMEWORKS,
            progress=lambda scenes, what: tracked(scenes, len(scenes), what),
        )
    except AdapterError as error:
        console.print(f"error: {error}", markup=False)
        return 2
    text = "\n\n".join([told(found), table(found), shares_table(found), told_apart(options.seed)])
    print(text)
    if options.page:
        write_section(options.page, "graded", text)
    return 0


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: expected 1 or more")
    return number


if __name__ == "__main__":
    raise SystemExit(main())
