"""Which arithmetic a layer has in a coarse dtype: told from what an adapter gives, and never mistaken for a fault."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from gradproof.model.adapter import Forward
from gradproof.model.case import Case, jittered, redrawn, upcast
from gradproof.model.dtypes import HALF, is_floating
from gradproof.model.layer import Layer, index_domain
from gradproof.model.network import Input, Network, Node
from gradproof.model.options import Options, OptionValue
from gradproof.reference import LAYERS, NumpyReference
from gradproof.verdict.arithmetic import FEWEST_PROBES, MOST_PROBES, PATIENT_PROBES, Classes, Evidence, Probe
from gradproof.verdict.equations import EVERY, INSIDE, STORED, Arithmetic, Equations
from gradproof.verdict.examination import Examination
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject
from gradproof.verdict.noise import Rounding, observe, rounded_inside
from gradproof.verdict.running import run

Array = np.ndarray[Any, Any]

EACH_HALF = pytest.mark.parametrize("dtype", HALF)


class Nearest(Rounding):
    """To the nearest number of the dtype, as hardware rounds."""

    def __init__(self, dtype: str) -> None:
        super().__init__(np.dtype(dtype), np.random.default_rng(0), to_grid=True)

    def __call__(self, exact: Array, at_one: bool = False) -> Array:
        with np.errstate(over="ignore"):
            return np.asarray(exact).astype(self.dtype).astype(float)


class Half(NumpyReference):
    """The reference in half precision, with an arithmetic of one of the classes.

    rows: layer -> (forward, backward) in place of the table's own.
    """

    name = "half"

    def __init__(self, arithmetic: str, rows: Mapping[str, Any] | None = None) -> None:
        super().__init__(rows=rows)
        self.arithmetic = arithmetic
        self.runs = 0

    def supports(self, layer: Layer, options: Options, dtype: str) -> bool:
        return True

    def _read(self, array: Array, nearest: Nearest) -> Array:
        exact = upcast(np.asarray(array))
        return observe(exact, nearest) if self.arithmetic == "every" and is_floating(exact) else exact

    def forward(self, network: Network, values: Mapping[str, Array], dtype: str) -> Forward:
        self.runs += 1
        nearest, known, caches = Nearest(dtype), dict(values), {}
        with np.errstate(all="ignore"):
            for node in network.nodes:
                reads = {source: self._read(known[source], nearest) for _, source in node.sources}
                out, cache = self.run_node(node, reads)
                caches[node.name] = rounded_inside(cache, nearest) if self.arithmetic == "stored" else cache
                known[node.name] = np.asarray(out).astype(dtype)
        return Forward({node.name: known[node.name].copy() for node in network.nodes}, (network, caches, dtype))

    def backward(self, forward: Forward, cotangent: Array) -> dict[str, Array]:
        network, caches, dtype = forward.tape
        found = {network.output: cotangent.copy()}
        with np.errstate(all="ignore"):
            for node in reversed(network.nodes):
                dout = self._read(found[node.name], Nearest(dtype))
                terms = self.row(node)[1](dout, caches[node.name])
                for argument, source in node.sources:
                    if argument in terms:
                        term = np.asarray(terms[argument]).astype(dtype)
                        found[source] = found[source] + term if source in found else term
        return found


def alone(layer: str, dtype: str = "bfloat16", shape: Sequence[int] = (8, 16), **options: OptionValue) -> Case:
    """The layer alone on ordinary numbers, with every parameter that it needs."""
    made = LAYERS[layer]
    slots = made.parameters([tuple(shape)], made.complete(options))
    network = Network(
        (Input("x", tuple(shape)),),
        (Node.of("out", made, "x", parameters={slot: f"{slot}0" for slot in slots}, options=options),),
    )
    draw = np.random.default_rng(1).normal
    values = {name: draw(size=network.shapes[name]).astype(dtype) for name in ("x", *network.parameters)}
    return Case(network, dtype, values, draw(size=network.shapes["out"]).astype(dtype))


def probe(adapter: NumpyReference) -> Callable[[Case], tuple[Equations, Mapping[str, Any]] | None]:
    def tried(case: Case) -> tuple[Equations, Mapping[str, Any]]:
        got = run(adapter, case, 60.0).got
        return Subject(adapter, {}).equations(case, got), got

    return tried


def found_class(adapter: NumpyReference, case: Case) -> str:
    return Classes().of(case, probe(adapter)).name


def examined(adapter: NumpyReference, case: Case, demanded: str = "every") -> Examination:
    return examine(Subject(adapter, {}, demanded=demanded), case)


def kinds(found: Examination) -> dict[str, str]:
    return {check.key: check.kind for check in found.checks if check.kind}


# Telling the classes apart.

ROUNDING_LAYERS = ["sigmoid", "softmax", "layer_norm", "gelu"]
STORING_LAYERS = ["tanh", "sigmoid", "softmax"]


@EACH_HALF
@pytest.mark.parametrize("layer", [*ROUNDING_LAYERS, "tanh", "linear"])
def test_an_adapter_that_rounds_its_results_once_is_found_inside(layer: str, dtype: str) -> None:
    options = {"features": 4} if layer == "linear" else {}
    case = alone(layer, dtype, **options)
    assert found_class(Half("inside"), case) == "inside"
    assert examined(Half("inside"), case, "inside").agrees


@EACH_HALF
@pytest.mark.parametrize("layer", STORING_LAYERS)
def test_an_adapter_that_rounds_what_it_stores_is_found_stored(layer: str, dtype: str) -> None:
    case = alone(layer, dtype)
    assert found_class(Half("stored"), case) == "stored"
    assert examined(Half("stored"), case).agrees


@EACH_HALF
@pytest.mark.parametrize("layer", ROUNDING_LAYERS)
def test_an_adapter_that_rounds_every_operation_is_found_every(layer: str, dtype: str) -> None:
    case = alone(layer, dtype)
    assert found_class(Half("every"), case) == "every"
    assert examined(Half("every"), case).agrees


def test_rounding_everything_may_show_no_more_than_rounding_what_is_stored() -> None:
    """Of tanh's backward pass, 1 - y^2, the digits that y has lost are all that shows: the finest class is told."""
    assert found_class(Half("every"), alone("tanh")) == "stored"


