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
from wisecli.data.records import EditRecord, Prompt
from wisecli.errors import InputError, WiseError
from wisecli.models.captured import CapturedRow
from wisecli.models.prompts import PromptEncoder, Row
from wisecli.models.upper import UpperModel

LONG = 64  # tokens of a prompt that brings a context of its own
ROWS, TOKENS = 128, 8192  # per batch at most when nothing is differentiated, with padding


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
    depend on its neighbours in the stream. Messages before a prompt stand in the first row alone: the edit is to hold
    in its conversation and out of it.

    Raises:
        InputError: the record cannot be rendered for this base; the message names its place.
    """
    rng = random.Random(f"{seed}|{record.id}")
    try:
        long = len(encoder.prompt(record.prompt)) > LONG
        before = [] if long else rng.sample(context_pool(), n_contexts)
        forms: list[Prompt] = [record.asked, *(f"{c} {record.prompt}" for c in before)]
        return [encoder.pair(form, record.target) for form in forms]
    except WiseError as e:
        raise InputError(f"{record.source or record.id}: {e.message}", hint=e.hint) from e


def check_records(
    encoder: PromptEncoder, records: Sequence[EditRecord], n_contexts: int, seed: int, max_length: int
) -> list[list[Row]]:
    """The token rows of each edit, after a look at whether a base can learn them all.

    Args:
        max_length: tokens the base takes.

    Raises:
        InputError: some edits cannot be learned; every one is named, with its place.
    """
    found: list[list[Row]] = []
    faults: list[InputError] = []
    for record in records:
        try:
            found.append(edit_rows(encoder, record, n_contexts, seed))
            _check_rows(encoder, record, found[-1], max_length)
        except InputError as e:
            faults.append(e)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise InputError(
            f"This base can learn {len(records) - len(faults)} of {len(records)} edits",
            hint=faults[0].hint,
            problems=[f.message for f in faults],
        )
    return found


def _check_rows(encoder: PromptEncoder, record: EditRecord, rows: Sequence[Row], max_length: int) -> None:
    place, longest = record.source or record.id, max(len(r) for r in rows)
    if longest > max_length:
        raise InputError(
            f"{place}: prompt and target take {longest} tokens, the base allows {max_length}.",
            hint="Shorten the prompt or the target; nothing is cut silently.",
        )
    if lost := encoder.unwritable(rows[0]):
        raise InputError(
            f"{place}: the base's tokenizer reads {', '.join(lost)} in the target {record.target[:60]!r}, "
            "which no answer shows.",
            hint="Write the target without special tokens, in characters that the tokenizer knows.",
        )


def capture_edits(
    upper: UpperModel, records: Sequence[EditRecord], n_contexts: int, seed: int, max_length: int | None = None
) -> list[CapturedEdit]:
    """Run the frozen part once over all rows of the given edits; with `max_length`, after `check_records`."""
    if max_length is None:
        per_edit = [edit_rows(upper.encoder, r, n_contexts, seed) for r in records]
    else:
        per_edit = check_records(upper.encoder, records, n_contexts, seed, max_length)
    captured = iter(upper.capture([row for rows in per_edit for row in rows]))
    return [CapturedEdit(r, tuple(next(captured) for _ in rows)) for r, rows in zip(records, per_edit, strict=True)]


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Positions of rows of these lengths, the short first, in batches that fit memory undifferentiated."""
    picked: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if picked and (len(picked) == ROWS or (len(picked) + 1) * lengths[i] > TOKENS):
            yield picked
            picked = []
        picked.append(i)
    if picked:
        yield picked
