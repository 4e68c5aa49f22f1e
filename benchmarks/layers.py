"""What the hand-written reference costs: per layer, with growing batch and depth, and in memory.

Everything is measured in one process and one run, on one thread, and reported as ratios within it: the time of the
backward pass over that of the forward pass, the time of both over PyTorch's for the same layer and numbers in
float64, the exponent with which time grows, and the peak of memory over what must be held.
"""

from __future__ import annotations

import argparse
import math
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from gradproof.adapters.torch import TorchAdapter
from gradproof.model.layer import REAL, Domain
from gradproof.model.network import Input, Network, Node
from gradproof.model.options import OptionValue, Shape
from gradproof.reference import LAYERS, NumpyReference


@dataclass(frozen=True)
class Subject:
    """A layer at a size at which its arithmetic counts.

    shapes: of its inputs. options: those that are not the default.
    """

    layer: str
    shapes: tuple[Shape, ...]
    options: dict[str, OptionValue] = field(default_factory=dict)

    def network(self) -> Network:
        layer = LAYERS[self.layer]
        options = layer.complete(self.options, self.shapes[0])
        arguments = layer.arguments_for(len(self.shapes), options)
        inputs = [
            Input(argument.name, shape, argument.domain(self.shapes[0], options))
            for argument, shape in zip(arguments, self.shapes, strict=True)
        ]
        slots = {slot: slot for slot in layer.parameters(self.shapes, options)}
        node = Node.of("out", layer, *(each.name for each in inputs), parameters=slots, options=options)
        return Network(tuple(inputs), (node,))


SUBJECTS = (
    Subject("tanh", ((256, 1024),)),
    Subject("gelu", ((256, 1024),)),
    Subject("leaky_relu", ((256, 1024),)),
    Subject("exp", ((256, 1024),)),
    Subject("swiglu", ((256, 1024),)),
    Subject("softmax", ((256, 1024),)),
    Subject("linear", ((128, 512),), {"features": 512}),
    Subject("matmul", ((8, 128, 128), (8, 128, 128))),
    Subject("conv1d", ((8, 32, 128),), {"features": 32, "kernel": (5,), "padding": (2,)}),
    Subject("conv2d", ((8, 16, 32, 32),), {"features": 16, "kernel": (3, 3), "padding": (1, 1)}),
    Subject("conv_transpose2d", ((8, 16, 16, 16),), {"features": 16, "kernel": (4, 4), "stride": (2, 2)}),
    Subject("max_pool2d", ((8, 16, 32, 32),), {"kernel": (3, 3), "stride": (2, 2)}),
    Subject("avg_pool2d", ((8, 16, 32, 32),), {"kernel": (2, 2), "stride": (2, 2)}),
    Subject("upsample", ((4, 8, 16, 16),), {"size": 2, "mode": "linear"}),
    Subject("batch_norm", ((16, 32, 16, 16),)),
    Subject("layer_norm", ((256, 512),)),
    Subject("dropout", ((256, 1024), (256, 1024))),
    Subject("gru", ((16, 16, 64),), {"hidden": 64}),
    Subject("lstm", ((16, 16, 64),), {"hidden": 64}),
    Subject("scaled_dot_product_attention", ((4, 4, 64, 32),) * 3),
    Subject("multi_head_attention", ((64, 4, 64),), {"heads": 4}),
    Subject("add", ((256, 1024), (1024,))),
    Subject("transpose", ((32, 64, 64),), {"axes": (2, 0, 1)}),
    Subject("gather", ((256, 256), (256, 256))),
    Subject("reduce_norm", ((256, 1024),)),
    Subject("cross_entropy", ((256, 512), (256,))),
    Subject("multi_margin", ((256, 128), (256,))),
    Subject("ctc", ((32, 8, 16), (8, 8), (8,), (8,)), {"labels": 8}),
)
GOALS = {"linear": 2.0, "conv1d": 2.0, "conv2d": 2.0, "scaled_dot_product_attention": 2.0}
"""Layers whose reference should take at most that many times as long as PyTorch on one thread."""


def draw(generator: np.random.Generator, domain: Domain, shape: Shape) -> np.ndarray:
    if not domain.floating:
        return generator.choice(np.asarray(domain.integers, np.int64), shape)
    return (
        np.abs(generator.normal(size=shape)) % 1.0
        if domain.kind in ("unit", "positive")
        else generator.normal(size=shape)
    )


