"""`wise merge`: make one side memory of the shards of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wisecli.cli import _options as opt
from wisecli.cli._output import Output, figure

if TYPE_CHECKING:
    from wisecli.memory.side_memory import Memory, SideMemory

_MEDIAN = 2  # of minimum, 1 %, median, 99 %, maximum


@opt.loads_base
def merge(
    shards: Annotated[Path, typer.Argument(metavar="SHARDS", help="Folder written by wise edit.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path("sm.safetensors"),
    method: Annotated[str, typer.Option(help="ties, sign, linear, dare or dare-ties.")] = "ties",
    density: Annotated[float, typer.Option(help="Share of each shard's trained entries that is kept.")] = 1.0,
    weights: Annotated[str | None, typer.Option(help="One weight per shard, separated by commas.")] = None,
    memories: Annotated[
        int, typer.Option("--memories", help="Memories made of the shards, in groups; the router chooses among them.")
    ] = 1,
    retrieve: Annotated[
        bool, typer.Option("--retrieve", help="WISE-Retrieve: one memory per shard, nothing is merged.")
    ] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse/--no-rehearse", help="Restore edits that merging disturbed.")
    ] = True,
    scope: Annotated[
        str,
        typer.Option(
            help="narrow, balanced or wide: so .25, 1 or 3 % of near prompts pass the gate. Can be changed at run time."
        ),
    ] = "balanced",
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="Load the base, to rehearse and calibrate both routers. --no-calibrate leaves out rehearsing as well; "
            "the key router alone has a threshold then.",
        ),
    ] = True,
    cache: opt.Cache = True,
    loading: opt.Loading = opt.Loading(),
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Merge the shards of a run into one side memory, rehearse its edits and calibrate its thresholds.

    Example: wise merge shards -o sm.safetensors
    """
    sink = Output(json, quiet)
    with sink.running():
        from wisecli.errors import UsageError
        from wisecli.memory.calibration import check_scope
        from wisecli.memory.files import ensure_writable
        from wisecli.memory.shard import RunFolder

        if retrieve and memories != 1:
            raise UsageError("--retrieve makes a memory of every shard.", hint="Leave --memories or --retrieve out.")
        run = RunFolder.open(shards)
        factors = _weights(weights)
        check_scope(scope)
        ensure_writable(out.parent)
        from wisecli.editing.merge import merge_run

        base = None
        if calibrate:
            base = loading.base(run.run["base"], run.site.layer)
        kept = opt.cache_folder(sink, "rewordings are") if cache and calibrate and rehearse else None
        how: dict[str, Any] = {
            "method": method,
            "density": density,
            "weights": factors,
            "rehearse": rehearse,
            "scope": scope,
        }
        side_memory = merge_run(run, base=base, cache=kept, memories=None if retrieve else memories, **how)
        side_memory.save(out)
        _warn_open(sink, side_memory)
        if not any(e.took for e in side_memory.edits):
            sink.warn(f"none of the {len(side_memory.edits)} edits took: the gate will open to none of them as wanted")
        sink.facts(_facts(side_memory, f"{run.n_shards} from {shards}, merged by {method}"))
        sink.line(
            f"Wrote {out} ({out.stat().st_size / 1e6:.2f} MB). Next:",
            command=f"wise chat --side-memory {out}",
        )
        sink.result({"out": str(out), "bytes": out.stat().st_size, "manifest": side_memory.manifest()}, str(out))


def _facts(side_memory: SideMemory, shards: str) -> list[tuple[str, str]]:
    memories = side_memory.memories
    took = sum(e.took for e in side_memory.edits)
    rows, columns = memories[0].delta.shape
    density = _range([m.delta.density for m in memories])
    thresholds = {k: [m.epsilon[k] for m in memories if k in m.epsilon] for k in memories[0].epsilon}
    return [
        ("shards", shards),
        ("edits", f"{len(side_memory.edits)}, {took} took{_rehearsed(memories)}"),
        ("memories", f"{len(memories)}, density {density} of {rows} x {columns}"),
        ("scope", _scope(side_memory)),
        ("thresholds", ", ".join(f"{k} {_range(v)}" for k, v in thresholds.items())),
        ("router", side_memory.router),
    ]


def _range(values: Sequence[float]) -> str:
    """One figure, or the smallest and the largest where they differ."""
    low, high = figure(min(values)), figure(max(values))
    return low if low == high else f"{low} to {high}"


def _scope(side_memory: SideMemory) -> str:
    """What the chosen scope lets pass, as measured while calibrating."""
    statistics = side_memory.statistics["key"]
    rates = statistics["scopes"][statistics["scope"]]
    shares = [("near", rates["near_opened"]), ("ordinary", rates["ordinary_opened"])]
    said = ", ".join(f"{figure(share)} of {name} pool prompts" for name, share in shares if share is not None)
    return f"{statistics['scope']}: lets {said} through" if said else statistics["scope"]


def _warn_open(sink: Output, side_memory: SideMemory) -> None:
    """The published router can come out with a gate that keeps next to nothing out."""
    if side_memory.router != "activation" or len(side_memory.memories) > 1:
        return
    ordinary = side_memory.statistics["activation"]["out_of_scope"]
    epsilon = side_memory.memories[0].epsilon["activation"]
    if ordinary and epsilon < ordinary[_MEDIAN]:
        sink.warn(
            f"more than half of the ordinary prompts pass the activation router's threshold ({figure(epsilon)}, their "
            f"median is {figure(ordinary[_MEDIAN])}); --router key keeps them with the main memory"
        )


def _weights(text: str | None) -> list[float] | None:
    from wisecli.errors import UsageError

    if text is None:
        return None
    try:
        return [float(x) for x in text.split(",")]
    except ValueError:
        raise UsageError(f"--weights must be numbers separated by commas, not {text!r}.") from None


def _rehearsed(memories: Sequence[Memory]) -> str:
    if all(len(m.origin["shards"]) == 1 for m in memories) and not any(m.origin["rehearsed"] for m in memories):
        return "; as they were learned"
    return "; rehearsed after merging" if any(m.origin["rehearsed"] for m in memories) else "; not rehearsed"
