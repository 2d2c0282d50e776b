"""`wise inspect`: what is in a side memory, a package or a run folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wisecli.cli import _options as opt
from wisecli.cli._output import Output, figure
from wisecli.cli._texts import setting

if TYPE_CHECKING:
    from wisecli.inspection.contents import Contents, MemoryFacts, RunContents, ShardFacts, Spread

_SHORT = 12  # characters of a digest
_WIDEST = 60  # columns of a drawn spread
_RANGE, _MOST, _MEDIAN, _EPSILON = "·", "━", "┃", "╎"
_RATES = ("near_opened", "ordinary_opened", "hard_opened", "wordings_routed")


def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="Side memory file, packaged folder, or folder written by wise edit.")
    ],
    json: opt.Json = False,
) -> None:
    """Show what is in a side memory, a package or a run folder: base, edit site, memories, keys, thresholds, sizes.

    No base is loaded.

    Example: wise inspect sm.safetensors
    """
    sink = Output(json)
    with sink.running():
        from wisecli.inspection import describe_run, describe_side_memory, open_source
        from wisecli.inspection.source import RunSource

        source = open_source(path)
        if isinstance(source, RunSource):
            run = describe_run(source)
            _show_run(sink, run)
            sink.result(run.to_json())
            return
        contents = describe_side_memory(source)
        _show(sink, contents)
        sink.result(contents.to_json())


def _show(sink: Output, c: Contents) -> None:
    m = c.manifest
    facts = [
        ("file", f"{c.path}, {c.kind}, {_bytes(c.size)}"),
        ("format", c.format),
        *_base_facts(m["base"], m["site"], m["chat"]),
        ("router", str(m["router"])),
        ("edits", _counted(c.outcomes)),
        ("keys", _keys(c)),
        ("digest", f"{c.digest[:_SHORT]} of the tensors"),
        ("versions", _pairs(m["versions"])),
        ("config", _pairs(m["config"])),
    ]
    sink.facts(facts)
    for i, memory in enumerate(c.memories):
        sink.line()
        sink.line(f"Memory {i}", style="bold")
        sink.facts(_memory(memory))
    _show_spreads(sink, c.spreads, {r: e for m in c.memories for r, e in m.epsilon.items() if e is not None})
    _show_scopes(sink, c.scopes)
    _show_sizes(sink, c)


def _show_run(sink: Output, c: RunContents) -> None:
    run = c.run
    state = "finished" if c.finished == len(c.shards) else "not finished"
    pool = [("pool", f"{c.pool} ordinary prompts in {c.rank} directions")] if c.pool is not None else []
    sink.facts(
        [
            ("folder", f"{c.path}, run folder, {_bytes(sum(c.files.values()))}"),
            ("format", f"{run['format']} {run.get('format_version', '')}"),
            *_base_facts(run["base"], run["site"], run["config"].get("chat")),
            ("streams", "; ".join(f"{s['edits']} edits in {s['shards']} shards" for s in run["streams"])),
            ("shards", f"{c.finished} of {len(c.shards)}, {state}"),
            ("edits", _counted(c.outcomes)),
            ("texts", "kept" if run.get("texts") else "left out"),
            *pool,
            ("versions", _pairs(run.get("versions", {}))),
            ("config", _pairs(run["config"])),
        ]
    )
    columns = ("shard", "state", "edits", "keys", "negatives", "density", "norm", "bytes")
    sink.line()
    sink.table("Shards", columns, [_shard(s) for s in c.shards], left=2)
    _show_spreads(sink, c.spreads, {})
    sink.line()
    sink.table("Files", ("file", "bytes"), [(name, f"{n:,}") for name, n in c.files.items()])


def _base_facts(base: Mapping[str, Any], site: Mapping[str, Any], chat: bool | None) -> Iterator[tuple[str, str]]:
    revision = f" at {str(base['revision'])[:_SHORT]}" if base.get("revision") else ""
    yield "base", f"{base.get('name')}{revision}, {base.get('model_type', 'model type not recorded')}"
    prints = (f"{dtype} {str(digest)[:_SHORT]}" for dtype, digest in sorted(base.get("fingerprint", {}).items()))
    yield "fingerprint", ", ".join(prints) or "none"
    yield "edit site", f"{site['path']}, layer {site['layer']}, {site['d_out']} x {site['d_in']}"
    yield "chat form", "yes" if chat else "no"


def _memory(m: MemoryFacts) -> Iterator[tuple[str, str]]:
    d = m.delta
    yield "delta", f"density {figure(d.density)}, {d.values:,} values of {d.dtype}, {_bytes(d.size)}, norm {d.norm:.4g}"
    yield "thresholds", _pairs(m.epsilon) or "none"
    if m.scopes:
        yield "scopes", _pairs(m.scopes)
    yield "edits", str(m.edits)
    shards = m.origin.get("shards") or ()
    origin = {k: v for k, v in m.origin.items() if k != "shards" and v is not None}
    yield "origin", _pairs(origin) or "not recorded"
    if shards:
        yield "shards", ", ".join(str(s.get("index")) for s in shards)


def _keys(c: Contents) -> str:
    k = c.keys
    each = f", {k.per_edit:,.0f} per edit" if k.per_edit is not None else ""
    return f"{k.number} of {k.rank} numbers for {k.edits} edits, {_bytes(k.size)}{each}"


def _shard(s: ShardFacts) -> tuple[str, ...]:
    if s.delta is None:
        return (str(s.index), "begun" if s.partial else "to be learned", str(s.edits) if s.partial else "-", *["-"] * 5)
    d = s.delta
    counts = (str(s.edits), str(s.keys), str(s.negatives))
    return (str(s.index), "finished", *counts, figure(d.density), f"{d.norm:.4g}", f"{s.size:,}")


def _show_sizes(sink: Output, c: Contents) -> None:
    rows = [(p.name, p.dtype, " x ".join(str(n) for n in p.shape), f"{p.size:,}") for p in c.parts]
    rows.append(("manifest", "JSON", "", f"{c.about:,}"))
    sink.line()
    sink.table("Parts of the file", ("part", "dtype", "shape", "bytes"), rows, left=3)
    if c.files:
        sink.line()
        sink.table("Files of the package", ("file", "bytes"), [(name, f"{n:,}") for name, n in c.files.items()])


# -- scores -----------------------------------------------------------------------------------------------------------


def _show_spreads(sink: Output, spreads: Iterable[Spread], epsilon: Mapping[str, float]) -> None:
    """One strip per distribution; those of one router on one scale, with its threshold."""
    for router in dict.fromkeys(s.router for s in spreads):
        some = [s for s in spreads if s.router == router]
        marks = [epsilon[router]] if router in epsilon else []
        names = max(len(s.name) for s in some)
        width = max(10, min(_WIDEST, sink.out.width - names - 19))
        ends = [x for s in some for x in s.quantiles] + marks
        low, high = min(ends), max(ends)
        sink.line()
        sink.line(f"Scores of the {router} router while calibrating, {low:.3f} to {high:.3f}", style="bold")
        for s in some:
            strip = _strip(s.quantiles, marks, low, high, width)
            sink.line(f"{s.name.replace('_', ' '):<{names}}  {strip}  median {s.quantiles[2]:.3f}")
        meaning = f"{_RANGE} all, {_MOST} 1 % to 99 %, {_MEDIAN} median"
        sink.line(f"{meaning}, {_EPSILON} threshold {marks[0]:.3f}" if marks else meaning, style="dim")


def _strip(quantiles: Sequence[float], marks: Sequence[float], low: float, high: float, width: int) -> str:
    """A distribution as a strip of characters between two ends of a scale."""

    def at(x: float) -> int:
        return min(width - 1, int((x - low) / (high - low) * width)) if high > low else 0

    first, one, median, most, last = (at(x) for x in quantiles)
    cells = [_RANGE if first <= i <= last else " " for i in range(width)]
    cells[one : most + 1] = _MOST * (most + 1 - one)
    for x in marks:
        cells[at(x)] = _EPSILON
    cells[median] = _MEDIAN
    return "".join(cells)


def _show_scopes(sink: Output, scopes: Mapping[str, Mapping[str, float | None]]) -> None:
    if not scopes:
        return
    rows = [(name, *(figure(rates.get(k)) for k in ("epsilon", *_RATES))) for name, rates in scopes.items()]
    sink.line()
    sink.table("What each scope lets pass, as calibrated", ("scope", "threshold", *(_named(r) for r in _RATES)), rows)


def _named(rate: str) -> str:
    return rate.rsplit("_", 1)[0]


# -- pieces -----------------------------------------------------------------------------------------------------------


def _counted(outcomes: Mapping[str, int]) -> str:
    total = sum(outcomes.values())
    return f"{total}: {', '.join(f'{n} {name}' for name, n in outcomes.items())}" if total else "none yet"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {setting(v)}" for k, v in sorted(values.items()) if v is not None)


def _bytes(n: int) -> str:
    return f"{n:,} bytes" if n < 10_000 else f"{n / 1e3:,.0f} kB" if n < 10_000_000 else f"{n / 1e6:,.1f} MB"
