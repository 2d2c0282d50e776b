"""`wise verify`: is a side memory whole, and does it still answer its edits?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wisecli.cli import _options as opt
from wisecli.cli._output import Output, short
from wisecli.cli._texts import edit_text
from wisecli.cli._why import printable, which

if TYPE_CHECKING:
    from wisecli.inspection.asking import AskedEdit
    from wisecli.inspection.checks import Check
    from wisecli.memory.side_memory import SideMemory
    from wisecli.models.base import Base

_STATE = {True: "ok", False: "FAILED", None: "-"}
_GAP = 3


@opt.loads_base
def verify(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Side memory file, or a packaged folder.")],
    ask: Annotated[
        bool, typer.Option("--ask/--no-ask", help="Ask every edit again; --no-ask checks file and base alone.")
    ] = True,
    compare_base: Annotated[
        bool, typer.Option("--base/--no-base", help="Load the base; --no-base checks the file alone.")
    ] = True,
    accept_failed: Annotated[
        bool, typer.Option("--accept-failed", help="Edits that are recorded as failed may fail.")
    ] = False,
    loading: opt.Loading = opt.Loading(),
    json: opt.Json = False,
) -> None:
    """Check that a side memory is whole and fits its base, and ask every edit again. Exit code 3 if anything fails.

    An edit passes when free greedy generation through the router gives exactly its target.

    A withdrawn edit passes when its target is no longer said for its sake. Superseded edits are not asked.

    Example: wise verify sm.safetensors
    Example: wise verify package --no-base
    """
    sink = Output(json)
    with sink.running():
        from wisecli.inspection import check_base, check_file

        sm, checks = check_file(path)
        asked: list[AskedEdit] | None = None
        if sm is not None and compare_base and all(c.ok is not False for c in checks):
            base = loading.of(sm)
            checks.append(check_base(base, sm))
            if ask and checks[-1].ok:
                asked = _ask(sink, base, sm)
        failed = [a for a in asked or () if not a.passed and not (accept_failed and a.outcome == "failed")]
        sink.table(str(path), ("check", "", "what"), [(c.name, _STATE[c.ok], c.detail) for c in checks], left=3)
        sink.line(_said(asked, failed, sm, ask and compare_base))
        _show(sink, failed, len(sm.memories) if sm else 0)
        ok = not failed and all(c.ok is not False for c in checks)
        document = {"path": str(path), "ok": ok, "checks": [c.to_json() for c in checks]}
        document["edits"] = None if asked is None else {"asked": len(asked), "failed": [a.to_json() for a in failed]}
        sink.result(document)
    _fail(checks, failed)


def _ask(sink: Output, base: Base, sm: SideMemory) -> list[AskedEdit]:
    from wisecli.inspection import ask_edits

    with sink.progress() as bar:
        task = bar.add_task("asking", total=None)
        return ask_edits(base, sm, lambda done, total: bar.update(task, completed=done, total=total))


def _said(asked: list[AskedEdit] | None, failed: Sequence[AskedEdit], sm: SideMemory | None, wanted: bool) -> str:
    if asked is None:
        return "No edit was asked: a check failed." if wanted else "No edit was asked."
    if not asked:
        texts = sm is not None and any(e.prompt is not None for e in sm.edits)
        return f"No edit was asked: {'none is in force' if texts else 'their texts were left out'}."
    kept = sum(not a.passed for a in asked) - len(failed)
    more = f"; {kept} recorded as failed did not" if kept else ""
    return (
        f"{len(asked)} edits asked again: {len(asked) - len(failed) - kept} as they should be, {len(failed)} not{more}."
    )


def _show(sink: Output, failed: Sequence[AskedEdit], memories: int) -> None:
    if not failed:
        return
    width = max(20, (sink.out.width - max(len(a.entry.id) for a in failed) - 5 * _GAP - 28) // 2)
    rows = []
    for a in failed:
        route = a.answer.route
        whose = which(route.memory, memories).removesuffix(" memory") if route else "-"
        text = edit_text(a.entry.prompt, a.entry.target, width)
        rows.append((a.entry.id, a.outcome, whose, text, short(printable(a.answer.text), width) or "(nothing)"))
    sink.table("Edits that fail", ("id", "recorded", "answered by", "edit", "answer"), rows, left=5)


def _fail(checks: Sequence[Check], failed: Sequence[AskedEdit]) -> None:
    from wisecli.errors import CheckFailed

    wrong = [f"{c.name}: {c.detail}" for c in checks if c.ok is False]
    if failed:
        leaking = sum(a.outcome == "withdrawn" for a in failed)
        for n, what in ((len(failed) - leaking, "not answered with"), (leaking, "withdrawn, but still answered with")):
            wrong += [f"{n} edits are {what} their targets" if n > 1 else f"1 edit is {what} its target"] if n else []
    if wrong:
        raise CheckFailed("; ".join(wrong) + ".", hint=_hint(checks))


def _hint(checks: Sequence[Check]) -> str:
    names = {c.name for c in checks if c.ok is False}
    if names == {"base"}:
        return "Give the base it was learned on with --model."
    if names:
        return "The file is damaged: fetch it again, or make it again with wise merge."
    return 'wise route --side-memory FILE "PROMPT" shows why a prompt goes where it goes.'
