"""What a layer is: a frozen record from which drawing, checking, tests and documentation all derive.

The records themselves stand in the table of `gradproof.reference`, one row per layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

Shape = tuple[int, ...]
OptionValue = bool | int | float | str | tuple[int, ...]
Options = Mapping[str, OptionValue]
Kind = Literal["activation", "loss", "layer"]

MAX_RANK = 4


@dataclass(frozen=True)
class Domain:
    """The numbers that an input may hold, or that a layer's output is known to hold.

    kind: "real", "unit" (the closed interval from 0 to 1), "positive" (above 0), or "index" (integers from 0 to
        classes - 1).
    """

    kind: Literal["real", "unit", "positive", "index"]
    classes: int = 0

    @property
    def floating(self) -> bool:
        return self.kind != "index"

    def admits(self, other: Domain) -> bool:
        """Whether every array of `other` is one of this domain too."""
        if self.kind == "index":
            return other.kind == "index" and other.classes <= self.classes
        return other.floating and self.kind in ("real", other.kind)

    def contains(self, array: np.ndarray) -> bool:
        """Whether every number of the array is in the domain; NaN, which overflow leaves behind, may be anywhere."""
        if self.kind == "index":
            in_range = array.size == 0 or (array.min() >= 0 and array.max() < self.classes)
            return bool(np.issubdtype(array.dtype, np.integer) and in_range)
        return not {
            "real": np.zeros((), bool),
            "unit": (array < 0) | (array > 1),
            "positive": array < 0,  # underflow may leave 0
        }[self.kind].any()

    def __str__(self) -> str:
        return f"integers from 0 to {self.classes - 1}" if self.kind == "index" else self.kind


REAL = Domain("real")
UNIT = Domain("unit")
POSITIVE = Domain("positive")


def index_domain(classes: int) -> Domain:
    return Domain("index", classes)


class OptionDomain(Protocol):
    """The values that an option may take, given the shape of the layer's first input."""

    @property
    def example(self) -> OptionValue: ...

    def contains(self, value: OptionValue, shape: Shape) -> bool: ...

    def describe(self, shape: Shape) -> str: ...


def _is_integer(value: OptionValue) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Choice:
    """One of a few values; the type counts too, so that 1 is not True."""

    values: tuple[OptionValue, ...]

    @property
    def example(self) -> OptionValue:
        return self.values[0]

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return any(type(value) is type(each) and value == each for each in self.values)

    def describe(self, shape: Shape) -> str:
        return "one of " + ", ".join(map(repr, self.values))


@dataclass(frozen=True)
class Real:
    """A finite number within bounds (both included); networks are drawn with one of the examples."""

    low: float
    high: float
    examples: tuple[float, ...]

    @property
    def example(self) -> OptionValue:
        return self.examples[0]

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        number = isinstance(value, float) or _is_integer(value)
        return number and math.isfinite(value) and self.low <= value <= self.high  # type: ignore[arg-type, operator]

    def describe(self, shape: Shape) -> str:
        return f"a number from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Size:
    """The length of an axis that the layer makes, drawn from the palette of sizes."""

    @property
    def example(self) -> OptionValue:
        return 1

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return _is_integer(value) and value >= 1  # type: ignore[operator]

    def describe(self, shape: Shape) -> str:
        return "an integer of at least 1"


@dataclass(frozen=True)
class Axis:
    """One axis of the first input, counted from the front or, negative, from the back."""

    @property
    def example(self) -> OptionValue:
        return 0

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return _is_integer(value) and -len(shape) <= value < len(shape)  # type: ignore[operator]

    def describe(self, shape: Shape) -> str:
        return f"an axis of an input of shape {list(shape)}: {-len(shape)} to {len(shape) - 1}"


@dataclass(frozen=True)
class TrailingAxes:
    """How many of the first input's last axes."""

    @property
    def example(self) -> OptionValue:
        return 1

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return _is_integer(value) and 1 <= value <= len(shape)  # type: ignore[operator]

    def describe(self, shape: Shape) -> str:
        return f"from 1 to {len(shape)} trailing axes of an input of shape {list(shape)}"


@dataclass(frozen=True)
class NewShape:
    """A shape with as many elements as the first input."""

    @property
    def example(self) -> OptionValue:
        return (-1,)

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return (
            isinstance(value, tuple)
            and all(_is_integer(size) and size >= 0 for size in value)
            and math.prod(value) == math.prod(shape)
        )

    def describe(self, shape: Shape) -> str:
        return f"a shape with {math.prod(shape)} elements, as many as the input of shape {list(shape)}"


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


def _any_domain(shape: Shape, options: Options) -> Domain:
    return REAL


