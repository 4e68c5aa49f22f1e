"""What an adapter says that it cannot run is never run, and it may see shapes and say why."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradproof.cli import main
from gradproof.draw.examples import EXAMPLES
from gradproof.model.adapter import AdapterError, Forward
from gradproof.reference import LAYERS, NumpyReference
from gradproof.run.check import check
from gradproof.show.layers import origin
from gradproof.show.walk import walk

PICKY = '''
import math

from gradproof import NumpyReference

class Picky(NumpyReference):
    """Takes few numbers, and no negative slope but one."""

    name = "picky"

    def supports(self, layer, options, dtype, shapes):
        if any(math.prod(shape) > 8 for shape in shapes):
            return "takes 8 numbers at most"
        return options.get("negative_slope", 0.01) == 0.01

    def forward(self, network, values, dtype):
        for node in network.nodes:
            shapes = [network.shapes[name] for name in node.inputs]
            assert self.supports(node.layer, dict(node.options), dtype, shapes) is True
        return super().forward(network, values, dtype)
'''


@pytest.mark.parametrize("isolation", [False, True])
def test_only_what_is_supported_is_run_and_the_reason_is_told(
    isolation: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("picky.py").write_text(PICKY)
    report = check(
        ["picky.py:Picky"], networks=40, seed=2, dtypes=["float64"], layers=["leaky_relu"], isolation=isolation
    )
    assert report.agrees, report.examinations
    (tally,) = report.tallies.values()
    assert tally.networks > 0
    assert tally.unsupported["leaky_relu"] > 0
    assert tally.unsupported["leaky_relu: takes 8 numbers at most"] > 0
    assert tally.networks + tally.unsupported.total() == 40


def test_the_summary_tells_why_networks_were_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("picky.py").write_text(PICKY)
    monkeypatch.setenv("COLUMNS", "500")
    main(["check", "--adapter", "picky.py:Picky", "--networks", "40", "--seed", "2", "--layer", "leaky_relu"])
    shown = capsys.readouterr().out
    assert "not run, for it lacks one of their layers: " in shown
    assert "leaky_relu: takes 8 numbers at most" in shown


class Refusing(NumpyReference):
    name = "refusing"

    def supports(self, layer, options, dtype):  # type: ignore[no-untyped-def]
        return f"no {layer.name} here"


def test_the_table_and_the_walk_tell_why() -> None:
    assert origin(Refusing(), LAYERS["tanh"]) == "no tanh here"
    example, *_ = EXAMPLES.values()
    with pytest.raises(AdapterError, match=r"refusing does not support \w+ in float64 \(no \w+ here\), which "):
        walk(example, [Refusing()])


class Silent(NumpyReference):
    """Supports nothing, and fails where it is run all the same."""

    name = "silent"

    def supports(self, layer, options, dtype):  # type: ignore[no-untyped-def]
        return False

    def forward(self, network, values, dtype) -> Forward:  # type: ignore[no-untyped-def]
        raise AssertionError(f"was asked to run {network}")


def test_no_probe_asks_for_what_is_refused() -> None:
    report = check([Silent()], networks=3, seed=1, isolation=False)
    assert not report.examinations
    assert {tally.networks for tally in report.tallies.values()} == {0}
