"""Protocols that make edits themselves: learn a stream and ask while learning, average over rollbacks.

They drive an editor and ask its base in between; every state that is asked is attached and detached, and no weight is
written, so going back to the base costs nothing and is exact. What has been asked is kept in the answer cache: after an
interruption learning is repeated where it must be, asking is not. End-of-stream evaluation of a side memory that exists
already is `evaluate`; WilKE's protocol is `wilke`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wisecli.data.stream import EditStream
from wisecli.editing.config import EditConfig
from wisecli.editing.editor import Editor, OpenShard, slices
from wisecli.editing.merge import MergeConfig, merge_run, merge_shards
from wisecli.editing.run import EditRun
from wisecli.errors import UsageError
from wisecli.evaluation.asking import Asker, Progress, Steps, drain
from wisecli.evaluation.evaluate import (
    EvalOptions,
    EvalReport,
    Findings,
    ask_everything,
    asker_for,
    make_report,
)
from wisecli.evaluation.questions import Item, questions_about
from wisecli.evaluation.scores import plain, scores_of
from wisecli.evaluation.store import AnswerStore, digest_of
from wisecli.memory.shard import Shard
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base
from wisecli.routing.attach import attach

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


def by_activation(config: EditConfig, options: EvalOptions) -> bool:
    """Whether side memories of this run are routed by activation, which needs the base for calibration."""
    return (options.router or ("activation" if config.schedule == "published" else "key")) == "activation"


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
        self.base, self.stream, self.protocol = base, stream, protocol
        self.options = options or EvalOptions()
        self.how = how or MergeConfig()
        self.run = EditRun(base, stream, config, out / "shards")
        self.path = out / "sm.safetensors"
        self.while_learning = protocol in (FRESH, BOTH)
        self.fresh: list[Item] = []
        self.curve: list[dict[str, Any]] = []
        self.report: EvalReport | None = None

    def __iter__(self) -> Iterator[Progress]:
        """Learn and ask, yielding progress; `report` is set at the end."""
        started = time.perf_counter()
        config = self.run.config
        asker = asker_for(self.base, self.stream, config.chat, self.options)
        yield from asker.before()
        yield from self._learn(asker)
        learned = time.perf_counter()
        yield Progress("merging", 0, 1)
        side_memory = merge_run(self.run.folder, base=self.base, **vars(self.how))
        side_memory.save(self.path)
        asker.seconds["merging"] = time.perf_counter() - learned
        yield Progress("merging", 1, 1)
        with attach(self.base.model, side_memory, router=self.options.router) as attached:
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
        asker.close()

    # -- while learning ------------------------------------------------------------------------------------------------

    def _learn(self, asker: Asker) -> Iterator[Progress]:
        about = {"run": digest_of(self.run.folder.run), "merge": digest_of(str(self.how))}
        store = asker.store({"protocol": self.protocol, **about})
        goals = checkpoints_of(len(self.stream)) if self.protocol == BOTH else []
        if self.while_learning:
            self._recall(store)
        goals = [p for p in goals if all(point["edits"] < p for point in self.curve)]
        started, waited = time.perf_counter(), 0.0
        for step in self.run:
            yield Progress("learning", step.done, step.total)
            if self.run.open is None or not self.while_learning:
                continue
            paused = time.perf_counter()
            yield from self._ask_arrived(asker, self.run.open, store)
            if any(p <= step.done for p in goals):
                goals = [p for p in goals if p > step.done]
                yield from self._ask_all_so_far(asker, self.run.open, store, step.done)
            self._note_end(self.run.open, store)
            waited += time.perf_counter() - paused
        asker.seconds["learning"] = time.perf_counter() - started - waited

    def _recall(self, store: AnswerStore | None) -> None:
        """Take up what was asked of finished shards; a shard whose answers are not at hand is learned again."""
        for index in range(self.run.config.shards):
            path = self.run.folder.shard_path(index)
            kept = store.get(f"shard {index}") if store is not None and path.exists() else None
            if kept is None:
                path.unlink(missing_ok=True)
            else:
                self.fresh += [Item.from_json(i) for i in kept["fresh"]]
                self.curve += kept["curve"]

    def _ask_arrived(self, asker: Asker, shard: OpenShard, store: AnswerStore | None) -> Steps[None]:
        """Ask the edits that have just arrived, in the memory that has just learned them."""
        known = {i.question.edit for i in self.fresh}
        new = {e.record.id for e in shard.captured} - known
        key = f"fresh {shard.index} {len(shard.captured)}"
        kept = store.get(key) if store is not None else None
        if kept is None:
            which = [i for i, q in enumerate(asker.questions) if q.edit in new]
            memory = self._memory([shard.shard()], rehearse=False)
            with attach(self.base.model, memory, router=self.options.router) as attached:
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
            which = [i for i, q in enumerate(asker.questions) if q.edit in so_far]
            memory = self._memory([*finished, shard.shard()], self.how.rehearse)
            with attach(self.base.model, memory, router=self.options.router) as attached:
                scores = plain((yield from asker.after(attached, which, stage="checkpoint", kept=False)))
            if store is not None:
                store.put(key, scores)
        self.curve.append({"edits": done, "scores": scores})

    def _note_end(self, shard: OpenShard, store: AnswerStore | None) -> None:
        """When a shard's last edit has been asked, keep everything under the shard."""
        records = slices(self.stream.records, self.run.config.shards)[shard.index]
        live = [r.id for r in records if r.id not in self.stream.superseded]
        if store is None or len(shard.captured) < len(live):
            return
        end = sum(len(s) for s in slices(self.stream.records, self.run.config.shards)[: shard.index])
        mine = [i.to_json() for i in self.fresh if i.question.edit in live]
        curve = [p for p in self.curve if end < p["edits"] <= end + len(records)]
        store.put(f"shard {shard.index}", {"fresh": mine, "curve": curve})

    def _memory(self, shards: Sequence[Shard], rehearse: bool) -> SideMemory:
        """The side memory of shards in memory. Without rehearsal the base is needed for the activation router only."""
        editor = self.run.editor
        upper = editor.upper if rehearse or by_activation(self.run.config, self.options) else None
        how = replace(self.how, rehearse=rehearse, weights=None)
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
        identical: whether the base gave the same logits, bit for bit, after every rollback as before the first edit.
    """

    t: int
    groups: int
    items: tuple[Item, ...]
    identical: bool


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
        self.report: EvalReport | None = None

    def __iter__(self) -> Iterator[Progress]:
        """Learn, ask and roll back, yielding progress; `report` is set at the end."""
        started = time.perf_counter()
        questions = [q for r in self.stream.records for q in questions_about(r)]
        options = self.options
        chat = self.editor.config.chat
        asker = Asker(self.base, questions, chat=chat, cache=options.cache, batch_size=options.batch_size)
        yield from asker.before()
        probe = _probe(self.base)
        found = []
        for t in self.sizes:
            found.append((yield from self._sequences(asker, t, probe)))
        about = {"name": ROLLBACK, "t": self.sizes, "text": TEXTS[ROLLBACK]}
        report = make_report(asker, self.stream, Findings(found[-1].items), None, options, about, started)
        last = self.editor.config
        self.report = report.with_sections(
            method=f"WISE, {last.schedule} schedule, {self.how.method} merge, learned anew per sequence",
            seeds={**report.sections["seeds"], "edit": last.seed},
            config=last.to_json(),
            rollbacks=[
                {"t": r.t, "groups": r.groups, "scores": scores_of(r.items), "identical": r.identical} for r in found
            ],
        )
        asker.close()

    def _sequences(self, asker: Asker, t: int, probe: Tensor) -> Steps[Rollback]:
        records = self.stream.records
        groups = [records[at : at + t] for at in range(0, len(records) - t + 1, t)]
        items: list[Item] = []
        identical = True
        places: dict[str, list[int]] = {}
        for i, q in enumerate(asker.questions):
            places.setdefault(q.edit, []).append(i)
        for k, group in enumerate(groups):
            yield Progress(f"T={t}", k, len(groups))
            stream = EditStream.of(group)
            which = [i for r in group if r.id not in stream.superseded for i in places[r.id]]
            items += self._sequence(asker, stream, which)
            identical = identical and torch.equal(_probe(self.base), probe)
        yield Progress(f"T={t}", len(groups), len(groups))
        return Rollback(t, len(groups), tuple(items), identical)

    def _sequence(self, asker: Asker, stream: EditStream, which: Sequence[int]) -> list[Item]:
        """Learn one sequence from the base, ask it, and leave the base as it was."""
        editor = copy.copy(self.editor)
        editor.gate = self.editor.gate  # worked out once
        editor.config = replace(editor.config, shards=min(editor.config.shards, len(stream)))
        run = editor.describe(stream)
        store = asker.store({"protocol": ROLLBACK, "run": digest_of(run), "merge": digest_of(str(self.how))})
        kept = store.get("items") if store is not None else None
        if kept is not None:
            return [Item.from_json(i) for i in kept]
        started = time.perf_counter()
        side_memory = merge_shards(editor.learn(stream), editor.gate, run, upper=editor.upper, how=self.how)
        asker.seconds["learning"] = asker.seconds.get("learning", 0.0) + time.perf_counter() - started
        with attach(self.base.model, side_memory, router=self.options.router) as attached:
            items = drain(asker.after(attached, which, kept=False))
        if store is not None:
            store.put("items", [i.to_json() for i in items])
        return items


@torch.no_grad()
def _probe(base: Base) -> Tensor:
    """Logits of the base as it is now on a fixed row of tokens."""
    vocab = base.model.config.get_text_config().vocab_size
    ids = (torch.arange(16) * 31 % vocab)[None].to(base.model.device)
    return base.model(input_ids=ids, use_cache=False).logits
