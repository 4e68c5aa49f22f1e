"""Linear maps, and products that are linear in each operand.

Legend: I input features, O output features, ... any leading axes, none included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from gradproof.model.layer import Argument, Layer, ShapeError
from gradproof.model.options import MAX_RANK, Choice, Option, Options, OptionValue, Shape, Size
from gradproof.reference.common import Array, Gradients, unbroadcast


class LinearOperands(NamedTuple):
    """What a linear map keeps: x (..., I) and weight (O, I)."""

    x: Array
    weight: Array
    biased: bool


def linear_forward(x: Array, weight: Array, bias: Array | None = None) -> tuple[Array, LinearOperands]:
    """out = x weight^T + bias. Shapes: x (..., I), weight (O, I), bias (O,), out (..., O)."""
    out = x @ weight.T
    return (out if bias is None else out + bias), LinearOperands(x, weight, bias is not None)


def linear_backward(dout: Array, kept: LinearOperands) -> Gradients:
    """dx = dout weight; dweight = sum of the outer products of dout and x over ...; dbias = sum of dout over ...."""
    x, weight = kept.x, kept.weight
    count = math.prod(x.shape[:-1])
    rows = dout.reshape(count, weight.shape[0])
    gradients = {"x": dout @ weight, "weight": rows.T @ x.reshape(count, weight.shape[1])}
    return gradients | ({"bias": rows.sum(axis=0)} if kept.biased else {})


class BilinearOperands(NamedTuple):
    """What a bilinear map keeps: x1 (..., I1), x2 (..., I2), weight (O, I1, I2); halfway, x1 weight, (..., O, I2)."""

    x1: Array
    x2: Array
    weight: Array
    halfway: Array
    biased: bool


def bilinear_forward(x1: Array, x2: Array, weight: Array, bias: Array | None = None) -> tuple[Array, BilinearOperands]:
    """out_o = sum_ij x1_i weight_oij x2_j + bias_o.

    Shapes: x1 (..., I1), x2 (..., I2), weight (O, I1, I2), bias (O,), out (..., O).
    """
    halfway = np.einsum("...i,oij->...oj", x1, weight)
    out = np.einsum("...oj,...j->...o", halfway, x2)
    return (out if bias is None else out + bias), BilinearOperands(x1, x2, weight, halfway, bias is not None)


def bilinear_backward(dout: Array, kept: BilinearOperands) -> Gradients:
    """dx1_i = sum_oj dout_o weight_oij x2_j; dx2_j = sum_oi dout_o x1_i weight_oij; dweight_oij = dout_o x1_i x2_j.

    dbias = dout; dweight and dbias are summed over ....
    """
    x1, x2, weight = kept.x1, kept.x2, kept.weight
    other_half = np.einsum("oij,...j->...oi", weight, x2)
    outer = np.einsum("...o,...i->...oi", dout, x1)
    gradients = {
        "x1": np.einsum("...o,...oi->...i", dout, other_half),
        "x2": np.einsum("...o,...oj->...j", dout, kept.halfway),
        "weight": np.einsum("noi,nj->oij", outer.reshape(-1, *weight.shape[:2]), x2.reshape(-1, x2.shape[-1])),
    }
    return gradients | ({"bias": unbroadcast(dout, dout.shape[-1:])} if kept.biased else {})


def matmul_forward(a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    """out = a b, matrix by matrix.

    Shapes: a (..., M, K), b (..., K, N), out (..., M, N), the leading axes broadcast. An operand of rank 1 is a row
    (a) or a column (b), whose other axis is missing from out too.
    """
    return a @ b, (a, b)


def matmul_backward(dout: Array, cache: tuple[Array, Array]) -> Gradients:
    """da = dout b^T, db = a^T dout, each summed over the axes along which it was broadcast."""
    a, b = cache
    row, column = a.ndim == 1, b.ndim == 1
    left = a[None, :] if row else a
    right = b[:, None] if column else b
    g = dout[..., None] if column else dout
    g = g[..., None, :] if row else g
    da = unbroadcast(g @ right.swapaxes(-1, -2), left.shape)
    db = unbroadcast(left.swapaxes(-1, -2) @ g, right.shape)
    return {"a": da.reshape(a.shape), "b": db.reshape(b.shape)}


@dataclass(frozen=True)
class Indices:
    """An equation's three index lists, such as "ij", "jk" and "ik"."""

    a: str
    b: str
    out: str

    @property
    def equation(self) -> str:
        return f"{self.a},{self.b}->{self.out}"


