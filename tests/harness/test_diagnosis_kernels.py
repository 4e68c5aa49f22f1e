"""Mistakes of kernels: memory read as contiguous, sums with too few digits or blocks, attention in its projections."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np
import pytest

from gradproof.model.network import Input, Network, Node
from gradproof.reference import LAYERS, NumpyReference
from gradproof.reference import attention as reference_attention
from gradproof.trust.faults import FAULTS
from gradproof.verdict.diagnosis import Diagnosis, Observation, diagnose
from helpers.adapters import reference_with
from helpers.diagnosis import rows_of
from helpers.examining import examined
from helpers.networks import network, node, ordinary

Array = np.ndarray[Any, Any]
BFLOAT16 = ml_dtypes.bfloat16

X = Input("x", (3, 5))


# What lies around.


class Misreading(NumpyReference):
    """The reference, in which gelu reads the cotangent's memory in a row, whatever its strides are."""

    def row(self, node: Node) -> Any:
        forward, backward = super().row(node)
        return (
            (forward, lambda dout, cache: backward(in_a_row(dout), cache))
            if node.layer.name == "gelu"
            else (forward, backward)
        )


def in_a_row(dout: Array) -> Array:
    """As many elements as there are, from where the first one lies on, in the order of the memory."""
    whole = dout
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    start = (dout.__array_interface__["data"][0] - whole.__array_interface__["data"][0]) // dout.itemsize
    return whole.reshape(-1, order="A")[start : start + dout.size].reshape(dout.shape)


def observed_in(of: Network, name: str, dtype: str = "float64") -> tuple[Observation, dict[str, Array]]:
    """What the misreading reference gives for a node within its network, and the gradients of that network."""
    (culprit,) = examined(Misreading(), ordinary(of, dtype, seed=5)).culprits
    assert culprit.node.name == name
    assert culprit.observation is not None
    return culprit.observation, dict(culprit.around)


BEHIND = {
    "transposed": network(X, node("bent", "gelu", "x"), node("out", "transpose", "bent", axes=(1, 0))),
    "a part": network(
        X, Input("y", (3, 4)), node("bent", "gelu", "x"), node("out", "concatenate", "bent", "y", axis=1)
    ),
}


def test_a_cotangent_that_lies_transposed_is_told_from_its_memory() -> None:
    observation, _ = observed_in(BEHIND["transposed"], "bent")
    diagnosis = diagnose(observation)
    assert diagnosis.names == ("cotangent read as contiguous",)
    assert "its axes lie there in the order 1, 0" in str(diagnosis)


def test_a_cotangent_that_is_a_part_of_a_larger_one_is_told_from_what_is_around() -> None:
    observation, gradients = observed_in(BEHIND["a part"], "bent")
    assert observation.wrong
    assert not diagnose(observation)
    diagnosis = diagnose(observation, {"out": gradients["out"]})
    assert diagnosis.names == ("cotangent read as contiguous",)
    assert "it is a part of the gradient of out" in str(diagnosis)


def test_few_numbers_do_not_tell_how_memory_was_read() -> None:
    """Of two rows and two columns, two elements change places: that may be anything."""
    of = network(Input("x", (2, 2)), node("bent", "gelu", "x"), node("out", "transpose", "bent", axes=(1, 0)))
    observation, _ = observed_in(of, "bent")
    assert len(observation.wrong) == 1
    assert not diagnose(observation)


# Sums, long ones.


def line(rows: int, change: Any, dtype: str = "float64") -> Diagnosis:
    """What is said of a linear layer on so many rows, whose gradients are changed by change(gradients, dout, x)."""
    of = network(Input("x", (rows, 3)), node("out", "linear", "x", parameters="weight:w bias:b", features=2))
    right = LAYERS["linear"]

    def backward(dout: Array, cache: Any) -> dict[str, Array]:
        return change(right.backward(dout, cache[1]), dout, cache[0])

    def forward(x: Array, **others: Array) -> tuple[Array, Any]:
        out, cache = right.forward(x, **others)
        return out, (x, cache)

    adapter = NumpyReference(rows={"linear": (forward, backward)})
    (culprit,) = examined(adapter, ordinary(of, dtype, seed=3)).culprits
    return culprit.diagnosis


def added_up(terms: Array, sums: Any, products: Any) -> Array:
    """One by one, in the dtype of the sums, of terms in the dtype of the products."""
    total = np.zeros(terms.shape[1:], sums)
    for term in terms:
        total = (total + term.astype(products).astype(sums)).astype(sums)
    return total.astype(terms.dtype)


