"""Honest algorithms that lose digits: each is named and no disagreement, and no mistake hides behind one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from typing import Any

import numpy as np
import pytest

from gradproof.draw.drawing import Drawn, draw_each
from gradproof.model.case import Case
from gradproof.model.layer import Layer
from gradproof.model.options import Options
from gradproof.model.tensors import gradient_of
from gradproof.reference import LAYERS, NumpyReference
from gradproof.reference.algorithms import ALGORITHMS, FOLDED, IN_ORDER, VARIANCE, Algorithm, algorithms_of
from gradproof.reference.other_layers import by_folding
from gradproof.verdict.examination import Examination
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject, disagrees
from gradproof.verdict.kinks import one_node
from helpers.frameworks import load

Array = np.ndarray[Any, Any]
PAIRS = [(layer, algorithm) for layer, algorithms in ALGORITHMS.items() for algorithm in algorithms]
EACH = pytest.mark.parametrize(("layer", "algorithm"), PAIRS, ids=[f"{layer}: {each.name}" for layer, each in PAIRS])

RARE = (
    *("scaled_dot_product_attention", "multi_head_attention", "batch_norm", "group_norm", "instance_norm"),
    *(
        "reduce_norm",
        "reduce_std",
        "lp_pool",
        "bce_with_logits",
        "multilabel_soft_margin",
        "sigmoid_focal",
        "weight_norm",
    ),
    *("tanh", "rnn_tanh", "gru", "lstm", "local_response_norm", "triplet_margin"),
)
"""Layers whose algorithms lose digits in few of the drawn networks."""

RECURRENT = ("rnn_tanh", "gru", "lstm")
"""Layers of very many operations, whose algorithm is the one of tanh in each."""


def examined(layer: str, row: Any, networks: int, strict: bool = False) -> list[Examination]:
    """The layer computed so in drawn networks."""
    subject = Subject(NumpyReference(rows={layer: row}), {}, strict=strict)
    return [examine(subject, case) for case in cases(layer, networks)]


@cache
def cases(layer: str, networks: int) -> tuple[Case, ...]:
    """Drawn networks of at most two nodes with this layer, in float32."""
    drawn: list[Drawn] = []
    draw_each(drawn.append, networks, 5, [layer], 2)
    return tuple(each.case("float32") for each in drawn)


@EACH
def test_an_honest_algorithm_is_no_disagreement(layer: str, algorithm: Algorithm) -> None:
    assert all(each.agrees for each in examined(layer, algorithm.row, 10 if layer in RECURRENT else 30))


@pytest.mark.parametrize(
    ("layer", "algorithm"), [p for p in PAIRS if p[0] not in RARE and p[1].name not in (FOLDED, VARIANCE)]
)
def test_the_digits_that_it_loses_are_named_and_disagree_where_that_is_asked(layer: str, algorithm: Algorithm) -> None:
    named = {each for found in examined(layer, algorithm.row, 60) for each in found.accuracy}
    assert any(name == layer and algorithm.name in algorithms.split(" or ") for name, algorithms in named)
    strict = examined(layer, algorithm.row, 60, strict=True)
    kinds = {check.kind for found in strict for check in found.wrong}
    assert kinds == {"accuracy"}
    assert {culprit.node.layer.name for found in strict for culprit in found.culprits} == {layer}


def fused(x: Array, over: tuple[int, ...], eps: float) -> tuple[Array, Array]:
    """x r - mean(x) r with one rounding for the multiplication and the subtraction, of numbers that are all equal."""
    _, reciprocal = by_folding(x, over, eps)
    shift = x.mean(axis=over, keepdims=True, dtype=np.float64).astype(x.dtype) * reciprocal
    return (x.astype(np.float64) * reciprocal - shift).astype(x.dtype), reciprocal


@pytest.mark.parametrize("layer", ["layer_norm", "batch_norm", "group_norm", "instance_norm"])
def test_a_normalization_that_cancels_is_named_where_all_numbers_are_equal(layer: str) -> None:
    """x r - mean(x) r leaves a rounding of x r where (x - mean(x)) r is exactly 0."""
    row = partial(LAYERS[layer].forward, normalize=fused), LAYERS[layer].backward
    options = {"groups": 1} if layer == "group_norm" else {}
    case = one_node(LAYERS[layer], options, {"x": np.full((2, 1, 3), 123456789.0).tolist()}, "float32")
    found = examine(Subject(NumpyReference(rows={layer: row}), {}), case)
    assert found.agrees
    assert found.accuracy
    assert all(name == layer and FOLDED in algorithms for name, algorithms in found.accuracy)


@pytest.mark.parametrize(
    ("layer", "options", "size"),
    [
        ("reduce_norm", {"p": 3.0, "axes": (0,), "keepdims": False}, 1e90),
        ("lp_pool", {"p": 3, "kernel": 2, "stride": 1, "ceil_mode": False}, 1e90),
    ],
)
def test_a_norm_by_plain_powers_is_named_where_they_are_far_from_1(layer: str, options: Options, size: float) -> None:
    algorithm, *_ = ALGORITHMS[layer]
    numbers = size * np.array([3.0, 4.0, 5.0])
    x = numbers if layer == "reduce_norm" else numbers[None, None]
    case = one_node(LAYERS[layer], options, {"x": x.tolist()}, "float64")
    found = examine(Subject(NumpyReference(rows={layer: algorithm.row}), {}), case)
    assert found.agrees
    assert {(layer, algorithm.name)} == set(found.accuracy)


@pytest.mark.parametrize("layer", ["bce_with_logits", "multilabel_soft_margin"])
def test_a_logistic_function_from_its_logarithm_is_named_where_it_is_far_from_0(layer: str) -> None:
    algorithm, _ = ALGORITHMS[layer]
    x = [[11.338336777587301, 8.614882909803711, 1.8814765092304908]]
    case = one_node(LAYERS[layer], {"reduction": "sum"}, {"x": x, "target": [[1.0] * 3]}, "float32")
    found = examine(Subject(NumpyReference(rows={layer: algorithm.row}), {}), case)
    assert found.agrees
    assert {(layer, algorithm.name)} == set(found.accuracy)


LARGE = 1e14 * np.array([[[1.0, -2.0, 0.5], [3.0, 1.5, -1.0]], [[2.0, 1.0, -0.5], [-3.0, 0.5, 1.0]]])


@pytest.mark.parametrize(
    ("layer", "name", "options", "numbers", "dtype"),
    [
        ("sigmoid_focal", "s (1 - s)", {"gamma": 5.0}, {"x": [-36.67, -37.04], "target": 0.93}, "float64"),
        (
            "weight_norm",
            "v / sqrt(v . v)",
            {"features": 2},
            {"x": [[0.3, 0.5]], "direction": 1e-12, "magnitude": 1e-28},
            "float32",
        ),
        (
            *("local_response_norm", "g x d^(-beta - 1)", {"size": 2}),
            *({"x": (3e13 * np.array([[[1.0, -2.0], [0.5, 3.0]]])).tolist()}, "float32"),
        ),
        (
            *("triplet_margin", "(sum |x|^p)^(1/p)", {"p": 3.0, "reduction": "none"}),
            {"anchor": [[1e90, 2e90]], "positive": [[-3e90, 1e90]], "negative": [[2e90, 1.5e90]]},
            "float64",
        ),
        *(
            (layer, VARIANCE, {"groups": 1} if layer == "group_norm" else {}, {"x": LARGE.tolist()}, "float32")
            for layer in ("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm")
        ),
    ],
)
def test_factors_that_lose_digits_far_from_1_are_named_there(
    layer: str, name: str, options: Options, numbers: Any, dtype: str
) -> None:
    algorithm = next(each for each in ALGORITHMS[layer] if each.name.startswith(name))
    case = one_node(LAYERS[layer], options, numbers, dtype)
    found = examine(Subject(NumpyReference(rows={layer: algorithm.row}), {}), case)
    assert found.agrees
    assert {(layer, algorithm.name)} == set(found.accuracy)


@pytest.mark.parametrize(("factor", "agrees"), [(1.0, True), (20.0, False), (np.nan, False)])
def test_probabilities_from_a_rounded_logarithm_are_at_most_as_many_times_wrong_as_there_are_classes(
    factor: float, agrees: bool
) -> None:
    """In float32 the logarithm of 2 exp(1e10) is rounded to 1e10, and exp(0) is twice what is right."""

    def forward(x: Array, **options: Any) -> tuple[Array, Any]:
        out, kept = LAYERS["logsumexp"].forward(x, **options)
        return out, kept._replace(softmax=np.exp(x - out) * x.dtype.type(factor))

    case = one_node(LAYERS["logsumexp"], {"axis": (0,), "keepdims": False}, {"x": [1e10, 1e10]}, "float32")
    row = forward, LAYERS["logsumexp"].backward
    assert examine(Subject(NumpyReference(rows={"logsumexp": row}), {}), case).agrees is agrees


@pytest.mark.parametrize(("roundings", "kind"), [(20.0, "accuracy"), (100.0, "gradient")])
def test_a_tanh_that_is_some_units_off_near_1_loses_digits_of_its_derivative(roundings: float, kind: str) -> None:
    """XLA's is in some of its programs: by 7 times 2^-53 at 18.6, where 1 - tanh(x)^2 is twice 2^-53."""

    def forward(x: Array) -> tuple[Array, Any]:
        out = np.tanh(x) - roundings * 2.0**-53
        return out, out

    case = one_node(LAYERS["tanh"], {}, {"x": [18.6, 18.9, 18.2]}, "float64")
    adapter = NumpyReference(rows={"tanh": (forward, LAYERS["tanh"].backward)})
    strict = examine(Subject(adapter, {}, strict=True), case)
    assert {check.kind for check in strict.wrong if check.key == gradient_of("x")} == {kind}
    assert examine(Subject(adapter, {}), case).agrees is (kind == "accuracy")


