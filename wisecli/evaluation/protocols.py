"""Protocols that make edits themselves: learn a stream and ask while learning, average over rollbacks.

They drive an editor and ask its base in between; every state that is asked is attached and detached, and no weight is
written, so going back to the base costs nothing and is exact. What has been asked is kept in the answer cache: after an
interruption learning is repeated where it must be, asking is not. End-of-stream evaluation of a side memory that exists
already is `evaluate`; WilKE's protocol is `wilke`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wisecli.cache import digest_of
from wisecli.data.stream import EditStream
from wisecli.editing.config import EditConfig
from wisecli.editing.editor import Editor, OpenShard, slices
from wisecli.editing.merge import MergeConfig, merge_run, merge_shards
from wisecli.editing.run import EditRun
from wisecli.errors import InputError, UsageError
from wisecli.evaluation.asking import Asker, Progress, Steps, drain
from wisecli.evaluation.evaluate import (
    EvalOptions,
    EvalReport,
    Findings,
    ask_everything,
    asker_for,
    make_report,
)
from wisecli.evaluation.questions import Item, questions_of
from wisecli.evaluation.scores import plain, scores_of
from wisecli.evaluation.store import AnswerStore
from wisecli.memory.shard import Shard
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base, weights_digest
from wisecli.routing.attach import Attached, attach

FRESH, BOTH, ROLLBACK = "fresh", "both", "rollback"
TEXTS = {
    FRESH: "each edit is asked right after the block of edits it arrived with, in the memory that has just learned it; "
    "nothing is asked again at the end of the stream",
    BOTH: "each edit is asked right after the block of edits it arrived with, in the memory that has just learned it, "
    "and everything again at the end of the stream; at checkpoints everything learned so far is merged and asked",
    ROLLBACK: "the stream is cut into sequences of T edits; each is learned from the untouched base, asked after its "
    "last edit, and rolled back; scores are over all sequences of the largest T",
}


def checkpoints_of(edits: int) -> list[int]:
    """1, 10, 100, ... below the length of the stream."""
    return [10**k for k in range(len(str(edits))) if 10**k < edits]


def router_of(config: EditConfig, options: EvalOptions) -> str:
    """The one router of an evaluation that learns: what was asked for, else what the schedule goes with."""
    return options.router or ("activation" if config.schedule == "published" else "key")


def attached_by(base: Base, sm: SideMemory, router: str) -> Attached:
    """Attach with this router and no other: a memory without a threshold for it, as when no edit took, stays shut."""
    memories = tuple(
        m if m.epsilon.get(router) is not None else replace(m, epsilon={**m.epsilon, router: inf}) for m in sm.memories
    )
    return attach(base.model, replace(sm, memories=memories), router=router)


class StreamEvaluation:
    """Learn a stream into a folder, merge it, evaluate it: `wise edit`, `wise merge` and `wise eval` in one.

    Args:
        base, stream, config: as for `EditRun`.
        out: folder for shards and side memory.
        protocol: "end-of-stream", "fresh" or "both".
        how: merge settings.
        options: see `EvalOptions`.
    """

    def __init__(
        self,
        base: Base,
        stream: EditStream,
        config: EditConfig,
        out: Path,
        protocol: str,
        how: MergeConfig | None = None,
        options: EvalOptions | None = None,
    ) -> None:
        self.base, self.protocol = base, protocol
        self.options = options or EvalOptions()
        self.how = how or MergeConfig()
        self.while_learning = protocol in (FRESH, BOTH)
        if self.while_learning:  # what arrives is asked in the one memory that has just learned it
            config = replace(config, shards_at_once=1)
        self.run = EditRun(
            base, stream, config, out / "shards", checkpoints=not self.while_learning, cache=self.options.cache
        )
        self.stream = _without(stream, self.run.settled.superseded)
        self.path = out / "sm.safetensors"
        self.fresh: list[Item] = []
        self.curve: list[dict[str, Any]] = []
        self.router = router_of(config, self.options)
        self.asker = asker_for(base, self.stream, config.chat, self.options)
        self.report: EvalReport | None = None

    def __iter__(self) -> Iterator[Progress]:
        """Learn and ask, yielding progress; `report` is set at the end.

        Raises:
            InputError: the folder holds shards whose edits were not asked while they were learned.
        """
        started = time.perf_counter()
        asker = self.asker
        yield from asker.before()
        yield from self._learn(asker)
        learned = time.perf_counter()
        yield Progress("merging", 0, 1)
        side_memory = merge_run(self.run.folder, base=self.base, cache=self.options.cache, **vars(self.how))
        side_memory.save(self.path)
        asker.seconds["merging"] = time.perf_counter() - learned
        yield Progress("merging", 1, 1)
        with attached_by(self.base, side_memory, self.router) as attached:
            if self.protocol == FRESH:
                findings = Findings(self.fresh)
            else:
                findings = yield from ask_everything(asker, self.stream, attached, self.options)
            about: dict[str, Any] = {"name": self.protocol}
            about |= {"text": TEXTS[self.protocol]} if self.protocol in TEXTS else {}
            about |= {"checkpoints": [p["edits"] for p in self.curve]} if self.curve else {}
            options = replace(self.options, side_memory=str(self.path))
            report = make_report(asker, self.stream, findings, attached, options, about, started)
        self.report = self._with_fresh(report)

    def close(self) -> None:
        """Drop what was kept to go on after an interruption; to be called when the report is safe."""
        self.asker.close()

    # -- while learning ------------------------------------------------------------------------------------------------

    def _learn(self, asker: Asker) -> Iterator[Progress]:
        about = {"run": digest_of(self.run.folder.run), "merge": digest_of(str(self.how)), "router": self.router}
        store = asker.store({"protocol": self.protocol, **about})
        goals = checkpoints_of(len(self.stream)) if self.protocol == BOTH else []
        if self.while_learning:
            self._recall(store)
        goals = [p for p in goals if all(point["edits"] < p for point in self.curve)]
        started, waited = time.perf_counter(), 0.0
        for step in self.run:
            yield Progress("learning", step.done, step.total)
            if not self.run.open or not self.while_learning:
                continue
            (shard,) = self.run.open
            paused = time.perf_counter()
            yield from self._ask_arrived(asker, shard, store)
            if any(p <= step.done for p in goals):
                goals = [p for p in goals if p > step.done]
                yield from self._ask_all_so_far(asker, shard, store, step.done)
            self._note_end(shard, store)
            waited += time.perf_counter() - paused
        asker.seconds["learning"] = time.perf_counter() - started - waited

    def _recall(self, store: AnswerStore | None) -> None:
        """Take up what was asked while finished shards were learned."""
        for index in range(self.run.config.shards):
            path = self.run.folder.shard_path(index)
            if not path.exists():
                continue
            kept = store.get(f"shard {index}") if store is not None else None
            if kept is None:
                raise InputError(
                    f"{path} is learned already, and what its edits were asked meanwhile is not at hand.",
                    hint="Choose another folder with --out.",
                )
            self.fresh += [Item.from_json(i) for i in kept["fresh"]]
            self.curve += kept["curve"]

    def _ask_arrived(self, asker: Asker, shard: OpenShard, store: AnswerStore | None) -> Steps[None]:
        """Ask the edits that have just arrived, in the memory that has just learned them."""
        known = {i.question.edit for i in self.fresh}
        new = {e.record.id for e in shard.captured} - known
        key = f"fresh {shard.index} {len(shard.captured)}"
        kept = store.get(key) if store is not None else None
        if kept is None:
            which = sorted(i for edit in new for i in asker.places.get(edit, ()))
            with attached_by(self.base, self._memory([shard.shard()], rehearse=False), self.router) as attached:
                items = yield from asker.after(attached, which, stage="fresh", kept=False)
            if store is not None:
                store.put(key, [i.to_json() for i in items])
        else:
            items = [Item.from_json(i) for i in kept]
        self.fresh += items

    def _ask_all_so_far(self, asker: Asker, shard: OpenShard, store: AnswerStore | None, done: int) -> Steps[None]:
        """A point of the retention curve: merge what is learned so far, ask all of it."""
        key = f"checkpoint {done}"
        scores = store.get(key) if store is not None else None
        if scores is None:
            finished = [Shard.load(self.run.folder.shard_path(i)) for i in range(shard.index)]
            so_far = {r.id for r in self.stream.records[:done]}
            which = sorted(i for edit in so_far for i in asker.places.get(edit, ()))
            memory = self._memory([*finished, shard.shard()], self.how.rehearse)
            with attached_by(self.base, memory, self.router) as attached:
                scores = plain((yield from asker.after(attached, which, stage="checkpoint", kept=False)))
            if store is not None:
                store.put(key, scores)
        self.curve.append({"edits": done, "scores": scores})

    def _note_end(self, shard: OpenShard, store: AnswerStore | None) -> None:
        """When a shard's last edit has been asked, keep everything under the shard."""
        records = slices(self.stream.records, self.run.config.shards)[shard.index]
        live = [r.id for r in records if r.id not in self.run.settled.superseded]
        if store is None or len(shard.captured) < len(live):
            return
        end = sum(len(s) for s in slices(self.stream.records, self.run.config.shards)[: shard.index])
        mine = [i.to_json() for i in self.fresh if i.question.edit in live]
        curve = [p for p in self.curve if end < p["edits"] <= end + len(records)]
        store.put(f"shard {shard.index}", {"fresh": mine, "curve": curve})

    def _memory(self, shards: Sequence[Shard], rehearse: bool) -> SideMemory:
        """The side memory of shards in memory. Without rehearsal the base is needed for the activation router only."""
        editor = self.run.editor
        upper = editor.upper if rehearse or self.router == "activation" else None
        weights = None if self.how.weights is None else list(self.how.weights)[: len(shards)]
        how = replace(self.how, rehearse=rehearse, weights=weights)
        return merge_shards(shards, editor.gate, self.run.folder.run, upper=upper, how=how)

    def _with_fresh(self, report: EvalReport) -> EvalReport:
        if not self.while_learning:
            return report
        sections: dict[str, Any] = {}
        if self.protocol == BOTH:
            end = {"edits": len(self.stream), "scores": plain(report.items)}
            sections["retention"] = [*self.curve, end]
            sections["fresh"] = {"scores": scores_of(self.fresh), "items": [i.to_json() for i in self.fresh]}
        return report.with_sections(**sections)