class EinsumOperands(NamedTuple):
    """What an einsum keeps: an axis of a, b and out per index."""

    a: Array
    b: Array
    indices: Indices


def einsum_forward(a: Array, b: Array, *, equation: str) -> tuple[Array, EinsumOperands]:
    """out = the sum of a b over every index that out lacks, as in Einstein's notation.

    Shapes: an axis per index; the same index, the same length.
    """
    indices = parse_equation(equation)
    return np.einsum(indices.equation, a, b), EinsumOperands(a, b, indices)


def einsum_backward(dout: Array, kept: EinsumOperands) -> Gradients:
    """da = the sum of dout b over every index that a lacks, the same along every index that only a has; db likewise."""
    a, b, indices = kept.a, kept.b, kept.indices
    return {
        "a": _operand_gradient(dout, indices.out, b, indices.b, a, indices.a),
        "b": _operand_gradient(dout, indices.out, a, indices.a, b, indices.b),
    }


def _operand_gradient(
    dout: Array, out_indices: str, other: Array, other_indices: str, own: Array, indices: str
) -> Array:
    """One operand's gradient, from the output's cotangent and the other operand."""
    shared = [each in out_indices + other_indices for each in indices]
    reached = "".join(each for each, is_shared in zip(indices, shared, strict=True) if is_shared)
    gradient = np.einsum(f"{out_indices},{other_indices}->{reached}", dout, other)
    lengths = [size if is_shared else 1 for size, is_shared in zip(own.shape, shared, strict=True)]
    return np.broadcast_to(gradient.reshape(lengths), own.shape)


@cache
def parse_equation(equation: str) -> Indices:
    """The index lists of "ij,jk->ik", or of "ij,jk": out then has, in order, the indices that stand once.

    Raises ShapeError where it is no equation of two operands, or one has an index twice.
    """
    operands, arrow, out = equation.replace(" ", "").partition("->")
    if operands.count(",") != 1:
        raise ShapeError(f"equation {equation!r}: expected two operands, such as 'ij,jk->ik'")
    a, b = operands.split(",")
    for letters in (a, b, out):
        strange = [each for each in letters if not (each.isascii() and each.isalpha())]
        if strange:
            raise ShapeError(f"equation {equation!r}: an index is one letter, got {strange[0]!r}")
        for letter in letters:
            if letters.count(letter) > 1:
                raise ShapeError(f"equation {equation!r}: the index {letter!r} stands twice in {letters!r}")
    unknown = [letter for letter in out if letter not in a + b]
    if unknown:
        raise ShapeError(f"equation {equation!r}: the output's index {unknown[0]!r} is in neither operand")
    return Indices(a, b, out if arrow else "".join(sorted(set(a) ^ set(b))))


@dataclass(frozen=True)
class Equation:
    """An equation in Einstein's notation, of two operands, without repeated indices in one of them."""

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return isinstance(value, str)  # what is wrong with an equation is said where the shapes are known

    def describe(self, shape: Shape) -> str:
        return f"an equation of two operands, such as {self.choices(shape)[0]!r}"

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        """Per rank: products, outer products, transposed outputs, sums over an index of one operand alone."""
        return EQUATIONS[len(shape)]


EQUATIONS: tuple[tuple[str, ...], ...] = (
    (",ij->ji", ",->"),
    ("i,i->", "i,j->ji", "i,ij->j", "i,j->j", "i,ij->i"),
    ("ij,jk->ik", "ij,kj->ki", "ij,ij->", "ij,kl->li", "ij,ji->j", "ij,k->jk", "ij,jk"),
    ("bij,bjk->bik", "bij,ijk->kb", "bij,kj->bki", "bij,b->j", "bij,->jb"),
    ("bhqd,bhkd->bhqk", "bqhd,hdo->bqo", "abcd,cd->ba", "abcd,ce->ea"),
    ("abcde,e->abcd", "abcde,bed->ca"),
)
"""Equations worth drawing, by the rank of the first operand."""


def _features_last(shapes: Sequence[Shape], options: Options) -> Shape:
    return (*shapes[0][:-1], int(options["features"]))  # type: ignore[arg-type]


def _linear_parameters(shapes: Sequence[Shape], options: Options) -> dict[str, Shape]:
    features = int(options["features"])  # type: ignore[arg-type]
    return {"weight": (features, shapes[0][-1])} | ({"bias": (features,)} if options["use_bias"] else {})


