"""Learn the shards of a run side by side, each in a process of its own with the base loaded into it.

Shards do not depend on one another, so the bytes are those of learning one after the other; shards that are learned at
once, as the config says, have one process together. Each process computes with as many threads as this one would, since
another number may round otherwise.
"""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import torch

from wisecli.editing.run import EditRun, Progress
from wisecli.errors import UsageError

_POLL_S = 0.2


def learn_side_by_side(run: EditRun, jobs: int, loading: Mapping[str, Any]) -> Iterator[Progress]:
    """Learn what is missing of a run with `jobs` processes; see `EditRun.__iter__`.

    Args:
        run: the run, its folder begun.
        jobs: processes at most.
        loading: arguments of `load_base` that give the run's base.

    Raises:
        UsageError: `jobs` is less than 1.
    """
    if jobs < 1:
        raise UsageError(f"--jobs must be at least 1, not {jobs}.")
    missing = [group for group in run.groups if run.is_missing(group)]
    if min(jobs, len(missing)) < 2:
        yield from run
        return
    run.prepare()
    context = multiprocessing.get_context("spawn")
    arrived = {group[0]: 0 if group in missing else run.size(group) for group in run.groups}
    total = len(run.stream.records)
    with run.folder.lock(), context.Manager() as manager:
        news = manager.Queue()
        with ProcessPoolExecutor(min(jobs, len(missing)), mp_context=context) as pool:
            arguments = (loading, run.arguments(), torch.get_num_threads(), news)
            waiting: dict[Future[None], Sequence[int]] = {pool.submit(_learn_some, *arguments, g): g for g in missing}
            try:
                while waiting:
                    arrived |= _heard(news)
                    for done in [f for f in waiting if f.done()]:
                        group = waiting.pop(done)
                        done.result()
                        arrived[group[0]] = run.size(group)
                        yield Progress(sum(arrived.values()), total, run.written(group))
                    yield Progress(sum(arrived.values()), total)
            finally:
                pool.shutdown(cancel_futures=True)


def _heard(news: Any) -> dict[int, int]:
    """Edits that have arrived by group, under its first shard, as said since, waiting a moment for the first word."""
    found: dict[int, int] = {}
    try:
        found |= [news.get(timeout=_POLL_S)]
        while True:
            found |= [news.get_nowait()]
    except queue.Empty:
        return found


def _learn_some(
    loading: Mapping[str, Any], arguments: Mapping[str, Any], threads: int, news: Any, group: Sequence[int]
) -> None:
    """Learn a group of shards, in a process of its own."""
    from wisecli.models.base import load_base

    torch.set_num_threads(threads)
    run = EditRun(load_base(**loading), **arguments)
    for arrived in run.learn_shards(group):
        news.put((group[0], arrived))
