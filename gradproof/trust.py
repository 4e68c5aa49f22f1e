"""Measure what the verdict catches and how many digits of the reference are right, into docs/trust.md.

Run `python -m gradproof.trust`; every figure of a section comes from one run. `gradproof.mutants` and
`gradproof.soak` write the sections of theirs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mpmath
from rich.console import Console

from gradproof import accuracy, sums
from gradproof.check import Report, check
from gradproof.faults import FAULTS, Fault
from gradproof.progress import tracked
from gradproof.sections import TRUST_PAGE, SectionError, versions, write_section

NETWORKS = 200
"""Networks within which every planted fault must be caught."""

TIMEOUT = 0.5
"""Seconds that a planted fault may take for one network."""

FAULTS_SECTION = """\
{caught} of {planted} were caught within {networks} networks, and blamed on the right layer; the median took
{median:g} networks and {seconds:.2f} s, the slowest was `{slowest}` with {most} networks.

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
        return {culprit.node.layer.name for each, _ in self.report.examinations for culprit in each.culprits}

    @property
    def right(self) -> bool:
        """Whether something disagreed, and exactly the faulty layer was blamed; none for a fault between layers."""
        return not self.report.agrees and self.blamed == ({self.fault.layer} if self.fault.layer else set())


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


def faults_section(catches: Sequence[Catch], seed: int) -> str:
    """What became of the planted faults, in Markdown."""
    caught = [each for each in catches if each.right]
    slowest = max(caught, key=lambda each: each.report.networks)
    return FAULTS_SECTION.format(
        caught=len(caught),
        planted=len(catches),
        networks=NETWORKS,
        median=statistics.median(each.report.networks for each in caught),
        seconds=statistics.median(each.seconds for each in caught),
        slowest=slowest.fault.name,
        most=slowest.report.networks,
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
    parser = argparse.ArgumentParser(prog="python -m gradproof.trust", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="what is drawn hangs on it (default 1)")
    parser.add_argument("--page", type=Path, default=TRUST_PAGE, metavar="FILE", help=f"default {TRUST_PAGE}")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    catches = [catch(each, options.seed) for each in tracked(FAULTS.values(), len(FAULTS), "planted faults")]
    found = [
        each
        for name in tracked(accuracy.DEFINITIONS, len(accuracy.DEFINITIONS), "elementwise layers")
        for each in accuracy.accuracies_of(name)
    ]
    added = list(tracked(sums.all_digits(seed=options.seed), len(sums.DEFINITIONS), "layers that add up"))
    try:
        write_section(options.page, "faults", faults_section(catches, options.seed))
        write_section(options.page, "digits", digits_section(found))
        write_section(options.page, "sums", sums_section(added, options.seed))
    except SectionError as error:
        console.print(f"error: {error}", style="red", highlight=False)
        return 2
    missed = [each.fault.name for each in catches if not each.right]
    lost = [each.layer for each in added if not each.agrees]
    lost += [each.layer for each in found if not each.reaches_the_goal]
    print(f"trust: planted={len(catches)} caught={len(catches) - len(missed)}")
    for name in missed:
        console.print(f"missed, or blamed on another layer: {name}", style="red", highlight=False)
    for name in lost:
        console.print(f"lacks digits of its exact definition: {name}", style="red", highlight=False)
    return int(bool(missed or lost))


if __name__ == "__main__":
    raise SystemExit(main())
