"""How many networks a second pass through reference, torch and jax, and where the time goes.

Everything is measured in one process and one run, and reported as rates and ratios within it: the same
networks with JAX compiled layer by layer, its compilations warm, and with the naive jit of each whole network.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

import gradproof.verdict.judging
from gradproof.adapters.jax import JaxAdapter
from gradproof.adapters.torch import TorchAdapter
from gradproof.draw.drawing import Drawn, draw_each
from gradproof.model.dtypes import DTYPES
from gradproof.run.check import Run
from gradproof.verdict.equations import Equation, Equations


class Stopwatch:
    """Seconds per part; a part that runs inside another is not counted twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = time.perf_counter()

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._running.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._running.pop()

        return run


@contextmanager
def instrumented(watch: Stopwatch) -> Iterator[None]:
    """Count the time of each part of an examination."""
    parts = (
        (Equations, "__init__", "reference"),
        (Equation, "_sample", "noise floor"),
        (TorchAdapter, "forward", "torch"),
        (TorchAdapter, "backward", "torch"),
        (JaxAdapter, "forward", "jax"),
        (JaxAdapter, "backward", "jax"),
        (gradproof.verdict.judging, "judge", "comparison"),
    )
    watch.seconds |= dict.fromkeys((name for _, _, name in parts), 0.0)
    patches = [patch.object(owner, name, watch.timed(part, getattr(owner, name))) for owner, name, part in parts]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def examine_all(run: Run, networks: Sequence[Drawn]) -> float:
    """Seconds to examine every network in every dtype."""
    started = time.perf_counter()
    for drawn in networks:
        run.examine(drawn)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=200, help="networks to time (default 200)")
    parser.add_argument("--naive", type=int, default=10, help="networks for the naive whole-network jit (default 10)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()

    started = time.perf_counter()
    networks: list[Drawn] = []
    draw_each(networks.append, options.networks, options.seed)
    drawing = time.perf_counter() - started

    run = Run({"torch": TorchAdapter(), "jax": JaxAdapter()}, DTYPES)
    run.prepare()
    first = examine_all(run, networks)
    watch = Stopwatch()
    with instrumented(watch):
        warm = examine_all(run, networks) + drawing

    naive = Run({"torch": TorchAdapter(), "jax": JaxAdapter(jit="network")}, DTYPES)
    naive.prepare()
    naive_rate = options.naive / examine_all(naive, networks[: options.naive])
    warm_rate = len(networks) / warm

    console = Console()
    split = Table("part", "seconds", "share", box=None)
    parts = {"drawing": drawing, **watch.seconds}
    parts["the rest"] = warm - sum(parts.values())
    for part, seconds in parts.items():
        split.add_row(part, f"{seconds:.2f}", f"{seconds / warm:.0%}")
    console.print(f"{len(networks)} networks of up to 8 nodes, each in {' and '.join(DTYPES)}, seed {options.seed}")
    console.print(split)
    console.print(f"first pass, compilations read or made: {len(networks) / first:.1f} networks a second")
    console.print(f"warm, drawing included:                {warm_rate:.1f} networks a second")
    console.print(f"naive jit of each whole network:       {naive_rate:.2f} networks a second")
    console.print(f"ratio of warm to naive:                {warm_rate / naive_rate:.0f}")


if __name__ == "__main__":
    main()
