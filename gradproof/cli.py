"""The command line. Exit codes: 0 agreement, 1 disagreement, 2 usage or environment, 130 interrupted."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import IntEnum
from pathlib import Path
from typing import Any

from gradproof import __version__
from gradproof.draw.architectures import ARCHITECTURES
from gradproof.draw.drawing import MAX_NODES
from gradproof.draw.examples import EXAMPLES, UnknownExampleError, example
from gradproof.model.adapter import JAX_CACHE_VARIABLE, Adapter, AdapterError
from gradproof.model.dtypes import DTYPES, HALF, VALID_DTYPES
from gradproof.model.spec import SpecError, json_safe, load_case
from gradproof.reference import LAYERS
from gradproof.run.check import FAILURE_DIRECTORY, NETWORKS, TIMEOUT, UsageError, check, replay, require_known
from gradproof.run.proof import prove
from gradproof.run.results import SCHEMA, Report
from gradproof.show.layer_page import layer_page
from gradproof.show.layers import arithmetic_of, layers_markdown, layers_table, layers_to_json
from gradproof.show.progress import progress, tracked
from gradproof.show.report import OutputConsole, conventions_table, diff, proofs_text, summary
from gradproof.show.walk import render_walk, walk
from gradproof.subject.own_layers import OwnLayersError, load_installed_layers, load_layers
from gradproof.subject.registry import HOW_TO_OVERRIDE, adapter_names, load_adapter, load_adapters
from gradproof.verdict.divergence import DivergenceError


class ExitCode(IntEnum):
    """What a command ends with."""

    AGREEMENT = 0
    DISAGREEMENT = 1
    USAGE = 2
    INTERRUPTED = 130


AGREEMENT, DISAGREEMENT, USAGE, INTERRUPTED = ExitCode

DEFAULT_ADAPTERS = ("torch", "jax")
SHOWN_DIFFS = 5

ERRORS = (AdapterError, UsageError, SpecError, DivergenceError, UnknownExampleError, OwnLayersError)

EXAMPLES_OF_USE = """\
examples:
  gradproof check                                       torch and jax on 300 random networks
  gradproof check --adapter torch --layer gelu          only networks with a gelu in them
  gradproof check --adapter my_backend.py:MyAdapter     your own adapter
  gradproof replay gradproof-failures/SPEC.json --adapter torch
  gradproof prove gelu                                  is the reference right? without any framework
  gradproof walk tanh_2_3_1 --adapter torch             one sweep of backpropagation, layer by layer
"""
DTYPE_HELP = f"{', '.join(VALID_DTYPES)}; repeatable (default: {' and '.join(DTYPES)})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if getattr(options, "jax_cache", None):
        os.environ[JAX_CACHE_VARIABLE] = options.jax_cache
    try:
        load_installed_layers()
        for each in options.own_layers:
            load_layers(each)
        _require_writable(options.json)
        command: Callable[[argparse.Namespace], int] = options.command
        with _terminated_as_interrupted():
            return command(options)
    except ERRORS as error:
        print(f"gradproof: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("gradproof: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return USAGE


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM, with which schedulers and CI end a job, leave what was found so far, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradproof",
        description="Check gradients: random networks through a hand-written backward pass and through a framework.",
        epilog=EXAMPLES_OF_USE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gradproof {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_check(commands)
    _add_layers(commands)
    _add_prove(commands)
    _add_replay(commands)
    _add_walk(commands)
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=run)
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the result as JSON")
    parser.add_argument(
        "--layers",
        metavar="FILE.py",
        action="append",
        default=[],
        dest="own_layers",
        help="layers of yours, LAYERS = (Layer(...), ...), and rows for them, ROWS = {adapter: {layer: function}}; "
        "repeatable",
    )
    parser.add_argument(
        "--jax-cache",
        metavar="DIRECTORY",
        help=f"where JAX keeps its compilations, or 'off' (default: a per-user cache, or ${JAX_CACHE_VARIABLE})",
    )
    return parser


def _add_adapters(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--adapter",
        metavar="A",
        action="append",
        help=f"{', '.join(adapter_names())}, package.module:Class or path/to/file.py:Class, with options as in "
        f"'torch[device=cuda]'; repeatable ({default})",
    )
    parser.add_argument(
        "--override",
        metavar=HOW_TO_OVERRIDE,
        action=_Override,
        help="a row of yours for this layer, in the adapter named before it; all else stays that adapter's; repeatable",
    )


class _Override(argparse.Action):
    """Adds a row of somebody's own to the adapter that was named last."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option: str | None = None) -> None:
        if not namespace.adapter:
            parser.error(f"--override {value}: name the adapter before it, as in --adapter torch --override {value}")
        namespace.adapter = [*namespace.adapter[:-1], f"{namespace.adapter[-1]}+{value}"]


