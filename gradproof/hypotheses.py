"""Named mistakes of a backward pass: what each would have given for a layer, computed from the reference's own cache.

A hypothesis makes guesses about one node; `gradproof.diagnosis` keeps those that reproduce what an adapter gave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, combinations, permutations, product
from typing import Any, NamedTuple

import numpy as np

from gradproof.case import Case, upcast
from gradproof.reference import LAYERS
from gradproof.reference.common import logistic
from gradproof.reference.normalization import along_channels

Array = np.ndarray[Any, Any]
Gradients = dict[str, Array]
Forward = Callable[..., tuple[Array, Any]]
Backward = Callable[[Array, Any], Gradients]
Change = Callable[[Gradients, Array, Any], Gradients]
Conventions = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Guess:
    """What one mistake would do to the node: functions or arrays in place of the right ones, None for the right ones.

    arrays: argument -> array. detail: what is to be said of it, for the hypothesis' advice.
    """

    backward: Backward | None = None
    forward: Forward | None = None
    arrays: Mapping[str, Array] | None = None
    dout: Array | None = None
    detail: str = ""


@dataclass(frozen=True)
class Coarse:
    """The guess that results are rounded to so many significant bits, whatever is computed on the way."""

    bits: int
    detail: str


@dataclass(frozen=True)
class Hypothesis:
    """A mistake that people make.

    advice: what the gradient then equals and what to check; {} stands for a guess's detail.
    guesses: what the mistake would have given for this node; none where it cannot be made there.
    covers: names of vaguer hypotheses that are not stated beside this one.
    """

    name: str
    advice: str
    guesses: Callable[[Suspect], Iterable[Guess | Coarse]]
    covers: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Suspect:
    """A node alone, with all that the reference knows of it in float64."""

    case: Case
    conventions: Conventions

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

    def predicted(self, guess: Guess) -> dict[str, Array]:
        """Tensors of the one-node case as the guess would have them, keyed as in a TensorCheck."""
        dout = self.dout if guess.dout is None else guess.dout
        out, cache = self._right
        if guess.forward or guess.arrays:
            out, cache = self.run_forward(guess.forward or self.node.layer.forward, guess.arrays or self.arrays)
        gradients = (guess.backward or self.node.layer.backward)(dout, cache)
        found = {f"value:{self.node.name}": np.asarray(out), f"gradient:{self.node.name}": dout}
        named = {f"gradient:{source}": argument for argument, source in self.node.sources}
        return found | {key: np.asarray(gradients[a]) for key, a in named.items() if a in gradients}

    def changed(self, change: Change, detail: str = "") -> Guess:
        """The guess that the gradients are changed by change(gradients, dout, cache) after they are computed."""
        backward = self.node.layer.backward
        return Guess(lambda dout, cache: change(backward(dout, cache), dout, cache), detail=detail)

    def each(self, transform: Callable[[Array], Array], detail: str = "") -> Guess:
        """The guess that every gradient, taken by itself, is transformed."""
        return self.changed(lambda g, dout, cache: {name: transform(each) for name, each in g.items()}, detail)

    def cached(self, change: Callable[[Any], Any], detail: str = "") -> Guess:
        """The guess that the backward pass works on another cache."""
        backward = self.node.layer.backward
        return Guess(lambda dout, cache: backward(dout, change(cache)), detail=detail)

    def called(self, detail: str = "", **keywords: Any) -> Iterator[Guess]:
        """The guesses that other keywords reach the layer: its backward pass alone, or both passes."""
        right = self.node.layer.forward

        def both(*arrays: Array, **others: Any) -> tuple[Array, Any]:
            return right(*arrays, **{**others, **keywords})

        def backward_alone(*arrays: Array, **others: Any) -> tuple[Array, Any]:
            return right(*arrays, **others)[0], both(*arrays, **others)[1]

        yield Guess(forward=backward_alone, detail=detail)
        yield Guess(forward=both, detail=detail)


def _subsets(items: Iterable[Any], least: int = 1) -> Iterator[tuple[Any, ...]]:
    pool = tuple(items)
    return chain.from_iterable(combinations(pool, count) for count in range(least, len(pool) + 1))


def _replaced(cache: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*cache[:at], value, *cache[at + 1 :])


# The whole gradient: sign, size, order.


def _opposite(suspect: Suspect) -> Iterator[Guess]:
    yield suspect.each(np.negative)


def _magnitude(suspect: Suspect) -> Iterator[Guess]:
    yield suspect.each(np.abs)


def _zero(suspect: Suspect) -> Iterator[Guess]:
    yield suspect.each(np.zeros_like)


def _two(suspect: Suspect) -> Iterator[Guess]:
    yield suspect.each(lambda g: 2.0 * g, "twice")
    yield suspect.each(lambda g: 0.5 * g, "half")


def sizes(suspect: Suspect) -> dict[int, list[str]]:
    """The numbers above 1 that a reduction may divide by -> what they count."""
    x, dout = suspect.first, suspect.dout
    kernel = suspect.node.keywords.get("kernel")
    weight = suspect.arrays.get("weight")
    if kernel is None and suspect.node.layer.family == "convolution" and weight is not None:
        kernel = weight.shape[2:]
    counts = {
        "the elements": x.size,
        "the elements of the output": dout.size,
        "the batch": x.shape[0] if x.ndim else 1,
        "the elements of one sample": math.prod(x.shape[1:]),
        "the features": x.shape[-1] if x.ndim else 1,
        "the rows": math.prod(dout.shape[:-1]),
        "the output's features": dout.shape[-1] if dout.ndim else 1,
        "the spatial size": math.prod(x.shape[2:]),
        "the output's spatial size": math.prod(dout.shape[2:]),
        "the batch times the output's spatial size": dout.size // max(dout.shape[1], 1) if dout.ndim > 2 else 1,
        "the kernel's size": 1 if kernel is None else math.prod(np.atleast_1d(kernel).tolist()),
        "the elements that become one": x.size // max(dout.size, 1),
    }
    for name, gradient in suspect.gradients.items():
        counts[f"the elements that {name} is broadcast to"] = dout.size // max(gradient.size, 1)
    found: dict[int, list[str]] = {}
    for what, count in counts.items():
        if count > 1:
            found.setdefault(count, []).append(what)
    return found


def _counted(what: list[str]) -> str:
    return " or ".join(what[:2])


def _times_n(suspect: Suspect) -> Iterator[Guess]:
    for count, what in sizes(suspect).items():
        yield suspect.each(partial(np.multiply, float(count)), f"N = {count}, {_counted(what)}")


def _over_n(suspect: Suspect) -> Iterator[Guess]:
    for count, what in sizes(suspect).items():
        yield suspect.each(partial(np.multiply, 1.0 / count), f"N = {count}, {_counted(what)}")


def _ranks(suspect: Suspect) -> range:
    return range(2, 1 + max((g.ndim for g in suspect.gradients.values()), default=0))


def _of_rank(rank: int, transform: Callable[[Array], Array]) -> Change:
    """Transform the gradients with so many axes, and leave the others out."""
    return lambda g, dout, cache: {name: transform(each) for name, each in g.items() if each.ndim == rank}


def _permuted(suspect: Suspect, swaps: bool) -> Iterator[Guess]:
    """Axes in another order, in the shape that this gives and in the right one; swaps: of two axes alone."""
    for rank in _ranks(suspect):
        for axes in permutations(range(rank)):
            moved = [axis for i, axis in enumerate(axes) if i != axis]
            if moved and (len(moved) == 2) == swaps:
                detail = f"axes {', '.join(map(str, moved))}" if rank > 2 else ""
                yield suspect.changed(_of_rank(rank, partial(np.transpose, axes=axes)), detail)
                yield suspect.changed(_of_rank(rank, partial(_transposed_in_shape, axes=axes)), detail)


def _transposed_in_shape(gradient: Array, axes: tuple[int, ...]) -> Array:
    return gradient.transpose(axes).reshape(gradient.shape)


def _transposed(suspect: Suspect) -> Iterator[Guess]:
    return _permuted(suspect, swaps=True)


def _laid_out(suspect: Suspect) -> Iterator[Guess]:
    yield from _permuted(suspect, swaps=False)
    yield suspect.each(lambda g: g.reshape(-1, order="F").reshape(g.shape))
    yield suspect.each(lambda g: g.reshape(-1).reshape(g.shape, order="F"))
    yield suspect.changed(
        lambda g, dout, cache: {
            name: dout.reshape(each.shape, order="F")
            for name, each in g.items()
            if each.size == dout.size and each.shape != dout.shape and max(_long_axes(each), _long_axes(dout)) > 1
        }
    )


def _long_axes(array: Array) -> int:
    """How many axes have more than one element: with one alone, no order of axes matters."""
    return sum(size > 1 for size in array.shape)


def _axes(suspect: Suspect) -> Iterator[tuple[int, int]]:
    """(rank, axis) of every gradient's axes."""
    return ((rank, axis) for rank in (1, *_ranks(suspect)) for axis in range(rank))


