"""What a person reads of known divergences."""

from __future__ import annotations

from pathlib import Path

from gradproof.model.adapter import Adapter
from gradproof.model.case import Case
from gradproof.reference import LAYERS
from gradproof.run.check import replay
from gradproof.run.results import Report
from gradproof.show.report import closing_line, diff_text, headline, warnings
from gradproof.subject.registry import load_adapter
from gradproof.verdict.divergence import Divergence
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject
from helpers.networks import node
from helpers.reports import case, fault, gated, settled

TANH_IS_OFF = '''
from gradproof.reference import LAYERS, NumpyReference


def forward(x):
    out, kept = LAYERS["tanh"].forward(x)
    return out, (x, kept)


def backward(dout, cache):
    """10 % too large from 1.5 to 2.5."""
    x, kept = cache
    off = (x > 1.5) & (x < 2.5)
    return {"x": LAYERS["tanh"].backward(dout, kept)["x"] * (1.1 if {wrong} else 1.0) ** off}


class Mine(NumpyReference):
    name = "mine"

    def __init__(self):
        super().__init__(rows={"tanh": (forward, backward)})

    def version(self):
        return "1.0"
'''

ENTRY = """
[[divergence]]
layer = "tanh"
dtypes = ["float64"]
argument = "x"
between = [1.5, 2.5]
kinds = ["gradient"]
versions = ["1."]
max_relative_error = 0.11
witness = { x = 2.0 }
reason = "tanh is taken from a table"
link = "https://example.org/tanh"
"""


def mine(directory: Path, wrong: bool) -> Adapter:
    """An adapter with a known-divergence file beside it."""
    stem = f"mine_{'wrong' if wrong else 'right'}"
    file = directory / f"{stem}.py"
    file.write_text(TANH_IS_OFF.replace("{wrong}", str(wrong)))
    file.with_suffix(".toml").write_text(ENTRY)
    return load_adapter(f"{file}:Mine")


def steep(layer: str = "identity") -> Case:
    """x[2] -> tanh -> layer, one element where the divergence shows."""
    return case((node("t", "tanh", "x"), node("o", layer, "t")), [1.0, 2.0], x=[0.0, 2.0])


def test_a_known_divergence_is_told_and_no_disagreement(tmp_path: Path) -> None:
    report = replay(steep(), [mine(tmp_path, wrong=True)])
    assert report.agrees
    assert (report.examinations, report.disagreements) == ([], [])
    assert [(each.tensor, each.cause) for each in report.known] == [("x", "tanh is taken from a table")]
    assert warnings(report) == ["known: mine float64 tanh: tanh is taken from a table (1 tensor)"]
    (tally,) = report.tallies.values()
    assert (tally.networks, tally.known, tally.disagreeing, sum(tally.wrong_layers.values())) == (1, 1, 0, 0)


def known_divergence() -> Divergence:
    return Divergence("relu", ("float64",), "x", (-9.0, 0.0), ("gradient",), ("1",), {"x": -1.0}, "why", "link", 0, 9)


def test_headline_of_a_known_divergence() -> None:
    subject = Subject(fault("relu_derivative_left_out"), {}, (known_divergence(),))
    found = examine(subject, gated())
    assert settled(headline(found)) == [
        "reference float64: relu (node h) diverges as known: d x at [1, 0]: expected 0, got 6 (inf noise units)"
    ]
    report = Report(0, ("float64",), {"reference": "1"}, {"reference": "reference"})
    assert diff_text(found, report, None).splitlines()[7].endswith(" known divergence")


def test_an_unknown_fault_beside_a_known_one_is_the_headline(tmp_path: Path) -> None:
    adapter = mine(tmp_path, wrong=True)
    adapter._rows = {**adapter._rows, "silu": (LAYERS["silu"].forward, lambda dout, cache: {"x": dout})}  # type: ignore[attr-defined]
    report = replay(steep("silu"), [adapter])
    ((examination, _),) = report.examinations
    assert headline(examination).startswith("mine float64: silu (node o) is wrong: d t at ")
    assert [each.cause for each in report.known] == ["tanh is taken from a table"]
    assert [each.layer for each in report.disagreements] == ["silu"]
    assert str(report.disagreements[0].cause).startswith("equals the cotangent as it came")
    assert not report.agrees


def test_a_stale_divergence(tmp_path: Path) -> None:
    report = replay(steep(), [mine(tmp_path, wrong=False)])
    report.seconds = 1.25
    assert not report.agrees
    assert warnings(report) == [
        "mine float64: the known divergence of tanh (tanh is taken from a table) no longer shows at {'x': 2.0}: "
        "remove its entry"
    ]
    assert closing_line(report) == "1 known divergence stale: 1 network, 3 gradients compared in 1.2 s, seed 0"
