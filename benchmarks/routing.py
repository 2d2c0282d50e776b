"""What routing costs with many memories and many keys, and whether it decides as it would by computing everything.

A stream of edits is learned into many small shards, which are merged into one memory and kept as a memory each. Both
side memories are on the demonstration base at once, through either router; a prefill is one forward over a batch of
prompts, and repetitions of all cases alternate. *Exact* is the activation router without estimates. Then prompts of the
stream (edits, rephrases, unrelated and near ones) are decided by both activation routers and by both ways of finding
the nearest key. Last, the nearest of so many random keys is looked up, among them queries next to a key, by `Index` and
by measuring all, from keys in fp32 and (*stored*) from keys in 8 bits that are converted at each call. One thread.

    python benchmarks/routing.py --edits 300 --shards 100 --out routing.json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from wisecli.data.stream import EditStream, read_edits
from wisecli.editing.config import EditConfig
from wisecli.editing.merge import merge_run
from wisecli.editing.run import EditRun
from wisecli.evaluation.environment import environment
from wisecli.memory.keys import to_int8
from wisecli.memory.lookup import Index, score
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base, load_base
from wisecli.models.prompts import Batch, PromptEncoder
from wisecli.routing.attach import attach
from wisecli.routing.routers import MAIN, ROUTERS, ActivationRouter, last_entries
from wisecli.routing.shelf import SideMemories

BUILD = Path(__file__).parents[1] / "examples" / "demo_base" / "build_edits.py"
BATCHES = (1, 8)
WARM = 2
WIDTH = 128  # of random keys, as of the demonstration base's


def learn(base: Base, edits: int, shards: int, seed: int, folder: Path) -> tuple[EditStream, SideMemory, SideMemory]:
    """The stream, its side memory with one memory and the one with a memory per shard."""
    made = folder / "edits.jsonl"
    subprocess.run([sys.executable, str(BUILD), str(made), "--edits", str(edits), "--seed", str(seed)], check=True)
    stream = read_edits(made)
    run = EditRun(base, stream, EditConfig(shards=shards), folder / "run")
    for _ in run:
        pass
    return stream, merge_run(run.folder, base=base), merge_run(run.folder, base=base, memories=None)


def batches(base: Base, stream: EditStream, prompts: int, size: int) -> list[Batch]:
    """So many of the stream's prompts of every kind, in random order."""
    texts = [p for r in stream.records for p in (r.prompt, *r.rephrases, *(x.prompt for x in r.locality))]
    random.Random(0).shuffle(texts)
    encoder = PromptEncoder(base.tokenizer)
    rows = [encoder.prompt(p) for p in texts[:prompts]]
    return [encoder.batch(rows[i : i + size]) for i in range(0, len(rows), size)]