def _bilinear_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    x1, x2 = shapes
    if len(x2) < 1 or x2[:-1] != x1[:-1]:
        raise ShapeError(f"its inputs must have the same leading axes, got shapes {list(x1)} and {list(x2)}")
    return _features_last(shapes, options)


def _bilinear_parameters(shapes: Sequence[Shape], options: Options) -> dict[str, Shape]:
    features = int(options["features"])  # type: ignore[arg-type]
    weight = (features, shapes[0][-1], shapes[1][-1])
    return {"weight": weight} | ({"bias": (features,)} if options["use_bias"] else {})


def _bilinear_partners(shape: Shape, options: Options) -> tuple[Shape, ...]:
    return tuple((*shape[:-1], size) for size in dict.fromkeys((2, shape[-1], 1)))


def _matmul_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    a, b = shapes
    if not b or a[-1] != b[-2:][0]:
        raise ShapeError(
            f"cannot multiply shapes {list(a)} and {list(b)}: the last axis of the first must be as long as "
            "the last but one of the second, or its only one"
        )
    try:
        leading = np.broadcast_shapes(a[:-2], b[:-2])
    except ValueError:
        raise ShapeError(
            f"cannot multiply shapes {list(a)} and {list(b)}: their leading axes do not broadcast"
        ) from None
    return (*leading, *a[-2:-1], *b[1:][-1:])


def _matmul_partners(shape: Shape, options: Options) -> tuple[Shape, ...]:
    """Matrices, vectors, and stacks of matrices whose leading axes are the same, broadcast, or stretch a's."""
    leading, inner = shape[:-2], shape[-1]
    stretched = tuple(2 if size == 1 else size for size in leading)
    stacks = [leading, stretched, *((1,) * count for count in range(1, len(leading) + 1))]
    stacks += [(2, *stretched)] if len(leading) < 2 else []
    partners = [(inner, 3), (inner,), *((*stack, inner, 2) for stack in stacks), (inner, inner)]
    return tuple(dict.fromkeys(partners))


def _einsum_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    indices = parse_equation(str(options["equation"]))
    lengths: dict[str, int] = {}
    for name, letters, shape in zip("ab", (indices.a, indices.b), shapes, strict=True):
        if len(letters) != len(shape):
            raise ShapeError(
                f"equation {options['equation']!r}: {name} has {len(letters)} indices, its shape {list(shape)} has "
                f"{len(shape)} axes"
            )
        for letter, size in zip(letters, shape, strict=True):
            known = lengths.setdefault(letter, size)
            if known != size:
                raise ShapeError(
                    f"equation {options['equation']!r}: the index {letter!r} has length {known} in a, {size} in b"
                )
    return tuple(lengths[letter] for letter in indices.out)


def _einsum_partners(shape: Shape, options: Options) -> tuple[Shape, ...]:
    indices = parse_equation(str(options["equation"]))
    lengths = dict(zip(indices.a, shape, strict=False))
    return tuple(dict.fromkeys(tuple(lengths.get(each, size) for each in indices.b) for size in (2, 1, 3)))


FEATURES = (
    Option("features", Size(), structural=True),
    Option("use_bias", Choice((True, False)), True, structural=True),
)

LAYERS = (
    Layer(
        "linear",
        "layer",
        "linear",
        linear_forward,
        linear_backward,
        FEATURES,
        ranks=(1, MAX_RANK),
        output_shape=_features_last,
        parameters=_linear_parameters,
    ),
    Layer(
        "bilinear",
        "layer",
        "linear",
        bilinear_forward,
        bilinear_backward,
        FEATURES,
        (Argument("x1"), Argument("x2", shapes=_bilinear_partners)),
        ranks=(1, MAX_RANK),
        output_shape=_bilinear_shape,
        parameters=_bilinear_parameters,
    ),
    Layer(
        "matmul",
        "layer",
        "linear",
        matmul_forward,
        matmul_backward,
        arguments=(Argument("a"), Argument("b", shapes=_matmul_partners)),
        ranks=(1, MAX_RANK),
        output_shape=_matmul_shape,
    ),
    Layer(
        "einsum",
        "layer",
        "linear",
        einsum_forward,
        einsum_backward,
        (Option("equation", Equation()),),
        (Argument("a"), Argument("b", shapes=_einsum_partners)),
        output_shape=_einsum_shape,
    ),
)
