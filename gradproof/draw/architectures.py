"""Architectures that users train, by name: small, with random weights.

Legend: N batch, C channels, H and W height and width, T time steps, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle, islice

import numpy as np

from gradproof.draw.drawing import Drawn
from gradproof.model.layer import REAL, UNIT, Domain, index_domain
from gradproof.model.network import Input, Network, NetworkError, Node
from gradproof.model.options import OptionValue, Shape
from gradproof.reference import LAYERS

SCALE = 0.5
"""The standard deviation of weights and inputs: deep networks neither die out nor overflow."""


class Sketch:
    """A network under construction, node by node."""

    def __init__(self) -> None:
        self._inputs: list[Input] = []
        self._nodes: list[Node] = []
        self._shapes: dict[str, Shape] = {}

    def input(self, name: str, shape: Shape, domain: Domain = REAL) -> str:
        self._inputs.append(Input(name, shape, domain))
        self._shapes[name] = shape
        return name

    def __call__(
        self, layer: str, *sources: str, name: str = "", share: Mapping[str, str] | None = None, **options: OptionValue
    ) -> str:
        """One more node; returns its name. Raises NetworkError where options or shapes do not fit.

        name: by default the layer's and a number. share: slot -> name of its parameter, where it is not the node's own.
        """
        row = LAYERS[layer]
        name = name or f"{layer}_{len(self._nodes) + 1}"
        shapes = [self._shapes[source] for source in sources]
        try:
            completed = row.complete(options, shapes[0])
            self._shapes[name] = row.output_shape(shapes, completed)
        except ValueError as error:
            raise NetworkError(f"node {name!r} ({layer}): {error}") from None
        slots = {slot: f"{name}.{slot}" for slot in row.parameters(shapes, completed)} | dict(share or {})
        self._nodes.append(Node.of(name, row, *sources, parameters=slots, options=completed))
        return name

    def network(self) -> Network:
        return Network(tuple(self._inputs), tuple(self._nodes))


def lenet5() -> Network:
    """LeNet-5 (LeCun et al. 1998): two convolutions with average pooling, three linear layers."""
    net = Sketch()
    h = net.input("x", (2, 1, 12, 12))
    h = net("tanh", net("conv2d", h, features=3, kernel=(5, 5), padding=(2, 2)))
    h = net("avg_pool2d", h, kernel=(2, 2), stride=(2, 2))
    h = net("tanh", net("conv2d", h, features=4, kernel=(5, 5)))
    h = net("flatten", net("avg_pool2d", h, kernel=(2, 2), stride=(2, 2)))
    for features in (8, 6):
        h = net("tanh", net("linear", h, features=features))
    net("cross_entropy", net("linear", h, features=4), net.input("target", (2,), index_domain(4)))
    return net.network()


def _convolved(net: Sketch, x: str, features: int, size: int, stride: int = 1, groups: int = 1) -> str:
    """A convolution that keeps the extent where the stride is 1, and a batch norm."""
    h = net(
        "conv2d",
        x,
        features=features,
        kernel=(size, size),
        stride=(stride, stride),
        padding=(size // 2, size // 2),
        groups=groups,
        use_bias=False,
    )
    return net("batch_norm", h)


def resnet_basic() -> Network:
    """A basic block of a ResNet (He et al. 2016): stride 2, with a projection beside it."""
    net = Sketch()
    x = net.input("x", (2, 3, 6, 5))
    h = net("relu", _convolved(net, x, 4, size=3, stride=2))
    h = _convolved(net, h, 4, size=3)
    net("relu", net("add", h, _convolved(net, x, 4, size=1, stride=2)))
    return net.network()


def resnet_bottleneck() -> Network:
    """A bottleneck block of a ResNet (He et al. 2016): narrow, convolve with stride 2, widen."""
    net = Sketch()
    x = net.input("x", (2, 4, 6, 5))
    h = net("relu", _convolved(net, x, 2, size=1))
    h = net("relu", _convolved(net, h, 2, size=3, stride=2))
    h = _convolved(net, h, 8, size=1)
    net("relu", net("add", h, _convolved(net, x, 8, size=1, stride=2)))
    return net.network()


def mobilenet_inverted_residual() -> Network:
    """An inverted residual of MobileNetV2 (Sandler et al. 2018): widen, convolve each channel alone, narrow."""
    net = Sketch()
    x = net.input("x", (2, 3, 5, 4))
    h = net("relu6", _convolved(net, x, 9, size=1))
    h = net("relu6", _convolved(net, h, 9, size=3, groups=9))
    net("add", _convolved(net, h, 3, size=1), x)
    return net.network()


def unet_level() -> Network:
    """One level of a U-Net (Ronneberger et al. 2015): down, up by a transposed convolution, beside the skip."""
    net = Sketch()

    def convolved(x: str, features: int) -> str:
        return net("relu", net("conv2d", x, features=features, kernel=(3, 3), padding=(1, 1)))

    skip = convolved(net.input("x", (1, 2, 6, 6)), 3)
    h = convolved(net("max_pool2d", skip, kernel=(2, 2), stride=(2, 2)), 6)
    h = net("conv_transpose2d", h, features=3, kernel=(2, 2), stride=(2, 2))
    h = convolved(net("concatenate", skip, h, axis=1), 3)
    h = net("conv2d", h, features=1, kernel=(1, 1))
    net("bce_with_logits", h, net.input("target", (1, 1, 6, 6), UNIT))
    return net.network()


def lstm_ctc_tagger() -> Network:
    """A stacked bidirectional LSTM whose outputs are aligned by CTC (Graves et al. 2006)."""
    net = Sketch()
    h = net("lstm", net.input("x", (5, 2, 3)), hidden=4, layers=2, bidirectional=True)
    logits = net("linear", h, features=4)
    targets = net.input("targets", (2, 2), Domain("index", classes=4, low=1))
    lengths = net.input("input_lengths", (2,), Domain("index", classes=6, low=1))
    net("ctc", logits, targets, lengths, net.input("target_lengths", (2,), index_domain(3)), labels=2)
    return net.network()


def gru_classifier() -> Network:
    """Words, a GRU, and the class that its last state tells."""
    net = Sketch()
    h = net("embedding", net.input("words", (5, 2), index_domain(7)), rows=7, width=3)
    h = net("gru", h, hidden=4, returns="hidden")
    h = net("linear", net("reshape", h, shape=(2, 4)), features=3)
    net("cross_entropy", h, net.input("target", (2,), index_domain(3)))
    return net.network()


def _feed_forward(net: Sketch, x: str, width: int, activation: str) -> str:
    return net("linear", net(activation, net("linear", x, features=4 * width)), features=width)


def _transformer_block(net: Sketch, x: str, width: int, causal: bool, activation: str) -> str:
    """Normalise, attend, add; normalise, feed forward, add. Shapes: x and out (T, N, D)."""
    h = net("layer_norm", x)
    x = net("add", x, net("multi_head_attention", h, heads=2, causal=causal))
    return net("add", x, _feed_forward(net, net("layer_norm", x), width, activation))


def gpt2_block() -> Network:
    """A block of GPT-2 (Radford et al. 2019): causal attention, the tanh form of gelu."""
    net = Sketch()
    _transformer_block(net, net.input("x", (4, 2, 4)), 4, causal=True, activation="gelu_tanh")
    return net.network()


def gpt_tied() -> Network:
    """A two-layer GPT whose embedding is also its output weight (Press and Wolf 2017)."""
    net = Sketch()
    tokens = net("embedding", net.input("tokens", (4, 2), index_domain(7)), rows=7, width=4, share={"weight": "words"})
    places = net("embedding", net.input("places", (4, 1), index_domain(4)), rows=4, width=4)
    h = net("add", tokens, places)
    for _ in range(2):
        h = _transformer_block(net, h, 4, causal=True, activation="gelu_tanh")
    logits = net("linear", net("layer_norm", h), features=7, use_bias=False, share={"weight": "words"})
    net("cross_entropy", logits, net.input("target", (4, 2), index_domain(7)))
    return net.network()


def llama_block() -> Network:
    """A block of Llama 2 (Touvron et al. 2023): RMS norm, rotary embedding, grouped queries, SwiGLU."""
    net = Sketch()
    x = net.input("x", (2, 3, 8))
    h = net("rms_norm", x)

    def heads(count: int, turned: bool) -> str:
        """Shape (N, heads, T, 2)."""
        wide = net("reshape", net("linear", h, features=2 * count, use_bias=False), shape=(2, 3, count, 2))
        apart = net("transpose", wide, axes=(0, 2, 1, 3))
        return net("rotary", apart) if turned else apart

    q, k, v = heads(4, turned=True), heads(2, turned=True), heads(2, turned=False)
    h = net("scaled_dot_product_attention", q, k, v, causal=True, groups=2)
    h = net("reshape", net("transpose", h, axes=(0, 2, 1, 3)), shape=(2, 3, 8))
    x = net("add", x, net("linear", h, features=8, use_bias=False))
    h = net("linear", net("rms_norm", x), features=12, use_bias=False)
    net("add", x, net("linear", net("swiglu", h), features=8, use_bias=False))
    return net.network()


def vit_block() -> Network:
    """Patches, a class token and one block of a vision transformer (Dosovitskiy et al. 2021)."""
    net = Sketch()
    h = net("conv2d", net.input("x", (2, 3, 4, 4)), features=4, kernel=(2, 2), stride=(2, 2))
    patches = net("transpose", net("reshape", h, shape=(2, 4, 4)), axes=(2, 0, 1))
    h = net("concatenate", net.input("class_token", (1, 2, 4)), patches, axis=0)
    h = net("add", h, net.input("places", (5, 1, 4)))
    h = _transformer_block(net, h, 4, causal=False, activation="gelu")
    first = net("reshape", net("slice", net("layer_norm", h), axis=0, start=0, stop=1), shape=(2, 4))
    net("cross_entropy", net("linear", first, features=3), net.input("target", (2,), index_domain(3)))
    return net.network()


def variational_autoencoder() -> Network:
    """A variational autoencoder with its noise given (Kingma and Welling 2014).

    Per example, KL = sum of (mu^2 + sigma^2) / 2 - log sigma, up to a constant; with two latent numbers half the sum of
    squares is their mean.
    """
    net = Sketch()
    x = net.input("x", (3, 5), UNIT)
    h = net("tanh", net("linear", x, features=4))
    mu, log_sigma = net("linear", h, features=2), net("linear", h, features=2)
    sigma = net("exp", log_sigma)
    z = net("add", mu, net("multiply", sigma, net.input("noise", (3, 2))))
    decoded = net("linear", net("tanh", net("linear", z, features=4)), features=5)
    squares = net("add", net("square", mu), net("square", sigma))
    kl = net("subtract", net("reduce_mean", squares), net("reduce_sum", log_sigma))
    net("add", net("bce_with_logits", decoded, x, reduction="sum"), net("reduce_sum", kl))
    return net.network()


def siamese_triplet() -> Network:
    """Three inputs through the same weights, and the triplet loss (Schroff et al. 2015)."""
    net = Sketch()
    hidden = {"weight": "hidden.weight", "bias": "hidden.bias"}
    embedding = {"weight": "embedding.weight", "bias": "embedding.bias"}

    def embedded(name: str) -> str:
        h = net("relu", net("linear", net.input(name, (3, 4)), features=5, share=hidden))
        return net("linear", h, features=3, share=embedding)

    net("triplet_margin", embedded("anchor"), embedded("positive"), embedded("negative"))
    return net.network()


ARCHITECTURES: dict[str, Callable[[], Network]] = {
    build.__name__: build
    for build in (
        *(lenet5, resnet_basic, resnet_bottleneck, mobilenet_inverted_residual, unet_level),
        *(lstm_ctc_tagger, gru_classifier, gpt2_block, gpt_tied, llama_block, vit_block),
        *(variational_autoencoder, siamese_triplet),
    )
}


def drawn_architectures(names: Sequence[str], count: int, seed: int) -> Iterator[Drawn]:
    """The architectures in turn, `count` in all, each with numbers of its own."""
    networks = {name: ARCHITECTURES[name]() for name in names}
    seeds = np.random.SeedSequence(seed).generate_state(count)
    for name, each in zip(islice(cycle(names), count), seeds, strict=True):
        yield Drawn(networks[name], int(each), edge_share=0.0, scale=SCALE)
