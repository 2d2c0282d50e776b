"""Run the frozen part of a base once, then only the edited layer and what lies above, many times.

Everything up to the input `a` of the edited projection is constant while an edit is learned. `UpperModel.capture`
runs it once per row; `UpperModel.logits` puts `y + a delta^T` in its place and runs the layers above through the
model's *own* forward, with the layers below turned into pass-throughs. Masks, rotary embeddings, final norm and logit
scaling therefore stay the model's code. The head is applied at supervised positions only.

Rows are padded on the right here: in a causal model what follows a token cannot change it, so a row's activations are
the same in every batch and can be stored without padding.

Shapes: `B` rows, `T` tokens, `F` FFN width, `D` model width, `n` supervised positions, `V` vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from wisecli.errors import ModelError
from wisecli.models.prompts import PromptEncoder, Row, last_content
from wisecli.models.site import EditSite, decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REPLAY_TOLERANCE = 1e-3  # of the largest logit, in fp32; half precision and 8 bits get twenty times that


@dataclass(frozen=True)
class CapturedRow:
    """What is constant about one row: its ids [T] and labels [T], `a` [T, F] and the stream it joins [T, D].

    `stream` is the edited layer's own output when the projection is added to it unchanged, else the layer's input.
    `content` [T] marks the prompt's content tokens. `entry` [D] is the residual stream that enters the edited layer, at
    the last content token: what the prompt's key is made of.
    """

    ids: Tensor
    labels: Tensor
    content: Tensor
    a: Tensor
    stream: Tensor
    entry: Tensor

    @property
    def last(self) -> Tensor:
        """`a` [F] at the last content token."""
        return self.a[int(self.content.nonzero()[-1])]


class UpperModel:
    """The part of a base above an edit site.

    Args:
        model: frozen, in evaluation mode.
        site: where the delta goes.
        encoder: turns rows into padded batches.
    """

    def __init__(self, model: PreTrainedModel, site: EditSite, encoder: PromptEncoder) -> None:
        self.model, self.site, self.encoder = model, site, encoder
        self.layers = decoder_layers(model)
        self.ffn = site.module(model)
        self.additive = False
        self._tuple_rest: tuple[Any, ...] | None = None
        self._probe()

    @torch.no_grad()
    def capture(self, rows: Sequence[Row], batch_size: int = 32) -> list[CapturedRow]:
        """One ordinary forward over the rows, up to the edited layer; order is kept, likeness in length is used."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        out: list[CapturedRow | None] = [None] * len(rows)
        for at in range(0, len(order), batch_size):
            picked = order[at : at + batch_size]
            batch = self.encoder.batch([rows[i] for i in picked], side="right").to(self.model.device)
            a, stream, entry = self._run_lower(batch.inputs)
            last = last_content(batch.content)
            for k, i in enumerate(picked):
                n = len(rows[i])
                out[i] = CapturedRow(
                    batch.input_ids[k, :n].clone(),
                    batch.labels[k, :n].clone(),
                    batch.content[k, :n].clone(),
                    a[k, :n].clone(),
                    stream[k, :n].clone(),
                    entry[k, last[k]].clone(),
                )
        return [r for r in out if r is not None]

    def entries(self, rows: Sequence[Row]) -> Tensor:
        """What each row brings into the edited layer at its last content token [N, D]; that layer does not run."""
        layer = self.site.layer
        found = torch.zeros(0)
        for picked, at in entries_at(self.model, self.encoder, (layer,), rows):
            found = found if len(found) else at[layer].new_zeros(len(rows), at[layer].shape[1])
            found[picked] = at[layer]
        return found

    def logits(
        self, rows: Sequence[CapturedRow], delta: Tensor | None, side: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [n, V] at every supervised position of the rows under W + delta, and their target ids [n].

        Gradients flow into `delta` [D, F] alone.

        Args:
            side: a delta^T [B, T, D] of the padded rows, where it is known already.
        """
        ids = pad_sequence([r.ids for r in rows], batch_first=True)
        labels = pad_sequence([r.labels for r in rows], batch_first=True, padding_value=-100)
        real = pad_sequence([torch.ones_like(r.ids) for r in rows], batch_first=True)
        stream = pad_sequence([r.stream for r in rows], batch_first=True)
        wanted = labels[:, 1:] != -100
        with contextlib.ExitStack() as stack:
            if self.additive:
                if delta is not None and side is None:
                    a = pad_sequence([r.a for r in rows], batch_first=True)
                    side = F.linear(a.to(delta.dtype), delta)
                stream = stream if side is None else stream + side.to(stream.dtype)
                stack.enter_context(self._stubbed(self.site.layer + 1, stream))
            else:
                stack.enter_context(self._stubbed(self.site.layer, stream))
                if delta is not None:
                    stack.enter_context(_hooked(self.ffn, lambda a, y: y + _side(a, delta, y)))
            stack.enter_context(head_at(self.model, wanted))
            logits = self.model(input_ids=ids, attention_mask=real, use_cache=False).logits
        return logits, labels[:, 1:][wanted]

    # -- the pieces ---------------------------------------------------------------------------------------------------

    def _run_lower(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """`a` [B, T, F], the stream and the layer's input [B, T, D] of a right-padded batch."""
        box: dict[str, Any] = {}

        def seen(mod: nn.Module, args: Any, out: Any) -> None:
            box["a"] = args[0]

        def enter(mod: nn.Module, args: Any, kwargs: Any) -> None:
            box["in"] = args[0] if args else kwargs["hidden_states"]

        def leave(mod: nn.Module, args: Any, out: Any) -> None:
            box["out"] = out
            raise _Enough

        layer = self.layers[self.site.layer]
        handles = [
            self.ffn.register_forward_hook(seen),
            layer.register_forward_pre_hook(enter, with_kwargs=True),
            layer.register_forward_hook(leave),
        ]
        try:
            self.model(**inputs, use_cache=False)
        except _Enough:
            pass
        finally:
            for h in handles:
                h.remove()
        out = box["out"]
        self._tuple_rest = tuple(out[1:]) if isinstance(out, tuple) else None
        stream = (out[0] if isinstance(out, tuple) else out) if self.additive else box["in"]
        return box["a"].view(*stream.shape[:2], -1), stream, box["in"]

    @contextlib.contextmanager
    def _stubbed(self, below: int, stream: Tensor) -> Iterator[None]:
        """Layers < `below` pass their input on; the last of them returns `stream`. Undone in any case."""
        saved: list[tuple[nn.Module, Any]] = []
        wrap = (lambda h: h) if self._tuple_rest is None else (lambda h: (h, *self._tuple_rest))

        def passing(hidden: Any = None, *args: Any, hidden_states: Any = None, **kwargs: Any) -> Any:
            return wrap(hidden if hidden is not None else hidden_states)

        def returning(*args: Any, **kwargs: Any) -> Any:
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
        captured = self.capture(rows)
        replayed, _ = self.logits(captured, None)
        batch = self.encoder.batch(rows, side="right").to(self.model.device)
        full = self.model(**batch.inputs, use_cache=False).logits[:, :-1][batch.labels[:, 1:] != -100]
        # In 8 bits activations are rounded: a difference of the last digit may become one of a step.
        exact = full.dtype == torch.float32 and not getattr(self.model, "is_loaded_in_8bit", False)
        scale = _REPLAY_TOLERANCE * (1 if exact else 20) * (1 + full.abs().max())
        if replayed.shape != full.shape or (replayed - full).abs().max() > scale:
            raise ModelError(
                f"The upper layers of {type(self.model).__name__} cannot be run on their own: "
                f"replayed logits differ from the model's.",
                hint="Choose another layer with --layer.",
            )

    def _is_additive(self, rows: Sequence[Row]) -> bool:
        """Whether adding d to the projection's output adds exactly d to the layer's output."""
        batch = self.encoder.batch(rows, side="right").to(self.model.device)
        self.additive = True
        plain = self._run_lower(batch.inputs)[1]
        d = torch.linspace(-1, 1, plain.shape[-1], device=plain.device, dtype=plain.dtype) * plain.std()
        with _hooked(self.ffn, lambda a, y: y + d):
            moved = self._run_lower(batch.inputs)[1]
        exact = plain.dtype == torch.float32 and not getattr(self.model, "is_loaded_in_8bit", False)
        tolerance = 1e-4 if exact else 2e-2
        return plain.dim() == 3 and bool(((moved - plain - d).abs() <= tolerance * (1 + plain.abs())).all())


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
            model(**batch.inputs, use_cache=False)
        except _Enough:
            pass
        finally:
            for h in handles:
                h.remove()
        last = last_content(batch.content)
        yield picked, {i: h[torch.arange(len(picked), device=h.device), last] for i, h in box.items()}


class _Enough(Exception):
    """Ends a forward pass once everything of interest is known."""


def _side(a: Tensor, delta: Tensor, y: Tensor) -> Tensor:
    return F.linear(a.to(delta.dtype), delta).to(y.dtype).view_as(y)


@contextlib.contextmanager
def head_at(model: Any, wanted: Tensor) -> Iterator[None]:
    """Within it the LM head sees only the positions that predict a supervised token, and logits are [n, V].

    Args:
        wanted: [B, T-1], position t-1 predicting token t; n of them are true.
    """
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda m, args: (args[0][:, :-1][wanted.to(args[0].device)], *args[1:])
    )
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _hooked(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda m, args, y: change(args[0], y))
    try:
        yield
    finally:
        handle.remove()
