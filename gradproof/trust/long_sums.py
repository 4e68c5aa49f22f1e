"""Long sums kept in bfloat16, which kernels keep in float32: are they told apart?

Three layers that add up many numbers, in bfloat16: each computes with all digits and rounds its results once, but keeps
one sum, taken term after term, in a dtype. Kept in float32 it must be of class inside; kept in bfloat16 it must not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradproof.model.case import Case
from gradproof.model.layer import index_domain
from gradproof.model.network import Input, Network, Node
from gradproof.reference import LAYERS
from gradproof.reference.indexing import Picked
from gradproof.reference.normalization import Standardized
from gradproof.reference.walk import Row
from gradproof.trust.rounded import RoundedOnce
from gradproof.verdict.agreement import judge
from gradproof.verdict.judging import Subject
from gradproof.verdict.running import run

Array = np.ndarray[Any, Any]

DTYPE = "bfloat16"
FINE, COARSE = "float32", "bfloat16"
"""What the sums are kept in."""

TIMEOUT = 60.0
"""Seconds that one run may take."""

TRIES = 20
"""Sets of numbers that each layer is tried on."""

TOKENS, WORDS, WIDTH, TERMS = 4096, 512, 2048, 10_000
"""Tokens looked up in a table of so many rows, by Zipf's law; numbers of a norm; terms of a sum."""


def added_up(terms: Array, axis: int, kept: str) -> Array:
    """The sum over an axis, term after term, each partial sum rounded to the dtype; in float64."""
    partial = np.add.accumulate(np.moveaxis(terms, axis, 0).astype(kept), axis=0, dtype=kept)
    return np.asarray(partial[-1], np.float64)


def sum_row(kept: str) -> Row:
    """out = the sum of a slice along its last axis."""
    layer = LAYERS["reduce_sum"]

    def forward(x: Array, **options: Any) -> tuple[Array, Any]:
        out, cache = layer.forward(x, **options)
        return added_up(x, -1, kept).reshape(out.shape), cache

    return forward, layer.backward


def rms_norm_row(kept: str) -> Row:
    """out = x r weight, r = 1 / sqrt(mean of x^2 + eps), the mean from a sum that is kept in a dtype."""
    layer = LAYERS["rms_norm"]

    def forward(x: Array, weight: Array, *, axes: int, eps: float) -> tuple[Array, Any]:
        mean = added_up(x * x, -1, kept)[..., None] / x.shape[-1]
        reciprocal = 1.0 / np.sqrt(mean + eps)
        return x * reciprocal * weight, Standardized(x * reciprocal, reciprocal, weight, (-1,))

    return forward, layer.backward


def embedding_row(kept: str) -> Row:
    """dweight_r = the sum of dout where r was picked, token after token."""
    layer = LAYERS["embedding"]

    def backward(dout: Array, picked: Picked) -> dict[str, Array]:
        dweight = np.zeros(picked.weight_shape, kept)
        for index, each in zip(picked.indices, dout.astype(kept), strict=True):
            dweight[index] += each
        dweight[picked.padding_idx] = 0.0
        return {"weight": dweight.astype(np.float64)}

    return layer.forward, backward


@dataclass(frozen=True)
class LongSum:
    """A layer that adds up many numbers. row: with its sum kept in a dtype. case: it alone, on numbers of a seed."""

    layer: str
    what: str
    row: Callable[[str], Row]
    case: Callable[[int], Case]

    def told(self, kept: str, seed: int) -> bool:
        """Whether class inside does not explain it, on these numbers, where its sum is kept so."""
        case, adapter = self.case(seed), RoundedOnce(rows={self.layer: self.row(kept)})
        trace = run(adapter, case, TIMEOUT)
        equations = Subject(adapter, {}).equations(case, trace.got)
        return any(judge(each, trace.got.get(each.key), DTYPE).kind for each in equations)


def _alone(node: Node, inputs: Mapping[str, Input], values: Mapping[str, Array], draw: np.random.Generator) -> Case:
    network = Network(tuple(inputs.values()), (node,))
    rounded = {name: value if value.dtype.kind == "i" else value.astype(DTYPE) for name, value in values.items()}
    return Case(network, DTYPE, rounded, draw.standard_normal(network.shapes[node.name]).astype(DTYPE))


def _sum(seed: int) -> Case:
    draw = np.random.default_rng(seed)
    node = Node.of("out", LAYERS["reduce_sum"], "x", options={"axes": (1,)})
    return _alone(node, {"x": Input("x", (8, TERMS))}, {"x": draw.standard_normal((8, TERMS))}, draw)


def _rms_norm(seed: int) -> Case:
    draw = np.random.default_rng(seed)
    node = Node.of("out", LAYERS["rms_norm"], "x", options={"axes": 1}, parameters={"weight": "w"})
    values = {"x": draw.standard_normal((8, WIDTH)), "w": draw.standard_normal(WIDTH)}
    return _alone(node, {"x": Input("x", (8, WIDTH))}, values, draw)


def _embedding(seed: int) -> Case:
    draw = np.random.default_rng(seed)
    shares = 1.0 / np.arange(1, WORDS + 1)
    indices = draw.choice(WORDS, TOKENS, p=shares / shares.sum())
    options = {"rows": WORDS, "width": 4, "padding_idx": WORDS - 1}
    node = Node.of("out", LAYERS["embedding"], "i", options=options, parameters={"weight": "w"})
    values = {"i": indices, "w": draw.standard_normal((WORDS, 4))}
    return _alone(node, {"i": Input("i", (TOKENS,), index_domain(WORDS))}, values, draw)


LONG_SUMS = (
    LongSum("embedding", f"dweight from {TOKENS:,} tokens by Zipf's law", embedding_row, _embedding),
    LongSum("rms_norm", f"mean of {WIDTH:,} squares", rms_norm_row, _rms_norm),
    LongSum("reduce_sum", f"sum of {TERMS:,} numbers", sum_row, _sum),
)


def told_apart(seed: int, tries: int = TRIES) -> str:
    """How often each is told from one in float32, in Markdown."""
    lines = [
        f"Sums kept in {COARSE}, term after term, in layers that round nothing else but their results: how often they "
        f"disagree when held to class inside, beside the same with sums in {FINE}.",
        "",
        f"| layer | sum | {COARSE} sums told | {FINE} sums told |",
        "|---|---|---:|---:|",
    ]
    for each in LONG_SUMS:
        counts = (sum(each.told(kept, seed + k) for k in range(tries)) for kept in (COARSE, FINE))
        lines.append(f"| {each.layer} | {each.what} | {' | '.join(f'{count} of {tries}' for count in counts)} |")
    return "\n".join(lines)
