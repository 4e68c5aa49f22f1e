"""The mistake is named where a known one was made, and only there."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import combinations, count, cycle
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np
import pytest

from gradproof.draw.drawing import Drawn, draw_each
from gradproof.model.adapter import Adapter, Forward
from gradproof.model.case import Case
from gradproof.model.layer import REAL
from gradproof.model.network import Input, Network, Node
from gradproof.model.options import OptionValue
from gradproof.reference import LAYERS, PRECISE, NumpyReference
from gradproof.reference import attention as reference_attention
from gradproof.run.check import check
from gradproof.run.results import Report, disagreements
from gradproof.trust.faults import FAULTS, KERNEL_FAULTS, KIND_FAULTS, Fault
from gradproof.verdict.agreement import Evidence, judge
from gradproof.verdict.diagnosis import PATHS, Diagnosis, Observation, diagnose, redrawn
from gradproof.verdict.equations import Equations
from gradproof.verdict.examination import Examination
from gradproof.verdict.examine import examine
from gradproof.verdict.hypotheses import HYPOTHESES
from gradproof.verdict.judging import Subject
from gradproof.verdict.noise import tensors
from gradproof.verdict.rows import rows

Array = np.ndarray[Any, Any]
BFLOAT16 = ml_dtypes.bfloat16

NAMED = {name: fault for name, fault in FAULTS.items() if fault.named}
NAMES = {*HYPOTHESES, *(name for name, _, _ in PATHS)}
SEED = 7


@cache
def report_of(fault: Fault) -> Report:
    """The first networks of its layer, up to one on which the fault shows.

    Not in a node that reads one tensor twice: all of what it sends there is wrong, and its terms cannot be told apart.
    """
    for seed in count(SEED):
        report = check(
            [fault.make()],
            networks=200,
            seed=seed,
            dtypes=["float64"],
            layers=[fault.layer] if fault.layer else [],
            failures=None,
            timeout=0.5,
            stop_at_first=True,
        )
        guilty = [culprit.node for examination, _ in report.examinations for culprit in examination.culprits]
        if not any(len({source for _, source in node.sources}) < len(node.sources) for node in guilty):
            return report
    raise AssertionError("unreachable")


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
    """But where both give the same numbers: half is 1/N where N = 2, two elements flipped are shifted, a query that
    sees nothing has the gradient 0."""
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
            ("mask missing", "another causal mask"),
            ("zero", "another causal mask"),
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
    got = results(NumpyReference(), case)
    checks = []
    for statement in Equations(case, got, NumpyReference({}, PRECISE), NumpyReference()):
        right, truth = judge(statement, got[statement.key], case.dtype), statement.expected
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
            examination = examine(Subject(Wrong(), {}), drawn_of(layer.name).case(dtype))
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
    return examine(Subject(adapter, {}), case)


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
    assert {check.kind for check in culprit.observation.checks} == {None, "value", "gradient"}


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
    assert examination.unblamed is not None
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


@pytest.mark.parametrize(("calls", "names"), [(100, ("factor 2",)), (2, ())])
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
    (culprit,) = examine(Subject(flipped, {}), case).culprits
    assert culprit.diagnosis.names == ("sign",)
    # alpha = -0.5 gives the same here.
    assert culprit.observation is not None
    unheard = replace(culprit.observation, again=lambda case: culprit.observation)
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
        examination = examine(Subject(fault.make(), {}), drawn.case("float64"))
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


def test_the_faults_of_new_kinds_are_curated_too() -> None:
    for fault in (*KIND_FAULTS, *KERNEL_FAULTS):
        assert fault.named
        assert FAULTS[fault.name] is fault


# What was seen to be wrongly stated.


def alone(layer: str, row: Any, x: list[float], cotangent: list[float], **options: OptionValue) -> Diagnosis:
    """What is said of one layer with this row, on one input."""
    of = network(Input("x", (len(x),)), node("out", layer, "x", **options))
    case = Case(of, "float64", {"x": np.array(x)}, np.array(cotangent))
    (culprit,) = examine(Subject(NumpyReference(rows={layer: row}), {}), case).culprits
    return culprit.diagnosis


def changed_at_zero(layer: str, slope: float) -> Any:
    """The layer's pair, with this slope at 0."""
    forward, backward = LAYERS[layer].forward, LAYERS[layer].backward

    def at_zero(dout: Array, kept: Any) -> dict[str, Array]:
        x, cache = kept
        return {"x": np.where(x == 0.0, slope * dout, backward(dout, cache)["x"])}

    return lambda x, **options: (forward(x, **options)[0], (x, forward(x, **options)[1])), at_zero


