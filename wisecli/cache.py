"""Where things are kept that can be worked out again, and under what name. What is kept is said where it is made."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "WISE_CACHE"


def default_folder() -> Path:
    """The folder named by WISE_CACHE, else ~/.cache/wise (under XDG_CACHE_HOME where that is set)."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "wise"


def digest_of(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
