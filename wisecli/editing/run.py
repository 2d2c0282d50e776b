"""Learn a stream of edits into a run folder, shard by shard, and go on with it later.

The stream is cut into consecutive slices; each slice has its own seeded mask and is learned on its own, so shards do
not depend on one another and may be learned side by side, in processes of their own or several at once in one. What is
in the making is written down every now and then and taken up from there: running the same command again gives the same
bytes as one uninterrupted run. For that, shards that are learned at once begin and end together. Another stream can be
added to a finished one; it gets shards of its own, and those that are there stay as they are.

A record that a later record contradicts (the same prompt, or by the gate's judgement the same fact, with another
target) is not learned: the later edit wins, and the ledger says so. One of an earlier stream, which was learned, is
given up when the shards are merged.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from wisecli.data.records import EditRecord
from wisecli.data.stream import EditStream
from wisecli.editing.config import EditConfig
from wisecli.editing.conflicts import Conflicts
from wisecli.editing.editor import Editor, OpenShard, describe_stream, grouped, slices
from wisecli.editing.rewording import Rewording
from wisecli.editing.steps import together
from wisecli.errors import InputError, OutputError, UsageError
from wisecli.memory.files import ensure_writable, load_tensors, save_tensors
from wisecli.memory.shard import RunFolder, locked
from wisecli.models.base import Base

_RARELY = 30  # times the cost of writing a shard in the making passes before it is written again
_PATIENCE_S = 60  # for which the ledger's turn is waited for, when shards are learned in several places
_ANOTHER = "Give the settings it began with, choose another folder with --out, or delete this one to start anew."
_SAME = ("base", "site", "config", "pool", "texts")


@dataclass(frozen=True)
class Progress:
    """`done` of `total` edits have been learned; the ledger lines of the shards that have just ended, if any have."""

    done: int
    total: int
    finished: tuple[dict[str, Any], ...] = ()


class EditRun:
    """One editing run: a base, a stream and a config, writing into a folder.

    Args:
        base: loaded base.
        stream: records to learn, in order.
        config: of the run; its `shards` are those of this stream.
        out: the run folder; made when absent, continued when it holds the same run.
        extra_pool: more ordinary prompts to whiten and calibrate on.
        texts: keep prompts and targets in the shards and the ledger; ids alone otherwise.
        append: add the stream to those that the folder holds.
        checkpoints: write a shard in the making down every now and then.
        cache: folder where the gates and rewordings of bases are kept; None keeps none.

    Raises:
        InputError: the folder holds another run, or a record does not fit the base.
        OutputError: the folder cannot be written, or another process writes there.
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
        append: bool = False,
        checkpoints: bool = True,
        cache: Path | None = None,
    ) -> None:
        self.base, self.stream, self.config, self.texts = base, stream, config, texts
        self.append, self.checkpoints, self.extra_pool = append, checkpoints, tuple(extra_pool)
        self.cache = cache
        if not stream.records:
            raise InputError("There are no edits to learn.")
        if config.shards > len(stream.records):
            raise UsageError(
                f"{len(stream.records)} edits cannot fill {config.shards} shards.",
                hint=f"Use --shards {len(stream.records)} or fewer.",
            )
        self.editor = Editor(base, config, extra_pool=extra_pool, texts=texts)
        Rewording.keep(self.editor.upper, base, cache)
        self.editor.check([r for r in stream.records if r.id not in stream.superseded])
        self.site = self.editor.site
        self.open: tuple[OpenShard, ...] = ()
        self._prepared = False
        ensure_writable(out)
        self.folder = self._take_up(out)

    def __iter__(self) -> Iterator[Progress]:
        """Learn what is missing, yielding progress; finished shards are on disk before they are reported.

        Between two steps `open` are the shards being learned, none at the end.
        """
        total, done = len(self.stream.records), 0
        with self.folder.lock():
            for group in self.groups:
                for arrived in self.learn_shards(group):
                    yield Progress(done + arrived, total)
                done += self.size(group)
                yield Progress(done, total, self.written(group))

    def one_shard(self, index: int) -> Iterator[Progress]:
        """Learn one shard alone, whoever learns the others: the unit of work of a cluster.

        The folder's lock is held only to write the ledger, so that others may learn their shards meanwhile.

        Args:
            index: of the shard in the folder.

        Raises:
            OutputError: another process is learning this shard, or writes to the folder for long.
        """
        total = len(self.slices[index])
        for arrived in self.learn_shards([index]):
            yield Progress(arrived, total)
        with locked(self.folder.path, wait=_PATIENCE_S):
            lines = self.written([index])
        yield Progress(total, total, lines)

    def learn_shards(self, group: Sequence[int]) -> Iterator[int]:
        """Learn some shards at once and write them, yielding how many of their edits have arrived; nothing where they
        are there.

        Raises:
            OutputError: another process is learning one of them.
        """
        if not self.is_missing(group):
            for index in group:
                self.folder.tidy(index)
            return
        with contextlib.ExitStack() as locks:
            for index in group:
                locks.enter_context(self.folder.lock_shard(index))
            if self.is_missing(group):  # they may have come while the locks were taken
                yield from self._learn(group)

    def _learn(self, group: Sequence[int]) -> Iterator[int]:
        self.prepare()
        for index in group:
            self.folder.note("begun", shard=index)
        states, before = self._taken_up(group)
        self.open = tuple(self.editor.open(i, self.stream, self.earlier, self._before(i)) for i in group)
        beside = {"at_once": len(group)} if len(group) > 1 else {}
        learning = [s.learning(self.slices[s.index], self.settled.superseded, states.get(s.index)) for s in self.open]
        written, cost = time.monotonic(), 0.0
        for arrived in together(self.editor.upper, learning):
            for index, n, old in zip(group, arrived, before, strict=True):
                if n > old:
                    self.folder.note("learned", shard=index, done=n, **beside)
            if self.checkpoints and time.monotonic() - written > _RARELY * cost:
                started = time.monotonic()
                self._write_down(arrived)
                written = time.monotonic()
                cost = written - started
            before = arrived
            yield sum(arrived)
        for shard in [s.shard() for s in self.open]:
            if not self.folder.shard_path(shard.index).exists():  # one that is there may have been rebuilt since
                shard.save(self.folder.shard_path(shard.index))
        for index in group:  # not before all are there: those that were learned at once are taken up at once
            self.folder.tidy(index)
        self.open = ()

    def _write_down(self, arrived: Sequence[int]) -> None:
        """The state of the shards being learned, and how many of their edits have arrived, in one file."""
        places = [s.index for s in self.open]
        states = {f"{s.index}.{name}": t for s in self.open for name, t in s.learner.state().items()}
        save_tensors(self.folder.partial_path(places[0]), states, {"shards": places, "arrived": list(arrived)})

    def is_missing(self, group: Sequence[int]) -> bool:
        """Whether one of these shards is still to be learned."""
        return not all(self.folder.shard_path(i).exists() for i in group)

    def size(self, group: Sequence[int]) -> int:
        """How many edits these shards have."""
        return sum(len(self.slices[i]) for i in group)

    def written(self, group: Sequence[int]) -> tuple[dict[str, Any], ...]:
        """The ledger's lines about these shards, the ledger being brought in line with all of them."""
        return tuple(e for e in self.folder.write_ledger() if e["shard"] in group)

    def prepare(self) -> None:
        """The gate of the folder, which all shards share; worked out and written where there is none."""
        if self._prepared:
            return
        if self.folder.gate_path.exists():
            self.editor.gate = self.folder.gate()
        else:
            self.editor.kept_gate(self.cache).save(self.folder.gate_path)
        self._prepared = True

    def arguments(self) -> dict[str, Any]:
        """What makes the same run again on the same base, in another process."""
        return {
            "stream": self.stream,
            "config": self.config,
            "out": self.folder.path,
            "extra_pool": self.extra_pool,
            "texts": self.texts,
            "checkpoints": self.checkpoints,
            "cache": self.cache,
        }

    @cached_property
    def slices(self) -> dict[int, Sequence[EditRecord]]:
        """The records of each shard of this stream, by the shard's index in the folder."""
        first = sum(s["shards"] for s in self.folder.streams[: self._position])
        return dict(enumerate(slices(self.stream.records, self.config.shards), first))

    @property
    def groups(self) -> list[Sequence[int]]:
        """The shards of this stream, those together that are learned at once."""
        return grouped(list(self.slices), self.config.shards_at_once)

    @cached_property
    def settled(self) -> Conflicts:
        """Superseded edits with those that take their places, and the pairs that the gate cannot tell apart."""
        self.prepare()
        return self._settle(self.earlier)

    @cached_property
    def earlier(self) -> list[EditRecord]:
        """The edits of earlier streams that this one may supersede, as far as their texts were kept."""
        known = self.folder.learned_before(self._position)
        return [EditRecord.of_entry(e) for e in known]

    @property
    def finished(self) -> int:
        """Shards of this stream that are already learned."""
        return sum(self.folder.shard_path(i).exists() for i in self.slices)

    # -- the pieces ----------------------------------------------------------------------------------------------------

    def _settle(self, earlier: Sequence[EditRecord]) -> Conflicts:
        """What clashes in this stream and with edits of earlier ones; what clashed among those alone is settled."""
        found = self.editor.settle(EditStream.of([*earlier, *self.stream.records]))
        mine, old = {r.id for r in self.stream}, {r.id for r in earlier}
        superseded = {a: b for a, b in found.superseded.items() if a in mine or b in mine}
        alike = tuple(pair for pair in found.alike if not old.issuperset(pair))
        return Conflicts(superseded, alike)

    def _before(self, index: int) -> list[EditRecord]:
        """The edits of the folder's earlier shards that are in force, as far as their texts are known."""
        mine = [r for i, records in self.slices.items() if i < index for r in records]
        return [r for r in (*self.earlier, *mine) if r.id not in self.settled.superseded]

    def _taken_up(self, group: Sequence[int]) -> tuple[dict[int, Mapping[str, Tensor]], Sequence[int]]:
        """The states of shards in the making, by index, and how many edits of each had arrived.

        Nothing where there are none, they cannot be read, or others were learned together.
        """
        nothing: tuple[dict[int, Mapping[str, Tensor]], Sequence[int]] = {}, (0,) * len(group)
        partial = self.folder.partial_path(group[0])
        if not self.checkpoints or not partial.exists():
            return nothing
        try:
            tensors, about = load_tensors(partial)
        except InputError:
            return nothing
        if about.get("shards") != list(group):
            return nothing
        found: dict[int, dict[str, Tensor]] = {i: {} for i in group}
        for name, t in tensors.items():
            index, _, part = name.partition(".")
            found[int(index)][part] = t
        return dict(found), about["arrived"]

    def _take_up(self, out: Path) -> RunFolder:
        """Start the run folder, add to it, or take up the same run where it stopped."""
        run = self.editor.describe(self.stream)
        if not (out / "run.json").exists():
            self._position = 0
            _refuse_foreign(out)
            return RunFolder.create(out, run)
        folder = RunFolder.open(out)
        self._refuse_other(folder, run)
        known = [s["digest"] for s in folder.streams]
        if self.stream.digest in known:
            self._position = known.index(self.stream.digest)
            return self._same_slices(folder)
        if not self.append:
            raise InputError(
                f"{out} already holds another run: its stream holds other edits.",
                hint=f"Choose another folder with --out, or add these edits to it with --shards {out}.",
            )
        self._position = len(known)
        return self._added(folder)

    def _refuse_other(self, folder: RunFolder, run: Mapping[str, Any]) -> None:
        known = EditConfig.from_json(folder.run["config"]).to_json()  # with the defaults of settings newer than the run
        old = {**folder.run, "config": {**known, "shards": None}}
        new = {**run, "config": {**run["config"], "shards": None}}
        changed = [k for k in _SAME if old.get(k) != new[k]]
        if changed:
            raise InputError(
                f"{folder.path} already holds another run: {_differences(old, new, changed)}.",
                hint=_ANOTHER,
            )

    def _same_slices(self, folder: RunFolder) -> RunFolder:
        shards = folder.streams[self._position]["shards"]
        if shards != self.config.shards:
            raise InputError(
                f"{folder.path} already holds another run: config.shards was {shards} and is now {self.config.shards}.",
                hint=_ANOTHER,
            )
        return folder

    def _added(self, folder: RunFolder) -> RunFolder:
        """The folder with this stream in run.json, and what it supersedes.

        Raises:
            InputError: the folder's last stream is unfinished, or an id is taken.
        """
        folder.check_finished()
        entries = folder.entries()
        taken = {e["id"] for e in entries}.intersection(r.id for r in self.stream)
        if taken:
            raise InputError(
                f"{len(taken)} of the edits have ids that {folder.path} holds already: {', '.join(sorted(taken)[:5])}.",
                hint="Give them other ids, or leave out those that are learned.",
            )
        with folder.lock():
            mine = describe_stream(self.stream, self.config.shards, {})
            self.folder = RunFolder(folder.path, {**folder.run, "streams": [*folder.streams, mine]})
            old = {r.id for r in self.earlier}
            supersedes = {a: b for a, b in self.settled.superseded.items() if a in old}
            return folder.update(streams=[*folder.streams, {**mine, "supersedes": supersedes}])


