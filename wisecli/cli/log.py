"""`wise log`: the edits of a run folder or a side memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wisecli.cli import _options as opt
from wisecli.cli._output import Output, figure
from wisecli.cli._texts import line_text, when

if TYPE_CHECKING:
    from wisecli.inspection.ledger import LedgerLine

_NARROWEST = 24  # characters of an edit's text, on however small a terminal
_GAP = 3  # between columns
_TWO_LINES = 100  # from this width on date and time of day stand on one line


def log(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Folder written by wise edit, side memory file, or packaged folder.")
    ] = Path("shards"),
    outcome: Annotated[str | None, typer.Option(help="took, failed, superseded or withdrawn.")] = None,
    grep: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Only edits with this in id, prompt, target or subject.")
    ] = None,
    last: Annotated[int | None, typer.Option("-n", min=1, metavar="N", help="Only the last N.")] = None,
    json: opt.Json = False,
) -> None:
    """List edits in stream order: what became of each, where it is held, and when it was learned.

    Example: wise log shards --outcome failed
    Example: wise log sm.safetensors --grep Bulgaria -n 5
    """
    sink = Output(json)
    with sink.running():
        from wisecli.inspection import ledger_of, open_source, select
        from wisecli.inspection.ledger import counts

        source = open_source(path)
        lines = ledger_of(source)
        found = select(lines, outcome=outcome, grep=grep, last=last)
        if found:
            _show(sink, found)
        summary = ", ".join(f"{n} {name}" for name, n in counts(lines).items())
        shown = "" if len(found) == len(lines) else f"; shown {len(found)}"
        sink.line(f"{path}: {summary or 'no edit is learned yet'}{shown}.")
        document = {"path": str(path), "kind": source.kind, "edits": [x.to_json() for x in found], "total": len(lines)}
        sink.result(document)


def _show(sink: Output, lines: Sequence[LedgerLine]) -> None:
    columns = _columns(lines, sink.out.width >= _TWO_LINES)
    used = sum(max(len(part) for cell in (name, *cells) for part in cell.split("\n")) + _GAP for name, cells in columns)
    width = max(_NARROWEST, sink.out.width - used - _GAP - 1)
    columns.append(("edit", [line_text(line, width) for line in lines]))
    rows = zip(*(cells for _, cells in columns), strict=True)
    sink.table("", [name for name, _ in columns], rows, left=len(columns))


def _columns(lines: Sequence[LedgerLine], wide: bool) -> list[tuple[str, list[str]]]:
    """All but the texts; a column that would be empty is left out."""
    columns = [("id", [line.id for line in lines]), ("outcome", [_outcome(line) for line in lines])]
    times = [when(line.time) if line.time else "" for line in lines]
    columns.append(("learned (UTC)" if wide else "learned", times if wide else [t.replace(" ", "\n") for t in times]))
    if len({line.memory for line in lines}) > 1:
        columns.append(("memory", [_memory(line.memory) for line in lines]))
    columns.append(("shard", ["" if line.shard is None else str(line.shard) for line in lines]))
    columns.append(("indicator", ["" if line.indicator is None else figure(line.indicator) for line in lines]))
    return [(name, cells) for name, cells in columns if any(cells)]


def _outcome(line: LedgerLine) -> str:
    return f"{line.outcome}\nby {line.by}" if line.by else line.outcome


def _memory(memory: int | None) -> str:
    return "" if memory is None else ("main" if memory < 0 else str(memory))
