"""A soak: very many networks, adapters that are known to be right, and every alarm a false one.

Run `python -m gradproof.trust.soak`. It can be stopped and goes on where it stopped, and it tells how far from the
threshold the verdict stayed, for every adapter, dtype and layer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import gradproof.adapters
import gradproof.reference
from gradproof.model.adapter import JAX_CACHE_VARIABLE, AdapterError
from gradproof.model.dtypes import VALID_DTYPES
from gradproof.run.check import Run, UsageError, require_known
from gradproof.show.progress import progress
from gradproof.subject.registry import load_adapters
from gradproof.trust.sections import write_section
from gradproof.trust.soak_outcome import ADAPTERS, CHUNK, Outcome, Plan
from gradproof.trust.soak_page import page

NETWORKS = 20_000

JOURNAL = Path("gradproof-soak.jsonl")
TRIES = 2
"""How often a chunk is begun before it is given up, where its process dies."""

QUICK_TO_COMPILE = {
    JAX_CACHE_VARIABLE: "off",
    "XLA_FLAGS": "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_cpu_multi_thread_eigen=false",
    "OMP_NUM_THREADS": "1",
}
"""The environment of a soak's processes: compiling takes a third of the time, and cores are not fought over."""


class JournalError(ValueError):
    """A journal that cannot be gone on with; one line that says why and what to do."""


class _Worker:
    """What a process of the soak keeps between chunks: the plan, and the adapters as probed."""

    plan: Plan
    run: Run
    probed: Outcome


def _start(plan: Plan) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _Worker.plan = plan
    _Worker.run = Run(load_adapters(plan.adapters), plan.dtypes, plan.seed, failures=plan.failures)
    _Worker.run.prepare()
    _Worker.run.probe()
    stale = [f"{each.adapter} {each.dtype}: stale: {each.divergence.layer}" for each in _Worker.run.report.stale]
    _Worker.probed = Outcome(false_alarms=[*_alarms(_Worker.run), *stale])


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _alarms(run: Run) -> Iterator[str]:
    """One line for each examination that disagrees unexplained."""
    for examination, spec in run.report.examinations:
        layers = ", ".join(culprit.node.layer.name for culprit in examination.culprits) or "composition"
        kinds = ", ".join(dict.fromkeys(str(check.kind) for check in examination.wrong))
        where = spec or examination.case.network
        yield f"{examination.adapter} {examination.case.dtype}: {layers}: {kinds}: {where}"


def examine_chunk(chunk: int, count: int) -> Outcome:
    """Examine the networks of a chunk in a process that `_start` has made ready."""
    plan, run = _Worker.plan, _Worker.run.afresh(_Worker.plan.chunk_seed(chunk))
    outcome = Outcome()
    for drawn, dtype in plan.networks(chunk, count):
        outcome.networks += 1
        for examination in run.examine_case(drawn.case(dtype)):
            outcome.add(examination)
    for (adapter, dtype), tally in run.report.tallies.items():
        outcome.unsupported[f"{adapter} {dtype}"] += tally.unsupported.total()
    outcome.false_alarms += _alarms(run)
    outcome.merge(_Worker.probed)
    return outcome


