"""What is in a side memory, a package or a run folder, in figures. No base is loaded.

Shapes: `D` x `F` is the edited matrix, `r` the rank of the key space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from torch import Tensor

from wisecli.errors import InputError
from wisecli.inspection.ledger import counts, ledger_of
from wisecli.inspection.source import MergedSource, RunSource
from wisecli.memory.bits import SparseDelta
from wisecli.memory.calibration import quantiles
from wisecli.memory.files import load_tensors
from wisecli.memory.shard import Shard
from wisecli.memory.side_memory import FORMAT
from wisecli.models.base import dtype_name

QUANTILES = ("minimum", "1 %", "median", "99 %", "maximum")


@dataclass(frozen=True)
class Part:
    """A tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, name: str, t: Tensor) -> Part:
        return cls(name, dtype_name(t.dtype), tuple(t.shape), t.numel() * t.element_size())


@dataclass(frozen=True)
class DeltaFacts:
    """A delta: share of the matrix that is stored, dtype of the values, bytes with its mask, and its length."""

    density: float
    values: int
    dtype: str
    size: int
    norm: float

    @classmethod
    def of(cls, delta: SparseDelta) -> DeltaFacts:
        size = sum(t.numel() * t.element_size() for t in (delta.bits, delta.values))
        norm = float(delta.values.double().norm())
        return cls(delta.density, delta.values.numel(), dtype_name(delta.values.dtype), size, norm)


@dataclass(frozen=True)
class MemoryFacts:
    """One memory of a side memory."""

    delta: DeltaFacts
    epsilon: Mapping[str, float]
    scopes: Mapping[str, float]
    edits: int
    origin: Mapping[str, Any]


@dataclass(frozen=True)
class KeyFacts:
    """The edit keys: how many, of how many numbers, of how many edits, and the bytes they take without their space."""

    number: int
    rank: int
    edits: int
    size: int

    @property
    def per_edit(self) -> float | None:
        return self.size / self.edits if self.edits else None


@dataclass(frozen=True)
class Spread:
    """Scores seen while calibrating: minimum, 1 %, median, 99 % and maximum. `router` is what scored."""

    router: str
    name: str
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class Contents:
    """What is in a side memory."""

    path: str
    kind: str
    format: str
    manifest: Mapping[str, Any]
    digest: str
    outcomes: Mapping[str, int]
    memories: tuple[MemoryFacts, ...]
    keys: KeyFacts
    spreads: tuple[Spread, ...]
    scopes: Mapping[str, Mapping[str, float | None]]
    parts: tuple[Part, ...]
    size: int
    files: Mapping[str, int]

    @property
    def about(self) -> int:
        """Bytes of the file that are no tensor: the manifest."""
        return self.size - sum(p.size for p in self.parts)

    def to_json(self) -> dict[str, Any]:
        named = ("base", "site", "router", "chat", "config", "versions")
        keys = {**asdict(self.keys), "per_edit": self.keys.per_edit}
        return {
            **{k: v for k, v in asdict(self).items() if k not in ("manifest", "spreads")},
            **{k: self.manifest[k] for k in named},
            "memories": [_finite(asdict(m)) for m in self.memories],
            "keys": keys,
            "spreads": [asdict(s) for s in self.spreads],
            "bytes_of_manifest": self.about,
        }


@dataclass(frozen=True)
class ShardFacts:
    """One shard of a run folder; `delta` is None where it is not finished, `partial` when it was begun."""

    index: int
    partial: bool
    edits: int = 0
    keys: int = 0
    negatives: int = 0
    mask_seed: int | None = None
    size: int = 0
    delta: DeltaFacts | None = None


@dataclass(frozen=True)
class RunContents:
    """What is in a run folder."""

    path: str
    run: Mapping[str, Any]
    outcomes: Mapping[str, int]
    shards: tuple[ShardFacts, ...]
    pool: int | None
    rank: int | None
    spreads: tuple[Spread, ...]
    files: Mapping[str, int]

    kind: str = "run folder"

    @property
    def finished(self) -> int:
        return sum(s.delta is not None for s in self.shards)

    def to_json(self) -> dict[str, Any]:
        named = ("base", "site", "config", "streams", "texts", "versions", "format_version", "withdrawn")
        return {
            **{k: v for k, v in asdict(self).items() if k != "run"},
            **{k: self.run[k] for k in named if k in self.run},
            "finished": self.finished,
        }


