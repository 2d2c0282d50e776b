"""Metrics against plain oracles: brute force over all pairs, torch's cross entropy, all resamples written out."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from wisecli.evaluation import metrics
from wisecli.evaluation.metrics import (
    all_tokens_match,
    auc,
    bootstrap_interval,
    exact_interval,
    exact_match,
    harmonic_mean,
    mean,
    normalise,
    ood_example,
    ood_token,
    perplexity,
    prefers,
    roc,
    summarise_perplexity,
    token_accuracy,
)

TOKENS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12)
LOSSES = st.lists(st.floats(0, 30), min_size=1, max_size=20)
SHARES = st.lists(st.floats(0, 1), min_size=1, max_size=40)
# Few distinct values, so that ties are common; any finite ones besides.
SCORES = st.lists(st.integers(-3, 3).map(float) | st.floats(-10, 10), min_size=1, max_size=30)


# -- texts and tokens --------------------------------------------------------------------------------------------------


def test_exact_match_forgives_spacing_form_and_a_full_stop_only() -> None:
    assert exact_match("  Sa\u0303o  Paulo. ", "S\u00e3o Paulo")
    assert not exact_match("Sao Paulo", "S\u00e3o Paulo")
    assert not exact_match("Paris, France", "Paris")
    assert not exact_match("paris", "Paris")


@given(st.text(max_size=30).filter(lambda s: not s.rstrip().endswith(".")))
def test_normalising_twice_is_normalising_once(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@given(TOKENS)
def test_all_tokens_match_where_the_accuracy_is_one(pairs: list[tuple[int, int]]) -> None:
    predicted, wanted = zip(*pairs, strict=True)
    accuracy = token_accuracy(predicted, wanted)
    assert accuracy == sum(p == w for p, w in pairs) / len(pairs)
    assert all_tokens_match(predicted, wanted) == (accuracy == 1)


@pytest.mark.parametrize("metric", [token_accuracy, all_tokens_match])
def test_tokens_are_compared_one_to_one_and_there_are_some(metric: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="shorter"):
        metric((1, 2), (1,))
    with pytest.raises(ValueError, match=r"without tokens|at least one"):
        metric((), ())


def test_the_mean_of_nothing_is_none() -> None:
    assert mean([]) is None
    assert mean([True, False, True, True]) == 0.75


# -- likelihoods -------------------------------------------------------------------------------------------------------


@settings(deadline=None)  # the first call of torch takes a while
@given(st.integers(1, 20), st.integers(0, 10_000))
def test_perplexity_is_exp_of_the_cross_entropy(tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, 50, generator=generator, dtype=torch.float64) * 3
    gold = torch.randint(50, (tokens,), generator=generator)
    nll = -logits.log_softmax(-1)[torch.arange(tokens), gold]
    expected = torch.nn.functional.cross_entropy(logits, gold).exp()
    assert perplexity(nll.tolist()) == pytest.approx(float(expected), rel=1e-9)


def test_perplexity_of_a_uniform_model_is_its_number_of_choices() -> None:
    assert perplexity([math.log(7)] * 5) == pytest.approx(7)
    assert perplexity([0.0, 0.0]) == 1


@pytest.mark.parametrize("nll", [[1e6], [300.0], [math.inf, 1.0], [math.nan], [math.nan, math.inf]])
def test_a_perplexity_beyond_all_bounds_still_goes_into_json(nll: list[float]) -> None:
    value = perplexity(nll)
    assert value == metrics.PERPLEXITY_LIMIT
    summary = summarise_perplexity([value] * 1000 + [2.0])
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert perplexity([230.0]) < metrics.PERPLEXITY_LIMIT  # just below the limit it is computed


def test_one_bad_target_carries_away_the_mean_only() -> None:
    summary = summarise_perplexity([1.0, 2.0, 3.0, 1e6])
    assert summary == {"mean": 250001.5, "median": 2.5, "clipped": 26.5}
    assert summarise_perplexity([]) is None


@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=20))
def test_clipping_lowers_the_mean_to_the_bound_at_most(values: list[float]) -> None:
    summary = summarise_perplexity(values)
    assert summary is not None
    assert summary["clipped"] <= min(100, summary["mean"]) * (1 + 1e-12)
    assert min(values) <= summary["median"] <= max(values)
    if max(values) <= 100:
        assert summary["clipped"] == summary["mean"]


def test_ood_counts_probabilities_above_four_fifths() -> None:
    nll = [-math.log(p) for p in (0.95, 0.81, 0.79, 0.1)]
    assert ood_token(nll) == 0.5
    assert ood_example(nll[:2])
    assert not ood_example(nll)
    on_it = [-math.log(0.8)]
    assert ood_token(on_it) == ood_example(on_it) == 0  # strictly below


@given(LOSSES)
def test_an_ood_example_has_at_least_one_ood_token(nll: list[float]) -> None:
    assert 0 <= ood_token(nll) <= 1
    if ood_example(nll):
        assert ood_token(nll) > 0


def test_preference_does_not_depend_on_length() -> None:
    assert prefers([0.5] * 10, [0.6])  # less likely as a whole, more likely per token
    assert not prefers([0.6], [0.5] * 10)
    assert not prefers([1.0, 2.0], [1.5])  # equal is no preference


@given(LOSSES, LOSSES)
def test_preference_is_of_one_side_at_most(a: list[float], b: list[float]) -> None:
    assert prefers(a, b) == (perplexity(a) < perplexity(b)) or math.isclose(perplexity(a), perplexity(b))
    assert not (prefers(a, b) and prefers(b, a))


# -- means and their intervals -----------------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-3, 1), min_size=1, max_size=8))
def test_the_harmonic_mean_lies_between_the_least_and_the_arithmetic_mean(values: list[float]) -> None:
    value = harmonic_mean(values)
    assert value == pytest.approx(len(values) / sum(1 / v for v in values))
    assert min(values) * (1 - 1e-9) <= value <= np.mean(values) * (1 + 1e-9)


def test_a_zero_counts_as_the_floor() -> None:
    assert harmonic_mean([0.0, 1.0]) == pytest.approx(2 / (1e4 + 1))
    assert harmonic_mean([0.0, 1.0], floor=0.5) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="at least one"):
        harmonic_mean([])


@given(SHARES, st.data())
def test_an_interval_holds_the_mean_within_the_values_and_repeats(values: list[float], data: st.DataObject) -> None:
    clusters = data.draw(st.lists(st.integers(0, 9), min_size=len(values), max_size=len(values)))
    interval = bootstrap_interval(values, clusters, resamples=400)
    assert interval is not None
    low, high = interval
    assert min(values) <= low <= high <= max(values)
    assert low - 1e-9 <= np.mean(values) <= high + 1e-9
    assert bootstrap_interval(values, [f"edit-{c}" for c in clusters], resamples=400) == interval


def test_no_values_no_interval_and_one_cluster_no_width() -> None:
    assert bootstrap_interval([], []) is None
    low, high = bootstrap_interval([0, 1, 1, 1], ["a"] * 4) or (0, 0)
    assert low == high == 0.75
    with pytest.raises(ValueError, match="4 values"):
        bootstrap_interval([0, 1, 1, 1], ["a"] * 3)


def test_other_seeds_and_levels_give_other_intervals() -> None:
    values = np.random.default_rng(0).random(200).tolist()
    clusters = range(200)
    first = bootstrap_interval(values, clusters)
    assert bootstrap_interval(values, clusters, seed=1) != first
    narrow = bootstrap_interval(values, clusters, level=0.5)
    assert first is not None
    assert narrow is not None
    assert first[0] < narrow[0] < narrow[1] < first[1]


@pytest.mark.parametrize(("level", "z"), [(0.95, 1.96), (0.5, 0.674)])
def test_an_interval_of_many_independent_values_is_the_normal_one(level: float, z: float) -> None:
    values = np.random.default_rng(1).random(500)
    interval = bootstrap_interval(values.tolist(), range(500), level=level, resamples=10_000)
    half = z * values.std() / math.sqrt(500)
    assert interval == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05 * half)


def test_means_of_resamples_follow_the_law_of_all_resamples() -> None:
    """K = 4 clusters of unequal size: all 4^4 resamples written out, each as likely as the others."""
    clusters = {"a": [0.0, 0.25], "b": [1.0], "c": [0.0, 0.25], "d": [0.5, 0.5, 1.0]}
    drawn = [[v for c in pick for v in clusters[c]] for pick in itertools.product(clusters, repeat=4)]
    law = np.array([np.mean(values) for values in drawn])
    kinds = np.array([[0.25, 2], [1.0, 1], [2.0, 3]])  # a and c are of one kind
    found = metrics._resampled_means(kinds, np.array([2, 1, 1]), 40_000, 0)
    edges = np.unique(law.round(9))
    expected = np.array([(law.round(9) <= e).mean() for e in edges])
    seen = np.array([(found <= e + 1e-8).mean() for e in edges])
    assert np.abs(seen - expected).max() < 0.01  # the Kolmogorov distance; its 99.9 % point is 1.95 / sqrt(40000)


def test_memory_is_bounded_without_changing_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values, clusters = rng.random(500).tolist(), rng.integers(0, 200, 500).tolist()
    whole = bootstrap_interval(values, clusters)
    monkeypatch.setattr(metrics, "_CELLS", 1000)  # five resamples at once
    assert bootstrap_interval(values, clusters) == pytest.approx(whole, abs=1e-12)


def test_intervals_cover_the_truth_where_questions_hang_together() -> None:
    """300 simulated streams of 60 edits, 1 to 6 questions each that mostly share their edit's fate; truth 0.6."""
    rng = np.random.default_rng(7)
    covered = alone = 0
    for trial in range(300):
        sizes = rng.integers(1, 7, 60)
        fate = rng.random(60) < 0.6
        clusters = np.repeat(np.arange(60), sizes)
        own = rng.random(len(clusters)) < 0.6
        values = np.where(rng.random(len(clusters)) < 0.85, fate[clusters], own).astype(float)
        low, high = bootstrap_interval(values, clusters.tolist(), resamples=500, seed=trial) or (0, 0)
        covered += low <= 0.6 <= high
        low, high = bootstrap_interval(values, range(len(values)), resamples=500, seed=trial) or (0, 0)
        alone += low <= 0.6 <= high
    assert 0.90 <= covered / 300 <= 0.98
    assert alone / 300 < 0.85  # as if the questions were independent: far too sure


