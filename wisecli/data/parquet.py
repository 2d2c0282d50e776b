"""Read the rows of a Parquet file as plain JSON values, through pyarrow, which is an optional dependency.

A table writes null for a key that a record does not have; such keys are left out, at every level, so that a row looks
as the record did before it was put into a table. What JSON does not know (dates, decimals, bytes) becomes text, and a
number that is not finite counts as null.

Which rows are edits is not decided here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wisecli.errors import InputError

_MAGIC = b"PAR1"
_BATCH_ROWS = 1000


def is_parquet(path: Path) -> bool:
    """Whether the file begins as a Parquet file does; False where it cannot be opened."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows in their order, read in batches: stop early and the rest is never decoded.

    Raises:
        InputError: pyarrow is not installed, or the file is damaged.
    """
    try:
        import pyarrow.parquet as pq
        from pyarrow import ArrowException
    except ImportError as err:
        what = f"{path} is a Parquet file, and pyarrow, which reads it, is not installed"
        raise InputError(what, hint="Run `pip install 'wisecli[eval]'`.") from err
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    yield _plain(row)
    except (ArrowException, OSError) as err:
        reason = str(err).splitlines()[0] if str(err) else type(err).__name__
        raise InputError(f"{path} is a damaged Parquet file: {reason}", hint="Fetch it again.") from err


def _plain(value: Any) -> Any:
    """The value in terms of JSON; an object without the keys whose value is null."""
    if isinstance(value, dict):
        plain = {str(key): _plain(inner) for key, inner in value.items()}
        return {key: inner for key, inner in plain.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
