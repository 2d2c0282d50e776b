"""Talk to a base with its side memory: answers in pieces as they are generated, and why each came out as it did.

With a chat template the conversation so far is rendered as a whole and prefilled anew each turn: a KV cache kept
between turns would also keep the decision of the first. Without one every question stands alone. Answers are greedy,
the same as in evaluation. What this module does not do is read from or write to a terminal.

One conversation at a time per attached side memory; it is not safe to use a session from several threads at once.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from wisecli.errors import InputError, UsageError
from wisecli.evaluation.answers import GREEDY
from wisecli.models.base import context_of
from wisecli.models.prompts import PromptEncoder, Row
from wisecli.routing.explain import TOP, Explanation, check_prompt, explain_conversation

if TYPE_CHECKING:
    from wisecli.memory.side_memory import EditEntry
    from wisecli.models.base import Base
    from wisecli.routing.attach import Attached
    from wisecli.routing.routers import Route, Routes

Message = dict[str, str]
_INCOMPLETE = "\ufffd"  # what a character decodes to while some of its bytes are still to come


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        route: which memory answered and why; None without a side memory, or when stopped before it was decided.
        edit: the nearest edit, where the router names one; also when main memory answered.
        stopped: the answer was interrupted; it does not enter the conversation.
    """

    question: str
    answer: str
    route: Route | None = None
    edit: EditEntry | None = None
    stopped: bool = False


