"""The mistake is named where a known one was made, and only there."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import combinations, cycle
from typing import Any, NamedTuple

import numpy as np
import pytest

from gradproof.adapter import Adapter, Forward
from gradproof.agreement import Evidence, compare
from gradproof.case import Case
from gradproof.check import Report, check, disagreements
from gradproof.diagnosis import PATHS, Diagnosis, Observation, diagnose, redrawn
from gradproof.drawing import Drawn, draw_each
from gradproof.examination import Examination, Oracles, Subject, examine, rows
from gradproof.faults import FAULTS, KIND_FAULTS, Fault
from gradproof.hypotheses import HYPOTHESES, _confused
from gradproof.layer import OptionValue
from gradproof.network import Input, Network, Node
from gradproof.noise import tensors
from gradproof.reference import LAYERS, NumpyReference

Array = np.ndarray[Any, Any]

NAMED = {name: fault for name, fault in FAULTS.items() if fault.named}
NAMES = {*HYPOTHESES, *(name for name, _, _ in PATHS)}
SEED = 7


@cache
def report_of(fault: Fault) -> Report:
    """The first networks of its layer, up to one on which the fault shows."""
    return check(
        [fault.make()],
        networks=200,
        seed=SEED,
        dtypes=["float64"],
        layers=[fault.layer] if fault.layer else [],
        failures=None,
        timeout=0.5,
        stop_at_first=True,
    )


def diagnoses(examination: Examination) -> list[Diagnosis]:
    """Of every culprit, or of the sum where there is none."""
    return [culprit.diagnosis for culprit in examination.culprits] or [examination.diagnosis]


def found(report: Report) -> list[Diagnosis]:
    return [each for examination, _ in report.examinations for each in diagnoses(examination)]


# Every curated fault.


@pytest.mark.parametrize("fault", NAMED.values(), ids=NAMED)
def test_every_fault_of_a_named_kind_is_named(fault: Fault) -> None:
    named = [each.names for each in found(report_of(fault))]
    assert named
    for names in named:
        assert fault.named in names, names


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in {*NAMED, "hangs"}])
def test_a_fault_of_no_named_kind_is_not_named(name: str) -> None:
    for diagnosis in found(report_of(FAULTS[name])):
        assert not diagnosis
        assert str(diagnosis) == ""


def test_every_hypothesis_is_the_name_of_a_fault() -> None:
    assert {fault.named for fault in NAMED.values()} == NAMES
    assert len(NAMES) > 40


@pytest.mark.parametrize("name", sorted(NAMES))
def test_no_hypothesis_is_stated_of_faults_of_other_kinds(name: str) -> None:
    """But where both give the same numbers: half is 1/N where N = 2, two elements flipped are shifted."""
    same = {
        frozenset(pair)
        for pair in (
            ("factor 2", "factor 1/N too many"),
            ("factor 2", "mask scale missing"),
            ("factor 2", "ddof"),
            ("factor 1/N too many", "mask scale missing"),
            ("factor 1/N too many", "ddof"),
            ("halves exchanged", "flipped"),
            ("halves exchanged", "shifted"),
            ("another activation", "another subgradient"),
        )
    }
    others = [fault for fault in NAMED.values() if fault.named not in (None, name)]
    stated = {fault.named for fault in others for each in found(report_of(fault)) if name in each.names}
    assert {each for each in stated if each and frozenset((each, name)) not in same} == set()


def test_most_faults_get_one_name() -> None:
    alone = [fault for fault in NAMED.values() if all(len(each.names) == 1 for each in found(report_of(fault)))]
    assert len(alone) >= 0.85 * len(NAMED)


def test_advice_is_a_sentence_that_says_what_to_check() -> None:
    advice = [*(each.advice for each in HYPOTHESES.values()), *(text for _, _, text in PATHS)]
    assert len(set(advice)) == len(advice)
    for text in advice:
        assert ": check " in text
        assert 40 <= len(text) <= 130
        assert not text.endswith(".")


def test_covered_hypotheses_exist() -> None:
    assert {name for each in HYPOTHESES.values() for name in each.covers} <= set(HYPOTHESES)
    assert not any(each.name in each.covers for each in HYPOTHESES.values())


# Nothing is named where nothing known is wrong.


@cache
def drawn_of(layer: str) -> Drawn:
    """A network of this layer alone; the first ones drawn are the simplest."""
    drawn: list[Drawn] = []
    draw_each(drawn.append, 3, SEED, [layer], 1)
    return drawn[-1]


FAMILIES = sorted({layer.family for layer in LAYERS.values()})


def results(adapter: Adapter, case: Case) -> dict[str, Any]:
    forward = adapter.forward(case.network, {name: value.copy() for name, value in case.values.items()}, case.dtype)
    return tensors(forward.outputs, adapter.backward(forward, case.cotangent.copy()))


def innocent(case: Case) -> Observation:
    """What the reference gives in the dtype's own arithmetic, as if every tensor that this rounds were wrong."""
    oracle, got = Oracles(case).under({}), results(NumpyReference(), case)
    checks = []
    for right in compare(oracle.expected, got, oracle.samples, case.dtype):
        truth = oracle.expected[right.key]
        error = abs(np.asarray(got[right.key], np.float64) - truth)
        kind = "gradient" if error.any() else None
        checks.append(replace(right, kind=kind, evidence=Evidence(error > 0.0, error, truth)))
    return Observation(case, {}, got, tuple(checks), innocent)


