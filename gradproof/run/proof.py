"""Is a layer's hand-written backward function the derivative of its forward function? Proven without any framework.

Complex steps give the slope of analytic code to 1e-13, central differences that of any to 1e-9. The backward function
must be linear in its cotangent, write to nothing, and give one gradient per array, in its shape. At kinks it must give
what the table says.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gradproof.model.layer import Kink, Layer
from gradproof.run.proof_cases import Array, Arrays, ProofCase, proof_cases

# Rounding is relative to the terms of a sum, never to the sum itself, which may cancel: see `Slopes.scale`.
COMPLEX_STEP_TOLERANCE = 1e-13
DIFFERENCES_TOLERANCE = 1e-9
LINEARITY_TOLERANCE = 1e-13

COMPLEX_STEP = 1e-30
# Powers of two, so that a point of a few digits moves by exactly one step.
STEP = 2.0**-13
ONE_SIDED_STEP = 2.0**-17
KINK_WEIGHTS = (0.0, 0.25, 1.0)


class NotProvenError(AssertionError):
    """What a backward function, or a forward function, is not that it must be."""


def require(holds: Any, message: str) -> None:
    if not holds:
        raise NotProvenError(message)


def check_structure(case: ProofCase) -> None:
    """The output has the declared shape and numbers; there is one gradient per differentiable array, in its shape."""
    values = case.point()
    out, cache = case.forward(values)
    require(np.shape(out) == case.out_shape, f"the output has shape {np.shape(out)}, not {case.out_shape}")
    require(case.layer.codomain.contains(np.asarray(out)), f"the output leaves its codomain, {case.layer.codomain}")
    gradients = case.layer.backward(case.cotangent(), cache)
    require(set(gradients) == set(case.differentiable), f"gradients of {sorted(gradients)}")
    for name, shape in case.differentiable.items():
        got = np.asarray(gradients[name])
        require(
            got.shape == shape and got.dtype == np.float64, f"{name}: {got.dtype} of shape {got.shape}, not {shape}"
        )


@dataclass(frozen=True)
class Slopes:
    """The slope of sum(cotangent * out) along a direction: as measured, and as the gradient claims."""

    measured: Array
    claimed: Array
    out: Array

    @property
    def error(self) -> float:
        return float(abs(self.measured.sum() - self.claimed.sum()))

    @property
    def scale(self) -> float:
        """The sum of the absolute terms: those of both sums and, for terms that cancel inside the layer, the output's.

        Points and directions are of order one, so those inner terms are of the output's order (layer norm over two
        numbers: its gradient is nearly zero, a difference of terms that are not).
        """
        return float(sum(abs(terms).sum() for terms in (self.measured, self.claimed, self.out)))


def complex_slope(case: ProofCase, values: Arrays, name: str, direction: Array) -> Array:
    out, _ = case.forward(values | {name: values[name] + 1j * COMPLEX_STEP * direction})
    return np.imag(out) / COMPLEX_STEP


def central_slope(case: ProofCase, values: Arrays, name: str, direction: Array) -> Array:
    """Central differences at a step and at half of it, extrapolated to order four."""

    def slope(step: float) -> Array:
        above, _ = case.forward(values | {name: values[name] + step * direction})
        below, _ = case.forward(values | {name: values[name] - step * direction})
        return (above - below) / (2.0 * step)

    return (4.0 * slope(STEP / 2) - slope(STEP)) / 3.0


Measure = Callable[[ProofCase, Arrays, str, Array], Array]


def slopes(case: ProofCase, measure: Measure) -> dict[str, Slopes]:
    values, cotangent = case.point(), case.cotangent()
    out, cache = case.forward(values)
    gradients = case.layer.backward(cotangent, cache)
    directions = {name: case.direction(name) for name in case.differentiable}
    return {
        name: Slopes(cotangent * measure(case, values, name, d), gradients[name] * d, cotangent * out)
        for name, d in directions.items()
    }


def check_slopes(case: ProofCase, measure: Measure, tolerance: float) -> None:
    for name, each in slopes(case, measure).items():
        if not each.error <= tolerance * each.scale:  # NaN is no error that is allowed
            share = each.error / each.scale
            raise NotProvenError(f"d{name}: off by {each.error:.1e}, {share:.1e} of the terms; allowed: {tolerance:g}")


def check_complex_step(case: ProofCase) -> None:
    check_slopes(case, complex_slope, COMPLEX_STEP_TOLERANCE)


def check_differences(case: ProofCase) -> None:
    check_slopes(case, central_slope, DIFFERENCES_TOLERANCE)


def check_linear(case: ProofCase) -> None:
    """B(a u + b v) = a B(u) + b B(v), and B(0) = 0 exactly."""
    values = case.point()
    out, cache = case.forward(values)
    u, v, (a, b) = case.cotangent("u"), case.cotangent("v"), (1.7, -0.6)
    of_u, of_v = case.layer.backward(u, cache), case.layer.backward(v, cache)
    of_both, of_zero = case.layer.backward(a * u + b * v, cache), case.layer.backward(0.0 * u, cache)
    inner = (abs(a * u * out) + abs(b * v * out)).sum()
    for name in case.differentiable:
        error = abs(of_both[name] - (a * of_u[name] + b * of_v[name])).max()
        scale = abs(a * of_u[name]).max() + abs(b * of_v[name]).max() + inner
        require(error <= LINEARITY_TOLERANCE * scale, f"d{name} is not linear in the cotangent: off by {error:.1e}")
        require(not np.any(of_zero[name]), f"d{name} is not zero for a zero cotangent")


def leaves(tree: Any) -> list[Any]:
    """What nested tuples, lists and dicts hold."""
    if isinstance(tree, dict):
        return leaves([*tree, *tree.values()])
    return [leaf for each in tree for leaf in leaves(each)] if isinstance(tree, tuple | list) else [tree]


def identical(left: Any, right: Any) -> bool:
    pairs = list(zip(leaves(left), leaves(right), strict=False))
    return len(leaves(left)) == len(leaves(right)) and all(np.array_equal(a, b) for a, b in pairs)


def freeze(tree: Any) -> None:
    for leaf in leaves(tree):
        if isinstance(leaf, np.ndarray):
            leaf.flags.writeable = False


def check_pure(case: ProofCase) -> None:
    """Nothing is written to: not the inputs, not the cotangent, not the cache."""
    values, cotangent = case.point(), np.asarray(case.cotangent())
    given = copy.deepcopy((values, cotangent))
    _, cache = case.forward(values)
    require(identical(values, given[0]), "forward wrote to its inputs")
    kept = copy.deepcopy(cache)
    first = copy.deepcopy(case.layer.backward(cotangent, cache))
    require(identical((values, cotangent), given), "backward wrote to the inputs or to its cotangent")
    require(identical(cache, kept), "backward wrote to its cache")
    require(identical(first, case.layer.backward(cotangent, cache)), "a second backward pass differs from the first")
    check_writes_nothing(case, values, cotangent)


def check_writes_nothing(case: ProofCase, values: Arrays, cotangent: Array) -> None:
    """Comparing copies does not see what is written and put back; read-only arrays do."""
    freeze((values, cotangent))
    try:
        _, cache = case.forward(values)
        freeze(cache)
        case.layer.backward(cotangent, cache)
    except ValueError as error:
        raise NotProvenError(f"a read-only array was written to: {error}") from error


def one_sided_slopes(case: ProofCase, values: Arrays, name: str, cotangent: Array, side: float) -> Array:
    """The derivative of sum(cotangent * out) with respect to each element, as the limit from one side."""
    here = (cotangent * case.forward(values)[0]).sum()

    def slope(index: tuple[int, ...], step: float) -> float:
        moved = values[name].copy()
        moved[index] += side * step
        there = (cotangent * case.forward(values | {name: moved})[0]).sum()
        return float(side * (there - here) / step)

    found = np.empty(values[name].shape)
    for index in np.ndindex(found.shape):
        found[index] = 2.0 * slope(index, ONE_SIDED_STEP / 2) - slope(index, ONE_SIDED_STEP)
    return found


def check_kink(case: ProofCase, kink: Kink) -> None:
    """At the kink the gradient is left + w (right - left), by default with the declared w; elsewhere w is idle."""
    cotangent = case.cotangent()
    values = case.point()
    point = kink.at(dict(case.options))
    at_kink = values | {name: np.full(shape, of_argument(point, name)) for name, shape in case.floating.items()}
    # As the harness probes it: which side of a hinge is the left one is decided by its label.
    indices = {name: domain.integers[0] for name, domain in case.domains.items() if not domain.floating}
    at_kink |= {name: np.full_like(values[name], index) for name, index in indices.items()}
    mixed = [case.backward(at_kink, cotangent, **{kink.name: weight}) for weight in KINK_WEIGHTS]
    for name in case.floating:
        left, right = (one_sided_slopes(case, at_kink, name, cotangent, side) for side in (-1.0, 1.0))
        # The right of the kink may be the left of a later argument, the target of an absolute error, or of some
        # elements, the class that is to win by a margin.
        gradients = [each[name] for each in mixed]
        straight, reverse = mixes(left, right, gradients), mixes(right, left, gradients)
        steps = ~np.isclose(left, right, rtol=0.0, atol=1e-8)
        exchanged = name == next(iter(case.floating)) and steps.any() and not (straight & steps).any()
        mixed_everywhere = (straight | reverse).all() and not exchanged
        if not mixed_everywhere:
            sides = f"left {left}, right {right}"
            raise NotProvenError(f"d{name} at {point}: not left + w (right - left), with {sides}")
    default = case.backward(at_kink, cotangent)
    require(identical(default, case.backward(at_kink, cotangent, **{kink.name: kink.default})), "another default")
    low, high = (case.backward(values, cotangent, **{kink.name: weight}) for weight in (0.0, 1.0))
    require(identical(low, high), f"{kink.name} changes the gradient away from {point}")


def check_ties(case: ProofCase, kink: Kink) -> None:
    """Where elements tie, the first or the last of them has the gradient, or all that tie share it.

    The first takes it all where a falling ramp is added, the last where a rising one is; in every case the gradient
    of a convex output is a subgradient, and that of a concave one the reverse.
    """
    cotangent = case.cotangent()
    tied = case.point() | {name: np.full(shape, kink.at(dict(case.options))) for name, shape in case.floating.items()}
    name, shape = next(iter(case.floating.items()))
    ramp = STEP * np.arange(math.prod(shape), dtype=float).reshape(shape)
    for weight, slope in ((0.0, -1.0), (1.0, 1.0)):
        got = case.backward(tied, cotangent, **{kink.name: weight})[name]
        near = case.backward(tied | {name: tied[name] + slope * ramp}, cotangent)[name]
        require(
            np.allclose(got, near, rtol=0.0, atol=0.01), f"weight {weight:g} is not the {'last' if weight else 'first'}"
        )
    shared = case.backward(tied, cotangent, **{kink.name: 0.5})[name]
    total = case.backward(tied, cotangent, **{kink.name: 0.0})[name].sum()
    require(abs(shared.sum() - total) <= 1e-9 * (1.0 + abs(total)), "shares do not add up")
    positive = np.abs(cotangent) + 0.5
    here = (positive * case.forward(tied)[0]).sum()
    gradient = case.backward(tied, positive, **{kink.name: 0.5})[name]
    for seed in range(3):
        direction = np.random.default_rng(seed).normal(size=shape)
        above, below = (
            (positive * case.forward(tied | {name: tied[name] + side * STEP * direction})[0]).sum() - here
            for side in (1.0, -1.0)
        )
        between = sorted((above, -below))
        step = STEP * (gradient * direction).sum()
        require(between[0] - 1e-9 <= step <= between[1] + 1e-9, "evenly shared, it is no subgradient")
    default = case.backward(tied, cotangent)
    require(identical(default, case.backward(tied, cotangent, **{kink.name: kink.default})), "another default")
    apart = case.point()
    low, high = (case.backward(apart, cotangent, **{kink.name: weight}) for weight in (0.0, 1.0))
    require(identical(low, high), f"{kink.name} changes the gradient where nothing ties")


def of_argument(point: float | Mapping[str, list[float]], name: str) -> Any:
    return point if isinstance(point, float) else point[name]


def mixes(left: Array, right: Array, gradients: Sequence[Array]) -> Array:
    """Mask of the elements that are left + w (right - left) for each weight w."""
    wanted = [left + weight * (right - left) for weight in KINK_WEIGHTS]
    close = [np.isclose(got, want, rtol=0.0, atol=1e-8) for got, want in zip(gradients, wanted, strict=True)]
    return np.asarray(np.logical_and.reduce(close))


CHECKS: dict[str, Callable[[ProofCase], None]] = {
    "structure": check_structure,
    "complex step": check_complex_step,
    "differences": check_differences,
    "linear in the cotangent": check_linear,
    "writes to nothing": check_pure,
}
"""What is checked of every case."""


@dataclass(frozen=True)
class Refutation:
    """A case, the check that it failed, and how."""

    case: str
    check: str
    message: str


@dataclass(frozen=True)
class Proof:
    """What was found for one layer. checks: how many were made."""

    layer: str
    cases: int
    checks: int
    refutations: tuple[Refutation, ...]

    @property
    def holds(self) -> bool:
        """A layer that no case fits is not proven."""
        return self.cases > 0 and not self.refutations


def prove(layer: Layer) -> Proof:
    """Check the layer's pair on every case, and on every kink that shows there."""
    cases = proof_cases(layer)
    made = [(case, name, check) for case in cases for name, check in checks_of(case).items()]
    found = [each for case, name, check in made if (each := refuted(case, name, check))]
    return Proof(layer.name, len(cases), len(made), tuple(found))


def checks_of(case: ProofCase) -> dict[str, Callable[[ProofCase], None]]:
    """The checks of a case: those of all cases, and those of its kinks."""
    checks = dict(CHECKS)
    for kink in case.layer.kinks:
        if kink.ties:
            checks[f"ties, {kink.name}"] = partial(check_ties, kink=kink)
        elif case.shows(kink):
            checks[f"kink, {kink.name}"] = partial(check_kink, kink=kink)
    return checks


def refuted(case: ProofCase, name: str, check: Callable[[ProofCase], None]) -> Refutation | None:
    """How the check fails, whatever the layer's functions raise; None where it does not."""
    try:
        check(case)
    except NotProvenError as error:
        return Refutation(str(case), name, str(error))
    except Exception as error:
        return Refutation(str(case), name, f"{type(error).__name__}: {error}")
    return None
