"""Ways to check gradients: gradproof beside finite differences, fixed tolerances and the error of an eager run.

Each tool is asked the same of a network: whether it raises an alarm, with a fault planted in one gradient or with none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gradproof.model.adapter import Adapter, Forward
from gradproof.model.case import Case, upcast
from gradproof.model.dtypes import VALID_DTYPES
from gradproof.model.layer import Layer
from gradproof.model.network import Network, Node
from gradproof.model.options import Options, Shape
from gradproof.verdict.arithmetic import Classes
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject, disagrees
from gradproof.verdict.sweep import Sweep

STEPPED = ("float64", "float32")
"""The dtypes in which checks by finite differences are asked; below, the step itself is lost to rounding."""

NARROW = ("float32", "bfloat16", "float16")
"""The dtypes in which the error of a framework's own run can be measured against one in float64."""


@dataclass(frozen=True)
class Place:
    """The gradient that faults are planted in: that of an input or parameter which one node reads.

    victim: its name. element: the flat index of the only element that is wrong, where not all are.
    node, argument: what reads it.
    """

    victim: str
    element: int
    node: Node
    argument: str


@dataclass(frozen=True)
class Plant:
    """A fault: the gradient is multiplied by 1 + size, in all elements or in one."""

    place: Place
    everywhere: bool
    size: float

    def factors(self, shape: Shape) -> np.ndarray:
        """What the gradient is multiplied by, in float64: in less, the factor would be rounded before the gradient."""
        factors = np.ones(shape)
        factors.reshape(-1)[slice(None) if self.everywhere else self.place.element] += self.size
        return factors

    def spoils(self, network: Network) -> str:
        """The tensor whose gradient is wrong: the layer makes its mistake when it runs alone, too."""
        (first, *others), place = network.nodes, self.place
        alone = not others and (first.layer, first.options) == (place.node.layer, place.node.options)
        return dict(first.sources)[place.argument] if alone else place.victim


Judge = Callable[[Case, Plant | None], bool]
"""Whether a tool raises the alarm on a case with this fault planted, or with none."""


@dataclass(frozen=True)
class Tool:
    """A way to check gradients, whose it checks, and the dtypes that it is asked in.

    steps: whether it runs the network many times, as for finite differences.
    """

    name: str
    framework: str
    dtypes: tuple[str, ...]
    judge: Judge
    steps: bool = False


def tools_of(subjects: Mapping[str, Subject]) -> Iterator[Tool]:
    """gradproof and the framework's own checks for each framework, and tolerances for the first."""
    for name, subject in subjects.items():
        yield Tool(f"gradproof on {name}", name, VALID_DTYPES, _gradproof(subject))
        yield from NUMERICAL[name](subject.adapter)
    framework, subject = next(iter(subjects.items()))
    yield Tool(f"error at most twice that of {framework} itself", framework, NARROW, _twice(subject))
    for name, close in FIXED.items():
        yield Tool(f"{name} on {framework}", framework, VALID_DTYPES, _fixed(subject, close))


def leaves(network: Network) -> list[str]:
    """The inputs and parameters that have a gradient."""
    nodes = {node.name for node in network.nodes}
    return [name for name in network.differentiable if name not in nodes]


class Spoilt:
    """An adapter whose results are a framework's own, but for the planted fault."""

    def __init__(self, adapter: Adapter, plant: Plant | None) -> None:
        self.name = adapter.name
        self._adapter = adapter
        self._plant = plant

    def version(self) -> str:
        return self._adapter.version()

    def supports(self, layer: Layer, options: Options, dtype: str) -> bool | str:
        return self._adapter.supports(layer, options, dtype)

    def forward(self, network: Network, values: Mapping[str, np.ndarray], dtype: str) -> Forward:
        forward = self._adapter.forward(network, values, dtype)
        return Forward(forward.outputs, (forward, network))

    def backward(self, forward: Forward, cotangent: np.ndarray) -> Mapping[str, np.ndarray]:
        own, network = forward.tape
        gradients = dict(self._adapter.backward(own, cotangent))
        if self._plant:
            victim = self._plant.spoils(network)
            right = gradients[victim]
            gradients[victim] = np.asarray(self._plant.factors(right.shape) * right).astype(right.dtype)
        return gradients


def _gradproof(subject: Subject) -> Judge:
    """A disagreement that no known divergence explains. The arithmetic of a layer is found out with the fault in it."""

    def judge(case: Case, plant: Plant | None) -> bool:
        spoilt = replace(subject, adapter=Spoilt(subject.adapter, plant), classes=Classes(), called_twice=set())
        layers = {node.layer.name for node in case.network.nodes}
        explicable = any(each.layer in layers for each in subject.divergences)
        return disagrees(spoilt, case) and not (explicable and examine(spoilt, case).known)

    return judge


def _gradients(adapter: Adapter, case: Case) -> Mapping[str, np.ndarray]:
    return adapter.backward(adapter.forward(case.network, case.values, case.dtype), case.cotangent)


