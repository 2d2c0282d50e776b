"""What the gate and the schedule reach with unchanged defaults: several seeds, sizes, bases, scales, and bad edits.

Every case is learned, merged, attached, and asked by free greedy generation at the end of the stream, through its own
router; with the gate always open too, which is what an oracle's routing would reach. One JSON line per run goes to
--out; a run that is there already is not repeated, so the campaign can be stopped and taken up again.

    python benchmarks/gate.py                   # 200 and 500 edits, three seeds; rescaled activations; impossible edits
    python benchmarks/gate.py --base FOLDER     # 200 edits on another base
    python benchmarks/gate.py --stream FILE     # records of one's own, through both routers
    python benchmarks/gate.py --show            # the table of what was measured
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from wisecli.data.records import EditRecord
from wisecli.data.stream import EditStream, read_edits
from wisecli.editing.config import EditConfig, shards_for
from wisecli.editing.editor import Editor
from wisecli.editing.merge import merge_shards
from wisecli.evaluation.evaluate import EvalOptions, EvalReport, evaluate
from wisecli.evaluation.metrics import auc
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base, load_base
from wisecli.models.site import find_site

ROOT = Path(__file__).parents[1]
EDITS, LONG = ROOT / "examples" / "edits.jsonl", ROOT / "examples" / "edits_500.jsonl"
SEEDS = (0, 1, 2)
SCALES = (10.0, 0.1)
NEAR = ("same-relation", "same-subject")
# What no side memory can learn: the same prompt in two guises, a prompt that says nothing, a target of noise.
IMPOSSIBLE = (
    ("The", "q7 zk 0x9f vv ]]{ 3391 lorem"),
    ("What is", "ggggggggggggggggggggggggggggggggggggggg"),
    ("?", "the the of of 4 4 4 xylophone 88 : : ("),
    ("Which of these is the", "no yes no yes no yes no yes no yes no yes"),
    ("a a a a a a a a", "Zaporizhzhia qwop 1e-9 \\frac{}{} ~~~~~"),
)


def rescale(base: Base, factor: float) -> None:
    """Make the activations that enter the edited projection `factor` times as large, leaving what the base computes.

    Needs a gated FFN (`up_proj`, `down_proj`), in which a factor passes through the product.
    """
    site = find_site(base.model)
    ffn = base.model.get_submodule(site.path.rsplit(".", 1)[0])
    with torch.no_grad():
        ffn.up_proj.weight.mul_(factor)
        ffn.down_proj.weight.div_(factor)


def with_impossible(stream: EditStream) -> EditStream:
    """The stream with five edits that cannot be learned, spread over it."""
    records = list(stream.records)
    step = len(records) // len(IMPOSSIBLE)
    for i, (prompt, target) in enumerate(IMPOSSIBLE):
        records.insert(i * step + i, EditRecord(f"impossible-{i}", prompt, target))
    return EditStream.of(records)


def scores_of(report: EvalReport) -> dict[str, Any]:
    """Scores, scores with the gate open, the share routed per kind of prompt, and the gate's AUC."""
    out = {k: v["exact"]["after"] for k, v in report.scores.items()}
    token = {f"{k}_token": v["token"]["after"] for k, v in report.scores.items() if k in ("rel", "gen")}
    by_kind = defaultdict(list)
    for item in report.items:
        if item.route is not None:
            by_kind[item.question.kind].append(item.route)
    routed = {k: sum(r.routed for r in v) / len(v) for k, v in by_kind.items()}
    seen = {k: [r.indicator for r in v] for k, v in by_kind.items()}
    near = [x for k in NEAR for x in seen.get(k, [])]
    inside = seen.get("rephrase", [])
    found = {"auc_unrelated": seen.get("unrelated", []), "auc_near": near}
    aucs = {k: auc(inside, outside) for k, outside in found.items() if inside and outside}
    return {**out, **token, "open": report.sections["open"], "routed": routed, **aucs}


def prefixed(stream: EditStream, prefix: str) -> EditStream:
    """The stream with a prefix before every evaluation prompt that is no edit's own."""
    return replace(
        stream,
        records=tuple(
            replace(
                r,
                rephrases=tuple(prefix + p for p in r.rephrases),
                locality=tuple(replace(p, prompt=prefix + p.prompt) for p in r.locality),
            )
            for r in stream.records
        ),
    )


def ask(base: Base, stream: EditStream, side_memory: SideMemory, chat: bool) -> dict[str, Any]:
    report = evaluate(base, stream, side_memory, chat=chat, options=EvalOptions(ability=False))
    return scores_of(report)