@pytest.mark.parametrize("x", [[0.0], [0.0, 0.0], [0.0, 0.0, 1.0, 2.0]], ids=len)
def test_a_wrong_slope_at_a_kink_is_not_taken_for_another_activation(x: list[float]) -> None:
    """0 at 0 is what tanhshrink has, and relu may have, but elsewhere elu is elu."""
    assert not alone("elu", changed_at_zero("elu", 0.0), x, [1.5, 0.25, -2.0, 3.0][: len(x)])


def test_where_a_value_is_infinite_nothing_is_said_of_it() -> None:
    right = LAYERS["softplus"]

    def naive(x: Array, *, beta: float) -> tuple[Array, Any]:
        return np.log(1.0 + np.exp(beta * x)) / beta, right.forward(x, beta=beta)[1]

    assert not alone("softplus", (naive, right.backward), [800.0, -1.0, 900.0], [1.0, -2.0, 3.0])


def test_beside_a_value_that_is_infinite_a_gradient_is_named_with_its_argument() -> None:
    right = LAYERS["softplus"]

    def naive(x: Array, *, beta: float) -> tuple[Array, Any]:
        return np.log(1.0 + np.exp(beta * x)) / beta, right.forward(x, beta=beta)[1]

    row = (naive, lambda dout, cache: {"x": -right.backward(dout, cache)["x"]})
    diagnosis = alone("softplus", row, [800.0, -1.0, 900.0], [1.0, -2.0, 3.0])
    assert str(diagnosis) == "x: equals the gradient with the opposite sign: check the sign of the derivative"


def spoilt_at_zero(layer: str) -> Any:
    """The layer's pair, whose gradient is another one where x is 0."""
    forward, backward = LAYERS[layer].forward, LAYERS[layer].backward

    def at_zero(dout: Array, kept: Any) -> dict[str, Array]:
        x, cache = kept
        return {"x": backward(dout, cache)["x"] + np.where(x == 0.0, 0.375 * dout, 0.0)}

    return lambda x, **options: (forward(x, **options)[0], (x, forward(x, **options)[1])), at_zero


ELEMENTWISE = [
    name
    for name, layer in LAYERS.items()
    if layer.kind == "activation" and len(layer.arguments) == 1 and not layer.parameters([(6,)], layer.defaults)
    if layer.output_shape([(6,)], layer.defaults) == (6,)
    if layer.arguments[0].domain((6,), layer.defaults) == REAL
]


@pytest.mark.parametrize("zeros", [1, 6])
@pytest.mark.parametrize("layer", ELEMENTWISE)
def test_nothing_is_said_of_what_is_wrong_at_zero_alone(layer: str, zeros: int) -> None:
    of = network(Input("x", (6,)), node("out", layer, "x", **LAYERS[layer].defaults))
    case = Case(
        of, "float64", {"x": np.array([0.0] * zeros + [-1.5, 0.75, 2.5, -0.25, 1.25][: 6 - zeros])}, np.arange(1.0, 7.0)
    )
    examination = examine(Subject(NumpyReference(rows={layer: spoilt_at_zero(layer)}), {}), case)
    for culprit in examination.culprits:
        assert set(culprit.diagnosis.names) <= {"another subgradient"}


# What lies around.


class Misreading(NumpyReference):
    """The reference, in which gelu reads the cotangent's memory in a row, whatever its strides are."""

    def row(self, node: Node) -> Any:
        forward, backward = super().row(node)
        return (
            (forward, lambda dout, cache: backward(in_a_row(dout), cache))
            if node.layer.name == "gelu"
            else (forward, backward)
        )