@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_is_taken_for_no_mistake(family: str) -> None:
    for layer in (each for each in LAYERS.values() if each.family == family):
        observation = innocent(drawn_of(layer.name).case("float32"))
        assert not diagnose(observation), layer.name


class Wrong(NumpyReference):
    """The reference, whose gradients for inputs and parameters are random."""

    def backward(self, forward: Forward, cotangent: Array) -> dict[str, Array]:
        right = super().backward(forward, cotangent)
        generator = np.random.default_rng(1)
        output = forward.tape[0].output
        return {
            name: each if name == output else generator.standard_normal(each.shape).astype(each.dtype)
            for name, each in right.items()
        }


@pytest.mark.parametrize("family", FAMILIES)
def test_random_gradients_are_taken_for_no_mistake(family: str) -> None:
    for layer, dtype in zip(LAYERS.values(), cycle(("float64", "float32")), strict=False):
        if layer.family == family:
            examination = examine(Subject(Wrong(), {}), Oracles(drawn_of(layer.name).case(dtype)))
            for culprit in examination.culprits:
                assert not culprit.diagnosis, (layer.name, str(culprit.diagnosis))


# One network.


def node(name: str, layer: str, *inputs: str, parameters: str = "", **options: OptionValue) -> Node:
    pairs = dict(pair.split(":") for pair in parameters.split())
    return Node.of(name, LAYERS[layer], *inputs, parameters=pairs, options=options)


def network(*parts: Input | Node) -> Network:
    inputs = tuple(part for part in parts if isinstance(part, Input))
    return Network(inputs, tuple(part for part in parts if isinstance(part, Node)))


X = Input("x", (3, 5))

CHAIN = network(
    X,
    Input("target", (3, 4)),
    node("line", "linear", "x", parameters="weight:w bias:b", features=4),
    node("bent", "tanh", "line"),
    node("normal", "layer_norm", "bent", parameters="weight:scale bias:shift"),
    node("share", "softmax", "normal", axis=-1),
    node("loss", "mse", "share", "target"),
)

PAIRABLE = (
    "linear_weight_transposed",
    "tanh_derivative_at_input",
    "layer_norm_first_term",
    "softmax_element_by_element",
    "mse_factor_two_missing",
)


def rows_of(*names: str) -> dict[str, Any]:
    """The faulty pairs of functions."""
    return {layer: row for name in names for layer, row in vars(FAULTS[name].make())["_rows"].items()}


def examined(adapter: Adapter, of: Network = CHAIN, dtype: str = "float64") -> Examination:
    case = Drawn(of, seed=11, edge_share=0.0, scale=1.0).case(dtype)
    return examine(Subject(adapter, {}), Oracles(case))


@pytest.mark.parametrize("pair", list(combinations(PAIRABLE, 2)), ids="+".join)
def test_two_faults_at_once_are_both_named(pair: tuple[str, str]) -> None:
    dtype = "float32" if "mse_factor_two_missing" in pair else "float64"
    examination = examined(NumpyReference(rows=rows_of(*pair)), dtype=dtype)
    named = {culprit.node.layer.name: culprit.diagnosis.names for culprit in examination.culprits}
    assert named == {FAULTS[name].layer: (FAULTS[name].named,) for name in pair}


