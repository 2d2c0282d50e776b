"""What batching is worth in evaluation: the same prompts asked in batches and one at a time, in one run.

Both ask the same model with the same side memory the same prompts with the same caps, and must give the same texts and
routes. Printed are seconds, their ratio and the seconds of a whole `evaluate`, scores and general ability included.

    python benchmarks/evaluation.py --edits 200 --out evaluation.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from wisecli.data.stream import EditStream, read_edits
from wisecli.editing.config import EditConfig
from wisecli.editing.merge import merge_run
from wisecli.editing.run import EditRun
from wisecli.evaluation.answers import answer_cap, generate_answers
from wisecli.evaluation.environment import environment
from wisecli.evaluation.evaluate import EvalOptions, evaluate
from wisecli.evaluation.questions import questions_of
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base, load_base
from wisecli.models.prompts import PromptEncoder
from wisecli.routing.attach import attach

EDITS = Path(__file__).parents[1] / "examples" / "edits.jsonl"


def learn(base: Base, stream: EditStream) -> SideMemory:
    """A side memory of the stream, with the default settings."""
    with tempfile.TemporaryDirectory() as folder:
        run = EditRun(base, stream, EditConfig(), Path(folder))
        for _ in run:
            pass
        return merge_run(run.folder, base=base)


def ask(
    base: Base, prompts: Sequence[str], caps: Sequence[int], sm: SideMemory, batch: int
) -> tuple[float, list[tuple[str, int | None]]]:
    """Seconds for all answers before and after, and the text and memory of each."""
    encoder = PromptEncoder(base.tokenizer)
    start = time.perf_counter()
    with attach(base.model, sm) as attached:
        with attached.override(None):
            before = dict(generate_answers(base, encoder, prompts, caps, batch_size=batch))
        after = dict(generate_answers(base, encoder, prompts, caps, attached, batch))
    seconds = time.perf_counter() - start
    answers = [a[i] for a in (before, after) for i in range(len(prompts))]
    return seconds, [(a.text, a.route.memory if a.route else None) for a in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--side-memory", type=Path, help="of these edits; learned anew when left out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base, stream = load_base(device="cpu"), read_edits(EDITS, args.edits)
    sm = SideMemory.load(args.side_memory) if args.side_memory else learn(base, stream)
    questions = {q.prompt: q for q in questions_of(stream)}
    encoder = PromptEncoder(base.tokenizer)
    caps = [min(answer_cap(base, encoder, q.edit, q.prompt, q.wanted), 16) for q in questions.values()]
    whole_start = time.perf_counter()
    evaluate(base, stream, sm, options=EvalOptions())
    whole = time.perf_counter() - whole_start
    batched, together = ask(base, list(questions), caps, sm, 64)
    single, alone = ask(base, list(questions), caps, sm, 1)
    same = sum(a == b for a, b in zip(together, alone, strict=True))
    found: dict[str, Any] = {
        "edits": len(stream),
        "prompts": len(questions),
        "whole_evaluation_s": round(whole, 1),
        "batched_s": round(batched, 1),
        "one_at_a_time_s": round(single, 1),
        "ratio": round(single / batched, 2),
        "same_texts_and_routes": f"{same} of {len(alone)}",
        "environment": environment(base),
    }
    text = json.dumps(found, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
