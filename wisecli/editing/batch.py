"""From edit records to token rows, and from token rows to what the frozen part of the base makes of them.

Each edit gives several rows with the same target: its prompt alone, and behind short neutral sentences, so that the
edit also holds in context. The frozen part runs once per row; learning iterates on what is captured here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wisecli.data.pool import contexts as context_pool
from wisecli.data.records import EditRecord
from wisecli.errors import InputError
from wisecli.models.prompts import PromptEncoder, Row
from wisecli.models.upper import CapturedRow, UpperModel

LONG = 64  # tokens of a prompt that brings a context of its own
_ROWS, _TOKENS = 128, 8192  # per batch at most when nothing is differentiated


@dataclass(frozen=True)
class CapturedEdit:
    """One edit with its captured rows; the first is the prompt alone, the others stand behind a context."""

    record: EditRecord
    rows: tuple[CapturedRow, ...]

    @property
    def entries(self) -> Tensor:
        """The layer's input at the last content token of every row [rows, D]."""
        return torch.stack([r.entry for r in self.rows])


def edit_rows(encoder: PromptEncoder, record: EditRecord, n_contexts: int, seed: int) -> list[Row]:
    """Token rows of one edit: the prompt, then, unless it is long, the prompt behind `n_contexts` different contexts.

    Contexts are drawn per edit from the built-in pool by a generator of the edit's own, so that an edit's rows do not
    depend on its neighbours in the stream.
    """
    rng = random.Random(f"{seed}|{record.id}")
    long = len(encoder.prompt(record.prompt)) > LONG
    before = [] if long else rng.sample(context_pool(), n_contexts)
    try:
        return [
            encoder.pair(text, record.target) for text in (record.prompt, *(f"{c} {record.prompt}" for c in before))
        ]
    except InputError as e:
        raise InputError(f"{record.source or record.id}: {e.message}", hint=e.hint) from e


def capture_edits(
    upper: UpperModel, records: Sequence[EditRecord], n_contexts: int, seed: int, max_length: int | None = None
) -> list[CapturedEdit]:
    """Run the frozen part once over all rows of the given edits."""
    per_edit = [edit_rows(upper.encoder, r, n_contexts, seed) for r in records]
    for record, rows in zip(records, per_edit, strict=True):
        longest = max(len(r) for r in rows)
        if max_length is not None and longest > max_length:
            raise InputError(
                f"{record.source or record.id}: prompt and target take {longest} tokens, the base allows {max_length}.",
                hint="Shorten the prompt or the target; nothing is cut silently.",
            )
    captured = iter(upper.capture([row for rows in per_edit for row in rows]))
    return [CapturedEdit(r, tuple(next(captured) for _ in rows)) for r, rows in zip(records, per_edit, strict=True)]


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Positions of rows of these lengths, in batches that fit memory when nothing is differentiated."""
    picked: list[int] = []
    spent = 0
    for i, length in enumerate(lengths):
        if picked and (len(picked) == _ROWS or spent + length > _TOKENS):
            yield picked
            picked, spent = [], 0
        picked.append(i)
        spent += length
    if picked:
        yield picked
