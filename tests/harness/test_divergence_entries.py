"""The known divergences of the built-in adapters, in the installed versions: they show, and excuse no wrong factor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pytest

from gradproof.model.dtypes import VALID_DTYPES
from gradproof.model.tensors import gradient_of, tensors, value_of
from gradproof.reference import NumpyReference
from gradproof.verdict.agreement import Evidence, TensorCheck
from gradproof.verdict.divergence import COTANGENT, OUTPUT, Divergence, divergences_of
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject
from gradproof.verdict.kinks import stale_divergences, witness_case
from helpers.divergences import built_in
from helpers.frameworks import load

NAMES = ("torch", "jax")


def entries() -> Iterator[tuple[str, int, str]]:
    for name in NAMES:
        for i, entry in enumerate(built_in(name)):
            yield from ((name, i, dtype) for dtype in entry.dtypes)


EACH_ENTRY = pytest.mark.parametrize(("name", "index", "dtype"), list(entries()))


@EACH_ENTRY
def test_every_entry_shows_at_its_witness(name: str, index: int, dtype: str) -> None:
    adapter, entry = load(name), built_in(name)[index]
    assert entry.applies(adapter.version(), dtype)
    assert stale_divergences(Subject(adapter, {}, (entry,)), dtype) == []


@EACH_ENTRY
def test_without_its_entry_the_witness_disagrees(name: str, index: int, dtype: str) -> None:
    adapter, entry = load(name), built_in(name)[index]
    case = witness_case(entry, dtype)
    entries = tuple(each for each in built_in(name) if each.applies(adapter.version(), dtype))
    assert examine(Subject(adapter, {}, entries), case).known
    removed = tuple(each for each in entries if each != entry)
    examination = examine(Subject(adapter, {}, removed), case)
    assert not examination.agrees
    assert not examination.known
    assert [culprit.node.layer.name for culprit in examination.culprits] == [entry.layer]


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_names_what_exists(name: str) -> None:
    for entry in built_in(name):
        assert set(entry.dtypes) <= set(VALID_DTYPES)
        assert set(entry.kinds) <= {"value", "gradient", "nonfinite"}
        case = witness_case(entry, entry.dtypes[0])
        output = NumpyReference().forward(case.network, case.exact_values, "float64").outputs[case.network.output]
        located_by = case.values | {COTANGENT: case.cotangent, OUTPUT: output}
        assert {entry.argument, *entry.witness} <= located_by.keys()
        assert entry.located(case, located_by[entry.argument].shape).any()
        assert entry.link.startswith("https://")
        assert entry.reason


@pytest.mark.parametrize("name", NAMES)
def test_the_adapter_finds_its_file(name: str) -> None:
    read: Mapping[str, tuple[Divergence, ...]] = {name: divergences_of(load(name))}
    assert read == {name: built_in(name)}
    assert built_in(name)


BY_SHARE = [
    (name, index, dtype)
    for name, index, dtype in entries()
    for entry in [built_in(name)[index]]
    if entry.max_absolute_error == 0.0 and entry.max_relative_error <= 1.01
]


def explained_where_off_by(times: float, entry: Divergence, dtype: str) -> list[str]:
    """The tensors in which the entry explains, at its witness, finite errors of so many times the numbers."""
    case = witness_case(entry, dtype)
    reference = NumpyReference()
    with np.errstate(all="ignore"):
        forward = reference.forward(case.network, case.exact_values, "float64")
        gradients = reference.backward(forward, case.cotangent.astype(float))
    found = []
    for key, expected in tensors(forward.outputs, gradients).items():
        with np.errstate(all="ignore"):
            error = times * np.abs(expected)
        wrong = np.isfinite(error) & (error > 0.0)
        evidence = Evidence(wrong, np.where(wrong, error, 0.0), expected)
        check = TensorCheck(key, expected.shape, key.role, evidence=evidence)
        found += [key] if entry.explained(case, check, evidence).any() else []
    return found


@pytest.mark.parametrize(("name", "index", "dtype"), BY_SHARE)
def test_no_factor_is_excused_that_is_more_than_the_number_itself(name: str, index: int, dtype: str) -> None:
    """A gradient with the wrong sign is off by twice itself, one that is 3.5 times too large by 2.5."""
    entry = built_in(name)[index]
    for times in (1.01, 2.0, 2.5):
        assert explained_where_off_by(times, entry, dtype) == []


def test_a_number_that_vanished_is_excused_where_the_entry_says_so() -> None:
    entry = next(e for e in built_in("torch") if e.layer == "reduce_norm" and e.between == (5e-324, 1.5e-154))
    assert explained_where_off_by(1.0, entry, "float64") == [
        value_of("reduce_norm"),
        gradient_of("reduce_norm"),
        gradient_of("x"),
    ]
