"""The model that lm_eval asks: its own for transformers, with one route per context.

lm_eval scores `context + answer`, padded on the right and without a mask. A side memory merely attached to its model
would decide anew for every answer of a question, and read padding. Here the distinct contexts are decided first, each
once, alone and unpadded; the route then holds for every answer to that context, in any batch. Order, batches and
arithmetic stay lm_eval's own, so what main memory answers keeps its log-likelihoods and generations bit for bit. It
costs one forward up to the edit site per distinct context.

    multiple choice, loglikelihood   decided by the context; the answers take no part
    loglikelihood_rolling            decided by the text itself, as far as it fits the model; holds for all its windows
    generate_until                   decided by the prompt, as lm_eval cut it

Tasks, prompts and metrics are lm_eval's. Encoder-decoder models are refused.

Shapes: `B` rows, `T` tokens.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from wisecli.errors import InputError, ModelError, RoutingError, UsageError
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import DEMO_BASE, demo_base_path
from wisecli.models.prompts import Batch
from wisecli.routing.attach import Attached, attach

_HINT = "pip install 'wisecli[harness]'"

try:
    from lm_eval.models import huggingface as _huggingface
except ImportError as e:
    _missing: ImportError | None = e
    _HFLM: Any = object
else:
    _missing = None
    _HFLM = _huggingface.HFLM


def need() -> None:
    """Raise an InputError where lm_eval is not installed or cannot be imported."""
    if _missing is not None:
        raise InputError(f"lm-evaluation-harness cannot be used: {_missing}.", hint=_HINT)


class WiseLM(_HFLM):
    """lm_eval's model for transformers, with a side memory attached.

    Args:
        pretrained: a loaded model, a folder, a hub id, or None for the demonstration base.
        side_memory: what to attach: in memory, a file, a packaged folder, or something attached to `pretrained`
            already. None is plain `HFLM`.
        router: "key" or "activation" instead of the side memory's own.
        allow_other_base: attach although the edited matrix is not the one the side memory was learned on.
        progress: called with the requests answered and their number; silences lm_eval's own bars.
        kwargs: what `HFLM` takes: tokenizer, batch_size, dtype, device, max_length, ...

    Attributes:
        attached: the side memory on the model, None where there is none.
        closed: send everything to main memory: the base alone, without detaching.
        routes: per task, the memory that answers each distinct context seen; None is main.

    Raises:
        InputError: lm_eval is not installed, or the side memory cannot be read.
        BaseMismatch: the model is not the base the side memory belongs to.
        ModelError: an encoder-decoder model.
    """

    def __init__(
        self,
        pretrained: Any = None,
        side_memory: Attached | SideMemory | str | Path | None = None,
        router: str | None = None,
        allow_other_base: bool = False,
        progress: Callable[[int, int], None] | None = None,
        **kwargs: Any,
    ) -> None:
        need()
        if pretrained is None or (isinstance(pretrained, str) and pretrained == DEMO_BASE):
            pretrained = str(demo_base_path())
        super().__init__(pretrained=pretrained, **kwargs)
        if self.backend != "causal":
            raise ModelError("An encoder-decoder model cannot be edited here.", hint="Give a causal language model.")
        if isinstance(side_memory, Attached):
            if side_memory.model is not self.model:
                raise UsageError("This side memory is attached to another model.", hint="Give the model it is on.")
            self.attached: Attached | None = side_memory
        elif side_memory is not None:
            self.attached = attach(self.model, side_memory, router=router, allow_other_base=allow_other_base)
        else:
            self.attached = None
        self.closed = False
        self.progress = progress
        self.routes: dict[str, dict[str, int | None]] = {}
        self._known: dict[tuple[int, ...], int | None] = {}
        self._decided: dict[str, int | None] = {}
        self._queue: Iterator[tuple[tuple[int, ...], int | None]] | None = None
        self._windows: Iterator[int | None] | None = None
        self._texts: list[str] = []
        self._done = self._total = 0

    # -- what lm_eval asks ---------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        with self._asking(requests):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm or self.progress is not None)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        with self._asking(requests):
            self._windows = self._window_routes([r.args[0] for r in requests]) if self._routing else None
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or self.progress is not None)
            finally:
                self._windows = None

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        with self._asking(requests):
            return super().generate_until(requests, disable_tqdm=disable_tqdm or self.progress is not None)

    @contextlib.contextmanager
    def _asking(self, requests: Sequence[Any]) -> Iterator[None]:
        """Around one call: starts counting, and notes afterwards which contexts of which task were routed where."""
        self._known, self._decided = {}, {}
        self._done, self._total = 0, len(requests)
        self._tick(0)
        yield
        self._tick(self._total)
        for r in requests:
            if r.args[0] in self._decided:
                self.routes.setdefault(str(r.task_name), {})[r.args[0]] = self._decided[r.args[0]]

    # -- deciding ------------------------------------------------------------------------------------------------------

    @property
    def _routing(self) -> bool:
        return self.attached is not None and not self.closed

    def _decide(self, ids: Sequence[int]) -> int | None:
        """The memory that answers a context of these tokens, cut at the left where the model cannot hold them all."""
        key = tuple(ids[-self.max_length :])
        if key not in self._known:
            self._known[key] = self._ask_router(self.attached, key) if key and self.attached else None
        return self._known[key]

    def _ask_router(self, attached: Attached, ids: tuple[int, ...]) -> int | None:
        row = torch.tensor([ids])
        real = torch.ones_like(row)
        batch = Batch(row, real, real.bool(), torch.full_like(row, -100))
        with torch.autocast(
            self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        ):
            return attached.decide(batch)[0].memory

    def _window_routes(self, texts: Sequence[str]) -> Iterator[int | None]:
        """The route of every window in the order `HFLM.loglikelihood_rolling` makes them: that of the window's text."""
        from lm_eval.utils import get_rolling_token_windows

        out: list[int | None] = []
        for text in texts:
            ids = self.tok_encode(text)
            self._decided[text] = self._decide(ids[: self.max_length])
            windows = get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            out += [self._decided[text]] * sum(1 for _ in windows)
        self._total = len(out)
        # Several processes are evened out with copies of the first window.
        return itertools.chain(out, itertools.repeat(out[0] if out else None))

    def _routes_of(self, requests: Sequence[Any]) -> list[int | None]:
        if self._windows is not None:
            return list(itertools.islice(self._windows, len(requests)))
        routes = [self._decide(context) for _, context, _ in requests]
        self._decided.update({asked[0]: route for (asked, _, _), route in zip(requests, routes, strict=True)})
        return routes

    # -- scoring and generating, as HFLM does, with the routes set -----------------------------------------------------

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **kwargs: Any) -> Any:
        ask = functools.partial(
            super()._loglikelihood_tokens, disable_tqdm=disable_tqdm or self.progress is not None, **kwargs
        )
        if not self._routing:
            return ask(requests)
        routes = self._routes_of(requests)
        rows = [tuple((context + answer)[:-1]) for _, context, answer in requests]
        answers: list[Any] = [None] * len(requests)
        for part in _rounds(rows, routes):
            self._queue = self._order([(rows[i], routes[i]) for i in part])
            try:
                got = ask([requests[i] for i in part])
            finally:
                self._queue = None
            for i, answer in zip(part, got, strict=True):
                answers[i] = answer
        return answers

    def _order(self, scored: list[tuple[tuple[int, ...], int | None]]) -> Iterator[tuple[tuple[int, ...], int | None]]:
        """Rows in the order HFLM feeds them: longest first, then by tokens; equal rows once where it keeps logits."""
        scored = sorted(scored, key=lambda x: (-len(x[0]), x[0]))
        return iter(dict(scored).items() if self.logits_cache else scored)

    def _forced(self, inps: torch.Tensor) -> list[int | None] | None:
        """Routes of the rows [B, T] that are to be scored next; None, all main, where nothing is being routed."""
        if self._queue is None:
            return None
        taken = list(itertools.islice(self._queue, len(inps)))
        kept = [ids[-self.max_length :] for ids, _ in taken]
        if len(kept) != len(inps) or any(
            tuple(row[: len(ids)]) != ids for row, ids in zip(inps.tolist(), kept, strict=True)
        ):
            raise RoutingError(
                "This version of lm_eval scores in an order that is not known: no route can be kept.",
                hint="pip install lm_eval==0.4.13",
            )
        return [route for _, route in taken]

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with self._override(self._forced(inps)):
            out = super()._model_call(inps, *args, **kwargs)
        self._tick(len(inps))
        return out

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> Any:
        """Trial batches are nobody's rows."""
        held, self._queue = (self._queue, self.progress), None
        self.progress = None
        try:
            return super()._detect_batch_size(*args, **kwargs)
        finally:
            self._queue, self.progress = held

    def tok_batch_encode(self, strings: Any, *args: Any, **kwargs: Any) -> Any:
        self._texts = list(strings)  # the prompts that _model_generate gets next, as token ids
        return super().tok_batch_encode(strings, *args, **kwargs)

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        forced = None
        if self._routing:
            mask = kwargs.get("attention_mask")
            real = torch.ones_like(context).bool() if mask is None else mask.bool()
            forced = [self._decide(row[keep].tolist()) for row, keep in zip(context, real, strict=True)]
            self._decided.update(zip(self._texts, forced, strict=True))
        with self._override(forced):
            out = super()._model_generate(context, *args, **kwargs)
        self._tick(len(context))
        return out

    def _override(self, routes: list[int | None] | None) -> Any:
        return contextlib.nullcontext() if self.attached is None else self.attached.override(routes)

    def _tick(self, rows: int) -> None:
        self._done = min(self._done + rows, self._total)
        if self.progress is not None:
            self.progress(self._done, self._total)


def _rounds(rows: Sequence[tuple[int, ...]], routes: Sequence[int | None]) -> list[list[int]]:
    """Indices in rounds, so that within one no row has two routes.

    HFLM scores equal rows once, and a row does not tell where its context ends: two requests that split the same tokens
    differently may be routed differently. Nearly always there is one round.
    """
    seen: dict[tuple[int, ...], list[int | None]] = {}
    rounds: list[list[int]] = []
    for i, (row, route) in enumerate(zip(rows, routes, strict=True)):
        known = seen.setdefault(row, [])
        if route not in known:
            known.append(route)
        if known.index(route) == len(rounds):
            rounds.append([])
        rounds[known.index(route)].append(i)
    return rounds


def _register() -> None:
    """Make `wise` a model of lm_eval. Where lm_eval finds installed models itself, it may have been first."""
    from lm_eval.api.registry import MODEL_REGISTRY, register_model

    if "wise" not in MODEL_REGISTRY:
        register_model("wise")(WiseLM)


if _missing is None:
    _register()
