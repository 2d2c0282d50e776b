"""Settings of a run as a file: JSON with fields of `EditConfig`, and the base they are for.

    {"model": "path/or/hub-id", "revision": null, "dtype": "bfloat16", "layer": 20, "chat": true}

Every field may be left out. A file that holds anything else is refused, with every fault in it named.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from wisecli.editing.config import EditConfig
from wisecli.errors import InputError, OutputError, WiseError
from wisecli.memory.files import write_json

QUANTIZE = ("4bit", "8bit", "none")
DTYPES = ("auto", "float32", "bfloat16", "float16")
BASE = ("model", "revision", "dtype", "quantize")
FIELDS = (*BASE, *EditConfig.__dataclass_fields__)
_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}


@dataclass(frozen=True)
class ConfigFile:
    """What a config file says.

    Attributes:
        base: those of `BASE` that it names.
        settings: the fields of `EditConfig` that it names, as that takes them.
    """

    base: Mapping[str, str | None] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        """Read a config file.

        Raises:
            InputError: not JSON, or a key or value that no run has; `problems` lists every one.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            raise InputError(f"Cannot read the config {path}: {e.strerror or e}.", hint=_HINT) from e
        except ValueError as e:
            raise InputError(f"The config {path} is not JSON: {e}.", hint=_HINT) from e
        if not isinstance(content, dict):
            raise InputError(f"The config {path} is not a JSON object.", hint=_HINT)
        problems = [p for key, value in content.items() if (p := _problem(key, value))]
        if problems:
            raise InputError(
                f"The config {path} cannot be used.", hint=_HINT, problems=[f"{path.name}: {p}" for p in problems]
            )
        base = {k: content[k] for k in BASE if k in content}
        return cls(base, {k: _value(v) for k, v in content.items() if k not in BASE})


_HINT = f"Known keys: {', '.join(FIELDS)}. wise doctor --out FILE writes such a file."


def write_config(path: Path, content: Mapping[str, Any]) -> None:
    """Write a config file, over another one at most.

    Raises:
        OutputError: there is something else, or the path cannot be written.
    """
    refuse_other(path)
    write_json(path, content)


def refuse_other(path: Path) -> None:
    """Refuse a path that holds anything but a config.

    Raises:
        OutputError: it does.
    """
    if not path.exists():
        return
    try:
        ConfigFile.read(path)
    except InputError as e:
        raise OutputError(
            f"{path} exists and is no config of wise edit.", hint="Choose another place with --out."
        ) from e


def _problem(key: str, value: Any) -> str | None:
    """What is wrong with one entry, None for nothing."""
    if key not in FIELDS:
        close = get_close_matches(key.replace("-", "_"), FIELDS, n=1)
        return f'unknown key "{key}"' + (f'; did you mean "{close[0]}"?' if close else "")
    shown = json.dumps(value, ensure_ascii=False)
    if key in BASE:
        allowed = "text" if key == "model" else "text or null"
        fits = (isinstance(value, str) and value.strip()) or (value is None and key == "revision")
        if key == "dtype":
            allowed, fits = f"one of {', '.join(DTYPES)}", value in DTYPES
        if key == "quantize":
            allowed, fits = f"one of {', '.join(QUANTIZE)} or null", value in (*QUANTIZE, None)
        return None if fits else f'"{key}" must be {allowed}, not {shown}'
    if key == "layer" and not (value == "auto" or _fits(value, int)):
        return f'"layer" must be a whole number or "auto", not {shown}'
    hint = get_type_hints(EditConfig)[key]
    if not _fits(value, hint):
        return f'"{key}" must be {_words(hint)}, not {shown}'
    try:
        EditConfig(**{key: _value(value)})
    except WiseError as e:
        return e.message.replace(f"--{key.replace('_', '-')}", f'"{key}"').rstrip(".") + _more(e.hint)
    return None


def _more(hint: str | None) -> str:
    return f": {hint[0].lower()}{hint[1:].rstrip('.')}" if hint else ""


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a field's type."""
    parts = get_args(hint)
    if getattr(hint, "__origin__", None) is tuple:
        return isinstance(value, list) and len(value) == len(parts) and all(map(_fits, value, parts))
    if parts:
        return any(_fits(value, p) for p in parts)
    if isinstance(value, bool) or hint is bool:
        return hint is bool and isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    """A field's type in words."""
    parts = get_args(hint)
    if getattr(hint, "__origin__", None) is tuple:
        return f"a list of {len(parts)} numbers"
    return " or ".join(map(_words, parts)) if parts else _NAMES[hint]


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
