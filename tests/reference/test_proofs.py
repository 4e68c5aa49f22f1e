"""Proof that every layer's backward function is the derivative of its forward function, without any framework.

Cases derive from the table of layers: every layer, every combination of its options' values, several shapes.
Each check is also run on backward functions that are wrong on purpose, which it must refuse.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice, pairwise, product
from typing import Any

import numpy as np
import pytest

from gradproof.model.layer import Domain, Kink, Layer, ShapeError
from gradproof.model.options import Choice, Integer, Integers, OptionValue, Real, Shape
from gradproof.reference import LAYERS, PRECISE
from gradproof.reference.precise import precise

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
Backward = Callable[[Any, Any], dict[str, Any]]

SHAPES: tuple[Shape, ...] = ((1,), (3,), (2, 3), (4, 1), (2, 3, 2), (2, 3, 1, 2))

# Rounding is relative to the terms of a sum, never to the sum itself, which may cancel: see `Slopes.scale`.
COMPLEX_STEP_TOLERANCE = 1e-13
DIFFERENCES_TOLERANCE = 1e-9
LINEARITY_TOLERANCE = 1e-13

COMPLEX_STEP = 1e-30
# Powers of two, so that a point of a few digits moves by exactly one step.
STEP = 2.0**-13
ONE_SIDED_STEP = 2.0**-17
KINK_WEIGHTS = (0.0, 0.25, 1.0)


CASES_PER_LAYER = 24
"""Where options and shapes combine to more, a share that shows each value of each option, and each shape."""


HELD_CONSTANT = {("embedding", "weight"): "padding_idx"}
"""The row of a parameter that an option names has no gradient, although the output depends on it."""


@dataclass(frozen=True)
class Case:
    """One layer with its options and the shapes of its inputs."""

    layer: Layer
    options: tuple[tuple[str, OptionValue], ...]
    shapes: tuple[Shape, ...]

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options).replace(" ", "")
        shapes = "-".join("x".join(map(str, shape)) or "scalar" for shape in self.shapes)
        return f"{self.layer.name}({options})-{shapes}"

    def rng(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(f"{self} {purpose}".encode()))

    @cached_property
    def domains(self) -> dict[str, Domain]:
        arguments = self.layer.arguments_for(len(self.shapes), dict(self.options))
        return {each.name: each.domain(self.shapes[0], dict(self.options)) for each in arguments}

    @cached_property
    def floating(self) -> dict[str, Shape]:
        """The inputs that have a gradient."""
        named = zip(self.domains, self.shapes, strict=True)
        return {name: shape for name, shape in named if self.domains[name].differentiable}

    @cached_property
    def parameters(self) -> dict[str, Shape]:
        return self.layer.parameters(self.shapes, dict(self.options))

    @cached_property
    def differentiable(self) -> dict[str, Shape]:
        return self.floating | self.parameters

    def shows(self, kink: Kink) -> bool:
        return kink.shows(self.shapes[0], dict(self.options))

    @cached_property
    def kinks(self) -> list[float]:
        """The numbers at which the layer has kinks; ties are wherever numbers meet."""
        points = (kink.at(dict(self.options)) for kink in self.layer.kinks if not kink.ties)
        return list(dict.fromkeys(point for point in points if isinstance(point, float)))

    @cached_property
    def out_shape(self) -> Shape:
        return self.layer.output_shape(self.shapes, dict(self.options))

    def forward(self, values: Mapping[str, Array], **weights: float) -> tuple[Array, Any]:
        structural = {option.name for option in self.layer.options if option.structural}
        options = {name: value for name, value in self.options if name not in structural}
        named = (*self.layer.keyword_arguments, *self.parameters)
        in_order = [values[name] for name in self.domains if name not in named]
        by_name = {name: values[name] for name in named if name in values}
        return self.layer.forward(*in_order, **by_name, **options, **weights)

    def backward(self, values: Mapping[str, Array], cotangent: Array, **weights: float) -> dict[str, Any]:
        _, cache = self.forward(values, **weights)
        return self.layer.backward(cotangent, cache)

    def cotangent(self, purpose: str = "cotangent") -> Array:
        return self.rng(purpose).normal(size=self.out_shape)

    def direction(self, name: str) -> Array:
        direction = self.rng(f"direction {name}").normal(size=self.differentiable[name])
        if (self.layer.name, name) in HELD_CONSTANT:
            row = dict(self.options)[HELD_CONSTANT[self.layer.name, name]]
            direction[np.arange(len(direction)) == row] = 0.0
        return direction

    def point(self) -> Arrays:
        """Numbers away from every kink, and from each other, because a kink may be where two inputs meet.

        Drawn again where integers ask for something that has no finite value.
        """
        points = (self.drawn(self.rng(f"point{attempt or ''}")) for attempt in range(100))
        return next(values for values in points if np.isfinite(self.forward(values)[0]).all())

    def drawn(self, rng: np.random.Generator) -> Arrays:
        values = {slot: rng.normal(size=shape) for slot, shape in self.parameters.items()}
        sizes = dict(zip(self.domains, self.shapes, strict=True))
        for domain in dict.fromkeys(self.domains.values()):
            names = [name for name in self.domains if self.domains[name] == domain]
            drawn = DRAW[domain.kind](rng, self, domain, sum(math.prod(sizes[name]) for name in names))
            parts = np.split(drawn, np.cumsum([math.prod(sizes[name]) for name in names])[:-1])
            values |= {name: part.reshape(sizes[name]) for name, part in zip(names, parts, strict=True)}
        return values


def separated(rng: np.random.Generator, size: int, low: float, high: float, avoid: Sequence[float]) -> Array:
    """Numbers strictly between the bounds, in random order, no two close, and none close to those to avoid."""
    grid, gap = np.linspace(low, high, 2 * (size + len(avoid)) + 1, retstep=True)
    free = [each for each in grid[1:-1] if all(abs(each - other) > gap / 2 for other in avoid)]
    return rng.choice(free, size, replace=False) + rng.uniform(-gap / 8, gap / 8, size)


POLES = {"divide": [0.0]}
"""Numbers next to which a layer bends too sharply for differences."""


def draw_real(rng: np.random.Generator, case: Case, domain: Domain, size: int) -> Array:
    """Edge values, never alone because a layer may be all but zero there, among numbers that reach past every kink."""
    edges = [each for each in case.layer.edges if each not in case.kinks][: size - 1]
    reach = 2.5 + max(map(abs, case.kinks), default=0.0)
    avoid = [*case.kinks, *edges, *POLES.get(case.layer.name, [])]
    return rng.permutation([*edges, *separated(rng, size - len(edges), -reach, reach, avoid)])


DRAW: dict[str, Callable[[np.random.Generator, Case, Domain, int], Array]] = {
    "real": draw_real,
    "unit": lambda rng, case, domain, size: separated(rng, size, 0.0, 1.0, case.kinks),
    "positive": lambda rng, case, domain, size: separated(rng, size, 0.1, 3.0, case.kinks),
    "sign": lambda rng, case, domain, size: rng.choice([-1.0, 1.0], size),
    "index": lambda rng, case, domain, size: rng.choice(np.asarray(domain.integers, np.int64), size),
}


def option_combinations(layer: Layer, shape: Shape) -> Iterator[dict[str, OptionValue]]:
    names = [option.name for option in layer.options]
    values = [option.domain.choices(shape) for option in layer.options]
    return (layer.complete(dict(zip(names, each, strict=True)), shape) for each in product(*values))


def companions(layer: Layer, shape: Shape, options: Mapping[str, OptionValue]) -> Iterator[tuple[Shape, ...]]:
    """The shapes of all inputs but the first."""
    arguments = [each for each in layer.arguments if each.when is None or each.when(options)]
    repeated = [layer.arguments * count for count in (1, 2, 3)] if layer.variadic else [tuple(arguments)]
    return chain.from_iterable(product(*(each.shapes(shape, options) for each in some[1:])) for some in repeated)


def first_shapes(layer: Layer) -> tuple[Shape, ...]:
    low, high = layer.ranks
    return layer.shapes or tuple(shape for shape in SHAPES if low <= len(shape) <= high)


def takes(layer: Layer, shapes: Sequence[Shape], options: Mapping[str, OptionValue]) -> bool:
    try:
        layer.output_shape(shapes, options)
    except ShapeError:
        return False
    return True


def cases(layer: Layer) -> Iterator[Case]:
    for shape in first_shapes(layer):
        for options in option_combinations(layer, shape):
            for others in companions(layer, shape, options):
                if takes(layer, (shape, *others), options):
                    yield Case(layer, tuple(options.items()), (shape, *others))


def telling_share(every: Sequence[Case], count: int) -> list[Case]:
    """Of more than `count` cases, first those that show an option's value or a shape not seen before."""
    if len(every) <= count:
        return list(every)
    order = np.random.default_rng(zlib.crc32(every[0].layer.name.encode())).permutation(len(every))
    seen: set[object] = set()
    telling, others = [], []
    for case in (every[i] for i in order):
        shown = {*case.options, *enumerate(case.shapes), (len(case.shapes), len(case.parameters))}
        (others if shown <= seen else telling).append(case)
        seen |= shown
    return [*telling, *others[: max(count - len(telling), 0)]]