def _add_isolation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--isolation",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run each adapter in a process of its own, which it may crash, hang or fill without ending the run "
        "(default); without, an adapter can be debugged",
    )
    parser.add_argument(
        "--memory", metavar="GIB", type=_amount, help="that an adapter's process may take (default: half of all)"
    )


def _count(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text!r}")
    return int(text)


def _amount(text: str, unit: str = "") -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number {unit}above 0, got {text!r}")
    return value


def _seconds(text: str) -> float:
    return _amount(text, "of seconds ")


def _add_check(commands: Any) -> None:
    text = "Draw random networks, and compare every gradient of every adapter with the hand-written reference."
    parser = _command(commands, "check", _check, text)
    _add_adapters(parser, f"default: {' and '.join(DEFAULT_ADAPTERS)}")
    parser.add_argument("--networks", metavar="N", type=_count, default=NETWORKS, help=f"how many (default {NETWORKS})")
    parser.add_argument(
        "--seed", metavar="S", type=_seed, help="everything random hangs on it (default: a new one, printed)"
    )
    parser.add_argument("--dtype", metavar="D", action="append", help=DTYPE_HELP)
    parser.add_argument(
        "--layer",
        metavar="L",
        action="append",
        help="only networks with this layer, and a verdict on it alone; repeatable",
    )
    parser.add_argument(
        "--architecture",
        metavar="NAME",
        action="append",
        help=f"in place of random networks: {', '.join(ARCHITECTURES)}, or all; repeatable",
    )
    parser.add_argument(
        "--max-nodes", metavar="N", type=_count, default=MAX_NODES, help=f"layers in a network (default {MAX_NODES})"
    )
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=_seconds, default=TIMEOUT, help=f"for one network (default {TIMEOUT:g})"
    )
    _add_isolation(parser)
    _add_demands(parser)
    parser.add_argument("-x", "--exitfirst", action="store_true", help="stop at the first network that disagrees")
    parser.add_argument(
        "--failures",
        metavar="DIRECTORY",
        type=Path,
        default=FAILURE_DIRECTORY,
        help=f"where specs of disagreeing networks go (default {FAILURE_DIRECTORY})",
    )


def _add_layers(commands: Any) -> None:
    text = "Show the table of layers: options, kinks, and which adapter supports them; or all about some of them."
    parser = _command(commands, "layers", _layers, text)
    parser.add_argument("names", metavar="NAME", nargs="*", help="tell all about this layer: how a row of it is called")
    _add_adapters(parser, "default: all that are installed")
    parser.add_argument(
        "--arithmetic",
        metavar="DTYPE",
        choices=HALF,
        help=f"also probe what every layer rounds in this dtype ({' or '.join(HALF)}): inside, stored or every",
    )
    parser.add_argument("--markdown", action="store_true", help="one row per family, as the README has it")


def _add_prove(commands: Any) -> None:
    text = (
        "Prove that a layer's hand-written backward pass is the derivative of its forward pass, without any framework."
    )
    parser = _command(commands, "prove", _prove, text)
    parser.add_argument("names", metavar="NAME", nargs="*", help="layers (default: all)")


def _add_replay(commands: Any) -> None:
    parser = _command(commands, "replay", _replay, "Run one written network again and show its per-layer diff.")
    parser.add_argument("spec", metavar="SPEC.json", type=Path, help="a spec that check wrote")
    _add_adapters(parser, f"default: {' and '.join(DEFAULT_ADAPTERS)}")
    _add_isolation(parser)
    _add_demands(parser)


def _add_demands(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strict",
        action="store_true",
        help="let an honest algorithm that loses digits, such as a variance as a difference of moments, disagree too",
    )
    parser.add_argument(
        "--arithmetic",
        metavar="CLASS",
        default="every",
        help="demand that no layer rounds more in bfloat16 and float16: inside (results alone), stored (what is kept "
        "for the backward pass too) or every (every operation; default)",
    )


def _add_walk(commands: Any) -> None:
    text = "Show one forward and one backward sweep of a worked example, layer by layer."
    parser = _command(commands, "walk", _walk, text)
    parser.add_argument("example", metavar="EXAMPLE", help=", ".join(EXAMPLES))
    _add_adapters(parser, "default: the reference alone")


