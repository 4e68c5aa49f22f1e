"""Known divergences: how they are read, what they excuse and what they do not, and that they still show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradproof.adapters
from gradproof.model.adapter import Adapter, Forward
from gradproof.model.case import Case
from gradproof.model.dtypes import VALID_DTYPES
from gradproof.model.layer import Layer
from gradproof.model.network import Input, Network, Node
from gradproof.model.options import Options
from gradproof.reference import LAYERS, NumpyReference
from gradproof.reference.walk import Row
from gradproof.run.check import check
from gradproof.run.results import Report
from gradproof.subject.registry import load_adapter
from gradproof.verdict.agreement import Evidence, TensorCheck
from gradproof.verdict.divergence import (
    COTANGENT,
    OUTPUT,
    Divergence,
    DivergenceError,
    divergences_of,
    explanation,
    read_divergences,
)
from gradproof.verdict.examination import Examination
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject
from gradproof.verdict.kinks import one_node, stale_divergences, witness_case
from gradproof.verdict.noise import tensors

Array = np.ndarray[Any, Any]

# Reading.

ENTRY = """
[[divergence]]
layer = "softplus"
dtypes = ["float64"]
argument = "x"
between = [20.0, inf]
kinds = ["value", "gradient"]
versions = ["1.2", "2"]
max_relative_error = 1e-6
witness = { x = 21.0 }
reason = "linear above 20"
link = "https://example.org"
"""

READ = Divergence(
    layer="softplus",
    dtypes=("float64",),
    argument="x",
    between=(20.0, float("inf")),
    kinds=("value", "gradient"),
    versions=("1.2", "2"),
    witness={"x": 21.0},
    reason="linear above 20",
    link="https://example.org",
    max_relative_error=1e-6,
)


def written(directory: Path, text: str) -> Path:
    path = directory / "framework.toml"
    path.write_text(text)
    return path


def test_an_entry_is_read(tmp_path: Path) -> None:
    assert read_divergences(written(tmp_path, ENTRY)) == (READ,)


def test_entries_are_read_in_order(tmp_path: Path) -> None:
    read = read_divergences(written(tmp_path, ENTRY + ENTRY.replace("softplus", "bce")))
    assert [entry.layer for entry in read] == ["softplus", "bce"]


def test_an_empty_file_has_no_entries(tmp_path: Path) -> None:
    assert read_divergences(written(tmp_path, "# none\n")) == ()


def changed(old: str, new: str) -> str:
    assert ENTRY.count(old) == 1
    return ENTRY.replace(old, new)


def test_an_entry_tells_what_differs_in_other_dtypes(tmp_path: Path) -> None:
    also = """
[divergence.also.float16]
between = [11.0, inf]
witness = { x = 12.0 }
cotangent = 1000.0