CASES = [case for layer in LAYERS.values() for case in telling_share(list(cases(layer)), CASES_PER_LAYER)]
PROVEN = [
    *(pytest.param(case, id=str(case)) for case in CASES),
    *(
        pytest.param(replace(case, layer=precise(case.layer)), id=f"precise-{case}")
        for case in CASES
        if case.layer.name in PRECISE
    ),
]
"""Of every layer the textbook's pair, and the precise one where it has one."""
KINKS = [(case, kink) for case in CASES for kink in case.layer.kinks if not kink.ties and case.shows(kink)]
TIES = [(case, kink) for case in CASES for kink in case.layer.kinks if kink.ties]


# The checks. Each raises AssertionError for a case whose backward function is not what it must be.


def check_structure(case: Case) -> None:
    """The output has the declared shape and numbers; there is one gradient per differentiable array, in its shape."""
    values = case.point()
    out, cache = case.forward(values)
    assert np.shape(out) == case.out_shape, f"the output has shape {np.shape(out)}, not {case.out_shape}"
    assert case.layer.codomain.contains(np.asarray(out)), f"the output leaves its codomain, {case.layer.codomain}"
    gradients = case.layer.backward(case.cotangent(), cache)
    assert set(gradients) == set(case.differentiable), f"gradients of {sorted(gradients)}"
    for name, shape in case.differentiable.items():
        got = np.asarray(gradients[name])
        assert (got.shape, got.dtype) == (shape, np.float64), f"{name}: {got.dtype} of shape {got.shape}, not {shape}"


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


