"""Graded faults: how small a fault in a gradient is still caught, by gradproof and by the usual checks.

On the same random networks, in one run: one input's or parameter's gradient is multiplied by 1 + 10^-k, whole or in
one element alone, and every tool is asked. Run `python -m gradproof.graded`.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from gradproof.adapter import Adapter, AdapterError, Forward
from gradproof.agreement import judge
from gradproof.case import Case, upcast
from gradproof.drawing import Drawn, draw_each
from gradproof.dtypes import VALID_DTYPES
from gradproof.examination import Subject, examine
from gradproof.kinks import probed_subject
from gradproof.layer import Layer, Options, Shape
from gradproof.network import Network
from gradproof.progress import tracked
from gradproof.registry import load_adapter
from gradproof.sections import write_section
from gradproof.sweep import Sweep

NETWORKS = 60
"""Networks drawn, some of which no fault can be planted in."""

KS = tuple(range(1, 16))
"""The faults' sizes: 10 to the power of minus these."""

RELIABLY = 0.95
"""The share of the networks in which a size of fault must be caught to count as caught."""

USABLE = 0.5
"""The share of the networks that a tool must pass with nothing planted; else what it catches says nothing."""

FRAMEWORKS = ("torch", "jax")

STEPPED = ("float64", "float32")
"""The dtypes in which checks by finite differences are asked; below, the step itself is lost to rounding."""

NOTHING, SCALED, ELEMENT = "nothing", "scaled", "element"
"""What is planted: no fault, one in a whole gradient, one in a single element of it."""

CAUGHT, PASSED, FAILED = "caught", "passed", "failed"
"""What a tool says: an alarm, none, or an error that is no verdict."""

TOLD = """{drawn} random networks of seed {seed}, with {versions}. In each, the gradient of one input or parameter is
multiplied by 1 + 10^-k, in all elements ("scaled") or in one ("one element"), and every tool is asked; false alarms
and errors are its answers with nothing planted. k: the largest for which, and for all below, the fault is caught in at
least {share} of the networks that pass with nothing planted; "-" where fewer than half pass. Every tool sees the same
networks; left out are, in {left_out}."""


@dataclass(frozen=True)
class Plant:
    """A fault in the gradient of one input or parameter.

    victim: its name. element: the flat index of the only element that is wrong, None where all are.
    k: the gradient is multiplied by 1 + 10^-k.
    """

    victim: str
    element: int | None
    k: int

    def factors(self, shape: Shape) -> np.ndarray:
        """What the gradient is multiplied by, in float64: in less, the factor would be rounded before the gradient."""
        factors = np.ones(shape)
        factors.reshape(-1)[slice(None) if self.element is None else self.element] += 10.0**-self.k
        return factors


@dataclass(frozen=True)
class Scene:
    """One network with its numbers in one dtype, and where faults are planted in it.

    number: of the network, the same in every dtype.
    """

    number: int
    case: Case
    victim: str
    element: int

    def plants(self, ks: Sequence[int]) -> Iterator[tuple[str, Plant]]:
        for k in ks:
            yield SCALED, Plant(self.victim, None, k)
            yield ELEMENT, Plant(self.victim, self.element, k)


Judge = Callable[[Scene, Plant | None], bool]
"""Whether a tool raises the alarm on a network with this fault planted, or with none."""


@dataclass(frozen=True)
class Tool:
    """A way to check gradients, and the dtypes that it is asked in."""

    name: str
    dtypes: tuple[str, ...]
    judge: Judge


@dataclass(frozen=True)
class Outcome:
    """What a tool said of one network.

    planted: "nothing", "scaled" or "element". k: the fault's size, 0 where nothing is planted.
    verdict: "caught", "passed" or "failed".
    """

    network: int
    planted: str
    k: int
    verdict: str
    seconds: float


