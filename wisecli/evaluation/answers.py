"""Ask a model many prompts at once: free greedy answers and teacher-forced scores, with the route of each.

Works the same on a plain base and with a side memory attached. Prompts are sorted by length, so batches waste little;
those to be continued are padded on the left, those only scored on the right, where positions count from 0 in any model.
An answer is the argmax at every step whatever the checkpoint's generation_config asks for (`GREEDY`). The cut into
batches depends on the prompts alone, so the same prompts are always asked in the same company, whatever answers them,
and a finished batch can be taken from a store (`AnswerStore`) instead.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from wisecli.cache import digest_of
from wisecli.data.records import Prompt
from wisecli.errors import InputError
from wisecli.evaluation.store import AnswerStore
from wisecli.models.base import Base, context_of
from wisecli.models.prompts import PromptEncoder, Row
from wisecli.models.upper import head_at
from wisecli.routing.routers import Route

if TYPE_CHECKING:
    from wisecli.routing.attach import Attached

BATCH = 64
TOKENS = 16_384  # of a padded batch at most: bounds memory where prompts are long
LOGITS = 2**27  # numbers at most in the logits of one batch's targets: half a gigabyte in fp32
LOSS_LIMIT = 1e4  # nats; half precision can overflow, and JSON has no infinity
SLACK = 4  # tokens an answer may run beyond its target before it is cut: enough to see that it runs on
PROBE_TOKENS = 16  # of the answer to a prompt without a target

# Plain greedy search: all that would otherwise come from the checkpoint and change which token is taken, or how many.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    **dict.fromkeys(
        (
            *("min_new_tokens", "max_time", "stop_strings", "exponential_decay_length_penalty"),
            *("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens"),
            *("forced_bos_token_id", "forced_eos_token_id", "constraints", "force_words_ids"),
            *("guidance_scale", "watermarking_config", "penalty_alpha", "dola_layers", "prompt_lookup_num_tokens"),
        )
    ),
}


@dataclass(frozen=True)
class Answer:
    """A generated text, its token ids (special tokens dropped) and the route taken; `route` is None without routing."""

    text: str
    ids: tuple[int, ...]
    route: Route | None = None


@dataclass(frozen=True)
class Forced:
    """What a model makes of a target it is led along.

    Attributes:
        predicted: argmax at each target position, given the gold tokens before it.
        nll: negative log-likelihood of each target token, in nats; LOSS_LIMIT where it is larger or not a number.
        route: taken from the prompt alone; None without routing.
    """

    predicted: tuple[int, ...]
    nll: tuple[float, ...]
    route: Route | None = None


def answer_cap(base: Base, encoder: PromptEncoder, edit: str, prompt: Prompt, text: str | None) -> int:
    """Tokens the answer to a prompt may take: as many as `text` has and SLACK more; PROBE_TOKENS without a text.

    It is never more than the base's context has left behind the prompt.

    Raises:
        InputError: the prompt, or the prompt with the text, does not fit the base's context; `edit` names it.
    """
    row = encoder.pair(prompt, text, eos=False) if text else encoder.prompt(prompt)
    cap = len(row.target) + SLACK if row.target else PROBE_TOKENS
    limit = context_of(base.model)
    if len(row.prompt) + max(len(row.target), 1) > limit:
        answer = f" and its answer {len(row.target)}" if row.target else ""
        raise InputError(
            f"A prompt of edit {edit!r} has {len(row.prompt)} tokens{answer}; the base takes {limit} in all: "
            f"{str(prompt)[:60]!r}.",
            hint="Shorten it, or leave it out.",
        )
    return min(cap, limit - len(row.prompt))


def check_text(base: Base, encoder: PromptEncoder, edit: str, text: str) -> None:
    """Refuse a text of an edit that is longer than the base's context.

    Raises:
        InputError: it does not fit.
    """
    tokens, limit = len(encoder.prompt(text)), context_of(base.model)
    if tokens > limit:
        raise InputError(
            f"A text of edit {edit!r} has {tokens} tokens; the base takes {limit}: {text[:60]!r}.",
            hint="Shorten it, or leave it out.",
        )


@torch.no_grad()
def generate_answers(
    base: Base,
    encoder: PromptEncoder,
    prompts: Sequence[Prompt],
    max_new_tokens: Sequence[int],
    attached: Attached | None = None,
    batch_size: int = BATCH,
    store: AnswerStore | None = None,
    sent_to: Sequence[int | None] | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Greedy answers, as (position in `prompts`, answer), batch by batch.

    Args:
        max_new_tokens: cap per prompt; a batch runs to its largest and each answer is cut to its own.
        attached: the side memory attached to the base's model, for the routes.
        store: where finished batches of this very state of the model are kept.
        sent_to: the memory that answers each prompt, None for main, whatever the router would say.
    """
    rows = [encoder.prompt(p) for p in prompts]
    caps = list(max_new_tokens)
    order = sorted(range(len(rows)), key=lambda i: (caps[i], len(rows[i])))
    sizes = [(len(r), cap) for r, cap in zip(rows, caps, strict=True)]
    for picked in _batches(order, sizes, batch_size, context_of(base.model)):
        key = digest_of(["generate", encoder.eos, [[rows[i].prompt, caps[i]] for i in picked]])
        kept = store.get(key) if store else None
        if kept is None:
            with _sent(attached, sent_to, picked):
                found = _generated(base, encoder, [rows[i] for i in picked], [caps[i] for i in picked], attached)
            if store:
                store.put(key, [[a.text, a.ids, a.route and a.route.to_json()] for a in found])
        else:
            found = [Answer(text, tuple(ids), route and Route.from_json(route)) for text, ids, route in kept]
        yield from zip(picked, found, strict=True)


