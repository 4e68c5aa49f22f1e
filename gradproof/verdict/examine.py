"""One adapter on one case: run it, check every equation of the sweep, and name the layer whose equation fails."""

from __future__ import annotations

from dataclasses import replace

from gradproof.model.case import Case
from gradproof.verdict.blame import blamed, wrong_alone
from gradproof.verdict.examination import Examination
from gradproof.verdict.judging import Subject, verdict_on


def examine(subject: Subject, case: Case) -> Examination:
    """Run the adapter on the case, check every equation, and where one fails name the guilty nodes."""
    found = verdict_on(subject, case)
    if found.trace.before:  # no layer of this network need have ended the process
        return found
    if found.trace.failure:
        return replace(found, culprits=tuple(wrong_alone(subject, found, case.network.nodes)))
    return found if found.agrees else replace(found, culprits=tuple(blamed(subject, found)))
