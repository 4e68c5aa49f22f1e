"""Layers of one's own: where they may come from, which rows they bring, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradproof.reference import LAYERS
from gradproof.run.check import check
from gradproof.subject import own_layers
from gradproof.subject.own_layers import OwnLayersError, load_installed_layers, load_layers
from gradproof.subject.registry import load_adapter

HALVE = '''
from gradproof import Layer

def forward(x):
    """f(x) = x / 2."""
    return 0.5 * x, None

def backward(dout, cache):
    """f'(x) = 1 / 2."""
    return {"x": 0.5 * dout}

LAYERS = (Layer("halve", "activation", "activations", forward, backward),)
ROWS = {"any": {"halve": lambda x: 0.5 * x}}
'''


@pytest.fixture(autouse=True)
def _forget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The table as it was, whatever a test adds to it."""
    monkeypatch.chdir(tmp_path)
    before, loaded = dict(LAYERS), dict(own_layers._loaded)
    yield
    for table, kept in ((LAYERS, before), (own_layers._loaded, loaded)):
        table.clear()
        table.update(kept)  # type: ignore[arg-type]


def written(text: str, name: str = "mine.py") -> str:
    Path(name).write_text(text)
    return name


def test_a_file_adds_its_layers_once() -> None:
    (layer,) = load_layers(written(HALVE))
    assert LAYERS["halve"] is layer
    assert load_layers("mine.py") == (layer,)
    assert load_layers(Path("mine.py").absolute()) == (layer,)


@pytest.mark.parametrize("isolation", [False, True])
def test_one_row_may_serve_every_framework(isolation: bool) -> None:
    pytest.importorskip("torch", reason="torch is not installed: pip install 'gradproof[torch]'")
    load_layers(written(HALVE))
    report = check(["torch"], networks=4, seed=1, layers=["halve"], max_nodes=2, isolation=isolation)
    assert report.agrees
    assert {tally.networks for tally in report.tallies.values()} == {4}


def test_an_adapter_keeps_the_rows_that_it_has() -> None:
    pytest.importorskip("torch", reason="torch is not installed: pip install 'gradproof[torch]'")
    plain: Any = load_adapter("torch")
    load_layers(written(HALVE.replace('"halve": lambda', '"tanh": None, "halve": lambda')))
    given: Any = load_adapter("torch")
    assert given.rows["tanh"] is plain.rows["tanh"]
    assert set(given.rows) - set(plain.rows) == {"halve"}


def test_a_layer_without_a_row_is_not_supported() -> None:
    pytest.importorskip("torch", reason="torch is not installed: pip install 'gradproof[torch]'")
    load_layers(written(HALVE.partition("ROWS")[0]))
    report = check(["torch"], networks=3, seed=1, layers=["halve"], max_nodes=1, isolation=False)
    assert {tally.unsupported["halve"] for tally in report.tallies.values()} == {3}


def test_an_installed_package_brings_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    written(HALVE, "package_of_layers.py")
    monkeypatch.syspath_prepend(Path.cwd())
    entry = EntryPoint("halves", "package_of_layers", own_layers.GROUP)
    monkeypatch.setattr(own_layers, "entry_points", lambda group: [entry] if group == own_layers.GROUP else [])
    load_installed_layers()
    assert "halve" in LAYERS
    assert np.array_equal(LAYERS["halve"].forward(np.array([3.0]))[0], [1.5])


REFUSED = {
    "x = 1": "mine.py has no layers; expected a Python file, or an entry point of the group 'gradproof.layers', with ",
    "LAYERS = ('tanh',)": "mine.py has no layers; expected ",
    HALVE.replace('"halve"', '"tanh"'): "mine.py: there is a layer named 'tanh' already; give yours another name",
    HALVE + "ROWS = {'torch': 3}": "mine.py: ROWS must be a mapping, adapter -> layer -> function, got {'torch': 3}",
}


@pytest.mark.parametrize(("text", "message"), REFUSED.items(), ids=["none", "names", "a name that is taken", "rows"])
def test_what_is_no_file_of_layers_is_refused(text: str, message: str) -> None:
    before = dict(LAYERS)
    with pytest.raises(OwnLayersError) as refusal:
        load_layers(written(text))
    assert str(refusal.value).startswith(message)
    assert before == LAYERS


def test_a_file_that_is_missing_or_does_not_import_is_refused() -> None:
    with pytest.raises(OwnLayersError, match=r"nowhere\.py'; expected a Python file"):
        load_layers("nowhere.py")
    with pytest.raises(OwnLayersError, match=r"mine\.py cannot be imported: ZeroDivisionError"):
        load_layers(written("1 / 0"))
    with pytest.raises(OwnLayersError, match=r"unknown layers 'nowhere'; installed: "):
        load_layers("nowhere")