# -- rollbacks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollback:
    """What sequences of `t` edits, each learned from the base and rolled back, came to.

    Attributes:
        groups: number of sequences.
        left_out: edits at the end of the stream that fill no sequence.
        identical: whether the base gave the same logits, bit for bit, after every rollback as before the first edit,
            and its weights were the same, bit for bit, after the last.
    """

    t: int
    groups: int
    left_out: int
    items: tuple[Item, ...]
    identical: bool

    def to_json(self) -> dict[str, Any]:
        numbers = {"t": self.t, "groups": self.groups, "left_out": self.left_out, "identical": self.identical}
        return {**numbers, "scores": scores_of(self.items)}


def check_sizes(sizes: Sequence[int], stream: EditStream) -> None:
    """Refuse lengths of sequences that a stream cannot be cut into.

    Raises:
        UsageError: there is none, or one is not between 1 and the length of the stream.
    """
    wrong = [t for t in sizes if not 1 <= t <= len(stream)]
    if wrong or not sizes:
        raise UsageError(
            f"T must lie between 1 and the {len(stream)} edits of the stream, not {wrong}.",
            hint="Give sizes separated by commas, as --t 1,10,100.",
        )


class RollbackEvaluation:
    """Average over rollbacks: sequences of T edits, each learned from the untouched base, asked, and rolled back.

    Args:
        sizes: the values of T. Edits that do not fill a last sequence are left out for that T.

    Raises:
        UsageError: a size is not between 1 and the length of the stream.
    """

    def __init__(
        self,
        base: Base,
        stream: EditStream,
        config: EditConfig,
        sizes: Sequence[int],
        how: MergeConfig | None = None,
        options: EvalOptions | None = None,
    ) -> None:
        check_sizes(sizes, stream)
        self.base, self.stream, self.sizes = base, stream, sorted(set(sizes))
        self.how, self.options = how or MergeConfig(), options or EvalOptions()
        self.editor = Editor(base, config)
        self.router = router_of(config, self.options)
        self.asker = asker_for(base, stream, config.chat, self.options, everything=True)
        self.report: EvalReport | None = None

    def __iter__(self) -> Iterator[Progress]:
        """Learn, ask and roll back, yielding progress; `report` is set at the end."""
        started = time.perf_counter()
        asker, options = self.asker, self.options
        yield from asker.before()
        probe = _Probe.of(self.base)
        found = []
        for t in self.sizes:
            found.append((yield from self._sequences(asker, t, probe)))
        about = {"name": ROLLBACK, "t": self.sizes, "router": self.router, "text": TEXTS[ROLLBACK]}
        report = make_report(asker, self.stream, Findings(found[-1].items), None, options, about, started)
        last = self.editor.config
        self.report = report.with_sections(
            method=f"WISE, {last.schedule} schedule, {self.how.method} merge, {self.router} router",
            seeds={**report.sections["seeds"], "edit": last.seed},
            config=last.to_json(),
            rollbacks=[r.to_json() for r in found],
        )

    def close(self) -> None:
        """Drop what was kept to go on after an interruption; to be called when the report is safe."""
        self.asker.close()

    def _sequences(self, asker: Asker, t: int, probe: _Probe) -> Steps[Rollback]:
        records = self.stream.records
        groups = [records[at : at + t] for at in range(0, len(records) - t + 1, t)]
        items: list[Item] = []
        identical = True
        for k, group in enumerate(groups):
            yield Progress(f"T={t}", k, len(groups))
            stream = EditStream.of(group)
            wanted = set(questions_of(_without(stream, self.editor.settle(stream).superseded)))
            which = [i for r in group for i in asker.places.get(r.id, ()) if asker.questions[i] in wanted]
            items += self._sequence(asker, stream, which)
            identical = identical and probe.same(self.base)
        yield Progress(f"T={t}", len(groups), len(groups))
        identical = identical and probe.same_weights(self.base)
        return Rollback(t, len(groups), len(records) - t * len(groups), tuple(items), identical)

    def _sequence(self, asker: Asker, stream: EditStream, which: Sequence[int]) -> list[Item]:
        """Learn one sequence from the base, ask it, and leave the base as it was."""
        editor = copy.copy(self.editor)
        editor.gate = self.editor.gate  # worked out once
        editor.config = replace(editor.config, shards=min(editor.config.shards, len(stream)))
        run = editor.describe(stream)
        about = {"run": digest_of(run), "merge": digest_of(str(self.how)), "router": self.router}
        store = asker.store({"protocol": ROLLBACK, **about})
        kept = store.get("items") if store is not None else None
        if kept is not None:
            return [Item.from_json(i) for i in kept]
        started = time.perf_counter()
        side_memory = merge_shards(editor.learn(stream), editor.gate, run, upper=editor.upper, how=self.how)
        asker.seconds["learning"] = asker.seconds.get("learning", 0.0) + time.perf_counter() - started
        with attached_by(self.base, side_memory, self.router) as attached:
            items = drain(asker.after(attached, which, kept=False))
        if store is not None:
            store.put("items", [i.to_json() for i in items])
        return items


def _without(stream: EditStream, superseded: Collection[str]) -> EditStream:
    """The stream as it is asked: what the gate found superseded is not learned, and not asked either."""
    return replace(stream, superseded=stream.superseded.union(superseded))


@dataclass(frozen=True)
class _Probe:
    """What the base was before the first edit: its logits on a fixed row of tokens, and a digest of its weights."""

    logits: Tensor
    weights: str | None

    @classmethod
    def of(cls, base: Base) -> _Probe:
        return cls(cls._logits(base), weights_digest(base.model))

    def same(self, base: Base) -> bool:
        return torch.equal(self._logits(base), self.logits)

    def same_weights(self, base: Base) -> bool:
        return weights_digest(base.model) == self.weights

    @staticmethod
    @torch.no_grad()
    def _logits(base: Base) -> Tensor:
        vocab = base.model.config.get_text_config().vocab_size
        ids = (torch.arange(16) * 31 % vocab)[None].to(base.model.device)
        return base.model(input_ids=ids, use_cache=False).logits
