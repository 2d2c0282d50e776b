"""Learn a stream of edits into a run folder, shard by shard.

The stream is cut into consecutive slices; each slice has its own seeded mask and is learned on its own, so shards do
not depend on one another. A shard is written when it is finished, its ledger lines after it. Running the same command
again continues with the shards that are missing and gives the same bytes as one uninterrupted run.

A record that a later record contradicts (the same prompt, or by the gate's judgement the same fact, with another
target) is not learned: the later edit wins, and the ledger says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from wisecli.data.stream import EditStream
from wisecli.editing.config import EditConfig
from wisecli.editing.conflicts import Conflicts
from wisecli.editing.editor import Editor, OpenShard, slices
from wisecli.errors import InputError, UsageError
from wisecli.memory.files import ensure_writable
from wisecli.memory.shard import RunFolder, Shard
from wisecli.models.base import Base


@dataclass(frozen=True)
class Progress:
    """`done` of `total` edits have been learned; the last finished shard's ledger lines, when one has just ended."""

    done: int
    total: int
    finished: tuple[dict[str, Any], ...] = ()


class EditRun:
    """One editing run: a base, a stream and a config, writing into a folder.

    Args:
        base: loaded base.
        stream: records to learn, in order.
        config: of the run.
        out: the run folder; made when absent, continued when it holds the same run.
        extra_pool: more ordinary prompts to whiten and calibrate on.
        texts: keep prompts and targets in the shards and the ledger; ids alone otherwise.

    Raises:
        InputError: the folder holds another run, or a record does not fit the base.
        OutputError: the folder cannot be written.
    """

    def __init__(
        self,
        base: Base,
        stream: EditStream,
        config: EditConfig,
        out: Path,
        *,
        extra_pool: Sequence[str] = (),
        texts: bool = True,
    ) -> None:
        self.base, self.stream, self.config, self.texts = base, stream, config, texts
        if not stream.records:
            raise InputError("There are no edits to learn.")
        if config.shards > len(stream.records):
            raise UsageError(
                f"{len(stream.records)} edits cannot fill {config.shards} shards.",
                hint=f"Use --shards {len(stream.records)} or fewer.",
            )
        self.editor = Editor(base, config, extra_pool=extra_pool, texts=texts)
        self.site = self.editor.site
        self.open: OpenShard | None = None
        self.folder = self._take_up(out)

    def __iter__(self) -> Iterator[Progress]:
        """Learn what is missing, yielding progress; finished shards are on disk before they are reported.

        Between two steps `open` is the shard being learned, None at the end.
        """
        total = len(self.stream.records)
        done = 0
        for index, records in enumerate(slices(self.stream.records, self.config.shards)):
            path = self.folder.shard_path(index)
            if not path.exists():
                self._ready_gate()
                self.open = self.editor.open(index, self.stream)
                for arrived in self.open.learn(records, self.settled.superseded):
                    yield Progress(done + arrived, total)
                self.open.shard().save(path)
                self.open = None
            done += len(records)
            yield Progress(done, total, self._record(Shard.load(path)))

    @cached_property
    def settled(self) -> Conflicts:
        """Superseded edits with those that take their places, and the pairs that the gate cannot tell apart."""
        self._ready_gate()
        return self.editor.settle(self.stream)

    @property
    def finished(self) -> int:
        """Shards that are already learned."""
        return sum(self.folder.shard_path(i).exists() for i in range(self.config.shards))

    # -- the pieces ----------------------------------------------------------------------------------------------------

    def _record(self, shard: Shard) -> tuple[dict[str, Any], ...]:
        """The shard's ledger lines; those not yet in the ledger are appended."""
        lines = tuple({"shard": shard.index, **e} for e in shard.edits)
        known = {line["id"] for line in self.folder.ledger()}
        self.folder.write_ledger([line for line in lines if line["id"] not in known])
        return lines

    def _ready_gate(self) -> None:
        """The gate of the folder; worked out and written where there is none."""
        if self.folder.gate_path.exists():
            self.editor.gate = self.folder.gate()
        else:
            self.editor.gate.save(self.folder.gate_path)

    def _take_up(self, out: Path) -> RunFolder:
        """Start the run folder, or take up the same run where it stopped."""
        ensure_writable(out)
        run = self.editor.describe(self.stream)
        if not (out / "run.json").exists():
            return RunFolder.create(out, run)
        folder = RunFolder.open(out)
        changed = [k for k in ("base", "site", "stream", "config", "pool", "texts") if folder.run.get(k) != run[k]]
        if changed:
            raise InputError(
                f"{out} already holds another run: {_differences(folder.run, run, changed)}.",
                hint="Choose another folder with --out, or delete this one to start anew.",
            )
        return folder


def _differences(old: Any, new: Any, keys: Sequence[str]) -> str:
    """What differs between two descriptions of a run, in words; digests are not worth reading."""
    parts = []
    for key in keys:
        a, b = old.get(key), new[key]
        if not isinstance(a, dict) or not isinstance(b, dict):
            parts.append("the pool differs" if key == "pool" else f"{key} was {a!r} and is now {b!r}")
            continue
        inner = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k) and k not in ("digest", "fingerprint")]
        parts += [f"{key}.{k} was {a.get(k)!r} and is now {b.get(k)!r}" for k in inner[:3]]
        parts += [] if inner else [f"the {key} holds other {'edits' if key == 'stream' else 'weights'}"]
    return "; ".join(parts)