def complex_slope(case: Case, values: Arrays, name: str, direction: Array) -> Array:
    out, _ = case.forward(values | {name: values[name] + 1j * COMPLEX_STEP * direction})
    return np.imag(out) / COMPLEX_STEP


def central_slope(case: Case, values: Arrays, name: str, direction: Array) -> Array:
    """Central differences at a step and at half of it, extrapolated to order four."""

    def slope(step: float) -> Array:
        above, _ = case.forward(values | {name: values[name] + step * direction})
        below, _ = case.forward(values | {name: values[name] - step * direction})
        return (above - below) / (2.0 * step)

    return (4.0 * slope(STEP / 2) - slope(STEP)) / 3.0


Measure = Callable[[Case, Arrays, str, Array], Array]


def slopes(case: Case, measure: Measure) -> dict[str, Slopes]:
    values, cotangent = case.point(), case.cotangent()
    out, cache = case.forward(values)
    gradients = case.layer.backward(cotangent, cache)
    directions = {name: case.direction(name) for name in case.differentiable}
    return {
        name: Slopes(cotangent * measure(case, values, name, d), gradients[name] * d, cotangent * out)
        for name, d in directions.items()
    }


def check_slopes(case: Case, measure: Measure, tolerance: float) -> None:
    for name, each in slopes(case, measure).items():
        assert each.error <= tolerance * each.scale, (
            f"d{name}: off by {each.error:.1e}, {each.error / each.scale:.1e} of the terms; allowed: {tolerance:g}"
        )


def check_complex_step(case: Case) -> None:
    check_slopes(case, complex_slope, COMPLEX_STEP_TOLERANCE)


def check_differences(case: Case) -> None:
    check_slopes(case, central_slope, DIFFERENCES_TOLERANCE)