def timed(cases: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each case; the cases take turns."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(WARM + repeats):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if i >= WARM:
                taken[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(x) for name, x in taken.items()}


@torch.no_grad()
def prefills(base: Base, one: SideMemory, many: SideMemory, stream: EditStream, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds per prefill, and how many times that of one memory it is."""
    rows = []
    n = len(many.memories)
    with SideMemories(base.model) as shelf:
        for router in ROUTERS:
            shelf.load(f"{router} 1", one, router=router)
            shelf.load(f"{router} {n}", many, router=router)
        shelf.load("exact", many, router="activation")
        exact = shelf._named["exact"].router
        assert isinstance(exact, ActivationRouter)
        exact.sketches = None
        names = (*shelf.names, None)
        for size in BATCHES:
            some = [b.to(base.model.device).inputs for b in batches(base, stream, 16 * size, size)]

            def run(name: str | None, some: Sequence[dict[str, Any]] = some) -> None:
                shelf.use(name)
                for inputs in some:
                    base.model(**inputs, use_cache=False)

            cases = {str(name): (lambda name=name: run(name)) for name in names}
            ms = {name: x / len(some) for name, x in timed(cases, repeats).items()}
            rows.append({"batch": size, "base": ms["None"]})
            for router in ROUTERS:
                few, lots = ms[f"{router} 1"], ms[f"{router} {n}"]
                rows[-1] |= {f"{router} 1": few, f"{router} {n}": lots, f"{router} ratio": lots / few}
            rows[-1] |= {"exact": ms["exact"], "exact ratio": ms["exact"] / ms["activation 1"]}
    return rows


@torch.no_grad()
def agreement(base: Base, many: SideMemory, stream: EditStream, prompts: int) -> dict[str, Any]:
    """On how many prompts the decisions are those of computing everything."""
    found = {"prompts": 0, "routed": 0, "same memory": 0, "same indicator": 0, "same nearest edit": 0}
    with attach(base.model, many, router="activation") as attached:
        exact = ActivationRouter(attached.deltas, attached.router.epsilon)
        keys, owner = many.keys.vectors, many.keys.owner
        for batch in batches(base, stream, prompts, 8):
            routes, seen = attached.look(batch)
            want = exact.decide(seen)
            routed = want.memory != MAIN
            h = last_entries(seen)
            best, edit = many.keys.nearest(h)
            plain = score(many.keys.space(h), keys, many.keys.crowding.float()[owner]).max(1)
            found["prompts"] += len(routed)
            found["routed"] += int(routed.sum())
            found["same memory"] += int((routes.memory == want.memory).sum())
            found["same indicator"] += int((routes.indicator == want.indicator).sum())
            found["same nearest edit"] += int(((edit == owner[plain.indices]) & (best == plain.values)).sum())
    return found


def lookups(sizes: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Milliseconds to find the nearest of n random keys, and whether the result is that of measuring all."""
    rows = []
    for n in sizes:
        g = torch.Generator().manual_seed(n)
        stored, step = to_int8(torch.randn(n, WIDTH, generator=g) / WIDTH**0.5, 1)
        keys, crowding = stored * step[:, None], 0.8 * torch.rand(n, generator=g)
        start = time.perf_counter()
        index = Index(keys, crowding)
        built = 1000 * (time.perf_counter() - start)
        for queries in BATCHES:
            z = torch.randn(queries, WIDTH, generator=g) / WIDTH**0.5
            z[::2] = keys[torch.randint(n, (len(z[::2]),), generator=g)] + 0.01 * z[::2]
            ms = timed(
                {
                    "index": lambda z=z, index=index: index.nearest(z),
                    "all": lambda z=z, k=keys, c=crowding: score(z, k, c).max(1),
                    "stored": lambda z=z, k=stored, s=step, c=crowding: score(z, k * s[:, None], c).max(1),
                },
                repeats,
            )
            same = all(map(torch.equal, index.nearest(z), score(z, keys, crowding).max(1)))
            rows.append({"keys": n, "queries": queries, "built": built, **ms, "same": same})
    return rows


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{x:.2f}" if isinstance(x, float) else str(x) for x in row.values()))
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--edits", type=int, default=300)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--seed", type=int, default=9, help="of the stream")
    parser.add_argument("--prompts", type=int, default=1500)
    parser.add_argument("--keys", type=int, nargs="*", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = load_base(device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        stream, one, many = learn(base, args.edits, args.shards, args.seed, Path(folder))
    start = time.perf_counter()
    attach(base.model, many, router="activation").detach()
    attaching = time.perf_counter() - start
    found = {
        "edits": len(stream),
        "memories": len(many.memories),
        "attaching_s": round(attaching, 2),
        "prefill_ms": prefills(base, one, many, stream, args.repeats),
        "decisions": agreement(base, many, stream, args.prompts),
        "lookup_ms": lookups(args.keys, args.repeats),
        "environment": environment(base),
    }
    show("milliseconds per prefill", found["prefill_ms"])
    show("decisions", [found["decisions"]])
    show("milliseconds per lookup", found["lookup_ms"])
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
