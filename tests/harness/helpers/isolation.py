"""An adapter in a file, which does something wherever a tanh takes part, and the process that it is loaded in."""

from __future__ import annotations

import sys
import textwrap
import time
from pathlib import Path

from gradproof.subject.isolation import SECONDS_TO_LEAVE
from gradproof.verdict.examination import Examination
from helpers.networks import chain, ordinary

MODULE = '''
import ctypes, os, pathlib, signal, time
import numpy as np
from gradproof.reference import LAYERS, NumpyReference

pathlib.Path("pid").write_text(str(os.getpid()))


class Right(NumpyReference):
    name = "right"


class Mine(NumpyReference):
    """Does something in the backward pass wherever a tanh takes part."""

    name = "mine"

    def forward(self, network, values, dtype):
        self.network, self.values = network, values
        return super().forward(network, values, dtype)

    def backward(self, forward, cotangent):
        gradients = super().backward(forward, cotangent)
        if all(node.layer.name != "tanh" for node in self.network.nodes):
            return gradients
        x = self.network.inputs[0].name
        return self.spoil(forward, cotangent, gradients, x)

    def spoil(self, forward, cotangent, gradients, x):
'''


def mine(body: str, loading: str = "") -> str:
    """The request for an adapter that does this wherever a tanh takes part."""
    spoil = textwrap.indent(textwrap.dedent(body).strip(), " " * 8)
    Path("mine.py").write_text(f"{MODULE}{spoil}\n{textwrap.dedent(loading)}")
    return "mine.py:Mine"


WITH = ordinary(chain("sigmoid", "tanh"))
WITHOUT = ordinary(chain("sigmoid", "softplus"))


def told(examination: Examination) -> list[tuple[str, str | None, str]]:
    """Key, kind and what was got of everything that is wrong."""
    return [(each.key, each.kind, str(each.got)) for each in examination.wrong]


def gone(process: int) -> bool:
    """Whether the process ends within some seconds."""
    deadline = time.monotonic() + SECONDS_TO_LEAVE
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process}/stat").read_text().split()[2] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def last_child() -> int:
    """The process that loaded the adapter last."""
    return int(Path("pid").read_text())


def forget_modules_in(directory: Path) -> None:
    """Let Python import anew what was imported from files in this directory."""
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(directory):
            del sys.modules[name]
