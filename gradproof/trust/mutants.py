"""Mutants: the reference's own backward functions, each with one small mistake made in its syntax tree.

A verdict that can be trusted tells every one of them from the original. Run `python -m gradproof.trust.mutants`.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import multiprocessing
import signal
import textwrap
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from gradproof.draw.drawing import Drawn, draw_each
from gradproof.draw.joining import NODES, Surroundings, ordinary_parts
from gradproof.model.case import Case
from gradproof.reference import LAYERS, NumpyReference
from gradproof.reference.walk import Row
from gradproof.show.progress import tracked
from gradproof.trust.sections import versions, write_section
from gradproof.verdict.judging import Subject, disagrees
from gradproof.verdict.kinks import first_gradient, probe

EQUIVALENTS = Path(__file__).with_suffix(".toml")
"""Mutants that compute the same, each with the proof."""

NETWORKS = 200
"""Networks with the layer in which a mutant must show."""

MAX_NODES = 3

BURIALS = 3
"""Networks of about 30 nodes that each network which shows a mutant is buried in, until one of them shows it too."""

DEEP_NETWORKS = 30
"""Networks of about 30 nodes in which a mutant must show that shows in small ones."""

TIMEOUT = 10.0
"""Seconds that a mutant may take for one network."""

DEEP_SECTION = """\
In about {nodes} nodes: {killed} of the {shown} are told too. A network of up to {max_nodes} nodes that shows one is put
among others (`gradproof/draw/joining.py`): {first} show in the first such network, {later} in a later one, and
{kinks} in the probe of a kink, which comes before networks of any size."""

Rule = Callable[[ast.expr], Iterator[ast.expr]]

SWAPPED: dict[type[ast.operator], type[ast.operator]] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.FloorDiv: ast.Mult},
}
COMPARED: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
CALLED = {"sum": "mean", "mean": "sum", "maximum": "minimum", "minimum": "maximum", "cos": "sin", "sin": "cos"}
"""Functions and methods that are taken for each other."""


def operator_swapped(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
        yield ast.BinOp(node.left, SWAPPED[type(node.op)](), node.right)
    if isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)


def operand_dropped(node: ast.expr) -> Iterator[ast.expr]:
    """A term or a factor left out; a power or a quotient keeps its left side."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)):
        yield node.left
        if isinstance(node.op, (ast.Add, ast.Mult)):
            yield node.right
        if isinstance(node.op, ast.Sub):
            yield ast.UnaryOp(ast.USub(), node.right)


def sign_flipped(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Invert, ast.Not)):
        yield node.operand
    elif isinstance(node, (ast.BinOp, ast.Call)):
        yield ast.UnaryOp(ast.USub(), node)


def constant_shifted(node: ast.expr) -> Iterator[ast.expr]:
    """Among them the axes of sums and the numbers of formulas."""
    if not isinstance(node, ast.Constant):
        return
    if isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node.value, (int, float)):
        yield ast.Constant(node.value + 1)
        if node.value:
            yield ast.Constant(node.value / 2 if isinstance(node.value, float) else node.value - 1)


