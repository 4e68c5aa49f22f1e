"""The suite itself: every gradient of every adapter, on random networks, on kinks, and on worked examples.

Run it against your own adapter with `pytest --pyargs gradproof.conformance --gradproof-adapter my_module:MyAdapter`.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from gradproof.draw.architectures import ARCHITECTURES, drawn_architectures
from gradproof.draw.drawing import Drawn, drawn_networks
from gradproof.draw.examples import EXAMPLES
from gradproof.draw.hypothesis_internals import BACKEND
from gradproof.model.spec import save_case
from gradproof.pytest_plugin import Target
from gradproof.run.check import FAILURE_DIRECTORY, Run
from gradproof.show.report import diff_text, headline, warnings
from gradproof.verdict.examination import Examination

PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
"""All but the phase that explains a failure by tracing lines: the per-layer diff says more, at once."""


class NothingComparedError(AssertionError):
    """An adapter that could run none of the networks: that is no agreement."""


class DisagreementError(AssertionError):
    """An adapter's tensors do not agree with the reference; the note holds the per-layer diff."""


def require_agreement(run: Run, found: list[Examination]) -> None:
    __tracebackhide__ = True
    for examination in found:
        if not (examination.agrees or examination.known):
            name = f"pytest-{examination.adapter}-{examination.case.dtype}"
            spec = save_case(examination.case, FAILURE_DIRECTORY, name)
            error = DisagreementError(headline(examination))
            error.add_note(diff_text(examination, run.report, str(spec)))
            raise error


def require_something(run: Run) -> None:
    __tracebackhide__ = True
    for tally in run.report.tallies.values():
        if not tally.networks:
            raise NothingComparedError("; ".join(warnings(run.report)))


def skip_what_was_not_run(run: Run) -> None:
    if not any(tally.networks for tally in run.report.tallies.values()):
        pytest.skip("; ".join(warnings(run.report)))


def test_every_gradient_agrees(gradproof_run: Run, gradproof_networks: int, gradproof_layers: tuple[str, ...]) -> None:
    gradproof_run.prepare(divergences=False)

    @settings(
        backend=BACKEND,
        max_examples=gradproof_networks,
        phases=PHASES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn_networks(gradproof_layers))
    def every_gradient_agrees(drawn: Drawn) -> None:
        __tracebackhide__ = True
        require_agreement(gradproof_run, gradproof_run.examine(drawn))

    every_gradient_agrees()
    require_something(gradproof_run)


def test_the_derivative_at_every_kink_is_a_valid_one(gradproof_run: Run) -> None:
    gradproof_run.prepare(divergences=False)
    require_agreement(gradproof_run, gradproof_run.probe())


def test_every_known_divergence_still_shows(gradproof_run: Run) -> None:
    gradproof_run.prepare()
    gradproof_run.probe()
    assert not gradproof_run.report.stale, "remove these entries from the adapter's known-divergence file"


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_example_agrees(gradproof_run: Run, target: Target, name: str) -> None:
    case = EXAMPLES[name].case(target.dtype)
    gradproof_run.prepare(divergences=False)
    require_agreement(gradproof_run, gradproof_run.examine_case(case))
    skip_what_was_not_run(gradproof_run)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_agrees(gradproof_run: Run, name: str) -> None:
    gradproof_run.prepare(divergences=False)
    for drawn in drawn_architectures([name], count=1, seed=1):
        require_agreement(gradproof_run, gradproof_run.examine(drawn))
    skip_what_was_not_run(gradproof_run)