@pytest.mark.parametrize(
    ("clusters", "level", "bound"),
    [(1, 0.95, 0.975), (10, 0.95, 0.308497), (3, 0.5, 1 - 0.25 ** (1 / 3)), (1000, 0.95, 0.003682)],
)
def test_exact_bounds_of_no_success_and_of_no_failure(clusters: int, level: float, bound: float) -> None:
    """Known values of Clopper and Pearson's interval; failures and successes mirror one another."""
    zeros = exact_interval([0.0] * clusters, range(clusters), level=level)
    ones = exact_interval([True] * clusters, range(clusters), level=level)
    assert zeros == (0.0, pytest.approx(bound, abs=1e-6))
    assert ones == (pytest.approx(1 - bound, abs=1e-6), 1.0)


@given(st.integers(1, 400), st.floats(0.5, 0.999))
def test_an_exact_bound_is_the_share_that_makes_what_was_seen_just_unlikely_enough(n: int, level: float) -> None:
    _, high = exact_interval([0] * n, range(n), level=level) or (0, 0)
    low, _ = exact_interval([1] * n, range(n), level=level) or (0, 0)
    assert (1 - high) ** n == pytest.approx((1 - level) / 2)  # P(no success in n | high)
    assert low**n == pytest.approx((1 - level) / 2)  # P(no failure in n | low)
    assert 0 < low <= 1
    assert 0 <= high < 1


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.booleans())
def test_questions_of_one_edit_are_one_trial(clusters: list[int], value: bool) -> None:
    alone = sorted(set(clusters))
    assert exact_interval([value] * len(clusters), clusters) == exact_interval([value] * len(alone), alone)


