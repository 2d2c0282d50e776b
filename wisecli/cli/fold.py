"""`wise fold`: write a dense checkpoint with a side memory's delta added, always on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wisecli.cli import _options as opt
from wisecli.cli._output import Output

if TYPE_CHECKING:
    from wisecli.folding import Folded
    from wisecli.memory.side_memory import SideMemory


def fold(
    side_memory: Annotated[
        Path,
        typer.Option("--side-memory", "-s", metavar="FILE", help="Side memory file, packaged folder, or hub id."),
    ] = Path("sm.safetensors"),
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("folded"),
    dtype: Annotated[
        str,
        typer.Option("--dtype", help="Of all weights written: float32, bfloat16, float16, or auto for the base's own."),
    ] = "float32",
    memory: Annotated[
        int | None, typer.Option("--memory", metavar="K", help="Which memory, of a side memory that holds several.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier fold.")] = False,
    lora: Annotated[bool, typer.Option("--lora", hidden=True)] = False,
    model: opt.Model = None,
    revision: opt.Revision = None,
    allow_other_base: opt.AllowOtherBase = False,
    trust_remote_code: opt.TrustRemoteCode = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write a dense checkpoint of the base with a side memory added to its weights, for engines without wise.

    There is no router in it: the delta is always on, and prompts that no edit is about change as well. Half precision
    rounds part of the delta away; how much is measured and said.

    Example: wise fold -s sm.safetensors -o folded
    """
    sink = Output(json, quiet)
    with sink.running():
        from wisecli.folding import check_fold, fold_side_memory
        from wisecli.models.base import STORED

        named, sm = opt.read_side_memory(sink, side_memory)
        index = check_fold(sm, out, memory, force)
        if lora:
            _refuse_lora(sm, index)
        stored = opt.Loading(model, revision, STORED, device="cpu", trust_remote_code=trust_remote_code)
        base = stored.base({k: v for k, v in sm.base.items() if k != "quantization"})
        folded = fold_side_memory(
            base, sm, out, memory=index, dtype=dtype, force=force, allow_other_base=allow_other_base
        )
        _show(sink, folded, named)
        sink.result(folded.to_json(), str(out))


def _refuse_lora(sm: SideMemory, memory: int) -> None:
    from wisecli.errors import UsageError
    from wisecli.folding import RANK, share_of_rank

    held = share_of_rank(sm.memories[memory].delta.dense())
    raise UsageError(
        f"A side memory is no LoRA adapter: its delta is sparse, not of low rank, and of this one the best adapter of "
        f"rank {RANK} would hold {held:.0%} of the energy.",
        hint="Leave --lora out for a dense checkpoint, or attach the side memory.",
    )


def _show(sink: Output, folded: Folded, side_memory: Path) -> None:
    from wisecli.folding import MOST_LOST

    rows = [
        (f"{name}, as written" if name == folded.dtype else name, f"{x.error:.2g}", f"{x.vanished:.2g}")
        for name, x in folded.losses.items()
    ]
    sink.facts(
        [
            ("base", folded.base),
            ("side memory", f"{side_memory}, memory {folded.memory}, {len(folded.edits)} edits"),
            ("router", "none: the delta is always on, for prompts that no edit is about as well"),
            ("written", f"{sum(f['bytes'] for f in folded.files.values()) / 1e6:.1f} MB in {folded.dtype}"),
        ]
    )
    sink.table("What rounding takes from the delta", ("dtype", "relative error", "entries vanished"), rows)
    if folded.lossy:
        sink.warn(
            f"in {folded.dtype} {folded.loss.error:.0%} of the delta is lost, more than {MOST_LOST:.0%}: edits may be "
            "lost with it; --dtype float32 keeps them"
        )
    sink.line(f"Wrote {folded.out}. Next:", command=f"wise chat --model {folded.out}")
