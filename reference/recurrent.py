"""Recurrent networks: stacked layers, each run over time in one direction or in both.

Legend: T time steps, N batch, I input features, H hidden features, D directions (1 or 2), L stacked layers,
G gates of a cell: the number of blocks of H rows in its weights. Steps are T first: x is (T, N, I).

A cell sees its input and its hidden state through two linear maps, given = x weight_ih^T + bias_ih and
recurrent = h weight_hh^T + bias_hh, both (N, G H). All else in it is elementwise, and is what a cell's step does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gradproof.model.layer import Argument, Layer, ShapeError
from gradproof.model.options import Choice, Integer, Option, Options, Shape, Size
from gradproof.reference.common import Array, Gradients, logistic

States = tuple[Any, ...]
Weights = dict[str, Array]
Elementwise = Callable[[Array], Array]


@dataclass(frozen=True)
class Cell:
    """What one kind of recurrent network does in one step.

    step: (given, recurrent, states) -> (states, kept); the first of the states is the hidden one, the cell's output.
    step_backward: (dstates, kept) -> (dgiven, drecurrent, dstates), the last one without what passes weight_hh.
    """

    gates: int
    states: int
    step: Callable[..., tuple[States, Any]]
    step_backward: Callable[[States, Any], tuple[Array, Array, States]]


def tanh_step(given: Array, recurrent: Array, states: States, tanh: Elementwise = np.tanh) -> tuple[States, Array]:
    """h' = tanh(given + recurrent)."""
    out = tanh(given + recurrent)
    return (out,), out


def tanh_step_backward(dstates: States, out: Array) -> tuple[Array, Array, States]:
    """The derivative of tanh is 1 - h'^2."""
    dsum = dstates[0] * (1.0 - out * out)
    return dsum, dsum, (0.0,)


class GruStep(NamedTuple):
    """The gates r and z, the candidate n, what it sees of the hidden state, b_n, and that state h: each (N, H)."""

    r: Array
    z: Array
    n: Array
    b_n: Array
    h: Array


def gru_step(
    given: Array, recurrent: Array, states: States, tanh: Elementwise = np.tanh, sigmoid: Elementwise = logistic
) -> tuple[States, GruStep]:
    """h' = (1 - z) n + z h, the gates' blocks in the order r, z, n of given a and recurrent b; see `gru_forward`."""
    (a_r, a_z, a_n), (b_r, b_z, b_n) = _blocks(given, 3), _blocks(recurrent, 3)
    (h,) = states
    r, z = sigmoid(a_r + b_r), sigmoid(a_z + b_z)
    n = tanh(a_n + r * b_n)
    return ((1.0 - z) * n + z * h,), GruStep(r, z, n, b_n, h)


def gru_step_backward(dstates: States, kept: GruStep) -> tuple[Array, Array, States]:
    """da_n = dh' (1 - z) (1 - n^2), da_z = dh' (h - n) z (1 - z), da_r = da_n b_n r (1 - r); dh = dh' z.

    db has da_r and da_z too, and db_n = da_n r.
    """
    r, z, n = kept.r, kept.z, kept.n
    (dout,) = dstates
    da_n = dout * (1.0 - z) * (1.0 - n * n)
    da_z = dout * (kept.h - n) * z * (1.0 - z)
    da_r = da_n * kept.b_n * r * (1.0 - r)
    dgiven = np.concatenate([da_r, da_z, da_n], axis=-1)
    drecurrent = np.concatenate([da_r, da_z, da_n * r], axis=-1)
    return dgiven, drecurrent, (dout * z,)


class LstmStep(NamedTuple):
    """The gates i, f and o, the candidate g, t = tanh(c'), and the cell c before the step: each (N, H)."""

    i: Array
    f: Array
    g: Array
    o: Array
    t: Array
    c: Array


def lstm_step(
    given: Array, recurrent: Array, states: States, tanh: Elementwise = np.tanh, sigmoid: Elementwise = logistic
) -> tuple[States, LstmStep]:
    """c' = f c + i g, h' = o tanh(c'), the gates' blocks in the order i, f, g, o; see `lstm_forward`."""
    _, c = states
    s_i, s_f, s_g, s_o = _blocks(given + recurrent, 4)
    i, f, g, o = sigmoid(s_i), sigmoid(s_f), tanh(s_g), sigmoid(s_o)
    cell = f * c + i * g
    t = tanh(cell)
    return (o * t, cell), LstmStep(i, f, g, o, t, c)


