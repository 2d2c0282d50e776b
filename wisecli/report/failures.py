"""What went wrong, by kind of failure: every item that was asked and did not come out, in one named group.

The route tells why: an edit or paraphrase that the gate kept out was never put to the side memory; one that was routed
and still missed was learned badly, or found another edit's memory. A locality prompt that the gate let in and that came
out changed is a false opening; one that changed *without* being routed must not exist, and has a group of its own so
that it is seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wisecli.report.results import NEAR, Results

GROUPS = {
    ("edit", "kept out"): "Edit not answered: kept out by the gate",
    ("edit", "routed"): "Edit routed, wrong answer",
    ("edit", ""): "Edit, wrong answer (no route recorded)",
    ("rephrase", "kept out"): "Paraphrase kept out by the gate",
    ("rephrase", "routed"): "Paraphrase routed, wrong answer",
    ("rephrase", ""): "Paraphrase, wrong answer (no route recorded)",
    ("near", "routed"): "Near prompt let in and changed",
    ("near", "kept out"): "Near prompt changed without being routed",
    ("near", ""): "Near prompt changed (no route recorded)",
    ("unrelated", "routed"): "Unrelated prompt let in and changed",
    ("unrelated", "kept out"): "Unrelated prompt changed without being routed",
    ("unrelated", ""): "Unrelated prompt changed (no route recorded)",
}
"""(kind of prompt, where it was routed) -> name of the failure, in reading order."""


@dataclass
class FailureGroup:
    """Failures of one kind, in the order they were asked, out of `asked` prompts of that kind."""

    name: str
    kind: str
    asked: int
    items: list[Mapping[str, Any]] = field(default_factory=list)


def classify(item: Mapping[str, Any]) -> str | None:
    """Name of the failure, or None for an item that came out or was not measured after editing."""
    exact = item.get("exact") or []
    if len(exact) < 2 or exact[1] is None or exact[1]:
        return None
    return GROUPS.get((kind_of(item), _where(item)))


def failures(results: Results) -> list[FailureGroup]:
    """Non-empty groups of failures in reading order."""
    items = results.get("items") or []
    asked: dict[str, int] = {}
    for item in items:
        asked[kind_of(item)] = asked.get(kind_of(item), 0) + 1
    groups = {name: FailureGroup(name, kind, asked.get(kind, 0)) for (kind, _), name in GROUPS.items()}
    for item in items:
        name = classify(item)
        if name is not None:
            groups[name].items.append(item)
    return [g for g in groups.values() if g.items]


def kind_of(item: Mapping[str, Any]) -> str:
    """edit, rephrase, unrelated or near."""
    kind = item.get("kind")
    return "near" if kind in NEAR else str(kind)


def _where(item: Mapping[str, Any]) -> str:
    route = item.get("route")
    if not route or "memory" not in route:
        return ""
    return "kept out" if route["memory"] is None else "routed"