def values_of(network: Network, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    domains = {each.name: each.domain for each in network.inputs}
    names = (*domains, *network.parameters)
    return {
        name: 0.1 * each if domains.get(name, REAL) == REAL else each
        for name in names
        for each in [draw(generator, domains.get(name, REAL), network.shapes[name])]
    }


def quickest(function: Callable[[], Any], repeats: int) -> float:
    """Seconds of the quickest of so many calls: what is slower was disturbed."""
    found = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        found = min(found, time.perf_counter() - started)
    return found


@dataclass(frozen=True)
class Cost:
    """Seconds of the reference's forward and backward pass, and of PyTorch's both."""

    layer: str
    forward: float
    backward: float
    torch: float


def cost_of(subject: Subject, repeats: int) -> Cost:
    network = subject.network()
    values = values_of(network)
    reference, peer = NumpyReference(), TorchAdapter()
    cotangent = np.random.default_rng(1).normal(size=network.shapes[network.output])
    kept = reference.forward(network, values, "float64")

    def both() -> None:
        peer.backward(peer.forward(network, values, "float64"), cotangent)

    return Cost(
        subject.layer,
        quickest(lambda: reference.forward(network, values, "float64"), repeats),
        quickest(lambda: reference.backward(kept, cotangent), repeats),
        quickest(both, repeats),
    )


def chain(depth: int, batch: int, width: int = 256) -> Network:
    nodes = []
    before = "x"
    for i in range(depth):
        slots = {"weight": f"w{i}", "bias": f"b{i}"}
        nodes.append(Node.of(f"z{i}", LAYERS["linear"], before, parameters=slots, options={"features": width}))
        nodes.append(Node.of(f"h{i}", LAYERS["tanh"], f"z{i}"))
        before = f"h{i}"
    return Network((Input("x", (batch, width)),), tuple(nodes))


def pass_time(network: Network, repeats: int) -> float:
    reference, values = NumpyReference(), values_of(network)
    cotangent = np.random.default_rng(1).normal(size=network.shapes[network.output])
    return quickest(lambda: reference.backward(reference.forward(network, values, "float64"), cotangent), repeats)


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The slope of log seconds over log size."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def memory_share(depth: int) -> float:
    """The peak of memory of a pass over parameters, their gradients, activations and theirs."""
    network = chain(depth, batch=256)
    reference, values = NumpyReference(), values_of(network)
    cotangent = np.random.default_rng(1).normal(size=network.shapes[network.output])
    inputs = sum(array.nbytes for array in values.values())
    activations = sum(8 * math.prod(network.shapes[node.name]) for node in network.nodes)
    tracemalloc.start()
    reference.backward(reference.forward(network, values, "float64"), cotangent)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Values exist already; one gradient per value and per node output is handed back.
    return (peak + inputs) / (2 * inputs + 2 * activations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20, help="the quickest of so many counts (default 20)")
    parser.add_argument("--layer", action="append", help="only these layers; repeatable")
    options = parser.parse_args()
    console = Console()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        subjects = [each for each in SUBJECTS if not options.layer or each.layer in options.layer]
        table = Table(
            "layer", "forward, ms", "backward / forward", "reference / torch", "goal", box=None, pad_edge=False
        )
        for subject in subjects:
            cost = cost_of(subject, options.repeats)
            goal = GOALS.get(cost.layer)
            table.add_row(
                cost.layer,
                f"{1e3 * cost.forward:.2f}",
                f"{cost.backward / cost.forward:.2f}",
                f"{(cost.forward + cost.backward) / cost.torch:.2f}",
                f"{goal:g}" if goal else "",
            )
        console.print(table)
        repeats = max(options.repeats // 4, 1)
        batches = (256, 512, 1024, 2048)
        depths = (8, 16, 32, 64)
        by_batch = exponent(batches, [pass_time(chain(8, batch), repeats) for batch in batches])
        by_depth = exponent(depths, [pass_time(chain(depth, 256), repeats) for depth in depths])
        console.print(f"time grows with batch ^ {by_batch:.3f}, with depth ^ {by_depth:.3f} (goal: 1 within 0.05)")
        console.print(f"peak memory / what must be held, depth 64: {memory_share(64):.2f} (goal: at most 1.25)")


if __name__ == "__main__":
    main()
