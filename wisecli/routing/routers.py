"""Routers: from the activations of a prompt to one route per row.

Two routers stand behind one interface. `activation` is the paper's: the indicator of each memory's delta against that
memory's epsilon, the strongest that passes wins (top-1). `key` compares what enters the edited layer at the last
content token with the stored edit keys; the nearest key names the edit and thereby the memory. Each row is decided on
its own.

Shapes: `B` rows, `T` tokens, `D` model width, `F` FFN width, `M` memories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, nan
from typing import Any, Protocol

import torch
from torch import Tensor

from wisecli.errors import UsageError
from wisecli.memory.dense import FEW
from wisecli.memory.indicator import activation_indicator
from wisecli.memory.keys import KeyStore
from wisecli.memory.side_memory import SideMemory
from wisecli.memory.sketch import MISSED, NEARLY, Sketches
from wisecli.models.prompts import last_content

MAIN = -1


@dataclass
class Routes:
    """One decision per row, all [B]: `memory` (-1 main), `indicator`, its `epsilon`, and the nearest `edit`.

    `edit` indexes the side memory's edits and is -1 where the router names none. `rows` lists, per memory that is used
    at all, the rows it answers, so that nothing need be looked up again at each decoding step.
    """

    memory: Tensor
    indicator: Tensor
    epsilon: Tensor
    edit: Tensor
    rows: dict[int, Tensor]

    @classmethod
    def of(cls, memory: Tensor, indicator: Tensor, epsilon: Tensor, edit: Tensor) -> Routes:
        rows: dict[int, list[int]] = {}
        for i, j in enumerate(memory.tolist()):
            if j != MAIN:
                rows.setdefault(j, []).append(i)
        used = {j: torch.tensor(rows[j], device=memory.device) for j in sorted(rows)}
        return cls(memory, indicator, epsilon, edit, used)

    @classmethod
    def forced(cls, memory: Tensor) -> Routes:
        """Routes set from outside; no indicator was computed."""
        nan = torch.full(memory.shape, float("nan"), device=memory.device)
        return cls.of(memory, nan, nan, torch.full_like(memory, -1))

    def repeat(self, times: int) -> Routes:
        """The routes when every row is repeated in place, as beam search and several return sequences do."""
        each = (x.repeat_interleave(times) for x in (self.memory, self.indicator, self.epsilon, self.edit))
        return Routes.of(*each)

    def __len__(self) -> int:
        return len(self.memory)


@dataclass(frozen=True)
class Route:
    """One row's decision in plain Python: the memory that answers (None: main) and why."""

    memory: int | None
    indicator: float
    epsilon: float
    edit: str | None = None

    @property
    def routed(self) -> bool:
        return self.memory is not None

    def to_json(self) -> dict[str, Any]:
        """Plain values; an indicator that was not computed, or a threshold at infinity, is null."""
        pairs = (("indicator", self.indicator), ("epsilon", self.epsilon))
        numbers = {name: value if isfinite(value) else None for name, value in pairs}
        return {"memory": self.memory, **numbers, "nearest_edit": self.edit}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Route:
        """The route that `to_json` wrote."""
        indicator, epsilon = (nan if data[k] is None else data[k] for k in ("indicator", "epsilon"))
        return cls(data["memory"], indicator, epsilon, data["nearest_edit"])


@dataclass(frozen=True)
class Seen:
    """What a router sees of a batch of prompts.

    Attributes:
        a: input of the edited projection [B, T, F].
        entry: the residual stream that enters the edited layer [B, T, D].
        content: content mask [B, T].
    """

    a: Tensor
    entry: Tensor
    content: Tensor


@dataclass(frozen=True)
class Ranking:
    """Nearest edits per row, best first, all [B, N]: `score`, `epsilon` of the memory that holds it, index `edit`."""

    score: Tensor
    epsilon: Tensor
    edit: Tensor


class Router(Protocol):
    """Decides, per row, which memory answers."""

    name: str

    def decide(self, seen: Seen) -> Routes:
        """Routes [B] of a batch of prompts."""
        ...

    def per_token(self, seen: Seen) -> Tensor:
        """What each token [B, T] reaches, in the indicator's unit. It decides nothing."""
        ...

    def ranking(self, seen: Seen, top: int) -> Ranking:
        """The nearest edits of each row, at most `top`; none where the router knows no single edits."""
        ...


