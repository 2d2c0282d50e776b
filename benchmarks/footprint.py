"""Memory that `wise edit` predicts against what it takes at most, each in a fresh process, on the CPU.

    python benchmarks/footprint.py            # the demonstration base, a Llama of 16 layers, GPT-2's shape
    python benchmarks/footprint.py --quick    # with a tenth of the pool: minutes less

Measured is the most that the process held, less what it held when the prediction was made: imports are done by then,
and no base is loaded. The other bases have random weights, so nothing is learned; a run takes the same memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
EDITS = HERE.parent / "examples" / "edits.jsonl"
SHAPES: dict[str, dict[str, Any]] = {
    "llama-16x512": {
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "gpt2": {"model_type": "gpt2", "vocab_size": 50257},
}


def build(name: str, folder: Path) -> None:
    """Write a base of one of the shapes with random weights, and the demonstration base's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from wisecli.models.base import demo_base_path

    tokenizer = AutoTokenizer.from_pretrained(demo_base_path())
    ids = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("pad", "bos", "eos")}
    torch.manual_seed(0)
    shape = dict(SHAPES[name])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape, **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def status(field: str) -> int:
    """A size from this process's status, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def child(argv: list[str], quick: bool) -> None:
    """Run `wise edit` here, and print what was predicted and what was taken."""
    from wisecli.cli import edit as command
    from wisecli.cli.app import main
    from wisecli.data import pool
    from wisecli.editing import rewording

    if quick:
        ordinary, facts = pool.ordinary_prompts()[::10], pool.pool_facts()[::10]
        pool.ordinary_prompts = lambda: ordinary  # type: ignore[assignment]
        pool.pool_facts = rewording.pool_facts = lambda: facts  # type: ignore[assignment]
    found: dict[str, int] = {}
    predict = command._predict

    def noting(*args: Any) -> Any:
        told = predict(*args)
        found["predicted"], found["before"] = told.total if told else 0, status("VmRSS")
        return told

    command._predict = noting
    if main(argv) != 0:
        raise SystemExit(1)
    print(json.dumps({"predicted": found["predicted"], "measured": status("VmHWM") - found["before"]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", help="wise-demo or one of the shapes")
    parser.add_argument("--edits", type=int, default=20)
    parser.add_argument("--shards-at-once", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.quick)
        return
    for name in [args.only] if args.only else ["wise-demo", *SHAPES]:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            if name in SHAPES:
                build(name, folder / "base")
            model = str(folder / "base") if name in SHAPES else name
            argv = ["edit", str(EDITS), "--limit", str(args.edits), "--max-steps", "10", "-q"]
            argv += ["--shards-at-once", str(args.shards_at_once)]
            argv += ["--model", model, "--dtype", args.dtype, "--device", "cpu", "--out", str(folder / "shards")]
            command = [sys.executable, __file__, *(["--quick"] if args.quick else []), "--child", *argv]
            env = {**os.environ, "WISE_CACHE": str(folder / "cache")}  # empty: the gate is worked out
            out = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
            got = json.loads(out.splitlines()[-1])
            ratio = got["predicted"] / got["measured"]
            mib = {k: f"{v / 2**20:.0f} MiB" for k, v in got.items()}
            print(f"{name}: predicted {mib['predicted']}, measured {mib['measured']}, ratio {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
