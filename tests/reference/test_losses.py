"""What the table-driven proofs of the losses leave out: values by hand, saturation, ignored targets, bad options."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

from gradproof.model.layer import ShapeError
from gradproof.model.network import Input, Network, NetworkError, Node
from gradproof.model.options import Options, Shape
from gradproof.reference import LAYERS

Array = np.ndarray[Any, Any]

WEIGHT = np.array([0.5, 0.0, 2.0])
LOGITS = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [5.0, 1.0, -2.0]])


def run(name: str, *arrays: Any, options: Options | None = None, **optional: Array) -> tuple[Any, dict[str, Array]]:
    """The loss, and its gradients for a cotangent of ones."""
    layer = LAYERS[name]
    completed = layer.complete(options or {})
    passed = {option.name: completed[option.name] for option in layer.options if not option.structural}
    with np.errstate(all="ignore"):
        out, cache = layer.forward(*map(np.asarray, arrays), **optional, **passed)
        return out, layer.backward(np.ones_like(out), cache)


def log_softmax(row: Array) -> Array:
    return np.asarray(row - math.log(np.exp(row).sum()))


@pytest.mark.parametrize(("error", "value", "slope"), [(0.5, 0.125, 0.5), (-2.0, 2.0, -2.0), (3.0, 4.0, 2.0)])
def test_huber_by_hand(error: float, value: float, slope: float) -> None:
    loss, gradients = run("huber", error + 1.0, 1.0, options={"delta": 2.0})
    assert (loss, gradients["x"], gradients["target"]) == (value, slope, -slope)


def test_huber_is_delta_times_smooth_l1() -> None:
    x, target = np.linspace(-4.0, 4.0, 9), np.zeros(9)
    huber, of_huber = run("huber", x, target, options={"delta": 2.0, "reduction": "none"})
    smooth, of_smooth = run("smooth_l1", x, target, options={"beta": 2.0, "reduction": "none"})
    assert_allclose(huber, 2.0 * smooth, rtol=1e-15)
    assert_allclose(of_huber["x"], 2.0 * of_smooth["x"], rtol=1e-15)


def test_smooth_l1_without_a_smooth_part_is_mae() -> None:
    x, target = np.array([1.0, 2.0, -3.0]), np.array([1.0, 1.0, 1.0])
    smooth, of_smooth = run("smooth_l1", x, target, options={"beta": 0.0})
    absolute, of_absolute = run("mae", x, target)
    assert smooth == absolute
    assert of_smooth["x"].tolist() == of_absolute["x"].tolist() == [0.0, 1 / 3, -1 / 3]


@pytest.mark.parametrize("error", [1e-150, 1e-8, 0.1, 0.999999, 1.0, 30.0, 1000.0, 1e300])
def test_log_cosh_keeps_its_digits(error: float) -> None:
    mpmath = pytest.importorskip("mpmath")
    loss, gradients = run("log_cosh", -error, 0.0)
    with mpmath.workdps(500):
        expected = float(mpmath.log(mpmath.cosh(error)))
    assert_allclose(loss, expected, rtol=1e-15)
    assert_allclose(gradients["x"], -math.tanh(error), rtol=1e-15)


@pytest.mark.parametrize(("target", "added"), [(0.0, 0.0), (1.0, 0.0), (4.0, math.log(24.0))])
def test_poisson_nll_adds_the_factorial_by_stirling(target: float, added: float) -> None:
    loss, _ = run("poisson_nll", 0.5, target)
    full, gradients = run("poisson_nll", 0.5, target, options={"full": True})
    assert_allclose(full - loss, added, rtol=0.01)
    assert math.isfinite(gradients["target"])


def test_poisson_nll_of_a_rate_is_that_of_its_logarithm() -> None:
    of_logarithm, _ = run("poisson_nll", math.log(3.0), 2.0)
    of_rate, _ = run("poisson_nll", 3.0, 2.0, options={"log_input": False, "eps": 0.0})
    assert_allclose(of_rate, of_logarithm, rtol=1e-15)


def test_gaussian_nll_is_the_logarithm_of_the_density() -> None:
    loss, _ = run("gaussian_nll", 1.0, 3.0, 4.0, options={"full": True})
    assert_allclose(loss, -math.log(math.exp(-(2.0**2) / 8.0) / math.sqrt(2.0 * math.pi * 4.0)), rtol=1e-15)


@pytest.mark.parametrize("var", [0.5, 0.0])
def test_gaussian_nll_lets_gradients_pass_the_clamp(var: float) -> None:
    """Below eps the gradient is that of eps itself, not 0."""
    _, at_eps = run("gaussian_nll", 1.0, 3.0, 1.0, options={"eps": 1.0})
    _, below = run("gaussian_nll", 1.0, 3.0, var, options={"eps": 1.0})
    assert below["var"] == at_eps["var"] == 0.5 * (1.0 - 4.0)


@pytest.mark.parametrize("shape", [(2, 1), (2,)])
def test_gaussian_nll_shares_a_variance_along_the_last_axis(shape: Shape) -> None:
    x, target, var = np.arange(6.0).reshape(2, 3), np.ones((2, 3)), np.array([0.5, 2.0])
    loss, gradients = run("gaussian_nll", x, target, var.reshape(shape))
    wide, of_wide = run("gaussian_nll", x, target, np.repeat(var, 3).reshape(2, 3))
    assert loss == wide
    assert_allclose(gradients["var"], of_wide["var"].sum(axis=1).reshape(shape), rtol=1e-15)


def test_bce_counts_nothing_without_weight() -> None:
    """An infinite loss with a weight of 0 among others."""
    weight = np.array([0.0, 3.0])
    loss, gradients = run("bce", [0.0, 0.25], [1.0, 0.0], weight=weight, options={"reduction": "sum", "weighted": True})
    assert_allclose(loss, -3.0 * math.log(0.75), rtol=1e-15)
    assert gradients["x"].tolist() == [0.0, 4.0]
    assert_allclose(gradients["target"], [0.0, 3.0 * math.log(3.0)], rtol=1e-15)


def test_positives_weigh_as_if_there_were_more_of_them() -> None:
    x, target, pos_weight = np.array([[0.3, -2.0]]), np.array([[1.0, 0.0]]), np.array([3.0, 7.0])
    loss, gradients = run("bce_with_logits", x, target, pos_weight=pos_weight, options={"reduction": "none"})
    plain, of_plain = run("bce_with_logits", x, target, options={"reduction": "none"})
    assert_allclose(loss, plain * [[3.0, 1.0]], rtol=1e-14)
    assert_allclose(gradients["x"], of_plain["x"] * [[3.0, 1.0]], rtol=1e-14)


@pytest.mark.parametrize("ignored", [-100, 2])
def test_cross_entropy_with_weights_smoothing_and_ignored_targets(ignored: int) -> None:
    """The mean divides by the weights of the targets that count: 0.5 + 0.5, not 3 and not by the ignored one's."""
    target = np.array([0, ignored, 0])
    options: Options = {"label_smoothing": 0.3, "ignore_index": ignored, "weighted": True}
    loss, gradients = run("cross_entropy", LOGITS, target, weight=WEIGHT, options=options)
    rows = [log_softmax(LOGITS[row]) for row in (0, 2)]
    each = [-0.7 * 0.5 * row[0] - 0.1 * (0.5 * row[0] + 2.0 * row[2]) for row in rows]
    assert_allclose(loss, sum(each) / (0.5 + 0.5), rtol=1e-14)
    assert gradients["x"][1].tolist() == [0.0, 0.0, 0.0]
    coefficients = np.array([0.7 * 0.5 + 0.1 * 0.5, 0.0, 0.2])
    assert_allclose(gradients["x"][0], np.exp(rows[0]) * coefficients.sum() - coefficients, rtol=1e-13)


