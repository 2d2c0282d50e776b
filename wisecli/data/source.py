"""Get raw records, each with its place, out of a file: JSONL, a JSON array, an object holding one list, or Parquet.

What a file is, is decided by its content; its name says nothing. Gzip is undone, a UTF-8 byte-order mark is dropped.
Lines end at a line feed only, because a JSON string may hold other line separators as they are. NaN, which some tools
write for a missing value, is read as null.

Nothing here knows what an edit looks like, apart from asking `formats` whether a lone object is one.
"""

from __future__ import annotations

import difflib
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from wisecli.data.formats import map_record
from wisecli.data.parquet import is_parquet, read_rows
from wisecli.errors import InputError

_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One decoded JSON value: where it stands, the value, and what kept it from being decoded (else None)."""

    where: str
    value: Any
    problem: str | None = None


def read_raw(path: Path, limit: int | None = None) -> list[RawRecord]:
    """The records of a file in their order, at most `limit`; undecodable lines are among them, with their problem.

    Raises:
        InputError: there is no such file, it cannot be read, or it holds no records at all.
    """
    records: Iterator[RawRecord]
    if is_parquet(path):
        records = (RawRecord(f"{path.name}: record {i}", row) for i, row in enumerate(read_rows(path), start=1))
    else:
        text = _read_text(path)
        if not text.strip():
            raise InputError(f"{path} is empty", hint="Write one edit per line, as JSON.")
        records = _records(path.name, text)
    found = list(islice(records, limit))
    if not found:
        raise InputError(f"{path} holds no records", hint="Write one edit per line, as JSON.")
    return found


def missing_file(path: Path) -> InputError:
    """The error for a path that leads nowhere, naming files beside it that are spelled alike."""
    if path.exists():
        return InputError(f"{path} is no regular file", hint="Write what it gives to a file first.")
    folder = path.parent
    if not folder.is_dir():
        return InputError(f"{path} does not exist: there is no folder {folder}", hint="Check the path.")
    close = difflib.get_close_matches(path.name, sorted(p.name for p in folder.iterdir()), n=3, cutoff=0.6)
    hint = f"Did you mean {' or '.join(str(folder / name) for name in close)}?" if close else "Check the path."
    return InputError(f"{path} does not exist", hint=hint)


def _read_text(path: Path) -> str:
    if not path.exists():
        raise missing_file(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a file of edits", hint="Name one file in it.")
    try:
        data = path.read_bytes()
        if data.startswith(_GZIP):
            data = gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as err:
        raise InputError(f"{path} is a damaged gzip file: {err}", hint="Fetch or compress it again.") from err
    except OSError as err:
        raise InputError(f"{path} cannot be read: {err.strerror or err}", hint="Check its permissions.") from err
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        what = f"{path} is not UTF-8 text (byte 0x{data[err.start]:02x} at offset {err.start})"
        raise InputError(what, hint="Give a JSON or JSONL file saved as UTF-8, or one compressed with gzip.") from err
    if "\0" in text:
        what = f"{path} is not text: it holds zero bytes"
        raise InputError(what, hint="Give a JSON or JSONL file saved as UTF-8, or one compressed with gzip.")
    return text


def _records(name: str, text: str) -> Iterator[RawRecord]:
    """The records of a text: one document if it is one; else lines, if most begin like a record; else a broken one."""
    value, problem, line = _decode(text)
    if problem is None:
        return _document(name, value, text)
    lines = text.split("\n")
    filled = [stripped for raw in lines if (stripped := raw.strip())]
    objects = [each for each in filled if each[0] == "{" and not each.endswith(",")]
    if filled[0][0] not in "[{" and not objects:
        raise InputError(
            f"{name} is neither JSON nor JSONL: it begins with {filled[0][:40]!r}",
            hint='Write one edit per line, as JSON: {"prompt": "..", "target": ".."}.',
        )
    if filled[0][0] != "[" and 2 * len(objects) >= len(filled):
        return _lines(name, lines)
    return iter([RawRecord(f"{name}:{line}", None, problem)])


def _lines(name: str, lines: list[str]) -> Iterator[RawRecord]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{name}:{number}"
            value, problem, _ = _decode(line)
            yield RawRecord(where, value, problem)


def _document(name: str, value: Any, text: str) -> Iterator[RawRecord]:
    """The records of one JSON document: an array, an object with one list in it, or something that stands alone."""
    entries = value
    if isinstance(value, dict) and not map_record(value).format:
        lists = [v for v in value.values() if isinstance(v, list)]
        entries = lists[0] if len(lists) == 1 else value
    if not isinstance(entries, list):
        start = text.count("\n", 0, len(text) - len(text.lstrip())) + 1
        yield RawRecord(f"{name}:{start}", value)
        return
    for number, entry in enumerate(entries, start=1):
        yield RawRecord(f"{name}: record {number}", entry)


def _decode(text: str) -> tuple[Any, str | None, int]:
    """The JSON value, what is wrong with it (else None), and the line the fault is on."""
    try:
        return json.loads(text, parse_constant=lambda _: None), None, 1
    except json.JSONDecodeError as err:
        return None, f"not JSON: {err.msg} (column {err.colno})", err.lineno
    except (RecursionError, ValueError) as err:  # nested without end; a number of thousands of digits
        return None, f"not usable JSON: {err}", 1
