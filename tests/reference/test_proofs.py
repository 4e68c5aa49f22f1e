"""Proof that every layer's backward function is the derivative of its forward function, without any framework.

Cases derive from the table of layers: every layer, every combination of its options' values, several shapes.
Each check is also run on backward functions that are wrong on purpose, which it must refuse.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest

from gradproof.model.layer import Layer
from gradproof.model.options import Choice, Integer, Integers, OptionValue, Real, Shape
from gradproof.reference import LAYERS, PRECISE
from gradproof.reference.precise import precise
from gradproof.run.proof import (
    CHECKS,
    STEP,
    NotProvenError,
    check_complex_step,
    check_differences,
    check_kink,
    check_linear,
    check_pure,
    check_structure,
    checks_of,
    refuted,
)
from gradproof.run.proof_cases import ProofCase as Case
from gradproof.run.proof_cases import companions, first_shapes, option_combinations, proof_cases, takes

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
Backward = Callable[[Any, Any], dict[str, Any]]

CASES = [case for layer in LAYERS.values() for case in proof_cases(layer)]

EACH_LAYER = pytest.mark.parametrize("name", LAYERS)


def named(layer: Layer) -> str:
    """A name for a test: the precise pair of a layer has the same name as the textbook's."""
    return layer.name if layer is LAYERS[layer.name] else f"precise-{layer.name}"


# The proofs.


def test_every_layer_has_cases() -> None:
    """A companion that a layer declares must fit wherever another does."""
    for layer in LAYERS.values():
        assert any(case.layer is layer for case in CASES), layer.name
        for shape in first_shapes(layer):
            for options in islice(option_combinations(layer, shape), 200):
                fits = {takes(layer, (shape, *others), options) for others in companions(layer, shape, options)}
                assert len(fits) == 1, f"{layer.name}: {options} beside {shape}"


def test_every_option_value_has_a_case() -> None:
    """All that the table lists, and at least two of the values that depend on the input's shape."""
    listed = {Choice: "values", Real: "examples", Integer: "examples", Integers: "examples"}
    for layer in LAYERS.values():
        for option in layer.options:
            seen = {dict(case.options)[option.name] for case in CASES if case.layer is layer}
            if type(option.domain) in listed:
                assert seen == set(getattr(option.domain, listed[type(option.domain)])), f"{layer.name}: {option.name}"
            else:
                assert len(seen) >= 2, f"{layer.name}: {option.name}"


@EACH_LAYER
def test_points_keep_away_from_kinks(name: str) -> None:
    """Both sides of the steps taken by differences stay in the domain, and cross no kink."""
    assert [str(case) for case in CASES if case.layer.name == name and not _keeps_away(case)] == []


def _keeps_away(case: Case) -> bool:
    values = case.point()
    reach = {name: STEP * case.direction(name) for name in case.floating if case.domains[name].kind != "sign"}
    inside = all(case.domains[name].contains(values[name] + side * reach[name]) for name in reach for side in (1, -1))
    if not case.layer.kinks:
        return inside
    taken = np.sort(np.concatenate([*(values[name].ravel() for name in reach), case.kinks]))
    gaps = [above - below for below, above in pairwise(taken)]
    return inside and bool(min(gaps, default=np.inf) > max(abs(each).max() for each in reach.values()))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("layer", [*LAYERS.values(), *map(precise, map(LAYERS.get, PRECISE))], ids=named)
def test_the_backward_function_is_the_derivative(layer: Layer, check: str) -> None:
    """Of the textbook's pair, and of the precise one where there is one."""
    of_layer = [replace(case, layer=layer) for case in CASES if case.layer.name == layer.name]
    assert [each for case in of_layer if (each := refuted(case, check, CHECKS[check]))] == []


@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if layer.kinks])
def test_kinks(name: str) -> None:
    found = [refuted(case, *each) for case in CASES if case.layer.name == name for each in at_kinks(case)]
    assert found or name in {layer for layer, _ in BETWEEN}
    assert [each for each in found if each] == []