def test_probabilities_are_divided_by_their_number() -> None:
    target = np.eye(3)
    loss, _ = run("cross_entropy", LOGITS, target, weight=WEIGHT, options={"targets": "probabilities"})
    rows = [log_softmax(row) for row in LOGITS]
    assert_allclose(loss, -(0.5 * rows[0][0] + 0.0 * rows[1][1] + 2.0 * rows[2][2]) / 3.0, rtol=1e-14)


@pytest.mark.parametrize("name", ["cross_entropy", "nll"])
def test_where_every_target_is_ignored_the_mean_is_nan_and_the_gradient_zero(name: str) -> None:
    """The mean of nothing has no value, and does not depend on the prediction."""
    loss, gradients = run(name, LOGITS, np.full(3, -100))
    assert math.isnan(loss)
    assert not gradients["x"].any()
    total, _ = run(name, LOGITS, np.full(3, -100), options={"reduction": "sum"})
    assert total == 0.0


def test_impossible_classes_cost_nothing_where_they_are_not_meant() -> None:
    logits = np.array([[1.0, -np.inf, 2.0]])
    loss, gradients = run("cross_entropy", logits, np.array([0]))
    assert_allclose(loss, math.log(1.0 + math.e), rtol=1e-15)
    assert gradients["x"][0, 1] == 0.0


def test_nll_of_log_softmax_is_cross_entropy() -> None:
    target, options = np.array([0, -1, 2]), {"ignore_index": -1}
    rows = np.stack([log_softmax(row) for row in LOGITS])
    nll, gradients = run("nll", rows, target, weight=WEIGHT, options=options)
    entropy, _ = run("cross_entropy", LOGITS, target, weight=WEIGHT, options=options)
    assert_allclose(nll, entropy, rtol=1e-14)
    assert gradients["x"].tolist() == [[-0.2, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, -0.8]]


