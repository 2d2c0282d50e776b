"""Routers: from the activations of a prompt to one route per row.

Two routers stand behind one interface. `activation` is the paper's: the indicator of each memory's delta against that
memory's epsilon, the strongest that passes wins (top-1). `key` compares the whitened activation of the last content
token with the stored edit keys; the nearest key names the edit and thereby the memory. Each row is decided on its own.

Shapes: `B` rows, `T` tokens, `F` FFN width, `M` memories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any, Protocol

import torch
from torch import Tensor

from wisecli.errors import UsageError
from wisecli.memory.indicator import activation_indicator
from wisecli.memory.keys import KeyStore
from wisecli.memory.side_memory import SideMemory
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
        used = [int(j) for j in memory.unique().tolist() if j != MAIN]
        return cls(memory, indicator, epsilon, edit, {j: (memory == j).nonzero()[:, 0] for j in used})

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


class Router(Protocol):
    """Decides, per row, which memory answers."""

    name: str

    def decide(self, a: Tensor, content: Tensor) -> Routes:
        """Routes [B] from the projection's input [B, T, F] and the content mask [B, T]."""
        ...


@dataclass
class ActivationRouter:
    """The paper's router: Delta_act of each memory (eq. 3) against its epsilon (eq. 4), top-1 among those that pass."""

    deltas: Sequence[Tensor]
    epsilon: Tensor
    name: str = "activation"

    def decide(self, a: Tensor, content: Tensor) -> Routes:
        acts = torch.stack([activation_indicator(a, content, d) for d in self.deltas], 1)  # [B, M]
        epsilon = self.epsilon.to(acts.device)
        # A memory below its own epsilon never hides one that passes.
        passing = torch.where(acts > epsilon, acts, -torch.inf)
        open_ = passing.isfinite().any(1)
        best = torch.where(open_, passing.argmax(1), acts.argmax(1))
        indicator = acts.gather(1, best[:, None])[:, 0]
        memory = torch.where(open_, best, MAIN)
        return Routes.of(memory, indicator, epsilon[best], torch.full_like(best, -1))


@dataclass
class KeyRouter:
    """Cosine of the whitened last-content-token activation with the nearest edit key, against that memory's epsilon."""

    keys: KeyStore
    memory_of: Tensor
    epsilon: Tensor
    name: str = "key"

    def decide(self, a: Tensor, content: Tensor) -> Routes:
        rows = torch.arange(a.shape[0], device=a.device)
        score, edit = self.keys.nearest(a[rows, last_content(content)])
        memory = self.memory_of.to(a.device)[edit]
        epsilon = self.epsilon.to(a.device)[memory]
        return Routes.of(torch.where(score > epsilon, memory, MAIN), score, epsilon, edit)


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
        return ActivationRouter(deltas, epsilon)
    return KeyRouter(sm.keys, torch.tensor([e.memory for e in sm.edits]), epsilon)
