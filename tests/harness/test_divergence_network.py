"""Known divergences inside a network, and in the report of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradproof.model.adapter import Adapter
from gradproof.model.case import Case
from gradproof.model.dtypes import DTYPES
from gradproof.model.network import Input
from gradproof.model.tensors import value_of
from gradproof.reference import LAYERS, NumpyReference
from gradproof.run.check import check
from gradproof.run.results import Report
from gradproof.subject.registry import load_adapter
from gradproof.verdict.divergence import divergences_of
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject
from helpers.divergences import ENTRY, READ, Diverging, changed, examined_with
from helpers.networks import case_of, network, node

Array = np.ndarray[Any, Any]


# In a network.


def around_softplus(x: Any) -> Case:
    """A softplus between two layers."""
    of = network(
        Input("x", np.shape(x)), node("a", "identity", "x"), node("b", "softplus", "a"), node("out", "tanh", "b")
    )
    return case_of(of, "float64", np.linspace(0.5, 1.5, np.size(x)), x=x)


def test_a_known_divergence_is_known_inside_a_network() -> None:
    examination = examined_with(around_softplus([1.0, 21.0]), READ)
    assert examination.known
    assert [check.key for check in examination.wrong] == [value_of("b")]
    assert [culprit.node.name for culprit in examination.culprits] == ["b"]


def test_an_unknown_fault_beside_a_known_divergence_is_not_excused() -> None:
    tanh = (LAYERS["tanh"].forward, lambda dout, out: {"x": dout})
    adapter = Diverging()
    adapter._rows = {**adapter._rows, "tanh": tanh}
    examination = examine(Subject(adapter, {}, (READ,)), around_softplus([1.0, 21.0]))
    assert not examination.known
    assert {culprit.node.name: culprit.divergence for culprit in examination.culprits} == {"b": READ, "out": None}


class Dropping(Diverging):
    """Diverges as known, and drops a path where paths meet."""

    def add_up(self, name: str, before: Array | None, arriving: Array) -> Array:
        return arriving


def test_a_composition_fault_beside_a_known_divergence_is_not_excused() -> None:
    of = network(
        *(Input(name, (2,)) for name in ("x", "y")),
        node("a", "tanh", "x"),
        node("b", "softplus", "y"),
        node("c", "multiply", "a", "a"),
        node("out", "add", "b", "c"),
    )
    case = case_of(of, "float64", [1.5, -0.5], x=[0.5, -0.25], y=[1.0, 21.0])
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

    examination = examine(Subject(Forgetting(), {}, (READ,)), around_softplus([1.0, 21.0]))
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


def checked(adapter: Adapter, dtypes: Sequence[str] = ("float64",)) -> Report:
    return check([adapter], networks=60, seed=3, dtypes=dtypes, layers=["softplus"], failures=None)


def test_a_known_divergence_is_counted_and_the_run_agrees(tmp_path: Path, unique: str) -> None:
    report = checked(framework(tmp_path, ENTRY, name=unique), DTYPES)
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
