"""`wise edit`: learn a stream of edits into shards."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from math import ceil
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wisecli.cli import _options as opt
from wisecli.cli._output import Output, figure, short

if TYPE_CHECKING:
    from wisecli.data.stream import EditStream
    from wisecli.editing.footprint import Footprint
    from wisecli.editing.run import EditRun
    from wisecli.memory.shard import RunFolder

_SHOWN_FAILURES = 10


@opt.loads_base
def edit(
    ctx: typer.Context,
    edits: Annotated[str, typer.Argument(metavar="EDITS", help="JSONL or JSON file of edits, or a dataset's name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the shards.")] = Path("shards"),
    layer: Annotated[
        str,
        typer.Option(
            help="A decoder layer, from the end if negative; or auto: the editable one nearest to 27/32 of the depth."
        ),
    ] = "auto",
    module: Annotated[str | None, typer.Option(help="Module path of the matrix, instead of a search.")] = None,
    shards: Annotated[
        str | None,
        typer.Option(
            metavar="N|FOLDER",
            help="Slices of the stream, each with its own mask (default: one for every 50 edits, at least 2); or the "
            "folder of an earlier run to add the stream to, with that run's settings.",
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/K", help="Learn shard I of K alone, counted from 1, as one of K jobs that share the folder."
        ),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", help="Shards learned side by side, each in its own process.")] = 1,
    shards_at_once: Annotated[
        int,
        typer.Option(
            help="Shards that a process learns side by side, the rows of their steps in one batch: quicker, and more "
            "memory."
        ),
    ] = 1,
    mask_density: Annotated[float, typer.Option(help="Share of trainable entries per shard.")] = 0.2,
    schedule: Annotated[
        str, typer.Option(help="rehearsal, or published: the paper's, one edit after the other.")
    ] = "rehearsal",
    max_steps: Annotated[
        int,
        typer.Option(
            help="Most steps for each block of edits and, for every ten edits, for the last pass over all of them; "
            "learning stops earlier."
        ),
    ] = 70,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Step size. Default: 0.07 for rehearsal, relative to the base's scale; 1.0 for published, absolute."
        ),
    ] = None,
    contexts: Annotated[
        int, typer.Option(help="Learn each edit behind so many short sentences, too, besides alone.")
    ] = 3,
    replay: Annotated[
        bool, typer.Option("--replay", help="Keep each shard quiet on the prompts of earlier shards (L_memo).")
    ] = False,
    chat: opt.Chat = None,
    pool: opt.Pool = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Settings, as wise doctor writes them; options on the command line override them.",
        ),
    ] = None,
    block: Annotated[int, typer.Option(help="Edits that arrive and are learned together.")] = 10,
    limit: Annotated[int | None, typer.Option(help="Learn only the first N edits.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of masks, contexts and minibatches.")] = 0,
    texts: Annotated[
        bool,
        typer.Option(
            "--texts/--no-texts",
            help="Keep prompts and targets in the shards; without them nothing is rehearsed, verified or rebuilt.",
        ),
    ] = True,
    cache: opt.Cache = True,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the outcome of every edit.")] = False,
    loading: opt.Loading = opt.Loading(),
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
        from wisecli.errors import UsageError
        from wisecli.memory.files import ensure_writable

        if jobs < 1:
            raise UsageError(f"--jobs must be at least 1, not {jobs}.")
        count, older = _count_or_run(ctx, shards)
        unit, count = _unit(shard, count, older, jobs)
        located, stream = read_dataset(edits, limit)
        _report_clashes(sink, stream)
        more = opt.read_pool(pool)
        wanted, settings = opt.run_settings(
            ctx,
            config,
            model=loading.model,
            revision=loading.revision,
            dtype=loading.dtype,
            quantize=loading.quantize,
            layer=layer if layer == "auto" else _number(layer),
            module=module,
            shards=count,
            shards_at_once=shards_at_once,
            mask_density=mask_density,
            seed=seed,
            schedule=schedule,
            contexts=contexts,
            replay=replay,
            chat=chat,
            block=block,
            max_steps=max_steps,
            lr=lr,
        )
        if older is not None:
            out = older.path
            wanted, settings, texts = _as_before(ctx, older, len(stream), wanted, settings)
        if unit is not None and settings["shards_at_once"] > 1:
            raise UsageError("--shard learns one shard, none beside it.", hint="Leave --shards-at-once out.")
        ensure_writable(out)
        from wisecli.editing.run import EditRun
        from wisecli.models.base import load_base

        arguments = replace(loading, **wanted).arguments({}, _lowest(settings))
        predicted = _predict(sink, arguments, stream, settings, more, jobs)
        base = load_base(**arguments)
        config_of_run = opt.edit_config(stream, base, **settings)
        kept = opt.cache_folder(sink, "the gate and the rewordings are") if cache else None
        run = EditRun(
            base, stream, config_of_run, out, extra_pool=more, texts=texts, append=older is not None, cache=kept
        )
        _introduce(sink, run, located.path)
        _say_layer(sink, run)
        entries = _learn(sink, run, jobs, arguments, unit)
        if predicted is not None:
            from wisecli.evaluation.environment import peak_memory

            run.folder.note("memory", predicted=predicted.total, **peak_memory(base))
        alike = run.settled.alike
        _summarise(sink, entries, alike, verbose)
        _say_next(sink, run, loading.again)
        sink.result(_document(run, entries, alike, out), str(out))


def _count_or_run(ctx: typer.Context, shards: str | None) -> tuple[int | None, RunFolder | None]:
    """What --shards says: how many there shall be, or the run that is added to."""
    if shards is None:
        return None, None
    try:
        return int(shards), None
    except ValueError:
        from wisecli.errors import UsageError
        from wisecli.memory.shard import RunFolder

        if re.fullmatch(r"[-+.\d]+", shards):
            raise UsageError(f"--shards must be a whole number or a folder, not {shards!r}.") from None
        if _given(ctx, "out"):
            raise UsageError(
                f"--shards {shards} adds to that folder, and --out names another.", hint="Leave --out out."
            ) from None
        return None, RunFolder.open(Path(shards))


def _unit(shard: str | None, count: int | None, older: RunFolder | None, jobs: int) -> tuple[int | None, int | None]:
    """The one shard that --shard asks for, from 0, and the number of shards it speaks of."""
    if shard is None:
        return None, count
    from wisecli.errors import UsageError

    found = re.fullmatch(r"([0-9]+)/([0-9]+)", shard)
    index, of = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= index <= of:
        raise UsageError(f"--shard must be I/K with I from 1 to K, not {shard!r}.", hint="For example --shard 2/8.")
    if older is not None:
        raise UsageError("--shard is of a run that begins.", hint="Add a stream with --shards FOLDER and --jobs.")
    if count not in (None, of):
        raise UsageError(f"--shard {shard} speaks of {of} shards, --shards of {count}.", hint="Leave --shards out.")
    if jobs != 1:
        raise UsageError("--shard learns one shard: there is nothing for --jobs to do.", hint="Leave --jobs out.")
    return index - 1, of


def _as_before(
    ctx: typer.Context, older: RunFolder, edits: int, loading: dict[str, Any], settings: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """How to load the base and learn so many more edits as the run began; what the command line says goes before it."""
    from wisecli.editing.run import as_before

    run = older.run
    recorded = {k: run["base"].get(k) for k in ("revision", "dtype")} | {"model": run["base"]["name"]}
    packed = run["base"].get("quantization")
    recorded["quantize"] = f"{packed['bits']}bit" if packed else None
    if _given(ctx, "model"):  # the revision and form are those of another base
        recorded |= {"revision": None, "quantize": None}
    loading = {k: v if _given(ctx, k) else recorded[k] for k, v in loading.items()}
    known = as_before(older, edits)
    return loading, {k: settings[k] if k in settings and _given(ctx, k) else v for k, v in known.items()}, run["texts"]


def _lowest(settings: dict[str, Any]) -> int | str:
    """The layer that is edited: the first that has to stay on the device."""
    inside = re.search(r"\.(\d+)\.", settings.get("module") or "")
    layer = settings.get("layer")
    return int(inside[1]) if inside else "auto" if layer is None else layer


def _given(ctx: typer.Context, name: str) -> bool:
    """Whether a setting was given on the command line; --shards names the folder here."""
    return name != "shards" and opt.given(ctx, name)


def _number(layer: str) -> int:
    from wisecli.errors import UsageError

    try:
        return int(layer)
    except ValueError:
        raise UsageError(f"--layer must be auto or a number, not {layer!r}.") from None


def _report_clashes(sink: Output, stream: EditStream) -> None:
    for text in stream.warnings:
        sink.warn(text)
    for clash in stream.contradictions:
        sink.warn(f"{clash.later} contradicts {clash.first} (same prompt, other target); the later edit wins")
    for clash in stream.duplicates:
        sink.warn(f"{clash.later} repeats {clash.first}")


def _predict(
    sink: Output,
    loading: Mapping[str, Any],
    stream: EditStream,
    settings: Mapping[str, Any],
    pool: Sequence[str],
    jobs: int,
) -> Footprint | None:
    """Say what the run will take, and warn where that is more than there is; nothing where it cannot be told.

    Args:
        jobs: processes side by side, each with a base of its own.
    """
    from wisecli.data.pool import Pool
    from wisecli.editing.footprint import predict, room
    from wisecli.models.base import check_dtype, loaded_dtype, outline, pick_device
    from wisecli.models.checkpoint import bits_of

    where, bits = pick_device(loading["device"]), bits_of(loading["quantize"])
    check_dtype(loading["dtype"])
    trust = {k: loading[k] for k in ("revision", "trust_remote_code")}
    try:
        bare = outline(loading["name"], **trust)
        dtype = loaded_dtype(bare, loading["dtype"], where)
        config = opt.edit_config(stream, bare, **settings)
        off = loading["offload_below"] is not None
        found = predict(
            bare, stream.records, config, dtype=dtype, device=where, pool=Pool.of(pool), quantize=bits, lower_off=off
        )
    except Exception:  # it only tells: what is wrong, if anything is, loading and the search for the site say
        return None
    parts = {"base": found.base, "delta": found.delta, "rows": found.captured, "a step": found.step}
    parts["gate and libraries"] = found.rest
    said = ", ".join(f"{what} {n / 2**20:,.0f}" for what, n in parts.items())
    sink.line(f"memory: about {_mib(found.total)} ({said})")
    if found.host:
        sink.line(f"        and {_mib(found.host)} of the machine's")
    together = max(1, min(jobs, ceil(config.shards / config.shards_at_once)))
    if together > 1:
        sink.line(f"        in each of {together} processes, about {_mib(together * found.total)} together")
    there = room(where)
    if there and together * found.total > there:
        sink.warn(
            f"{where} has {_mib(there)}: try --offload-lower, --dtype bfloat16 or --quantize 4bit, or --device-map "
            "auto over several devices"
        )
    return found


def _mib(n: int) -> str:
    return f"{n / 2**20:,.0f} MiB"


def _introduce(sink: Output, run: EditRun, source: Path) -> None:
    model, site = run.base.model, run.site
    size = model.num_parameters() / 1e6
    at_once = min(run.config.shards, run.config.shards_at_once)
    shards = f"{run.config.shards}, {at_once} at once" if at_once > 1 else str(run.config.shards)
    sink.facts(
        [
            ("base", f"{run.base.label} ({model.config.model_type}, {size:.1f} M parameters, {model.dtype})"),
            ("edit site", f"{site.path} [{site.d_out} x {site.d_in}]"),
            ("stream", f"{len(run.stream.records)} edits from {source} ({run.stream.format})"),
            ("shards", f"{shards}, mask density {run.config.mask_density}, {run.config.schedule} schedule"),
            ("prompts", "in the base's chat template" if run.config.chat else "as they are, no chat template"),
        ]
    )


def _say_layer(sink: Output, run: EditRun) -> None:
    """Say that the layer taken is not the one that is edited by default."""
    from wisecli.models.site import auto_layer, decoder_layers

    usual = auto_layer(len(decoder_layers(run.base.model)))
    if run.config.layer == "auto" and run.config.module is None and run.site.layer != usual:
        sink.warn(f"layer {usual} has no FFN output projection to edit; layer {run.site.layer} is the nearest that has")


def _learn(
    sink: Output, run: EditRun, jobs: int, loading: dict[str, Any], unit: int | None = None
) -> list[dict[str, Any]]:
    from wisecli.editing.parallel import learn_side_by_side

    if len(run.groups) < min(jobs, run.config.shards):
        shards, at_once = run.config.shards, run.config.shards_at_once
        sink.warn(f"{shards} shards, {at_once} at once, keep {len(run.groups)} of {jobs} jobs busy")
    entries: list[dict[str, Any]] = []
    steps = learn_side_by_side(run, jobs, loading) if unit is None else run.one_shard(unit)
    if run.finished:
        sink.line(f"Continuing: {run.finished} of {run.config.shards} shards are learned already.")
    with sink.progress() as bar:
        task = bar.add_task("preparing the gate", total=None)
        with run.folder.lock() if unit is None else nullcontext():
            run.prepare()
            run.settled  # noqa: B018  (what clashes is found by the gate, too)
        bar.reset(task, total=len(run.stream.records), description="learning")
        for step in steps:
            bar.update(task, completed=step.done, total=step.total)
            entries += step.finished
    return sorted(entries, key=lambda e: e["shard"])


def _say_next(sink: Output, run: EditRun, loading: Sequence[str]) -> None:
    out, missing = run.folder.path, [i + 1 for i in run.slices if not run.folder.shard_path(i).exists()]
    if not missing:
        sink.line(
            f"Wrote {out}. Next:", command=shlex.join(("wise", "merge", str(out), "-o", "sm.safetensors", *loading))
        )
        return
    others = ", ".join(f"{i}/{run.config.shards}" for i in missing[:5]) + (", ..." if len(missing) > 5 else "")
    sink.line(f"Wrote {out}. To be learned before merging: {others}.")


def _summarise(sink: Output, entries: list[dict[str, Any]], alike: Sequence[tuple[str, str]], verbose: bool) -> None:
    rows = []
    for shard in sorted({e["shard"] for e in entries}):
        mine = [e for e in entries if e["shard"] == shard]
        count = {o: sum(e["outcome"] == o for e in mine) for o in ("took", "failed", "superseded")}
        steps = median(e["steps"] for e in mine)
        rows.append((str(shard), str(len(mine)), *(str(c) for c in count.values()), figure(steps, 0)))
    sink.table("Edits", ("shard", "edits", "took", "did not take", "superseded", "steps (median)"), rows)
    _say_conflicts(sink, entries, alike)
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


def _say_conflicts(sink: Output, entries: list[dict[str, Any]], alike: Sequence[tuple[str, str]]) -> None:
    """Edits that ask for the same fact: which ones a later edit replaced, and which were all learned."""
    named = {e["id"]: short(e.get("prompt") or e["id"]) for e in entries}
    pairs = [(e["id"], e["by"], "replaced by the later one") for e in entries if e.get("by")]
    pairs += [(a, b, "both learned; the gate can hardly tell them apart") for a, b in alike]
    rows = [(a, named.get(a, a), b, named.get(b, b), what) for a, b, what in pairs]
    if rows:
        sink.table(
            "Edits that ask for the same", ("edit", "prompt", "later", "prompt", ""), rows[:_SHOWN_FAILURES], left=5
        )
    if len(rows) > _SHOWN_FAILURES:
        sink.line(f"... and {len(rows) - _SHOWN_FAILURES} more such pairs; --json lists all.")


def _line(e: dict[str, Any]) -> tuple[str, ...]:
    return e["id"], short(e.get("prompt", "")), short(e.get("target", ""), 30), e["outcome"], str(e["steps"])


def _document(
    run: EditRun, entries: list[dict[str, Any]], alike: Sequence[tuple[str, str]], out: Path
) -> dict[str, Any]:
    return {
        "out": str(out),
        "base": run.folder.run["base"],
        "site": run.folder.run["site"],
        "config": run.folder.run["config"],
        "edits": entries,
        "took": sum(e["outcome"] == "took" for e in entries),
        "failed": sum(e["outcome"] == "failed" for e in entries),
        "superseded": sum(e["outcome"] == "superseded" for e in entries),
        "alike": [list(pair) for pair in alike],
    }
