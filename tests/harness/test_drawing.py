"""What is drawn: valid networks over the whole table, the same for the same seed, shrinking to what matters."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gradproof.draw.drawing import (
    EDGES,
    MAX_ELEMENTS,
    MAX_NODES,
    UNIT_EDGES,
    Drawn,
    drawn_networks,
    networks,
)
from gradproof.draw.hypothesis_internals import BACKEND
from gradproof.model.adapter import Adapter
from gradproof.model.case import Case
from gradproof.model.dtypes import DTYPES
from gradproof.model.layer import Layer
from gradproof.model.network import Input, Network, Node
from gradproof.model.options import MAX_RANK, Axis, Choice, Integer, Integers, NewShape, Real, Shape, TrailingAxes
from gradproof.model.spec import case_from_json, case_to_json, network_from_json, network_to_json
from gradproof.reference import LAYERS, NumpyReference
from gradproof.trust.faults import FAULTS

DRAWS = 1000
ONLY_GENERATE = settings(
    backend=BACKEND, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)


@cache
def draws(count: int, seed: int = 1, layers: tuple[str, ...] = (), max_nodes: int = MAX_NODES) -> tuple[Drawn, ...]:
    """What a run with this seed draws."""
    found: list[Drawn] = []

    @hypothesis.seed(seed)
    @settings(ONLY_GENERATE, max_examples=count)
    @given(drawn_networks(layers, max_nodes))
    def collect(drawn: Drawn) -> None:
        found.append(drawn)

    collect()
    return tuple(found)


# Validity.


@given(drawn_networks(), st.sampled_from(DTYPES))
def test_every_drawn_network_is_valid_and_its_case_round_trips(drawn: Drawn, dtype: str) -> None:
    case = drawn.case(dtype)
    copy = case_from_json(json.loads(json.dumps(case_to_json(case))), LAYERS)
    assert copy.network == drawn.network
    for name, value in case.values.items():
        assert copy.values[name].dtype == value.dtype
        np.testing.assert_array_equal(copy.values[name], value)
    np.testing.assert_array_equal(copy.cotangent, case.cotangent)


@given(networks())
def test_every_drawn_network_is_rebuilt_from_its_json(network: Network) -> None:
    assert network_from_json(network_to_json(network), LAYERS) == network


@given(st.data(), st.integers(1, MAX_NODES + 3))
def test_no_network_is_longer_than_asked_for(data: st.DataObject, max_nodes: int) -> None:
    network = data.draw(networks(max_nodes=max_nodes))
    assert 1 <= len(network.nodes) <= max_nodes


@given(networks())
def test_tensors_stay_small(network: Network) -> None:
    for node in network.nodes:
        assert math.prod(network.shapes[node.name]) <= MAX_ELEMENTS
        assert len(network.shapes[node.name]) <= MAX_RANK


@given(st.data(), st.sampled_from([(3,), (2, 3), (1,), (2, 1, 3, 2)]))
def test_drawn_options_lie_in_their_domains(data: st.DataObject, shape: Shape) -> None:
    layers = [each for each in LAYERS.values() if each.options and each.ranks[0] <= len(shape) <= each.ranks[1]]
    option = data.draw(st.sampled_from([option for layer in layers for option in layer.options]))
    choices = option.domain.choices(shape)
    if choices:
        assert option.domain.contains(data.draw(st.sampled_from(choices)), shape)


@pytest.mark.parametrize("layer", LAYERS)
def test_networks_asked_to_contain_a_layer_do(layer: str) -> None:
    found = draws(30, layers=(layer,))
    assert len(found) >= 25
    assert all(layer in {node.layer.name for node in drawn.network.nodes} for drawn in found)
    assert len({drawn.network for drawn in found}) >= 20


def test_one_of_several_wanted_layers_is_enough() -> None:
    held = [{node.layer.name for node in drawn.network.nodes} for drawn in draws(60, layers=("gelu", "mae"))]
    assert all(names & {"gelu", "mae"} for names in held)
    assert any("gelu" not in names for names in held)
    assert any("mae" not in names for names in held)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_wanted_layer_fits_into_two_nodes(layer: str) -> None:
    """A loss may need another layer before it, for an input of its domain."""
    for drawn in draws(10, layers=(layer,), max_nodes=2):
        assert layer in {node.layer.name for node in drawn.network.nodes}


# What occurs.


def ancestors(network: Network) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {each.name: set() for each in network.inputs}
    for node in network.nodes:
        found[node.name] = set().union(*({source} | found[source] for source in node.inputs))
    return found


def structure(network: Network) -> Iterator[str]:
    before = ancestors(network)
    made = {node.name for node in network.nodes}
    yield f"{len(network.nodes)} nodes"
    yield "several inputs" if len(network.inputs) > 1 else "one input"
    if any(len(network.consumers[name]) > 1 for name in made):
        yield "fan-out"
    if any(len(network.consumers[name]) > 2 for name in made):
        yield "fan-out of three"
    if any(len(network.consumers[name]) > 1 for name in network.parameters):
        yield "a shared parameter"
    for node in network.nodes:
        if len(set(node.inputs)) < len(node.inputs):
            yield "an input used twice by one node"
        yield from _joints(node, before, made)
    yield f"ends in a {network.nodes[-1].layer.kind}"


def _joints(node: Node, before: dict[str, set[str]], made: set[str]) -> Iterator[str]:
    for first, second in zip(node.inputs, node.inputs[1:], strict=False):
        if first in before[second] or second in before[first]:
            yield "residual"
        elif first != second and before[first] & before[second] & made:
            yield "diamond"


def layers_and_options(network: Network) -> Iterator[str]:
    for node in network.nodes:
        yield node.layer.name
        shapes = [network.shapes[source] for source in node.inputs]
        for option in node.layer.options:
            value = dict(node.options)[option.name]
            if isinstance(option.domain, LISTED):
                yield f"{node.layer.name} {option.name}={value}"
            elif isinstance(option.domain, Axis):
                yield f"{node.layer.name} {option.name} from the {'front' if value >= 0 else 'back'}"  # type: ignore[operator]
            elif isinstance(option.domain, TrailingAxes):
                yield f"{node.layer.name} {option.name}: {'one' if value == 1 else 'several'}"
            elif isinstance(option.domain, NewShape):
                yield f"{node.layer.name} to rank {len(value)}"  # type: ignore[arg-type]
        yield f"{node.layer.name} of rank {len(shapes[0])}"
        if len(set(shapes)) > 1:
            yield f"{node.layer.name} of unlike shapes"


def numbers(drawn: Drawn) -> Iterator[str]:
    case = drawn.case("float64")
    domains = {each.name: each.domain.kind for each in drawn.network.inputs}
    for name, value in case.values.items():
        kind = domains.get(name, "real")
        for edge in {"real": EDGES, "unit": UNIT_EDGES, "index": (0,)}.get(kind, ()):
            if (value == edge).any():
                yield f"{kind} {edge:g}"


@cache
def occurrences() -> Counter[str]:
    """Property -> how many of the drawn networks have it."""
    found: Counter[str] = Counter()
    for drawn in draws(DRAWS):
        found.update({*structure(drawn.network), *layers_and_options(drawn.network), *numbers(drawn)})
    return found


def options_of(layer: Layer) -> Iterator[str]:
    for option in layer.options:
        if isinstance(option.domain, LISTED):
            yield from (f"{layer.name} {option.name}={value}" for value in option.domain.choices((2, 3)))
        if isinstance(option.domain, Axis):
            yield from (f"{layer.name} {option.name} from the {side}" for side in ("front", "back"))
        if isinstance(option.domain, TrailingAxes):
            yield from (f"{layer.name} {option.name}: {many}" for many in ("one", "several"))


def ranks_of(layer: Layer) -> Iterator[str]:
    low, high = layer.ranks
    ranks = {len(shape) for shape in layer.shapes} or range(max(low, 1), min(high, 3) + 1)
    yield from (f"{layer.name} of rank {rank}" for rank in ranks)


STRUCTURES = (
    *(f"{count} nodes" for count in range(1, MAX_NODES + 1)),
    *("several inputs", "one input", "fan-out", "fan-out of three", "a shared parameter"),
    *("an input used twice by one node", "residual", "diamond"),
    *("ends in a loss", "ends in a layer", "ends in a activation"),
    *(f"{layer} of unlike shapes" for layer in ("add", "subtract", "multiply", "concatenate")),
    *(f"reshape to rank {rank}" for rank in (1, 2, 3)),
)
LISTED = (Choice, Real, Integer, Integers)
NUMBERS = (*(f"real {edge:g}" for edge in EDGES), *(f"unit {edge:g}" for edge in UNIT_EDGES), "index 0")


@pytest.mark.parametrize("wanted", [tuple(LAYERS), STRUCTURES, NUMBERS], ids=["layers", "structures", "numbers"])
def test_a_thousand_draws_meet(wanted: Sequence[str]) -> None:
    assert [each for each in wanted if not occurrences()[each]] == []


@pytest.mark.parametrize("layer", LAYERS.values(), ids=lambda layer: layer.name)
def test_draws_of_a_layer_meet_its_options_and_ranks(layer: Layer) -> None:
    """Within 150 draws; most layers need no more than 40."""
    for count in (40, 150):
        met: Counter[str] = Counter()
        for drawn in draws(count, layers=(layer.name,), max_nodes=2):
            met.update(set(layers_and_options(drawn.network)))
        assert met[layer.name] == count
        missing = [each for each in (*options_of(layer), *ranks_of(layer)) if not met[each]]
        if not missing:
            break
    assert missing == []


def test_rank_four_occurs_for_most_activations() -> None:
    activations = [name for name, layer in LAYERS.items() if layer.kind == "activation"]
    met = {name for name in activations if occurrences()[f"{name} of rank 4"]}
    assert len(met) > 0.8 * len(activations)


def test_negative_zero_is_drawn() -> None:
    values = [value for drawn in draws(DRAWS) for value in drawn.case("float64").values.values()]
    assert any((np.signbit(value) & (value == 0.0)).any() for value in values if value.dtype == np.float64)


def holds(number: float, drawn: Drawn) -> Iterator[bool]:
    return (bool((value == number).any()) for value in drawn.case("float64").values.values())


@pytest.mark.parametrize(("layer", "drawn"), [("softplus", True), ("relu", False)])
def test_the_edges_of_a_layer_are_drawn_for_it_alone(layer: str, drawn: bool) -> None:
    edge = 21.0
    assert edge in LAYERS["softplus"].edges
    assert edge not in EDGES
    network = Network((Input("x", (2, 3)),), (Node.of("h", LAYERS[layer], "x"),))
    met = [any(holds(edge, Drawn(network, seed, edge_share=0.2, scale=1.0))) for seed in range(300)]
    assert any(met) is drawn


# The same seed.


def identical(first: Case, second: Case) -> bool:
    names = set(first.values) | set(second.values)
    return first.network == second.network and all(
        np.array_equal(first.values[name], second.values[name]) for name in names
    )


def test_the_same_seed_draws_the_same_networks_and_numbers() -> None:
    once, again = draws(100, seed=5), draws.__wrapped__(100, seed=5)
    assert once == again
    assert once != draws(100, seed=6)
    for first, second in zip(once, again, strict=True):
        assert identical(first.case("float32"), second.case("float32"))


def test_another_array_seed_draws_other_numbers_for_the_same_network() -> None:
    drawn = draws(100)[10]
    other = Drawn(drawn.network, drawn.seed + 1, drawn.edge_share, drawn.scale)
    assert not identical(drawn.case("float64"), other.case("float64"))


SCRIPT = """
import hashlib
import sys
import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
import gradproof.draw.drawing as drawing
from hypothesis import strategies as st