[divergence.also.bfloat16]
max_relative_error = 0.5
"""
    half = replace(READ, dtypes=("float16",), between=(11.0, float("inf")), witness={"x": 12.0}, cotangent=1000.0)
    coarse = replace(READ, dtypes=("bfloat16",), max_relative_error=0.5)
    assert read_divergences(written(tmp_path, ENTRY + also)) == (READ, half, coarse)


def test_an_entry_may_name_a_parameter(tmp_path: Path) -> None:
    text = changed('"softplus"', '"weight_norm"').replace('argument = "x"', 'argument = "direction"')
    assert read_divergences(written(tmp_path, text))[0].argument == "direction"


REFUSED = {
    "no toml": ("[[divergence", "framework.toml: not TOML: "),
    "an unknown field": (
        changed("max_relative_error", "max_error"),
        "framework.toml: entry 1: unknown fields: ['max_error'], missing fields: none",
    ),
    "missing fields": (
        changed('link = "https://example.org"', "").replace('reason = "linear above 20"', ""),
        "framework.toml: entry 1: unknown fields: none, missing fields: ['link', 'reason']",
    ),
    "both": (
        changed("witness =", "witnes ="),
        "framework.toml: entry 1: unknown fields: ['witnes'], missing fields: ['witness']",
    ),
    "one bound": (
        changed("[20.0, inf]", "[20.0]"),
        "framework.toml: entry 1: between must be [low, high], got [20.0]",
    ),
    "a bound alone": (
        changed("[20.0, inf]", "20.0"),
        "framework.toml: entry 1: between must be [low, high], got 20.0",
    ),
    "in another dtype": (
        ENTRY + "[divergence.also.float16]\nbetween = [1.0]",
        "framework.toml: entry 1: also float16: between must be [low, high], got [1.0]",
    ),
    "a kind alone": (
        changed('["value", "gradient"]', '"gradient"'),
        "framework.toml: entry 1: kinds must be a list of strings, got 'gradient'",
    ),
    "versions of numbers": (
        changed('["1.2", "2"]', "[1.2, 2]"),
        "framework.toml: entry 1: versions must be a list of strings, got [1.2, 2]",
    ),
    "other dtypes that are no tables": (
        ENTRY + 'also = ["float16"]',
        "framework.toml: entry 1: also must be a table of tables, one per dtype, got ['float16']",
    ),
    "a witness that is no table": (
        changed("{ x = 21.0 }", "21.0"),
        "framework.toml: entry 1: witness must be a table, got 21.0",
    ),
    "an error of any size": (
        changed("max_relative_error = 1e-6", "max_relative_error = 1e-6\nmax_absolute_error = inf"),
        "framework.toml: entry 1: max_absolute_error must be a finite number of at least 0, got inf",
    ),
    "an error below nothing": (
        changed("max_relative_error = 1e-6", "max_relative_error = -1e-6"),
        "framework.toml: entry 1: max_relative_error must be a finite number of at least 0, got -1e-06",
    ),
    "in a later entry": (
        ENTRY + changed("[20.0, inf]", "[]"),
        "framework.toml: entry 2: between must be [low, high], got []",
    ),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DivergenceError) as refusal:
        read_divergences(written(tmp_path, text))
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


MEANINGLESS = {
    "a misspelt table": changed("[[divergence]]", "[[divergences]]"),
    "a table that is no list": changed("[[divergence]]", "[divergence]"),
    "an unknown layer": changed('"softplus"', '"softplusplus"'),
    "an unknown argument": changed('argument = "x"', 'argument = "y"'),
    "an unknown statistic": changed("between =", 'statistic = "median"\nbetween ='),
    "axes of an unknown option": changed("between =", 'along = "axes"\nbetween ='),
    "an unknown factor": changed("between =", 'times = "alpha"\nbetween ='),
    "an unknown kind": changed('["value", "gradient"]', '["gradients"]'),
    "an unknown dtype": changed('["float64"]', '["float63"]'),
    "an unknown role": ENTRY.replace("[[divergence]]", '[[divergence]]\nrole = "loss"'),
    "an unknown other dtype": ENTRY + "[divergence.also.float8]\nbetween = [1.0, inf]",
    "a witness of another argument": changed("{ x = 21.0 }", "{ y = 21.0 }"),
}


@pytest.mark.parametrize("text", MEANINGLESS.values(), ids=MEANINGLESS)
def test_a_file_that_means_nothing_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DivergenceError):
        read_divergences(written(tmp_path, text))


@pytest.mark.parametrize(
    ("version", "dtype", "applies"),
    [
        ("1.2.3", "float64", True),
        ("1.2", "float64", True),
        ("2.0+cpu", "float64", True),
        ("1.3.0", "float64", False),
        ("1.1.2", "float64", False),
        ("1.2.3", "float32", False),
    ],
)
def test_an_entry_is_for_some_versions_and_dtypes(version: str, dtype: str, applies: bool) -> None:
    assert READ.applies(version, dtype) is applies


def test_an_adapter_without_a_file_has_no_divergences() -> None:
    assert divergences_of(NumpyReference()) == ()


# What an entry excuses. The adapter below replaces softplus by the identity above 20, as torch does.


def softplus_row(
    value: Callable[[Array, Array], Array] = lambda out, x: out,
    slope: Callable[[Array, Array], Array] = lambda dx, x: dx,
) -> Row:
    """Softplus whose value and gradient are changed where they stand."""

    def forward(x: Array, beta: float) -> tuple[Array, Any]:
        out, cache = LAYERS["softplus"].forward(x, beta=beta)
        return value(out, x).astype(x.dtype), (x, cache)

    def backward(dout: Array, kept: Any) -> dict[str, Array]:
        x, cache = kept
        return {"x": slope(LAYERS["softplus"].backward(dout, cache)["x"], x).astype(x.dtype)}

    return forward, backward


class Diverging(NumpyReference):
    """The reference with another softplus; by default one that is the identity above 20."""

    def __init__(self, row: Row | None = None) -> None:
        super().__init__(rows={"softplus": row or softplus_row(value=lambda out, x: np.where(x > 20, x, out))})

    def version(self) -> str:
        return "1.2.3"


def softplus_case(x: Any, dtype: str = "float64") -> Case:
    network = Network((Input("x", np.shape(x)),), (Node.of("out", LAYERS["softplus"], "x"),))
    cotangent = np.linspace(0.5, 1.5, np.size(x)).reshape(np.shape(x))
    return Case(network, dtype, {"x": np.asarray(x, dtype)}, cotangent.astype(dtype))


def examined(case: Case, *entries: Divergence, row: Row | None = None) -> Examination:
    return examine(Subject(Diverging(row), {}, entries), case)


ABOVE = [[1.0, 21.0], [-3.0, 22.0]]


def test_an_entry_explains_what_it_describes() -> None:
    examination = examined(softplus_case(ABOVE), READ)
    assert not examination.agrees
    assert examination.known
    assert [culprit.divergence for culprit in examination.culprits] == [READ]
    assert not examined(softplus_case(ABOVE)).known


def spoilt(where: Callable[[Array], Array], factor: float) -> Row:
    """The identity above 20, and a value that is wrong elsewhere too."""
    return softplus_row(value=lambda out, x: np.where(where(x), out * factor, np.where(x > 20, x, out)))


@pytest.mark.parametrize(
    ("entry", "row"),
    [
        (replace(READ, layer="silu"), None),
        (replace(READ, between=(21.5, 30.0)), None),
        (replace(READ, between=(20.0, 21.5)), None),
        (replace(READ, kinds=("gradient",)), None),
        (replace(READ, kinds=("nonfinite",)), None),
        (replace(READ, max_relative_error=1e-13), None),
        (READ, spoilt(lambda x: x == 1.0, 1.0 + 1e-9)),
        (READ, spoilt(lambda x: x == 21.0, 1.0 + 2e-6)),
        (READ, spoilt(lambda x: x == 22.0, np.nan)),
        (READ, softplus_row(slope=lambda dx, x: np.where(x < 0, 0.0, dx))),
    ],
    ids=[
        *("another layer", "below its location", "above its location", "another kind", "not finite alone"),
        *("a smaller error", "an error elsewhere", "a bigger error", "not finite", "a gradient elsewhere"),
    ],
)
def test_an_entry_explains_nothing_else(entry: Divergence, row: Row | None) -> None:
    examination = examined(softplus_case(ABOVE), entry, row=row)
    assert not examination.agrees
    assert not examination.known
    assert [culprit.divergence for culprit in examination.culprits] == [None]


def test_bounds_are_included() -> None:
    row = softplus_row(value=lambda out, x: out * (1.0 + 1e-8))
    case = softplus_case([20.0, 25.0])
    assert examined(case, replace(READ, between=(20.0, 25.0)), row=row).known
    assert not examined(case, replace(READ, between=(20.0, 24.9)), row=row).known
    assert not examined(case, replace(READ, between=(20.1, 25.0)), row=row).known


@pytest.mark.parametrize(("relative", "absolute", "known"), [(0.0, 2e-9, True), (0.0, 1e-9, False), (1e-10, 0, True)])
def test_an_error_is_bounded_by_a_share_and_a_number(relative: float, absolute: float, known: bool) -> None:
    entry = replace(READ, max_relative_error=relative, max_absolute_error=absolute)
    row = softplus_row(value=lambda out, x: out + 1.5e-9 * (x > 20))
    assert examined(softplus_case(ABOVE), entry, row=row).known is known


@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_a_cotangent_that_is_not_finite_does_not_count(lost: float) -> None:
    case = softplus_case([21.0, 1.0, 22.0])
    case = replace(case, cotangent=np.array([0.5, lost, 1.5]))
    row = softplus_row(slope=lambda dx, x: dx + 1e-9 * (x > 20))
    known = replace(READ, kinds=("gradient",), max_relative_error=0.0, max_absolute_error=1e-9)
    assert examined(case, known, row=row).known
    assert not examined(case, replace(known, max_absolute_error=5e-10), row=row).known


def test_both_kinds_of_tensor_are_explained_where_both_are_named() -> None:
    row = softplus_row(slope=lambda dx, x: np.where(x > 20, dx * (1 + 1e-8), dx))
    assert examined(softplus_case(ABOVE), READ, row=row).known
    assert not examined(softplus_case(ABOVE), replace(READ, kinds=("value",)), row=row).known


def test_what_is_not_finite_is_explained_where_that_is_named() -> None:
    row = softplus_row(slope=lambda dx, x: np.where(x > 20, np.nan, dx))
    assert examined(softplus_case(ABOVE), replace(READ, kinds=("nonfinite",)), row=row).known
    assert not examined(softplus_case(ABOVE), READ, row=row).known


def test_several_entries_explain_together() -> None:
    first, second = replace(READ, between=(20.5, 21.5)), replace(READ, between=(21.5, 23.0))
    assert not examined(softplus_case(ABOVE), first).known
    assert not examined(softplus_case(ABOVE), second).known
    both = examined(softplus_case(ABOVE), replace(READ, layer="silu"), first, second)
    assert both.known
    assert both.culprits[0].divergence == first


@pytest.mark.parametrize(
    "spoil", [lambda x: None, lambda x: x[None], lambda x: x.astype("float32")], ids=["missing", "shape", "dtype"]
)
def test_no_entry_explains_a_tensor_of_the_wrong_structure(spoil: Callable[[Array], Any]) -> None:
    class Misshapen(Diverging):
        def backward(self, forward: Any, cotangent: Array) -> dict[str, Any]:
            gradients = super().backward(forward, cotangent)
            return {**gradients, "x": spoil(gradients["x"])}

    everything = replace(READ, kinds=("value", "gradient", "nonfinite"), max_relative_error=1e300)
    assert not examine(Subject(Misshapen(), {}, (everything,)), softplus_case(ABOVE)).known


def test_nothing_wrong_needs_no_entry() -> None:
    assert examined(softplus_case([1.0, 2.0]), READ).culprits == ()
    assert explanation([READ], []) is None


def test_a_reduced_loss_is_located_by_any_of_its_elements() -> None:
    """Its one value has no place of its own."""
    layer = LAYERS["mse"]
    network = Network((Input("x", (3,)), Input("target", (3,))), (Node.of("out", layer, "x", "target"),))
    values = {"x": np.array([0.0, 1.0, 5.0]), "target": np.zeros(3)}
    case = Case(network, "float64", values, np.array(1.5))
    row = (lambda x, target, reduction: _off(layer.forward(x, target, reduction=reduction)), layer.backward)
    subject = Subject(NumpyReference(rows={"mse": row}), {})
    entry = replace(READ, layer="mse", between=(4.0, 6.0), kinds=("value",))
    assert examine(replace(subject, divergences=(entry,)), case).known
    assert not examine(replace(subject, divergences=(replace(entry, between=(6.0, 7.0)),)), case).known


def _off(result: tuple[Array, Any]) -> tuple[Array, Any]:
    return result[0] * (1.0 + 1e-9), result[1]


ROWS_OF = [[0.0, 0.0, 0.0], [0.0, -8.0, 0.5], [3.0, 3.0, 3.0]]
STATISTICS = {
    ("magnitude", 8.0, 9.0): [[0, 0, 0], [0, 1, 0], [0, 0, 0]],
    ("peak", 0.0, 0.0): [[1, 1, 1], [0, 0, 0], [0, 0, 0]],
    ("peak", 8.0, 8.0): [[0, 0, 0], [1, 1, 1], [0, 0, 0]],
    ("range", 0.0, 0.0): [[1, 1, 1], [0, 0, 0], [1, 1, 1]],
    ("range", 8.5, 8.5): [[0, 0, 0], [1, 1, 1], [0, 0, 0]],
    ("variance", 0.0, 0.0): [[1, 1, 1], [0, 0, 0], [1, 1, 1]],
    ("variance", 15.0, 16.0): [[0, 0, 0], [1, 1, 1], [0, 0, 0]],
    ("largest product", 8.0, 8.0): [[0, 0, 0], [1, 1, 1], [0, 0, 0]],
    ("largest product", 27.0, 27.0): [[0, 0, 0], [0, 0, 0], [1, 1, 1]],
    ("smallest product", 0.0, 1.0): [[0, 0, 0], [0, 0, 0], [1, 1, 1]],
}


@pytest.mark.parametrize(("statistic", "low", "high"), STATISTICS)
def test_a_slice_is_located_by_its_statistic(statistic: str, low: float, high: float) -> None:
    held = np.array(STATISTICS[statistic, low, high], bool)
    case = one_node(LAYERS["reduce_sum"], {"axes": (1,)}, {"x": ROWS_OF}, "float64")
    entry = replace(READ, layer="reduce_sum", between=(low, high), statistic=statistic, along="axes")
    assert (entry.located(case, (3, 3)) == held).all()
    if statistic != "magnitude":
        assert (entry.located(case, (3,)) == held[:, 0]).all()


def test_a_slice_may_have_several_axes() -> None:
    case = one_node(LAYERS["reduce_sum"], {"axes": (0, 1)}, {"x": ROWS_OF}, "float64")
    entry = replace(READ, layer="reduce_sum", between=(11.0, 11.0), statistic="range", along="axes")
    assert entry.located(case, ())
    assert not replace(entry, between=(8.5, 8.5)).located(case, ())


def test_an_option_may_tell_how_many_of_the_last_axes_a_slice_has() -> None:
    case = one_node(LAYERS["layer_norm"], {"axes": 1}, {"x": ROWS_OF}, "float64")
    entry = replace(READ, layer="layer_norm", between=(8.5, 8.5), statistic="range", along="axes")
    assert entry.located(case, (3, 3)).tolist() == [[False] * 3, [True] * 3, [False] * 3]
    whole = one_node(LAYERS["layer_norm"], {"axes": 2}, {"x": ROWS_OF}, "float64")
    assert replace(entry, between=(11.0, 11.0)).located(whole, (3, 3)).all()
    assert not entry.located(whole, (3, 3)).any()


def test_an_entry_may_be_located_by_the_cotangent() -> None:
    case = softplus_case([21.0, 22.0])  # cotangents 0.5 and 1.5
    row = softplus_row(slope=lambda dx, x: dx * (1.0 + 1e-8))
    entry = replace(READ, argument="cotangent", kinds=("gradient",))
    assert examined(case, replace(entry, between=(0.5, 2.0)), row=row).known
    assert not examined(case, replace(entry, between=(1.0, 2.0)), row=row).known
    assert examined(case, replace(entry, between=(1.5, 1.5), statistic="largest"), row=row).known


def test_an_entry_may_be_located_by_the_output() -> None:
    """A gradient's element is located where it is a part of such an output."""
    layer, options = LAYERS["lp_pool"], {"p": 1, "kernel": 2, "stride": 2}
    case = one_node(layer, options, {"x": [[[1.0, -1.0, 3.0, 4.0]]]}, "float64")
    entry = replace(READ, layer="lp_pool", argument="output", between=(0.0, 0.0), kinds=("gradient",))
    assert entry.located(case, (1, 1, 2)).tolist() == [[[True, False]]]
    assert entry.located(case, (1, 1, 4)).tolist() == [[[True, True, False, False]]]
    for part, known in ((slice(0, 2), True), (slice(1, 3), False)):
        row = layer.forward, _with_nothing_in(part)
        examination = examine(
            Subject(NumpyReference(rows={"lp_pool": row}), {}, (replace(entry, max_relative_error=1.0),)), case
        )
        assert not examination.agrees
        assert examination.known is known