SOFTMAX = alone("softmax").network.nodes[0]


def coarse_backward(dout: Array, cache: Any) -> Mapping[str, Array]:
    nearest = Nearest("bfloat16")
    return LAYERS["softmax"].backward(observe(np.asarray(dout), nearest), rounded_inside(cache, nearest))


def test_what_backward_rounds_is_seen_where_forward_is_fine() -> None:
    row = LAYERS["softmax"]
    assert found_class(Half("inside", {"softmax": (row.forward, row.backward)}), alone("softmax")) == "inside"
    assert found_class(Half("inside", {"softmax": (row.forward, coarse_backward)}), alone("softmax")) != "inside"


# Sums.


def summing_in(dtype: str) -> Half:
    """Right in all but that sums are kept in this dtype, one term after another."""
    row = LAYERS["reduce_sum"]

    def forward(x: Array, **options: Any) -> tuple[Array, Any]:
        exact, cache = row.forward(x, **options)
        kept = np.add.accumulate(np.asarray(x).astype(dtype), axis=-1)[..., -1]
        return kept.astype(float).reshape(exact.shape), cache

    return Half("inside", {"reduce_sum": (forward, row.backward)})


@pytest.mark.parametrize("count", [1000, 10_000])
def test_long_sums_tell_what_they_are_kept_in(count: int) -> None:
    case = alone("reduce_sum", "bfloat16", (3, count), axes=(1,))
    assert found_class(summing_in("float32"), case) == "inside"
    assert found_class(summing_in("bfloat16"), case) == "every"
    assert examined(summing_in("float32"), case, "inside").agrees
    assert kinds(examined(summing_in("bfloat16"), case, "inside")) == {"value:out": "arithmetic"}


def test_a_sum_that_stands_still_is_wrong_in_every_class() -> None:
    """256 and 1 are 256 in bfloat16."""
    case = alone("reduce_sum", "bfloat16", (1, 10_000), axes=(1,))
    ones = Case(case.network, "bfloat16", {"x": np.ones((1, 10_000), "bfloat16")}, case.cotangent)
    (total,) = run(summing_in("bfloat16"), ones, 60.0).got["value:out"]
    assert float(total) == 256.0
    assert kinds(examined(summing_in("bfloat16"), ones)) == {"value:out": "value"}
    assert examined(summing_in("float32"), ones, "inside").agrees


# Faults are no arithmetic.


def scaled(layer: str, argument: str, factor: float) -> Half:
    """Right but for one element of one gradient."""
    row = LAYERS[layer]

    def backward(dout: Array, cache: Any) -> Mapping[str, Array]:
        terms = {name: np.array(each) for name, each in row.backward(dout, cache).items()}
        terms[argument].flat[3] *= factor
        return terms

    return Half("inside", {layer: (row.forward, backward)})