BETWEEN = {("reduce_norm", "at_zero_slice"), ("cosine_embedding", "at_margin")}
"""Kinks that no element has for itself in these cases."""


def test_kinks_that_need_a_case_of_their_own() -> None:
    cases = [
        case_of("reduce_norm", (2, 1), p=math.inf, axes=(-1,), keepdims=False),
        case_of("cosine_embedding", (4,), (4,), (), margin=0.0),
    ]
    named = {(case.layer.name, name.partition(", ")[2]) for case in cases for name, _ in at_kinks(case)}
    assert named >= BETWEEN
    assert [each for case in cases for kink in at_kinks(case) if (each := refuted(case, *kink))] == []


def at_kinks(case: Case) -> list[tuple[str, Callable[[Case], None]]]:
    return [(name, check) for name, check in checks_of(case).items() if name not in CHECKS]


def test_every_other_kink_shows_in_a_case() -> None:
    every = {(layer.name, kink.name) for layer in LAYERS.values() for kink in layer.kinks}
    shown = {(case.layer.name, name.partition(", ")[2]) for case in CASES for name, _ in at_kinks(case)}
    assert every - shown == BETWEEN


# The checks refuse what is wrong.

Gradients = dict[str, Any]


def case_of(name: str, *shapes: Shape, **options: OptionValue) -> Case:
    layer = LAYERS[name]
    return Case(layer, tuple(layer.complete(options, shapes[0]).items()), shapes)


def altered(case: Case, alter: Callable[[Gradients], Gradients]) -> Case:
    """The case with a backward function whose result is altered."""
    right = case.layer.backward
    return replace(case, layer=replace(case.layer, backward=lambda dout, cache: alter(right(dout, cache))))


def misled(case: Case, mislead: Callable[[Array], Array]) -> Case:
    """The case with a backward function that sees another cotangent."""
    right = case.layer.backward
    return replace(case, layer=replace(case.layer, backward=lambda dout, cache: right(mislead(dout), cache)))


def rewritten(case: Case, **functions: Callable[..., Any]) -> Case:
    return replace(case, layer=replace(case.layer, **functions))


def every(change: Callable[[Array], Any]) -> Callable[[Gradients], Gradients]:
    return lambda gradients: {name: change(np.asarray(gradient)) for name, gradient in gradients.items()}


def without_largest(gradient: Array) -> Array:
    kept = np.array(gradient)
    kept.flat[abs(kept).argmax()] = 0.0
    return kept


def telling(layer: Layer) -> Case:
    """The layer's first case with several numbers, and slopes that are nowhere zero, nor next to it by cancelling."""
    return next(
        case
        for case in CASES
        if case.layer is layer and math.prod(case.shapes[0]) > 1 and all(share > 0.02 for share in slope_shares(case))
    )


def slope_shares(case: Case) -> Iterator[float]:
    """For each gradient, its slope along the direction taken, as a share of the scale on which errors are judged."""
    out, _ = case.forward(case.point())
    for name, gradient in case.backward(case.point(), case.cotangent()).items():
        terms = gradient * case.direction(name)
        scale = abs(terms).sum() + abs(case.cotangent() * out).sum()
        yield abs(terms.sum()) / scale if scale else 0.0


WRONG_GRADIENTS: dict[str, Callable[[Gradients], Gradients]] = {
    "sign flipped": every(lambda gradient: -gradient),
    "one element zero": every(without_largest),
    "all zero": every(np.zeros_like),
    "scaled by 1 + 1e-6": every(lambda gradient: gradient * (1.0 + 1e-6)),
    "not finite": every(lambda gradient: gradient * np.nan),
}

WRONG_STRUCTURES: dict[str, Callable[[Gradients], Gradients]] = {
    "one missing": lambda gradients: dict(list(gradients.items())[1:]),
    "one too many": lambda gradients: gradients | {"surplus": np.zeros(3)},
    "None": every(lambda gradient: None),
    "an axis too many": every(lambda gradient: gradient[None]),
    "a lower precision": every(lambda gradient: gradient.astype(np.float32)),
}

