"""One edit: its ledger entry, its keys, what is near it, and whether the gate opens for it. No base is loaded.

What is said of the gate is said at the edit's stored key, where its bare prompt lies among the keys, so that it needs
no forward pass; stored keys are rounded to 8 bits.

Shapes: `n` keys, `r` directions of the key space, `E` edits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from wisecli.inspection.ledger import LedgerLine, find, ledger_of
from wisecli.inspection.source import MergedSource, RunSource, Source
from wisecli.memory.keys import KeyStore
from wisecli.memory.lookup import score
from wisecli.memory.shard import SUPERSEDED, WITHDRAWN, Shard, keys_in_force

_NEAREST = 5


@dataclass(frozen=True)
class Neighbour:
    """Another edit, and the score that this one's bare key has for it."""

    line: LedgerLine
    score: float


@dataclass(frozen=True)
class Opening:
    """Whether the gate opens at an edit's own key.

    Attributes:
        open: None where that cannot be said, and `why` says why.
        reached: the edit that names the answer: itself, or one whose keys are nearer.
        score, epsilon: of the edit reached; epsilon is None for main memory, which has no threshold.
    """

    open: bool | None
    why: str
    reached: str | None = None
    score: float | None = None
    epsilon: float | None = None


@dataclass(frozen=True)
class EditView:
    """All that is known of an edit.

    Attributes:
        supersedes: ids of the edits whose place it took.
        keys: how many it has; `crowding` is None without any.
        own: scores of its other forms for its bare key.
        nearest: other edits, best first.
    """

    line: LedgerLine
    position: int
    edits: int
    supersedes: tuple[str, ...]
    keys: int
    crowding: float | None
    own: tuple[float, ...]
    nearest: tuple[Neighbour, ...]
    opening: Opening

    def to_json(self) -> dict[str, Any]:
        near = [{"score": n.score, **n.line.to_json()} for n in self.nearest]
        return {
            **self.line.to_json(),
            "position": self.position,
            "edits": self.edits,
            "supersedes": list(self.supersedes),
            "keys": {"number": self.keys, "crowding": self.crowding, "own_scores": list(self.own)},
            "nearest": near,
            "routing": asdict(self.opening),
        }


def view_edit(source: Source, edit: str, top: int = _NEAREST) -> EditView:
    """Everything known of one edit.

    Args:
        edit: its id.
        top: other edits to name, at most.

    Raises:
        InputError: there is no such edit; the closest ids are named.
    """
    lines = ledger_of(source)
    line = find(lines, edit, source.path)
    ids, keys = _keys_of(source)
    at = ids.index(edit) if edit in ids else -1
    mine = keys.owner == at if keys is not None else torch.zeros(0, dtype=torch.bool)
    view: dict[str, Any] = {"crowding": None, "own": (), "nearest": ()}
    if keys is None or not mine.any():
        opening = Opening(None, _keyless(source, line))
    else:
        best = _best_of_each(keys, mine, len(ids))
        own = keys.vectors[mine]
        scores = score(own[1:], own[:1], keys.crowding[at : at + 1].float())[:, 0] if len(own) > 1 else own.new_zeros(0)
        view = {
            "crowding": _rounded(keys.crowding[at]),
            "own": tuple(_rounded(x) for x in scores),
            "nearest": _nearest(best, ids, at, {x.id: x for x in lines}, top),
        }
        opening = _opening(source, line, best, ids, at)
    position = next(i for i, x in enumerate(lines) if x.id == edit)
    supersedes = tuple(x.id for x in lines if x.by == edit and x.outcome == SUPERSEDED)
    return EditView(line, position + 1, len(lines), supersedes, int(mine.sum()), opening=opening, **view)


def _keys_of(source: Source) -> tuple[list[str], KeyStore | None]:
    """The ids that key owners index, and the keys; None where there are none yet."""
    if isinstance(source, MergedSource):
        return [e.id for e in source.side_memory.edits], source.side_memory.keys
    run = source.run
    paths = [run.shard_path(i) for i in range(run.n_shards) if run.shard_path(i).exists()]
    shards = [Shard.load(p) for p in paths]
    entries = [run.outcome_of(e) for s in shards for e in s.edits]
    if not entries or not run.gate_path.exists():
        return [], None
    keys = keys_in_force(run.gate(), shards, [e["outcome"] for e in entries])
    return [e["id"] for e in entries], keys


def _best_of_each(keys: KeyStore, mine: Tensor, edits: int) -> Tensor:
    """The score [E] of an edit's bare key for every edit; -inf for those without keys."""
    vectors = keys.vectors
    scores = score(vectors[mine][:1], vectors, keys.off)[0]
    return torch.full((edits,), -torch.inf).scatter_reduce_(0, keys.owner, scores, "amax")


def _nearest(best: Tensor, ids: list[str], at: int, lines: dict[str, LedgerLine], top: int) -> tuple[Neighbour, ...]:
    order = best.sort(descending=True, stable=True).indices.tolist()
    others = [i for i in order if i != at and bool(best[i].isfinite())]
    return tuple(Neighbour(lines.get(ids[i], LedgerLine(ids[i], "")), _rounded(best[i])) for i in others[:top])


def _opening(source: Source, line: LedgerLine, best: Tensor, ids: list[str], at: int) -> Opening:
    if isinstance(source, RunSource):
        return Opening(None, "the shards are not merged yet: thresholds come with wise merge")
    sm = source.side_memory
    if sm.router != "key":
        return Opening(None, f"the {sm.router} router compares no keys: wise route asks it")
    reached = int(best.argmax())
    number, name = _rounded(best[reached]), ids[reached]
    memory = sm.edits[reached].memory
    if not 0 <= memory < len(sm.memories):
        whose = "it was withdrawn" if reached == at else f"{name}, which is nearer, was withdrawn"
        return Opening(False, f"main memory answers, since {whose}", name, number)
    epsilon = sm.memories[memory].epsilon.get("key")
    if epsilon is None:
        return Opening(None, "the side memory has no threshold for the key router", name, number)
    opens = number > epsilon
    why = "its key is above the threshold" if opens else "its key is not above the threshold"
    return Opening(
        opens, why if reached == at else f"another edit, {name}, is nearer to its key", name, number, epsilon
    )


def _keyless(source: Source, line: LedgerLine) -> str:
    if line.outcome == SUPERSEDED:
        return f"superseded by {line.by or 'a later edit'}, it has no key"
    if line.outcome == WITHDRAWN:
        return "withdrawn, it has no key"
    return "it has no key yet" if isinstance(source, RunSource) else "it has no key"


def _rounded(x: Tensor) -> float:
    return round(float(x), 4)