def _with_nothing_in(part: slice) -> Callable[..., Any]:
    def backward(dout: Array, cache: Any) -> dict[str, Array]:
        dx = np.array(LAYERS["lp_pool"].backward(dout, cache)["x"])
        dx[..., part] = 0.0
        return {"x": dx}

    return backward


def test_a_product_too_small_for_the_dtype_is_no_zero() -> None:
    case = one_node(LAYERS["reduce_sum"], {"axes": (1,)}, {"x": [[1e-200, 1e-200], [0.0, 1.0]]}, "float64")
    entry = replace(READ, layer="reduce_sum", between=(0.0, 1e-300), statistic="smallest product", along="axes")
    assert entry.located(case, (2,)).tolist() == [True, False]


# In a network.


def chain(x: Any) -> Case:
    """Two layers around a softplus."""
    nodes = (
        Node.of("a", LAYERS["identity"], "x"),
        Node.of("b", LAYERS["softplus"], "a"),
        Node.of("out", LAYERS["tanh"], "b"),
    )
    network = Network((Input("x", np.shape(x)),), nodes)
    return Case(network, "float64", {"x": np.asarray(x)}, np.linspace(0.5, 1.5, np.size(x)))


def test_a_known_divergence_is_known_inside_a_network() -> None:
    examination = examined(chain([1.0, 21.0]), READ)
    assert examination.known
    assert [check.key for check in examination.wrong] == ["value:b"]
    assert [culprit.node.name for culprit in examination.culprits] == ["b"]


