"""The local equations of a run: what each tensor must be, given the numbers that the adapter itself had.

Backpropagation is a set of local equations. A node's value is its layer's function of what the node reads; a tensor's
gradient is the sum, over the nodes that read it, of their vector-Jacobian products with the gradients of their
outputs. Where every equation holds to within the rounding of one layer, the whole sweep is right, by induction from
the given inputs and the given cotangent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gradproof.model.case import Case, upcast
from gradproof.model.dtypes import HALF, is_floating
from gradproof.model.network import Network, NetworkError, Node
from gradproof.model.tensors import Role, Tensor, gradient_of, value_of
from gradproof.reference import NumpyReference
from gradproof.reference.algorithms import Algorithm
from gradproof.verdict.noise import Rounding, observe, rounded_inside

Array = np.ndarray[Any, Any]
Terms = Mapping[str, Array]
"""Argument -> what a node sends back to the tensor that it reads there."""

Held = Callable[[Tensor, int], Array | None]
"""What an adapter may have held of a tensor, in the run of that number, in place of what it gave of it; None of what it
was given itself."""


@dataclass(frozen=True)
class Arithmetic:
    """What a layer rounds, and to which dtype, when it computes in a coarse one.

    name: "inside" where it computes in float32 or wider and rounds each result once; "stored" where what forward hands
    to backward is rounded too; "every" where every operation rounds. In float64 and float32 every operation rounds to
    the dtype itself, whichever the class.
    """

    name: str

    def operations(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """The dtype to which single operations round."""
        return np.dtype("float32") if self.name != "every" and dtype.name in HALF else dtype


INSIDE, STORED, EVERY = Arithmetic("inside"), Arithmetic("stored"), Arithmetic("every")
ARITHMETICS = {each.name: each for each in (INSIDE, STORED, EVERY)}
"""Name -> class of arithmetic, the finest first."""


PEAK = 4.0
"""How many mean deviations the largest of many deviations may be; of normally distributed errors it is about 3."""


@dataclass(frozen=True, eq=False)
class Floor:
    """How far rounding can move the numbers of one tensor.

    spread: mean absolute deviation of the perturbed runs, or a quarter of the largest one where errors are so unevenly
        distributed that this is more. lost: where some run left the arithmetic's range.
    """

    spread: Array
    lost: Array


class Equation:
    """One node on the numbers that the adapter had: what it reads, and the gradient of its output.

    number: its place in the network, from which its rounding errors are drawn. reads: tensor -> float64 array.
    dout: float64 array. reference: computes what is expected. textbook: the formulas that are watched while they round.
    held: what the adapter may have had of a tensor in place of what it gave; None where it had that.
    """

    def __init__(
        self,
        node: Node,
        number: int,
        reads: Mapping[str, Array],
        reference: NumpyReference,
        textbook: NumpyReference,
        dtype: str,
        held: Held | None = None,
    ) -> None:
        self.node = node
        self._number = number
        self.reads = reads
        self._reference = reference
        self._textbook = textbook
        self._dtype = np.dtype(dtype)
        self._held = held
        self._samples: dict[tuple[Any, ...], list[tuple[Array, Terms]]] = {}
        self.out, self._cache = reference.run_node(node, reads)
        self.dout = np.zeros(())
        self.terms: Terms = {}

    def pull_back(self, dout: Array) -> None:
        """Take the gradient of the node's output, and compute what it sends back."""
        self.dout = dout
        _, backward = self._reference.row(self.node)
        self.terms = backward(dout.copy(), self._cache)

    @cached_property
    def finite(self) -> bool:
        """Whether all the numbers that it is given are finite."""
        given = (*(array for array in self.reads.values() if is_floating(array)), self.dout)
        return all(bool(np.isfinite(array).all()) for array in given)

    @property
    def unordered(self) -> bool:
        """Whether places depend on the order of numbers of which one is NaN, that has no place in any order."""
        given = (array for array in self.reads.values() if is_floating(array))
        return self.node.layer.by_order and any(bool(np.isnan(array).any()) for array in given)

    def samples(
        self,
        count: int,
        arithmetic: Arithmetic,
        algorithm: Algorithm | None = None,
        held: Collection[Role] = (Role.VALUE, Role.GRADIENT),
    ) -> Sequence[Any]:
        """The value and the terms of `count` runs whose arithmetic rounds, those of another algorithm where given.

        held: the roles of the tensors that are taken as the adapter may have held them; the others as it gave them.
        """
        made = self._samples.setdefault((arithmetic.name, algorithm.name if algorithm else None, *held), [])
        while len(made) < count:
            made.append(self._sample(len(made), arithmetic, algorithm, held))
        return made[:count]

    def _sample(
        self, index: int, arithmetic: Arithmetic, algorithm: Algorithm | None, held: Collection[Role]
    ) -> tuple[Array, Terms]:
        generator = np.random.default_rng((index, self._number, self._dtype.itemsize))
        in_order = algorithm is not None and algorithm.in_order
        rounding = Rounding(arithmetic.operations(self._dtype), generator, to_grid=index % 2 == 1, in_order=in_order)
        row = algorithm.row if algorithm else None
        reference = self._textbook.replacing(self.node.layer.name, row) if row else self._textbook
        coarse = Rounding(self._dtype, generator, to_grid=index % 2 == 1)

        def given(key: Tensor, array: Array) -> Array:
            other = self._held(key, index) if self._held and key.role in held else None
            return observe(rounding.flushed(array if other is None else coarse(other)), rounding)

        reads = {
            name: given(value_of(name), array) if is_floating(array) else array for name, array in self.reads.items()
        }
        with np.errstate(all="ignore"):
            out, cache = reference.run_node(self.node, reads)
            if arithmetic is STORED:
                cache = rounded_inside(cache, coarse)
            terms = reference.row(self.node)[1](given(gradient_of(self.node.name), self.dout), cache)
        return np.asarray(out), {name: np.asarray(each) for name, each in terms.items()}


