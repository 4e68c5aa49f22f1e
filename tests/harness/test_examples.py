"""The worked examples: every stated number is met, and each is found by its name."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from gradproof.draw.examples import EXAMPLES, UnknownExampleError, descend, example
from gradproof.model.adapter import Adapter
from gradproof.reference import NumpyReference
from helpers.examples import missed, run


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_stated_number_is_met(adapter: Adapter, name: str) -> None:
    example = EXAMPLES[name]
    outputs, gradients = run(adapter, example.network, example.values)
    expected = example.expected
    assert missed(expected.forward, outputs, expected.tolerance) == set()
    assert missed(expected.gradients, gradients, expected.tolerance) == set()


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_number_that_is_off_in_the_last_digits_is_missed(name: str) -> None:
    example = EXAMPLES[name]
    _, gradients = run(NumpyReference(), example.network, example.values)
    off = {name: gradient + 3 * example.expected.tolerance for name, gradient in gradients.items()}
    assert missed(example.expected.gradients, off, example.expected.tolerance) == set(example.expected.gradients)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_record_is_complete(name: str) -> None:
    example = EXAMPLES[name]
    network = example.network
    assert example.name == name
    assert set(example.values) == {each.name for each in network.inputs} | set(network.parameters)
    for source, value in example.values.items():
        assert (value.shape, value.dtype) == (network.shapes[source], np.float64)
        assert not value.flags.writeable
    assert set(network.parameters) <= set(example.expected.gradients)
    assert {"prediction", "loss"} <= set(example.expected.forward)
    assert example.cotangent.shape == ()


def test_descent_moves_all_parameters_but_those_held() -> None:
    example = EXAMPLES["tanh_2_3_1"]
    _, gradients = run(NumpyReference(), example.network, example.values)
    after = descend(NumpyReference(), example.network, example.values, learning_rate=0.1, held=("b1", "b2"))
    for name, value in example.values.items():
        step = 0.1 * gradients[name] if name in ("W1", "W2") else 0.0
        np.testing.assert_array_equal(after[name], value - step)


# by name


def test_an_unknown_example_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UnknownExampleError) as raised:
        example("tanh")
    assert str(raised.value) == (
        "unknown example 'tanh'; valid examples: "
        "tanh_2_3_1, sigmoid_2_2_1, relu_2_3_1, squared_error_2_2_1, decision_boundary_2d"
    )
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_found_by_name(name: str) -> None:
    assert example(name) is EXAMPLES[name]


def test_importing_the_examples_imports_no_framework() -> None:
    code = (
        "import sys, gradproof.draw.examples, gradproof.show.walk; print(sorted({'torch', 'jax'} & set(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout == "[]\n"
