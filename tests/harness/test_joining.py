"""Joined networks: each part keeps its numbers, its gradient reaches all before it, nothing explodes or vanishes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gradproof.draw.drawing import Drawn, draw_each
from gradproof.draw.joining import (
    FELT,
    NODES,
    ORDINARY,
    Flow,
    Link,
    Surroundings,
    deep_networks,
    flow,
    join_cases,
    links,
    ordinary_parts,
)
from gradproof.model.case import Case
from gradproof.model.dtypes import VALID_DTYPES
from gradproof.model.network import Input, Network, Node
from gradproof.reference import LAYERS, NumpyReference
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject

SURROUNDINGS = Surroundings(ordinary_parts(1, 40))


def small_cases(count: int, dtype: str = "float64", seed: int = 3) -> list[Case]:
    """Drawn cases, edge values included."""
    drawn: list[Drawn] = []
    draw_each(drawn.append, count, seed, max_nodes=4)
    return [each.case(dtype) for each in drawn]


def tanh_case(x: float, cotangent: float = 1.0) -> Case:
    network = Network((Input("x", (2,)),), (Node.of("out", LAYERS["tanh"], "x"),))
    return Case(network, "float64", {"x": np.array([x, 0.5])}, np.array([cotangent, 1.0]))


def swept(case: Case) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Values and gradients that the reference has."""
    reference = NumpyReference()
    forward = reference.forward(case.network, case.values, case.dtype)
    return dict(forward.outputs), reference.backward(forward, case.cotangent)


def keeps_its_numbers(joined: Case, part: Case, prefix: str) -> bool:
    """Whether the part has its own values to the bit, and its own cotangent to within roundings."""
    values, gradients = swept(joined)
    own = swept(part)[0]
    same = all(np.array_equal(values.get(prefix + name, np.nan), value, equal_nan=True) for name, value in own.items())
    arrived = gradients[prefix + part.network.output]
    return same and np.allclose(arrived, part.cotangent, rtol=1024 * np.finfo(part.dtype).eps, atol=0.0)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_part_keeps_its_numbers(dtype: str) -> None:
    cases = small_cases(40, dtype)
    for first in range(0, len(cases), 4):
        parts = cases[first : first + 4]
        joined = join_cases(parts)
        assert all(keeps_its_numbers(joined, part, f"p{k}.") for k, part in enumerate(parts))


def test_a_part_that_is_really_moved_does_not() -> None:
    parts = [tanh_case(0.25), tanh_case(0.75)]
    joined = join_cases(parts)
    assert keeps_its_numbers(joined, parts[1], "p1.")
    off = replace(joined, values={**joined.values, "p1.level": joined.values["p1.level"] + 1e-9})
    assert not keeps_its_numbers(off, parts[1], "p1.")
    heavier = replace(joined, values={**joined.values, "p0.weights": joined.values["p0.weights"] * 1.001})
    assert not keeps_its_numbers(heavier, parts[0], "p0.")


def test_what_a_part_sends_back_reaches_those_before_it() -> None:
    parts = [tanh_case(0.25), tanh_case(0.75)]
    sent = flow(parts[1]).sent["x"]
    assert sent == pytest.approx(2 - np.tanh(0.75) ** 2 - np.tanh(0.5) ** 2)
    _, gradients = swept(join_cases(parts))
    assert gradients["total0"] == pytest.approx(1 + sent)


def flowing(total: float = 1.0, **sent: float) -> Flow:
    return Flow(np.ones(()), total, sent, 1.0, 1.0)


@pytest.mark.parametrize(
    ("flows", "moved", "cotangents"),
    [
        ([flowing(x=2.0), flowing(x=2.0, y=-5.0)], [None, "y"], [-4.0, 1.0]),
        ([flowing(), flowing()], [None, None], [1.0, 1.0]),
        ([flowing(), flowing(x=np.nan)], [None, None], [1.0, 1.0]),
        ([flowing(), flowing(x=-1.0), flowing(x=1.0)], [None, "x", "x"], [1.0, 2.0, 1.0]),
        ([flowing(), flowing(x=-1.0)], [None, None], [1.0, 1.0]),
        ([flowing(np.inf), flowing(x=1.0)], [None, None], [1.0, 1.0]),
    ],
    ids=["the one that sends most", "nothing to move", "a NaN", "on and on", "they cancel", "an infinite total"],
)
def test_which_input_is_moved(flows: list[Flow], moved: list[str | None], cotangents: list[float]) -> None:
    assert links(flows) == tuple(map(Link, moved, cotangents))


def test_deep_networks_have_about_so_many_nodes_and_are_the_same_again() -> None:
    sizes = [len(each.network.nodes) for each in deep_networks(40, seed=5)]
    assert NODES - 5 <= min(sizes) <= max(sizes) <= NODES + 5
    assert np.mean(sizes) == pytest.approx(NODES, abs=2)
    twice = [deep_networks(3, seed=5, nodes=20) for _ in range(2)]
    assert [repr(each) for each in twice[0]] == [repr(each) for each in twice[1]]
    assert 15 <= len(twice[0][0].network.nodes) <= 25


def test_nothing_explodes_or_vanishes_at_any_depth() -> None:
    for deep in deep_networks(20, seed=6):
        values, gradients = swept(deep.case("float64"))
        assert max(np.abs(each).max() for each in (*values.values(), *gradients.values())) <= 4 * ORDINARY
        assert all(np.abs(gradients[name]).max() >= FELT / 4 for name in values if ".offset" not in name)


@pytest.mark.parametrize("dtype", VALID_DTYPES)
def test_a_deep_network_is_the_same_in_every_dtype(dtype: str) -> None:
    for deep in deep_networks(3, seed=7):
        case = deep.case(dtype)
        assert case.network == deep.network
        assert case.dtype == dtype
        assert np.isfinite(case.cotangent.astype("float64")).all()


def test_what_is_buried_keeps_its_numbers_among_others_without_its_layers() -> None:
    places = set()
    for seed, case in enumerate(small_cases(12)):
        buried = SURROUNDINGS.bury(case, seed, apart=["tanh"])
        own = {node.layer.name for node in case.network.nodes}
        fits = [k for k in range(9) if f"p{k}.{case.network.output}" in buried.network.shapes]
        held = [k for k in fits if keeps_its_numbers(buried, case, f"p{k}.")]
        assert len(held) == 1
        places.add(held[0])
        assert NODES - 7 <= len(buried.network.nodes) <= NODES + 5
        others = [node for node in buried.network.nodes if not node.name.startswith(f"p{held[0]}.")]
        joining = {"subtract", "add", "multiply", "reduce_sum"}
        assert not {node.layer.name for node in others} - joining & (own | {"tanh"})
    assert len(places) > 2


def test_the_reference_agrees_in_joined_networks() -> None:
    subject = Subject(NumpyReference(), {})
    for seed, case in enumerate(small_cases(10, "float32")):
        found = examine(subject, SURROUNDINGS.bury(case, seed))
        assert found.agrees, found.wrong
