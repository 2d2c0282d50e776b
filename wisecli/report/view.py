"""What a page is made of: tiles, sections, tables, facts, figures and folded groups, and figures as text.

Values only: the templates draw them, `sections` fills them. Text is plain here and escaped by the templates; SVG made
by this tool is the one exception and is marked as such.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from markupsafe import Markup

DASH = "–"


@dataclass(frozen=True)
class Cell:
    """A table cell: its text and, smaller beneath, a remark such as an interval."""

    text: str
    sub: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first `left` columns are text, the others figures.

    Args:
        stacked: rows become cards on a narrow screen.
        grouped: rows whose first cell is empty belong to the one above.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    left: int = 1
    stacked: bool = False
    grouped: bool = False
    note: str = ""
    block: ClassVar[str] = "table"

    @property
    def long(self) -> bool:
        """Whether it is higher than a plot."""
        return len(self.rows) > 7


@dataclass(frozen=True)
class Facts:
    """Names with values."""

    pairs: Sequence[tuple[str, str]]
    title: str = ""
    block: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Picture:
    """An SVG element that this tool drew, with its caption."""

    svg: Markup
    caption: str
    block: ClassVar[str] = "picture"


@dataclass(frozen=True)
class Fold:
    """A folded group with its count."""

    title: str
    count: str
    table: Table
    kind: str = ""
    block: ClassVar[str] = "fold"


@dataclass(frozen=True)
class Tile:
    """A headline figure."""

    name: str
    value: str
    lines: Sequence[str]
    colour: str


@dataclass
class Section:
    """A titled part of the page. Pictures stand beside one another where there is room."""

    id: str
    title: str
    lead: str = ""
    blocks: list[Any] = field(default_factory=list)


def figure(value: float | None, digits: int = 3) -> str:
    """A share or score; a dash where nothing was measured."""
    return DASH if value is None else f"{value:.{digits}f}"


def interval(limits: Sequence[float | None] | None) -> str:
    """lo–hi; empty where there is none."""
    if not limits or len(limits) != 2 or None in limits:
        return ""
    return f"{limits[0]:.3f}–{limits[1]:.3f}"


def scored(s: Mapping[str, Any], when: str) -> Cell:
    """A score's value with its interval beneath. `when`: before or after."""
    return Cell(figure(s.get(when)), interval(s.get(f"{when}_interval")))


def number(value: float | None) -> str:
    """A figure of any size: perplexities, thresholds, counts."""
    if value is None:
        return DASH
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.2f}"
    return f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.3g}"


def seconds(value: float | None) -> str:
    """A duration."""
    if value is None:
        return DASH
    if value < 100:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def size(value: float | None) -> str:
    """Bytes as MiB or GiB."""
    if value is None:
        return DASH
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def cells(values: Iterable[Any]) -> tuple[Cell, ...]:
    return tuple(v if isinstance(v, Cell) else Cell(str(v)) for v in values)


def facts_of(record: Mapping[str, Any] | None, names: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    """Names and values of a record, inner records flattened with dots; nulls are left out."""
    found: list[tuple[str, str]] = []
    for key, value in (record or {}).items():
        name = (names or {}).get(key, key.replace("_", " "))
        if isinstance(value, Mapping):
            found += [(f"{name}, {inner}", text) for inner, text in facts_of(value)]
        elif isinstance(value, (list, tuple)):
            found.append((name, _listed(value)))
        elif value is not None:
            found.append((name, _plain(value)))
    return found


def _listed(values: Sequence[Any]) -> str:
    """Values between commas; records between semicolons."""
    if any(isinstance(v, Mapping) for v in values):
        return "; ".join(
            ", ".join(f"{k} {t}" for k, t in facts_of(v)) if isinstance(v, Mapping) else str(v) for v in values
        )
    return ", ".join(map(str, values)) or DASH


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
