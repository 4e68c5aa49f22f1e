"""A soak: very many networks, adapters that are known to be right, and every alarm a false one.

Run `python -m gradproof.trust.soak`. It can be stopped and goes on where it stopped, and it tells how far from the
threshold the verdict stayed, for every adapter, dtype and layer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import gradproof.adapters
import gradproof.reference
from gradproof.draw.drawing import EDGE_SHARES, SCALES, Drawn, draw_each
from gradproof.model.adapter import AdapterError
from gradproof.model.dtypes import VALID_DTYPES
from gradproof.run.check import FAILURE_DIRECTORY, Run, UsageError, require_known
from gradproof.show.progress import progress
from gradproof.subject.registry import load_adapters
from gradproof.trust.sections import write_section
from gradproof.verdict.agreement import THRESHOLD, WHOLE_ROUNDINGS
from gradproof.verdict.examination import Examination
from gradproof.verdict.rows import rows

ADAPTERS = ("torch", "jax[jit=network,cache=off]")
NETWORKS = 20_000
CHUNK = 100
"""Networks that one process examines between two lines of the journal."""

DRAWS = 4
"""Sets of numbers tried on each graph: JAX compiles once for all of them, and that is what a soak pays for."""

JOURNAL = Path("gradproof-soak.jsonl")
TRIES = 2
"""How often a chunk is begun before it is given up, where its process dies."""

BINS_PER_DECADE = 20
NOTHING = -4 * BINS_PER_DECADE
"""The bin of errors up to 1e-4 noise units."""

QUICK_TO_COMPILE = {
    "XLA_FLAGS": "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_cpu_multi_thread_eigen=false",
    "OMP_NUM_THREADS": "1",
}
"""The environment of a soak's processes: compiling takes a third of the time, and cores are not fought over."""


class JournalError(ValueError):
    """A journal that cannot be gone on with; one line that says why and what to do."""


@dataclass(frozen=True)
class Plan:
    """What a soak examines. Two soaks with the same plan and versions draw the same networks.

    Networks come in graphs of DRAWS sets of numbers each; the dtypes take turns from graph to graph.
    """

    adapters: tuple[str, ...] = ADAPTERS
    dtypes: tuple[str, ...] = VALID_DTYPES
    seed: int = 1
    failures: Path | None = FAILURE_DIRECTORY

    def networks(self, chunk: int, count: int = CHUNK) -> Iterator[tuple[Drawn, str]]:
        """The first `count` networks of a chunk, each with the dtype that it is examined in."""
        graphs: list[Drawn] = []
        draw_each(graphs.append, 1 + math.ceil(count / DRAWS), self.chunk_seed(chunk))
        graphs = graphs[1:]  # Hypothesis begins with the simplest network, whatever the seed
        drawn = (
            (each, self.dtypes[(chunk + i) % len(self.dtypes)])
            for i, graph in enumerate(graphs)
            for each in sets_of_numbers(graph)
        )
        yield from (each for _, each in zip(range(count), drawn, strict=False))

    def chunk_seed(self, chunk: int) -> int:
        return int(np.random.SeedSequence((self.seed, chunk)).generate_state(1)[0])


def sets_of_numbers(drawn: Drawn) -> Iterator[Drawn]:
    """The network as drawn, then with other numbers."""
    yield drawn
    generator = np.random.default_rng(drawn.seed)
    for _ in range(DRAWS - 1):
        yield replace(
            drawn,
            seed=int(generator.integers(2**32)),
            edge_share=float(generator.choice(EDGE_SHARES)),
            scale=float(generator.choice(SCALES)),
        )


@dataclass
class Distribution:
    """Errors of tensors in noise units, counted in bins of equal ratio. largest: the largest one, exactly."""

    counts: Counter[int] = field(default_factory=Counter)
    largest: float = 0.0

    def add(self, units: float) -> None:
        tiny = units <= 10.0 ** (NOTHING / BINS_PER_DECADE)
        self.counts[NOTHING if tiny else math.ceil(BINS_PER_DECADE * math.log10(units))] += 1
        self.largest = max(self.largest, units)

    def merge(self, other: Distribution) -> None:
        self.counts.update(other.counts)
        self.largest = max(self.largest, other.largest)

    def quantile(self, share: float) -> float:
        """A number of noise units that this share of the tensors does not exceed, to within a bin."""
        wanted, seen = share * self.counts.total(), 0
        for index in sorted(self.counts):
            seen += self.counts[index]
            if seen >= wanted:
                return min(self.largest, 10.0 ** (index / BINS_PER_DECADE))
        return 0.0

    def to_json(self) -> list[Any]:
        return [self.largest, *sorted(self.counts.items())]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Distribution:
        return cls(Counter(dict(data[1:])), data[0])


Key = tuple[str, str, str]
"""Adapter, dtype, layer."""


