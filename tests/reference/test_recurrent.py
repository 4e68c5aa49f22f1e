"""Recurrent networks: values computed by hand, what stacks and directions are made of, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gradproof.model.layer import Layer
from gradproof.model.network import Input, Network, NetworkError, Node
from gradproof.model.options import Options, Shape
from gradproof.reference import LAYERS

LOG2, LOG3 = math.log(2.0), math.log(3.0)  # tanh(LOG2) = 3/5, sigmoid(LOG3) = 3/4
NAMES = ("rnn_tanh", "gru", "lstm")
Array = np.ndarray[Any, Any]


def column(*numbers: float) -> Array:
    return np.array(numbers).reshape(-1, 1)


def state(number: float) -> Array:
    return np.full((1, 1, 1), number)


def run(layer: str, x: Array, *, returns: str = "sequence", bidirectional: bool = False, **arrays: Array) -> Any:
    layers = sum(name.startswith("weight_ih") for name in arrays) // (1 + bidirectional)
    return LAYERS[layer].forward(x, layers=layers, bidirectional=bidirectional, returns=returns, **arrays)


def gradients(layer: str, dout: Array, cache: Any) -> dict[str, Array]:
    return LAYERS[layer].backward(dout, cache)


def close(got: dict[str, Array], wanted: dict[str, Any]) -> None:
    for name, numbers in wanted.items():
        np.testing.assert_allclose(got[name], numbers, rtol=1e-13, atol=1e-15, err_msg=name)


def test_rnn_over_two_steps_by_hand() -> None:
    """h1 = tanh(log 2) = 3/5, h2 = tanh(w 3/5) = 3/5 with w = log 2 / (3/5)."""
    w = LOG2 / 0.6
    x = np.array([LOG2, 0.0]).reshape(2, 1, 1)
    out, cache = run("rnn_tanh", x, returns="hidden", weight_ih_l0=column(1.0), weight_hh_l0=column(w))
    np.testing.assert_allclose(out, state(0.6), rtol=1e-13)
    last = 1.0 - 0.36
    first = last * w * (1.0 - 0.36)
    wanted = {"x": column(first, last)[..., None], "weight_ih_l0": [[first * LOG2]], "weight_hh_l0": [[last * 0.6]]}
    close(gradients("rnn_tanh", state(1.0), cache), wanted)


def test_gru_step_by_hand() -> None:
    """r = 1/2, z = 3/4, n = tanh(r 2 log 2) = 3/5, h' = 3/5 / 4 + 3/4: the bias of n's recurrent part is reset too."""
    weights = {"weight_ih_l0": np.zeros((3, 1)), "weight_hh_l0": np.zeros((3, 1))}
    biases = {"bias_ih_l0": np.array([0.0, LOG3, 0.0]), "bias_hh_l0": np.array([0.0, 0.0, 2 * LOG2])}
    out, cache = run("gru", np.ones((1, 1, 1)), h0=state(1.0), **weights, **biases)
    np.testing.assert_allclose(out, state(0.9), rtol=1e-13)
    new = 0.25 * 0.64
    reset, update = new * 2 * LOG2 * 0.25, (1.0 - 0.6) * 0.75 * 0.25
    wanted = {"bias_ih_l0": [reset, update, new], "bias_hh_l0": [reset, update, new / 2], "h0": state(0.75)}
    close(gradients("gru", state(1.0), cache), wanted)


def test_lstm_step_by_hand() -> None:
    """i = 1/2, f = 3/4, g = 3/5, o = 1/2, c' = f c0 + i g = log 2, h' = o tanh(c') = 3/10."""
    c0 = (LOG2 - 0.3) / 0.75
    weights = {"weight_ih_l0": column(0.0, LOG3, LOG2, 0.0), "weight_hh_l0": np.zeros((4, 1))}
    out, cache = run("lstm", np.ones((1, 1, 1)), h0=state(0.0), c0=state(c0), **weights)
    np.testing.assert_allclose(out, state(0.3), rtol=1e-13)
    dcell = 0.5 * 0.64
    rows = column(dcell * 0.6 * 0.25, dcell * c0 * 0.75 * 0.25, dcell * 0.5 * 0.64, 0.6 * 0.25)
    close(gradients("lstm", state(1.0), cache), {"weight_ih_l0": rows, "c0": state(0.75 * dcell)})


def drawn(layer: str, x: Shape, **options: Any) -> tuple[Array, dict[str, Array]]:
    rng = np.random.default_rng(7)
    row = LAYERS[layer]
    slots = row.parameters((x,), row.complete({"hidden": 3, **options}))
    return rng.normal(size=x), {slot: rng.normal(size=shape) for slot, shape in slots.items()}


def renamed(parameters: dict[str, Array], end: str) -> dict[str, Array]:
    """The parameters whose names have this end, as those of one layer in one direction."""
    return {f"{name.removesuffix(end)}_l0": each for name, each in parameters.items() if name.endswith(end)}


@pytest.mark.parametrize("layer", NAMES)
def test_two_directions_are_two_runs_of_which_one_reads_from_the_end(layer: str) -> None:
    x, parameters = drawn(layer, (4, 2, 3), bidirectional=True)
    out, cache = run(layer, x, bidirectional=True, **parameters)
    dout = np.random.default_rng(8).normal(size=out.shape)
    onward, onward_cache = run(layer, x, **renamed(parameters, "_l0"))
    back, back_cache = run(layer, x[::-1], **renamed(parameters, "_l0_reverse"))
    np.testing.assert_array_equal(out, np.concatenate([onward, back[::-1]], axis=-1))
    dx = gradients(layer, dout[..., :3], onward_cache)["x"]
    dback = gradients(layer, dout[::-1, :, 3:], back_cache)
    both = gradients(layer, dout, cache)
    np.testing.assert_allclose(both["x"], dx + dback["x"][::-1], rtol=1e-12)
    np.testing.assert_array_equal(both["weight_hh_l0_reverse"], dback["weight_hh_l0"])


@pytest.mark.parametrize("layer", NAMES)
def test_a_stack_feeds_each_layer_to_the_next(layer: str) -> None:
    x, parameters = drawn(layer, (4, 2, 3), layers=2)
    out, cache = run(layer, x, **parameters)
    below, below_cache = run(layer, x, **renamed(parameters, "_l0"))
    above, above_cache = run(layer, below, **renamed(parameters, "_l1"))
    np.testing.assert_array_equal(out, above)
    dabove = gradients(layer, np.cos(out), above_cache)
    dbelow = gradients(layer, dabove["x"], below_cache)
    both = gradients(layer, np.cos(out), cache)
    np.testing.assert_array_equal(both["x"], dbelow["x"])
    np.testing.assert_array_equal(both["weight_ih_l1"], dabove["weight_ih_l0"])


@pytest.mark.parametrize("layer", NAMES)
def test_the_last_states_are_where_each_direction_ends(layer: str) -> None:
    x, parameters = drawn(layer, (4, 2, 3), bidirectional=True)
    sequence, _ = run(layer, x, bidirectional=True, **parameters)
    hidden, _ = run(layer, x, bidirectional=True, returns="hidden", **parameters)
    np.testing.assert_array_equal(hidden, np.stack([sequence[-1, :, :3], sequence[0, :, 3:]]))


@pytest.mark.parametrize("layer", NAMES)
def test_saturated_gates_stay_finite(layer: str) -> None:
    x, parameters = drawn(layer, (3, 2, 3), layers=2)
    out, cache = run(layer, 1e3 * x, **{name: 1e3 * each for name, each in parameters.items()})
    with np.errstate(over="raise", invalid="raise"):
        found = gradients(layer, np.ones_like(out), cache)
    assert all(np.isfinite(each).all() for each in (out, *found.values()))


def network(layer: Layer, shapes: dict[str, Shape], options: Options) -> Network:
    parameters = {name: name for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")}
    inputs = tuple(Input(name, shape) for name, shape in shapes.items())
    return Network(inputs, (Node.of("h", layer, *shapes, parameters=parameters, options=options),))


@pytest.mark.parametrize(
    ("layer", "shapes", "options", "message"),
    [
        ("gru", {"x": (3, 2)}, {}, r"needs an input of rank 3, got shape \[3, 2\]"),
        ("gru", {"x": (0, 2, 3)}, {}, r"at least one time step, row and feature, got an input of shape \[0, 2, 3\]"),
        ("gru", {"x": (3, 2, 3)}, {"layers": 0}, "option layers=0: expected an integer of at least 1"),
        ("gru", {"x": (3, 2, 3)}, {"returns": "cell"}, "returns='cell': expected one of 'sequence', 'hidden'"),
        (
            "lstm",
            {"x": (3, 2, 3), "h0": (1, 2, 4), "c0": (2, 2, 4)},
            {"initial": True},
            r"its initial states must have shape \[1, 2, 4\], got \[2, 2, 4\]",
        ),
        ("lstm", {"x": (3, 2, 3), "h0": (1, 2, 4)}, {"initial": True}, r"takes 3 inputs \(x, h0, c0\), got 2"),
    ],
)
def test_refuses(layer: str, shapes: dict[str, Shape], options: Options, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        network(LAYERS[layer], shapes, {"hidden": 4, **options})


def test_accepts_what_the_refused_ones_miss() -> None:
    shapes = {"x": (3, 2, 3), "h0": (1, 2, 4), "c0": (1, 2, 4)}
    assert network(LAYERS["lstm"], shapes, {"hidden": 4, "initial": True}).shapes["h"] == (3, 2, 4)
