"""Ask questions of a base, plain and with a side memory attached, and make items of the answers.

The base is asked once, whatever is attached later. A state of the edited model that is asked everything is asked in the
same batches, so rows that main memory answers come out the same to the last bit; one that is asked a part only takes
the base's answers for such rows, which in other company could differ in the last bit. Progress is yielded; results are
returned. What the items add up to is `scores` and `evidence`; when to ask is `evaluate` and `protocols`.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from wisecli.cache import digest_of
from wisecli.data.records import EditRecord, Prompt
from wisecli.evaluation.answers import (
    BATCH,
    PROBE_TOKENS,
    Answer,
    Forced,
    answer_cap,
    force_each,
    generate_answers,
)
from wisecli.evaluation.metrics import all_tokens_match, exact_match, ood_example, ood_token, token_accuracy
from wisecli.evaluation.questions import Item, Question
from wisecli.evaluation.store import AnswerStore
from wisecli.memory.side_memory import MAIN_MEMORY
from wisecli.models.base import Base
from wisecli.models.prompts import PromptEncoder, Row
from wisecli.routing.attach import Attached

T = TypeVar("T")
Seen = TypeVar("Seen", Answer, Forced)
Steps = Generator["Progress", None, T]
ORACLE = "oracle"  # in the router's place: an edit's prompts go to the memory that learned it, all others to main


@dataclass(frozen=True)
class Progress:
    """`done` of `total` prompts of a stage are answered."""

    stage: str
    done: int
    total: int


def drain(steps: Steps[T]) -> T:
    """Run to the end without reporting progress; gives the result."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value


@dataclass(frozen=True)
class OodText:
    """A text out of the edit's distribution (WISE eq. 9), scored as a whole; pairs are (before, after)."""

    edit: str
    text: str
    token: tuple[float, float]
    example: tuple[bool, bool]
    routed: bool | None

    def to_json(self) -> dict[str, Any]:
        named = {"edit": self.edit, "text": self.text, "routed": self.routed}
        return {**named, "token": list(self.token), "example": list(self.example)}


