"""How every plot looks and how it becomes SVG or PNG: one palette, one type size, one width.

Plots are made for a column 4.4 inches wide, so that a phone shows them at about their own size. Colours are those of
Okabe and Ito, told apart by colour-blind readers: one per kind of prompt, grey for "before". In SVG each of them is a
CSS variable with the colour as its fallback, so that a page can adapt its plots to a dark screen. The same figure gives
the same bytes: no dates, ids salted with the plot's name, matplotlib's own defaults in place of the user's.

What is drawn is in `plots` and `compare_plots`.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.4  # inches
DPI = 200
_COLUMNS = (39, 76)  # right edges of the value columns, in points right of the bars
INK, MUTED, RULE, BEFORE = "#1f2630", "#5b6673", "#d5dae1", "#a3acb7"
SCORE_COLOURS = {"rel": "#0072b2", "gen": "#56b4e9", "loc": "#e69f00", "loc_near": "#d55e00"}
"""Blue prompts should be answered by the side memory, warm ones should not."""
METHOD_COLOURS = ("#0072b3", "#d55f00", "#009e73", "#cc79a7", "#56b4ea", "#e69f01", "#8c6d1f", "#6f6fb8")
"""Okabe and Ito again, one per result; last digits differ from the above so that each is a variable of its own."""
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", BEFORE: "before"}
VARIABLES |= {colour: name.replace("_", "-") for name, colour in SCORE_COLOURS.items()}
VARIABLES |= {colour: f"method-{i}" for i, colour in enumerate(METHOD_COLOURS)}
_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "lines.linewidth": 1.6,
    "savefig.dpi": DPI,
    "svg.fonttype": "none",
    "text.parse_math": False,
}


@contextlib.contextmanager
def styled(salt: str = "") -> Iterator[None]:
    """Draw and save inside this: the style stands, whatever the user's matplotlibrc says."""
    import matplotlib.style

    with matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": f"wise-{salt}"}]):
        yield


def new_figure(height: float) -> Figure:
    """A figure `WIDTH` inches wide that belongs to no window."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.07))


def to_png(figure: Figure) -> bytes:
    """PNG on white, without a date."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def to_svg(figure: Figure, name: str, label: str) -> str:
    """An SVG element to stand inside a page.

    Args:
        name: makes its ids unlike those of other plots.
        label: what the plot shows, for those who cannot see it.
    """
    out = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.S)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font-family: [^;\"]*;?|font: ([\d.]+px) [^;\"]*", _font, text)
    text = re.sub(r"#[0-9a-f]{6}\b", _variable, text)
    box = re.search(r'viewBox="[^"]*"', text)
    head = f'<svg {box[0] if box else ""} role="img" aria-label="{escape(label)}" xmlns="http://www.w3.org/2000/svg"'
    head += ' xmlns:xlink="http://www.w3.org/1999/xlink">'
    return re.sub(r"^<svg[^>]*>", lambda _: head, text).strip()


def _font(match: re.Match[str]) -> str:
    """The page's own type in place of the one that was measured."""
    return f"font-size: {match[1]}" if match[1] else ""


def _variable(match: re.Match[str]) -> str:
    name = VARIABLES.get(match[0])
    return f"var(--{name}, {match[0]})" if name else match[0]


# -- parts that several plots share -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """One row: a thick bar with its interval, and what it is compared with as a thin grey one."""

    label: str
    thick: float | None
    interval: Sequence[float] | None
    colour: str
    thin: float | None = None


@dataclass(frozen=True)
class BarGroup:
    """Rows under a title, with a remark beside it."""

    title: str
    remark: str
    bars: Sequence[Bar]


def bar_rows(groups: Sequence[BarGroup], columns: tuple[str, str], axis: str) -> Figure:
    """Horizontal bars from 0 to 1 in titled groups, their values in columns on the right.

    Args:
        groups: from top to bottom.
        columns: heads of the value columns: thin (none where empty), thick.
        axis: what the bars measure.
    """
    rows = sum(len(g.bars) for g in groups)
    figure = new_figure(0.75 + 0.27 * rows + 0.33 * len(groups))
    ax = figure.add_subplot()
    y, ticks = 0.0, []
    places: tuple[int | None, int] = _COLUMNS if columns[0] else (None, _COLUMNS[0])
    for group in groups:
        y += 1.25
        ax.text(0, y - 0.88, group.title, ha="left", va="center", fontweight="bold")
        ax.text(1, y - 0.88, group.remark, ha="right", va="center", color=MUTED, fontsize=8)
        for bar in group.bars:
            ticks.append((y, bar.label))
            _draw_bar(ax, y, bar, places)
            y += 1
    for x, head in zip(places, columns, strict=True):
        if x is not None:
            _beside(ax, x, -0.35, head, color=MUTED, fontsize=8)
    ax.set(xlim=(0, 1), ylim=(y - 0.35, -0.75), xlabel=axis, xticks=[0, 0.25, 0.5, 0.75, 1])
    ax.set_xticklabels(["0", "0.25", "0.5", "0.75", "1"])
    ax.set_yticks([t for t, _ in ticks], [label for _, label in ticks])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x")
    return figure


def _draw_bar(ax: Axes, y: float, bar: Bar, places: tuple[int | None, int]) -> None:
    if bar.thin is not None:
        ax.barh(y + 0.36, bar.thin, height=0.18, color=BEFORE)
    if bar.thick is not None:
        ax.barh(y - 0.03, bar.thick, height=0.56, color=bar.colour)
    if bar.interval and None not in bar.interval:
        low, high = bar.interval
        ax.plot([low, high], [y - 0.03] * 2, color=INK, linewidth=1.1, solid_capstyle="butt", clip_on=False)
        for end in (low, high):
            ax.plot([end] * 2, [y - 0.15, y + 0.09], color=INK, linewidth=1.1, clip_on=False)
    if places[0] is not None:
        _beside(ax, places[0], y, share(bar.thin), color=MUTED, fontsize=8.5)
    _beside(ax, places[1], y, share(bar.thick), fontsize=8.5, fontweight="bold")


def _beside(ax: Axes, offset: float, y: float, text: str, **style: Any) -> None:
    """Text that ends `offset` points right of the bars' end."""
    ax.annotate(
        text,
        (1, y),
        xytext=(offset, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        annotation_clip=False,
        **style,
    )


def share(value: float | None) -> str:
    """A share as text; a dash where nothing was measured."""
    return "–" if value is None else f"{value:.3f}"


def line_names(ax: Axes, ends: Sequence[tuple[float, str, str]], gap: float = 0.068) -> None:
    """Write each line's name right of the axes at the height of its end, spread so that no two names overlap.

    Args:
        ends: height in [0, 1], name and colour of each line.
        gap: least distance of two names.
    """
    ordered = sorted(ends, key=lambda e: e[0])
    heights = [e[0] for e in ordered]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for i in reversed(range(len(heights))):  # pushed above the top: move down again
        heights[i] = min(heights[i], 1 - gap * (len(heights) - 1 - i))
    for height, (_, name, colour) in zip(heights, ordered, strict=True):
        ax.plot([1.03, 1.07], [height] * 2, color=colour, linewidth=2.5, transform=ax.transAxes, clip_on=False)
        ax.text(1.09, height, name, ha="left", va="center", transform=ax.transAxes)
