"""Put a side memory on a live model, and take it off again.

The model stays a plain transformers model: `generate`, pipelines, streaming, beams and assisted decoding keep working.
One decision is taken per sequence, when its prompt is first seen, from the prompt's content tokens alone; it is kept on
the KV-cache object and so holds through decoding, is reordered and copied with the cache, and is the same with any
padding and in any batch. Rows answered by main memory keep the base's values bit for bit. Ways of calling the model in
which that cannot be kept (packed sequences, chunked prefill, a cache filled before attaching) are refused.

No weight is ever written: the delta is applied beside the projection, y + a delta^T, to routed rows only.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wisecli.errors import BaseMismatch, InputError, RoutingError, UsageError
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import matches
from wisecli.models.prompts import Batch
from wisecli.models.site import decoder_layers
from wisecli.routing.routers import MAIN, Route, Router, Routes, Seen, build_router

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ON_CACHE = "_wise_routes"
_OWNER = "_wise_attached"
_attachments = itertools.count()


@dataclass
class _Call:
    """What is known during one forward of the decoder."""

    content: Tensor | None = None
    entry: Tensor | None = None
    routes: Routes | None = None
    cache: Any = None
    token: Token | None = None


@dataclass(frozen=True)
class _Generation:
    """What `generate` was called with: assisted decoding feeds prompt and candidates in its first forward."""

    prompt_length: int | None
    chunked: bool


class Attached:
    """A side memory attached to a model. Use `attach` to make one; it is a context manager.

    Attributes:
        model: the model it is attached to, unchanged but for hooks.
        side_memory: what was attached.
        last: routes of the most recent prompt seen, None before the first.
    """

    def __init__(self, model: PreTrainedModel, side_memory: SideMemory, router: str | None = None) -> None:
        self.model, self.side_memory = model, side_memory
        self.last: Routes | None = None
        self._name = next(_attachments)
        self._ffn = side_memory.site.module(model)
        weight = side_memory.site.weight(model)
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        self.deltas = [m.delta.dense().to(weight.device, dtype) for m in side_memory.memories]
        self.router: Router = build_router(side_memory, self.deltas, router)
        self._call: ContextVar[_Call | None] = ContextVar("wise_call", default=None)
        self._generation: ContextVar[_Generation | None] = ContextVar("wise_generation", default=None)
        self._override: ContextVar[Routes | None] = ContextVar("wise_override", default=None)
        self._lengths: ContextVar[Tensor | None] = ContextVar("wise_lengths", default=None)
        self._stop: ContextVar[bool] = ContextVar("wise_stop", default=False)
        decoder = model.get_decoder()
        self._signature = inspect.signature(decoder.forward)
        self._handles = [
            decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            decoder_layers(model)[side_memory.site.layer].register_forward_pre_hook(self._arrive, with_kwargs=True),
            self._ffn.register_forward_hook(self._project),
            decoder.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]
        self._generate = model.__dict__.get("generate")
        self._wrapped = self._wrap_generate(model.generate)
        model.generate = self._wrapped

    # -- public --------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Leave the model as it was. Calling it again does nothing; several attachments come off in any order."""
        if not self._handles:
            return
        for h in self._handles:
            h.remove()
        self._handles = []
        if self.model.__dict__.get("generate") is not self._wrapped:
            return  # wrapped again since; ours inside it now only passes on
        below = self._generate
        while (owner := getattr(below, _OWNER, None)) is not None and not owner._handles:
            below = owner._generate
        if below is None:
            self.model.__dict__.pop("generate", None)
        else:
            self.model.generate = below

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
            routes = Routes.forced(torch.tensor(picked, device=self.deltas[0].device))
        token = self._override.set(routes)
        try:
            yield
        finally:
            self._override.reset(token)

    @property
    def overridden(self) -> bool:
        """Whether routes are being set from outside."""
        return self._override.get() is not None

    @contextlib.contextmanager
    def prompt_lengths(self, lengths: Sequence[int] | Tensor) -> Iterator[None]:
        """Say how many tokens of each row are its prompt, so that what follows takes no part in the decision.

        For scoring an answer in one forward, `model(prompt + answer)`: without it the answer counts as prompt.

        Args:
            lengths: tokens of each row's prompt, padding not counted. A model called with a multiple of these rows
                takes each for the rows made of it, as beams do.
        """
        wanted = torch.as_tensor(lengths)
        if wanted.dim() != 1 or not len(wanted) or wanted.is_floating_point() or int(wanted.min()) < 1:
            raise UsageError(
                f"{wanted.tolist()} are no lengths of prompts.", hint="Give a whole number of at least 1 per row."
            )
        token = self._lengths.set(wanted)
        try:
            yield
        finally:
            self._lengths.reset(token)

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
        except _Decided as e:
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

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def _wrap_generate(self, generate: Any) -> Any:
        @functools.wraps(generate)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
            length = None if ids is None else ids.shape[1]
            token = self._generation.set(_Generation(length, kwargs.get("prefill_chunk_size") is not None))
            try:
                return generate(*args, **kwargs)
            finally:
                self._generation.reset(token)

        setattr(wrapped, _OWNER, self)
        return wrapped

    def _enter(self, module: Any, args: Any, kwargs: Any) -> None:
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        bound = {**bound.pop("kwargs", {}), **bound}
        call = _Call(cache=bound.get("past_key_values"))
        past = call.cache.get_seq_length() if call.cache is not None else 0
        rows = _first(bound, "input_ids", "inputs_embeds").shape[0]
        forced = self._override.get()
        if forced is not None:
            call.routes = _fit(forced, rows)
        elif past > 0:
            known = getattr(call.cache, _ON_CACHE, {}).get(self._name)
            if known is None:
                raise RoutingError(
                    "The KV cache was filled before the side memory was attached: no decision can be kept.",
                    hint="Start from the prompt with an empty cache.",
                )
            call.routes = _fit(known, rows)
        else:
            self._refuse(bound)
            call.content = self._content(bound)
        call.token = self._call.set(call)

    def _refuse(self, bound: Mapping[str, Any]) -> None:
        generation = self._generation.get()
        if bound.get("cu_seq_lens_q") is not None:
            raise RoutingError(
                "Packed sequences and continuous batching cannot be routed: several requests share one row.",
                hint="Call generate with a padded batch.",
            )
        width = _first(bound, "input_ids", "inputs_embeds").shape[1]
        if generation is not None and (generation.chunked or width < (generation.prompt_length or 0)):
            raise RoutingError(
                "A prefill in chunks cannot be routed: the decision needs the whole prompt.",
                hint="Leave prefill_chunk_size out.",
            )

    def _content(self, bound: Mapping[str, Any]) -> Tensor:
        """Content mask [B, T] of the prompt in this call."""
        ids = bound.get("input_ids")
        x = _first(bound, "input_ids", "inputs_embeds")
        rows, width = x.shape[:2]
        mask = bound.get("attention_mask")
        if isinstance(mask, Mapping):
            mask = mask.get("full_attention", next(iter(mask.values())))
        if mask is None:
            real = torch.ones(rows, width, dtype=torch.bool, device=x.device)
        elif mask.dim() == 2:
            real = mask[:, -width:].bool()
        else:  # 4-D: a token is real where it may attend to itself
            own = torch.diagonal(mask[:, 0, :, :width], dim1=-2, dim2=-1)
            real = own if own.dtype == torch.bool else own == 0
        real = real.expand(rows, width)
        generation = self._generation.get()
        if generation is not None and generation.prompt_length is not None and width > generation.prompt_length:
            real = real.clone()
            real[:, generation.prompt_length :] = False
        lengths = self._lengths.get()
        if lengths is not None:
            if rows % len(lengths):
                raise RoutingError(
                    f"{len(lengths)} prompt lengths were given, but the model was called with {rows} rows."
                )
            each = lengths.to(x.device).repeat_interleave(rows // len(lengths))
            real = real & (real.cumsum(1) <= each[:, None])
        return real if ids is None else self.side_memory.rule.mask(ids, real)

    def _arrive(self, module: Any, args: Any, kwargs: Any) -> None:
        call = self._call.get()
        if call is not None and call.routes is None:
            call.entry = args[0] if args else kwargs["hidden_states"]

    def _project(self, module: Any, args: Any, y: Tensor) -> Tensor | None:
        call = self._call.get()
        if call is None:
            return None
        if call.routes is None:
            if call.content is None or call.entry is None:
                raise RoutingError("The edit site ran outside a decoder call.")
            shape = call.content.shape
            seen = Seen(args[0].view(*shape, -1), call.entry.view(*shape, -1), call.content)
            call.routes = self.last = self.router.decide(seen)
            call.entry = None
            if self._stop.get():
                raise _Decided(call.routes, seen)
        if not call.routes.rows:
            return None
        a = args[0].view(len(call.routes), -1, args[0].shape[-1])
        out = y.clone()
        flat = out.view(*a.shape[:2], -1)
        for j, rows in call.routes.rows.items():
            delta = self.deltas[j]
            flat[rows] += F.linear(a[rows].to(delta.dtype), delta).to(y.dtype)
        return out

    def _leave(self, module: Any, args: Any, kwargs: Any, out: Any) -> None:
        call = self._call.get()
        if call is None:
            return
        if call.token is not None:
            self._call.reset(call.token)
        if call.routes is not None and out is not None:
            cache = call.cache if call.cache is not None else getattr(out, "past_key_values", None)
            if cache is not None:
                setattr(cache, _ON_CACHE, {**getattr(cache, _ON_CACHE, {}), self._name: call.routes})


class _Decided(Exception):
    """Ends a forward pass at the edit site, once the routes are known."""

    def __init__(self, routes: Routes, seen: Seen) -> None:
        super().__init__()
        self.routes, self.seen = routes, seen


def attach(
    model: PreTrainedModel,
    side_memory: SideMemory | str | Path,
    *,
    router: str | None = None,
    scope: str | None = None,
    allow_other_base: bool = False,
) -> Attached:
    """Attach a side memory to a model; use as a context manager or call `.detach()`.

    Args:
        model: a loaded causal language model; it is not copied and no weight of it is changed.
        side_memory: one in memory, or the path of a file or of a packaged folder.
        router: "key" or "activation" instead of the side memory's own.
        scope: "narrow", "balanced" or "wide" instead of the one the side memory was merged with (key router).
        allow_other_base: attach although the edited matrix is not the one the side memory was learned on.

    Raises:
        BaseMismatch: the model is not the base the side memory belongs to.
    """
    sm = side_memory if isinstance(side_memory, SideMemory) else SideMemory.load(side_memory_file(Path(side_memory)))
    if scope is not None:
        sm = sm.scoped(scope, router)
    site = sm.site
    try:
        shape = tuple(site.weight(model).shape)
    except AttributeError as e:
        raise BaseMismatch(
            f"This model has no module {site.path}; the side memory belongs to {sm.base.get('name')}.",
            hint="Give that base with --model.",
        ) from e
    recorded = sm.base.get("fingerprint", {})
    weight = site.module(model).weight.detach()
    same = shape == (site.d_out, site.d_in) and matches(weight, recorded)
    if not same and (not allow_other_base or shape != (site.d_out, site.d_in)):
        raise BaseMismatch(
            f"This side memory was learned on {sm.base.get('name')}; the weights of {site.path} in this model differ.",
            hint="Give the right base with --model, or attach anyway with --allow-other-base.",
        )
    return Attached(model, sm, router)


def side_memory_file(path: Path) -> Path:
    """A packaged folder stands for the side memory inside it.

    Raises:
        InputError: the folder holds no side memory.
    """
    if not path.is_dir():
        return path
    inside = path / "side_memory.safetensors"
    if (path / "run.json").exists():
        raise InputError(
            f"{path} holds shards that are not merged yet.", hint=f"Run wise merge {path} -o sm.safetensors first."
        )
    if not inside.exists():
        raise InputError(f"The folder {path} holds no side memory.", hint="Give a file made by wise merge.")
    return inside


def _fit(routes: Routes, rows: int) -> Routes:
    if len(routes) == rows:
        return routes
    if rows % len(routes):
        raise RoutingError(f"Routes were decided for {len(routes)} rows, but the model was called with {rows}.")
    return routes.repeat(rows // len(routes))


def _first(bound: Mapping[str, Any], *names: str) -> Tensor:
    for name in names:
        if bound.get(name) is not None:
            return bound[name]
    raise UsageError("The model was called without input_ids or inputs_embeds.")