SCALED: list[tuple[str, str, Options]] = [
    ("linear", "weight", {"features": 4, "use_bias": False}),
    ("linear", "x", {"features": 4, "use_bias": False}),
    ("layer_norm", "x", {"affine": False}),
    ("softmax", "x", {}),
    ("sigmoid", "x", {}),
    ("tanh", "x", {}),
]


@EACH_HALF
@pytest.mark.parametrize(("layer", "argument", "options"), SCALED, ids=lambda each: str(each))
def test_three_percent_in_one_element_of_a_gradient_are_caught(
    layer: str, argument: str, options: Options, dtype: str
) -> None:
    case = alone(layer, dtype, **options)
    tensor = "x" if argument == "x" else f"{argument}0"
    for factor in (1.03, 0.97):
        adapter = scaled(layer, argument, factor)
        assert kinds(examined(adapter, case)) == {f"gradient:{tensor}": "gradient"}
        assert found_class(adapter, case) == "inside"
    assert examined(scaled(layer, argument, 1.0), case, "inside").agrees


def test_errors_to_one_side_are_what_tells_a_fault_from_a_coarse_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """In size, 3 % of one element are what bfloat16 may lose where every operation rounds."""
    case = alone("linear", features=4, use_bias=False)
    adapter = scaled("linear", "weight", 1.03)
    monkeypatch.setattr("gradproof.verdict.arithmetic._one_sided", lambda roundings: False)
    assert found_class(adapter, case) == "every"
    assert examined(adapter, case).agrees


def test_a_fault_that_fits_in_no_class_tells_none() -> None:
    case = alone("softmax")
    adapter = scaled("softmax", "x", -1.0)
    assert found_class(adapter, case) == "inside"
    assert kinds(examined(adapter, case)) == {"gradient:x": "gradient"}


# What is demanded.


@EACH_HALF
def test_a_class_coarser_than_demanded_is_a_disagreement_of_its_own_kind(dtype: str) -> None:
    case = alone("softmax", dtype)
    every, stored = Half("every"), Half("stored")
    assert set(kinds(examined(every, case, "inside")).values()) == {"arithmetic"}
    assert set(kinds(examined(every, case, "stored")).values()) == {"arithmetic"}
    assert examined(every, case, "every").agrees
    assert set(kinds(examined(stored, case, "inside")).values()) == {"arithmetic"}
    assert examined(stored, case, "stored").agrees
    assert examined(Half("inside"), case, "inside").agrees


def test_a_known_class_does_not_hide_what_is_demanded() -> None:
    """The second case is judged by the finest class again, not by what the first has taught."""
    subject = Subject(Half("every"), {}, demanded="inside")
    for _ in range(2):
        found = examine(subject, alone("softmax"))
        assert set(kinds(found).values()) == {"arithmetic"}
        assert [culprit.node.name for culprit in found.culprits] == ["out"]


def test_what_is_shown_is_by_how_much_the_finer_class_is_missed() -> None:
    case = alone("softmax")
    (check,) = (check for check in examined(Half("every"), case, "inside").checks if check.key == "value:out")
    assert check.kind == "arithmetic"
    assert check.noise_units > 100.0


def test_a_wrong_number_is_no_matter_of_arithmetic() -> None:
    assert kinds(examined(scaled("softmax", "x", -1.0), alone("softmax"), "inside")) == {"gradient:x": "gradient"}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fine_dtypes_have_one_class(dtype: str) -> None:
    subject = Subject(Half("every"), {}, demanded="inside")
    assert examine(subject, alone("softmax", dtype)).agrees
    assert subject.classes.known == {}


# What is remembered.


def test_a_layer_that_needs_none_is_not_probed() -> None:
    subject = Subject(Half("inside"), {})
    assert examine(subject, alone("softmax")).agrees
    assert subject.classes.known == {}


def test_what_was_found_serves_the_next_case() -> None:
    adapter = Half("every")
    subject = Subject(adapter, {})
    assert examine(subject, alone("softmax")).agrees
    assert subject.classes.by_layer("bfloat16") == {"softmax": "every"}
    assert subject.classes.already(SOFTMAX, "bfloat16") is EVERY
    before = adapter.runs
    assert examine(subject, alone("softmax")).agrees
    assert adapter.runs == before + 1