# More seeds than a network has, so that constants have their chance.
seeds = st.lists(st.integers(0, 2**32 - 1), min_size=10, max_size=10)

def digest(backend):
    found = []

    @hypothesis.seed(5)
    @settings(backend=backend, max_examples=150, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(drawing.drawn_networks(), seeds)
    def collect(drawn, seeds):
        found.append((repr(drawn), seeds))

    collect()
    return hashlib.sha256(repr(found).encode()).hexdigest()

for module in sys.argv[2:]:
    __import__(module)
for backend in sys.argv[1].split(","):
    print(digest(backend))
"""
CONSTANTS = "\n".join(f"value_{i} = {i * 1_234_567 + 89}" for i in range(200))
OWN, PLAIN = BACKEND, "hypothesis"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("draws")
    (path / "script.py").write_text(SCRIPT)
    (path / "constants.py").write_text(CONSTANTS)
    return path


def drawn_elsewhere(directory: Path, backends: Sequence[str], modules: Sequence[str] = ()) -> list[str]:
    """A digest of what another process draws with each backend in turn, with these modules loaded."""
    command = [sys.executable, "script.py", ",".join(backends), *modules]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.fixture(scope="module")
def undisturbed(directory: Path) -> dict[str, str]:
    return dict(zip((OWN, PLAIN), drawn_elsewhere(directory, (OWN, PLAIN)), strict=True))


def test_the_same_seed_draws_the_same_in_another_process_whatever_is_loaded(
    directory: Path, undisturbed: dict[str, str]
) -> None:
    assert drawn_elsewhere(directory, [OWN], ["constants", "decimal", "unittest.mock"]) == [undisturbed[OWN]]


def test_the_same_seed_draws_the_same_whatever_hypothesis_drew_before(
    directory: Path, undisturbed: dict[str, str]
) -> None:
    assert drawn_elsewhere(directory, [PLAIN, OWN], ["constants"])[-1] == undisturbed[OWN]


# Numbers.


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_of_the_dtype_and_exactly_what_the_reference_sees(dtype: str) -> None:
    for drawn in draws(DRAWS)[:200]:
        case = drawn.case(dtype)
        for each in drawn.network.inputs:
            wanted = np.dtype(dtype) if each.domain.floating else np.dtype("int64")
            assert case.values[each.name].dtype == wanted
            assert each.domain.contains(case.values[each.name])
        for name, value in case.values.items():
            assert np.isfinite(value).all()
            np.testing.assert_array_equal(case.exact_values[name].astype(value.dtype), value)
        assert case.cotangent.dtype == dtype


def test_both_dtypes_get_the_same_numbers_rounded() -> None:
    for drawn in draws(DRAWS)[:100]:
        wide, narrow = drawn.case("float64"), drawn.case("float32")
        for name, value in wide.values.items():
            np.testing.assert_array_equal(value.astype(narrow.values[name].dtype), narrow.values[name])


def test_the_cotangent_is_random_and_nowhere_uniform() -> None:
    cotangents = [drawn.case("float64").cotangent for drawn in draws(DRAWS)]
    for cotangent in cotangents:
        assert np.unique(cotangent).size == cotangent.size
        assert not (np.isin(cotangent, [0.0, 1.0, -1.0])).any()
    pooled = np.concatenate([cotangent.ravel() for cotangent in cotangents])
    assert np.unique(pooled).size > 0.9 * pooled.size
    assert abs(pooled.mean()) < 0.1
    assert 0.9 < pooled.std() < 1.1


def test_edges_replace_a_share_of_some_arrays() -> None:
    generic, mixed = 0, 0
    for drawn in draws(DRAWS):
        share = np.isin(drawn.case("float64").values[drawn.network.inputs[0].name], EDGES).mean()
        generic += share == 0.0
        mixed += 0.0 < share < 1.0
    assert generic > DRAWS / 2
    assert mixed > DRAWS / 20


# Shrinking.


def spoils(adapter: Adapter) -> Callable[[Drawn], bool]:
    """Whether the adapter's gradients are visibly not the reference's."""

    def gradients(of: Adapter, case: Case) -> dict[str, Any]:
        values = {name: value.copy() for name, value in case.values.items()}
        return dict(of.backward(of.forward(case.network, values, case.dtype), case.cotangent.copy()))

    def differs(got: Any, right: np.ndarray) -> bool:
        if got is None or got.shape != right.shape:
            return True
        with np.errstate(all="ignore"):
            return bool(np.isfinite(right).all() and not (np.abs(got - right) <= 1e-9 * np.abs(right)).all())

    def predicate(drawn: Drawn) -> bool:
        case = drawn.case("float64")
        right, got = gradients(NumpyReference(), case), gradients(adapter, case)
        return any(differs(got[name], array) for name, array in right.items())

    return predicate


def shrunk(fault: str, seed: int = 0) -> Drawn:
    """The smallest drawn network that Hypothesis finds on which a planted fault shows."""
    config = settings(ONLY_GENERATE, max_examples=1000, phases=[Phase.generate, Phase.shrink])
    found = hypothesis.find(drawn_networks(), spoils(FAULTS[fault].make()), settings=config, random=Random(seed))
    assert isinstance(found, Drawn)
    return found


@pytest.mark.parametrize(
    "fault",
    [
        "relu_derivative_left_out",
        "elu_sign_flipped",
        "gelu_density_missing",
        "subtract_sign_lost",
        "layer_norm_first_term",
        "mse_factor_two_missing",
        "returns_none",
    ],
)
def test_a_fault_in_one_layer_shrinks_to_that_layer_alone(fault: str) -> None:
    """From the first of three starts: Hypothesis gives up in a local minimum of two layers now and then."""
    starts = (shrunk(fault, seed) for seed in range(3))
    smallest = next((each for each in starts if len(each.network.nodes) == 1), None)
    assert smallest is not None
    assert [node.layer.name for node in smallest.network.nodes] == [FAULTS[fault].layer]
    (node,) = smallest.network.nodes
    # A layer norm without its parameters takes fewer draws than one with its default options.
    assert {**dict(node.options), "affine": True} == {"affine": True, **node.layer.complete({})}
    assert smallest.network.inputs[0].shape == (2, 3)
    assert (smallest.seed, smallest.edge_share, smallest.scale) == (0, 0.0, 1.0)


@pytest.mark.parametrize("fault", ["fan_out_path_dropped", "fan_out_path_doubled"])
def test_a_fan_out_fault_shrinks_to_a_few_nodes(fault: str) -> None:
    network = shrunk(fault).network
    assert len(network.nodes) <= 3
    assert any(len(readers) > 1 for readers in network.consumers.values())


def test_the_printed_network_is_what_failed() -> None:
    drawn = draws(10)[3]
    assert repr(drawn).startswith(f"<{drawn.network}; seed={drawn.seed}, ")


def test_layers_are_anchored_by_name() -> None:
    """The table is the only list: what is drawn are its very records."""
    table: dict[str, Layer] = LAYERS
    assert {id(node.layer) for drawn in draws(DRAWS) for node in drawn.network.nodes} == {
        id(layer) for layer in table.values()
    }
