"""Edits of a stream that the gate cannot tell apart: the same fact asked in other words.

Two prompts ask for the same when each would be routed to the other's key by more than any two different facts of the
pool come to one another. Where their targets differ the later edit wins, as it does for equal prompts; where they
agree, or where the records name different subjects, both are learned and the pair is reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wisecli.data.records import EditRecord
from wisecli.data.stream import squeeze
from wisecli.memory.lookup import score

_ROWS = 1024  # compared at a time


@dataclass(frozen=True)
class Conflicts:
    """`superseded`: ids of edits, each with the later edit in its place; `alike`: pairs (earlier, later) that stay."""

    superseded: Mapping[str, str]
    alike: tuple[tuple[str, str], ...] = ()


def find_conflicts(records: Sequence[EditRecord], vectors: Tensor, crowded: Tensor, bar: float) -> Conflicts:
    """Compare every record with every later one; of several that ask for the same, the last decides.

    Args:
        records: in stream order.
        vectors: of their prompts in the key space [N, r].
        crowded: their crowding [N].
        bar: score, both ways, above which two prompts ask for the same.
    """
    superseded: dict[str, str] = {}
    alike = []
    for i, j in _close(vectors.float(), crowded.float(), bar):
        one, other = records[i], records[j]
        same = _same_subject(one, other)
        if same and squeeze(one.target).casefold() != squeeze(other.target).casefold():
            superseded[one.id] = other.id
            continue
        alike.append((one.id, other.id))
        if same:  # what the stream ends with is what this one says
            superseded.pop(one.id, None)
    return Conflicts(superseded, tuple(pair for pair in alike if superseded.keys().isdisjoint(pair)))


def _close(vectors: Tensor, crowded: Tensor, bar: float) -> Iterator[tuple[int, int]]:
    """Pairs (earlier, later) whose scores both ways are above the bar, in order."""
    for at in range(0, len(vectors), _ROWS):
        some = slice(at, at + _ROWS)
        both = torch.minimum(
            score(vectors[some], vectors, crowded), score(vectors, vectors[some], crowded[some]).T
        )  # [rows, N]
        for i, j in (both > bar).nonzero().tolist():
            if at + i < j:
                yield at + i, j


def _same_subject(one: EditRecord, other: EditRecord) -> bool:
    """Whether two records may be about the same; a subject that one alone names must be in the other's prompt."""
    a, b = (squeeze(r.subject).casefold() if r.subject else None for r in (one, other))
    if a is not None and b is not None:
        return a == b
    return (a is None or a in other.prompt.casefold()) and (b is None or b in one.prompt.casefold())
