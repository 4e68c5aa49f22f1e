"""Small networks from well-known explanations of backpropagation, with the numbers that they must give.

Inputs are rows: a batch of one. Every network ends in a scalar loss, so the backward pass starts from dL/dL = 1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradproof.model.adapter import Adapter
from gradproof.model.case import Case
from gradproof.model.layer import UNIT
from gradproof.model.network import Input, Network, Node
from gradproof.reference import LAYERS

Arrays = Mapping[str, np.ndarray]


class UnknownExampleError(ValueError):
    """A name that no worked example has; the message lists those that exist."""


@dataclass(frozen=True, eq=False)
class Expected:
    """Numbers that a worked example states.

    forward: node name -> output; gradients: name -> gradient of the loss. Shapes are the network's own.
    tolerance: the largest absolute difference between a stated number and a float64 result.
    """

    forward: Arrays
    gradients: Arrays
    tolerance: float = 1e-15


@dataclass(frozen=True, eq=False)
class Example:
    """A network with one set of numbers to run it on.

    values: an array in float64 for every input and parameter, read-only.
    samples: the inputs of the whole data set, where there is one; `values` then holds the first.
    """

    name: str
    summary: str
    network: Network
    values: Arrays
    expected: Expected
    samples: tuple[Arrays, ...] = ()

    @property
    def cotangent(self) -> np.ndarray:
        return np.ones(self.network.shapes[self.network.output])

    def case(self, dtype: str) -> Case:
        """The example as a case, its numbers rounded to the dtype."""
        values = {name: value.astype(dtype) for name, value in self.values.items()}
        return Case(self.network, dtype, values, self.cotangent.astype(dtype))


def example(name: str) -> Example:
    """The worked example of this name. Raises UnknownExampleError for any other."""
    if name not in EXAMPLES:
        raise UnknownExampleError(f"unknown example {name!r}; valid examples: {', '.join(EXAMPLES)}")
    return EXAMPLES[name]


def descend(
    adapter: Adapter,
    network: Network,
    values: Arrays,
    *,
    learning_rate: float,
    steps: int = 1,
    held: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """The values after some steps of gradient descent in float64, with the gradients that the adapter gives.

    held: parameters that stay as they are.
    """
    moving = [name for name in network.parameters if name not in held]
    seed = np.ones(network.shapes[network.output])
    current = dict(values)
    for _ in range(steps):
        gradients = adapter.backward(adapter.forward(network, current, "float64"), seed)
        current |= {name: current[name] - learning_rate * gradients[name] for name in moving}
    return current


def _arrays(**numbers: Any) -> dict[str, np.ndarray]:
    arrays = {name: np.array(value, dtype="float64") for name, value in numbers.items()}
    for array in arrays.values():
        array.setflags(write=False)
    return arrays


def _linear(name: str, source: str, features: int, weight: str, bias: str | None = None) -> Node:
    parameters = {"weight": weight} | ({"bias": bias} if bias else {})
    options = {"features": features, "use_bias": bias is not None}
    return Node.of(name, LAYERS["linear"], source, parameters=parameters, options=options)


def _node(name: str, layer: str, *sources: str) -> Node:
    return Node.of(name, LAYERS[layer], *sources)


PLANE = Input("x", (1, 2))
ANSWER = Input("y", (1, 1))
LABEL = Input("y", (1, 1), UNIT)


TANH_2_3_1 = Example(
    name="tanh_2_3_1",
    summary=(
        "A hidden unit's learning signal is the error sent back through its readout weight and its tanh gate. "
        "Shows which of the three hidden units learns most."
    ),
    network=Network(
        (PLANE, ANSWER),
        (
            _linear("z1", "x", 3, "W1", "b1"),
            _node("h1", "tanh", "z1"),
            _linear("prediction", "h1", 1, "W2", "b2"),
            _node("loss", "half_squared_error", "prediction", "y"),
        ),
    ),
    values=_arrays(
        x=[[0.5, -1.0]],
        y=[[0.25]],
        W1=[[0.6, -0.2], [-0.3, 0.4], [0.1, 0.5]],
        b1=[0.05, 0.0, -0.05],
        W2=[[0.25, -0.15, 0.2]],
        b2=[0.02],
    ),
    expected=Expected(
        forward=_arrays(
            z1=[[0.55, -0.55, -0.5]],
            h1=[[0.5005202111902353, -0.5005202111902353, -0.46211715726000974]],
            prediction=[[0.12778465302409217]],
            loss=0.007468295518220772,
        ),
        gradients=_arrays(
            prediction=[[-0.12221534697590783]],
            W2=[[-0.06117125127906927, 0.06117125127906927, 0.05647780871805225]],
            b2=[-0.12221534697590783],
            h1=[[-0.03055383674397696, 0.01833230204638617, -0.02444306939518157]],
            z1=[[-0.02289947484173428, 0.01373968490504057, -0.01922319651256938]],
            W1=[
                [-0.01144973742086714, 0.02289947484173428],
                [0.00686984245252028, -0.01373968490504057],
                [-0.00961159825628469, 0.01922319651256938],
            ],
            b1=[-0.02289947484173428, 0.01373968490504057, -0.01922319651256938],
            x=[[-0.01978391002780968, 0.00046417067407839]],
        ),
    ),
)

SIGMOID_2_2_1 = Example(
    name="sigmoid_2_2_1",
    summary=(
        "Every sigmoid multiplies the error that flows back by at most a quarter, and by next to nothing where it "
        "is saturated. Shows the classic two-layer network, number by number."
    ),
    network=Network(
        (PLANE, ANSWER),
        (
            _linear("z1", "x", 2, "W1", "b1"),
            _node("a", "sigmoid", "z1"),
            _linear("z2", "a", 1, "W2", "b2"),
            _node("prediction", "sigmoid", "z2"),
            _node("loss", "half_squared_error", "prediction", "y"),
        ),
    ),
    values=_arrays(
        x=[[0.5, 0.9]],
        y=[[1.0]],
        W1=[[0.15, 0.20], [0.25, 0.30]],
        b1=[0.35, 0.35],
        W2=[[0.40, 0.45]],
        b2=[0.60],
    ),
    expected=Expected(
        forward=_arrays(
            a=[[0.6467993925579857, 0.6780882495516275]],
            prediction=[[0.7620332930580278]],
            loss=0.02831407680640324,
        ),
        gradients=_arrays(
            z2=[[-0.04315253837736277]],
            W2=[[-0.02791103560981341, -0.02926122921201535]],
            b2=[-0.04315253837736277],
            z1=[[-0.00394327789268871, -0.00423879008215991]],
            W1=[[-0.00197163894634436, -0.00354895010341984], [-0.00211939504107996, -0.00381491107394392]],
            b1=[-0.00394327789268871, -0.00423879008215991],
        ),
    ),
)

RELU_2_3_1 = Example(
    name="relu_2_3_1",
    summary=(
        "A gradient is the product of the local factors along a path, summed over all paths to the loss. "
        "The second hidden unit is inactive: nothing flows through it, so its weights get exactly zero."
    ),
    network=Network(
        (PLANE, LABEL),
        (
            _linear("z1", "x", 3, "W1", "b1"),
            _node("h", "relu", "z1"),
            _linear("z2", "h", 1, "W2", "b2"),
            _node("prediction", "sigmoid", "z2"),
            _node("loss", "bce", "prediction", "y"),
        ),
    ),
    values=_arrays(
        x=[[0.80, 0.20]],
        y=[[1.0]],
        W1=[[0.5, -0.3], [-0.6, 0.4], [0.2, 0.9]],
        b1=[0.1, 0.0, -0.1],
        W2=[[0.7, -0.5, 0.6]],
        b2=[0.05],
    ),
    expected=Expected(
        forward=_arrays(
            z1=[[0.44, -0.40, 0.24]],
            h=[[0.44, 0.0, 0.24]],
            z2=[[0.502]],
            prediction=[[0.622929223384262247]],
            loss=0.47332237277312819,
        ),
        gradients=_arrays(
            prediction=[[-1.60531881064622423]],
            z2=[[-0.377070776615737753]],
            W2=[[-0.165911141710924611, 0.0, -0.0904969863877770606]],
            b2=[-0.377070776615737753],
            h=[[-0.263949543631016427, 0.188535388307868876, -0.226242465969442652]],
            z1=[[-0.263949543631016427, 0.0, -0.226242465969442652]],
            W1=[
                [-0.211159634904813141, -0.0527899087262032854],
                [0.0, 0.0],
                [-0.180993972775554121, -0.0452484931938885303],
            ],
            b1=[-0.263949543631016427, 0.0, -0.226242465969442652],
            x=[[-0.177223265009396744, -0.124433356283193458]],
            y=[[-0.502]],
        ),
    ),
)

SQUARED_ERROR_2_2_1 = Example(
    name="squared_error_2_2_1",
    summary=(
        "Two inputs, a hidden unit for each, one output, and four weights without biases: the chain rule with nothing "
        "else in the way. The prediction 0.7 for the target 1 sends back -0.6, and each weight takes its share."
    ),
    network=Network(
        (Input("x1", (1, 1)), Input("x2", (1, 1)), ANSWER),
        (
            _linear("h1", "x1", 1, "w1"),
            _linear("h2", "x2", 1, "w2"),
            _linear("from_h1", "h1", 1, "w3"),
            _linear("from_h2", "h2", 1, "w4"),
            _node("prediction", "add", "from_h1", "from_h2"),
            _node("loss", "mse", "prediction", "y"),
        ),
    ),
    values=_arrays(x1=[[0.5]], x2=[[0.8]], y=[[1.0]], w1=[[0.8]], w2=[[0.5]], w3=[[1.0]], w4=[[0.75]]),
    expected=Expected(
        forward=_arrays(h1=[[0.4]], h2=[[0.4]], from_h1=[[0.4]], from_h2=[[0.3]], prediction=[[0.7]], loss=0.09),
        gradients=_arrays(
            prediction=[[-0.6]],
            from_h1=[[-0.6]],
            from_h2=[[-0.6]],
            w3=[[-0.24]],
            w4=[[-0.24]],
            h1=[[-0.6]],
            h2=[[-0.45]],
            w1=[[-0.3]],
            w2=[[-0.36]],
            x1=[[-0.48]],
            x2=[[-0.225]],
            y=[[0.6]],
        ),
    ),
)

# One class sits on a ring around the other: no straight line parts them.
RING = (
    (1.5, 0.0, 0),
    (1.06, 1.06, 0),
    (0.5, 0.0, 1),
    (0.0, 1.5, 0),
    (-1.06, 1.06, 0),
    (0.0, 0.5, 1),
    (-1.5, 0.0, 0),
    (-1.06, -1.06, 0),
    (-0.5, 0.0, 1),
    (0.0, -1.5, 0),
    (1.06, -1.06, 0),
    (0.0, -0.5, 1),
)
RING_SAMPLES = tuple(_arrays(x=[[across, up]], y=[[label]]) for across, up, label in RING)

DECISION_BOUNDARY_2D = Example(
    name="decision_boundary_2d",
    summary=(
        "A classifier of points in the plane, trained sample by sample until its boundary has bent around the inner "
        "class. One backward pass gives every weight's gradient, and the input's too."
    ),
    network=Network(
        (PLANE, LABEL),
        (
            _linear("z1", "x", 4, "W1", "b1"),
            _node("h", "tanh", "z1"),
            _linear("z2", "h", 1, "W2", "b2"),
            _node("prediction", "sigmoid", "z2"),
            _node("loss", "bce", "prediction", "y"),
        ),
    ),
    values=_arrays(
        W1=[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]],
        b1=[0.0, 0.0, 0.0, 0.0],
        W2=[[0.1, -0.2, 0.3, -0.4]],
        b2=[0.0],
    )
    | RING_SAMPLES[0],
    expected=Expected(
        forward=_arrays(
            z1=[[1.5, 0.0, -1.5, 0.0]],
            h=[[0.905148253644866438, 0.0, -0.905148253644866438, 0.0]],
            z2=[[-0.181029650728973288]],
            prediction=[[0.454865780600248173]],
            loss=0.606723240511403031,
        ),
        gradients=_arrays(
            prediction=[[1.83441061744592299]],
            z2=[[0.454865780600248173]],
            W2=[[0.411720966953123601, 0.0, -0.411720966953123601, 0.0]],
            b2=[0.454865780600248173],
            h=[[0.0454865780600248173, -0.0909731561200496347, 0.136459734180074452, -0.181946312240099269]],
            z1=[[0.00821972663736525792, -0.0909731561200496347, 0.0246591799120957738, -0.181946312240099269]],
            W1=[
                [0.0123295899560478869, 0.0],
                [-0.136459734180074452, 0.0],
                [0.0369887698681436607, 0.0],
                [-0.272919468360148904, 0.0],
            ],
            b1=[0.00821972663736525792, -0.0909731561200496347, 0.0246591799120957738, -0.181946312240099269],
            x=[[-0.0164394532747305158, 0.0909731561200496347]],
            y=[[0.181029650728973288]],
        ),
    ),
    samples=RING_SAMPLES,
)

EXAMPLES: dict[str, Example] = {
    each.name: each for each in (TANH_2_3_1, SIGMOID_2_2_1, RELU_2_3_1, SQUARED_ERROR_2_2_1, DECISION_BOUNDARY_2D)
}