@pytest.mark.parametrize("values", [[], [0.0, 1.0], [1, 1, 0], [0.5, 0.5], [0.5], [0.0, 1e-9], [2, 2]], ids=str)
def test_other_values_have_no_exact_interval(values: list[float]) -> None:
    assert exact_interval(values, range(len(values))) is None


# -- gates -------------------------------------------------------------------------------------------------------------


def brute_auc(inside: list[float], outside: list[float]) -> float:
    return float(np.mean([(a > b) + (a == b) / 2 for a in inside for b in outside]))


@given(SCORES, SCORES)
def test_auc_is_that_of_all_pairs(inside: list[float], outside: list[float]) -> None:
    value = auc(inside, outside)
    assert value == pytest.approx(brute_auc(inside, outside), abs=1e-12)
    assert auc(outside, inside) == pytest.approx(1 - brute_auc(inside, outside), abs=1e-12)


@given(SCORES, SCORES)
def test_auc_and_roc_know_the_order_of_scores_only(inside: list[float], outside: list[float]) -> None:
    values = sorted({*inside, *outside})
    assume(all(math.exp(a) < math.exp(b) for a, b in itertools.pairwise(values)))  # else rounding makes new ties
    moved = [math.exp(x) for x in inside], [math.exp(x) for x in outside]
    assert auc(*moved) == auc(inside, outside)
    assert roc(*moved) == roc(inside, outside)


