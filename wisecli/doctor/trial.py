"""Learn the probe edits at one layer, the way `wise edit` and `wise merge` would, and ask them.

Nothing is left behind but the figures: shards and side memory stay in memory, apart from one temporary file that tells
how large a side memory is.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wisecli.data.pool import Pool
from wisecli.data.stream import EditStream
from wisecli.doctor.report import Figure, Learned
from wisecli.editing.config import EditConfig
from wisecli.editing.editor import Editor
from wisecli.editing.merge import merge_shards
from wisecli.evaluation.asking import Asker, Progress, Steps
from wisecli.evaluation.metrics import auc, mean, prefers
from wisecli.evaluation.questions import EDIT, NEAR, REPHRASE, Item, questions_of
from wisecli.evaluation.scores import open_of, scores_of
from wisecli.memory.shard import Gate, Shard
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base
from wisecli.routing.attach import attach


def learn_probes(base: Base, config: EditConfig, stream: EditStream, pool: Pool, h: Tensor) -> Steps[Learned]:
    """Learn, merge and ask probe edits.

    Args:
        config: of the run; its layer is the one to try.
        pool: without the probes' facts.
        h: what the pool's prompts bring into that layer [P, D].
    """
    editor = Editor(base, config, pool=pool)
    group = torch.tensor(pool.group)
    editor.gate = Gate.fit(h, group, config.rank)
    stage = f"layer {editor.site.layer}, learning"
    started = time.perf_counter()
    shards = yield from _learn(editor, stream, stage)
    learned = time.perf_counter() - started
    side_memory = merge_shards(shards, editor.gate, editor.describe(stream), upper=editor.upper)
    merged = time.perf_counter() - started - learned
    items = yield from _ask(base, config, stream, side_memory)
    return _figures(side_memory, items, learned / len(stream), merged)


def _learn(editor: Editor, stream: EditStream, stage: str) -> Steps[list[Shard]]:
    shards: list[Shard] = []
    yield Progress(stage, 0, len(stream))
    for arrived in editor.learning(stream, {}, shards):
        yield Progress(stage, arrived, len(stream))
    return shards


def _ask(base: Base, config: EditConfig, stream: EditStream, side_memory: SideMemory) -> Steps[list[Item]]:
    """The questions of the stream, before and after, and with the gate open."""
    asker = Asker(base, questions_of(stream), chat=config.chat)
    yield from asker.before()
    with attach(base.model, side_memory) as attached:
        items = yield from asker.after(attached)
        return (yield from asker.opened(attached, items))


def _figures(sm: SideMemory, items: Sequence[Item], seconds_per_edit: float, merge_seconds: float) -> Learned:
    scores, opened = scores_of(items), open_of(_all_opened(items)) or {}
    figures = {name: _figure(scores[name]["exact"]) for name in ("rel", "gen", "loc_near")}
    inside, near = _routes(items, (REPHRASE,)), _routes(items, NEAR)
    (memory,) = sm.memories
    epsilon = memory.epsilon["key"]
    return Learned(
        edits=len(sm.edits),
        took=sum(e.took for e in sm.edits),
        **figures,
        gen_open=opened.get("gen"),
        loc_near_open=opened.get("loc_near"),
        routed=mean([x > epsilon for x in inside]),
        near_opened=mean([x > epsilon for x in near]),
        auc=auc(inside, near),
        ordinary_opened=sm.statistics["key"]["scopes"][sm.statistics["key"]["scope"]]["ordinary_opened"],
        known=_known(items),
        epsilon=epsilon,
        seconds_per_edit=round(seconds_per_edit, 3),
        merge_seconds=round(merge_seconds, 3),
        bytes=_size(sm),
        bytes_per_edit=sm.keys.nbytes // len(sm.edits),
    )


def _figure(summary: Mapping[str, Any]) -> Figure:
    low, high = summary["after_interval"] or (None, None)
    return Figure(summary["after"], low, high, summary["n"])


def _all_opened(items: Sequence[Item]) -> list[Item]:
    """The items as with a gate always open: what was let through anyway counts with the answer it got."""
    return [i if i.opened is not None else i.with_opened(i.after, i.exact[1]) for i in items]


def _routes(items: Sequence[Item], kinds: Sequence[str]) -> list[float]:
    return [i.route.indicator for i in items if i.question.kind in kinds and i.route is not None]


def _known(items: Sequence[Item]) -> float | None:
    """Share of the edits' wordings that make the base prefer the true answer."""
    pairs = [(i.contrast, i.nll) for i in items if i.question.kind in (EDIT, REPHRASE) and i.contrast and i.nll]
    return mean([prefers([truth[0]], [target[0]]) for truth, target in pairs])


def _size(sm: SideMemory) -> int:
    """Bytes of the side memory as a file."""
    with tempfile.TemporaryDirectory(prefix="wise-doctor-") as folder:
        path = Path(folder) / "sm.safetensors"
        sm.save(path)
        return path.stat().st_size
