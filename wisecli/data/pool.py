"""The shipped texts: ordinary prompts that no edit is about, facts in several wordings, sentences to stand before a
prompt, and held-out passages.

All are files beside this module, one entry per line. Which of them an editor uses, how many and in what order, is not
decided here. No editor uses the passages: they are for measuring.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from wisecli.errors import InputError

ALONE = -1


@dataclass(frozen=True)
class PoolFact:
    """An ordinary fact: its subject, the kind of question it answers, its answer, and wordings that ask for it."""

    subject: str
    relation: str
    answer: str
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Pool:
    """Prompts that no edit is about. Those of one group are wordings of one question; `ALONE` belongs to none."""

    prompts: tuple[str, ...]
    group: tuple[int, ...]

    @classmethod
    def of(cls, lines: Sequence[str] = (), facts: Sequence[PoolFact] | None = None) -> Pool:
        """The shipped prompts and facts, and lines of one's own: a prompt, or its wordings with tabs between them."""
        facts = pool_facts() if facts is None else facts
        groups = [(p,) for p in ordinary_prompts()] + [f.prompts for f in facts]
        groups += [tuple(w.strip() for w in line.split("\t") if w.strip()) for line in lines]
        seen: dict[str, int] = {}
        for i, wordings in enumerate(groups):
            for w in wordings:
                seen.setdefault(w, i if len(wordings) > 1 else ALONE)
        return cls(tuple(seen), tuple(seen.values()))

    @property
    def digest(self) -> str:
        """SHA-256 over prompts and groups, in order."""
        lines = (f"{group}\t{prompt}\n" for group, prompt in zip(self.group, self.prompts, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def ordinary_prompts() -> tuple[str, ...]:
    """Everyday prompts, for thresholds and as irrelevant prompts where a record brings none."""
    return _lines("pool.txt")


@cache
def pool_facts() -> tuple[PoolFact, ...]:
    """Ordinary facts of many kinds, a few wordings each."""
    rows = (json.loads(line) for line in _lines("pool_facts.jsonl"))
    return tuple(PoolFact(r["subject"], r["relation"], r["answer"], tuple(r["prompts"])) for r in rows)


def contexts() -> tuple[str, ...]:
    """Sentences that may stand before a prompt without changing what it asks."""
    return _lines("contexts.txt")


def held_text() -> tuple[str, ...]:
    """Passages of plain English, 50 to 90 words each, to measure what a model keeps of its general ability."""
    return _lines("held_text.txt")


@cache
def _lines(name: str) -> tuple[str, ...]:
    try:
        text = (files("wisecli.data") / name).read_text(encoding="utf-8")
    except FileNotFoundError as err:
        raise InputError(f"the shipped file {name} is missing", hint="Install the package again.") from err
    return tuple(line.strip() for line in text.split("\n") if line.strip())