def test_options_and_dtypes_have_classes_of_their_own() -> None:
    classes = Classes()
    classes.of(alone("softmax", "bfloat16"), probe(Half("every")))
    classes.of(alone("softmax", "bfloat16", axis=0), probe(Half("inside")))
    assert classes.by_layer("bfloat16") == {"softmax": "every"}
    assert classes.by_layer("float16") == {}
    assert classes.already(SOFTMAX, "float16") is INSIDE
    assert classes.already(alone("softmax", axis=0).network.nodes[0], "bfloat16") is INSIDE
    assert sorted(each.name for each in classes.known.values()) == ["every", "inside"]


def test_the_class_is_the_coarsest_that_was_ever_needed() -> None:
    classes, case = Classes(), alone("softmax")
    found = [classes.of(case, probe(Half(each))).name for each in ("inside", "stored", "every", "inside")]
    assert found == ["inside", "stored", "every", "every"]


@pytest.mark.parametrize(
    ("classes", "demanded", "allowed"),
    [
        ([], "inside", True),
        ([INSIDE, INSIDE], "inside", True),
        ([INSIDE, STORED], "inside", False),
        ([STORED], "stored", True),
        ([EVERY, INSIDE], "stored", False),
        ([EVERY, STORED], "every", True),
    ],
)
def test_none_may_be_coarser_than_demanded(classes: list[Arithmetic], demanded: str, allowed: bool) -> None:
    assert Classes.allow(classes, demanded) is allowed


def needed(probes: list[Case], tried: Probe, least: Arithmetic = INSIDE) -> Arithmetic:
    evidence = Evidence(probes[0].network.nodes[0], least)
    evidence.gather(probes, tried)
    return evidence.needed


def test_a_run_that_fails_tells_no_class() -> None:
    probes = [alone("softmax")] * 3
    assert needed(probes, lambda case: None) is INSIDE
    assert needed(probes, lambda case: None, STORED) is STORED
    cases = [redrawn(alone("softmax"), seed) for seed in range(16)]
    tried = probe(Half("every"))
    assert needed(cases, lambda case: None if case in cases[::2] else tried(case)) is EVERY


@pytest.mark.parametrize(("shape", "count"), [((2,), MOST_PROBES), ((1000,), FEWEST_PROBES)])
def test_small_tensors_are_probed_more_often(shape: tuple[int, ...], count: int) -> None:
    adapter = Half("inside")
    case = alone("tanh", "bfloat16", shape)
    classes = Classes()
    classes.of(case, probe(adapter))
    assert adapter.runs == 2 * count
    classes.of(case, probe(adapter))
    assert adapter.runs == 3 * count


def test_numbers_near_the_cases_own_are_probed() -> None:
    """x - mean loses digits in bfloat16 where all are near 100, and hardly any where they are ordinary."""

    def cancelling(x: Array, **options: Any) -> tuple[Array, Any]:
        out, cache = LAYERS["layer_norm"].forward(x, **options)
        if np.abs(x).min() > 50.0:
            out = LAYERS["layer_norm"].forward(observe(x, Nearest("bfloat16")), **options)[0]
        return np.asarray(out), cache

    adapter = Half("inside", {"layer_norm": (cancelling, LAYERS["layer_norm"].backward)})
    case = alone("layer_norm", affine=False)
    assert found_class(adapter, case) == "inside"
    far = Case(
        case.network, "bfloat16", {"x": (100.0 + 5.0 * upcast(case.values["x"])).astype("bfloat16")}, case.cotangent
    )
    assert found_class(adapter, far) == "every"


def test_probes_keep_to_the_domain_and_to_integers() -> None:
    """Each is a case of the same network, else it could not be run."""
    network = Network(
        (Input("x", (4, 3)), Input("target", (4,), index_domain(3))),
        (Node.of("out", LAYERS["cross_entropy"], "x", "target"),),
    )
    values = {"x": np.ones((4, 3), "bfloat16"), "target": np.array([0, 2, 1, 0])}
    case = Case(network, "bfloat16", values, np.array(1.0, "bfloat16"))
    for other in (redrawn(case, 1), jittered(case, 1)):
        np.testing.assert_array_equal(other.values["target"], values["target"])
        assert (other.values["x"] != values["x"]).any()
    near = upcast(jittered(case, 1).values["x"])
    assert ((near >= 0.89) & (near <= 1.11)).all()
    assert found_class(Half("inside"), case) == "inside"


# In a network.