@pytest.mark.parametrize(
    ("dtype", "sums", "products", "told"),
    [
        ("float64", np.float32, np.float64, "float32"),
        ("float64", np.float32, np.float32, "float32"),
        ("float64", np.float16, np.float16, "float16"),
        ("float32", np.float16, np.float32, "float16"),
        ("float32", BFLOAT16, np.float32, "bfloat16"),
        ("float32", BFLOAT16, BFLOAT16, "bfloat16"),
    ],
)
def test_a_running_sum_in_a_lower_precision_is_told_with_its_dtype(
    dtype: str, sums: Any, products: Any, told: str
) -> None:
    def change(g: dict[str, Array], dout: Array, x: Array) -> dict[str, Array]:
        return {**g, "weight": added_up(dout[:, :, None] * x[:, None], sums, products)}

    diagnosis = line(300, change, dtype)
    assert diagnosis.names == ("rounded running sum",)
    assert f"one by one in {told}: check" in str(diagnosis)


def test_a_sum_that_is_rounded_once_is_no_running_sum() -> None:
    diagnosis = line(300, lambda g, dout, x: {**g, "weight": g["weight"].astype(np.float16).astype(np.float64)})
    assert diagnosis.names == ("lower precision",)
    assert "within the rounding of float16" in str(diagnosis)


@pytest.mark.parametrize("block", [8, 16, 32, 64, 128, 256, 1024])
def test_the_last_block_of_a_sum_is_told(block: int) -> None:
    rows = block + 5
    diagnosis = line(rows, lambda g, dout, x: {**g, "weight": dout[block:].T @ x[block:]})
    assert str(diagnosis) == (
        f"equals the gradient from the last 5 of {rows} rows alone: check that blocks of rows add up what they sum"
    )


def test_a_block_from_the_middle_of_a_sum_is_not_named() -> None:
    assert not line(24, lambda g, dout, x: {**g, "weight": dout[8:16].T @ x[8:16]})


def test_a_part_is_told_with_where_it_lies() -> None:
    diagnosis = line(24, lambda g, dout, x: {**g, "x": np.where(np.arange(24)[:, None] < 8, g["x"], 0.0)})
    assert str(diagnosis) == (
        "equals the gradient in 8 of the 24 places along axis 0, from 0 on, and is zero in the rest: "
        "check that every block is computed and written"
    )


def test_a_part_in_the_wrong_size_is_not_named() -> None:
    assert not line(24, lambda g, dout, x: {**g, "x": np.where(np.arange(24)[:, None] < 8, 1.3 * g["x"], 0.0)})


# Attention with its projections.


class WrongWithin(NumpyReference):
    """The reference, in whose multi-head attention the heads' backward pass is a planted fault's."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self._backward = rows_of(fault)["scaled_dot_product_attention"]

    def _within(self, dout: Array, cache: Any, *, rows: Any) -> Any:
        return self._backward[1](dout, cache)

    def row(self, node: Node) -> Any:
        forward, backward = super().row(node)

        def within(*arrays: Array, **others: Any) -> tuple[Array, Any]:
            with patch.object(reference_attention, "scaled_dot_product_attention_forward", self._backward[0]):
                return forward(*arrays, **others)

        def wrong(dout: Array, cache: Any) -> dict[str, Array]:
            with patch.object(reference_attention, "scaled_dot_product_attention_backward", self._within):
                return backward(dout, cache)

        return within, wrong


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("fault", ["attention_row_sums_missing", "attention_strictly_causal", "attention_scale_twice"])
def test_mistakes_within_multi_head_attention_are_named(fault: str, causal: bool) -> None:
    slots = "in_proj_weight:w out_proj_weight:v in_proj_bias:b out_proj_bias:c"
    of = network(
        Input("x", (5, 2, 6)), node("out", "multi_head_attention", "x", parameters=slots, heads=2, causal=causal)
    )
    examination = examined(WrongWithin(fault), of)
    assert [culprit.diagnosis.names for culprit in examination.culprits] == (
        [] if fault == "attention_strictly_causal" and not causal else [(FAULTS[fault].named,)]
    )


def test_what_is_exchanged_is_wrong_on_both_sides() -> None:
    """A value's gradient that is zero is not the key's where the key has its own, which one key alone has: zero."""
    of = network(
        Input("q", (2, 1, 3)),
        Input("k", (2, 1, 3)),
        Input("v", (2, 1, 3)),
        node("out", "scaled_dot_product_attention", "q", "k", "v"),
    )
    adapter = reference_with("scaled_dot_product_attention", lambda g, dout: {**g, "v": np.zeros((2, 1, 3))})
    (culprit,) = examined(adapter, of).culprits
    assert culprit.diagnosis.names == ("zero",)