def _flipped(suspect: Suspect) -> Iterator[Guess]:
    for rank in (1, *_ranks(suspect)):
        for axes in _subsets(range(rank)):
            detail = f"axis {axes[0]}" if len(axes) == 1 else f"axes {', '.join(map(str, axes))}"
            yield suspect.changed(_of_rank(rank, partial(np.flip, axis=axes)), detail)


def _shifted(suspect: Suspect) -> Iterator[Guess]:
    for (rank, axis), step in product(_axes(suspect), (1, -1)):
        yield suspect.changed(_of_rank(rank, partial(np.roll, shift=step, axis=axis)), f"axis {axis}")
        yield suspect.changed(_of_rank(rank, partial(_moved, step=step, axis=axis)), f"axis {axis}")


def _moved(gradient: Array, step: int, axis: int) -> Array:
    """Shifted by one along the axis, with zeros where nothing comes from."""
    rolled = np.moveaxis(np.roll(gradient, step, axis).copy(), axis, 0)
    rolled[0 if step > 0 else -1] = 0.0
    return np.moveaxis(rolled, 0, axis)


def _halves(suspect: Suspect) -> Iterator[Guess]:
    for rank, axis in _axes(suspect):
        yield suspect.changed(_of_rank(rank, partial(_halves_exchanged, axis=axis)), f"axis {axis}")