class Asker:
    """The questions about a stream, a base to ask, and what it answered.

    Args:
        base: loaded base.
        questions: all that may be asked.
        chat: render prompts with the base's chat template.
        cache: folder in which finished batches are kept; None keeps nothing.
        batch_size: rows per batch at most.
        left_out: how many questions were left out of them, by kind, for the record; None where nothing is left out.
    """

    def __init__(
        self,
        base: Base,
        questions: Sequence[Question],
        *,
        chat: bool = False,
        cache: Path | None = None,
        batch_size: int = BATCH,
        left_out: Mapping[str, int] | None = None,
    ) -> None:
        self.base, self.questions, self.batch_size = base, list(questions), batch_size
        self.left_out = left_out
        self.encoder = PromptEncoder(base.tokenizer, chat=chat)
        self.prompts = list(dict.fromkeys(q.asked for q in self.questions))
        self.seconds: dict[str, float] = {}
        self._cache = cache if cache is not None and base.digest is not None else None
        self._journals: dict[Path, AnswerStore] = {}
        self._answers: dict[Prompt, Answer] = {}
        self._rows: list[Row | None] = []
        self._contrasts: list[Row | None] = []
        self._forced: dict[int, Forced] = {}
        self._forced_contrasts: dict[int, Forced] = {}
        self._base_store: AnswerStore | None = None
        self.places: dict[str, list[int]] = {}
        for i, q in enumerate(self.questions):
            self.places.setdefault(q.edit, []).append(i)

    # -- the base ------------------------------------------------------------------------------------------------------

    def before(self, attached: Attached | None = None) -> Steps[None]:
        """Ask the base everything; `attached` is what is attached to its model at the time, and takes no part.

        Raises:
            InputError: a prompt, alone or with its answer, does not fit the base's context; nothing was asked then.
        """
        caps, store = self._caps, self.store_of(None)
        with _closed(attached):
            self._answers = yield from self._generate("base", self.prompts, caps, None, store)
            self._rows = [self._row(q) for q in self.questions]
            self._contrasts = [None if q.contrast is None else self._pair(q, q.contrast) for q in self.questions]
            self._forced = yield from self._force("base, forced", self._rows, None, store)
            self._forced_contrasts = yield from self._force("base, contrasts", self._contrasts, None, store)

    # -- the edited model ----------------------------------------------------------------------------------------------

    def after(
        self,
        attached: Attached | None,
        which: Sequence[int] | None = None,
        *,
        stage: str = "edited",
        kept: bool = True,
        oracle: bool = False,
    ) -> Steps[list[Item]]:
        """Ask the model as it is now, and give the items in order.

        Args:
            attached: what is attached to it; None for the base alone: then after is before.
            which: positions of the questions to ask; all when None.
            kept: keep finished batches in the cache until `close`, so that an interrupted evaluation can go on.
            oracle: instead of the router, send prompts of an edit to the memory that learned it, all others to main.
        """
        everything = which is None
        which = range(len(self.questions)) if which is None else which
        if attached is None:
            plain = {i: self._forced[i] for i in which if i in self._forced}
            contrasts = {i: self._forced_contrasts[i] for i in which if i in self._forced_contrasts}
            return [self._item(i, self._answers, plain, contrasts) for i in which]
        store = self.store_of(attached, {"router": ORACLE} if oracle else None) if kept else None
        sent = self._own_memories(attached) if oracle else None
        answers = yield from self._generate(stage, self._prompts_of(which), self._caps, attached, store, sent)
        picked, force = set(which), partial(self._force, attached=attached, store=store)
        to = None if sent is None else [sent[q.asked] for q in self.questions]
        rows = [r if i in picked else None for i, r in enumerate(self._rows)]
        forced = yield from force(f"{stage}, forced", rows, sent_to=to)
        rows = [r if i in picked else None for i, r in enumerate(self._contrasts)]
        contrasts = yield from force(f"{stage}, contrasts", rows, sent_to=to)
        if not everything:
            answers = {p: _or_base(a, self._answers[p]) for p, a in answers.items()}
            forced = {i: _or_base(f, self._forced[i]) for i, f in forced.items()}
            contrasts = {i: _or_base(f, self._forced_contrasts[i]) for i, f in contrasts.items()}
        return [self._item(i, answers, forced, contrasts) for i in which]

    def opened(self, attached: Attached, items: Sequence[Item]) -> Steps[list[Item]]:
        """The items with the answers that a gate always open would have let through.

        What a memory answered anyway is not asked again. With several memories a prompt of an edit goes to the edit's
        own, as an oracle would send it, and any other prompt to the nearest edit's.
        """
        memory_of = {e.id: max(e.memory, 0) for e in attached.side_memory.edits}
        due = {i: m for i, item in enumerate(items) if (m := _open_to(item, memory_of)) is not None}
        answers: dict[tuple[int, Prompt], Answer] = {}
        for memory in sorted(set(due.values())):
            asked = list(dict.fromkeys(items[i].question.asked for i, m in due.items() if m == memory))
            with attached.override([memory]):
                store = self.store_of(attached, {"open": memory})
                found = yield from self._generate("gate open", asked, self._caps, None, store)
            answers |= {(memory, prompt): answer for prompt, answer in found.items()}
        return [
            self._opened(item, answers[due[i], item.question.asked] if i in due else None)
            for i, item in enumerate(items)
        ]

    def ood(
        self, records: Iterable[EditRecord], attached: Attached | None, oracle: bool = False
    ) -> Steps[list[OodText]]:
        """Score the texts out of distribution: all tokens but the first, as published.

        A text that begins with the edit's prompt is routed on that; any other on all of it. An oracle sends it to the
        memory that learned the edit.
        """
        encoder = PromptEncoder(self.base.tokenizer)
        texts = [(r, t) for r in records for t in r.ood]
        rows, seen = [], []
        for record, text in texts:
            ids = encoder.prompt(text).prompt
            own = encoder.prompt(record.prompt).prompt
            rows.append(Row(ids[:1], ids[1:]) if len(ids) > 1 else None)
            seen.append(len(own) if ids[: len(own)] == own else len(ids))
        ask = partial(self._force, rows=rows, seen=seen, encoder=encoder)
        with _closed(attached):
            before = yield from ask("base, texts", attached=None, store=self.store_of(None))
        after = before
        if attached is not None:
            memory_of = {e.id: e.memory for e in attached.side_memory.edits}
            to = [memory_of.get(r.id, MAIN_MEMORY) for r, _ in texts] if oracle else None
            store = self.store_of(attached, {"router": ORACLE} if oracle else None)
            after = yield from ask("edited, texts", attached=attached, store=store, sent_to=to)
        out = []
        for i, (record, text) in enumerate(texts):
            if i in before:
                a, b = before[i].nll, after[i].nll
                route = after[i].route
                share, whole = (ood_token(a), ood_token(b)), (ood_example(a), ood_example(b))
                out.append(OodText(record.id, text, share, whole, None if route is None else route.routed))
        return out

    def close(self) -> None:
        """Drop what was kept for edited models: it only serves to go on after an interruption."""
        for store in self._journals.values():
            store.discard()
        self._journals = {}

    # -- the pieces ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What decides the base's answers apart from the prompts."""
        return {**self.base.state(), "batch": self.batch_size}

    def store(self, about: Mapping[str, Any]) -> AnswerStore | None:
        """A store for what is asked under `about`; dropped by `close`."""
        if self._cache is None:
            return None
        store = AnswerStore(self._cache, {**self.state(), **about})
        return self._journals.setdefault(store.path, store)

    def store_of(self, attached: Attached | None, more: Mapping[str, Any] | None = None) -> AnswerStore | None:
        """The store of a state of the model: the base's stays, that of an edited model is dropped by `close`."""
        if attached is None:
            if self._base_store is None and self._cache is not None:
                self._base_store = AnswerStore(self._cache, self.state())
            return self._base_store
        sm = attached.side_memory
        about = {"side_memory": sm.digest, "manifest": digest_of(sm.manifest()), "router": attached.router.name}
        return self.store({**about, **(more or {})})

    def _generate(
        self,
        stage: str,
        prompts: Sequence[Prompt],
        caps: Mapping[Prompt, int],
        attached: Attached | None,
        store: AnswerStore | None,
        sent: Mapping[Prompt, int | None] | None = None,
    ) -> Steps[dict[Prompt, Answer]]:
        found: dict[Prompt, Answer] = {}
        limits = [caps[p] for p in prompts]
        to = None if sent is None else [sent[p] for p in prompts]
        each = generate_answers(self.base, self.encoder, prompts, limits, attached, self.batch_size, store, to)
        for done in self._timed(stage, each):
            found[prompts[done[0]]] = done[1]
            yield Progress(stage, len(found), len(prompts))
        return found

    def _force(
        self,
        stage: str,
        rows: Sequence[Row | None],
        attached: Attached | None,
        store: AnswerStore | None,
        *,
        seen: Sequence[int] | None = None,
        encoder: PromptEncoder | None = None,
        sent_to: Sequence[int | None] | None = None,
    ) -> Steps[dict[int, Forced]]:
        """What was seen along each row, by position; rows that are None or have no target are left out."""
        places = [i for i, r in enumerate(rows) if r is not None and r.target]
        picked = [r for r in rows if r is not None and r.target]
        routed_on = None if seen is None else [seen[i] for i in places]
        to = None if sent_to is None else [sent_to[i] for i in places]
        found: dict[int, Forced] = {}
        each = force_each(self.base, encoder or self.encoder, picked, attached, self.batch_size, store, routed_on, to)
        for at, forced in self._timed(stage, each):
            found[places[at]] = forced
            yield Progress(stage, len(found), len(picked))
        return found

    def _timed(self, stage: str, each: Iterator[T]) -> Iterator[T]:
        """The same, with the time it takes noted under the stage."""
        started = time.perf_counter()
        for x in each:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
            yield x
            started = time.perf_counter()

    def _own_memories(self, attached: Attached) -> dict[Prompt, int | None]:
        """Where an oracle sends each prompt: that of an edit to the memory that learned it, any other to main (None).

        A withdrawn edit is in no memory, nor is one that the side memory does not hold.
        """
        own = {e.id: e.memory for e in attached.side_memory.edits if e.memory != MAIN_MEMORY}
        sent: dict[Prompt, int | None] = dict.fromkeys(self.prompts)
        return sent | {q.asked: own.get(q.edit) for q in self.questions if q.edited}

    def _prompts_of(self, which: Iterable[int]) -> list[Prompt]:
        return list(dict.fromkeys(self.questions[i].asked for i in which))

    @cached_property
    def _caps(self) -> dict[Prompt, int]:
        """Tokens each prompt may generate: the most that any question with it asks for."""
        longest: dict[Prompt, int] = {}
        for q in self.questions:
            n = answer_cap(self.base, self.encoder, q.edit, q.asked, q.wanted)
            if q.contrast is not None:
                answer_cap(self.base, self.encoder, q.edit, q.asked, q.contrast)  # it must fit, too
            n = n if q.edited else min(n, PROBE_TOKENS)
            longest[q.asked] = max(longest.get(q.asked, 0), n)
        return longest

    def _row(self, q: Question) -> Row | None:
        if q.wanted:
            return self._pair(q, q.wanted)
        # the base's tokens as it said them: written out and read again they may be others, or more
        return Row(self.encoder.prompt(q.asked).prompt, self._answers[q.asked].ids)

    def _pair(self, q: Question, text: str) -> Row:
        return self.encoder.pair(q.asked, text, eos=False)

    def _item(
        self, i: int, answers: Mapping[Prompt, Answer], forced: Mapping[int, Forced], contrasts: Mapping[int, Forced]
    ) -> Item:
        q = self.questions[i]
        a, b = self._answers[q.asked], answers[q.asked]
        led: dict[str, Any] = {}
        if i in forced:
            x, y, row = self._forced[i], forced[i], self._rows[i]
            gold = row.target if q.edited and row is not None else x.predicted
            led["token"] = (token_accuracy(x.predicted, gold), token_accuracy(y.predicted, gold))
            led["match"] = (all_tokens_match(x.predicted, gold), all_tokens_match(y.predicted, gold))
            if not q.edited and q.answer is not None and row is not None:
                led["answered"] = (all_tokens_match(x.predicted, row.target), all_tokens_match(y.predicted, row.target))
            led["nll"] = (fmean(x.nll), fmean(y.nll))
        if i in contrasts:
            led["contrast"] = (fmean(self._forced_contrasts[i].nll), fmean(contrasts[i].nll))
        return Item(q, a.text, b.text, (_right(q, a, a), _right(q, a, b)), route=b.route, **led)

    def _opened(self, item: Item, answer: Answer | None) -> Item:
        q = item.question
        if answer is None:
            return item.with_opened(item.after, item.exact[1])
        return item.with_opened(answer.text, _right(q, self._answers[q.asked], answer))


def _open_to(item: Item, memory_of: Mapping[str, int]) -> int | None:
    """The memory that an always open gate would ask, None where the answer that was given is that one's."""
    route, q = item.route, item.question
    if route is None:
        return None
    memory = memory_of.get((q.edit if q.edited else route.edit) or "", 0)
    right = route.routed and (not q.edited or route.memory == memory)
    return None if right else memory


def _or_base(seen: Seen, base: Seen) -> Seen:
    """What the base made of it, with the route taken, where main memory answered."""
    shut = seen.route is not None and not seen.route.routed
    return replace(base, route=seen.route) if shut else seen


def _right(q: Question, before: Answer, answer: Answer) -> bool:
    """Whether an answer is what is wanted: the target, or for a probe the base's own tokens."""
    return exact_match(answer.text, q.target) if q.target is not None else answer.ids == before.ids


def _closed(attached: Attached | None) -> AbstractContextManager[None]:
    """Within it the base answers, whatever is attached."""
    return nullcontext() if attached is None else attached.override(None)
