"""`wise forget`: withdraw edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wisecli.cli import _options as opt
from wisecli.cli._output import Output, figure

if TYPE_CHECKING:
    from wisecli.data.records import Prompt
    from wisecli.editing.rebuild import RebuildPlan
    from wisecli.memory.shard import RunFolder
    from wisecli.memory.side_memory import SideMemory
    from wisecli.models.base import Base

_REBUILD = "Rebuilding"
_BASE = ("pool", *opt.LOADING)  # options that only rebuilding needs
_SHOWN = 10


@opt.loads_base
def forget(
    ctx: typer.Context,
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of the edits, as wise log lists them.")],
    side_memory: opt.SideMemoryFile = None,
    shards: Annotated[
        Path | None, typer.Option("--shards", metavar="FOLDER", help="Run folder to withdraw them from as well.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File for the side memory without them. Default: in place.")
    ] = None,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild",
            help="Learn the shards that hold them anew, so that nothing of them is left there; merge again, and ask.",
            rich_help_panel=_REBUILD,
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what rebuilding takes.", rich_help_panel=_REBUILD)
    ] = False,
    pool: opt.Pool = None,
    loading: opt.Loading = opt.Loading(),
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Withdraw edits: their prompts are answered by the base again, at once.

    In a side memory the gate is closed to them. In a run folder the next merge leaves them out.

    With --rebuild the shards that hold them are learned anew without them, which takes a base and time.

    Example: wise forget demo-001 -s sm.safetensors --shards shards
    Example: wise forget demo-001 -s sm.safetensors --shards shards --rebuild
    """
    sink = Output(json, quiet)
    with sink.running():
        from wisecli.errors import UsageError

        _check(side_memory, shards, out, rebuild, dry_run)
        idle = [f"--{k.replace('_', '-')}" for k in _BASE if opt.given(ctx, k)] if not rebuild else []
        if idle:
            raise UsageError(f"{idle[0]} is for learning anew.", hint="Add --rebuild, or leave it out.")
        ids = list(dict.fromkeys(ids))
        if rebuild and shards is not None:
            again = _Again(sink, shards, side_memory, out, ids)
            result = again.plan() if dry_run else again.run(opt.read_pool(pool), loading)
        else:
            result = _close(sink, ids, side_memory, shards, out)
        sink.result(result, "\n".join(result["written"]))
    _fail(result)


def _check(side_memory: Path | None, shards: Path | None, out: Path | None, rebuild: bool, dry_run: bool) -> None:
    from wisecli.errors import UsageError

    if side_memory is None and shards is None:
        raise UsageError("Nothing to withdraw from.", hint="Give --side-memory FILE, --shards FOLDER or both.")
    if out is not None and side_memory is None:
        raise UsageError("--out is the file for a side memory.", hint="Give --side-memory FILE too.")
    if rebuild and shards is None:
        raise UsageError("--rebuild learns shards anew.", hint="Give the run folder with --shards FOLDER.")
    if dry_run and not rebuild:
        raise UsageError("--dry-run says what --rebuild takes.", hint="Add --rebuild, or leave --dry-run out.")
    if side_memory is not None and side_memory.is_dir():
        raise UsageError(
            f"{side_memory} is a folder: a package lists the checksums of its files.",
            hint="Withdraw from the side memory that was packaged, then run wise package again.",
        )


def _close(
    sink: Output, ids: Sequence[str], side_memory: Path | None, shards: Path | None, out: Path | None
) -> dict[str, Any]:
    """Close the gate to the edits, and mark them in the run folder."""
    from wisecli.memory.shard import RunFolder
    from wisecli.memory.side_memory import SideMemory
    from wisecli.routing.attach import side_memory_file

    closed = SideMemory.load(side_memory_file(side_memory)).withdrawn(ids) if side_memory is not None else None
    run = RunFolder.open(shards).withdraw(ids) if shards is not None else None
    written = []
    if closed is not None and side_memory is not None:
        closed.save(out or side_memory)
        written.append(str(out or side_memory))
    if run is not None:
        written.append(str(run.path))
    sink.facts([("withdrawn", ", ".join(ids)), ("written", ", ".join(written))])
    if run is not None and closed is None:
        sink.line("The shards leave them out from the next merge on. Next:", command=f"wise merge {run.path}")
    return {"withdrawn": list(ids), "written": written}


