"""The run folder: what `edit` leaves on disk and `merge` reads.

    run.json            config, base, edit site, seeds, the streams learned and what they supersede; written first
    gate.safetensors    key space of the layer and the pool in it
    shard-00000.safetensors ...   one per slice of a stream: mask, values, edit keys, outcomes
    partial-00001.safetensors     shards in the making, this one and those beside it, to go on from when interrupted
    ledger.jsonl        one line per edit with its outcome, in stream order; follows from the files above
    journal.jsonl       what happened when; the only file whose bytes differ between two runs of one command

A shard is complete or absent. Nothing here trains or merges.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wisecli.data.pool import ALONE
from wisecli.errors import InputError, OutputError
from wisecli.memory.bits import SparseDelta
from wisecli.memory.calibration import Trial, try_on_pool
from wisecli.memory.files import (
    append_line,
    check_version,
    load_manifest,
    load_tensors,
    read_json,
    read_lines,
    save_tensors,
    write_json,
    write_lines,
)
from wisecli.memory.keys import KeySpace, KeyStore, crowding
from wisecli.models.prompts import ContentRule
from wisecli.models.site import EditSite

TOOK, FAILED, SUPERSEDED, WITHDRAWN = "took", "failed", "superseded", "withdrawn"
SHARD_FORMAT, GATE_FORMAT, RUN_FORMAT = "wise-shard", "wise-gate", "wise-run"
FORMAT_VERSION = "4.0"


@dataclass(frozen=True)
class Gate:
    """What the layer makes of the pool.

    Attributes:
        space: the layer's key space.
        pool: vectors [P, r] (fp16) of the pool's prompts; `group` [P] is the fact each is a wording of.
        trial: how the gate does on the pool's own facts.
    """

    space: KeySpace
    pool: Tensor
    group: Tensor
    trial: Trial

    @classmethod
    def fit(cls, h: Tensor, group: Tensor, rank: int) -> Gate:
        """The gate of a layer, from what the pool's prompts bring into it [P, D]."""
        space = KeySpace.fit(h, group, rank)
        return cls(space, space(h).half().cpu(), group, try_on_pool(h, group, rank))

    def ordinary(self, about: Collection[int], alone: bool = False) -> Tensor:
        """Vectors [n, r] of the pool's prompts but those at `about`; with `alone` only of those that word no fact."""
        fits = (self.group == ALONE).tolist() if alone else [True] * len(self.pool)
        about = set(about)
        return self.pool[[i for i, fit in enumerate(fits) if fit and i not in about]].float()

    def save(self, path: Path) -> None:
        space = {"mean": self.space.mean, "projection": self.space.projection, "scale": self.space.scale}
        seen = {"pool": self.pool, "group": self.group, "inside": self.trial.inside, "near": self.trial.near}
        about = {"format": GATE_FORMAT, "format_version": FORMAT_VERSION, "trial_edits": self.trial.edits}
        save_tensors(path, space | seen, about)

    @classmethod
    def load(cls, path: Path) -> Gate:
        t, about = _load(path, GATE_FORMAT, ("mean", "projection", "scale", "pool", "group", "inside", "near"))
        trial = Trial(t["inside"], t["near"], int(about.get("trial_edits", 1)))
        return cls(KeySpace(t["mean"], t["projection"], t["scale"]), t["pool"], t["group"], trial)


