"""What differs between two side memories: edits, settings, tensors, and, with their base, answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from wisecli.data.records import Prompt
from wisecli.data.stream import prompt_key
from wisecli.evaluation.answers import Answer
from wisecli.evaluation.metrics import normalise
from wisecli.inspection.asking import Report, ask_prompts, caps_of, caps_of_prompts
from wisecli.inspection.ledger import LedgerLine, ledger_of
from wisecli.inspection.source import MergedSource
from wisecli.memory.files import load_tensors
from wisecli.models.base import Base

_COMPARED = ("id", "history", "prompt", "target", "outcome", "memory")
_NO_SETTING = ("edits", "statistics", "format")
Two = tuple[Any, Any]


@dataclass(frozen=True)
class ChangedEdit:
    """An edit that both have, with each field that differs as (in A, in B)."""

    a: LedgerLine
    b: LedgerLine
    changes: Mapping[str, Two]

    def to_json(self) -> dict[str, Any]:
        return {"id": self.a.id, "prompt": self.a.prompt, "changes": {k: list(v) for k, v in self.changes.items()}}


@dataclass(frozen=True)
class AnswerPair:
    """A prompt that A and B answer otherwise."""

    prompt: str
    a: Answer
    b: Answer

    def to_json(self) -> dict[str, Any]:
        answers = {"a": self.a, "b": self.b}
        said = {k: {"answer": x.text, "route": x.route.to_json() if x.route else None} for k, x in answers.items()}
        return {"prompt": self.prompt, **said}


@dataclass(frozen=True)
class Difference:
    """What differs.

    Attributes:
        only_a, only_b: edits that one alone has.
        changed: edits of both with other fields; `same` is how many have none.
        settings: what differs in the manifests, by the path of the key, as (in A, in B); None where one has none.
        tensors: names of the tensors that are not the same bytes, each with what is the matter.
        digests: of all tensors of A, and of B.
    """

    only_a: tuple[LedgerLine, ...]
    only_b: tuple[LedgerLine, ...]
    changed: tuple[ChangedEdit, ...]
    same: int
    settings: Mapping[str, Two]
    tensors: Mapping[str, str]
    digests: tuple[str, str]

    @property
    def none(self) -> bool:
        return not (self.only_a or self.only_b or self.changed or self.settings or self.tensors)

    def to_json(self) -> dict[str, Any]:
        return {
            "only_a": [asdict(x) for x in self.only_a],
            "only_b": [asdict(x) for x in self.only_b],
            "changed": [x.to_json() for x in self.changed],
            "same_edits": self.same,
            "settings": {k: list(v) for k, v in self.settings.items()},
            "tensors": {"same": not self.tensors, "differ": dict(self.tensors), "digests": list(self.digests)},
        }


def compare_side_memories(a: MergedSource, b: MergedSource) -> Difference:
    """What differs between two side memories; no base is loaded.

    Edits are the same edit when they have the same id; those left over, when they are of the same prompt.
    """
    pairs, only_a, only_b = _paired(ledger_of(a), ledger_of(b))
    changed = tuple(c for c in (_changed(x, y) for x, y in pairs) if c.changes)
    first, second = (_flat(s.side_memory.manifest()) for s in (a, b))
    settings = {
        k: (first.get(k), second.get(k)) for k in sorted(first.keys() | second.keys()) if first.get(k) != second.get(k)
    }
    numbers = (len(a.side_memory.memories), len(b.side_memory.memories))
    if numbers[0] != numbers[1]:  # what is set for a memory that one alone has is no difference of settings
        extra = tuple(f"memory {i}." for i in range(min(numbers), max(numbers)))
        settings = {"memories": numbers, **{k: v for k, v in settings.items() if not k.startswith(extra)}}
    return Difference(
        only_a=tuple(only_a),
        only_b=tuple(only_b),
        changed=changed,
        same=len(pairs) - len(changed),
        settings=settings,
        tensors=_tensors(a, b),
        digests=(a.side_memory.digest, b.side_memory.digest),
    )


def compare_answers(
    base: Base,
    a: MergedSource,
    b: MergedSource,
    prompts: Sequence[str] | None = None,
    progress: Report | None = None,
) -> tuple[list[AnswerPair], int]:
    """Ask both the same prompts; the answers that differ, in order, and how many prompts were asked.

    Args:
        base: of both.
        prompts: what to ask; None for the prompts of all edits of either.
        progress: called with the answers there are, and their total.

    Raises:
        BaseMismatch: the base is another one than that of A or of B.
        InputError: a prompt does not fit the base's context.
    """
    both = (a.side_memory, b.side_memory)
    caps: dict[Prompt, int] = {}
    for sm in both:
        edits = [e for e in sm.edits if e.prompt is not None]
        mine = caps_of(base, sm, edits) if prompts is None else caps_of_prompts(base, sm, prompts)
        caps = {p: max(caps.get(p, 0), mine.get(p, 0)) for p in (*caps, *mine)}
    said = []
    for half, sm in enumerate(both):

        def report(done: int, total: int, before: int = half * len(caps)) -> None:
            if progress is not None:
                progress(before + done, 2 * total)

        said.append(ask_prompts(base, sm, caps, report))
    pairs = [AnswerPair(str(p), said[0][p], said[1][p]) for p in caps]
    return [x for x in pairs if normalise(x.a.text) != normalise(x.b.text)], len(caps)


def _paired(
    a: Sequence[LedgerLine], b: Sequence[LedgerLine]
) -> tuple[list[tuple[LedgerLine, LedgerLine]], list[LedgerLine], list[LedgerLine]]:
    """Edits of both, those of A alone, those of B alone."""
    by_id = {line.id: line for line in b}
    pairs = [(line, by_id[line.id]) for line in a if line.id in by_id]
    taken = {line.id for line, _ in pairs}
    rest_a, rest_b = ([line for line in lines if line.id not in taken] for lines in (a, b))
    by_prompt: dict[str, list[LedgerLine]] = {}
    for line in rest_b:
        if line.prompt is not None:
            by_prompt.setdefault(prompt_key(line.asked), []).append(line)
    only_a = []
    for line in rest_a:
        alike = by_prompt.get(prompt_key(line.asked), []) if line.prompt is not None else []
        if alike:
            pairs.append((line, alike.pop(0)))
        else:
            only_a.append(line)
    matched = {id(y) for _, y in pairs}
    return pairs, only_a, [line for line in rest_b if id(line) not in matched]


def _changed(x: LedgerLine, y: LedgerLine) -> ChangedEdit:
    both = {k: (getattr(x, k), getattr(y, k)) for k in _COMPARED}
    return ChangedEdit(x, y, {k: v for k, v in both.items() if v[0] != v[1]})


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """The settings of a manifest by the path of their keys. Lists are settled as a whole, but for the memories."""
    if isinstance(value, Mapping):
        parts = [(f"{path}.{k}" if path else str(k), v) for k, v in value.items() if k not in _NO_SETTING]
    elif path == "memories":
        parts = [(f"memory {i}", v) for i, v in enumerate(value)]
    else:
        return {path: value}
    return {k: x for name, v in parts for k, x in _flat(v, name).items()}


def _tensors(a: MergedSource, b: MergedSource) -> dict[str, str]:
    first, second = load_tensors(a.file)[0], load_tensors(b.file)[0]
    found = {}
    for name in sorted(first.keys() | second.keys()):
        x, y = first.get(name), second.get(name)
        if x is None or y is None:
            found[name] = "only in A" if y is None else "only in B"
        elif x.dtype != y.dtype or x.shape != y.shape:
            found[name] = f"{_kind(x)} in A, {_kind(y)} in B"
        elif not torch.equal(x.view(-1).view(torch.uint8), y.view(-1).view(torch.uint8)):
            found[name] = "other numbers"
    return found


def _kind(t: torch.Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {' x '.join(str(n) for n in t.shape)}"
