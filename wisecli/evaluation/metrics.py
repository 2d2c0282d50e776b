"""Metrics of edited models, as pure functions of texts, token ids, likelihoods and scores.

Each says in its name what it compares. The families are never mixed: `exact_match` of free greedy generation with its
natural stop; what is measured under teacher forcing (`token_accuracy`, `all_tokens_match`, `perplexity`, `ood_token`,
`ood_example`, `prefers`), each token given the gold tokens before it, which is what papers report and which flatters an
editor; and what describes a gate (`auc`, `roc`). `bootstrap_interval` says how far a mean can be trusted. Nothing here
runs a model.

Likelihoods are negative log-likelihoods in nats, one per target token: nll_t = -ln p(y_t | x, y_<t). Functions of one
target want at least one token of it and raise ValueError otherwise.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Hashable, Sequence
from statistics import fmean, median
from statistics import harmonic_mean as _harmonic_mean

import numpy as np
from numpy.typing import NDArray

OOD_THRESHOLD = -math.log(0.8)  # nats; the delta of WISE eq. 9, where its text says 80 %
PERPLEXITY_LIMIT = 1e100  # stands for anything beyond it, infinite or undefined, because JSON has no infinity
PERPLEXITY_CLIP = 100.0
SCORE_FLOOR = 1e-4
ROC_POINTS = 200
_CELLS = 4_000_000  # numbers held at once while resampling


def normalise(text: str) -> str:
    """NFC, white space collapsed, without a final full stop: differences no reader would call another answer."""
    return " ".join(unicodedata.normalize("NFC", text).split()).removesuffix(".").rstrip()


def exact_match(answer: str, wanted: str) -> bool:
    """1[generated text = wanted text], after `normalise`; the whole generated text, nothing cut off.

    WISE eq. 10 read to the letter, f_T(x) = y.
    """
    return normalise(answer) == normalise(wanted)


def mean(values: Sequence[float | bool]) -> float | None:
    """1/n sum_i v_i; None where nothing was asked."""
    return fmean(values) if len(values) else None


# -- under teacher forcing ---------------------------------------------------------------------------------------------


def token_accuracy(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    """1/n sum_t 1[argmax_t = y_t] over the n target tokens, each predicted from the gold tokens before it.

    What EasyEdit computes where the WISE paper writes the indicator of eq. 10.
    """
    return fmean(p == w for p, w in zip(predicted, wanted, strict=True))


def all_tokens_match(predicted: Sequence[int], wanted: Sequence[int]) -> bool:
    """prod_t 1[argmax_t = y_t]: every target token is the argmax, given the gold tokens before it.

    The indicator of WilKE's eqs. 12 to 16 as its code computes it. It does not ask whether the answer stops there.
    """
    if not len(wanted):
        raise ValueError("a target without tokens")
    return all(p == w for p, w in zip(predicted, wanted, strict=True))


def perplexity(nll: Sequence[float]) -> float:
    """exp(1/n sum_t nll_t), of one target or of all tokens of a text.

    A result above PERPLEXITY_LIMIT, or one that is not defined because a model gives no number, is PERPLEXITY_LIMIT.
    """
    mean_nll = fmean(nll)
    # written so that NaN, which compares false, goes the second way
    return math.exp(mean_nll) if mean_nll < math.log(PERPLEXITY_LIMIT) else PERPLEXITY_LIMIT


def summarise_perplexity(values: Sequence[float]) -> dict[str, float] | None:
    """How the perplexities of many targets lie; None where there are none.

    Returns:
        `mean` = 1/n sum_i ppl_i, which is what EasyEdit reports on the hallucination data and which one bad target can
        carry away; `median`; `clipped` = 1/n sum_i min(ppl_i, PERPLEXITY_CLIP), the clipping that EasyEdit's code
        holds commented out.
    """
    if not len(values):
        return None
    clipped = fmean(min(v, PERPLEXITY_CLIP) for v in values)
    return {"mean": fmean(values), "median": float(median(values)), "clipped": clipped}


def ood_token(nll: Sequence[float]) -> float:
    """1/n sum_t 1[nll_t < -ln 0.8]: share of tokens that were given a probability above 0.8.

    What EasyEdit computes for the temporal data where the WISE paper writes eq. 9.
    """
    return fmean(x < OOD_THRESHOLD for x in nll)


def ood_example(nll: Sequence[float]) -> bool:
    """1[1/n sum_t nll_t < -ln 0.8], the indicator of WISE eq. 9 (OOD Gen.), its loss read as the mean over tokens."""
    return fmean(nll) < OOD_THRESHOLD


def prefers(nll_a: Sequence[float], nll_b: Sequence[float]) -> bool:
    """1[mean nll of a < mean nll of b]: a is the likelier of two continuations of one prompt, per token.

    P(a) > P(b) of CounterFact's ES, PS and NS (ROME, MEMIT) as their code computes it, exp(-1/n sum_t nll_t) for
    either side, so that a longer answer is not the less likely one for its length alone. Equal is not preferred.
    """
    return fmean(nll_a) < fmean(nll_b)


# -- many scores to one ------------------------------------------------------------------------------------------------


def harmonic_mean(values: Sequence[float], floor: float = SCORE_FLOOR) -> float:
    """n / sum_i 1/max(v_i, floor) of scores in [0, 1]: high only where all of them are.

    The score S of CounterFact (ROME, MEMIT: of ES, PS, NS) and of WilKE (of ES, GS, LS, ERS, ORS). WilKE's code puts
    1e-4 in place of a zero, so that the rest still counts; in ROME's and MEMIT's a zero makes S zero.
    """
    return _harmonic_mean([max(v, floor) for v in values])


def bootstrap_interval(
    values: Sequence[float | bool],
    clusters: Sequence[Hashable],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean of values that hang together in clusters.

    After Efron (1979), whole clusters being drawn (Field, Welsh 2007):
    K clusters are drawn with replacement from the K there are, each with all its values, and
    mean* = sum_k w_k s_k / sum_k w_k n_k with w ~ Multinomial(K, 1/K), s_k and n_k the sum and the number of the values
    of cluster k. The interval runs from the (1-level)/2 to the (1+level)/2 quantile of mean*. It knows only the
    variation between the given clusters: from one cluster, or from clusters of equal mean, it is [v, v], which says
    nothing about certainty, and from fewer than some twenty it is too narrow.

    Args:
        values: n finite scores.
        clusters: what each value belongs to, e.g. the id of the edit a question is about.
        level: wanted coverage, in (0, 1).

    Returns:
        (low, high), within the range of the values; the same for the same arguments. None for no values.
    """
    if not len(values):
        return None
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values, but the clusters of {len(clusters)}")
    x = np.asarray(values, dtype=np.float64)
    number: dict[Hashable, int] = {}
    member = np.asarray([number.setdefault(c, len(number)) for c in clusters])
    pairs = np.stack([np.bincount(member, weights=x), np.bincount(member)], 1)  # [K, 2]: s, n
    # Clusters of equal sum and size are drawn as one, with their joint probability: the same law, far fewer numbers.
    kinds, count = np.unique(pairs, axis=0, return_counts=True)
    means = _resampled_means(kinds, count, resamples, seed)
    low, high = np.clip(np.quantile(means, [(1 - level) / 2, (1 + level) / 2]), x.min(), x.max())
    return float(low), float(high)


