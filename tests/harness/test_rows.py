"""What rows of the built-in adapters do beside calling the framework's function."""

from __future__ import annotations

import pytest

from gradproof.model.tensors import gradient_of
from gradproof.reference import LAYERS
from gradproof.verdict.kinks import one_node
from gradproof.verdict.running import run
from helpers.frameworks import load


@pytest.mark.parametrize("number", [float("inf"), -float("inf"), 1.0])
def test_the_first_of_equal_elements_is_picked_by_torch(number: float) -> None:
    case = one_node(LAYERS["top_k"], {"k": 1, "largest": False}, {"x": [[number] * 5]}, "float16")
    gradient = run(load("torch"), case, 60.0).got[gradient_of("x")]
    assert (gradient != 0).tolist() == [[True, False, False, False, False]]


def test_instance_norm_of_torch_is_right_for_a_cotangent_in_any_order() -> None:
    torch = pytest.importorskip("torch", reason="needs pip install 'gradproof[torch]'")
    row = load("torch").rows["instance_norm"]  # type: ignore[attr-defined]
    gradients = []
    for order in (torch.contiguous_format, torch.channels_last):
        x = torch.tensor([[[[1.0, 2.0]], [[3.0, 5.0]]]], requires_grad=True)
        row(x, eps=0.75).backward(torch.tensor([[[[0.0, 1.0]], [[0.0, 0.0]]]]).to(memory_format=order))
        gradients.append(x.grad.tolist())
    assert gradients[0] == gradients[1]