@dataclass(frozen=True, eq=False)
class Statement:
    """What one tensor must be.

    expected: float64 array. size: the sum of the magnitudes of its terms.
    parts: the nodes, with their arguments, whose terms it is the sum of; of a value, the node with None.
    finite: whether all numbers that go into it are finite. open: whether some of them are not known.
    undefined: where the adapter's value of the tensor is NaN, at which nothing has a derivative; everywhere, where a
        layer has put numbers into an order of which one is NaN.
    """

    key: Tensor
    expected: Array
    size: Array
    parts: tuple[tuple[Equation, str | None], ...]
    finite: bool = True
    open: bool = False
    undefined: Any = False

    def floor(
        self,
        count: int,
        arithmetics: Mapping[str, Arithmetic],
        algorithms: Mapping[str, Algorithm] | None = None,
    ) -> Floor:
        """The floor from `count` runs. arithmetics: node -> class, inside where it is not named.

        algorithms: node -> another algorithm that it may be computed by.
        """
        if not self.parts:  # the given cotangent, which nobody computes
            return Floor(np.zeros(self.expected.shape), np.zeros(self.expected.shape, bool))
        others = algorithms or {}
        runs = [
            equation.samples(count, arithmetics.get(equation.node.name, INSIDE), others.get(equation.node.name))
            for equation, _ in self.parts
        ]
        samples = np.stack([self._sum([each[i] for each in runs]) for i in range(count)])
        with np.errstate(all="ignore"):
            deviations = np.abs(samples - self.expected)
            spread = np.maximum(deviations.mean(axis=0), deviations.max(axis=0) / PEAK)
        lost = ~np.isfinite(spread)
        return Floor(np.where(lost, 0.0, spread), lost)

    def held(self, given: Array, run: int) -> Array:
        """What may have stood in place of the given numbers where all operations rounded otherwise, in one run.

        Where its equation rounds nothing, as a reshape's, what it reads may have been held otherwise.
        """
        sampled = self._sampled(run, held=())
        if np.array_equal(sampled, self.expected, equal_nan=True):
            sampled = self._sampled(run, held=(self.key.role,))
        with np.errstate(all="ignore"):
            moved = given + (sampled - self.expected)
        return np.where(np.isfinite(moved), moved, given)

    def _sampled(self, run: int, held: Collection[Role]) -> Array:
        return self._sum([equation.samples(run + 1, EVERY, held=held)[run] for equation, _ in self.parts])

    def _sum(self, runs: Sequence[tuple[Array, Terms]]) -> Array:
        """The tensor of one run, given the value and the terms of every part."""
        terms = [
            out if argument is None else terms[argument]
            for (out, terms), (_, argument) in zip(runs, self.parts, strict=True)
        ]
        return np.broadcast_to(sum(terms), self.expected.shape)


def usable(got: Any, shape: tuple[int, ...]) -> bool:
    """Whether these are numbers of that shape, which an equation can be checked on."""
    return isinstance(got, (np.ndarray, np.generic)) and got.shape == shape and is_floating(np.asarray(got))


