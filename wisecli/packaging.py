"""Package a side memory for shipping: a folder that holds all there is to know about it, and no base weights.

    side_memory.safetensors   what `attach` loads; it needs no other file
    ledger.jsonl              one line per edit: id, prompt, target, outcome, shard, steps; left out on request
    README.md                 the model card
    manifest.json             the manifest for people, with digests of the other files; written last

A folder without manifest.json is unfinished. The same input gives the same bytes: there are no dates in it.
What is not here: the way to a hub and back (`wisecli.hub`) and loading (`routing.attach` takes the folder as it is).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wisecli.card import outcome_of, render_card
from wisecli.errors import InputError, OutputError, UsageError
from wisecli.evaluation.recall import Measured, measure
from wisecli.hub import CARD, FILES, LEDGER, MANIFEST, SCHEMA, SIDE_MEMORY
from wisecli.memory.files import ensure_writable, read_json, write_bytes, write_json
from wisecli.memory.side_memory import SideMemory

__all__ = [
    "Measured",
    "PackageReport",
    "PackagedFile",
    "check_request",
    "copy_package",
    "measure",
    "package_side_memory",
]

SCHEMA_VERSION = "1.0"
EVAL_SCHEMA, EVAL_VERSION = "wise-eval", "2"
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# What a package says of an evaluation: never what holds prompts and answers, nor where the file lay.
_EVAL_KEYS = ("schema_version", "protocol", "metrics", "method", "dataset", "base", "seeds", "scores", "average")
_EVAL_PARTS = {
    "side_memory": ("digest", "router"),
    "routing": ("router", "epsilon", "kinds", "precision", "recall", "false_opening"),
    "ability": ("text", "passages", "tokens", "perplexity", "agreement", "routed"),
}


@dataclass(frozen=True)
class PackagedFile:
    """One file of a package, with its SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class PackageReport:
    """What was written.

    Attributes:
        content: SHA-256 over the tensors, the same with and without texts.
        edits: number of edits per outcome.
        texts: whether prompts and targets are inside.
    """

    out: Path
    files: tuple[PackagedFile, ...]
    content: str
    edits: dict[str, int]
    texts: bool
    measured: Measured | None

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "files": {f.name: {"bytes": f.size, "sha256": f.sha256} for f in self.files},
            "content": self.content,
            "edits": self.edits,
            "texts": self.texts,
            "measured": self.measured.to_json() if self.measured else None,
        }


def package_side_memory(
    side_memory: SideMemory,
    out: Path,
    *,
    ledger: bool = True,
    measured: Measured | None = None,
    evaluation: Mapping[str, Any] | None = None,
    licence: str | None = None,
    force: bool = False,
) -> PackageReport:
    """Write a side memory as a folder ready for a hub.

    Args:
        side_memory: what is shipped.
        out: the folder; made when absent.
        ledger: write the ledger and keep prompts and targets, but for edits that were withdrawn; without it no text of
            an edit is in any file.
        measured: figures of `measure` for the card.
        evaluation: the JSON of `wise eval`, for the card.
        licence: a licence id for the card, such as apache-2.0.
        force: replace an existing package.

    Raises:
        InputError: the evaluation is no result of `wise eval` with this side memory.
        OutputError: the folder holds something else, or a package and `force` is not set, or cannot be written.
        UsageError: the licence is no id.
    """
    check_request(out, evaluation=evaluation, licence=licence, force=force, side_memory=side_memory)
    shipped = side_memory.without_texts(withdrawn_only=ledger)
    about = _about(evaluation) if evaluation is not None else None
    card = render_card(shipped, ledger=ledger, measured=measured, evaluation=about, licence=_licence(licence))
    _clear(out)
    shipped.save(out / SIDE_MEMORY)
    if ledger:
        write_bytes(out / LEDGER, _ledger(shipped))
    write_bytes(out / CARD, card.encode())
    files = tuple(_describe(out / name) for name in (SIDE_MEMORY, LEDGER, CARD) if (out / name).exists())
    content = shipped.digest
    manifest = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "content": content,
        "files": {f.name: {"bytes": f.size, "sha256": f.sha256} for f in files},
        "measured": measured.to_json() if measured is not None else None,
        "evaluation": about,
        "side_memory": shipped.manifest(),
    }
    write_json(out / MANIFEST, manifest)
    texts = any(e.prompt is not None for e in shipped.edits)
    return PackageReport(out, (*files, _describe(out / MANIFEST)), content, _outcomes(shipped), texts, measured)


