"""Measure what the verdict catches and how many digits of the reference are right, into docs/trust.md.

Run `python -m gradproof.trust.measure`; every figure of a section comes from one run. `gradproof.trust.mutants` and
`gradproof.trust.soak` write the sections of theirs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mpmath
from rich.console import Console

from gradproof.draw.drawing import MAX_NODES, Drawn, draw_each
from gradproof.draw.joining import NODES, Surroundings, ordinary_parts
from gradproof.model.case import Case
from gradproof.run.check import check
from gradproof.run.results import Report
from gradproof.show.progress import tracked
from gradproof.trust import accuracy, sums
from gradproof.trust.faults import FAULTS, Fault
from gradproof.trust.sections import TRUST_PAGE, SectionError, versions, write_section
from gradproof.verdict.examination import Examination
from gradproof.verdict.examine import examine
from gradproof.verdict.kinks import probed_subject

NETWORKS = 200
"""Networks within which every planted fault must be caught."""

BURIALS = 3
"""Networks of about 30 nodes in which that is buried which caught a fault."""

DRAWN = 3
"""As many more, in each of which another drawn network with the faulty layer is buried."""

TIMEOUT = 0.5
"""Seconds that a planted fault may take for one network."""

FAULTS_SECTION = """\
{caught} of {planted} were caught within {networks} networks of 1 to {max_nodes} nodes, and blamed on the right layer;
the median took {median:g} networks and {seconds:.2f} s, the slowest was `{slowest}` with {most} networks.

In about {nodes} nodes: {deep} of {planted} were caught, and blamed on the right layer alone wherever they showed. The
network that caught a fault was put among others without the faulty layer, in {burials} networks of {fewest} to
{largest} nodes, and so were {drawn} more with that layer (`gradproof/draw/joining.py`). The faults showed in {shown} of
these {tried}, and were blamed right in {right}.

{versions}, seed {seed}.
"""

DIGITS_SECTION = """\
{table}

{versions}.
"""

SUMS_SECTION = """\
{agreeing} of {layers} layers agree.

{table}

