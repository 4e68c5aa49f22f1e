"""Margin losses and ctc: values computed by hand and by enumeration, what is degenerate, and what is refused."""

from __future__ import annotations

import math
from itertools import groupby, product
from typing import Any

import numpy as np
import pytest

from gradproof.model.network import Input, Network, NetworkError, Node
from gradproof.model.options import Options, Shape
from gradproof.reference import LAYERS

Array = np.ndarray[Any, Any]
ROOT2, ROOT3 = math.sqrt(2.0), math.sqrt(3.0)


def lose(name: str, *arrays: Any, **given: Any) -> tuple[Array, dict[str, Array]]:
    """The unreduced loss, and the gradients for a cotangent of ones."""
    layer = LAYERS[name]
    structural = {option.name for option in layer.options if option.structural}
    defaults = {key: value for key, value in layer.defaults.items() if key not in structural}
    out, cache = layer.forward(*map(np.asarray, arrays), **{**defaults, "reduction": "none", **given})
    return out, layer.backward(np.ones_like(out), cache)


def check(found: tuple[Array, dict[str, Array]], loss: Any, **gradients: Any) -> None:
    np.testing.assert_allclose(found[0], loss, rtol=1e-13, atol=1e-15)
    for name, numbers in gradients.items():
        np.testing.assert_allclose(found[1][name], numbers, rtol=1e-13, atol=1e-15, err_msg=name)


def test_binary_hinges_by_hand() -> None:
    x, target = [0.25, -3.0, 2.0], [1.0, 1.0, -1.0]
    check(lose("hinge", x, target), [0.75, 4.0, 3.0], x=[-1.0, -1.0, 1.0], target=[-0.25, 3.0, -2.0])
    check(lose("squared_hinge", x, target), [0.5625, 16.0, 9.0], x=[-1.5, -8.0, 6.0])
    check(lose("hinge", [1.5, -1.5], [1.0, -1.0]), [0.0, 0.0], x=[0.0, 0.0], target=[0.0, 0.0])


def test_labelled_hinges_by_hand() -> None:
    check(lose("hinge_embedding", [0.25, 0.25, 3.0], [1, -1, -1], margin=0.5), [0.25, 0.25, 0.0], x=[1.0, -1.0, 0.0])
    found = lose("margin_ranking", [1.0, 1.0, 0.0], [0.5, 0.5, 3.0], [1, -1, -1], margin=0.75)
    check(found, [0.25, 1.25, 0.0], x1=[-1.0, 1.0, 0.0], x2=[1.0, -1.0, 0.0])


def test_soft_margin_stays_finite() -> None:
    check(lose("soft_margin", [-1e3, 1e3, 0.0], [1.0, 1.0, -1.0]), [1e3, 0.0, math.log(2.0)], x=[-1.0, 0.0, 0.5])


def test_multi_margin_by_hand() -> None:
    x, target, weight = [[0.5, 0.0, 2.0]], [0], np.array([3.0, 5.0, 7.0])
    check(lose("multi_margin", x, target), [3.0 / 3], x=[[-2 / 3, 1 / 3, 1 / 3]])
    check(lose("multi_margin", x, target, weight=weight), [3.0], x=[[-2.0, 1.0, 1.0]])
    check(lose("multi_margin", x, target, p=2, margin=0.5), [4.0 / 3], x=[[-4 / 3, 0.0, 4 / 3]])
    check(lose("multi_margin", [[4.0]], [0]), [0.0], x=[[0.0]])


def test_multilabel_margin_reads_the_classes_before_the_first_end() -> None:
    x = [0.5, 0.0, 1.0]
    check(lose("multilabel_margin", x, [0, -1, 2]), (0.5 + 1.5) / 3, x=[-2 / 3, 1 / 3, 1 / 3])
    check(lose("multilabel_margin", x, [0, 2, -1]), 0.5 / 3, x=[-1 / 3, 1 / 3, 0.0])
    check(lose("multilabel_margin", x, [0, 0, -1]), 4.0 / 3, x=[-4 / 3, 2 / 3, 2 / 3])
    check(lose("multilabel_margin", x, [-1, 0, 1]), 0.0, x=[0.0, 0.0, 0.0])
    check(lose("multilabel_margin", x, [2, 0, 1]), 0.0, x=[0.0, 0.0, 0.0])


