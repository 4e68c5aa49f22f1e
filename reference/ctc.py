"""Connectionist temporal classification (Graves et al. 2006).

Legend: T time steps, N sequences, C classes with the blank, S columns of the targets (the option `labels`), L the
length of a target, K = 2 S + 1 states.
A target is read along the states blank, label 1, blank, label 2, ..., blank. A path starts in one of the first two,
ends in one of the last two, and in each step stays, moves on by one, or skips the blank between two unequal labels;
its score is the sum of the log-probabilities of what its states emit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gradproof.model.layer import Argument, Domain, Layer, ShapeError, index_domain
from gradproof.model.options import Choice, Integer, Option, Options, OptionValue, Shape, is_integer
from gradproof.reference.common import Array, Gradients
from gradproof.reference.softmax import log_softmax_backward, log_softmax_forward


class Lattice(NamedTuple):
    """What forward keeps of the paths.

    states: the class that each state emits, (N, K). skips: whether a path may come from two states before, (N, K).
    ends: where a path may end, (N, K). emissions: log-probabilities of the states, (T, N, K).
    arriving, arrives: log of the summed probability of all paths up to a state at a time, its own emission included,
        and whether there is any path, (T, N, K). total, feasible: the same of all whole paths, (N,).
    """

    states: Array
    skips: Array
    ends: Array
    emissions: Array
    arriving: Array
    arrives: Array
    total: Array
    feasible: Array


class Paths(NamedTuple):
    """What ctc keeps: log_probabilities (T, N, C), the paths' lattice, and input_lengths and share (N,).

    share: what each sequence's loss is multiplied by.
    """

    log_probabilities: Array
    lattice: Lattice
    input_lengths: Array
    share: Array
    zero_infinity: bool


def ctc_forward(
    logits: Array,
    targets: Array,
    input_lengths: Array,
    target_lengths: Array,
    *,
    blank: int,
    zero_infinity: bool,
    reduction: str,
) -> tuple[Array, Paths]:
    """l = -log of the summed probability of all paths through the target, the classes' probabilities softmax(logits).

    Shapes: logits (T, N, C), targets (N, S), both lengths (N,), l (N,). Without any path l is infinite, or 0 with
    zero_infinity. Of the lengths, targets beyond L and logits beyond input_length are not read. The mean over the
    batch is taken of l / max(L, 1).
    """
    log_probabilities, _ = log_softmax_forward(logits, axis=-1)
    lattice = _lattice(log_probabilities, targets, input_lengths, target_lengths, blank)
    loss = np.where(lattice.feasible, -lattice.total, 0.0 if zero_infinity else np.inf)
    share = _shares(target_lengths, reduction)
    out = loss if reduction == "none" else (share * loss).sum()
    return out, Paths(log_probabilities, lattice, input_lengths, share, zero_infinity)


def ctc_backward(dout: Array, kept: Paths) -> Gradients:
    """dlogits_tc = g (softmax(logits_t)_c - o_tc), o_tc the share of the paths' probability that emits c at time t.

    It is -g o_tc with respect to the log-probabilities, and goes from there through log_softmax. It is 0 beyond
    input_length. Where there is no path it is 0 with zero_infinity; else there is no gradient, and NaN says so.
    """
    log_probabilities, lattice, input_lengths = kept.log_probabilities, kept.lattice, kept.input_lengths
    emitted = lattice.states[..., None] == np.arange(log_probabilities.shape[-1])
    occupancy = np.einsum("tnk,nkc->tnc", _occupancy(lattice, input_lengths), np.where(emitted, 1.0, 0.0))
    gradients = log_softmax_backward(-(dout * kept.share)[:, None] * occupancy, (log_probabilities, -1))
    within = (np.arange(log_probabilities.shape[0])[:, None] < input_lengths)[..., None]
    lost = within & ~lattice.feasible[:, None]
    return {"logits": gradients["x"] if kept.zero_infinity else np.where(lost, np.nan, gradients["x"])}


def _shares(target_lengths: Array, reduction: str) -> Array:
    """What each sequence's loss is multiplied by."""
    if reduction == "mean":
        return 1.0 / (np.maximum(target_lengths, 1) * target_lengths.size)
    return np.ones(target_lengths.shape)


def _lattice(
    log_probabilities: Array, targets: Array, input_lengths: Array, target_lengths: Array, blank: int
) -> Lattice:
    states = np.full((targets.shape[0], 2 * targets.shape[1] + 1), blank)
    states[:, 1::2] = targets
    unequal = (states[:, 2:] != states[:, :-2]) & (states[:, 2:] != blank)
    skips = np.concatenate([np.zeros_like(states[:, :2], dtype=bool), unequal], axis=1)
    position = np.arange(states.shape[1])
    last = 2 * target_lengths[:, None]
    ends = (position == last) | (position == last - 1)
    emissions = np.take_along_axis(log_probabilities, states[None], axis=-1)
    arriving, arrives = _arrivals(emissions, skips)
    final = (input_lengths - 1)[None, :, None]
    score, possible = (np.take_along_axis(each, final, axis=0)[0] for each in (arriving, arrives))
    total, feasible = _log_sum(score, possible & ends, axis=1)
    return Lattice(states, skips, ends, emissions, arriving, arrives, total, feasible)


def _arrivals(emissions: Array, skips: Array) -> tuple[Array, Array]:
    """Of all paths up to each state, from the first time step on."""
    possible = np.broadcast_to(np.arange(skips.shape[1]) < 2, skips.shape)
    score = np.where(possible, emissions[0], 0.0)
    scores, possibles = [score], [possible]
    for emission in emissions[1:]:
        ways = np.stack([possible, _later(possible, 1), _later(possible, 2) & skips])
        score, possible = _log_sum(np.stack([score, _later(score, 1), _later(score, 2)]), ways, axis=0)
        score = score + emission
        scores, possibles = [*scores, score], [*possibles, possible]
    return np.stack(scores), np.stack(possibles)