def _check(options: argparse.Namespace) -> int:
    console = OutputConsole()
    with progress(options.networks, "networks") as advance:
        report = check(
            options.adapter or DEFAULT_ADAPTERS,
            networks=options.networks,
            seed=options.seed,
            dtypes=tuple(dict.fromkeys(options.dtype or DTYPES)),
            layers=tuple(options.layer or ()),
            architectures=_architectures(options.architecture or ()),
            max_nodes=options.max_nodes,
            timeout=options.timeout,
            isolation=options.isolation,
            memory=options.memory,
            failures=options.failures,
            stop_at_first=options.exitfirst,
            strict=options.strict,
            arithmetic=options.arithmetic,
            progress=lambda so_far: advance(so_far.networks, _so_far(so_far)),
            looking=lambda what: advance(options.networks, f"networks; {what} on more numbers"),
        )
    return _show(report, options.json, console)


def _architectures(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(ARCHITECTURES) if "all" in names else tuple(dict.fromkeys(names))


def _show(report: Report, path: Path | None, console: OutputConsole) -> int:
    _write_json(path, report.to_json())
    for examination, spec in report.examinations[:SHOWN_DIFFS]:
        console.show(diff(examination, report, spec))
        console.print()
    hidden = len(report.examinations) - SHOWN_DIFFS
    if hidden > 0:
        console.show(f"... and {hidden} more networks that disagree: replay their specs to see them\n")
    console.show("Conventions at kinks (weight of the right-hand derivative):")
    console.show(conventions_table(report.conventions))
    console.print()
    console.show(summary(report))
    if report.interrupted and not report.disagreements:
        return INTERRUPTED
    return AGREEMENT if report.agrees else DISAGREEMENT


def _replay(options: argparse.Namespace) -> int:
    report = replay(
        load_case(options.spec, LAYERS),
        options.adapter or DEFAULT_ADAPTERS,
        isolation=options.isolation,
        memory=options.memory,
        strict=options.strict,
        arithmetic=options.arithmetic,
    )
    _write_json(options.json, report.to_json())
    console = OutputConsole()
    for examination, _ in report.examinations:
        console.show(diff(examination, report, str(options.spec)))
        console.print()
    console.show(summary(report, by_layer=False))
    return AGREEMENT if report.agrees else DISAGREEMENT


def _layers(options: argparse.Namespace) -> int:
    require_known("layer", options.names, LAYERS)
    adapters = load_adapters(options.adapter) if options.adapter else _installed()
    classes = _classes(adapters, options.arithmetic) if options.arithmetic else {}
    _write_json(options.json, layers_to_json(adapters, classes))
    if options.names:
        print("\n\n\n".join(layer_page(LAYERS[name], adapters) for name in options.names))
    elif options.markdown:
        print(layers_markdown(adapters))
    else:
        OutputConsole().show(layers_table(adapters, classes))
    return AGREEMENT


def _prove(options: argparse.Namespace) -> int:
    require_known("layer", options.names, LAYERS)
    names = list(dict.fromkeys(options.names or LAYERS))
    proofs = [prove(LAYERS[name]) for name in tracked(names, len(names), "layers")]
    _write_json(options.json, {"schema": SCHEMA, "layers": [asdict(each) for each in proofs]})
    OutputConsole().show(proofs_text(proofs))
    return AGREEMENT if all(each.holds for each in proofs) else DISAGREEMENT


def _classes(adapters: Mapping[str, Adapter | str], dtype: str) -> dict[str, dict[str, str]]:
    """Adapter -> layer -> class of its arithmetic, of those that are there."""
    found = {}
    for name, adapter in adapters.items():
        if not isinstance(adapter, str):
            layers = tracked(LAYERS, len(LAYERS), f"layers, {name}")
            found[name] = arithmetic_of(adapter, dtype, layers)
    return found


def _installed() -> Mapping[str, Adapter | str]:
    """Every registered adapter, or why it cannot be used here."""
    found: dict[str, Adapter | str] = {}
    for name in adapter_names():
        try:
            found[name] = load_adapter(name)
        except AdapterError as error:
            found[name] = str(error)
    return found


def _walk(options: argparse.Namespace) -> int:
    shown = walk(example(options.example), load_adapters(options.adapter or ()).values())
    _write_json(options.json, shown.to_json())
    OutputConsole().show(render_walk(shown))
    return AGREEMENT


def _require_writable(path: Path | None) -> None:
    """Raise UsageError where the file could not be written when the work is done."""
    if path is None:
        return
    try:
        new = not path.exists()
        path.open("a").close()
        if new:
            path.unlink()
    except OSError as error:
        raise UsageError(f"cannot write {str(path)!r}: {error.strerror}") from None


def _write_json(path: Path | None, data: Any) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(json_safe(data), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UsageError(f"cannot write {str(path)!r}: {error.strerror}") from None


def _so_far(report: Report) -> str:
    wrong = len(report.examinations)
    return f"networks, {wrong} disagree" if wrong else "networks"
