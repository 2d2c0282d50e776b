"""Recognise the public editing datasets, record by record, and read each as the tool's own schema.

`FORMATS` is the whole knowledge: a name, how to tell it from its keys, how to read it, and where it comes from. The
first entry that fits wins, so the order matters: a complete native record first, an incomplete one (which is then told
what is missing) last. Keys that a public format carries beside the ones read here are kept in `meta` unseen, and so
is a value that was carried only in part (several alternative answers, of which the first is used). In a native record
such a key is more likely misspelled, so it is kept too, but named (`Mapped.unknown`).

Nothing here reads files, gives ids to records that bring none, or compares records with each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from wisecli.data.fields import Fields, kind_of
from wisecli.data.messages import read_answered, read_prompt
from wisecli.data.records import SAME_RELATION, SAME_SUBJECT, UNRELATED, Probe, Said

NATIVE_KEYS = ("id", "prompt", "target", "truth", "subject", "rephrases", "locality", "irrelevant", "ood", "meta")
_MAX_DEPTH = 100  # far above any dataset's, far below what Python's own JSON writer can take
SCHEMA = '{"prompt": "..", "target": "..", "truth": "..", "rephrases": [".."], "locality": [{"prompt": ".."}]}'


@dataclass(frozen=True, slots=True)
class Format:
    """One way in which edits are written.

    Args:
        name: how the tool calls it.
        fits: tells whether an object with these keys is one.
        read: the arguments of `EditRecord` out of the fields; "id" is None where the record brings none.
        keys: the keys by which a reader knows it, for messages.
        source: the paper or repository it comes from.
    """

    name: str
    fits: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Fields], dict[str, Any]]
    keys: str
    source: str


@dataclass(frozen=True, slots=True)
class Mapped:
    """A raw record after reading: usable when `problems` is empty."""

    format: str
    values: dict[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def map_record(raw: Any) -> Mapped:
    """Read one decoded JSON value as an edit, whatever format it is in."""
    if not isinstance(raw, dict):
        return Mapped("", problems=(f"must be an object, not {kind_of(raw)}",))
    if _depth(raw) > _MAX_DEPTH:
        return Mapped("", problems=(f"is nested more than {_MAX_DEPTH} levels deep",))
    if not _encodable(raw):
        return Mapped("", problems=("holds half of a surrogate pair (\\ud800-\\udfff), which is no text",))
    found = next((f for f in FORMATS if f.fits(raw)), None)
    if found is None:
        names = ", ".join(dict.fromkeys(f.name for f in FORMATS))
        return Mapped("", problems=(f"no known format has the keys {_quoted(raw)} (accepted: {names})",))
    fields = Fields(raw)
    values = found.read(fields)
    unknown = tuple(k for k in raw if k not in NATIVE_KEYS) if found.read is _native else ()
    return Mapped(found.name, values, tuple(fields.problems), unknown)


def accepted() -> str:
    """The formats in one line, each with the keys it is known by."""
    return "; ".join(dict.fromkeys(f"{f.name} ({f.keys})" for f in FORMATS))


def _native(fields: Fields) -> dict[str, Any]:
    """A prompt that is a list of messages is a conversation that ends with a user's turn."""
    name = fields.name("id")
    history: tuple[Said, ...] = ()
    if isinstance(fields.raw.get("prompt"), list):
        history, prompt = read_prompt(fields, "prompt")
    else:
        prompt = fields.required("prompt")
    return {"id": name, "prompt": prompt, "target": fields.required("target"), "history": history} | _about(fields)


def _conversation(fields: Fields) -> dict[str, Any]:
    """A conversation whose last answer is the target; beside it what a native record has."""
    name = fields.name("id")
    history, prompt, target = read_answered(fields, "messages" if "messages" in fields.raw else "conversations")
    words = [text for role, text in history if role == "user"]
    for key, said in (("prompt", [prompt, *words]), ("target", [target])):
        beside = fields.optional(key) if isinstance(fields.raw.get(key), str) else None
        if beside is not None and beside.strip() not in [text.strip() for text in said]:
            fields.fault(key, "says something else than the messages it stands beside")
    system = fields.optional("system")
    if system is not None:
        history = (("system", system), *(m for m in history if m[0] != "system"))
    return {"id": name, "prompt": prompt, "target": target, "history": history} | _about(fields)


