"""Probing an adapter: which derivative it chooses at each kink, and whether its known divergences still show."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np

from gradproof.model.adapter import Adapter
from gradproof.model.case import Case, upcast
from gradproof.model.dtypes import limits
from gradproof.model.layer import Kink, Layer, ShapeError
from gradproof.model.network import Input, Network, NetworkError, Node
from gradproof.model.options import Options, Shape
from gradproof.model.tensors import Role, Wrong
from gradproof.reference import LAYERS, NumpyReference
from gradproof.verdict.divergence import Divergence, divergences_of
from gradproof.verdict.examination import Culprit, Examination
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject
from gradproof.verdict.running import TimeLimitError, time_limit

COTANGENT = np.array([1.75, -0.625])
"""Non-uniform, and exact in every dtype."""

PARAMETER = 0.25
"""What the parameters of a probed layer are filled with."""

ROUNDING = 1e-5
"""How far a probed weight may be outside what the kink allows, or differ between elements, by rounding alone; more in
coarse dtypes."""


def probed_subject(
    adapter: Adapter, dtype: str, timeout: float = 60.0, layers: Collection[str] = LAYERS.keys()
) -> tuple[Subject, list[Examination]]:
    """The adapter with its conventions at the kinks of these layers, and what `probe_kinks` found."""
    subject = Subject(adapter, {}, applicable(adapter, dtype), timeout)
    return subject, probe_kinks(subject, dtype, layers)


def probe_kinks(subject: Subject, dtype: str, layers: Collection[str]) -> list[Examination]:
    """Take over which derivative the adapter chooses at the kinks of these layers in this dtype.

    Returns an examination of every kink where it chooses badly: a weight outside the kink's valid set becomes no
    convention; the reference's own is kept, so that the probe, and every network that meets the kink, disagrees.
    """
    outside: list[Case] = []
    for layer, kink, (case, left, right) in _probes(subject, dtype, layers):
        weight = _chosen_weight(subject.adapter, case, left, right, subject.timeout)
        if weight is not None and kink.allows(weight, rounding(dtype)):
            subject.conventions.setdefault(layer.name, {})[kink.name] = _tidied(weight, rounding(dtype))
        else:
            outside.append(case)
    return [_disagreeing(examine(subject, case)) for case in outside]


def _disagreeing(found: Examination) -> Examination:
    """The examination of a derivative that is none of those allowed.

    Where the layer's own arithmetic decides on which side of the kink a number lies, the floor is as large as the
    step of the derivative, and excuses any choice: what the probe has seen counts.
    """
    if not found.agrees:
        return found
    allowed = rounding(found.case.dtype)
    off = {
        check.key for check in found.checks if check.key.role is Role.GRADIENT and (check.max_error or 0.0) > allowed
    }
    checks = tuple(replace(check, kind=Wrong.GRADIENT) if check.key in off else check for check in found.checks)
    return replace(found, checks=checks, culprits=(Culprit(found.case.network.nodes[0], tuple(off)),))


def rounding(dtype: str) -> float:
    """How far a probed weight may be off in this dtype."""
    return max(ROUNDING, 8.0 * float(limits(dtype).eps))


def _tidied(weight: float, allowed: float) -> float:
    """The weight without its rounding error, where it is next to a simple fraction."""
    simple = float(Fraction(weight).limit_denominator(64))
    return simple if abs(simple - weight) < allowed else weight


def applicable(adapter: Adapter, dtype: str) -> tuple[Divergence, ...]:
    """The known divergences of the adapter's version in this dtype."""
    return tuple(each for each in divergences_of(adapter) if each.applies(adapter.version(), dtype))


Probe = tuple[Case, np.ndarray, np.ndarray]
"""A case on a kink, and the gradients that the left-hand and the right-hand derivative give there."""


def _probes(subject: Subject, dtype: str, layers: Collection[str]) -> Iterator[tuple[Layer, Kink, Probe]]:
    """A probe of every kink of the layers, of those that the adapter says that it can run."""
    for layer in LAYERS.values():
        for kink in layer.kinks if layer.name in layers else ():
            found = probe(layer, kink, dtype)
            if subject.supports(found[0].network, dtype):
                yield layer, kink, found