WRONG_COTANGENTS: dict[str, Callable[[Array], Array]] = {
    "its sign": np.sign,
    "its square": np.square,
    "squashed": np.tanh,
    "normalised": lambda dout: dout / (1e-8 + abs(dout).max()),
    "shifted unevenly": lambda dout: dout + 1e-9 * (1.0 + np.arange(dout.size)).reshape(dout.shape),
}


def accepted(check: Callable[[Case], None], message: str, cases: Mapping[str, Case]) -> list[str]:
    """The names of the cases that the check does not refuse with such a message."""
    return [name for name, case in cases.items() if not re.search(message, refusal(check, case))]


def refusal(check: Callable[[Case], None], case: Case) -> str:
    try:
        check(case)
    except NotProvenError as error:
        return str(error)
    return ""


OFF = "of the terms; allowed"


@EACH_LAYER
@pytest.mark.parametrize("check", [check_complex_step, check_differences])
def test_slopes_refuse_wrong_gradients(name: str, check: Callable[[Case], None]) -> None:
    right = telling(LAYERS[name])
    assert accepted(check, OFF, {fault: altered(right, alter) for fault, alter in WRONG_GRADIENTS.items()}) == []


@EACH_LAYER
def test_slopes_refuse_wrong_cotangents(name: str) -> None:
    right, faults = telling(LAYERS[name]), WRONG_COTANGENTS | {"ones": np.ones_like}
    wrong = {fault: misled(right, mislead) for fault, mislead in faults.items()}
    assert accepted(check_complex_step, OFF, wrong) == []


@EACH_LAYER
def test_complex_step_sees_the_last_digits(name: str) -> None:
    wrong = altered(telling(LAYERS[name]), every(lambda gradient: gradient * (1.0 + 1e-10)))
    assert accepted(check_complex_step, OFF, {name: wrong}) == []


@EACH_LAYER
def test_structure_refuses_wrong_gradients(name: str) -> None:
    right = telling(LAYERS[name])
    wrong = {fault: altered(right, alter) for fault, alter in WRONG_STRUCTURES.items()}
    assert accepted(check_structure, r"^gradients of|: (float32|float64|object) of shape", wrong) == []


@EACH_LAYER
def test_linearity_refuses_wrong_cotangents(name: str) -> None:
    right = telling(LAYERS[name])
    wrong = {fault: misled(right, mislead) for fault, mislead in WRONG_COTANGENTS.items()}
    said = r"is not linear in the cotangent|is not zero for a zero cotangent"
    assert accepted(check_linear, said, wrong) == []


def test_a_right_layer_is_not_refused() -> None:
    right = {"tanh": telling(LAYERS["tanh"])}
    assert accepted(check_complex_step, OFF, right) == ["tanh"]


def test_linearity_demands_exactly_zero() -> None:
    with pytest.raises(AssertionError, match="dx is not zero for a zero cotangent"):
        check_linear(altered(case_of("tanh", (2, 3)), every(lambda gradient: gradient + 1e-300)))


def test_structure_refuses_a_gradient_of_class_indices() -> None:
    case = case_of("cross_entropy", (2, 3), (2,), targets="classes")
    with pytest.raises(AssertionError, match=r"gradients of \['target', 'x'\]"):
        check_structure(altered(case, lambda gradients: gradients | {"target": np.zeros(2)}))


def test_structure_refuses_an_undeclared_output() -> None:
    softmax = case_of("softmax", (2, 3))
    with pytest.raises(AssertionError, match=r"the output has shape \(6,\), not \(2, 3\)"):
        check_structure(rewritten(softmax, forward=lambda x, axis: (x.ravel(), None)))
    with pytest.raises(AssertionError, match="the output leaves its codomain, unit"):
        check_structure(rewritten(softmax, forward=lambda x, axis: (x, None)))


def bias_of_first_row(dout: Array, cache: Any) -> Gradients:
    gradients = LAYERS["linear"].backward(dout, cache)
    return gradients | {"bias": dout.reshape(-1, dout.shape[-1])[0]}


