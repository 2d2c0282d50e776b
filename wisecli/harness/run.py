"""Tasks of lm_eval before and after: finding and loading them, asking twice, and the figures side by side.

Progress, errors and results are this package's; what is asked and how it is scored is lm_eval's.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from wisecli.errors import InputError, UsageError, first_line
from wisecli.harness.lm import WiseLM, need
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base
from wisecli.routing.attach import Attached, attach

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many requests of it are answered, and how many there are (0: not known yet)."""

_SHOWN = 5
_SEED = 1234  # lm_eval's own


def run_harness(
    base: Base,
    side_memory: Attached | SideMemory | str | Path | None,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    include: Path | None = None,
    chat: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Ask tasks of lm_eval before and after: the base alone, then with the side memory, both on the same weights.

    Seeds are set anew for each, so both see the same few-shot examples.

    Args:
        base: with its model loaded; its tokenizer is left as it is.
        side_memory: attached to that model already, or to be attached meanwhile; None asks the base alone.
        tasks: names or patterns of tasks, groups and tags as lm_eval knows them, or as `include` defines them.
        limit: ask only the first so many samples of each task.
        num_fewshot: examples in each prompt; None is each task's own number.
        include: a folder of task definitions (YAML) besides those that come with lm_eval.
        chat: put prompts in the base's chat template, as the side memory's edits were.

    Returns:
        `tasks`: per task and metric, `before` and `after` (null with no side memory); per task also `routed`, the share
        of its distinct contexts that a side memory answered, `contexts`, their number, `samples`, `fewshot`,
        `task_versions` and `higher_is_better`; and how lm_eval was run.

    Raises:
        InputError: lm_eval is not installed; a task is unknown, cannot be loaded, or cannot be asked of this base.
    """
    need()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        if side_memory is not None and not isinstance(side_memory, Attached):
            side_memory = stack.enter_context(attach(base.model, side_memory))
        manager, names = _find(tasks, include)
        lm = WiseLM(
            base.model,
            side_memory,
            tokenizer=copy.deepcopy(base.tokenizer),  # lm_eval may add a padding token to it
            batch_size=batch_size,
            add_bos_token=False if chat else None,  # only the template adds special tokens, as while editing
        )
        how = {"limit": limit, "batch_size": batch_size, "num_fewshot": num_fewshot, "chat": chat}
        passes = []
        for name in ("before", "after")[: 1 if lm.attached is None else 2]:
            lm.closed = name == "before"
            lm.progress = functools.partial(progress or _silent, name)
            if progress is not None:
                progress(f"{name}: loading tasks", 0, 0)
            passes.append(_ask(lm, manager, names, how))
    return _document(passes, lm.routes) | how | {"lm_eval": version("lm_eval")}


def check_tasks(tasks: Sequence[str], include: Path | None = None) -> None:
    """Refuse what lm_eval does not know, before any work is spent; their data is not loaded yet.

    Raises:
        InputError: lm_eval is not installed, or a task is unknown.
        UsageError: no task was named.
    """
    need()
    with _quiet():
        _find(tasks, include)


def _silent(what: str, done: int, total: int) -> None:
    """No progress is wanted."""


def _find(tasks: Sequence[str], include: Path | None) -> tuple[Any, list[str]]:
    """lm_eval's task manager, and the names that `tasks` stand for, each once."""
    from lm_eval.tasks import TaskManager

    if not tasks:
        raise UsageError("No tasks were named.", hint="Give names of lm_eval tasks, for example arc_easy.")
    if include is not None and not include.is_dir():
        raise InputError(f"There is no folder of tasks at {include}.", hint="Give the folder that holds their YAML.")
    manager = TaskManager(include_path=None if include is None else str(include))
    matched = {name: manager.match_tasks([name]) for name in tasks}
    unknown = [name for name, found in matched.items() if not found]
    if unknown:
        near = (difflib.get_close_matches(name, manager.all_tasks, _SHOWN) for name in unknown)
        close = list(dict.fromkeys(c for found in near for c in found))
        hint = f"Did you mean {', '.join(close)}?" if close else "lm_eval ls tasks lists all there are."
        raise InputError(f"lm_eval knows no task {', '.join(map(repr, unknown))}.", hint=hint)
    return manager, list(dict.fromkeys(name for found in matched.values() for name in found))


def _ask(lm: WiseLM, manager: Any, names: Sequence[str], how: Mapping[str, Any]) -> Mapping[str, Any]:
    """lm_eval's results for one state of the model."""
    from lm_eval.evaluator import evaluate

    loaded = _load(manager, names)
    _seed()
    for task in loaded["tasks"].values():
        _set_fewshot(task, how["num_fewshot"])
    chat = how["chat"]
    try:
        results = evaluate(
            lm=lm,
            task_dict=loaded,
            limit=how["limit"],
            bootstrap_iters=0,
            log_samples=False,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    except (AssertionError, ValueError) as e:  # how lm_eval refuses a task that does not suit the model
        raise InputError(
            f"lm_eval cannot ask {', '.join(names)} of this base: {first_line(e)}",
            hint="Leave that task out; where prompts are too long, use fewer examples.",
        ) from e
    if results is None:
        raise InputError("Only the first of several processes gets results.", hint="Run it in one process.")
    return results


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """As lm_eval does it: a task that says 0 keeps 0, one that says nothing gets 0."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEED)


def _seed() -> None:
    """For tasks that sample or shuffle."""
    import numpy

    random.seed(_SEED)
    numpy.random.seed(_SEED)
    torch.manual_seed(_SEED)


def _load(manager: Any, names: Sequence[str]) -> dict[str, Any]:
    """Load tasks, groups and tags with their data: what `TaskManager.load` returns.

    Raises:
        InputError: whatever kept a definition or its data from being loaded.
    """
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        try:
            found = manager.load([name])
        except Exception as e:  # from lm_eval, datasets, the hub, or code of the task itself
            raise InputError(
                f"The task {name} cannot be loaded: {type(e).__name__}: {first_line(e)}",
                hint="Data on the hub must be fetched online once; tasks with data of your own need no network.",
            ) from e
        for part in loaded:
            loaded[part] |= found.get(part) or {}
    unsafe = [n for n, t in loaded["tasks"].items() if getattr(t, "UNSAFE_CODE", False)]
    if unsafe:
        raise InputError(
            f"The task {unsafe[0]} runs code that the model writes.",
            hint="Ask lm_eval itself, in a sandbox: python -m wisecli.harness --confirm_run_unsafe_code ...",
        )
    return loaded


def _document(passes: Sequence[Mapping[str, Any]], routes: Mapping[str, Mapping[str, int | None]]) -> dict[str, Any]:
    """Before and after side by side; groups count what their tasks do."""
    before, after = passes[0], passes[1] if len(passes) > 1 else None
    out: dict[str, Any] = {k: {} for k in ("tasks", "routed", "contexts", "samples")}
    for task, found in before["results"].items():
        figures = _figures(found)
        if not figures:
            continue  # a group without a figure of its own
        now = {} if after is None else _figures(after["results"][task])
        leaves = _leaves(task, before.get("group_subtasks") or {})
        seen = [route for leaf in leaves for route in routes.get(leaf, {}).values()]
        out["tasks"][task] = {k: {"before": v, "after": now.get(k)} for k, v in figures.items()}
        out["contexts"][task] = len(seen) if after is not None else None
        out["routed"][task] = sum(r is not None for r in seen) / len(seen) if seen else None
        out["samples"][task] = sum(before["n-samples"][leaf]["effective"] for leaf in leaves)
    for ours, theirs in (
        ("task_versions", "versions"),
        ("higher_is_better", "higher_is_better"),
        ("fewshot", "n-shot"),
    ):
        out[ours] = {task: v for task, v in (before.get(theirs) or {}).items() if task in out["tasks"]}
    return out


def _figures(found: Mapping[str, Any]) -> dict[str, float | None]:
    """Metrics of one task. lm_eval's names are `metric,filter`; its filter `none` goes without saying."""
    out: dict[str, float | None] = {}
    for name, value in found.items():
        metric, _, kept = name.partition(",")
        if kept and not metric.endswith("_stderr") and isinstance(value, int | float):
            out[metric if kept == "none" else name] = float(value) if math.isfinite(value) else None
    return out


def _leaves(task: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks a group stands for, at any depth, each once; a task stands for itself."""
    inside = [leaf for child in groups.get(task, ()) if child != task for leaf in _leaves(child, groups)]
    return list(dict.fromkeys(inside)) or [task]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps lm_eval's notes and the bars of datasets off stderr, and puts their settings back."""
    import datasets
    from lm_eval.api import task

    log, bar = logging.getLogger("lm_eval"), task.tqdm
    level, shown = log.level, not datasets.are_progress_bars_disabled()
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    task.tqdm = functools.partial(bar, disable=True)  # its bar for building requests cannot be turned off otherwise
    try:
        yield
    finally:
        log.setLevel(level)
        task.tqdm = bar
        if shown:
            datasets.enable_progress_bars()
