"""Architectures by name: what they are made of, and how they are asked for."""

from __future__ import annotations

import numpy as np
import pytest

from gradproof.draw.architectures import ARCHITECTURES, Sketch, drawn_architectures
from gradproof.model.network import NetworkError
from gradproof.reference import LAYERS, NumpyReference
from gradproof.run.check import UsageError, check

WANTED = {
    "lenet5": {"conv2d", "avg_pool2d", "tanh", "linear", "cross_entropy"},
    "resnet_basic": {"conv2d", "batch_norm", "relu", "add"},
    "resnet_bottleneck": {"conv2d", "batch_norm", "relu", "add"},
    "mobilenet_inverted_residual": {"conv2d", "batch_norm", "relu6", "add"},
    "unet_level": {"conv2d", "max_pool2d", "conv_transpose2d", "concatenate"},
    "lstm_ctc_tagger": {"lstm", "ctc"},
    "gru_classifier": {"embedding", "gru", "cross_entropy"},
    "gpt2_block": {"layer_norm", "multi_head_attention", "gelu_tanh", "add"},
    "gpt_tied": {"embedding", "multi_head_attention", "linear", "cross_entropy"},
    "llama_block": {"rms_norm", "rotary", "scaled_dot_product_attention", "swiglu"},
    "vit_block": {"conv2d", "multi_head_attention", "gelu", "concatenate"},
    "variational_autoencoder": {"exp", "multiply", "bce_with_logits"},
    "siamese_triplet": {"linear", "triplet_margin"},
}


def layers_of(architecture: str) -> set[str]:
    return {node.layer.name for node in ARCHITECTURES[architecture]().nodes}


def test_every_architecture_has_the_layers_that_it_is_known_for() -> None:
    assert set(ARCHITECTURES) == set(WANTED)
    assert {
        name: sorted(WANTED[name] - layers_of(name)) for name in WANTED if not WANTED[name] <= layers_of(name)
    } == {}


def test_weights_are_shared_where_the_architecture_shares_them() -> None:
    def uses(name: str, parameter: str) -> int:
        return len(ARCHITECTURES[name]().consumers[parameter])

    assert uses("gpt_tied", "words") == 2
    assert uses("siamese_triplet", "embedding.weight") == 3


def test_the_inverted_residual_convolves_each_channel_alone() -> None:
    network = ARCHITECTURES["mobilenet_inverted_residual"]()
    assert [dict(node.options)["groups"] for node in network.nodes if node.layer.name == "conv2d"] == [1, 9, 1]


def test_architectures_are_taken_in_turn_with_other_numbers_each_time() -> None:
    drawn = list(drawn_architectures(["gpt2_block", "siamese_triplet"], 4, seed=3))
    assert [each.network.nodes[-1].layer.name for each in drawn] == ["add", "triplet_margin"] * 2
    first, second = (each.case("float64").values["x"] for each in drawn[::2])
    assert not np.array_equal(first, second)
    again = next(drawn_architectures(["gpt2_block"], 1, seed=3))
    np.testing.assert_array_equal(again.case("float64").values["x"], first)


def test_a_check_of_an_architecture_examines_that_network() -> None:
    report = check([NumpyReference()], networks=2, seed=1, architectures=["siamese_triplet"], failures=None)
    assert report.agrees
    assert report.networks == 2
    assert set(report.conventions["reference"]["float64"]) <= layers_of("siamese_triplet")


def test_a_fault_in_an_architecture_is_found_and_named() -> None:
    def backward(dout: np.ndarray, cache: object) -> dict[str, np.ndarray]:
        gradients = LAYERS["rotary"].backward(dout, cache)
        return {"x": -gradients["x"]}

    adapter = NumpyReference(rows={"rotary": (LAYERS["rotary"].forward, backward)})
    report = check([adapter], networks=1, seed=1, architectures=["llama_block"], failures=None)
    assert {each.layer for each in report.disagreements if each.culprit} == {"rotary"}


def test_an_unknown_architecture_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(UsageError, match="unknown architecture 'alexnet'; valid architectures: lenet5, "):
        check([NumpyReference()], architectures=["alexnet"])
    with pytest.raises(UsageError, match="layers and architectures cannot both be asked for"):
        check([NumpyReference()], architectures=["lenet5"], layers=["relu"])


def test_a_sketch_refuses_what_a_network_refuses() -> None:
    net = Sketch()
    x = net.input("x", (1, 1, 4))
    with pytest.raises(NetworkError, match=r"node 'conv1d_1' \(conv1d\): option stride=\(0,\): expected"):
        net("conv1d", x, features=1, kernel=(2,), stride=(0,))
