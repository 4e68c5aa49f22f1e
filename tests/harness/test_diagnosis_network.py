"""What is said of the layers and sums of one network, and that it must hold on other numbers too."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from gradproof.model.adapter import Forward
from gradproof.model.network import Input, Network
from gradproof.reference import LAYERS, NumpyReference
from gradproof.run.results import disagreements
from gradproof.trust.faults import FAULTS
from gradproof.verdict.diagnosis import diagnose, redrawn
from gradproof.verdict.rows import rows
from helpers.adapters import reference_with
from helpers.diagnosis import drawn_of, rows_of
from helpers.examining import examined
from helpers.networks import case_of, network, node

Array = np.ndarray[Any, Any]


X = Input("x", (3, 5))

CHAIN = network(
    X,
    Input("target", (3, 4)),
    node("line", "linear", "x", parameters="weight:w bias:b", features=4),
    node("bent", "tanh", "line"),
    node("normal", "layer_norm", "bent", parameters="weight:scale bias:shift"),
    node("share", "softmax", "normal", axis=-1),
    node("loss", "mse", "share", "target"),
)

PAIRABLE = (
    "linear_weight_transposed",
    "tanh_derivative_at_input",
    "layer_norm_first_term",
    "softmax_element_by_element",
    "mse_factor_two_missing",
)


@pytest.mark.parametrize("pair", list(combinations(PAIRABLE, 2)), ids="+".join)
def test_two_faults_at_once_are_both_named(pair: tuple[str, str]) -> None:
    dtype = "float32" if "mse_factor_two_missing" in pair else "float64"
    examination = examined(NumpyReference(rows=rows_of(*pair)), CHAIN, dtype)
    named = {culprit.node.layer.name: culprit.diagnosis.names for culprit in examination.culprits}
    assert named == {FAULTS[name].layer: (FAULTS[name].named,) for name in pair}


def test_two_mistakes_in_one_layer_are_told_apart() -> None:
    adapter = reference_with("linear", lambda g, dout: {"x": -g["x"], "weight": 2.0 * g["weight"], "bias": -g["bias"]})
    (culprit,) = examined(adapter, CHAIN).culprits
    assert str(culprit.diagnosis) == (
        "x, bias: equals the gradient with the opposite sign: check the sign of the derivative; "
        "weight: equals twice the gradient: check the factor 2, as the derivative of a square has it"
    )
    assert culprit.diagnosis.names == ("sign", "factor 2")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda g, dout: {**g, "weight": g["weight"] / 3.0},
            "equals the gradient times 1/N (N = 3, the batch or the rows): check whether to sum or to average",
        ),
        (
            lambda g, dout: {**g, "bias": dout},
            "equals the cotangent not summed over axis 0: check the sum that makes the bias' gradient",
        ),
        (
            lambda g, dout: {**g, "weight": g["weight"].T},
            "equals the gradient transposed: check the order of its axes",
        ),
    ],
    ids=["factor", "shape", "transposed shape"],
)
def test_what_is_said(change: Any, text: str) -> None:
    examination = examined(reference_with("linear", change), CHAIN)
    assert str(examination.culprits[0].diagnosis) == text
    assert {each.cause for each in disagreements(examination, None) if each.culprit} == {text}


def test_what_is_inherited_has_no_cause() -> None:
    examination = examined(FAULTS["tanh_derivative_at_input"].make(), CHAIN)
    causes = {row.verdict: row.cause for row in rows(examination)}
    assert causes["inherited"] is None
    assert causes["agrees"] is None
    assert "at the input: check what is cached" in str(causes["WRONG HERE"])


def test_a_mistake_in_both_passes_is_named() -> None:
    gelu = network(X, node("out", "gelu", "x"))
    other = LAYERS["gelu_tanh"]
    (culprit,) = examined(NumpyReference(rows={"gelu": (other.forward, other.backward)}), gelu).culprits
    assert culprit.diagnosis.names == ("approximate gelu",)
    assert {check.kind for check in culprit.observation.checks} == {None, "value", "gradient"}


def test_the_cotangent_itself_may_be_lost() -> None:
    class Ones(NumpyReference):
        def backward(self, forward: Forward, cotangent: Array) -> dict[str, Array]:
            return super().backward(forward, np.ones_like(cotangent))

    for culprit in examined(Ones(), CHAIN).culprits:
        assert culprit.diagnosis.names == ("cotangent as ones",)


# Sums between layers.

DIAMOND = network(
    X,
    node("a", "tanh", "x"),
    node("b", "sigmoid", "a"),
    node("c", "softplus", "a"),
    node("d", "silu", "a"),
    node("bc", "multiply", "b", "c"),
    node("out", "multiply", "bc", "d"),
)
SHARED = network(
    X,
    node("first", "linear", "x", parameters="weight:w", features=5, use_bias=False),
    node("second", "linear", "first", parameters="weight:w", features=5, use_bias=False),
)
TWICE = network(X, node("square", "multiply", "x", "x"))


class Walk(NumpyReference):
    """Adds up in another way."""

    def __init__(self, add: Any) -> None:
        super().__init__()
        self._add = add

    def add_up(self, name: str, before: Array | None, arriving: Array) -> Array:
        return arriving if before is None else self._add(before, arriving)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("of", "add", "text"),
    [
        (DIAMOND, lambda before, arriving: before, "equals the sum without the part from b (x) and c (x): check"),
        (DIAMOND, lambda before, arriving: arriving, "equals the sum without the part from c (x) and d (x): check"),
        (
            DIAMOND,
            lambda before, arriving: before + 2.0 * arriving,
            "equals the sum with the part from b (x) and c (x) counted",
        ),
        (SHARED, lambda before, arriving: arriving, "equals the sum without the part from second (weight): check"),
        (
            TWICE,
            lambda before, arriving: before + 2.0 * arriving,
            "equals the sum with the part from square (a) counted",
        ),
    ],
    ids=["first kept", "last kept", "doubled", "shared", "twice"],
)
def test_a_path_is_named(of: Network, add: Any, text: str, dtype: str) -> None:
    examination = examined(Walk(add), of, dtype)
    assert examination.culprits == ()
    assert str(examination.diagnosis).startswith(text)
    assert [row.cause for row in rows(examination) if row.verdict == "composition"] == [str(examination.diagnosis)]


def test_another_sum_is_not_named() -> None:
    examination = examined(Walk(lambda before, arriving: before + 1.3 * arriving), DIAMOND)
    assert examination.unblamed is not None
    assert not examination.diagnosis


# Other numbers.


def test_redrawn_numbers_are_ordinary_and_in_their_domain() -> None:
    for layer in ("bce", "embedding", "batch_norm", "gaussian_nll", "dropout"):
        case = drawn_of(layer).case("float32")
        again = redrawn(case)
        assert again.network == case.network
        assert not np.array_equal(again.cotangent, case.cotangent)
        for name, value in again.values.items():
            assert (value is case.values[name]) == (value.dtype.kind == "i")
            assert np.isfinite(value).all()


class Failing(NumpyReference):
    """Half of every gradient, for so many calls."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self._left = calls

    def backward(self, forward: Forward, cotangent: Array) -> dict[str, Array]:
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("not again")
        right = super().backward(forward, cotangent)
        output = forward.tape[0].output
        return {name: each if name == output else 0.5 * each for name, each in right.items()}


@pytest.mark.parametrize(("calls", "names"), [(100, ("factor 2",)), (2, ())])
def test_an_adapter_that_fails_when_asked_again_is_not_diagnosed(calls: int, names: tuple[str, ...]) -> None:
    (culprit,) = examined(Failing(calls), network(X, node("out", "tanh", "x"))).culprits
    assert culprit.diagnosis.names == names


def test_what_fits_the_case_alone_is_not_stated() -> None:
    """At 0, where tanh has the slope 1, the lost derivative does not show; at one number, any slope is a factor."""
    of = network(Input("x", (1,)), node("out", "elu", "x", alpha=0.5))
    flipped = reference_with("elu", lambda g, dout: {"x": -g["x"]})
    (culprit,) = examined(flipped, case_of(of, "float64", [1.5], x=[-1.0])).culprits
    assert culprit.diagnosis.names == ("sign",)
    # alpha = -0.5 gives the same here.
    assert culprit.observation is not None
    unheard = replace(culprit.observation, again=lambda case: culprit.observation)
    assert diagnose(unheard).names == ("another option", "sign")
