"""Attention and rotary embeddings: values computed by hand, what options amount to, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gradproof.model.network import Input, Network, NetworkError, Node
from gradproof.model.options import Options, Shape
from gradproof.reference import LAYERS

Array = np.ndarray[Any, Any]
LOG3 = math.log(3.0)
TRIANGLE = np.tri(3, 5, dtype=int)


def normal(*shape: int, seed: int = 5) -> Array:
    return np.random.default_rng((seed, *shape)).normal(size=shape)


def attend(q: Array, k: Array, v: Array, **given: Any) -> tuple[Array, dict[str, Array]]:
    """The output, and the gradients for the cotangent cos(out)."""
    layer = LAYERS["scaled_dot_product_attention"]
    out, cache = layer.forward(q, k, v, **{"causal": False, "scale": "default", "groups": 1, **given})
    return out, layer.backward(np.cos(out), cache)


def agree(left: tuple[Array, dict[str, Array]], right: tuple[Array, dict[str, Array]]) -> None:
    np.testing.assert_allclose(left[0], right[0], rtol=1e-12)
    for name in left[1].keys() & right[1].keys():
        np.testing.assert_allclose(left[1][name], right[1][name], rtol=1e-11, atol=1e-14, err_msg=name)


def test_attention_by_hand() -> None:
    """Scores 0 and log 3, so the weights are 1/4 and 3/4."""
    layer = LAYERS["scaled_dot_product_attention"]
    q, k, v = np.array([[2.0]]), np.array([[0.0], [LOG3]]), np.array([[0.0], [1.0]])
    out, cache = layer.forward(q, k, v, causal=False, scale=0.5, groups=1)
    np.testing.assert_allclose(out, [[0.75]], rtol=1e-14)
    got = layer.backward(np.ones((1, 1)), cache)
    wanted = {"q": [[0.5 * LOG3 * 3 / 16]], "k": [[-3 / 16], [3 / 16]], "v": [[1 / 4], [3 / 4]]}
    for name, numbers in wanted.items():
        np.testing.assert_allclose(got[name], numbers, rtol=1e-14, err_msg=name)


def test_the_default_scale_is_one_over_the_root_of_the_features() -> None:
    q, k, v = normal(3, 4), normal(5, 4), normal(5, 2)
    agree(attend(q, k, v), attend(q, k, v, scale=0.5))


def test_causal_allows_query_i_the_keys_up_to_i() -> None:
    q, k, v = normal(3, 2), normal(5, 2), normal(5, 2)
    agree(attend(q, k, v, causal=True), attend(q, k, v, mask=TRIANGLE))
    agree(attend(q, k, v, causal=True), attend(q, k, v, bias=np.where(TRIANGLE, 0.0, -1e4)))
    out, found = attend(q, k, v, causal=True)
    np.testing.assert_allclose(out[0], v[0])
    assert not found["k"][3:].any()
    assert not found["v"][3:].any()


def test_a_query_that_is_allowed_no_key_gives_zero_and_has_no_gradient() -> None:
    q, k, v = normal(2, 3, 2), normal(2, 5, 2), normal(2, 5, 4)
    mask = np.ones((2, 3, 5), int)
    mask[0, 1] = 0
    out, found = attend(q, k, v, mask=mask, bias=normal(3, 5))
    assert not out[0, 1].any()
    assert not found["q"][0, 1].any()
    rest = attend(q[:, ::2], k, v, mask=mask[:, ::2], bias=normal(3, 5)[::2])
    agree((out[1:, ::2], {}), (rest[0][1:], {}))
    agree((out[:1, ::2], {"k": found["k"][:1], "v": found["v"][:1]}), (rest[0][:1], {n: rest[1][n][:1] for n in "kv"}))


def test_hidden_keys_do_not_matter_however_large() -> None:
    q, k, v = normal(3, 2), normal(5, 2), normal(5, 2)
    mask = np.array([1, 1, 0, 1, 0])[None]
    large = np.where(mask.T, k, 1e200)
    with np.errstate(over="raise", invalid="raise"):
        agree((attend(q, large, v, mask=mask)[0], {}), (attend(q, k, v, mask=mask)[0], {}))
        assert np.isfinite(attend(1e3 * q, 1e3 * k, v)[0]).all()


def test_groups_share_heads() -> None:
    q, k, v = normal(2, 4, 3, 2), normal(2, 2, 5, 2), normal(2, 2, 5, 3)
    out, found = attend(q, k, v, groups=2, causal=True)
    repeated, each = attend(q, np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1), causal=True)
    np.testing.assert_array_equal(out, repeated)
    for name in "kv":
        np.testing.assert_allclose(found[name], each[name][:, ::2] + each[name][:, 1::2], rtol=1e-12)


FEATURES = 4


def multi_head(query: Array, heads: int = 2, **given: Any) -> tuple[Array, dict[str, Array]]:
    weights = {
        "in_proj_weight": normal(3 * FEATURES, FEATURES),
        "in_proj_bias": normal(3 * FEATURES),
        "out_proj_weight": normal(FEATURES, FEATURES),
        "out_proj_bias": normal(FEATURES),
    }
    layer = LAYERS["multi_head_attention"]
    out, cache = layer.forward(query, **{"heads": heads, "causal": False, **weights, **given})
    return out, layer.backward(np.cos(out), cache)


def test_a_head_is_attention_between_linear_maps() -> None:
    x, identity = normal(3, FEATURES), np.eye(FEATURES)
    plain = {"in_proj_weight": np.tile(identity, (3, 1)), "out_proj_weight": identity}
    out, found = multi_head(x, 1, **plain, in_proj_bias=None, out_proj_bias=None, causal=True)
    attended, each = attend(x, x, x, causal=True)
    agree((out, found), (attended, {"query": each["q"] + each["k"] + each["v"]}))
    out, _ = multi_head(x, 2, **plain, in_proj_bias=None, out_proj_bias=None)
    np.testing.assert_allclose(out, np.concatenate([attend(h, h, h)[0] for h in (x[:, :2], x[:, 2:])], axis=1))


def test_sources_that_are_not_given_are_the_ones_before() -> None:
    query, memory = normal(3, 2, FEATURES), normal(5, 2, FEATURES)
    (own, alone), (_, separate) = multi_head(query), multi_head(query, key=query, value=query)
    np.testing.assert_allclose(alone["query"], sum(separate[name] for name in ("query", "key", "value")), rtol=1e-12)
    (out, shared), (same, separate) = multi_head(query, key=memory), multi_head(query, key=memory, value=memory)
    np.testing.assert_array_equal(out, same)
    np.testing.assert_allclose(shared["key"], separate["key"] + separate["value"], rtol=1e-12)
    assert own.shape == out.shape == query.shape


def test_weights_apart_are_the_rows_of_the_weights_together() -> None:
    query, memory = normal(3, 2, FEATURES), normal(5, 2, FEATURES)
    apart = dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), np.split(normal(12, 4), 3), strict=True))
    layer = LAYERS["multi_head_attention"]
    options = {"heads": 2, "causal": False, "out_proj_weight": normal(4, 4), "key": memory}
    out, cache = layer.forward(query, **options, **apart)
    together, same = layer.forward(query, **options, in_proj_weight=normal(12, 4))
    np.testing.assert_array_equal(out, together)
    found, whole = layer.backward(np.cos(out), cache), layer.backward(np.cos(out), same)
    np.testing.assert_array_equal(np.concatenate([found[name] for name in apart]), whole["in_proj_weight"])


def test_masks_of_heads_and_padding() -> None:
    query, memory = normal(3, 2, FEATURES), normal(5, 2, FEATURES)
    padding = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    per_head = np.repeat(padding, 2, axis=0)[:, None].repeat(3, axis=1)
    agree(multi_head(query, key=memory, padding=padding), multi_head(query, key=memory, mask=per_head))
    both = multi_head(query, key=memory, padding=padding, mask=TRIANGLE)
    agree(both, multi_head(query, key=memory, mask=per_head * TRIANGLE))
    agree(both, multi_head(query, key=memory, padding=padding, causal=True))
    # The second query of batch 1 sees key 1 alone, the first one none: the output's bias is left.
    np.testing.assert_array_equal(both[0][0, 1], normal(FEATURES))


def rotate(x: Array, axis: int = -2, pairs: str = "half", base: float = 1.0) -> Array:
    out, _ = LAYERS["rotary"].forward(x, axis=axis, pairs=pairs, base=base)
    return np.asarray(out)


def test_rotary_by_hand() -> None:
    x = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    wanted = [[1.0, 0.0], [math.cos(1), math.sin(1)], [-math.sin(2), math.cos(2)]]
    np.testing.assert_allclose(rotate(x), wanted, rtol=1e-15)
    turned = rotate(np.tile([1.0, 1.0, 0.0, 0.0], (2, 1)), base=100.0)  # frequencies 1 and 1 / sqrt(100)
    np.testing.assert_allclose(turned[1], [math.cos(1), math.cos(0.1), math.sin(1), math.sin(0.1)], rtol=1e-15)


def test_rotary_pairs_are_a_matter_of_order() -> None:
    x, order = normal(5, 6), [0, 3, 1, 4, 2, 5]
    np.testing.assert_array_equal(rotate(x, base=50.0)[:, order], rotate(x[:, order], pairs="interleaved", base=50.0))
    np.testing.assert_array_equal(rotate(x[None].swapaxes(0, 1), axis=0)[:, 0], rotate(x))


def test_rotary_scores_depend_on_distance_alone() -> None:
    q, k = (rotate(np.tile(normal(6, seed=seed), (5, 1)), base=50.0) for seed in (1, 2))
    scores = q @ k.T
    np.testing.assert_allclose(scores[:-1, :-1], scores[1:, 1:], rtol=1e-12)


def network(name: str, shapes: dict[str, Shape], options: Options) -> Network:
    layer = LAYERS[name]
    completed = layer.complete(options)
    inputs = tuple(
        Input(argument.name, shape, argument.domain(shape, completed))
        for argument, shape in zip(layer.arguments_for(len(shapes), completed), shapes.values(), strict=True)
    )
    slots = ("in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias") if "heads" in options else ()
    parameters = {slot: slot for slot in slots}
    return Network(inputs, (Node.of("h", layer, *shapes, parameters=parameters, options=options),))


Q, K, V = {"q": (2, 3, 4)}, {"k": (2, 5, 4)}, {"v": (2, 5, 2)}
MASKED: Options = {"mask": "boolean"}
REFUSED: list[tuple[str, dict[str, Shape], Options, str]] = [
    (
        "scaled_dot_product_attention",
        {**Q, "k": (2, 5, 3), **V},
        {},
        r"keys must have shape \[2, S, 4\], got \[2, 5, 3\]",
    ),
    (
        "scaled_dot_product_attention",
        {**Q, **K, "v": (2, 4, 2)},
        {},
        r"values must have shape \[2, 5, V\], got \[2, 4, 2\]",
    ),
    (
        "scaled_dot_product_attention",
        {**Q, "k": (2, 0, 4), "v": (2, 0, 2)},
        {},
        r"cannot attend with keys of shape \[2, 0",
    ),
    (
        "scaled_dot_product_attention",
        {**Q, **K, **V, "mask": (3, 4)},
        MASKED,
        r"must broadcast to \[2, 3, 5\], .*\[3, 4\]",
    ),
    (
        "scaled_dot_product_attention",
        {**Q, **K, **V},
        {"groups": 2},
        "groups=2: expected 1, for .* has no axis of heads",
    ),
    ("scaled_dot_product_attention", {**Q, **K, **V}, {"scale": "none"}, "scale='none': expected \"default\""),
    ("scaled_dot_product_attention", {"q": (1, 3, 2, 2), **K, **V}, {"groups": 2}, "groups=2: expected a divisor of 3"),
    ("multi_head_attention", {"query": (3, 2, 4)}, {"heads": 3}, "heads=3: expected a divisor of 4"),
    (
        "multi_head_attention",
        {"query": (3, 2, 4), "key": (5, 1, 4)},
        {"heads": 2, "attends": "memory"},
        r"keys must have shape \[S, 2, K\], got \[5, 1, 4\]",
    ),
    (
        "multi_head_attention",
        {"query": (3, 2, 4), "mask": (2, 3, 3)},
        {"heads": 2, "mask": "boolean"},
        r"its mask must have shape \[3, 3\] or \[4, 3, 3\], got \[2, 3, 3\]",
    ),
    (
        "multi_head_attention",
        {"query": (3, 2, 4), "padding": (3, 2)},
        {"heads": 2, "padding": True},
        r"its padding must have shape \[2, 3\], got \[3, 2\]",
    ),
    ("rotary", {"x": (3, 5)}, {}, r"needs an even number of them; got shape \[3, 5\]"),
    (
        "rotary",
        {"x": (3, 4)},
        {"axis": 1},
        r"axis=1: expected an axis of an input of shape \[3, 4\] other than its last",
    ),
    ("rotary", {"x": (4,)}, {"axis": -1}, r"needs an input of rank 2 or more, got shape \[4\]"),
]


@pytest.mark.parametrize(("name", "shapes", "options", "message"), REFUSED)
def test_refuses(name: str, shapes: dict[str, Shape], options: Options, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        network(name, shapes, options)


def test_accepts_what_the_refused_ones_miss() -> None:
    assert network("scaled_dot_product_attention", {**Q, **K, **V, "mask": (1, 5)}, MASKED).shapes["h"] == (2, 3, 2)
    shapes = {"query": (3, 2, 4), "mask": (4, 3, 3), "padding": (2, 3)}
    options = {"heads": 2, "mask": "boolean", "padding": True}
    assert network("multi_head_attention", shapes, options).shapes["h"] == (3, 2, 4)