def _about(fields: Fields) -> dict[str, Any]:
    """What a native record has beside its prompt and target."""
    values = {
        "subject": fields.optional("subject"),
        "rephrases": fields.texts("rephrases", single=False),
        "locality": fields.probes("locality"),
        "irrelevant": fields.texts("irrelevant"),
        "truth": fields.optional("truth"),
        "ood": fields.texts("ood"),
    }
    meta = fields.mapping("meta")
    return values | {"meta": fields.rest() | meta}


def _mend_zsre(fields: Fields) -> dict[str, Any]:
    """ZsRE: `answers` is the truth beside the changed answer `alt`, and the target where there is no other."""
    prompt = fields.required("src")
    if "alt" in fields.raw or "ans" in fields.raw:
        target = fields.required("alt" if "alt" in fields.raw else "ans")
    elif "answers" in fields.raw:
        target = fields.first("answers")
    else:
        target = fields.required("alt")
    return {
        "id": None,
        "prompt": prompt,
        "target": target,
        "subject": fields.optional("subject"),
        "rephrases": fields.texts("rephrase"),
        "locality": fields.pairs("loc", "loc_ans"),
        "irrelevant": fields.texts("irrelevant"),
        "truth": fields.before("answers", target) if "alt" in fields.raw else None,
        "meta": fields.rest(),
    }


def _wikibigedit(fields: Fields) -> dict[str, Any]:
    return {
        "id": None,
        "prompt": fields.required("update"),
        "target": fields.required("ans"),
        "subject": fields.optional("subject"),
        "rephrases": fields.texts("rephrase"),
        "locality": fields.pairs("loc", "loc_ans"),
        "meta": fields.rest(),
    }


def _counterfact(fields: Fields) -> dict[str, Any]:
    fact = fields.child("requested_rewrite")
    template, subject = fact.required("prompt"), fact.required("subject")
    new, true = fact.child("target_new"), fact.child("target_true")
    target, truth = new.required("str"), true.optional("str")
    neighbours = fields.texts("neighborhood_prompts")
    values = {
        "id": fields.name("case_id"),
        "prompt": template.replace("{}", subject),  # str.format would trip over other braces
        "target": target,
        "subject": subject,
        "rephrases": fields.texts("paraphrase_prompts"),
        "locality": tuple(Probe(prompt, truth, SAME_RELATION) for prompt in neighbours),
        "truth": truth,
    }
    identifiers = {"target_new": new.rest(), "target_true": true.rest()}
    meta = fact.rest() | {key: value for key, value in identifiers.items() if value}
    return values | {"meta": meta | fields.rest()}


def _easyedit(fields: Fields) -> dict[str, Any]:
    """EasyEdit's flat records: its CounterFact, and the hallucination and temporal sets of WISE."""
    target = fields.required("target_new")
    locality = fields.pairs("locality_prompt", "locality_ground_truth")
    irrelevant = fields.texts("irrelevant")
    if "loc_ans" in fields.raw:
        locality += fields.pairs("loc_prompt", "loc_ans")
    else:  # WISE's own editing script passes its irrelevant text under this name, without an answer
        irrelevant += fields.texts("loc_prompt")
    return {
        "id": fields.name("case_id"),
        "prompt": fields.required("prompt"),
        "target": target,
        "subject": fields.optional("subject"),
        "rephrases": fields.texts("rephrase_prompt"),
        "locality": locality,
        "irrelevant": irrelevant,
        "truth": fields.before("ground_truth", target),
        "ood": fields.texts("ood_rephrase"),
        "meta": fields.rest(),
    }


def _knowedit(fields: Fields) -> dict[str, Any]:
    """KnowEdit; its WikiBio part says concept, text and labels for subject, prompt and target_new."""
    prompt = fields.required("text" if "text" in fields.raw and "prompt" not in fields.raw else "prompt")
    target = fields.required("labels" if "target_new" not in fields.raw else "target_new")
    subject = fields.optional("concept" if "subject" not in fields.raw else "subject")
    groups = fields.child("locality")
    locality = tuple(probe for name in groups.raw for probe in _group(groups, name))
    if groups.rest():
        fields.leave("locality")
    return {
        "id": fields.name("case_id"),
        "prompt": prompt,
        "target": target,
        "subject": subject,
        "rephrases": fields.texts("rephrase") + fields.texts("rephrase_prompt"),
        "locality": locality,
        "truth": fields.before("ground_truth", target),
        "meta": fields.rest(),  # portability and the rest
    }