@pytest.mark.parametrize(
    ("layer", "options", "x", "incoming"),
    [
        ("lp_pool", {"p": 2, "kernel": 2, "stride": 1}, [[[3e-12, 4e-12, 5e-12]]], 1e-32),
        ("reduce_std", {"axes": (0,)}, [3e14, -4e14, 5e14], 1e-28),
    ],
)
def test_the_digits_of_a_small_incoming_gradient_are_lost_where_it_is_scaled_first(
    layer: str, options: Options, x: Any, incoming: float
) -> None:
    """It is subnormal in float32 times 1e-12, or over 1e14."""
    *_, algorithm = ALGORITHMS[layer]
    case = one_node(LAYERS[layer], options, {"x": x}, "float32")
    case = replace(case, cotangent=(incoming * case.cotangent.astype(float)).astype("float32"))
    found = examine(Subject(NumpyReference(rows={layer: algorithm.row}), {}), case)
    assert found.agrees
    assert {(layer, algorithm.name)} == set(found.accuracy)


NEAR_ZERO = {"x": [1e-3, -2e-3, 1e-4]}
FAR_FROM_ONE = {"x": [3e90, 4e90, 5e90]}


@pytest.mark.parametrize(
    ("layer", "options", "numbers", "dtype", "most"),
    [
        ("tanhshrink", {}, NEAR_ZERO, "float64", 1e-14),
        ("tanhshrink", {}, NEAR_ZERO, "float32", 5e-6),
        ("reduce_norm", {"p": 3.0, "axes": (0,), "keepdims": False}, FAR_FROM_ONE, "float64", 1e-12),
        ("lp_pool", {"p": 3, "kernel": 3, "stride": 1}, {"x": [[FAR_FROM_ONE["x"]]]}, "float64", 1e-12),
    ],
)
def test_where_digits_are_lost_no_more_than_these_may_be_wrong(
    layer: str, options: Options, numbers: Any, dtype: str, most: float
) -> None:
    """The algorithm's own numbers agree; with an error of `most` beside a cotangent of 1 they do not."""
    algorithm, *_ = ALGORITHMS[layer]
    assert algorithm.row is not None
    forward, backward = algorithm.row

    def off(dout: Array, cache: Any) -> dict[str, Array]:
        return {name: each + most * np.abs(dout).max() for name, each in backward(dout, cache).items()}

    case = one_node(LAYERS[layer], options, numbers, dtype)
    assert examine(Subject(NumpyReference(rows={layer: (forward, backward)}), {}), case).agrees
    assert {c.key for c in examine(Subject(NumpyReference(rows={layer: (forward, off)}), {}), case).wrong} == {
        gradient_of("x")
    }


