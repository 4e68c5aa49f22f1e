"""Sliding windows over the last axes of an array: what convolution and pooling share.

Legend: S the spatial axes (the last ones), k a kernel's extent along one of them, tap: one position in the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from gradproof.model.layer import ShapeError
from gradproof.reference.common import Array


def window_count(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """How many windows fit along an axis: floor((size + 2 padding - dilation (kernel - 1) - 1) / stride) + 1.

    Raises ShapeError where not even one fits.
    """
    reach = dilation * (kernel - 1) + 1
    if size + 2 * padding < reach:
        raise ShapeError(
            f"a kernel of {kernel} with dilation {dilation} reaches over {reach} elements, "
            f"and the padded axis has {size + 2 * padding}"
        )
    return (size + 2 * padding - reach) // stride + 1


Tap = tuple[int, ...]


def taps(
    kernel: Sequence[int], counts: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Iterator[tuple[Tap, tuple[slice, ...]]]:
    """Each tap of the kernel, with the slices of the padded spatial axes that it meets in all windows."""
    for tap in np.ndindex(*kernel):
        steps = zip(tap, dilation, stride, counts, strict=True)
        yield tap, tuple(slice(t * d, t * d + s * (n - 1) + 1, s) for t, d, s, n in steps)


Amounts = Sequence[tuple[int, int]]
"""How many elements before and after, for each of an array's last axes."""


def widened(x: Array, amounts: Amounts, value: float = 0.0) -> Array:
    """x with `value` before and after its elements, along as many of its last axes as there are amounts."""
    first = x.ndim - len(amounts)
    sizes = [before + size + after for size, (before, after) in zip(x.shape[first:], amounts, strict=True)]
    out = np.full_like(x, value, shape=(*x.shape[:first], *sizes))
    out[_inside(out, amounts)] = x
    return out


def narrowed(x: Array, amounts: Amounts) -> Array:
    """x without its elements before and after: the adjoint of `widened`."""
    return x[_inside(x, amounts)]


def _inside(x: Array, amounts: Amounts) -> tuple[slice, ...]:
    """What is between the elements before and after."""
    first = x.ndim - len(amounts)
    sizes = zip(x.shape[first:], amounts, strict=True)
    return (*[slice(None)] * first, *(slice(before, size - after) for size, (before, after) in sizes))
