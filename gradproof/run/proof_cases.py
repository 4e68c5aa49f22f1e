"""Cases on which a layer is proven: every combination of its options' values on several shapes, at telling points."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, product
from typing import Any

import numpy as np

from gradproof.model.layer import Domain, Kink, Layer, ShapeError
from gradproof.model.options import OptionValue, Shape

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]

SHAPES: tuple[Shape, ...] = ((1,), (3,), (2, 3), (4, 1), (2, 3, 2), (2, 3, 1, 2))

CASES_PER_LAYER = 24
"""Where options and shapes combine to more, a share that shows each value of each option, and each shape."""


HELD_CONSTANT = {("embedding", "weight"): "padding_idx"}
"""The row of a parameter that an option names has no gradient, although the output depends on it."""


@dataclass(frozen=True)
class ProofCase:
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


def draw_real(rng: np.random.Generator, case: ProofCase, domain: Domain, size: int) -> Array:
    """Edge values, never alone because a layer may be all but zero there, among numbers that reach past every kink."""
    edges = [each for each in case.layer.edges if each not in case.kinks][: size - 1]
    reach = 2.5 + max(map(abs, case.kinks), default=0.0)
    avoid = [*case.kinks, *edges, *POLES.get(case.layer.name, [])]
    return rng.permutation([*edges, *separated(rng, size - len(edges), -reach, reach, avoid)])


DRAW: dict[str, Callable[[np.random.Generator, ProofCase, Domain, int], Array]] = {
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


def cases(layer: Layer) -> Iterator[ProofCase]:
    for shape in first_shapes(layer):
        for options in option_combinations(layer, shape):
            for others in companions(layer, shape, options):
                if takes(layer, (shape, *others), options):
                    yield ProofCase(layer, tuple(options.items()), (shape, *others))


def proof_cases(layer: Layer) -> list[ProofCase]:
    """The cases on which a layer is proven."""
    return telling_share(list(cases(layer)), CASES_PER_LAYER)


def telling_share(every: Sequence[ProofCase], count: int) -> list[ProofCase]:
    """Of more than `count` cases, first those that show an option's value or a shape not seen before."""
    if len(every) <= count:
        return list(every)
    order = np.random.default_rng(zlib.crc32(every[0].layer.name.encode())).permutation(len(every))
    seen: set[object] = set()
    telling: list[ProofCase] = []
    others: list[ProofCase] = []
    for case in (every[i] for i in order):
        shown = {*case.options, *enumerate(case.shapes), (len(case.shapes), len(case.parameters))}
        (others if shown <= seen else telling).append(case)
        seen |= shown
    return [*telling, *others[: max(count - len(telling), 0)]]