def _halves_exchanged(gradient: Array, axis: int) -> Array:
    length = gradient.shape[axis]
    return gradient if length % 2 else np.roll(gradient, length // 2, axis)


def _exchanged(suspect: Suspect) -> Iterator[Guess]:
    shapes = {name: g.shape for name, g in suspect.gradients.items()}
    for a, b in combinations(shapes, 2):
        if shapes[a] == shapes[b]:
            yield suspect.changed(_exchange(a, b), f"{a} and {b}")


def _exchange(first: str, second: str) -> Change:
    return lambda g, dout, cache: {first: g[second], second: g[first]}


# The cotangent.


def _ones(suspect: Suspect) -> Iterator[Guess]:
    yield Guess(dout=np.ones_like(suspect.dout))


def _first_element(suspect: Suspect) -> Iterator[Guess]:
    if suspect.dout.size:
        yield Guess(dout=np.full_like(suspect.dout, suspect.dout.reshape(-1)[0]))


# The derivative of an activation.


def _derivative_missing(suspect: Suspect) -> Iterator[Guess]:
    yield suspect.changed(lambda g, dout, cache: {n: dout for n, each in g.items() if each.shape == dout.shape})


def _at_output(suspect: Suspect) -> Iterator[Guess]:
    """The derivative at f(x) in place of x, be it computed anew or from what was cached."""
    right = suspect.node.layer.forward
    if suspect.elementwise:
        yield Guess(forward=lambda x, **options: (right(x, **options)[0], right(right(x, **options)[0], **options)[1]))
    yield Guess(forward=_confused(right, lambda arrays, out: {id(each): out for each in arrays}))


def _at_input(suspect: Suspect) -> Iterator[Guess]:
    """The formula for the derivative from f(x), with x put in."""
    if suspect.elementwise:
        yield Guess(forward=_confused(suspect.node.layer.forward, lambda arrays, out: {id(out): arrays[0]}))


def _confused(forward: Forward, which: Callable[[tuple[Array, ...], Array], dict[int, Array]]) -> Forward:
    """The forward function, with one array in its cache taken for another: id of the one -> the other."""

    def confusing(*arrays: Array, **others: Any) -> tuple[Array, Any]:
        out, cache = forward(*arrays, **others)
        return out, _substituted(cache, which(arrays, out))

    return confusing


def _substituted(cache: Any, others: Mapping[int, Array]) -> Any:
    if isinstance(cache, tuple):
        items = [_substituted(each, others) for each in cache]
        return cache._make(items) if hasattr(cache, "_make") else tuple(items)
    return others.get(id(cache), cache)


def _twice(suspect: Suspect) -> Iterator[Guess]:
    backward = suspect.node.layer.backward
    if suspect.elementwise:
        yield suspect.changed(lambda g, dout, cache: backward(g["x"], cache))
    if suspect.name == "cross_entropy":
        yield suspect.changed(lambda g, dout, cache: {"x": _softmax_derivative(g["x"], np.exp(cache[0]))})
    if suspect.name == "bce_with_logits":
        yield suspect.changed(lambda g, dout, cache: {"x": g["x"] * logistic(cache[0]) * logistic(-cache[0])})


def _softmax_derivative(dout: Array, out: Array) -> Array:
    return out * (dout - (dout * out).sum(axis=-1, keepdims=True))


GATE: dict[str, Callable[[Array], Array]] = {
    **dict.fromkeys(("silu", "gelu", "quick_gelu", "mish"), lambda gate: gate),
    "gelu_tanh": lambda bend: 0.5 * (1.0 + bend),
}
"""The gate of layers f(x) = x gate(x), from what they keep beside x."""


def _one_term(suspect: Suspect) -> Iterator[Guess]:
    """Of x gate(x): gate, or x gate'(x)."""
    gate = GATE.get(suspect.name)
    if gate:
        yield suspect.changed(lambda g, dout, cache: {"x": dout * gate(cache[1])})
        yield suspect.changed(lambda g, dout, cache: {"x": g["x"] - dout * gate(cache[1])})


GELUS = ("gelu", "gelu_tanh", "quick_gelu")


def _gelu(suspect: Suspect) -> Iterator[Guess]:
    for other in GELUS if suspect.name in GELUS else ():
        yield from _as_layer(suspect, other)
    yield from _options(suspect, "approximate")


def _other_activation(suspect: Suspect) -> Iterator[Guess]:
    if suspect.node.layer.kind == "activation" and suspect.elementwise:
        for other in LAYERS.values():
            if other.kind == "activation" and len(other.arguments) == 1 and other.name not in ("identity", *GELUS):
                yield from _as_layer(suspect, other.name)


def _as_layer(suspect: Suspect, name: str) -> Iterator[Guess]:
    """The guesses that the backward pass, or both passes, are those of another elementwise layer."""
    right, other = suspect.node.layer.forward, LAYERS[name]
    options = {option.name: other.defaults[option.name] for option in other.options if not option.structural}

    def backward_alone(x: Array, **others: Any) -> tuple[Array, Any]:
        return right(x, **others)[0], other.forward(x, **options)[1]

    yield Guess(other.backward, backward_alone, detail=name)
    yield Guess(other.backward, lambda x, **others: other.forward(x, **options), detail=name)


# Softmax and normalisation.


def _element_by_element(suspect: Suspect) -> Iterator[Guess]:
    diagonal: dict[str, Callable[[Array], Array]] = {
        "softmax": lambda out: out * (1.0 - out),
        "softmin": lambda out: -out * (1.0 - out),
        "log_softmax": lambda out: 1.0 - np.exp(out),
    }
    if suspect.name in diagonal:
        of = diagonal[suspect.name]
        yield suspect.changed(lambda g, dout, cache: {"x": dout * of(cache[0])})


NORMS = ("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm")


class Standard(NamedTuple):
    """What a normalisation layer's dx = r (g - mean(g) - z mean(g z)) is made of; plain: dout, shaped as g is."""

    z: Array
    r: Array
    g: Array
    plain: Array
    over: tuple[int, ...]


def _standard(name: str, dout: Array, cache: tuple[Any, ...]) -> Standard:
    z, r, weight, *over = cache
    by_channel = name not in ("layer_norm", "rms_norm")
    factor = 1.0 if weight is None else along_channels(weight, dout.ndim) if by_channel else weight
    if over:
        return Standard(z, r, dout * factor, dout, over[0])
    grouped = (*r.shape[:2], -1)
    return Standard(z.reshape(grouped), r, (dout * factor).reshape(grouped), dout.reshape(grouped), (2,))


def _mean(each: Array, over: tuple[int, ...]) -> Array:
    return each.mean(axis=over, keepdims=True)


def _without_second(s: Standard) -> Array:
    return s.r * (s.g - _mean(s.g, s.over))


def _without_weight(s: Standard) -> Array:
    return s.r * (s.plain - _mean(s.plain, s.over) - s.z * _mean(s.plain * s.z, s.over))


def _as_in_training(s: Standard) -> Array:
    over = (0, *range(2, s.g.ndim))
    return s.r * (s.g - _mean(s.g, over) - s.z * _mean(s.g * s.z, over))


TERMS: dict[str, Callable[[Standard], Array]] = {
    "the terms of the mean and of the variance": lambda s: s.r * s.g,
    "the term of the mean": lambda s: s.r * (s.g - s.z * _mean(s.g * s.z, s.over)),
    "the term of the variance": _without_second,
    "the weight in dx": _without_weight,
}


def _terms_missing(suspect: Suspect) -> Iterator[Guess]:
    name = suspect.name
    formulas = TERMS if name in NORMS and suspect.cache[3:] != ((),) else {}
    for detail, formula in formulas.items():
        yield suspect.changed(_by_formula(name, formula), detail)


def _by_formula(name: str, formula: Callable[[Standard], Array]) -> Change:
    return lambda g, dout, cache: {"x": formula(_standard(name, dout, cache)).reshape(dout.shape)}


def _training_formula(suspect: Suspect) -> Iterator[Guess]:
    if suspect.name == "batch_norm" and suspect.cache[3] == ():
        yield suspect.changed(lambda g, dout, cache: {"x": _as_in_training(_standard("batch_norm", dout, cache))})


def _normalized_count(name: str, x: Array, options: Mapping[str, Any]) -> int:
    """How many elements are normalised together."""
    if name in ("layer_norm", "rms_norm"):
        return math.prod(x.shape[-options["axes"] :])
    sets = {"batch_norm": x.shape[1], "instance_norm": x.shape[0] * x.shape[1]}
    return x.size // sets.get(name, x.shape[0] * options.get("groups", 1))


def _ddof(suspect: Suspect) -> Iterator[Guess]:
    yield from _options(suspect, "ddof")
    if suspect.name in NORMS and suspect.cache[3:] != ((),):
        yield from _norm_with_ddof(suspect)


def _norm_with_ddof(suspect: Suspect) -> Iterator[Guess]:
    """The variance divided by n - 1: the layer with eps (n - 1) / n and a weight times sqrt((n - 1) / n)."""
    name, right, backward = suspect.name, suspect.node.layer.forward, suspect.node.layer.backward

    def forward(x: Array, *, eps: float, **others: Any) -> tuple[Array, Any]:
        n = _normalized_count(name, x, others)
        shrink = math.sqrt((n - 1) / n)
        affine = "weight" in others
        given = {**others, "weight": others["weight"] * shrink} if affine else others
        out, cache = right(x, eps=eps * (n - 1) / n, **given)
        return (out if affine else out * shrink), (cache, shrink, affine)

    def ddof_backward(dout: Array, cache: Any) -> Gradients:
        inner, shrink, affine = cache
        gradients = backward(dout if affine else dout * shrink, inner)
        return {**gradients, "weight": gradients["weight"] * shrink} if affine else gradients

    def backward_alone(x: Array, **others: Any) -> tuple[Array, Any]:
        return right(x, **others)[0], forward(x, **others)[1]

    yield Guess(ddof_backward, forward, detail="n - 1")
    yield Guess(ddof_backward, backward_alone, detail="n - 1")


def _eps(suspect: Suspect) -> Iterator[Guess]:
    yield from _options(suspect, "eps")
    if suspect.name in NORMS and suspect.cache[3:] != ((),):
        yield from _eps_outside(suspect)


def _eps_outside(suspect: Suspect) -> Iterator[Guess]:
    """r = 1 / (sigma + eps), whose derivative with respect to sigma has another factor than with eps in the root."""
    name, right, backward = suspect.name, suspect.node.layer.forward, suspect.node.layer.backward
    by_channel = name not in ("layer_norm", "rms_norm")

    def forward(x: Array, *, eps: float, **others: Any) -> tuple[Array, Any]:
        out, (z, r, *rest) = right(x, eps=0.0, **others)
        sigma = 1.0 / r
        outside = 1.0 / (sigma + eps)
        grouped = z.reshape(*r.shape[:2], -1) if len(rest) == 1 else z
        scaled = (grouped * (outside / r)).reshape(x.shape)
        shaped = {
            slot: along_channels(others[slot], x.ndim) if by_channel else others[slot]
            for slot in ("weight", "bias")
            if slot in others
        }
        out = scaled * shaped.get("weight", 1.0) + shaped.get("bias", 0.0)
        return out, ((scaled, outside, *rest), eps / sigma)

    def outside_backward(dout: Array, cache: Any) -> Gradients:
        inner, share = cache
        s = _standard(name, dout, inner)
        more = s.r * s.z * _mean(s.g * s.z, s.over) * share
        gradients = backward(dout, inner)
        return {**gradients, "x": gradients["x"] - more.reshape(dout.shape)}

    def backward_alone(x: Array, **others: Any) -> tuple[Array, Any]:
        return right(x, **others)[0], forward(x, **others)[1]

    yield Guess(outside_backward, forward, detail="eps added to the standard deviation")
    yield Guess(outside_backward, backward_alone, detail="eps added to the standard deviation")


# Options.

NAMED_OPTIONS = ("reduction", "ddof", "eps", "approximate")
"""Options that a hypothesis of its own is about."""


def _options(suspect: Suspect, name: str) -> Iterator[Guess]:
    """The guesses that the option of this name has another value."""
    for option in suspect.node.layer.options:
        if option.name != name or option.structural:
            continue
        given = suspect.node.keywords[name]
        neutral = (0.0, 1.0) if isinstance(given, float) else ()
        choices = (*option.domain.choices(suspect.first.shape), *neutral)
        for value in dict.fromkeys(each for each in choices if each != given):
            yield from suspect.called(f"{name}={value!r}", **{name: value})


def _reduction(suspect: Suspect) -> Iterator[Guess]:
    return _options(suspect, "reduction")


def _other_option(suspect: Suspect) -> Iterator[Guess]:
    for option in suspect.node.layer.options:
        if option.name not in NAMED_OPTIONS:
            yield from _options(suspect, option.name)


# Sums that are not taken.


def _bias(suspect: Suspect) -> Iterator[Guess]:
    """A bias whose gradient is the sum of dout over some axes: of these, only some are summed over."""
    for name, bias in suspect.gradients.items():
        if "bias" in name:
            for axes in _subsets(range(suspect.dout.ndim)):
                total = suspect.dout.sum(axis=axes)
                if total.shape == bias.shape and np.allclose(total, bias):
                    yield from _partly_summed(suspect, name, axes)


def _partly_summed(suspect: Suspect, name: str, axes: tuple[int, ...]) -> Iterator[Guess]:
    for summed in _subsets(axes, least=0):
        rest = tuple(axis for axis in axes if axis not in summed)
        if rest:
            kept = f"axes {', '.join(map(str, rest))}" if len(rest) > 1 else f"axis {rest[0]}"
            for taken in (None, 0, -1):
                yield suspect.changed(_picked(name, summed, rest, taken), kept)


def _picked(name: str, summed: tuple[int, ...], rest: tuple[int, ...], taken: int | None) -> Change:
    return lambda g, dout, cache: {name: _part(dout.sum(axis=summed, keepdims=True), summed, rest, taken)}


def _part(partly: Array, summed: tuple[int, ...], rest: tuple[int, ...], taken: int | None) -> Array:
    """The sum without the axes summed over, and of the rest all elements (taken None), the first or the last."""
    index = tuple(
        0 if axis in summed else taken if axis in rest and taken is not None else slice(None)
        for axis in range(partly.ndim)
    )
    return partly[index]


def _broadcast(suspect: Suspect) -> Iterator[Guess]:
    """Operands stretched to the output's shape beforehand, whose gradients nobody sums; or one element for the sum."""
    shape, right = suspect.out.shape, suspect.node.layer.forward
    stretched = {n: a for n, a in suspect.arrays.items() if a.shape != shape and _fits(a.shape, shape)}
    if not stretched or not all(_fits(each.shape, shape) for each in suspect.arrays.values()):
        return

    def forward(*arrays: Array, **others: Any) -> tuple[Array, Any]:
        return right(*(np.broadcast_to(each, shape) for each in arrays), **others)

    def reduced(dout: Array, cache: Any, at: int) -> Gradients:
        full = suspect.node.layer.backward(dout, cache)
        return {name: _one_of(each, suspect.gradients[name].shape, at) for name, each in full.items()}

    yield Guess(forward=forward)
    yield Guess(lambda dout, cache: reduced(dout, cache, 0), forward)
    yield Guess(lambda dout, cache: reduced(dout, cache, -1), forward)


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, wanted) == wanted
    except ValueError:
        return False


