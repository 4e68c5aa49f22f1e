"""What a person reads: the per-layer diff of one examination, the summary of a run, the table of layers."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from gradproof.model.tensors import NOTHING_GIVEN, Role, Wrong
from gradproof.run.proof import Proof
from gradproof.run.results import TOO_LITTLE, Report, Tally
from gradproof.verdict.examination import Examination
from gradproof.verdict.rows import Row, Verdict, rows
from gradproof.verdict.running import SECOND_PASS

WIDTH = 120
"""Columns of a diff that goes into a note or a file."""

STYLES = {
    Verdict.WRONG_HERE: "bold red",
    Verdict.COMPOSITION: "bold red",
    Verdict.INHERITED: "yellow",
    Verdict.KNOWN: "cyan",
    Verdict.AGREES: "green",
}


class OutputConsole(Console):
    """Standard output as it is: no markup in what adapters say, no line cut, and no verdict for a closed pipe."""

    def __init__(self) -> None:
        super().__init__(markup=False, emoji=False, highlight=False)
        if not self.is_terminal and "COLUMNS" not in os.environ:
            self.width = WIDTH

    def show(self, part: RenderableType) -> None:
        self.print(part, crop=False)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _table(names: Iterable[str], right: Iterable[str] = (), padding: int = 2) -> Table:
    """An empty table without lines; the columns named in `right` are aligned there."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, padding, 0, 0))
    numbers = set(right)
    for name in names:
        table.add_column(Text(name), justify="right" if name in numbers else "left", overflow="fold")
    return table


def _add_row(table: Table, cells: Iterable[str | Text]) -> None:
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def number(value: Any, digits: int = 9) -> str:
    """A number with that many significant digits, anything else as text."""
    return f"{value:.{digits}g}" if isinstance(value, float) else "" if value is None else str(value)


def tensor_label(row: Row) -> str:
    """`out h` for a node's value, `d h` for the gradient with respect to it, `h` for an array that was given."""
    if row.check.kind in (Wrong.MUTATED_INPUT, Wrong.GLOBAL_STATE):
        return row.check.key.name
    return f"{'out' if row.check.key.role is Role.VALUE else 'd'} {row.check.key.name}"


def headline(examination: Examination) -> str:
    """The first thing that is wrong, in one sentence."""
    where = f"{examination.adapter} {examination.case.dtype}"
    found = rows(examination)
    first = next((row for row in found if row.culprit and row.verdict is not Verdict.KNOWN), None)
    first = first or next((row for row in found if row.check.kind), None)
    if first is None:
        return f"{where}: every tensor agrees"
    if first.verdict is Verdict.COMPOSITION:
        right = "the first backward pass agrees" if first.check.second_pass else "every layer agrees alone"
        return f"{where}: {right}; in the network, {_wrong(first)}{_readers(examination, first)}"
    verdict = "diverges as known" if first.verdict is Verdict.KNOWN else "is wrong"
    return f"{where}: {first.layer} (node {first.node}) {verdict}: {_wrong(first)}"


def _wrong(row: Row) -> str:
    check = row.check
    if check.kind in NOTHING_GIVEN:
        return f"{check.kind}: {check.got}"
    if check.kind in (Wrong.VIEW, Wrong.GLOBAL_STATE):
        return f"{check.kind}: {tensor_label(row)} {check.got}"
    if check.kind is Wrong.REUSED_BUFFER:
        return f"{check.kind}: {tensor_label(row)}: {check.got}"
    if check.kind is Wrong.MUTATED_INPUT:
        return f"{check.kind}: {check.key.name} was written to"
    at = f" at {list(check.index)}" if check.index else ""
    units = f" ({check.noise_units:.3g} noise units)" if check.index is not None else f" ({check.kind})"
    again = ", and something else when called again" if check.kind is Wrong.NONDETERMINISTIC else ""
    again = f" in {SECOND_PASS}" if check.second_pass else again
    return f"{tensor_label(row)}{at}: expected {number(check.expected)}, got {number(check.got)}{again}{units}"


