"""Numbers that are rounded where they should not be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gradproof.model.dtypes import limits
from gradproof.verdict.hypotheses.suspect import Array, Gradients, Guess, LowerPrecision, Suspect

# Precision.

PRECISIONS = ((8, "bfloat16"), (11, "float16"), (24, "float32"))
"""Significant bits -> the dtype that has them; what is in the numbers of a coarser one is in those of a finer one."""


def rounded_to(array: Array, bits: int) -> Array:
    """The nearest numbers with so many significant bits."""
    mantissa, exponent = np.frexp(array)
    scale = 2.0**bits
    return np.ldexp(np.rint(mantissa * scale) / scale, exponent)


def lower_precision(suspect: Suspect) -> Iterator[LowerPrecision]:
    return (LowerPrecision(bits, dtype) for bits, dtype in PRECISIONS)


def operands_rounded(suspect: Suspect) -> Iterator[Guess]:
    """Every array that is multiplied; a bias is only added."""
    for bits, dtype in ((11, "TF32 or float16"), (8, "bfloat16")):
        arrays = {
            name: each if "bias" in name or each.dtype.kind != "f" else rounded_to(each, bits)
            for name, each in suspect.arrays.items()
        }
        yield Guess(arrays=arrays, dout=rounded_to(suspect.dout, bits), detail=dtype)
        yield Guess(arrays=arrays, detail=dtype)
        yield Guess(dout=rounded_to(suspect.dout, bits), detail=dtype)


MOST_TERMS = 1024
"""Terms of a sum up to which it is taken again, one by one."""


def running_sum(suspect: Suspect) -> Iterator[Guess]:
    """The parameters' sums over rows, taken row by row, each time rounded; the terms are rounded too, or are not."""
    dout, bits_asked = suspect.dout, int(limits(suspect.case.dtype).nmant) + 1
    if not suspect.node.parameters or suspect.node.layer.family == "recurrent" or dout.ndim < 2:
        return
    for channels in dict.fromkeys((dout.ndim - 1, 1)):
        if 1 < dout.size // max(dout.shape[channels], 1) <= MOST_TERMS:
            for bits, dtype in PRECISIONS:
                if bits < bits_asked or bits == bits_asked < 24:
                    for terms in (bits, bits_asked):
                        yield _added_up(suspect, channels, bits, terms, dtype)


def _added_up(suspect: Suspect, channels: int, bits: int, terms: int, dtype: str) -> Guess:
    """The sum over all axes but the channels'; bits: of the sum, terms: of each term."""
    backward, slots = suspect.node.layer.backward, [slot for slot, _ in suspect.node.parameters]

    def added_up(dout: Array, cache: Any) -> Gradients:
        sums: Gradients = {}
        for place in np.ndindex(*(1 if axis == channels else size for axis, size in enumerate(dout.shape))):
            at = tuple(slice(None) if axis == channels else i for axis, i in enumerate(place))
            row = np.zeros_like(dout)
            row[at] = dout[at]
            found = backward(row, cache)
            for slot in slots:
                if slot in found:
                    sums[slot] = rounded_to(sums.get(slot, 0.0) + rounded_to(found[slot], terms), bits)
        return sums

    return Guess(added_up, detail=dtype)
