"""The commands `layers` and `walk`: what they print, and the JSON that they write."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from gradproof.cli import AGREEMENT
from gradproof.draw.examples import EXAMPLES
from gradproof.reference import LAYERS
from helpers.command_line import (
    VERSION,
    Command,
    not_installed,
    refused,
    refused_in_one_line,
    single_spaced,
    valid_json,
)

pytestmark = pytest.mark.usefixtures("workplace")

# layers


def test_layers(gradproof: Command) -> None:
    result = gradproof("layers", "--adapter", "reference", "--adapter", "adapters_here.py:Small", "--json", "l.json")
    assert (result.code, result.err) == (AGREEMENT, "")
    heading, *rows = result.lines
    assert heading == "layer kind family options kinks reference adapters_here.py:Small"
    assert [row.split()[0] for row in rows] == list(LAYERS)
    by_name = {row.split()[0]: row for row in rows}
    assert by_name["tanh"] == "tanh activation activations native native"
    assert by_name["relu"] == "relu activation activations at_zero (0) native not supported"


def test_the_json_of_layers(gradproof: Command) -> None:
    gradproof("layers", "--adapter", "reference", "--adapter", "adapters_here.py:Small", "--json", "layers.json")
    data = valid_json("layers.json")
    assert list(data) == ["schema", "layers"]
    assert data["schema"] == 1
    assert [each["name"] for each in data["layers"]] == list(LAYERS)
    for each in data["layers"]:
        assert list(each) == ["name", "kind", "family", "options", "kinks", "adapters"]
        assert each["kind"] in ("activation", "loss", "layer")
        assert each["adapters"].keys() == {"reference", "adapters_here.py:Small"}
        assert each["adapters"]["reference"] == "native"
    by_name = {each["name"]: each for each in data["layers"]}
    assert by_name["leaky_relu"]["kinks"] == [{"name": "at_zero", "point": 0.0, "valid": [0.0, 1.0]}]
    assert list(by_name["leaky_relu"]["options"]) == ["negative_slope"]
    assert by_name["relu"]["adapters"]["adapters_here.py:Small"] == "not supported"


def test_layers_probes_the_class_of_arithmetic_where_it_is_asked(gradproof: Command) -> None:
    adapter = ("--adapter", "adapters_here.py:LowerPrecision")
    result = gradproof("layers", *adapter, "--arithmetic", "bfloat16", "--json", "layers.json")
    by_name = {row.split()[0]: row for row in result.lines}
    assert by_name["sigmoid"] == "sigmoid activation activations native, every"
    classes = {each["name"]: each["arithmetic"] for each in valid_json("layers.json")["layers"]}
    assert classes.pop("sigmoid") == {"adapters_here.py:LowerPrecision": "every"}
    assert set(map(str, classes.values())) == {"{}"}


def test_layers_tells_why_an_adapter_cannot_be_had(gradproof: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EntryPoint, "load", not_installed)
    monkeypatch.setenv("COLUMNS", "500")
    result = gradproof("layers", "--json", "layers.json")
    assert result.code == AGREEMENT
    reason = "adapter 'torch' needs torch, which is not installed: pip install 'gradproof[torch]'"
    (first, *_) = valid_json("layers.json")["layers"]
    assert first["adapters"]["torch"] == reason
    assert first["adapters"]["reference"] == "native"
    assert result.out.count(reason) == len(LAYERS)


def test_layers_tells_native_from_composed(gradproof: Command) -> None:
    gradproof("layers", "--adapter", "adapters_here.py:Tabled", "--json", "layers.json")
    origins = {
        each["name"]: each["adapters"]["adapters_here.py:Tabled"] for each in valid_json("layers.json")["layers"]
    }
    assert origins.pop("gelu") == "native"
    assert origins.pop("mse") == "composed"
    assert set(origins.values()) == {"no row in the adapter's table"}


# walk


def test_walk(gradproof: Command) -> None:
    result = gradproof("walk", "tanh_2_3_1")
    assert (result.code, result.err) == (AGREEMENT, "")
    assert result.lines[0] == "tanh_2_3_1"
    text = single_spaced(result.out)
    assert text.index("Forward sweep") < text.index("Backward sweep")
    assert "off by" not in text


def test_walk_beside_an_adapter(gradproof: Command) -> None:
    result = gradproof("walk", "tanh_2_3_1", "--adapter", "adapters_here.py:Right", "--json", "walk.json")
    assert result.code == AGREEMENT
    assert "off by: the largest absolute difference from the reference" in result.lines
    walked = valid_json("walk.json")
    assert walked["adapters"] == {"reference": VERSION, "right": VERSION}
    nodes = [node.name for node in EXAMPLES["tanh_2_3_1"].network.nodes]
    assert [step["node"] for step in walked["forward"]] == nodes
    assert [step["node"] for step in walked["backward"]] == nodes[::-1]
    for step in walked["forward"]:
        assert step["values"]["right"] == step["values"]["reference"]
    for step in walked["backward"]:
        assert step["cotangents"]["right"] == step["cotangents"]["reference"]
        assert all(sides["right"] == sides["reference"] for sides in step["parameters"].values())


def test_walk_with_an_adapter_that_lacks_a_layer(gradproof: Command) -> None:
    result = gradproof("walk", "tanh_2_3_1", "--adapter", "adapters_here.py:Small")
    assert refused(
        result,
        "small does not support half_squared_error in float64, which tanh_2_3_1 needs; "
        "walk it with another adapter or dtype",
    )


def test_walk_with_an_adapter_that_crashes(gradproof: Command) -> None:
    result = gradproof("walk", "tanh_2_3_1", "--adapter", "adapters_here.py:NoBackward")
    refused_in_one_line(result, "nobackward", "no backward pass")
