"""The plots of one results.json: scores, indicator and ROC of the gate, retention, fresh against end of stream, WilKE.

Each is drawn where its data is there and left out where it is not. Axes of shares run from 0 to 1; values stand beside
the bars; lines carry their names. Look and formats are in `canvas`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wisecli.report import canvas
from wisecli.report.canvas import INK, MUTED, SCORE_COLOURS, Bar, BarGroup, bar_rows, line_names, new_figure, styled
from wisecli.report.failures import kind_of
from wisecli.report.results import PROMPTS, SCORES, SHORT, Results, asked, base_alone, metrics_of, score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KIND_OF_SCORE = {"rel": "edit", "gen": "rephrase", "loc": "unrelated", "loc_near": "near"}
_BINS = 40
_LONG_TAIL = 50  # largest over smallest indicator from which its axis is logarithmic
_WIDE_RANGE = 25  # last over first checkpoint from which the axis of the stream is logarithmic


@dataclass(frozen=True)
class Plot:
    """A plot: its file name, what it shows, whether the data is there, and how it is drawn."""

    name: str
    caption: Callable[[Results], str]
    has: Callable[[Results], object]
    draw: Callable[[Results], Figure]


def svg(plot: Plot, results: Results) -> str:
    """The plot as an SVG element."""
    with styled(plot.name):
        return canvas.to_svg(plot.draw(results), plot.name, plot.caption(results))


def write_plots(results: Results, folder: Path) -> list[Path]:
    """Write every plot there is data for as FOLDER/NAME.png; returns their paths.

    Raises:
        OutputError: the folder cannot be written.
    """
    from wisecli.memory.files import ensure_writable, write_bytes

    ensure_writable(folder)
    paths = []
    for plot in PLOTS:
        if plot.has(results):
            path = folder / f"{plot.name}.png"
            with styled(plot.name):
                write_bytes(path, canvas.to_png(plot.draw(results)))
            paths.append(path)
    return paths


# -- scores -----------------------------------------------------------------------------------------------------------


def _draw_scores(results: Results) -> Figure:
    groups = []
    alone = base_alone(results)
    for name in asked(results):
        bars = []
        for metric in (m for m in metrics_of(results) if m != "match"):
            s = score(results, name, metric)
            if not s.get("n"):
                continue
            if alone:
                bars.append(Bar(metric, s.get("before"), s.get("before_interval"), SCORE_COLOURS[name]))
            else:
                after, interval = s.get("after"), s.get("after_interval")
                bars.append(Bar(metric, after, interval, SCORE_COLOURS[name], s.get("before")))
        groups.append(BarGroup(SCORES[name], f"{score(results, name)['n']} {PROMPTS[name]}", bars))
    columns = ("", "base") if alone else ("before", "after")
    return bar_rows(groups, columns, "share of prompts (exact), of tokens (token)")


def _draw_fresh(results: Results) -> Figure:
    groups = []
    fresh = {"scores": results["fresh"]["scores"]}
    for name in asked(results):
        s, early = score(results, name), score(fresh, name)
        if early.get("after") is not None:
            bar = Bar("exact", s.get("after"), s.get("after_interval"), SCORE_COLOURS[name], early["after"])
            groups.append(BarGroup(SCORES[name], "", [bar]))
    return bar_rows(groups, ("fresh", "end"), "share of prompts")


# -- the gate ---------------------------------------------------------------------------------------------------------


def indicators(results: Results) -> dict[str, list[tuple[float, bool]]]:
    """(indicator, routed) of every prompt that has one, by score; scores without any are left out."""
    found: dict[str, list[tuple[float, bool]]] = {name: [] for name in SCORES}
    names = {kind: name for name, kind in KIND_OF_SCORE.items()}
    for item in results.get("items") or []:
        route, name = item.get("route") or {}, names.get(kind_of(item))
        if name and route.get("indicator") is not None:
            found[name].append((route["indicator"], route.get("memory") is not None))
    return {name: values for name, values in found.items() if values}


def _draw_indicator(results: Results) -> Figure:
    import numpy as np

    found = indicators(results)
    everything = [v for values in found.values() for v, _ in values]
    epsilons = _epsilons(results)
    low, high = min(everything + epsilons), max(everything + epsilons)
    low, high = (low, high) if low < high else (low - 0.5, high + 0.5)
    tail = low > 0 and high / low > _LONG_TAIL
    edges = np.geomspace(low, high, _BINS + 1) if tail else np.linspace(low, high, _BINS + 1)
    figure = new_figure(0.75 + 0.82 * len(found))
    axes = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (name, values) in zip(axes, found.items(), strict=True):
        weights = [1 / len(values)] * len(values)
        ax.hist([v for v, _ in values], bins=edges, weights=weights, color=SCORE_COLOURS[name], histtype="stepfilled")
        routed = sum(r for _, r in values)
        title = f"{PROMPTS[name]}: {routed} of {len(values)} let in"
        ax.set_title(title, loc="left", pad=3)
        _percent_axis(ax)
        for epsilon in epsilons:
            ax.axvline(epsilon, color=INK, linewidth=1, linestyle=(0, (4, 2)))
    _label_epsilon(axes[0], epsilons)
    if tail:
        axes[-1].set_xscale("log")
    axes[-1].set_xlabel(_indicator_name(results))
    figure.supylabel("share of prompts per bin", fontsize=9, color=INK)
    return figure


def _epsilons(results: Results) -> list[float]:
    """Different thresholds, at most a handful: with more memories than that lines would say nothing."""
    values = [e for e in (results.get("routing") or {}).get("epsilon") or [] if e is not None]
    return sorted(set(values)) if len(set(values)) <= 4 else [min(values), max(values)]


def _label_epsilon(ax: Axes, epsilons: Sequence[float]) -> None:
    if not epsilons:
        return
    text = f"ε = {epsilons[0]:.3g}" if len(epsilons) == 1 else f"ε: {epsilons[0]:.3g} to {epsilons[-1]:.3g}"
    ax.annotate(
        text,
        (epsilons[-1], 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 15),
        textcoords="offset points",
        ha="center",
        annotation_clip=False,
    )


def _percent_axis(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(2))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def _indicator_name(results: Results) -> str:
    router = (results.get("routing") or {}).get("router")
    known = {
        "key": "indicator: largest cosine with an edit's key",
        "activation": "activation indicator (eq. 3 of the WISE paper)",
    }
    return known.get(str(router), "routing indicator")


def _draw_roc(results: Results) -> Figure:
    curves = {k: c for k, c in sorted(results["routing"]["roc"].items(), reverse=True) if _drawable(c)}
    colours = {"unrelated": SCORE_COLOURS["loc"], "near": SCORE_COLOURS["loc_near"]}
    negatives = {k: _negatives(results, k) for k in curves}
    corner = all((_auc(results, k) or 0) > 0.9 for k in curves)
    figure = new_figure(3.3)
    ax = figure.add_subplot()
    for row, (kind, curve) in enumerate(curves.items()):
        fpr, tpr = [0.0, *curve["fpr"], 1.0], [0.0, *curve["tpr"], 1.0]
        ax.plot(fpr, tpr, color=colours.get(kind, INK), drawstyle="steps-post", clip_on=False)
        auc = _auc(results, kind)
        text = f"against {kind} prompts" + (f", AUC {auc:.3f}" if auc is not None else "")
        y = 0.16 + 0.09 * (len(curves) - 1 - row)
        ax.plot([0.20, 0.25], [y, y], color=colours.get(kind, INK), transform=ax.transAxes, linewidth=2.5)
        ax.text(0.28, y, text, transform=ax.transAxes, ha="left", va="center")
        _mark_threshold(ax, results, kind)
    ax.plot([0.225], [0.07], "o", color=INK, markersize=5, transform=ax.transAxes)
    ax.text(0.28, 0.07, "the gate at its threshold ε", transform=ax.transAxes, ha="left", va="center")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="false openings: share of these prompts let in")
    ax.set_ylabel(f"share of {_positives(results)} let in")
    if corner:
        _stretch_corner(ax, max(negatives.values()))
    else:
        ax.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
    ax.grid()
    return figure


def _stretch_corner(ax: Axes, prompts: int) -> None:
    """A horizontal axis that is linear below one prompt's share and logarithmic above, so that the corner is seen."""
    least = 10.0 ** math.floor(math.log10(1 / max(prompts, 10)))
    ax.set_xscale("symlog", linthresh=least, linscale=0.5)
    ticks = [0.0, *(10.0**e for e in range(round(math.log10(least)), 1))]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.xaxis.set_minor_locator(_nothing())
    ax.set_xlim(0, 1)
    ax.set_xlabel("false openings: share of these prompts let in (log scale)")