def test_two_mistakes_in_one_layer_are_told_apart() -> None:
    right = LAYERS["linear"]

    def backward(dout: Array, cache: Any) -> dict[str, Array]:
        g = right.backward(dout, cache)
        return {"x": -g["x"], "weight": 2.0 * g["weight"], "bias": -g["bias"]}

    (culprit,) = examined(NumpyReference(rows={"linear": (right.forward, backward)})).culprits
    assert str(culprit.diagnosis) == (
        "x, bias: equals the gradient with the opposite sign: check the sign of the derivative; "
        "weight: equals twice the gradient: check the factor 2, as the derivative of a square has it"
    )
    assert culprit.diagnosis.names == ("sign", "factor 2")


def linear_with(change: Any) -> NumpyReference:
    right = LAYERS["linear"]
    return NumpyReference(
        rows={"linear": (right.forward, lambda dout, cache: change(right.backward(dout, cache), dout))}
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda g, dout: {**g, "weight": g["weight"] / 3.0},
            "equals the gradient times 1/N (N = 3, the batch or the rows): check whether to sum or to average",
        ),
        (
            lambda g, dout: {**g, "bias": dout},
            "equals the cotangent not summed over axis 0: check the sum that makes the bias' gradient",
        ),
        (
            lambda g, dout: {**g, "weight": g["weight"].T},
            "equals the gradient transposed: check the order of its axes",
        ),
    ],
    ids=["factor", "shape", "transposed shape"],
)
def test_what_is_said(change: Any, text: str) -> None:
    examination = examined(linear_with(change))
    assert str(examination.culprits[0].diagnosis) == text
    assert {each.cause for each in disagreements(examination, None) if each.culprit} == {text}


def test_what_is_inherited_has_no_cause() -> None:
    examination = examined(FAULTS["tanh_derivative_at_input"].make())
    causes = {row.verdict: row.cause for row in rows(examination)}
    assert causes["inherited"] is None
    assert causes["agrees"] is None
    assert "at the input: check what is cached" in str(causes["WRONG HERE"])


def test_a_mistake_in_both_passes_is_named() -> None:
    gelu = network(X, node("out", "gelu", "x"))
    other = LAYERS["gelu_tanh"]
    (culprit,) = examined(NumpyReference(rows={"gelu": (other.forward, other.backward)}), gelu).culprits
    assert culprit.diagnosis.names == ("approximate gelu",)
    assert {check.kind for check in culprit.checks} == {None, "value", "gradient"}


def test_the_cotangent_itself_may_be_lost() -> None:
    class Ones(NumpyReference):
        def backward(self, forward: Forward, cotangent: Array) -> dict[str, Array]:
            return super().backward(forward, np.ones_like(cotangent))

    for culprit in examined(Ones()).culprits:
        assert culprit.diagnosis.names == ("cotangent as ones",)


# Sums between layers.

DIAMOND = network(
    X,
    node("a", "tanh", "x"),
    node("b", "sigmoid", "a"),
    node("c", "softplus", "a"),
    node("d", "silu", "a"),
    node("bc", "multiply", "b", "c"),
    node("out", "multiply", "bc", "d"),
)
SHARED = network(
    X,
    node("first", "linear", "x", parameters="weight:w", features=5, use_bias=False),
    node("second", "linear", "first", parameters="weight:w", features=5, use_bias=False),
)
TWICE = network(X, node("square", "multiply", "x", "x"))


class Walk(NumpyReference):
    """Adds up in another way."""

    def __init__(self, add: Any) -> None:
        super().__init__()
        self._add = add

    def add_up(self, name: str, before: Array | None, arriving: Array) -> Array:
        return arriving if before is None else self._add(before, arriving)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("of", "add", "text"),
    [
        (DIAMOND, lambda before, arriving: before, "equals the sum without the part from b (x) and c (x): check"),
        (DIAMOND, lambda before, arriving: arriving, "equals the sum without the part from c (x) and d (x): check"),
        (
            DIAMOND,
            lambda before, arriving: before + 2.0 * arriving,
            "equals the sum with the part from b (x) and c (x) counted",
        ),
        (SHARED, lambda before, arriving: arriving, "equals the sum without the part from second (weight): check"),
        (
            TWICE,
            lambda before, arriving: before + 2.0 * arriving,
            "equals the sum with the part from square (a) counted",
        ),
    ],
    ids=["first kept", "last kept", "doubled", "shared", "twice"],
)
def test_a_path_is_named(of: Network, add: Any, text: str, dtype: str) -> None:
    examination = examined(Walk(add), of, dtype)
    assert examination.culprits == ()
    assert str(examination.diagnosis).startswith(text)
    assert [row.cause for row in rows(examination) if row.verdict == "composition"] == [str(examination.diagnosis)]