def _no_shapes(shape: Shape, options: Options) -> tuple[Shape, ...]:
    return ()


@dataclass(frozen=True)
class Argument:
    """One array that a layer takes from an input or from another node.

    domain: the numbers it may hold, from the first input's shape and the options.
    shapes: the shapes it may have when drawn beside a first input of the given shape.
    """

    name: str
    domain: Callable[[Shape, Options], Domain] = _any_domain
    shapes: Callable[[Shape, Options], tuple[Shape, ...]] = _no_shapes


@dataclass(frozen=True)
class Kink:
    """A point where the function has two one-sided derivatives, and a framework must choose.

    name: the keyword of the layer's forward function that receives the choice, as the weight w of
        the right-hand derivative: left + w * (right - left).
    point: every floating argument set to this number, or to the option of this name times `sign`, sits on the kink.
    default: the weight that the reference uses when it stands alone.
    valid: the weights a framework may choose; (0, 1) is the whole subdifferential.
    """

    name: str
    point: float | str
    default: float
    valid: tuple[float, float] = (0.0, 1.0)
    sign: float = 1.0

    def at(self, options: Options) -> float:
        """The point, given the layer's options."""
        return self.point if isinstance(self.point, float) else self.sign * float(options[self.point])  # type: ignore[arg-type]


class ShapeError(ValueError):
    """The shapes of a layer's inputs do not go together; the message says which and why."""


def first_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    return shapes[0]


def normalized_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    """The first shape, for layers that divide by what they find along an axis."""
    if 0 in shapes[0]:
        raise ShapeError(f"cannot normalise an input of shape {list(shapes[0])}: it has no elements")
    return shapes[0]


def _no_parameters(shapes: Sequence[Shape], options: Options) -> dict[str, Shape]:
    return {}


@dataclass(frozen=True)
class Layer:
    """One row of the layer table.

    forward: (*arrays, **options) -> (output, cache); backward: (dout, cache) -> {argument: gradient}.
    arguments: the arrays taken, in order; a variadic layer repeats its only one, as x0, x1, ...
    min_rank: axes that the first input must have at least.
    output_shape: the output's shape; raises ShapeError where the inputs do not fit.
    parameters: slot -> shape of each parameter that these inputs and options ask for.
    codomain: what is known of the output's numbers.
    edges: numbers worth drawing for this layer, beside those drawn for all.
    """

    name: str
    kind: Kind
    family: str
    forward: Callable[..., tuple[np.ndarray, Any]]
    backward: Callable[[np.ndarray, Any], dict[str, np.ndarray]]
    options: tuple[Option, ...] = ()
    arguments: tuple[Argument, ...] = (Argument("x"),)
    variadic: bool = False
    min_rank: int = 0
    output_shape: Callable[[Sequence[Shape], Options], Shape] = first_shape
    parameters: Callable[[Sequence[Shape], Options], dict[str, Shape]] = _no_parameters
    codomain: Domain = REAL
    kinks: tuple[Kink, ...] = ()
    edges: tuple[float, ...] = field(default=())

    @property
    def defaults(self) -> dict[str, OptionValue]:
        """Every option's default, or an example where it must be given."""
        return {each.name: each.domain.example if each.default is None else each.default for each in self.options}

    def arguments_for(self, count: int) -> tuple[Argument, ...]:
        """The arguments of a call with `count` inputs. Raises ShapeError where that count is wrong."""
        if self.variadic and count >= 1:
            (each,) = self.arguments
            return tuple(Argument(f"{each.name}{i}", each.domain, each.shapes) for i in range(count))
        if self.variadic or count != len(self.arguments):
            expected = "at least 1" if self.variadic else str(len(self.arguments))
            raise ShapeError(f"takes {expected} inputs ({', '.join(a.name for a in self.arguments)}), got {count}")
        return self.arguments

    def complete(self, options: Options, shape: Shape | None = None) -> dict[str, OptionValue]:
        """The options with defaults filled in, in the table's order.

        Raises ValueError for an unknown or missing option and, where the first input's shape is
        given, for a value outside its domain.
        """
        known = [option.name for option in self.options]
        for name in options:
            if name not in known:
                raise ValueError(f"unknown option {name!r}; valid options: {', '.join(known) or 'none'}")
        completed: dict[str, OptionValue] = {}
        for option in self.options:
            value = options.get(option.name, option.default)
            if value is None:
                raise ValueError(f"option {option.name!r} must be given")
            if shape is not None and not option.domain.contains(value, shape):
                raise ValueError(f"option {option.name}={value!r}: expected {option.domain.describe(shape)}")
            completed[option.name] = value
        return completed