def _one_of(full: Array, shape: tuple[int, ...], at: int) -> Array:
    """The first or last element along every axis that was stretched."""
    leading = full.ndim - len(shape)
    picked = full[(at,) * leading]
    stretched = [axis for axis, size in enumerate(shape) if size == 1]
    for axis in stretched:
        picked = np.take(picked, [at], axis=axis)
    return picked


def _assigned(suspect: Suspect) -> Iterator[Guess]:
    """What is picked twice counts once: the last time, or the first."""
    if suspect.name not in ("embedding", "gather"):
        return
    indices, backward = suspect.cache[0], suspect.node.layer.backward
    axis = 0 if suspect.name == "embedding" else suspect.cache[2]
    flat = indices.reshape(-1) if suspect.name == "embedding" else indices
    for later in (True, False):
        counts = _only_pick(flat, axis, later)
        counts = counts.reshape(*indices.shape, 1) if suspect.name == "embedding" else counts
        yield Guess(partial(_counting, backward, counts))


def _counting(backward: Backward, counts: Array, dout: Array, cache: Any) -> Gradients:
    return backward(np.where(counts, dout, 0.0), cache)


def _only_pick(indices: Array, axis: int, last: bool) -> Array:
    """Where no other pick of the same index comes later (or earlier) along the axis."""
    along = np.moveaxis(indices, axis, -1)
    same = along[..., :, None] == along[..., None, :]
    others = np.triu(np.ones(same.shape[-2:], bool), 1)
    return np.moveaxis(~(same & (others if last else others.T)).any(axis=-1), -1, axis)


