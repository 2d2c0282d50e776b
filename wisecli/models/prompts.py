"""From text to token rows, the same way while editing, calibrating, evaluating and chatting.

A row is a prompt, alone or followed by its target. Its *content* tokens are what the user wrote: no padding, no special
tokens, nothing a chat template adds; of a conversation, the words of the last user turn. Routing looks at content
tokens only, so `ContentRule` can be stored with a side memory and applied later to bare token ids. This module does not
run models.

Shapes: `B` rows, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wisecli.data.records import Conversation, Prompt
from wisecli.errors import InputError, UsageError
from wisecli.models.template import ChatTemplate, special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ContentRule:
    """Which tokens of a prompt are content: no special ones and, in a chat template, the words of the last user turn.

    They begin behind the last opening and end before the last closing, each a token sequence the template puts there
    whatever is said. So system messages, dates and earlier turns before them, and the beginning of an answer behind
    them, are no content. A token that holds a piece of the template and a piece of the words, where the tokenizer
    merged them, is.

    Special tokens written out in a user's words become special tokens when the template is tokenized. Where words hold
    a whole opening the model itself sees a new user turn there, and so does this rule: what follows it is the content.
    A closing among the words changes nothing. In a row without any opening, such as plain text, all counts up to the
    closing, if there is one.
    """

    special_ids: tuple[int, ...] = ()
    openings: tuple[tuple[int, ...], ...] = ()
    closings: tuple[tuple[int, ...], ...] = ()

    def mask(self, ids: Tensor, real: Tensor) -> Tensor:
        """Content mask [B, T] of token ids [B, T], given which positions are real (not padding) [B, T].

        It may be `real` itself: it is only read. A row without any content token keeps all its real tokens, so that it
        can still be routed.
        """
        if not (self.special_ids or self.openings or self.closings):
            return real
        content = real
        if self.special_ids:
            content = content & ~torch.isin(ids, torch.tensor(self.special_ids, device=ids.device, dtype=ids.dtype))
        if self.openings or self.closings:
            content = content & self._last_turn(ids, real)
        return torch.where(content.any(1, keepdim=True), content, real)

    def _last_turn(self, ids: Tensor, real: Tensor) -> Tensor:
        """The words of the last user turn [B, T]."""
        places = torch.arange(ids.shape[1] + 1, device=ids.device)  # between tokens
        closed = [_ends(ids, real, c) for c in self.closings]
        at = _last(_any(closed, real), places)  # where the last closing ends [B], 0 for none
        longest = places[:1].expand(len(ids))
        for mark, hits in zip(self.closings, closed, strict=True):
            longest = torch.where(hits.gather(1, at[:, None])[:, 0], longest.clamp(min=len(mark)), longest)
        closing = torch.where(at > 0, at - longest, ids.shape[1])
        opened = [_ends(ids, real, o) for o in self.openings]
        open_still = [h & (places - len(o) >= at[:, None]) for o, h in zip(self.openings, opened, strict=True)]
        unanswered = _last(_any(open_still, real), places)  # a turn with no closing of its own
        start = torch.where(
            unanswered > 0, unanswered, _last(_any(opened, real) & (places <= closing[:, None]), places)
        )
        end = torch.where(unanswered > 0, ids.shape[1], closing)
        return (places[:-1] >= start[:, None]) & (places[:-1] < end[:, None])

    def to_json(self) -> dict[str, Any]:
        marks = {"openings": self.openings, "closings": self.closings}
        return {"special_ids": list(self.special_ids)} | {k: [list(x) for x in v] for k, v in marks.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ContentRule:
        """The rule that `to_json` wrote. A fixed prefix and suffix, as written once, are an opening and a closing."""
        marks = []
        for name, once in (("openings", "prefix"), ("closings", "suffix")):
            found = data.get(name, [data[once]] if data.get(once) else [])
            marks.append(tuple(tuple(int(i) for i in mark) for mark in found if mark))
        return cls(tuple(data.get("special_ids", ())), *marks)


def _ends(ids: Tensor, real: Tensor, mark: tuple[int, ...]) -> Tensor:
    """Where a token sequence ends in rows [B, T]: [B, T + 1], place j standing before token j."""
    n = len(mark)
    if n > ids.shape[1]:
        return torch.zeros(len(ids), ids.shape[1] + 1, dtype=torch.bool, device=ids.device)
    same = ids.unfold(1, n, 1) == torch.tensor(mark, device=ids.device, dtype=ids.dtype)
    return F.pad((same & real.unfold(1, n, 1)).all(2), (n, 0))


def _any(hits: Sequence[Tensor], real: Tensor) -> Tensor:
    """Whether any of them hits [B, T + 1]."""
    none = torch.zeros(real.shape[0], real.shape[1] + 1, dtype=torch.bool, device=real.device)
    return torch.stack([none, *hits]).any(0)


def _last(hits: Tensor, places: Tensor) -> Tensor:
    """The last place that hits [B], 0 for none."""
    return (hits * places).amax(1)


def last_content(content: Tensor) -> Tensor:
    """Index [B] of the last content token of each row of a content mask [B, T]."""
    steps = torch.arange(1, content.shape[1] + 1, device=content.device)
    return (content * steps).argmax(1)


@dataclass(frozen=True)
class Row:
    """Token ids of a prompt and, when there is one, its target (ending in EOS where the tokenizer has one)."""

    prompt: tuple[int, ...]
    target: tuple[int, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt + self.target

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


@dataclass
class Batch:
    """Padded rows. `input_ids`, `attention_mask` [B, T]; `labels` [B, T] with -100 where nothing is supervised.

    `content` [B, T] marks the prompt's content tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    content: Tensor
    labels: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(t.to(device) for t in (self.input_ids, self.attention_mask, self.content, self.labels)))