def test_an_unknown_fault_beside_a_known_divergence_is_not_excused() -> None:
    tanh = (LAYERS["tanh"].forward, lambda dout, out: {"x": dout})
    adapter = Diverging()
    adapter._rows = {**adapter._rows, "tanh": tanh}
    examination = examine(Subject(adapter, {}, (READ,)), chain([1.0, 21.0]))
    assert not examination.known
    assert {culprit.node.name: culprit.divergence for culprit in examination.culprits} == {"b": READ, "out": None}


class Dropping(Diverging):
    """Diverges as known, and drops a path where paths meet."""

    def add_up(self, name: str, before: Array | None, arriving: Array) -> Array:
        return arriving


def test_a_composition_fault_beside_a_known_divergence_is_not_excused() -> None:
    nodes = (
        Node.of("a", LAYERS["tanh"], "x"),
        Node.of("b", LAYERS["softplus"], "y"),
        Node.of("c", LAYERS["multiply"], "a", "a"),
        Node.of("out", LAYERS["add"], "b", "c"),
    )
    network = Network((Input("x", (2,)), Input("y", (2,))), nodes)
    values = {"x": np.array([0.5, -0.25]), "y": np.array([1.0, 21.0])}
    case = Case(network, "float64", values, np.array([1.5, -0.5]))
    assert examine(Subject(Diverging(), {}, (READ,)), case).known
    assert not examine(Subject(Dropping(), {}, (READ,)), case).known


