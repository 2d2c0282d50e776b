"""The hooks through which side memories act on a live model. `attach` and `SideMemories` are what is used of it.

One set of hooks serves any number of side memories. At a prefill each of those asked for takes one decision per row at
its own edit site; of those that claim a row the one of the highest rank answers it, so that never two deltas are added
to one row. The decision is kept on the KV cache and holds until the sequence ends. Where a row asks for side memories
of different layers, the prompt first runs up to the highest of them without any delta: each decides from what the base
makes of the prompt, as it would alone.

A model carries one such set at a time. A copy of it carries none: `copy.deepcopy` gives the plain base, whose answers
have nothing to do with the routes of the original. A model in training mode is refused: under dropout no decision
holds, and gradient checkpointing runs layers again outside the call for which the routes were taken.

Shapes: `B` rows, `T` tokens, `F` FFN width, `D` model width.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wisecli.errors import RoutingError, UsageError
from wisecli.memory.dense import DenseDeltas
from wisecli.memory.side_memory import SideMemory
from wisecli.models.site import decoder_layers, decoder_of, residual
from wisecli.routing.calls import (
    Generation,
    Prompts,
    arguments,
    input_of,
    is_begun,
    read_prompts,
    state_of,
    without_cache,
)
from wisecli.routing.routers import MAIN, Router, Routes, Seen, build_router

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ON_CACHE = "_wise_routes"
_ids = itertools.count()


class _Hook:
    """A hook of ours, known as such; its copy does nothing, so that no copy of a module reaches back."""

    def __init__(self, act: Callable[..., Any] | None) -> None:
        self.act = act

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if self.act is None else self.act(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(None)


def carries_side_memory(model: PreTrainedModel) -> bool:
    """Whether side memories are on a model now."""
    hooks = decoder_of(model)._forward_pre_hooks.values()
    return any(isinstance(h, _Hook) and h.act is not None for h in hooks)


class Member:
    """A side memory as it is on a model: its deltas beside the weight they belong to, and its router."""

    def __init__(self, model: PreTrainedModel, side_memory: SideMemory, router: str | None) -> None:
        self.key = next(_ids)
        self.side_memory, self.site = side_memory, side_memory.site
        self.ffn = self.site.module(model)
        self.deltas = DenseDeltas([m.delta for m in side_memory.memories])
        self.follow(self.site.device(model))
        self.router: Router = build_router(side_memory, self.deltas, router)

    def follow(self, device: torch.device) -> None:
        """Bring the deltas to where the model computes and to its weight's dtype, anew from the stored values."""
        dtype = self.ffn.weight.dtype if self.ffn.weight.is_floating_point() else torch.float32
        self.deltas.follow(device, dtype)  # the router holds the same sequence


@dataclass(frozen=True)
class Asked:
    """Which side memories may answer a call.

    Attributes:
        ranks: by member, one per row: 0 where the row does not ask for it, else the higher the sooner it answers.
            None where it is asked for by all rows and alone.
        across: whether some row asks for members of different layers.
    """

    ranks: Mapping[int, Sequence[int] | None]
    across: bool = False


@dataclass
class _Call:
    """What is known during one forward of the decoder.

    `routes` holds members whose decision is final; `idle` says that all are, and that none of them answers a row.
    """

    rows: int
    cache: Any = None
    prompts: Prompts | None = None
    asked: Asked = Asked({})
    ahead: bool = False
    keep: bool = True
    idle: bool = False
    entries: dict[str, Tensor] = field(default_factory=dict)
    found: dict[int, Routes] = field(default_factory=dict)
    routes: Mapping[int, Routes] = field(default_factory=dict)  # may be what a cache keeps
    token: Token | None = None


class Decided(Exception):
    """Ends a forward pass at the edit site, once the routes are known."""

    def __init__(self, routes: Routes | None = None, seen: Seen | None = None) -> None:
        super().__init__()
        self.routes, self.seen = routes, seen


