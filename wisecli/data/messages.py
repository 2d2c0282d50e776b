"""Read conversations as instruct models are fine-tuned on them: lists of messages that end with what is to be learned.

Two spellings are known: `{"role": .., "content": ..}`, where content may be a list of text parts, and ShareGPT's
`{"from": .., "value": ..}`. The last user turn is the prompt, the answer behind it the target; what stands before is
kept as it is. Whether a chat template takes such a conversation is not for a reader to say.
"""

from __future__ import annotations

from typing import Any

from wisecli.data.fields import Fields, kind_of
from wisecli.data.records import Said

_ROLES = {
    **{"system": "system", "developer": "system"},
    **{"user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant", "model": "assistant"},
}
_KNOWN = "system, user, assistant"
_SPELLINGS = (("role", "content"), ("from", "value"))


def read_prompt(fields: Fields, key: str) -> tuple[tuple[Said, ...], str]:
    """The messages before the last user turn, which must end the list, and its words."""
    said = _messages(fields, key)
    if not said or said[-1][0] != "user":
        return (), _no_end(fields, key, "user", said)
    return said[:-1], said[-1][1]


def read_answered(fields: Fields, key: str) -> tuple[tuple[Said, ...], str, str]:
    """The messages before the last user turn, its words, and the assistant's answer, which must end the list."""
    said = _messages(fields, key)
    if len(said) < 2 or [role for role, _ in said[-2:]] != ["user", "assistant"]:
        return (), "", _no_end(fields, key, "user, then a message of the assistant", said)
    return said[:-2], said[-2][1], said[-1][1]


def _no_end(fields: Fields, key: str, wanted: str, said: tuple[Said, ...]) -> str:
    if said:
        last = ", ".join(role for role, _ in said[-3:])
        fields.fault(key, f"must end with a message of the {wanted}; it ends with {last}")
    return ""


def _messages(fields: Fields, key: str) -> tuple[Said, ...]:
    """All messages of a list, () and a fault where one cannot be used."""
    value, known = fields.take(key), len(fields.problems)
    if not isinstance(value, list) or not value:
        fields.fault(key, "is empty" if value == [] else f"must be a list of messages, not {kind_of(value)}")
        return ()
    said = [_message(fields, f"{key}[{i}]", entry, i) for i, entry in enumerate(value)]
    if any(len(entry) > 2 for entry in value if isinstance(entry, dict)):
        fields.leave(key)  # names, weights and the like
    return tuple(m for m in said if m is not None) if len(fields.problems) == known else ()


def _message(fields: Fields, name: str, entry: Any, at: int) -> Said | None:
    if not isinstance(entry, dict):
        fields.fault(name, f"must be an object, not {kind_of(entry)}")
        return None
    part = Fields(entry, name, fields.problems)
    who, what = next((s for s in _SPELLINGS if s[0] in entry), _SPELLINGS[0])
    given, known = part.required(who), len(fields.problems)
    role = _ROLES.get(given)
    if given and role is None:
        part.fault(who, f'must be one of {_KNOWN}, not "{given}"')
    elif role == "system" and at > 0:
        part.fault(who, "is system, which only the first message may be")
    content = _text(part, what)
    return (role, content) if role is not None and len(fields.problems) == known else None


def _text(part: Fields, key: str) -> str:
    """A message's text, which may come in parts."""
    value = part.raw.get(key)
    if not isinstance(value, list):
        return part.required(key)
    texts = [p.get("text") if isinstance(p, dict) else p for p in value]
    other = next((v for v, t in zip(value, texts, strict=True) if not isinstance(t, str)), None)
    if other is not None:
        kind = other.get("type", "an object") if isinstance(other, dict) else kind_of(other)
        part.fault(key, f"holds a part that is no text: {kind}")
        return ""
    text = "".join(t for t in texts if isinstance(t, str))
    if not text.strip():
        part.fault(key, "is empty")
    return text