def test_multilabel_soft_margin_is_a_mean_of_binary_losses() -> None:
    x, target, weight = np.array([[1.0, -50.0]]), np.array([[0.25, 1.0]]), np.array([2.0, 0.5])
    each, slopes = lose("bce_with_logits", x, target)
    found = lose("multilabel_soft_margin", x, target, weight=weight)
    check(found, (each * weight).mean(axis=-1), x=slopes["x"] * weight / 2, target=slopes["target"] * weight / 2)


def test_cosine_embedding_by_hand() -> None:
    a, b = [[3.0, 4.0]] * 2, [[0.0, 2.0], [0.0, 2.0]]
    (alike, apart), gradients = lose("cosine_embedding", a, b, [1, -1], margin=0.5)
    assert (alike, apart) == (pytest.approx(0.2, abs=1e-12), pytest.approx(0.3, abs=1e-12))
    towards = np.array([-0.48, 0.36]) / 5  # (b / |b| - 0.8 a / |a|) / |a|
    np.testing.assert_allclose(gradients["x1"], [-towards, towards], atol=1e-12)


def test_cosine_embedding_of_a_zero_vector_is_orthogonal_to_all() -> None:
    (loss,), gradients = lose("cosine_embedding", [[0.0, 0.0]], [[3.0, 4.0]], [1])
    assert loss == 1.0
    np.testing.assert_allclose(gradients["x1"], [[-6e5, -8e5]], rtol=1e-8)
    np.testing.assert_array_equal(gradients["x2"], [[0.0, 0.0]])
    check(lose("cosine_embedding", [[0.0, 0.0]], [[0.0, 0.0]], [1]), [1.0], x1=[[0.0, 0.0]], x2=[[0.0, 0.0]])


def test_cosine_embedding_does_not_overflow() -> None:
    (loss,), gradients = lose("cosine_embedding", [[1e200, 0.0]], [[1e200, 1e200]], [1])
    assert loss == pytest.approx(1.0 - 1.0 / ROOT2)
    np.testing.assert_allclose(gradients["x1"], [[0.0, -1e-200 / ROOT2]], atol=1e-215)


@pytest.mark.parametrize(("p", "distance"), [(1.0, 3.0), (2.0, math.sqrt(5.0)), (3.0, 9.0 ** (1 / 3))])
def test_triplet_margin_by_hand(p: float, distance: float) -> None:
    anchor, positive, negative = [0.0, 0.0], [0.0, 0.5], [-1.0, 2.0]
    loss, gradients = lose("triplet_margin", anchor, positive, negative, p=p, margin=4.0, eps=0.0)
    assert loss == pytest.approx(4.0 + 0.5 - distance, rel=1e-14)
    slope = np.array([1.0, -1.0]) * (np.array([1.0, 2.0]) / distance) ** (p - 1)
    np.testing.assert_allclose(gradients["negative"], slope, rtol=1e-13)
    np.testing.assert_allclose(gradients["positive"], [0.0, 1.0], atol=1e-15)
    np.testing.assert_allclose(gradients["anchor"], np.array([0.0, -1.0]) - slope, rtol=1e-13)


def test_triplet_margin_where_points_coincide() -> None:
    """A distance of 0 is eps times the root of the dimension, with a direction; without eps it has none."""
    point, far = [1.0, 2.0, 3.0], [1.0, 2.0, 9.0]
    loss, gradients = lose("triplet_margin", point, point, far, margin=10.0)
    assert loss == pytest.approx(10.0 + 1e-6 * ROOT3 - (6.0 - 1e-6), abs=1e-11)
    np.testing.assert_allclose(gradients["positive"], [-1.0 / ROOT3] * 3, rtol=1e-9)
    check(lose("triplet_margin", point, point, far, margin=10.0, eps=0.0), 4.0, positive=[0.0] * 3)


def test_triplet_margin_swaps_to_the_nearer_and_shares_where_both_are_as_near() -> None:
    def gradients(anchor: float, positive: float) -> list[float]:
        found = lose("triplet_margin", [anchor], [positive], [4.0], margin=10.0, swap=True)[1]
        return [float(found[name][0]) for name in ("anchor", "positive", "negative")]

    assert gradients(0.0, 1.0) == [-1.0, 2.0, -1.0]
    assert gradients(1.0, 0.0) == [2.0, -1.0, -1.0]
    assert gradients(1.0, 1.0) == [1.5, -0.5, -1.0]


