"""What overflows or vanishes on the way, and what its known divergences excuse beside it: nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from gradproof.model.adapter import Forward
from gradproof.model.layer import Layer
from gradproof.model.network import Network
from gradproof.model.options import Options
from gradproof.reference import LAYERS, NumpyReference
from gradproof.verdict.examination import Examination
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject
from gradproof.verdict.kinks import one_node
from helpers.divergences import built_in

Array = np.ndarray[Any, Any]


class Spoiling(NumpyReference):
    """The reference, rounded to float16, with a part of one gradient changed."""

    name = "jax"

    def __init__(self, layer: str, argument: str, spoil: Callable[[Array], Array]) -> None:
        self.argument = argument
        super().__init__(rows={layer: (LAYERS[layer].forward, self._backward_of(layer, spoil))})

    def version(self) -> str:
        return "0.10.2"

    def supports(self, layer: Layer, options: Options, dtype: str) -> bool:
        return True

    def _backward_of(self, layer: str, spoil: Callable[[Array], Array]) -> Callable[..., Any]:
        def backward(dout: Array, cache: Any) -> dict[str, Array]:
            gradients = LAYERS[layer].backward(dout, cache)
            return {**gradients, self.argument: spoil(np.array(gradients[self.argument], float))}

        return backward

    def forward(self, network: Network, values: Mapping[str, Array], dtype: str) -> Forward:
        exact = {n: v.astype(float) if v.dtype.kind != "i" else v for n, v in values.items()}
        forward = super().forward(network, exact, "float64")
        with np.errstate(all="ignore"):
            return Forward({n: a.astype(dtype) for n, a in forward.outputs.items()}, forward.tape)

    def backward(self, forward: Forward, cotangent: Array) -> dict[str, Array]:
        with np.errstate(all="ignore"):
            found = super().backward(forward, cotangent.astype(float))
            return {n: a.astype(cotangent.dtype) for n, a in found.items()}


def nothing_but_nan(gradient: Array) -> Array:
    return np.full_like(gradient, np.nan)


VERSIONS = {"torch": "2.13.0", "jax": "0.10.2"}


NONE = {"reduction": "none"}

OVERFLOWING = [
    ("jax", "layer_norm", {}, "x", {"x": [[0.013, -0.014, 0.004]]}, {"x": [[1.0, 2.0, 4.0]]}, 1.0, 1.0),
    ("jax", "layer_norm", {}, "x", {"x": [[1.0, 2.0, 4.0]]}, {"x": [[1.0, 2.0, 4.0]]}, 1000.0, 1.0),
    (
        *("jax", "weight_norm", {"features": 3}, "direction"),
        *({"x": [1.0, -0.5], "direction": 4.0}, {"x": [1.0, -0.5]}, 1000.0, 1.0),
    ),
    ("torch", "squareplus", {"b": 4.0}, "x", {"x": [5772.0]}, {"x": [5772.0]}, 50.0, 1.0),
    *(
        ("jax", "half_squared_error", NONE, argument, {**here, argument: 40000.0}, {**here, argument: 100.0}, 0.1, 0.1)
        for argument, here in (("x", {"target": 0.0}), ("target", {"x": 0.0}))
    ),
    *(
        (name, "squared_hinge", NONE, "x", {"x": -41000.0, "target": 1.0}, {"x": -100.0, "target": 1.0}, 0.1, 0.1)
        for name in ("torch", "jax")
    ),
    *(
        (name, "mse", NONE, argument, {**here, argument: 40000.0}, {**here, argument: 100.0}, 0.1, 0.1)
        for name in ("torch", "jax")
        for argument, here in (("x", {"target": 0.0}), ("target", {"x": 0.0}))
    ),
    *(
        (
            "jax",
            "lp_pool",
            {"p": p, "kernel": 2, "stride": 1},
            "x",
            {"x": [[[800.0, 600.0]]]},
            {"x": [[[0.8, 0.6]]]},
            300.0,
            300.0,
        )
        for p in (2, 3)
    ),
    *((name, "square", {}, "x", {"x": [40000.0]}, {"x": [30000.0]}, 0.001, 0.001) for name in ("torch", "jax")),
    (
        *("jax", "dice", {"squared": True, "smooth": 1e-5, "reduction": "none"}, "x"),
        *({"x": [[0.02, 0.03]], "target": [[0.01, 0.02]]}, {"x": [[0.2, 0.3]], "target": [[0.1, 0.2]]}, 1.0, 1.0),
    ),
    (
        *("torch", "triplet_margin", {"p": 3.0, **NONE}, "anchor"),
        {"anchor": [[0.004, 0.001]], "positive": [[0.0, 0.0]], "negative": [[0.5, 0.25]]},
        {"anchor": [[0.5, 0.25]], "positive": [[3.0, 1.0]], "negative": [[0.0, 0.0]]},
        *(1.0, 1.0),
    ),
]
"""Framework, layer, options, argument, numbers at which its float16 gradient may overflow, numbers at which it may not,
and what the cotangent is multiplied by in either case."""


@pytest.mark.parametrize(("name", "layer", "options", "argument", "there", "elsewhere", "scale", "other"), OVERFLOWING)
def test_an_overflow_on_the_way_excuses_what_is_not_finite_where_it_can_occur(
    name: str,
    layer: str,
    options: Options,
    argument: str,
    there: Mapping[str, Any],
    elsewhere: Mapping[str, Any],
    scale: float,
    other: float,
) -> None:
    entries = tuple(e for e in built_in(name) if e.layer == layer and e.applies(VERSIONS[name], "float16"))

    def found(spoil: Callable[[Array], Array], numbers: Mapping[str, Any], factor: float) -> Examination:
        case = one_node(LAYERS[layer], options, numbers, "float16")
        case = replace(case, cotangent=(case.cotangent * np.float16(factor)).astype("float16"))
        return examine(Subject(Spoiling(layer, argument, spoil), {}, entries), case)

    assert found(nothing_but_nan, there, scale).known
    for spoil, numbers, factor in (
        (nothing_but_nan, elsewhere, other),
        (lambda gradient: 1.25 * gradient, there, scale),
        (lambda gradient: gradient + np.abs(gradient).max(), there, scale),
    ):
        examination = found(spoil, numbers, factor)
        assert not examination.agrees
        assert not examination.known


FAR: list[tuple[str, str, Options, str, str, Mapping[str, Any], Mapping[str, Any], float]] = [
    *(
        (name, "square", {}, dtype, "x", {"x": [0.6 * peak]}, {"x": [0.4 * peak]}, 1e-3)
        for name in ("torch", "jax")
        for dtype, peak in (("float64", 1.79e308), ("float32", 3.4e38), ("bfloat16", 3.38e38))
    ),
    *(
        ("torch", "bilinear", {"features": 2}, dtype, "x1", {"x1": [0.01, 0.02], "x2": [0.01, -0.02]}, {}, scale)
        for dtype, scale in (("float64", 1e302), ("float32", 1e32), ("bfloat16", 1e32))
    ),
    *(
        ("jax", "gelu_tanh", {}, dtype, "x", {"x": [0.75, -0.5]}, {}, scale)
        for dtype, scale in (("float64", 1e302), ("float32", 1e32))
    ),
]
"""Framework, layer, options, dtype, argument, numbers at which its gradient may overflow near the end of the range,
others at which it may not (none where that hangs on the incoming gradient), and what the cotangent is multiplied by."""


@pytest.mark.parametrize(("name", "layer", "options", "dtype", "argument", "there", "elsewhere", "scale"), FAR)
def test_near_the_end_of_the_range_nothing_is_excused_but_what_is_not_finite(
    name: str,
    layer: str,
    options: Options,
    dtype: str,
    argument: str,
    there: Mapping[str, Any],
    elsewhere: Mapping[str, Any],
    scale: float,
) -> None:
    entries = tuple(e for e in built_in(name) if e.layer == layer and e.applies(VERSIONS[name], dtype))

    def found(spoil: Callable[[Array], Array], numbers: Mapping[str, Any], factor: float) -> Examination:
        case = one_node(LAYERS[layer], options, numbers, dtype)
        case = replace(case, cotangent=(case.cotangent.astype(float) * factor).astype(dtype))
        return examine(Subject(Spoiling(layer, argument, spoil), {}, entries), case)

    assert found(nothing_but_nan, there, scale).known
    for spoil, numbers, factor in (
        (nothing_but_nan, elsewhere or there, scale if elsewhere else 1.0),
        *((partial(np.multiply, f), there, scale) for f in (0.0, -1.0, 1.25)),
    ):
        examination = found(spoil, numbers, factor)
        assert not examination.agrees
        assert not examination.known


RANGE = {"float32": 1e20, "float64": 1e160}
WINDOWS = {"x": [[[3.0, 4.0, 2.0]]]}
NEAR: Mapping[str, Any] = {"anchor": [[0.5, 2.0]], "positive": [[3.0, 0.5]], "negative": [[0.5, 1.5]]}
BESIDE: list[tuple[str, str, Options, str, str, Mapping[str, Any]]] = [
    *(
        ("torch", "lp_pool", {"p": p, "stride": s}, d, "x", WINDOWS)
        for p in (1, 2, 3)
        for s in (1, 2, 3)
        for d in RANGE
    ),
    *(("jax", "reduce_prod", {}, d, "x", {"x": [3.0, -0.5, 2.0, 1.5]}) for d in RANGE),
    *(("jax", "reduce_prod", {}, d, "x", {"x": [2.0, RANGE[d], 0.5, 3.0]}) for d in RANGE),
    *(
        ("jax", "ctc", {}, d, "logits", {"logits": [[[x, 0.5, 2.0]]], "target_lengths": 1})
        for d in RANGE
        for x in (1, 9)
    ),
    *(("jax", "triplet_margin", {"p": 2.0}, "float32", argument, NEAR) for argument in ("anchor", "positive")),
]
"""Framework, layer, options, dtype, argument, and numbers at which no entry of the layer holds."""


@pytest.mark.parametrize(("name", "layer", "options", "dtype", "argument", "numbers"), BESIDE)
@pytest.mark.parametrize("spoil", [nothing_but_nan, *(partial(np.multiply, f) for f in (0.0, -1.0, 1.25))])
def test_beside_an_entry_no_fault_is_excused(
    name: str,
    layer: str,
    options: Options,
    dtype: str,
    argument: str,
    numbers: Mapping[str, Any],
    spoil: Callable[[Array], Array],
) -> None:
    entries = tuple(e for e in built_in(name) if e.layer == layer and e.applies(VERSIONS[name], dtype))
    assert entries
    case = one_node(LAYERS[layer], LAYERS[layer].defaults | options, numbers, dtype)
    found = examine(Subject(Spoiling(layer, argument, spoil), {}, entries), case)
    assert not found.agrees
    assert not found.known


@pytest.mark.parametrize(
    ("dtype", "there", "elsewhere"),
    [
        ("float32", [1e-25, 1e18, 1e-25, 1e18], [0.5, 2.0, 3.0, 1.0]),
        ("float64", [1e-170, 1e120] * 2, [0.5, 2.0, 3.0, 1.0]),
    ],
)
def test_a_vanishing_product_excuses_no_more_than_the_number(
    dtype: str, there: Sequence[float], elsewhere: Sequence[float]
) -> None:
    entries = tuple(e for e in built_in("torch") if e.layer == "reduce_prod" and e.applies("2.13.0", dtype))
    forward, backward = LAYERS["reduce_prod"].forward, LAYERS["reduce_prod"].backward

    def found(factor: float, numbers: Sequence[float]) -> Examination:
        def spoilt(x: Array, **options: Any) -> tuple[Array, Any]:
            out, cache = forward(x, **options)
            return out * out.dtype.type(factor), cache

        case = one_node(LAYERS["reduce_prod"], {}, {"x": numbers}, dtype)
        return examine(Subject(NumpyReference(rows={"reduce_prod": (spoilt, backward)}), {}, entries), case)

    assert found(0.0, there).known
    for factor, numbers in ((0.0, elsewhere), (3.0, there), (-1.5, there), (math.nan, there)):
        examination = found(factor, numbers)
        assert not examination.agrees
        assert not examination.known


@pytest.mark.parametrize(
    ("x", "slope", "known"),
    [
        (1.0009765625, 0.25, True),
        (1.0009765625, 0.5, True),
        (1.0009765625, 0.51, False),
        (1.0009765625, np.nan, False),
        (1.001953125, 0.25, False),
    ],
)
def test_a_kink_that_lies_one_number_late_excuses_its_slopes_at_that_number(
    x: float, slope: float, known: bool
) -> None:
    entries = tuple(e for e in built_in("jax") if e.layer == "sparse_sigmoid" and e.applies("0.10.2", "float16"))
    case = replace(one_node(LAYERS["sparse_sigmoid"], {}, {"x": [x]}, "float16"), cotangent=np.ones(1, "float16"))
    found = examine(
        Subject(Spoiling("sparse_sigmoid", "x", lambda gradient: np.full_like(gradient, slope)), {}, entries), case
    )
    assert not found.agrees
    assert found.known is known


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
@pytest.mark.parametrize(
    ("largest", "value", "gradient", "known"),
    [
        (40000.0, np.inf, 1.0, True),
        (40000.0, np.inf, np.nan, False),
        (40000.0, 3.0, 1.0, False),
        (4.0, np.inf, 1.0, False),
    ],
)
def test_a_loss_that_overflows_in_its_sum_excuses_its_value_alone(
    smoothing: float, largest: float, value: float, gradient: float, known: bool
) -> None:
    """What the value and the gradient are multiplied by, with logits of this size."""
    entries = tuple(e for e in built_in("torch") if e.layer == "cross_entropy" and e.applies("2.13.0", "float16"))
    layer = LAYERS["cross_entropy"]

    class Overflowing(Spoiling):
        def forward(self, network: Network, values: Mapping[str, Array], dtype: str) -> Forward:
            right = super().forward(network, values, dtype)
            with np.errstate(all="ignore"):
                spoilt = {n: (a * np.float16(value)).astype(dtype) for n, a in right.outputs.items()}
            return Forward(spoilt, right.tape)

    options = {"label_smoothing": smoothing, "reduction": "none"}
    case = one_node(layer, options, {"x": [[largest, 0.0, 0.0]]}, "float16")
    adapter = Overflowing("cross_entropy", "x", lambda each: each * gradient)
    found = examine(Subject(adapter, {}, entries), case)
    assert not found.agrees
    assert found.known is known