def _twice(subject: Subject) -> Judge:
    """What kernels are held to: an error against float64 that is at most twice that of the framework's own run."""

    def judge(case: Case, plant: Plant | None) -> bool:
        exact = Case(case.network, "float64", case.exact_values, upcast(case.cotangent))
        right, eager = _gradients(subject.adapter, exact), _gradients(subject.adapter, case)
        got = _gradients(Spoilt(subject.adapter, plant), case)

        def error(gradients: Mapping[str, np.ndarray], name: str) -> float:
            return float(np.abs(upcast(gradients[name]) - right[name]).max(initial=0.0))

        return not all(error(got, name) <= 2.0 * error(eager, name) for name in leaves(case.network))

    return judge


Close = Callable[[np.ndarray, np.ndarray], bool]


def _fixed(subject: Subject, close: Close) -> Judge:
    """Every gradient of an input or parameter, compared with the reference's rounded to the dtype."""

    def judge(case: Case, plant: Plant | None) -> bool:
        got = _gradients(Spoilt(subject.adapter, plant), case)
        right = Sweep(case, subject.conventions).gradients
        return not all(close(got[name], right[name].astype(case.dtype)) for name in leaves(case.network))

    return judge


def _close_to_torch(got: np.ndarray, right: np.ndarray) -> bool:
    import torch

    dtype = getattr(torch, str(right.dtype))
    try:
        torch.testing.assert_close(*(torch.tensor(each.astype(np.float64), dtype=dtype) for each in (got, right)))
    except AssertionError:
        return False
    return True


def _close_to_numpy(got: np.ndarray, right: np.ndarray) -> bool:
    try:
        np.testing.assert_allclose(upcast(got), upcast(right))
    except AssertionError:
        return False
    return True


FIXED: dict[str, Close] = {
    "torch.testing.assert_close": _close_to_torch,
    "np.testing.assert_allclose": _close_to_numpy,
    "np.allclose": lambda got, right: bool(np.allclose(upcast(got), upcast(right))),
    "np.allclose(rtol=1e-3, atol=1e-3)": lambda got, right: bool(
        np.allclose(upcast(got), upcast(right), rtol=1e-3, atol=1e-3)
    ),
}
"""Fixed tolerances as people use them: the defaults, and what is commonly typed."""


def _gradchecks(adapter: Any) -> Iterator[Tool]:
    yield Tool("torch.autograd.gradcheck", "torch", STEPPED, _gradcheck(adapter, fast_mode=False), steps=True)
    fast = _gradcheck(adapter, fast_mode=True)
    yield Tool("torch.autograd.gradcheck(fast_mode=True)", "torch", STEPPED, fast, steps=True)


def _gradcheck(adapter: Any, fast_mode: bool) -> Judge:
    import torch
    from torch.autograd.gradcheck import GradcheckError

    def judge(case: Case, plant: Plant | None) -> bool:
        tensors = {name: adapter.tensor(value, case.dtype) for name, value in case.values.items()}
        names = leaves(case.network)

        def run(*given: Any) -> Any:
            known = tensors | dict(zip(names, given, strict=True))
            if plant:
                known[plant.place.victim] = _torch_identity(plant, known[plant.place.victim])
            for node in case.network.nodes:
                known[node.name] = adapter.call(node, known)
            return known[case.network.output]

        try:
            torch.autograd.gradcheck(run, [tensors[name] for name in names], fast_mode=fast_mode)
        except GradcheckError:
            return True
        return False

    return judge


def _torch_identity(plant: Plant, x: Any) -> Any:
    """The tensor as it is, its gradient with the fault."""
    import torch

    factors = torch.tensor(plant.factors(tuple(x.shape)))

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Any) -> Any:
            return x.view_as(x)

        @staticmethod
        def backward(context: Any, *douts: Any) -> Any:
            return (factors * douts[0]).to(douts[0].dtype)

    identity: Any = Identity  # torch has no types for it
    return identity.apply(x)


def _check_grads(adapter: Any) -> Iterator[Tool]:
    """Order 1 must be said, and of the modes only reverse: a fault in a vjp leaves the function no jvp."""
    from jax.test_util import check_grads

    def judge(case: Case, plant: Plant | None) -> bool:
        names = leaves(case.network)
        taps = {node.name: np.zeros(case.network.shapes[node.name], case.dtype) for node in case.network.nodes}

        def run(*given: Any) -> Any:
            known: dict[str, Any] = {**case.values, **dict(zip(names, given, strict=True))}
            if plant:
                known[plant.place.victim] = _jax_identity(plant, known[plant.place.victim])
            for node in case.network.nodes:
                known[node.name] = adapter.run_node(node, known, taps[node.name])
            return known[case.network.output]

        try:
            check_grads(run, [case.values[name] for name in names], order=1, modes=["rev"])
        except AssertionError:
            return True
        return False

    yield Tool("jax.test_util.check_grads", "jax", STEPPED, judge, steps=True)


def _jax_identity(plant: Plant, x: Any) -> Any:
    """The array as it is, its gradient with the fault."""
    import jax

    factors = plant.factors(x.shape)
    identity = jax.custom_vjp(lambda x: x)
    identity.defvjp(lambda x: (x, None), lambda _, dout: ((factors * dout).astype(dout.dtype),))
    return identity(x)


NUMERICAL: dict[str, Callable[[Any], Iterator[Tool]]] = {"torch": _gradchecks, "jax": _check_grads}
"""Each framework's own checks by finite differences."""
