"""Drawing many networks, examining every adapter on each, and keeping count."""

from __future__ import annotations

import copy
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from gradproof.draw.architectures import ARCHITECTURES, drawn_architectures
from gradproof.draw.drawing import MAX_NODES, Drawn, draw_each
from gradproof.model.adapter import Adapter
from gradproof.model.case import Case
from gradproof.model.dtypes import DTYPES, VALID_DTYPES
from gradproof.model.spec import save_case
from gradproof.reference import LAYERS
from gradproof.run.results import Biased, Disagreement, Report, Stale, Tally, disagreements, wrong_rows
from gradproof.subject.isolation import close, loader
from gradproof.subject.registry import load_adapters
from gradproof.verdict.bias import Bias, Evidence
from gradproof.verdict.equations import ARITHMETICS, EVERY
from gradproof.verdict.examination import Examination
from gradproof.verdict.examine import examine
from gradproof.verdict.judging import Subject, probe
from gradproof.verdict.kinks import applicable, probe_kinks, stale_divergences

NETWORKS = 300
TIMEOUT = 60.0
FAILURE_DIRECTORY = Path("gradproof-failures")


class UsageError(ValueError):
    """A request that names something unknown; one line with the valid choices."""


def check(
    adapters: Sequence[str | Adapter] = ("torch", "jax"),
    *,
    networks: int = NETWORKS,
    seed: int | None = None,
    dtypes: Sequence[str] = DTYPES,
    layers: Sequence[str] = (),
    architectures: Sequence[str] = (),
    max_nodes: int = MAX_NODES,
    timeout: float = TIMEOUT,
    isolation: bool = True,
    memory: float | None = None,
    failures: Path | None = FAILURE_DIRECTORY,
    stop_at_first: bool = False,
    strict: bool = False,
    arithmetic: str = "every",
    progress: Callable[[Report], None] = lambda report: None,
    looking: Callable[[str], None] = lambda what: None,
) -> Report:
    """Examine every adapter on randomly drawn networks.

    seed: what everything random hangs on; a random one where None. layers: draw only networks with one of these, and
    answer for these alone. architectures: in place of drawn networks take these in turn, with drawn numbers. isolation:
    run adapters that are given by name in processes of their own. memory: the GiB that each of these may take, half of
    the machine's where None. failures: where specs of disagreeing networks are written, None to write none.
    stop_at_first: end with the first network that disagrees. strict: let an honest algorithm that loses digits count as
    a disagreement. arithmetic: the coarsest class of arithmetic that is none. progress: called after every network.
    looking: told the adapter, dtype and layer that is then run on more numbers, to tell a factor from chance.

    Raises UsageError for an unknown dtype, layer or architecture, AdapterError for an adapter that cannot be used.
    """
    _require_names(dtypes, arithmetic, layers, architectures)
    _require_directory(failures)
    loaded = load_adapters(adapters, loader(isolation, memory))
    run = Run(loaded, dtypes, secrets.randbits(32) if seed is None else seed, timeout, failures, strict, arithmetic)
    started = time.monotonic()

    def examine_one(drawn: Drawn) -> None:
        run.examine(drawn)
        run.report.seconds = time.monotonic() - started
        progress(run.report)
        if stop_at_first and run.report.disagreements:
            raise _Enough

    try:
        run.prepare(layers)
        if architectures:
            for drawn in drawn_architectures(architectures, networks, run.report.seed):
                examine_one(drawn)
        else:
            draw_each(examine_one, networks, run.report.seed, layers, max_nodes)
        run.conclude(looking)
    except _Enough:
        pass
    except KeyboardInterrupt:
        run.report.interrupted = True
    finally:
        run.close()
    run.report.seconds = time.monotonic() - started
    return run.report


def _look(looking: Callable[[str], None], subject: Subject, dtype: str, layer: str) -> None:
    looking(f"{subject.adapter.name} {dtype} {layer}")


class _Enough(BaseException):
    """The first disagreement was wanted, and is found. Hypothesis would take an Exception for a failing test."""


def require_known(what: str, names: Iterable[str], valid: Iterable[str]) -> None:
    """Raise UsageError for the first name that is not valid, with the valid ones."""
    for name in names:
        if name not in valid:
            raise UsageError(f"unknown {what} {name!r}; valid {what}s: {', '.join(valid)}")


def _require_names(dtypes: Iterable[str], arithmetic: str, layers: Sequence[str], architectures: Sequence[str]) -> None:
    """Raise UsageError for what is unknown, or cannot be asked for together."""
    require_known("dtype", dtypes, VALID_DTYPES)
    require_known("arithmetic", [arithmetic], ARITHMETICS)
    require_known("layer", layers, LAYERS)
    require_known("architecture", architectures, ARCHITECTURES)
    if layers and architectures:
        raise UsageError("layers and architectures cannot both be asked for: an architecture has the layers it has")