def lstm_step_backward(dstates: States, kept: LstmStep) -> tuple[Array, Array, States]:
    """dc' gains dh' o (1 - t^2), t = tanh(c'); of the sums in the gates, ds_i = dc' g i (1 - i),

    ds_f = dc' c f (1 - f), ds_g = dc' i (1 - g^2), ds_o = dh' t o (1 - o); dc = dc' f.
    """
    i, f, g, o, t = kept.i, kept.f, kept.g, kept.o, kept.t
    dhidden, dcarry = dstates
    dcell = dcarry + dhidden * o * (1.0 - t * t)
    dgates = [
        dcell * g * i * (1.0 - i),
        dcell * kept.c * f * (1.0 - f),
        dcell * i * (1.0 - g * g),
        dhidden * t * o * (1.0 - o),
    ]
    dsum = np.concatenate(dgates, axis=-1)
    return dsum, dsum, (0.0, dcell * f)


def _blocks(gates: Array, count: int) -> list[Array]:
    """The gates' blocks, side by side on the last axis."""
    return np.split(gates, count, axis=-1)


TANH = Cell(1, 1, tanh_step, tanh_step_backward)
GRU = Cell(3, 1, gru_step, gru_step_backward)
LSTM = Cell(4, 2, lstm_step, lstm_step_backward)


class Run(NamedTuple):
    """What one layer keeps in one direction: x (T, N, I), the hidden states before each step (T, N, H), what each step
    keeps, and the weights without their suffix."""

    x: Array
    before: Array
    steps: list[Any]
    weights: Weights


def _run(cell: Cell, x: Array, states: States, weights: Weights) -> tuple[Array, States, Run]:
    """One layer in one direction: its outputs (T, N, H), its last states and what it keeps."""
    given = x @ weights["weight_ih"].T + weights.get("bias_ih", 0.0)
    hidden, steps = [states[0]], []
    for at_step in given:
        recurrent = hidden[-1] @ weights["weight_hh"].T + weights.get("bias_hh", 0.0)
        states, step = cell.step(at_step, recurrent, states)
        hidden.append(states[0])
        steps.append(step)
    return np.stack(hidden[1:]), states, Run(x, np.stack(hidden[:-1]), steps, weights)


def _run_backward(cell: Cell, douts: Array, dstates: States, run: Run) -> tuple[Array, States, dict[str, Array]]:
    """dx, the cotangents of the first states and of the weights: back through time, the weights' summed over it."""
    weights = run.weights
    dgiven, drecurrent = [], []
    for dout, at_step in zip(douts[::-1], reversed(run.steps), strict=True):
        dhidden, *dothers = dstates
        dg, dr, direct = cell.step_backward((dhidden + dout, *dothers), at_step)
        dstates = (direct[0] + dr @ weights["weight_hh"], *direct[1:])
        dgiven.append(dg)
        drecurrent.append(dr)
    into, back = np.stack(dgiven[::-1]), np.stack(drecurrent[::-1])
    gradients = {
        "weight_ih": np.einsum("tng,tni->gi", into, run.x),
        "weight_hh": np.einsum("tng,tnh->gh", back, run.before),
    }
    if "bias_ih" in weights:
        gradients |= {"bias_ih": into.sum(axis=(0, 1)), "bias_hh": back.sum(axis=(0, 1))}
    return into @ weights["weight_ih"], dstates, gradients


RETURNS = ("sequence", "hidden", "cell")


class Unrolled(NamedTuple):
    """runs: of layer l in direction d at l D + d. which: place in RETURNS. initial: whether each state was given."""

    runs: list[Run]
    layers: int
    bidirectional: bool
    which: int
    initial: tuple[bool, ...]


def unrolled(
    cell: Cell,
    x: Array,
    initial: Sequence[Array | None],
    parameters: Weights,
    layers: int,
    bidirectional: bool,
    returns: str,
) -> tuple[Array, Unrolled]:
    """Each layer reads the outputs of the one below, both directions side by side; the first states are 0 by default.

    The first and last states of layer l in direction d stand at l D + d.
    """
    suffixes = _suffixes(layers, bidirectional)
    directions = len(suffixes) // layers
    shape = (len(suffixes), x.shape[1], parameters["weight_hh_l0"].shape[1])
    first = [np.zeros_like(x, shape=shape) if state is None else state for state in initial]
    last, runs = [], []
    for layer in range(layers):
        outs = []
        for direction in range(directions):
            at = layer * directions + direction
            suffix = suffixes[at]
            weights = {name[: -len(suffix)]: parameters[name] for name in _slots(suffix, parameters)}
            states = tuple(state[at] for state in first)
            out, states, run = _run(cell, _turned(x, direction), states, weights)
            outs.append(_turned(out, direction))
            last.append(states)
            runs.append(run)
        x = np.concatenate(outs, axis=-1)
    which = RETURNS.index(returns)
    out = np.stack([states[which - 1] for states in last]) if which else x
    return out, Unrolled(runs, layers, bidirectional, which, tuple(state is not None for state in initial))


