"""Put a side memory on a live model, and take it off again.

The model stays a plain transformers model: `generate`, pipelines, streaming, beams and assisted decoding keep working.
One decision is taken per sequence, when its prompt is first seen, from the prompt's content tokens alone; it is kept on
the KV-cache object and so holds through decoding, is reordered and copied with the cache, and is the same with any
padding and in any batch. Rows answered by main memory keep the base's values bit for bit. Ways of calling the model in
which that cannot be kept (packed sequences, chunked prefill, a cache filled before attaching) are refused.

No weight is ever written: the delta is applied beside the projection, y + a delta^T, to routed rows only, wherever the
model is moved and whatever dtype it is cast to. Several side memories at once are what `shelf.SideMemories` is for.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wisecli.errors import BaseMismatch, InputError, RoutingError, UsageError
from wisecli.hub import SIDE_MEMORY, fetch, is_hub_id
from wisecli.memory.dense import DenseDeltas
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base, matches, matrix_of
from wisecli.models.checkpoint import check_rows
from wisecli.models.prompts import Batch
from wisecli.routing.engine import Asked, Decided, Member, OnModel
from wisecli.routing.routers import MAIN, Route, Router, Routes, Seen

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Attached(OnModel):
    """A side memory attached to a model. Use `attach` to make one; it is a context manager.

    Attributes:
        model: the model it is attached to, unchanged but for hooks.
        side_memory: what was attached.
        router: what decides.
        last: routes of the most recent prompt seen, None before the first.
    """

    def __init__(self, model: PreTrainedModel, side_memory: SideMemory, router: str | None = None) -> None:
        super().__init__(model)
        self.side_memory = side_memory
        self.last: Routes | None = None
        self._member = Member(model, side_memory, router)
        self.router: Router = self._member.router
        self._override: ContextVar[Routes | None] = ContextVar("wise_override", default=None)
        self._mount(self._member)

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Leave the model as it was. Calling it again does nothing; several attachments come off in any order."""
        if self._members:
            self._unmount(self._member.key)

    @property
    def deltas(self) -> DenseDeltas:
        """The deltas [D, F] as they are added now, in the model's dtype; many are made dense when asked for."""
        return self._member.deltas

    @contextlib.contextmanager
    def override(self, memory: Sequence[int | None] | Tensor | None) -> Iterator[None]:
        """Set the route of every row from outside: a memory index per row, None or -1 for main.

        `override(None)` sends everything to main memory. Used to ask the unedited model and for oracle routing.
        """
        if memory is None:
            routes = Routes.forced(torch.full((1,), MAIN))
        else:
            picked = [MAIN if m is None else int(m) for m in memory]
            if not picked or not all(MAIN <= m < len(self.deltas) for m in picked):
                raise UsageError(
                    f"Routes {picked} do not name memories of this side memory, which has {len(self.deltas)}.",
                    hint="Give one memory index per row, None for main memory.",
                )
            routes = Routes.forced(torch.tensor(picked, device=self.deltas.device))
        token = self._override.set(routes)
        try:
            yield
        finally:
            self._override.reset(token)

    @property
    def overridden(self) -> bool:
        """Whether routes are being set from outside."""
        return self._override.get() is not None

    def decide(self, batch: Batch) -> list[Route]:
        """The route of each prompt of a batch, at the cost of the layers up to the edit site."""
        return self.explain(self.look(batch)[0])

    @torch.no_grad()
    def look(self, batch: Batch) -> tuple[Routes, Seen]:
        """The decision about each prompt of a batch and what it was taken from; `decide` in tensors."""
        token = self._stop.set(True)
        try:
            inputs = batch.to(self.model.device).inputs
            if "position_ids" in inspect.signature(self.model.forward).parameters:  # left padding counts no positions
                inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            self.model(**inputs, use_cache=False)
        except Decided as e:
            if e.routes is not None and e.seen is not None:
                return e.routes, e.seen
        finally:
            self._stop.reset(token)
        raise RoutingError("The edit site did not run.", hint="The model was changed since it was attached.")

    def explain(self, routes: Routes) -> list[Route]:
        """Routes in plain Python, with the id of the nearest edit."""
        ids = [e.id for e in self.side_memory.edits]
        columns = (x.tolist() for x in (routes.memory, routes.indicator, routes.epsilon, routes.edit))
        return [
            Route(None if m == MAIN else int(m), i, e, ids[k] if k >= 0 else None)
            for m, i, e, k in zip(*columns, strict=True)
        ]

    def _asked(self, rows: int) -> Asked:
        return Asked({self._member.key: None})

    def _forced(self, rows: int) -> dict[int, Routes] | None:
        routes = self._override.get()
        return None if routes is None else {self._member.key: routes}

    def _note(self, rows: int, routes: Mapping[int, Routes]) -> None:
        self.last = routes[self._member.key]