class OnModel:
    """Side memories on a model. Subclasses say which are asked for; the hooks are there while any is mounted.

    What is set for a `with` block is set for the thread that runs it, and for what runs through `bind`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._id = next(_ids)
        self._members: dict[int, Member] = {}
        self._handles: list[Any] = []
        self._at_site: dict[str, list[Any]] = {}
        self._mine: dict[str, Any] = {}  # attributes put on the model, and what was there before
        self._before: dict[str, Any] = {}
        self._call: ContextVar[_Call | None] = ContextVar("wise_call", default=None)
        self._ahead: ContextVar[_Call | None] = ContextVar("wise_ahead", default=None)
        self._generation: ContextVar[Generation | None] = ContextVar("wise_generation", default=None)
        self._lengths: ContextVar[Tensor | None] = ContextVar("wise_lengths", default=None)
        self._stop: ContextVar[bool] = ContextVar("wise_stop", default=False)
        self._decoder = decoder_of(model)
        self._signature = inspect.signature(self._decoder.forward)

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

    def bind(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that runs with what is set here, whichever thread calls it.

        A new thread knows nothing of the `with` blocks it was started in; a streamed generation gets their routes by
        `Thread(target=attached.bind(model.generate), kwargs=...)`. It can be called several times, also at once.
        """
        here = contextvars.copy_context()

        @functools.wraps(function)
        def bound(*args: Any, **kwargs: Any) -> Any:
            return here.copy().run(function, *args, **kwargs)

        return bound

    # -- what subclasses say -------------------------------------------------------------------------------------------

    def _asked(self, rows: int) -> Asked:
        raise NotImplementedError

    def _forced(self, rows: int) -> dict[int, Routes] | None:
        """Routes set from outside."""
        return None

    def _note(self, rows: int, routes: Mapping[int, Routes]) -> None:
        """Called when decisions about a prompt are final."""

    # -- putting on and taking off -------------------------------------------------------------------------------------

    def _mount(self, member: Member) -> None:
        site = member.site
        if not self._members:
            self._put_on()
        if site.path not in self._at_site:
            layer = decoder_layers(self.model)[site.layer]
            arrive, project = (_Hook(functools.partial(f, site.path)) for f in (self._arrive, self._project))
            self._at_site[site.path] = [
                layer.register_forward_pre_hook(arrive, with_kwargs=True),
                member.ffn.register_forward_hook(project),
            ]
        self._members[member.key] = member

    def _refuse_second(self) -> None:
        if not self._handles and carries_side_memory(self.model):
            raise UsageError(
                "This model carries a side memory already.",
                hint="Detach it first. Several on one model are what wisecli.SideMemories is for.",
            )

    def _put_on(self) -> None:
        self._refuse_second()
        self._handles = [
            self._decoder.register_forward_pre_hook(_Hook(self._enter), with_kwargs=True),
            self._decoder.register_forward_hook(_Hook(self._leave), with_kwargs=True, always_call=True),
        ]
        self._mine = {"generate": self._wrap_generate(self.model.generate), "__deepcopy__": self._plain_copy}
        self._before = {name: self.model.__dict__.get(name) for name in self._mine}
        for name, value in self._mine.items():
            setattr(self.model, name, value)

    def _unmount(self, key: int) -> None:
        path = self._members.pop(key).site.path
        if not any(m.site.path == path for m in self._members.values()):
            for h in self._at_site.pop(path):
                h.remove()
        if self._members:
            return
        for h in self._handles:
            h.remove()
        self._handles = []
        for name, value in self._mine.items():
            if self.model.__dict__.get(name) is not value:
                continue  # wrapped again since; ours inside it now only passes on
            if self._before[name] is None:
                del self.model.__dict__[name]
            else:
                setattr(self.model, name, self._before[name])

    def _wrap_generate(self, generate: Any) -> Any:
        @functools.wraps(generate)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            token = self._generation.set(Generation.of(args, kwargs))
            try:
                return generate(*args, **kwargs)
            finally:
                self._generation.reset(token)

        return wrapped

    def _plain_copy(self, memo: dict[int, Any]) -> Any:
        """A deep copy of the model with nothing of ours on it; the model itself is left alone meanwhile."""
        model = self.model
        new = memo[id(model)] = type(model).__new__(type(model))
        put_back = {k: v for k, v in self._before.items() if v is not None}
        state = {k: v for k, v in vars(model).items() if self._mine.get(k) is not v} | put_back
        new.__dict__.update(copy.deepcopy(state, memo))
        for module in new.modules():
            hooks = [d for n, d in vars(module).items() if n.startswith(("_forward_hooks", "_forward_pre_hooks"))]
            for key in {k for d in hooks for k, hook in d.items() if isinstance(hook, _Hook)}:
                for d in hooks:
                    d.pop(key, None)
        return new

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def _enter(self, module: Any, args: Any, kwargs: Any) -> None:
        if module.training:
            raise RoutingError(
                "The model is in training mode, in which no decision about a prompt holds.",
                hint="Call model.eval(). To train the model, detach the side memory first.",
            )
        call = self._ahead.get()
        if call is None:
            bound = arguments(self._signature, args, kwargs)
            call = _Call(len(input_of(bound)), state_of(bound))
            forced = None if self._stop.get() else self._forced(call.rows)
            if forced is not None:
                call.routes = _fit(forced, call.rows)
                call.idle = _nobody(call.routes)
            elif is_begun(call.cache):
                self._continue(call)
            else:
                self._start(call, bound)
        call.token = self._call.set(call)

    def _continue(self, call: _Call) -> None:
        """Take the routes that were decided at the sequence's prompt."""
        known = self._kept_with(call.cache).get(self._id)
        if known is None:
            if self._asked(call.rows).ranks:
                raise RoutingError(
                    "The KV cache was filled before the side memory was attached: no decision can be kept.",
                    hint="Start from the prompt with an empty cache.",
                )
            call.keep = False
            return
        call.routes = _fit(known, call.rows)
        call.keep = call.routes is not known
        call.idle = _nobody(call.routes)
        if not call.idle and any(routes.rows and key not in self._members for key, routes in call.routes.items()):
            raise RoutingError(
                "The side memory that answers this sequence is no longer on the model.",
                hint="Start from the prompt with an empty cache.",
            )

    def _start(self, call: _Call, bound: dict[str, Any]) -> None:
        """Make ready for the decisions about new prompts, or take them ahead where one depends on a later layer."""
        call.asked = self._asked(call.rows)
        if not call.asked.ranks:
            self._note(call.rows, call.routes)
            return
        call.prompts = read_prompts(bound, self._generation.get(), self._lengths.get())
        if not call.asked.across and not bound.get("logits_to_keep"):
            return  # a decoder that is told of it may run its upper layers on the last tokens alone
        first = _Call(call.rows, prompts=call.prompts, asked=call.asked, ahead=True)
        token = self._ahead.set(first)
        try:
            with contextlib.suppress(Decided), torch.no_grad():
                self._decoder(**without_cache(bound, call.prompts.real.shape[1]))
        finally:
            self._ahead.reset(token)
        call.routes = _resolve(call.asked, first.found)
        self._note(call.rows, call.routes)

    def _arrive(self, path: str, module: Any, args: Any, kwargs: Any) -> None:
        call = self._call.get()
        if call is not None and call.prompts is not None:
            call.entries[path] = args[0] if args else kwargs["hidden_states"]

    def _project(self, path: str, module: Any, args: Any, y: Tensor) -> Tensor | None:
        call = self._call.get()
        if call is None or call.idle:
            return None
        here = [m for m in tuple(self._members.values()) if m.site.path == path]
        for member in here:
            member.follow(y.device)
        self._decide(call, path, here, args[0])
        if call.ahead:
            return None
        out = None
        for member in here:
            routes = call.routes.get(member.key)
            if routes is None or not routes.rows:
                continue
            a = args[0].view(len(routes), -1, args[0].shape[-1])
            for j, rows in routes.rows.items():
                delta = member.deltas[j]
                if len(rows) == len(routes):  # one memory answers all: nothing to pick out
                    return y + F.linear(a.to(delta.dtype), delta).to(y.dtype).view_as(y)
                out = y.clone() if out is None else out
                out.view(*a.shape[:2], -1)[rows] += F.linear(a[rows].to(delta.dtype), delta).to(y.dtype)
        return out

    def _decide(self, call: _Call, path: str, here: Sequence[Member], a: Tensor) -> None:
        """Decisions of the members at one site, where they are still to be taken."""
        open_ = [m for m in here if m.key in call.asked.ranks and m.key not in call.routes]
        if not open_:
            return
        if call.prompts is None or path not in call.entries:
            raise RoutingError("The edit site ran outside a decoder call.")
        shape, entry = call.prompts.real.shape, call.entries.pop(path)
        found: dict[int, Routes] = {}
        for member in open_:
            content = call.prompts.content(member.side_memory.rule)
            seen = Seen(a.view(*shape, -1), residual(self.model, entry, *shape).flatten(2), content)
            found[member.key] = member.router.decide(seen)
        call.found |= found
        if call.ahead:
            if call.found.keys() >= call.asked.ranks.keys():
                raise Decided
            return
        call.routes = {**call.routes, **_resolve(call.asked, found)}
        self._note(call.rows, call.routes)
        if self._stop.get():
            raise Decided(call.routes[open_[-1].key], seen)

    def _leave(self, module: Any, args: Any, kwargs: Any, out: Any) -> None:
        call = self._call.get()
        if call is None:
            return
        if call.token is not None:
            self._call.reset(call.token)
        if not call.keep or call.ahead or out is None:
            return
        cache = call.cache if call.cache is not None else state_of(out)
        if cache is None:
            return
        kept = {**self._kept_with(cache), self._id: call.routes}
        if not isinstance(cache, list | tuple):
            setattr(cache, _ON_CACHE, kept)
        elif (generation := self._generation.get()) is not None:
            generation.kept[_ON_CACHE] = kept

    def _kept_with(self, cache: Any) -> dict[int, Any]:
        """The decisions kept with the state of sequences: on it, or with the `generate` call where it is a list."""
        generation = self._generation.get()
        if isinstance(cache, list | tuple):
            return generation.kept.get(_ON_CACHE, {}) if generation is not None else {}
        return getattr(cache, _ON_CACHE, {})