def _backward(cell: Cell, dout: Array, kept: Unrolled) -> Gradients:
    """From the last layer to the first, each direction back through its own time."""
    suffixes = _suffixes(kept.layers, kept.bidirectional)
    directions = len(suffixes) // kept.layers
    steps, batch, features = kept.runs[0].before.shape
    nothing = np.zeros_like(dout, shape=(len(suffixes), batch, features))
    dlast = [dout if kept.which == state + 1 else nothing for state in range(cell.states)]
    dx = np.zeros_like(dout, shape=(steps, batch, directions * features)) if kept.which else dout
    gradients: Gradients = {}
    dfirst: list[States] = []
    for layer in reversed(range(kept.layers)):
        dparts = np.split(dx, directions, axis=-1)
        dinputs = []
        for direction in reversed(range(directions)):
            at = layer * directions + direction
            dstates = tuple(each[at] for each in dlast)
            turned = _turned(dparts[direction], direction)
            dinput, dstates, dweights = _run_backward(cell, turned, dstates, kept.runs[at])
            dinputs.append(_turned(dinput, direction))
            dfirst.insert(0, dstates)
            gradients |= {f"{name}{suffixes[at]}": each for name, each in dweights.items()}
        dx = dinputs[0] + dinputs[1] if kept.bidirectional else dinputs[0]
    starts = {f"{name}0": np.stack(each) for name, each in zip("hc", zip(*dfirst, strict=True), strict=False)}
    given = {name: each for (name, each), was in zip(starts.items(), kept.initial, strict=True) if was}
    return {"x": dx} | given | gradients


def _turned(x: Array, direction: int) -> Array:
    """The second direction reads time from its end."""
    return x[::-1] if direction else x


def _suffixes(layers: int, bidirectional: bool) -> list[str]:
    """What the names of a layer's parameters end in, in the order of the states."""
    ends = ("", "_reverse") if bidirectional else ("",)
    return [f"_l{layer}{end}" for layer in range(layers) for end in ends]


