"""From the shards of a run to one side memory: merge the deltas, rehearse, gather the keys, calibrate the thresholds.

Deltas are merged elementwise (`memory.merge`). Shards were learned without knowing of one another, so a merge disturbs
some edits; with the base at hand they are rehearsed on the merged delta, inside the union of the shards' masks, until
each holds again. The key router's threshold comes from what the run folder holds; the activation router's needs the
merged delta's reaction to every edit, hence the base. Without a base both steps are left out and the manifest says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wisecli.data.pool import ordinary_prompts
from wisecli.data.records import EditRecord, said_of
from wisecli.editing.batch import CapturedEdit, batches, capture_edits
from wisecli.editing.config import EditConfig
from wisecli.editing.editor import slices
from wisecli.editing.margins import indicators, indicators_of
from wisecli.editing.rehearsal import Rehearsal
from wisecli.editing.rewording import Rewording
from wisecli.errors import BaseMismatch, InputError, UsageError
from wisecli.memory.bits import SparseDelta
from wisecli.memory.calibration import (
    DEFAULT_SCOPE,
    Calibration,
    activation_threshold,
    key_calibration,
)
from wisecli.memory.keys import KeyStore
from wisecli.memory.lookup import score
from wisecli.memory.merge import METHODS, merge_deltas
from wisecli.memory.shard import (
    FAILED,
    SUPERSEDED,
    TOOK,
    WITHDRAWN,
    Gate,
    RunFolder,
    Shard,
    about_edits_of,
    keys_in_force,
)
from wisecli.memory.side_memory import MAIN_MEMORY, EditEntry, Memory, SideMemory
from wisecli.models.base import Base, matches, matrix_of
from wisecli.models.captured import StackedRows
from wisecli.models.prompts import ContentRule, PromptEncoder
from wisecli.models.site import EditSite
from wisecli.models.upper import UpperModel
from wisecli.versions import versions

_EVERY = 7  # one ordinary prompt in so many is asked for the statistics beside the activation router's threshold


@dataclass(frozen=True)
class MergeConfig:
    """How shards become one memory.

    Attributes:
        method, weights: see `merge_deltas`.
        memories: how many memories the shards make, in consecutive groups that are merged each on its own; None for one
            per shard (WISE-Retrieve).
        density: share of each shard's *trained* entries that trimming or dropping keeps.
        rehearse: restore the edits that merging disturbed; needs the base and the texts of the edits, and is left out
            for the published schedule and for a memory of one shard, which is as it was learned.
        scope: how much the key router claims; see `memory.calibration.SCOPES`.
        values: dtype in which the merged delta is stored.
    """

    method: str = "ties"
    memories: int | None = 1
    density: float = 1.0
    weights: Sequence[float] | None = None
    rehearse: bool = True
    scope: str = DEFAULT_SCOPE
    values: torch.dtype = torch.bfloat16


def merge_run(run: RunFolder, *, base: Base | None = None, cache: Path | None = None, **options: Any) -> SideMemory:
    """Merge all shards of a run into a side memory.

    Args:
        run: a finished run folder.
        base: the run's base, to rehearse and to calibrate the activation router; None leaves both out.
        cache: folder where the rewordings of bases are kept; None keeps none.
        options: fields of `MergeConfig`.

    Raises:
        InputError: the run is unfinished or damaged.
        BaseMismatch: the base given is not the run's.
    """
    upper = None
    if base is not None:
        upper = _upper(run, base, EditConfig.from_json(run.run["config"]))
        Rewording.keep(upper, base, cache)
    try:
        shards = [replace(s, edits=tuple(run.outcome_of(e) for e in s.edits)) for s in run.shards()]
        return merge_shards(shards, run.gate(), run.run, upper=upper, how=MergeConfig(**options))
    except InputError as e:
        raise InputError(f"{run.path}: {e.message}", hint=e.hint, problems=e.problems) from e


def merge_shards(
    shards: Sequence[Shard],
    gate: Gate,
    run: Mapping[str, Any],
    *,
    upper: UpperModel | None = None,
    how: MergeConfig | None = None,
) -> SideMemory:
    """Merge shards of one run, all of them or those there are so far.

    Args:
        shards: in order.
        gate: of the run.
        run: the run's description, as run.json holds it.
        upper: the upper part of the run's base, to rehearse and to calibrate the activation router.

    Raises:
        InputError: no shard holds a learned edit.
    """
    how = how or MergeConfig()
    config = EditConfig.from_json(run["config"])
    job = _Job(upper, run, config, how)
    merged = [_merge_group(job, i, group) for i, group in enumerate(_groups(shards, how))]
    entries = tuple(e for m in merged for e in m.entries)
    keys = keys_in_force(gate, shards, [e.details["outcome"] for e in entries])
    if not len(keys.owner):
        raise InputError("there is no learned edit.", hint="Run wise edit again with other edits.")
    calibrated = _calibrate_keys(gate, shards, keys, how.scope)
    statistics: dict[str, Any] = {"key": calibrated.statistics}
    scopes = {name: s["epsilon"] for name, s in calibrated.statistics["scopes"].items()}
    activations = _calibrate_activation(upper, config, merged) if upper is not None else [None] * len(merged)
    if any(activations):
        found = [None if a is None else a.statistics for a in activations]
        statistics["activation"] = found[0] if len(found) == 1 else {"memories": found}
    memories = []
    for m, activation in zip(merged, activations, strict=True):
        epsilon = {"key": calibrated.epsilon} | ({"activation": activation.epsilon} if activation else {})
        memories.append(Memory(m.delta, epsilon, tuple(e.id for e in m.entries), m.origin, scopes))
    by_activation = config.schedule == "published" and all("activation" in m.epsilon for m in memories)
    return SideMemory(
        base=run["base"],
        site=EditSite(**run["site"]),
        rule=ContentRule.from_json(run["content_rule"]),
        memories=tuple(memories),
        keys=keys,
        edits=entries,
        router="activation" if by_activation else "key",
        chat=config.chat,
        config=config.to_json(),
        statistics=statistics,
        versions=versions(),
    )


@dataclass(frozen=True)
class _Job:
    """What all memories of a merge share; see `merge_shards`."""

    upper: UpperModel | None
    run: Mapping[str, Any]
    config: EditConfig
    how: MergeConfig


@dataclass(frozen=True)
class _Merged:
    """One memory in the making: its delta, its edits with their outcome under it, how it came about."""

    delta: SparseDelta
    entries: tuple[EditEntry, ...]
    origin: Mapping[str, Any]


def _groups(shards: Sequence[Shard], how: MergeConfig) -> list[Sequence[Shard]]:
    """The shards of each memory."""
    n = len(shards) if how.memories is None else how.memories
    if not 1 <= n <= len(shards):
        raise UsageError(f"{len(shards)} shards cannot make {n} memories.", hint=f"Use --memories 1 to {len(shards)}.")
    if how.weights is not None and n > 1:
        raise UsageError("--weights are of shards that make one memory.", hint="Leave --memories or --weights out.")
    return [group for group in slices(shards, n) if group]


def _merge_group(job: _Job, index: int, shards: Sequence[Shard]) -> _Merged:
    how, config = job.how, job.config
    trims = METHODS[_known(how.method)].trim and 0 < how.density < 1
    share = how.density * config.mask_density if trims else how.density
    merged = merge_deltas([s.delta for s in shards], how.method, density=share, weights=how.weights, seed=config.seed)
    # A shard by itself comes out as it was learned: nothing was disturbed, and there is nothing to restore.
    disturbed = len(shards) > 1 or not torch.equal(merged, shards[0].delta.dense())
    delta, entries, steps = _settle(job, merged, _entries(shards, index), disturbed)
    origin = {
        "method": how.method,
        "density": how.density,
        "weights": list(how.weights) if how.weights is not None else None,
        "seed": config.seed,
        "rehearsed": steps is not None,
        "rehearsal_steps": steps or 0,
        "shards": [{"index": s.index, "mask_seed": s.mask_seed, "edits": len(s.edits)} for s in shards],
    }
    return _Merged(delta, entries, origin)


def _settle(
    job: _Job, merged: Tensor, entries: tuple[EditEntry, ...], disturbed: bool
) -> tuple[SparseDelta, tuple[EditEntry, ...], int | None]:
    """Rehearse the merged delta where that is wanted and possible, pack it, and ask every edit again.

    Returns the packed delta, the entries with their outcome under it, and the rehearsal steps all edits took
    together, None when nothing was rehearsed.
    """
    upper, config, how = job.upper, job.config, job.how
    steps = None
    if upper is None or not job.run["texts"]:
        return SparseDelta.pack(merged, dtype=how.values), entries, steps
    rehearse = how.rehearse and disturbed and config.schedule == "rehearsal"
    captured = _capture(upper, config, entries, config.contexts if rehearse else 0)
    if captured and rehearse:
        learner = Rehearsal(upper, merged != 0, config, config.seed, start=merged)
        took = {e.id: e.took for e in entries}
        failed = [i for i, c in enumerate(captured) if not took[c.record.id]]
        steps = sum(o.steps for o in learner.hold(captured, failed))
        merged = learner.result().cpu()
    delta = SparseDelta.pack(merged, dtype=how.values)
    return delta, _asked_again(upper, captured, delta.dense(), entries), steps


def merged_as(sm: SideMemory) -> dict[str, Any]:
    """The fields of `MergeConfig` with which a side memory was merged."""
    origin, shards = sm.memories[0].origin, sum(len(m.origin["shards"]) for m in sm.memories)
    return {
        **{name: origin[name] for name in ("method", "density", "weights")},
        "memories": None if len(sm.memories) == shards else len(sm.memories),
        "rehearse": any(m.origin["rehearsed"] for m in sm.memories),
        "scope": sm.statistics["key"]["scope"],
        "values": sm.memories[0].delta.values.dtype,
    }


def check_base(run: RunFolder, base: Base) -> None:
    """Refuse a base that is not the run's.

    Raises:
        BaseMismatch: its matrix at the run's edit site holds other weights.
    """
    try:
        weight = matrix_of(base.model, run.site)
    except AttributeError:
        weight = torch.zeros(0)
    if not matches(weight, run.run["base"]["fingerprint"]):
        raise BaseMismatch(
            f"These shards were learned on {run.run['base']['name']}; this base differs at {run.site.path}.",
            hint="Give the run's own base with --model.",
        )


def _upper(run: RunFolder, base: Base, config: EditConfig) -> UpperModel:
    """The base's upper part at the run's edit site, once it is sure that it is the run's base."""
    check_base(run, base)
    return UpperModel(base.model, run.site, PromptEncoder(base.tokenizer, chat=config.chat))


