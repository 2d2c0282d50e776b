"""How edits and settings look in a line of a table. The commands that look into side memories share it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wisecli.cli._output import short
from wisecli.cli._why import printable

if TYPE_CHECKING:
    from wisecli.inspection.ledger import LedgerLine

NO_TEXT = "(its texts were left out)"
_TARGET_SHARE = 2 / 5  # of a line at most, where both prompt and target are long


def edit_text(prompt: str | None, target: str | None, width: int) -> str:
    """`prompt -> target`, cut to a width so that something of both can be read."""
    if prompt is None:
        return NO_TEXT
    said = short(printable(str(target)), max(8, int(width * _TARGET_SHARE)))
    return f"{short(printable(prompt), max(8, width - len(said) - len(' -> ')))} -> {said}"


def line_text(line: LedgerLine, width: int) -> str:
    return edit_text(line.prompt, line.target, width)


def setting(value: Any) -> str:
    """A value of a manifest or a config."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {setting(v)}" for k, v in sorted(value.items()))
    if isinstance(value, list | tuple):
        return ("; " if any(isinstance(v, Mapping) for v in value) else ", ").join(setting(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else printable(str(value))


def when(time: str) -> str:
    """An ISO-8601 time in UTC without what is the same in all."""
    return time.replace("T", " ").removesuffix("+00:00").removesuffix("Z")