class ChatSession:
    """A conversation with a base, or with a base and the side memory attached to it.

    Args:
        base: the loaded base.
        attached: the side memory attached to its model, None for the plain base.
        chat: render with the base's chat template; turns then see the turns before them.
        system: a system message, with `chat` only.
        max_new_tokens: cap on the tokens of an answer.

    Attributes:
        turn: the last turn, None before the first.
    """

    def __init__(
        self, base: Base, attached: Attached | None, *, chat: bool, system: str | None = None, max_new_tokens: int = 128
    ) -> None:
        if system and not chat:
            raise UsageError("A system message needs a chat template.", hint="Leave --system out, or use --chat.")
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
        self.base, self.attached, self.max_new_tokens = base, attached, max_new_tokens
        self.encoder = PromptEncoder(base.tokenizer, chat, system)
        self.turn: Turn | None = None
        self._messages: list[Message] = []  # of the conversation, the last turn included
        self._asked: list[Message] = []  # what the last turn was asked with
        self._open: Generator[str] | None = None

    def ask(self, text: str) -> Generator[str]:
        """The answer in pieces, as they are generated; afterwards `turn` holds the turn.

        Closing the iterator early, or asking again, stops the generation: `turn` then holds what was said so far.

        Raises:
            InputError: an empty question, or a conversation longer than the base takes.
        """
        self._stop_open()
        messages = [*self._history(), _user(text)]
        self._open = self._answer(text, messages, self._run(messages))
        return self._open

    def ask_base(self, text: str | None = None) -> Generator[str]:
        """The unedited model's answer to a question, None for the last one. It does not enter the conversation."""
        self._stop_open()
        if text is None and self.turn is None:
            raise InputError("Nothing has been asked yet.", hint="Ask a question first, or give one.")
        messages = self._asked if text is None else [*self._history(), _user(text)]
        self._open = self._run(messages, unedited=True).pieces()
        return self._open

    def explain(self, top: int = TOP) -> Explanation | None:
        """Why the last turn came from the memory it came from; None where its `route` is.

        The prompt is run again up to the edit site; an answer still open is stopped first.
        """
        self._stop_open()
        if self.turn is None:
            raise InputError("Nothing has been asked yet.", hint="Ask a question first.")
        if self.attached is None or self.turn.route is None:
            return None
        return explain_conversation(self.attached, self.encoder, self._asked, top)

    def reset(self) -> None:
        """Forget the conversation."""
        self._stop_open()
        self.turn, self._messages, self._asked = None, [], []

    def _history(self) -> list[Message]:
        return self._messages if self.encoder.chat else []

    def _stop_open(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _run(self, messages: Sequence[Message], *, unedited: bool = False) -> _Generation:
        row = self.encoder.conversation(messages)
        cap = min(self.max_new_tokens, _room(self.base.model, row))
        return _Generation(self.base, self.encoder, row, cap, self.attached, unedited)

    def _answer(self, text: str, messages: list[Message], run: _Generation) -> Generator[str]:
        try:
            yield from run.pieces()
        finally:
            if run.error is None:
                answer = run.text()
                self._asked = messages
                self.turn = Turn(text, answer, *self._why(run.routes), stopped=not run.finished)
                if run.finished:
                    self._messages = [*messages, {"role": "assistant", "content": answer}]

    def _why(self, routes: Routes | None) -> tuple[Route | None, EditEntry | None]:
        if self.attached is None or routes is None:
            return None, None
        nearest = int(routes.edit[0])
        edit = self.attached.side_memory.edits[nearest] if nearest >= 0 else None
        return self.attached.explain(routes)[0], edit


class _Stop(StoppingCriteria):
    """Ends `generate` after the step during which an event was set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class _Generation(BaseStreamer):
    """One greedy answer, generated in a thread and read as text pieces that join to `text()`.

    A piece is handed on once the bytes of its last character are complete. The library's own iterator loses spaces
    behind line breaks with some tokenizers, and waits for ever when `generate` raises.
    """

    def __init__(
        self, base: Base, encoder: PromptEncoder, row: Row, cap: int, attached: Attached | None, unedited: bool
    ) -> None:
        self.base, self.encoder, self.row, self.cap = base, encoder, row, cap
        self.attached, self.unedited = attached, unedited
        self.routes: Routes | None = None
        self.error: BaseException | None = None
        self.finished = False
        self._ids: list[int] = []
        self._shown = ""
        self._prompt_seen = self._ended = False
        self._halt = threading.Event()
        self._queue: SimpleQueue[str | None] = SimpleQueue()

    def text(self) -> str:
        """The answer so far."""
        return self.encoder.decode(self._ids)

    def pieces(self) -> Generator[str]:
        """Start generating and hand the text on. What `generate` raises is raised here; closing stops it."""
        context = contextvars.copy_context()  # an override in force here holds in the thread too
        thread = threading.Thread(target=context.run, args=(self._generate,), name="wise-chat", daemon=True)
        thread.start()
        try:
            while (piece := self._queue.get()) is not None:
                yield piece
            if self.error is not None:
                raise self.error
            self.finished = True
        finally:
            self._halt.set()
            thread.join()

    def put(self, value: Tensor) -> None:
        """Token ids from `generate`: first the prompt's, then one after the other."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.reshape(-1).tolist():
            self._ended = self._ended or token in self.encoder.eos
            if not self._ended:
                self._ids.append(token)
        if self._ended:
            self._halt.set()
        self._hand_on(self.text().rstrip(_INCOMPLETE))

    def end(self) -> None:
        """Called by `generate`; what is left is handed on when it has returned."""

    def _generate(self) -> None:
        try:
            with self._routing():
                batch = self.encoder.batch([self.row]).to(self.base.model.device)
                self.base.model.generate(
                    **batch.inputs,
                    max_new_tokens=self.cap,
                    **GREEDY,
                    pad_token_id=self.encoder.pad,
                    streamer=self,
                    stopping_criteria=StoppingCriteriaList([_Stop(self._halt)]),
                )
            self._hand_on(self.text())
        except BaseException as e:  # surfaces where the pieces are read
            self.error = e
        finally:
            self._queue.put(None)

    @contextlib.contextmanager
    def _routing(self) -> Iterator[None]:
        """Within the thread: the unedited model, or the attached one with its decision read afterwards."""
        if self.attached is None:
            yield
        elif self.unedited:
            with self.attached.override(None):
                yield
        else:
            self.attached.last = None
            yield
            self.routes = self.attached.last

    def _hand_on(self, text: str) -> None:
        if len(text) > len(self._shown):
            self._queue.put(text[len(self._shown) :])
            self._shown = text


def _user(text: str) -> Message:
    check_prompt(text, "question")
    return {"role": "user", "content": text}


def _room(model: Any, row: Row) -> int:
    """Tokens the base can take behind a prompt."""
    limit = context_of(model)
    if limit <= len(row):
        raise InputError(
            f"The question and the conversation before it have {len(row)} tokens; the base takes {limit}.",
            hint="Start a new conversation with /reset, or ask a shorter question.",
        )
    return limit - len(row)