# Time.


def _one_step(suspect: Suspect) -> Iterator[Guess]:
    """The weights' gradients of one time step alone, of the first or of the last: assigned, where a loop should add."""
    if suspect.node.layer.family != "recurrent":
        return
    backward = suspect.node.layer.backward
    for step, which in ((0, "first"), (-1, "last")):

        def alone(dout: Array, cache: tuple[Any, ...], step: int = step) -> Gradients:
            weights = backward(dout, _replaced(cache, 0, [_at_step(each, step, False) for each in cache[0]]))
            biases = backward(dout, _replaced(cache, 0, [_at_step(each, step, True) for each in cache[0]]))
            of_biases = {
                name: biases[name.replace("bias", "weight")][:, 0] for name in biases if name.startswith("bias")
            }
            return {name: each for name, each in weights.items() if name.startswith("weight")} | of_biases

        yield Guess(alone, detail=which)


def _at_step(cache: tuple[Any, ...], step: int, ones: bool) -> tuple[Any, ...]:
    """What a run kept, its inputs and states 0 but at one step; ones: 1 there, so that the weights' are the biases'."""
    x, before, kept, weights = cache
    at = np.zeros((len(x), 1, 1))
    at[step] = 1.0
    if ones:
        return np.broadcast_to(at, (*x.shape[:2], 1)), np.broadcast_to(at, (*x.shape[:2], 1)), kept, weights
    return x * at, before * at, kept, weights


