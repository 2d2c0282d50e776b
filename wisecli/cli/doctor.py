"""`wise doctor`: what editing a base will be like, tried on a few edits."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wisecli.cli import _options as opt
from wisecli.cli._output import Output, figure

if TYPE_CHECKING:
    from wisecli.doctor import Candidate, DoctorReport, Figure, Learned
    from wisecli.models.base import Base

_GATE = ("gate AUC", "wordings in", "near in")
_STYLES = {"ready": "bold green", "limited": "bold yellow"}


@opt.loads_base
def doctor(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the settings for wise edit --config here.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="L,L,..", help="Layers to look at. Default: some from the middle up.")
    ] = None,
    edits: Annotated[int, typer.Option(help="Probe edits to learn.")] = 12,
    seed: Annotated[int, typer.Option(help="Seed of the probe edits, and of the run that is described.")] = 0,
    chat: opt.Chat = None,
    pool: opt.Pool = None,
    loading: opt.Loading = opt.Loading(),
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Find out whether and where a base can be edited, how well and at what cost, from a few probe edits.

    Exit code 3 where it cannot. Nothing is written but the settings, with --out.

    Example: wise doctor --model path/to/base -o wise-edit.json
    """
    sink = Output(json, quiet)
    with sink.running():
        from wisecli.doctor.probes import probe_edits
        from wisecli.editing.config_file import refuse_other, write_config
        from wisecli.memory.files import ensure_writable

        wanted, more = _layers(layers), opt.read_pool(pool)
        probe_edits(edits, seed)  # refuse a wrong number before a base is loaded
        if out is not None:
            refuse_other(out)
            ensure_writable(out.parent)
        from wisecli.doctor import DoctorOptions

        base = loading.base({}, min(wanted, default="auto"))
        report = _examine(sink, base, DoctorOptions(wanted, edits, seed, chat, more))
        config = _config(report, loading.quantize)
        if out is not None and config is not None:
            write_config(out, config)
        _show(sink, report)
        written = out if config is not None else None
        if out is not None and written is None:
            sink.warn(f"{out} is not written: there are no settings for a base that cannot be edited")
        _next(sink, report, written, pool, loading)
        sink.result(
            {**report.to_json(), "config": config, "out": str(written) if written else None},
            str(written) if written else None,
        )
        if not report.verdict.usable:
            raise typer.Exit(3)


def _layers(text: str | None) -> tuple[int, ...]:
    from wisecli.errors import UsageError

    try:
        return tuple(int(x) for x in text.split(",")) if text is not None else ()
    except ValueError:
        raise UsageError(f"--layers must be whole numbers separated by commas, not {text!r}.") from None


def _examine(sink: Output, base: Base, options: Any) -> DoctorReport:
    from wisecli.doctor import examine

    with sink.progress() as bar:
        task, stage = bar.add_task("examining", total=None), None
        steps = examine(base, options)
        while True:
            try:
                step = next(steps)
            except StopIteration as done:
                return done.value
            if step.stage != stage:
                stage = step.stage
                bar.reset(task, total=step.total, description=stage)
            bar.update(task, completed=step.done)


def _config(report: DoctorReport, quantize: str | None) -> dict[str, Any] | None:
    """The settings as a file holds them, with the base they are for; None where the base cannot be edited."""
    if report.config is None:
        return None
    base = report.base
    packed = {"quantize": quantize} if quantize else {}
    return {"model": base["name"], "revision": base["revision"], "dtype": base["dtype"], **packed, **report.config}


def _show(sink: Output, report: DoctorReport) -> None:
    base = report.base
    sink.facts(
        [
            (
                "base",
                f"{base['label']} ({base['model_type']}, {base['layers']} layers, "
                f"{base['parameters'] / 1e6:.1f} M parameters, {base['dtype']} on {base['device']})",
            ),
            ("probe edits", _probes(report)),
        ]
    )
    if report.candidates:
        title = "Layers: the gate on held-out pool facts, and probe edits where it does best"
        told = report.chosen is not None and report.chosen.learned is not None  # of the edit site, below
        matrix = not told or len({c.shape for c in report.candidates}) > 1
        about = ("layer", "matrix") if matrix else ("layer",)
        rows = [_row(c, report.layer, matrix) for c in report.candidates]
        sink.table(title, (*about, *_GATE, "took", "Rel", "Gen", "Loc near"), rows, left=len(about))
    if report.chosen is not None and report.chosen.learned is not None:
        which = "the one to edit" if report.verdict.usable else "the best of them"
        sink.line(f"Layer {report.layer}, {which}", style="bold")
        sink.facts(_findings(report, report.chosen, report.chosen.learned))
    for c in report.candidates:
        if c.reason is not None and report.verdict.usable:  # else the verdict says so
            sink.line(f"Layer {c.layer}: {c.reason}.")
    sink.line(f"Verdict: {report.verdict.text}", style=_STYLES.get(report.verdict.level, "bold red"))