def check_linear(case: Case) -> None:
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
        assert error <= LINEARITY_TOLERANCE * scale, f"d{name} is not linear in the cotangent: off by {error:.1e}"
        assert not np.any(of_zero[name]), f"d{name} is not zero for a zero cotangent"


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


def check_pure(case: Case) -> None:
    """Nothing is written to: not the inputs, not the cotangent, not the cache."""
    values, cotangent = case.point(), np.asarray(case.cotangent())
    given = copy.deepcopy((values, cotangent))
    _, cache = case.forward(values)
    assert identical(values, given[0]), "forward wrote to its inputs"
    kept = copy.deepcopy(cache)
    first = copy.deepcopy(case.layer.backward(cotangent, cache))
    assert identical((values, cotangent), given), "backward wrote to the inputs or to its cotangent"
    assert identical(cache, kept), "backward wrote to its cache"
    assert identical(first, case.layer.backward(cotangent, cache)), "a second backward pass differs from the first"
    check_writes_nothing(case, values, cotangent)


def check_writes_nothing(case: Case, values: Arrays, cotangent: Array) -> None:
    """Comparing copies does not see what is written and put back; read-only arrays do."""
    freeze((values, cotangent))
    try:
        _, cache = case.forward(values)
        freeze(cache)
        case.layer.backward(cotangent, cache)
    except ValueError as error:
        raise AssertionError(f"a read-only array was written to: {error}") from error


def one_sided_slopes(case: Case, values: Arrays, name: str, cotangent: Array, side: float) -> Array:
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


def check_kink(case: Case, kink: Kink) -> None:
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
        assert mixed_everywhere, f"d{name} at {point}: not left + w (right - left), with left {left}, right {right}"
    default = case.backward(at_kink, cotangent)
    assert identical(default, case.backward(at_kink, cotangent, **{kink.name: kink.default})), "another default"
    low, high = (case.backward(values, cotangent, **{kink.name: weight}) for weight in (0.0, 1.0))
    assert identical(low, high), f"{kink.name} changes the gradient away from {point}"


def check_ties(case: Case, kink: Kink) -> None:
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
        assert np.allclose(got, near, rtol=0.0, atol=0.01), (
            f"weight {weight:g} is not the {'last' if weight else 'first'}"
        )
    shared = case.backward(tied, cotangent, **{kink.name: 0.5})[name]
    total = case.backward(tied, cotangent, **{kink.name: 0.0})[name].sum()
    assert abs(shared.sum() - total) <= 1e-9 * (1.0 + abs(total)), "shares do not add up"
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
        assert between[0] - 1e-9 <= step <= between[1] + 1e-9, "evenly shared, it is no subgradient"
    default = case.backward(tied, cotangent)
    assert identical(default, case.backward(tied, cotangent, **{kink.name: kink.default})), "another default"
    apart = case.point()
    low, high = (case.backward(apart, cotangent, **{kink.name: weight}) for weight in (0.0, 1.0))
    assert identical(low, high), f"{kink.name} changes the gradient where nothing ties"


def of_argument(point: float | Mapping[str, list[float]], name: str) -> Any:
    return point if isinstance(point, float) else point[name]


def mixes(left: Array, right: Array, gradients: Sequence[Array]) -> Array:
    """Mask of the elements that are left + w (right - left) for each weight w."""
    wanted = [left + weight * (right - left) for weight in KINK_WEIGHTS]
    close = [np.isclose(got, want, rtol=0.0, atol=1e-8) for got, want in zip(gradients, wanted, strict=True)]
    return np.asarray(np.logical_and.reduce(close))


# The proofs.


def test_every_layer_has_cases() -> None:
    """A companion that a layer declares must fit wherever another does."""
    for layer in LAYERS.values():
        assert any(case.layer is layer for case in CASES), layer.name
        for shape in first_shapes(layer):
            for options in islice(option_combinations(layer, shape), 200):
                fits = {takes(layer, (shape, *others), options) for others in companions(layer, shape, options)}
                assert len(fits) == 1, f"{layer.name}: {options} beside {shape}"