def describe_side_memory(source: MergedSource) -> Contents:
    """What is in a side memory or a package.

    Raises:
        InputError: mask and values of a memory do not belong together, or the manifest is malformed.
    """
    sm = source.side_memory
    tensors, written = load_tensors(source.file)
    keys = sm.keys
    try:
        memories = tuple(
            MemoryFacts(DeltaFacts.of(m.delta), dict(m.epsilon), dict(m.scopes), len(m.edits), dict(m.origin))
            for m in sm.memories
        )
        spreads, scopes = tuple(_spreads(sm.statistics)), _scopes(sm.statistics)
    except (TypeError, ValueError, AttributeError) as e:
        raise InputError(f"{source.path} has a malformed manifest: {e}.", hint="Ask wise verify what is wrong.") from e
    folder = source.package
    return Contents(
        path=str(source.path),
        kind=source.kind,
        format=f"{written.get('format', FORMAT)} {written.get('format_version', '')}".strip(),
        manifest=sm.manifest(),
        digest=sm.digest,
        outcomes=counts(ledger_of(source)),
        memories=memories,
        keys=KeyFacts(len(keys.owner), keys.space.rank, len(keys.owner.unique()), keys.nbytes),
        spreads=spreads,
        scopes=scopes,
        parts=tuple(Part.of(name, t) for name, t in sorted(tensors.items())),
        size=source.file.stat().st_size,
        files={p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()} if folder else {},
    )


def describe_run(source: RunSource) -> RunContents:
    """What is in a run folder, finished or not.

    Raises:
        InputError: a shard or the gate is damaged.
    """
    run = source.run
    gate = run.gate() if run.gate_path.exists() else None
    spreads: tuple[Spread, ...] = ()
    if gate is not None:
        tried = {"trial_inside": gate.trial.inside, "trial_near": gate.trial.near}
        spreads = tuple(Spread("key", n, tuple(quantiles(t))) for n, t in tried.items() if len(t))
    making = run.arrived()
    return RunContents(
        path=str(source.path),
        run=run.run,
        outcomes=counts(ledger_of(source)),
        shards=tuple(_shard(source, i, making) for i in range(run.n_shards)),
        pool=len(gate.pool) if gate else None,
        rank=gate.space.rank if gate else None,
        spreads=spreads,
        files={p.name: p.stat().st_size for p in sorted(run.path.iterdir()) if p.is_file() and p.name[0] != "."},
    )


def _shard(source: RunSource, index: int, making: Mapping[int, int]) -> ShardFacts:
    path = source.run.shard_path(index)
    if not path.exists():
        return ShardFacts(index, index in making, edits=making.get(index, 0))
    shard = Shard.load(path)
    return ShardFacts(
        index=index,
        partial=False,
        edits=len(shard.edits),
        keys=len(shard.owner),
        negatives=len(shard.negatives),
        mask_seed=shard.mask_seed,
        size=path.stat().st_size,
        delta=DeltaFacts.of(shard.delta),
    )


def _spreads(statistics: Mapping[str, Any]) -> list[Spread]:
    """Every five quantiles in the statistics; those of one memory among several carry its number."""
    found = []
    for router, part in sorted(statistics.items()):
        if not isinstance(part, Mapping):
            continue
        several = part.get("memories")
        parts = [("", part)] if several is None else [(f" of memory {i}", p) for i, p in enumerate(several) if p]
        for whose, scores in parts:
            for name, values in sorted(scores.items()):
                if isinstance(values, list) and len(values) == len(QUANTILES):
                    found.append(Spread(router, f"{name}{whose}", tuple(float(x) for x in values)))
    return found


def _scopes(statistics: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Of the key router's scopes the threshold and what it lets pass, as measured while calibrating."""
    key = statistics.get("key")
    scopes = key.get("scopes") if isinstance(key, Mapping) else None
    return {str(n): dict(rates) for n, rates in (scopes or {}).items()}


def _finite(value: Any) -> Any:
    """The same with null for numbers JSON has not."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not isfinite(value) else value