@dataclass
class ActivationRouter:
    """The paper's router: Delta_act of each memory (eq. 3) against its epsilon (eq. 4), top-1 among those that pass.

    With sketches, memories are tried in the order of their estimates, and those left out that by their estimate cannot
    pass or cannot be the strongest. What decides is always an exact indicator.
    """

    deltas: Sequence[Tensor]
    epsilon: Tensor
    name: str = "activation"
    sketches: Sketches | None = None

    def decide(self, seen: Seen) -> Routes:
        acts, best, open_ = self._strongest(seen)
        indicator = acts.gather(1, best[:, None])[:, 0]
        memory = torch.where(open_, best, MAIN)
        return Routes.of(memory, indicator, self.epsilon.to(acts.device)[best], torch.full_like(best, -1))

    def per_token(self, seen: Seen) -> Tensor:
        """||a_t delta^T|| of the memory that the decision is about: its mean over content tokens is the indicator."""
        alone = seen.a.flatten(0, 1)[:, None]  # each token as a row of its own
        one = torch.ones_like(seen.content).flatten()[:, None]
        best = self._strongest(seen)[1]
        norms = torch.zeros(seen.content.shape, device=best.device)
        for j in best.unique().tolist():
            norms[best == j] = activation_indicator(alone, one, self.deltas[j]).view_as(norms)[best == j]
        return norms

    def ranking(self, seen: Seen, top: int) -> Ranking:
        none = seen.a.new_zeros(len(seen.a), 0)
        return Ranking(none, none, none.long())

    def _strongest(self, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
        """Indicators [B, M], -inf where none was needed, the memory [B] that counts, and whether it passes [B]."""
        if self.sketches is None:
            acts = torch.stack([activation_indicator(seen.a, seen.content, d) for d in self.deltas], 1)
        else:
            acts = self._candidates(self.sketches, seen)
        # A memory below its own epsilon never hides one that passes.
        passing = torch.where(acts > self.epsilon.to(acts.device), acts, -torch.inf)
        open_ = passing.isfinite().any(1)
        return acts, torch.where(open_, passing.argmax(1), acts.argmax(1)), open_

    @torch.no_grad()
    def _candidates(self, sketches: Sketches, seen: Seen) -> Tensor:
        """Indicators [B, M] of the memories that each row's decision is between; -inf for the others.

        Each row is searched for itself, so that its candidates depend on no other row.
        """
        rows = list(zip(seen.a.split(1), seen.content.split(1), strict=True))
        # All estimates before any indicator: what they are read from stays in the cache.
        estimates = [sketches.indicators(a[0], content[0]) for a, content in rows]
        return torch.stack([self._search(e, *row) for e, row in zip(estimates, rows, strict=True)])

    def _search(self, estimate: Tensor, a: Tensor, content: Tensor) -> Tensor:
        """Indicators [M] of one row, a [1, T, F], from their estimates [M]; -inf where none was needed.

        Computed are those of all memories that by their estimate may pass their own epsilon, as long as they may also
        be stronger than the strongest that does. Where none passes, the one of the largest estimate is among them, to
        tell what came closest.
        """
        near, epsilon = estimate.tolist(), self.epsilon.tolist()
        order = estimate.argsort(descending=True).tolist()
        found: dict[int, Tensor] = {}
        strongest = -inf
        for j in order:
            if near[j] * (1 + NEARLY) < strongest:
                break
            if near[j] * (1 + MISSED) > epsilon[j]:
                found[j] = activation_indicator(a, content, self.deltas[j])[0]
                strongest = max(strongest, x) if (x := float(found[j])) > epsilon[j] else strongest
        if strongest == -inf and order[0] not in found:
            found[order[0]] = activation_indicator(a, content, self.deltas[order[0]])[0]
        acts = estimate.new_full((len(order),), -torch.inf)
        acts[list(found)] = torch.stack(list(found.values()))
        return acts


@dataclass
class KeyRouter:
    """Score of the last content token's entry for the nearest edit, against that edit's memory's epsilon."""

    keys: KeyStore
    memory_of: Tensor
    epsilon: Tensor
    name: str = "key"
    _reached: Tensor = field(init=False, repr=False)  # epsilon of each edit

    def __post_init__(self) -> None:
        self._reached = torch.where(self.memory_of == MAIN, torch.inf, self.epsilon[self.memory_of])

    def decide(self, seen: Seen) -> Routes:
        score, edit = self.keys.nearest(last_entries(seen))
        memory, epsilon = self._claims(edit)
        return Routes.of(torch.where(score > epsilon, memory, MAIN), score, epsilon, edit)

    def per_token(self, seen: Seen) -> Tensor:
        """The score each prompt would have if it ended at that token."""
        return torch.stack([self.keys.nearest(row)[0] for row in seen.entry])  # a row at a time: T x n scores are many

    def ranking(self, seen: Seen, top: int) -> Ranking:
        scores = self.keys.scores(last_entries(seen))
        owner = self.keys.owner.to(scores.device)
        best = scores.new_full((len(scores), len(self.memory_of)), -torch.inf)
        best.scatter_reduce_(1, owner.expand_as(scores), scores, "amax")
        # Of equal scores the first edit comes first, as in the decision. Edits without a key are no candidates.
        score, edit = (x[:, : min(top, len(owner.unique()))] for x in best.sort(dim=1, descending=True, stable=True))
        return Ranking(score, self._claims(edit)[1], edit)

    def _claims(self, edit: Tensor) -> tuple[Tensor, Tensor]:
        """Memory and epsilon of edits; nothing reaches a withdrawn one's."""
        return self.memory_of.to(edit.device)[edit], self._reached.to(edit.device)[edit]


def last_entries(seen: Seen) -> Tensor:
    """The entry [B, D] at each row's last content token."""
    last = last_content(seen.content).to(seen.entry.device)
    return seen.entry.gather(1, last[:, None, None].expand(-1, 1, seen.entry.shape[-1]))[:, 0]


ROUTERS = ("key", "activation")


def build_router(sm: SideMemory, deltas: Sequence[Tensor], name: str | None = None) -> Router:
    """The router a side memory asks for, or the one named.

    Raises:
        UsageError: unknown name, or the side memory has no threshold for it.
    """
    name = name or sm.router
    if name not in ROUTERS:
        raise UsageError(f"Unknown router {name!r}.", hint=f"Use {' or '.join(ROUTERS)}.")
    missing = [i for i, m in enumerate(sm.memories) if m.epsilon.get(name) is None]
    if missing:
        raise UsageError(
            f"This side memory has no threshold for the {name} router.",
            hint="Edit without --no-texts and merge without --no-calibrate; at least one edit must take.",
        )
    epsilon = torch.tensor([m.epsilon[name] for m in sm.memories])
    if name == "activation":
        many = len(sm.memories) > FEW
        return ActivationRouter(
            deltas, epsilon, sketches=Sketches(m.delta.dense() for m in sm.memories) if many else None
        )
    return KeyRouter(sm.keys, torch.tensor([e.memory for e in sm.edits]), epsilon)
