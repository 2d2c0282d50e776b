"""Failures as the report shows them: a folded table for each kind of failure, with prompts and answers in full.

Which failure an item is, is decided in `failures`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from wisecli.report.failures import FailureGroup, failures
from wisecli.report.results import Results, base_alone
from wisecli.report.view import DASH, Cell, Fold, Section, Table, figure

SHOWN = 100
"""Failures shown of each kind; the results hold all of them."""


def failure_section(results: Results) -> Section | None:
    """The section, None where nothing was asked after editing."""
    if not results.get("items") or base_alone(results):
        return None
    groups = failures(results)
    section = Section("failures", "Failures", "Every prompt that did not come out, by exact match, by what went wrong.")
    if not groups:
        section.lead = "None: every prompt that was asked came out right."
    section.blocks += [_fold(group) for group in groups]
    return section


def _fold(group: FailureGroup) -> Fold:
    """A group of failures as a table; columns in which nothing would stand are left out."""
    shown = group.items[:SHOWN]
    wanted = group.kind in ("edit", "rephrase")
    columns: dict[str, Callable[[Mapping[str, Any]], Cell]] = {
        "prompt": lambda i: Cell(str(i.get("prompt") or ""), str(i.get("edit"))),
        **({"wanted": lambda i: _answer(i.get("target"))} if wanted else {}),
        "before" if wanted else "base's answer": lambda i: _answer(i.get("before")),
        "after": lambda i: _answer(i.get("after")),
    }
    texts = len(columns)
    if any(i.get("open") is not None for i in shown):
        columns["gate open"] = lambda i: _answer(i.get("open"))
        texts += 1
    if any(_route(i).get("indicator") is not None for i in shown):
        columns["indicator"] = _indicator
    if any(_route(i).get("nearest_edit") is not None for i in shown):
        columns["nearest edit"] = lambda i: _nearest(i, wanted)
    left = len(group.items) - SHOWN
    note = f"{left:,} more are not shown here; the results file holds all of them." if left > 0 else ""
    rows = [tuple(make(item) for make in columns.values()) for item in shown]
    table = Table(list(columns), rows, left=texts, stacked=True, note=note)
    return Fold(group.name, f"{len(group.items):,} of {group.asked:,}", table, group.kind)


def _route(item: Mapping[str, Any]) -> Mapping[str, Any]:
    return item.get("route") or {}


def _indicator(item: Mapping[str, Any]) -> Cell:
    indicator, epsilon = (_route(item).get(k) for k in ("indicator", "epsilon"))
    return Cell(_three(indicator), f"ε {_three(epsilon)}" if epsilon is not None else "")


def _three(value: float | None) -> str:
    """Three decimals for cosines, fewer for large indicators."""
    return figure(value) if value is None or abs(value) < 10 else f"{value:,.1f}"


def _nearest(item: Mapping[str, Any], wanted: bool) -> Cell:
    nearest = _route(item).get("nearest_edit")
    other = wanted and nearest is not None and nearest != item.get("edit")
    return Cell(DASH if nearest is None else str(nearest), "another edit" if other else "")


def _answer(text: Any) -> Cell:
    """An answer as it is; an empty one says so."""
    if text is None:
        return Cell(DASH)
    return Cell(str(text) if str(text).strip() else "(nothing)")
