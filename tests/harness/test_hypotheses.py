"""What hypotheses compute by formulas of their own is, but for the mistake, what the reference computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from gradproof.draw.drawing import Drawn, draw_each
from gradproof.model.tensors import gradient_of, value_of
from gradproof.verdict.hypotheses import attention, gated, normalization, recurrent
from gradproof.verdict.hypotheses.suspect import Guess, Suspect
from gradproof.verdict.sweep import Sweep, alone_as_the_sweep_has_it

SEED = 3


def suspects(layer: str, count: int = 40) -> list[Suspect]:
    """The layer alone, with many options, each of its arguments an array of its own."""
    drawn: list[Drawn] = []
    draw_each(drawn.append, count, SEED, [layer], 1)
    cases = [each.case("float64") for each in drawn]
    found = [Suspect(alone_as_the_sweep_has_it(Sweep(each, {}), each, each.network.nodes[-1]), {}) for each in cases]
    return [each for each in found if "running_mean" not in each.arrays]


def _rotary(suspect: Suspect) -> Guess:
    back = partial(attention.turned, keywords=suspect.keywords)
    return suspect.computed(
        lambda arrays, dout: {"x": back(dout, sign=-1.0, shift=0)},
        "",
        lambda arrays: back(arrays["x"], sign=1.0, shift=0),
    )


UNCHANGED: dict[str, Callable[[Suspect], Guess]] = {
    **dict.fromkeys(attention.AROUND, lambda suspect: attention.attending(suspect, attention.within)),
    "rotary": _rotary,
    **dict.fromkeys(normalization.NORMS, lambda suspect: next(normalization.with_statistics(suspect, ""))),
    **dict.fromkeys(
        ("glu", "swiglu", "geglu"),
        lambda suspect: suspect.computed(
            partial(gated.gradients, suspect, lambda function, gate, value: gated.slope_of(function, gate))
        ),
    ),
    **dict.fromkeys(
        recurrent.STATES,
        lambda suspect: suspect.computed(
            partial(recurrent.walked_back, suspect, lambda run, at, state, after, before: before, slice(None))
        ),
    ),
}


@pytest.mark.parametrize("layer", UNCHANGED)
def test_a_formula_without_its_mistake_is_right(layer: str) -> None:
    compared = 0
    for suspect in suspects(layer):
        predicted = suspect.predicted(UNCHANGED[layer](suspect))
        np.testing.assert_allclose(predicted[value_of(suspect.node.name)], suspect.out, rtol=1e-9, atol=1e-9)
        for argument, source in suspect.node.sources:
            if argument in suspect.gradients and not argument.startswith("out_proj"):
                got = predicted[gradient_of(source)]
                np.testing.assert_allclose(got, suspect.gradients[argument], rtol=1e-8, atol=1e-9, err_msg=argument)
                compared += 1
    assert compared >= 20