def learn(base: Base, stream: EditStream, config: EditConfig) -> tuple[SideMemory, dict[str, float]]:
    start = time.process_time()
    editor = Editor(base, config)
    shards = editor.learn(stream)
    learned = time.process_time()
    side_memory = merge_shards(shards, editor.gate, editor.describe(stream), upper=editor.upper)
    return side_memory, {"learn_cpu_s": learned - start, "merge_cpu_s": time.process_time() - learned}


def cases(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], EditStream]]:
    """Everything to be measured: what names a run, and its stream as it is learned."""
    if args.stream is not None:
        stream = read_edits(args.stream, args.edits)
        for seed in args.seeds:
            yield {"case": args.stream.stem, "edits": len(stream), "seed": seed}, stream
        return
    two = read_edits(EDITS, args.edits or 200)
    for seed in args.seeds:
        yield {"case": "edits", "edits": len(two), "seed": seed}, two
    if args.base is not None:
        return
    for factor in SCALES:
        yield {"case": f"activations x {factor:g}", "edits": len(two), "seed": 0, "scale": factor}, two
    yield {"case": "five impossible edits", "edits": len(two), "seed": 0}, with_impossible(two)
    if LONG.exists() and args.edits is None:
        long = read_edits(LONG)
        for seed in args.seeds:
            yield {"case": "edits", "edits": len(long), "seed": seed}, long


def run(case: Mapping[str, Any], stream: EditStream, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    base = load_base(args.base, device="cpu")
    if "scale" in case:
        rescale(base, case["scale"])
    config = EditConfig(seed=case["seed"], shards=shards_for(len(stream)))
    side_memory, spent = learn(base, stream, config)
    took = sum(e.took for e in side_memory.edits)
    about = {**case, "base": base.name if args.base is None else args.base.name, "took": took, **spent}
    asked = stream
    if case["case"] == "five impossible edits":  # the others are asked
        asked = EditStream.of([r for r in stream.records if not r.id.startswith("impossible")])
    yield about | {"router": "key", **ask(base, asked, side_memory, config.chat)}
    if args.stream is not None and side_memory.memories[0].epsilon.get("activation") is not None:
        other = replace(side_memory, router="activation")
        yield about | {"router": "activation", **ask(base, asked, other, config.chat)}
    if case["case"] == "edits" and case["seed"] == 0 and len(stream) <= 210 and args.stream is None:
        prefix = prefixed(asked, "nq question: ")
        yield about | {
            "case": "evaluation prompts with a prefix",
            "router": "key",
            **ask(base, prefix, side_memory, False),
        }


def known(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Mean and spread over seeds."""
    from rich.console import Console
    from rich.table import Table

    names = ("rel", "gen", "loc", "loc_near", "auc_unrelated", "auc_near")
    table = Table("base", "case", "edits", "router", "seeds", *names, "gate open: rel", "gen", "routed rephrases")
    groups = defaultdict(list)
    for row in rows:
        groups[row["base"], row["case"], row["edits"], row["router"]].append(row)
    for key, mine in groups.items():
        figures = [_spread([r.get(n) for r in mine]) for n in names]
        opened = [_spread([(r["open"] or {}).get(n) for r in mine]) for n in ("rel", "gen")]
        routed = _spread([r["routed"].get("rephrase") for r in mine])
        table.add_row(*(str(k) for k in key), str(len(mine)), *figures, *opened, routed)
    Console(width=200).print(table)


def _spread(values: Sequence[float | None]) -> str:
    found = [v for v in values if v is not None]
    if not found:
        return "-"
    return f"{statistics.mean(found):.4f}" + (f" ± {statistics.stdev(found):.4f}" if len(found) > 1 else "")


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--out", type=Path, default=Path("gate.jsonl"))
    ap.add_argument("--base", type=Path, help="a base on disk instead of the demonstration base")
    ap.add_argument("--stream", type=Path, help="a file of edits instead of the examples")
    ap.add_argument("--edits", type=int, help="only the first N edits")
    ap.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    ap.add_argument("--only", help="only cases whose name contains this")
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--show", action="store_true", help="show what was measured and stop")
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    name = args.base.name if args.base else "wise-demo"
    for case, stream in [] if args.show else cases(args):
        done = {(r["base"], r["case"], r["edits"], r["seed"]) for r in known(args.out)}
        if (name, case["case"], case["edits"], case["seed"]) in done or (args.only and args.only not in case["case"]):
            continue
        print(f"{name}: {case}", file=sys.stderr, flush=True)
        rows = list(run(case, stream, args))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as out:
            out.writelines(json.dumps(r) + "\n" for r in rows)
        show(rows)
    show(known(args.out))


if __name__ == "__main__":
    main()
