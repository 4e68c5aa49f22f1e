"""bfloat16 and float16: numbers cross the border of every adapter exactly, and faults are found in few digits too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gradproof.draw.drawing import draw_each
from gradproof.model.adapter import Adapter
from gradproof.model.case import Case
from gradproof.model.dtypes import DTYPES, HALF, limits
from gradproof.model.network import Input, Network, NetworkError, Node
from gradproof.reference import LAYERS
from gradproof.run.check import check
from gradproof.subject.registry import load_adapter
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject
from gradproof.verdict.kinks import one_node

EACH_HALF = pytest.mark.parametrize("dtype", HALF)
EACH_FRAMEWORK = pytest.mark.parametrize("name", ["torch", "jax"])
RUN_BY_TORCH = ("linear", "conv2d", "layer_norm", "lstm", "scaled_dot_product_attention", "cross_entropy", "softmax")


def loaded(name: str) -> Adapter:
    pytest.importorskip(name, reason=f"needs pip install 'gradproof[{name}]'")
    return load_adapter(name)


def every_normal_number(dtype: str) -> np.ndarray:
    numbers = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        return numbers[np.isfinite(numbers) & (np.abs(numbers) >= limits(dtype).smallest_normal)]


@EACH_FRAMEWORK
@EACH_HALF
def test_every_number_goes_in_and_comes_out_as_it_is(name: str, dtype: str) -> None:
    numbers = every_normal_number(dtype)
    network = Network((Input("x", numbers.shape),), (Node.of("y", LAYERS["identity"], "x"),))
    adapter = loaded(name)
    forward = adapter.forward(network, {"x": numbers.copy()}, dtype)
    gradient = adapter.backward(forward, numbers.copy())["x"]
    for array in (forward.outputs["y"], gradient):
        assert array.dtype == numbers.dtype
        np.testing.assert_array_equal(array.view(np.uint16), numbers.view(np.uint16))


def run(adapter: Adapter, layer: str, dtype: str) -> None:
    """The layer alone, forward and backward, with drawn options and shapes."""
    found: list[Case] = []
    draw_each(lambda drawn: found.append(drawn.case(dtype)), 8, 1, layers=[layer], max_nodes=1)
    for case in found:
        adapter.backward(adapter.forward(case.network, dict(case.values), dtype), case.cotangent)


@EACH_HALF
def test_torch_refuses_the_layers_that_it_lacks(dtype: str) -> None:
    adapter: Any = loaded("torch")
    assert adapter.lacking[dtype]
    for layer in adapter.lacking[dtype]:
        assert not adapter.supports(LAYERS[layer], {}, dtype)
        assert all(adapter.supports(LAYERS[layer], {}, other) for other in DTYPES)
        if layer == "conv3d":  # which runs, and gives what was in memory
            continue
        with pytest.raises((RuntimeError, NotImplementedError), match="not implemented for"):
            run(adapter, layer, dtype)


@EACH_HALF
@pytest.mark.parametrize("layer", RUN_BY_TORCH)
def test_torch_runs_what_it_supports(layer: str, dtype: str) -> None:
    adapter = loaded("torch")
    assert adapter.supports(LAYERS[layer], {}, dtype)
    run(adapter, layer, dtype)


def spoilt(factor: float) -> Adapter:
    """torch, with the gradient of tanh too large by this factor."""
    whole: Any = loaded("torch")
    import torch

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Any) -> Any:
            return x.clone()

        @staticmethod
        def backward(context: Any, dout: Any) -> Any:
            return factor * dout

    whole.rows = {**whole.rows, "tanh": lambda x: Scaled.apply(torch.tanh(x))}
    return whole  # type: ignore[no-any-return]


@pytest.mark.parametrize(("dtype", "factor"), [("bfloat16", 1.1), ("float16", 1.02)])
def test_a_gradient_that_is_a_little_too_large_is_found(dtype: str, factor: float) -> None:
    drawn: dict[str, Any] = {"dtypes": [dtype], "networks": 60, "seed": 7, "layers": ["tanh"], "max_nodes": 2}
    report = check([spoilt(factor)], **drawn, failures=None, stop_at_first=True)
    assert "tanh" in {culprit.node.layer.name for each, _ in report.examinations for culprit in each.culprits}
    assert check([loaded("torch")], **drawn | {"networks": 20}, failures=None).agrees


@EACH_HALF
@pytest.mark.parametrize("layer", ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation"),
    [(1, 3, 1, 1, 1), (1, 2, 3, 1, 1), (2, 2, 1, 1, 3), (1, 1, 2, 1, 2), (4, 3, 2, 1, 1)],
)
def test_torch_survives_a_tap_that_meets_padding_alone(
    layer: str, size: int, kernel: int, stride: int, padding: int, dilation: int, dtype: str
) -> None:
    axes = int(layer[-2])
    options = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    spread = {name: (each,) * axes for name, each in options.items()} | {"features": 2}
    try:
        case = one_node(LAYERS[layer], spread, 0.75, dtype, (2, 1, *[size] * axes))
    except NetworkError:
        pytest.skip(f"a transposed convolution of {size} has no output with these options")
    subject = Subject(loaded("torch"), {})
    assert examine(subject, case).agrees or not subject.supports(case.network, dtype)