def transposed_weight(dout: Array, cache: Any) -> Gradients:
    gradients = LAYERS["linear"].backward(dout, cache)
    return gradients | {"weight": gradients["weight"].T}


def layer_norm_without(missing: str) -> Backward:
    def backward(dout: Array, cache: Any) -> Gradients:
        normalized, reciprocal, _, over = cache
        terms = {
            "mean": dout.mean(axis=over, keepdims=True),
            "product": normalized * (dout * normalized).mean(axis=over, keepdims=True),
        }
        return {"x": reciprocal * (dout - sum(term for name, term in terms.items() if name != missing))}

    return backward


MISTAKES: dict[str, tuple[Case, Backward]] = {
    "derivative left out": (case_of("tanh", (2, 3)), lambda dout, out: {"x": dout}),
    "derivative at the output": (
        case_of("softplus", (3,)),
        lambda dout, x: {"x": dout / (1 + np.exp(-np.log1p(np.exp(x))))},
    ),
    "bias not summed": (case_of("linear", (2, 3), features=3), bias_of_first_row),
    "weight transposed": (
        case_of("linear", (2, 3), features=3),
        transposed_weight,
    ),
    "softmax element by element": (
        case_of("softmax", (2, 3)),
        lambda dout, cache: {"x": dout * cache[0] * (1.0 - cache[0])},
    ),
    "layer norm without the mean": (case_of("layer_norm", (2, 3), affine=False), layer_norm_without("mean")),
    "layer norm without the product": (case_of("layer_norm", (2, 3), affine=False), layer_norm_without("product")),
    "broadcast partner not summed": (
        case_of("add", (2, 3), (3,)),
        lambda dout, cache: {"a": dout, "b": dout[0]},
    ),
    "second factor's gradient with the first's": (
        case_of("multiply", (3,), (3,)),
        lambda dout, cache: {"a": dout * cache[1], "b": dout * cache[1]},
    ),
    "sum instead of mean": (
        case_of("mse", (2, 3), (2, 3), reduction="mean"),
        lambda dout, cache: {"x": 2.0 * dout * cache[0], "target": -2.0 * dout * cache[0]},
    ),
    "target's sign": (
        case_of("half_squared_error", (3,), (3,), reduction="none"),
        lambda dout, cache: {"x": dout * cache[0], "target": dout * cache[0]},
    ),
    "parts swapped": (
        case_of("concatenate", (3,), (3,), axis=0),
        lambda dout, cache: {"x0": dout[3:], "x1": dout[:3]},
    ),
    "columns before rows": (
        case_of("reshape", (2, 3), shape=(3, 2)),
        lambda dout, shape: {"x": dout.reshape(shape, order="F")},
    ),
}


@pytest.mark.parametrize("check", [check_complex_step, check_differences])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_slopes_refuse_mistakes(mistake: str, check: Callable[[Case], None]) -> None:
    case, backward = MISTAKES[mistake]
    check(case)
    with pytest.raises(AssertionError, match="of the terms; allowed"):
        check(rewritten(case, backward=backward))


def scale_input(x: Array) -> tuple[Array, Array]:
    out = np.tanh(x)
    x *= 2.0
    return out, out


def write_back_input(x: Array) -> tuple[Array, Array]:
    x += 0.0
    return np.tanh(x), np.tanh(x)


def scale_cotangent(dout: Array, out: Array) -> Gradients:
    dout *= 1.0 - out * out
    return {"x": dout}


def write_back_cotangent(dout: Array, out: Array) -> Gradients:
    dout *= 1.0
    return {"x": dout * (1.0 - out * out)}


def scale_cache(dout: Array, bend: Array) -> Gradients:
    bend *= bend
    return {"x": dout * bend}


def write_back_cache(dout: Array, bend: Array) -> Gradients:
    bend *= 1.0
    return {"x": dout * bend * bend}


def clear_cache(dout: Array, cache: Any) -> Gradients:
    gradients = LAYERS["concatenate"].backward(dout, cache)
    cache[0].clear()
    return gradients


