"""Edit an instruct model: learn edits that are given as conversations, merge them, and talk to the edited model.

    python examples/instruct.py                     # the demonstration base, with a chat template put on it
    python examples/instruct.py FOLDER-OR-HUB-ID    # an instruct model with its own

Every edit is asked in its own conversation, then in its first other wording as a second turn behind an unrelated
question. For each answer the memory that gave it is shown. Run it again with the same --out: nothing is learned twice.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import wisecli
from wisecli.chat import ChatSession
from wisecli.editing.run import Progress
from wisecli.evaluation.answers import generate_answers
from wisecli.models.base import Base
from wisecli.models.prompts import PromptEncoder
from wisecli.routing.routers import Route

EDITS = Path(__file__).parent / "chats.jsonl"
UNRELATED = "How many legs does a spider have?"
# The demonstration base has seen no chats. This puts role names, and the marks its training texts stood between, around
# what is said; what it answers to other questions in there is not worth reading.
TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}assistant\n{% endif %}"
)


def learn(base: Base, stream: wisecli.EditStream, out: Path) -> wisecli.SideMemory:
    """Learn the edits inside the base's chat template into a run folder, and merge its shards."""

    def tell(step: Progress) -> None:
        for entry in step.finished:
            print(f"{entry['id']}: {entry['outcome']}")

    return wisecli.edit(base, stream, out=out / "shards", chat=True, progress=tell)


def show(question: str, answer: str, route: Route | None) -> None:
    """An answer and the memory that gave it."""
    memory = f"side memory, {route.edit}" if route is not None and route.routed else "main memory"
    print(f"  {question}\n    {answer or '(nothing)'}    [{memory}]")


def main(argv: Sequence[str] | None = None) -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("base", nargs="?", help="folder or hub id of an instruct model; default: the demonstration base")
    ap.add_argument("--edits", type=Path, default=EDITS, help="conversations to learn, as JSONL")
    ap.add_argument("--out", type=Path, help="folder for what is learned; default: one that is removed afterwards")
    args = ap.parse_args(argv)
    base = wisecli.load_base(args.base)
    if args.base is None:
        base.tokenizer.chat_template = TEMPLATE
    with tempfile.TemporaryDirectory() as scratch:
        stream = wisecli.read_edits(args.edits)
        side_memory = learn(base, stream, args.out or Path(scratch))
    encoder = PromptEncoder(base.tokenizer, chat=True)
    with wisecli.attach(base.model, side_memory) as attached:
        print("\nIn its own conversation:")
        asked = [r.asked for r in stream]
        for i, answer in generate_answers(base, encoder, asked, [24] * len(asked), attached):
            show(str(asked[i]), answer.text, answer.route)
        print("\nIn other words, behind another question:")
        session = ChatSession(base, attached, chat=True, max_new_tokens=24)
        for record in stream:
            session.reset()
            for question in (UNRELATED, record.rephrases[0] if record.rephrases else record.prompt):
                said = "".join(session.ask(question))
                show(question, said, session.turn.route if session.turn else None)


if __name__ == "__main__":
    main()
