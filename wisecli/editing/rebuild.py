"""Learn shards anew without the edits that were withdrawn from them, so that nothing of those is left in a run folder.

Withdrawing marks an edit; its values, keys and text stay in its shard, and merging leaves them out of reach. Here each
shard that holds such an edit is learned again from what the ledger knows of the others, with the shard's own mask and
seeds, and takes the old one's place: of a withdrawn edit its id alone is left. A shard is replaced in one step, so an
interrupted rebuild goes on with the shards that still hold something. Side memories made before hold it still, and with
replay later shards, which were kept quiet on its prompt. A run folder keeps no prompts that only asked: a negative of a
rebuilt shard may be one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import torch

from wisecli.data.records import EditRecord
from wisecli.editing.config import EditConfig
from wisecli.editing.editor import Editor, OpenShard
from wisecli.editing.merge import check_base
from wisecli.errors import InputError
from wisecli.memory.files import read_lines
from wisecli.memory.shard import SUPERSEDED, WITHDRAWN, RunFolder, Shard
from wisecli.models.base import Base


@dataclass(frozen=True)
class RebuildPlan:
    """What a rebuild has to do.

    Attributes:
        shards: those that hold something of a withdrawn edit.
        edits: others in them, to be learned anew.
        seconds: that learning these shards took the first time, until their last edit arrived; None where the journal
            does not say.
    """

    shards: tuple[int, ...]
    edits: int
    seconds: float | None


def plan_rebuild(run: RunFolder, withdrawn: Collection[str] = ()) -> RebuildPlan:
    """What it takes to be rid of the withdrawn edits.

    Args:
        withdrawn: ids that shall be, besides those that are.

    Raises:
        InputError: texts were left out of the shards, so that nothing can be learned anew.
    """
    gone = run.withdrawn.union(withdrawn)
    held: dict[int, list[dict[str, Any]]] = {}
    for entry in run.entries():
        held.setdefault(entry["shard"], []).append(entry)
    shards = tuple(i for i, entries in held.items() if any(e["id"] in gone and _left(e) for e in entries))
    others = [e for i in shards for e in held[i] if e["id"] not in gone and e["outcome"] != SUPERSEDED]
    if shards and not run.run["texts"]:
        raise InputError(
            f"{run.path} holds no texts, so its shards cannot be learned anew.",
            hint="Learn the other edits again with wise edit; without --rebuild the gate is closed to those withdrawn.",
        )
    spans = _spans(run)
    known = [spans[i] for i in shards if i in spans]
    return RebuildPlan(shards, len(others), sum(known) if len(known) == len(shards) else None)


class Rebuild:
    """Learn the shards of a plan anew; iterate to do it.

    Args:
        base: the run's, loaded.
        run: the folder.
        extra_pool: as the run was given.
        withdraw: edits to withdraw first, once it is sure that their shards can be learned anew.

    Raises:
        BaseMismatch: the base is not the run's.
        InputError: the pool is not the run's, or texts were left out.
    """

    def __init__(
        self, base: Base, run: RunFolder, extra_pool: Sequence[str] = (), withdraw: Collection[str] = ()
    ) -> None:
        self.plan = plan_rebuild(run, withdraw)
        check_base(run, base)
        config = EditConfig.from_json(run.run["config"])
        self.editor = Editor(base, config, extra_pool=extra_pool, texts=True)
        if self.editor.pool.digest != run.run["pool"]:
            raise InputError(f"{run.path} was learned with another pool.", hint="Give that one with --pool.")
        self.editor.gate = run.gate()
        self.run = run.withdraw(withdraw) if withdraw else run

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yields the edits learned so far and their total; a shard is in its place when the next one begins."""
        done, entries = 0, self.run.entries()
        prompts = {e["prompt"] for e in entries if "prompt" in e and e["id"] not in self.run.withdrawn}
        with self.run.lock():
            for index in self.plan.shards:
                before = [e for e in entries if e["shard"] < index and e["outcome"] not in (SUPERSEDED, WITHDRAWN)]
                mine = [e for e in entries if e["shard"] == index]
                shard = OpenShard(self.editor, index, prompts, [EditRecord.of_entry(e) for e in before])
                kept = [e for e in mine if e["outcome"] != WITHDRAWN]
                superseded = {e["id"]: e.get("by") for e in kept if e["outcome"] == SUPERSEDED}
                for arrived in shard.learn([EditRecord.of_entry(e) for e in kept], superseded):
                    yield done + sum(e["id"] not in superseded for e in kept[:arrived]), self.plan.edits
                done += len(kept) - len(superseded)
                gone = [e["id"] for e in mine if e["outcome"] == WITHDRAWN]
                self.run.rebuilt(index, gone, _with_gaps(shard.shard(), [e["id"] for e in mine]))
                yield done, self.plan.edits


def _left(entry: Mapping[str, Any]) -> bool:
    """Whether a shard still holds something of an edit but its id."""
    return "loss" in entry or "prompt" in entry


def _with_gaps(shard: Shard, ids: Sequence[str]) -> Shard:
    """The shard with an entry for each of these ids, in their order: those it does not hold were withdrawn."""
    held = {e["id"]: e for e in shard.edits}
    place = torch.tensor([i for i, edit in enumerate(ids) if edit in held], dtype=torch.long)
    entries = tuple(held.get(edit, {"id": edit, "outcome": WITHDRAWN, "steps": 0}) for edit in ids)
    return replace(shard, edits=entries, owner=place[shard.owner])


def _spans(run: RunFolder) -> dict[int, float]:
    """Seconds that learning each shard took, by the journal."""
    spans: dict[int, float] = {}
    last: dict[int, datetime] = {}
    for event in read_lines(run.journal_path):
        if event.get("event") not in ("begun", "learned"):
            continue
        index, now = event["shard"], datetime.fromisoformat(event["time"])
        if event["event"] == "learned" and index in last:
            taken = (now - last[index]).total_seconds() / event.get("at_once", 1)  # the others' share of the time
            spans[index] = spans.get(index, 0.0) + taken
        last[index] = now
    return spans
