"""What an option of a layer may be: domains from which drawing, checking and documentation all derive."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

Shape = tuple[int, ...]
OptionValue = bool | int | float | str | tuple[int, ...]
Options = Mapping[str, OptionValue]

MAX_RANK = 5
"""The most axes that a tensor of a drawn network has."""

SIZES = (3, 1, 5)
"""Lengths of axes, simplest first. Few, because JAX compiles once per shape."""


class OptionDomain(Protocol):
    """The values that an option may take, given the shape of the layer's first input.

    A family may define its own beside its layers.
    """

    def contains(self, value: OptionValue, shape: Shape) -> bool: ...

    def describe(self, shape: Shape) -> str:
        """What a value must be, for an error message and the table of layers."""
        ...

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        """The values worth drawing, simplest first; none where no value fits the shape."""
        ...


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Choice:
    """One of a few values; the type counts too, so that 1 is not True."""

    values: tuple[OptionValue, ...]

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return any(type(value) is type(each) and value == each for each in self.values)

    def describe(self, shape: Shape) -> str:
        return "one of " + ", ".join(map(repr, self.values))

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        return self.values


@dataclass(frozen=True)
class Real:
    """A finite number within bounds (both included); networks are drawn with one of the examples."""

    low: float
    high: float
    examples: tuple[float, ...]

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        number = isinstance(value, float) or is_integer(value)
        return number and math.isfinite(value) and self.low <= value <= self.high  # type: ignore[arg-type, operator]

    def describe(self, shape: Shape) -> str:
        return f"a number from {self.low:g} to {self.high:g}"

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        return self.examples


@dataclass(frozen=True)
class Integer:
    """An integer of at least `low`; networks are drawn with one of the examples."""

    low: int
    examples: tuple[int, ...]

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return is_integer(value) and value >= self.low  # type: ignore[operator]

    def describe(self, shape: Shape) -> str:
        return f"an integer of at least {self.low}"

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        return self.examples


@dataclass(frozen=True)
class Integers:
    """A tuple of `count` integers, each of at least `low`; networks are drawn with one of the examples."""

    count: int
    low: int
    examples: tuple[tuple[int, ...], ...]

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return (
            isinstance(value, tuple)
            and len(value) == self.count
            and all(is_integer(each) and each >= self.low for each in value)
        )

    def describe(self, shape: Shape) -> str:
        return f"{self.count} integers of at least {self.low}"

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        return self.examples


@dataclass(frozen=True)
class Size:
    """The length of an axis that the layer makes, drawn from the palette of sizes."""

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return is_integer(value) and value >= 1  # type: ignore[operator]

    def describe(self, shape: Shape) -> str:
        return "an integer of at least 1"

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        return SIZES


@dataclass(frozen=True)
class Divisor:
    """A divisor of the length of one of the first input's axes: a number of groups."""

    axis: int

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return is_integer(value) and value >= 1 and shape[self.axis] % value == 0  # type: ignore[operator]

    def describe(self, shape: Shape) -> str:
        return f"a divisor of {shape[self.axis]}, the length of axis {self.axis} of an input of shape {list(shape)}"

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        size = shape[self.axis]
        return [each for each in range(1, size + 1) if size % each == 0] or [1]


@dataclass(frozen=True)
class Axis:
    """One axis of the first input, counted from the front or, negative, from the back."""

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return is_integer(value) and -len(shape) <= value < len(shape)  # type: ignore[operator]

    def describe(self, shape: Shape) -> str:
        return f"an axis of an input of shape {list(shape)}: {-len(shape)} to {len(shape) - 1}"

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        return [-1, *range(len(shape)), *range(-len(shape), -1)]


@dataclass(frozen=True)
class Axes:
    """One or more different axes of the first input, each counted from the front or, negative, from the back."""

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        if not isinstance(value, tuple) or not all(is_integer(each) for each in value):
            return False
        inside = all(-len(shape) <= each < len(shape) for each in value)
        return inside and 0 < len(value) == len({each % len(shape) for each in value})

    def describe(self, shape: Shape) -> str:
        return f"different axes of an input of shape {list(shape)}, each from {-len(shape)} to {len(shape) - 1}"

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        every = range(len(shape))
        ascending = [axes for count in range(1, len(shape) + 1) for axes in combinations(every, count)]
        return [(-1,), *ascending, tuple(reversed(every))]


@dataclass(frozen=True)
class TrailingAxes:
    """How many of the first input's last axes."""

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return is_integer(value) and 1 <= value <= len(shape)  # type: ignore[operator]

    def describe(self, shape: Shape) -> str:
        return f"from 1 to {len(shape)} trailing axes of an input of shape {list(shape)}"

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        return range(1, len(shape) + 1)


@dataclass(frozen=True)
class NewShape:
    """A shape with as many elements as the first input."""

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return (
            isinstance(value, tuple)
            and all(is_integer(size) and size >= 0 for size in value)
            and math.prod(value) == math.prod(shape)
        )

    def describe(self, shape: Shape) -> str:
        return f"a shape with {math.prod(shape)} elements, as many as the input of shape {list(shape)}"

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        """Flat, then in two and three factors."""
        elements = math.prod(shape)
        pairs = [(size, elements // size) for size in (1, 2, 3, 5, 8) if elements % size == 0]
        return [(elements,), *pairs, *((first, 1, rest) for first, rest in pairs)]


@dataclass(frozen=True)
class Option:
    """One option of a layer.

    default: None where the option must be given; such options are written without their name.
    structural: it only decides shapes, so the forward functions do not receive it.
    """

    name: str
    domain: OptionDomain
    default: OptionValue | None = None
    structural: bool = False
