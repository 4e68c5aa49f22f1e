"""Rows of torch whose backward pass reads the memory of its cotangent as if it were contiguous.

Alone they are right; in a network in which something behind them hands over a strided cotangent they are wrong, and no
rule may excuse that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install 'gradproof[torch]'")

import torch

from gradproof.adapters.torch import ROWS, TorchAdapter
from gradproof.draw.drawing import Drawn
from gradproof.model.network import Input, Network, Node
from gradproof.model.options import OptionValue
from gradproof.reference import LAYERS
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject


def in_a_row(dout: torch.Tensor) -> torch.Tensor:
    """As many elements as there are, from where the first one lies on, in the order of the memory."""
    strides = torch.empty(dout.shape).stride()
    room = dout.untyped_storage().nbytes() // dout.element_size() - dout.storage_offset()
    return dout.as_strided(dout.shape, strides) if room >= dout.numel() else dout.contiguous()


def misreading(row: Callable[..., Any]) -> Callable[..., Any]:
    """The row, with the cotangent read so."""

    class Misreading(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, call: Callable[..., Any], *tensors: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                context.given = [each.detach().requires_grad_(each.is_floating_point()) for each in tensors]
                context.out = call(*context.given)
            return context.out.detach().clone()

        @staticmethod
        def backward(context: Any, *douts: torch.Tensor) -> Any:
            floating = [each for each in context.given if each.requires_grad]
            found = iter(torch.autograd.grad(context.out, floating, in_a_row(douts[0]), retain_graph=True))
            return (None, *(next(found) if each.requires_grad else None for each in context.given))

    def call(*arrays: Any, **others: Any) -> Any:
        names = [name for name, each in others.items() if isinstance(each, torch.Tensor)]
        options = {name: each for name, each in others.items() if name not in names}

        def run(*tensors: Any) -> Any:
            return row(*tensors[: len(arrays)], **dict(zip(names, tensors[len(arrays) :], strict=True)), **options)

        return Misreading.apply(run, *arrays, *(others[name] for name in names))

    return call


class Contiguous(TorchAdapter):
    rows = {**ROWS, **{name: misreading(ROWS[name]) for name in ("rms_norm", "rotary", "swiglu")}} | {
        "scaled_dot_product_attention": misreading(ROWS["scaled_dot_product_attention"])
    }


def node(name: str, layer: str, *inputs: str, parameters: str = "", **options: OptionValue) -> Node:
    pairs = dict(pair.split(":") for pair in parameters.split())
    return Node.of(name, LAYERS[layer], *inputs, parameters=pairs, options=options)


X = Input("x", (1, 2, 4, 4))
LAYER = {
    "rms_norm": node("it", "rms_norm", "x", parameters="weight:w"),
    "rotary": node("it", "rotary", "x"),
    "swiglu": node("it", "swiglu", "x", axis=3),
    "scaled_dot_product_attention": node("it", "scaled_dot_product_attention", "x", "x", "x"),
}
BEHIND = {"nothing": (), "transpose": (node("out", "transpose", "it", axes=(0, 1, 3, 2)),)}


@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("layer", LAYER)
def test_a_misread_cotangent_is_caught_where_one_is_handed_over(layer: str, behind: str) -> None:
    of = Network((X,), (LAYER[layer], *BEHIND[behind]))
    case = Drawn(of, seed=3, edge_share=0.0, scale=1.0).case("float32")
    found = examine(Subject(Contiguous(), {}), case)
    assert found.agrees == (behind == "nothing")
    assert [culprit.node.layer.name for culprit in found.culprits] == ([] if found.agrees else [layer])
    assert examine(Subject(TorchAdapter(), {}), case).agrees
    assert np.isfinite([check.noise_units for check in found.checks]).all()