@dataclass
class Outcome:
    """What a soak, or a chunk of one, found.

    networks: drawn. gradients: compared. false_alarms: one line each, for a network (of an adapter) that disagrees
    with no known divergence to explain it. known, unsupported: networks by adapter and dtype.
    tensors: numbers of tensors that agree; within: of these, whose error is so small that no noise was measured.
    accuracy: of algorithms that lose digits, by adapter, dtype, layer and algorithm. elements, unverifiable: numbers.
    units: of the tensors that agree and whose noise was measured.
    """

    networks: int = 0
    gradients: int = 0
    false_alarms: list[str] = field(default_factory=list)
    known: Counter[str] = field(default_factory=Counter)
    unsupported: Counter[str] = field(default_factory=Counter)
    tensors: Counter[str] = field(default_factory=Counter)
    within: Counter[str] = field(default_factory=Counter)
    elements: Counter[str] = field(default_factory=Counter)
    unverifiable: Counter[str] = field(default_factory=Counter)
    accuracy: Counter[str] = field(default_factory=Counter)
    units: dict[Key, Distribution] = field(default_factory=dict)

    def add(self, examination: Examination) -> None:
        """Count the tensors of one adapter on one network."""
        where = f"{examination.adapter} {examination.case.dtype}"
        self.gradients += sum(check.role == "gradient" for check in examination.checks)
        self.known[where] += examination.known
        for row in rows(examination) if examination.agrees else ():
            check = row.check
            self.tensors[where] += 1
            self.within[where] += check.bound
            self.elements[where] += check.elements
            self.unverifiable[where] += check.unverifiable
            if check.algorithm:
                self.accuracy[f"{where} {': '.join(check.algorithm)}"] += 1
            elif check.index is not None and not check.bound:
                key = (examination.adapter, examination.case.dtype, row.layer)
                self.units.setdefault(key, Distribution()).add(check.noise_units)

    def merge(self, other: Outcome) -> None:
        self.networks += other.networks
        self.gradients += other.gradients
        self.false_alarms += [each for each in other.false_alarms if each not in self.false_alarms]
        for name in COUNTERS:
            getattr(self, name).update(getattr(other, name))
        for key, distribution in other.units.items():
            self.units.setdefault(key, Distribution()).merge(distribution)

    def distribution(self, adapter: str, dtype: str) -> Distribution:
        """Over all layers."""
        together = Distribution()
        for (name, held, _), each in self.units.items():
            if (name, held) == (adapter, dtype):
                together.merge(each)
        return together

    @property
    def closing_line(self) -> str:
        alarms = len(self.false_alarms)
        return f"soak: networks={self.networks} gradients={self.gradients} false_alarms={alarms}"

    def to_json(self) -> dict[str, Any]:
        units = [[*key, each.to_json()] for key, each in self.units.items()]
        return vars(self) | {"units": units}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        units = {(adapter, dtype, layer): Distribution.from_json(d) for adapter, dtype, layer, d in data["units"]}
        counters = {name: Counter(data[name]) for name in COUNTERS}
        return cls(**dict(data) | counters | {"units": units})


COUNTERS = ("known", "unsupported", "tensors", "within", "elements", "unverifiable", "accuracy")


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


PAGE = """\
{line}

{versions}, seed {seed}. {draws} sets of numbers for each graph; the dtypes take turns from graph to graph. Errors are
in noise units, of the tensors that agree; the threshold is {threshold:g} for all. "Not measured" is the share of
tensors whose error is within a few roundings of the result ({roundings}), so that no noise was measured: they are in no
quantile. "Nothing said" is the share of elements that are unverifiable.
"Known" counts the networks that a known divergence of the framework explains (`adapters/*.toml`).

{totals}

Per layer, for {columns}: 99.9 % and the largest.

{layers}
"""


def page(outcome: Outcome, plan: Plan, versions: Mapping[str, str]) -> str:
    """The distribution of errors in Markdown."""
    pairs = [(adapter, dtype) for adapter in plan.adapters for dtype in plan.dtypes]
    return PAGE.format(
        line=outcome.closing_line,
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        seed=plan.seed,
        draws=DRAWS,
        threshold=THRESHOLD,
        roundings=", ".join(f"{each:g} in {dtype}" for dtype, each in WHOLE_ROUNDINGS.items()),
        totals="\n".join(_totals(outcome, pairs)),
        columns=", ".join(f"{adapter} {dtype}" for adapter, dtype in pairs),
        layers="\n".join(_layers(outcome, pairs)),
    )


def _totals(outcome: Outcome, pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    figures = ("median", "99 %", "99.9 %", "max", "nothing said", "known", "not supported")
    yield f"| {' | '.join(('adapter, dtype', 'tensors', 'not measured', *figures))} |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for adapter, dtype in pairs:
        where, together = f"{adapter} {dtype}", outcome.distribution(adapter, dtype)
        tensors = outcome.tensors[where]
        quantiles = [*(together.quantile(share) for share in (0.5, 0.99, 0.999)), together.largest]
        cells = [f"{tensors}", f"{outcome.within[where] / max(tensors, 1):.1%}", *(f"{each:.2g}" for each in quantiles)]
        cells += [f"{outcome.unverifiable[where] / max(outcome.elements[where], 1):.2%}"]
        cells += [f"{outcome.known[where]}", f"{outcome.unsupported[where]}"]
        yield f"| {where} | {' | '.join(cells)} |"


def _layers(outcome: Outcome, pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    yield f"| layer | {' | '.join(f'{adapter} {dtype}' for adapter, dtype in pairs)} |"
    yield "|---" * (len(pairs) + 1) + "|"
    for layer in sorted({layer for *_, layer in outcome.units}):
        cells = (_cell(outcome.units.get((*pair, layer))) for pair in pairs)
        yield f"| {layer} | {' | '.join(cells)} |"


def _cell(distribution: Distribution | None) -> str:
    return f"{distribution.quantile(0.999):.2g}, {distribution.largest:.2g}" if distribution else ""


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