def test_kl_div_by_hand() -> None:
    p, q = np.array([[0.5, 0.5], [0.0, 1.0]]), np.array([[0.25, 0.75], [0.5, 0.5]])
    each = [0.5 * math.log(2.0), 0.5 * math.log(2.0 / 3.0), 0.0, math.log(2.0)]
    loss, _ = run("kl_div", np.log(q), p, options={"reduction": "none"})
    assert_allclose(loss.ravel(), each, rtol=1e-14)
    for reduction, count in (("sum", 1), ("batchmean", 2), ("mean", 4)):
        reduced, _ = run("kl_div", np.log(q), p, options={"reduction": reduction})
        assert_allclose(reduced, sum(each) / count, rtol=1e-14)
    of_logarithms, _ = run("kl_div", np.log(q[:1]), np.log(p[:1]), options={"log_target": True, "reduction": "sum"})
    assert_allclose(of_logarithms, each[0] + each[1], rtol=1e-14)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("x", [-1000.0, -40.0, 0.0, 0.7, 1000.0])
def test_sigmoid_focal_is_finite_where_it_is_saturated(x: float, target: float, gamma: float) -> None:
    """Compared with the formula in more digits than cancel in it."""
    mpmath = pytest.importorskip("mpmath")
    loss, gradients = run("sigmoid_focal", x, target, options={"gamma": gamma})

    def exact(x: Any, target: Any) -> Any:
        right, balance = 1 / (1 + mpmath.exp(-x)), target / 4 + 3 * (1 - target) / 4
        wrong = right * (1 - target) + (1 - right) * target
        return -balance * wrong**gamma * (target * mpmath.log(right) + (1 - target) * mpmath.log(1 - right))

    with mpmath.workdps(1500):
        tiny = mpmath.mpf(10) ** -900
        at = (mpmath.mpf(x), mpmath.mpf(target))
        wanted = [exact(*at)] + [(exact(at[0] + tiny * i, at[1] + tiny * (1 - i)) - exact(*at)) / tiny for i in (1, 0)]
    for got, want in zip((loss, gradients["x"], gradients["target"]), wanted, strict=True):
        assert_allclose(float(got), float(want), rtol=1e-11, atol=1e-300)


def test_dice_by_hand() -> None:
    x, target = np.array([[1.0, 0.5], [0.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 0.0]])
    loss, _ = run("dice", x, target, options={"reduction": "none", "smooth": 1.0})
    assert loss.tolist() == [1.0 - 3.0 / 3.5, 0.0]
    squared, _ = run("dice", x, target, options={"reduction": "none", "smooth": 1.0, "squared": True})
    assert squared.tolist() == [1.0 - 3.0 / 3.25, 0.0]
    together, _ = run("dice", x, target, options={"axes": 2, "smooth": 1.0})
    assert together == 1.0 - 3.0 / 3.5


def network(name: str, shapes: list[Shape], options: Options) -> Network:
    layer = LAYERS[name]
    complete = layer.complete(options)
    arguments = layer.arguments_for(len(shapes), complete)
    inputs = [
        Input(each.name, shape, each.domain(shapes[0], complete)) for each, shape in zip(arguments, shapes, strict=True)
    ]
    return Network(tuple(inputs), (Node.of("a", layer, *[each.name for each in inputs], options=options),))


@pytest.mark.parametrize(
    ("name", "shapes", "options", "message"),
    [
        ("huber", [(3,), (3,)], {"delta": 0.0}, "option delta=0.0: expected a number from 0.001 to 1000"),
        ("smooth_l1", [(3,), (3,)], {"beta": -1.0}, "option beta=-1.0: expected a number from 0 to 1000"),
        ("bce", [(2, 3), (2, 3), (3,)], {"weighted": True}, "needs a weight of shape [2, 3], got [3]"),
        ("bce_with_logits", [(2, 3), (2, 3), (2,)], {"pos_weighted": True}, "a pos_weight of shape [3], got [2]"),
        ("bce_with_logits", [(2, 3), (2, 3)], {"weighted": True}, "takes 3 inputs (x, target, weight), got 2"),
        ("cross_entropy", [(2, 3), (2,), (2,)], {"weighted": True}, "needs a weight of shape [3], got [2]"),
        ("cross_entropy", [(2, 3), (2,)], {"label_smoothing": 1.5}, "expected a number from 0 to 1"),
        (
            "cross_entropy",
            [(2, 3), (2, 3)],
            {"targets": "probabilities", "ignore_index": 1},
            "ignore_index=1 is for targets that are classes; with targets='probabilities' leave it at -100",
        ),
        ("nll", [(2, 3), (2,)], {"ignore_index": 0.5}, "option ignore_index=0.5: expected an integer"),
        ("nll", [(2, 0), (2,)], {}, "cannot normalise an input of shape [2, 0]: it has no elements"),
        ("kl_div", [(), ()], {}, "needs an input of rank 1 or more, got shape []"),
        ("gaussian_nll", [(2, 3), (2, 3), (3,)], {}, "needs a var of shape [2, 3] or [2, 1] or [2], got [3]"),
        ("sigmoid_focal", [(3,), (3,)], {"gamma": -1.0}, "option gamma=-1.0: expected a number from 0 to 10"),
        ("dice", [(2, 3), (2, 3)], {"axes": 3}, "expected from 1 to 2 trailing axes of an input of shape [2, 3]"),
    ],
)
def test_refused(name: str, shapes: list[Shape], options: Options, message: str) -> None:
    with pytest.raises((NetworkError, ShapeError)) as caught:
        network(name, shapes, options)
    assert message in str(caught.value)
