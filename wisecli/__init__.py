"""Lifelong knowledge editing with a routed side memory (WISE), as a library.

    import wisecli

    base = wisecli.load_base("path/or/hub-id")
    with wisecli.attach(base.model, "sm.safetensors"):
        base.model.generate(...)

Names are loaded when first used, so importing the package is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wisecli.data.records import EditRecord, Probe
    from wisecli.data.stream import EditStream, read_edits
    from wisecli.editing.config import EditConfig
    from wisecli.editing.merge import merge_run
    from wisecli.editing.run import EditRun
    from wisecli.evaluation.evaluate import EvalOptions, evaluate
    from wisecli.memory.shard import RunFolder
    from wisecli.memory.side_memory import SideMemory
    from wisecli.models.base import load_base
    from wisecli.routing.attach import attach
    from wisecli.routing.explain import Explanation, explain
    from wisecli.routing.shelf import SideMemories

_HOME = {
    "EditConfig": "wisecli.editing.config",
    "EditRecord": "wisecli.data.records",
    "EditRun": "wisecli.editing.run",
    "EditStream": "wisecli.data.stream",
    "EvalOptions": "wisecli.evaluation.evaluate",
    "Explanation": "wisecli.routing.explain",
    "Probe": "wisecli.data.records",
    "RunFolder": "wisecli.memory.shard",
    "SideMemories": "wisecli.routing.shelf",
    "SideMemory": "wisecli.memory.side_memory",
    "attach": "wisecli.routing.attach",
    "evaluate": "wisecli.evaluation.evaluate",
    "explain": "wisecli.routing.explain",
    "load_base": "wisecli.models.base",
    "merge_run": "wisecli.editing.merge",
    "read_edits": "wisecli.data.stream",
}

__all__ = [
    "EditConfig",
    "EditRecord",
    "EditRun",
    "EditStream",
    "EvalOptions",
    "Explanation",
    "Probe",
    "RunFolder",
    "SideMemories",
    "SideMemory",
    "attach",
    "evaluate",
    "explain",
    "load_base",
    "merge_run",
    "read_edits",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'wisecli' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