def likely(examination: Examination) -> list[str]:
    """A line for every layer, or sum of gradients, whose wrong numbers a known mistake gives."""
    found = [(culprit.node, culprit.diagnosis) for culprit in examination.culprits if culprit.diagnosis]
    lines = [f"likely mistake in {node.layer.name} (node {node.name}): {diagnosis}" for node, diagnosis in found]
    if examination.diagnosis:
        lines.append(f"likely mistake: d {examination.unblamed[0].key.name} {examination.diagnosis}")
    return lines


def _readers(examination: Examination, row: Row) -> str:
    readers = [node for node, _ in examination.case.network.consumers.get(row.check.key.name, ())]
    if row.check.second_pass or not readers[1:]:
        return ""
    return f"; the gradients that {', '.join(readers)} send to {row.check.key.name} add up wrongly"


def diff_table(examination: Examination) -> Table:
    """Every gradient from the loss back to the inputs, with its verdict; values only where they are wrong."""
    numbers = ("worst error", "at", "expected", "got", "noise units")
    table = _table(("node", "layer", "tensor", "shape", *numbers, "verdict"), numbers, padding=1)
    for row in rows(examination):
        if row.check.key.role is Role.GRADIENT or row.verdict is not Verdict.AGREES:
            _add_row(table, _cells(row))
    return table


def _cells(row: Row) -> Iterator[str | Text]:
    check = row.check
    yield from (row.node, row.layer, tensor_label(row), str(list(check.shape)))
    yield "" if check.max_error is None else f"{check.max_error:.2e}"
    yield "" if check.index is None else str(list(check.index))
    yield number(check.expected)
    yield number(check.got)
    yield "" if check.index is None else f"{check.noise_units:.3g}"
    plain = check.kind is None or check.kind in (Wrong.VALUE, Wrong.GRADIENT)
    yield Text(row.verdict if plain else f"{row.verdict}: {check.kind}", STYLES[row.verdict])


def diff(examination: Examination, report: Report, spec: str | None) -> Group:
    """The per-layer diff: headline, table, and what is needed to see it again."""
    case = examination.case
    again = (
        f"gradproof replay {spec} --adapter {report.requests[examination.adapter]}" if spec else "no spec was written"
    )
    seed = "numbers given" if case.seed is None else f"numbers drawn from seed {case.seed}"
    return Group(
        Text(headline(examination), "bold"),
        *(Text(line, "bold") for line in likely(examination)),
        Text(f"network: {case.network}"),
        Text(_forward_line(examination)),
        diff_table(examination),
        Text(f"{examination.adapter} {report.adapters[examination.adapter]}, {case.dtype}, {seed}"),
        Text(f"replay: {again}", no_wrap=True, overflow="ignore"),
    )


def _forward_line(examination: Examination) -> str:
    kinds = {check.kind for check in examination.checks if check.key.role is Role.VALUE and check.kind}
    if kinds & set(NOTHING_GIVEN):
        return "forward: nothing was compared"
    return (
        "forward: values disagree too, listed first"
        if kinds - {Wrong.MUTATED_INPUT, Wrong.GLOBAL_STATE, Wrong.REUSED_BUFFER}
        else "forward: every value agrees"
    )


def diff_text(examination: Examination, report: Report, spec: str | None) -> str:
    """The per-layer diff as plain text."""
    target = io.StringIO()
    console = Console(file=target, width=WIDTH, no_color=True, force_terminal=False, markup=False, emoji=False)
    console.print(diff(examination, report, spec), crop=False, highlight=False)
    return "\n".join(line.rstrip() for line in target.getvalue().splitlines())


