"""From the shards of a run to one side memory: merge the deltas, rehearse, gather the keys, calibrate the thresholds.

Deltas are merged elementwise (`memory.merge`). Shards were learned without knowing of one another, so a merge disturbs
some edits; with the base at hand they are rehearsed on the merged delta, inside the union of the shards' masks, until
each holds again. The key router's threshold comes from what the run folder holds; the activation router's needs the
merged delta's reaction to every edit, hence the base. Without a base both steps are left out and the manifest says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wisecli.data.pool import ordinary_prompts
from wisecli.data.records import EditRecord
from wisecli.editing.batch import CapturedEdit, capture_edits
from wisecli.editing.config import EditConfig
from wisecli.editing.editor import FAILED, SUPERSEDED, TOOK
from wisecli.editing.rehearsal import Rehearsal, batches
from wisecli.errors import BaseMismatch, InputError, UsageError
from wisecli.memory.bits import SparseDelta
from wisecli.memory.calibration import (
    DEFAULT_SCOPE,
    Calibration,
    activation_threshold,
    key_calibration,
)
from wisecli.memory.indicator import activation_indicator
from wisecli.memory.keys import KeyStore, crowding, score
from wisecli.memory.merge import METHODS, merge_deltas
from wisecli.memory.shard import Gate, RunFolder, Shard
from wisecli.memory.side_memory import EditEntry, Memory, SideMemory
from wisecli.models.base import Base, matches
from wisecli.models.prompts import ContentRule, PromptEncoder, Row
from wisecli.models.site import EditSite
from wisecli.models.upper import UpperModel
from wisecli.versions import versions


@dataclass(frozen=True)
class MergeConfig:
    """How shards become one memory.

    Attributes:
        method, weights: see `merge_deltas`.
        density: share of each shard's *trained* entries that trimming or dropping keeps.
        rehearse: restore the edits that merging disturbed; needs the base and the texts of the edits, and is left out
            for the published schedule.
        scope: how much the key router claims; see `memory.calibration.SCOPES`.
        values: dtype in which the merged delta is stored.
    """

    method: str = "ties"
    density: float = 1.0
    weights: Sequence[float] | None = None
    rehearse: bool = True
    scope: str = DEFAULT_SCOPE
    values: torch.dtype = torch.bfloat16


def merge_run(run: RunFolder, *, base: Base | None = None, **options: Any) -> SideMemory:
    """Merge all shards of a run into a side memory with one memory.

    Args:
        run: a finished run folder.
        base: the run's base, to rehearse and to calibrate the activation router; None leaves both out.
        options: fields of `MergeConfig`.

    Raises:
        InputError: the run is unfinished or damaged.
        BaseMismatch: the base given is not the run's.
    """
    upper = _upper(run, base, EditConfig.from_json(run.run["config"])) if base is not None else None
    try:
        return merge_shards(run.shards(), run.gate(), run.run, upper=upper, how=MergeConfig(**options))
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
    trims = METHODS[_known(how.method)].trim and 0 < how.density < 1
    share = how.density * config.mask_density if trims else how.density
    deltas = [s.delta.dense() for s in shards]
    merged = merge_deltas(deltas, how.method, density=share, weights=how.weights, seed=config.seed)
    delta, entries, steps = _settle(upper, run, config, merged, _entries(shards), how)
    keys = _keys(gate, shards)
    if not len(keys.owner):
        raise InputError("there is no learned edit.", hint="Run wise edit again with other edits.")
    calibrated = _calibrate_keys(gate, shards, keys, how.scope)
    epsilon, statistics = {"key": calibrated.epsilon}, {"key": calibrated.statistics}
    scopes = {name: s["epsilon"] for name, s in calibrated.statistics["scopes"].items()}
    if upper is not None:
        activation = _calibrate_activation(upper, config, entries, delta.dense())
        if activation is not None:
            epsilon["activation"], statistics["activation"] = activation.epsilon, activation.statistics
    origin = {
        "method": how.method,
        "density": how.density,
        "weights": list(how.weights) if how.weights is not None else None,
        "seed": config.seed,
        "rehearsed": steps is not None,
        "rehearsal_steps": steps or 0,
        "shards": [{"index": s.index, "mask_seed": s.mask_seed, "edits": len(s.edits)} for s in shards],
    }
    return SideMemory(
        base=run["base"],
        site=EditSite(**run["site"]),
        rule=ContentRule.from_json(run["content_rule"]),
        memories=(Memory(delta, epsilon, tuple(e.id for e in entries), origin, scopes),),
        keys=keys,
        edits=entries,
        router="activation" if config.schedule == "published" and "activation" in epsilon else "key",
        chat=config.chat,
        config=config.to_json(),
        statistics=statistics,
        versions=versions(),
    )


def _settle(
    upper: UpperModel | None,
    run: Mapping[str, Any],
    config: EditConfig,
    merged: Tensor,
    entries: tuple[EditEntry, ...],
    how: MergeConfig,
) -> tuple[SparseDelta, tuple[EditEntry, ...], int | None]:
    """Rehearse the merged delta where that is wanted and possible, pack it, and ask every edit again.

    Returns the packed delta, the entries with their outcome under it, and the rehearsal steps all edits took
    together, None when nothing was rehearsed.
    """
    steps = None
    if upper is None or not run["texts"]:
        return SparseDelta.pack(merged, dtype=how.values), entries, steps
    captured = _capture(upper, config, entries)
    if captured and how.rehearse and config.schedule == "rehearsal":
        learner = Rehearsal(upper, merged != 0, config, config.seed, start=merged)
        took = {e.id: e.took for e in entries}
        failed = [i for i, c in enumerate(captured) if not took[c.record.id]]
        steps = sum(o.steps for o in learner.hold(captured, failed))
        merged = learner.result().cpu()
    delta = SparseDelta.pack(merged, dtype=how.values)
    return delta, _asked_again(upper, captured, delta.dense(), entries), steps


def _upper(run: RunFolder, base: Base, config: EditConfig) -> UpperModel:
    """The base's upper part at the run's edit site, once it is sure that it is the run's base."""
    try:
        weight = run.site.module(base.model).weight.detach()
    except AttributeError:
        weight = torch.zeros(0)
    if not matches(weight, run.run["base"]["fingerprint"]):
        raise BaseMismatch(
            f"These shards were learned on {run.run['base']['name']}; this base differs at {run.site.path}.",
            hint="Give the run's own base with --model.",
        )
    return UpperModel(base.model, run.site, PromptEncoder(base.tokenizer, chat=config.chat))