class Journal:
    """The file that a soak goes on from: a line about the run, then a line per chunk."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self._path = path
        self._about = dict(about)

    def read(self) -> dict[int, Outcome]:
        """The chunks that are done; a last line cut short by a kill is left out.

        Raises JournalError where the file is of another run, or no journal.
        """
        if not self._path.exists():
            return {}
        lines = self._path.read_text().splitlines(keepends=True)
        entries = [json.loads(line) for line in lines if line.endswith("\n") and _is_json(line)]
        if not entries or not isinstance(entries[0], dict) or "about" not in entries[0]:
            raise JournalError(f"{self._path} is no journal of a soak: move it away, or name another with --journal")
        differing = [name for name, value in self._about.items() if entries[0]["about"].get(name) != value]
        if differing:
            raise JournalError(
                f"{self._path} is of a soak with another {', '.join(differing)}: --fresh starts anew, "
                "--journal names another file"
            )
        return {each["chunk"]: Outcome.from_json(each["outcome"]) for each in entries[1:]}

    def begin(self, done: Mapping[int, Outcome]) -> None:
        """Write the file anew, whole or not at all, with what is done."""
        lines = [{"about": self._about}, *(_line(chunk, outcome) for chunk, outcome in done.items())]
        partial = self._path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
        partial.replace(self._path)

    def add(self, chunk: int, outcome: Outcome) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(_line(chunk, outcome)) + "\n")


def _line(chunk: int, outcome: Outcome) -> dict[str, Any]:
    return {"chunk": chunk, "outcome": outcome.to_json()}


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def about(plan: Plan, versions: Mapping[str, str]) -> dict[str, Any]:
    """What the networks and verdicts of a soak hang on: change any of it, and it is another soak."""
    return {
        "seed": plan.seed,
        "dtypes": list(plan.dtypes),
        "adapters": dict(versions),
        "numpy": np.__version__,
        "code": _fingerprint(),
    }


def _fingerprint() -> str:
    """Of the source of gradproof, its reference and its adapters."""
    found = hashlib.sha256()
    for package in (gradproof, gradproof.reference, gradproof.adapters):
        (directory,) = package.__path__
        for path in sorted(each for each in Path(directory).rglob("*") if each.suffix in (".py", ".toml")):
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def soak(plan: Plan, todo: Mapping[int, int], processes: int | None) -> Iterator[tuple[int, Outcome]]:
    """Examine chunks (number -> how many networks of it) in several processes, and hand each over as it is done.

    A process that dies takes nothing along: the chunks that are open are begun again, TRIES times.
    """
    open_chunks, tries = dict(todo), Counter[int]()
    # Processes of their own, not forks: frameworks have threads that do not survive one.
    spawned = multiprocessing.get_context("spawn")
    while open_chunks:
        with ProcessPoolExecutor(processes, spawned, initializer=_start, initargs=(plan,)) as pool:
            jobs = {pool.submit(examine_chunk, *each): each[0] for each in open_chunks.items()}
            try:
                for job in as_completed(jobs):
                    outcome = job.result()
                    del open_chunks[jobs[job]]
                    yield jobs[job], outcome
            except BrokenProcessPool:
                tries.update(list(open_chunks)[: processes or os.cpu_count()])
            except (KeyboardInterrupt, GeneratorExit):
                for each in multiprocessing.active_children():
                    each.terminate()
                pool.shutdown(cancel_futures=True)
                raise
        for chunk in [each for each in open_chunks if tries[each] > TRIES]:
            del open_chunks[chunk]
            yield (
                chunk,
                Outcome(false_alarms=[f"chunk {chunk} of seed {plan.seed}: its process died {TRIES + 1} times"]),
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak; 1 where something disagrees, 2 where it cannot be begun, 130 where it was interrupted."""
    parser = argparse.ArgumentParser(prog="python -m gradproof.trust.soak", description=__doc__)
    every = ", ".join(VALID_DTYPES)
    parser.add_argument("--networks", type=int, default=NETWORKS, help=f"how many to draw (default {NETWORKS})")
    parser.add_argument("--seed", type=int, default=1, help="what is drawn hangs on it (default 1)")
    parser.add_argument("--adapter", action="append", metavar="A", help=f"repeatable (default: {', '.join(ADAPTERS)})")
    parser.add_argument("--dtype", action="append", metavar="D", help=f"repeatable (default: {every})")
    parser.add_argument("--processes", type=int, default=None, help="default: one per core")
    parser.add_argument("--journal", type=Path, default=JOURNAL, help=f"what it goes on from (default {JOURNAL})")
    parser.add_argument("--fresh", action="store_true", help="begin anew, whatever the journal holds")
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the distribution of errors into this page")
    options = parser.parse_args(arguments)
    if options.networks < 1:
        parser.error(f"--networks {options.networks}: expected 1 or more")
    plan = Plan(tuple(options.adapter or ADAPTERS), tuple(options.dtype or VALID_DTYPES), options.seed)
    console = Console(stderr=True)
    os.environ.update(QUICK_TO_COMPILE)
    try:
        require_known("dtype", plan.dtypes, VALID_DTYPES)
        versions = {each.name: each.version() for each in load_adapters(plan.adapters).values()}
        journal = Journal(options.journal, about(plan, versions))
        done = {} if options.fresh else journal.read()
    except (AdapterError, UsageError, JournalError) as error:
        console.print(f"error: {error}", style="red", highlight=False)
        return 2
    wanted = {chunk: min(CHUNK, options.networks - chunk * CHUNK) for chunk in range(-(-options.networks // CHUNK))}
    done = {chunk: each for chunk, each in done.items() if each.networks == wanted.get(chunk)}
    journal.begin(done)
    interrupted = _go_on(plan, wanted, done, journal, options.processes)
    outcome = Outcome()
    for chunk in sorted(done):
        outcome.merge(done[chunk])
    for alarm in outcome.false_alarms:
        console.print(f"false alarm: {alarm}", style="red", highlight=False)
    if interrupted:
        console.print(f"interrupted: the same command goes on from {options.journal}")
    elif options.page:
        write_section(options.page, "soak", page(outcome, plan, versions))
    print(outcome.closing_line)
    return 130 if interrupted else int(bool(outcome.false_alarms))


def _go_on(
    plan: Plan,
    wanted: Mapping[int, int],
    done: dict[int, Outcome],
    journal: Journal,
    processes: int | None,
) -> bool:
    """Examine what is not done, and write it down as it comes; whether it was interrupted."""
    todo = {chunk: count for chunk, count in wanted.items() if chunk not in done}
    networks = sum(each.networks for each in done.values())
    alarms = sum(len(each.false_alarms) for each in done.values())
    with progress(sum(wanted.values()), "networks", networks) as advance:
        try:
            for chunk, outcome in soak(plan, todo, processes):
                done[chunk] = outcome
                journal.add(chunk, outcome)
                networks += wanted[chunk]
                alarms += len(outcome.false_alarms)
                advance(networks, f"networks, {alarms} false alarms")
        except KeyboardInterrupt:
            return True
    return False


if __name__ == "__main__":
    sys.exit(main())
