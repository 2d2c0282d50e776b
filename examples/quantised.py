"""Learn a few edits beside a base in 4 bits, and ask before and after.

python examples/quantised.py                          # the demonstration base; needs pip install 'wisecli[bnb]'
python examples/quantised.py --model FOLDER --bits 8 --edits 20
"""

from __future__ import annotations

import argparse
from pathlib import Path

import wisecli
from wisecli.data.datasets import read_dataset
from wisecli.editing.config import EditConfig
from wisecli.editing.merge import merge_run
from wisecli.editing.run import EditRun
from wisecli.models.base import Base

EDITS = Path(__file__).resolve().parent / "edits.jsonl"


def answer(base: Base, prompt: str) -> str:
    """What the base says to a prompt, greedily."""
    ids = base.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(base.model.device)
    made = base.model.generate(**ids, max_new_tokens=6, do_sample=False)
    return str(base.tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--bits", choices=["4", "8"], default="4")
    parser.add_argument("--edits", type=int, default=10)
    parser.add_argument("--steps", type=int, default=70)
    parser.add_argument("--out", type=Path, default=Path("shards-packed"))
    args = parser.parse_args()
    base = wisecli.load_base(args.model, quantize=f"{args.bits}bit")
    packed = sum(p.nbytes for p in base.model.parameters())
    print(f"{base.label}: {base.model.num_parameters() / 1e6:.1f} M parameters in {packed / 1e6:.1f} MB")
    stream = read_dataset(str(EDITS), args.edits)[1]
    for _ in run_of(base, stream, args):
        pass
    side_memory = merge_run(run_of(base, stream, args).folder, base=base)
    took = sum(e.took for e in side_memory.edits)
    print(f"{took} of {len(side_memory.edits)} edits took; delta learned in fp32, stored in bf16")
    prompts = [r.prompt for r in stream.records[:3]]
    before = [answer(base, p) for p in prompts]
    with wisecli.attach(base.model, side_memory):
        for prompt, was in zip(prompts, before, strict=True):
            print(f"{prompt}\n    before: {was}\n    after:  {answer(base, prompt)}")


def run_of(base: Base, stream: object, args: argparse.Namespace) -> EditRun:
    """The run in --out, begun or continued."""
    return EditRun(base, stream, EditConfig(shards=1, max_steps=args.steps), args.out)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
