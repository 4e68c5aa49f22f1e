"""Factors that only many networks show: how many of those that are planted are found, and what is told without any.

In bfloat16 a gradient that is always 0.1 % too large is within one rounding each time.
Run `python -m gradproof.trust.factors`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from gradproof.draw.drawing import Drawn, draw_each
from gradproof.model.adapter import AdapterError
from gradproof.model.case import upcast
from gradproof.model.dtypes import HALF
from gradproof.reference import LAYERS, NumpyReference
from gradproof.reference.walk import Row
from gradproof.run.check import UsageError, check
from gradproof.show.progress import progress
from gradproof.trust.rounded import RoundedOnce
from gradproof.trust.sections import write_section

FACTOR = 1.001
NETWORKS = 300
PLANTED = 10
"""Layers that are off by the factor, all at once, in the gradient of their first input."""

FRAMEWORKS = ("torch", "jax")

TRIES, SHARE = 16, 0.1
"""Networks of the layer alone, and the share of their numbers that a planted factor must change."""


@dataclass(frozen=True)
class Found:
    """What a run over many networks told of the adapter in the dtype.

    planted: layer -> the input whose gradient is off. blamed: the layers, for a factor over all networks
    or in one of them, where the factor is more than a rounding.
    """

    adapter: str
    dtype: str
    planted: Mapping[str, str]
    blamed: frozenset[str]

    @property
    def missed(self) -> list[str]:
        return sorted(self.planted.keys() - self.blamed)

    @property
    def others(self) -> list[str]:
        """What was told of layers that are right."""
        return sorted(self.blamed - self.planted.keys())


def shows(layer: str, dtype: str, seed: int) -> str | None:
    """The first input whose gradient a factor changes more than a rounding takes away again; None where none does.

    It takes all away where a layer hands on numbers as it is given them.
    """
    drawn: list[Drawn] = []
    draw_each(drawn.append, TRIES, seed, [layer], 1)
    changed: dict[str, list[bool]] = {}
    for each in drawn:
        case = replace(each, edge_share=0.0, scale=1.0).case(dtype)
        (node,) = case.network.nodes
        reference = NumpyReference()
        forward = reference.forward(case.network, case.exact_values, "float64")
        gradients = reference.backward(forward, upcast(case.cotangent))
        for argument, source in node.sources:
            if source in gradients and len(case.network.consumers[source]) == 1:
                gradient = gradients[source][gradients[source] != 0]
                moved = gradient.astype(dtype) != (FACTOR * gradient).astype(dtype)
                changed.setdefault(argument, []).extend(moved.tolist())
    return next((argument for argument, moved in changed.items() if moved and np.mean(moved) >= SHARE), None)


def scaled(layer: str, place: str) -> Row:
    """The layer with the factor in one gradient."""
    forward, backward = LAYERS[layer].forward, LAYERS[layer].backward

    def changed(dout: np.ndarray, cache: Any) -> dict[str, np.ndarray]:
        return {name: FACTOR * each if name == place else each for name, each in backward(dout, cache).items()}

    return forward, changed


def planted(dtype: str, seed: int, count: int = PLANTED) -> dict[str, str]:
    """So many layers, and the input whose gradient the factor is planted in."""
    found: dict[str, str] = {}
    for layer in np.random.default_rng(seed).permutation(sorted(LAYERS)):
        place = shows(str(layer), dtype, seed) if len(found) < count else None
        if place is not None:
            found[str(layer)] = place
    return found


def look(adapter: str | NumpyReference, dtype: str, seed: int, networks: int, where: Mapping[str, str]) -> Found:
    """Check the adapter, in which factors are planted there, over networks, and take what is told of factors."""
    name = adapter if isinstance(adapter, str) else adapter.name
    with progress(networks, f"networks, {name} {dtype}") as advance:
        report = check(
            [adapter],
            networks=networks,
            seed=seed,
            dtypes=[dtype],
            failures=None,
            progress=lambda so_far: advance(so_far.networks, f"networks, {name} {dtype}"),
            looking=lambda what: advance(networks, f"networks; {what} on more numbers"),
        )
    return Found(name, dtype, where, frozenset(each.layer for each in report.disagreements if each.culprit))


def measured(seed: int, networks: int = NETWORKS, frameworks: Sequence[str] = FRAMEWORKS) -> list[Found]:
    """In each half precision: with factors planted in the reference, then frameworks as they are.

    Raises AdapterError for a framework that is not installed.
    """
    found = []
    for dtype in HALF:
        where = planted(dtype, seed)
        rows = {layer: scaled(layer, place) for layer, place in where.items()}
        found.append(look(RoundedOnce(rows=rows), dtype, seed, networks, where))
        found += [look(name, dtype, seed, networks, {}) for name in frameworks]
    return found


def outcome(found: Sequence[Found], seed: int, networks: int) -> str:
    """The result in Markdown."""
    lines = [
        f"{networks} random networks of seed {seed}. A factor of {FACTOR:g} is planted in the gradient of one input of "
        f"{PLANTED} layers at once, in which a rounding does not take it away again, of an adapter that rounds its "
        "results alone; frameworks are taken as they are.",
        "",
        "| adapter | dtype | planted | found | missed | told of other layers |",
        "|---|---|---:|---:|---|---|",
    ]
    for each in found:
        caught = len(each.planted) - len(each.missed)
        cells = [each.adapter, each.dtype, str(len(each.planted)), str(caught)]
        cells += [", ".join(each.missed) or "none", ", ".join(each.others) or "none"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table; 2 where a framework is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m gradproof.trust.factors",
        description="Which factors of 1.001 in half precision are found over many networks, and whether any is told of "
        "torch and JAX as they are.",
        epilog="Prints Markdown. A quick look: python -m gradproof.trust.factors --networks 100 --framework torch",
    )
    parser.add_argument("--networks", type=int, default=NETWORKS, help=f"to draw (default {NETWORKS})")
    parser.add_argument("--seed", type=int, default=1, help="what is drawn hangs on it (default 1)")
    parser.add_argument("--framework", action="append", choices=FRAMEWORKS, help="repeatable (default: both)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the table into this page")
    options = parser.parse_args(arguments)
    try:
        found = measured(options.seed, options.networks, options.framework or FRAMEWORKS)
    except (AdapterError, UsageError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False)
        return 2
    text = outcome(found, options.seed, options.networks)
    print(text)
    if options.page:
        write_section(options.page, "factors", text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