def _slots(suffix: str, parameters: Weights) -> list[str]:
    names = (f"{name}{suffix}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    return [name for name in names if name in parameters]


def rnn_tanh_forward(
    x: Array, h0: Array | None = None, *, layers: int, bidirectional: bool, returns: str, **parameters: Array
) -> tuple[Array, Unrolled]:
    """h_t = tanh(weight_ih x_t + bias_ih + weight_hh h_{t-1} + bias_hh) (Elman 1990).

    Shapes: x (T, N, I), h0 (L D, N, H), weight_ih (H, I), in higher layers (H, D H), weight_hh (H, H), biases (H,).
    Returns the outputs of the last layer (T, N, D H) or the last hidden states (L D, N, H).
    """
    return unrolled(TANH, x, (h0,), parameters, layers, bidirectional, returns)


def rnn_tanh_backward(dout: Array, kept: Unrolled) -> Gradients:
    """With s the sum in tanh: ds = dh (1 - h^2), dh_{t-1} = weight_hh^T ds; weights sum their outer products."""
    return _backward(TANH, dout, kept)


def gru_forward(
    x: Array, h0: Array | None = None, *, layers: int, bidirectional: bool, returns: str, **parameters: Array
) -> tuple[Array, Unrolled]:
    """h_t = (1 - z) n + z h_{t-1} (Cho et al. 2014), with given a and recurrent b from the legend of this file:

    r = sigmoid(a_r + b_r), z = sigmoid(a_z + b_z), n = tanh(a_n + r b_n). Shapes as in `rnn_tanh_forward`, but for
    three blocks of H rows (r, z, n) in weights and biases.
    """
    return unrolled(GRU, x, (h0,), parameters, layers, bidirectional, returns)


def gru_backward(dout: Array, kept: Unrolled) -> Gradients:
    """db_n = r da_n, where da_n = dh (1 - z) (1 - n^2); dh_{t-1} = z dh + weight_hh^T db; see `gru_step_backward`."""
    return _backward(GRU, dout, kept)


def lstm_forward(
    x: Array,
    h0: Array | None = None,
    c0: Array | None = None,
    *,
    layers: int,
    bidirectional: bool,
    returns: str,
    **parameters: Array,
) -> tuple[Array, Unrolled]:
    """c_t = f c_{t-1} + i g, h_t = o tanh(c_t) (Hochreiter and Schmidhuber 1997; f by Gers et al. 2000).

    i, f, o = sigmoid and g = tanh of the four blocks of weight_ih x_t + bias_ih + weight_hh h_{t-1} + bias_hh.
    Shapes as in `rnn_tanh_forward`, but for four blocks of H rows (i, f, g, o); c0 has h0's. May return the last
    cell states too (L D, N, H).
    """
    return unrolled(LSTM, x, (h0, c0), parameters, layers, bidirectional, returns)


def lstm_backward(dout: Array, kept: Unrolled) -> Gradients:
    """dc_t gains dh o (1 - tanh(c_t)^2); dc_{t-1} = f dc_t; dh_{t-1} = weight_hh^T ds; see `lstm_step_backward`."""
    return _backward(LSTM, dout, kept)


def _states_shape(shape: Shape, options: Options) -> Shape:
    directions = 2 if options["bidirectional"] else 1
    return (int(options["layers"]) * directions, shape[1], int(options["hidden"]))  # type: ignore[arg-type]


def _output_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    x, *initial = shapes
    if 0 in x:
        raise ShapeError(f"needs at least one time step, row and feature, got an input of shape {list(x)}")
    states = _states_shape(x, options)
    for shape in initial:
        if shape != states:
            raise ShapeError(f"its initial states must have shape {list(states)}, got {list(shape)}")
    directions = 2 if options["bidirectional"] else 1
    return states if options["returns"] != "sequence" else (x[0], x[1], directions * states[-1])


def _parameters(cell: Cell, shapes: Sequence[Shape], options: Options) -> dict[str, Shape]:
    hidden, layers = int(options["hidden"]), int(options["layers"])  # type: ignore[arg-type]
    suffixes = _suffixes(layers, bool(options["bidirectional"]))
    rows = cell.gates * hidden
    slots: dict[str, Shape] = {}
    for suffix in suffixes:
        below = shapes[0][-1] if suffix.startswith("_l0") else len(suffixes) // layers * hidden
        slots |= {f"weight_ih{suffix}": (rows, below), f"weight_hh{suffix}": (rows, hidden)}
        slots |= {f"bias_ih{suffix}": (rows,), f"bias_hh{suffix}": (rows,)} if options["use_bias"] else {}
    return slots


def _initial_shapes(shape: Shape, options: Options) -> tuple[Shape, ...]:
    return (_states_shape(shape, options),)


def _initial(name: str) -> Argument:
    return Argument(name, shapes=_initial_shapes, when=lambda options: bool(options["initial"]))


@dataclass(frozen=True)
class Hidden(Size):
    """The number of hidden features, drawn from few, because JAX compiles once per shape."""

    def choices(self, shape: Shape) -> Sequence[int]:
        return (3, 1)


def _options(returns: tuple[str, ...]) -> tuple[Option, ...]:
    return (
        Option("hidden", Hidden(), structural=True),
        Option("layers", Integer(1, (1, 2, 3)), 1),
        Option("bidirectional", Choice((False, True)), False),
        Option("use_bias", Choice((True, False)), True, structural=True),
        Option("initial", Choice((False, True)), False, structural=True),
        Option("returns", Choice(returns), "sequence"),
    )


recurrent = partial(
    Layer,
    kind="layer",
    family="recurrent",
    ranks=(3, 3),
    shapes=((3, 2, 2), (1, 1, 1), (5, 1, 3)),
    output_shape=_output_shape,
)

LAYERS: tuple[Layer, ...] = (
    recurrent(
        "rnn_tanh",
        forward=rnn_tanh_forward,
        backward=rnn_tanh_backward,
        options=_options(RETURNS[:2]),
        arguments=(Argument("x"), _initial("h0")),
        parameters=partial(_parameters, TANH),
    ),
    recurrent(
        "gru",
        forward=gru_forward,
        backward=gru_backward,
        options=_options(RETURNS[:2]),
        arguments=(Argument("x"), _initial("h0")),
        parameters=partial(_parameters, GRU),
    ),
    recurrent(
        "lstm",
        forward=lstm_forward,
        backward=lstm_backward,
        options=_options(RETURNS),
        arguments=(Argument("x"), _initial("h0"), _initial("c0")),
        parameters=partial(_parameters, LSTM),
    ),
)