def attach(
    model: PreTrainedModel | Base,
    side_memory: SideMemory | str | Path,
    *,
    router: str | None = None,
    scope: str | None = None,
    allow_other_base: bool = False,
) -> Attached:
    """Attach a side memory to a model; use as a context manager or call `.detach()`.

    Args:
        model: a loaded causal language model, or a base; it is not copied and no weight of it is changed.
        side_memory: one in memory, the path of a file or of a packaged folder, or a hub id with or without @revision.
        router: "key" or "activation" instead of the side memory's own.
        scope: "narrow", "balanced" or "wide" instead of the one the side memory was merged with (key router).
        allow_other_base: attach although the edited matrix is not the one the side memory was learned on.

    Raises:
        BaseMismatch: the model is not the base the side memory belongs to.
        UsageError: the model carries a side memory already.
    """
    model = model.model if isinstance(model, Base) else model
    return Attached(model, fitting_side_memory(model, side_memory, router, scope, allow_other_base), router)


def fitting_side_memory(
    model: PreTrainedModel,
    side_memory: SideMemory | str | Path,
    router: str | None,
    scope: str | None,
    allow_other_base: bool,
) -> SideMemory:
    """The side memory that `attach` would put on a model, with the thresholds of the scope asked for.

    Raises:
        BaseMismatch: the model is not the base it belongs to.
        RoutingError: it is an 8-bit model whose rows depend on one another.
    """
    sm = side_memory if isinstance(side_memory, SideMemory) else load_side_memory(side_memory)
    if scope is not None:
        sm = sm.scoped(scope, router)
    site = sm.site
    try:
        shape = site.shape(model)
    except AttributeError as e:
        raise BaseMismatch(
            f"This model has no module {site.path}; the side memory belongs to {sm.base.get('name')}.",
            hint="Give that base with --model.",
        ) from e
    fits, weight = shape == (site.d_out, site.d_in), matrix_of(model, site)
    same = fits and matches(weight, sm.base.get("fingerprint", {}))
    if not same and (not allow_other_base or not fits):
        packed = fits and not weight.is_floating_point()
        found = "are packed here, so that it cannot be told whether they are the same" if packed else "differ here"
        raise BaseMismatch(
            f"This side memory was learned on {sm.base.get('name')}; the weights of {site.path} {found}.",
            hint="Give the right base with --model, or attach anyway with --allow-other-base.",
        )
    check_rows(model)
    return sm


def load_side_memory(source: str | Path) -> SideMemory:
    """The side memory in a file, a packaged folder, or a package on the hub, named with or without @revision.

    Raises:
        InputError: there is none, it is damaged, or of a newer format.
    """
    return SideMemory.load(side_memory_file(source))


def side_memory_file(source: str | Path) -> Path:
    """The file of a side memory: itself, the one in a packaged folder, or that of a package fetched from the hub.

    Args:
        source: a file, a folder, or a hub id with or without @revision. What exists here goes first.

    Raises:
        InputError: the folder holds no side memory, or the package cannot be had.
    """
    path = Path(source)
    if not path.exists() and is_hub_id(source):
        return fetch(str(source)).side_memory
    if not path.is_dir():
        return path
    inside = path / SIDE_MEMORY
    if (path / "run.json").exists():
        raise InputError(
            f"{path} holds shards that are not merged yet.", hint=f"Run wise merge {path} -o sm.safetensors first."
        )
    if not inside.exists():
        raise InputError(
            f"The folder {path} holds neither a side memory nor shards.",
            hint="Give a folder written by wise edit or wise package, or a file by wise merge.",
        )
    return inside