def _entries(shards: Sequence[Shard]) -> tuple[EditEntry, ...]:
    entries = []
    for shard in shards:
        for e in shard.edits:
            details: dict[str, Any] = {"shard": shard.index, "outcome": e["outcome"], "steps": e["steps"]}
            entries.append(EditEntry(e["id"], 0, e["outcome"] == TOOK, e.get("prompt"), e.get("target"), details))
    return tuple(entries)


def _known(method: str) -> str:
    if method not in METHODS:
        raise UsageError(f"Unknown merge method {method!r}.", hint=f"Use one of {', '.join(METHODS)}.")
    return method


def _capture(upper: UpperModel, config: EditConfig, entries: Sequence[EditEntry]) -> list[CapturedEdit]:
    """All edits that were learned, with the same rows as while editing."""
    live = [e for e in entries if e.details["outcome"] != SUPERSEDED]
    records = [EditRecord(e.id, str(e.prompt), str(e.target)) for e in live]
    return capture_edits(upper, records, config.contexts, config.seed)


@torch.no_grad()
def _asked_again(
    upper: UpperModel, captured: Sequence[CapturedEdit], delta: Tensor, entries: tuple[EditEntry, ...]
) -> tuple[EditEntry, ...]:
    """The entries with their outcome under the merged delta as it is stored: every target token right by argmax."""
    rows = [e.rows[0] for e in captured]
    delta = delta.to(upper.model.device)
    took: dict[str, bool] = {}
    for picked in batches([len(r.ids) for r in rows]):
        some = [rows[i] for i in picked]
        logits, targets = upper.logits(some, delta)
        right = (logits.argmax(-1) == targets).split([int((r.labels != -100).sum()) for r in some])
        took |= {captured[i].record.id: bool(x.all()) for i, x in zip(picked, right, strict=True)}
    return tuple(
        replace(e, took=took[e.id], details={**e.details, "outcome": TOOK if took[e.id] else FAILED})
        if e.id in took
        else e
        for e in entries
    )