def _resolve(asked: Asked, found: Mapping[int, Routes]) -> dict[int, Routes]:
    """Of the members that claim a row the one of the highest rank keeps it; to the others it is main memory's."""
    claims: dict[int, Tensor] = {}
    for key, routes in found.items():
        ranks = asked.ranks[key]
        if ranks is None:
            return {key: routes}
        rank = torch.tensor(ranks, device=routes.memory.device)
        claims[key] = torch.where(routes.memory != MAIN, rank, 0)
    best = functools.reduce(torch.maximum, (c.to(next(iter(claims.values())).device) for c in claims.values()))
    return {k: _only(found[k], (c > 0) & (c == best.to(c.device))) for k, c in claims.items()}


def _only(routes: Routes, kept: Tensor) -> Routes:
    """The routes of some rows [B], the others at main memory."""
    return Routes.of(torch.where(kept, routes.memory, MAIN), routes.indicator, routes.epsilon, routes.edit)


def _nobody(routes: Mapping[int, Routes]) -> bool:
    """Whether main memory answers every row."""
    return not any(r.rows for r in routes.values())


def _fit(known: Mapping[int, Routes], rows: int) -> Mapping[int, Routes]:
    """Routes of so many rows; what is known itself, where it is of so many."""
    for routes in known.values():
        if len(routes) != rows:
            return {key: _fitted(r, rows) for key, r in known.items()}
    return known


def _fitted(routes: Routes, rows: int) -> Routes:
    if len(routes) == rows:
        return routes
    if rows % len(routes):
        raise RoutingError(f"Routes were decided for {len(routes)} rows, but the model was called with {rows}.")
    return routes.repeat(rows // len(routes))