GATES = {"lstm": 4, "gru": 3}


def _gate_order(suspect: Suspect) -> Iterator[Guess]:
    """The gates' blocks in another order, in the gradients alone or in the weights as they are read."""
    count = GATES.get(suspect.name, 0)
    right, backward = suspect.node.layer.forward, suspect.node.layer.backward
    for order in permutations(range(count)):
        if order == tuple(range(count)):
            continue
        back = tuple(order.index(i) for i in range(count))
        detail = "".join("ifgo"[i] if count == 4 else "rzn"[i] for i in order)

        def forward(*arrays: Array, order: tuple[int, ...] = order, **others: Any) -> tuple[Array, Any]:
            return right(*arrays, **{name: _reordered(name, each, order) for name, each in others.items()})

        def read(dout: Array, cache: Any, back: tuple[int, ...] = back) -> Gradients:
            return {name: _reordered(name, each, back) for name, each in backward(dout, cache).items()}

        def written(g: Gradients, dout: Array, cache: Any, order: tuple[int, ...] = order) -> Gradients:
            return {name: _reordered(name, each, order) for name, each in g.items()}

        yield suspect.changed(written, detail)
        yield Guess(read, forward, detail=detail)


def _reordered(name: str, gates: Any, order: tuple[int, ...]) -> Any:
    if not name.startswith(("weight", "bias")):
        return gates
    blocks = np.split(gates, len(order))
    return np.concatenate([blocks[i] for i in order])