@dataclass(frozen=True)
class Row:
    """One tool in one dtype, and all that it said."""

    tool: str
    dtype: str
    outcomes: tuple[Outcome, ...]

    @property
    def sound(self) -> tuple[Outcome, ...]:
        """What it said of every network with nothing planted."""
        return tuple(each for each in self.outcomes if each.planted == NOTHING)

    def share(self, verdict: str) -> float:
        """The share of the networks with nothing planted of which it said so."""
        return sum(each.verdict == verdict for each in self.sound) / max(len(self.sound), 1)

    def caught(self, planted: str, k: int) -> float:
        """Of the networks that pass with nothing planted, the share in which it catches the fault."""
        passing = {each.network for each in self.sound if each.verdict == PASSED}
        asked = [e for e in self.outcomes if (e.planted, e.k) == (planted, k) and e.network in passing]
        return sum(each.verdict == CAUGHT for each in asked) / max(len(asked), 1)

    def ks(self) -> list[int]:
        return sorted({each.k for each in self.outcomes if each.planted != NOTHING})

    def finest(self, planted: str) -> int | None:
        """The largest k that is reliably caught, and every smaller one too; None where none is."""
        found = None
        for k in self.ks():
            if self.caught(planted, k) < RELIABLY:
                break
            found = k
        return found

    @property
    def seconds(self) -> float:
        """The median time for a network with nothing planted."""
        return float(np.median([each.seconds for each in self.sound])) if self.sound else 0.0


@dataclass(frozen=True)
class Graded:
    """The result. left_out: dtype -> reason -> networks in which no fault could be planted. versions: of frameworks."""

    seed: int
    drawn: int
    rows: tuple[Row, ...]
    left_out: Mapping[str, Mapping[str, int]]
    versions: Mapping[str, str]


def graded(
    networks: int = NETWORKS,
    seed: int = 1,
    frameworks: Sequence[str] = FRAMEWORKS,
    dtypes: Sequence[str] = VALID_DTYPES,
    ks: Sequence[int] = KS,
    progress: Callable[[Sequence[Scene], str], Iterable[Scene]] = lambda scenes, what: scenes,
) -> Graded:
    """Plant every fault in every network, and ask every tool.

    networks: so many are drawn. frameworks: "torch", "jax" or both; a network is used where all of them agree with
    the reference, so that all tools see the same ones. progress: wraps the networks of a dtype as they are gone over.

    Raises AdapterError for a framework that is not installed.
    """
    adapters = {name: load_adapter(name) for name in frameworks}
    drawn: list[Drawn] = []
    draw_each(drawn.append, networks, seed)
    layers = {node.layer.name for each in drawn for node in each.network.nodes}
    rows: list[Row] = []
    left_out: dict[str, Counter[str]] = {}
    for dtype in dtypes:
        subjects = {name: probed_subject(adapter, dtype, layers=layers)[0] for name, adapter in adapters.items()}
        scenes, left_out[dtype] = _scenes(drawn, dtype, list(subjects.values()))
        tools = [tool for tool in _tools(subjects) if dtype in tool.dtypes]
        said: dict[str, list[Outcome]] = {tool.name: [] for tool in tools}
        for scene in progress(scenes, f"networks, {dtype}"):
            for tool in tools:
                said[tool.name] += _asked(tool, scene, ks)
        rows += [Row(name, dtype, tuple(outcomes)) for name, outcomes in said.items()]
    versions = {name: adapter.version() for name, adapter in adapters.items()}
    return Graded(seed, networks, tuple(rows), left_out, versions)


def _asked(tool: Tool, scene: Scene, ks: Sequence[int]) -> Iterator[Outcome]:
    yield _judged(tool, scene, NOTHING, None)
    for planted, plant in scene.plants(ks):
        yield _judged(tool, scene, planted, plant)


