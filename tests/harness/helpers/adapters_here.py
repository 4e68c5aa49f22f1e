"""Adapters that are right, wrong, or ill-behaved; the tests of the command line have a copy where they work."""

import os
import signal
from pathlib import Path
from typing import ClassVar

from gradproof.adapters.base import Composed, TableAdapter
from gradproof.reference import LAYERS, NumpyReference
from gradproof.reference.algorithms import ALGORITHMS


class Right(NumpyReference):
    name = "right"


class Wrong(NumpyReference):
    """Leaves out the derivative of tanh."""

    name = "wrong"

    def __init__(self):
        super().__init__(rows={"tanh": (LAYERS["tanh"].forward, lambda dout, cache: {"x": dout})})


class Marks(NumpyReference):
    """Leaves a file behind when it is run."""

    name = "marks"

    def forward(self, network, values, dtype):
        Path("was-run").touch()
        return super().forward(network, values, dtype)


class Small(NumpyReference):
    """Has two layers."""

    name = "small"

    def supports(self, layer, options, dtype):
        return layer.name in ("tanh", "linear")


class Tabled(TableAdapter, NumpyReference):
    """Has a function of its own for one layer, and puts another together."""

    name = "tabled"
    rows: ClassVar = {"gelu": abs, "mse": Composed(abs)}


class Counting(NumpyReference):
    """Does something at the fourth network that `check` draws; in probes the node is named after its layer."""

    seen = frozenset()

    def forward(self, network, values, dtype):
        if network.nodes[-1].name != network.nodes[-1].layer.name:
            self.seen |= {network}
        if len(self.seen) > 3:
            self.happen()
        return super().forward(network, values, dtype)


class Interrupted(Counting):
    name = "interrupted"

    def happen(self):
        raise KeyboardInterrupt


class Signalled(Counting):
    name = "signalled"

    def happen(self):
        os.kill(os.getppid(), getattr(signal, os.environ["SIGNAL"]))  # the adapter runs in a process of its own


class Exits(Counting):
    name = "exits"

    def happen(self):
        raise SystemExit(0)


class Spoilt(NumpyReference):
    """Something is wrong wherever there is a softmax, a sigmoid, a multiply or an mse."""

    name = "spoilt"

    def backward(self, forward, cotangent):
        gradients = super().backward(forward, cotangent)
        layers = {node.layer.name for node in forward.tape[0].nodes}
        name = forward.tape[0].inputs[0].name
        if "softmax" in layers:
            raise RuntimeError("no softmax")
        if "sigmoid" in layers:
            return None
        if "multiply" in layers:
            return {**gradients, name: None}
        if "mse" in layers:
            return {**gradients, name: gradients[name] * float("nan")}
        return gradients


class Lossy(NumpyReference):
    """Takes log cosh as a difference of logarithms."""

    name = "lossy"

    def __init__(self):
        super().__init__(rows={"log_cosh": ALGORITHMS["log_cosh"][0].row})


class LowerPrecision(NumpyReference):
    """Has one layer, in which every operation rounds to bfloat16."""

    name = "coarse"

    def supports(self, layer, options, dtype):
        return layer.name == "sigmoid"


class NoVersion(NumpyReference):
    name = "noversion"

    def version(self):
        raise RuntimeError("no version")


class NoSupports(NumpyReference):
    name = "nosupports"

    def supports(self, layer, options, dtype):
        raise RuntimeError("cannot tell")


class NoBackward(NumpyReference):
    name = "nobackward"

    def backward(self, forward, cotangent):
        raise RuntimeError("no backward pass")


class Incomplete:
    name = "incomplete"

    def forward(self, network, values, dtype):
        pass


class Unmade(NumpyReference):
    def __init__(self):
        raise RuntimeError("no device")
