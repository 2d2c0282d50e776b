"""The edits of a run folder or a side memory, one line each, in stream order.

A run folder knows when an edit was learned and what it cost; a side memory knows the memory that holds it. What one of
them does not know is None.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from wisecli.data.records import Prompt, Said, asked_behind, said_of
from wisecli.data.stream import prompt_key
from wisecli.errors import InputError, UsageError
from wisecli.inspection.source import RunSource, Source
from wisecli.memory.shard import FAILED, SUPERSEDED, TOOK, WITHDRAWN
from wisecli.memory.side_memory import EditEntry

OUTCOMES = (TOOK, FAILED, SUPERSEDED, WITHDRAWN)
_CLOSE = 3  # ids named in place of an unknown one
_KNOWN = ("subject", "shard", "steps", "loss", "by", "time", "indicator")


@dataclass(frozen=True)
class LedgerLine:
    """One edit.

    Attributes:
        id, outcome: took, failed, superseded or withdrawn.
        prompt, target: None when texts were left out; `history` holds the messages before the prompt, if any.
        shard: that learned it; `memory` of the side memory that holds it, -1 for main memory.
        by: the edit that superseded it, where that is known.
        time: when it was learned, ISO-8601 in UTC.
        indicator: what its prompt reaches under the delta that holds it (eq. 3).
        more: what else is written of it.
    """

    id: str
    outcome: str
    prompt: str | None = None
    target: str | None = None
    history: tuple[Said, ...] | None = None
    subject: str | None = None
    shard: int | None = None
    memory: int | None = None
    steps: int | None = None
    loss: float | None = None
    by: str | None = None
    time: str | None = None
    indicator: float | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def asked(self) -> Prompt:
        """The prompt as it is put to a base; to be asked for where texts are known."""
        return asked_behind(self.history, str(self.prompt))

    @property
    def in_force(self) -> bool:
        """Whether the edit is one that its prompt should be answered by."""
        return self.outcome in (TOOK, FAILED)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def ledger_of(source: Source) -> list[LedgerLine]:
    """The edits of a run folder or a side memory, in stream order.

    Raises:
        InputError: the ledger of a run folder is damaged.
    """
    if isinstance(source, RunSource):
        return _settled(_run_lines(source))
    return _settled([_of_entry(e) for e in source.side_memory.edits])


def select(
    lines: Sequence[LedgerLine], *, outcome: str | None = None, grep: str | None = None, last: int | None = None
) -> list[LedgerLine]:
    """The lines that fit.

    Args:
        outcome: one of `OUTCOMES`.
        grep: text to be found in id, prompt, target or subject, whatever the case.
        last: how many of those that fit, from the end.

    Raises:
        UsageError: there is no such outcome.
    """
    if outcome is not None and outcome not in OUTCOMES:
        raise UsageError(f"Unknown outcome {outcome!r}.", hint=f"Use {', '.join(OUTCOMES)}.")
    wanted = grep.casefold() if grep else ""
    found = [line for line in lines if outcome in (None, line.outcome) and _has(line, wanted)]
    return found if last is None else found[max(0, len(found) - last) :]


def find(lines: Sequence[LedgerLine], edit: str, where: object) -> LedgerLine:
    """The line of an edit.

    Raises:
        InputError: there is none; the ids closest to it are named.
    """
    for line in lines:
        if line.id == edit:
            return line
    close = get_close_matches(edit, [line.id for line in lines], n=_CLOSE, cutoff=0.4)
    hint = f"Did you mean {', '.join(close)}?" if close else f"wise log {where} lists the edits."
    raise InputError(f"{where} has no edit {edit!r}.", hint=hint)


def outcome_of(entry: EditEntry) -> str:
    """What became of an edit of a side memory."""
    return str(entry.details.get("outcome") or (TOOK if entry.took else FAILED))


def counts(lines: Iterable[LedgerLine]) -> dict[str, int]:
    """Edits per outcome, in the order of `OUTCOMES`; outcomes of no edit are left out."""
    seen = Counter(line.outcome for line in lines)
    return {o: seen[o] for o in (*OUTCOMES, *sorted(seen.keys() - set(OUTCOMES))) if seen[o]}


def _run_lines(source: RunSource) -> list[LedgerLine]:
    try:
        return [_of_mapping(line) for line in source.run.ledger()]
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InputError(
            f"{source.run.ledger_path} is damaged: {type(e).__name__} {e}.",
            hint="Run the same wise edit command again; it writes the ledger anew.",
        ) from e


def _of_mapping(line: Mapping[str, Any]) -> LedgerLine:
    named = ("id", "outcome", "prompt", "target", "history", "memory", *_KNOWN)
    given = {k: line[k] for k in named if line.get(k) is not None}
    more = {k: v for k, v in line.items() if k not in named}
    given |= {"history": said_of(line["history"])} if line.get("history") else {}
    return LedgerLine(**{"id": str(line["id"]), "outcome": str(line["outcome"])} | given, more=more)


def _of_entry(entry: EditEntry) -> LedgerLine:
    known = {k: entry.details[k] for k in _KNOWN if k in entry.details}
    more = {k: v for k, v in entry.details.items() if k not in (*_KNOWN, "outcome")}
    texts = (entry.prompt, entry.target, entry.history)
    line = LedgerLine(entry.id, outcome_of(entry), *texts, memory=entry.memory)
    return replace(line, **known, more=more)


def _settled(lines: list[LedgerLine]) -> list[LedgerLine]:
    """With what superseded an edit where it was not written down: of equal prompts the last one counts."""
    last = {prompt_key(line.asked): line.id for line in lines if line.prompt is not None and line.in_force}
    return [
        replace(line, by=last.get(prompt_key(line.asked)))
        if line.outcome == SUPERSEDED and line.by is None and line.prompt is not None
        else line
        for line in lines
    ]


def _has(line: LedgerLine, wanted: str) -> bool:
    texts = (line.id, line.prompt, line.target, line.subject)
    return not wanted or any(wanted in text.casefold() for text in texts if text)
