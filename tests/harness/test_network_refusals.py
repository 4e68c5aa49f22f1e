"""What no Network may be, each said in a sentence: unknown names, shapes that do not fit, parts in the wrong order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from gradproof.model.layer import UNIT, index_domain
from gradproof.model.network import Input, Network, NetworkError, Node
from gradproof.model.options import OptionValue
from gradproof.reference import LAYERS
from helpers.networks import X, Y, linear, network, node


def beside(layer: str, *others: Input, **options: OptionValue) -> Callable[[], Network]:
    """The layer on x and the other inputs."""
    return lambda: network(X, *others, node("a", layer, "x", *(each.name for each in others), **options))


def of(*parts: Input | Node) -> Callable[[], Network]:
    return lambda: network(*parts)


REFUSED: dict[str, tuple[Callable[[], Network], str]] = {
    "no node": (of(X), "a network needs at least one node"),
    # Options.
    "unknown option": (
        beside("softmax", dim=1),
        "node 'a' (softmax): unknown option 'dim'; valid options: axis",
    ),
    "unknown option of several": (
        beside("layer_norm", epsilon=1e-5),
        "node 'a' (layer_norm): unknown option 'epsilon'; valid options: axes, eps, affine",
    ),
    "unknown option of none": (
        beside("relu", inplace=True),
        "node 'a' (relu): unknown option 'inplace'; valid options: none",
    ),
    "missing option": (beside("linear"), "node 'a' (linear): option 'features' must be given"),
    "axis": (
        beside("softmax", axis=2),
        "node 'a' (softmax): option axis=2: expected an axis of an input of shape [2, 3]: -2 to 1",
    ),
    "negative axis": (
        beside("softmax", axis=-3),
        "node 'a' (softmax): option axis=-3: expected an axis of an input of shape [2, 3]: -2 to 1",
    ),
    "trailing axes": (
        beside("layer_norm", axes=3, affine=False),
        "node 'a' (layer_norm): option axes=3: expected from 1 to 2 trailing axes of an input of shape [2, 3]",
    ),
    "choice": (
        beside("mse", Y, reduction="average"),
        "node 'a' (mse): option reduction='average': expected one of 'mean', 'none', 'sum'",
    ),
    "choice of another type": (
        beside("linear", features=2, use_bias=0),
        "node 'a' (linear): option use_bias=0: expected one of True, False",
    ),
    "size": (
        beside("linear", features=0),
        "node 'a' (linear): option features=0: expected an integer of at least 1",
    ),
    "size of another type": (
        beside("linear", features=2.0),
        "node 'a' (linear): option features=2.0: expected an integer of at least 1",
    ),
    "number out of bounds": (
        beside("elu", alpha=10.5),
        "node 'a' (elu): option alpha=10.5: expected a number from -10 to 10",
    ),
    "not a number": (
        beside("elu", alpha=float("nan")),
        "node 'a' (elu): option alpha=nan: expected a number from -10 to 10",
    ),
    "new shape": (
        beside("reshape", shape=(4, 2)),
        "node 'a' (reshape): option shape=(4, 2): expected a shape with 6 elements, as many as the input of "
        "shape [2, 3]",
    ),
    # The graph.
    "dangling input": (
        of(X, node("a", "relu", "missing")),
        "node 'a': its input 'missing' is neither an input nor a node",
    ),
    "parameter as input": (
        of(X, linear("h", "x"), node("a", "relu", "w")),
        "node 'a': its input 'w' is neither an input nor a node",
    ),
    "later node": (
        of(X, node("a", "relu", "b"), node("b", "tanh", "x")),
        "node 'a': its input 'b' stands later; list nodes in forward order",
    ),
    "cycle of one": (
        of(X, node("a", "add", "x", "a")),
        "node 'a' reads its own output, a cycle: a <- a",
    ),
    "cycle of two": (
        of(X, node("a", "add", "x", "b"), node("b", "relu", "a")),
        "node 'a' reads its own output, a cycle: a <- b <- a",
    ),
    "cycle of three": (
        of(X, node("a", "add", "x", "c"), node("b", "relu", "a"), node("c", "tanh", "b")),
        "node 'a' reads its own output, a cycle: a <- c <- b <- a",
    ),
    "two nodes of one name": (
        of(X, node("a", "relu", "x"), node("a", "tanh", "a")),
        "the name 'a' stands for more than one input, node or parameter",
    ),
    "two inputs of one name": (
        of(X, Input("x", (3,)), node("a", "relu", "x")),
        "the name 'x' stands for more than one input, node or parameter",
    ),
    "an input and a node of one name": (
        of(X, node("x", "relu", "x")),
        "the name 'x' stands for more than one input, node or parameter",
    ),
    "a parameter and a node of one name": (
        of(X, linear("w", "x")),
        "the name 'w' stands for more than one input, node or parameter",
    ),
    "a parameter and an input of one name": (
        of(X, node("a", "layer_norm", "x", parameters="weight:x bias:b")),
        "the name 'x' stands for more than one input, node or parameter",
    ),
    "idle input": (
        of(X, Y, node("a", "relu", "x")),
        "'y' does not reach the output 'a', so it has no gradient",
    ),
    "idle node": (
        of(X, node("idle", "relu", "x"), node("a", "tanh", "x")),
        "'idle' does not reach the output 'a', so it has no gradient",
    ),
    "idle parameter": (
        of(X, linear("idle", "x"), node("a", "tanh", "x")),
        "'b' does not reach the output 'a', so it has no gradient",
    ),
    # Numbers of inputs, and slots.
    "one input too few": (of(X, node("a", "add", "x")), "node 'a' (add): takes 2 inputs (a, b), got 1"),
    "one input too many": (
        of(X, node("a", "subtract", "x", "x", "x")),
        "node 'a' (subtract): takes 2 inputs (a, b), got 3",
    ),
    "nothing to concatenate": (
        of(X, node("a", "concatenate")),
        "node 'a' (concatenate): takes at least 1 inputs (x), got 0",
    ),
    "slots empty": (
        of(X, node("a", "linear", "x", features=2)),
        "node 'a' (linear): needs parameters ['bias', 'weight'], got none",
    ),
    "slot missing": (
        of(X, node("a", "linear", "x", parameters="weight:w", features=2)),
        "node 'a' (linear): needs parameters ['bias', 'weight'], got ['weight']",
    ),
    "slot unwanted": (
        of(X, node("a", "linear", "x", parameters="weight:w bias:b", features=2, use_bias=False)),
        "node 'a' (linear): needs parameters ['weight'], got ['bias', 'weight']",
    ),
    "slot of a layer without": (
        of(X, node("a", "relu", "x", parameters="slope:s")),
        "node 'a' (relu): needs parameters none, got ['slope']",
    ),
    # Shapes.
    "add": (
        beside("add", Input("y", (2, 4))),
        "node 'a' (add): cannot broadcast shapes [2, 3] and [2, 4]",
    ),
    "concatenate along the last axis": (
        beside("concatenate", Input("y", (3, 3))),
        "node 'a' (concatenate): cannot concatenate shapes [2, 3] and [3, 3] along axis -1",
    ),
    "concatenate along the first axis": (
        beside("concatenate", Y, Input("z", (2, 4)), axis=0),
        "node 'a' (concatenate): cannot concatenate shapes [2, 3] and [2, 4] along axis 0",
    ),
    "concatenate another rank": (
        beside("concatenate", Input("y", (3,)), axis=0),
        "node 'a' (concatenate): cannot concatenate shapes [2, 3] and [3] along axis 0",
    ),
    "loss beside a target that would broadcast": (
        beside("mse", Input("y", (2, 1))),
        "node 'a' (mse): a prediction of shape [2, 3] needs a target of shape [2, 3], got [2, 1]",
    ),
    "classes": (
        beside("cross_entropy", Input("y", (3,), index_domain(3))),
        "node 'a' (cross_entropy): a prediction of shape [2, 3] needs a target of shape [2], got [3]",
    ),
    "class probabilities": (
        beside("cross_entropy", Input("y", (2,), UNIT), targets="probabilities"),
        "node 'a' (cross_entropy): a prediction of shape [2, 3] needs a target of shape [2, 3], got [2]",
    ),
    "shared weight": (
        of(X, linear("h", "x", features=4), linear("a", "h", features=4)),
        "node 'a' (linear): the shared parameter 'w' has shape [4, 3] elsewhere, and must have [4, 4] here",
    ),
    "parameter in slots of two shapes": (
        of(X, node("a", "linear", "x", parameters="weight:p bias:p", features=3)),
        "node 'a' (linear): the shared parameter 'p' has shape [3, 3] elsewhere, and must have [3] here",
    ),
    # Domains.
    "probabilities from a real node": (
        of(X, Input("t", (2, 3), UNIT), node("h", "tanh", "x"), node("a", "bce", "h", "t")),
        "node 'a' (bce): its x must hold unit, but 'h' holds real",
    ),
    "a real target": (
        of(X, Y, node("h", "sigmoid", "x"), node("a", "bce", "h", "y")),
        "node 'a' (bce): its target must hold unit, but 'y' holds real",
    ),
    "class indices as numbers": (
        of(Input("i", (2,), index_domain(3)), node("a", "relu", "i")),
        "node 'a' (relu): its x must hold real, but 'i' holds integers from 0 to 2",
    ),
    "numbers as class indices": (
        beside("cross_entropy", Input("t", (2,))),
        "node 'a' (cross_entropy): its target must hold integers from 0 to 2 or -100, but 't' holds real",
    ),
    "more classes than the prediction has": (
        beside("cross_entropy", Input("t", (2,), index_domain(4))),
        "node 'a' (cross_entropy): its target must hold integers from 0 to 2 or -100, "
        "but 't' holds integers from 0 to 3",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    build, message = REFUSED[name]
    with pytest.raises(NetworkError) as refusal:
        build()
    assert str(refusal.value) == message


def test_a_refusal_is_a_value_error_without_a_chain() -> None:
    with pytest.raises(ValueError, match="takes 2 inputs") as refusal:
        network(X, node("a", "add", "x"))
    assert refusal.value.__suppress_context__


def test_a_replaced_node_is_checked_again() -> None:
    each = network(X, node("a", "tanh", "x"), node("out", "exp", "a"))
    with pytest.raises(NetworkError, match="neither an input nor a node"):
        replace(each, nodes=each.nodes[1:])


@pytest.mark.parametrize(
    ("layer", "given", "default"),
    [("softmax", {"axis": 0}, {"axis": -1}), ("linear", {"features": 2}, {"features": 2, "use_bias": True})],
)
def test_options_are_completed_in_the_order_of_the_table(
    layer: str, given: dict[str, OptionValue], default: dict[str, OptionValue]
) -> None:
    completed = Node.of("a", LAYERS[layer], "x", options=given).options
    assert completed == tuple((default | given).items())


def test_a_shared_parameter_of_one_shape_is_accepted() -> None:
    each = network(X, linear("h", "x"), linear("out", "h"))
    assert each.parameters == {"w": (3, 3), "b": (3,)}