def _keys(gate: Gate, shards: Sequence[Shard]) -> KeyStore:
    """The keys of all learned edits, and how crowded each edit is: by its bare prompt, among prompts about no edit."""
    owners, seen = [], 0
    for shard in shards:
        owners.append(shard.owner + seen)
        seen += len(shard.edits)
    vectors, owner = torch.cat([s.keys for s in shards]), torch.cat(owners)
    crowded = torch.zeros(seen)
    first = _first_of_each(owner)
    crowded[owner[first]] = crowding(vectors[first].float(), gate.ordinary(_about(shards)))
    return KeyStore(gate.space, vectors, owner, crowded.half())


def _about(shards: Sequence[Shard]) -> set[int]:
    """Positions of the pool's prompts that are about an edit."""
    return {i for s in shards for i in s.details.get("pool_about_edits", ())}


def _first_of_each(owner: Tensor) -> Tensor:
    """Positions where a new owner begins."""
    if not len(owner):
        return torch.zeros(0, dtype=torch.long)
    return torch.cat([torch.zeros(1, dtype=torch.long), (owner[1:] != owner[:-1]).nonzero()[:, 0] + 1])


def _calibrate_keys(gate: Gate, shards: Sequence[Shard], keys: KeyStore, scope: str) -> Calibration:
    hard = torch.cat([s.negatives for s in shards]).float()
    crowded = keys.crowding.float()[keys.owner]
    alone = gate.ordinary(_about(shards), alone=True)  # what facts of a kind may do is the trial's to say
    ordinary, negatives = (_best(v, keys.keys.float(), crowded) for v in (alone, hard))
    edits = len(keys.owner.unique())
    return key_calibration(gate.trial, edits, ordinary, negatives, _own_scores(keys), scope)


def _best(vectors: Tensor, keys: Tensor, crowded: Tensor) -> Tensor:
    """Largest score of each vector; nothing for no vectors."""
    return score(vectors, keys, crowded).max(1).values if len(vectors) else torch.zeros(0)


def _own_scores(keys: KeyStore) -> Tensor:
    """For each edit with several forms, the lowest score of one of them for its bare prompt's key."""
    scores = []
    for edit in keys.owner.unique().tolist():
        own = keys.keys[keys.owner == edit].float()
        if len(own) > 1:
            scores.append(score(own[1:], own[:1], keys.crowding[edit].float()).min())
    return torch.stack(scores) if scores else torch.zeros(0)


@torch.no_grad()
def _calibrate_activation(
    upper: UpperModel, config: EditConfig, entries: Sequence[EditEntry], delta: Tensor
) -> Calibration | None:
    prompts = [e.prompt for e in entries if e.took and e.prompt is not None]
    if not prompts:
        return None
    delta = delta.to(upper.model.device)
    inside, outside = (
        _indicators(upper, [upper.encoder.prompt(p) for p in texts], delta) for texts in (prompts, ordinary_prompts())
    )
    return activation_threshold(inside, outside, config.act_ratio)


def _indicators(upper: UpperModel, rows: Sequence[Row], delta: Tensor) -> Tensor:
    captured = upper.capture(rows)
    return torch.cat([activation_indicator(r.a[None].float(), r.content[None], delta) for r in captured]).cpu()