def test_every_option_value_has_a_case() -> None:
    """All that the table lists, and at least two of the values that depend on the input's shape."""
    listed = {Choice: "values", Real: "examples", Integer: "examples", Integers: "examples"}
    for layer in LAYERS.values():
        for option in layer.options:
            seen = {dict(case.options)[option.name] for case in CASES if case.layer is layer}
            if type(option.domain) in listed:
                assert seen == set(getattr(option.domain, listed[type(option.domain)])), f"{layer.name}: {option.name}"
            else:
                assert len(seen) >= 2, f"{layer.name}: {option.name}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_points_keep_away_from_kinks(case: Case) -> None:
    """Both sides of the steps taken by differences stay in the domain, and cross no kink."""
    values = case.point()
    reach = {name: STEP * case.direction(name) for name in case.floating if case.domains[name].kind != "sign"}
    for name, moved in reach.items():
        assert case.domains[name].contains(values[name] + moved)
        assert case.domains[name].contains(values[name] - moved)
    if case.layer.kinks:
        numbers = [values[name].ravel() for name in reach]
        taken = np.sort(np.concatenate([*numbers, case.kinks]))
        gaps = [above - below for below, above in pairwise(taken)]
        assert min(gaps, default=np.inf) > max(abs(each).max() for each in reach.values())


@pytest.mark.parametrize("case", PROVEN)
def test_structure(case: Case) -> None:
    check_structure(case)


@pytest.mark.parametrize("case", PROVEN)
def test_complex_step(case: Case) -> None:
    check_complex_step(case)


@pytest.mark.parametrize("case", PROVEN)
def test_differences(case: Case) -> None:
    check_differences(case)


@pytest.mark.parametrize("case", PROVEN)
def test_linear_in_cotangent(case: Case) -> None:
    check_linear(case)


@pytest.mark.parametrize("case", PROVEN)
def test_pure(case: Case) -> None:
    check_pure(case)


@pytest.mark.parametrize(("case", "kink"), KINKS, ids=[f"{case}-{kink.name}" for case, kink in KINKS])
def test_kink(case: Case, kink: Kink) -> None:
    check_kink(case, kink)


@pytest.mark.parametrize(("case", "kink"), TIES, ids=[f"{case}-{kink.name}" for case, kink in TIES])
def test_ties(case: Case, kink: Kink) -> None:
    check_ties(case, kink)


# The checks refuse what is wrong.

Gradients = dict[str, Any]


def case_of(name: str, *shapes: Shape, **options: OptionValue) -> Case:
    layer = LAYERS[name]
    return Case(layer, tuple(layer.complete(options, shapes[0]).items()), shapes)


def altered(case: Case, alter: Callable[[Gradients], Gradients]) -> Case:
    """The case with a backward function whose result is altered."""
    right = case.layer.backward
    return replace(case, layer=replace(case.layer, backward=lambda dout, cache: alter(right(dout, cache))))


def misled(case: Case, mislead: Callable[[Array], Array]) -> Case:
    """The case with a backward function that sees another cotangent."""
    right = case.layer.backward
    return replace(case, layer=replace(case.layer, backward=lambda dout, cache: right(mislead(dout), cache)))


def rewritten(case: Case, **functions: Callable[..., Any]) -> Case:
    return replace(case, layer=replace(case.layer, **functions))


def every(change: Callable[[Array], Any]) -> Callable[[Gradients], Gradients]:
    return lambda gradients: {name: change(np.asarray(gradient)) for name, gradient in gradients.items()}


def without_largest(gradient: Array) -> Array:
    kept = np.array(gradient)
    kept.flat[abs(kept).argmax()] = 0.0
    return kept


def telling(layer: Layer) -> Case:
    """The layer's first case with several numbers, and slopes that are nowhere zero, nor next to it by cancelling."""
    return next(
        case
        for case in CASES
        if case.layer is layer and math.prod(case.shapes[0]) > 1 and all(share > 0.02 for share in slope_shares(case))
    )


def slope_shares(case: Case) -> Iterator[float]:
    """For each gradient, its slope along the direction taken, as a share of the scale on which errors are judged."""
    out, _ = case.forward(case.point())
    for name, gradient in case.backward(case.point(), case.cotangent()).items():
        terms = gradient * case.direction(name)
        scale = abs(terms).sum() + abs(case.cotangent() * out).sum()
        yield abs(terms.sum()) / scale if scale else 0.0


