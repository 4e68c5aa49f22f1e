"""Specs: what is written is read back number for number, and every bad spec is refused in one line."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings

from gradproof.draw.drawing import Drawn, drawn_networks
from gradproof.model.case import Case
from gradproof.model.dtypes import VALID_DTYPES, limits
from gradproof.model.layer import UNIT, index_domain
from gradproof.model.network import Input, Network, NetworkError, Node
from gradproof.model.spec import (
    SCHEMA,
    SpecError,
    case_from_json,
    case_to_json,
    load_case,
    network_from_json,
    save_case,
)
from gradproof.reference import LAYERS

LAYER_NAMES = ", ".join(LAYERS)
INPUTS = [
    {"name": "x", "shape": [2, 3], "domain": "real"},
    {"name": "target", "shape": [2], "domain": "index", "classes": 4},
]


def node(name: str, layer: str, *inputs: str, parameters: dict[str, str] | None = None, **options: Any) -> Node:
    return Node.of(name, LAYERS[layer], *inputs, parameters=parameters, options=options)


def classifier(dtype: str = "float64") -> Case:
    """x -> linear -> cross_entropy, with class indices, two parameters, an empty option list and a default."""
    network = Network(
        (Input("x", (2, 3)), Input("target", (2,), index_domain(4))),
        (
            node("logits", "linear", "x", parameters={"weight": "w", "bias": "b"}, features=4),
            node("loss", "cross_entropy", "logits", "target"),
        ),
    )
    values = {
        "x": np.arange(6.0).reshape(2, 3).astype(dtype),
        "target": np.array([0, 3]),
        "w": np.linspace(-1.0, 1.0, 12).reshape(4, 3).astype(dtype),
        "b": np.zeros(4, dtype),
    }
    return Case(network, dtype, values, np.asarray(1.5, dtype), 7)


def every_kind_of_field() -> Drawn:
    """Unit inputs, scalar options (one infinite), a shape option, a shared parameter, fan-out, an input used twice."""
    network = Network(
        (Input("x", (1, 3)), Input("target", (3, 1), UNIT)),
        (
            node("first", "linear", "x", parameters={"weight": "w"}, features=3, use_bias=False),
            node("second", "linear", "first", parameters={"weight": "w"}, features=3, use_bias=False),
            node("square", "multiply", "second", "second"),
            node("sum", "add", "square", "first"),
            node("slope", "leaky_relu", "sum", negative_slope=0.2),
            node("column", "reshape", "slope", shape=(3, 1)),
            node("chance", "sigmoid", "column"),
            node("loss", "bce", "chance", "target", reduction="none"),
            node("worst", "reduce_norm", "loss", p=math.inf),
        ),
    )
    return Drawn(network, seed=11, edge_share=0.2, scale=5.0)


def bits(array: np.ndarray) -> tuple[Any, ...]:
    """Everything that makes two arrays the same, the sign of zero included."""
    return array.dtype.str, array.shape, array.tobytes()


def written(directory: Path, data: Any) -> Path:
    path = directory / "spec.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def refusal(path: Path) -> str:
    """What load_case says of the file, without the path that it starts with."""
    with pytest.raises(SpecError) as caught:
        load_case(path, LAYERS)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


# Round trips.


@pytest.mark.parametrize("dtype", VALID_DTYPES)
@settings(max_examples=25, deadline=None)
@example(every_kind_of_field())
@given(drawn_networks())
def test_a_drawn_case_survives_json(dtype: str, drawn: Drawn) -> None:
    case = drawn.case(dtype)
    again = case_from_json(json.loads(json.dumps(case_to_json(case), allow_nan=False)), LAYERS)
    assert again.network == case.network
    assert (again.dtype, again.seed) == (dtype, drawn.seed)
    assert {name: bits(value) for name, value in again.values.items()} == {
        name: bits(value) for name, value in case.values.items()
    }
    assert bits(again.cotangent) == bits(case.cotangent)


@pytest.mark.parametrize("dtype", VALID_DTYPES)
def test_a_case_survives_its_file(dtype: str, tmp_path: Path) -> None:
    case = classifier(dtype)
    again = load_case(save_case(case, tmp_path, "spec"), LAYERS)
    assert again.network == case.network
    assert [bits(again.values[name]) for name in case.values] == [bits(value) for value in case.values.values()]
    assert bits(again.cotangent) == bits(case.cotangent)
    assert again.values["target"].dtype == np.int64


@pytest.mark.parametrize("dtype", VALID_DTYPES)
def test_awkward_numbers_survive(dtype: str) -> None:
    info = limits(dtype)
    numbers = np.array([-0.0, 0.1, 1e-30, info.smallest_subnormal, info.smallest_normal, info.max, -info.max], dtype)
    network = Network((Input("x", numbers.shape),), (node("y", "tanh", "x"),))
    data = json.loads(json.dumps(case_to_json(Case(network, dtype, {"x": numbers}, numbers))))
    assert bits(case_from_json(data, LAYERS).values["x"]) == bits(numbers)
    assert bits(case_from_json(data, LAYERS).cotangent) == bits(numbers)


def test_a_case_without_a_seed_stays_without_one() -> None:
    case = classifier()
    without = Case(case.network, case.dtype, case.values, case.cotangent)
    assert case_to_json(without)["seed"] is None
    assert case_from_json(case_to_json(without), LAYERS).seed is None


def test_the_fields_of_a_spec() -> None:
    data = case_to_json(classifier())
    assert list(data) == ["schema", "dtype", "seed", "network", "values", "cotangent"]
    assert (data["schema"], data["dtype"], data["seed"], data["cotangent"]) == (SCHEMA, "float64", 7, 1.5)
    assert data["network"] == {
        "inputs": INPUTS,
        "nodes": [
            {
                "name": "logits",
                "layer": "linear",
                "inputs": ["x"],
                "options": {"features": 4, "use_bias": True},
                "parameters": {"weight": "w", "bias": "b"},
            },
            {
                "name": "loss",
                "layer": "cross_entropy",
                "inputs": ["logits", "target"],
                "options": {
                    "targets": "classes",
                    "weighted": False,
                    "label_smoothing": 0.0,
                    "ignore_index": -100,
                    "reduction": "mean",
                },
                "parameters": {},
            },
        ],
    }
    assert data["values"]["target"] == [0, 3]


def test_options_and_parameters_may_be_left_out() -> None:
    data = {"inputs": [{"name": "x", "shape": [2]}], "nodes": [{"name": "y", "layer": "elu", "inputs": ["x"]}]}
    assert network_from_json(data, LAYERS) == Network((Input("x", (2,)),), (node("y", "elu", "x"),))


# Refusals of files.


def test_a_missing_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nothing.json") == "cannot be read: No such file or directory"


def test_a_directory(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "cannot be read: Is a directory"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value: line 1 column 1 (char 0)"),
        ("{'schema': 1}", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ('{"schema": 1', "Expecting ',' delimiter: line 1 column 13 (char 12)"),
    ],
)
def test_no_json(tmp_path: Path, text: str, reason: str) -> None:
    assert refusal(written(tmp_path, text)) == f"not JSON: {reason}"


def test_no_text(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_bytes(b"\xff\xfe\x00")
    assert refusal(path).startswith("not JSON: 'utf-8' codec can't decode byte 0xff")


def test_json_nested_too_deeply(tmp_path: Path) -> None:
    assert refusal(written(tmp_path, "[" * 100_000)).startswith("not JSON: ")


@pytest.mark.parametrize(("data", "kind"), [([], "list"), (None, "NoneType"), (1, "int"), ("spec", "str")])
def test_json_that_is_no_object(tmp_path: Path, data: object, kind: str) -> None:
    assert refusal(written(tmp_path, json.dumps(data))) == f"spec: expected a JSON object, got {kind}"


# Refusals of contents. Each row: the field, what it becomes (GONE: nothing), and what must be said.

GONE = object()

BAD_FIELDS = [
    ("schema", GONE, "spec: 'schema' is missing"),
    ("schema", 2, "spec has schema 2; this version of gradproof reads schema 1"),
    ("schema", "1", "spec: 'schema' must be of type int, got '1'"),
    ("dtype", GONE, "spec: 'dtype' is missing"),
    ("dtype", "float8", "unknown dtype 'float8'; valid dtypes: float64, float32, bfloat16, float16"),
    ("dtype", 64, "spec: 'dtype' must be of type str, got 64"),
    ("network", GONE, "spec: 'network' is missing"),
    ("network", [], "spec: 'network' must be of type dict, got []"),
    ("network.inputs", GONE, "network: 'inputs' is missing"),
    ("network.inputs", {}, "network: 'inputs' must be of type list, got {}"),
    ("network.inputs.0", "x", "an input: expected a JSON object, got str"),
    ("network.inputs.0.name", GONE, "an input: 'name' is missing"),
    ("network.inputs.0.name", 1, "an input: 'name' must be of type str, got 1"),
    ("network.inputs.0.shape", GONE, "input 'x': 'shape' is missing"),
    ("network.inputs.0.shape", 6, "input 'x': 'shape' must be of type list, got 6"),
    ("network.inputs.0.shape", [2, -3], "input 'x': shape [2, -3]: expected a list of sizes, 0 or more"),
    ("network.inputs.0.shape", [2, 3.0], "input 'x': shape [2, 3.0]: expected a list of sizes, 0 or more"),
    ("network.inputs.0.shape", ["2", 3], "input 'x': shape ['2', 3]: expected a list of sizes, 0 or more"),
    (
        "network.inputs.0.domain",
        "complex",
        "input 'x': unknown domain 'complex'; valid domains: real, unit, positive, sign, index",
    ),
    (
        "network.inputs.0.domain",
        None,
        "input 'x': unknown domain None; valid domains: real, unit, positive, sign, index",
    ),
    ("network.inputs.1.classes", GONE, "input 'target': 'classes' is missing"),
    ("network.inputs.1.classes", "4", "input 'target': 'classes' must be of type int, got '4'"),
    ("network.inputs.1.name", "x", "the name 'x' stands for more than one input, node or parameter"),
    ("network.nodes", GONE, "network: 'nodes' is missing"),
    ("network.nodes", [], "a network needs at least one node"),
    ("network.nodes.0", None, "a node: expected a JSON object, got NoneType"),
    ("network.nodes.0.name", GONE, "a node: 'name' is missing"),
    ("network.nodes.0.layer", GONE, "node 'logits': 'layer' is missing"),
    ("network.nodes.0.layer", "dense", f"node 'logits': unknown layer 'dense'; valid layers: {LAYER_NAMES}"),
    ("network.nodes.0.layer", 3, "node 'logits': 'layer' must be of type str, got 3"),
    ("network.nodes.0.inputs", GONE, "node 'logits': 'inputs' is missing"),
    ("network.nodes.0.inputs", "x", "node 'logits': 'inputs' must be of type list, got 'x'"),
    ("network.nodes.0.inputs", ["z"], "node 'logits': its input 'z' is neither an input nor a node"),
    ("network.nodes.0.inputs", ["logits"], "node 'logits' reads its own output, a cycle: logits <- logits"),
    ("network.nodes.0.inputs", ["loss"], "node 'logits' reads its own output, a cycle: logits <- loss <- logits"),
    ("network.nodes.0.inputs", [], "node 'logits' (linear): takes 1 inputs (x), got 0"),
    (
        "network.nodes.1.inputs",
        ["x", "target"],
        "node 'loss' (cross_entropy): its target must hold integers from 0 to 2 or -100, "
        "but 'target' holds integers from 0 to 3",
    ),
    (
        "network.inputs",
        [*INPUTS, {"name": "spare", "shape": [1]}],
        "'spare' does not reach the output 'loss', so it has no gradient",
    ),
    ("network.nodes.0.options", [], "node 'logits': 'options' must be of type dict, got []"),
    (
        "network.nodes.0.options",
        {"width": 4},
        "node 'logits' (linear): unknown option 'width'; valid options: features, use_bias",
    ),
    ("network.nodes.0.options", {}, "node 'logits' (linear): option 'features' must be given"),
    (
        "network.nodes.0.options.features",
        0,
        "node 'logits' (linear): option features=0: expected an integer of at least 1",
    ),
    (
        "network.nodes.1.options.reduction",
        "max",
        "node 'loss' (cross_entropy): option reduction='max': expected one of 'mean', 'none', 'sum'",
    ),
    ("network.nodes.0.parameters", [], "node 'logits': 'parameters' must be of type dict, got []"),
    (
        "network.nodes.0.parameters",
        {"weight": "w"},
        "node 'logits' (linear): needs parameters ['bias', 'weight'], got ['weight']",
    ),
    (
        "network.inputs.1.shape",
        [3],
        "node 'loss' (cross_entropy): a prediction of shape [2, 4] needs a target of shape [2], got [3]",
    ),
    ("values", GONE, "spec: 'values' is missing"),
    ("values", [], "spec: 'values' must be of type dict, got []"),
    ("values.w", GONE, "values: 'w' is missing"),
    ("values.z", [1.0], "values: 'z' is not an input or parameter"),
    ("values.x", [1.0, 2.0, 3.0], "values: 'x' has shape [3], expected [2, 3]"),
    ("values.x", [[1.0, 2.0], [3.0]], "values: 'x' is not an array of numbers"),
    ("values.x", {"0": 1.0}, "values: 'x' is not an array of numbers"),
    ("values.x.0.0", "one", "values: 'x' is not an array of numbers"),
    ("values.target", [0, 4], "values: 'target' holds numbers outside its domain: integers from 0 to 3"),
    ("values.target", [0, -1], "values: 'target' holds numbers outside its domain: integers from 0 to 3"),
    ("cotangent", GONE, "spec: 'cotangent' is missing"),
    ("cotangent", [1.0], "cotangent has shape [1], expected []"),
    ("cotangent", "one", "cotangent is not an array of numbers"),
]


def changed(spec: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """The spec with the field at this dotted path replaced."""
    result = copy.deepcopy(spec)
    *parents, last = [int(key) if key.isdecimal() else key for key in path.split(".")]
    place: Any = result
    for key in parents:
        place = place[key]
    if value is GONE:
        del place[last]
    else:
        place[last] = value
    return result


@pytest.mark.parametrize(("field", "value", "message"), BAD_FIELDS)
def test_a_bad_field_is_refused(tmp_path: Path, field: str, value: object, message: str) -> None:
    assert refusal(written(tmp_path, changed(case_to_json(classifier()), field, value))) == message


NO_NUMBERS = [
    ("values.x.0.0", "1.0"),
    ("values.x.0.0", "nan"),
    ("values.x.0.0", None),
    ("values.x.0.0", True),
    pytest.param("values.x.0.0", 10**400, id="too large for a float"),
    ("values.target.0", 1.5),
    ("values.target.0", "1"),
    pytest.param("values.target.0", 10**30, id="too large for an index"),
    ("cotangent", None),
    ("cotangent", "1.5"),
]


@pytest.mark.parametrize(("field", "value"), NO_NUMBERS)
def test_what_only_looks_like_a_number_is_refused(tmp_path: Path, field: str, value: object) -> None:
    what = "cotangent" if field == "cotangent" else f"values: {field.split('.')[1]!r}"
    message = refusal(written(tmp_path, changed(case_to_json(classifier()), field, value)))
    assert message.startswith(f"{what} is not an array of ")


@pytest.mark.parametrize("value", [1e300, -1e39])
def test_a_number_beyond_the_dtype_is_refused(tmp_path: Path, value: float) -> None:
    data = changed(case_to_json(classifier("float32")), "values.x.0.0", value)
    assert refusal(written(tmp_path, data)).startswith("values: 'x' ")


@pytest.mark.parametrize("field", ["values.x.0.0", "cotangent"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_of_which_nothing_follows_is_refused(tmp_path: Path, field: str, value: float) -> None:
    message = refusal(written(tmp_path, changed(case_to_json(classifier()), field, value)))
    what = "cotangent" if field == "cotangent" else "values: 'x'"
    assert message == f"{what} holds NaN or infinity; of what follows from these nothing can be said"


def test_a_network_that_takes_too_much_memory_is_refused_before_it_is_taken(tmp_path: Path) -> None:
    network = Network(
        (Input("x", (1, 1)),), (node("wide", "broadcast", "x", shape=(2, 2)), node("y", "square", "wide"))
    )
    data = case_to_json(Case(network, "float64", {"x": np.ones((1, 1))}, np.ones((2, 2))))
    data["network"]["nodes"][0]["options"]["shape"] = [100000, 100000]
    message = refusal(written(tmp_path, data))
    assert message == f"'wide' has the shape [100000, 100000], 10000000000 elements; at most {2**24}"


WRONG_TYPES = [
    ("schema", True, "spec: 'schema' must be "),
    ("seed", "seven", "spec: 'seed' must be "),
    ("network.inputs.0.shape", [True, 3], "input 'x': shape [True, 3]: "),
    ("network.inputs.1.classes", True, "input 'target': 'classes' must be "),
    ("network.nodes.0.inputs", [["x"]], "node 'logits'"),
    ("network.nodes.0.inputs", [0], "node 'logits'"),
    ("network.nodes.0.parameters", {"weight": ["w"], "bias": "b"}, "node 'logits'"),
    ("network.nodes.0.parameters", {"weight": 0, "bias": "b"}, "node 'logits'"),
    ("network.nodes.0.options.features", {"size": 4}, "node 'logits'"),
    ("network.nodes.0.options.features", [[4]], "node 'logits'"),
    ("network.nodes.0.options.features", None, "node 'logits'"),
]


@pytest.mark.parametrize(("field", "value", "start"), WRONG_TYPES)
def test_a_field_of_a_wrong_type_is_refused_by_name(tmp_path: Path, field: str, value: object, start: str) -> None:
    assert refusal(written(tmp_path, changed(case_to_json(classifier()), field, value))).startswith(start)


# Refusals of a Case made in Python.


def test_a_case_refuses_an_array_in_another_dtype() -> None:
    case = classifier()
    with pytest.raises(NetworkError, match=r"^values: 'b' is in float32, expected float64$"):
        Case(case.network, case.dtype, {**case.values, "b": np.zeros(4, np.float32)}, case.cotangent)


def test_a_case_refuses_a_cotangent_in_another_dtype() -> None:
    case = classifier()
    with pytest.raises(NetworkError, match=r"^cotangent is in float32, expected float64$"):
        Case(case.network, case.dtype, case.values, case.cotangent.astype(np.float32))


def test_a_case_refuses_numbers_outside_the_unit_interval() -> None:
    network = Network(
        (Input("p", (1,)), Input("t", (1,), UNIT)), (node("s", "sigmoid", "p"), node("l", "bce", "s", "t"))
    )
    with pytest.raises(NetworkError, match=r"^values: 't' holds numbers outside its domain: unit$"):
        Case(network, "float64", {"p": np.zeros(1), "t": np.full(1, 1.5)}, np.asarray(1.0))


def test_exact_values_are_in_float64_and_indices_stay() -> None:
    exact = classifier("float32").exact_values
    assert {name: str(value.dtype) for name, value in exact.items()} == {
        "x": "float64",
        "target": "int64",
        "w": "float64",
        "b": "float64",
    }


# Writing.


def test_saving_makes_the_directory_and_leaves_nothing_else(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "down"
    path = save_case(classifier(), directory, "torch-float64-relu-1-1")
    assert path == directory / "torch-float64-relu-1-1.json"
    assert os.listdir(directory) == ["torch-float64-relu-1-1.json"]


@pytest.mark.parametrize(
    ("name", "file"),
    [("my.adapter-1", "my.adapter-1.json"), ("a/b\\c d:é", "a-b-c-d--.json"), ("../up", "..-up.json")],
)
def test_any_name_becomes_a_file_in_the_directory(tmp_path: Path, name: str, file: str) -> None:
    assert save_case(classifier(), tmp_path, name) == tmp_path / file


def test_saving_again_replaces_the_file_whole(tmp_path: Path) -> None:
    path = save_case(classifier("float64"), tmp_path, "spec")
    with path.open() as reader:
        save_case(classifier("float32"), tmp_path, "spec")
        assert json.load(reader)["dtype"] == "float64"
    assert load_case(path, LAYERS).dtype == "float32"
    assert os.listdir(tmp_path) == ["spec.json"]


def half_a_write(path: Path, text: str, *arguments: Any, **options: Any) -> int:
    with path.open("w") as file:
        file.write(text[: len(text) // 2])
    raise OSError(28, "No space left on device")


def no_replacing(path: Path, target: Path) -> Path:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize(("method", "fails"), [("write_text", half_a_write), ("replace", no_replacing)])
def test_a_failed_write_leaves_the_old_spec_and_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, fails: Callable[..., Any]
) -> None:
    before = save_case(classifier(), tmp_path, "spec").read_bytes()
    monkeypatch.setattr(Path, method, fails)
    with pytest.raises(OSError, match=r"No space left|Input/output"):
        save_case(classifier("float32"), tmp_path, "spec")
    monkeypatch.undo()
    assert (tmp_path / "spec.json").read_bytes() == before
    assert os.listdir(tmp_path) == ["spec.json"]
