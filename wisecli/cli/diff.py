"""`wise diff`: what differs between two side memories."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wisecli.cli import _options as opt
from wisecli.cli._output import Output, short
from wisecli.cli._texts import line_text, setting
from wisecli.cli._why import printable, which

if TYPE_CHECKING:
    from wisecli.evaluation.answers import Answer
    from wisecli.inspection.difference import AnswerPair, Difference
    from wisecli.inspection.ledger import LedgerLine
    from wisecli.inspection.source import MergedSource

_DIGEST = 12  # characters of a digest
_IS_DIGEST = re.compile("[0-9a-f]{64}")
_GAP = 3


@opt.loads_base
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="Side memory file, or a packaged folder.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The other one.")],
    ask: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also ask both these prompts, one per line; loads the base.")
    ] = None,
    ask_edits: Annotated[
        bool, typer.Option("--ask-edits", help="Also ask both the prompts of all their edits; loads the base.")
    ] = False,
    loading: opt.Loading = opt.Loading(),
    json: opt.Json = False,
) -> None:
    """Show what differs between two side memories: edits, settings, tensors, and on request their answers.

    Edits are matched by id, those left over by prompt.

    Example: wise diff old.safetensors new.safetensors
    Example: wise diff old.safetensors new.safetensors --ask-edits
    """
    sink = Output(json)
    with sink.running():
        from wisecli.errors import UsageError
        from wisecli.inspection import compare_side_memories, open_side_memory

        if ask is not None and ask_edits:
            raise UsageError("--ask and --ask-edits are two sets of prompts.", hint="Give one of them.")
        prompts = _prompts(ask) if ask is not None else None
        one, other = open_side_memory(a), open_side_memory(b)
        found = compare_side_memories(one, other)
        document = {"a": str(a), "b": str(b), **found.to_json(), "answers": None}
        _show(sink, found)
        if prompts is not None or ask_edits:
            base = loading.of(one.side_memory)
            pairs, asked = _answers(sink, base, one, other, prompts)
            _show_answers(sink, pairs, asked, [len(s.side_memory.memories) for s in (one, other)])
            document["answers"] = {"asked": asked, "differ": [p.to_json() for p in pairs]}
        sink.result(document)


def _prompts(path: Path) -> list[str]:
    from wisecli.errors import InputError

    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(
            f"Cannot read the prompts {path}: {e}.", hint="Give a UTF-8 text file, one prompt per line."
        ) from e
    if not prompts:
        raise InputError(f"There are no prompts in {path}.", hint="Give one per line.")
    return list(dict.fromkeys(prompts))


def _answers(
    sink: Output, base: Any, a: MergedSource, b: MergedSource, prompts: Sequence[str] | None
) -> tuple[list[AnswerPair], int]:
    from wisecli.inspection import compare_answers

    with sink.progress() as bar:
        task = bar.add_task("asking", total=None)
        return compare_answers(base, a, b, prompts, lambda n, total: bar.update(task, completed=n, total=total))


def _show(sink: Output, d: Difference) -> None:
    if d.none:
        sink.line(f"No difference: the same {d.same} edits, settings and tensors ({d.digests[0][:_DIGEST]}).")
        return
    for name, lines in (("A", d.only_a), ("B", d.only_b)):
        _show_lines(sink, name, lines)
    if d.changed:
        sink.table("Edits that differ", ("id", "", "A", "B"), _changes(d), left=4)
        sink.line()
    if d.settings:
        rows = [(k, _value(x), _value(y)) for k, (x, y) in d.settings.items()]
        sink.table("Settings that differ", ("setting", "A", "B"), rows, left=3)
        sink.line()
    edits = f"{d.same} the same, {len(d.changed)} changed, {len(d.only_a)} only in A, {len(d.only_b)} only in B"
    differ = "; ".join(f"{name} ({what})" for name, what in d.tensors.items())
    digests = " and ".join(x[:_DIGEST] for x in dict.fromkeys(d.digests))
    sink.facts(
        [
            ("edits", edits),
            ("settings", f"{len(d.settings)} differ" if d.settings else "the same"),
            ("tensors", f"differ: {differ}" if d.tensors else "the same"),
            ("digest", digests),
        ]
    )


def _show_lines(sink: Output, name: str, lines: Sequence[LedgerLine]) -> None:
    if not lines:
        return
    width = max(24, sink.out.width - max(len(x.id) for x in lines) - 2 * _GAP - 12)
    rows = [(x.id, x.outcome, line_text(x, width)) for x in lines]
    sink.table(f"Edits only in {name}", ("id", "outcome", "edit"), rows, left=3)
    sink.line()


def _changes(d: Difference) -> Iterator[tuple[str, str, str, str]]:
    for edit in d.changed:
        for n, (what, (x, y)) in enumerate(edit.changes.items()):
            yield ("" if n else edit.a.id, what, _value(x), _value(y))


def _show_answers(sink: Output, pairs: Sequence[AnswerPair], asked: int, memories: Sequence[int]) -> None:
    sink.line()
    if pairs:
        width = max(16, (sink.out.width - 2 * _GAP - 4) // 3)
        rows = [
            (short(printable(p.prompt), width), *(_said(x, n) for x, n in zip((p.a, p.b), memories, strict=True)))
            for p in pairs
        ]
        sink.table("Answers that differ", ("prompt", "A", "B"), rows, left=3)
    sink.line(f"{asked} prompts asked: {len(pairs)} answered otherwise.")


def _said(answer: Answer, memories: int) -> str:
    route = answer.route
    whose = which(route.memory, memories) if route else "-"
    return f"{printable(answer.text) or '(nothing)'}\n({whose})"


def _value(value: Any) -> str:
    """A value of either; of a digest its start."""
    text = setting(value)
    return f"{text[:_DIGEST]}…" if _IS_DIGEST.fullmatch(text) else text
