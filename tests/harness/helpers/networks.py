"""Small networks, and ordinary numbers for them."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradproof.draw.drawing import Drawn
from gradproof.model.case import Case
from gradproof.model.network import Input, Network, Node
from gradproof.model.options import OptionValue
from gradproof.reference import LAYERS

Array = np.ndarray[Any, Any]


def node(name: str, layer: str, *inputs: str, parameters: str = "", **options: OptionValue) -> Node:
    """A node; its parameters are written "slot:name slot:name"."""
    pairs = dict(pair.split(":") for pair in parameters.split())
    return Node.of(name, LAYERS[layer], *inputs, parameters=pairs, options=options)


def linear(name: str, source: str, suffix: str = "", features: int = 3) -> Node:
    """A linear node whose parameters are w and b, each with the suffix."""
    return node(name, "linear", source, parameters=f"weight:w{suffix} bias:b{suffix}", features=features)


def network(*parts: Input | Node) -> Network:
    """The network of these inputs and nodes, in the order in which they are given."""
    inputs = tuple(part for part in parts if isinstance(part, Input))
    return Network(inputs, tuple(part for part in parts if isinstance(part, Node)))


def chain(*layers: str, shape: tuple[int, ...] = (2, 3)) -> Network:
    """One input x of this shape, then these layers one after another: h1, h2, ..."""
    names = ["x", *(f"h{i + 1}" for i in range(len(layers)))]
    return network(Input("x", shape), *(node(names[i + 1], layer, names[i]) for i, layer in enumerate(layers)))


def ordinary(of: Network, dtype: str = "float64", seed: int = 11) -> Case:
    """The network on numbers of ordinary size, none of them at an edge of its domain."""
    return Drawn(of, seed=seed, edge_share=0.0, scale=1.0).case(dtype)


def case_of(of: Network, dtype: str = "float64", cotangent: Any = None, **values: Any) -> Case:
    """The network on numbers that are given by name, rounded to the dtype; the cotangent is drawn if not given."""
    seed = normal(*of.shapes[of.output]) if cotangent is None else cotangent
    return Case(of, dtype, {k: np.asarray(v, dtype) for k, v in values.items()}, np.asarray(seed, dtype))


def normal(*shape: int, seed: int = 1) -> Array:
    """Standard normal numbers in float64."""
    return np.random.default_rng(seed).normal(size=shape)


X = Input("x", (2, 3))
Y = Input("y", (2, 3))

SIX = network(
    X,
    Input("target", (2, 4)),
    node("line", "linear", "x", parameters="weight:w bias:b", features=4),
    node("bent", "tanh", "line"),
    node("gate", "sigmoid", "bent"),
    node("rise", "softplus", "bent"),
    node("gated", "multiply", "gate", "rise"),
    node("loss", "mse", "gated", "target"),
)
"""Six nodes, of which two read one tensor."""

SHARED = network(
    X,
    node("first", "linear", "x", parameters="weight:w", features=3, use_bias=False),
    node("middle", "tanh", "first"),
    node("second", "linear", "middle", parameters="weight:w", features=3, use_bias=False),
)
"""Two nodes with one parameter."""

TWICE = network(X, node("square", "multiply", "x", "x"))
"""A node that reads one tensor twice."""
