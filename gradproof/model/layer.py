"""What a layer is: a frozen record from which drawing, checking, tests and documentation all derive.

The records themselves stand in the table of `gradproof.reference`, one row per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from gradproof.model.options import MAX_RANK, Option, Options, OptionValue, Shape

Kind = Literal["activation", "loss", "layer"]

COMMON_SHAPE: Shape = (2, 3, 2, 2, 2)


@dataclass(frozen=True)
class Domain:
    """The numbers that an input may hold, or that a layer's output is known to hold.

    kind: "real", "unit" (the closed interval from 0 to 1), "positive" (above 0), "sign" (-1 or 1), or "index"
        (integers from `low` to `classes` - 1, and those in `extra`).
    constant: floating data that has no gradient, such as the weights of classes.
    """

    kind: Literal["real", "unit", "positive", "sign", "index"]
    classes: int = 0
    low: int = 0
    extra: tuple[int, ...] = ()
    constant: bool = False

    @property
    def floating(self) -> bool:
        return self.kind != "index"

    @property
    def differentiable(self) -> bool:
        return self.floating and not self.constant

    def admits(self, other: Domain) -> bool:
        """Whether every array of `other` is one of this domain too, and has a gradient where this one must."""
        if self.constant != other.constant or self.floating != other.floating:
            return False
        if self.kind == "index":
            return set(other.integers) <= set(self.integers)
        return self.kind in ("real", other.kind)

    @property
    def integers(self) -> tuple[int, ...]:
        """The integers of an index domain."""
        return (*range(self.low, self.classes), *self.extra)

    def contains(self, array: np.ndarray) -> bool:
        """Whether every number of the array is in the domain; NaN, which overflow leaves behind, may be anywhere."""
        if self.kind == "index":
            return bool(np.issubdtype(array.dtype, np.integer) and np.isin(array, self.integers).all())
        with np.errstate(invalid="ignore"):  # bfloat16 warns where it compares NaN
            return not {
                "real": np.zeros((), bool),
                "unit": (array < 0) | (array > 1),
                "positive": array < 0,  # underflow may leave 0
                "sign": np.abs(array) != 1,
            }[self.kind].any()

    def __str__(self) -> str:
        if self.kind != "index":
            return f"constant {self.kind}" if self.constant else self.kind
        if self.low >= self.classes:
            return f"integers {' or '.join(map(str, self.extra))}"
        others = "".join(f" or {each}" for each in self.extra)
        return f"integers from {self.low} to {self.classes - 1}{others}"


REAL = Domain("real")
UNIT = Domain("unit")
POSITIVE = Domain("positive")
SIGN = Domain("sign")
MASK = Domain("index", 2)
LABEL = Domain("index", 1, low=1, extra=(-1, 1))
"""-1 or 1, in integers: labels with respect to which nothing is differentiated; -1, where hinges bend, first."""


def index_domain(classes: int) -> Domain:
    return Domain("index", classes)


def _any_domain(shape: Shape, options: Options) -> Domain:
    return REAL


def _no_shapes(shape: Shape, options: Options) -> tuple[Shape, ...]:
    return ()


def same_shape(shape: Shape, options: Options) -> tuple[Shape, ...]:
    """The first input's shape, for an argument that must have it too."""
    return (shape,)


@dataclass(frozen=True)
class Argument:
    """One array that a layer takes from an input or from another node.

    domain: the numbers it may hold, from the first input's shape and the options.
    shapes: the shapes it may have when drawn beside a first input of the given shape, the simplest first.
    when: whether these options ask for it; an argument that may be absent is passed by its name.
    """

    name: str
    domain: Callable[[Shape, Options], Domain] = _any_domain
    shapes: Callable[[Shape, Options], tuple[Shape, ...]] = _no_shapes
    when: Callable[[Options], bool] | None = None


TIE_WEIGHTS = (0.0, 0.5, 1.0)
"""First, all evenly, last."""