def test_another_sum_is_not_named() -> None:
    examination = examined(Walk(lambda before, arriving: before + 1.3 * arriving), DIAMOND)
    assert examination.composition is not None
    assert not examination.diagnosis


# Other numbers.


def test_redrawn_numbers_are_ordinary_and_in_their_domain() -> None:
    for layer in ("bce", "embedding", "batch_norm", "gaussian_nll", "dropout"):
        case = drawn_of(layer).case("float32")
        again = redrawn(case)
        assert again.network == case.network
        assert not np.array_equal(again.cotangent, case.cotangent)
        for name, value in again.values.items():
            assert (value is case.values[name]) == (value.dtype.kind == "i")
            assert np.isfinite(value).all()


class Failing(NumpyReference):
    """Half of every gradient, for so many calls."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self._left = calls

    def backward(self, forward: Forward, cotangent: Array) -> dict[str, Array]:
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("not again")
        right = super().backward(forward, cotangent)
        output = forward.tape[0].output
        return {name: each if name == output else 0.5 * each for name, each in right.items()}


@pytest.mark.parametrize(("calls", "names"), [(100, ("factor 2",)), (4, ())])
def test_an_adapter_that_fails_when_asked_again_is_not_diagnosed(calls: int, names: tuple[str, ...]) -> None:
    (culprit,) = examined(Failing(calls), network(X, node("out", "tanh", "x"))).culprits
    assert culprit.diagnosis.names == names


def test_what_fits_the_case_alone_is_not_stated() -> None:
    """At 0, where tanh has the slope 1, the lost derivative does not show; at one number, any slope is a factor."""
    of = network(Input("x", (1,)), node("out", "elu", "x", alpha=0.5))
    right = LAYERS["elu"]
    flipped = NumpyReference(
        rows={"elu": (right.forward, lambda dout, cache: {"x": -right.backward(dout, cache)["x"]})}
    )
    case = Case(of, "float64", {"x": np.array([-1.0])}, np.array([1.5]))
    (culprit,) = examine(Subject(flipped, {}), Oracles(case)).culprits
    assert culprit.diagnosis.names == ("sign",)
    # alpha = -0.5 gives the same here.
    assert culprit.alone is not None
    unheard = replace(culprit.alone, again=lambda case: culprit.alone)
    assert diagnose(unheard).names == ("another option", "sign")


# Large networks.

LARGE = ("tanh_derivative_at_input", "linear_weight_transposed", "layer_norm_first_term")


class Enough(BaseException):
    """No Exception: that would be a failing example."""


@pytest.mark.parametrize("name", LARGE)
def test_in_networks_of_up_to_30_nodes_the_faulty_layer_alone_is_named(name: str) -> None:
    fault = FAULTS[name]
    sizes: list[int] = []
    named: list[str] = []

    def examine_one(drawn: Drawn) -> None:
        if len(drawn.network.nodes) < 13:
            return
        examination = examine(Subject(fault.make(), {}), Oracles(drawn.case("float64")))
        if examination.agrees:
            return
        sizes.append(len(drawn.network.nodes))
        assert {culprit.node.layer.name for culprit in examination.culprits} == {fault.layer}
        guilty = {culprit.node.name for culprit in examination.culprits}
        assert {row.node for row in rows(examination) if row.culprit} <= guilty
        named.extend(each for culprit in examination.culprits for each in culprit.diagnosis.names)
        if len(sizes) == 2:
            raise Enough

    assert fault.layer
    with suppress(Enough):
        draw_each(examine_one, 200, SEED, [fault.layer], 30)
    assert len(sizes) == 2
    assert named.count(fault.named or "") >= 2


class Kept(NamedTuple):
    x: Array
    count: int


def test_a_cache_with_names_keeps_them_when_an_array_in_it_is_taken_for_another() -> None:
    x = np.ones(2)
    confusing = _confused(lambda x: (x + 1.0, Kept(x, 3)), lambda arrays, out: {id(arrays[0]): out})
    out, cache = confusing(x)
    assert (cache.x is out, cache.count) == (True, 3)


def test_the_faults_of_new_kinds_are_curated_too() -> None:
    assert all(fault.named for fault in KIND_FAULTS)
    assert {fault.name for fault in KIND_FAULTS} <= set(FAULTS)