def test_triplet_margin_does_not_overflow() -> None:
    loss, gradients = lose("triplet_margin", [1e200, 0.0], [0.0, 1e200], [0.0, 0.0], p=3.0)
    assert loss == pytest.approx(1e200 * (2.0 ** (1 / 3) - 1.0), rel=1e-13)
    np.testing.assert_allclose(gradients["positive"], [-(2.0 ** (-2 / 3)), 2.0 ** (-2 / 3)], rtol=1e-13)


def test_what_overflowed_before_has_no_slope() -> None:
    assert np.isnan(lose("hinge", [math.nan], [1.0])[1]["x"]).all()
    assert np.isnan(lose("margin_ranking", [math.nan], [1.0], [1])[1]["x2"]).all()


def probability(probabilities: Array, target: list[int], blank: int) -> float:
    """The summed probability of all labellings of the time steps that read as the target."""
    return sum(
        math.prod(probabilities[time, label] for time, label in enumerate(labels))
        for labels in product(range(probabilities.shape[1]), repeat=len(probabilities))
        if [label for label, _ in groupby(labels) if label != blank] == target
    )


@pytest.mark.parametrize("blank", [0, 1, 2])
@pytest.mark.parametrize("repeated", [False, True])
def test_ctc_sums_over_all_labellings(blank: int, repeated: bool) -> None:
    logits = np.random.default_rng(3).normal(size=(5, 4, 3))
    first, second = (label for label in range(3) if label != blank)
    targets = np.array([[first, first if repeated else second, second]] * 4)
    input_lengths, target_lengths = np.array([5, 4, 3, 1]), np.array([3, 2, 1, 0])
    loss, gradients = lose("ctc", logits, targets, input_lengths, target_lengths, blank=blank)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    for i, (time, labels) in enumerate(zip(input_lengths, target_lengths, strict=True)):
        wanted = -math.log(probability(probabilities[:time, i], list(targets[i, :labels]), blank))
        assert loss[i] == pytest.approx(wanted, rel=1e-13)
        assert not gradients["logits"][time:, i].any()
    np.testing.assert_allclose(gradients["logits"].sum(axis=-1), 0.0, atol=1e-14)


def test_ctc_without_any_path() -> None:
    """Two equal labels need three time steps; the other sequence is none the worse."""
    logits, targets = np.zeros((2, 2, 2)), np.array([[1, 1], [1, 1]])
    lengths = np.array([2, 2]), np.array([2, 1])
    loss, gradients = lose("ctc", logits, targets, *lengths)
    assert loss[0] == math.inf
    assert np.isnan(gradients["logits"][:, 0]).all()
    zeroed, without = lose("ctc", logits, targets, *lengths, zero_infinity=True)
    assert zeroed[0] == 0.0
    assert not without["logits"][:, 0].any()
    for other, slopes in ((loss[1], gradients), (zeroed[1], without)):
        assert other == pytest.approx(-math.log(3 / 4))
        np.testing.assert_allclose(slopes["logits"][:, 1], [[1 / 6, -1 / 6]] * 2, rtol=1e-13)


def test_ctc_stays_finite_where_probabilities_underflow() -> None:
    logits = np.array([[[1000.0, -1000.0]], [[1000.0, 0.0]]])
    found = lose("ctc", logits, [[1]], [2], [1])
    check(found, [1000.0], logits=[[[0.0, 0.0]], [[1.0, -1.0]]])


def test_ctc_averages_over_labels_before_sequences() -> None:
    logits = np.random.default_rng(4).normal(size=(4, 2, 3))
    arrays = logits, np.array([[1, 2], [2, 1]]), np.array([4, 3]), np.array([2, 0])
    each, slopes = lose("ctc", *arrays)
    check(lose("ctc", *arrays, reduction="sum"), each.sum(), logits=slopes["logits"])
    share = np.array([1 / 4, 1 / 2])
    check(lose("ctc", *arrays, reduction="mean"), each @ share, logits=slopes["logits"] * share[:, None])


