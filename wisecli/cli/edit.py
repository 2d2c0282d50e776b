"""`wise edit`: learn a stream of edits into shards."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wisecli.cli import _options as opt
from wisecli.cli._output import Output, figure, short

if TYPE_CHECKING:
    from wisecli.data.stream import EditStream
    from wisecli.editing.run import EditRun

_SHOWN_FAILURES = 10


def edit(
    edits: Annotated[str, typer.Argument(metavar="EDITS", help="JSONL or JSON file of edits, or a dataset's name.")],
    model: opt.Model = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the shards.")] = Path("shards"),
    layer: Annotated[str, typer.Option(help="Decoder layer to edit: auto or a number.")] = "auto",
    module: Annotated[str | None, typer.Option(help="Module path of the matrix, instead of a search.")] = None,
    shards: Annotated[
        int | None,
        typer.Option(help="Slices of the stream, each with its own mask. Default: 2, or 1 for a single edit."),
    ] = None,
    mask_density: Annotated[float, typer.Option(help="Share of trainable entries per shard.")] = 0.2,
    schedule: Annotated[str, typer.Option(help="rehearsal, or published: the paper's way.")] = "rehearsal",
    max_steps: Annotated[
        int,
        typer.Option(help="Cap on steps per block of ten edits and on going over all of them; learning stops earlier."),
    ] = 70,
    lr: Annotated[float | None, typer.Option(help="Step size; default: the schedule's own.")] = None,
    contexts: Annotated[int, typer.Option(help="Short sentences put before each prompt while learning.")] = 3,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Render prompts with the base's chat template. Default: if it has one.",
            show_default=False,
        ),
    ] = None,
    pool: Annotated[Path | None, typer.Option(help="More ordinary prompts to calibrate on, one per line.")] = None,
    block: Annotated[int, typer.Option(help="Edits that arrive and are learned together.")] = 10,
    limit: Annotated[int | None, typer.Option(help="Learn only the first N edits.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of masks, contexts and minibatches.")] = 0,
    texts: Annotated[bool, typer.Option("--texts/--no-texts", help="Keep prompts and targets in the ledger.")] = True,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the outcome of every edit.")] = False,
    revision: opt.Revision = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    trust_remote_code: opt.TrustRemoteCode = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Learn a stream of edits into side-memory shards. The base is only read.

    Run the same command again to continue after an interruption.

    Example: wise edit examples/edits.jsonl --out shards
    """
    sink = Output(json, quiet)
    with sink.running():
        from wisecli.data.datasets import read_dataset
        from wisecli.memory.files import ensure_writable

        located, stream = read_dataset(edits, limit)
        _report_clashes(sink, stream)
        more = _read_pool(pool)
        ensure_writable(out)
        from wisecli.editing.config import EditConfig

        settings: dict[str, Any] = {
            "layer": layer if layer == "auto" else _number(layer),
            "module": module,
            "mask_density": mask_density,
            "seed": seed,
            "schedule": schedule,
            "contexts": contexts,
            "block": block,
            "max_steps": max_steps,
            "lr": lr,
        }
        EditConfig(**settings, shards=shards or 1)  # refuse wrong settings before a base is loaded
        from wisecli.editing.run import EditRun
        from wisecli.models.base import load_base

        base = load_base(model, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        config = opt.edit_config(stream, base, shards=shards, chat=chat, **settings)
        run = EditRun(base, stream, config, out, extra_pool=more, texts=texts)
        _introduce(sink, run, located.path)
        entries = _learn(sink, run)
        _summarise(sink, entries, verbose)
        sink.line(f"Wrote {out}. Next:", command=f"wise merge {out} -o sm.safetensors")
        sink.result(_document(run, entries, out), str(out))


def _number(layer: str) -> int:
    from wisecli.errors import UsageError

    try:
        return int(layer)
    except ValueError:
        raise UsageError(f"--layer must be auto or a number, not {layer!r}.") from None


def _read_pool(path: Path | None) -> list[str]:
    if path is None:
        return []
    from wisecli.errors import InputError

    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(
            f"Cannot read the pool {path}: {e}.", hint="Give a UTF-8 text file, one prompt per line."
        ) from e


def _report_clashes(sink: Output, stream: EditStream) -> None:
    for text in stream.warnings:
        sink.warn(text)
    for clash in stream.contradictions:
        sink.warn(f"{clash.later} contradicts {clash.first} (same prompt, other target); the later edit wins")
    for clash in stream.duplicates:
        sink.warn(f"{clash.later} repeats {clash.first}")


def _introduce(sink: Output, run: EditRun, source: Path) -> None:
    model, site = run.base.model, run.site
    size = sum(p.numel() for p in model.parameters()) / 1e6
    sink.facts(
        [
            ("base", f"{run.base.label} ({model.config.model_type}, {size:.1f} M parameters, {model.dtype})"),
            ("edit site", f"{site.path} [{site.d_out} x {site.d_in}]"),
            ("stream", f"{len(run.stream.records)} edits from {source} ({run.stream.format})"),
            ("shards", f"{run.config.shards}, mask density {run.config.mask_density}, {run.config.schedule} schedule"),
            ("prompts", "in the base's chat template" if run.config.chat else "as they are, no chat template"),
        ]
    )


def _learn(sink: Output, run: EditRun) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    if run.finished:
        sink.line(f"Continuing: {run.finished} of {run.config.shards} shards are learned already.")
    with sink.progress() as bar:
        task = bar.add_task("learning", total=len(run.stream.records))
        for step in run:
            bar.update(task, completed=step.done)
            entries += step.finished
    return entries


def _summarise(sink: Output, entries: list[dict[str, Any]], verbose: bool) -> None:
    rows = []
    for shard in sorted({e["shard"] for e in entries}):
        mine = [e for e in entries if e["shard"] == shard]
        count = {o: sum(e["outcome"] == o for e in mine) for o in ("took", "failed", "superseded")}
        steps = median(e["steps"] for e in mine)
        rows.append((str(shard), str(len(mine)), *(str(c) for c in count.values()), figure(steps, 0)))
    sink.table("Edits", ("shard", "edits", "took", "did not take", "superseded", "steps (median)"), rows)
    failed = [e for e in entries if e["outcome"] == "failed"]
    shown = entries if verbose else failed[:_SHOWN_FAILURES]
    if shown:
        columns = ("id", "prompt", "target", "outcome", "steps")
        sink.table("Every edit" if verbose else "Did not take", columns, [_line(e) for e in shown], left=4)
    if len(failed) > _SHOWN_FAILURES and not verbose:
        sink.line(f"... and {len(failed) - _SHOWN_FAILURES} more; --verbose shows every edit.")
    took = sum(e["outcome"] == "took" for e in entries)
    if failed and not took:
        sink.warn(f"none of the {len(failed)} edits took; delete the shards and try --lr or --max-steps")


def _line(e: dict[str, Any]) -> tuple[str, ...]:
    return e["id"], short(e.get("prompt", "")), short(e.get("target", ""), 30), e["outcome"], str(e["steps"])


def _document(run: EditRun, entries: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    return {
        "out": str(out),
        "base": run.folder.run["base"],
        "site": run.folder.run["site"],
        "config": run.folder.run["config"],
        "edits": entries,
        "took": sum(e["outcome"] == "took" for e in entries),
        "failed": sum(e["outcome"] == "failed" for e in entries),
        "superseded": sum(e["outcome"] == "superseded" for e in entries),
    }
