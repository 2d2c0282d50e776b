"""What every shard of a run shares, and a shard while it is being learned.

`Editor` holds a base, a config and what follows from them: edit site, the base's upper part, the pool of ordinary
prompts. `OpenShard` takes edits in as they arrive and can be read off at any time as the shard it would be if the
stream ended now. Nothing here touches the disk: `run` writes shards into a folder, `merge` makes side memories of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from wisecli.data.pool import Pool, PoolFact, pool_facts
from wisecli.data.records import EditRecord, Prompt
from wisecli.data.stream import EditStream, prompt_key
from wisecli.editing.batch import CapturedEdit, capture_edits, check_records
from wisecli.editing.config import EditConfig
from wisecli.editing.conflicts import Conflicts, find_conflicts
from wisecli.editing.kept import place
from wisecli.editing.margins import Margins, Replay, indicators_of
from wisecli.editing.negatives import about_edits, hard_negatives, kindred_negatives
from wisecli.editing.published import Published
from wisecli.editing.rehearsal import Outcome, Rehearsal
from wisecli.editing.steps import Arrived, Learning, Step, together
from wisecli.errors import InputError, ModelError, OutputError
from wisecli.memory.bits import SparseDelta, draw_mask
from wisecli.memory.keys import crowding
from wisecli.memory.lookup import alike
from wisecli.memory.shard import FAILED, FORMAT_VERSION, RUN_FORMAT, SUPERSEDED, TOOK, Gate, Shard
from wisecli.models.base import Base, context_of, dtype_name, fingerprint, matrix_of
from wisecli.models.prompts import PromptEncoder
from wisecli.models.site import find_site
from wisecli.models.upper import UpperModel
from wisecli.versions import versions

T = TypeVar("T")
KINDRED = 0.3  # how alike a pool fact of an edit's kind must be to it; nine in ten find one of their kind so close


class Editor:
    """A base made ready to be edited under one config.

    Args:
        base: loaded base; only read.
        config: of the run.
        extra_pool: more ordinary prompts to calibrate on; wordings of one question have tabs between them.
        texts: keep prompts and targets in the shards; ids alone otherwise.
        pool: all ordinary prompts, instead of the shipped ones and `extra_pool`.
    """

    def __init__(
        self,
        base: Base,
        config: EditConfig,
        *,
        extra_pool: Sequence[str] = (),
        texts: bool = True,
        pool: Pool | None = None,
    ) -> None:
        self.base, self.config, self.texts = base, config, texts
        self.encoder = PromptEncoder(base.tokenizer, chat=config.chat)
        self.site = find_site(base.model, config.layer, config.module)
        self.upper = UpperModel(base.model, self.site, self.encoder)
        self.pool = Pool.of(extra_pool) if pool is None else pool
        known = set(self.pool.prompts)
        self.facts = tuple(f for f in pool_facts() if known.issuperset(f.prompts))
        self._vectors: dict[Prompt, Tensor] = {}

    def kept_gate(self, cache: Path | None) -> Gate:
        """The gate, from a cache where it was worked out before; only on the CPU, where it is worth hashing the base.

        Args:
            cache: folder; None for none.
        """
        about = {"pool": self.pool.digest, "rank": self.config.rank, "format": FORMAT_VERSION}
        path = place(cache, "gates", self.base, self.upper, **about)
        if path is None:
            return self.gate
        with contextlib.suppress(InputError):  # none there, or a damaged one
            self.gate = Gate.load(path)
            return self.gate
        with contextlib.suppress(OutputError):  # a cache that cannot be written is no fault
            self.gate.save(path)
        return self.gate

    @cached_property
    def gate(self) -> Gate:
        """The layer's key space, and the pool in it."""
        h = self.upper.entries([self.encoder.prompt(p) for p in self.pool.prompts])
        return Gate.fit(h, torch.tensor(self.pool.group), self.config.rank)

    @cached_property
    def margins(self) -> Margins:
        """The unit of the layer's activation indicator."""
        return Margins(self.upper, self.config.margins)

    def vectors(self, prompts: Sequence[Prompt]) -> Tensor:
        """Vectors [n, r] (fp16) of prompts in the key space; a prompt seen before is not run again."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._vectors]
        if new:
            vectors = self.gate.space(self.upper.entries([self.encoder.prompt(p) for p in new])).half().cpu()
            self._vectors |= zip(new, vectors, strict=True)
        rank = self.gate.space.rank
        kept = [self._vectors[p] for p in prompts]
        return torch.stack(kept) if kept else torch.zeros(0, rank, dtype=torch.float16)

    def negatives(self, records: Sequence[EditRecord], exclude: Collection[str] = ()) -> list[str]:
        """Prompts close to these edits but out of their scope, none of them in `exclude`."""
        nearest = self._nearest_facts(records)
        strange = [r for r, fact in zip(records, nearest, strict=True) if fact is None]
        seed = self.config.seed
        made = kindred_negatives(records, nearest, self.facts, seed, exclude)
        return list(dict.fromkeys([*made, *hard_negatives(strange, seed=seed, exclude=exclude)]))

    def _nearest_facts(self, records: Sequence[EditRecord]) -> list[PoolFact | None]:
        """For each record the pool fact closest to it that is about no edit, if any is as close as facts of a kind."""
        about = set(about_edits(self.pool.prompts, records))
        place = {p: i for i, p in enumerate(self.pool.prompts)}
        facts = [f for f in self.facts if place[f.prompts[0]] not in about]
        if not facts or not records:
            return [None] * len(records)
        vectors = self.gate.pool[[place[f.prompts[0]] for f in facts]].float()
        best, at = alike(self.vectors([r.asked for r in records]).float(), vectors).max(1)
        return [facts[i] if near > KINDRED else None for near, i in zip(best.tolist(), at.tolist(), strict=True)]

    def conflicts(self, records: Sequence[EditRecord]) -> Conflicts:
        """Which of these records ask for the same fact in other words, as the gate sees it."""
        near = self.gate.trial.near
        if not len(near):
            return Conflicts({})
        vectors = self.vectors([r.asked for r in records]).float()
        ordinary = self.gate.ordinary(about_edits(self.pool.prompts, records))
        return find_conflicts(records, vectors, crowding(vectors, ordinary), float(near.max()))

    def settle(self, stream: EditStream) -> Conflicts:
        """Every superseded edit of a stream, by equal prompts or by the gate, and the pairs that stay though alike."""
        last = {prompt_key(r.asked): r.id for r in stream.records}
        by_prompt = {r.id: last[prompt_key(r.asked)] for r in stream.records if r.id in stream.superseded}
        found = self.conflicts([r for r in stream.records if r.id not in stream.superseded])
        return Conflicts({**by_prompt, **found.superseded}, found.alike)

    def check(self, records: Sequence[EditRecord]) -> None:
        """See whether the base can learn these edits, without running it.

        Raises:
            InputError: some cannot be rendered, do not fit its context or have a target it cannot say.
        """
        check_records(self.encoder, records, self.config.contexts, self.config.seed, context_of(self.base.model))

    def capture(self, records: Sequence[EditRecord]) -> list[CapturedEdit]:
        """Edits run through the frozen part, once.

        Raises:
            InputError: see `check`.
            ModelError: what the base makes of a prompt is not finite: it would have no key.
        """
        limit = context_of(self.base.model)
        captured = capture_edits(self.upper, records, self.config.contexts, self.config.seed, limit)
        wrong = next((e.record for e in captured if not e.entries.isfinite().all()), None)
        if wrong is not None:
            raise ModelError(
                f"{wrong.source or wrong.id}: what the base makes of this prompt is not finite in "
                f"{dtype_name(self.base.model.dtype)}.",
                hint="Use --dtype float32, or another layer.",
            )
        return captured

    def open(
        self, index: int, stream: EditStream, earlier: Sequence[EditRecord] = (), before: Sequence[EditRecord] = ()
    ) -> OpenShard:
        """A new, empty shard.

        Args:
            index: see `OpenShard`.
            stream: no prompt of it, edit or probe, will be a negative of the shard.
            earlier: edits of earlier streams, whose prompts will not be either.
            before: edits of earlier shards, for replay.
        """
        return OpenShard(self, index, every_prompt(stream) | {r.prompt for r in earlier}, before)

    def learn(self, stream: EditStream) -> list[Shard]:
        """The shards of a whole stream, in memory."""
        shards: list[Shard] = []
        for _ in self.learning(stream, self.settle(stream).superseded, shards):
            pass
        return shards

    def learning(self, stream: EditStream, superseded: Mapping[str, str], shards: list[Shard]) -> Iterator[int]:
        """The same, yielding how many edits have arrived.

        Args:
            superseded: edits of the stream that are not learned, each with the one that takes its place.
            shards: those learned are put here.
        """
        before: list[EditRecord] = []
        for group in grouped(list(enumerate(slices(stream.records, self.config.shards))), self.config.shards_at_once):
            some, learning = [], []
            for index, records in group:
                some.append(self.open(index, stream, before=[r for r in before if r.id not in superseded]))
                learning.append(some[-1].learning(records, superseded))
                before += records
            done = sum(len(shard.edits) for shard in shards)
            for arrived in together(self.upper, learning):
                yield done + sum(arrived)
            shards += [shard.shard() for shard in some]

    def describe(self, stream: EditStream) -> dict[str, Any]:
        """The content of run.json: all that decides the bytes of the shards."""
        model = self.base.model
        return {
            "format": RUN_FORMAT,
            "format_version": FORMAT_VERSION,
            "base": {
                "name": self.base.name,
                "revision": self.base.revision,
                "model_type": model.config.model_type,
                "dtype": dtype_name(model.dtype),
                "fingerprint": self._fingerprint,
                **({"quantization": self.base.quantization} if self.base.quantization else {}),
            },
            "site": asdict(self.site),
            "content_rule": self.encoder.rule.to_json(),
            "config": self.config.to_json(),
            "streams": [describe_stream(stream, self.config.shards, {})],
            "pool": self.pool.digest,
            "texts": self.texts,
            "versions": versions(),
        }

    @cached_property
    def _fingerprint(self) -> dict[str, str]:
        return fingerprint(matrix_of(self.base.model, self.site))


class OpenShard:
    """One shard in the making.

    Args:
        editor: what it shares with the others.
        index: position of its slice in the stream, from 0; decides its mask and its seed.
        exclude: prompts that must not become negatives.
        before: edits of earlier shards, for replay where the config asks for it.
    """

    def __init__(
        self, editor: Editor, index: int, exclude: Collection[str] = (), before: Sequence[EditRecord] = ()
    ) -> None:
        self.editor, self.index, self.exclude = editor, index, exclude
        config, site = editor.config, editor.site
        self.seed = config.mask_seed(index)
        self.mask = draw_mask((site.d_out, site.d_in), config.mask_density, self.seed)
        upper, replay = editor.upper, None
        if config.replay and before:
            replay = Replay(upper, editor.margins, before, self.seed)
        self.learner: Rehearsal | Published
        if config.schedule == "published":
            self.learner = Published(upper, self.mask, config, self.seed, editor.margins, replay)
        else:
            self.learner = Rehearsal(upper, self.mask, config, self.seed, replay=replay)
        self.records: list[EditRecord] = []
        self.captured: list[CapturedEdit] = []
        self.by: dict[str, str | None] = {}

    def learn(
        self,
        records: Sequence[EditRecord],
        superseded: Mapping[str, str | None] | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> Iterator[int]:
        """Learn a whole slice, block by block, yielding how many of its records have arrived; see `learning`."""
        for (arrived,) in together(self.editor.upper, [self.learning(records, superseded, state)]):
            yield arrived

    def learning(
        self,
        records: Sequence[EditRecord],
        superseded: Mapping[str, str | None] | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> Learning:
        """The same, giving out the steps to be taken, alone or with those of other shards.

        Args:
            records: of the slice.
            superseded: ids that are not learned, each with the edit that takes its place.
            state: the learner's, to go on from.
        """
        self.by = superseded = dict(superseded or {})
        places = [i for i, r in enumerate(records) if r.id not in superseded]
        captured = self.editor.capture([records[i] for i in places])
        if state is not None:
            self.learner.load_state(captured[: len(state["steps"])], state)
        for got in self.learner.learning(captured):
            if isinstance(got, Step):
                yield got
                continue
            here = places[got.count - 1] + 1 if got.count else 0
            self.records, self.captured = list(records[:here]), captured[: got.count]
            yield Arrived(here, got.all)
        self.records, self.captured = list(records), captured

    def arrive(self, record: EditRecord) -> None:
        """Learn one more edit, whenever it comes. One that asks what earlier edits ask takes their place."""
        (edit,) = self.editor.capture([record])
        place, *others = self._beaten(record) or (None,)
        self.by |= {self.captured[i].record.id: record.id for i in (place, *others) if i is not None}
        for i in reversed(others):
            self.learner.drop(i)
            del self.captured[i]
        if place is None:
            self.learner.arrive([edit])
            self.captured.append(edit)
        else:
            self.learner.replace(place, edit)
            self.captured[place] = edit
        self.records.append(record)

    def _beaten(self, record: EditRecord) -> list[int]:
        """Positions of the edits whose place a new one takes: those of its prompt, and those the gate says it asks."""
        found = self.editor.conflicts([*(e.record for e in self.captured), record]).superseded
        return [
            i
            for i, e in enumerate(self.captured)
            if e.record.asked == record.asked or found.get(e.record.id) == record.id
        ]

    def shard(self) -> Shard:
        """The shard as it stands."""
        editor, live = self.editor, [e.record for e in self.captured]
        outcomes = {e.record.id: o for e, o in zip(self.captured, self.learner.outcomes(), strict=True)}
        keys = {e.record.id: editor.gate.space(e.entries).half().cpu() for e in self.captured}
        mine = [keys[r.id] for r in self.records if r.id in keys]
        counts = [len(keys.get(r.id, ())) for r in self.records]
        near = editor.negatives(live, self.exclude)
        delta = self.learner.result()
        indicators = indicators_of(self.captured, delta)
        return Shard(
            index=self.index,
            delta=SparseDelta.pack(delta, self.mask),
            mask_seed=self.seed,
            keys=torch.cat(mine) if mine else torch.zeros(0, editor.gate.space.rank, dtype=torch.float16),
            owner=torch.repeat_interleave(torch.arange(len(self.records)), torch.tensor(counts, dtype=torch.long)),
            negatives=editor.vectors(near),
            edits=tuple(self._entry(r, outcomes, indicators) for r in self.records),
            details={
                "mask_density": editor.config.mask_density,
                "schedule": editor.config.schedule,
                "pool_about_edits": about_edits(editor.pool.prompts, self.records),
            },
        )

    def _entry(
        self, record: EditRecord, outcomes: Mapping[str, Outcome], indicators: Mapping[str, float]
    ) -> dict[str, Any]:
        entry: dict[str, Any] = {"id": record.id}
        if self.editor.texts:
            entry |= {"prompt": record.prompt, "target": record.target}
            entry |= {"subject": record.subject} if record.subject else {}
            entry |= {"history": [list(said) for said in record.history]} if record.history else {}
        outcome = outcomes.get(record.id)
        if outcome is None:
            by = self.by.get(record.id)
            return entry | {"outcome": SUPERSEDED, "steps": 0} | ({"by": by} if by else {})
        return entry | {
            "outcome": TOOK if outcome.took else FAILED,
            "steps": outcome.steps,
            "loss": round(outcome.loss, 4),
            "indicator": indicators[record.id],
        }


def describe_stream(stream: EditStream, shards: int, supersedes: Mapping[str, str]) -> dict[str, Any]:
    """What run.json says of a stream: which it is, its shards, and the edits of earlier streams that it replaces."""
    about = {"digest": stream.digest, "edits": len(stream.records), "format": stream.format}
    return {**about, "shards": shards, "supersedes": dict(supersedes)}


def every_prompt(stream: EditStream) -> set[str]:
    """Every prompt of a stream: edits, rephrases and probes."""
    return {text for r in stream.records for text in (r.prompt, *r.rephrases, *(p.prompt for p in r.locality))}


def grouped(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive groups of so many, the last perhaps of fewer."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def slices(records: Sequence[T], n: int) -> list[Sequence[T]]:
    """`n` consecutive slices whose sizes differ by at most one."""
    bounds = [len(records) * i // n for i in range(n + 1)]
    return [records[a:b] for a, b in pairwise(bounds)]
