"""Run the frozen part of a base once, then only the edited layer and what lies above, many times.

Everything up to the input `a` of the edited projection is constant while an edit is learned. `UpperModel.capture`
runs it once per row; `UpperModel.logits` puts `y + a delta^T` in its place and runs the layers above through the
model's *own* forward, with the layers below turned into pass-throughs. Masks, rotary embeddings, final norm and logit
scaling therefore stay the model's code. The head runs at supervised positions only, and so do the last layer's FFN and
those of its linear maps whose outputs reach the loss nowhere else: queries, and what attention gives out.

Rows are padded on the right here: in a causal model what follows a token cannot change it, so a row's activations are
the same in every batch and can be stored without padding. Nor is the model told of the padding, which spares attention
a mask of its own.

Shapes: `B` rows, `T` tokens, `F` FFN width, `D` model width, `n` supervised positions, `V` vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wisecli.errors import ModelError
from wisecli.models.captured import CapturedRow, StackedRows, cut
from wisecli.models.prompts import Batch, PromptEncoder, Row, last_content
from wisecli.models.site import EditSite, as_passed_on, decoder_layers, foreign, is_linear, residual

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REPLAY_TOLERANCE = 1e-3  # of the largest logit, in fp32; half precision and 8 bits get twenty times that


class UpperModel:
    """The part of a base above an edit site.

    Args:
        model: frozen, in evaluation mode.
        site: where the delta goes.
        encoder: turns rows into padded batches.
    """

    def __init__(self, model: PreTrainedModel, site: EditSite, encoder: PromptEncoder) -> None:
        self.model, self.site, self.encoder = model, site, encoder
        self.layers = list(decoder_layers(model))  # a list is indexed faster, in every step
        self.ffn = site.module(model)
        self.additive = False
        self._rest: tuple[Any, ...] | None = None
        self._narrow: tuple[nn.Module, ...] = ()  # of the last layer; they run at supervised positions only
        with foreign(model, "running its upper layers on their own"):
            self._probe()

    def capture(self, rows: Sequence[Row], batch_size: int = 32) -> list[CapturedRow]:
        """One ordinary forward over the rows, up to the edited layer; in order."""
        found = {i: r.alone() for i, r in self.capturing(rows, batch_size)}
        return [found[i] for i in range(len(rows))]

    @torch.no_grad()
    def capturing(self, rows: Sequence[Row], batch_size: int = 32) -> Iterator[tuple[int, CapturedRow]]:
        """The same one row after the other, those of like length together, each with its position among the rows.

        A row given shares the memory of its batch, which goes when the last of them does.
        """
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for at in range(0, len(order), batch_size):
            picked = order[at : at + batch_size]
            batch = self.encoder.batch([rows[i] for i in picked], side="right").to(self.model.device)
            a, stream, entry, beside = self._run_lower(batch)
            last = last_content(batch.content).tolist()
            for k, i in enumerate(picked):
                n, prompt = len(rows[i]), len(rows[i].prompt)
                ids, content = batch.input_ids[k, :n], batch.content[k, :n]
                at_last = entry[k, last[k]].flatten()
                past = cut(beside, k, n)
                yield i, CapturedRow(ids, content, a[k, :n], stream[k, :n], at_last, prompt, past)

    def entries(self, rows: Sequence[Row]) -> Tensor:
        """What each row brings into the edited layer at its last content token [N, D]; that layer does not run."""
        layer = self.site.layer
        found = torch.zeros(0)
        for picked, at in entries_at(self.model, self.encoder, (layer,), rows):
            found = found if len(found) else at[layer].new_zeros(len(rows), at[layer].shape[1])
            found[picked] = at[layer]
        return found

    def logits(self, rows: StackedRows, delta: Tensor | None, side: Tensor | None = None) -> Tensor:
        """Logits [n, V] under W + delta where the rows' supervised tokens are predicted.

        Gradients flow into `delta` [D, F] alone.

        Args:
            side: `rows.side(delta)`, where it is known already.
        """
        stream = rows.stream
        with contextlib.ExitStack() as stack:
            if delta is not None and side is None:
                side = rows.side(delta)
            if self.additive:
                stream = stream if side is None else stream + side.to(stream.dtype)
                stack.enter_context(self._stubbed(self.site.layer + 1, stream, rows))
            else:
                stack.enter_context(self._stubbed(self.site.layer, stream, rows))
                if side is not None:
                    # Of the rows' own `a`, which may hold dropout or another wording, not of what runs here.
                    stack.enter_context(_hooked(self.ffn, lambda a, y: y + side.to(y.dtype).view_as(y)))
            stack.enter_context(head_at(self.model, rows.at))
            for module in self._narrow:
                stack.enter_context(_only_at(module, rows.at, rows.ids.shape))
            logits: Tensor = self.model(**_unpadded(rows.ids), use_cache=False).logits
        return logits

    # -- the pieces ---------------------------------------------------------------------------------------------------

    def _run_lower(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Any]:
        """`a` [B, T, F], the stream and the layer's input [B, T, D] of a right-padded batch, and what goes past it."""
        box: dict[str, Any] = {}

        def start(mod: nn.Module, args: Any, kwargs: Any) -> None:
            box["start"] = {k: set(v) for k, v in _mappings(kwargs)}

        def seen(mod: nn.Module, args: Any, out: Any) -> None:
            box["a"] = args[0]

        def enter(mod: nn.Module, args: Any, kwargs: Any) -> None:
            box["in"] = args[0] if args else kwargs["hidden_states"]
            if not self.additive:
                box["beside"] = _added(box["start"], kwargs)

        def leave(mod: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            box["out"] = out
            if self.additive:
                box["beside"] = _added(box["start"], kwargs)
            raise _Enough

        layer = self.layers[self.site.layer]
        handles = [
            self.layers[0].register_forward_pre_hook(start, with_kwargs=True),
            self.ffn.register_forward_hook(seen),
            layer.register_forward_pre_hook(enter, with_kwargs=True),
            layer.register_forward_hook(leave, with_kwargs=True),
        ]
        try:
            self.model(**_unpadded(batch.input_ids), use_cache=False)
        except _Enough:
            pass
        finally:
            for h in handles:
                h.remove()
        out = box["out"]
        if not isinstance(out, Tensor) and type(out) not in (tuple, list):
            raise ModelError(
                f"The layers of {type(self.model).__name__} give out a {type(out).__name__}; "
                "hidden states, alone or first in a tuple, can be edited.",
                hint="Take another base.",
            )
        self._rest = (type(out), tuple(out[1:])) if isinstance(out, tuple | list) else None
        rows, tokens = batch.input_ids.shape
        first = (out if self._rest is None else out[0]) if self.additive else box["in"]
        stream, entry = (residual(self.model, h, rows, tokens) for h in (first, box["in"]))
        return box["a"].view(rows, tokens, -1), stream, entry, box["beside"]

    @contextlib.contextmanager
    def _stubbed(self, below: int, stream: Tensor, rows: StackedRows) -> Iterator[None]:
        """Layers < `below` pass their input on; the last of them returns `stream`. Undone in any case."""
        saved: list[tuple[nn.Module, Any]] = []
        stream = as_passed_on(self.model, stream)

        def wrap(h: Any) -> Any:
            return h if self._rest is None else self._rest[0]((h, *self._rest[1]))

        def passing(hidden: Any = None, *args: Any, hidden_states: Any = None, **kwargs: Any) -> Any:
            return wrap(hidden if hidden is not None else hidden_states)

        def returning(*args: Any, **kwargs: Any) -> Any:
            for name, states in (rows.beside or {}).items():
                kwargs[name].update(states)
            return wrap(stream)

        handle = None
        try:
            if below == 0:  # nothing below: the stream enters layer 0 itself
                handle = self.layers[0].register_forward_pre_hook(
                    lambda m, args, kw: ((stream, *args[1:]), kw) if args else (args, {**kw, "hidden_states": stream}),
                    with_kwargs=True,
                )
            for i in range(below):
                saved.append((self.layers[i], self.layers[i].__dict__.get("forward")))
                self.layers[i].forward = returning if i == below - 1 else passing
            yield
        finally:
            if handle is not None:
                handle.remove()
            for m, forward in saved:
                if forward is None:
                    m.__dict__.pop("forward", None)
                else:
                    m.forward = forward

    @torch.no_grad()
    def _probe(self) -> None:
        """Learn whether the projection is simply added to the stream, and check that replaying changes nothing."""
        vocab = self.model.config.get_text_config().vocab_size
        ids = tuple((torch.arange(7, 19) * 31 % vocab).tolist())
        rows = [Row(ids[:8], ids[8:]), Row(ids[2:7], ids[7:10])]
        self.additive = self._is_additive(rows)
        stacked = StackedRows.of(self.capture(rows))
        batch = self.encoder.batch(rows, side="right").to(self.model.device)
        placed = self._full(batch, self._positions(batch))
        if self._replays(stacked, placed):
            self._narrow = self._found_narrow(stacked, placed)
            return
        if self._replays(stacked, self._full(batch, {})):
            raise ModelError(
                f"{type(self.model).__name__} counts positions in generate otherwise than in a plain forward: "
                f"what is learned would not be what is generated.",
                hint="Take another base.",
            )
        raise ModelError(
            f"The upper layers of {type(self.model).__name__} cannot be run on their own: "
            f"replayed logits differ from the model's.",
            hint="Choose another layer with --layer.",
        )

    def _positions(self, batch: Batch) -> dict[str, Tensor]:
        """Positions as `generate` gives them, where the model takes any."""
        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            return {}
        return {"position_ids": (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)}

    def _full(self, batch: Batch, positions: dict[str, Tensor]) -> Tensor:
        """The whole model's logits [n, V] at supervised positions."""
        logits: Tensor = self.model(**batch.inputs, **positions, use_cache=False).logits
        return logits[:, :-1][batch.labels[:, 1:] != -100]

    def _replays(self, rows: StackedRows, full: Tensor) -> bool:
        """Whether the upper part alone gives the model's own logits [n, V]."""
        replayed = self.logits(rows, None)
        return replayed.shape == full.shape and self._close(replayed, full, 1 + full.abs().max())

    def _close(self, x: Tensor, y: Tensor, unit: Tensor) -> bool:
        return bool((x - y).abs().max() <= _REPLAY_TOLERANCE * (1 if self._exact(y) else 20) * unit)

    def _found_narrow(self, rows: StackedRows, full: Tensor) -> tuple[nn.Module, ...]:
        """The modules of the last layer that need to run at supervised positions only.

        They are its FFN, and linear maps whose outputs elsewhere have a gradient of exactly zero, as queries have and
        keys have not; as many of them as leave logits and gradients what they are.
        """
        if self.site.layer + 1 >= len(self.layers):
            return ()
        ffn = self._ffn_of_last_layer()
        inside = set(ffn.modules()) if ffn is not None else set()
        linear = [m for m in self.layers[-1].modules() if is_linear(m) and m not in inside]
        try:
            _, gradient, watched = self._differentiated(rows, linear)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # such a base cannot be edited, but asked
            return ()
        rest = torch.ones(rows.ids.numel(), dtype=torch.bool).index_fill(0, rows.at.cpu(), False)
        aimed = [m for m, g in watched.items() if _is_zero_at(g, rest)]
        for some in ((ffn, *aimed), (ffn,), aimed):
            narrow = tuple(m for m in some if m is not None)
            if narrow and self._same_with(narrow, rows, full, gradient):
                return narrow
        return ()

    def _same_with(self, narrow: tuple[nn.Module, ...], rows: StackedRows, full: Tensor, gradient: Tensor) -> bool:
        """Whether logits [n, V] and their gradient [B, T, D] stay what they are."""
        self._narrow = narrow
        try:
            logits, found, _ = self._differentiated(rows)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # an FFN that does not take positions out of their rows
            return False
        finally:
            self._narrow = ()
        alike = logits.shape == full.shape and self._close(logits, full, 1 + full.abs().max())
        return alike and self._close(found, gradient, gradient.abs().max())

    def _differentiated(
        self, rows: StackedRows, watched: Sequence[nn.Module] = ()
    ) -> tuple[Tensor, Tensor, dict[nn.Module, Tensor | None]]:
        """Logits [n, V], and the gradient of the sum of their squares: by what is added to the projection's output
        [B, T, D], and by what each watched module gives out that runs once."""
        outputs: dict[nn.Module, list[Tensor]] = {}
        with torch.inference_mode(False), torch.enable_grad(), contextlib.ExitStack() as stack:
            for m in watched:
                stack.enter_context(_hooked(m, functools.partial(_keep, outputs.setdefault(m, []))))
            side = rows.stream.new_zeros(*rows.ids.shape, self.site.d_out).requires_grad_()
            logits = self.logits(rows, None, side)
            once = {m: ys[0] for m, ys in outputs.items() if len(ys) == 1}
            found = torch.autograd.grad(logits.float().square().sum(), [side, *once.values()], allow_unused=True)
        return logits.detach(), found[0], dict(zip(once, found[1:], strict=True))

    def _ffn_of_last_layer(self) -> nn.Module | None:
        """The last layer's counterpart of the part that holds the edit site."""
        here = next(k for k, m in self.model.named_modules() if m is self.layers[self.site.layer])
        name = self.site.path.removeprefix(here + ".").split(".")[0]
        found = getattr(self.layers[-1], name, None)
        return found if isinstance(found, nn.Module) else None

    def _is_additive(self, rows: Sequence[Row]) -> bool:
        """Whether adding d to the projection's output adds exactly d to the layer's output."""
        batch = self.encoder.batch(rows, side="right").to(self.model.device)
        self.additive = True
        plain = self._run_lower(batch)[1]
        if plain.dim() != 3 or plain.shape[-1] != self.site.d_out:  # several residual streams
            return False
        d = torch.linspace(-1, 1, plain.shape[-1], device=plain.device, dtype=plain.dtype) * plain.std()
        with _hooked(self.ffn, lambda a, y: y + d):
            moved = self._run_lower(batch)[1]
        tolerance = 1e-4 if self._exact(plain) else 2e-2
        return bool(((moved - plain - d).abs() <= tolerance * (1 + plain.abs())).all())

    def _exact(self, x: Tensor) -> bool:
        """Whether what was computed differs by rounding in fp32 alone; in 8 bits activations themselves are rounded."""
        return x.dtype == torch.float32 and not getattr(self.model, "is_loaded_in_8bit", False)


@torch.no_grad()
def entries_at(
    model: Any, encoder: PromptEncoder, layers: Sequence[int], rows: Sequence[Row], batch_size: int = 32
) -> Iterator[tuple[list[int], dict[int, Tensor]]]:
    """The residual stream that enters each of some layers at the last content token, in one pass over the rows.

    Yields, batch by batch in order of length, the rows' positions and per layer a tensor [b, D].
    """
    modules, box, last_layer = decoder_layers(model), dict[int, Tensor](), max(layers)

    def enter(layer: int, args: Any, kwargs: Any) -> None:
        box[layer] = args[0] if args else kwargs["hidden_states"]
        if layer == last_layer:
            raise _Enough

    hooks = {i: lambda m, args, kwargs, i=i: enter(i, args, kwargs) for i in layers}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for at in range(0, len(order), batch_size):
        picked = order[at : at + batch_size]
        batch = encoder.batch([rows[i] for i in picked], side="right").to(model.device)
        handles = [modules[i].register_forward_pre_hook(h, with_kwargs=True) for i, h in hooks.items()]
        try:
            model(**_unpadded(batch.input_ids), use_cache=False)
        except _Enough:
            pass
        finally:
            for h in handles:
                h.remove()
        last = last_content(batch.content).tolist()
        streams = {i: residual(model, h, *batch.input_ids.shape) for i, h in box.items()}
        yield picked, {i: h[range(len(picked)), last].flatten(1) for i, h in streams.items()}


def _unpadded(ids: Tensor) -> dict[str, Tensor]:
    """The inputs of a call in which padding counts as any token; some models warn where they are told of no mask."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class _Enough(Exception):
    """Ends a forward pass once everything of interest is known."""


def _mappings(kwargs: Any) -> list[tuple[str, MutableMapping[Any, Any]]]:
    """Those arguments of a layer that layers may write to for others to read."""
    return [(k, v) for k, v in kwargs.items() if isinstance(v, MutableMapping)]


def _added(start: dict[str, set[Any]], kwargs: Any) -> dict[str, dict[Any, Any]]:
    """What has been written there since the first layer was entered."""
    found = {name: {k: v for k, v in m.items() if k not in start.get(name, ())} for name, m in _mappings(kwargs)}
    return {name: new for name, new in found.items() if new}


def _keep(kept: list[Tensor], a: Tensor, y: Tensor) -> None:
    kept.append(y)


def _is_zero_at(gradient: Tensor | None, positions: Tensor) -> bool:
    """Whether a gradient [.., n] is exactly zero at positions in [B T], given as a mask."""
    if gradient is None or gradient.numel() != len(positions) * gradient.shape[-1]:
        return False
    return not gradient.flatten(0, -2)[positions.to(gradient.device)].any()


@contextlib.contextmanager
def head_at(model: Any, at: Tensor) -> Iterator[None]:
    """Within it the LM head sees only some positions, and logits are [n, V].

    Args:
        at: positions in [B T], such as `StackedRows.at` [n].
    """
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda m, args: (args[0].flatten(0, -2)[at.to(args[0].device)], *args[1:])
    )
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _only_at(module: nn.Module, at: Tensor, shape: Sequence[int]) -> Iterator[None]:
    """Within it a position-wise module runs at some positions in [B T] alone, and gives zeros elsewhere.

    Its input is [B, T, D], or [B T, D] where the model flattens its tokens.

    Args:
        at: positions [n].
        shape: B and T.
    """

    def gather(m: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        x = args[0]
        return x.flatten(0, -2)[at.to(x.device)].view(*([1] * (x.dim() - 2)), len(at), -1), *args[1:]

    def scatter(m: nn.Module, args: Any, out: Any) -> Any:
        y = out[0] if isinstance(out, tuple) else out
        full = y.new_zeros(math.prod(shape), y.shape[-1]).index_copy_(0, at.to(y.device), y.flatten(0, -2))
        full = full.view(*shape, -1) if y.dim() == 3 else full
        return (full, *out[1:]) if isinstance(out, tuple) else full

    handles = [module.register_forward_pre_hook(gather), module.register_forward_hook(scatter)]
    try:
        yield
    finally:
        for h in handles:
            h.remove()


@contextlib.contextmanager
def _hooked(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda m, args, y: change(args[0], y))
    try:
        yield
    finally:
        handle.remove()
