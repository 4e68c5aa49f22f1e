"""Factors that only many networks show: found where they are, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradproof.model.case import Case, redrawn
from gradproof.model.dtypes import HALF, limits
from gradproof.model.spec import load_case
from gradproof.model.tensors import gradient_of, value_of
from gradproof.reference import LAYERS, PRECISE, NumpyReference
from gradproof.run.check import check
from gradproof.run.results import Report
from gradproof.show.report import biases
from gradproof.trust.rounded import RoundedOnce
from gradproof.verdict.bias import FEWEST, OFTEN, Evidence, Scale
from gradproof.verdict.equations import Equations
from gradproof.verdict.judging import Subject
from gradproof.verdict.kinks import one_node
from gradproof.verdict.running import run

Array = np.ndarray[Any, Any]
ROUNDING = 2.0**-9
"""Of bfloat16: the largest relative error of a rounded number."""


def made(layer: str, place: str, change: Callable[[Array], Array]) -> RoundedOnce:
    """An adapter with one layer whose value, or gradient of one argument, is changed before it is rounded."""
    forward, backward = LAYERS[layer].forward, LAYERS[layer].backward

    def changed_forward(*arrays: Array, **options: Any) -> tuple[Array, Any]:
        out, cache = forward(*arrays, **options)
        return (change(out) if place == "value" else out), cache

    def changed_backward(dout: Array, cache: Any) -> dict[str, Array]:
        return {name: change(each) if name == place else each for name, each in backward(dout, cache).items()}

    return RoundedOnce(rows={layer: (changed_forward, changed_backward)})


def checked(adapter: NumpyReference, layer: str, dtype: str, networks: int = 40, **more: Any) -> Report:
    return check([adapter], networks=networks, seed=11, dtypes=[dtype], layers=[layer], max_nodes=3, **more)


@pytest.mark.parametrize(
    ("layer", "place"),
    [("gelu", "x"), ("silu", "value"), ("linear", "weight"), ("layer_norm", "x"), ("reduce_mean", "x")],
)
def test_a_tenth_of_a_per_cent_is_found_in_bfloat16(layer: str, place: str) -> None:
    report = checked(made(layer, place, lambda each: 1.001 * each), layer, "bfloat16", failures=None)
    assert not report.agrees
    assert {(each.layer, each.kind) for each in report.disagreements} == {(layer, "bias")}
    (found,) = report.biased
    assert (found.bias.layer, found.bias.place) == (layer, place)
    assert abs(found.bias.factor - 1.001) < 5.0 * found.bias.standard_error


def test_the_case_that_shows_it_best_is_written_and_told(tmp_path: Path) -> None:
    report = checked(made("gelu", "x", lambda each: 1.001 * each), "gelu", "bfloat16", failures=tmp_path)
    (found,) = report.biased
    assert found.spec is not None
    assert "gelu" in {node.layer.name for node in load_case(Path(found.spec), LAYERS).network.nodes}
    (line,) = biases(report)
    assert line.startswith("bias: rounded bfloat16 gelu: the gradient of x is 1.00")
    assert line.endswith(f"; shown best by {found.spec}")
    (told,) = report.to_json()["bias"]
    assert (told["layer"], told["of"]) == ("gelu", "x")
    assert (told["factor"], told["spec"]) == (found.bias.factor, found.spec)
    (disagreement,) = report.to_json()["disagreements"]
    assert (disagreement["kind"], disagreement["layer"], disagreement["got"]) == ("bias", "gelu", found.bias.factor)


@pytest.mark.parametrize("dtype", HALF)
def test_honest_rounding_has_no_factor(dtype: str) -> None:
    report = check([RoundedOnce()], networks=60, seed=12, dtypes=[dtype], failures=None)
    assert report.biased == []


def test_errors_to_both_sides_are_no_factor() -> None:
    generator = np.random.default_rng(1)

    def shaken(each: Array) -> Array:
        return each * (1.0 + 0.2 * ROUNDING * generator.choice([-1.0, 1.0], np.shape(each)))

    assert checked(made("gelu", "x", shaken), "gelu", "bfloat16", failures=None).biased == []


def test_truncation_in_place_of_rounding_is_a_factor() -> None:
    """It is too small by up to a unit in the last place, two roundings, and never too large."""

    def truncated(each: Array) -> Array:
        bits = np.asarray(each, "float32").view("uint32") & np.uint32(0xFFFF0000)
        return np.asarray(bits.view("float32"), float)

    (found,) = checked(made("gelu", "x", truncated), "gelu", "bfloat16", failures=None).biased
    assert -2.0 * ROUNDING < found.bias.factor - 1.0 < -0.5 * ROUNDING


# The sums.


def of_tensors(excess: float, tensors: int, together: float = 0.0) -> Scale:
    """The errors of so many tensors of 20 elements, which have a share in common."""
    generator, scale = np.random.default_rng(2), Scale()
    for _ in range(tensors):
        own, common = generator.uniform(-ROUNDING, ROUNDING, 20), generator.uniform(-ROUNDING, ROUNDING)
        errors = excess + (1.0 - together) * own + together * common
        scale.add(errors, np.full(20, ROUNDING))
    return scale


def test_the_standard_error_is_that_of_the_mean() -> None:
    scale = of_tensors(0.0, 400)
    assert scale.standard_error == pytest.approx(ROUNDING / np.sqrt(3.0 * 8000.0), rel=0.1)


def test_what_the_elements_of_a_tensor_have_in_common_counts_once() -> None:
    scale = of_tensors(0.0, 400, together=1.0)
    assert scale.standard_error == pytest.approx(ROUNDING / np.sqrt(3.0 * 400.0), rel=0.1)


def test_few_tensors_tell_nothing() -> None:
    few, enough = (of_tensors(0.5 * ROUNDING, count) for count in (FEWEST - 1, 4 * FEWEST))
    assert (few.standard_error, few.shows_a_factor("bfloat16")) == (np.inf, False)
    assert enough.shows_a_factor("bfloat16")


def test_what_honest_arithmetic_makes_is_no_factor() -> None:
    """However surely it is known."""
    scale = of_tensors(0.1 * ROUNDING, 4000)
    assert scale.excess > 10.0 * scale.standard_error
    assert not scale.shows_a_factor("bfloat16")


def test_errors_beyond_the_rounding_of_the_results_to_both_sides_are_coarse_arithmetic() -> None:
    coarse = of_tensors(0.5 * ROUNDING, 100)
    assert coarse.is_all("bfloat16")
    coarse.add(np.array([-1.2 * ROUNDING]), np.array([ROUNDING]))
    assert not coarse.is_all("bfloat16")


def test_a_rounded_constant_is_no_factor_that_holds_everywhere() -> None:
    """1 / n in bfloat16 is off by as much as n makes it."""

    def by_count(x: Array, *, axes: tuple[int, ...], keepdims: bool) -> tuple[Array, Any]:
        count = np.prod([x.shape[axis] for axis in axes])
        share = float(np.asarray(1.0 / count).astype("bfloat16"))
        _, cache = LAYERS["reduce_mean"].forward(x, axes=axes, keepdims=keepdims)
        return x.sum(axis=axes, keepdims=keepdims) * share, cache

    adapter = RoundedOnce(rows={"reduce_mean": (by_count, LAYERS["reduce_mean"].backward)})
    assert checked(adapter, "reduce_mean", "bfloat16", networks=80, failures=None).biased == []


def test_only_ordinary_numbers_of_about_the_right_size_are_taken() -> None:
    case = one_node(LAYERS["identity"], {}, {"x": [1.0, 0.0, 2e-38, 3.0]}, "bfloat16")
    got = {
        value_of("identity"): np.array([1.0, 0.0, 2e-38, 4.0]).astype("bfloat16"),
        gradient_of("identity"): case.cotangent,
    }
    evidence = Evidence("bfloat16")
    equations = Equations(case, got, NumpyReference({}, PRECISE), NumpyReference())
    evidence.add(equations, got, [value_of("identity")])
    assert evidence.scales["identity", "value"].elements == 1.0
    assert float(limits("bfloat16").smallest_normal) < 2e-38


def test_what_is_looked_at_again_is_told() -> None:
    told: list[str] = []
    assert checked(RoundedOnce(), "gelu", "bfloat16", failures=None, looking=told.append).agrees
    assert "rounded bfloat16 gelu" in told


@pytest.mark.parametrize(("often", "again"), [(OFTEN - 1, False), (OFTEN, True)])
def test_a_layer_that_hardly_occurs_is_not_run_again(often: int, again: bool) -> None:
    evidence, probed, subject = Evidence("bfloat16"), [], Subject(RoundedOnce(), {})
    for seed in range(often):
        case = redrawn(one_node(LAYERS["gelu"], {}, 0.5, "bfloat16"), seed)
        got = run(subject.adapter, case, 60.0).got
        evidence.add(subject.equations(case, got), got, got.keys())
    evidence.look_closer(probed.append)
    assert bool(probed) is again


def test_settings_are_run_one_after_another() -> None:
    """A framework that compiles does so for each."""
    evidence, subject, shapes = Evidence("bfloat16"), Subject(RoundedOnce(), {}), []

    def probe(case: Case) -> tuple[Equations, Mapping[str, Any]]:
        shapes.append(case.cotangent.shape)
        got = run(subject.adapter, case, 60.0).got
        return subject.equations(case, got), got

    for size in range(2, 2 + OFTEN):
        equations, got = probe(one_node(LAYERS["gelu"], {}, 0.5, "bfloat16", (size,)))
        evidence.add(equations, got, got.keys())
    shapes.clear()
    evidence.look_closer(probe)
    assert len(shapes) > 3
    assert set(shapes[:3]) == {(2,)}


def test_settings_in_which_a_factor_cannot_show_do_not_dilute_it() -> None:
    factor, silent = of_tensors(0.5 * ROUNDING, 100), Scale()
    for _ in range(400):
        silent.add(np.zeros(20), np.full(20, ROUNDING))
    both = replace(
        factor,
        tensors=factor.tensors + silent.tensors,
        elements=factor.elements + silent.elements,
        squares=factor.squares + silent.squares,
    )
    assert both.excess == pytest.approx(0.2 * factor.excess)
    assert both.less(silent).excess == factor.excess
    assert both.less(silent).standard_error == pytest.approx(factor.standard_error)