@dataclass
class PromptEncoder:
    """Renders prompts and targets for one tokenizer.

    Args:
        tokenizer: of the base.
        chat: render prompts as a user turn of the tokenizer's chat template, with the generation prompt.
        system: an optional system message for chat rendering.
    """

    tokenizer: PreTrainedTokenizerBase
    chat: bool = False
    system: str | None = None
    rule: ContentRule = field(init=False)

    def __post_init__(self) -> None:
        self._template = ChatTemplate(self.tokenizer, self.system) if self.chat else None
        marks = (self._template.openings, self._template.closings) if self._template else ()
        self.rule = ContentRule(tuple(sorted(self.special)), *marks)

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids of special tokens."""
        return special_ids(self.tokenizer)

    @cached_property
    def eos(self) -> tuple[int, ...]:
        """What ends an answer: the chat template's end of turn, else the tokenizer's EOS, () when there is none."""
        turn = self._template.end if self._template else None
        eos = self.tokenizer.eos_token_id if turn is None else turn
        return () if eos is None else (int(eos),)

    @property
    def pad(self) -> int:
        """What fills up rows of a batch: the tokenizer's padding token, else EOS, else 0."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else (self.eos[0] if self.eos else 0)

    def prompt(self, text: Prompt) -> Row:
        """Token row of a prompt alone, as generation starts from it.

        Raises:
            InputError: it has no tokens.
            UsageError: a conversation, and there is no chat template, or one that does not take it.
        """
        return _row(self._start(text)[1])

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> Row:
        """Token row of a conversation that ends with a user's message, rendered as a whole.

        Args:
            messages: `role` (user or assistant) and `content` of each. Without a chat template, exactly one.
        """
        if self._template is not None:
            return _row(self._template.ids(self._template.text(messages)))
        if len(messages) != 1:
            raise _needs_template()
        return self.prompt(messages[0]["content"])

    def pair(self, prompt: Prompt, target: str, *, eos: bool = True) -> Row:
        """Token row of a prompt followed by its target.

        The target begins as decoding begins: in plain text after a space, in a chat template right behind the
        generation prompt, or behind the white space the template itself puts there. Its ids come from the joint
        encoding, so that no tokenizer adds a stray word-start piece. When the tokenizer merges across the boundary the
        prompt keeps the tokens that generation would start from and the target is encoded behind them, so that decoding
        continues exactly there.
        """
        text, start = self._start(prompt)
        if self._template is not None:
            said = target.lstrip()
            said = self._template.lead + said if said else ""
        else:
            said = target if text[-1:].isspace() or target[:1].isspace() else f" {target}"
        joint = self._joint(text + said)
        whole = joint[: len(start)] == start and len(joint) > len(start)
        tail = joint[len(start) :] if whole else self._behind(said)
        if not tail:
            raise InputError("The target has no tokens.", hint="Give a target with at least one character.")
        return Row(start, tail + (self.eos if eos else ()))

    def unwritable(self, row: Row) -> tuple[str, ...]:
        """Tokens of a row's target that no answer shows: special ones, and what stands for text unknown to the base."""
        said = row.target[:-1] if self.eos and row.target[-1:] == self.eos else row.target
        return tuple(str(self.tokenizer.convert_ids_to_tokens(i)) for i in dict.fromkeys(said) if i in self.special)

    def _start(self, prompt: Prompt) -> tuple[str, tuple[int, ...]]:
        """The text that generation starts from, and its ids."""
        if self._template is not None:
            talk = prompt if isinstance(prompt, Conversation) else Conversation((), prompt)
            text = self._template.text(talk.messages)
            return text, self._template.ids(text)
        if isinstance(prompt, Conversation):
            raise _needs_template()
        return prompt, self._joint(prompt)

    def _joint(self, text: str) -> tuple[int, ...]:
        """Ids of a whole text, with what the tokenizer puts before texts unless a template does; nothing ends them."""
        ids = self._ids(text, self._template is None)
        return ids[: len(ids) - self._behind_texts] if self._template is None else ids

    def _ids(self, text: str, special: bool) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    @cached_property
    def _behind_texts(self) -> int:
        """How many tokens the tokenizer puts behind every text, such as an end or a separator."""
        whole, bare = self._ids("a", True), self._ids("a", False)
        behind = len(whole) - len(bare)
        return next((behind - k for k in range(behind + 1) if whole[k : k + len(bare)] == bare), 0)

    def _behind(self, text: str) -> tuple[int, ...]:
        """Ids of a text that stands behind another: without the piece some tokenizers put where a text begins."""
        mark, marked, alone = (self._ids(t, False) for t in ("\n", f"\n{text}", text))
        return marked[len(mark) :] if text and marked[: len(mark)] == mark else alone

    def batch(self, rows: Sequence[Row], *, side: str = "left") -> Batch:
        """Pad rows to one batch; `side` is where the padding goes."""
        width = max(len(r) for r in rows)
        ids = torch.full((len(rows), width), self.pad, dtype=torch.long)
        real = torch.zeros(len(rows), width, dtype=torch.long)
        prompt_part = torch.zeros(len(rows), width, dtype=torch.bool)
        labels = torch.full((len(rows), width), -100, dtype=torch.long)
        for i, row in enumerate(rows):
            at = width - len(row) if side == "left" else 0
            end, boundary = at + len(row), at + len(row.prompt)
            ids[i, at:end] = torch.tensor(row.ids)
            real[i, at:end] = 1
            prompt_part[i, at:boundary] = True
            labels[i, boundary:end] = torch.tensor(row.target, dtype=torch.long)
        return Batch(ids, real, self.rule.mask(ids, prompt_part), labels)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of generated ids: special tokens dropped, surrounding whitespace stripped."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def _needs_template() -> UsageError:
    return UsageError(
        "A conversation of several messages needs a chat template.",
        hint="Use the base's with --chat, where it has one, or ask one question alone.",
    )


def _row(ids: tuple[int, ...]) -> Row:
    if not ids:
        raise InputError("The prompt has no tokens.", hint="Give a prompt with at least one character.")
    return Row(ids)