class Momentum:
    """A backward function that remembers its last result."""

    def __init__(self) -> None:
        self.last: Any = 0.0

    def __call__(self, dout: Array, out: Array) -> Gradients:
        self.last = 0.5 * self.last + dout * (1.0 - out * out)
        return {"x": self.last}


TANH, TANHSHRINK = case_of("tanh", (2, 3)), case_of("tanhshrink", (2, 3))
IMPURE: dict[str, tuple[Case, str]] = {
    "forward scales its input": (rewritten(TANH, forward=scale_input), "forward wrote to its inputs"),
    "forward writes its input back": (rewritten(TANH, forward=write_back_input), "a read-only array was written to"),
    "backward scales its cotangent": (rewritten(TANH, backward=scale_cotangent), "to the inputs or to its cotangent"),
    "backward writes its cotangent back": (rewritten(TANH, backward=write_back_cotangent), "a read-only array"),
    "backward scales its cache": (rewritten(TANHSHRINK, backward=scale_cache), "backward wrote to its cache"),
    "backward writes its cache back": (
        rewritten(TANHSHRINK, backward=write_back_cache),
        "a read-only array was written to",
    ),
    "backward empties a list": (
        rewritten(case_of("concatenate", (3,), (3,)), backward=clear_cache),
        "backward wrote to its cache",
    ),
    "backward remembers": (rewritten(TANH, backward=Momentum()), "a second backward pass differs from the first"),
}


@pytest.mark.parametrize("fault", IMPURE)
def test_purity_refuses(fault: str) -> None:
    case, message = IMPURE[fault]
    with pytest.raises(AssertionError, match=message):
        check_pure(case)


def relu_at_zero(derivative: Callable[[Array, float], Array], default: float = 0.0) -> Case:
    """ReLU with another derivative, a function of x and of the weight asked for."""

    def forward(x: Array, *, at_zero: float = default) -> tuple[Array, tuple[Array, float]]:
        return np.maximum(x, 0.0), (x, at_zero)

    def backward(dout: Array, cache: tuple[Array, float]) -> Gradients:
        return {"x": dout * derivative(*cache)}

    return rewritten(case_of("relu", (2, 3)), forward=forward, backward=backward)


def relu_derivative(x: Array, weight: float) -> Array:
    return np.where(x == 0, weight, x > 0)


NOT_BETWEEN = r"dx at 0.0: not left \+ w \(right - left\)"
WRONG_KINKS: dict[str, tuple[Case, str]] = {
    "weight ignored": (relu_at_zero(lambda x, weight: np.where(x == 0, 0.5, x > 0)), NOT_BETWEEN),
    "weight of the other side": (relu_at_zero(lambda x, weight: relu_derivative(x, 1.0 - weight)), NOT_BETWEEN),
    "weight squared": (relu_at_zero(lambda x, weight: relu_derivative(x, weight * weight)), NOT_BETWEEN),
    "beyond the right": (relu_at_zero(lambda x, weight: relu_derivative(x, 2.0 * weight)), NOT_BETWEEN),
    "another default": (relu_at_zero(relu_derivative, default=1.0), "another default"),
    "weight used everywhere": (
        relu_at_zero(lambda x, weight: np.where(x <= 0, weight, 1.0)),
        "at_zero changes the gradient away from 0.0",
    ),
    "prediction and target swapped": (
        altered(case_of("mae", (3,), (3,)), every(lambda gradient: -gradient)),
        NOT_BETWEEN,
    ),
}


@pytest.mark.parametrize("fault", WRONG_KINKS)
def test_kink_check_refuses(fault: str) -> None:
    case, message = WRONG_KINKS[fault]
    (kink,) = case.layer.kinks
    with pytest.raises(AssertionError, match=message):
        check_kink(case, kink)


def test_kink_check_accepts_relu_as_rewritten_here() -> None:
    case = relu_at_zero(relu_derivative)
    check_kink(case, *case.layer.kinks)