def in_a_row(dout: Array) -> Array:
    """As many elements as there are, from where the first one lies on, in the order of the memory."""
    whole = dout
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    start = (dout.__array_interface__["data"][0] - whole.__array_interface__["data"][0]) // dout.itemsize
    return whole.reshape(-1, order="A")[start : start + dout.size].reshape(dout.shape)


def observed_in(of: Network, name: str, dtype: str = "float64") -> tuple[Observation, dict[str, Array]]:
    """What the misreading reference gives for a node within its network, and the gradients of that network."""
    case = Drawn(of, seed=5, edge_share=0.0, scale=1.0).case(dtype)
    (culprit,) = examine(Subject(Misreading(), {}), case).culprits
    assert culprit.node.name == name
    assert culprit.observation is not None
    return culprit.observation, dict(culprit.around)


BEHIND = {
    "transposed": network(X, node("bent", "gelu", "x"), node("out", "transpose", "bent", axes=(1, 0))),
    "a part": network(
        X, Input("y", (3, 4)), node("bent", "gelu", "x"), node("out", "concatenate", "bent", "y", axis=1)
    ),
}


def test_a_cotangent_that_lies_transposed_is_told_from_its_memory() -> None:
    observation, _ = observed_in(BEHIND["transposed"], "bent")
    diagnosis = diagnose(observation)
    assert diagnosis.names == ("cotangent read as contiguous",)
    assert "its axes lie there in the order 1, 0" in str(diagnosis)


def test_a_cotangent_that_is_a_part_of_a_larger_one_is_told_from_what_is_around() -> None:
    observation, gradients = observed_in(BEHIND["a part"], "bent")
    assert observation.wrong
    assert not diagnose(observation)
    diagnosis = diagnose(observation, {"out": gradients["out"]})
    assert diagnosis.names == ("cotangent read as contiguous",)
    assert "it is a part of the gradient of out" in str(diagnosis)


def test_few_numbers_do_not_tell_how_memory_was_read() -> None:
    """Of two rows and two columns, two elements change places: that may be anything."""
    of = network(Input("x", (2, 2)), node("bent", "gelu", "x"), node("out", "transpose", "bent", axes=(1, 0)))
    observation, _ = observed_in(of, "bent")
    assert len(observation.wrong) == 1
    assert not diagnose(observation)


# Sums, long ones.


def line(rows: int, change: Any, dtype: str = "float64") -> Diagnosis:
    """What is said of a linear layer on so many rows, whose gradients are changed by change(gradients, dout, x)."""
    of = network(Input("x", (rows, 3)), node("out", "linear", "x", parameters="weight:w bias:b", features=2))
    right = LAYERS["linear"]

    def backward(dout: Array, cache: Any) -> dict[str, Array]:
        return change(right.backward(dout, cache[1]), dout, cache[0])

    def forward(x: Array, **others: Array) -> tuple[Array, Any]:
        out, cache = right.forward(x, **others)
        return out, (x, cache)

    case = Drawn(of, seed=3, edge_share=0.0, scale=1.0).case(dtype)
    (culprit,) = examine(Subject(NumpyReference(rows={"linear": (forward, backward)}), {}), case).culprits
    return culprit.diagnosis


def added_up(terms: Array, sums: Any, products: Any) -> Array:
    """One by one, in the dtype of the sums, of terms in the dtype of the products."""
    total = np.zeros(terms.shape[1:], sums)
    for term in terms:
        total = (total + term.astype(products).astype(sums)).astype(sums)
    return total.astype(terms.dtype)


@pytest.mark.parametrize(
    ("dtype", "sums", "products", "told"),
    [
        ("float64", np.float32, np.float64, "float32"),
        ("float64", np.float32, np.float32, "float32"),
        ("float64", np.float16, np.float16, "float16"),
        ("float32", np.float16, np.float32, "float16"),
        ("float32", BFLOAT16, np.float32, "bfloat16"),
        ("float32", BFLOAT16, BFLOAT16, "bfloat16"),
    ],
)
def test_a_running_sum_in_a_lower_precision_is_told_with_its_dtype(
    dtype: str, sums: Any, products: Any, told: str
) -> None:
    def change(g: dict[str, Array], dout: Array, x: Array) -> dict[str, Array]:
        return {**g, "weight": added_up(dout[:, :, None] * x[:, None], sums, products)}

    diagnosis = line(300, change, dtype)
    assert diagnosis.names == ("rounded running sum",)
    assert f"one by one in {told}: check" in str(diagnosis)