@pytest.mark.parametrize("spoil", [lambda x: None, lambda x: x[None], lambda x: "text"], ids=["None", "shape", "text"])
def test_a_tensor_of_the_wrong_structure_beside_a_known_divergence_is_not_excused(
    spoil: Callable[[Array], Any],
) -> None:
    class Forgetting(Diverging):
        """Spoils a gradient wherever there is more than one node."""

        def backward(self, forward: Any, cotangent: Array) -> dict[str, Any]:
            gradients = super().backward(forward, cotangent)
            alone = len(forward.tape[0].nodes) == 1
            return gradients if alone else {**gradients, "x": spoil(gradients["x"])}

    examination = examine(Subject(Forgetting(), {}, (READ,)), chain([1.0, 21.0]))
    assert {culprit.node.name: culprit.divergence for culprit in examination.culprits} == {"b": READ, "a": None}
    assert not examination.known


# In a report.


def framework(directory: Path, divergences: str, base: type = Diverging, name: str = "framework_of_tests") -> Adapter:
    """An adapter in a file of its own, beside a known-divergence file."""
    path = directory / f"{name}.py"
    source = f"import numpy as np\nfrom gradproof.reference import LAYERS, NumpyReference\n{SOURCES[base]}"
    path.write_text(source)
    path.with_suffix(".toml").write_text(divergences.replace("between =", 'times = "beta"\nbetween ='))
    return load_adapter(f"{path}:Framework")


SOURCES = {
    Diverging: """
def forward(x, beta):
    out, cache = LAYERS["softplus"].forward(x, beta=beta)
    return np.where(beta * x > 20, x, out).astype(x.dtype), cache

class Framework(NumpyReference):
    name = "framework"
    def __init__(self):
        super().__init__(rows={"softplus": (forward, LAYERS["softplus"].backward)})
    def version(self):
        return "1.2.3"
""",
    NumpyReference: """
class Framework(NumpyReference):
    name = "framework"
    def version(self):
        return "1.2.3"
""",
}


@pytest.fixture
def unique(request: pytest.FixtureRequest) -> str:
    """A module name for this test alone."""
    return f"framework_{abs(hash(request.node.nodeid))}"


