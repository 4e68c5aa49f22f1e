"""Products and picked elements: values computed by hand, equal elements, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gradproof.model.case import Case
from gradproof.model.layer import ShapeError, index_domain
from gradproof.model.network import Input, Network, NetworkError, Node
from gradproof.model.options import OptionValue, Shape
from gradproof.reference import LAYERS
from gradproof.reference.linear import Indices, parse_equation

Array = np.ndarray[Any, Any]


def numbers(*each: float) -> Array:
    return np.array(each, np.float64)


def indices(*each: Any) -> Array:
    return np.array(each, np.int64)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape)


def run(name: str, *arrays: Array, dout: Any, **named: Any) -> tuple[Array, dict[str, Array]]:
    """The output, and the gradients for this cotangent."""
    out, cache = LAYERS[name].forward(*arrays, **named)
    return out, LAYERS[name].backward(np.asarray(dout, np.float64), cache)


def equal(got: Any, *wanted: Any) -> None:
    np.testing.assert_allclose(got, wanted[0] if len(wanted) == 1 else wanted, rtol=1e-14, atol=1e-15)


def network(name: str, *shapes: Shape, **options: OptionValue) -> Network:
    """The layer alone, on inputs of these shapes."""
    layer = LAYERS[name]
    completed = layer.complete(options)
    domains = [each.domain(shapes[0], completed) for each in layer.arguments[: len(shapes)]]
    inputs = tuple(Input(f"x{i}", shape, domain) for i, (shape, domain) in enumerate(zip(shapes, domains, strict=True)))
    slots = {slot: slot for slot in layer.parameters([shapes[0]] * len(shapes), completed)}
    node = Node.of("out", layer, *(each.name for each in inputs), parameters=slots, options=options)
    return Network(inputs, (node,))


# Products.


def test_bilinear_by_hand() -> None:
    weight = np.array([[[1.0, 2.0], [3.0, 4.0]]])
    out, gradients = run("bilinear", numbers(1, 10), numbers(5, 7), weight=weight, bias=numbers(0.5), dout=[2.0])
    equal(out, [19 + 430 + 0.5])
    equal(gradients["x1"], [2 * 19, 2 * 43])
    equal(gradients["x2"], [2 * 31, 2 * 42])
    equal(gradients["weight"], [[[10, 14], [100, 140]]])
    equal(gradients["bias"], [2])


def test_bilinear_of_a_one_is_linear() -> None:
    x, weight, dout = normal(4, 3), normal(2, 3, seed=1), normal(4, 2, seed=2)
    linear, expected = run("linear", x, weight=weight, dout=dout)
    out, got = run("bilinear", x, np.ones((4, 1)), weight=weight[..., None], dout=dout)
    equal(out, linear)
    equal(got["x1"], expected["x"])
    equal(got["weight"][..., 0], expected["weight"])


def test_matmul_of_two_vectors_is_their_inner_product() -> None:
    out, gradients = run("matmul", numbers(1, 2), numbers(3, 4), dout=10.0)
    equal(out, 11)
    equal(gradients["a"], [30, 40])
    equal(gradients["b"], [10, 20])


def test_matmul_sums_over_the_stack_that_a_vector_meets() -> None:
    stack = np.array([[[1.0, 2.0]], [[3.0, 4.0]]])
    out, gradients = run("matmul", stack, numbers(5, 6), dout=[[1.0], [10.0]])
    equal(out, [[17], [39]])
    equal(gradients["a"], [[[5, 6]], [[50, 60]]])
    equal(gradients["b"], [31, 42])


def test_matmul_broadcasts_leading_axes() -> None:
    a, b, dout = normal(1, 2, 3), normal(4, 3, 2, seed=1), normal(4, 2, 2, seed=2)
    out, gradients = run("matmul", a, b, dout=dout)
    each = [run("matmul", a[0], b[i], dout=dout[i]) for i in range(4)]
    equal(out, [one for one, _ in each])
    equal(gradients["a"][0], sum(one["a"] for _, one in each))
    equal(gradients["b"], [one["b"] for _, one in each])


def test_einsum_spreads_the_gradient_of_an_index_that_one_operand_sums_alone() -> None:
    a, b = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[10.0, 20.0, 30.0]])
    out, gradients = run("einsum", a, b, equation="ij,kl->il", dout=[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    equal(out, [[30, 60, 90], [70, 140, 210]])
    equal(gradients["a"], [[140, 140], [320, 320]])
    equal(gradients["b"], [[31, 41, 51]])


@pytest.mark.parametrize("equation", ["ij,jk->ik", "ij,jk", " ij , jk -> ik ", "aB,Bc->ac"])
def test_einsum_is_matmul(equation: str) -> None:
    a, b, dout = normal(2, 3), normal(3, 4, seed=1), normal(2, 4, seed=2)
    out, got = run("einsum", a, b, equation=equation, dout=dout)
    expected, gradients = run("matmul", a, b, dout=dout)
    equal(out, expected)
    equal(got["a"], gradients["a"])
    equal(got["b"], gradients["b"])


def test_equations_without_an_output_keep_what_stands_once_in_order() -> None:
    assert parse_equation("ba,cb") == Indices("ba", "cb", "ac")


@pytest.mark.parametrize(
    ("equation", "message"),
    [
        ("ij->ij", "expected two operands, such as 'ij,jk->ik'"),
        ("i,j,k->ijk", "expected two operands"),
        ("i...,j->j", r"an index is one letter, got '\.'"),
        ("i1,j->j", "an index is one letter, got '1'"),
        ("ij,j->i->j", "an index is one letter, got '-'"),
        ("ii,ij->j", "the index 'i' stands twice in 'ii'"),
        ("ij,jk->ii", "the index 'i' stands twice in 'ii'"),
        ("ij,jk->il", "the output's index 'l' is in neither operand"),
        ("ijk,kl->il", r"a has 3 indices, its shape \[2, 3\] has 2 axes"),
        ("ij,j->i", r"b has 1 indices, its shape \[3, 4\] has 2 axes"),
        ("ij,ik->jk", "the index 'i' has length 2 in a, 3 in b"),
    ],
)
def test_wrong_equations_are_refused(equation: str, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        network("einsum", (2, 3), (3, 4), equation=equation)


def test_lengths_of_one_are_not_stretched_in_an_equation() -> None:
    with pytest.raises(NetworkError, match="the index 'j' has length 1 in a, 3 in b"):
        network("einsum", (2, 1), (3, 4), equation="ij,jk->ik")


# Tables.

TABLE = np.array([[1.0, -1.0], [2.0, -2.0], [4.0, -4.0]])


def test_embedding_adds_up_repeated_indices() -> None:
    dout = [[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]]
    out, gradients = run("embedding", indices(2, 0, 2), weight=TABLE, padding_idx=-1, dout=dout)
    equal(out, [[4, -4], [1, -1], [4, -4]])
    equal(gradients["weight"], [[10, 20], [0, 0], [101, 202]])


def test_embedding_looks_the_padding_row_up_and_does_not_train_it() -> None:
    dout = [[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]]
    out, gradients = run("embedding", indices(2, 0, 2), weight=TABLE, padding_idx=2, dout=dout)
    equal(out, [[4, -4], [1, -1], [4, -4]])
    equal(gradients["weight"], [[10, 20], [0, 0], [0, 0]])


def bags(mode: str, **named: Any) -> tuple[Array, Array]:
    """Row 0 is for padding: bags of one other row, of another twice, and of padding alone."""
    dout = [[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]]
    given = indices([0, 1, 0], [2, 0, 2], [0, 0, 0])
    out, gradients = run("embedding_bag", given, weight=TABLE, mode=mode, padding_idx=0, dout=dout, **named)
    return out, gradients["weight"]


@pytest.mark.parametrize(
    ("mode", "second", "last_row"),
    [("sum", [8, -8], [20, 40]), ("mean", [4, -4], [10, 20]), ("max", [4, -4], [10, 20])],
)
def test_embedding_bags_leave_padding_out(mode: str, second: list[float], last_row: list[float]) -> None:
    out, weight = bags(mode)
    equal(out, [[2, -2], second, [0, 0]])
    equal(weight, [[0, 0], [1, 2], last_row])


def test_embedding_bags_sum_with_weights() -> None:
    per_sample_weights = np.array([[3.0, 5.0]])
    named = {"weight": TABLE, "mode": "sum", "padding_idx": -1, "per_sample_weights": per_sample_weights}
    out, gradients = run("embedding_bag", indices([1, 2]), dout=[[1.0, 10.0]], **named)
    equal(out, [[26, -26]])
    equal(gradients["weight"], [[0, 0], [3, 30], [5, 50]])
    equal(gradients["per_sample_weights"], [[2 - 20, 4 - 40]])


def test_the_first_of_equal_largest_rows_in_a_bag_has_the_gradient() -> None:
    weight = np.array([[1.0, 5.0], [3.0, 5.0], [3.0, 5.0]])
    named = {"weight": weight, "mode": "max", "padding_idx": -1}
    _, gradients = run("embedding_bag", indices([2, 0, 1, 2]), dout=[[1.0, 10.0]], **named)
    equal(gradients["weight"], [[0, 0], [0, 0], [1, 10]])
    _, gradients = run("embedding_bag", indices([0, 1, 2]), dout=[[1.0, 10.0]], **named)
    equal(gradients["weight"], [[0, 10], [1, 0], [0, 0]])


# Elements by index and by position.


def test_gather_adds_up_repeated_indices() -> None:
    x = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    out, gradients = run("gather", x, indices([2, 2], [0, 1]), axis=1, dout=[[1.0, 10.0], [100.0, 1000.0]])
    equal(out, [[3, 3], [4, 5]])
    equal(gradients["x"], [[0, 0, 11], [100, 1000, 0]])


def test_gather_broadcasts_beside_the_axis() -> None:
    x = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    out, gradients = run("gather", x, indices([2, 0]), axis=1, dout=[[1.0, 10.0], [100.0, 1000.0]])
    equal(out, [[3, 1], [6, 4]])
    equal(gradients["x"], [[10, 0, 1], [1000, 0, 100]])
    out, gradients = run("gather", x[:1], indices([2], [0]), axis=1, dout=[[1.0], [10.0]])
    equal(out, [[3], [1]])
    equal(gradients["x"], [[10, 0, 1]])


def test_scatter_add_adds_up_repeated_indices() -> None:
    x, source = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[10.0, 100.0, 1000.0]])
    out, gradients = run("scatter_add", x, indices([1, 0, 1]), source, axis=1, dout=[[1.0, 2.0], [3.0, 4.0]])
    equal(out, [[101, 1012], [3, 4]])
    equal(gradients["x"], [[1, 2], [3, 4]])
    equal(gradients["source"], [[2, 1, 2]])


def test_scatter_add_is_the_adjoint_of_gather() -> None:
    x, picked, dout = normal(2, 4), indices([1, 1, 0], [3, 2, 3]), normal(2, 3, seed=1)
    _, gradients = run("gather", x, picked, axis=1, dout=dout)
    out, adjoint = run("scatter_add", np.zeros_like(x), picked, dout, axis=1, dout=x)
    equal(out, gradients["x"])
    equal(adjoint["source"], LAYERS["gather"].forward(x, picked, axis=1)[0])


def test_where_hands_the_gradient_to_what_was_chosen_alone() -> None:
    a, b = numbers(1, np.inf, 3), np.array(7.0)
    out, gradients = run("where", a, b, indices(1, 0, 1), dout=[1.0, 10.0, 100.0])
    equal(out, [1, 7, 3])
    equal(gradients["a"], [1, 0, 100])
    equal(gradients["b"], 10)


@pytest.mark.parametrize(
    ("start", "stop", "step", "taken"),
    [(1, 4, 2, [1, 3]), (-2, 5, 1, [3, 4]), (4, 0, -2, [4, 2]), (2, -6, -1, [2, 1, 0]), (0, 5, 3, [0, 3])],
)
def test_slices(start: int, stop: int, step: int, taken: list[int]) -> None:
    dout = 1.0 + np.arange(len(taken), dtype=float)
    out, gradients = run("slice", np.arange(5.0), axis=0, start=start, stop=stop, step=step, dout=dout)
    equal(out, taken)
    equal(gradients["x"][taken], dout)
    assert gradients["x"].sum() == dout.sum()


def test_uneven_parts() -> None:
    parts = [
        run("split", np.arange(8.0), axis=0, parts=3, index=i, dout=numbers(1, 2, 3)[: 3 - i // 2]) for i in range(3)
    ]
    assert [out.tolist() for out, _ in parts] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [gradients["x"].tolist() for _, gradients in parts] == [
        [1, 2, 3, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 2, 3, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 2],
    ]


# Elements by rank; 0.0 and -0.0 are equal.


@pytest.mark.parametrize(
    ("descending", "wanted", "gradient"),
    [(False, [-1, 0, 0, 2, 2], [8, 2, 1, 16, 4]), (True, [2, 2, 0, 0, -1], [1, 4, 16, 2, 8])],
)
def test_sorting_keeps_equal_elements_in_order(descending: bool, wanted: list[float], gradient: list[float]) -> None:
    x = numbers(2, 0.0, -1, 2, -0.0)
    out, gradients = run("sort", x, axis=0, descending=descending, dout=[1.0, 2.0, 4.0, 8.0, 16.0])
    equal(out, wanted)
    equal(gradients["x"], gradient)


@pytest.mark.parametrize(
    ("k", "largest", "wanted", "gradient"),
    [
        (1, True, [2], [1, 0, 0, 0, 0]),
        (3, True, [2, 2, 0], [1, 4, 0, 2, 0]),
        (2, False, [-1, 0], [0, 2, 1, 0, 0]),
        (3, False, [-1, 0, 0], [0, 2, 1, 0, 4]),
    ],
)
def test_the_first_of_equal_elements_is_picked(
    k: int, largest: bool, wanted: list[float], gradient: list[float]
) -> None:
    x = numbers(2, -0.0, -1, 2, 0.0)
    out, gradients = run("top_k", x, k=k, axis=0, largest=largest, dout=numbers(1, 2, 4)[:k])
    equal(out, wanted)
    equal(gradients["x"], gradient)


@pytest.mark.parametrize(("largest", "wanted"), [(True, [np.nan, 3]), (False, [1, 3])])
def test_nan_counts_as_the_largest(largest: bool, wanted: list[float]) -> None:
    """So it is in torch and JAX; overflow on the way must not exchange what is finite."""
    out, gradients = run("top_k", numbers(1, np.nan, 3), k=2, axis=0, largest=largest, dout=[1.0, 10.0])
    equal(out, wanted)
    equal(gradients["x"], [0, 1, 10] if largest else [1, 0, 10])


# What is refused.

REFUSED: list[tuple[str, tuple[Shape, ...], dict[str, OptionValue], str]] = [
    ("bilinear", ((2, 3), (3, 3)), {"features": 2}, r"same leading axes, got shapes \[2, 3\] and \[3, 3\]"),
    ("bilinear", ((3,), ()), {"features": 2}, "same leading axes"),
    ("matmul", ((2, 3), (2, 3)), {}, r"cannot multiply shapes \[2, 3\] and \[2, 3\]: the last axis of the first"),
    ("matmul", ((3,), (2,)), {}, r"cannot multiply shapes \[3\] and \[2\]"),
    ("matmul", ((2,), ()), {}, r"cannot multiply shapes \[2\] and \[\]"),
    ("matmul", ((), (2,)), {}, "needs an input of rank 1 or more"),
    ("matmul", ((2, 1, 3), (3, 3, 1)), {}, "their leading axes do not broadcast"),
    (
        "embedding",
        ((3,),),
        {"rows": 3, "width": 2, "padding_idx": 3},
        "padding_idx is 3, and the table's last row is 2",
    ),
    ("embedding", ((3,),), {"rows": 3, "width": 2, "padding_idx": -2}, "expected an integer of at least -1"),
    ("embedding", ((3,),), {"rows": 0, "width": 2}, "expected an integer of at least 1"),
    ("embedding_bag", ((3,),), {"rows": 3, "width": 2}, "needs an input of rank 2"),
    ("embedding_bag", ((3, 0),), {"rows": 3, "width": 2}, r"cannot take bags without indices, of shape \[3, 0\]"),
    ("embedding_bag", ((3, 2),) * 2, {"rows": 3, "width": 2, "weighted": True}, "only a sum can be weighted"),
    (
        "embedding_bag",
        ((3, 2), (3,)),
        {"rows": 3, "width": 2, "weighted": True, "mode": "sum"},
        r"must have the indices' shape \[3, 2\], got \[3\]",
    ),
    ("gather", ((2, 3), (3,)), {}, "must have as many axes as"),
    ("gather", ((2, 3), (3, 2)), {}, r"indices of shape \[3, 2\] do not broadcast to an input of shape \[2, 3\]"),
    ("scatter_add", ((2, 3), (2, 4), (2, 3)), {}, r"source must have the indices' shape \[2, 4\], got \[2, 3\]"),
    ("scatter_add", ((2, 3), (3, 3), (3, 3)), {}, r"must be no longer than an input of shape \[2, 3\], but for axis 1"),
    ("where", ((2, 3), (3,), (2,)), {}, "cannot broadcast shapes"),
    ("slice", ((2, 3),), {"start": 3, "stop": 3}, "cannot slice from 3 to 3 along an axis of length 3"),
    ("slice", ((2, 3),), {"stop": 4}, "cannot slice from 0 to 4 along an axis of length 3"),
    ("slice", ((2, 3),), {"start": 2, "stop": 2}, "nothing lies from 2 to 2 in steps of 1"),
    ("slice", ((2, 3),), {"start": 0, "stop": 3, "step": -1}, "nothing lies from 0 to 3 in steps of -1"),
    ("slice", ((2, 3),), {"stop": 3, "step": 0}, "step=0: expected an integer other than 0"),
    ("slice", ((2, 3),), {"stop": 3, "axis": 2}, "axis=2: expected an axis"),
    ("split", ((2, 3),), {"parts": 4, "index": 0}, "there is no part 0 of 4 parts, none empty, of an axis of length 3"),
    ("split", ((2, 3),), {"parts": 2, "index": 2}, "there is no part 2 of 2 parts"),
    ("split", ((2, 3),), {"parts": 0, "index": 0}, "parts=0: expected an integer of at least 1"),
    ("top_k", ((2, 3),), {"k": 4}, "there are no 4 elements along an axis of length 3"),
    ("top_k", ((2, 3),), {"k": 3, "axis": 0}, "there are no 3 elements along an axis of length 2"),
    ("sort", ((),), {}, "needs an input of rank 1 or more"),
]


@pytest.mark.parametrize(("name", "shapes", "options", "message"), REFUSED)
def test_what_does_not_fit_is_refused(
    name: str, shapes: tuple[Shape, ...], options: dict[str, OptionValue], message: str
) -> None:
    with pytest.raises((NetworkError, ShapeError), match=message):
        network(name, *shapes, **options)


@pytest.mark.parametrize("outside", [3, -1])
def test_numbers_out_of_range_are_refused(outside: int) -> None:
    gather = network("gather", (2, 3), (2, 1))
    assert gather.domain("x1") == index_domain(3)
    with pytest.raises(NetworkError, match="'x1' holds numbers outside its domain: integers from 0 to 2"):
        Case(gather, "float64", {"x0": normal(2, 3), "x1": indices([0], [outside])}, normal(2, 1))
