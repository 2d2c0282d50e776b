"""Items as JSON, and what they add up to: scores, probabilities and routing evidence of hand-made items."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wisecli.data.records import SAME_RELATION, SAME_SUBJECT, UNRELATED
from wisecli.evaluation.evidence import routing_evidence
from wisecli.evaluation.metrics import bootstrap_interval, exact_interval
from wisecli.evaluation.questions import EDIT, REPHRASE, Item, Question
from wisecli.evaluation.scores import (
    BOOTSTRAP_SEED,
    average_of,
    open_of,
    perplexity_of,
    probability_of,
    scores_of,
    summary,
)
from wisecli.routing.routers import Route


def numbers() -> st.SearchStrategy[float]:
    return st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def items(draw: st.DrawFn) -> Item:
    text, shares, yes = st.text(), st.tuples(numbers(), numbers()), st.booleans()
    target = draw(st.none() | text)
    question = Question(
        draw(text),
        draw(st.sampled_from([EDIT, REPHRASE, UNRELATED, SAME_RELATION, SAME_SUBJECT])),
        draw(text),
        target,
        draw(st.none() | text),
        draw(st.none() | text),
    )
    number = numbers() | st.just(math.nan)
    route = st.builds(Route, st.none() | st.integers(0, 3), number, number, st.none() | text)
    return Item(
        question,
        draw(text),
        draw(text),
        draw(st.tuples(yes, yes)),
        draw(st.none() | shares),
        draw(st.none() | st.tuples(yes, yes)),
        draw(st.none() | shares),
        draw(st.none() | shares),
        draw(st.none() | route),
        draw(st.none() | st.tuples(text, yes)),
        draw(st.none() | st.tuples(yes, yes)),
    )


@settings(max_examples=150, deadline=None)
@given(items())
def test_items_survive_json(item: Item) -> None:
    document = json.dumps(item.to_json(), ensure_ascii=False, allow_nan=False)
    again = Item.from_json(json.loads(document))
    assert json.dumps(again.to_json(), ensure_ascii=False) == document
    if item.route is None or not (math.isnan(item.route.indicator) or math.isnan(item.route.epsilon)):
        assert again == item
    else:
        assert dataclasses.replace(again, route=None) == dataclasses.replace(item, route=None)
        assert again.route is not None
        assert (again.route.memory, again.route.edit) == (item.route.memory, item.route.edit)


def made(
    kind: str,
    edit: str,
    after: bool,
    *,
    indicator: float | None = None,
    nearest: str | None = None,
    opened: bool | None = None,
    nll: tuple[float, float] | None = None,
    contrast: tuple[float, float] | None = None,
    token: tuple[float, float] | None = None,
) -> Item:
    """An item with known numbers; the gate opens above 0.5."""
    route = None
    if indicator is not None:
        route = Route(0 if indicator > 0.5 else None, indicator, 0.5, nearest)
    question = Question(edit, kind, f"{edit} {kind}", "x" if kind in (EDIT, REPHRASE) else None)
    opening = None if opened is None else ("text", opened)
    before = kind not in (EDIT, REPHRASE)
    match = None if token is None else (token[0] == 1.0, token[1] == 1.0)
    return Item(question, "a", "b", (before, after), token, match, nll, contrast, route, opening)


def test_routing_evidence_by_hand() -> None:
    found = routing_evidence(
        [
            made(EDIT, "a", True, indicator=0.9, nearest="a"),
            made(EDIT, "b", True, indicator=0.8, nearest="a"),
            made(REPHRASE, "a", True, indicator=0.7, nearest="a"),
            made(REPHRASE, "b", False, indicator=0.3, nearest="b"),
            made(UNRELATED, "a", True, indicator=0.1, nearest="a"),
            made(UNRELATED, "a", True, indicator=0.2, nearest="b"),
            made(UNRELATED, "b", False, indicator=0.6, nearest="b"),
            made(SAME_RELATION, "b", True, indicator=0.3, nearest="b"),
        ],
        "key",
        [0.5],
    )
    assert found["precision"] == pytest.approx(3 / 4)
    assert found["recall"] == pytest.approx(3 / 4)
    assert found["false_opening"] == pytest.approx(1 / 4)
    kinds = found["kinds"]
    assert kinds["edit"] == {"n": 2, "routed": 1.0, "right_edit": 0.5}
    assert kinds["rephrase"] == {"n": 2, "routed": 0.5, "right_edit": 1.0}
    assert kinds["unrelated"] == {"n": 3, "routed": pytest.approx(1 / 3), "right_edit": None}
    assert kinds["same-relation"] == {"n": 1, "routed": 0.0, "right_edit": None}
    assert kinds["same-subject"] == {"n": 0, "routed": None, "right_edit": None}
    assert found["auc"]["edit"] == {"unrelated": 1.0, "near": 1.0}
    # of the six pairs 0.7 wins three, 0.3 two; against 0.3 alone one wins and one ties
    assert found["auc"]["rephrase"] == {"unrelated": pytest.approx(5 / 6), "near": pytest.approx(0.75)}
    roc = found["roc"]["unrelated"]
    assert (roc["fpr"][0], roc["tpr"][0], roc["fpr"][-1], roc["tpr"][-1]) == (0, 0, 1, 1)
    area = sum((b - a) * (x + y) / 2 for (a, b), (x, y) in zip(pairwise(roc["fpr"]), pairwise(roc["tpr"]), strict=True))
    assert area == pytest.approx(5 / 6)


def test_routing_evidence_where_kinds_are_lacking() -> None:
    alone = routing_evidence([made(EDIT, "a", True, indicator=0.4)], "activation", [0.5])
    assert (alone["precision"], alone["recall"], alone["false_opening"]) == (None, 0.0, None)
    assert alone["auc"]["edit"] == {"unrelated": None, "near": None}
    assert alone["roc"] == {"unrelated": None, "near": None}
    assert alone["kinds"]["edit"]["right_edit"] is None  # the activation router names no edit
    both = routing_evidence(
        [made(EDIT, "a", True, indicator=0.4), made(UNRELATED, "a", True, indicator=0.4)], "key", [0.5]
    )
    assert both["auc"]["edit"]["unrelated"] == 0.5
    assert both["roc"]["unrelated"] is not None  # edits stand in for rephrases


def test_scores_by_hand() -> None:
    hand = [
        made(EDIT, "a", True, token=(0.5, 1.0), nll=(math.log(4), math.log(2)), opened=True),
        made(EDIT, "b", False, token=(0.0, 0.25), nll=(math.log(1000), math.log(8)), opened=True),
        made(REPHRASE, "a", True, token=(0.0, 0.5), opened=True),
        made(REPHRASE, "a", False, opened=False),
        made(REPHRASE, "b", False, token=(0.0, 0.0), opened=False),
        made(UNRELATED, "a", True, token=(1.0, 1.0), opened=False),
        made(SAME_RELATION, "a", True, token=(1.0, 1.0), opened=True),
        made(SAME_SUBJECT, "b", False, token=(1.0, 0.5), opened=False),
    ]
    scores = scores_of(hand)
    exact = {name: (m["exact"]["before"], m["exact"]["after"], m["exact"]["n"]) for name, m in scores.items()}
    want = {"rel": (0, 0.5, 2), "gen": (0, pytest.approx(1 / 3), 3), "loc": (1, 1, 1), "loc_near": (1, 0.5, 2)}
    assert exact == want
    token = {name: (m["token"]["before"], m["token"]["after"], m["token"]["n"]) for name, m in scores.items()}
    assert token == {"rel": (0.25, 0.625, 2), "gen": (0, 0.25, 2), "loc": (1, 1, 1), "loc_near": (1, 0.75, 2)}
    assert scores["rel"]["match"]["after"] == 0.5
    low, high = scores["rel"]["exact"]["after_interval"]
    assert (low, high) == (0.0, 1.0)
    average = average_of(scores)
    assert average["exact"]["after"] == pytest.approx((0.5 + 1 / 3 + 1) / 3)
    assert (average["exact"]["n"], average["exact"]["after_interval"]) == (6, None)
    opening = {"rel": 1.0, "gen": pytest.approx(1 / 3), "loc": 0.0, "loc_near": 0.5}
    assert open_of(hand) == opening
    assert open_of([dataclasses.replace(i, opened=None) for i in hand]) is None
    ppl = perplexity_of(hand)
    assert ppl["rel"]["n"] == 2
    assert ppl["rel"]["before"] == pytest.approx({"mean": 502, "median": 502, "clipped": 52})
    assert ppl["rel"]["after"] == pytest.approx({"mean": 5, "median": 5, "clipped": 5})
    assert ppl["gen"] == {"before": None, "after": None, "n": 0}
    partly = average_of(scores_of([i for i in hand if i.question.kind != UNRELATED]))
    assert (partly["exact"]["before"], partly["exact"]["after"]) == (None, None)


def test_a_score_without_spread_has_the_exact_interval_and_any_other_the_bootstrap_s() -> None:
    edits = ["a", "a", "b", "c", "c"]
    pairs = [(False, True)] * 5
    found = summary(list(zip(edits, pairs, strict=True)))
    assert found["before_interval"] == list(exact_interval([0] * 5, edits) or ())
    assert found["after_interval"] == list(exact_interval([1] * 5, edits) or ())
    assert found["after_interval"] == [pytest.approx(0.025 ** (1 / 3)), 1.0]  # three edits, not five prompts
    assert (found["before"], found["after"], found["n"]) == (0.0, 1.0, 5)
    mixed = [(False, x) for x in (1, 1, 0, 1, 0)]
    found = summary(list(zip(edits, mixed, strict=True)))
    assert found["before_interval"] == [0.0, pytest.approx(1 - 0.025 ** (1 / 3))]
    assert found["after_interval"] == list(bootstrap_interval([1, 1, 0, 1, 0], edits, seed=BOOTSTRAP_SEED) or ())
    same = summary([("a", (0.5, 0.5)), ("b", (0.5, 0.5))])
    assert same["after_interval"] == [0.5, 0.5]
    nothing = summary([])
    assert (nothing["before"], nothing["before_interval"], nothing["after_interval"]) == (None, None, None)


def test_probability_comparisons_by_hand() -> None:
    """`nll` is of what is wanted: the target of an edit, the true answer of a near probe."""
    hand = [
        made(EDIT, "a", True, nll=(3.0, 1.0), contrast=(2.0, 2.0)),
        made(EDIT, "b", True, nll=(3.0, 2.0), contrast=(2.0, 2.0)),  # equal is not preferred
        made(REPHRASE, "a", True, nll=(1.0, 1.0), contrast=(2.0, 2.0)),
        made(SAME_RELATION, "a", True, nll=(1.0, 3.0), contrast=(2.0, 2.0)),
        made(SAME_SUBJECT, "b", True, nll=(1.0, 1.0), contrast=(2.0, 2.0)),
        made(UNRELATED, "b", True, nll=(1.0, 1.0), contrast=(2.0, 2.0)),
        made(EDIT, "c", True, nll=(1.0, 1.0)),
    ]
    found = probability_of(hand)
    assert found is not None
    sides = {k: (v["before"], v["after"], v["n"]) for k, v in found.items() if k != "score"}
    assert sides == {"es": (0.0, 0.5, 2), "ps": (1.0, 1.0, 1), "ns": (1.0, 0.5, 2)}
    assert found["score"]["after"] == pytest.approx(3 / (1 / 0.5 + 1 / 1 + 1 / 0.5))
    assert found["score"]["n"] == 5
    assert probability_of([made(EDIT, "c", True, nll=(1.0, 1.0))]) is None
    some = probability_of(hand[:2])
    assert some is not None
    assert (some["ns"]["n"], some["score"]["after"]) == (0, None)