def checked(adapter: Adapter) -> Report:
    return check([adapter], networks=150, seed=3, layers=["softplus"], failures=None)


def test_a_known_divergence_is_counted_and_the_run_agrees(tmp_path: Path, unique: str) -> None:
    report = checked(framework(tmp_path, ENTRY, name=unique))
    assert report.agrees
    assert report.known
    assert {(each.layer, each.cause) for each in report.known if each.culprit} == {("softplus", "linear above 20")}
    assert {each.dtype for each in report.known} == {"float64"}
    assert report.tallies["framework", "float64"].known > 0
    assert report.tallies["framework", "float64"].disagreeing == 0
    assert report.stale == []


def test_without_its_entry_the_run_disagrees(tmp_path: Path, unique: str) -> None:
    report = checked(framework(tmp_path, "", name=unique))
    assert not report.agrees
    assert report.known == []
    assert {each.layer for each in report.disagreements if each.culprit} == {"softplus"}


def test_an_entry_that_no_longer_shows_is_stale_and_the_run_does_not_agree(tmp_path: Path, unique: str) -> None:
    report = checked(framework(tmp_path, ENTRY, NumpyReference, unique))
    assert report.disagreements == []
    assert [(each.adapter, each.dtype, each.divergence.layer) for each in report.stale] == [
        ("framework", "float64", "softplus")
    ]
    assert not report.agrees
    assert report.to_json()["stale_divergences"] == [{"adapter": "framework", "layer": "softplus", "dtype": "float64"}]


def test_an_entry_for_other_versions_is_neither_used_nor_stale(tmp_path: Path, unique: str) -> None:
    other = changed('["1.2", "2"]', '["1.3"]')
    assert checked(framework(tmp_path, other, NumpyReference, unique)).agrees
    report = checked(framework(tmp_path, other, name=f"{unique}_too"))
    assert not report.agrees
    assert report.stale == []


def test_a_witness_off_the_divergence_is_stale(tmp_path: Path, unique: str) -> None:
    report = checked(framework(tmp_path, changed("{ x = 21.0 }", "{ x = 2.0 }"), name=unique))
    assert [each.divergence.layer for each in report.stale] == ["softplus"]


def test_each_entry_must_show_by_itself(tmp_path: Path, unique: str) -> None:
    """The second describes nothing that happens, although the first explains its witness."""
    report = checked(framework(tmp_path, ENTRY + changed('["value", "gradient"]', '["nonfinite"]'), name=unique))
    assert [each.divergence.kinds for each in report.stale] == [("nonfinite",)]


def test_adapters_in_files_of_the_same_name_keep_their_own_entries(tmp_path: Path, unique: str) -> None:
    for each in ("one", "two"):
        (tmp_path / each).mkdir()
    first = framework(tmp_path / "one", ENTRY, name=unique)
    second = framework(tmp_path / "two", "", name=unique)
    assert (len(divergences_of(first)), len(divergences_of(second))) == (1, 0)


# The files of the built-in adapters, in the installed versions.

FRAMEWORKS = {"torch": ("torch",), "jax": ("jax", "optax", "platformdirs")}


def load(name: str) -> Adapter:
    if not all(map(find_spec, FRAMEWORKS[name])):
        pytest.skip(f"{name} is not installed: pip install 'gradproof[{name}]'")
    (entry,) = entry_points(group="gradproof.adapters", name=name)
    adapter: Adapter = entry.load()()
    return adapter


def built_in(name: str) -> tuple[Divergence, ...]:
    (directory,) = gradproof.adapters.__path__
    return read_divergences(Path(directory) / f"{name}.toml")


def entries() -> Iterator[tuple[str, int, str]]:
    for name in FRAMEWORKS:
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


@pytest.mark.parametrize("name", FRAMEWORKS)
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


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_adapter_finds_its_file(name: str) -> None:
    read: Mapping[str, tuple[Divergence, ...]] = {name: divergences_of(load(name))}
    assert read == {name: built_in(name)}
    assert built_in(name)


# What overflows in float16 on the way. The adapter below is right but for the elements that it is told to spoil.


class Spoiling(NumpyReference):
    """The reference, rounded to float16, with a part of one gradient changed."""

    name = "jax"

    def __init__(self, layer: str, argument: str, spoil: Callable[[Array], Array]) -> None:
        self.argument = argument
        super().__init__(rows={layer: (LAYERS[layer].forward, self._backward_of(layer, spoil))})

    def version(self) -> str:
        return "0.10.2"

    def supports(self, layer: Layer, options: Options, dtype: str) -> bool:
        return True

    def _backward_of(self, layer: str, spoil: Callable[[Array], Array]) -> Callable[..., Any]:
        def backward(dout: Array, cache: Any) -> dict[str, Array]:
            gradients = LAYERS[layer].backward(dout, cache)
            return {**gradients, self.argument: spoil(np.array(gradients[self.argument], float))}

        return backward

    def forward(self, network: Network, values: Mapping[str, Array], dtype: str) -> Forward:
        exact = {n: v.astype(float) if v.dtype.kind != "i" else v for n, v in values.items()}
        forward = super().forward(network, exact, "float64")
        with np.errstate(all="ignore"):
            return Forward({n: a.astype(dtype) for n, a in forward.outputs.items()}, forward.tape)

    def backward(self, forward: Forward, cotangent: Array) -> dict[str, Array]:
        with np.errstate(all="ignore"):
            found = super().backward(forward, cotangent.astype(float))
            return {n: a.astype(cotangent.dtype) for n, a in found.items()}