def _entries(shards: Sequence[Shard], memory: int) -> tuple[EditEntry, ...]:
    """The edits of the shards as their memory knows them; withdrawn ones belong to main memory."""
    entries = []
    for shard in shards:
        for e in shard.edits:
            details: dict[str, Any] = {"shard": shard.index, "outcome": e["outcome"], "steps": e["steps"]}
            details |= {"by": e["by"]} if e.get("by") else {}
            place = MAIN_MEMORY if e["outcome"] == WITHDRAWN else memory
            texts, history = (e.get("prompt"), e.get("target")), said_of(e.get("history", ())) or None
            entries.append(EditEntry(e["id"], place, e["outcome"] == TOOK, *texts, details, history))
    return tuple(entries)


def _known(method: str) -> str:
    if method not in METHODS:
        raise UsageError(f"Unknown merge method {method!r}.", hint=f"Use one of {', '.join(METHODS)}.")
    return method


def _capture(upper: UpperModel, config: EditConfig, entries: Sequence[EditEntry], contexts: int) -> list[CapturedEdit]:
    """All edits in force, with so many of the rows behind a context as while editing."""
    live = [e for e in entries if e.details["outcome"] not in (SUPERSEDED, WITHDRAWN)]
    records = [EditRecord(e.id, str(e.prompt), str(e.target), history=e.history or ()) for e in live]
    return capture_edits(upper, records, contexts, config.seed)