def copy_package(source: Path, out: Path, *, force: bool = False) -> tuple[PackagedFile, ...]:
    """Copy a package's own files from a folder that may hold others, the manifest last.

    Raises:
        InputError: a file cannot be read.
        OutputError: the folder holds something else, or a package and `force` is not set, or cannot be written.
    """
    check_request(out, force=force)
    names = [n for n in FILES if (source / n).is_file()]
    _clear(out)
    for name in names:
        try:
            data = (source / name).read_bytes()
        except OSError as e:
            raise InputError(f"Cannot read {source / name}: {e.strerror or e}.") from e
        write_bytes(out / name, data)
    return tuple(_describe(out / name) for name in names)


def check_request(
    out: Path,
    *,
    evaluation: Mapping[str, Any] | None = None,
    licence: str | None = None,
    force: bool = False,
    side_memory: SideMemory | None = None,
) -> None:
    """Refuse, before any work is spent, what `package_side_memory` would refuse.

    Whether the evaluation is of the side memory can only be said when that is given.
    """
    _check_folder(out, force)
    _licence(licence)
    if evaluation is not None:
        _check_evaluation(evaluation)
        _check_evaluated(evaluation, side_memory)


# -- refusals ---------------------------------------------------------------------------------------------------------


def _check_folder(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file.", hint="Give a folder with --out.")
    held = sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) if out.is_dir() else []
    if not held:
        return
    finished = MANIFEST in held
    if (finished and not _is_package(out / MANIFEST)) or (not finished and not _is_unfinished(held)):
        raise OutputError(
            f"{out} is not empty and not a package: it holds {', '.join(held[:3])}{', ...' if len(held) > 3 else ''}.",
            hint="Choose another folder with --out.",
        )
    if not force:
        state = "already holds a package" if finished else "holds a package that was not finished"
        raise OutputError(f"{out} {state}.", hint="Replace it with --force, or choose another folder with --out.")


def _is_package(manifest: Path) -> bool:
    try:
        found = read_json(manifest)
    except InputError:
        return False
    return isinstance(found, dict) and found.get("schema") == SCHEMA


def _is_unfinished(held: list[str]) -> bool:
    """A package is written side memory first, so one that was interrupted holds that file and no foreign one."""
    return SIDE_MEMORY in held and set(held) <= set(FILES)


def _licence(licence: str | None) -> str | None:
    if licence is None:
        return None
    name = licence.strip().lower()
    if not _LICENCE.fullmatch(name):
        raise UsageError(f"{licence!r} is no licence id.", hint="Use one such as apache-2.0, mit, cc-by-4.0 or other.")
    return name


