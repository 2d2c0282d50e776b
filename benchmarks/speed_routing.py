"""What an attached side memory costs when a model is used: prefill and decoding, routed and not.

Two copies of one model with the same weights are timed in turn, one as it is, one with a side memory attached whose
threshold keeps every prompt out or lets every prompt in; the routes are checked. The router does the same work either
way, one decision per sequence at prefill.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from measure import interleaved, quartiles, ratios
from speed_editing import base_of

from wisecli.data.pool import ordinary_prompts
from wisecli.editing.config import EditConfig
from wisecli.editing.editor import Editor
from wisecli.memory.bits import SparseDelta, draw_mask
from wisecli.memory.keys import KeyStore
from wisecli.memory.side_memory import EditEntry, Memory, SideMemory
from wisecli.models.base import Base, fingerprint
from wisecli.models.prompts import PromptEncoder
from wisecli.routing.attach import Attached, attach


def routing(shape: str, lengths: tuple[int, ...], batches: tuple[int, ...], repeats: int, edits: int) -> dict[str, Any]:
    """Prefill and decoding time of an attached model over that of the plain one."""
    base = base_of(shape)
    sm = side_memory(base, edits)
    out: dict[str, Any] = {"base": base.name, "edits": edits, "keys": len(sm.keys.owner), "repeats": repeats}
    for batch in batches:
        for length in lengths:
            out[f"batch {batch}, {length} tokens"] = _case(base, sm, batch, length, repeats)
    return out


def side_memory(base: Base, edits: int) -> SideMemory:
    """A random delta of the default density, and the real keys of ordinary prompts, four per edit."""
    editor = Editor(base, EditConfig())
    site = editor.site
    mask = draw_mask((site.d_out, site.d_in), 0.2, 0)
    delta = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)) * mask * 1e-3
    pool = editor.gate.pool
    keys = pool[torch.arange(4 * edits) % len(pool)]
    store = KeyStore(editor.gate.space, keys, torch.arange(edits).repeat_interleave(4), torch.zeros(edits).half())
    entries = tuple(EditEntry(f"e{i}", 0, True) for i in range(edits))
    packed = SparseDelta.pack(delta, dtype=torch.bfloat16)
    return SideMemory(
        base={"name": base.name, "fingerprint": fingerprint(site.module(base.model).weight.detach())},
        site=site,
        rule=editor.encoder.rule,
        memories=(Memory(packed, {"key": 0.0}, tuple(e.id for e in entries)),),
        keys=store,
        edits=entries,
    )


def _with_threshold(sm: SideMemory, epsilon: float) -> SideMemory:
    return replace(sm, memories=tuple(replace(m, epsilon={"key": epsilon}) for m in sm.memories))


def _prompts(base: Base, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Rows of exactly `length` tokens of ordinary text."""
    encoder = PromptEncoder(base.tokenizer)
    words = [i for p in ordinary_prompts()[: 40 * batch] for i in encoder.prompt(p).prompt]
    while len(words) < batch * length:
        words += words
    ids = torch.tensor(words[: batch * length]).view(batch, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _case(base: Base, sm: SideMemory, batch: int, length: int, repeats: int) -> dict[str, Any]:
    inputs = _prompts(base, batch, length)
    plain = base.model
    models: dict[str, Any] = {"plain": plain}
    attached: dict[str, Attached] = {}
    for name, epsilon in (("unrouted", float("inf")), ("routed", float("-inf"))):
        models[name] = copy.deepcopy(plain)
        attached[name] = attach(models[name], _with_threshold(sm, epsilon))
    with torch.no_grad():
        prefill = interleaved({n: _prefill(m, inputs) for n, m in models.items()}, repeats, warm=3)
        decode = interleaved({n: _decode(m, inputs) for n, m in models.items()}, repeats, warm=2)
    for name, a in attached.items():
        if a.last is None or bool((a.last.memory >= 0).all()) != (name == "routed"):
            raise RuntimeError(f"{name}: the routes are {a.last and a.last.memory.tolist()}")
        a.detach()
    return {
        what: {
            "plain_ms": _ms(times["plain"].wall),
            "unrouted_over_plain": ratios(times["unrouted"], times["plain"]),
            "routed_over_plain": ratios(times["routed"], times["plain"]),
            "unrouted_beyond_plain_ms": 1e3 * (times["unrouted"].mid - times["plain"].mid),
            "routed_beyond_plain_ms": 1e3 * (times["routed"].mid - times["plain"].mid),
        }
        for what, times in (("prefill", prefill), ("decode, 16 tokens", decode))
    }


def _ms(seconds: tuple[float, ...]) -> float:
    return 1e3 * quartiles(seconds)[1]


def _prefill(model: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    def once() -> None:
        model(**inputs, use_cache=True, logits_to_keep=1)

    return once


def _decode(model: Any, inputs: dict[str, torch.Tensor], tokens: int = 16) -> Callable[[], None]:
    """Steps of one token from a cache that is cut back each time, so that every repetition does the same."""
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    cache, length = out.past_key_values, inputs["input_ids"].shape[1]
    step = out.logits[:, -1:].argmax(-1)
    masks = [torch.ones(len(step), length + i + 1, dtype=torch.long) for i in range(tokens)]

    def once() -> None:
        cache.crop(length)
        for mask in masks:
            model(input_ids=step, attention_mask=mask, past_key_values=cache, use_cache=True)

    return once