def probe(layer: Layer, kink: Kink, dtype: str) -> Probe:
    """A one-node case on the kink, with options for which its one-sided derivatives differ."""
    for values in product(*(option.domain.choices(kink.shape) for option in layer.options)):
        options = dict(zip((option.name for option in layer.options), values, strict=True))
        if not kink.shows(kink.shape, options):
            continue
        try:
            case = one_node(layer, options, kink.at(options), dtype, kink.shape)
        except NetworkError:  # these options do not fit the shape
            continue
        left, right = (first_gradient(NumpyReference({layer.name: {kink.name: w}}), case) for w in (0.0, 1.0))
        if (left != right).all():
            return case, left, right
    raise ValueError(f"layer {layer.name!r}: no options make the kink {kink.name!r} show")


Numbers = float | Mapping[str, Any]


def one_node(layer: Layer, options: Options, numbers: Numbers, dtype: str, shape: Shape = (2,)) -> Case:
    """A case of this layer alone, its first input of this shape, each argument filled with one number.

    numbers: one for all floating arguments, or one, or a nested list, per argument or parameter, integer ones too.
    Where none is given, these are filled with PARAMETER, an integer argument with the first of its integers.
    """
    options = layer.complete(options)
    arguments = [each for each in layer.arguments if each.when is None or each.when(options)]
    named = numbers if isinstance(numbers, Mapping) else {}
    given = named or dict.fromkeys((a.name for a in arguments), numbers)
    if isinstance(given.get(arguments[0].name), list):
        shape = np.shape(given[arguments[0].name])
    values: dict[str, np.ndarray] = {}
    inputs: list[Input] = []
    for argument in arguments:
        domain, fitting = argument.domain(shape, options), argument.shapes(shape, options)
        own = shape if not inputs or shape in fitting or not fitting else fitting[0]
        filling = given.get(argument.name, PARAMETER) if domain.floating else domain.integers[0]
        number = named.get(argument.name, filling)
        values[argument.name] = np.broadcast_to(np.asarray(number, dtype if domain.floating else "int64"), own).copy()
        inputs.append(Input(argument.name, own, domain))
    try:
        slots = layer.parameters([each.shape for each in inputs], options)
    except ShapeError as error:
        raise NetworkError(str(error)) from None
    node = Node.of(layer.name, layer, *values, options=options, parameters={slot: slot for slot in slots})
    network = Network(tuple(inputs), (node,))
    values |= {slot: np.full(size, given.get(slot, PARAMETER), dtype) for slot, size in slots.items()}
    cotangent = np.resize(COTANGENT, network.shapes[node.name])
    return Case(network, dtype, values, np.asarray(cotangent, dtype))


def first_gradient(adapter: Adapter, case: Case) -> np.ndarray:
    """The gradient for the first input of the case."""
    forward = adapter.forward(case.network, {k: v.copy() for k, v in case.values.items()}, case.dtype)
    gradients = adapter.backward(forward, case.cotangent.copy())
    return np.asarray(gradients[case.network.inputs[0].name], np.float64)


def _chosen_weight(adapter: Adapter, case: Case, left: np.ndarray, right: np.ndarray, timeout: float) -> float | None:
    try:
        with time_limit(timeout):
            weights = (first_gradient(adapter, case) - left) / (right - left)
    except (
        Exception,
        SystemExit,
        TimeLimitError,
    ):  # the examination of the same case, made next, reports what went wrong
        return None
    same = np.isfinite(weights).all() and np.ptp(weights) < rounding(case.dtype)
    return float(weights.flat[0]) if same else None


def stale_divergences(subject: Subject, dtype: str, layers: Collection[str] = LAYERS.keys()) -> list[Divergence]:
    """The known divergences of these layers that no longer show at their witness."""
    return [each for each in subject.divergences if each.layer in layers and not _shows(subject, each, dtype)]


def _shows(subject: Subject, entry: Divergence, dtype: str) -> bool:
    case = witness_case(entry, dtype)
    if not subject.supports(case.network, dtype):  # what is not run is not seen
        return True
    return examine(replace(subject, divergences=(entry,)), case).known


def witness_case(entry: Divergence, dtype: str) -> Case:
    """The case at which a known divergence must show."""
    layer = LAYERS[entry.layer]
    unreduced = {option.name: "none" for option in layer.options if option.name == "reduction"}
    case = one_node(layer, layer.defaults | unreduced | dict(entry.options), entry.witness, dtype)
    return replace(case, cotangent=np.asarray(upcast(case.cotangent) * entry.cotangent, dtype))