PAIR = ((2, 3), (2, 3))
REFUSED: list[tuple[str, tuple[Shape, ...], Options, str]] = [
    ("hinge", ((2, 3), (3,)), {}, r"its target must have shape \[2, 3\], got \[3\]"),
    ("multi_margin", ((2, 3), (3,)), {}, r"its target must have shape \[2\], got \[3\]"),
    ("multi_margin", ((2, 3), (2,), (2,)), {"weighted": True}, r"its weight must have shape \[3\], got \[2\]"),
    ("multi_margin", ((2, 3), (2,)), {"weighted": True}, r"takes 3 inputs \(x, target, weight\), got 2"),
    ("multi_margin", ((2, 0), (2,)), {}, r"needs rows of at least 1 number, got an input of shape \[2, 0\]"),
    ("multi_margin", ((1, 2, 3), (1, 2)), {}, r"needs an input of rank 1 to 2, got shape \[1, 2, 3\]"),
    ("multi_margin", ((2, 3), (2,)), {"p": 3}, "option p=3: expected one of 1, 2"),
    ("multilabel_margin", ((2, 3), (2,)), {}, r"its target must have shape \[2, 3\], got \[2\]"),
    ("margin_ranking", (*PAIR, (2,)), {}, r"its target must have shape \[2, 3\], got \[2\]"),
    (
        "margin_ranking",
        (*PAIR, (2, 3)),
        {"margin": math.nan},
        "option margin=nan: expected a number from -1000 to 1000",
    ),
    ("cosine_embedding", (*PAIR, (2, 3)), {}, r"its target must have shape \[2\], got \[2, 3\]"),
    ("cosine_embedding", (*PAIR, (2,)), {"margin": 1.5}, "option margin=1.5: expected a number from -1 to 1"),
    ("triplet_margin", (*PAIR, (1, 3)), {}, r"its negative must have shape \[2, 3\], got \[1, 3\]"),
    ("triplet_margin", (*PAIR, (2, 3)), {"margin": 0.0}, "option margin=0.0: expected a number from 1e-06 to 1000"),
    ("triplet_margin", (*PAIR, (2, 3)), {"p": 0.5}, "option p=0.5: expected a number from 1 to 100"),
    ("triplet_margin", (*PAIR, (2, 3)), {"eps": -1e-6}, "option eps=-1e-06: expected a number from 0 to 1"),
    ("ctc", ((4, 2, 3), (2, 3), (2,), (2,)), {"labels": 2}, r"need targets of shape \[2, 2\], got \[2, 3\]"),
    ("ctc", ((4, 2, 3), (2, 2), (3,), (2,)), {"labels": 2}, r"need input_lengths of shape \[2\], got \[3\]"),
    ("ctc", ((4, 2, 1), (2, 2), (2,), (2,)), {"labels": 2}, r"a sequence and 2 classes, got shape \[4, 2, 1\]"),
    ("ctc", ((4, 2, 3), (2, 0), (2,), (2,)), {"labels": 0}, "option labels=0: expected an integer of at least 1"),
    ("ctc", ((4, 2, 3), (2, 2), (2,), (2,)), {"labels": 2, "blank": 3}, r"option blank=3: expected a class .* 0 to 2"),
]


@pytest.mark.parametrize(("name", "shapes", "options", "message"), REFUSED)
def test_a_network_refuses(name: str, shapes: tuple[Shape, ...], options: Options, message: str) -> None:
    layer = LAYERS[name]
    arguments = [each for each in layer.arguments if each.when is None or each.when(layer.defaults | dict(options))]
    first = shapes[0]
    chosen = layer.defaults | dict(options)
    inputs = tuple(
        Input(argument.name, shape, argument.domain(first, chosen))
        for argument, shape in zip(arguments, shapes, strict=False)
    )
    with pytest.raises(NetworkError, match=message):
        _ = Network(inputs, (Node.of("loss", layer, *(each.name for each in inputs), options=options),)).shapes


def test_a_target_of_ctc_may_not_hold_the_blank() -> None:
    arguments, shapes = LAYERS["ctc"].arguments, ((4, 2, 3), (2, 2), (2,), (2,))
    domains = [each.domain(shapes[0], {"labels": 2, "blank": 1}) for each in arguments]
    inputs = tuple(Input(a.name, s, d) for a, s, d in zip(arguments, shapes, domains, strict=True))
    assert domains[1].integers == (0, 2)
    with pytest.raises(NetworkError, match="its targets must hold integers from 1 to 2, but 'targets' holds"):
        Network(inputs, (Node.of("loss", LAYERS["ctc"], *(each.name for each in inputs), options={"labels": 2}),))