def _nothing() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _mark_threshold(ax: Axes, results: Results, kind: str) -> None:
    """The point at which the gate stands."""
    routed = _kinds(results, kind)
    passed = _kinds(results, "rephrase") or _kinds(results, "edit")
    if routed and passed:
        x = sum(n * r for n, r in routed) / sum(n for n, _ in routed)
        y = sum(n * r for n, r in passed) / sum(n for n, _ in passed)
        ax.plot([x], [y], "o", color=INK, markersize=5, clip_on=False, zorder=5)


def _kinds(results: Results, kind: str) -> list[tuple[int, float]]:
    """(number, share routed) of the kinds of prompts that a curve's name stands for."""
    names = ("same-relation", "same-subject") if kind == "near" else (kind,)
    kinds = (results.get("routing") or {}).get("kinds") or {}
    found = [kinds.get(name) or {} for name in names]
    return [(k["n"], k["routed"]) for k in found if k.get("n") and k.get("routed") is not None]


def _negatives(results: Results, kind: str) -> int:
    return sum(n for n, _ in _kinds(results, kind)) or 100


def _positives(results: Results) -> str:
    return "paraphrases" if _kinds(results, "rephrase") else "edits"


def _auc(results: Results, kind: str) -> float | None:
    auc = results["routing"].get("auc") or {}
    of = auc.get("rephrase" if _kinds(results, "rephrase") else "edit") or {}
    return of.get(kind)


