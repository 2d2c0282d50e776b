"""What a chat template adds to what is said, found by rendering probes.

A template is a program; nothing in it says where the words of the last user turn begin and end once they are tokens. So
the same conversations are rendered with different words, and what all of them share is the template's. Some of it may
merge with the words into one token (a line break before a text that begins with one); only what no probe changes
counts as a mark. What the template does to the words themselves, such as trimming them, is its own affair.

A template is refused where the turn's beginning cannot be told from bare tokens, where the user's words are left out,
and where no answer can follow because nothing opens the assistant's turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, reduce
from typing import TYPE_CHECKING

from wisecli.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]
Messages = Sequence[Mapping[str, str]]

_PLAIN = ("Zebras drink", "7 quick words!")  # share no first or last token
_STARTS = ("\nx", "\n\nx", " x", "\tx", ":x", "]x", ".x", "éx")  # may merge with what stands before them
_ENDS = ("x\n", "x\n\n", "x ", "x:", "x[", "x.", "xé")  # or behind them
_SAID = (("Zebras drink", "Grass"), ("7 quick words!", "Slow."), ("Why", "Because\n"))  # earlier turns
_RULES = ("Speak softly", "Answer in 7 words.", "Be kind\n")  # system messages
_ANSWER = "Walruses"
_INSTEAD = "Use --no-chat."
_NO_SYSTEM = "Leave the system message (--system) out, or say it in the question."


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: with a chat template.
        system: a system message that stands before every conversation that has none of its own.

    Attributes:
        openings: what stands before the words of the last user turn; any of them may.
        closings: what stands behind them; any of them may. What follows the closing does not matter.

    Raises:
        UsageError: the tokenizer has no chat template, or one that cannot be used here, or not with a system message.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError("This base has no chat template.", hint="Drop --chat, or use an instruct model.")
        self.tokenizer, self.system = tokenizer, system
        self._added = special_ids(tokenizer) | set(getattr(tokenizer, "added_tokens_decoder", {}))
        self._check_words()
        self.openings = self._find_openings()
        self.closings = self._find_closings()
        fault = self._system_fault(system) if system else None
        if fault:
            raise UsageError(fault, hint=_NO_SYSTEM)

    # -- rendering -----------------------------------------------------------------------------------------------------

    def text(self, messages: Messages, *, answering: bool = True) -> str:
        """A conversation as text, with the system message, and with the generation prompt where `answering`.

        Raises:
            UsageError: the template refuses the conversation, or cannot keep its system message apart.
        """
        own = messages[0]["role"] == "system"
        if own and self._own_system_fault:
            raise UsageError(self._own_system_fault, hint=_NO_SYSTEM)
        said = messages if own or not self.system else [_says("system", self.system), *messages]
        try:
            return self._rendered(said, answering)
        except _Refused as e:
            hint = _NO_SYSTEM if own or self.system else _INSTEAD
            raise UsageError(f"The chat template of this base refuses these messages: {e}", hint=hint) from e

    def ids(self, text: str) -> Ids:
        """Ids of rendered text. Only the template adds special tokens: one BOS, not two."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def lead(self) -> str:
        """White space that the template puts between the generation prompt and an answer: decoding begins with it."""
        between = self._between[0]
        return between if between.isspace() else ""

    @cached_property
    def end(self) -> int | None:
        """The token that ends an assistant's turn, None where the template has none."""
        after = self.ids(self._between[1].lstrip())
        return after[0] if after and after[0] in self._added else None

    # -- finding out ---------------------------------------------------------------------------------------------------

    def _rendered(self, messages: Messages, answering: bool = True) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(m) for m in messages], tokenize=False, add_generation_prompt=answering
                )
            )
        except (TemplateError, TypeError, ValueError) as e:
            raise _Refused(str(e) or type(e).__name__) from e

    @cached_property
    def _between(self) -> tuple[str, str]:
        """What stands between the generation prompt and an answer, and what stands behind the answer."""
        asked = [_says("user", _PLAIN[0])]
        try:
            whole = self._rendered([*asked, _says("assistant", _ANSWER)], False)
        except _Refused:
            return "", ""
        before, found, after = whole.rpartition(_ANSWER)
        start = self._rendered(asked)
        return (before[len(start) :] if found and before.startswith(start) else "", after if found else "")

    def _check_words(self) -> None:
        asked = [_says("user", _PLAIN[0])]
        try:
            start = self._rendered(asked)
        except _Refused as e:
            raise UsageError(f"The chat template of this base cannot be used: {e}", hint=_INSTEAD) from e
        if _PLAIN[0] not in start:
            raise UsageError("The chat template of this base leaves out what the user says.", hint=_INSTEAD)
        if start == self._rendered(asked, False) and self._between[0].strip():
            raise UsageError(
                "The chat template of this base does not open the assistant's turn: it has no generation prompt.",
                hint=_INSTEAD,
            )

    @cached_property
    def _own_system_fault(self) -> str | None:
        """Why no conversation can have a system message of its own; None where it can."""
        return self._system_fault(_RULES[0])

    def _system_fault(self, system: str) -> str | None:
        """Why a conversation cannot be rendered with a system message; None where it can."""
        try:
            text = self._rendered([_says("system", system), _says("user", _PLAIN[0])])
        except _Refused as e:
            return f"The chat template of this base refuses a system message: {e}"
        if system.strip() not in text:
            return "The chat template of this base leaves a system message out."
        if not self._separate:
            return (
                "The chat template of this base puts the system message into the user's turn, with nothing to mark "
                "where it ends."
            )
        return None

    @cached_property
    def _separate(self) -> bool:
        """Whether the words of a user's turn can be told from a system message before them."""
        found = self._before([[_says("system", s)] for s in _RULES])
        return found is not None and self._telling(found[0])

    def _find_openings(self) -> tuple[Ids, ...]:
        """Marks of where the last user turn begins: at first, after other turns, after a system message, after both."""
        turns = [[_says("user", q), _says("assistant", a)] for q, a in _SAID]
        rules = [[_says("system", s)] for s in _RULES]
        first = self._before([[]])
        later = self._before(turns)
        openings: list[tuple[Ids, Ids]] = [f for f in (later, first) if f is not None and f[0]]
        if (later is not None and not later[0]) or not all(self._telling(core) for core, _ in openings):
            raise UsageError(
                "The chat template of this base does not mark where a user's turn begins: it cannot be told from what "
                "was said before.",
                hint=_INSTEAD,
            )
        if self._separate:
            more = (self._before(rules), self._before([[*r, *t] for r, t in zip(rules, turns, strict=True)]))
            openings += [f for f in more if f is not None and self._telling(f[0])]
        marks: list[Ids] = []
        for core, lead in self._joined(openings):
            marks += [core + lead[:k] for k in range(len(lead) + 1)]
        return tuple(dict.fromkeys(marks))

    def _find_closings(self) -> tuple[Ids, ...]:
        """Marks of where it ends, with all, some or none of the white space before; words may merge with that.

        White space at their end is left out: some tools cut it off.
        """
        whole = reduce(_common, (self._asked([], words)[::-1] for words in _PLAIN))
        core = reduce(_common, (self._asked([], words)[::-1] for words in _ENDS), whole)[::-1]
        core = core[self._blanks(core) :]
        tail = whole[::-1][: len(whole) - len(core)]
        core = core[: len(core) - self._blanks(core[::-1])]
        marks = [tail[k:] + core for k in range(len(tail) + 1)]
        return tuple(m for m in marks if m)

    def _asked(self, before: Messages, words: str) -> Ids:
        return self.ids(self._rendered([*before, _says("user", words)]))

    def _before(self, histories: Iterable[Messages]) -> tuple[Ids, Ids] | None:
        """What stands before the words of the last turn whatever was said before: a mark, and white space behind it.

        White space is apart since words may merge with it. None where the template refuses such conversations.
        """
        cores, leads = [], []
        try:
            for history in histories:
                core = reduce(_common, (self._asked(history, words) for words in (*_PLAIN, *_STARTS)))
                core = core[: len(core) - self._blanks(core[::-1])]
                alone = self.ids(self._rendered([*history, _says("user", _PLAIN[0])]).rpartition(_PLAIN[0])[0])
                cores.append(core)
                leads.append(alone[len(core) :] if alone[: len(core)] == core else ())
        except _Refused:
            return None
        core = reduce(_common, (c[::-1] for c in cores))[::-1]
        return core, reduce(_common, leads)

    def _joined(self, openings: list[tuple[Ids, Ids]]) -> list[tuple[Ids, Ids]]:
        """Openings with what they share in place of any two that share a whole mark."""
        out: list[tuple[Ids, Ids]] = []
        for core, lead in openings:
            for i, (other, same) in enumerate(out):
                shared = _common(core[::-1], other[::-1])[::-1]
                if lead == same and self._telling(shared) and self._whole(core, shared) and self._whole(other, shared):
                    out[i] = (shared, lead)
                    break
            else:
                out.append((core, lead))
        return out

    def _telling(self, ids: Ids) -> bool:
        """Whether a mark is more than white space and punctuation, which user texts are full of."""
        return any(i in self._added for i in ids) or any(c.isalnum() for c in self._decoded(ids))

    def _whole(self, ids: Ids, end: Ids) -> bool:
        """Whether an end of some ids begins where a word, or a special token, begins."""
        before = self._decoded(ids[: len(ids) - len(end)])
        return end[0] in self._added or not before[-1:].isalnum()

    def _blanks(self, ids: Ids) -> int:
        """How many tokens of white space ids begin with."""
        blank = (i not in self._added and not self._decoded((i,)).strip() for i in ids)
        return next((k for k, x in enumerate(blank) if not x), len(ids))

    def _decoded(self, ids: Ids) -> str:
        return str(self.tokenizer.decode(list(ids)))


class _Refused(Exception):
    """A template refuses a conversation."""


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of special tokens: the named ones, and others the tokenizer knows as such; headers of templates often are."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {int(i) for i, token in added.items() if token.special}


def _says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _common(a: Ids, b: Ids) -> Ids:
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:n]
