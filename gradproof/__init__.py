"""gradproof: random networks, one set of numbers, a backward pass written by hand, and yours.

What is imported from here is public, and nothing else is. Frameworks are imported when they are asked for.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradproof.adapters.base import Composed as Composed
    from gradproof.adapters.functional import FunctionalAdapter as FunctionalAdapter
    from gradproof.adapters.tape import TapeAdapter as TapeAdapter
    from gradproof.cli import ExitCode as ExitCode
    from gradproof.model.adapter import Adapter as Adapter
    from gradproof.model.adapter import AdapterError as AdapterError
    from gradproof.model.adapter import Forward as Forward
    from gradproof.model.layer import Layer as Layer
    from gradproof.model.network import Network as Network
    from gradproof.reference import LAYERS as LAYERS
    from gradproof.reference import NumpyReference as NumpyReference
    from gradproof.run.check import check as check
    from gradproof.run.check import replay as replay
    from gradproof.run.proof import prove as prove
    from gradproof.run.results import Report as Report
    from gradproof.subject.own_layers import load_layers as load_layers

__version__ = version("gradproof")

_HOMES = {
    "Adapter": "model.adapter",
    "AdapterError": "model.adapter",
    "Composed": "adapters.base",
    "ExitCode": "cli",
    "Forward": "model.adapter",
    "FunctionalAdapter": "adapters.functional",
    "LAYERS": "reference",
    "load_layers": "subject.own_layers",
    "Layer": "model.layer",
    "Network": "model.network",
    "NumpyReference": "reference",
    "Report": "run.results",
    "TapeAdapter": "adapters.tape",
    "check": "run.check",
    "prove": "run.proof",
    "replay": "run.check",
}
"""Public name -> the module that has it."""

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    """A public name, whose module is imported when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gradproof' has no attribute {name!r}; public: {', '.join(__all__)}")
    return getattr(import_module(f"gradproof.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
