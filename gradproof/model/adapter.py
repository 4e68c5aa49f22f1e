"""The contract between gradproof and a backward pass: what an adapter is given and what it returns."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from gradproof.model.layer import Layer
from gradproof.model.network import Network
from gradproof.model.options import Options, Shape
from gradproof.model.place import place

JAX_CACHE_VARIABLE = "GRADPROOF_JAX_CACHE"
"""The environment variable that moves JAX's compilation cache to another directory, or turns it "off"."""

TOLD = 400
"""How many characters of an adapter's own error message are repeated."""


class AdapterError(RuntimeError):
    """An adapter that was asked for and cannot be used; the message says what to do."""


class RelayedError(RuntimeError):
    """What happened to an adapter in another process; the message is what `message_of` would give there."""


class EndedError(RelayedError):
    """The process of an adapter ended. before: what had run in it before, nothing where it had just begun."""

    def __init__(self, message: str, before: str = "") -> None:
        super().__init__(message)
        self.before = before


class RelayedMemoryError(RelayedError, MemoryError):
    """An adapter in another process took more memory than there is, or than it may take."""


@dataclass(frozen=True)
class Forward:
    """What a forward pass leaves behind.

    outputs: node name -> NumPy array in the dtype asked for, for every node, as it was when it was computed.
    tape: whatever the same adapter's backward pass needs.
    live: the same arrays where they share memory with what the tape holds, so that it shows when that is overwritten;
        none where `outputs` are such arrays already, or nothing can overwrite them.
    """

    outputs: Mapping[str, np.ndarray]
    tape: Any
    live: Mapping[str, np.ndarray] = field(default_factory=dict)


class Adapter(Protocol):
    """One implementation of forward and backward. NumPy arrays in, NumPy arrays out.

    An adapter that may go on with more digits of a node's output than it gives, as one program for a whole network
    may, says so with an attribute `fused` that is True.
    """

    name: str

    def version(self) -> str:
        """The version of what is being validated."""
        ...

    def supports(self, layer: Layer, options: Options, dtype: str) -> bool | str:
        """Whether this layer, with these options, can be run in this dtype.

        It may take a fourth argument, the shapes of the layer's inputs, and may say in a sentence why not, in place of
        False.
        """
        ...

    def forward(self, network: Network, values: Mapping[str, np.ndarray], dtype: str) -> Forward:
        """Run the network.

        values: an array for every input and parameter; floating ones are in `dtype`, indices in int64.
            They must not be written to.
        """
        ...

    def backward(self, forward: Forward, cotangent: np.ndarray) -> Mapping[str, np.ndarray]:
        """The gradient of sum(cotangent * output) for every name in `network.differentiable`.

        cotangent: an array of the output's shape and dtype.
        It is called twice on one `forward`, and gives the same both times, or raises: nothing is added to a tape.
        """
        ...


def supported(adapter: Adapter, layer: Layer, options: Options, dtype: str, shapes: Sequence[Shape]) -> bool | str:
    """Whether the adapter supports the layer on inputs of these shapes: True, False, or a sentence that says why not.

    Raises AdapterError where it cannot tell.
    """
    try:
        return asked(adapter, layer, options, dtype, shapes)
    except Exception as error:
        raise AdapterError(
            f"adapter {adapter.name!r} cannot tell whether it supports {layer.name}: {message_with_place(error)}"
        ) from error


def asked(adapter: Adapter, layer: Layer, options: Options, dtype: str, shapes: Sequence[Shape]) -> bool | str:
    """The same; what the adapter raises passes."""
    supports: Callable[..., Any] = adapter.supports
    given = (layer, options, dtype, tuple(shapes)) if sees_shapes(adapter) else (layer, options, dtype)
    answer = supports(*given)
    return answer if isinstance(answer, str) else bool(answer)


def sees_shapes(adapter: Adapter) -> bool:
    """Whether what the adapter supports may hang on the shapes of a layer's inputs."""
    return len(inspect.signature(adapter.supports).parameters) > 3


def message_of(error: BaseException) -> str:
    """An error's type and message on one line, the message cut where it is a page."""
    if isinstance(error, RelayedError):  # it was cut where it was raised
        return str(error)
    message = textwrap.shorten(str(error), TOLD, placeholder=" ...")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def message_with_place(error: BaseException) -> str:
    """The same, and where in the adapter it was raised."""
    where = "" if isinstance(error, RelayedError) else place(error)
    return f"{message_of(error)} ({where})" if where else message_of(error)