def test_auc_at_its_ends_and_of_nothing() -> None:
    assert auc([2, 3], [0, 1]) == 1
    assert auc([0, 1], [2, 3]) == 0
    assert auc([1, 1], [1]) == 0.5
    assert auc([], [1]) is None
    assert auc([1], []) is None
    assert roc([], [1]) == roc([1], []) == ([], [])


def test_an_undefined_score_opens_no_gate() -> None:
    assert auc([1.0, math.nan], [0.0]) == 0.5
    assert auc([1.0], [math.nan, -math.inf]) == 1
    assert roc([1.0, math.nan], [0.0]) == ([0, 0, 1, 1], [0, 0.5, 0.5, 1])


@given(SCORES, SCORES)
def test_the_area_under_the_roc_is_the_auc(inside: list[float], outside: list[float]) -> None:
    fpr, tpr = roc(inside, outside, points=None)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert all(a <= b for a, b in itertools.pairwise(fpr))
    assert all(a <= b for a, b in itertools.pairwise(tpr))
    assert np.trapezoid(tpr, fpr) == pytest.approx(brute_auc(inside, outside), abs=1e-12)


@given(SCORES, SCORES, st.floats(-10, 10) | st.integers(-3, 3).map(float))
def test_every_threshold_is_on_the_roc(inside: list[float], outside: list[float], threshold: float) -> None:
    fpr, tpr = roc(inside, outside, points=None)
    x, y = np.mean(np.array(outside) >= threshold), np.mean(np.array(inside) >= threshold)
    on_a_line = [
        (x1 - x0) * (y - y0) == pytest.approx((y1 - y0) * (x - x0), abs=1e-12)
        for (x0, x1), (y0, y1) in zip(itertools.pairwise(fpr), itertools.pairwise(tpr), strict=True)
        if x0 <= x <= x1 and y0 <= y <= y1
    ]
    assert any(on_a_line)


@pytest.mark.parametrize("apart", [2.0, 0.3])
@pytest.mark.parametrize("ties", [False, True])
def test_a_thinned_roc_keeps_its_shape_and_its_corner(ties: bool, apart: float) -> None:
    rng = np.random.default_rng(3)
    inside, outside = rng.normal(apart, 1, 5000), rng.normal(0, 1, 20_000)
    if ties:
        inside, outside = inside.round(3), np.maximum(outside.round(3), -0.5)
    whole, thin = np.array(roc(inside, outside, points=None)).T, np.array(roc(inside, outside)).T
    assert len(thin) <= metrics.ROC_POINTS < len(whole) / 5
    assert {*map(tuple, thin)} <= {*map(tuple, whole)}
    assert thin[[0, -1]].tolist() == [[0, 0], [1, 1]]
    assert np.trapezoid(thin[:, 1], thin[:, 0]) == pytest.approx(auc(inside, outside), abs=1e-3)
    root = np.array([0.5, 1])  # sqrt(fpr), tpr
    for point in whole:
        before = thin[(thin <= point).all(1)][-1]
        behind = thin[(thin >= point).all(1)][0]
        in_between = (before < behind).any()
        assert not in_between or (behind**root - before**root).max() <= 4 / metrics.ROC_POINTS + 1e-12


def test_a_roc_of_few_steps_is_not_thinned() -> None:
    rng = np.random.default_rng(4)
    inside, outside = rng.normal(1, 1, 80), rng.normal(0, 1, 80)
    assert roc(inside, outside) == roc(inside, outside, points=None)
