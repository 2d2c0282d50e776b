"""What each choice of the default schedule is worth, on the demonstration base.

Learns the first edits of a stream, merges, and asks everything again, once per variant, in one process. Scores are
exact match of free greedy generation at the end of the stream, through each variant's own router.

    python benchmarks/ablation.py --edits 100
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from wisecli.data.stream import EditStream, read_edits
from wisecli.editing.config import EditConfig
from wisecli.editing.merge import merge_run
from wisecli.editing.run import EditRun
from wisecli.evaluation.evaluate import evaluate
from wisecli.models.base import Base, load_base

EDITS = Path(__file__).parents[1] / "examples" / "edits.jsonl"
VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "default": ({}, True),
    "no rehearsal after merging": ({}, False),
    "no dropout": ({"dropout": 0.0}, True),
    "no dropout, no rehearsal after merging": ({"dropout": 0.0}, False),
    "no contexts": ({"contexts": 0}, True),
    "published": ({"schedule": "published", "contexts": 10}, False),
}


def measure(base: Base, stream: EditStream, options: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        run = EditRun(base, stream, EditConfig(**options), Path(folder))
        for _ in run:
            pass
        editing = time.process_time() - start
        side_memory = merge_run(run.folder, base=base, rehearse=rehearse)
        merging = time.process_time() - start - editing
        report = evaluate(base, stream, side_memory)
    scores = {name: score["exact"]["after"] for name, score in report.scores.items()}
    n = len(stream.records)
    kinds = report.routing["kinds"] if report.routing else {}
    routed = {kind: found["routed"] for kind, found in kinds.items()}
    return scores | {"routed": routed, "cpu_s_per_edit": editing / n, "merge_cpu_s_per_edit": merging / n}


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--stream", type=Path, default=EDITS)
    ap.add_argument("--edits", type=int, default=100)
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    base, stream = load_base(device="cpu"), read_edits(args.stream, args.edits)
    for name in args.only:
        print(json.dumps({"variant": name, "edits": args.edits, **measure(base, stream, *VARIANTS[name])}), flush=True)


if __name__ == "__main__":
    main()