def _check_evaluation(evaluation: Any) -> None:
    schema = evaluation.get("schema") if isinstance(evaluation, Mapping) else None
    version = str(evaluation.get("schema_version", "")) if isinstance(evaluation, Mapping) else ""
    if schema != EVAL_SCHEMA:
        raise InputError(
            f"The evaluation has the schema {schema!r}, not {EVAL_SCHEMA!r}.",
            hint="Make one with wise eval --side-memory sm.safetensors --out results.json.",
        )
    again = "Make it again with wise eval."
    major = version.split(".")[0]
    if major != EVAL_VERSION:
        newer = major.isdecimal() and int(major) > int(EVAL_VERSION)
        raise InputError(
            f"The evaluation has schema version {version or 'none'}.", hint="Install a newer wise." if newer else again
        )
    if evaluation.get("side_memory", "") is None:
        what = "not of one side memory" if evaluation.get("method") else "of the base alone"
        raise InputError(
            f"The evaluation is {what}.", hint="Make one with wise eval --side-memory sm.safetensors --out FILE.json."
        )
    parts = [k for k in ("protocol", "dataset", "base", "side_memory") if not isinstance(evaluation.get(k), Mapping)]
    if parts:
        raise InputError(f"The evaluation has no readable {', '.join(parts)}.", hint=again)
    scores = evaluation.get("scores")
    known = isinstance(scores, Mapping) and all(isinstance(s, Mapping) for s in scores.values())
    if not known or not all(_is_score(m) for s in scores.values() for m in s.values()):
        raise InputError("The evaluation has no readable scores.", hint=again)


def _check_evaluated(evaluation: Mapping[str, Any], side_memory: SideMemory | None) -> None:
    """The results must be of the very side memory that is packaged."""
    found = evaluation["side_memory"].get("digest")
    name = evaluation["side_memory"].get("path") or "another side memory"
    if found is None:
        message = "The evaluation does not say which side memory it is of."
    elif side_memory is not None and found != side_memory.digest:
        message = f"The evaluation is of {name} with the digest {str(found)[:12]}, not of {side_memory.digest[:12]}."
    else:
        return
    raise InputError(message, hint="Evaluate the file to be packaged again: wise eval --side-memory FILE --out FILE.")


def _is_score(metric: Any) -> bool:
    """{"before", "after", "n"}, each a number, or None where nothing was asked; intervals are pairs of numbers."""
    wanted = (int, float, type(None))
    return (
        isinstance(metric, Mapping)
        and all(k in metric and isinstance(metric[k], wanted) for k in ("before", "after", "n"))
        and all(_is_interval(metric.get(k)) for k in ("before_interval", "after_interval"))
    )


def _is_interval(bounds: Any) -> bool:
    return bounds is None or (
        isinstance(bounds, Sequence) and len(bounds) == 2 and all(isinstance(b, int | float) for b in bounds)
    )


def _about(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What of an evaluation goes into the package."""
    about: dict[str, Any] = {k: evaluation[k] for k in _EVAL_KEYS if k in evaluation}
    for name, keys in _EVAL_PARTS.items():
        part = evaluation.get(name)
        about[name] = {k: part[k] for k in keys if k in part} if isinstance(part, Mapping) else None
    return about


# -- the files --------------------------------------------------------------------------------------------------------


def _clear(out: Path) -> None:
    """Make the folder, and take an old package out of it: its manifest first, so that it never passes for whole."""
    ensure_writable(out)
    try:
        for name in reversed(FILES):
            (out / name).unlink(missing_ok=True)
    except OSError as e:
        raise OutputError(f"Cannot replace {out}: {e.strerror or e}.", hint="Choose another folder with --out.") from e


def _ledger(side_memory: SideMemory) -> bytes:
    """One JSON line per edit, in stream order."""
    lines = []
    for e in side_memory.edits:
        line = {"id": e.id, "history": e.history, "prompt": e.prompt, "target": e.target, "outcome": outcome_of(e)}
        line |= {k: e.details.get(k) for k in ("shard", "steps")}
        lines.append(json.dumps({k: v for k, v in line.items() if v is not None}, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def _outcomes(side_memory: SideMemory) -> dict[str, int]:
    counts = dict.fromkeys(("took", "failed", "superseded"), 0)
    for e in side_memory.edits:
        counts[outcome_of(e)] = counts.get(outcome_of(e), 0) + 1
    return counts


def _describe(path: Path) -> PackagedFile:
    data = path.read_bytes()
    return PackagedFile(path.name, len(data), hashlib.sha256(data).hexdigest())