WRONG_GRADIENTS: dict[str, Callable[[Gradients], Gradients]] = {
    "sign flipped": every(lambda gradient: -gradient),
    "one element zero": every(without_largest),
    "all zero": every(np.zeros_like),
    "scaled by 1 + 1e-6": every(lambda gradient: gradient * (1.0 + 1e-6)),
    "not finite": every(lambda gradient: gradient * np.nan),
}

WRONG_STRUCTURES: dict[str, Callable[[Gradients], Gradients]] = {
    "one missing": lambda gradients: dict(list(gradients.items())[1:]),
    "one too many": lambda gradients: gradients | {"surplus": np.zeros(3)},
    "None": every(lambda gradient: None),
    "an axis too many": every(lambda gradient: gradient[None]),
    "a lower precision": every(lambda gradient: gradient.astype(np.float32)),
}

WRONG_COTANGENTS: dict[str, Callable[[Array], Array]] = {
    "its sign": np.sign,
    "its square": np.square,
    "squashed": np.tanh,
    "normalised": lambda dout: dout / (1e-8 + abs(dout).max()),
    "shifted unevenly": lambda dout: dout + 1e-9 * (1.0 + np.arange(dout.size)).reshape(dout.shape),
}


@pytest.mark.parametrize("check", [check_complex_step, check_differences])
@pytest.mark.parametrize("fault", WRONG_GRADIENTS)
@pytest.mark.parametrize("name", LAYERS)
def test_slopes_refuse_wrong_gradients(name: str, fault: str, check: Callable[[Case], None]) -> None:
    with pytest.raises(AssertionError, match="of the terms; allowed"):
        check(altered(telling(LAYERS[name]), WRONG_GRADIENTS[fault]))


@pytest.mark.parametrize("fault", ["ones", *WRONG_COTANGENTS])
@pytest.mark.parametrize("name", LAYERS)
def test_slopes_refuse_wrong_cotangents(name: str, fault: str) -> None:
    with pytest.raises(AssertionError, match="of the terms; allowed"):
        check_complex_step(misled(telling(LAYERS[name]), (WRONG_COTANGENTS | {"ones": np.ones_like})[fault]))


@pytest.mark.parametrize("name", LAYERS)
def test_complex_step_sees_the_last_digits(name: str) -> None:
    with pytest.raises(AssertionError, match="of the terms; allowed"):
        check_complex_step(altered(telling(LAYERS[name]), every(lambda gradient: gradient * (1.0 + 1e-10))))


@pytest.mark.parametrize("fault", WRONG_STRUCTURES)
@pytest.mark.parametrize("name", LAYERS)
def test_structure_refuses_wrong_gradients(name: str, fault: str) -> None:
    with pytest.raises(AssertionError, match=r"^gradients of|: (float32|float64|object) of shape"):
        check_structure(altered(telling(LAYERS[name]), WRONG_STRUCTURES[fault]))


@pytest.mark.parametrize("fault", WRONG_COTANGENTS)
@pytest.mark.parametrize("name", LAYERS)
def test_linearity_refuses_wrong_cotangents(name: str, fault: str) -> None:
    with pytest.raises(AssertionError, match=r"is not linear in the cotangent|is not zero for a zero cotangent"):
        check_linear(misled(telling(LAYERS[name]), WRONG_COTANGENTS[fault]))


def test_linearity_demands_exactly_zero() -> None:
    with pytest.raises(AssertionError, match="dx is not zero for a zero cotangent"):
        check_linear(altered(case_of("tanh", (2, 3)), every(lambda gradient: gradient + 1e-300)))


def test_structure_refuses_a_gradient_of_class_indices() -> None:
    case = case_of("cross_entropy", (2, 3), (2,), targets="classes")
    with pytest.raises(AssertionError, match=r"gradients of \['target', 'x'\]"):
        check_structure(altered(case, lambda gradients: gradients | {"target": np.zeros(2)}))