def test_a_sum_that_is_rounded_once_is_no_running_sum() -> None:
    diagnosis = line(300, lambda g, dout, x: {**g, "weight": g["weight"].astype(np.float16).astype(np.float64)})
    assert diagnosis.names == ("lower precision",)
    assert "within the rounding of float16" in str(diagnosis)


@pytest.mark.parametrize("block", [8, 16, 32, 64, 128, 256, 1024])
def test_the_last_block_of_a_sum_is_told(block: int) -> None:
    rows = block + 5
    diagnosis = line(rows, lambda g, dout, x: {**g, "weight": dout[block:].T @ x[block:]})
    assert str(diagnosis) == (
        f"equals the gradient from the last 5 of {rows} rows alone: check that blocks of rows add up what they sum"
    )


def test_a_block_from_the_middle_of_a_sum_is_not_named() -> None:
    assert not line(24, lambda g, dout, x: {**g, "weight": dout[8:16].T @ x[8:16]})


def test_a_part_is_told_with_where_it_lies() -> None:
    diagnosis = line(24, lambda g, dout, x: {**g, "x": np.where(np.arange(24)[:, None] < 8, g["x"], 0.0)})
    assert str(diagnosis) == (
        "equals the gradient in 8 of the 24 places along axis 0, from 0 on, and is zero in the rest: "
        "check that every block is computed and written"
    )


def test_a_part_in_the_wrong_size_is_not_named() -> None:
    assert not line(24, lambda g, dout, x: {**g, "x": np.where(np.arange(24)[:, None] < 8, 1.3 * g["x"], 0.0)})


# Attention with its projections.


class WrongWithin(NumpyReference):
    """The reference, in whose multi-head attention the heads' backward pass is a planted fault's."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self._backward = rows_of(fault)["scaled_dot_product_attention"]

    def _within(self, dout: Array, cache: Any, *, rows: Any) -> Any:
        return self._backward[1](dout, cache)

    def row(self, node: Node) -> Any:
        forward, backward = super().row(node)

        def within(*arrays: Array, **others: Any) -> tuple[Array, Any]:
            with patch.object(reference_attention, "scaled_dot_product_attention_forward", self._backward[0]):
                return forward(*arrays, **others)

        def wrong(dout: Array, cache: Any) -> dict[str, Array]:
            with patch.object(reference_attention, "scaled_dot_product_attention_backward", self._within):
                return backward(dout, cache)

        return within, wrong


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("fault", ["attention_row_sums_missing", "attention_strictly_causal", "attention_scale_twice"])
def test_mistakes_within_multi_head_attention_are_named(fault: str, causal: bool) -> None:
    slots = "in_proj_weight:w out_proj_weight:v in_proj_bias:b out_proj_bias:c"
    of = network(
        Input("x", (5, 2, 6)), node("out", "multi_head_attention", "x", parameters=slots, heads=2, causal=causal)
    )
    examination = examined(WrongWithin(fault), of)
    assert [culprit.diagnosis.names for culprit in examination.culprits] == (
        [] if fault == "attention_strictly_causal" and not causal else [(FAULTS[fault].named,)]
    )


def test_what_is_exchanged_is_wrong_on_both_sides() -> None:
    """A value's gradient that is zero is not the key's where the key has its own, which one key alone has: zero."""
    of = network(
        Input("q", (2, 1, 3)),
        Input("k", (2, 1, 3)),
        Input("v", (2, 1, 3)),
        node("out", "scaled_dot_product_attention", "q", "k", "v"),
    )
    right = LAYERS["scaled_dot_product_attention"]
    row = (right.forward, lambda dout, cache: {**right.backward(dout, cache), "v": np.zeros((2, 1, 3))})
    (culprit,) = examined(NumpyReference(rows={"scaled_dot_product_attention": row}), of).culprits
    assert culprit.diagnosis.names == ("zero",)