def _generated(
    base: Base, encoder: PromptEncoder, rows: Sequence[Row], caps: Sequence[int], attached: Attached | None
) -> list[Answer]:
    """One batch, answered."""
    special = encoder.special
    batch = encoder.batch(rows).to(base.model.device)
    out = base.model.generate(**batch.inputs, **GREEDY, max_new_tokens=max(caps), pad_token_id=encoder.pad)
    routes = _routes(attached, len(rows))
    answers = []
    for ids, cap, route in zip(out[:, batch.input_ids.shape[1] :].tolist(), caps, routes, strict=True):
        said = [t for t in _until(ids[:cap], encoder.eos) if t not in special]
        answers.append(Answer(encoder.decode(said), tuple(said), route))
    return answers


def force(
    base: Base,
    encoder: PromptEncoder,
    rows: Sequence[Row],
    attached: Attached | None = None,
    **options: Any,
) -> list[Forced]:
    """What `force_each` gives, in the order of the rows."""
    found = dict(force_each(base, encoder, rows, attached, **options))
    return [found[i] for i in range(len(rows))]


@torch.no_grad()
def force_each(
    base: Base,
    encoder: PromptEncoder,
    rows: Sequence[Row],
    attached: Attached | None = None,
    batch_size: int = BATCH,
    store: AnswerStore | None = None,
    routed_on: Sequence[int] | None = None,
    sent_to: Sequence[int | None] | None = None,
) -> Iterator[tuple[int, Forced]]:
    """Lead the model along each row's target: argmax and negative log-likelihood at every target position.

    Gives (position in `rows`, what was seen), batch by batch.

    Args:
        rows: prompts with targets, without EOS unless it is to be scored.
        attached: the side memory attached to the base's model: each row is routed by its prompt alone, as when it is
            answered freely, and not by the target behind it. With `attached.override(None)` around the call the base
            is asked.
        store: where finished batches of this very state of the model are kept.
        routed_on: tokens of each row that the router sees instead, counted from the row's start.
        sent_to: the memory that answers each row, None for main, whatever the router would say.
    """
    seen = [len(r.prompt) for r in rows] if routed_on is None else list(routed_on)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    most = max(1, LOGITS // base.model.config.get_text_config().vocab_size)
    sizes = [(len(r), 0) for r in rows]
    for picked in _batches(order, sizes, batch_size, sys.maxsize, [len(r.target) for r in rows], most):
        key = digest_of(["force", [[rows[i].prompt, rows[i].target, seen[i]] for i in picked]])
        kept = store.get(key) if store else None
        if kept is None:
            with _sent(attached, sent_to, picked):
                found = _led(base, encoder, [rows[i] for i in picked], [seen[i] for i in picked], attached)
            if store:
                store.put(key, [[f.predicted, f.nll, f.route and f.route.to_json()] for f in found])
        else:
            found = [
                Forced(tuple(predicted), tuple(nll), route and Route.from_json(route)) for predicted, nll, route in kept
            ]
        yield from zip(picked, found, strict=True)


def _led(
    base: Base, encoder: PromptEncoder, rows: Sequence[Row], seen: Sequence[int], attached: Attached | None
) -> list[Forced]:
    """One batch, scored."""
    batch = encoder.batch(rows, side="right").to(base.model.device)
    labels = batch.labels.flatten()
    predicted = (labels != -100).nonzero()[:, 0]  # a prompt comes first in each row: none is a row's first token
    lengths = attached.prompt_lengths(seen) if attached is not None else nullcontext()
    with lengths, head_at(base.model, predicted - 1):
        logits = base.model(**batch.inputs, use_cache=False).logits  # [n, V]
    gold = labels[predicted]
    nll = torch.nn.functional.cross_entropy(logits.float(), gold, reduction="none")
    nll = nll.nan_to_num(nan=LOSS_LIMIT).clamp(max=LOSS_LIMIT)
    counts = [len(r.target) for r in rows]
    parts = zip(logits.argmax(-1).split(counts), nll.split(counts), _routes(attached, len(rows)), strict=True)
    return [Forced(tuple(p.tolist()), tuple(x.tolist()), route) for p, x, route in parts]


def _routes(attached: Attached | None, rows: int) -> list[Route] | list[None]:
    """The routes just taken; none where nothing is attached or they were set from outside."""
    last = attached.last if attached is not None and not attached.overridden else None
    return attached.explain(last) if attached is not None and last is not None else [None] * rows


def _sent(
    attached: Attached | None, sent_to: Sequence[int | None] | None, picked: Sequence[int]
) -> AbstractContextManager[None]:
    """Within it the rows of a batch go where they are sent, if anything is said of that."""
    if attached is None or sent_to is None:
        return nullcontext()
    return attached.override([sent_to[i] for i in picked])


def _batches(
    order: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    batch_size: int,
    limit: int,
    targets: Sequence[int] | None = None,
    most: int = sys.maxsize,
) -> Iterator[list[int]]:
    """Cut an order of rows into batches in which no row runs beyond the base's context while others go on.

    Args:
        sizes: (tokens, cap) of each row.
        targets: supervised tokens of each row, of which a batch holds at most `most`.
    """
    picked: list[int] = []
    longest = largest = led = 0
    for i in order:
        length, cap = max(longest, sizes[i][0]), max(largest, sizes[i][1])
        led += targets[i] if targets is not None else 0
        full = len(picked) == batch_size or (length + cap) * (len(picked) + 1) > TOKENS or led > most
        if picked and (full or length + cap > limit):
            yield picked
            picked, (length, cap) = [], sizes[i]
            led = targets[i] if targets is not None else 0
        picked.append(i)
        longest, largest = length, cap
    if picked:
        yield picked


def _until(ids: Sequence[int], stop: Sequence[int]) -> Sequence[int]:
    """Ids up to the first stop token, without it."""
    for k, token in enumerate(ids):
        if token in stop:
            return ids[:k]
    return ids
