"""The shipped texts: ordinary prompts that no edit is about, sentences to stand before a prompt, and held-out passages.

All are plain text files beside this module, one entry per line. Which of them an editor uses, how many and in what
order, is not decided here. No editor uses the passages: they are for measuring.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from wisecli.errors import InputError


def ordinary_prompts() -> tuple[str, ...]:
    """Everyday prompts, for thresholds and as irrelevant prompts where a record brings none."""
    return _lines("pool.txt")


def contexts() -> tuple[str, ...]:
    """Sentences that may stand before a prompt without changing what it asks."""
    return _lines("contexts.txt")


def held_text() -> tuple[str, ...]:
    """Passages of plain English, 50 to 90 words each, to measure what a model keeps of its general ability."""
    return _lines("held_text.txt")


@cache
def _lines(name: str) -> tuple[str, ...]:
    try:
        text = (files("wisecli.data") / name).read_text(encoding="utf-8")
    except FileNotFoundError as err:
        raise InputError(f"the shipped file {name} is missing", hint="Install the package again.") from err
    return tuple(line.strip() for line in text.split("\n") if line.strip())
