"""LLaMA-2-7B's shape with random weights: what an edit costs there, in seconds, memory and share of the machine's rate.

Random weights say nothing about edit quality; they cost what trained ones cost. On a GPU in bf16 at full size; without
one the widths are divided by --scale and the numbers are those of this processor.

    python benchmarks/shape_7b.py                        # on a GPU
    python benchmarks/shape_7b.py --device cpu --scale 8 --layers 8 --steps 10 --early 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import flops, machine, peak_memory
from speed import show
from speed_editing import EDITS, Ours, at_once_of, never_early, random_llama
from speed_routing import overhead

from wisecli.data.records import EditRecord
from wisecli.data.stream import read_edits
from wisecli.editing.config import EditConfig
from wisecli.memory.bits import draw_mask
from wisecli.models.base import Base, load_base
from wisecli.models.site import find_site

WIDTH, FFN, HEADS, VOCAB = 4096, 11008, 32, 32_000


def synchronised(thing: Callable[[], Any], device: str) -> float:
    """Wall seconds of a call, with what an accelerator does of it."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    thing()
    wait()
    return time.perf_counter() - start


def matmul_rate(base: Base, repeats: int = 5) -> float:
    """FLOP/s of the matrix product this machine does best: many rows through the FFN's matrix, in the model's dtype."""
    weight = find_site(base.model).weight(base.model)
    rows = torch.randn(4096 if weight.is_cuda else 512, weight.shape[1], device=weight.device, dtype=weight.dtype)
    seconds = [synchronised(lambda: rows @ weight.T, weight.device.type) for _ in range(repeats + 1)][1:]
    return 2 * len(rows) * weight.numel() / min(seconds)


def learning(base: Base, records: list[EditRecord], steps: int, rate: float) -> dict[str, Any]:
    """Seconds per edit, its FLOPs, the share of the machine's rate it reaches, and peak memory beside the model."""
    device = base.model.device.type
    site = find_site(base.model)
    mask = draw_mask((site.d_out, site.d_in), 0.2, 0)
    ours = Ours(base, EditConfig(schedule="published", max_steps=steps), mask)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    with never_early(), peak_memory() as resident:
        ours.edit(records[0])
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else resident["bytes"]
    with never_early():
        seconds = statistics.median(synchronised(lambda r=r: ours.edit(r), device) for r in records[1:])
        done = statistics.median(flops(lambda r=r: ours.edit(r)) for r in records[1:])
    return {
        "steps": steps,
        "seconds_per_edit": seconds,
        "tflop_per_edit": done / 1e12,
        "share_of_matmul_rate": done / seconds / rate,
        "peak_beside_model_mb": peak / 1e6,
    }


def several(base: Base, counts: list[int], steps: int) -> dict[str, float]:
    """Seconds per edit, its frozen part apart, where so many shards learn one each at once."""
    found = {}
    for n in counts:
        learn = at_once_of(base, n, steps)
        found[f"{n}"] = min(synchronised(learn, base.model.device.type) for _ in range(3)) / n
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--scale", type=int, default=1, help="divide the widths by this; a divisor of 32")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=70)
    parser.add_argument("--early", type=int, default=20, help="steps of an edit that stops early")
    parser.add_argument("--edits", type=int, default=3)
    parser.add_argument("--shards-at-once", type=int, nargs="*", default=[1, 4, 8], metavar="N")
    parser.add_argument("--repeats", type=int, default=20, help="of prefill and decoding")
    parser.add_argument("--tokens", type=int, default=64, help="length of the prompts whose prefill is timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    widths = WIDTH // args.scale, FFN // args.scale, args.layers, HEADS // args.scale, VOCAB
    base = random_llama(load_base(device="cpu"), *widths, getattr(torch, args.dtype), args.device)
    records = list(read_edits(EDITS, args.edits + 1).records)
    rate = matmul_rate(base)
    weights = sum(p.numel() * p.element_size() for p in base.model.parameters())
    found: dict[str, Any] = {
        "machine": machine(),
        "protocol": {k: v for k, v in vars(args).items() if k != "out"} | {"seed": 0},
        "model": {"parameters": sum(p.numel() for p in base.model.parameters()), "weights_mb": weights / 1e6},
        "matmul_tflop_per_s": rate / 1e12,
        "at_the_cap": learning(base, records, args.steps, rate),
        "stopped_early": learning(base, records, args.early, rate),
        "seconds_per_edit_of_shards_at_once": several(base, args.shards_at_once, args.early),
        "overhead": {f"batch {b}": overhead(base, 200, b, args.tokens, args.repeats) for b in (1, 8)},
    }
    del found["stopped_early"]["peak_beside_model_mb"]  # the same, and on a CPU what was freed is held already
    show(base.name, found)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