# Masks.

ATTENTION = ("scaled_dot_product_attention", "multi_head_attention")


def _attending(suspect: Suspect, change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Guess:
    """Change what attention kept: its own cache, or the first part of that of all heads."""
    if suspect.name == "multi_head_attention":
        return suspect.cached(lambda cache: _replaced(cache, 0, change(cache[0])))
    return suspect.cached(change)


def _mask_missing(suspect: Suspect) -> Iterator[Guess]:
    if suspect.name == "dropout":
        yield suspect.changed(lambda g, dout, cache: {"x": dout})
        yield suspect.changed(lambda g, dout, cache: {"x": dout / (1.0 - suspect.keywords["p"])})
    if suspect.name == "embedding":
        yield suspect.cached(lambda cache: _replaced(cache, 2, -1))
    if suspect.name in ATTENTION:
        yield _attending(suspect, lambda cache: _replaced(cache, 5, np.ones_like(cache[5])))
        yield from suspect.called(mask=None, causal=False)


def _mask_scale_missing(suspect: Suspect) -> Iterator[Guess]:
    if suspect.name == "dropout":
        yield suspect.cached(lambda scale: scale * (1.0 - suspect.keywords["p"]))


def _scale_missing(suspect: Suspect) -> Iterator[Guess]:
    if suspect.name in ATTENTION:
        yield _attending(suspect, lambda cache: _replaced(cache, 6, 1.0))


# Kinks.


def _kinks(suspect: Suspect, ties: bool) -> Iterator[Guess]:
    for kink in suspect.node.layer.kinks:
        if kink.ties == ties:
            for weight, which in ((0.0, "left"), (0.5, "mean"), (1.0, "right")):
                side = {"left": "first", "mean": "all alike", "right": "last"}[which] if ties else which
                yield from suspect.called(side if ties else f"{side} derivative at {kink.place}", **{kink.name: weight})


def _ties(suspect: Suspect) -> Iterator[Guess]:
    return _kinks(suspect, ties=True)


def _subgradient(suspect: Suspect) -> Iterator[Guess]:
    return _kinks(suspect, ties=False)


# Precision.

PRECISIONS = ((24, "float32"), (11, "float16"), (8, "bfloat16"))
"""Significant bits -> the dtype that has them."""


def rounded_to(array: Array, bits: int) -> Array:
    """The nearest numbers with so many significant bits."""
    mantissa, exponent = np.frexp(array)
    scale = 2.0**bits
    return np.ldexp(np.rint(mantissa * scale) / scale, exponent)


def _lower_precision(suspect: Suspect) -> Iterator[Coarse]:
    return (Coarse(bits, dtype) for bits, dtype in PRECISIONS)


def _operands_rounded(suspect: Suspect) -> Iterator[Guess]:
    """Every array that is multiplied; a bias is only added."""
    for bits, dtype in ((11, "TF32 or float16"), (8, "bfloat16")):
        arrays = {
            name: each if "bias" in name or each.dtype.kind != "f" else rounded_to(each, bits)
            for name, each in suspect.arrays.items()
        }
        yield Guess(arrays=arrays, dout=rounded_to(suspect.dout, bits), detail=dtype)
        yield Guess(arrays=arrays, detail=dtype)
        yield Guess(dout=rounded_to(suspect.dout, bits), detail=dtype)


HYPOTHESES: dict[str, Hypothesis] = {
    each.name: each
    for each in (
        Hypothesis(
            "cotangent as ones",
            "equals the gradient for a cotangent of ones: check that the cotangent that arrives is used",
            _ones,
        ),
        Hypothesis(
            "cotangent's first element",
            "equals the gradient for the cotangent's first element everywhere: check that all of it is used",
            _first_element,
        ),
        Hypothesis(
            "mask missing",
            "equals the gradient without the mask: check that the backward pass applies it",
            _mask_missing,
            covers=("derivative missing", "another option"),
        ),
        Hypothesis(
            "mask scale missing",
            "equals the gradient without the mask's scale 1 / (1 - p): check that the backward pass applies it",
            _mask_scale_missing,
            covers=("another option",),
        ),
        Hypothesis(
            "attention scale missing",
            "equals the gradient without the scale of the scores: check that the backward pass applies it",
            _scale_missing,
        ),
        Hypothesis(
            "softmax element by element",
            "equals dout times the diagonal of softmax's Jacobian: check that every output depends on every input",
            _element_by_element,
        ),
        Hypothesis(
            "normalisation term missing",
            "equals the gradient without {}: check the backward formula, where mean and variance depend on the input",
            _terms_missing,
        ),
        Hypothesis(
            "training formula",
            "equals the formula of training, in evaluation: check that the given statistics are held constant",
            _training_formula,
        ),
        Hypothesis("ddof", "equals what another divisor of the variance gives ({}): check n against n - 1", _ddof),
        Hypothesis("eps", "equals what eps elsewhere gives ({}): check where eps is added, and how large it is", _eps),
        Hypothesis(
            "reduction",
            "equals what {} gives: check the factor 1/N of the mean",
            _reduction,
            covers=("factor 1/N missing", "factor 1/N too many"),
        ),
        Hypothesis(
            "bias not summed",
            "equals the cotangent not summed over {}: check the sum that makes the bias' gradient",
            _bias,
            covers=("broadcast not summed", "derivative missing"),
        ),
        Hypothesis(
            "broadcast not summed",
            "equals the gradient not summed over the axes that were broadcast: check that it gets the operand's shape",
            _broadcast,
        ),
        Hypothesis(
            "assigned, not accumulated",
            "equals the gradient with one pick of each index: check that what repeated indices get is added up",
            _assigned,
        ),
        Hypothesis(
            "one time step",
            "equals the gradient of the {} time step alone: check that weights add up their gradients over time",
            _one_step,
        ),
        Hypothesis(
            "gate order",
            "equals what the gates' rows in the order {} give: check the order of the gates in weights and biases",
            _gate_order,
            covers=("halves exchanged",),
        ),
        Hypothesis(
            "approximate gelu", "equals what {} gives: check which form of gelu each of the two passes has", _gelu
        ),
        Hypothesis(
            "another option",
            "equals what {} gives: check that the option reaches both passes",
            _other_option,
            covers=("another activation", "normalisation term missing"),
        ),
        Hypothesis(
            "derivative missing",
            "equals the cotangent as it came: check that the layer's derivative is multiplied in",
            _derivative_missing,
            covers=("another activation", "derivative at the output"),
        ),
        Hypothesis(
            "derivative at the output",
            "equals the derivative taken at the layer's output: check that it is taken at the input",
            _at_output,
        ),
        Hypothesis(
            "derivative at the input",
            "equals the formula for the derivative from the output, at the input: check what is cached",
            _at_input,
        ),
        Hypothesis(
            "derivative twice",
            "equals the gradient times the derivative once more: check that it is applied once",
            _twice,
        ),
        Hypothesis(
            "product term missing",
            "equals one of the two terms of the product rule: check that the other one is added",
            _one_term,
            covers=("another activation",),
        ),
        Hypothesis(
            "another activation",
            "equals the derivative of {}: check which activation the backward pass has",
            _other_activation,
        ),
        Hypothesis(
            "ties",
            "equals what another treatment of ties gives ({}): check which of equal elements get the gradient",
            _ties,
        ),
        Hypothesis(
            "another subgradient",
            "equals what the {} gives: check that the choice at the kink is the same for every element",
            _subgradient,
        ),
        Hypothesis("zero", "is zero: check that the gradient reaches this argument", _zero),
        Hypothesis(
            "sign",
            "equals the gradient with the opposite sign: check the sign of the derivative",
            _opposite,
            covers=("derivative missing", "arguments exchanged"),
        ),
        Hypothesis("sign lost", "equals the gradient's magnitude: check that its sign is kept", _magnitude),
        Hypothesis(
            "factor 2", "equals {} the gradient: check the factor 2, as the derivative of a square has it", _two
        ),
        Hypothesis(
            "factor 1/N missing", "equals the gradient without the factor 1/N ({}): check the reduction", _times_n
        ),
        Hypothesis(
            "factor 1/N too many", "equals the gradient times 1/N ({}): check whether to sum or to average", _over_n
        ),
        Hypothesis(
            "arguments exchanged", "equals the gradients of {}, exchanged: check which is handed to which", _exchanged
        ),
        Hypothesis(
            "transposed",
            "equals the gradient transposed: check the order of its axes",
            _transposed,
            covers=("another layout",),
        ),
        Hypothesis(
            "halves exchanged", "equals the gradient with its halves exchanged along {}: check their order", _halves
        ),
        Hypothesis(
            "flipped", "equals the gradient flipped along {}: check convolution against cross-correlation", _flipped
        ),
        Hypothesis("shifted", "equals the gradient one element off along {}: check the padding", _shifted),
        Hypothesis(
            "another layout",
            "equals the gradient in another layout: check the order of its axes and elements",
            _laid_out,
        ),
        Hypothesis(
            "operands rounded",
            "equals the gradient of operands rounded to {}: check the precision of matrix products",
            _operands_rounded,
        ),
        Hypothesis(
            "lower precision",
            "agrees within the rounding of {}, in whose numbers it is: check the dtype of the computation",
            _lower_precision,
            covers=("operands rounded",),
        ),
    )
}
"""Name -> hypothesis, the most specific first."""