{versions}, seed {seed}.
"""


@dataclass(frozen=True)
class Catch:
    """How a planted fault was caught: after how many networks and seconds, and whether the right layer was blamed."""

    fault: Fault
    report: Report
    seconds: float

    @property
    def blamed(self) -> set[str]:
        """The layers that were culprits."""
        return _blamed(each for each, _ in self.report.examinations)

    @property
    def right(self) -> bool:
        """Whether something disagreed, and exactly the faulty layer was blamed; none for a fault between layers."""
        return not self.report.agrees and self.blamed == _guilty(self.fault)

    @property
    def case(self) -> Case | None:
        """That of the first network that disagreed."""
        return next((each.case for each, _ in self.report.examinations), None)


@dataclass(frozen=True)
class DeepCatch:
    """What became of a planted fault in networks of about 30 nodes."""

    fault: Fault
    examinations: tuple[Examination, ...]

    @property
    def shown(self) -> list[Examination]:
        """Those in which something disagreed."""
        return [each for each in self.examinations if not each.agrees]

    @property
    def blamed_right(self) -> list[Examination]:
        """Those in which exactly the faulty layer was blamed; none for a fault between layers."""
        return [each for each in self.shown if _blamed([each]) == _guilty(self.fault)]

    @property
    def right(self) -> bool:
        """Whether it showed, and was blamed right wherever it did."""
        return bool(self.shown) and len(self.shown) == len(self.blamed_right)


def _blamed(examinations: Iterable[Examination]) -> set[str]:
    return {culprit.node.layer.name for each in examinations for culprit in each.culprits}


def _guilty(fault: Fault) -> set[str]:
    return {fault.layer} if fault.layer else set()


def catch(fault: Fault, seed: int) -> Catch:
    """Run the fault on networks with its layer, to the first that disagrees."""
    started = time.perf_counter()
    report = check(
        [fault.make()],
        networks=NETWORKS,
        seed=seed,
        layers=[fault.layer] if fault.layer else [],
        failures=None,
        timeout=TIMEOUT,
        stop_at_first=True,
    )
    return Catch(fault, report, time.perf_counter() - started)


def catch_deep(found: Catch, surroundings: Surroundings, seed: int) -> DeepCatch:
    """Bury the network that caught the fault, and others with its layer, in larger ones, and examine these."""
    fault, case = found.fault, found.case
    if case is None:
        return DeepCatch(fault, ())
    drawn: list[Drawn] = []
    draw_each(drawn.append, DRAWN, seed, sorted(_guilty(fault)))
    small = [*[case] * BURIALS, *(each.case(case.dtype) for each in drawn)]
    layers = {node.layer.name for node in case.network.nodes} | _guilty(fault)
    subject, _ = probed_subject(fault.make(), case.dtype, TIMEOUT, layers)
    deep = [surroundings.bury(each, seed + k, apart=_guilty(fault)) for k, each in enumerate(small)]
    return DeepCatch(fault, tuple(examine(subject, each) for each in deep))


def faults_section(catches: Sequence[Catch], deep: Sequence[DeepCatch], seed: int) -> str:
    """What became of the planted faults, in Markdown."""
    caught = [each for each in catches if each.right]
    slowest = max(caught, key=lambda each: each.report.networks)
    sizes = [len(each.case.network.nodes) for found in deep for each in found.examinations]
    return FAULTS_SECTION.format(
        caught=len(caught),
        planted=len(catches),
        networks=NETWORKS,
        median=statistics.median(each.report.networks for each in caught),
        seconds=statistics.median(each.seconds for each in caught),
        slowest=slowest.fault.name,
        most=slowest.report.networks,
        max_nodes=MAX_NODES,
        nodes=NODES,
        deep=sum(each.right for each in deep),
        burials=BURIALS,
        drawn=DRAWN,
        fewest=min(sizes),
        largest=max(sizes),
        shown=sum(len(each.shown) for each in deep),
        tried=len(sizes),
        right=sum(len(each.blamed_right) for each in deep),
        versions=versions(),
        seed=seed,
    )


def digits_section(found: Sequence[accuracy.Accuracy]) -> str:
    """The errors of the elementwise layers, in Markdown."""
    return DIGITS_SECTION.format(table=accuracy.table(found), versions=f"{versions()}, mpmath {mpmath.__version__}")


def sums_section(found: Sequence[sums.Digits], seed: int) -> str:
    """The errors of the layers that add up numbers, in Markdown."""
    return SUMS_SECTION.format(
        agreeing=sum(each.agrees for each in found),
        layers=len(found),
        table=sums.table(found),
        versions=f"{versions()}, mpmath {mpmath.__version__}",
        seed=seed,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the sections; 1 where a fault or digits are missed, 2 where the page lacks their places."""
    parser = argparse.ArgumentParser(prog="python -m gradproof.trust.measure", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="what is drawn hangs on it (default 1)")
    parser.add_argument("--page", type=Path, default=TRUST_PAGE, metavar="FILE", help=f"default {TRUST_PAGE}")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    catches = [catch(each, options.seed) for each in tracked(FAULTS.values(), len(FAULTS), "planted faults")]
    surroundings = Surroundings(ordinary_parts(options.seed))
    deep = [catch_deep(each, surroundings, options.seed) for each in tracked(catches, len(catches), "the same, buried")]
    found = [
        each
        for name in tracked(accuracy.DEFINITIONS, len(accuracy.DEFINITIONS), "elementwise layers")
        for each in accuracy.accuracies_of(name)
    ]
    added = list(tracked(sums.all_digits(seed=options.seed), len(sums.DEFINITIONS), "layers that add up"))
    try:
        write_section(options.page, "faults", faults_section(catches, deep, options.seed))
        write_section(options.page, "digits", digits_section(found))
        write_section(options.page, "sums", sums_section(added, options.seed))
    except SectionError as error:
        console.print(f"error: {error}", style="red", highlight=False)
        return 2
    missed = [each.fault.name for each in catches if not each.right]
    astray = [each.fault.name for each in deep if not each.right]
    lost = [each.layer for each in added if not each.agrees]
    lost += [each.layer for each in found if not each.reaches_the_goal]
    caught, deeply = len(catches) - len(missed), len(deep) - len(astray)
    print(f"trust: planted={len(catches)} caught={caught} caught_in_{NODES}_nodes={deeply}")
    for name in missed:
        console.print(f"missed, or blamed on another layer: {name}", style="red", highlight=False)
    for name in astray:
        console.print(f"missed in {NODES} nodes, or blamed on another layer: {name}", style="red", highlight=False)
    for name in lost:
        console.print(f"lacks digits of its exact definition: {name}", style="red", highlight=False)
    return int(bool(missed or astray or lost))


if __name__ == "__main__":
    raise SystemExit(main())
