"""`wise show`: everything known of one edit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wisecli.cli import _options as opt
from wisecli.cli._output import Output, figure, short
from wisecli.cli._texts import NO_TEXT, line_text, when
from wisecli.cli._why import printable

if TYPE_CHECKING:
    from wisecli.inspection.edit import EditView

_LONGEST = 2000  # characters of a prompt or a target
_GAP = 3


def show(
    edit: Annotated[str, typer.Argument(metavar="ID", help="Id of the edit, as wise log lists it.")],
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Folder written by wise edit, side memory file, or packaged folder.")
    ] = Path("shards"),
    top: Annotated[int, typer.Option(min=0, help="Nearest other edits to show, at most.")] = 5,
    json: opt.Json = False,
) -> None:
    """Show an edit: what became of it, its keys, the edits nearest to it, and whether the gate opens for it.

    No base is loaded: scores are those of the stored keys.

    Example: wise show demo-012 sm.safetensors
    """
    sink = Output(json)
    with sink.running():
        from wisecli.inspection import open_source, view_edit

        view = view_edit(open_source(path), edit, top)
        sink.facts([(name, printable(value)) for name, value in _facts(view)])
        if view.nearest:
            sink.line()
            width = max(24, sink.out.width - max(len(n.line.id) for n in view.nearest) - 4 * _GAP - 20)
            rows = [(n.line.id, n.line.outcome, line_text(n.line, width), figure(n.score)) for n in view.nearest]
            sink.table("Nearest other edits", ("id", "outcome", "edit", "score"), rows, left=3)
        sink.result({"path": str(path), **view.to_json()})


def _facts(view: EditView) -> Iterator[tuple[str, str]]:
    line = view.line
    yield "edit", f"{line.id}, {view.position} of {view.edits}"
    yield from ((role, short(said, _LONGEST)) for role, said in line.history or ())
    yield "prompt", NO_TEXT if line.prompt is None else short(line.prompt, _LONGEST)
    if line.prompt is not None:
        yield "target", short(str(line.target), _LONGEST)
    if line.subject:
        yield "subject", short(line.subject, _LONGEST)
    yield "outcome", f"{line.outcome} by {line.by}" if line.by else line.outcome
    if view.supersedes:
        yield "supersedes", ", ".join(view.supersedes)
    if line.time:
        yield "learned", f"{when(line.time)} UTC"
    if line.memory is not None:
        yield "memory", "main" if line.memory < 0 else str(line.memory)
    learned = [("shard", line.shard), ("steps", line.steps), ("loss", line.loss), ("indicator", line.indicator)]
    yield from ((name, f"{value:g}") for name, value in learned if value is not None)
    yield from ((name, short(str(value), _LONGEST)) for name, value in sorted(line.more.items()))
    yield "keys", str(view.keys) + (f", crowding {figure(view.crowding)}" if view.crowding is not None else "")
    if view.own:
        yield "own forms", f"score {', '.join(figure(x) for x in view.own)} for its bare prompt's key"
    yield "routing", _routing(view)


def _routing(view: EditView) -> str:
    o = view.opening
    state = {True: "open", False: "closed", None: "not known"}[o.open]
    sign = (
        "" if o.epsilon is None or o.score is None else f" ({figure(o.score)} {'>' if o.open else '<='} {o.epsilon:g})"
    )
    return f"{state}: {o.why}{sign}"