def _probes(report: DoctorReport) -> str:
    p, chat = report.probes, report.base["chat_template"]
    template = "in the chat template" if report.config and report.config["chat"] else "no chat template"
    named = f", {template}" if chat or report.config else ""
    return f"{p['edits']} of {p['kinds']} kinds, none of which is among the pool's {p['pool_facts']} facts{named}"


def _row(c: Candidate, chosen: int | None, matrix: bool) -> tuple[str, ...]:
    gate = tuple(figure(x) for x in (c.auc, c.routed, c.opened))
    found = c.learned
    learned: tuple[str, ...] = ("-",) * 4
    if found is not None:
        learned = (f"{found.took}/{found.edits}", *(figure(f.value) for f in (found.rel, found.gen, found.loc_near)))
    shape = ("{} x {}".format(*c.shape) if c.shape else "none",) if matrix else ()
    return (f"{c.layer}{'*' if c.layer == chosen else ''}", *shape, *gate, *learned)


def _findings(report: DoctorReport, c: Candidate, found: Learned) -> list[tuple[str, str]]:
    height, width = c.shape or (0, 0)
    peak = report.memory.get("accelerator_bytes") or report.memory.get("resident_bytes")
    where = "on the accelerator" if report.memory.get("accelerator_bytes") else "resident"
    pool = report.seconds.get("pool", 0.0)
    facts = [
        ("edit site", f"{c.site} [{height} x {width}]"),
        ("edits hold", f"Rel {_share(found.rel)}"),
        ("other wordings", f"Gen {_share(found.gen)}; gate always open {figure(found.gen_open)}"),
        ("near prompts", f"Loc {_share(found.loc_near)}; gate always open {figure(found.loc_near_open)}"),
        (
            "gate",
            f"lets {figure(found.routed)} of the wordings through, {figure(found.near_opened)} of the near prompts, "
            f"{figure(found.ordinary_opened)} of ordinary ones; AUC {figure(found.auc)}",
        ),
        ("base knows", f"{figure(found.known)} of the probe facts (prefers the true answer to the target)"),
        (
            "time",
            f"{found.seconds_per_edit:.2f} s per edit; once per run, {pool:.1f} s for the pool and "
            f"{found.merge_seconds:.1f} s to merge {found.edits} edits",
        ),
        ("side memory", f"{found.bytes / 1e6:.2f} MB, {found.bytes_per_edit} bytes of it for each edit's keys"),
    ]
    return [*facts, ("peak memory", f"{peak / 1e9:.2f} GB {where}")] if peak else facts


def _share(f: Figure) -> str:
    between = f" [{f.low:.2f}, {f.high:.2f}]" if f.low is not None and f.high is not None else ""
    return f"{figure(f.value)}{between} of {f.n}"


def _next(sink: Output, report: DoctorReport, out: Path | None, pool: Path | None, loading: opt.Loading) -> None:
    if report.config is None:
        return
    command: Sequence[str] = ("wise", "edit", "EDITS.jsonl")
    if out is not None:
        command = (*command, "--config", str(out))
    else:
        command = (*command, "--layer", str(report.layer), "--seed", str(report.config["seed"]))
        command = (*command, "--model", str(report.base["name"]), "--dtype", str(report.base["dtype"]))
        command = (*command, *(("--revision", str(report.base["revision"])) if report.base["revision"] else ()))
        command = (*command, *(("--quantize", loading.quantize) if loading.quantize else ()))
        command = (*command, "--chat" if report.config["chat"] else "--no-chat")
    command = (*command, *(("--pool", str(pool)) if pool else ()), *loading.again)
    sink.line(f"Wrote {out}. Next:" if out is not None else "Next:", command=shlex.join(command))