def _judged(tool: Tool, scene: Scene, planted: str, plant: Plant | None) -> Outcome:
    started = time.perf_counter()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            verdict = CAUGHT if tool.judge(scene, plant) else PASSED
        except Exception:  # an error of the tool's own says nothing about the gradient
            verdict = FAILED
    return Outcome(scene.number, planted, plant.k if plant else 0, verdict, time.perf_counter() - started)


def _scenes(drawn: Sequence[Drawn], dtype: str, subjects: Sequence[Subject]) -> tuple[list[Scene], Counter[str]]:
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


def _scene(number: int, drawn: Drawn, dtype: str, subjects: Sequence[Subject]) -> Scene | str:
    """The scene, or why there is none."""
    place = _place(drawn)
    if place is None:
        return "every gradient is zero"
    scene = Scene(number, drawn.case(dtype), *place)
    for subject in subjects:
        if not subject.supports(drawn.network, dtype):
            return f"{subject.adapter.name} lacks a layer"
    if _doubtful(scene, subjects[0]):
        return "the gradient is unverifiable or zero"
    for subject in subjects:
        if examine(subject, scene.case).known:
            return f"{subject.adapter.name} diverges as known"
    return scene


def _place(drawn: Drawn) -> tuple[str, int] | None:
    """An input or parameter and an element of it, chosen where gradients are not zero, the same in every dtype."""
    generator = np.random.default_rng(drawn.seed)
    case = drawn.case("float64")
    gradients = Sweep(case, {}).gradients
    spoilable = {name: np.flatnonzero(gradients[name]) for name in _leaves(case.network)}
    names = [name for name, places in spoilable.items() if places.size]
    if not names:
        return None
    victim = names[generator.integers(len(names))]
    return victim, int(generator.choice(spoilable[victim]))


def _doubtful(scene: Scene, subject: Subject) -> bool:
    """Whether nothing can be said of the gradient, or it is 0 to within rounding, so that a factor changes nothing."""
    found = examine(subject, scene.case)
    check = next(each for each in found.checks if each.key == f"gradient:{scene.victim}")
    got = found.trace.got.get(check.key)
    if found.equations is None or got is None or check.unverifiable:
        return True
    without = np.array(got)
    without.flat[scene.element] = 0
    return not judge(found.equations[check.key], without, scene.case.dtype).kind


def _leaves(network: Network) -> list[str]:
    """The inputs and parameters that have a gradient."""
    nodes = {node.name for node in network.nodes}
    return [name for name in network.differentiable if name not in nodes]


def _tools(subjects: Mapping[str, Subject]) -> Iterator[Tool]:
    for name, subject in subjects.items():
        yield Tool(f"gradproof on {name}", VALID_DTYPES, _gradproof(subject))
        yield from NUMERICAL[name](subject.adapter)
    framework, subject = next(iter(subjects.items()))
    for name, close in FIXED.items():
        yield Tool(f"{name} on {framework}", VALID_DTYPES, _fixed(subject, close))


class Spoilt:
    """An adapter whose results are a framework's own, but for the planted fault."""

    def __init__(self, adapter: Adapter, plant: Plant | None) -> None:
        self.name = adapter.name
        self._adapter = adapter
        self._plant = plant

    def version(self) -> str:
        return self._adapter.version()

    def supports(self, layer: Layer, options: Options, dtype: str) -> bool:
        return self._adapter.supports(layer, options, dtype)

    def forward(self, network: Network, values: Mapping[str, np.ndarray], dtype: str) -> Forward:
        return self._adapter.forward(network, values, dtype)

    def backward(self, forward: Forward, cotangent: np.ndarray) -> Mapping[str, np.ndarray]:
        gradients = dict(self._adapter.backward(forward, cotangent))
        plant = self._plant
        if plant and plant.victim in gradients:
            right = gradients[plant.victim]
            gradients[plant.victim] = np.asarray(plant.factors(right.shape) * right).astype(right.dtype)
        return gradients


