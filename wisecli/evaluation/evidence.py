"""What the gate did, prompt by prompt, and how well it could have done: the routing part of results.json.

In scope are edits and their rephrases; out of scope are unrelated prompts and near ones. Precision and recall are of
the gate as it is set; the ROC and its area are over all thresholds, from the indicator's distance to epsilon.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

from wisecli.data.records import KINDS, UNRELATED
from wisecli.evaluation.metrics import auc, mean, roc
from wisecli.evaluation.questions import EDIT, NEAR, REPHRASE, Item

_IN_SCOPE = (EDIT, REPHRASE)


def routing_evidence(items: Sequence[Item], router: str, epsilon: Sequence[float]) -> dict[str, Any]:
    """Precision, recall, share of false openings, per kind and overall, with ROC and AUC.

    Args:
        items: with their routes.
        router: its name.
        epsilon: its threshold, per memory.
    """
    inside = [i for i in items if i.question.kind in _IN_SCOPE]
    outside = [i for i in items if i.question.kind not in _IN_SCOPE]
    opened = [_routed(i) for i in (*inside, *outside)]
    right = sum(map(_routed, inside))
    return {
        "router": router,
        "epsilon": [e if isfinite(e) else None for e in epsilon],
        "kinds": {kind: _kind(items, kind) for kind in (*_IN_SCOPE, *KINDS)},
        "precision": right / sum(opened) if sum(opened) else None,
        "recall": mean([_routed(i) for i in inside]),
        "false_opening": mean([_routed(i) for i in outside]),
        "auc": {
            kind: {"unrelated": _auc(items, kind, (UNRELATED,)), "near": _auc(items, kind, NEAR)} for kind in _IN_SCOPE
        },
        "roc": {"unrelated": _roc(items, (UNRELATED,)), "near": _roc(items, NEAR)},
    }


def _kind(items: Sequence[Item], kind: str) -> dict[str, Any]:
    mine = [i for i in items if i.question.kind == kind]
    named = [i.route.edit == i.question.edit for i in mine if i.route is not None and i.route.edit is not None]
    return {
        "n": len(mine),
        "routed": mean([_routed(i) for i in mine]),
        "right_edit": mean(named) if kind in _IN_SCOPE else None,
    }


def _routed(item: Item) -> bool:
    return item.route is not None and item.route.routed


def _scores(items: Sequence[Item], kinds: Sequence[str]) -> list[float]:
    """How far each prompt's indicator lies above epsilon; the indicator itself where there is no finite epsilon."""
    routes = [i.route for i in items if i.question.kind in kinds]
    return [r.indicator - (r.epsilon if isfinite(r.epsilon) else 0.0) for r in routes if r is not None]


def _auc(items: Sequence[Item], kind: str, outside: Sequence[str]) -> float | None:
    return auc(_scores(items, (kind,)), _scores(items, outside))


def _roc(items: Sequence[Item], outside: Sequence[str]) -> dict[str, list[float]] | None:
    """Rephrases, or edits where there are none, against one kind of prompts out of scope; None where either lacks."""
    inside = _scores(items, (REPHRASE,)) or _scores(items, (EDIT,))
    other = _scores(items, outside)
    if not inside or not other:
        return None
    fpr, tpr = roc(inside, other)
    return {"fpr": fpr, "tpr": tpr}
