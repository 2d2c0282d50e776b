"""What folding a side memory into its base costs, against routing it.

The first edits of a file are learned, merged and evaluated with their router; then the side memory is folded into
checkpoints of each dtype, which are loaded as anyone would load them and asked the same questions. Locality is
agreement of the generated text with the untouched base's. Printed as JSON: the scores of each, and what rounding took.

    python benchmarks/fold.py --edits 20 --out fold.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import wisecli
from wisecli.evaluation.questions import Item
from wisecli.folding import DTYPES, share_of_rank

EDITS = Path(__file__).parents[1] / "examples" / "edits.jsonl"
NEAR = ("same-relation", "same-subject")


def scored(items: Mapping[Any, Item], base: Mapping[Any, Item], after: bool) -> dict[str, float]:
    """Rel, Gen, Loc, Loc near, and how many were asked for each."""
    kinds = {"rel": ("edit",), "gen": ("rephrase",), "loc": ("unrelated",), "loc_near": NEAR}
    out: dict[str, float] = {}
    for name, some in kinds.items():
        asked = [key for key, item in items.items() if item.question.kind in some]
        if name in ("rel", "gen"):
            right = [items[k].exact[after] for k in asked]
        else:
            right = [(items[k].after if after else items[k].before) == base[k].before for k in asked]
        out |= {name: round(mean(right), 4), f"{name}_n": len(asked)}
    return out


def asked(report: wisecli.EvalReport) -> dict[Any, Item]:
    return {(i.question.edit, i.question.kind, i.question.prompt): i for i in report.items}


def measured(edits: int, folder: Path, seed: int) -> dict[str, Any]:
    """Everything, with what is written kept in a folder."""
    stream = wisecli.EditStream.of(tuple(islice(wisecli.read_edits(EDITS), edits)))
    base = wisecli.load_base(device="cpu")
    options = wisecli.EvalOptions(ability=False)
    side_memory = wisecli.edit(base, stream, out=folder / "shards", seed=seed)
    report = wisecli.evaluate(base, stream, side_memory, options=options)
    reference = asked(report)
    delta = side_memory.memories[0].delta.dense()
    result: dict[str, Any] = {
        "edits": edits,
        "base": base.label,
        "delta_over_weight": float(delta.norm() / side_memory.site.weight(base.model).norm()),
        "energy_of_rank_64": share_of_rank(delta),
        "routed": scored(reference, reference, after=True),
        "gate_open": report.sections["open"],
    }
    for dtype in DTYPES:
        folded = wisecli.fold(base, side_memory, folder / dtype, dtype=dtype, force=True)
        alone = wisecli.evaluate(wisecli.load_base(str(folder / dtype), dtype="stored"), stream, options=options)
        loss = {"error": folded.loss.error, "vanished": folded.loss.vanished}
        result[f"folded, {dtype}"] = {**scored(asked(alone), reference, after=False), **loss}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = measured(args.edits, Path(folder), args.seed)
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
