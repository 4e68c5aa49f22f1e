"""Values that a later pass overwrites: who did it is blamed, and not who needed them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gradproof.model.network import Input, Network
from gradproof.model.tensors import gradient_of, value_of
from gradproof.reference import LAYERS, NumpyReference
from gradproof.trust.faults import FAULTS
from gradproof.verdict.rows import rows
from helpers.adapters import spoilt
from helpers.examining import EACH_DTYPE, culprits, examined, wrong
from helpers.networks import X, network, node

Array = np.ndarray[Any, Any]


def test_a_value_that_a_later_layer_overwrites_is_that_layers_fault() -> None:
    of = network(X, node("a", "tanh", "x"), node("out", "relu", "a"))
    examination = examined(FAULTS["writes_to_its_input"].make(), of)
    (row,) = [each for each in rows(examination) if each.culprit]
    assert (row.node, row.check.key, row.check.kind, row.verdict) == (
        "out",
        value_of("a"),
        "mutated_input",
        "WRONG HERE",
    )
    assert row.check.got == "a later layer's forward pass overwrote it: it is no longer what was computed"


class OverwritingItsOutput(NumpyReference):
    """Softmax, whose backward pass computes in place, into the output that it has kept."""

    def __init__(self) -> None:
        forward, backward = LAYERS["softmax"].forward, LAYERS["softmax"].backward

        def keeping(x: Array, **options: Any) -> tuple[Array, Any]:
            out, cache = forward(x, **options)
            return out, (out, cache)

        def in_place(dout: Array, kept: Any) -> dict[str, Array]:
            gradients = backward(dout, kept[1])
            np.copyto(kept[0], gradients["x"])
            return {"x": kept[0].copy()}

        super().__init__(rows={"softmax": (keeping, in_place)})


@EACH_DTYPE
def test_a_value_that_its_own_backward_pass_overwrites_is_that_layers_fault(dtype: str) -> None:
    of = network(X, node("a", "tanh", "x"), node("p", "softmax", "a"), node("out", "exp", "p"))
    examination = examined(OverwritingItsOutput(), of, dtype)
    assert wrong(examination) == {value_of("p"): "mutated_input"}
    assert culprits(examination) == ["p"]
    assert examination.wrong[0].got == "the backward pass overwrote it: it is no longer what was computed"


RELU_IN_PLACE = FAULTS["relu_cotangent_overwritten"].make
TARGET = Input("target", (2, 3))
VIEWED = network(
    X,
    TARGET,
    node("rectified", "relu", "x"),
    node("turned", "transpose", "rectified", axes=(1, 0)),
    node("back", "transpose", "turned", axes=(1, 0)),
    node("loss", "mse", "back", "target"),
)
SUMMED = network(X, node("rectified", "relu", "x"), node("doubled", "add", "rectified", "rectified"))
BRANCHED = network(
    X, node("rectified", "relu", "x"), node("bent", "tanh", "rectified"), node("all", "add", "bent", "rectified")
)


@pytest.mark.parametrize("of", [VIEWED, SUMMED, BRANCHED], ids=["views", "one reader", "two readers"])
def test_who_overwrites_its_cotangent_is_blamed_for_all_that_lies_in_its_memory(of: Network) -> None:
    found = examined(RELU_IN_PLACE(), of)
    assert {check.key.name for check in found.wrong} <= {"rectified", "turned", "back"}
    assert culprits(found) == ["rectified"]
    assert found.unblamed == ()


def test_who_reads_what_lies_in_one_memory_is_blamed_where_nobody_overwrites_it() -> None:
    assert culprits(examined(spoilt("mse"), VIEWED)) == ["loss"]
    assert culprits(examined(spoilt("add"), BRANCHED)) == ["all"]


def writing_over_what_it_reads(layer: str, when: str) -> NumpyReference:
    """A layer that computes its output, or its gradient, in the memory of its input."""
    right, back = LAYERS[layer].forward, LAYERS[layer].backward

    def forward(x: Array, **options: Any) -> tuple[Array, Any]:
        out, cache = right(x.copy(), **options)
        if when == "forward":
            np.copyto(x, out)
        return out, (x, cache)

    def backward(dout: Array, kept: Any) -> dict[str, Array]:
        gradients = back(dout, kept[1])
        if when == "backward":
            np.copyto(kept[0], gradients["x"])
        return gradients

    return NumpyReference(rows={layer: (forward, backward)})


LAST = network(X, node("a", "tanh", "x"), node("out", "exp", "a"))
BESIDE = network(
    X, node("a", "tanh", "x"), node("out", "exp", "a"), node("b", "sigmoid", "a"), node("end", "multiply", "b", "out")
)
KEPT_BY_TWO = network(
    X,
    node("first", "sigmoid", "x"),
    node("a", "tanh", "first"),
    node("out", "exp", "a"),
    node("b", "multiply", "first", "a"),
    node("end", "multiply", "b", "out"),
)


@EACH_DTYPE
@pytest.mark.parametrize("of", [LAST, BESIDE, KEPT_BY_TWO], ids=["last", "beside", "summed"])
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_who_overwrites_what_others_have_kept_is_blamed_and_not_they(when: str, of: Network, dtype: str) -> None:
    """Tanh has kept its output for its backward pass, which is wrong by no fault of its own."""
    examination = examined(writing_over_what_it_reads("exp", when), of, dtype)
    found = wrong(examination)
    assert found[value_of("a")] == "mutated_input"
    assert "gradient" in found.values()
    assert culprits(examination) == ["out"]
    assert examination.unblamed == ()
    first = next(row for row in rows(examination) if row.culprit)
    assert (first.node, first.check.key.name, first.check.kind) == ("out", "a", "mutated_input")


def test_who_overwrites_is_blamed_beside_a_neighbour_that_is_wrong_itself() -> None:
    overwriting, bad = writing_over_what_it_reads("exp", "backward"), spoilt("tanh")
    adapter = NumpyReference(rows={"exp": overwriting._rows["exp"], "tanh": bad._rows["tanh"]})
    examination = examined(adapter, LAST)
    assert culprits(examination) == ["a", "out"]
    assert {each.node.name: each.keys for each in examination.culprits} == {
        "a": (gradient_of("x"),),
        "out": (value_of("a"),),
    }


def test_values_in_one_memory_are_overwritten_together() -> None:
    of = network(X, node("a", "tanh", "x"), node("same", "identity", "a"), node("out", "exp", "same"))
    overwriting = writing_over_what_it_reads("exp", "forward")
    handing_back = (lambda x: (x, None), LAYERS["identity"].backward)
    adapter = NumpyReference(rows={"exp": overwriting._rows["exp"], "identity": handing_back})
    examination = examined(adapter, of)
    found = wrong(examination)
    assert {key for key, kind in found.items() if kind == "mutated_input"} == {value_of("a"), value_of("same")}
    assert culprits(examination) == ["out"]
