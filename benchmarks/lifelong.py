"""What a stream in portions, several memories and withdrawing edits come to, on the demonstration base.

The same edits are learned in one go and in ten portions, each added to the run folder of those before; the portions are
merged into one memory and kept as one memory per shard. Scores are exact match of free greedy generation at the end of
the stream. *Own memory* is the share of routed rephrases whose memory is their edit's; *open* what an oracle's routing
would reach. Ten edits are withdrawn in the end: how often the base's own text comes back for their prompts and
rephrases, and what the others keep, with the gate closed to them and with their shards learned anew. *Checkpoints* is
the share of the time of learning in one go that writing shards in the making took.

    python benchmarks/lifelong.py --edits 200 --portions 10 --out lifelong.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from wisecli.data.stream import EditStream, read_edits
from wisecli.editing.config import EditConfig
from wisecli.editing.merge import merge_run
from wisecli.editing.rebuild import Rebuild
from wisecli.editing.run import EditRun
from wisecli.evaluation.evaluate import EvalOptions, EvalReport, evaluate
from wisecli.evaluation.metrics import mean
from wisecli.memory import files
from wisecli.memory.shard import RunFolder
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base, load_base

EDITS = Path(__file__).parents[1] / "examples" / "edits.jsonl"


def learn(base: Base, portions: Sequence[EditStream], config: EditConfig, out: Path) -> RunFolder:
    """The run folder of portions that were added one after the other."""
    for i, portion in enumerate(portions):
        run = EditRun(base, portion, config, out, append=i > 0)
        for _ in run:
            pass
    return run.folder


def scores(report: EvalReport, edits: Collection[str] | None = None) -> dict[str, float | None]:
    """Exact match after editing, of all edits or of some; and how rephrases were routed."""
    items = [i for i in report.items if edits is None or i.question.edit in edits]
    of = {"rel": ("edit",), "gen": ("rephrase",), "loc": ("unrelated",), "near": ("same-relation", "same-subject")}
    out = {k: mean([i.exact[1] for i in items if i.question.kind in kinds]) for k, kinds in of.items()}
    opened = {
        f"open {k}": mean([i.opened[1] for i in items if i.question.kind in of[k] and i.opened]) for k in ("rel", "gen")
    }
    return {**out, **opened}


def own_memory(report: EvalReport, sm: SideMemory) -> float | None:
    """Share of routed rephrases whose memory holds their edit."""
    memory = {e.id: e.memory for e in sm.edits}
    routed = [i for i in report.items if i.question.kind == "rephrase" and i.route is not None and i.route.routed]
    return mean([i.route is not None and i.route.memory == memory[i.question.edit] for i in routed])


@contextlib.contextmanager
def timed_writing() -> Iterator[list[float]]:
    """The seconds of each write of a run, as they are spent."""
    spent: list[float] = []
    write = files.write_bytes

    def timed(path: Path, data: bytes) -> None:
        start = time.perf_counter()
        write(path, data)
        spent.append(time.perf_counter() - start)

    files.write_bytes = timed
    try:
        yield spent
    finally:
        files.write_bytes = write


def rebuilt(base: Base, run: RunFolder, ids: Collection[str]) -> SideMemory:
    """The side memory of a run whose shards were learned anew without some edits."""
    run = run.withdraw(ids)
    for _ in Rebuild(base, run):
        pass
    return merge_run(run, base=base)


def withdrawn(base: Base, stream: EditStream, sm: SideMemory, ids: Collection[str]) -> dict[str, float | None]:
    """What comes back of the base, and what the other edits keep."""
    report = evaluate(base, stream, sm, options=EvalOptions(open_gate=False, ability=False))
    asked = [i for i in report.items if i.question.edited]
    gone = [i for i in asked if i.question.edit in ids]
    return {
        "base's text again": mean([i.before == i.after for i in gone]),
        "rel of the others": mean([i.exact[1] for i in asked if i.question.kind == "edit" and i not in gone]),
        "gen of the others": mean([i.exact[1] for i in asked if i.question.kind == "rephrase" and i not in gone]),
    }


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--edits", type=int, default=200)
    ap.add_argument("--portions", type=int, default=10)
    ap.add_argument("--withdrawn", type=int, default=10)
    ap.add_argument("--stream", type=Path, default=EDITS)
    ap.add_argument("--out", type=Path)
    args = ap.parse_args()
    torch.set_num_threads(1)
    base, stream = load_base(device="cpu"), read_edits(args.stream, args.edits)
    cuts = [len(stream) * i // args.portions for i in range(args.portions + 1)]
    portions = [EditStream.of(stream.records[a:b]) for a, b in pairwise(cuts)]
    first = {r.id for r in portions[0]}
    options = EvalOptions(ability=False)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        with timed_writing() as writes:
            start = time.perf_counter()
            one = learn(base, [stream], EditConfig(), Path(folder) / "one")
            found["checkpoints"] = sum(writes) / (time.perf_counter() - start)
        print("checkpoints", json.dumps(found["checkpoints"]), flush=True)
        many = learn(base, portions, EditConfig(shards=1), Path(folder) / "many")
        for name, run, how in (
            ("one go", one, {}),
            ("portions, merged", many, {}),
            ("portions, a memory each", many, {"memories": None}),
        ):
            sm = merge_run(run, base=base, **how)
            report = evaluate(base, stream, sm, options=options)
            found[name] = {"all": scores(report), "first portion": scores(report, first)}
            found[name]["own memory"] = own_memory(report, sm)
            print(name, json.dumps(found[name]), flush=True)
            if name == "one go":
                ids = [r.id for r in stream.records[:: max(1, len(stream) // args.withdrawn)]][: args.withdrawn]
                for name, less in (("gate closed", sm.withdrawn(ids)), ("rebuilt", rebuilt(base, one, ids))):
                    found[f"withdrawn, {name}"] = withdrawn(base, stream, less, ids)
                    print("withdrawn,", name, json.dumps(found[f"withdrawn, {name}"]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