def nothing_but_nan(gradient: Array) -> Array:
    return np.full_like(gradient, np.nan)


NONE = {"reduction": "none"}

OVERFLOWING = [
    ("jax", "layer_norm", {}, "x", {"x": [[0.013, -0.014, 0.004]]}, {"x": [[1.0, 2.0, 4.0]]}, 1.0, 1.0),
    ("jax", "layer_norm", {}, "x", {"x": [[1.0, 2.0, 4.0]]}, {"x": [[1.0, 2.0, 4.0]]}, 1000.0, 1.0),
    (
        *("jax", "weight_norm", {"features": 3}, "direction"),
        *({"x": [1.0, -0.5], "direction": 4.0}, {"x": [1.0, -0.5]}, 1000.0, 1.0),
    ),
    ("torch", "squareplus", {"b": 4.0}, "x", {"x": [5772.0]}, {"x": [5772.0]}, 50.0, 1.0),
    *(
        ("jax", "half_squared_error", NONE, argument, {**here, argument: 40000.0}, {**here, argument: 100.0}, 0.1, 0.1)
        for argument, here in (("x", {"target": 0.0}), ("target", {"x": 0.0}))
    ),
    *(
        (name, "squared_hinge", NONE, "x", {"x": -41000.0, "target": 1.0}, {"x": -100.0, "target": 1.0}, 0.1, 0.1)
        for name in ("torch", "jax")
    ),
    *(
        (name, "mse", NONE, argument, {**here, argument: 40000.0}, {**here, argument: 100.0}, 0.1, 0.1)
        for name in ("torch", "jax")
        for argument, here in (("x", {"target": 0.0}), ("target", {"x": 0.0}))
    ),
    *(
        (
            "jax",
            "lp_pool",
            {"p": p, "kernel": 2, "stride": 1},
            "x",
            {"x": [[[800.0, 600.0]]]},
            {"x": [[[0.8, 0.6]]]},
            300.0,
            300.0,
        )
        for p in (2, 3)
    ),
]
"""Framework, layer, options, argument, numbers at which its float16 gradient may overflow, numbers at which it may not,
and what the cotangent is multiplied by in either case."""

VERSIONS = {"torch": "2.13.0", "jax": "0.10.2"}


@pytest.mark.parametrize(("name", "layer", "options", "argument", "there", "elsewhere", "scale", "other"), OVERFLOWING)
def test_an_overflow_on_the_way_excuses_what_is_not_finite_where_it_can_occur(
    name: str,
    layer: str,
    options: Options,
    argument: str,
    there: Mapping[str, Any],
    elsewhere: Mapping[str, Any],
    scale: float,
    other: float,
) -> None:
    entries = tuple(e for e in built_in(name) if e.layer == layer and e.applies(VERSIONS[name], "float16"))

    def found(spoil: Callable[[Array], Array], numbers: Mapping[str, Any], factor: float) -> Examination:
        case = one_node(LAYERS[layer], options, numbers, "float16")
        case = replace(case, cotangent=(case.cotangent * np.float16(factor)).astype("float16"))
        return examine(Subject(Spoiling(layer, argument, spoil), {}, entries), case)

    assert found(nothing_but_nan, there, scale).known
    for spoil, numbers, factor in (
        (nothing_but_nan, elsewhere, other),
        (lambda gradient: 1.25 * gradient, there, scale),
        (lambda gradient: gradient + np.abs(gradient).max(), there, scale),
    ):
        assert not found(spoil, numbers, factor).agrees
        assert not found(spoil, numbers, factor).known


RANGE = {"float32": 1e20, "float64": 1e160}
WINDOWS = {"x": [[[3.0, 4.0, 2.0]]]}
NEAR: Mapping[str, Any] = {"anchor": [[0.5, 2.0]], "positive": [[3.0, 0.5]], "negative": [[0.5, 1.5]]}
BESIDE: list[tuple[str, str, Options, str, str, Mapping[str, Any]]] = [
    *(
        ("torch", "lp_pool", {"p": p, "stride": s}, d, "x", WINDOWS)
        for p in (1, 2, 3)
        for s in (1, 2, 3)
        for d in RANGE
    ),
    *(("jax", "reduce_prod", {}, d, "x", {"x": [3.0, -0.5, 2.0, 1.5]}) for d in RANGE),
    *(("jax", "reduce_prod", {}, d, "x", {"x": [2.0, RANGE[d], 0.5, 3.0]}) for d in RANGE),
    *(
        ("jax", "ctc", {}, d, "logits", {"logits": [[[x, 0.5, 2.0]]], "target_lengths": 1})
        for d in RANGE
        for x in (1, 9)
    ),
    *(("jax", "triplet_margin", {"p": 2.0}, "float32", argument, NEAR) for argument in ("anchor", "positive")),
]
"""Framework, layer, options, dtype, argument, and numbers at which no entry of the layer holds."""