def _drawable(curve: Any) -> bool:
    return bool(curve and curve.get("fpr")) and len(curve["fpr"]) == len(curve.get("tpr") or [])


# -- over the stream --------------------------------------------------------------------------------------------------


def _draw_retention(results: Results) -> Figure:
    points = results["retention"]
    lines = {SHORT[name]: ([(p.get("scores") or {}).get(name) for p in points], SCORE_COLOURS[name]) for name in SCORES}
    return _lines([p["edits"] for p in points], lines, "edits learned so far", "exact, share of all asked so far")


def _draw_wilke(results: Results) -> Figure:
    wilke = results["wilke"]
    colours = {"ers": SCORE_COLOURS["rel"], "ors": SCORE_COLOURS["loc"], "s": INK}
    lines = {k.upper(): (wilke[k], colour) for k, colour in colours.items() if wilke_series(results, k)}
    return _lines(wilke["checkpoints"], lines, "edits learned so far", "score")


def wilke_series(results: Results, name: str) -> list[float | None]:
    """A WilKE score at each checkpoint; empty where it was not taken at each."""
    wilke = results.get("wilke") or {}
    values = wilke.get(name)
    same = isinstance(values, list) and len(values) == len(wilke.get("checkpoints") or [])
    return list(values) if same and values else []


def _lines(
    x: Sequence[float], lines: Mapping[str, tuple[Sequence[float | None], str]], xlabel: str, ylabel: str
) -> Figure:
    """Lines over the stream, from 0 to 1, each with its name at its end."""
    figure = new_figure(2.9)
    ax = figure.add_subplot()
    ends = []
    for name, (values, colour) in lines.items():
        known = [(a, b) for a, b in zip(x, values, strict=True) if b is not None]
        if known:
            ax.plot(*zip(*known, strict=True), "o-", color=colour, markersize=3, clip_on=False)
            ends.append((known[-1][1], f"{name} {known[-1][1]:.3f}", colour))
    line_names(ax, ends)
    ax.set(xlim=(0, max(x)), ylim=(0, 1), xlabel=xlabel, ylabel=ylabel)
    if min(x) > 0 and max(x) / min(x) > _WIDE_RANGE:
        ax.set_xscale("log")
        ax.set_xticks(x, [str(v) for v in x])
        ax.xaxis.set_minor_locator(_nothing())
        ax.set_xlim(min(x), max(x))
    ax.grid(axis="y")
    return figure


def _scores_caption(results: Results) -> str:
    text = "Scores by exact match and by teacher-forced tokens"
    if base_alone(results):
        return f"{text}, with 95 % intervals."
    return f"{text}: thick bars after editing, with 95 % intervals; thin grey bars before."


def _said(text: str) -> Callable[[Results], str]:
    return lambda _: text


PLOTS = (
    Plot("scores", _scores_caption, asked, _draw_scores),
    Plot(
        "indicator",
        _said("Indicator of every prompt, by kind of prompt, with the threshold ε."),
        lambda r: r.get("routing") and indicators(r),
        _draw_indicator,
    ),
    Plot(
        "roc",
        lambda r: f"ROC of the gate: the share of {_positives(r)} let in against the share of others let in.",
        lambda r: any(_drawable(c) for c in ((r.get("routing") or {}).get("roc") or {}).values()),
        _draw_roc,
    ),
    Plot(
        "retention",
        _said("Exact scores over everything learned so far, as the stream grows."),
        lambda r: r.get("retention"),
        _draw_retention,
    ),
    Plot(
        "fresh",
        _said("Exact scores at the end of the stream (thick, with 95 % intervals) and right after each edit (thin)."),
        lambda r: (r.get("fresh") or {}).get("scores"),
        _draw_fresh,
    ),
    Plot(
        "wilke",
        _said("Original answers still given as the stream grows: of edited facts (ERS), of untouched ones (ORS); S."),
        lambda r: any(wilke_series(r, k) for k in ("ers", "ors", "s")),
        _draw_wilke,
    ),
)
