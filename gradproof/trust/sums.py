"""How many digits of the reference are right where numbers are added up: reductions, norms, products, losses.

Each definition stands on its own, on arrays of mpmath's numbers; its derivatives are differences with 200 digits. The
reference's error is counted as an adapter's is, in units of the noise floor of float64. Run
`python -m gradproof.trust.sums`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from mpmath import mp
from rich.console import Console

from gradproof.draw.drawing import Drawn, draw_each
from gradproof.model.case import Case
from gradproof.model.tensors import Tensor, gradient_of, value_of
from gradproof.reference import PRECISE, NumpyReference
from gradproof.verdict.agreement import judge
from gradproof.verdict.equations import Equations

DIGITS = 460
"""Enough for what the shortest step changes in the smallest number of float64, beside a number near 1."""
STEP = mp.mpf(10) ** -60
NETWORKS = 24
"""Networks of one node that each layer is tried on."""

Array = np.ndarray[Any, Any]  # of mpmath's numbers

EXP, LOG, SQRT, LOG1P, LOG_COSH = (
    np.frompyfunc(function, 1, 1) for function in (mp.exp, mp.log, mp.sqrt, mp.log1p, lambda x: mp.log(mp.cosh(x)))
)


def _softmax(x: Array, axis: int) -> Array:
    powers = EXP(x)
    return powers / powers.sum(axis=axis, keepdims=True)


def _mean(x: Array, axes: Any, keepdims: bool = True) -> Array:
    total = x.sum(axis=axes, keepdims=keepdims)
    return total / mp.mpf(x.size // np.size(total))


def _variance(x: Array, axes: Any, ddof: int = 0, keepdims: bool = True) -> Array:
    squares = (x - _mean(x, axes)) ** 2
    total = squares.sum(axis=axes, keepdims=keepdims)
    return total / mp.mpf(x.size // np.size(total) - ddof)


def _scaled(x: Array, weight: Array | None, bias: Array | None, shape: Sequence[int]) -> Array:
    scaled = x if weight is None else x * weight.reshape(shape)
    return scaled if bias is None else scaled + bias.reshape(shape)


def _standardized(x: Array, axes: Any, eps: float) -> Array:
    return (x - _mean(x, axes)) / SQRT(_variance(x, axes) + mp.mpf(eps))


def _layer_norm(x: Array, weight: Any = None, bias: Any = None, *, axes: int, eps: float) -> Array:
    over = tuple(range(-axes, 0))
    return _scaled(_standardized(x, over, eps), weight, bias, x.shape[-axes:])


def _rms_norm(x: Array, weight: Any = None, *, axes: int, eps: float) -> Array:
    over = tuple(range(-axes, 0))
    return _scaled(x / SQRT(_mean(x * x, over) + mp.mpf(eps)), weight, None, x.shape[-axes:])


def _per_channel(x: Array) -> list[int]:
    return [1, x.shape[1], *[1] * (x.ndim - 2)]


def _batch_norm(
    x: Array,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    *,
    eps: float,
) -> Any:
    shape = _per_channel(x)
    if running_mean is None:
        normal = _standardized(x, (0, *range(2, x.ndim)), eps)
    else:
        normal = (x - running_mean.reshape(shape)) / SQRT(running_var.reshape(shape) + mp.mpf(eps))
    return _scaled(normal, weight, bias, shape)


def _group_norm(x: Array, weight: Any = None, bias: Any = None, *, groups: int, eps: float) -> Array:
    grouped = x.reshape(x.shape[0], groups, -1)
    return _scaled(_standardized(grouped, (2,), eps).reshape(x.shape), weight, bias, _per_channel(x))


def _instance_norm(x: Array, weight: Any = None, bias: Any = None, *, eps: float) -> Array:
    return _scaled(_standardized(x, tuple(range(2, x.ndim)), eps), weight, bias, _per_channel(x))


def _linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    out = (x[..., None, :] * weight).sum(axis=-1)
    return out if bias is None else out + bias


def _cumsum(x: Array, axis: int, reverse: bool) -> Array:
    return np.flip(np.flip(x, axis).cumsum(axis), axis) if reverse else x.cumsum(axis)


def _reduced(losses: Array, reduction: str) -> Any:
    total = losses.sum()
    return {"none": losses, "sum": total, "mean": total / mp.mpf(losses.size)}[reduction]


def _loss(per_element: Callable[..., Array]) -> Callable[..., Any]:
    return lambda *arrays, reduction, **others: _reduced(per_element(*arrays, **others), reduction)


def _bce_with_logits(x: Array, target: Array, weight: Any = 1, pos_weight: Any = 1) -> Array:
    return weight * (pos_weight * target * LOG1P(EXP(-x)) + (1 - target) * LOG1P(EXP(x)))


DEFINITIONS: dict[str, Callable[..., Any]] = {
    "softmax": _softmax,
    "softmin": lambda x, axis: _softmax(-x, axis),
    "log_softmax": lambda x, axis: LOG(_softmax(x, axis)),
    "logsumexp": lambda x, axis, keepdims: LOG(EXP(x).sum(axis=axis, keepdims=keepdims)),
    "linear": _linear,
    "matmul": np.matmul,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "reduce_sum": lambda x, axes, keepdims: x.sum(axis=axes, keepdims=keepdims),
    "reduce_mean": _mean,
    "reduce_var": _variance,
    "reduce_std": lambda x, axes, ddof, keepdims: SQRT(_variance(x, axes, ddof, keepdims)),
    "reduce_prod": lambda x, axes, keepdims: x.prod(axis=axes, keepdims=keepdims),
    "cumsum": _cumsum,
    "mse": _loss(lambda x, target: (x - target) ** 2),
    "half_squared_error": _loss(lambda x, target: (x - target) ** 2 / 2),
    "log_cosh": _loss(lambda x, target: LOG_COSH(x - target)),
    "bce_with_logits": _loss(_bce_with_logits),
    "soft_margin": _loss(lambda x, target: LOG1P(EXP(-x * target))),
}


@dataclass(frozen=True)
class Digits:
    """What a layer loses: the most noise units of a value and of a gradient, over so many networks.

    agrees: whether no tensor is called wrong.
    """

    layer: str
    networks: int
    value: float
    gradient: float
    agrees: bool


def exact_tensors(case: Case, definition: Callable[..., Any]) -> dict[Tensor, np.ndarray]:
    """The output of a one-node case, and the gradients of sum(cotangent * output), rounded to float64 at the end."""
    with mp.workdps(DIGITS):
        (node,) = case.network.nodes
        known = {name: _widened(array) for name, array in case.exact_values.items()}
        cotangent = _widened(case.cotangent)

        def output(changed: Mapping[str, Array]) -> Any:
            in_order, by_name = node.bind({**known, **changed})
            return np.asarray(definition(*in_order, **by_name, **node.keywords), dtype=object)

        found = {value_of(node.name): _nearest(output({})), gradient_of(node.name): _nearest(cotangent)}
        for name in (each for each in case.network.differentiable if each in known):
            found[gradient_of(name)] = _nearest(_slopes(partial(_moved, output, name), known[name], cotangent))
        return found


def _moved(output: Callable[[Mapping[str, Array]], Any], name: str, array: Array) -> Any:
    return output({name: array})


def _slopes(output: Callable[[Array], Any], at: Array, cotangent: Array) -> Array:
    """Central differences of sum(cotangent * output), element by element."""
    slopes = np.empty(at.shape, dtype=object)
    for index in np.ndindex(at.shape):
        step = STEP * max(abs(at[index]), STEP)
        sides = []
        for side in (1, -1):
            moved = at.copy()
            moved[index] += side * step
            sides.append(np.sum(cotangent * output(moved)))
        slopes[index] = (sides[0] - sides[1]) / (2 * step)
    return slopes


def _widened(array: np.ndarray) -> Array:
    if np.issubdtype(array.dtype, np.integer):
        return array
    return np.array([mp.mpf(float(each)) for each in array.flat], dtype=object).reshape(array.shape)


def _nearest(array: Any) -> np.ndarray:
    array = np.asarray(array, dtype=object)
    return np.array([float(each) for each in array.flat]).reshape(array.shape)


def digits(layer: str, networks: int = NETWORKS, seed: int = 1) -> Digits:
    """The exact tensors of drawn one-node networks, compared with the reference's as an adapter's would be."""
    cases: list[Case] = []

    def keep(drawn: Drawn) -> None:
        if len(drawn.network.nodes) == 1:
            cases.append(drawn.case("float64"))

    draw_each(keep, networks, seed, [layer], 1)
    worst, agrees = {"value": 0.0, "gradient": 0.0}, True
    for case in cases:
        exact = exact_tensors(case, DEFINITIONS[layer])
        equations = Equations(case, exact, NumpyReference({}, PRECISE), NumpyReference())
        checks = [judge(statement, exact[statement.key], "float64") for statement in equations]
        agrees = agrees and not any(check.kind for check in checks)
        for check in checks:
            worst[check.key.role] = max(worst[check.key.role], check.noise_units)
    return Digits(layer, len(cases), worst["value"], worst["gradient"], agrees)


def all_digits(networks: int = NETWORKS, seed: int = 1) -> Iterator[Digits]:
    """Every layer that is defined here."""
    return (digits(layer, networks, seed) for layer in DEFINITIONS)


def table(found: Sequence[Digits]) -> str:
    """A Markdown table with one row per layer."""
    lines = ["| layer | networks | value, noise units | gradients, noise units |", "|---|---|---|---|"]
    lines += [f"| {each.layer} | {each.networks} | {each.value:.2g} | {each.gradient:.2g} |" for each in found]
    return "\n".join(lines)


if __name__ == "__main__":
    Console().print(table(list(all_digits())))