def exact_interval(
    values: Sequence[float | bool], clusters: Sequence[Hashable], *, level: float = 0.95
) -> tuple[float, float] | None:
    """Clopper-Pearson interval where all values are 0, or all are 1; None otherwise.

    A bootstrap of such values is a point, as if nothing could have come out otherwise. Each of the K clusters counts as
    one trial: with a = (1-level)/2 the interval is [a^(1/K), 1] for ones and [0, 1 - a^(1/K)] for zeros.
    """
    if not len(values) or len(set(values)) > 1 or values[0] not in (0, 1):
        return None
    bound = float(((1 - level) / 2) ** (1 / len(set(clusters))))
    return (bound, 1.0) if values[0] else (0.0, 1 - bound)


def _resampled_means(kinds: NDArray, count: NDArray, resamples: int, seed: int) -> NDArray:
    """mean* [R] of `bootstrap_interval`, from the kinds of clusters [J, 2] and how many there are of each [J]."""
    rng = np.random.default_rng(seed)
    clusters = int(count.sum())
    step = max(1, _CELLS // len(kinds))
    means = []
    for at in range(0, resamples, step):
        weights = rng.multinomial(clusters, count / clusters, size=min(step, resamples - at))  # [r, J]
        sums = weights @ kinds  # [r, 2]
        means.append(sums[:, 0] / sums[:, 1])
    return np.concatenate(means)


# -- gates -------------------------------------------------------------------------------------------------------------


def auc(inside: Sequence[float], outside: Sequence[float]) -> float | None:
    """P(inside > outside) + P(inside = outside)/2 over all pairs: how well a score tells the two apart, 1/2 by chance.

    The Mann-Whitney statistic over n m, which is the area under `roc` (Hanley, McNeil 1982); by ranks, without making
    the pairs.

    Args:
        inside, outside: scores of prompts that a gate should and should not let through. NaN, which passes no gate,
            counts as lower than any number.

    Returns:
        None where either is empty.
    """
    if not len(inside) or not len(outside):
        return None
    a, b = _scores(inside), np.sort(_scores(outside))
    below = np.searchsorted(b, a, side="left").sum()
    not_above = np.searchsorted(b, a, side="right").sum()
    return float((int(below) + int(not_above)) / (2 * len(a) * len(b)))


def roc(
    inside: Sequence[float], outside: Sequence[float], points: int | None = ROC_POINTS
) -> tuple[list[float], list[float]]:
    """Receiver operating characteristic: over all thresholds e, tpr = P(inside >= e) against fpr = P(outside >= e).

    A staircase from (0, 0) to (1, 1), neither coordinate ever falling. Scores that are equal are one step, slanted
    where both sides have them, so that the trapezoid area is `auc`. Points on a straight line are left out.

    Args:
        inside, outside: as in `auc`.
        points: at most so many are given, None for all. They are then picked evenly along sqrt(fpr) + tpr, which keeps
            the corner of few false openings, where gates are used, in detail: an omitted point lies in a box between
            two given ones that is at most 4/points high in tpr and 4/points wide in sqrt(fpr).

    Returns:
        (fpr, tpr), equally long; empty where either side is.
    """
    if not len(inside) or not len(outside):
        return [], []
    a, b = np.sort(_scores(inside)), np.sort(_scores(outside))
    steps = np.unique(np.concatenate([a, b]))[::-1]  # thresholds, falling
    fp = np.concatenate([[0], len(b) - np.searchsorted(b, steps, side="left")])
    tp = np.concatenate([[0], len(a) - np.searchsorted(a, steps, side="left")])
    dx, dy = np.diff(fp), np.diff(tp)
    corner = dx[:-1] * dy[1:] != dx[1:] * dy[:-1]
    keep = np.concatenate([[True], corner, [True]])
    fpr, tpr = fp[keep] / len(b), tp[keep] / len(a)
    if points is not None and len(fpr) > points:
        picked = _spread(np.sqrt(fpr) + tpr, points)
        fpr, tpr = fpr[picked], tpr[picked]
    return fpr.tolist(), tpr.tolist()


def _scores(values: Sequence[float]) -> NDArray:
    x = np.asarray(values, dtype=np.float64)
    return np.where(np.isnan(x), -np.inf, x)


def _spread(position: NDArray, points: int) -> NDArray:
    """Which of rising positions in [0, 2] to keep: the first and the last of each of points/2 equal stretches."""
    stretches = points // 2
    stretch = np.minimum((position * (stretches / 2)).astype(int), stretches - 1)
    new = np.diff(stretch) > 0
    return np.concatenate([[True], new]) | np.concatenate([new, [True]])