def as_before(run: RunFolder, edits: int) -> dict[str, Any]:
    """The settings with which so many more edits are learned as a run began, in shards about as large as its first."""
    first = run.streams[0]
    size = first["edits"] / first["shards"]
    return run.run["config"] | {"shards": max(1, round(edits / size))}


def _refuse_foreign(out: Path) -> None:
    """Refuse to begin a run among other files, as those of a model."""
    held = sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) if out.is_dir() else []
    if held:
        raise OutputError(
            f"{out} is no run folder and not empty: it holds {', '.join(held[:3])}{', ...' if len(held) > 3 else ''}.",
            hint="Choose another folder with --out.",
        )


def _differences(old: Any, new: Any, keys: Sequence[str]) -> str:
    """What differs between two descriptions of a run, in words; digests are not worth reading."""
    parts = []
    for key in keys:
        a, b = old.get(key), new[key]
        if not isinstance(a, dict) or not isinstance(b, dict):
            parts.append("the pool differs" if key == "pool" else f"{key} was {a!r} and is now {b!r}")
            continue
        inner = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k) and k != "fingerprint"]
        parts += [f"{key}.{k} was {a.get(k)!r} and is now {b.get(k)!r}" for k in inner[:3]]
        parts += [] if inner else [f"the {key} holds other weights"]
    return "; ".join(parts)
