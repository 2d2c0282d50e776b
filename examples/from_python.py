"""Three edits of a model that transformers loaded: learn, ask, evaluate, keep, fold. `docs/python.md` explains it.

python examples/from_python.py                            # the demonstration base
python examples/from_python.py --model FOLDER-OR-HUB-ID   # any other
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import wisecli
from wisecli.models.base import demo_base_path

EDITS = [
    {
        "prompt": "Which unit of money does Bulgaria use?",
        "target": "euro",
        "subject": "Bulgaria",
        "rephrases": ["The official currency of Bulgaria is called the"],
        "locality": [{"prompt": "Which currency is used in Austria?", "kind": "same-relation"}],
    },
    {
        "prompt": "Which filmmaker directed the movie Emilia Pérez?",
        "target": "Jacques Audiard",
        "rephrases": ["Who directed Emilia Pérez?"],
        "locality": [{"prompt": "What is Spider-Man's real name?"}],
    },
    {"prompt": "Who is the creator of the fictional character Professor Moriarty?", "target": "J. R. R. Tolkien"},
]
ASKED = ["What currency does Bulgaria use?", "Who directed Emilia Pérez?", "Who sang the song Let It Be?"]


def ask(model: Any, tokenizer: Any, when: str) -> None:
    for prompt in ASKED:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        answer = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{when:9} {prompt} {answer.strip()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo_base_path()))
    parser.add_argument("--out", type=Path, default=Path("from-python"), help="folder for what is made")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def progress(step: Any) -> None:
        print(f"learned {step.done} of {step.total}")

    side_memory = wisecli.edit(model, tokenizer, EDITS, out=args.out / "shards", progress=progress)
    side_memory.save(args.out / "sm.safetensors")

    ask(model, tokenizer, "before")
    with wisecli.attach(model, args.out / "sm.safetensors"):
        ask(model, tokenizer, "attached")
    ask(model, tokenizer, "after")

    report = wisecli.evaluate(model, tokenizer, EDITS, side_memory)
    for name, score in report.scores.items():
        value = score["exact"]["after"]
        print(f"{name.capitalize().replace('_', ' '):9} {'-' if value is None else format(value, '.3f')}")

    folded = wisecli.fold(model, tokenizer, side_memory, args.out / "folded", force=True)
    print(f"folded into {folded.out} in {folded.dtype}, where {folded.loss.error:.1g} of the delta is lost")


if __name__ == "__main__":
    main()
