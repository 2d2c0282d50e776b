"""How an explanation looks at a terminal: the prompt as a heat line, the decision, and the nearest edits.

With colours each token stands on the colour of its score; without, a bar stands under it. Nothing runs beyond the width
of the terminal. `wise route` and /why of `wise chat` show the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from wisecli.cli._output import figure, short

if TYPE_CHECKING:
    from wisecli.memory.side_memory import EditEntry
    from wisecli.routing.explain import Explanation
    from wisecli.routing.routers import Route

_BELOW = (
    ("▁", "black on #eff6ff"),
    ("▂", "black on #dbeafe"),
    ("▃", "black on #bfdbfe"),
    ("▄", "black on #93c5fd"),
    ("▅", "black on #60a5fa"),
)
_ABOVE = (
    ("▆", "bold black on #fde68a"),
    ("▇", "bold black on #fdba74"),
    ("█", "bold black on #fb923c"),
)
_ASIDE = ("·", "dim")  # tokens that are no content
_BAR_OF = {style: bar for bar, style in (*_BELOW, *_ABOVE, _ASIDE)}
_LONGEST = 300  # characters of an edit's text
_MEANING = {
    "key": "the score the prompt would have if it ended there",
    "activation": "how much the side memory changes at the token",
}


def show_explanation(console: Console, why: Explanation) -> None:
    """The heat line, the decision, and the nearest edits."""
    for line in _heat_lines(console, why):
        console.print(line)
    edit = why.nearest[0].entry if why.nearest else None
    verdict = f"{route_line(why.route, edit, why.memories)} · {why.router} router"
    console.print(Text(verdict, style="bold", overflow="fold"))
    if not why.nearest:
        console.print(Text("This router names no single edit.", style="dim"))
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for near in why.nearest:
        above = near.score > near.epsilon
        figures = f"{figure(near.score):>6} {_against(near.epsilon, '> ' if above else '<=')}"
        texts = Text.assemble(edit_line(near.entry), "\n", (_details(near.entry, why.memories), "dim"))
        table.add_row(Text(figures, style="bold" if above else "dim"), texts)
    console.print(table)


def show_legend(console: Console, why: Explanation) -> None:
    """What colours or bars mean."""
    below, above = "up to the threshold", "above it"
    parts: list[str | tuple[str, str]]
    if _coloured(console):
        parts = [*_spread(below, _BELOW), ", ", *_spread(above, _ABOVE)]
    else:
        bars = ["".join(bar for bar, _ in steps) for steps in (_BELOW, _ABOVE)]
        parts = [f"{bars[0]} {below}, {bars[1]} {above}, {_ASIDE[0]} no content"]
    console.print(Text.assemble(f"{_MEANING[why.router]}: ", *parts, style="dim", overflow="fold"))


def _spread(words: str, steps: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Words standing on all colours of a scale in turn."""
    for i, c in enumerate(words):
        yield c, f"not dim {steps[i * len(steps) // len(words)][1]}"


def route_line(route: Route, edit: EditEntry | None, memories: int) -> str:
    """`side memory · indicator 0.982 > 0.611 · edit demo-012`."""
    threshold = _against(route.epsilon, ">" if route.routed else "<=")
    line = f"{which(route.memory, memories)} · indicator {figure(route.indicator)} {threshold}"
    return f"{line} · edit {edit.id}" if edit and (route.routed or edit.memory < 0) else line


def _against(epsilon: float, sign: str) -> str:
    """`> 0.611`; nothing reaches a withdrawn edit."""
    return f"{sign} {figure(epsilon)}" if math.isfinite(epsilon) else "(closed)"


def which(memory: int | None, memories: int) -> str:
    """The memory that answers; with its number where there are several."""
    if memory is None:
        return "main memory"
    return f"side memory {memory}" if memories > 1 else "side memory"


def edit_line(edit: EditEntry) -> str:
    """`demo-012: The capital of France is -> Lyon`."""
    if edit.prompt is None:
        return f"{edit.id}: (its texts were left out)"
    return printable(f"{edit.id}: {short(edit.prompt, _LONGEST)} -> {short(str(edit.target), _LONGEST)}")


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters but line breaks and tabs become a replacement character."""
    return "".join("\ufffd" if (c < " " and c not in "\n\t") or "\x7f" <= c < "\xa0" else c for c in text)


def _details(edit: EditEntry, memories: int) -> str:
    """What else the ledger knows: `shard 0 · took · 31 steps`."""
    details = dict(edit.details)
    parts = [f"memory {edit.memory}"] if memories > 1 and edit.memory >= 0 else []
    if "shard" in details:
        parts.append(f"shard {details.pop('shard')}")
    parts.append(str(details.pop("outcome", None) or ("took" if edit.took else "did not take")))
    if "steps" in details:
        parts.append(f"{details.pop('steps')} steps")
    parts += [f"{name} {short(str(value), _LONGEST)}" for name, value in sorted(details.items())]
    return printable(" · ".join(parts))


def _heat_lines(console: Console, why: Explanation) -> Iterator[Text]:
    """The shown tokens, cut to the width; with a line of bars under each where there are no colours."""
    text = Text(overflow="fold")
    for token in why.tokens[slice(*why.shown)]:
        style = _step(token.score, why)[1] if token.content else _ASIDE[1]
        text.append(_flat(token.text), style=style)
    for line in text.wrap(console, console.width):
        if _coloured(console):
            yield line
        else:
            yield Text(line.plain)
            yield Text(_bars(line))


def _step(score: float, why: Explanation) -> tuple[str, str]:
    """Bar and style of a score: five steps up to the threshold, three above it, the last at twice the threshold."""
    epsilon = why.route.epsilon
    if score > epsilon:
        beyond = score / epsilon - 1 if epsilon > 0 else 1.0
        return _ABOVE[_nth(beyond, len(_ABOVE))]
    if not math.isfinite(epsilon) or epsilon <= 0:
        return _BELOW[0]
    floor = -epsilon if why.router == "key" else 0.0  # cosines may be negative, lengths not
    return _BELOW[_nth((score - floor) / (epsilon - floor), len(_BELOW))]


def _nth(share: float, steps: int) -> int:
    return min(steps - 1, max(0, int(share * steps)))


def _bars(line: Text) -> str:
    """For each cell of a line the bar of its token; nothing under spaces."""
    bars = [" "] * len(line)
    for span in line.spans:
        for i in range(span.start, min(span.end, len(line))):
            bars[i] = _BAR_OF.get(str(span.style), " ")
    cells = ((" " if c.isspace() else bar) * cell_len(c) for c, bar in zip(line.plain, bars, strict=True))
    return "".join(cells).rstrip()


def _flat(text: str) -> str:
    """A token's text on one line, each character as wide as it is shown."""
    return printable(text).replace("\n", "⏎").replace("\t", "⇥")


def _coloured(console: Console) -> bool:
    return console.is_terminal and not console.no_color and console.color_system is not None
