"""Results side by side as plots: the triangle of Rel, Gen and Loc (the WISE paper's figure 1), and bars with intervals.

Each result has one colour and one line style in both, so that polygons that lie on one another are still told apart.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from wisecli.report import canvas
from wisecli.report.canvas import INK, METHOD_COLOURS, MUTED, RULE, Bar, BarGroup, bar_rows, new_figure, styled
from wisecli.report.compare import Comparison
from wisecli.report.results import SCORES
from wisecli.report.view import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CORNERS = {"rel": 90.0, "gen": 330.0, "loc": 210.0}  # degrees
_STYLES = ("solid", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
_NAME_WIDTH = 58  # characters of a name on a line of the legend
_LABEL_WIDTH = 22  # characters of a name beside its bar


def pictures(comparison: Comparison) -> list[Picture]:
    """Both plots as SVG."""
    metric = comparison.metric
    triangle = f"Reliability, generalization and locality, {metric}; a corner is 1, the middle 0."
    bars = f"Scores, {metric}, with 95 % bootstrap intervals."
    with styled("compare"):
        return [
            Picture(Markup(canvas.to_svg(draw_triangle(comparison), "triangle", triangle)), triangle),
            Picture(Markup(canvas.to_svg(draw_bars(comparison), "bars", bars)), bars),
        ]


def png(comparison: Comparison) -> bytes:
    """The triangle above the bars in one picture, with setting and differences beneath."""
    import io

    from PIL import Image

    with styled("compare"):
        parts = [canvas.to_png(f) for f in (draw_triangle(comparison), draw_bars(comparison), _draw_text(comparison))]
    images = [Image.open(io.BytesIO(p)).convert("RGB") for p in parts]
    whole = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), "white")
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height
    out = io.BytesIO()
    whole.save(out, format="PNG", dpi=(canvas.DPI, canvas.DPI))
    return out.getvalue()


def draw_triangle(comparison: Comparison) -> Figure:
    """Three axes, one polygon per result."""
    short = labels(comparison)
    pairs = [(e.name, name) for e, name in zip(comparison.entries, short, strict=True)]
    full = [name if _parts(label) <= _parts(name) else f"{label}: {name}" for name, label in pairs]
    names = [textwrap.fill(name, _NAME_WIDTH) for name in full]
    lines = sum(n.count("\n") + 1 for n in names)
    figure = new_figure(3.25 + 0.17 * lines)
    ax = figure.add_subplot()
    _draw_web(ax)
    for i, (entry, name) in enumerate(zip(comparison.entries, names, strict=True)):
        known = [entry.value(corner, comparison.metric) for corner in CORNERS]
        values = [v for v in known if v is not None]
        if len(values) < len(known):
            continue
        colour, style = METHOD_COLOURS[i % len(METHOD_COLOURS)], _STYLES[i % len(_STYLES)]
        ax.fill(*_corners(values), color=colour, alpha=0.08, linewidth=0)
        _draw_polygon(ax, values, color=colour, linestyle=style, marker="o", markersize=3.5, label=name, clip_on=False)
    ax.set(xlim=(-1.15, 1.15), ylim=(-0.72, 1.12), aspect="equal")
    ax.axis("off")
    figure.legend(loc="outside lower left", handlelength=3)
    return figure


def _draw_web(ax: Axes) -> None:
    """Rings at quarters, spokes and the corners' names."""
    for ring in (0.25, 0.5, 0.75, 1.0):
        _draw_polygon(ax, [ring] * 3, color=MUTED if ring == 1 else RULE, linewidth=0.7)
        ax.text(-0.05, ring, f"{ring:g}", color=MUTED, fontsize=7.5, ha="right", va="center")
    for name, angle in CORNERS.items():
        x, y = _at(angle, 1.0)
        ax.plot([0, x], [0, y], color=RULE, linewidth=0.7)
        tx, ty = _at(angle, 1.07)
        sides = {90.0: ("center", "bottom"), 210.0: ("center", "top"), 330.0: ("center", "top")}[angle]
        ax.text(tx, ty, SCORES[name], ha=sides[0], va=sides[1], fontweight="bold", color=INK)


def _draw_polygon(ax: Axes, values: Sequence[float], **style: Any) -> None:
    x, y = _corners(values)
    ax.plot([*x, x[0]], [*y, y[0]], **style)


def _corners(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """x and y of the values on the three axes."""
    points = [_at(angle, value) for angle, value in zip(CORNERS.values(), values, strict=True)]
    return [x for x, _ in points], [y for _, y in points]


def _at(angle: float, radius: float) -> tuple[float, float]:
    return radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))


def draw_bars(comparison: Comparison) -> Figure:
    """Every score of every result with its interval."""
    groups = []
    short = labels(comparison)
    for name in comparison.names:
        bars = []
        for i, entry in enumerate(comparison.entries):
            s = entry.scores[name][comparison.metric]
            bars.append(Bar(short[i], s["value"], s["interval"], METHOD_COLOURS[i % len(METHOD_COLOURS)]))
        counts = {e.scores[name][comparison.metric]["n"] for e in comparison.entries}
        groups.append(BarGroup(SCORES[name], f"{counts.pop()} prompts" if len(counts) == 1 else "", bars))
    axis = "share of tokens" if comparison.metric == "token" else "share of prompts"
    return bar_rows(groups, ("", comparison.metric), axis)


def labels(comparison: Comparison) -> list[str]:
    """Short distinct names to stand beside bars.

    The names without the parts between commas that all share; else the files' stems; else letters.
    """
    names = [e.name for e in comparison.entries]
    shared = set.intersection(*map(_parts, names))
    own = [", ".join(p for p in name.split(", ") if p not in shared) for name in names]
    stems = [Path(e.source).stem for e in comparison.entries]
    for short in (own, stems):
        if len(set(short)) == len(short) and all(0 < len(s) <= _LABEL_WIDTH for s in short):
            return short
    return [chr(ord("A") + i) if i < 26 else str(i + 1) for i in range(len(names))]


def _parts(name: str) -> set[str]:
    return set(name.split(", "))


def _draw_text(comparison: Comparison) -> Figure:
    """What the figures stand for, so that a picture passed on says it too."""
    said = [comparison.setting]
    if comparison.differences:
        said += ["These results differ in more than the method:", *comparison.differences]
    text = "\n".join(textwrap.fill(line, 78) for line in said)
    figure = new_figure(0.15 + 0.16 * (text.count("\n") + 1))
    figure.text(0.02, 0.98, text, fontsize=8, color=MUTED, ha="left", va="top")
    return figure
