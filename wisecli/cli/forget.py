"""`wise forget`: withdraw edits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wisecli.cli import _options as opt
from wisecli.cli._output import Output


def forget(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of the edits, as wise log lists them.")],
    side_memory: opt.SideMemoryFile = None,
    shards: Annotated[
        Path | None, typer.Option("--shards", metavar="FOLDER", help="Run folder to withdraw them from as well.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File for the side memory without them. Default: in place.")
    ] = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Withdraw edits: their prompts are answered by the base again, at once.

    In a side memory the gate is closed to them. In a run folder they are marked, and the next merge leaves them out.

    Example: wise forget demo-001 -s sm.safetensors --shards shards
    """
    sink = Output(json, quiet)
    with sink.running():
        from wisecli.errors import UsageError
        from wisecli.memory.shard import RunFolder
        from wisecli.memory.side_memory import SideMemory
        from wisecli.routing.attach import side_memory_file

        if side_memory is None and shards is None:
            raise UsageError("Nothing to withdraw from.", hint="Give --side-memory FILE, --shards FOLDER or both.")
        if out is not None and side_memory is None:
            raise UsageError("--out is the file for a side memory.", hint="Give --side-memory FILE too.")
        if side_memory is not None and side_memory.is_dir():
            raise UsageError(
                f"{side_memory} is a folder: a package lists the checksums of its files.",
                hint="Withdraw from the side memory that was packaged, then run wise package again.",
            )
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
        sink.result({"withdrawn": list(ids), "written": written}, "\n".join(written))
