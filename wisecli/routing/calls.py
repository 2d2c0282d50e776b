"""What one call of the decoder says about its prompts: rows, real tokens, content; and which calls cannot be routed.

A decision is taken from a whole prompt, one per row. Calls that feed a prompt in pieces, or several prompts in one row,
are refused here. Nothing here looks at weights or changes a model.

Shapes: `B` rows, `T` tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wisecli.errors import RoutingError, UsageError
from wisecli.models.prompts import ContentRule


@dataclass(frozen=True)
class Generation:
    """What `generate` was called with: assisted decoding feeds prompt and candidates in its first forward.

    `kept` is where decisions are kept that cannot be kept on the sequences' own state, when that is a bare list.
    """

    prompt_length: int | None
    chunked: bool
    kept: dict[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Generation:
        """From the arguments of `generate`."""
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        return cls(None if ids is None else ids.shape[1], kwargs.get("prefill_chunk_size") is not None)


@dataclass(frozen=True)
class Prompts:
    """The prompts of a call: token ids [B, T], None where embeddings were given, and their real tokens [B, T]."""

    ids: Tensor | None
    real: Tensor

    def content(self, rule: ContentRule) -> Tensor:
        """Content mask [B, T]."""
        return self.real if self.ids is None else rule.mask(self.ids, self.real)


def arguments(signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name, those of `**kwargs` among them."""
    if not args:  # as in every step of `generate`, where binding takes longer than all else that is done here
        return dict(kwargs)
    bound = signature.bind_partial(*args, **kwargs).arguments
    return {**bound.pop("kwargs", {}), **bound}


def without_cache(bound: Mapping[str, Any], width: int) -> dict[str, Any]:
    """The arguments of a prefill for a forward that leaves no trace: no cache, masks cut to the tokens given."""

    def cut(mask: Any) -> Any:
        if isinstance(mask, Mapping):
            return {k: cut(v) for k, v in mask.items()}
        return mask[..., :width] if isinstance(mask, Tensor) and mask.dim() == 4 else mask

    dropped = ("past_key_values", "use_cache", "cache_position", "logits_to_keep")
    kept = {k: v for k, v in bound.items() if k not in dropped}
    return {**kept, "attention_mask": cut(kept.get("attention_mask")), "use_cache": False}


def state_of(values: Any) -> Any:
    """What carries sequences from one call to the next, among a call's arguments or results: a KV cache, or a state."""
    if not isinstance(values, Mapping):
        return getattr(values, "past_key_values", None)
    for name in ("past_key_values", "cache_params", "state"):
        if (found := values.get(name)) is not None:
            return found
    return None


def is_begun(state: Any) -> bool:
    """Whether tokens went into a state before."""
    return state is not None and (not hasattr(state, "get_seq_length") or state.get_seq_length() > 0)


def input_of(bound: Mapping[str, Any]) -> Tensor:
    """Token ids [B, T] or embeddings [B, T, D]."""
    for name in ("input_ids", "inputs_embeds"):
        if bound.get(name) is not None:
            found: Tensor = bound[name]
            return found
    raise UsageError("The model was called without input_ids or inputs_embeds.")


def read_prompts(bound: Mapping[str, Any], generation: Generation | None, lengths: Tensor | None) -> Prompts:
    """The prompts of a call, without what is padding, a candidate of assisted decoding, or an answer.

    Args:
        lengths: tokens of each row's prompt, for rows or groups of rows, where they were said.

    Raises:
        RoutingError: the call is one in which no decision per row can be taken.
    """
    real = _real(bound)
    _refuse(bound, generation, real)
    rows, width = real.shape
    if generation is not None and generation.prompt_length is not None and width > generation.prompt_length:
        real = real.clone()
        real[:, generation.prompt_length :] = False
    if lengths is not None:
        if rows % len(lengths):
            raise RoutingError(f"{len(lengths)} prompt lengths were given, but the model was called with {rows} rows.")
        each = lengths.to(real.device).repeat_interleave(rows // len(lengths))
        real = real & (real.cumsum(1) <= each[:, None])
    return Prompts(bound.get("input_ids"), real)


def _real(bound: Mapping[str, Any]) -> Tensor:
    """Which tokens are no padding [B, T]."""
    x = input_of(bound)
    rows, width = x.shape[:2]
    mask = bound.get("attention_mask")
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return torch.ones(rows, width, dtype=torch.bool, device=x.device)
    if mask.dim() == 2:
        return mask[:, -width:].bool().expand(rows, width)
    own = torch.diagonal(mask[:, 0, :, :width], dim1=-2, dim2=-1)  # a token is real where it may attend to itself
    return (own if own.dtype == torch.bool else own == 0).expand(rows, width)


def _refuse(bound: Mapping[str, Any], generation: Generation | None, real: Tensor) -> None:
    if bound.get("cu_seq_lens_q") is not None or _restarts(bound.get("position_ids"), real):
        raise RoutingError(
            "Packed sequences and continuous batching cannot be routed: several requests share one row.",
            hint="Call generate with a padded batch.",
        )
    width = real.shape[1]
    if generation is not None and (generation.chunked or width < (generation.prompt_length or 0)):
        raise RoutingError(
            "A prefill in chunks cannot be routed: the decision needs the whole prompt.",
            hint="Leave prefill_chunk_size out.",
        )


def _restarts(positions: Tensor | None, real: Tensor) -> bool:
    """Whether positions start again within the real tokens of a row, as those of sequences packed into it do.

    Padding has whatever positions it was given. Positions in several dimensions are those of images, not of a packing.
    """
    if positions is None or positions.dim() > 2 or positions.shape[-1] != real.shape[1]:
        return False
    each = positions.to(real.device).view(-1, real.shape[1]).expand_as(real)
    before = torch.where(real, each, -1).cummax(1).values  # the largest position of a real token so far
    return bool((real[:, 1:] & (each[:, 1:] <= before[:, :-1])).any())
