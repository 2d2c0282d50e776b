"""What one edit is: `EditRecord`, the locality prompts that come with it: `Probe`, and what stands before a prompt in a
conversation: `Conversation`.

Both are values: made once, never changed, written as JSON in the tool's own schema (`to_json`). The text is kept as it
was given, with two exceptions that make prompt + separator + target well defined: white space at the end of a prompt
(and of a rephrase) is dropped, and so is white space around the target, the truth and the texts of `ood`. A locality
answer is *not* stripped: in the public files some continue the prompt in the middle of a word.

Nothing here reads files, knows other formats, tokenizes, or decides which of two contradicting edits wins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wisecli.errors import InputError

UNRELATED = "unrelated"
SAME_RELATION = "same-relation"
SAME_SUBJECT = "same-subject"
KINDS = (UNRELATED, SAME_RELATION, SAME_SUBJECT)


Said = tuple[str, str]  # role and content of a message


@dataclass(frozen=True, slots=True)
class Conversation:
    """A user's words and the messages before them, put to a base as a whole; needs a chat template.

    Args:
        history: a system message, earlier turns, or both; roles are system, user and assistant.
        prompt: the words of the last user turn.
    """

    history: tuple[Said, ...]
    prompt: str

    def __str__(self) -> str:
        return self.prompt

    @property
    def messages(self) -> list[dict[str, str]]:
        """All of them, as chat templates take them."""
        return [{"role": role, "content": content} for role, content in (*self.history, ("user", self.prompt))]


Prompt = str | Conversation


def asked_behind(history: Sequence[Said] | None, prompt: str) -> Prompt:
    """A prompt behind the messages before it; the text alone where there are none."""
    return Conversation(said_of(history), prompt) if history else prompt


def said_of(messages: Iterable[Sequence[str]]) -> tuple[Said, ...]:
    """Messages read from JSON, as values."""
    return tuple((role, content) for role, content in messages)


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt whose answer an edit must leave alone.

    Args:
        prompt: the text to ask.
        answer: what the dataset gives as the answer; None where it gives none. The baseline is the base's own answer.
        kind: how far from the edit it is. The two near kinds share its relation (another subject) or its subject
            (another relation).
    """

    prompt: str
    answer: str | None = None
    kind: str = UNRELATED

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise InputError("the prompt of a locality probe is empty", hint="Give the text to ask.")
        if self.kind not in KINDS:
            raise InputError(f'"{self.kind}" is no kind of locality probe', hint=f"Use one of: {', '.join(KINDS)}.")
        if self.answer is not None and not self.answer.strip():
            object.__setattr__(self, "answer", None)

    @property
    def near(self) -> bool:
        """Whether it shares the edit's subject or relation."""
        return self.kind != UNRELATED

    def to_json(self) -> dict[str, str]:
        """The probe in the native schema; a missing answer and the default kind are left out."""
        out = {"prompt": self.prompt}
        if self.answer is not None:
            out["answer"] = self.answer
        if self.near:
            out["kind"] = self.kind
        return out


@dataclass(frozen=True, slots=True)
class EditRecord:
    """One fact to change.

    Args:
        id: unique in its stream.
        prompt: the text after which the target must follow; of a conversation, the words of its last user turn.
        target: the text to reach, without a leading space.
        subject: what the fact is about, where the dataset says so.
        rephrases: other wordings of the prompt, for generalization.
        locality: prompts whose answers must not change.
        irrelevant: texts used *while* editing as out-of-scope examples; disjoint from `locality`.
        truth: the answer before the edit, without a leading space; None where the dataset does not give it.
        ood: texts that follow from the edit in other words, out of its distribution; scored as wholes.
        history: the messages before the prompt, where the record is a conversation. All that is asked about the record
            is asked behind them.
        meta: whatever else the record carried; kept, never interpreted.
        source: where it was read, "edits.jsonl:7". Not part of the value: ignored by `==` and by `to_json`.
    """

    id: str
    prompt: str
    target: str
    subject: str | None = None
    rephrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    irrelevant: tuple[str, ...] = ()
    truth: str | None = None
    ood: tuple[str, ...] = ()
    history: tuple[Said, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name, text in (("id", self.id), ("prompt", self.prompt), ("target", self.target)):
            if not text.strip():
                raise InputError(f'the "{name}" of an edit is empty', hint="Give every edit a prompt and a target.")
        tidy = {
            "prompt": self.prompt.rstrip(),
            "target": self.target.strip(),
            "subject": self.subject if self.subject and self.subject.strip() else None,
            "rephrases": _texts(r.rstrip() for r in self.rephrases),
            "locality": tuple(self.locality),
            "irrelevant": _texts(self.irrelevant),
            "truth": self.truth.strip() or None if self.truth else None,
            "ood": _texts(text.strip() for text in self.ood),
            "history": said_of(self.history),
        }
        for name, value in tidy.items():
            object.__setattr__(self, name, value)

    @property
    def asked(self) -> Prompt:
        """The prompt as it is put to a base: behind the messages before it."""
        return asked_behind(self.history, self.prompt)

    @classmethod
    def of_entry(cls, entry: Mapping[str, Any]) -> EditRecord:
        """What a ledger's entry with texts knows of an edit."""
        subject, history = entry.get("subject"), said_of(entry.get("history", ()))
        return cls(entry["id"], entry["prompt"], entry["target"], subject=subject, history=history)

    def to_json(self) -> dict[str, Any]:
        """The record in the native schema; empty fields are left out, and a conversation's prompt is its messages."""
        asked = self.asked
        prompt = asked.messages if isinstance(asked, Conversation) else asked
        out: dict[str, Any] = {"id": self.id, "prompt": prompt, "target": self.target}
        optional = {
            "subject": self.subject,
            "rephrases": list(self.rephrases),
            "locality": [probe.to_json() for probe in self.locality],
            "irrelevant": list(self.irrelevant),
            "truth": self.truth,
            "ood": list(self.ood),
            "meta": dict(self.meta),
        }
        return out | {name: value for name, value in optional.items() if value}


def content_id(prompt: str, target: str) -> str:
    """The id of a record that brings none: the first 12 hex digits of the SHA-256 of its prompt and target."""
    text = f"{prompt}\0{target}".encode(errors="surrogatepass")
    return hashlib.sha256(text).hexdigest()[:12]


def _texts(values: Iterable[str]) -> tuple[str, ...]:
    """The texts that hold more than white space, in order."""
    return tuple(value for value in values if value.strip())


def ordered_ids(wanted: Sequence[str | None], contents: Sequence[tuple[str, str]]) -> list[str]:
    """One id per record: the one it brought, else one derived from its content ("-2", "-3" .. for repeats).

    Args:
        wanted: the ids the records brought, None where there is none.
        contents: (prompt, target) of each record, in the same order.
    """
    taken = {name for name in wanted if name is not None}
    repeats: dict[str, int] = {}
    ids = []
    for given, (prompt, target) in zip(wanted, contents, strict=True):
        name = given if given is not None else _free_id(content_id(prompt, target), taken, repeats)
        taken.add(name)
        ids.append(name)
    return ids


def _free_id(stem: str, taken: set[str], repeats: dict[str, int]) -> str:
    """`stem`, or the first of stem-2, stem-3 .. that is not taken; `repeats` remembers where the last search ended."""
    count = repeats.get(stem, 0) + 1
    while (name := stem if count == 1 else f"{stem}-{count}") in taken:
        count += 1
    repeats[stem] = count
    return name
