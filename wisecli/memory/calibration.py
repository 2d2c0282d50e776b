"""Thresholds from scores. Scores in, epsilon and the statistics behind it out.

The key router's epsilon has a stated false-opening rate: the share of near prompts (other facts of a kind, other facts
about a subject) that may pass. What near prompts score is seen on facts of the pool, some of which stand in for edits;
what the stream's own hard negatives and forms score corrects it where its prompts are unlike the pool. The activation
router, as published, opens above a share of the weakest in-scope indicator. Evaluation probes are never used. Keys come
from the base alone, so that whether an edit took has no part in the key router's threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wisecli.data.pool import ALONE
from wisecli.errors import UsageError
from wisecli.memory.keys import KeySpace, crowding, principal_axes
from wisecli.memory.lookup import SHARE, alike, score

FOLDS = 4


@dataclass(frozen=True)
class Scope:
    """How much a side memory claims, as rates.

    Attributes:
        near: share of near prompts that may pass.
        ordinary: share of ordinary prompts that may pass.
        stopped: share of the stream's hard negatives to be stopped; some of them are wordings of edited facts.
        lost: share of the edits whose own forms hard negatives may shut out.
    """

    near: float
    ordinary: float
    stopped: float
    lost: float


SCOPES: Mapping[str, Scope] = {
    "narrow": Scope(near=0.0025, ordinary=0.0, stopped=0.97, lost=0.05),
    "balanced": Scope(near=0.01, ordinary=0.002, stopped=0.9, lost=0.02),
    "wide": Scope(near=0.03, ordinary=0.005, stopped=0.75, lost=0.01),
}
DEFAULT_SCOPE = "balanced"


@dataclass(frozen=True)
class Trial:
    """Scores of pool prompts where some of the pool's facts stand in for edits: their other wordings, and near facts.

    `edits` is how many stood in at a time.
    """

    inside: Tensor
    near: Tensor
    edits: int


def try_on_pool(h: Tensor, group: Tensor, rank: int) -> Trial:
    """Cross-fitted: in each fold the key space is fitted on the other facts, so that it has seen none of those tried.

    Args:
        h: entry of the layer for the pool's prompts [P, D].
        group: the fact each is a wording of [P]; -1 where alone.
        rank: of the key space.
    """
    facts = group[group != ALONE].unique()
    axes = principal_axes(h)
    trials = []
    for fold in range(FOLDS):
        held = torch.isin(group, facts[fold::FOLDS])
        space = KeySpace.fit(h[~held], group[~held], rank, axes)
        trials.append(try_facts(space(h).cpu(), group, facts[fold::FOLDS]))
    tried = max(1, sum(t.edits for t in trials) // FOLDS)
    return Trial(torch.cat([t.inside for t in trials]), torch.cat([t.near for t in trials]), tried)


def try_facts(vectors: Tensor, group: Tensor, facts: Tensor) -> Trial:
    """Let every other one of some pool facts be an edit whose key is its first wording, and the rest be near prompts.

    A near prompt takes no part in the crowding of the keys it is scored against, nor do the other wordings of its fact:
    an unseen prompt would not.

    Args:
        vectors: of the pool's prompts [P, r].
        group: of the pool's prompts [P]; -1 where alone.
        facts: the groups that are tried.
    """
    edits, rest = facts[::2], facts[1::2]
    is_edit, near = torch.isin(group, edits), torch.isin(group, rest)
    if not len(edits) or is_edit.all():
        return Trial(torch.zeros(0), torch.zeros(0), 0)
    keys_at = torch.stack([(group == f).nonzero()[0, 0] for f in edits])
    inside = is_edit.clone()
    inside[keys_at] = False
    keys, outside = vectors[keys_at], ~is_edit
    near_by = alike(vectors[outside], keys)  # [outside, keys]
    by_fact, fact_of = _best_by_group(near_by, group[outside])  # [facts, keys]
    best, at = by_fact.topk(min(2, len(by_fact)), 0)
    tried = near[outside]
    others = torch.where(fact_of[tried][:, None] == at[0][None], best[-1][None], best[0][None])
    return Trial(
        score(vectors[inside], keys, crowding(keys, vectors[outside])).max(1).values,
        (near_by[tried] - SHARE * others).max(1).values,
        len(edits),
    )


def _best_by_group(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Largest entry per group and column [G, n] of [N, n], and the row's group index [N]; rows alone are groups too."""
    alone = group == ALONE
    unique = torch.where(alone, group.max() + 1 + alone.cumsum(0), group)
    _, index = unique.unique(return_inverse=True)
    best = scores.new_full((int(index.max()) + 1, scores.shape[1]), -torch.inf)
    return best.scatter_reduce_(0, index[:, None].expand_as(scores), scores, "amax"), index


