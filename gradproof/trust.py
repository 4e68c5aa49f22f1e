"""Write docs/trust.md: what the verdict catches, and how many digits of the reference are right.

Run `python -m gradproof.trust`; every figure in the page comes from that one run.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mpmath
import numpy as np
import scipy
from rich.console import Console
from rich.progress import track

from gradproof import accuracy, mutants
from gradproof.check import check
from gradproof.faults import FAULTS, Fault

NETWORKS = 200
"""Networks within which every planted fault must be caught."""

PAGE = """# What the verdict can be trusted with

Written by `make trust`, seed {seed}, with {versions}.

## Planted faults

Mistakes that people make (`gradproof/faults.py`), each as an adapter that makes it, run on random networks with its
layer until the first disagreement; none, where the probe of the layer's kinks tells. {caught} of {planted} were caught
within {networks} networks, and blamed on the right layer; the median took {median:g} networks and {seconds:.2f} s,
the slowest was `{slowest}` with {most} networks.

## Mutants

Mistakes made in the syntax trees of the reference's own backward functions (`gradproof/mutants.py`), {drawn} networks
per layer. Mutants that compute the same are listed with the proof in `gradproof/mutants.toml`.

    {mutants}

{survivors}

## Digits

The largest error of each elementwise layer in float64, in units in the last place, over the whole range: subnormal
numbers, saturation, both sides of every kink. True values come from definitions of their own in 50-digit arithmetic,
true derivatives from differences with 1,500 digits (`gradproof/accuracy.py`). The goal is 4. Where a layer loses more,
its formula is the one that frameworks have, which the noise floor takes into account.

{table}
"""


@dataclass(frozen=True)
class Catch:
    """How a planted fault was caught: after how many networks and seconds, and whether the right layer was blamed."""

    fault: Fault
    networks: int
    seconds: float
    blamed: bool


def catch(fault: Fault, seed: int) -> Catch:
    """Run the fault on networks with its layer, to the first that disagrees."""
    started = time.perf_counter()
    report = check(
        [fault.make()],
        networks=NETWORKS,
        seed=seed,
        layers=[fault.layer] if fault.layer else [],
        failures=None,
        timeout=0.5,
        stop_at_first=True,
    )
    layers = {culprit.node.layer.name for each, _ in report.examinations for culprit in each.culprits}
    right = not report.agrees and layers == ({fault.layer} if fault.layer else set())
    return Catch(fault, report.networks, time.perf_counter() - started, right)


def page(
    catches: Sequence[Catch], outcomes: Iterable[mutants.Outcome], found: Sequence[accuracy.Accuracy], seed: int
) -> str:
    """The page in Markdown."""
    caught = [each for each in catches if each.blamed]
    slowest = max(caught, key=lambda each: each.networks)
    line, survived = mutants.summary(outcomes, mutants.read_equivalents())
    return PAGE.format(
        seed=seed,
        versions=versions(),
        caught=len(caught),
        planted=len(catches),
        networks=NETWORKS,
        median=statistics.median(each.networks for each in caught),
        seconds=statistics.median(each.seconds for each in caught),
        slowest=slowest.fault.name,
        most=slowest.networks,
        drawn=mutants.NETWORKS,
        mutants=line,
        survivors="\n".join(_survivors(survived)) or "None survived.",
        table=accuracy.table(found),
    )


def _survivors(survived: Iterable[mutants.Mutant]) -> Iterator[str]:
    for each in survived:
        yield f"- survived: `{each.function}`, {each.mistake}: `{each.mutated}`"


def versions() -> str:
    """What the figures depend on."""
    found = {"Python": platform.python_version(), "NumPy": np.__version__, "SciPy": scipy.__version__}
    return ", ".join(f"{name} {version}" for name, version in (found | {"mpmath": mpmath.__version__}).items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure everything and write the page."""
    parser = argparse.ArgumentParser(prog="python -m gradproof.trust", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="what is drawn hangs on it (default 1)")
    parser.add_argument("--output", type=Path, default=Path("docs/trust.md"), help="the page (default docs/trust.md)")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    catches = [catch(each, options.seed) for each in track(FAULTS.values(), "planted faults", console=console)]
    functions = track(mutants.backward_functions(), "mutants of functions", console=console)
    outcomes = [outcome for each in functions for outcome in mutants.judge_all(each, mutants.NETWORKS, options.seed)]
    found = list(track(accuracy.accuracies(), "digits of layers", total=None, console=console))
    options.output.write_text(page(catches, outcomes, found, options.seed))
    console.print(f"written: {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