@pytest.mark.parametrize(("name", "layer", "options", "dtype", "argument", "numbers"), BESIDE)
@pytest.mark.parametrize("spoil", [nothing_but_nan, *(partial(np.multiply, f) for f in (0.0, -1.0, 1.25))])
def test_beside_an_entry_no_fault_is_excused(
    name: str,
    layer: str,
    options: Options,
    dtype: str,
    argument: str,
    numbers: Mapping[str, Any],
    spoil: Callable[[Array], Array],
) -> None:
    entries = tuple(e for e in built_in(name) if e.layer == layer and e.applies(VERSIONS[name], dtype))
    assert entries
    case = one_node(LAYERS[layer], LAYERS[layer].defaults | options, numbers, dtype)
    found = examine(Subject(Spoiling(layer, argument, spoil), {}, entries), case)
    assert not found.agrees
    assert not found.known


@pytest.mark.parametrize(
    ("dtype", "there", "elsewhere"),
    [
        ("float32", [1e-25, 1e18, 1e-25, 1e18], [0.5, 2.0, 3.0, 1.0]),
        ("float64", [1e-170, 1e120] * 2, [0.5, 2.0, 3.0, 1.0]),
    ],
)
def test_a_vanishing_product_excuses_no_more_than_the_number(
    dtype: str, there: Sequence[float], elsewhere: Sequence[float]
) -> None:
    entries = tuple(e for e in built_in("torch") if e.layer == "reduce_prod" and e.applies("2.13.0", dtype))
    forward, backward = LAYERS["reduce_prod"].forward, LAYERS["reduce_prod"].backward

    def found(factor: float, numbers: Sequence[float]) -> Examination:
        def spoilt(x: Array, **options: Any) -> tuple[Array, Any]:
            out, cache = forward(x, **options)
            return out * out.dtype.type(factor), cache

        case = one_node(LAYERS["reduce_prod"], {}, {"x": numbers}, dtype)
        return examine(Subject(NumpyReference(rows={"reduce_prod": (spoilt, backward)}), {}, entries), case)

    assert found(0.0, there).known
    for factor, numbers in ((0.0, elsewhere), (3.0, there), (-1.5, there), (math.nan, there)):
        assert not found(factor, numbers).agrees
        assert not found(factor, numbers).known


@pytest.mark.parametrize(
    ("x", "slope", "known"),
    [
        (1.0009765625, 0.25, True),
        (1.0009765625, 0.5, True),
        (1.0009765625, 0.51, False),
        (1.0009765625, np.nan, False),
        (1.001953125, 0.25, False),
    ],
)
def test_a_kink_that_lies_one_number_late_excuses_its_slopes_at_that_number(
    x: float, slope: float, known: bool
) -> None:
    entries = tuple(e for e in built_in("jax") if e.layer == "sparse_sigmoid" and e.applies("0.10.2", "float16"))
    case = replace(one_node(LAYERS["sparse_sigmoid"], {}, {"x": [x]}, "float16"), cotangent=np.ones(1, "float16"))
    found = examine(
        Subject(Spoiling("sparse_sigmoid", "x", lambda gradient: np.full_like(gradient, slope)), {}, entries), case
    )
    assert not found.agrees
    assert found.known is known


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
        check = TensorCheck(key, expected.shape, key.partition(":")[0], evidence=evidence)
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
    assert explained_where_off_by(1.0, entry, "float64") == ["value:reduce_norm", "gradient:reduce_norm", "gradient:x"]


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
@pytest.mark.parametrize(
    ("largest", "value", "gradient", "known"),
    [
        (40000.0, np.inf, 1.0, True),
        (40000.0, np.inf, np.nan, False),
        (40000.0, 3.0, 1.0, False),
        (4.0, np.inf, 1.0, False),
    ],
)
def test_a_loss_that_overflows_in_its_sum_excuses_its_value_alone(
    smoothing: float, largest: float, value: float, gradient: float, known: bool
) -> None:
    """What the value and the gradient are multiplied by, with logits of this size."""
    entries = tuple(e for e in built_in("torch") if e.layer == "cross_entropy" and e.applies("2.13.0", "float16"))
    layer = LAYERS["cross_entropy"]

    class Overflowing(Spoiling):
        def forward(self, network: Network, values: Mapping[str, Array], dtype: str) -> Forward:
            right = super().forward(network, values, dtype)
            with np.errstate(all="ignore"):
                spoilt = {n: (a * np.float16(value)).astype(dtype) for n, a in right.outputs.items()}
            return Forward(spoilt, right.tape)

    options = {"label_smoothing": smoothing, "reduction": "none"}
    case = one_node(layer, options, {"x": [[largest, 0.0, 0.0]]}, "float16")
    adapter = Overflowing("cross_entropy", "x", lambda each: each * gradient)
    found = examine(Subject(adapter, {}, entries), case)
    assert not found.agrees
    assert found.known is known