@pytest.mark.parametrize("factor", [0.0, 2.0, -1.0])
def test_powers_that_vanish_excuse_nothing(factor: float) -> None:
    """The norm of 1e-30 is 1e-30; its square is 0 in float32, and no digit is left."""
    row = LAYERS["reduce_norm"].forward, scaled(LAYERS["reduce_norm"].backward, factor)
    options = {"p": 2.0, "axes": (0,), "keepdims": False}
    case = one_node(LAYERS["reduce_norm"], options, {"x": [3e-30, 4e-30]}, "float32")
    assert not examine(Subject(NumpyReference(rows={"reduce_norm": row}), {}), case).agrees


@pytest.mark.parametrize("strict", [False, True])
def test_what_an_algorithm_accounts_for_leaves_the_rest_of_the_tensor_wrong(strict: bool) -> None:
    (algorithm,) = ALGORITHMS["tanhshrink"]
    assert algorithm.row is not None
    forward, backward = algorithm.row

    def one_wrong(dout: Array, cache: Any) -> dict[str, Array]:
        dx = backward(dout, cache)["x"]
        dx[2] *= 1.5
        return {"x": dx}

    case = one_node(LAYERS["tanhshrink"], {}, {"x": [1e-4, 2e-4, 2.0, 3e-4]}, "float32")
    found = examine(Subject(NumpyReference(rows={"tanhshrink": (forward, one_wrong)}), {}, strict=strict), case)
    (check,) = (each for each in found.wrong if each.key == gradient_of("x"))
    assert check.evidence is not None
    assert check.evidence.wrong[2]
    assert check.evidence.wrong.sum() == 1 or strict
    assert check.kind == "gradient"


