"""Writing files so that a reader never sees half of one, and reading safetensors with errors a user can act on.

Every artifact is written beside its place and renamed after an fsync. Tensors go into safetensors and everything else
into JSON; nothing is pickled. Metadata is one key holding sorted JSON: with several keys the bytes would differ
between runs.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonlines
from torch import Tensor

from wisecli.errors import InputError, OutputError

METADATA_KEY = "wise"


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file's content in one step. A write that fails leaves the old content and nothing beside it.

    Raises:
        OutputError: the path cannot be written.
    """
    try:
        partial = path.with_name(f".{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, ValueError) as e:  # ValueError: a path without a name, such as "."
        raise OutputError(
            f"Cannot write {path}: {getattr(e, 'strerror', None) or e}.",
            hint="Choose another place with --out, or free space there.",
        ) from e


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, hint: str = "Check the path.") -> Any:
    """What stands in a JSON file.

    Args:
        hint: what to do where there is none.

    Raises:
        InputError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"Cannot read {path}: {e.strerror or e}.", hint=hint) from e
    except ValueError as e:
        raise InputError(f"{path} is not JSON: {e}.", hint="The file is damaged; make it again.") from e


def write_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file's content by one line of JSON per value."""
    write_bytes(path, b"".join(_line(v) for v in values))


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON line; a line that was cut off before it is ended first."""
    try:
        with open(path, "ab+") as f:
            size = f.seek(0, os.SEEK_END)
            torn = size > 0 and f.seek(size - 1) >= 0 and f.read(1) != b"\n"
            f.write((b"\n" if torn else b"") + _line(value))
    except OSError as e:
        raise OutputError(f"Cannot write {path}: {e.strerror or e}.", hint="Free space there and run again.") from e


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file that are JSON objects; none where there is no file."""
    if not path.exists():
        return []
    with jsonlines.open(path) as reader:
        return list(reader.iter(type=dict, skip_invalid=True))


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, sort_keys=True, ensure_ascii=False) + "\n").encode()


def ensure_writable(folder: Path) -> None:
    """Make a folder and check that files can be created in it, before any work is spent."""
    probe = folder / ".wise-write-test"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as e:
        raise OutputError(
            f"Cannot write to {folder}: {e.strerror or e}.", hint="Choose another place with --out."
        ) from e


def check_version(where: Path | str, version: str, ours: str, again: str) -> None:
    """Refuse a file of another major format version.

    Args:
        where: the file, as the message names it.
        version: what the file says of itself.
        ours: the version this tool reads.
        again: how to make the file anew, for one that is older.
    """
    theirs, mine = version.split(".")[0], ours.split(".")[0]
    if theirs == mine:
        return
    older = theirs.isdigit() and int(theirs) < int(mine)
    raise InputError(
        f"{where} has format version {version}; this tool reads version {mine}.x.",
        hint=again if older else "Install a newer wise.",
    )


def save_tensors(path: Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Write a safetensors file with its manifest; the same content gives the same bytes."""
    from safetensors.torch import save

    text = json.dumps(manifest, sort_keys=True, ensure_ascii=False)
    ordered = {k: tensors[k].detach().contiguous().cpu() for k in sorted(tensors)}
    write_bytes(path, save(ordered, metadata={METADATA_KEY: text}))


def load_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a safetensors file written by `save_tensors`; its tensors are not read.

    Raises:
        InputError: missing, truncated, or not written by this tool.
    """
    with _opened(path) as f:
        return _manifest(path, f)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file written by `save_tensors`: its tensors and its manifest.

    Raises:
        InputError: missing, truncated, or not written by this tool.
    """
    with _opened(path) as f:
        return {k: f.get_tensor(k) for k in f.keys()}, _manifest(path, f)  # noqa: SIM118  (safe_open is no mapping)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {what}.", hint="Give a .safetensors file made by wise merge.")
    try:
        with safe_open(path, "pt") as f:
            yield f
    except (SafetensorError, OSError, ValueError) as e:
        raise InputError(
            f"{path} is not a readable safetensors file: {e}.", hint="It is truncated or damaged; make it again."
        ) from e


def _manifest(path: Path, file: Any) -> dict[str, Any]:
    text = (file.metadata() or {}).get(METADATA_KEY)
    if text is None:
        raise InputError(f"{path} was not written by wise: it has no manifest.", hint="Make one with wise merge.")
    try:
        manifest = json.loads(text)
    except ValueError as e:
        raise InputError(f"The manifest of {path} is not JSON: {e}.", hint="Make the file again.") from e
    if not isinstance(manifest, dict):
        raise InputError(f"The manifest of {path} is not a JSON object.", hint="Make the file again.")
    return manifest