@torch.no_grad()
def _asked_again(
    upper: UpperModel, captured: Sequence[CapturedEdit], delta: Tensor, entries: tuple[EditEntry, ...]
) -> tuple[EditEntry, ...]:
    """The entries with their outcome under the merged delta as it is stored: every target token right by argmax."""
    rows = [e.rows[0] for e in captured]
    delta = delta.to(upper.site.device(upper.model))
    took: dict[str, bool] = {}
    for picked in batches([len(r.ids) for r in rows]):
        some = StackedRows.of([rows[i] for i in picked])
        right = some.right(upper.logits(some, delta)).tolist()
        took |= {captured[i].record.id: x for i, x in zip(picked, right, strict=True)}
    reached = indicators_of(captured, delta)
    return tuple(
        replace(
            e,
            took=took[e.id],
            details={**e.details, "outcome": TOOK if took[e.id] else FAILED, "indicator": reached[e.id]},
        )
        if e.id in took
        else e
        for e in entries
    )


def _calibrate_keys(gate: Gate, shards: Sequence[Shard], keys: KeyStore, scope: str) -> Calibration:
    hard = torch.cat([s.negatives for s in shards]).float()
    alone = gate.ordinary(about_edits_of(shards), alone=True)  # what facts of a kind may do is the trial's to say
    vectors, off = keys.vectors, keys.off
    ordinary, negatives = (_best(v, vectors, off) for v in (alone, hard))
    edits = len(keys.owner.unique())
    return key_calibration(gate.trial, edits, ordinary, negatives, _own_scores(keys), scope)


def _best(vectors: Tensor, keys: Tensor, crowded: Tensor) -> Tensor:
    """Largest score of each vector; nothing for no vectors."""
    return score(vectors, keys, crowded).max(1).values if len(vectors) else torch.zeros(0)


def _own_scores(keys: KeyStore) -> Tensor:
    """For each edit with several forms, the lowest score of one of them for its bare prompt's key."""
    scores, vectors = [], keys.vectors
    for edit in keys.owner.unique().tolist():
        own = vectors[keys.owner == edit]
        if len(own) > 1:
            scores.append(score(own[1:], own[:1], keys.crowding[edit].float()).min())
    return torch.stack(scores) if scores else torch.zeros(0)


@torch.no_grad()
def _calibrate_activation(upper: UpperModel, config: EditConfig, merged: Sequence[_Merged]) -> list[Calibration | None]:
    """The activation router's threshold of each memory; None for one in which no edit took."""
    ordinary = upper.capture([upper.encoder.prompt(p) for p in ordinary_prompts()[::_EVERY]])
    found: list[Calibration | None] = []
    for m in merged:
        own = torch.tensor([e.details["indicator"] for e in m.entries if e.took and e.prompt is not None])
        if not len(own):
            found.append(None)
            continue
        delta = m.delta.dense().to(upper.site.device(upper.model))
        found.append(activation_threshold(own, indicators(ordinary, delta), config.act_ratio))
    return found