def _require_directory(path: Path | None) -> None:
    """Raise UsageError where no directory can be at the path, before anything is run."""
    existing = next((each for each in (path, *path.parents) if each.exists()), None) if path else None
    if existing is not None and not existing.is_dir():
        raise UsageError(f"cannot write specs to {str(path)!r}: {str(existing)!r} is not a directory")


class Run:
    """The adapters under test and the report that grows while networks are examined.

    adapters: name asked for -> adapter. failures: where specs of disagreeing networks are written, None to write none.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        dtypes: Sequence[str],
        seed: int = 0,
        timeout: float = TIMEOUT,
        failures: Path | None = None,
        strict: bool = False,
        arithmetic: str = "every",
    ) -> None:
        self._strict, self._arithmetic = strict, arithmetic
        self._adapters = tuple(adapters.values())
        self._timeout = timeout
        self._failures = failures
        self._subjects: dict[str, list[Subject]] = {}
        self._answered_for = self._must_show = frozenset(LAYERS)
        self._evidence: dict[tuple[str, str], Evidence] = {}
        versions = {adapter.name: adapter.version() for adapter in self._adapters}
        requests = {adapter.name: request for request, adapter in adapters.items()}
        self.report = Report(seed, tuple(dtypes), versions, requests)

    def prepare(self, layers: Collection[str] = (), divergences: bool = True) -> None:
        """Make the adapters ready to be examined.

        layers: those that are asked for, whose errors count and whose known divergences must still show; all where
        none. divergences: whether it is looked at that they do.
        """
        self._answered_for = frozenset(layers or LAYERS)
        self._must_show = self._answered_for if divergences else frozenset()
        for dtype in self.report.dtypes:
            self._subjects[dtype] = []
            for adapter in self._adapters:
                subject = Subject(
                    adapter,
                    {},
                    applicable(adapter, dtype),
                    self._timeout,
                    strict=self._strict,
                    demanded=self._arithmetic,
                )
                self._subjects[dtype].append(subject)
                self.report.tallies[subject.adapter.name, dtype] = Tally()
                self.report.conventions.setdefault(subject.adapter.name, {})[dtype] = subject.conventions

    def probe(self, layers: Collection[str] = LAYERS.keys()) -> list[Examination]:
        """Probe the kinks and known divergences of these layers in every dtype; returns what disagreed in doing so."""
        subjects = [(subject, dtype) for dtype, subjects in self._subjects.items() for subject in subjects]
        return [each for subject, dtype in subjects for each in self._probe(subject, dtype, layers)]

    def _probe(self, subject: Subject, dtype: str, layers: Collection[str]) -> list[Examination]:
        """Probe the layers that have not been probed yet."""
        new = set(layers) - subject.probed
        subject.probed.update(new)
        found = probe_kinks(subject, dtype, new)
        for examination in found:
            self.record(examination)
        stale = stale_divergences(subject, dtype, new & self._must_show)
        self.report.stale += [Stale(subject.adapter.name, dtype, each) for each in stale]
        return found

    def afresh(self, seed: int) -> Run:
        """The same adapters, as they were probed, with nothing counted yet."""
        run = copy.copy(self)
        report = self.report
        run.report = Report(seed, report.dtypes, report.adapters, report.requests, conventions=report.conventions)
        run.report.tallies = {key: Tally() for key in report.tallies}
        run._evidence = {}
        return run

    def examine(self, drawn: Drawn) -> list[Examination]:
        """Examine every adapter on one drawn network, in every dtype."""
        self.report.networks += 1
        return [each for dtype in self._subjects for each in self.examine_case(drawn.case(dtype))]

    def examine_case(self, case: Case) -> list[Examination]:
        """Examine every adapter on one case, and keep count."""
        found = []
        for subject in self._subjects[case.dtype]:
            tally = self.report.tallies[subject.adapter.name, case.dtype]
            lacking = subject.lacking(case.network, case.dtype)
            if lacking is not None:
                tally.unsupported[lacking] += 1
                continue
            self._probe(subject, case.dtype, {node.layer.name for node in case.network.nodes})
            examination = examine(subject, case)
            tally.add(examination)
            self._gather(examination)
            self._note_arithmetic(subject, case.dtype)
            self.record(examination)
            found.append(examination)
        return found

    def _note_arithmetic(self, subject: Subject, dtype: str) -> None:
        """Take over the classes of arithmetic that have been found so far."""
        found = subject.classes.by_layer(dtype)
        self.report.arithmetic.setdefault(subject.adapter.name, {})[dtype] = dict(sorted(found.items()))

    def _gather(self, examination: Examination) -> None:
        """Take over what the tensors tell that agree, in which every element can be verified."""
        key = (examination.adapter, examination.case.dtype)
        evidence = self._evidence.setdefault(key, Evidence(examination.case.dtype))
        agreeing = [c.key for c in examination.checks if not (c.kind or c.unverifiable or c.algorithm)]
        if examination.equations is not None:
            evidence.add(examination.equations, examination.trace.got, agreeing)

    def conclude(self, looking: Callable[[str], None] = lambda what: None) -> None:
        """Look for factors that no single network shows, on more numbers where they are not out of the question.

        looking: told the adapter, dtype and layer that is looked at.
        """
        for dtype, subjects in self._subjects.items():
            for subject in subjects:
                evidence = self._evidence.get((subject.adapter.name, dtype))
                if evidence is not None:
                    evidence.look_closer(partial(probe, subject), partial(_look, looking, subject, dtype))
                    coarse = {name for name, each in subject.classes.by_layer(dtype).items() if each == EVERY.name}
                    for bias in evidence.biases(coarse):
                        self._record_bias(subject.adapter.name, dtype, bias)

    def _record_bias(self, adapter: str, dtype: str, bias: Bias) -> None:
        spec = self._save(bias.case, f"{adapter}-{dtype}-{bias.layer}-bias-{self.report.seed}")
        self.report.biased.append(Biased(adapter, dtype, bias, spec))
        found = self.report.disagreements if self._asked_for([bias.layer]) else self.report.beside
        found.append(
            Disagreement(
                adapter=adapter,
                dtype=dtype,
                network=str(bias.case.network),
                node=bias.node,
                layer=bias.layer,
                tensor=bias.tensor,
                kind="bias",
                max_error=None,
                noise_units=0.0,
                bound=True,
                index=None,
                expected=1.0,
                got=bias.factor,
                culprit=True,
                cause=bias.description,
                spec=spec,
            )
        )

    def close(self) -> None:
        """End the adapters' processes."""
        for adapter in self._adapters:
            close(adapter)

    def record(self, examination: Examination) -> None:
        """Take the disagreements of an examination into the report, and write its spec."""
        if examination.agrees:
            return
        if examination.known:
            self.report.known += disagreements(examination, None)
            return
        layers = "-".join(dict.fromkeys(culprit.node.layer.name for culprit in examination.culprits)) or "composition"
        number = len(self.report.examinations) + len({each.spec for each in self.report.beside}) + 1
        name = f"{examination.adapter}-{examination.case.dtype}-{layers}-{self.report.seed}-{number}"
        spec = self._save(examination.case, name)
        found = list(zip(wrong_rows(examination), disagreements(examination, spec), strict=True))
        self.report.known += [each for row, each in found if row.divergence]
        wrong = [each for row, each in found if not row.divergence]
        if self._asked_for(culprit.node.layer.name for culprit in examination.culprits):
            self.report.disagreements += wrong
            self.report.examinations.append((examination, spec))
        else:
            self.report.beside += wrong

    def _asked_for(self, culprits: Iterable[str]) -> bool:
        """Whether one of the layers was asked for; what is no layer's fault is everybody's."""
        guilty = set(culprits)
        return not guilty or bool(guilty & self._answered_for)

    def _save(self, case: Case, name: str) -> str | None:
        if self._failures is None:
            return None
        try:
            return str(save_case(case, self._failures, name))
        except OSError:  # the verdict counts more than its spec; the diff says that none was written
            return None


def replay(
    case: Case,
    adapters: Sequence[str | Adapter],
    timeout: float = TIMEOUT,
    *,
    isolation: bool = True,
    memory: float | None = None,
    strict: bool = False,
    arithmetic: str = "every",
) -> Report:
    """Examine the adapters on one given case, and on the kinks of its layers; all else as in `check`.

    Raises UsageError for an unknown arithmetic, AdapterError for an adapter that cannot be used.
    """
    require_known("arithmetic", [arithmetic], ARITHMETICS)
    loaded = load_adapters(adapters, loader(isolation, memory))
    run = Run(loaded, [case.dtype], case.seed or 0, timeout, None, strict, arithmetic)
    started = time.monotonic()
    try:
        run.prepare()
        run.examine_case(case)
    finally:
        run.close()
    run.report.networks = 1
    run.report.seconds = time.monotonic() - started
    return run.report