def summary(report: Report, by_layer: bool = True) -> Group:
    """Counts per adapter and dtype, then per layer, then everything that deserves a warning."""
    versions = ", ".join(f"{name} {version}" for name, version in report.adapters.items())
    parts: list[RenderableType] = [Text(versions), "", _tally_table(report)]
    if by_layer:
        parts += ["", _layer_table(report)]
    parts += [Text(line, "bold red") for line in biases(report)]
    parts += [Text(line, "yellow") for line in warnings(report)]
    parts += ["", Text(closing_line(report), "bold green" if report.agrees else "bold red")]
    return Group(*parts)


def closing_line(report: Report) -> str:
    found = [_count(len(report.disagreements), "tensor disagrees", "tensors disagree")] if report.disagreements else []
    found += [_count(len(report.stale), "known divergence", "known divergences") + " stale"] if report.stale else []
    found += ["not every adapter examined a network"] if not (report.agrees or found) else []
    interrupted = "interrupted: " if report.interrupted else ""
    return (
        f"{interrupted}{', '.join(found) or 'agreement'}: {_count(report.networks, 'network', 'networks')}, "
        f"{report.gradients_compared} gradients compared in {report.seconds:.1f} s, seed {report.seed}"
    )


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _tally_table(report: Report) -> Table:
    numbers = ("networks", "gradients", "wrong", "known", "worst agreeing", "unverifiable")
    table = _table(("adapter", "dtype", *numbers), numbers)
    for (adapter, dtype), tally in report.tallies.items():
        _add_row(table, (adapter, dtype, *_counts(tally)))
    return table


def _counts(tally: Tally) -> tuple[str, ...]:
    return (
        str(tally.networks),
        str(tally.gradients),
        str(tally.disagreeing),
        str(tally.known),
        f"{tally.worst:.1f} units",
        f"{tally.unverifiable_share:.2%}",
    )


def _layer_table(report: Report) -> Table:
    """Layer by adapter and dtype: networks it stood in, and in how many it was wrong."""
    columns = [f"{adapter} {dtype}" for adapter, dtype in report.tallies]
    table = _table(("networks with layer", *columns), columns)
    seen = {name for tally in report.tallies.values() for name in (*tally.layers, *tally.wrong_layers)}
    for layer in sorted(seen):
        _add_row(table, (layer, *(_layer_cell(tally, layer) for tally in report.tallies.values())))
    return table


def _layer_cell(tally: Tally, layer: str) -> Text:
    wrong = tally.wrong_layers[layer]
    return Text(f"{wrong} WRONG of {tally.layers[layer]}", "bold red") if wrong else Text(str(tally.layers[layer]))


def biases(report: Report) -> list[str]:
    """A line for every factor that only many networks show."""
    return [
        f"bias: {each.adapter} {each.dtype} {each.bias.layer}: {each.bias.description}"
        + (f"; shown best by {each.spec}" if each.spec else "")
        for each in report.biased
    ]


def warnings(report: Report) -> list[str]:
    """What a reader of a green summary must still know."""
    lines = []
    for each in report.stale:
        entry = each.divergence
        lines.append(
            f"{each.adapter} {each.dtype}: the known divergence of {entry.layer} ({entry.reason}) no longer shows at "
            f"{dict(entry.witness)}: remove its entry"
        )
    lines += _beside(report)
    for (adapter, dtype), tally in report.tallies.items():
        if tally.unverifiable_share > TOO_LITTLE:
            share = f"{tally.unverifiable_share:.0%} of the elements overflow {dtype}"
            lines.append(f"{adapter} {dtype}: verified too little: {share}")
        if tally.unsupported:
            left_out = _count(tally.unsupported.total(), "network", "networks")
            layers = [layer for layer, _ in tally.unsupported.most_common()]
            more = ", ..." if len(layers) > SHOWN_LAYERS else ""
            told = ", ".join(layers[:SHOWN_LAYERS]) + more
            lines.append(f"{adapter} {dtype}: {left_out} not run, for it lacks one of their layers: {told}")
        if not tally.networks:
            lines.append(f"{adapter} {dtype}: no network was examined")
    lines += [f"known: {line}" for line in _known_counts(report)]
    lines += [f"accuracy: {line}" for line in _accuracy_counts(report)]
    lines += [f"arithmetic: {line}" for line in _classes(report)]
    return lines


