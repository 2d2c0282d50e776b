"""Does a conversation reach the edit that its bare prompt reaches? Edits of the demonstration base in chat templates.

For each template the gate is made twice: of edits learned as bare prompts, and of edits learned inside the template.
Both are then asked inside it: the edit's prompt alone, behind a system message, and behind an earlier question with its
answer; the rephrases alone; and the unrelated prompts alone and behind the edit's own question. The reference is what
the bare prompt does in the side memory of bare prompts: whether it is routed, and to which edit.

A gate rests on keys, and keys on the base alone, so the edits are learned for a single step. The base has seen no
chats: the marks of the templates are ordinary text to it, in pieces. Nothing is generated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import fmean as mean

import torch

from wisecli.data.pool import ordinary_prompts
from wisecli.data.records import Conversation, Prompt
from wisecli.data.stream import EditStream, read_edits
from wisecli.editing.config import EditConfig
from wisecli.editing.editor import Editor
from wisecli.editing.merge import MergeConfig, merge_shards
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base, load_base
from wisecli.models.prompts import PromptEncoder
from wisecli.routing.attach import attach

EDITS = Path(__file__).parents[1] / "examples" / "edits.jsonl"
RULES = "Answer briefly and truthfully."
_OPENED = "{% if add_generation_prompt %}"
TEMPLATES = {
    "ChatML": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        + _OPENED
        + "<|im_start|>assistant\n{% endif %}"
    ),
    "ChatML, default system": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        + _OPENED
        + "<|im_start|>assistant\n{% endif %}"
    ),
    "headers": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        + _OPENED
        + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "instructions": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
        "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}[SYS] {{ m.content }} [/SYS]{% endif %}"
        "{% endfor %}"
    ),
    "turns": (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}" + _OPENED + "<start_of_turn>model\n{% endif %}"
    ),
    "role marks": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        + _OPENED
        + "<|assistant|>\n{% endif %}"
    ),
    "names": (
        "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}"
        + _OPENED
        + "Assistant:{% endif %}"
    ),
}

Route = tuple[bool, str | None]


def memory_of(base: Base, stream: EditStream, chat: bool) -> tuple[SideMemory, PromptEncoder]:
    """A side memory whose gate is that of the stream, its delta unlearned; and how prompts are rendered for it."""
    editor = Editor(base, EditConfig(chat=chat, max_steps=1, dropout=0.0, rewording=0.0))
    shards = editor.learn(stream)
    how = MergeConfig(rehearse=False)
    return merge_shards(shards, editor.gate, editor.describe(stream), upper=editor.upper, how=how), editor.encoder


def routes(base: Base, sm: SideMemory, encoder: PromptEncoder, prompts: Sequence[Prompt]) -> list[Route]:
    """Whether each prompt is routed, and the nearest edit, with the words that the encoder's rule takes for content."""
    out: list[Route] = []
    with attach(base.model, replace(sm, rule=encoder.rule)) as attached:
        for at in range(0, len(prompts), 64):
            batch = encoder.batch([encoder.prompt(p) for p in prompts[at : at + 64]])
            out += [(r.routed, r.edit) for r in attached.decide(batch)]
    return out


def forms(before: Sequence[str]) -> dict[str, Callable[[int, str], Prompt]]:
    """How a prompt is asked: alone, behind a system message, behind an earlier question."""

    def turn(i: int) -> tuple[tuple[str, str], ...]:
        return ("user", before[i % len(before)]), ("assistant", "I do not know that.")

    return {
        "alone": lambda i, p: p,
        "behind a system message": lambda i, p: Conversation((("system", RULES),), p),
        "behind a turn": lambda i, p: Conversation(turn(i), p),
        "behind both": lambda i, p: Conversation((("system", RULES), *turn(i)), p),
    }


def ask(
    base: Base, sm: SideMemory, encoder: PromptEncoder, stream: EditStream, reference: Sequence[Route], few: bool
) -> dict[str, float]:
    """Shares: of edits routed as their bare prompts, of rephrases that reach their edit, of others let in."""
    records = stream.records
    found = {}
    for name, form in forms(ordinary_prompts()).items():
        if few and "system" in name:
            continue
        asked = routes(base, sm, encoder, [form(i, r.prompt) for i, r in enumerate(records)])
        found[name] = sum(a == b for a, b in zip(asked, reference, strict=True)) / len(records)
    others = [(r.prompt, p.prompt) for r in records for p in r.locality if not p.near]
    told = ("assistant", "I do not know that.")
    behind: list[Prompt] = [Conversation((("user", edit), told), p) for edit, p in others]
    found["unrelated behind an edit, let in"] = mean([routed for routed, _ in routes(base, sm, encoder, behind)])
    if few:
        return found
    own = [(r.id, p) for r in records for p in r.rephrases]
    reached = routes(base, sm, encoder, [p for _, p in own])
    alone = routes(base, sm, encoder, [p for _, p in others])
    return found | {
        "rephrases": mean([x == (True, name) for x, (name, _) in zip(reached, own, strict=True)]),
        "unrelated let in": mean([routed for routed, _ in alone]),
    }


def study(
    base: Base, stream: EditStream, names: Sequence[str], learned: Path | None, few: bool
) -> Iterator[tuple[str, Mapping[str, float]]]:
    """What is found for each template, and for each way of learning."""
    plain = PromptEncoder(base.tokenizer)
    bare = memory_of(base, stream, False)[0] if learned is None else SideMemory.load(learned)
    reference = routes(base, bare, plain, [r.prompt for r in stream.records])
    own = [x == (True, r.id) for x, r in zip(reference, stream.records, strict=True)]
    yield "bare prompts", {"routed to their own edit": mean(own)}
    for name in names:
        tokenizer = deepcopy(base.tokenizer)
        tokenizer.chat_template = TEMPLATES[name]
        other = replace(base, tokenizer=tokenizer)
        inside, encoder = memory_of(other, stream, True)
        yield f"{name}: learned inside", ask(other, inside, encoder, stream, reference, few)
        yield f"{name}: learned bare", ask(other, bare, encoder, stream, reference, few)


def show(found: Mapping[str, Mapping[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(k for row in found.values() for k in row))
    table = Table("", *columns)
    for name, row in found.items():
        table.add_row(name, *(f"{row[k]:.3f}" if k in row else "-" for k in columns))
    Console(width=200).print(table)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--edits", type=int, default=200)
    ap.add_argument("--templates", nargs="*", choices=tuple(TEMPLATES), default=list(TEMPLATES))
    ap.add_argument("--side-memory", type=Path, help="these edits learned as bare prompts, instead of learning them")
    ap.add_argument("--few", action="store_true", help="leave out the rephrases, and a system message on its own")
    ap.add_argument("--out", type=Path, help="JSON file of what was measured")
    ap.add_argument("--threads", type=int, default=1)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    stream = read_edits(EDITS, args.edits)
    kept = EditStream.of([r for r in stream.records if r.id not in stream.superseded])
    found: dict[str, Mapping[str, float]] = {}
    for name, row in study(load_base(device="cpu"), kept, args.templates, args.side_memory, args.few):
        found[name] = row
        print(json.dumps({name: row}), file=sys.stderr, flush=True)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    show(found)


if __name__ == "__main__":
    main()
