"""No layer escapes the noise: every result of every layer is perturbed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from gradproof.draw.drawing import draw_each
from gradproof.model.case import Case
from gradproof.model.tensors import Tensor, gradient_of, value_of
from gradproof.reference import LAYERS, NumpyReference
from gradproof.verdict.noise import Noisy, observe
from helpers.examining import results
from helpers.noise import in_float64, rounding

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]


CASES_PER_LAYER = 8


@cache
def cases_of(layer: str) -> tuple[Case, ...]:
    """The layer alone in float32, with drawn options and shapes, and generic numbers."""
    found: list[Case] = []
    draw_each(
        lambda drawn: found.append(replace(drawn, edge_share=0.0, scale=1.0).case("float32")),
        CASES_PER_LAYER,
        seed=3,
        layers=[layer],
        max_nodes=1,
    )
    return tuple(found)


def perturbed(reference: NumpyReference, of: Case, seed: int) -> Arrays:
    error = rounding("float32", seed=seed)
    values = {name: observe(v, error) if v.dtype == np.float64 else v for name, v in of.exact_values.items()}
    return results(reference, Case(of.network, "float64", values, observe(of.cotangent, error)))


def dropped(reference: NumpyReference, of: Case) -> set[str]:
    """The tensors that are not noisy, or do not move where float32 arithmetic rounds."""
    exact = results(reference, in_float64(of))
    coarse = results(reference, of)
    runs = [perturbed(reference, of, seed) for seed in range(3)]

    def moves(key: Tensor) -> bool:
        moved = np.any([np.asarray(run[key]) != exact[key] for run in runs], axis=0)
        return bool((moved | (coarse[key] == exact[key])).all())

    return {key for key in exact if not (all(isinstance(run[key], Noisy) for run in runs) and moves(key))}


@pytest.mark.parametrize("layer", LAYERS)
def test_noise_reaches_every_result_of_every_layer(layer: str) -> None:
    for of in cases_of(layer):
        assert dropped(NumpyReference(), of) == set(), of.network


def test_float32_arithmetic_rounds_in_most_layers() -> None:
    """So that the test above has something to ask for."""
    moving = set()
    for layer in LAYERS:
        for of in cases_of(layer):
            exact = results(NumpyReference(), in_float64(of))
            coarse = results(NumpyReference(), of)
            moving |= {layer for key in exact if not np.array_equal(exact[key], coarse[key])}
    assert len(moving) > 0.7 * len(LAYERS)


def _tanh_of_plain_arrays(x: Array) -> tuple[Array, Array]:
    out = np.tanh(np.asarray(x))
    return out, out


def _tanh_of_python_numbers(x: Array) -> tuple[Array, Array]:
    out = np.array([math.tanh(each) for each in x.ravel()]).reshape(x.shape)
    return out, out


def _tanh_observed_again(x: Array) -> tuple[Array, Array]:
    """Noisy, but the rounding of tanh itself is lost."""
    out = np.tanh(np.asarray(x))
    return (observe(out, x.rounding) if isinstance(x, Noisy) else out), out


def _plain_gradient(dout: Array, out: Array) -> dict[str, Array]:
    return {"x": np.asarray(dout * (1.0 - out * out))}


TANH = LAYERS["tanh"]
DROPPING = {
    "a plain array": ((_tanh_of_plain_arrays, TANH.backward), {value_of("h1")}),
    "Python's numbers": ((_tanh_of_python_numbers, TANH.backward), {value_of("h1")}),
    "the noise of one operation": ((_tanh_observed_again, TANH.backward), {value_of("h1")}),
    "a plain gradient": ((TANH.forward, _plain_gradient), {gradient_of("x0")}),
}


@pytest.mark.parametrize(("row", "lost"), DROPPING.values(), ids=DROPPING)
def test_a_layer_that_drops_the_noise_is_caught(row: Any, lost: set[str]) -> None:
    assert dropped(NumpyReference(rows={"tanh": row}), cases_of("tanh")[0]) == lost
