"""Where and with what something was measured: base, machine, versions, memory. For results.json; runs no model."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from math import isfinite
from typing import Any

import torch

from wisecli.evaluation.asking import ORACLE
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base, dtype_name
from wisecli.versions import versions


def describe_base(base: Base, digest: bool = True) -> dict[str, Any]:
    """Which base it is, and how it was loaded; its digest takes as long as reading it."""
    model = base.model
    about = {
        "name": base.name,
        "revision": base.revision,
        "label": base.label,
        "model_type": model.config.model_type,
        "parameters": model.num_parameters(),
        "dtype": dtype_name(model.dtype),
        "device": model.device.type,
    }
    about |= {"quantization": base.quantization} if base.quantization else {}
    return about | {"digest": base.digest} if digest else about


def describe_side_memory(sm: SideMemory, router: str, path: str | None = None) -> dict[str, Any]:
    """Which side memory it is, and how it came about."""
    memories = [
        {"epsilon": _finite(m.epsilon), "density": round(m.delta.density, 6), "origin": dict(m.origin)}
        for m in sm.memories
    ]
    return {
        "path": path,
        "digest": sm.digest,
        "router": router,
        "edits": len(sm.edits),
        "took": sum(e.took for e in sm.edits),
        "config": dict(sm.config),
        "versions": dict(sm.versions),
        "memories": memories,
    }


def _finite(epsilon: Mapping[str, float]) -> dict[str, float | None]:
    """Thresholds as JSON can hold them: one at infinity is null."""
    return {name: value if isfinite(value) else None for name, value in epsilon.items()}


def method_of(sm: SideMemory, router: str) -> str:
    """The method in one line, as it stands above a column."""
    merge = {str(m.origin.get("method", "unknown")) for m in sm.memories}
    schedule = sm.config.get("schedule", "unknown")
    replay = " with replay" if sm.config.get("replay") else ""
    several = f", {len(sm.memories)} memories" if len(sm.memories) > 1 else ""
    how = f"{schedule} schedule{replay}, {' + '.join(sorted(merge))} merge{several}"
    return f"WISE, {how}, {router}{'' if router == ORACLE else ' router'}"


def environment(base: Base) -> dict[str, Any]:
    """The machine and the software."""
    device = base.model.device
    return {
        **versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def peak_memory(base: Base) -> dict[str, int | None]:
    """Most bytes this process has held so far, and most bytes allocated on its accelerator."""
    device = base.model.device
    return {
        "resident_bytes": _resident(),
        "accelerator_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def _resident() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cpu_name() -> str:
    """The processor's name where the system tells it, with the number of cores at hand."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            name = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"