def _departures(lattice: Lattice, input_lengths: Array) -> tuple[Array, Array]:
    """Of all paths on from each state, its own emission excluded, from the last time step back."""
    score, possible = np.zeros_like(lattice.emissions[0]), np.zeros_like(lattice.ends)
    scores: list[Array] = []
    possibles: list[Array] = []
    for time in reversed(range(len(lattice.emissions))):
        skipped = _earlier(possible & lattice.skips, 2)
        ways = np.stack([possible, _earlier(possible, 1), skipped])
        score, possible = _log_sum(np.stack([score, _earlier(score, 1), _earlier(score, 2)]), ways, axis=0)
        is_final = (input_lengths - 1 == time)[:, None]
        score, possible = np.where(is_final, 0.0, score), np.where(is_final, lattice.ends, possible)
        scores, possibles = [score, *scores], [possible, *possibles]
        score = score + lattice.emissions[time]
    return np.stack(scores), np.stack(possibles)


def _occupancy(lattice: Lattice, input_lengths: Array) -> Array:
    """The share of all paths' probability that passes through each state at each time, (T, N, K)."""
    departing, departs = _departures(lattice, input_lengths)
    passes = lattice.arrives & departs
    score = np.where(passes, lattice.arriving + departing - lattice.total[:, None], 0.0)
    return np.where(passes, np.exp(score), 0.0)


def _later(along: Array, states: int) -> Array:
    """The row moved to later states; what moves in is 0, or False."""
    return np.concatenate([np.zeros_like(along[:, :states]), along[:, :-states]], axis=1)


def _earlier(along: Array, states: int) -> Array:
    """The row moved to earlier states; what moves in is 0, or False."""
    return np.concatenate([along[:, states:], np.zeros_like(along[:, :states])], axis=1)


def _log_sum(scores: Array, possible: Array, axis: int) -> tuple[Array, Array]:
    """The logarithm of the summed exponentials of what is possible, and whether anything is; 0 where nothing is.

    No infinity takes the place of the logarithm of 0, so that rounding can be observed on every number.
    """
    any_possible: Array = np.any(possible, axis=axis)
    highest = np.where(possible, scores.real, -np.inf).max(axis=axis, keepdims=True)
    highest = np.where(np.expand_dims(any_possible, axis), highest, 0.0)
    terms = np.where(possible, np.exp(np.where(possible, scores - highest, 0.0)), 0.0)
    total = np.where(any_possible, terms.sum(axis=axis), 1.0)
    return np.squeeze(highest, axis) + np.log(total), any_possible


@dataclass(frozen=True)
class ClassIndex:
    """One of the classes, the last axis of the first input."""

    def contains(self, value: OptionValue, shape: Shape) -> bool:
        return is_integer(value) and 0 <= value < shape[-1]  # type: ignore[operator]

    def describe(self, shape: Shape) -> str:
        return f"a class of an input of shape {list(shape)}: 0 to {shape[-1] - 1}"

    def choices(self, shape: Shape) -> Sequence[OptionValue]:
        return (0, shape[-1] - 1)


def _labels(shape: Shape, options: Options) -> Domain:
    """Every class but the blank."""
    blank = int(options["blank"])  # type: ignore[arg-type]
    if blank == 0:
        return Domain("index", shape[-1], low=1)
    return Domain("index", blank, extra=tuple(range(blank + 1, shape[-1])))


def _targets(shape: Shape, options: Options) -> tuple[Shape, ...]:
    return ((shape[1], int(options["labels"])),)  # type: ignore[arg-type]


def _one_per_sequence(shape: Shape, options: Options) -> tuple[Shape, ...]:
    return (shape[1:2],)


def _input_length(shape: Shape, options: Options) -> Domain:
    return Domain("index", shape[0] + 1, low=1)


def _target_length(shape: Shape, options: Options) -> Domain:
    return index_domain(int(options["labels"]) + 1)  # type: ignore[arg-type]


ARGUMENTS = (
    Argument("logits"),
    Argument("targets", _labels, _targets),
    Argument("input_lengths", _input_length, _one_per_sequence),
    Argument("target_lengths", _target_length, _one_per_sequence),
)


def _output_shape(shapes: Sequence[Shape], options: Options) -> Shape:
    logits = shapes[0]
    if 0 in logits or logits[2] < 2:
        raise ShapeError(
            f"needs logits (time, batch, classes) with a time step, a sequence and 2 classes, got shape {list(logits)}"
        )
    for argument, shape in zip(ARGUMENTS[1:], shapes[1:], strict=True):
        (expected,) = argument.shapes(logits, options)
        if shape != expected:
            raise ShapeError(
                f"logits of shape {list(logits)} need {argument.name} of shape {list(expected)}, got {list(shape)}"
            )
    return logits[1:2] if options["reduction"] == "none" else ()


LAYERS = (
    Layer(
        "ctc",
        "loss",
        "ctc",
        ctc_forward,
        ctc_backward,
        (
            Option("labels", Integer(1, (1, 3)), structural=True),
            Option("blank", ClassIndex(), 0),
            Option("zero_infinity", Choice((False, True)), False),
            Option("reduction", Choice(("mean", "none", "sum")), "mean"),
        ),
        ARGUMENTS,
        ranks=(3, 3),
        shapes=((4, 2, 3), (1, 2, 3), (6, 3, 4), (5, 3, 2)),
        output_shape=_output_shape,
    ),
)