SHOWN_LAYERS = 8
"""Layers that an adapter lacks, those of the most networks first."""


def _accuracy_counts(report: Report) -> list[str]:
    return [
        f"{adapter} {dtype} {layer}: no more digits than {algorithm} gives ({_count(number, 'tensor', 'tensors')})"
        for (adapter, dtype), tally in report.tallies.items()
        for (layer, algorithm), number in sorted(tally.accuracy.items())
    ]


ROUNDS = {"stored": "rounds what is kept for the backward pass", "every": "rounds every operation"}
"""Class of arithmetic -> what that means."""


def _classes(report: Report) -> list[str]:
    return [
        f"{adapter} {dtype} {meaning}: {', '.join(layers)}"
        for adapter, dtypes in report.arithmetic.items()
        for dtype, classes in dtypes.items()
        for name, meaning in ROUNDS.items()
        if (layers := [layer for layer, each in classes.items() if each == name])
    ]


def _beside(report: Report) -> list[str]:
    """A line per layer that is wrong and was not asked for, with a spec that shows it."""
    guilty = [each for each in report.beside if each.culprit]
    specs = {(each.adapter, each.dtype, each.layer): each.spec for each in reversed(guilty)}
    return [
        f"{adapter} {dtype}: {layer} is wrong too, which was not asked for" + (f": {spec}" if spec else "")
        for (adapter, dtype, layer), spec in sorted(specs.items(), key=str)
    ]


def _known_counts(report: Report) -> list[str]:
    tensors = Counter((each.adapter, each.dtype, each.layer, each.cause) for each in report.known if each.cause)
    return [
        f"{adapter} {dtype} {layer}: {cause} ({_count(number, 'tensor', 'tensors')})"
        for (adapter, dtype, layer, cause), number in sorted(tensors.items(), key=str)
    ]


def conventions_table(conventions: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> Table:
    """The derivative each adapter chose at each kink, as a weight between the left and the right one."""
    columns = [f"{adapter} {dtype}" for adapter, dtypes in conventions.items() for dtype in dtypes]
    table = _table(("layer", "kink", *columns))
    chosen: dict[tuple[str, str], dict[str, str]] = {}
    for adapter, dtypes in conventions.items():
        for dtype, layers in dtypes.items():
            for layer, kinks in layers.items():
                for kink, weight in kinks.items():
                    chosen.setdefault((layer, kink), {})[f"{adapter} {dtype}"] = f"{weight:g}"
    for (layer, kink), weights in sorted(chosen.items()):
        _add_row(table, (layer, kink, *(weights.get(column, "?") for column in columns)))
    return table


SHOWN_REFUTATIONS = 5
"""Of one layer; the others are counted."""


def proofs_text(proofs: Sequence[Proof]) -> str:
    """One line for every layer that is proven, and how the others are not."""
    lines: list[str] = []
    for each in proofs:
        if each.holds:
            lines.append(f"{each.layer}: proven, {each.checks} checks on {_count(each.cases, 'case', 'cases')}")
            continue
        wrong = len(each.refutations)
        lines.append(
            f"{each.layer}: NOT PROVEN, {wrong} of {each.checks} checks on {_count(each.cases, 'case', 'cases')}"
        )
        lines += [f"  {one.case}: {one.check}: {one.message}" for one in each.refutations[:SHOWN_REFUTATIONS]]
        if wrong > SHOWN_REFUTATIONS:
            lines.append(f"  ... and {wrong - SHOWN_REFUTATIONS} more")
    holding = sum(each.holds for each in proofs)
    return "\n".join([*lines, "", f"{holding} of {_count(len(proofs), 'layer', 'layers')} proven"])
