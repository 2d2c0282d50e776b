"""How fast it is, and against what: every figure is a ratio of two things measured in turn in one run.

    python benchmarks/speed.py                          # everything, tens of minutes of one thread
    python benchmarks/speed.py --only merge artifact    # parts: see PARTS
    python benchmarks/speed.py --stream 200 --reference-edits 40 --out speed.json

Medians over interleaved repetitions; CPU seconds of this process unless a column says otherwise; one thread unless
--threads says otherwise. Each table names its target where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from measure import machine
from rich.console import Console
from rich.table import Table
from speed_editing import SHAPES, at_once, editing, evaluation, same_deltas, stream
from speed_memory import artifact, merging, startup
from speed_routing import routing


def parts(args: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """What can be measured, by name."""
    steps = {"wise-demo": args.steps, "llama-32x512": min(args.steps, 10)}
    edits = {"wise-demo": args.edits, "llama-32x512": 1}
    return {
        "deltas": lambda: same_deltas(5, args.steps),
        "editing": lambda: {s: editing(s, edits[s], steps[s], args.repeats) for s in args.shapes},
        "at once": lambda: {s: at_once(s, (1, 2, 4), min(args.steps, 10), args.repeats) for s in args.shapes},
        "stream": lambda: stream(args.stream, min(args.stream, args.reference_edits or args.stream)),
        "routing": lambda: {
            s: routing(s, (args.tokens,), (1, 8), args.routing_repeats // (1 if s == "wise-demo" else 5), 200)
            for s in args.shapes
        },
        "merge": lambda: merging(args.repeats),
        "artifact": lambda: artifact(args.repeats),
        "startup": lambda: startup(4 * args.repeats),
        "evaluation": lambda: evaluation(min(args.stream, 50), 64),
    }


TARGETS: Mapping[str, Mapping[str, str]] = {
    "deltas": {"largest_difference": "<= 1e-5", "epsilon_difference": "<= 1e-4"},
    "editing": {
        "wise-demo.times_fewer_cpu_s.median": ">= 5",
        "llama-32x512.times_fewer_cpu_s.median": ">= 4",
        "wise-demo.flops_over_minimum.ours": "<= 1.25",
        "llama-32x512.flops_over_minimum.ours": "<= 1.25",
    },
    "stream": {"times_fewer_cpu_s": ">= 20"},
    "routing": {
        f"{s}.batch {b}, * tokens.{what}": target
        for s in SHAPES
        for b in (1, 8)
        for what, target in (
            ("prefill.unrouted_over_plain.median", "<= 1.02"),
            ("decode, 16 tokens.unrouted_over_plain.median", "<= 1.01"),
            ("decode, 16 tokens.routed_over_plain.median", "<= 1.03"),
        )
    },
    "merge": {"*.times_faster": ">= 4", "*.share_of_peak": "<= 0.25", "*.and_are_no_ties": "<= 0"},
    "artifact": {"share_of_dense_bf16": "<= 0.27", "load_and_unpack_s": "<= 0.5"},
}


def flat(found: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures by their dotted path."""
    out: dict[str, Any] = {}
    for key, value in found.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def target_of(part: str, name: str) -> str:
    """The target of a figure, "" for none; a star in a target's name stands for anything."""
    for pattern, target in TARGETS.get(part, {}).items():
        before, star, after = pattern.partition("*")
        if name == pattern or (star and name.startswith(before) and name.endswith(after)):
            return target
    return ""


def meets(value: float, target: str) -> bool:
    sign, bound = target.split()
    return value >= float(bound) if sign == ">=" else value <= float(bound)


def show(part: str, found: Mapping[str, Any]) -> None:
    table = Table("figure", "measured", "target", "", title=part, title_justify="left")
    for name, value in flat(found).items():
        text = f"{value:.5g}" if isinstance(value, float) else str(value)
        target = target_of(part, name)
        table.add_row(name, text, target, ("met" if meets(value, target) else "missed") if target else "")
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", nargs="*", metavar="PART", help="parts to measure; all by default")
    parser.add_argument("--stream", type=int, default=200, metavar="N", help="edits of the stream")
    parser.add_argument(
        "--reference-edits", type=int, metavar="N", help="edits the reference learns of it; all of them"
    )
    parser.add_argument("--steps", type=int, default=70, help="steps per edit where both take the same number")
    parser.add_argument("--edits", type=int, default=5, help="edits per repetition there")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=SHAPES, help="of editing and routing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--routing-repeats", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64, help="length of the prompts whose prefill is timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON with every figure")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    known = parts(args)
    unknown = sorted(set(args.only or ()) - set(known))
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(known)}")
    protocol = {k: v for k, v in vars(args).items() if k not in ("out", "only")}
    found: dict[str, Any] = {"machine": machine(), "protocol": protocol | {"seed": 0}, "parts": {}}
    for part in args.only or known:
        print(f"measuring: {part}", file=sys.stderr, flush=True)
        found["parts"][part] = known[part]()
        show(part, found["parts"][part])
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
