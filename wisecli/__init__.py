"""Lifelong knowledge editing with a routed side memory (WISE), as a library.

    import wisecli

    side_memory = wisecli.edit(model, tokenizer, "edits.jsonl", out="shards")
    with wisecli.attach(model, side_memory):
        model.generate(...)

`model` and `tokenizer` are what transformers loads; `load_base` loads them as the command line does. `docs/python.md`
shows the rest.

Names are loaded when first used, so importing the package is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wisecli.api import edit, evaluate, fold, merge
    from wisecli.data.records import EditRecord, Probe
    from wisecli.data.stream import EditStream, read_edits
    from wisecli.editing.config import EditConfig
    from wisecli.editing.merge import merge_run
    from wisecli.editing.run import EditRun
    from wisecli.evaluation.evaluate import EvalOptions, EvalReport
    from wisecli.memory.shard import RunFolder
    from wisecli.memory.side_memory import SideMemory
    from wisecli.models.base import Base, load_base
    from wisecli.routing.attach import attach, load_side_memory
    from wisecli.routing.explain import Explanation, explain
    from wisecli.routing.shelf import SideMemories

_HOME = {
    "Base": "wisecli.models.base",
    "EditConfig": "wisecli.editing.config",
    "EditRecord": "wisecli.data.records",
    "EditRun": "wisecli.editing.run",
    "EditStream": "wisecli.data.stream",
    "EvalOptions": "wisecli.evaluation.evaluate",
    "EvalReport": "wisecli.evaluation.evaluate",
    "Explanation": "wisecli.routing.explain",
    "Probe": "wisecli.data.records",
    "RunFolder": "wisecli.memory.shard",
    "SideMemories": "wisecli.routing.shelf",
    "SideMemory": "wisecli.memory.side_memory",
    "attach": "wisecli.routing.attach",
    "edit": "wisecli.api",
    "evaluate": "wisecli.api",
    "explain": "wisecli.routing.explain",
    "fold": "wisecli.api",
    "load_base": "wisecli.models.base",
    "load_side_memory": "wisecli.routing.attach",
    "merge": "wisecli.api",
    "merge_run": "wisecli.editing.merge",
    "read_edits": "wisecli.data.stream",
}

__all__ = [
    "Base",
    "EditConfig",
    "EditRecord",
    "EditRun",
    "EditStream",
    "EvalOptions",
    "EvalReport",
    "Explanation",
    "Probe",
    "RunFolder",
    "SideMemories",
    "SideMemory",
    "attach",
    "edit",
    "evaluate",
    "explain",
    "fold",
    "load_base",
    "load_side_memory",
    "merge",
    "merge_run",
    "read_edits",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'wisecli' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
