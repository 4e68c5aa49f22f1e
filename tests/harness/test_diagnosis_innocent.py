"""No mistake is named where none was made, or where too few numbers show which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from typing import Any

import numpy as np
import pytest

from gradproof.model.adapter import Forward
from gradproof.model.case import Case
from gradproof.model.layer import REAL
from gradproof.model.network import Input
from gradproof.model.options import OptionValue
from gradproof.reference import LAYERS, PRECISE, NumpyReference
from gradproof.reference.walk import Row
from gradproof.verdict.agreement import Evidence, judge
from gradproof.verdict.diagnosis import Diagnosis, Observation, diagnose
from gradproof.verdict.equations import Equations
from helpers.diagnosis import drawn_of
from helpers.examining import examined, results
from helpers.networks import case_of, network, node

Array = np.ndarray[Any, Any]


FAMILIES = sorted({layer.family for layer in LAYERS.values()})


def innocent(case: Case) -> Observation:
    """What the reference gives in the dtype's own arithmetic, as if every tensor that this rounds were wrong."""
    got = results(NumpyReference(), case)
    checks = []
    for statement in Equations(case, got, NumpyReference({}, PRECISE), NumpyReference()):
        right, truth = judge(statement, got[statement.key], case.dtype), statement.expected
        error = abs(np.asarray(got[right.key], np.float64) - truth)
        kind = "gradient" if error.any() else None
        checks.append(replace(right, kind=kind, evidence=Evidence(error > 0.0, error, truth)))
    return Observation(case, {}, got, tuple(checks), innocent)


@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_is_taken_for_no_mistake(family: str) -> None:
    for layer in (each for each in LAYERS.values() if each.family == family):
        observation = innocent(drawn_of(layer.name).case("float32"))
        assert not diagnose(observation), layer.name


class Wrong(NumpyReference):
    """The reference, whose gradients for inputs and parameters are random."""

    def backward(self, forward: Forward, cotangent: Array) -> dict[str, Array]:
        right = super().backward(forward, cotangent)
        generator = np.random.default_rng(1)
        output = forward.tape[0].output
        return {
            name: each if name == output else generator.standard_normal(each.shape).astype(each.dtype)
            for name, each in right.items()
        }


@pytest.mark.parametrize("family", FAMILIES)
def test_random_gradients_are_taken_for_no_mistake(family: str) -> None:
    for layer, dtype in zip(LAYERS.values(), cycle(("float64", "float32")), strict=False):
        if layer.family == family:
            examination = examined(Wrong(), drawn_of(layer.name).case(dtype))
            for culprit in examination.culprits:
                assert not culprit.diagnosis, (layer.name, str(culprit.diagnosis))


# What was seen to be wrongly stated.


def alone(layer: str, row: Any, x: list[float], cotangent: list[float], **options: OptionValue) -> Diagnosis:
    """What is said of one layer with this row, on one input."""
    of = network(Input("x", (len(x),)), node("out", layer, "x", **options))
    case = case_of(of, "float64", cotangent, x=x)
    (culprit,) = examined(NumpyReference(rows={layer: row}), case).culprits
    return culprit.diagnosis


def changed_at_zero(layer: str, change: Callable[[Array, Array], Array]) -> Row:
    """The layer's pair, whose gradient is change(gradient, cotangent) where x is 0."""
    forward, backward = LAYERS[layer].forward, LAYERS[layer].backward

    def keeping(x: Array, **options: Any) -> tuple[Array, Any]:
        out, cache = forward(x, **options)
        return out, (x, cache)

    def at_zero(dout: Array, kept: Any) -> dict[str, Array]:
        x, cache = kept
        dx = backward(dout, cache)["x"]
        return {"x": np.where(x == 0.0, change(dx, dout), dx)}

    return keeping, at_zero


@pytest.mark.parametrize("x", [[0.0], [0.0, 0.0], [0.0, 0.0, 1.0, 2.0]], ids=len)
def test_a_wrong_slope_at_a_kink_is_not_taken_for_another_activation(x: list[float]) -> None:
    """0 at 0 is what tanhshrink has, and relu may have, but elsewhere elu is elu."""
    assert not alone("elu", changed_at_zero("elu", lambda dx, dout: 0.0 * dout), x, [1.5, 0.25, -2.0, 3.0][: len(x)])


def naive_softplus(x: Array, *, beta: float) -> tuple[Array, Any]:
    """Infinite where the exponential is."""
    return np.log(1.0 + np.exp(beta * x)) / beta, LAYERS["softplus"].forward(x, beta=beta)[1]


def test_where_a_value_is_infinite_nothing_is_said_of_it() -> None:
    assert not alone("softplus", (naive_softplus, LAYERS["softplus"].backward), [800.0, -1.0, 900.0], [1.0, -2.0, 3.0])


def test_beside_a_value_that_is_infinite_a_gradient_is_named_with_its_argument() -> None:
    row = (naive_softplus, lambda dout, cache: {"x": -LAYERS["softplus"].backward(dout, cache)["x"]})
    diagnosis = alone("softplus", row, [800.0, -1.0, 900.0], [1.0, -2.0, 3.0])
    assert str(diagnosis) == "x: equals the gradient with the opposite sign: check the sign of the derivative"


ELEMENTWISE = [
    name
    for name, layer in LAYERS.items()
    if layer.kind == "activation" and len(layer.arguments) == 1 and not layer.parameters([(6,)], layer.defaults)
    if layer.output_shape([(6,)], layer.defaults) == (6,)
    if layer.arguments[0].domain((6,), layer.defaults) == REAL
]


@pytest.mark.parametrize("zeros", [1, 6])
@pytest.mark.parametrize("layer", ELEMENTWISE)
def test_nothing_is_said_of_what_is_wrong_at_zero_alone(layer: str, zeros: int) -> None:
    of = network(Input("x", (6,)), node("out", layer, "x", **LAYERS[layer].defaults))
    x = [0.0] * zeros + [-1.5, 0.75, 2.5, -0.25, 1.25][: 6 - zeros]
    case = case_of(of, "float64", np.arange(1.0, 7.0), x=x)
    examination = examined(
        NumpyReference(rows={layer: changed_at_zero(layer, lambda dx, dout: dx + 0.375 * dout)}), case
    )
    for culprit in examination.culprits:
        assert set(culprit.diagnosis.names) <= {"another subgradient"}