def test_each_node_is_judged_by_its_own_class() -> None:
    """One layer that rounds everywhere widens no floor but its own."""
    nodes = (
        Node.of("h", LAYERS["tanh"], "x"),
        Node.of("s", LAYERS["softmax"], "h"),
        Node.of("out", LAYERS["sigmoid"], "s"),
    )
    network = Network((Input("x", (8, 16)),), nodes)
    values = {"x": np.random.default_rng(1).normal(size=(8, 16)).astype("bfloat16")}
    case = Case(network, "bfloat16", values, np.random.default_rng(2).normal(size=(8, 16)).astype("bfloat16"))
    softmax = LAYERS["softmax"]

    def coarse(x: Array, **options: Any) -> tuple[Array, Any]:
        out, _ = softmax.forward(observe(x, Nearest("bfloat16")), **options)
        return np.asarray(out), softmax.forward(x, **options)[1]

    right: dict[str, Any] = {"softmax": (coarse, softmax.backward)}
    subject = Subject(Half("inside", right), {})
    assert examine(subject, case).agrees
    assert subject.classes.by_layer("bfloat16") == {"softmax": "every"}

    def off(x: Array) -> tuple[Array, Any]:
        out, cache = LAYERS["tanh"].forward(x)
        return out * np.where(np.arange(16) == 3, 1.03, 1.0), cache

    wrong = right | {"tanh": (off, LAYERS["tanh"].backward)}
    found = examined(Half("inside", wrong), case)
    assert [culprit.node.name for culprit in found.culprits] == ["h"]
    assert set(kinds(found)) == {"value:h"}


# In a network.


class InCompany(Half):
    """Rounds its results once when a layer is run alone, and every operation in a network: another kernel is chosen."""

    def forward(self, network: Network, values: Mapping[str, Array], dtype: str) -> Forward:
        self.arithmetic = "every" if len(network.nodes) > 1 else "inside"
        return super().forward(network, values, dtype)


def in_company(layer: str, dtype: str = "bfloat16", shape: Sequence[int] = (8, 16)) -> Case:
    """The layer behind another, on ordinary numbers."""
    nodes = (Node.of("before", LAYERS["identity"], "x"), Node.of("out", LAYERS[layer], "before"))
    network = Network((Input("x", tuple(shape)),), nodes)
    draw = np.random.default_rng(1).normal
    return Case(network, dtype, {"x": draw(size=shape).astype(dtype)}, draw(size=network.shapes["out"]).astype(dtype))


@pytest.mark.parametrize("layer", ["sigmoid", "softmax", "gelu"])
def test_a_class_that_shows_in_a_network_alone_is_found_there(layer: str) -> None:
    found = Subject(InCompany("every"), {})
    assert examine(found, in_company(layer)).agrees
    assert found.classes.by_layer("bfloat16")[layer] == "every"
    strict = examined(InCompany("every"), in_company(layer), "inside")
    assert {culprit.node.layer.name for culprit in strict.culprits} == {layer}
    assert set(kinds(strict).values()) == {"arithmetic"}


class WrongInCompany(Half):
    """Scales the gradient of softmax where another layer stands beside it."""

    def forward(self, network: Network, values: Mapping[str, Array], dtype: str) -> Forward:
        row = LAYERS["softmax"]
        wrong = (row.forward, lambda dout, cache: {"x": 1.03 * row.backward(np.asarray(dout), cache)["x"]})
        self._rows = {"softmax": wrong} if len(network.nodes) > 1 else {}
        return super().forward(network, values, dtype)


@EACH_HALF
def test_a_fault_that_shows_in_a_network_alone_is_no_class(dtype: str) -> None:
    found = examined(WrongInCompany("inside"), in_company("softmax", dtype))
    assert kinds(found) == {"gradient:before": "gradient"}
    assert {culprit.node.layer.name for culprit in found.culprits} == {"softmax"}


# Patience.


class Seldom(Half):
    """Rounds every operation in one run of a hundred, and its results alone in the others."""

    def forward(self, network: Network, values: Mapping[str, Array], dtype: str) -> Forward:
        self.arithmetic = "every" if self.runs % 100 == 99 else "inside"
        return super().forward(network, values, dtype)


def test_a_class_that_shows_seldom_is_found_with_patience_and_looked_for_once() -> None:
    adapter, classes, case = Seldom("inside"), Classes(), alone("softmax")
    assert classes.of(case, probe(adapter)).name == "inside"
    assert classes.patiently(case, probe(adapter)).name == "every"
    runs = adapter.runs
    assert 100 <= runs <= 2 * MOST_PROBES + PATIENT_PROBES
    assert classes.patiently(case, probe(adapter)).name == "every"
    assert adapter.runs == runs
