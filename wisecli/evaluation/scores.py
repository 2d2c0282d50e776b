"""From items to scores: averages with their bootstrap intervals, per score and metric.

Every score is a mean over prompts; its interval resamples whole edits, because the prompts of one edit hang together.
Where all prompts score 0, or all 1, resampling shows no spread and the interval is the exact binomial one over edits.
The dictionaries made here are parts of results.json. What a score compares is named in `METRICS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from wisecli.evaluation.answers import PROBE_TOKENS, SLACK
from wisecli.evaluation.asking import OodText
from wisecli.evaluation.metrics import (
    bootstrap_interval,
    exact_interval,
    harmonic_mean,
    mean,
    perplexity,
    prefers,
    summarise_perplexity,
)
from wisecli.evaluation.questions import EDIT, NEAR, REPHRASE, SCORES, Item

BOOTSTRAP_SEED = 0
AVERAGED = ("rel", "gen", "loc")
METRICS = {
    "exact": "exact match of free greedy generation with natural stop; locality: agreement with the base's own tokens, "
    f"generated as far as the probe's answer and {SLACK} more, at most {PROBE_TOKENS}",
    "token": "teacher-forced token accuracy; locality: agreement with the base's own argmax tokens",
    "match": "teacher-forced all-token match; locality: agreement of all of the base's own argmax tokens",
    "perplexity": "exp of the mean negative log-likelihood of the target's tokens, per prompt; clipped: cut at 100",
    "ood": "token: share of a text's tokens, all but the first, with a loss below -log 0.8; "
    "example: share of texts with a mean loss below it (WISE eq. 9)",
    "probability": "ES, PS: share of edits, rephrases that give the target a higher probability per token than the "
    "true answer; NS: share of near prompts that give the true answer the higher one; score: their harmonic mean",
}
_PAIRED: dict[str, Callable[[Item], tuple[float, float] | None]] = {
    "exact": lambda i: i.exact,
    "token": lambda i: i.token,
    "match": lambda i: i.match,
}


def scores_of(items: Sequence[Item]) -> dict[str, dict[str, Any]]:
    """Score name -> metric -> summary, for rel, gen, loc and loc_near."""
    return {
        name: {
            metric: summary([(i.question.edit, value) for i in items if _in(i, kinds) and (value := pair(i))])
            for metric, pair in _PAIRED.items()
        }
        for name, kinds in SCORES.items()
    }


def summary(values: Sequence[tuple[str, tuple[float, float]]]) -> dict[str, Any]:
    """Means before and after, with 95 % intervals, of (edit, (before, after)); None for nothing."""
    out: dict[str, Any] = {"n": len(values)}
    edits = [edit for edit, _ in values]
    for at, name in enumerate(("before", "after")):
        side = [pair[at] for _, pair in values]
        interval = exact_interval(side, edits) or bootstrap_interval(side, edits, seed=BOOTSTRAP_SEED)
        out |= {name: mean(side), f"{name}_interval": None if interval is None else list(interval)}
    return out


def average_of(scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The papers' average: mean of Rel, Gen and Loc, where all of them were asked."""
    out: dict[str, Any] = {}
    for metric in _PAIRED:
        parts = [scores[name][metric] for name in AVERAGED]
        asked = all(p["n"] for p in parts)
        means = {side: mean([p[side] for p in parts]) if asked else None for side in ("before", "after")}
        intervals = {"before_interval": None, "after_interval": None}
        out[metric] = {**means, **intervals, "n": sum(p["n"] for p in parts)}
    return out


def plain(items: Sequence[Item]) -> dict[str, float | None]:
    """Exact scores after editing, without intervals."""
    return {name: mean([i.exact[1] for i in items if _in(i, kinds)]) for name, kinds in SCORES.items()}


def open_of(items: Sequence[Item]) -> dict[str, float | None] | None:
    """Exact scores with the gate always open; None where that was not asked."""
    asked = [i for i in items if i.opened is not None]
    if not asked:
        return None
    return {name: mean([i.opened[1] for i in asked if i.opened and _in(i, kinds)]) for name, kinds in SCORES.items()}


def perplexity_of(items: Sequence[Item]) -> dict[str, Any]:
    """Perplexity of the target, of edits (rel) and rephrases (gen): mean, median and clipped mean."""
    out: dict[str, Any] = {}
    for name in ("rel", "gen"):
        known = [i.nll for i in items if _in(i, SCORES[name]) and i.nll is not None]
        sides = {
            side: summarise_perplexity([perplexity([pair[at]]) for pair in known])
            for at, side in enumerate(("before", "after"))
        }
        out[name] = {**sides, "n": len(known)}
    return out


def probability_of(items: Sequence[Item]) -> dict[str, Any] | None:
    """CounterFact's ES, PS and NS; None where the dataset gives no true answers."""
    parts = {}
    for name, kinds in (("es", (EDIT,)), ("ps", (REPHRASE,)), ("ns", NEAR)):
        mine = [i for i in items if _in(i, kinds) and i.nll is not None and i.contrast is not None]
        parts[name] = summary([(i.question.edit, _preferred(i)) for i in mine])
    if not any(p["n"] for p in parts.values()):
        return None
    whole: dict[str, Any] = {"n": sum(p["n"] for p in parts.values())}
    for side in ("before", "after"):
        values = [p[side] for p in parts.values()]
        whole |= {side: None if None in values else harmonic_mean(values), f"{side}_interval": None}
    return {**parts, "score": whole}


def ood_of(texts: Sequence[OodText]) -> dict[str, Any] | None:
    """OOD generalization by tokens and by examples, with every text; None where the dataset has none."""
    if not texts:
        return None
    return {
        "token": summary([(t.edit, t.token) for t in texts]),
        "example": summary([(t.edit, t.example) for t in texts]),
        "routed": mean([t.routed for t in texts if t.routed is not None]),
        "texts": [t.to_json() for t in texts],
    }


def _in(item: Item, kinds: Sequence[str]) -> bool:
    return item.question.kind in kinds


def _preferred(item: Item) -> tuple[bool, bool]:
    """Whether the wanted text beats its contrast, before and after; `nll` is of what is wanted."""
    pairs = zip(item.nll or (), item.contrast or (), strict=True)
    before, after = (prefers([a], [b]) for a, b in pairs)
    return before, after
