"""What the losses share: their row in the table, the numbers their arguments hold, and the check of their shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gradproof.model.layer import POSITIVE, REAL, UNIT, Argument, Domain, Layer, ShapeError, same_shape
from gradproof.model.options import Choice, Option, Options, Shape
from gradproof.reference.common import Array, Gradients

Unreduced = Callable[[Shape, Options], Shape]

REDUCTION = Option("reduction", Choice(("mean", "none", "sum")), "mean")
WEIGHTED = Option("weighted", Choice((False, True)), False, structural=True)


def real(shape: Shape, options: Options) -> Domain:
    return REAL


def unit(shape: Shape, options: Options) -> Domain:
    return UNIT


def positive(shape: Shape, options: Options) -> Domain:
    return POSITIVE


def constant_unit(shape: Shape, options: Options) -> Domain:
    return Domain("unit", constant=True)


def weighted(options: Options) -> bool:
    return bool(options["weighted"])


def _unchanged(shape: Shape, options: Options) -> Shape:
    return shape


REAL_PAIR = (Argument("x"), Argument("target", real, same_shape))
LOGIT_PAIR = (Argument("x"), Argument("target", unit, same_shape))
UNIT_PAIR = (Argument("x", unit), Argument("target", unit, same_shape))


@dataclass(frozen=True)
class Reduced:
    """The output's shape, where each argument beside the prediction fits it; a value, so that layers are equal."""

    arguments: tuple[Argument, ...]
    unreduced: Unreduced

    def __call__(self, shapes: Sequence[Shape], options: Options) -> Shape:
        x = shapes[0]
        shape = self.unreduced(x, options)
        wanted = [each for each in self.arguments if each.when is None or each.when(options)]
        for argument, got in zip(wanted[1:], shapes[1:], strict=True):
            fitting = argument.shapes(x, options)
            if got not in fitting:
                expected = " or ".join(str(list(each)) for each in fitting)
                raise ShapeError(
                    f"a prediction of shape {list(x)} needs a {argument.name} of shape {expected}, got {list(got)}"
                )
        return shape if options["reduction"] == "none" else ()


def loss(
    name: str,
    family: str,
    forward: Callable[..., tuple[Array, Any]],
    backward: Callable[[Array, Any], Gradients],
    arguments: tuple[Argument, ...],
    options: tuple[Option, ...] = (),
    *,
    reduction: Option = REDUCTION,
    unreduced: Unreduced = _unchanged,
    **others: Any,
) -> Layer:
    """The row of a loss whose value, before it is reduced, has the shape `unreduced`, from the prediction's."""
    shape = Reduced(arguments, unreduced)
    return Layer(
        name, "loss", family, forward, backward, (*options, reduction), arguments, output_shape=shape, **others
    )
