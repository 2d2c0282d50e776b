"""Looking into what the tool has made: run folders, side memories and packages. Nothing here changes them.

    from wisecli.inspection import open_source, ledger_of, select

    for line in select(ledger_of(open_source("shards")), outcome="failed"):
        print(line.id, line.prompt)

Names are loaded when first used: a ledger can be read without what asking a base needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wisecli.inspection.asking import ask_edits, ask_prompts
    from wisecli.inspection.checks import check_base, check_file
    from wisecli.inspection.contents import describe_run, describe_side_memory
    from wisecli.inspection.difference import compare_answers, compare_side_memories
    from wisecli.inspection.edit import view_edit
    from wisecli.inspection.ledger import find, ledger_of, select
    from wisecli.inspection.source import open_side_memory, open_source

_HOME = {
    "ask_edits": "asking",
    "ask_prompts": "asking",
    "check_base": "checks",
    "check_file": "checks",
    "compare_answers": "difference",
    "compare_side_memories": "difference",
    "describe_run": "contents",
    "describe_side_memory": "contents",
    "find": "ledger",
    "ledger_of": "ledger",
    "open_side_memory": "source",
    "open_source": "source",
    "select": "ledger",
    "view_edit": "edit",
}

__all__ = [
    "ask_edits",
    "ask_prompts",
    "check_base",
    "check_file",
    "compare_answers",
    "compare_side_memories",
    "describe_run",
    "describe_side_memory",
    "find",
    "ledger_of",
    "open_side_memory",
    "open_source",
    "select",
    "view_edit",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'wisecli.inspection' has no attribute {name!r}")
    return getattr(import_module(f"wisecli.inspection.{_HOME[name]}"), name)
