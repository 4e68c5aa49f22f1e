"""What a run has found: disagreements, tallies, stale entries and factors, in one report that is also JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from gradproof.model.spec import json_safe
from gradproof.model.tensors import WHOLE_RUN, Role, Wrong
from gradproof.verdict.bias import Bias
from gradproof.verdict.divergence import Divergence
from gradproof.verdict.examination import Examination
from gradproof.verdict.rows import Row, Verdict, rows

SCHEMA = 1
TOO_LITTLE = 0.25
"""The share of unverifiable elements above which a run says that it verified too little."""


@dataclass(frozen=True)
class Disagreement:
    """One tensor on which an adapter disagrees. Fields as in the JSON of `gradproof check`."""

    adapter: str
    dtype: str
    network: str
    node: str
    layer: str
    tensor: str
    kind: str
    max_error: float | None
    noise_units: float
    bound: bool
    index: tuple[int, ...] | None
    expected: Any
    got: Any
    culprit: bool
    cause: str | None
    spec: str | None


@dataclass
class Tally:
    """Counts for one adapter in one dtype.

    networks: examined. unsupported: layer, and what the adapter says of it -> networks that were
    not run, because the adapter lacks it there.
    disagreeing, known: networks with a disagreement, with known divergences alone. gradients: tensors compared.
    elements, unverifiable: of all tensors. worst: the most noise units that were measured of a tensor that agrees.
    accuracy: (layer, algorithm) -> tensors in which an honest algorithm loses digits.
    layers: layer name -> networks that it stood in. wrong_layers: layer name -> networks in which it was a culprit.
    """

    networks: int = 0
    unsupported: Counter[str] = field(default_factory=Counter)
    disagreeing: int = 0
    known: int = 0
    gradients: int = 0
    elements: int = 0
    unverifiable: int = 0
    worst: float = 0.0
    accuracy: Counter[tuple[str, str]] = field(default_factory=Counter)
    layers: Counter[str] = field(default_factory=Counter)
    wrong_layers: Counter[str] = field(default_factory=Counter)

    @property
    def unverifiable_share(self) -> float:
        return self.unverifiable / max(self.elements, 1)

    def add(self, examination: Examination) -> None:
        checks = examination.checks
        self.networks += 1
        self.disagreeing += not (examination.agrees or examination.known)
        self.known += examination.known
        self.gradients += sum(check.key.role is Role.GRADIENT for check in checks)
        self.elements += sum(check.elements for check in checks)
        self.unverifiable += sum(check.unverifiable for check in checks)
        measured = (check.noise_units for check in checks if not (check.kind or check.bound or check.algorithm))
        self.worst = max([self.worst, *measured])
        self.accuracy.update(examination.accuracy)
        self.layers.update({node.layer.name for node in examination.case.network.nodes})
        self.wrong_layers.update(
            {culprit.node.layer.name for culprit in examination.culprits if not culprit.divergence}
        )


@dataclass(frozen=True)
class Stale:
    """A known divergence that no longer shows, which is an error in its file."""

    adapter: str
    dtype: str
    divergence: Divergence


@dataclass(frozen=True)
class Biased:
    """A factor that only many networks show, of one adapter in one dtype, and the spec that shows it best."""

    adapter: str
    dtype: str
    bias: Bias
    spec: str | None


@dataclass
class Report:
    """The result of a check.

    adapters: name -> version. requests: name -> what the adapter was asked for by.
    networks: drawn, each examined with every adapter in every dtype.
    conventions: adapter -> dtype -> layer -> kink -> weight of the right-hand derivative.
    arithmetic: adapter -> dtype -> layer -> class of its arithmetic, of the layers that are not of the finest.
    beside: disagreements of layers that were not asked for, where some were; they leave the verdict alone.
    biased: factors that only many networks show. examinations: those that disagreed and are not known, for the
    per-layer diff. interrupted: ended by Ctrl-C.
    """

    seed: int
    dtypes: tuple[str, ...]
    adapters: dict[str, str]
    requests: dict[str, str]
    networks: int = 0
    seconds: float = 0.0
    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)
    conventions: dict[str, dict[str, dict[str, dict[str, float]]]] = field(default_factory=dict)
    arithmetic: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)
    disagreements: list[Disagreement] = field(default_factory=list)
    beside: list[Disagreement] = field(default_factory=list)
    known: list[Disagreement] = field(default_factory=list)
    stale: list[Stale] = field(default_factory=list)
    biased: list[Biased] = field(default_factory=list)
    examinations: list[tuple[Examination, str | None]] = field(default_factory=list)
    interrupted: bool = False

    @property
    def gradients_compared(self) -> int:
        return sum(tally.gradients for tally in self.tallies.values())

    @property
    def agrees(self) -> bool:
        """Whether every adapter examined networks in every dtype, and none disagreed."""
        examined = bool(self.tallies) and all(tally.networks for tally in self.tallies.values())
        return examined and not self.disagreements and not self.stale

    def to_json(self) -> dict[str, Any]:
        unverifiable: dict[str, dict[str, float]] = {name: {} for name in self.adapters}
        for (adapter, dtype), tally in self.tallies.items():
            unverifiable[adapter][dtype] = tally.unverifiable_share
        return json_safe(
            {
                "schema": SCHEMA,
                "seed": self.seed,
                "seconds": self.seconds,
                "networks": self.networks,
                "gradients_compared": self.gradients_compared,
                "adapters": self.adapters,
                "disagreements": [vars(each) for each in self.disagreements],
                "known": [vars(each) for each in self.known],
                "unverifiable": unverifiable,
                "unsupported": {
                    adapter: {d: t.unsupported.total() for (a, d), t in self.tallies.items() if a == adapter}
                    for adapter in self.adapters
                },
                "stale_divergences": [
                    {"adapter": each.adapter, "layer": each.divergence.layer, "dtype": each.dtype}
                    for each in self.stale
                ],
                "bias": [
                    {
                        "adapter": each.adapter,
                        "dtype": each.dtype,
                        "layer": each.bias.layer,
                        "of": each.bias.place,
                        "factor": each.bias.factor,
                        "standard_error": each.bias.standard_error,
                        "tensors": each.bias.tensors,
                        "spec": each.spec,
                    }
                    for each in self.biased
                ],
                "conventions": self.conventions,
                "arithmetic": self.arithmetic,
                "accuracy": [
                    {"adapter": adapter, "dtype": dtype, "layer": layer, "algorithm": algorithm, "tensors": tensors}
                    for (adapter, dtype), tally in self.tallies.items()
                    for (layer, algorithm), tensors in sorted(tally.accuracy.items())
                ],
                "beside": [vars(each) for each in self.beside],
                "interrupted": self.interrupted,
            }
        )


def wrong_rows(examination: Examination) -> list[Row]:
    return [row for row in rows(examination) if row.check.kind and row.verdict is not Verdict.INHERITED]


def disagreements(examination: Examination, spec: str | None) -> list[Disagreement]:
    """The wrong tensors from the loss back, with the `cause` where a known divergence or mistake explains one."""
    return [_disagreement(examination, row, spec) for row in wrong_rows(examination)]


def _disagreement(examination: Examination, row: Row, spec: str | None) -> Disagreement:
    check = row.check
    return Disagreement(
        adapter=examination.adapter,
        dtype=examination.case.dtype,
        network=str(examination.case.network),
        node=row.node,
        layer=row.layer,
        tensor=check.key.name,
        kind=_kind(row),
        max_error=check.max_error,
        noise_units=check.noise_units,
        bound=check.bound,
        index=check.index,
        expected=check.expected,
        got=check.got,
        culprit=row.culprit,
        cause=row.cause,
        spec=spec,
    )


def _kind(row: Row) -> str:
    """What is wrong with a tensor; "composition" where it is in its numbers, and by no layer's fault."""
    between = row.verdict is Verdict.COMPOSITION and row.check.kind not in (*WHOLE_RUN, Wrong.REUSED_BUFFER)
    return Verdict.COMPOSITION if between else str(row.check.kind)