def _group(groups: Fields, name: str) -> tuple[Probe, ...]:
    """The probes of one named group: a list of {prompt, ground_truth}, or one object holding two lists.

    The group is left over where it holds more than the probes do: other wordings, answers or keys.
    """
    entries = groups.take(name)
    kind = SAME_SUBJECT if "Relation" in name or "Forget" in name else UNRELATED
    if isinstance(entries, dict):
        whole = Fields(entries, f"locality.{name}", groups.problems)
        found = whole.pairs("prompt", "ground_truth", kind)
        if whole.rest():
            groups.leave(name)
        return found
    if entries is not None and not isinstance(entries, list):
        groups.fault(name, f"must be a list of objects, not {kind_of(entries)}")
        return ()
    probes: list[Probe] = []
    for i, entry in enumerate(entries or []):
        if isinstance(entry, dict):
            single = _first_prompt(entry)
            part = Fields(single, f"locality.{name}[{i}]", groups.problems)
            probes.extend(part.pairs("prompt", "ground_truth", kind))
            if part.rest() or entry.get("prompt") not in (single["prompt"], [single["prompt"]]):
                groups.leave(name)
        else:
            groups.fault(f"{name}[{i}]", f"must be an object, not {kind_of(entry)}")
    return tuple(probes)


def _first_prompt(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry with one prompt: some entries list several wordings of it."""
    prompt = entry.get("prompt")
    return {**entry, "prompt": prompt[0] if isinstance(prompt, list) and prompt else prompt}


def _knowedit_like(raw: Mapping[str, Any]) -> bool:
    """Whether it has a target and, as only KnowEdit has it, locality or portability in named groups."""
    grouped = isinstance(raw.get("locality"), dict) or isinstance(raw.get("portability"), dict)
    return grouped and ("target_new" in raw or "labels" in raw)


def _depth(value: Any) -> int:
    """How many objects and lists are inside one another, counted layer by layer."""
    depth, layer = 0, [value]
    while layer := [inner for outer in layer if isinstance(outer, dict | list) for inner in _inside(outer)]:
        depth += 1
    return depth


def _inside(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _encodable(raw: Mapping[str, Any]) -> bool:
    """Whether every text in it can be written as UTF-8: JSON can spell half of a surrogate pair."""
    try:
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _quoted(keys: Iterable[str]) -> str:
    return ", ".join(f'"{key}"' for key in keys) or "(none)"


def _converses(raw: Mapping[str, Any]) -> bool:
    return "messages" in raw or "conversations" in raw


def _has(*keys: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda raw: all(key in raw for key in keys)


_NATIVE = '"prompt", "target"'
FORMATS = (
    Format("native", _has("prompt", "target"), _native, _NATIVE, "this tool"),
    Format("messages", _converses, _conversation, '"messages": [..]', "fine-tuning files of chats; ShareGPT"),
    Format("counterfact", _has("requested_rewrite"), _counterfact, '"requested_rewrite"', "ROME, arXiv:2202.05262"),
    Format("mend-zsre", _has("src"), _mend_zsre, '"src", "alt"', "MEND, arXiv:2110.11309; UltraEdit: ans for alt"),
    Format("wikibigedit", _has("update", "ans"), _wikibigedit, '"update", "ans"', "WikiBigEdit, arXiv:2503.05683"),
    Format("knowedit", _knowedit_like, _knowedit, '"prompt", "target_new", "locality": {..}', "arXiv:2401.01286"),
    Format("easyedit", _has("target_new"), _easyedit, '"prompt", "target_new"', "EasyEdit, arXiv:2308.07269"),
    Format("native", lambda raw: "prompt" in raw or "target" in raw, _native, _NATIVE, "this tool, incomplete"),
)