@dataclass(frozen=True)
class Shard:
    """One learned slice of the stream.

    Attributes:
        index: position of the slice, from 0.
        delta: W' - W over the shard's mask, fp32 values.
        mask_seed: what the mask was drawn from.
        keys: vectors [n, r] (fp16) of the edits' forms in the key space, each edit's bare prompt first; `owner`
            [n] indexes `edits`.
        negatives: vectors [m, r] of prompts close to the edits but out of their scope.
        edits: one entry per edit: id, outcome and, unless left out, prompt and target.
    """

    index: int
    delta: SparseDelta
    mask_seed: int
    keys: Tensor
    owner: Tensor
    negatives: Tensor
    edits: tuple[Mapping[str, Any], ...]
    details: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        manifest = {
            "format": SHARD_FORMAT,
            "format_version": FORMAT_VERSION,
            "index": self.index,
            "shape": list(self.delta.shape),
            "mask_seed": self.mask_seed,
            "edits": [dict(e) for e in self.edits],
            "details": dict(self.details),
        }
        tensors = {
            "mask": self.delta.bits,
            "values": self.delta.values,
            "keys": self.keys,
            "owner": self.owner,
            "negatives": self.negatives,
        }
        save_tensors(path, tensors, manifest)

    @classmethod
    def load(cls, path: Path) -> Shard:
        t, m = _load(path, SHARD_FORMAT, ("mask", "values", "keys", "owner", "negatives"))
        try:
            delta = SparseDelta(t["mask"], t["values"], (m["shape"][0], m["shape"][1]))
            edits, index, seed = tuple(m["edits"]), m["index"], m["mask_seed"]
        except (KeyError, TypeError, IndexError) as e:
            raise InputError(f"{path} lacks part of its manifest: {e}.", hint="Run wise edit again.") from e
        return cls(index, delta, seed, t["keys"], t["owner"], t["negatives"], edits, m.get("details", {}))


def keys_in_force(gate: Gate, shards: Sequence[Shard], outcomes: Sequence[str]) -> KeyStore:
    """The keys of all edits in force, and how crowded each edit is: by its bare prompt, among prompts about no edit.

    A withdrawn edit keeps its keys: what comes nearest to it is main memory's. A superseded one has none.

    Args:
        outcomes: of the shards' edits, in order, as they are by now.
    """
    owners, seen = [], 0
    for shard in shards:
        owners.append(shard.owner + seen)
        seen += len(shard.edits)
    vectors, owner = torch.cat([s.keys for s in shards]), torch.cat(owners)
    kept = torch.tensor([o != SUPERSEDED for o in outcomes], dtype=torch.bool)[owner]
    vectors, owner = vectors[kept], owner[kept]
    store, crowded = KeyStore.of(gate.space, vectors, owner, torch.zeros(seen)), torch.zeros(seen)
    if len(owner):
        first = torch.cat([torch.zeros(1, dtype=torch.long), (owner[1:] != owner[:-1]).nonzero()[:, 0] + 1])
        crowded[owner[first]] = crowding(store.vectors[first], gate.ordinary(about_edits_of(shards)))
    return replace(store, crowding=crowded.half())


def about_edits_of(shards: Sequence[Shard]) -> set[int]:
    """Positions of the pool's prompts that are about an edit."""
    return {i for s in shards for i in s.details.get("pool_about_edits", ())}


