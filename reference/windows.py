"""Sliding windows over the last axes of an array: what convolution and pooling share.

Legend: S the spatial axes (the last ones), k a kernel's extent along one of them, tap: one position in the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from gradproof.layer import ShapeError


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