def scaled(backward: Callable[..., Any], factor: float) -> Callable[..., Any]:
    return lambda dout, cache: {name: factor * each for name, each in backward(dout, cache).items()}


def without_mean(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A gradient that lacks a part: its mean over the last axis."""
    return lambda dout, cache: {
        name: each - each.mean(axis=-1, keepdims=True) if each.ndim else each
        for name, each in backward(dout, cache).items()
    }


@EACH
@pytest.mark.parametrize("spoil", [lambda b: scaled(b, 1.0 + 1e-4), without_mean], ids=["scaled", "a term missing"])
def test_no_mistake_passes_as_an_algorithm(
    layer: str, algorithm: Algorithm, spoil: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Not of the textbook's pair, nor of the algorithm's own."""
    assert algorithm.row is not None
    for forward, backward in ((LAYERS[layer].forward, LAYERS[layer].backward), algorithm.row):
        subject = Subject(NumpyReference(rows={layer: (forward, spoil(backward))}), {})
        wrong = list(islice((case for case in cases(layer, 12) if disagrees(subject, case)), 3))
        assert len(wrong) == 3
        assert {culprit.node.layer.name for culprit in examine(subject, wrong[0]).culprits} == {layer}


FAR_BELOW = {"x": [-30.0, -20.0, -9.0]}
NEAR_HALF = {"x": [1e-3, -1e-3], "target": [0.5, 0.25]}
EACH_LOSS = {"reduction": "none"}
CANCELLING = [
    *((layer, "expm1", {}, FAR_BELOW, ["jax"]) for layer in ("elu", "selu", "celu")),
    ("softsign", "1 / (1 + |x|)", {}, {"x": [100.0, -60.0, 75.0, 90.0, -110.0, 85.0]}, ["torch"]),
    ("huber", "(e - delta)", EACH_LOSS, {"x": [1e-3, -2e-3], "target": 0.0}, ["jax"]),
    ("bce_with_logits", "log(1", EACH_LOSS, NEAR_HALF, ["jax"]),
    ("bce_with_logits", "log(1", EACH_LOSS | {"pos_weighted": True}, {**NEAR_HALF, "pos_weight": 1.0}, ["torch"]),
    ("bce_with_logits", "log(1", EACH_LOSS, {"x": [-1000.0, -20.0], "target": [1e-3, 2e-3]}, ["torch"]),
    ("multilabel_soft_margin", "log(1", EACH_LOSS, {k: [each] for k, each in NEAR_HALF.items()}, ["torch"]),
]
"""Layer, the beginning of an algorithm's name, options, numbers at which its terms cancel, frameworks that have it."""
CANCEL = pytest.mark.parametrize(("layer", "name", "options", "numbers", "frameworks"), CANCELLING)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@CANCEL
def test_what_two_terms_leave_where_they_cancel_is_named_in_every_dtype(
    layer: str, name: str, options: Options, numbers: Any, frameworks: list[str], dtype: str
) -> None:
    algorithm = next(each for each in ALGORITHMS[layer] if each.name.startswith(name))
    case = one_node(LAYERS[layer], options, numbers, dtype)
    found = examine(Subject(Narrow(rows={layer: algorithm.row}), {}), case)
    assert found.agrees
    assert {(layer, algorithm.name)} == set(found.accuracy)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@CANCEL
def test_what_frameworks_leave_where_terms_cancel_is_no_disagreement(
    layer: str, name: str, options: Options, numbers: Any, frameworks: list[str], dtype: str
) -> None:
    case = one_node(LAYERS[layer], options, numbers, dtype)
    for framework in frameworks:
        found = examine(Subject(load(framework), {}), case)
        assert found.agrees
        assert all(layer == own and name in told for own, told in found.accuracy)


@pytest.mark.parametrize("factor", [0.5, -1.0, 1.25])
@CANCEL
def test_where_terms_cancel_no_factor_passes_in_half_precision(
    layer: str, name: str, options: Options, numbers: Any, frameworks: list[str], factor: float
) -> None:
    """Though the coarser classes of arithmetic are open to an algorithm too."""
    algorithm = next(each for each in ALGORITHMS[layer] if each.name.startswith(name))
    assert algorithm.row is not None
    ordinary = {"x": [-0.9, 0.3, 0.8], "target": [0.1, 0.7, 0.4], "pos_weight": 2.0}
    ordinary = {key: [each] if np.ndim(numbers[key]) == 2 else each for key, each in ordinary.items() if key in numbers}
    case = one_node(LAYERS[layer], options, ordinary, "float16")
    for forward, backward in ((LAYERS[layer].forward, LAYERS[layer].backward), algorithm.row):
        assert not examine(Subject(Narrow(rows={layer: (forward, scaled(backward, factor))}), {}), case).agrees


@EACH
def test_an_algorithm_computes_the_same_function(layer: str, algorithm: Algorithm) -> None:
    """On ordinary numbers no digit that counts is lost."""
    drawn: list[Drawn] = []
    draw_each(drawn.append, 40, 7, [layer], 1)
    for each in drawn:
        case = Drawn(each.network, each.seed, 0.0, 1.0).case("float64")
        right, other = (results(NumpyReference(rows=rows), case) for rows in ({}, {layer: algorithm.row}))
        for name, array in right.items():
            np.testing.assert_allclose(other[name], array, rtol=1e-6, atol=1e-9, err_msg=f"{each.network}: {name}")


def results(reference: NumpyReference, case: Any) -> dict[str, Array]:
    forward = reference.forward(case.network, case.exact_values, "float64")
    return {**forward.outputs, **reference.backward(forward, case.cotangent.astype(np.float64))}


def in_order(x: Array, *, axes: tuple[int, ...], keepdims: bool) -> tuple[Array, Any]:
    """A sum over the last axis, one term after the other."""
    _, cache = LAYERS["reduce_sum"].forward(x, axes=axes, keepdims=keepdims)
    total = np.cumsum(np.moveaxis(x, axes, range(len(axes))).reshape(-1, *_left(x, axes)), axis=0)[-1]
    return (np.expand_dims(total, axes) if keepdims else total), cache


def _left(x: Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    over = {axis % x.ndim for axis in axes}
    return tuple(size for axis, size in enumerate(x.shape) if axis not in over)


@pytest.mark.parametrize("terms", [100, 1000])
def test_a_sum_taken_term_after_term_is_no_mistake(terms: int) -> None:
    subject = Subject(NumpyReference(rows={"reduce_sum": (in_order, LAYERS["reduce_sum"].backward)}), {})
    for seed in range(10):
        numbers = np.random.default_rng(seed).standard_normal(terms).tolist()
        options = {"axes": (0,), "keepdims": False}
        found = examine(subject, one_node(LAYERS["reduce_sum"], options, {"x": numbers}, "float32"))
        assert found.agrees, seed
        assert {names for _, names in found.accuracy} <= {IN_ORDER.name}


def test_every_layer_may_add_in_order() -> None:
    assert algorithms_of("identity") == (IN_ORDER,)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("factor", [0.5, -1.0, 1.25])
def test_what_leans_to_one_side_by_a_rounded_constant_hides_no_mistake_in_half_precision(
    dtype: str, factor: float
) -> None:
    """Of log cosh, whose algorithm rounds log(2)."""
    numbers = np.random.default_rng(3).standard_normal((4, 8))
    case = one_node(LAYERS["log_cosh"], {"reduction": "none"}, {"x": numbers.tolist(), "target": 0.0}, dtype)
    (algorithm,) = ALGORITHMS["log_cosh"]
    assert algorithm.row is not None
    for forward, backward in ((LAYERS["log_cosh"].forward, LAYERS["log_cosh"].backward), algorithm.row):
        for right, row in ((True, (forward, backward)), (False, (forward, scaled(backward, factor)))):
            assert examine(Subject(Narrow(rows={"log_cosh": row}), {}), case).agrees is right


class Narrow(NumpyReference):
    """Runs in half precision too, in which every operation rounds."""

    def supports(self, layer: Layer, options: Options, dtype: str) -> bool:
        return True


def test_an_algorithm_that_leaves_the_range_excuses_nothing() -> None:
    """Of nearly equal numbers the difference of moments is 0 now and then, and its gradient infinite in float16."""
    case = one_node(LAYERS["group_norm"], {"groups": 1}, {"x": [[[1.0, 1.02]]]}, "float16")
    case = replace(case, cotangent=(4000.0 * case.cotangent.astype(float)).astype("float16"))

    def lost(dout: Array, cache: Any) -> dict[str, Array]:
        return {name: np.full_like(each, np.nan) for name, each in LAYERS["group_norm"].backward(dout, cache).items()}

    found = examine(Subject(Narrow(rows={"group_norm": (LAYERS["group_norm"].forward, lost)}), {}), case)
    assert {check.kind for check in found.wrong} == {"nonfinite"}
    assert {gradient_of("x")} <= {check.key for check in found.wrong}