def test_structure_refuses_an_undeclared_output() -> None:
    softmax = case_of("softmax", (2, 3))
    with pytest.raises(AssertionError, match=r"the output has shape \(6,\), not \(2, 3\)"):
        check_structure(rewritten(softmax, forward=lambda x, axis: (x.ravel(), None)))
    with pytest.raises(AssertionError, match="the output leaves its codomain, unit"):
        check_structure(rewritten(softmax, forward=lambda x, axis: (x, None)))


def bias_of_first_row(dout: Array, cache: Any) -> Gradients:
    gradients = LAYERS["linear"].backward(dout, cache)
    return gradients | {"bias": dout.reshape(-1, dout.shape[-1])[0]}


def transposed_weight(dout: Array, cache: Any) -> Gradients:
    gradients = LAYERS["linear"].backward(dout, cache)
    return gradients | {"weight": gradients["weight"].T}


def layer_norm_without(missing: str) -> Backward:
    def backward(dout: Array, cache: Any) -> Gradients:
        normalized, reciprocal, _, over = cache
        terms = {
            "mean": dout.mean(axis=over, keepdims=True),
            "product": normalized * (dout * normalized).mean(axis=over, keepdims=True),
        }
        return {"x": reciprocal * (dout - sum(term for name, term in terms.items() if name != missing))}

    return backward


MISTAKES: dict[str, tuple[Case, Backward]] = {
    "derivative left out": (case_of("tanh", (2, 3)), lambda dout, out: {"x": dout}),
    "derivative at the output": (
        case_of("softplus", (3,)),
        lambda dout, x: {"x": dout / (1 + np.exp(-np.log1p(np.exp(x))))},
    ),
    "bias not summed": (case_of("linear", (2, 3), features=3), bias_of_first_row),
    "weight transposed": (
        case_of("linear", (2, 3), features=3),
        transposed_weight,
    ),
    "softmax element by element": (
        case_of("softmax", (2, 3)),
        lambda dout, cache: {"x": dout * cache[0] * (1.0 - cache[0])},
    ),
    "layer norm without the mean": (case_of("layer_norm", (2, 3), affine=False), layer_norm_without("mean")),
    "layer norm without the product": (case_of("layer_norm", (2, 3), affine=False), layer_norm_without("product")),
    "broadcast partner not summed": (
        case_of("add", (2, 3), (3,)),
        lambda dout, cache: {"a": dout, "b": dout[0]},
    ),
    "second factor's gradient with the first's": (
        case_of("multiply", (3,), (3,)),
        lambda dout, cache: {"a": dout * cache[1], "b": dout * cache[1]},
    ),
    "sum instead of mean": (
        case_of("mse", (2, 3), (2, 3), reduction="mean"),
        lambda dout, cache: {"x": 2.0 * dout * cache[0], "target": -2.0 * dout * cache[0]},
    ),
    "target's sign": (
        case_of("half_squared_error", (3,), (3,), reduction="none"),
        lambda dout, cache: {"x": dout * cache[0], "target": dout * cache[0]},
    ),
    "parts swapped": (
        case_of("concatenate", (3,), (3,), axis=0),
        lambda dout, cache: {"x0": dout[3:], "x1": dout[:3]},
    ),
    "columns before rows": (
        case_of("reshape", (2, 3), shape=(3, 2)),
        lambda dout, shape: {"x": dout.reshape(shape, order="F")},
    ),
}


@pytest.mark.parametrize("check", [check_complex_step, check_differences])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_slopes_refuse_mistakes(mistake: str, check: Callable[[Case], None]) -> None:
    case, backward = MISTAKES[mistake]
    check(case)
    with pytest.raises(AssertionError, match="of the terms; allowed"):
        check(rewritten(case, backward=backward))


def scale_input(x: Array) -> tuple[Array, Array]:
    out = np.tanh(x)
    x *= 2.0
    return out, out


def write_back_input(x: Array) -> tuple[Array, Array]:
    x += 0.0
    return np.tanh(x), np.tanh(x)


def scale_cotangent(dout: Array, out: Array) -> Gradients:
    dout *= 1.0 - out * out
    return {"x": dout}


def write_back_cotangent(dout: Array, out: Array) -> Gradients:
    dout *= 1.0
    return {"x": dout * (1.0 - out * out)}


def scale_cache(dout: Array, bend: Array) -> Gradients:
    bend *= bend
    return {"x": dout * bend}