class Equations:
    """All equations of one run.

    got: what the adapter gave, keyed as in `tensors`. fused: whether it may have gone on with more digits than it gave.
    """

    def __init__(
        self,
        case: Case,
        got: Mapping[Tensor, Any],
        reference: NumpyReference,
        textbook: NumpyReference,
        fused: bool = False,
    ) -> None:
        self.case = case
        network = case.network
        held = self._held if fused else None
        self._unknown: set[Tensor] = set()
        self.got = got
        known = self._values = dict(case.exact_values)
        self.by_node: dict[str, Equation] = {}
        with np.errstate(all="ignore"):
            for number, node in enumerate(network.nodes):
                reads = {source: known[source] for _, source in node.sources}
                equation = Equation(node, number, reads, reference, textbook, case.dtype, held)
                self.by_node[node.name] = equation
                known[node.name] = self._known(value_of(node.name), equation.out)
            self._statements = {value_of(name): self._value(name) for name in self.by_node}
            self._walk_back(network)

    def __iter__(self) -> Any:
        return iter(self._statements.values())

    def __contains__(self, key: Tensor) -> bool:
        return key in self._statements

    def __getitem__(self, key: Tensor) -> Statement:
        return self._statements[key]

    def alone(self, node: Node) -> Case | None:
        """The case of one node on the adapter's own numbers, None where these are missing or in no domain."""
        case, got = self.case, self.got
        network, stands_for = case.network.alone(node.name)
        known = {**{name: got.get(value_of(name)) for name in self.by_node}, **case.values}
        values = {own: known[name] for own, name in stands_for.items()}
        dout = got.get(gradient_of(node.name))
        if not usable(dout, case.network.shapes[node.name]) or dout.dtype != np.dtype(case.dtype):  # type: ignore[union-attr]
            return None
        try:
            return Case(network, case.dtype, values, np.asarray(dout), case.seed)  # type: ignore[arg-type]
        except (NetworkError, AttributeError):
            return None

    def _known(self, key: Tensor, expected: Array) -> Array:
        """The adapter's own numbers, else what they must be."""
        got = self.got.get(key)
        if usable(got, expected.shape):
            return upcast(np.asarray(got))
        self._unknown.add(key)
        return expected

    def _held(self, key: Tensor, run: int) -> Array | None:
        """What the adapter may have gone on with in place of a tensor that it computed."""
        if key not in self._statements or not self._statements[key].parts:
            return None
        given = self._values[key.name] if key.role is Role.VALUE else self.by_node[key.name].dout
        return self._statements[key].held(given, run)

    def _value(self, name: str) -> Statement:
        equation = self.by_node[name]
        unknown = any(value_of(source) in self._unknown for _, source in equation.node.sources)
        out = np.asarray(equation.out)
        finite = all(bool(np.isfinite(a).all()) for a in equation.reads.values() if is_floating(a))
        return Statement(value_of(name), out, np.abs(out), ((equation, None),), finite, unknown, equation.unordered)

    def _walk_back(self, network: Network) -> None:
        cotangent = self.case.cotangent.astype(np.float64)
        key = gradient_of(network.output)
        output = self.by_node[network.output]
        self._statements[key] = Statement(key, cotangent, np.abs(cotangent), ())
        output.pull_back(self._known(key, cotangent))
        for node in reversed(network.nodes[:-1]):
            statement = self._gradient(node.name)
            self.by_node[node.name].pull_back(self._known(statement.key, statement.expected))
        for name in network.differentiable:
            if name not in self.by_node:
                self._gradient(name)

    def _gradient(self, name: str) -> Statement:
        key = gradient_of(name)
        parts, terms, unknown = [], [], False
        for reader, argument in self.case.network.consumers[name]:
            equation = self.by_node[reader]
            if argument in equation.terms:
                parts.append((equation, argument))
                terms.append(equation.terms[argument])
                unknown |= bool(self._unknown & self._inputs_of(equation))
        expected = np.zeros(self.case.network.shapes[name])
        size = np.zeros(self.case.network.shapes[name])
        for term in terms:
            expected, size = expected + term, size + np.abs(term)
        finite = all(equation.finite for equation, _ in parts)
        undefined = np.isnan(self._values[name]) | any(equation.unordered for equation, _ in parts)
        self._statements[key] = Statement(
            key, np.asarray(expected), np.asarray(size), tuple(parts), finite, unknown, undefined
        )
        return self._statements[key]

    def read_by(self, key: Tensor) -> set[Tensor]:
        """The keys of the tensors that go into the equation of this one, inputs and parameters among them."""
        parts = self[key].parts
        read = {each for equation, _ in parts for each in self._inputs_of(equation)}
        return read - {gradient_of(equation.node.name) for equation, argument in parts if argument is None}

    @staticmethod
    def _inputs_of(equation: Equation) -> set[Tensor]:
        return {gradient_of(equation.node.name)} | {value_of(source) for _, source in equation.node.sources}
