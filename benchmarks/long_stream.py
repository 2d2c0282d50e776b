"""A thousand edits in one go on the demonstration base: Rel, Gen, Loc and memory as the stream grows.

The stream is learned once per variant, 50 edits to a shard; what stands after 100, 300 and 1,000 edits is merged into
one memory (WISE-Merge), kept as one memory per shard (WISE-Retrieve), and asked by an oracle that sends each edit's
prompts to the memory that learned it. Variants: our schedule and the published one, with and without replay. Scores are
exact match of free greedy generation at the end of the stream so far; *own* is the share of routed rephrases (and of
prompts) whose memory is their edit's. Peak memory is the process's, after so many edits were learned.

    python benchmarks/long_stream.py --seed 9 --out long_stream.json
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from wisecli.data.stream import EditStream, read_edits
from wisecli.editing.config import EditConfig
from wisecli.editing.merge import MergeConfig, merge_shards
from wisecli.editing.run import EditRun
from wisecli.evaluation.evaluate import EvalOptions, EvalReport
from wisecli.evaluation.evaluate import evaluate as ask
from wisecli.evaluation.metrics import mean
from wisecli.memory.shard import RunFolder
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base, load_base
from wisecli.models.prompts import PromptEncoder
from wisecli.models.upper import UpperModel
from wisecli.versions import versions

BUILD = Path(__file__).parents[1] / "examples" / "demo_base" / "build_edits.py"
STATUS = Path("/proc/self/status")  # rusage's peak may be that of the process that started this one
PER_SHARD = 50
KINDS = {"rel": ("edit",), "gen": ("rephrase",), "loc": ("unrelated",), "near": ("same-relation", "same-subject")}
VARIANTS = {
    "rehearsal": EditConfig(),
    "rehearsal, replay": EditConfig(replay=True),
    "published": EditConfig(schedule="published"),
    "published, replay": EditConfig(schedule="published", replay=True),
}


def learn(base: Base, stream: EditStream, config: EditConfig, out: Path) -> tuple[RunFolder, list[dict[str, Any]]]:
    """The run folder, and after each shard the edits learned, CPU seconds and the process's peak memory."""
    run = EditRun(base, stream, config, out)
    curve, start = [], time.process_time()
    for step in run:
        if step.finished:
            peak = int(re.search(r"VmHWM:\s+(\d+)", STATUS.read_text())[1]) // 1024  # type: ignore[index]
            cpu = round(time.process_time() - start, 1)
            curve.append({"edits": step.done, "cpu_s": cpu, "peak_mib": peak})
    return run.folder, curve


def learn_apart(stream: Path, variant: str, out: Path) -> list[dict[str, Any]]:
    """`learn` in a process of its own, so that the peak is that of learning."""
    command = [sys.executable, __file__, "--learn-only", variant, "--stream", str(stream), "--folder", str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def merged(base: Base, run: RunFolder, edits: int, how: MergeConfig) -> SideMemory:
    """The side memory of the run's first shards, up to so many edits."""
    config = EditConfig.from_json(run.run["config"])
    shards = run.shards()[: edits // PER_SHARD]
    upper = UpperModel(base.model, run.site, PromptEncoder(base.tokenizer, chat=config.chat))
    return merge_shards(shards, run.gate(), run.run, upper=upper, how=how)


def figures(report: EvalReport, sm: SideMemory) -> dict[str, float | None]:
    """Exact match after editing; what was routed; and how often to the memory that learned the edit."""
    out = {k: mean([i.exact[1] for i in report.items if i.question.kind in kinds]) for k, kinds in KINDS.items()}
    memory = {e.id: e.memory for e in sm.edits}
    for name, kind in (("prompts", "edit"), ("rephrases", "rephrase")):
        items = [i for i in report.items if i.question.kind == kind and i.route is not None]
        routed = [i for i in items if i.route is not None and i.route.routed]
        out[f"{name} routed"] = mean([i.route is not None and i.route.routed for i in items])
        out[f"{name} own"] = mean([i.route is not None and i.route.memory == memory[i.question.edit] for i in routed])
    return out


def table(base: Base, stream: EditStream, run: RunFolder, sizes: Sequence[int]) -> dict[str, Any]:
    """Merge, Retrieve and oracle after so many edits."""
    found: dict[str, Any] = {}
    options = EvalOptions(ability=False, open_gate=False)
    for edits in sizes:
        part = EditStream.of(stream.records[:edits])
        for name, how in (("merge", MergeConfig()), ("retrieve", MergeConfig(memories=None))):
            start = time.process_time()
            sm = merged(base, run, edits, how)
            cpu = round(time.process_time() - start, 1)
            for router in (None, "oracle") if name == "retrieve" else (None,):
                report = ask(base, part, sm, options=replace(options, router=router))
                key = f"{edits} {router or name}"
                found[key] = {**figures(report, sm), "merge_cpu_s": cpu}
                print(key, json.dumps(found[key]), flush=True)
            gc.collect()
    return found


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--edits", type=int, default=1000)
    ap.add_argument("--seed", type=int, default=9, help="of the stream")
    ap.add_argument("--sizes", type=int, nargs="+", default=[100, 300, 1000])
    ap.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    ap.add_argument("--folder", type=Path, help="keep the shards here, and go on where a run stopped")
    ap.add_argument("--out", type=Path)
    ap.add_argument("--stream", type=Path, help=argparse.SUPPRESS)
    ap.add_argument("--learn-only", choices=VARIANTS, help=argparse.SUPPRESS)
    args = ap.parse_args()
    torch.set_num_threads(1)
    base = load_base(device="cpu")
    if args.learn_only:
        stream = read_edits(args.stream)
        config = replace(VARIANTS[args.learn_only], shards=len(stream) // PER_SHARD)
        print(json.dumps(learn(base, stream, config, args.folder)[1]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        path = folder / "edits.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        build = [sys.executable, str(BUILD), "--edits", str(args.edits), "--seed", str(args.seed), str(path)]
        subprocess.run(build, check=True, capture_output=True)
        stream = read_edits(path)
        found: dict[str, Any] = {"versions": versions(), "threads": torch.get_num_threads(), "seed": args.seed}
        for name in args.variants:
            out = folder / name.replace(", ", "-")
            curve = learn_apart(path, name, out)
            print(name, json.dumps(curve), flush=True)
            found[name] = {"learning": curve, **table(base, stream, RunFolder.open(out), args.sizes)}
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
