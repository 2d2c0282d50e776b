"""The prompts of the router study, and what the frozen base makes of them; each is run once.

The prompts are a stream's edits in other wordings, near prompts, and paraphrases nobody wrote: the gate is asked which
fact of the pool is nearest to an edit, and that fact's wordings are filled with the edit's subject. The wordings that
are tried never serve as keys. Nothing is scored here.

Shapes: `N` prompts, `P` of them of the pool, `D` model width, `F` FFN width, `L` layers, `B` rows, `T` tokens, `S`
content tokens.
"""

from __future__ import annotations

import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wisecli.data.pool import pool_facts
from wisecli.data.records import SAME_RELATION, EditRecord, Probe
from wisecli.data.stream import EditStream
from wisecli.editing.batch import edit_rows
from wisecli.editing.editor import Editor
from wisecli.editing.negatives import about_edits, template_of
from wisecli.models.base import Base
from wisecli.models.prompts import PromptEncoder, Row, last_content
from wisecli.models.site import EditSite, decoder_layers

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo_base"))
from build_edits import build, pool_subjects
from facts import load_facts, make_fact

BEFORE = (
    "We talked about the weather all morning.",
    "My brother is painting the kitchen today.",
    "Hello, how are you?",
)
AFTER = ("Please answer briefly.", "I need it for a quiz.", "Thank you very much.")
PREFIX, CLOZE = "nq question: ", "Complete the sentence: "


@dataclass(frozen=True)
class Stream:
    """Edits, the relation of each, and the texts that are asked: kind -> (edit, text)."""

    records: tuple[EditRecord, ...]
    relations: tuple[str, ...]
    texts: Mapping[str, Sequence[tuple[int, str]]]


def edits_of(n: int, seed: int) -> tuple[list[EditRecord], dict[str, str]]:
    """Records of a stream, and the relation of each id."""
    made = build(n, seed)
    records = [
        EditRecord(
            id=r["id"],
            prompt=r["prompt"],
            target=r["target"],
            subject=r["subject"],
            rephrases=tuple(r["rephrases"]),
            locality=tuple(Probe(p["prompt"], p["answer"], p.get("kind", "unrelated")) for p in r["locality"]),
        )
        for r in made
    ]
    return records, {r["id"]: r["meta"]["relation"] for r in made}


def gather(editor: Editor, n: int, seed: int) -> Stream:
    """The texts of a stream. An edit that the gate takes for another edit's wording is left out, as in editing."""
    records, relation = edits_of(n, seed)
    superseded = editor.settle(EditStream.of(records)).superseded
    records = [r for r in records if r.id not in superseded]
    relations = tuple(relation[r.id] for r in records)
    texts: dict[str, list[tuple[int, str]]] = defaultdict(list)
    others = _others(records, relations)
    for i, record in enumerate(records):
        for kind, text in (*_wordings(record, random.Random(f"{seed}|{record.id}")), *_probes(record)):
            texts[kind].append((i, text))
        texts["swapped"] += [(i, t) for t in _swapped(record, others[relations[i]])]
    texts["paraphrase"] = list(paraphrases(editor, records))
    texts["foreign"] = list(paraphrases(editor, records, relations))
    return Stream(tuple(records), relations, texts)


def _wordings(record: EditRecord, rng: random.Random) -> Iterator[tuple[str, str]]:
    questions = [p for p in record.rephrases if p.endswith("?")]
    statements = [p for p in record.rephrases if not p.endswith("?")]
    yield from (("question", p) for p in questions)
    yield from (("statement", p) for p in statements)
    yield "cloze", CLOZE + rng.choice(statements)
    yield "before", f"{rng.choice(BEFORE)} {rng.choice(record.rephrases)}"
    yield "after", f"{rng.choice(questions)} {rng.choice(AFTER)}"
    yield "lower", rng.choice(record.rephrases).lower()
    mistyped = _mistyped(rng.choice(record.rephrases), rng)
    if mistyped:
        yield "typo", mistyped
    yield "prefix", PREFIX + rng.choice(questions)
    unrelated = [p.prompt for p in record.locality if not p.near]
    yield "earlier", f"{rng.choice(questions)} {rng.choice(unrelated)}"  # it asks for the second