@dataclass(frozen=True)
class RunFolder:
    """A run folder on disk and its run.json."""

    path: Path
    run: Mapping[str, Any]

    @property
    def gate_path(self) -> Path:
        return self.path / "gate.safetensors"

    @property
    def ledger_path(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def journal_path(self) -> Path:
        return self.path / "journal.jsonl"

    def shard_path(self, index: int) -> Path:
        return self.path / f"shard-{index:05d}.safetensors"

    def partial_path(self, index: int) -> Path:
        """Where shards in the making are written down that are learned at once, this one being the first of them."""
        return self.path / f"partial-{index:05d}.safetensors"

    def arrived(self) -> dict[int, int]:
        """How many edits of each shard in the making have arrived, as it was last written down."""
        found: dict[int, int] = {}
        for partial in sorted(self.path.glob("partial-*.safetensors")):
            with contextlib.suppress(InputError):  # a torn one is begun anew
                about = load_manifest(partial)
                if isinstance(about.get("shards"), list):
                    found |= zip(about["shards"], about["arrived"], strict=True)
        return found

    @property
    def streams(self) -> list[dict[str, Any]]:
        """The streams learned, in order: digest, edits, format, shards, and the earlier edits each supersedes."""
        return list(self.run["streams"])

    @property
    def withdrawn(self) -> frozenset[str]:
        """Ids of the edits that were withdrawn."""
        return frozenset(self.run.get("withdrawn", ()))

    @property
    def superseded(self) -> dict[str, str]:
        """Edits that an edit of a later stream superseded, each with that edit."""
        return {old: new for s in self.streams for old, new in s["supersedes"].items()}

    @property
    def site(self) -> EditSite:
        return EditSite(**self.run["site"])

    @property
    def rule(self) -> ContentRule:
        return ContentRule.from_json(self.run["content_rule"])

    @property
    def n_shards(self) -> int:
        return sum(s["shards"] for s in self.streams)

    def shards(self) -> list[Shard]:
        """All shards, in order.

        Raises:
            InputError: some are missing, so the run did not finish.
        """
        self.check_finished()
        return [Shard.load(self.shard_path(i)) for i in range(self.n_shards)]

    def check_finished(self) -> None:
        """Refuse a run that lacks shards.

        Raises:
            InputError: some are missing.
        """
        missing = [i for i in range(self.n_shards) if not self.shard_path(i).exists()]
        if missing:
            raise InputError(
                f"{self.path} has {self.n_shards - len(missing)} of {self.n_shards} shards: editing did not finish.",
                hint="Run the same wise edit command again; it continues with the missing shards.",
            )

    def gate(self) -> Gate:
        return Gate.load(self.gate_path)

    def entries(self) -> list[dict[str, Any]]:
        """Every edit of the finished shards with its shard and its outcome as it is by now, in order."""
        found = []
        for index in (i for i in range(self.n_shards) if self.shard_path(i).exists()):
            manifest = load_manifest(self.shard_path(index))
            found += [{"shard": index, **self.outcome_of(e)} for e in manifest.get("edits", ())]
        return found

    def learned_before(self, position: int) -> list[dict[str, Any]]:
        """Entries of the edits that were in force, with their texts, when the stream at this position arrived."""
        first = sum(s["shards"] for s in self.streams[:position])
        gone = {old for s in self.streams[:position] for old in s["supersedes"]}
        found: list[dict[str, Any]] = []
        for index in range(first):
            found += load_manifest(self.shard_path(index)).get("edits", ())
        return [e for e in found if e["id"] not in gone and e["outcome"] != SUPERSEDED and "prompt" in e]

    def outcome_of(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """A shard's entry of an edit, with what happened to the edit since."""
        now = dict(entry)
        by = self.superseded.get(now["id"])
        if by is not None:
            now |= {"outcome": SUPERSEDED, "by": by}
        return now | {"outcome": WITHDRAWN} if now["id"] in self.withdrawn else now

    def rebuilt(self, index: int, without: Collection[str], shard: Shard) -> None:
        """Put a shard that was learned anew without some edits in the place of the one there is."""
        shard.save(self.shard_path(index))
        self.write_ledger()
        self.note("rebuilt", shard=index, without=sorted(without))

    def write_ledger(self) -> list[dict[str, Any]]:
        """Bring the ledger in line with the shards; returns its lines."""
        lines = self.entries()
        write_lines(self.ledger_path, lines)
        return lines

    def ledger(self) -> list[dict[str, Any]]:
        """The ledger's lines, each with the time at which the journal says its edit was learned."""
        times: dict[tuple[int, int], str] = {}
        lines = read_lines(self.ledger_path)
        events = [e for e in read_lines(self.journal_path) if e.get("event") == "learned"]
        for e in reversed(events):
            times |= {(e["shard"], i): e["time"] for i in range(e["done"])}
        place: Counter[int] = Counter()
        for line in lines:
            at = (line["shard"], place[line["shard"]])
            place[line["shard"]] += 1
            line |= {"time": times[at]} if at in times else {}
        return lines

    def note(self, event: str, **about: Any) -> None:
        """Write into the journal that something happened now."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        append_line(self.journal_path, {"time": now, "event": event, **about})

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other writers out. The system drops the lock of a process that has died.

        Raises:
            OutputError: another process is writing here.
        """
        with locked(self.path):
            yield

    @contextlib.contextmanager
    def lock_shard(self, index: int) -> Iterator[None]:
        """Keep others from learning a shard.

        Raises:
            OutputError: another process is learning it.
        """
        with locked(self.path, f"-{index:05d}"):
            yield
        self.tidy(index)

    def tidy(self, index: int) -> None:
        """Remove what served to learn a shard that is there; a process that was killed may have left it."""
        if self.shard_path(index).exists():
            self.partial_path(index).unlink(missing_ok=True)
            for name in (".lock", ".writer"):  # whoever takes the lock looks for the shard first
                (self.path / f"{name}-{index:05d}").unlink(missing_ok=True)

    def withdraw(self, ids: Collection[str]) -> RunFolder:
        """The folder with these edits withdrawn: merging leaves them out, and main memory answers their prompts.

        Raises:
            InputError: an id is unknown.
            OutputError: another process is writing here.
        """
        self.check_ids(ids)
        with self.lock():
            folder = self.update(withdrawn=sorted(self.withdrawn.union(ids)))
            folder.write_ledger()
            folder.note("withdrawn", ids=sorted(ids))
        return folder

    def check_ids(self, ids: Collection[str]) -> None:
        """Refuse ids of no edit.

        Raises:
            InputError: an id is unknown.
        """
        unknown = sorted(set(ids) - {e["id"] for e in self.entries()})
        if unknown:
            raise InputError(f"{self.path} has no edit {', '.join(unknown[:5])}.", hint="wise log lists the edits.")

    def update(self, **changes: Any) -> RunFolder:
        """The folder with parts of run.json replaced."""
        return RunFolder.create(self.path, {**self.run, **changes})

    @classmethod
    def create(cls, path: Path, run: Mapping[str, Any]) -> RunFolder:
        write_json(path / "run.json", run)
        return cls(path, run)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open a run folder.

        Raises:
            InputError: not a run folder, or of a newer major format version.
        """
        file = path / "run.json"
        if path.is_file():
            raise InputError(f"{path} is a file, not a run folder.", hint="Give the folder written by wise edit --out.")
        if (path / "side_memory.safetensors").exists():
            raise InputError(f"{path} is a package: it is merged already.", hint="Use it with wise eval or wise chat.")
        if not path.is_dir():
            raise InputError(f"There is no folder {path}.", hint="Give the folder written by wise edit --out.")
        if not file.exists():
            raise InputError(f"{path} has no run.json.", hint="Give the folder written by wise edit --out.")
        run = read_json(file)
        if not isinstance(run, dict) or run.get("format") != RUN_FORMAT:
            raise InputError(f"{file} does not describe an editing run.", hint="Run wise edit again.")
        check_version(file, str(run.get("format_version", "")), FORMAT_VERSION, "Learn the edits again with wise edit.")
        return cls(path, run)


@contextlib.contextmanager
def locked(folder: Path, part: str = "", wait: float = 0) -> Iterator[None]:
    """Hold the lock of a folder, or of a part of what is in it; see `RunFolder.lock`.

    Args:
        part: what sets the lock's name apart from the folder's own.
        wait: seconds to wait for it.
    """
    from filelock import FileLock, Timeout

    holder = folder / f".writer{part}"
    lock = FileLock(folder / f".lock{part}")
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        who = holder.read_text(encoding="utf-8").strip() if holder.exists() else "another process"
        raise OutputError(
            f"{folder} is being written by {who}.", hint="Wait for it to finish, or choose another folder with --out."
        ) from None
    try:
        holder.write_text(f"process {os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _load(path: Path, kind: str, names: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, manifest = load_tensors(path)
    if manifest.get("format") != kind:
        raise InputError(f"{path} holds {manifest.get('format')!r}, not {kind}.", hint="Run wise edit again.")
    lacking = [n for n in names if n not in tensors]
    if lacking:
        raise InputError(f"{path} lacks {', '.join(lacking)}.", hint="It is damaged; run wise edit again.")
    return tensors, manifest