class _Again:
    """Withdrawing by learning anew: what it takes, and doing it."""

    def __init__(self, sink: Output, shards: Path, file: Path | None, out: Path | None, ids: Sequence[str]) -> None:
        from wisecli.memory.shard import RunFolder

        self.sink, self.file, self.out, self.ids = sink, file, out, ids
        self.folder = RunFolder.open(shards)
        self.folder.check_finished()
        self.folder.check_ids(ids)
        self.before = _belonging(self.folder, file) if file is not None else None

    def plan(self) -> dict[str, Any]:
        """Say what it takes."""
        from wisecli.editing.rebuild import plan_rebuild

        plan = plan_rebuild(self.folder, self.ids)
        self.sink.facts(
            [
                ("to withdraw", ", ".join(self.ids)),
                ("shards to learn anew", f"{len(plan.shards)} of {self.folder.n_shards}"),
                ("other edits in them", str(plan.edits)),
                ("time", _time(plan)),
            ]
        )
        about = {"shards": list(plan.shards), "edits": plan.edits, "seconds": plan.seconds}
        return {"withdrawn": [], "written": [], "plan": about}

    def run(self, pool: Sequence[str], loading: opt.Loading) -> dict[str, Any]:
        """Withdraw, learn anew, merge again as before, and ask."""
        from wisecli.data.records import EditRecord
        from wisecli.editing.rebuild import Rebuild
        from wisecli.memory.files import ensure_writable

        said = self.plan()
        if self.file is not None:
            ensure_writable((self.out or self.file).parent)
        recorded = self.folder.run["base"]
        dtype = recorded["dtype"] if loading.dtype == "auto" else loading.dtype
        base = replace(loading, dtype=dtype).base(recorded, self.folder.site.layer)
        known = [e for e in self.folder.entries() if e["id"] in self.ids and "prompt" in e]
        prompts = {e["id"]: EditRecord.of_entry(e).asked for e in known}
        job = Rebuild(base, self.folder, pool, self.ids)
        self.folder = job.run
        with self.sink.progress() as bar:
            task = bar.add_task("learning", total=None)
            for done, total in job:
                bar.update(task, completed=done, total=total)
        written = [str(self.folder.path)]
        result: dict[str, Any] = {"withdrawn": list(self.ids), "written": written, "plan": said["plan"]}
        if self.before is None or self.file is None:
            self.sink.line("The shards hold nothing of them. Next:", command=f"wise merge {self.folder.path}")
            return result
        written.insert(0, str(self.out or self.file))
        return result | self._merged_again(base, prompts, self.before)

    def _merged_again(self, base: Base, prompts: Mapping[str, Prompt], before: SideMemory) -> dict[str, Any]:
        from wisecli.editing.merge import merge_run, merged_as
        from wisecli.inspection.asking import ask_edits, unlike_base

        calibrated = "activation" in before.statistics
        sm = merge_run(self.folder, base=base if calibrated else None, **merged_as(before))
        sm.save(self.out or self.file or Path())
        asked = [a for a in ask_edits(base, sm) if a.outcome != "withdrawn"]
        held = {e.id for e in before.edits if e.took}
        lost = [a.entry.id for a in asked if not a.passed and a.entry.id in held]
        unlike = unlike_base(base, sm, prompts)
        right = sum(a.passed for a in asked)
        self.sink.facts(
            [
                ("withdrawn", f"{len(prompts) - len(unlike)} of {len(prompts)} prompts answered as the base does"),
                ("others", f"{right} of {len(asked)} asked again answer with their targets"),
                ("written", f"{self.out or self.file}, {self.folder.path}"),
            ]
        )
        if lost:
            more = ", ..." if len(lost) > _SHOWN else ""
            self.sink.warn(f"{len(lost)} edits that held do not hold any more: {', '.join(lost[:_SHOWN])}{more}")
        return {"as_base": len(prompts) - len(unlike), "unlike_base": unlike, "others": len(asked), "lost": lost}


def _belonging(folder: RunFolder, file: Path) -> SideMemory:
    """The side memory of a file that was merged from the run folder."""
    from wisecli.errors import InputError
    from wisecli.memory.side_memory import SideMemory
    from wisecli.routing.attach import side_memory_file

    sm = SideMemory.load(side_memory_file(file))
    mine, theirs = {e.id for e in sm.edits}, {e["id"] for e in folder.entries()}
    if not mine <= theirs or sm.base.get("fingerprint") != folder.run["base"]["fingerprint"]:
        raise InputError(
            f"{file} was not merged from {folder.path}.", hint=f"Merge that folder first: wise merge {folder.path}"
        )
    return sm


def _time(plan: RebuildPlan) -> str:
    if not plan.shards:
        return "none: nothing of them is left in the shards"
    if plan.seconds is None:
        return "not known: the journal does not say what learning took"
    minutes = plan.seconds / 60
    about = f"{figure(minutes)} minutes" if minutes >= 2 else f"{plan.seconds:.0f} seconds"
    return f"about {about}, which learning these shards took the first time"


def _fail(result: Mapping[str, Any]) -> None:
    from wisecli.errors import CheckFailed

    unlike = result.get("unlike_base")
    if unlike:
        raise CheckFailed(
            f"{len(unlike)} withdrawn edits' prompts are not answered as the base does: {', '.join(unlike[:_SHOWN])}.",
            hint='wise route --side-memory FILE "PROMPT" shows which edit answers instead.',
        )
