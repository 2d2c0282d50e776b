"""Where what follows from a base and a layer alone is kept, so that the next run need not work it out again."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from wisecli.cache import digest_of
from wisecli.models.base import Base
from wisecli.models.upper import UpperModel


def place(cache: Path | None, kind: str, base: Base, upper: UpperModel, **about: Any) -> Path | None:
    """The file of one such thing; None where nothing is kept: only on the CPU is it worth hashing the base.

    Args:
        cache: folder; None keeps nothing.
        kind: of thing.
        base: whose upper part it is.
        about: what it depends on, besides the base and how prompts are rendered.
    """
    if cache is None or base.model.device.type != "cpu" or base.digest is None:
        return None
    encoder = upper.encoder
    how = {"site": asdict(upper.site), "rule": encoder.rule.to_json(), "chat": encoder.chat}
    return cache / kind / f"{digest_of({**base.state(), **how, **about})}.safetensors"