@dataclass(frozen=True)
class Calibration:
    """Thresholds by scope (or the only one) with the quantiles of the scores they were chosen from."""

    epsilon: float
    statistics: dict[str, Any]


def key_threshold(trial: Trial, edits: int, ordinary: Tensor, hard: Tensor, in_scope: Tensor, scope: str) -> float:
    """epsilon of the key router for one scope.

    The quantile of near prompts' scores in the trial that the scope allows, at least the one of ordinary prompts
    against this stream's own keys. A prompt meets more keys in a side memory of more edits: where n edits stood in and
    the side memory holds N of them, 1 - (1 - near)^(n/N) may pass in the trial, and never more than `near`. Where the
    stream's hard negatives come closer than that it is raised to stop most of them, but no further than a low quantile
    of in-scope scores: edits must stay reachable, and one edit that is out of line decides nothing.

    Args:
        trial: of the gate, on pool facts.
        edits: how many the side memory holds.
        ordinary: largest score of each ordinary prompt [N].
        hard: the same for hard negatives made from the stream [M].
        in_scope: for each edit, the lowest score of its other forms for its bare prompt's key [E].
    """
    rates = SCOPES[check_scope(scope)]
    kept = (1 - rates.near) ** min(1.0, trial.edits / max(1, edits))
    epsilon = max(_quantile(trial.near, kept), _quantile(ordinary, 1 - rates.ordinary))
    if len(hard):
        stop = _quantile(hard, rates.stopped)
        epsilon = max(epsilon, min(stop, _quantile(in_scope, rates.lost) if len(in_scope) else stop))
    return round(max(epsilon, 0.0), 6)


def key_calibration(
    trial: Trial, edits: int, ordinary: Tensor, hard: Tensor, in_scope: Tensor, scope: str
) -> Calibration:
    """epsilon of a scope, and in the statistics those of all scopes with what they would let pass."""
    statistics: dict[str, Any] = {
        "scope": scope,
        "ordinary": quantiles(ordinary),
        "hard": quantiles(hard),
        "in_scope": quantiles(in_scope),
        "trial_near": quantiles(trial.near),
        "trial_inside": quantiles(trial.inside),
        "scopes": {},
    }
    for name in SCOPES:
        epsilon = key_threshold(trial, edits, ordinary, hard, in_scope, name)
        statistics["scopes"][name] = {
            "epsilon": epsilon,
            "near_opened": _share(trial.near, epsilon),
            "ordinary_opened": _share(ordinary, epsilon),
            "hard_opened": _share(hard, epsilon),
            "wordings_routed": _share(trial.inside, epsilon),
        }
    return Calibration(statistics["scopes"][check_scope(scope)]["epsilon"], statistics)


def activation_threshold(in_scope: Tensor, out_of_scope: Tensor, act_ratio: float) -> Calibration:
    """epsilon of the activation router, as published: act_ratio * min over edits that took of Delta_act (eq. 4)."""
    stats = {"out_of_scope": quantiles(out_of_scope), "in_scope": quantiles(in_scope)}
    return Calibration(round(act_ratio * float(in_scope.min()), 6), stats)


def quantiles(scores: Tensor) -> list[float]:
    """Minimum, 1 %, median, 99 % and maximum; empty for no scores."""
    if not len(scores):
        return []
    q = scores.float().quantile(torch.tensor([0.0, 0.01, 0.5, 0.99, 1.0]))
    return [round(float(x), 4) for x in q]


def _quantile(scores: Tensor, q: float) -> float:
    return float(scores.float().quantile(q)) if len(scores) else 0.0


def _share(scores: Tensor, epsilon: float) -> float | None:
    return round(float((scores > epsilon).float().mean()), 4) if len(scores) else None


def check_scope(scope: str) -> str:
    """The scope, if it is one.

    Raises:
        UsageError: it is none.
    """
    if scope not in SCOPES:
        raise UsageError(f"Unknown scope {scope!r}.", hint=f"Use {', '.join(SCOPES)}.")
    return scope
