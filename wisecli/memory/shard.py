"""The run folder: what `edit` leaves on disk and `merge` reads.

    run.json            config, base, edit site, seeds, digest of the stream; written first
    gate.safetensors    key space of the layer and the pool in it
    shard-00000.safetensors ...   one per slice of the stream: mask, values, edit keys, outcomes
    ledger.jsonl        one line per edit with its outcome, in stream order

A shard is complete or absent. Nothing here trains or merges.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonlines
from torch import Tensor

from wisecli.data.pool import ALONE
from wisecli.errors import InputError
from wisecli.memory.bits import SparseDelta
from wisecli.memory.calibration import Trial, try_on_pool
from wisecli.memory.files import append_line, check_version, load_tensors, read_json, save_tensors, write_json
from wisecli.memory.keys import KeySpace
from wisecli.models.prompts import ContentRule
from wisecli.models.site import EditSite

SHARD_FORMAT, GATE_FORMAT, RUN_FORMAT = "wise-shard", "wise-gate", "wise-run"
FORMAT_VERSION = "3.0"


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

    def shard_path(self, index: int) -> Path:
        return self.path / f"shard-{index:05d}.safetensors"

    @property
    def site(self) -> EditSite:
        return EditSite(**self.run["site"])

    @property
    def rule(self) -> ContentRule:
        return ContentRule.from_json(self.run["content_rule"])

    @property
    def n_shards(self) -> int:
        return int(self.run["n_shards"])

    def shards(self) -> list[Shard]:
        """All shards, in order.

        Raises:
            InputError: some are missing, so the run did not finish.
        """
        missing = [i for i in range(self.n_shards) if not self.shard_path(i).exists()]
        if missing:
            raise InputError(
                f"{self.path} has {self.n_shards - len(missing)} of {self.n_shards} shards: editing did not finish.",
                hint="Run the same wise edit command again; it continues with the missing shards.",
            )
        return [Shard.load(self.shard_path(i)) for i in range(self.n_shards)]

    def gate(self) -> Gate:
        return Gate.load(self.gate_path)

    def write_ledger(self, lines: list[Mapping[str, Any]]) -> None:
        """Append the outcomes of one finished shard and wait until they are on disk."""
        for line in lines:
            append_line(self.ledger_path, line)

    def ledger(self) -> list[dict[str, Any]]:
        if not self.ledger_path.exists():
            return []
        with jsonlines.open(self.ledger_path) as reader:
            return list(reader.iter(type=dict, skip_invalid=True))

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


def _load(path: Path, kind: str, names: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, manifest = load_tensors(path)
    if manifest.get("format") != kind:
        raise InputError(f"{path} holds {manifest.get('format')!r}, not {kind}.", hint="Run wise edit again.")
    lacking = [n for n in names if n not in tensors]
    if lacking:
        raise InputError(f"{path} lacks {', '.join(lacking)}.", hint="It is damaged; run wise edit again.")
    return tensors, manifest