def _mistyped(text: str, rng: random.Random) -> str | None:
    """Two neighbouring letters inside one longer word change places; None without such a word."""
    words = re.finditer(r"[A-Za-z]{5,}", text)
    spots = [i for m in words for i in range(m.start() + 1, m.end() - 2) if text[i] != text[i + 1]]
    if not spots:
        return None
    i = rng.choice(spots)
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def _probes(record: EditRecord) -> Iterator[tuple[str, str]]:
    for probe in record.locality:
        near = "relation" if probe.kind == SAME_RELATION else "subject"
        yield near if probe.near else "unrelated", probe.prompt
        yield "near, prefix" if probe.near else "unrelated, prefix", PREFIX + probe.prompt


def _others(records: Sequence[EditRecord], relations: Sequence[str]) -> dict[str, list[str]]:
    """Subjects of each relation that are neither edited in it nor in the pool."""
    taken = {(k, r.subject) for k, r in zip(relations, records, strict=True)} | {("", s) for s in pool_subjects()}
    out: dict[str, list[str]] = defaultdict(list)
    for f in load_facts():
        if (f.relation, f.subject) not in taken and ("", f.subject) not in taken:
            out[f.relation].append(f.subject)
    return out


def _swapped(record: EditRecord, subjects: Sequence[str]) -> list[str]:
    """The edit's own prompt with another subject, up to twice."""
    template = template_of(record)
    picked = random.Random(record.id).sample(subjects, min(2, len(subjects))) if template else []
    return [str(template).replace("{}", s) for s in picked]


def paraphrases(
    editor: Editor, records: Sequence[EditRecord], relations: Sequence[str] = ()
) -> Iterator[tuple[int, str]]:
    """Wordings of an edit that nobody wrote: those of the pool fact with the nearest wording, with its subject.

    Args:
        relations: of the edits, where the fact must come from the half of the relations that the edit's is not in.
    """
    half = halves()
    facts = {p: f for f in pool_facts() for p in f.prompts}
    known = [i for i, p in enumerate(editor.pool.prompts) if p in facts]
    near = editor.vectors([r.prompt for r in records]).float() @ editor.gate.pool[known].float().T
    if relations:
        side = torch.tensor([half[facts[editor.pool.prompts[i]].relation] for i in known])
        near[torch.tensor([half[k] for k in relations])[:, None] == side[None]] = -torch.inf
    for i, (record, at) in enumerate(zip(records, near.argmax(1).tolist(), strict=True)):
        fact = facts[editor.pool.prompts[known[at]]]
        for p in fact.prompts:
            text = p.replace(fact.subject, str(record.subject), 1)
            if fact.subject in p and text != record.prompt:
                yield i, text[0].upper() + text[1:]


def halves() -> dict[str, int]:
    """Every other relation, in alphabetical order, is in half 0 and the rest in half 1."""
    return {k: i % 2 for i, k in enumerate(sorted({f.relation for f in (*load_facts(), *pool_facts())}))}


def relation_of(prompts: Sequence[str]) -> list[str | None]:
    """The relation each prompt asks about: that of its pool fact, or one whose phrasing it fits; None for neither."""
    known = {p: f.relation for f in pool_facts() for p in f.prompts}
    blank = {k: make_fact(k, "\0", "") for k in sorted({f.relation for f in load_facts()})}
    fits = [(re.compile(re.escape(p).replace("\0", "(.+)")), k) for k, f in blank.items() for p in f.trained + f.held]
    return [known.get(p) or next((k for fit, k in fits if fit.fullmatch(p)), None) for p in prompts]


# -- what the base makes of them ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Material:
    """Where each prompt of a study is found among the rows that are run.

    Attributes:
        rows: distinct prompts [N].
        at: kind -> rows of its prompts.
        edit: kind -> the edit each of them belongs to.
        pool: rows of the pool's prompts [P]; `group` [P] the fact each is a wording of.
        ordinary: whether each is about no edit [P].
    """

    rows: Sequence[Row]
    at: Mapping[str, Tensor]
    edit: Mapping[str, Tensor]
    pool: Tensor
    group: Tensor
    ordinary: Tensor