@dataclass(frozen=True)
class Kink:
    """A point where the function has two one-sided derivatives, and a framework must choose.

    name: the keyword of the layer's forward function that receives the choice, as the weight w of
        the right-hand derivative: left + w * (right - left).
    point: every floating argument set to this number, or to the option of this name times `sign`, sits on the kink;
        or the numbers of each argument, where they differ.
    default: the weight that the reference uses when it stands alone.
    valid: the weights a framework may choose; (0, 1) is the whole subdifferential.
    ties: the kink is where several elements are largest: weight 0 gives the gradient to the first of them, 1 to the
        last, and anything between shares it evenly.
    shape: the shape of a first input, filled with the point, on which the choice shows in every element.
    when: whether, with a first input of this shape and these options, every element has the kink for itself.
    """

    name: str
    point: float | str | Mapping[str, list[float]] = field(hash=False)
    default: float
    valid: tuple[float, float] = (0.0, 1.0)
    sign: float = 1.0
    ties: bool = False
    shape: Shape = (2,)
    when: Callable[[Shape, Options], bool] | None = None

    def shows(self, shape: Shape, options: Options) -> bool:
        return self.when is None or self.when(shape, options)

    def allows(self, weight: float, rounding: float) -> bool:
        """Whether a framework may choose this weight, or one this close to it."""
        if self.ties:
            return any(abs(weight - each) <= rounding for each in TIE_WEIGHTS)
        return self.valid[0] - rounding <= weight <= self.valid[1] + rounding

    @property
    def place(self) -> str:
        """Where it is, in words."""
        if self.ties:
            return "ties"
        if isinstance(self.point, str):
            return f"{'-' if self.sign < 0 else ''}{self.point}"
        return f"{self.point:g}" if isinstance(self.point, float) else self.name.removeprefix("at_")

    def at(self, options: Options) -> float | Mapping[str, list[float]]:
        """The point, given the layer's options."""
        return self.sign * float(options[self.point]) if isinstance(self.point, str) else self.point  # type: ignore[arg-type]


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
    ranks: axes that the first input must have at least, and at most.
    shapes: shapes of a first input worth drawing for this layer in place of the common ones.
    output_shape: the output's shape; raises ShapeError where the inputs do not fit.
    parameters: slot -> shape of each parameter that these inputs and options ask for.
    codomain: what is known of the output's numbers.
    edges: numbers worth drawing for this layer, beside those drawn for all.
    by_order: whether it puts the numbers into an order, in which NaN has no place.
    """

    name: str
    kind: Kind
    family: str
    forward: Callable[..., tuple[np.ndarray, Any]]
    backward: Callable[[np.ndarray, Any], dict[str, np.ndarray]]
    options: tuple[Option, ...] = ()
    arguments: tuple[Argument, ...] = (Argument("x"),)
    variadic: bool = False
    ranks: tuple[int, int] = (0, MAX_RANK)
    shapes: tuple[Shape, ...] = ()
    output_shape: Callable[[Sequence[Shape], Options], Shape] = first_shape
    parameters: Callable[[Sequence[Shape], Options], dict[str, Shape]] = _no_parameters
    codomain: Domain = REAL
    kinks: tuple[Kink, ...] = ()
    edges: tuple[float, ...] = field(default=())
    by_order: bool = False

    @cached_property
    def defaults(self) -> dict[str, OptionValue]:
        """Every option's default, or the simplest choice where it must be given."""
        choices = {each.name: each.domain.choices(self.example_shape) for each in self.options}
        return {each.name: choices[each.name][0] if each.default is None else each.default for each in self.options}

    @property
    def example_shape(self) -> Shape:
        """A shape of a first input that the layer takes."""
        low, high = self.ranks
        return self.shapes[0] if self.shapes else COMMON_SHAPE[: min(max(low, 2), high)]

    def example_shapes(self, options: Options) -> list[Shape]:
        """Shapes of the inputs of a call with these options."""
        wanted = [each for each in self.arguments if each.when is None or each.when(options)]
        fitting = [each.shapes(self.example_shape, options) for each in wanted]
        own = self.example_shape
        return [own if own in shapes or not shapes else shapes[0] for shapes in fitting]

    @property
    def keyword_arguments(self) -> tuple[str, ...]:
        """The arguments that may be absent."""
        return tuple(argument.name for argument in self.arguments if argument.when is not None)

    def arguments_for(self, count: int, options: Options) -> tuple[Argument, ...]:
        """The arguments of a call with `count` inputs. Raises ShapeError where that count is wrong."""
        if self.variadic and count >= 1:
            (each,) = self.arguments
            return tuple(replace(each, name=f"{each.name}{i}") for i in range(count))
        wanted = tuple(each for each in self.arguments if each.when is None or each.when(options))
        if self.variadic or count != len(wanted):
            expected = "at least 1" if self.variadic else str(len(wanted))
            raise ShapeError(f"takes {expected} inputs ({', '.join(a.name for a in wanted)}), got {count}")
        return wanted

    def check_rank(self, shape: Shape) -> None:
        """Raise ShapeError where a first input of this shape has too few or too many axes."""
        low, high = self.ranks
        if not low <= len(shape) <= high:
            wanted = f"{low}" if low == high else f"{low} or more" if high == MAX_RANK else f"{low} to {high}"
            raise ShapeError(f"needs an input of rank {wanted}, got shape {list(shape)}")

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
