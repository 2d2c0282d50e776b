"""Reading a results.json and checking that everything a reader touches has the right form.

`SHAPE` says what may stand where. Every key may be missing or null and unknown keys are left alone, so a reader asks
with `get`; a value that is there but of the wrong form is a fault, and all faults are named at once. What the figures
mean is the evaluation's matter, and no figure is computed anew here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wisecli.errors import InputError

SCHEMA = "wise-eval"
RESULTS = "results.json"
MAJOR = 2

SCORES = {"rel": "Reliability", "gen": "Generalization", "loc": "Locality", "loc_near": "Locality near"}
"""Scores in reading order with their names."""
SHORT = {"rel": "Rel", "gen": "Gen", "loc": "Loc", "loc_near": "Loc near"}
PROMPTS = {"rel": "edits", "gen": "paraphrases", "loc": "unrelated prompts", "loc_near": "near prompts"}
METRICS = {"exact": "exact", "token": "token", "match": "match"}
KINDS = {
    "edit": "edits",
    "rephrase": "paraphrases",
    "unrelated": "unrelated",
    "same-relation": "near, same relation",
    "same-subject": "near, same subject",
}
NEAR = ("same-relation", "same-subject")

Results = Mapping[str, Any]
"""A checked results.json."""

# A type or a tuple of types stands for a value, [x] for a list of x, a mapping for an object ("*": any key).
_NUMBER = (int, float)
_SHARE = "share"
_S = {"before": _SHARE, "after": _SHARE, "before_interval": [_SHARE], "after_interval": [_SHARE], "n": int}
_SCORES = {"*": {"*": _S}}
_CHANGE = {"before": _NUMBER, "after": _NUMBER}
_CURVE = {"fpr": [_SHARE], "tpr": [_SHARE]}
_ITEM = {
    "edit": (str, int),
    "kind": str,
    "prompt": str,
    "target": str,
    "before": str,
    "after": str,
    "open": str,
    "exact": [(bool, int)],
    "route": {"memory": int, "indicator": _NUMBER, "epsilon": _NUMBER, "nearest_edit": (str, int)},
}
_WILKE = {"es": _NUMBER, "gs": _NUMBER, "ls": _NUMBER, "ers": [_NUMBER], "ors": [_NUMBER]}
SHAPE: dict[str, Any] = {
    "protocol": {"name": str, "t": [int], "checkpoints": [int], "text": str},
    "metrics": {"*": str},
    "method": str,
    "dataset": {"name": str, "file": str, "revision": str, "digest": str, "edits": int, "superseded": int},
    "base": {"name": str, "label": str, "model_type": str, "parameters": _NUMBER, "dtype": str, "digest": str},
    "side_memory": {
        "path": str,
        "router": str,
        "edits": int,
        "took": int,
        "config": {},
        "versions": {},
        "memories": [{"epsilon": {"*": _NUMBER}, "density": _NUMBER, "origin": {}}],
    },
    "config": {},
    "chat": bool,
    "environment": {},
    "seeds": {},
    "scores": _SCORES,
    "average": {"*": _S},
    "open": {"*": _SHARE},
    "perplexity": {"*": {"before": {"*": _NUMBER}, "after": {"*": _NUMBER}, "n": int}},
    "ood": {"token": _S, "example": _S, "routed": _SHARE},
    "probability": {"*": _S},
    "routing": {
        "router": str,
        "epsilon": [_NUMBER],
        "kinds": {"*": {"n": int, "routed": _SHARE, "right_edit": _SHARE}},
        "precision": _SHARE,
        "recall": _SHARE,
        "false_opening": _SHARE,
        "auc": {"*": {"*": _SHARE}},
        "roc": {"*": _CURVE},
    },
    "ability": {"text": str, "passages": int, "tokens": int, "perplexity": _CHANGE, "agreement": _SHARE},
    "harness": {"tasks": {"*": {"*": _CHANGE}}, "samples": {"*": int}, "routed": {"*": _SHARE}},
    "fresh": {"scores": _SCORES},
    "retention": [{"edits": int, "scores": {"*": _SHARE}}],
    "rollbacks": [{"t": int, "groups": int, "scores": _SCORES, "identical": bool}],
    "wilke": {
        "checkpoints": [int],
        **_WILKE,
        "s": [_NUMBER],
        "exact": _WILKE,
        "known": int,
        "edited": int,
        "left_out": int,
    },
    "items": [_ITEM],
    "timings": {"*": _NUMBER},
    "peak_memory": {"*": _NUMBER},
}


def read_results(path: Path) -> dict[str, Any]:
    """A results.json, checked.

    Raises:
        InputError: missing, not JSON, not results of `wise eval`, of another schema, or damaged.
    """
    document = read_document(path)
    check_results(document, str(path))
    return dict(document)


def read_document(path: Path) -> Any:
    """What stands in a file of results, or in that of a folder that wise eval --out wrote; not checked.

    Raises:
        InputError: missing, or not JSON.
    """
    from wisecli.memory.files import read_json

    return read_json(path / RESULTS if path.is_dir() else path, "wise eval --out FOLDER writes FOLDER/results.json.")


def check_results(document: Any, source: str = "results") -> None:
    """Check schema, version and the form of every value that a reader touches.

    Args:
        document: parsed JSON.
        source: what to call it in messages.

    Raises:
        InputError: with every fault in `problems`.
    """
    again = "Make it again with wise eval --out."
    if not isinstance(document, dict) or not isinstance(document.get("scores"), dict):
        raise InputError(f"{source} holds no results of wise eval.", hint="Give a file written by wise eval --out.")
    version = document.get("schema_version")
    if document.get("schema") != SCHEMA:
        raise InputError(f'{source} has the schema {document.get("schema")!r}, not "{SCHEMA}".', hint=again)
    major = str(version).split(".")[0]
    if major != str(MAJOR):
        newer = major.isdigit() and int(major) > MAJOR
        hint = "Read it with a newer wise." if newer else again
        raise InputError(f"{source} has schema version {version}; this wise reads {MAJOR}.x.", hint=hint)
    problems = [*_missing(document), *_faults(document, SHAPE, "")]
    if problems:
        raise InputError(f"{source} is damaged.", hint=again, problems=[f"{source}: {p}" for p in problems])


def _missing(document: Results) -> Iterator[str]:
    for name in ("rel", "gen", "loc"):
        if not isinstance(document["scores"].get(name), dict) or "exact" not in document["scores"][name]:
            yield f"scores.{name}.exact is missing"


def _faults(value: Any, shape: Any, place: str) -> Iterator[str]:
    """Everything in `value` that has not the form `shape` gives; null is always allowed."""
    if value is None:
        return
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            yield f"{place} is no object"
            return
        for key, inner in value.items():
            if key in shape or "*" in shape:
                yield from _faults(inner, shape.get(key, shape.get("*")), f"{place}.{key}" if place else key)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield f"{place} is no list"
            return
        for i, inner in enumerate(value):
            yield from _faults(inner, shape[0], f"{place}[{i}]")
    else:
        yield from _bad_value(value, shape, place)


def _bad_value(value: Any, shape: Any, place: str) -> Iterator[str]:
    kinds = _NUMBER if shape == _SHARE else shape
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds in (int, _NUMBER)):
        yield f"{place} is {value!r}"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{place} is not finite"
    elif shape == _SHARE and not 0 <= value <= 1:
        yield f"{place} is {value}, outside 0 to 1"


def score(results: Results, name: str, metric: str = "exact") -> Mapping[str, Any]:
    """A score's record {before, after, before_interval, after_interval, n}; empty where nothing was measured."""
    return ((results["scores"].get(name) or {}).get(metric)) or {}


def asked(results: Results) -> list[str]:
    """Scores for which there were prompts, in reading order."""
    return [name for name in SCORES if score(results, name).get("n")]


def metrics_of(results: Results) -> list[str]:
    """Metrics measured for any score, in reading order."""
    return [m for m in METRICS if any(score(results, name, m).get("n") for name in SCORES)]


def base_alone(results: Results) -> bool:
    """Whether the base was asked alone: no method is named, and no score is another after than before."""
    if results.get("method") is not None or results.get("side_memory") is not None:
        return False
    every = [score(results, name, metric) for name in SCORES for metric in METRICS]
    return all(s.get("after") in (None, s.get("before")) for s in every)


def full_name(results: Results, metric: str) -> str:
    """What a metric means, as the results say it."""
    return str((results.get("metrics") or {}).get(metric) or metric)


def dataset_name(results: Results) -> str:
    """The dataset's name, its file where it has none, or empty."""
    data = results.get("dataset") or {}
    return str(data.get("name") or data.get("file") or "")


def base_name(results: Results) -> str:
    """What the base is called, or empty."""
    base = results.get("base") or {}
    return str(base.get("label") or base.get("name") or "")
