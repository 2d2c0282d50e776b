"""What an attached side memory costs when a model is used: prefill and decoding, routed and not.

Three copies of one model that share their weights are timed in turn: one as it is, and two with a side memory attached
whose threshold keeps every prompt out or lets every prompt in; the routes are checked. The router does the same work
either way, one decision per sequence at prefill. Beside the ratios stands what share of the attached model's time its
hooks take, which a machine that is busy now and then leaves as it is.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch
from measure import Times, interleaved, quartiles, ratios
from speed_editing import base_of
from speed_memory import side_memory

from wisecli.data.pool import ordinary_prompts
from wisecli.editing.config import EditConfig
from wisecli.models.base import Base, fingerprint
from wisecli.models.prompts import PromptEncoder
from wisecli.models.site import find_site
from wisecli.routing.attach import Attached, attach
from wisecli.routing.engine import _Hook

TOKENS = 16  # decoded one by one


def routing(shape: str, lengths: tuple[int, ...], batches: tuple[int, ...], repeats: int, edits: int) -> dict[str, Any]:
    """Prefill and decoding time of an attached model over that of the plain one."""
    base = base_of(shape)
    out: dict[str, Any] = {"base": base.name, "edits": edits, "repeats": repeats}
    for batch in batches:
        for length in lengths:
            out[f"batch {batch}, {length} tokens"] = overhead(base, edits, batch, length, repeats)
    return out


def _prompts(base: Base, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Rows of exactly `length` tokens of ordinary text."""
    encoder = PromptEncoder(base.tokenizer)
    words = [i for p in ordinary_prompts()[: 40 * batch] for i in encoder.prompt(p).prompt]
    while len(words) < batch * length:
        words += words
    ids = torch.tensor(words[: batch * length]).view(batch, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def overhead(base: Base, edits: int, batch: int, length: int, repeats: int) -> dict[str, Any]:
    """Prefill and decoding of an attached copy of a base, over those of the base itself."""
    plain, site = base.model, find_site(base.model)
    inputs = {k: v.to(plain.device) for k, v in _prompts(base, batch, length).items()}
    about = {"name": base.name, "fingerprint": fingerprint(site.module(plain).weight.detach())}
    models: dict[str, Any] = {"plain": plain}
    attached: dict[str, Attached] = {}
    for name, epsilon in (("unrouted", float("inf")), ("routed", float("-inf"))):
        models[name] = copy.deepcopy(plain)
        models[name].load_state_dict(plain.state_dict(), assign=True)  # in the same memory, which is as fast for all
        attached[name] = attach(models[name], side_memory(site, edits, EditConfig().rank, about, epsilon))
    on_gpu = plain.device.type == "cuda"
    timed = {"repeats": repeats, "warm": 3, "sync": torch.cuda.synchronize if on_gpu else lambda: None}
    with torch.no_grad():
        prefill = interleaved({n: _prefill(m, inputs) for n, m in models.items()}, **timed)
        decode = interleaved({n: _decode(m, inputs) for n, m in models.items()}, **timed)
        shares = [
            {n: _share_of_hooks(make(models[n], inputs), min(repeats, 20)) for n in attached if not on_gpu}
            for make in (_prefill, _decode)
        ]
    for name, a in attached.items():
        if a.last is None or bool((a.last.memory >= 0).all()) != (name == "routed"):
            raise RuntimeError(f"{name}: the routes are {a.last and a.last.memory.tolist()}")
        a.detach()
    clock = "wall" if on_gpu else "cpu"
    out = {"prefill": _compared(prefill, clock), f"decode, {TOKENS} tokens": _compared(decode, clock)}
    for found, share in zip(out.values(), shares, strict=True):
        found |= {f"{name}_in_hooks": x for name, x in share.items()}
    return out


def _compared(times: Mapping[str, Times], clock: str) -> dict[str, Any]:
    plain = quartiles(getattr(times["plain"], clock))[1]
    out: dict[str, Any] = {"plain_ms": 1e3 * plain}
    for name in ("unrouted", "routed"):
        out[f"{name}_over_plain"] = ratios(times[name], times["plain"], clock)
        pairs = zip(getattr(times[name], clock), getattr(times["plain"], clock), strict=True)
        out[f"{name}_beyond_plain_ms"] = 1e3 * quartiles(tuple(a - b for a, b in pairs))[1]
    return out


def _share_of_hooks(thing: Callable[[], None], repeats: int) -> float:
    """Share of the wall seconds of a thing that is spent in the hooks of what is attached, the median."""
    act, spent, shares = _Hook.__call__, [0.0], []

    def timed(hook: _Hook, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return act(hook, *args, **kwargs)
        finally:
            spent[0] += time.perf_counter() - start

    with mock.patch.object(_Hook, "__call__", timed):
        for _ in range(repeats):
            spent[0], start = 0.0, time.perf_counter()
            thing()
            shares.append(spent[0] / (time.perf_counter() - start))
    return statistics.median(shares)


def _prefill(model: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    def once() -> None:
        model(**inputs, use_cache=True, logits_to_keep=1)

    return once


def _decode(model: Any, inputs: dict[str, torch.Tensor], tokens: int = TOKENS) -> Callable[[], None]:
    """Steps of one token from a cache that is cut back each time, so that every repetition does the same."""
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    cache, length = out.past_key_values, inputs["input_ids"].shape[1]
    step = out.logits[:, -1:].argmax(-1)
    masks = [step.new_ones(len(step), length + i + 1) for i in range(tokens)]

    def once() -> None:
        for mask in masks:
            model(input_ids=step, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache.crop(-tokens)

    return once
