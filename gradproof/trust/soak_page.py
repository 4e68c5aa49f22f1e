"""What a soak has found, as a section of a page: how far from the threshold the errors stayed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from gradproof.trust.soak_outcome import DRAWS, Distribution, Outcome, Plan
from gradproof.verdict.agreement import THRESHOLD, WHOLE_ROUNDINGS

PAGE = """\
{line}

{versions}, seed {seed}. {draws} sets of numbers for each graph; the dtypes take turns from graph to graph. Errors are
in noise units, of the tensors that agree; the threshold is {threshold:g} for all. "Not measured" is the share of
tensors whose error is within a few roundings of the result ({roundings}), so that no noise was measured: they are in no
quantile. "Nothing said" is the share of elements that are unverifiable.
"Known" counts the networks that a known divergence of the framework explains (`adapters/*.toml`).

{totals}

Per layer, for {columns}: 99.9 % and the largest.

{layers}
"""


def page(outcome: Outcome, plan: Plan, versions: Mapping[str, str]) -> str:
    """The distribution of errors in Markdown."""
    pairs = [(adapter, dtype) for adapter in plan.adapters for dtype in plan.dtypes]
    return PAGE.format(
        line=outcome.closing_line,
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        seed=plan.seed,
        draws=DRAWS,
        threshold=THRESHOLD,
        roundings=", ".join(f"{each:g} in {dtype}" for dtype, each in WHOLE_ROUNDINGS.items()),
        totals="\n".join(_totals(outcome, pairs)),
        columns=", ".join(f"{adapter} {dtype}" for adapter, dtype in pairs),
        layers="\n".join(_layers(outcome, pairs)),
    )


def _totals(outcome: Outcome, pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    figures = ("median", "99 %", "99.9 %", "max", "nothing said", "known", "not supported")
    yield f"| {' | '.join(('adapter, dtype', 'tensors', 'not measured', *figures))} |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for adapter, dtype in pairs:
        where, together = f"{adapter} {dtype}", outcome.distribution(adapter, dtype)
        tensors = outcome.tensors[where]
        quantiles = [*(together.quantile(share) for share in (0.5, 0.99, 0.999)), together.largest]
        cells = [f"{tensors}", f"{outcome.within[where] / max(tensors, 1):.1%}", *(f"{each:.2g}" for each in quantiles)]
        cells += [f"{outcome.unverifiable[where] / max(outcome.elements[where], 1):.2%}"]
        cells += [f"{outcome.known[where]}", f"{outcome.unsupported[where]}"]
        yield f"| {where} | {' | '.join(cells)} |"


def _layers(outcome: Outcome, pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    yield f"| layer | {' | '.join(f'{adapter} {dtype}' for adapter, dtype in pairs)} |"
    yield "|---" * (len(pairs) + 1) + "|"
    for layer in sorted({layer for *_, layer in outcome.units}):
        cells = (_cell(outcome.units.get((*pair, layer))) for pair in pairs)
        yield f"| {layer} | {' | '.join(cells)} |"


def _cell(distribution: Distribution | None) -> str:
    return f"{distribution.quantile(0.999):.2g}, {distribution.largest:.2g}" if distribution else ""
