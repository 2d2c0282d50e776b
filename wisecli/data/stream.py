"""Read a file of edits into an `EditStream`: ordered, checked as a whole, with its clashes named.

Every fault of every record is found before anything is raised, so that a file is mended in one go. Two records with the
same prompt are reported - the same target again is a duplicate, another target a contradiction, which the later edit
wins - but both stay in the stream: dropping edits is not for a reader to decide.

It does not look for clashes between different wordings of a fact, and no model is involved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any

from wisecli.data.formats import NATIVE_KEYS, SCHEMA, Mapped, accepted, map_record
from wisecli.data.records import Conversation, EditRecord, Prompt, ordered_ids
from wisecli.data.source import RawRecord, read_raw
from wisecli.errors import InputError, UsageError


@dataclass(frozen=True, slots=True)
class Clash:
    """Two records with the same prompt, by id: the last one before, and the later one."""

    first: str
    later: str


@dataclass(frozen=True, slots=True)
class EditStream:
    """Edits in the order in which they are to be learned.

    Args:
        records: all of them; nothing is dropped.
        format: the format they were written in; several are joined with " + ".
        warnings: what was read but looks like a slip.
        digest: SHA-256 over the canonical JSON of the records; the same edits give the same digest.
        duplicates: same prompt, same target.
        contradictions: same prompt, another target.
        superseded: ids of the records whose prompt ends the stream with another target.
    """

    records: tuple[EditRecord, ...]
    format: str = "native"
    warnings: tuple[str, ...] = ()
    digest: str = ""
    duplicates: tuple[Clash, ...] = ()
    contradictions: tuple[Clash, ...] = ()
    superseded: frozenset[str] = frozenset()

    @classmethod
    def of(cls, records: Sequence[EditRecord], format: str = "native", warnings: Sequence[str] = ()) -> EditStream:
        """A stream of records made in Python, with its digest and clashes worked out."""
        duplicates, contradictions, superseded = _clashes(records)
        return cls(tuple(records), format, tuple(warnings), _digest(records), duplicates, contradictions, superseded)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[EditRecord]:
        return iter(self.records)


def read_edits(path: str | PathLike[str], limit: int | None = None) -> EditStream:
    """Read a file of edits in any accepted format.

    Args:
        path: JSONL, a JSON array or an object holding one list, gzip or not; or Parquet (needs pyarrow).
        limit: read only the first so many records.

    Raises:
        InputError: the file cannot be read, or records in it cannot be used; `problems` lists every fault.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the limit is {limit}, but must be at least 1", hint="Leave it out to read every edit.")
    path = Path(path)
    return _stream(read_raw(path, limit), path.name)


def edits_of(values: Iterable[EditRecord | Mapping[str, Any]]) -> EditStream:
    """A stream of records, or of objects in any accepted format, just as a file that holds them would give.

    Raises:
        InputError: some of them cannot be used; `problems` lists every fault.
    """
    found = [v.to_json() if isinstance(v, EditRecord) else dict(v) if isinstance(v, Mapping) else v for v in values]
    return _stream([RawRecord(f"edits[{i}]", v) for i, v in enumerate(found)], "the edits given")


def _stream(raw: Sequence[RawRecord], name: str) -> EditStream:
    mapped = [Mapped("", problems=(r.problem,)) if r.problem else map_record(r.value) for r in raw]
    faults = _faults(raw, mapped)
    if faults:
        raise _refusal(name, faults, len(raw))
    ids = ordered_ids(
        [m.values["id"] for m in mapped],
        [(m.values["prompt"].rstrip(), m.values["target"].strip()) for m in mapped],
    )
    records = [
        EditRecord(**m.values | {"id": each, "source": r.where}) for r, m, each in zip(raw, mapped, ids, strict=True)
    ]
    formats = " + ".join(dict.fromkeys(m.format for m in mapped))
    return EditStream.of(records, formats, _unknown_keys(raw, mapped))


def _faults(raw: Sequence[RawRecord], mapped: Sequence[Mapped]) -> list[tuple[str, ...]]:
    """The faults of each faulty record, each with its place; an id used before is one."""
    found = []
    seen: dict[str, str] = {}
    for record, result in zip(raw, mapped, strict=True):
        problems = list(result.problems)
        name = result.values.get("id")
        if name is not None and seen.setdefault(name, record.where) != record.where:
            problems.append(f'the id "{name}" is already used by {seen[name]}')
        if problems:
            found.append(tuple(f"{record.where}: {problem}" for problem in problems))
    return found


def _refusal(name: str, faults: Sequence[tuple[str, ...]], total: int) -> InputError:
    return InputError(
        f"{len(faults)} of {total} record{'s' if total > 1 else ''} in {name} cannot be used",
        hint=f"Write one edit per line, as JSON: {SCHEMA}. Accepted formats: {accepted()}.",
        problems=[problem for record in faults for problem in record],
    )


def _unknown_keys(raw: Sequence[RawRecord], mapped: Sequence[Mapped]) -> list[str]:
    """One warning per key that the native schema does not have, with the key it may be meant to be."""
    places: dict[str, list[str]] = {}
    for record, result in zip(raw, mapped, strict=True):
        for key in result.unknown:
            places.setdefault(key, []).append(record.where)
    return [_unknown_key(key, where) for key, where in places.items()]


def _unknown_key(key: str, where: Sequence[str]) -> str:
    close = get_close_matches(key.casefold(), NATIVE_KEYS, n=1, cutoff=0.6)
    meant = f'; did you mean "{close[0]}"?' if close else ""
    more = f" and {len(where) - 1} more" if len(where) > 1 else ""
    return f'{where[0]}{more}: unknown key "{key}", kept in "meta"{meant}'


def _clashes(records: Sequence[EditRecord]) -> tuple[tuple[Clash, ...], tuple[Clash, ...], frozenset[str]]:
    """Duplicates, contradictions, and the ids whose prompt has another target at the end of the stream."""
    last: dict[str, EditRecord] = {}
    duplicates: list[Clash] = []
    contradictions: list[Clash] = []
    for record in records:
        key = prompt_key(record.asked)
        before = last.get(key)
        if before is not None:
            same = squeeze(before.target) == squeeze(record.target)
            (duplicates if same else contradictions).append(Clash(before.id, record.id))
        last[key] = record
    finals = {key: squeeze(record.target) for key, record in last.items()}
    beaten = (r.id for r in records if finals[prompt_key(r.asked)] != squeeze(r.target))
    return tuple(duplicates), tuple(contradictions), frozenset(beaten)


def prompt_key(prompt: Prompt) -> str:
    """What two prompts that ask the same have in common: they may differ in white space and capitals."""
    said = [m["content"] for m in prompt.messages] if isinstance(prompt, Conversation) else [prompt]
    return "\n".join(squeeze(text).casefold() for text in said)


def squeeze(text: str) -> str:
    """The text with every run of white space as one space; two targets may differ in capitals and mean it."""
    return " ".join(text.split())


def _digest(records: Sequence[EditRecord]) -> str:
    """SHA-256 over one line of canonical JSON per record."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record.to_json(), sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()