def _gradproof(subject: Subject) -> Judge:
    def judge(scene: Scene, plant: Plant | None) -> bool:
        found = examine(replace(subject, adapter=Spoilt(subject.adapter, plant)), scene.case)
        return not (found.agrees or found.known)

    return judge


Close = Callable[[np.ndarray, np.ndarray], bool]


def _fixed(subject: Subject, close: Close) -> Judge:
    """Every gradient of an input or parameter, compared with the reference's rounded to the dtype."""

    def judge(scene: Scene, plant: Plant | None) -> bool:
        case, adapter = scene.case, Spoilt(subject.adapter, plant)
        got = adapter.backward(adapter.forward(case.network, case.values, case.dtype), case.cotangent)
        right = Sweep(case, subject.conventions).gradients
        return not all(close(got[name], right[name].astype(case.dtype)) for name in _leaves(case.network))

    return judge


def _close_to_torch(got: np.ndarray, right: np.ndarray) -> bool:
    import torch

    dtype = getattr(torch, str(right.dtype))
    try:
        torch.testing.assert_close(*(torch.tensor(each.astype(np.float64), dtype=dtype) for each in (got, right)))
    except AssertionError:
        return False
    return True


def _close_to_numpy(got: np.ndarray, right: np.ndarray) -> bool:
    try:
        np.testing.assert_allclose(upcast(got), upcast(right))
    except AssertionError:
        return False
    return True


FIXED: dict[str, Close] = {
    "torch.testing.assert_close": _close_to_torch,
    "np.testing.assert_allclose": _close_to_numpy,
    "np.allclose": lambda got, right: bool(np.allclose(upcast(got), upcast(right))),
    "np.allclose(rtol=1e-3, atol=1e-3)": lambda got, right: bool(
        np.allclose(upcast(got), upcast(right), rtol=1e-3, atol=1e-3)
    ),
}
"""Fixed tolerances as people use them: the defaults, and what is commonly typed."""


def _gradchecks(adapter: Any) -> Iterator[Tool]:
    yield Tool("torch.autograd.gradcheck", STEPPED, _gradcheck(adapter, fast_mode=False))
    yield Tool("torch.autograd.gradcheck(fast_mode=True)", STEPPED, _gradcheck(adapter, fast_mode=True))


def _gradcheck(adapter: Any, fast_mode: bool) -> Judge:
    import torch
    from torch.autograd.gradcheck import GradcheckError

    def judge(scene: Scene, plant: Plant | None) -> bool:
        case = scene.case
        tensors = {name: adapter.tensor(value, case.dtype) for name, value in case.values.items()}
        names = _leaves(case.network)

        def run(*leaves: Any) -> Any:
            known = tensors | dict(zip(names, leaves, strict=True))
            if plant:
                known[plant.victim] = _torch_identity(plant, known[plant.victim])
            for node in case.network.nodes:
                known[node.name] = adapter.call(node, known)
            return known[case.network.output]

        try:
            torch.autograd.gradcheck(run, [tensors[name] for name in names], fast_mode=fast_mode)
        except GradcheckError:
            return True
        return False

    return judge


def _torch_identity(plant: Plant, x: Any) -> Any:
    """The tensor as it is, its gradient with the fault."""
    import torch

    factors = torch.tensor(plant.factors(tuple(x.shape)))

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Any) -> Any:
            return x.view_as(x)

        @staticmethod
        def backward(context: Any, *douts: Any) -> Any:
            return (factors * douts[0]).to(douts[0].dtype)

    identity: Any = Identity  # torch has no types for it
    return identity.apply(x)


