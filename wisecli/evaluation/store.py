"""What a model has answered already, on disk: finished batches are not asked again.

One file per state of a model (its weights, what is attached to it, how it is run), one JSON line per finished batch,
found by the content of the batch: token ids, caps, what was asked for. A batch is kept whole because an answer may
depend, in its last bits, on the rows it was computed beside; so an answer taken from here is the one that would be
computed. What is never kept here is a score: those are worked out anew from the answers each time.

An interrupted evaluation continues from here, and the base's answers serve every evaluation on the same prompts.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from errno import ENOSPC
from pathlib import Path
from typing import Any

from wisecli.cache import FOLDER_VARIABLE, digest_of
from wisecli.errors import OutputError


class AnswerStore:
    """The finished batches of one state of a model.

    Args:
        folder: where the files lie; made when the first batch is written.
        state: everything that decides an answer apart from the batch.
    """

    def __init__(self, folder: Path, state: Mapping[str, Any]) -> None:
        self.path = folder / "answers" / f"{digest_of(state)}.jsonl"
        self._known: dict[str, Any] | None = None
        self._needs_newline = False

    def get(self, key: str) -> Any:
        """What was kept under a key, None when nothing was."""
        if self._known is None:
            self._known = self._read()
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a value and hand it to the operating system: the process may be killed, the machine may not.

        Raises:
            OutputError: the file cannot be written.
        """
        if self._known is None:
            self._known = self._read()
        line = json.dumps({"key": key, "value": value}, separators=(",", ":"), ensure_ascii=False)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as f:  # one write: two processes do not tear each other's lines
                data = (("\n" if self._needs_newline else "") + line + "\n").encode("utf-8", "surrogatepass")
                if f.write(data) != len(data):
                    self._needs_newline = True
                    raise OSError(ENOSPC, os.strerror(ENOSPC))
        except OSError as e:
            raise OutputError(
                f"Cannot write answers to {self.path}: {e.strerror or e}.",
                hint=f"Free space, set {FOLDER_VARIABLE} to another folder, or use --no-cache.",
            ) from e
        self._needs_newline = False
        self._known[key] = value

    def discard(self) -> None:
        """Forget everything kept for this state."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        self._known = None

    def _read(self) -> dict[str, Any]:
        """All whole lines; one that was cut off, by a kill or a full disk, counts as not written."""
        try:
            data = self.path.read_bytes()
        except OSError:
            return {}
        self._needs_newline = bool(data) and not data.endswith(b"\n")
        known = {}
        for line in data.split(b"\n"):  # a cut inside a character spoils its line alone
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line.decode("utf-8", "surrogatepass"))
                known[entry["key"]] = entry["value"]
        return known