def write_back_cache(dout: Array, bend: Array) -> Gradients:
    bend *= 1.0
    return {"x": dout * bend * bend}


def clear_cache(dout: Array, cache: Any) -> Gradients:
    gradients = LAYERS["concatenate"].backward(dout, cache)
    cache[0].clear()
    return gradients


class Momentum:
    """A backward function that remembers its last result."""

    def __init__(self) -> None:
        self.last: Any = 0.0

    def __call__(self, dout: Array, out: Array) -> Gradients:
        self.last = 0.5 * self.last + dout * (1.0 - out * out)
        return {"x": self.last}


TANH, TANHSHRINK = case_of("tanh", (2, 3)), case_of("tanhshrink", (2, 3))
IMPURE: dict[str, tuple[Case, str]] = {
    "forward scales its input": (rewritten(TANH, forward=scale_input), "forward wrote to its inputs"),
    "forward writes its input back": (rewritten(TANH, forward=write_back_input), "a read-only array was written to"),
    "backward scales its cotangent": (rewritten(TANH, backward=scale_cotangent), "to the inputs or to its cotangent"),
    "backward writes its cotangent back": (rewritten(TANH, backward=write_back_cotangent), "a read-only array"),
    "backward scales its cache": (rewritten(TANHSHRINK, backward=scale_cache), "backward wrote to its cache"),
    "backward writes its cache back": (
        rewritten(TANHSHRINK, backward=write_back_cache),
        "a read-only array was written to",
    ),
    "backward empties a list": (
        rewritten(case_of("concatenate", (3,), (3,)), backward=clear_cache),
        "backward wrote to its cache",
    ),
    "backward remembers": (rewritten(TANH, backward=Momentum()), "a second backward pass differs from the first"),
}


@pytest.mark.parametrize("fault", IMPURE)
def test_purity_refuses(fault: str) -> None:
    case, message = IMPURE[fault]
    with pytest.raises(AssertionError, match=message):
        check_pure(case)


def relu_at_zero(derivative: Callable[[Array, float], Array], default: float = 0.0) -> Case:
    """ReLU with another derivative, a function of x and of the weight asked for."""

    def forward(x: Array, *, at_zero: float = default) -> tuple[Array, tuple[Array, float]]:
        return np.maximum(x, 0.0), (x, at_zero)

    def backward(dout: Array, cache: tuple[Array, float]) -> Gradients:
        return {"x": dout * derivative(*cache)}

    return rewritten(case_of("relu", (2, 3)), forward=forward, backward=backward)


def relu_derivative(x: Array, weight: float) -> Array:
    return np.where(x == 0, weight, x > 0)


NOT_BETWEEN = r"dx at 0.0: not left \+ w \(right - left\)"
WRONG_KINKS: dict[str, tuple[Case, str]] = {
    "weight ignored": (relu_at_zero(lambda x, weight: np.where(x == 0, 0.5, x > 0)), NOT_BETWEEN),
    "weight of the other side": (relu_at_zero(lambda x, weight: relu_derivative(x, 1.0 - weight)), NOT_BETWEEN),
    "weight squared": (relu_at_zero(lambda x, weight: relu_derivative(x, weight * weight)), NOT_BETWEEN),
    "beyond the right": (relu_at_zero(lambda x, weight: relu_derivative(x, 2.0 * weight)), NOT_BETWEEN),
    "another default": (relu_at_zero(relu_derivative, default=1.0), "another default"),
    "weight used everywhere": (
        relu_at_zero(lambda x, weight: np.where(x <= 0, weight, 1.0)),
        "at_zero changes the gradient away from 0.0",
    ),
    "prediction and target swapped": (
        altered(case_of("mae", (3,), (3,)), every(lambda gradient: -gradient)),
        NOT_BETWEEN,
    ),
}


@pytest.mark.parametrize("fault", WRONG_KINKS)
def test_kink_check_refuses(fault: str) -> None:
    case, message = WRONG_KINKS[fault]
    (kink,) = case.layer.kinks
    with pytest.raises(AssertionError, match=message):
        check_kink(case, kink)


def test_kink_check_accepts_relu_as_rewritten_here() -> None:
    case = relu_at_zero(relu_derivative)
    check_kink(case, *case.layer.kinks)