def _check_grads(adapter: Any) -> Iterator[Tool]:
    """Order 1 must be said, and of the modes only reverse: a fault in a vjp leaves the function no jvp."""
    from jax.test_util import check_grads

    def judge(scene: Scene, plant: Plant | None) -> bool:
        case = scene.case
        names = _leaves(case.network)
        taps = {node.name: np.zeros(case.network.shapes[node.name], case.dtype) for node in case.network.nodes}

        def run(*leaves: Any) -> Any:
            known: dict[str, Any] = {**case.values, **dict(zip(names, leaves, strict=True))}
            if plant:
                known[plant.victim] = _jax_identity(plant, known[plant.victim])
            for node in case.network.nodes:
                known[node.name] = adapter.run_node(node, known, taps[node.name])
            return known[case.network.output]

        try:
            check_grads(run, [case.values[name] for name in names], order=1, modes=["rev"])
        except AssertionError:
            return True
        return False

    yield Tool("jax.test_util.check_grads", STEPPED, judge)


def _jax_identity(plant: Plant, x: Any) -> Any:
    """The array as it is, its gradient with the fault."""
    import jax

    factors = plant.factors(x.shape)
    identity = jax.custom_vjp(lambda x: x)
    identity.defvjp(lambda x: (x, None), lambda _, dout: ((factors * dout).astype(dout.dtype),))
    return identity(x)


NUMERICAL: dict[str, Callable[[Any], Iterator[Tool]]] = {"torch": _gradchecks, "jax": _check_grads}
"""Each framework's own checks by finite differences."""


def table(found: Graded) -> str:
    """The comparison in Markdown: one row per tool and dtype."""
    head = ("tool", "dtype", "networks", "false alarms", "errors", "scaled: k", "one element: k", "s per network")
    lines = [_line(head), _line(["---"] * 3 + ["---:"] * 5)]
    for row in found.rows:
        shares = (f"{row.share(verdict):.0%}" for verdict in (CAUGHT, FAILED))
        finest = (_finest(row, planted) for planted in (SCALED, ELEMENT))
        lines.append(_line([row.tool, row.dtype, str(len(row.sound)), *shares, *finest, f"{row.seconds:.2g}"]))
    return "\n".join(lines)


def _finest(row: Row, planted: str) -> str:
    if row.share(PASSED) < USABLE:
        return "-"
    k = row.finest(planted)
    return "none" if k is None else str(k)


def shares_table(found: Graded) -> str:
    """Of the networks that pass with nothing planted, the share in which each k is caught, in Markdown."""
    ks = sorted({k for row in found.rows for k in row.ks()})
    lines = [_line(["tool", "dtype", "planted", *(f"k={k}" for k in ks)]), _line(["---"] * 3 + ["---:"] * len(ks))]
    for row in found.rows:
        for planted in (SCALED, ELEMENT):
            shares = ("-" if row.share(PASSED) < USABLE else f"{row.caught(planted, k):.0%}" for k in ks)
            lines.append(_line([row.tool, row.dtype, planted, *shares]))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def told(found: Graded) -> str:
    """What was done and how the table is to be read, in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    counts = [f"{dtype}: {_reasons(reasons) or 'none'}" for dtype, reasons in found.left_out.items()]
    return TOLD.format(
        drawn=found.drawn, seed=found.seed, versions=versions, left_out="; ".join(counts), share=f"{RELIABLY:.0%}"
    )


def _reasons(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count} where {reason}" for reason, count in sorted(reasons.items()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the tables; 2 where a framework is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m gradproof.graded",
        description="How small a fault in a gradient is still caught: by gradproof, by gradcheck and check_grads, and "
        "by fixed tolerances, all on the same random networks. In each network the gradient of one input or parameter "
        "is multiplied by 1 + 10^-k, whole or in one element, and every tool is asked; so is it with nothing planted.",
        epilog="Prints Markdown: one row per tool and dtype, then the share caught for every k. A quick look: "
        "python -m gradproof.graded --networks 5 --framework torch",
    )
    parser.add_argument("--networks", type=_at_least_one, default=NETWORKS, help=f"to draw (default {NETWORKS})")
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
    text = "\n\n".join([told(found), table(found), shares_table(found)])
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
