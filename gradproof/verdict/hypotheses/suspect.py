"""What a hypothesis is made of: the node under suspicion, and guesses at what a mistake would have given for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, combinations
from typing import Any

import numpy as np

from gradproof.model.case import Case, upcast
from gradproof.model.tensors import Tensor, gradient_of, value_of

Array = np.ndarray[Any, Any]
Gradients = dict[str, Array]
Forward = Callable[..., tuple[Array, Any]]
Backward = Callable[[Array, Any], Gradients]
Change = Callable[[Gradients, Array, Any], Gradients]
Arrays = Mapping[str, Array]
"""Argument -> array."""
Formula = Callable[[Arrays, Array], Gradients]
"""(arrays, dout) -> gradients."""
Value = Callable[[Arrays], Array]
Conventions = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Guess:
    """What one mistake would do to the node: functions or arrays in place of the right ones, None for the right ones.

    arrays: argument -> array. detail: what is to be said of it, for the hypothesis' advice.
    whole: it explains no tensor unless every one that it gives is so, right ones too.
    """

    backward: Backward | None = None
    forward: Forward | None = None
    arrays: Mapping[str, Array] | None = None
    dout: Array | None = None
    detail: str = ""
    whole: bool = False


@dataclass(frozen=True)
class LowerPrecision:
    """The guess that results are rounded to so many significant bits, whatever is computed on the way."""

    bits: int
    detail: str


@dataclass(frozen=True)
class Hypothesis:
    """A mistake that people make.

    advice: what the gradient then equals and what to check; {} stands for a guess's detail.
    guesses: what the mistake would have given for this node; none where it cannot be made there.
    covers: names of vaguer hypotheses that are not stated beside this one.
    at_kinks: it shows at special numbers alone, and has nothing to show on ordinary ones.
    in_place: it shows only in the network in which it was seen, and not in the node alone on other numbers.
    """

    name: str
    advice: str
    guesses: Callable[[Suspect], Iterable[Guess | LowerPrecision]]
    covers: tuple[str, ...] = ()
    at_kinks: bool = False
    in_place: bool = False


@dataclass(frozen=True, eq=False)
class Suspect:
    """A node alone, with all that the reference knows of it in float64.

    around: name -> a larger array of which the cotangent may be a slice in memory.
    got: key -> what the adapter gave, for guesses that take from it which part is there.
    """

    case: Case
    conventions: Conventions
    around: Mapping[str, Array] = field(default_factory=dict)
    got: Mapping[Tensor, Any] = field(default_factory=dict)

    @cached_property
    def node(self) -> Any:
        return self.case.network.nodes[0]

    @cached_property
    def name(self) -> str:
        """The layer's name."""
        return str(self.node.layer.name)

    @cached_property
    def arrays(self) -> dict[str, Array]:
        """Argument -> array."""
        return {argument: upcast(self.case.values[source]) for argument, source in self.node.sources}

    @cached_property
    def keywords(self) -> dict[str, Any]:
        """What forward gets beside the arrays: options, and the adapter's choices at kinks."""
        return {**self.node.keywords, **self.conventions.get(self.name, {})}

    @cached_property
    def dout(self) -> Array:
        return self.case.cotangent.astype(np.float64)

    def run_forward(self, forward: Forward, arrays: Mapping[str, Array]) -> tuple[Array, Any]:
        known = {source: arrays[argument] for argument, source in self.node.sources}
        in_order, by_name = self.node.bind(known)
        return forward(*in_order, **by_name, **self.keywords)

    @cached_property
    def _right(self) -> tuple[Array, Any]:
        return self.run_forward(self.node.layer.forward, self.arrays)

    @property
    def out(self) -> Array:
        return self._right[0]

    @property
    def cache(self) -> Any:
        return self._right[1]

    @cached_property
    def gradients(self) -> Gradients:
        """The right ones, per argument."""
        found: Gradients = self.node.layer.backward(self.dout, self.cache)
        return found

    @property
    def first(self) -> Array:
        return next(iter(self.arrays.values()))

    @property
    def elementwise(self) -> bool:
        """Whether it maps one array to another of the same shape."""
        return len(self.arrays) == 1 and self.first.shape == self.out.shape

    def predicted(self, guess: Guess) -> dict[Tensor, Array]:
        """Tensors of the one-node case as the guess would have them."""
        dout = self.dout if guess.dout is None else guess.dout
        out, cache = self._right
        if guess.forward or guess.arrays:
            out, cache = self.run_forward(guess.forward or self.node.layer.forward, guess.arrays or self.arrays)
        gradients = (guess.backward or self.node.layer.backward)(dout, cache)
        found = {value_of(self.node.name): np.asarray(out), gradient_of(self.node.name): dout}
        named = {gradient_of(source): argument for argument, source in self.node.sources}
        return found | {key: np.asarray(gradients[a]) for key, a in named.items() if a in gradients}

    def changed(self, change: Change, detail: str = "") -> Guess:
        """The guess that the gradients are changed by change(gradients, dout, cache) after they are computed."""
        backward = self.node.layer.backward
        return Guess(lambda dout, cache: change(backward(dout, cache), dout, cache), detail=detail)

    def each(self, transform: Callable[[Array], Array], detail: str = "") -> Guess:
        """The guess that every gradient, taken by itself, is transformed."""
        return self.changed(lambda g, dout, cache: {name: transform(each) for name, each in g.items()}, detail)

    def _named(self, in_order: Iterable[Array], by_name: Mapping[str, Any]) -> dict[str, Array]:
        """Argument -> array, of what a forward function is called with."""
        names, _ = self.node.bind({source: argument for argument, source in self.node.sources})
        optional = {name: each for name, each in by_name.items() if name in self.arrays}
        return dict(zip(names, in_order, strict=True)) | optional

    def right(self, arrays: Arrays, dout: Array) -> Gradients:
        """The layer's gradients for these arrays."""
        found: Gradients = self.node.layer.backward(dout, self.run_forward(self.node.layer.forward, arrays)[1])
        return found

    def computed(self, gradients: Formula, detail: str = "", value: Value | None = None) -> Guess:
        """The guess that the gradients are gradients(arrays, dout), and the output, where it is given, value(arrays).

        Arguments that the formula leaves out are not guessed.
        """
        right = self.node.layer.forward

        def forward(*arrays: Array, **others: Any) -> tuple[Array, Arrays]:
            given = self._named(arrays, others)
            return (value(given) if value else right(*arrays, **others)[0]), given

        return Guess(lambda dout, given: gradients(given, dout), forward, detail=detail)

    def kept(self, others: Arrays, detail: str = "") -> Guess:
        """The guess that the backward pass finds some other arrays where those lay that forward was given."""
        right = self.node.layer.forward

        def forward(*arrays: Array, **keywords: Any) -> tuple[Array, Any]:
            out, _ = right(*arrays, **keywords)
            _, cache = self.run_forward(right, {**self._named(arrays, keywords), **others})
            return out, cache

        return Guess(forward=forward, detail=detail)

    def called(self, detail: str = "", **keywords: Any) -> Iterator[Guess]:
        """The guesses that other keywords reach the layer: its backward pass alone, or both passes."""
        right = self.node.layer.forward

        def both(*arrays: Array, **others: Any) -> tuple[Array, Any]:
            return right(*arrays, **{**others, **keywords})

        def backward_alone(*arrays: Array, **others: Any) -> tuple[Array, Any]:
            return right(*arrays, **others)[0], both(*arrays, **others)[1]

        yield Guess(forward=backward_alone, detail=detail)
        yield Guess(forward=both, detail=detail)


def subsets(items: Iterable[Any], least: int = 1) -> Iterator[tuple[Any, ...]]:
    pool = tuple(items)
    return chain.from_iterable(combinations(pool, count) for count in range(least, len(pool) + 1))
