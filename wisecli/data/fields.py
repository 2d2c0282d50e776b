"""Read typed values out of a raw JSON object and note every fault instead of stopping at the first.

A `Fields` wraps one record. Each method asks for a key as one type and returns something usable even when the value is
wrong, having added a sentence such as `"rephrases" must be a list of strings, not a number` to `problems`. Keys that
were asked for are remembered, so that what is left over can be kept (`rest`). A value of which only a part could be
carried, as the first of several alternative answers, counts as left over.

It knows no format: which keys exist, and what they mean, is in `formats`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from wisecli.data.records import KINDS, UNRELATED, Probe

_NO_ANSWER = "<|endoftext|>"  # EasyEdit's ground_truth where the caller gives none


class Fields:
    """One raw object and the faults found in it.

    Args:
        raw: the object.
        under: its name inside the record ("locality[2]"); empty for the record itself.
        problems: the list to add faults to; nested objects share their record's.
    """

    def __init__(self, raw: Mapping[str, Any], under: str = "", problems: list[str] | None = None) -> None:
        self.raw = raw
        self.under = under
        self.problems: list[str] = [] if problems is None else problems
        self.used: set[str] = set()

    def fault(self, key: str, what: str) -> None:
        """Note that the value of `key` cannot be used."""
        name = f"{self.under}.{key}" if self.under else key
        self.problems.append(f'"{name}" {what}')

    def take(self, key: str) -> Any:
        """The raw value, None when absent; the key counts as used."""
        self.used.add(key)
        return self.raw.get(key)

    def required(self, key: str) -> str:
        """A text that must be there and hold more than white space."""
        value = self.take(key)
        if key not in self.raw:
            self.fault(key, f"is missing{self._lookalike(key)}")
        elif not isinstance(value, str):
            self.fault(key, f"must be a string, not {kind_of(value)}")
        elif not value.strip():
            self.fault(key, "is empty")
        else:
            return value
        return ""

    def optional(self, key: str) -> str | None:
        """A text, or None when it is absent, null or blank."""
        value = self.take(key)
        if value is None or isinstance(value, str):
            return value if value and value.strip() else None
        self.fault(key, f"must be a string, not {kind_of(value)}")
        return None

    def texts(self, key: str, *, single: bool = True) -> tuple[str, ...]:
        """A list of texts; with `single`, one text as well. Blank ones, and nulls, are left out."""
        value = self.take(key)
        if value is None:
            return ()
        if single and isinstance(value, str):
            value = [value]
        allowed = "a string or a list of strings" if single else "a list of strings"
        if not isinstance(value, list):
            self.fault(key, f"must be {allowed}, not {kind_of(value)}")
            return ()
        wrong = next((v for v in value if v is not None and not isinstance(v, str)), None)
        if wrong is not None:
            self.fault(key, f"must be {allowed}, but holds {kind_of(wrong)}")
            return ()
        return tuple(v for v in value if v and v.strip())

    def first(self, key: str) -> str:
        """The first text of a list that must hold one; where it holds more, the list is left over."""
        texts = self.texts(key)
        if len(texts) > 1:
            self.leave(key)
        if not texts and not self.problems:
            self.fault(key, "is empty")
        return texts[0] if texts else ""

    def before(self, key: str, target: str) -> str | None:
        """The answer that an edit to `target` replaces: a text, or the first of a (nested) list of them.

        None, and the key left over, where there is none: the value is absent, no text, the target itself, or the
        end-of-text token that some tools write in its place. A list with more than one answer is left over as well.
        """
        found = list(_filled(self.raw.get(key)))
        if not found or not all(isinstance(leaf, str) for leaf in found):
            return None
        truth = found[0].strip()
        if truth in (target.strip(), _NO_ANSWER):
            return None
        if len(found) == 1:
            self.used.add(key)
        return truth

    def name(self, key: str) -> str | None:
        """An identifier: a text or an integer, as a text; None when absent."""
        value = self.take(key)
        if value is None:
            return None
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self.required(key) or None

    def mapping(self, key: str) -> dict[str, Any]:
        """An object, empty when absent."""
        value = self.take(key)
        if value is not None and not isinstance(value, dict):
            self.fault(key, f"must be an object, not {kind_of(value)}")
            return {}
        return dict(value or {})

    def child(self, key: str) -> Fields:
        """A nested object as fields of its own, with the same list of problems."""
        return Fields(self.mapping(key), f"{self.under}.{key}" if self.under else key, self.problems)

    def pairs(self, prompt_key: str, answer_key: str, kind: str = UNRELATED) -> tuple[Probe, ...]:
        """Probes from two parallel values: one prompt and its answer, or a list of each.

        An answer may be a list of alternatives (even nested): the first counts, and the whole value is left over.
        Blank prompts are left out.
        """
        prompts, answers = self.take(prompt_key), self.take(answer_key)
        if not isinstance(prompts, list):
            prompts, answers = [prompts], [answers]
        elif not isinstance(answers, list):
            answers = [answers] * (len(prompts) if answers is None else 1)
        if len(answers) != len(prompts):
            self.fault(prompt_key, f'has {len(prompts)} entries, but "{answer_key}" has {len(answers)}')
            return ()
        if any(len(list(_filled(answer))) > 1 for answer in answers):
            self.leave(answer_key)
        self.texts(prompt_key)  # notes prompts of a wrong type; they are passed over below
        return tuple(
            Probe(prompt, self._first_text(answer_key, answer), kind)
            for prompt, answer in zip(prompts, answers, strict=True)
            if isinstance(prompt, str) and prompt.strip()
        )

    def probes(self, key: str) -> tuple[Probe, ...]:
        """Probes in the native schema: a list of {"prompt", "answer"?, "kind"?}."""
        value = self.take(key)
        if value is None:
            return ()
        if not isinstance(value, list):
            self.fault(key, f"must be a list of objects, not {kind_of(value)}")
            return ()
        found = [self._probe(f"{key}[{i}]", entry) for i, entry in enumerate(value)]
        return tuple(probe for probe in found if probe is not None)

    def leave(self, key: str) -> None:
        """Count a key as left over although it was read: not all of it could be carried."""
        self.used.discard(key)

    def rest(self) -> dict[str, Any]:
        """What no method asked for, or was left over, in the order of the record."""
        return {key: value for key, value in self.raw.items() if key not in self.used}

    def _probe(self, name: str, entry: Any) -> Probe | None:
        if not isinstance(entry, dict):
            self.fault(name, f"must be an object, not {kind_of(entry)}")
            return None
        part = Fields(entry, name, self.problems)
        prompt, answer = part.required("prompt"), self._first_text(f"{name}.answer", entry.get("answer"))
        kind = part.optional("kind") or UNRELATED
        if kind not in KINDS:
            part.fault("kind", f'must be one of {", ".join(KINDS)}, not "{kind}"')
            return None
        return Probe(prompt, answer, kind) if prompt else None

    def _first_text(self, key: str, value: Any) -> str | None:
        """A text, or the first text of a (nested) list; None when there is none."""
        first = next(_filled(value), None)
        if first is None or isinstance(first, str):
            return first
        self.fault(key, f"must be a string or a list of strings, not {kind_of(first)}")
        return None

    def _lookalike(self, key: str) -> str:
        """A remark on a key of the record that is spelled almost like the missing one."""
        close = difflib.get_close_matches(key, [k for k in self.raw if k not in self.used], n=1, cutoff=0.75)
        return f' (is "{close[0]}" a misspelling of it?)' if close else ""


def _filled(value: Any) -> Iterator[Any]:
    """What a (nested) list holds, in order, but for nulls and blank texts; any other value is its own only entry."""
    if isinstance(value, list):
        for entry in value:
            yield from _filled(entry)
    elif value is not None and (not isinstance(value, str) or value.strip()):
        yield value


def kind_of(value: Any) -> str:
    """What a JSON value is, in words: "a string", "a number" .."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = ((str, "a string"), (int | float, "a number"), (list, "a list"), (dict, "an object"))
    return next((name for kinds, name in names if isinstance(value, kinds)), type(value).__name__)
