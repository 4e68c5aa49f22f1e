"""The rows of an examination, from the loss back to the inputs."""

from __future__ import annotations

from hypothesis import given, settings

from gradproof.draw.drawing import Drawn, drawn_networks
from gradproof.model.tensors import gradient_of, value_of
from gradproof.reference import NumpyReference
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject
from gradproof.verdict.rows import Row, rows
from helpers.adapters import spoilt
from helpers.examining import examined
from helpers.networks import SIX


def gradient_rows(found: tuple[Row, ...]) -> list[str]:
    return [row.check.key.name for row in found if row.check.key.role == "gradient"]


def test_rows_run_from_the_loss_back() -> None:
    assert gradient_rows(rows(examined(NumpyReference()))) == [
        *("loss", "gated", "target", "rise", "gate", "bent", "line", "x", "w", "b")
    ]


def test_values_come_first_in_forward_order() -> None:
    keys = [row.check.key for row in rows(examined(NumpyReference()))]
    assert keys[:6] == [value_of(each.name) for each in SIX.nodes]


@settings(max_examples=50)
@given(drawn_networks())
def test_no_gradient_stands_before_one_that_it_follows_from(drawn: Drawn) -> None:
    of = drawn.case("float64")
    found = gradient_rows(rows(examine(Subject(NumpyReference(), {}), of)))
    assert sorted(found) == sorted(drawn.network.differentiable)
    for each in drawn.network.nodes:
        sources = {source for _, source in each.sources} & set(found)
        assert all(found.index(each.name) < found.index(source) for source in sources)


def test_every_row_names_a_node_and_its_layer() -> None:
    owners = {row.check.key: (row.node, row.layer) for row in rows(examined(NumpyReference()))}
    assert owners[value_of("gate")] == ("gate", "sigmoid")
    assert owners[gradient_of("loss")] == ("loss", "mse")
    assert owners[gradient_of("target")] == ("loss", "mse")
    assert owners[gradient_of("w")] == ("line", "linear")
    assert owners[gradient_of("bent")] == ("gate", "sigmoid")


def test_what_is_inherited_or_agrees_is_no_culprits_row() -> None:
    found = {row.verdict: row.culprit for row in rows(examined(spoilt("sigmoid")))}
    assert found == {"agrees": False, "inherited": False, "WRONG HERE": True}