def lay_out(stream: Stream, editor: Editor, encoder: PromptEncoder) -> Material:
    """All prompts of a stream and of the pool, rendered by an encoder."""
    places: dict[Row, int] = {}
    config, pool = editor.config, editor.pool
    found = {kind: [(i, encoder.prompt(t)) for i, t in pairs] for kind, pairs in stream.texts.items()}
    forms = [edit_rows(encoder, r, config.contexts, config.seed) for r in stream.records]
    found["edit"] = [(i, Row(f[0].prompt)) for i, f in enumerate(forms)]
    found["context"] = [(i, Row(x.prompt)) for i, f in enumerate(forms) for x in f[1:]]
    at = {k: torch.tensor([places.setdefault(r, len(places)) for _, r in rows]) for k, rows in found.items()}
    pool_at = torch.tensor([places.setdefault(encoder.prompt(p), len(places)) for p in pool.prompts])
    ordinary = torch.ones(len(pool.prompts), dtype=torch.bool)
    ordinary[about_edits(pool.prompts, stream.records)] = False
    edit = {k: torch.tensor([i for i, _ in rows]) for k, rows in found.items()}
    return Material(list(places), at, edit, pool_at, torch.tensor(pool.group), ordinary)


@dataclass(frozen=True)
class Captured:
    """What the frozen layers make of each row.

    Attributes:
        entries: input of every layer at the last content token [N, L, D].
        tokens: input of the edited layer at every content token [S, D]; `row` [S] is whose it is.
        a: input of the edited projection at the last content token [N, F].
        reactions: statistic of ||a_t delta^T|| -> [N]; none without a delta.
    """

    entries: Tensor
    tokens: Tensor
    row: Tensor
    a: Tensor
    reactions: Mapping[str, Tensor]


@torch.no_grad()
def capture(
    base: Base, encoder: PromptEncoder, site: EditSite, rows: Sequence[Row], delta: Tensor | None = None
) -> Captured:
    """One forward over the rows."""
    layers, box, parts = decoder_layers(base.model), dict[Any, Tensor](), defaultdict[str, list[Tensor]](list)
    hooks = [
        m.register_forward_pre_hook(
            lambda m, a, kw, i=i: box.update({i: a[0] if a else kw["hidden_states"]}), with_kwargs=True
        )
        for i, m in enumerate(layers)
    ]
    hooks.append(site.module(base.model).register_forward_pre_hook(lambda m, a: box.update(a=a[0])))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    try:
        for start in range(0, len(order), 64):
            picked = order[start : start + 64]
            batch = encoder.batch([rows[i] for i in picked], side="right")
            base.model.get_decoder()(**batch.inputs, use_cache=False)
            each, end = torch.arange(len(picked)), last_content(batch.content)
            a = box["a"].view(*batch.content.shape, -1)
            parts["entries"].append(torch.stack([box[i][each, end] for i in range(len(layers))], 1))
            parts["tokens"].append(box[site.layer][batch.content].half())
            parts["row"].append(torch.tensor(picked)[batch.content.nonzero()[:, 0]])
            parts["a"].append(a[each, end])
            if delta is not None:
                for name, x in react(a, batch.content, delta, site.weight(base.model)).items():
                    parts[name].append(x)
    finally:
        for h in hooks:
            h.remove()
    back = torch.tensor(order).argsort()
    own = {k: torch.cat(v) for k, v in parts.items()}
    tokens, row = own.pop("tokens"), own.pop("row")
    return Captured(own.pop("entries")[back], tokens, row, own.pop("a")[back], {k: v[back] for k, v in own.items()})


def react(a: Tensor, content: Tensor, delta: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Statistics [B] over content tokens of ||a_t delta^T||, also divided by the same of ||a_t W^T||."""
    out = dict[str, Tensor]()
    raw, unit = ((a @ m.T).norm(dim=-1) * content for m in (delta, weight))
    each, end, count = torch.arange(len(a)), last_content(content), content.sum(1)
    for name, of in (
        ("mean", lambda x: x.sum(1) / count),
        ("max", lambda x: x.max(1).values),
        ("last token", lambda x: x[each, end]),
    ):
        out[f"activation, {name}"] = of(raw)
        out[f"activation, {name}, scaled"] = of(raw) / of(unit)
    return out