def comparison_turned(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        for other in COMPARED.get(type(node.ops[0]), ()):
            yield ast.Compare(node.left, [other()], node.comparators)


def branch_taken(node: ast.expr) -> Iterator[ast.expr]:
    """One side always, or the sides exchanged."""
    if isinstance(node, ast.IfExp):
        sides = [node.body, node.orelse]
    elif isinstance(node, ast.Call) and ast.unparse(node.func) == "np.where" and len(node.args) == 3:
        sides = node.args[1:]
        yield ast.Call(node.func, [node.args[0], *sides[::-1]], node.keywords)
    else:
        return
    yield from sides


def call_confused(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLED:
        other = ast.Attribute(node.func.value, CALLED[node.func.attr], node.func.ctx)
        keywords = [each for each in node.keywords if each.arg not in ("initial", "where")]
        yield ast.Call(other, node.args, keywords)


RULES: tuple[Rule, ...] = (
    operator_swapped,
    operand_dropped,
    sign_flipped,
    constant_shifted,
    comparison_turned,
    branch_taken,
    call_confused,
)


@dataclass(frozen=True)
class Mutant:
    """One backward function with one mistake.

    function: module and name. mistake: what was done, in words. mutated: the line that was changed, as it is now.
    source: of the whole function.
    """

    function: str
    mistake: str
    mutated: str
    source: str

    def compiled(self) -> Callable[..., Any]:
        """The function, in the namespace of the original."""
        original = backward_functions()[self.function]
        names: dict[str, Any] = {}
        exec(compile(self.source, f"<mutant of {self.function}>", "exec"), original.__globals__, names)
        return names[original.__name__]

    def diff(self) -> str:
        """The change, as a unified diff."""
        before = ast.unparse(_tree(self.function)).splitlines()
        lines = difflib.unified_diff(before, self.source.splitlines(), self.function, self.mistake, lineterm="")
        return "\n".join(lines) + "\n"


@cache
def backward_functions() -> dict[str, Callable[..., Any]]:
    """Module and name -> function, of every layer; layers share some."""
    found = (layer.backward for layer in LAYERS.values())
    return {f"{each.__module__.rpartition('.')[2]}.{each.__name__}": each for each in found}


@cache
def layers_of(function: str) -> tuple[str, ...]:
    """The layers whose backward function it is."""
    return tuple(layer.name for layer in LAYERS.values() if layer.backward is backward_functions()[function])


def _tree(function: str) -> ast.Module:
    """The function's syntax tree, without annotations."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(backward_functions()[function])))
    definition = _definition(tree)
    definition.returns = None
    definition.args.args = [ast.arg(each.arg) for each in definition.args.args]
    return tree


def _definition(tree: ast.Module) -> ast.FunctionDef:
    return next(each for each in tree.body if isinstance(each, ast.FunctionDef))


def mutants_of(function: str) -> list[Mutant]:
    """Every mutant of the function, each once."""
    tree = _tree(function)
    plain = ast.unparse(tree)
    found: dict[str, Mutant] = {}
    for mistake in _mistakes(_definition(tree)):
        source = ast.unparse(ast.fix_missing_locations(tree))
        lines = zip(plain.splitlines(), source.splitlines(), strict=True)
        changed = [after.strip() for before, after in lines if before != after]
        if changed and source not in found:
            found[source] = Mutant(function, mistake, " ".join(changed), source)
    return list(found.values())


def _mistakes(definition: ast.FunctionDef) -> Iterator[str]:
    """Make one mistake in the function, tell of it, and undo it before the next."""
    rules = (*RULES, _cached_value_confused(_cached(definition)))
    for body, position, statement in list(_statements(definition)):
        if isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Add):
            body[position] = ast.Assign([statement.target], statement.value, lineno=0)
            yield "overwritten, not added to"
            body[position] = statement
            statement.op = ast.Sub()
            yield "added with the wrong sign"
            statement.op = ast.Add()
        for owner, name, place, node in list(_expressions(statement)):
            for rule in rules:
                for other in rule(node):
                    _put(owner, name, place, other)
                    yield rule.__name__.replace("_", " ")
                    _put(owner, name, place, node)
    yield from _signs_flipped(definition)


def _signs_flipped(definition: ast.FunctionDef) -> Iterator[str]:
    """Of every gradient, where it is handed over."""
    for node in ast.walk(definition):
        for i, value in enumerate(node.values) if isinstance(node, ast.Dict) else ():
            node.values[i] = ast.UnaryOp(ast.USub(), value)  # type: ignore[attr-defined]
            yield "sign flipped"
            node.values[i] = value  # type: ignore[attr-defined]


def _statements(definition: ast.FunctionDef) -> Iterator[tuple[list[ast.stmt], int, ast.stmt]]:
    """The innermost statements that do something, each with the block that holds it."""
    for owner in ast.walk(definition):
        for body in (getattr(owner, name, []) for name in ("body", "orelse")):
            for position, statement in enumerate(body if isinstance(body, list) else ()):
                if isinstance(statement, (ast.Assign, ast.AugAssign, ast.Return, ast.Expr)) and not _docstring(
                    statement
                ):
                    yield body, position, statement


def _docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _expressions(statement: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.expr]]:
    """Every expression that is read, with the place that holds it."""
    for owner in ast.walk(statement):
        for name, value in ast.iter_fields(owner):
            for position, each in enumerate(value) if isinstance(value, list) else ((None, value),):
                if isinstance(each, ast.expr) and isinstance(getattr(each, "ctx", ast.Load()), ast.Load):
                    yield owner, name, position, each


def _put(owner: ast.AST, name: str, position: int | None, node: ast.expr) -> None:
    if position is None:
        setattr(owner, name, node)
    else:
        getattr(owner, name)[position] = node


def _cached(definition: ast.FunctionDef) -> list[str]:
    """The cotangent, and what the function reads of its cache, each as it stands there: a name of its own, or a field.

    `x, out = cache` and `x = kept.x` give the name x; `kept.x` that has no name is read as it is.
    """
    dout, cached = (each.arg for each in definition.args.args)
    named = [(target, value) for target, value in _assigned(definition) if _is_of(value, cached)]
    known = {ast.unparse(value) for _, value in named}
    names = [each for target, _ in named for each in ast.walk(target) if isinstance(each, ast.Name)]
    fields = [each for each in ast.walk(definition) if _is_field(each, cached) and ast.unparse(each) not in known]
    read = sorted((*names, *fields), key=lambda each: (each.lineno, each.col_offset))  # type: ignore[attr-defined]
    values = list(dict.fromkeys((dout, *map(ast.unparse, read))))
    return [value for value in values if value != "_"] + ([cached] if len(values) == 1 else [])


def _assigned(definition: ast.FunctionDef) -> Iterator[tuple[ast.expr, ast.expr]]:
    """What is assigned, and its value; several at once, as in `x, y = kept.x, kept.y`, one by one."""
    for node in ast.walk(definition):
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                yield from zip(target.elts, value.elts, strict=True)
            else:
                yield target, value


def _is_of(value: ast.AST, cached: str) -> bool:
    return _is_field(value, cached) or ast.unparse(value) == cached


def _is_field(node: ast.AST, cached: str) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node.value) == cached


def _cached_value_confused(values: Sequence[str]) -> Rule:
    """Each value that came from the cache is taken for the next of them."""
    following = dict(zip(values, (*values[1:], *values[:1]), strict=True))

    def wrong_cached_value(node: ast.expr) -> Iterator[ast.expr]:
        value = ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""
        if following.get(value, value) != value:
            yield ast.parse(following[value], mode="eval").body

    return wrong_cached_value


@dataclass(frozen=True)
class Trial:
    """A small network in which a mutant may show, with the larger ones in which it is buried."""

    case: Case
    surroundings: Surroundings

    @cached_property
    def buried(self) -> list[Case]:
        """The network in BURIALS of about 30 nodes; the others have none of its layers."""
        return [self.surroundings.bury(self.case, seed) for seed in range(BURIALS)]


@dataclass(frozen=True)
class Outcome:
    """What told the mutant from the original.

    networks: how many small ones were needed, None where none of them does. deep: how many of about 30 nodes, in which
    those are buried, were needed then; 0 where the probe of a kink tells, which comes before networks of any size;
    None where nothing does.
    """

    mutant: Mutant
    networks: int | None
    deep: int | None

    @property
    def killed(self) -> bool:
        """Whether it showed in small networks and in large ones."""
        return self.networks is not None and self.deep is not None


def judge(mutant: Mutant, trials: Mapping[str, Sequence[Trial]]) -> Outcome:
    """Run the mutant as an adapter on the trials of each layer that has it, until one shows it, and buried too."""
    backward = mutant.compiled()
    networks: int | None = None
    count = deep = 0
    for layer in layers_of(mutant.function):
        row = (LAYERS[layer].forward, backward)
        subject = Subject(NumpyReference(rows={layer: row}), {}, timeout=TIMEOUT)
        for trial in trials[layer]:
            count += 1
            if not disagrees(subject, trial.case):
                continue
            networks = networks or count
            for case in trial.buried:
                deep += 1
                if disagrees(subject, case):
                    return Outcome(mutant, networks, deep)
            if deep >= DEEP_NETWORKS:
                break
        if _shows_at_a_kink(layer, row):
            return Outcome(mutant, networks or count + 1, 0)
    return Outcome(mutant, networks, None)


def _shows_at_a_kink(layer: str, row: Row) -> bool:
    """Whether it takes another derivative at a kink than the one it was told to take."""
    for kink in LAYERS[layer].kinks:
        case, left, right = probe(LAYERS[layer], kink, "float64")
        for weight, expected in ((0.0, left), (1.0, right)):
            try:
                found = first_gradient(NumpyReference({layer: {kink.name: weight}}, {layer: row}), case)
            except Exception:
                return True
            if not np.allclose(found, expected):
                return True
    return False


@cache
def surroundings_of(seed: int) -> Surroundings:
    """The networks of this seed that others are buried among."""
    return Surroundings(ordinary_parts(seed))


def trials_of(layer: str, networks: int, seed: int) -> list[Trial]:
    """Drawn networks that have the layer, in float64."""
    drawn: list[Drawn] = []
    draw_each(drawn.append, networks, seed, [layer], MAX_NODES)
    return [Trial(each.case("float64"), surroundings_of(seed)) for each in drawn]


def judge_all(function: str, networks: int, seed: int) -> list[Outcome]:
    """The outcomes of all mutants of one function."""
    trials = {layer: trials_of(layer, networks, seed) for layer in layers_of(function)}
    return [judge(mutant, trials) for mutant in mutants_of(function)]


def read_equivalents(path: Path = EQUIVALENTS) -> dict[tuple[str, str], str]:
    """Function and mutated statement -> why the mutant computes the same."""
    entries = tomllib.loads(path.read_text()).get("equivalent", []) if path.is_file() else []
    return {(entry["function"], entry["mutated"]): entry["proof"] for entry in entries}


def summary(outcomes: Iterable[Outcome], equivalents: Mapping[tuple[str, str], str]) -> tuple[str, list[Mutant]]:
    """The closing line, and the survivors that no proof excuses."""
    outcomes = list(outcomes)
    alive = [each for each in outcomes if not each.killed]
    survived = [each.mutant for each in alive if each.networks or _name(each.mutant) not in equivalents]
    killed, equivalent = len(outcomes) - len(alive), len(alive) - len(survived)
    line = f"mutants: made={len(outcomes)} killed={killed} equivalent={equivalent} survived={len(survived)}"
    return line, survived


def _name(mutant: Mutant) -> tuple[str, str]:
    return mutant.function, mutant.mutated


def _leave_interrupts_to_the_first() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge the mutants of all functions in several processes; 1 where one survives without a proof."""
    parser = argparse.ArgumentParser(prog="python -m gradproof.trust.mutants", description=__doc__)
    parser.add_argument("--function", action="append", metavar="F", help="module.name; repeatable (default: all)")
    parser.add_argument("--networks", type=int, default=NETWORKS, help=f"per layer (default {NETWORKS})")
    parser.add_argument("--seed", type=int, default=1, help="what is drawn hangs on it (default 1)")
    parser.add_argument("--processes", type=int, default=None, help="default: one per core")
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the outcome into this page")
    parser.add_argument("--survivors", type=Path, default=Path("survivors.diff"), help="where their diffs go")
    options = parser.parse_args(arguments)
    known = backward_functions()
    unknown = [each for each in options.function or () if each not in known]
    if unknown:
        parser.error(f"unknown function {unknown[0]!r}; valid: {', '.join(known)}")
    console = Console(stderr=True)
    outcomes: list[Outcome] = []
    # Processes of their own, not forks: JAX, where it is loaded, has threads that do not survive one.
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, spawned, initializer=_leave_interrupts_to_the_first) as pool:
        jobs = [pool.submit(judge_all, each, options.networks, options.seed) for each in options.function or known]
        try:
            for job in tracked(as_completed(jobs), len(jobs), "functions"):
                outcomes += job.result()
        except KeyboardInterrupt:
            for each in multiprocessing.active_children():
                each.terminate()
            console.print(f"interrupted after {len(outcomes)} mutants; nothing was written")
            return 130
    line, survived = summary(outcomes, read_equivalents())
    if survived:
        options.survivors.write_text("".join(mutant.diff() for mutant in survived))
        console.print(f"the survivors' diffs are in {options.survivors}")
    if options.page:
        write_section(options.page, "mutants", section(line, outcomes, survived, options))
    print(line)
    return 1 if survived else 0


def section(line: str, outcomes: Sequence[Outcome], survived: Iterable[Mutant], options: argparse.Namespace) -> str:
    """The outcome in Markdown."""
    shown = [each for each in outcomes if each.networks]
    deep = DEEP_SECTION.format(
        nodes=NODES,
        killed=sum(each.killed for each in shown),
        shown=len(shown),
        max_nodes=MAX_NODES,
        first=sum(each.deep == 1 for each in shown),
        later=sum((each.deep or 0) > 1 for each in shown),
        kinks=sum(each.deep == 0 for each in shown),
    )
    told = [f"- survived: `{each.function}`, {each.mistake}: `{each.mutated}`" for each in survived]
    drawn = f"{versions()}, seed {options.seed}, {options.networks} networks per layer."
    return "\n\n".join([f"    {line}", deep, *(["\n".join(told)] if told else []), drawn])


if __name__ == "__main__":
    raise SystemExit(main())
