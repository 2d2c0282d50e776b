"""Find the file of a named dataset: on disk, in the Hugging Face cache, or on the hub; and read it.

`DATASETS` says for each name where its file lives and under which names a local copy is accepted. A file is fetched
when its user asks for it, under the licence noted here; none but the demonstration is shipped with the package. Where
the commit of a published version is known it is pinned, else a branch is followed; `revision` overrides both, and the
commit that a file came from is told (`Located.revision`). A cached file is used without asking the network.

What is in a file is left to `stream.read_edits`, whose digest names the content.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from os import PathLike
from pathlib import Path

from wisecli.data.source import missing_file
from wisecli.data.stream import EditStream, read_edits
from wisecli.errors import InputError, UsageError

FOLDER_VARIABLE = "WISE_DATA"
_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
_PATIENCE_S = 5.0  # for the one request that tells whether the hub answers
_COMMIT = re.compile("[0-9a-f]{40}")
_EASYEDIT_DATA = "https://github.com/zjunlp/EasyEdit (section on datasets)"


@dataclass(frozen=True, slots=True)
class Dataset:
    """Where one named dataset is found.

    Args:
        name: what `--dataset` is given; "name:part" for one of several files of a dataset.
        about: what it is, in one line.
        licence: its licence, or where to look for it.
        local: accepted names of a local copy, the preferred one first.
        repo: its dataset repository on the hub; empty where it is on none.
        file: the file in that repository.
        revision: branch or commit read by default.
        shipped: its name inside the package; empty where it is not shipped.
        page: where it, or a fuller version of it, can be fetched by hand.
    """

    name: str
    about: str
    licence: str
    local: tuple[str, ...]
    repo: str = ""
    file: str = ""
    revision: str = "main"
    shipped: str = ""
    page: str = ""

    def command(self, revision: str | None = None) -> str:
        """The command that puts the file into the cache; empty when it is not on the hub."""
        pin = f" --revision {revision}" if revision and revision != "main" else ""
        return f"hf download {self.repo} {self.file} --repo-type dataset{pin}" if self.repo else ""


@dataclass(frozen=True, slots=True)
class Located:
    """A dataset's file and where it came from.

    Args:
        path: the file.
        name: the dataset's name; for a file given by its path, its name without suffixes.
        revision: the commit of the hub it came from, 40 hex digits; None for any other file.
    """

    path: Path
    name: str
    revision: str | None = None


def _knowedit(name: str, about: str, file: str, *other_names: str, page: str = "") -> Dataset:
    """A part of KnowEdit, at the last commit of its repository."""
    local = (*other_names, Path(file).name)
    commit = "6d218881e60c7c8be836bd2befd598eb3b318be4"
    return Dataset(name, about, "MIT (KnowEdit)", local, "zjunlp/KnowEdit", file, commit, page=page)


def _counterfact(name: str, about: str, file: str, *other_names: str, page: str = "") -> Dataset:
    """A split of CounterFact, at the last commit of its repository."""
    local, commit = (*other_names, Path(file).name), "c01c413f856ee38f5c080c9fc5e87aff478e2ff9"
    return Dataset(name, about, "see its page", local, "azhx/counterfact", file, commit, page=page)


def _wikibigedit(name: str, step: int, span: str) -> Dataset:
    """One time step of WikiBigEdit."""
    about = f"WikiBigEdit: real changes of Wikidata, time step {step} of 8 ({span.replace('_', ' to ')})"
    file = f"wiki_big_edit_{span}.json"
    return Dataset(name, about, "Apache-2.0", (file,), "lukasthede/WikiBigEdit", file)


_STEPS = (
    "20240201_20240220",
    "20240220_20240301",
    "20240301_20240320",
    "20240320_20240401",
    "20240401_20240501",
    "20240501_20240601",
    "20240601_20240620",
    "20240620_20240701",
)
_DEMO = "demo_edits.jsonl"
DATASETS = {
    d.name: d
    for d in (
        Dataset(
            "demo",
            "edits of facts that the embedded base knows",
            "as this package",
            (_DEMO,),
            shipped=_DEMO,
        ),
        _knowedit(
            "zsre",
            "ZsRE questions with a changed answer: KnowEdit's 1301 on the hub, or a local file of MEND's or WISE's",
            "benchmark/ZsRE/ZsRE-test-all.json",
            "zsre_mend_edit.json",
            "zsre_mend_eval.json",
            "zsre_edit_500.json",
            page="https://rome.baulab.info/data/dsets/zsre_mend_eval.json",
        ),
        _counterfact(
            "counterfact",
            "CounterFact: counterfactual statements with near prompts; from the hub the test split, 2191 of 21919",
            "data/test-00000-of-00001-bacb83500fca49a9.parquet",
            "counterfact.json",
            "multi_counterfact.json",
            "counterfact_sample.json",
            page="https://memit.baulab.info/data/dsets/counterfact.json",
        ),
        _counterfact(
            "counterfact:train",
            "CounterFact's training split, 19728 of 21919",
            "data/train-00000-of-00001-05d11247db7abce8.parquet",
        ),
        _knowedit(
            "wiki-counterfact",
            "KnowEdit's counterfactuals from Wikidata (another dataset than counterfact)",
            "benchmark/wiki_counterfact/test_cf.json",
        ),
        _knowedit(
            "wiki-recent",
            "KnowEdit's recent facts from Wikidata",
            "benchmark/wiki_recent/recent_test.json",
        ),
        _knowedit(
            "wikibio",
            "KnowEdit's hallucinated biographies to correct",
            "benchmark/WikiBio/wikibio-test-all.json",
        ),
        _wikibigedit("wikibigedit", 1, _STEPS[0]),
        *(_wikibigedit(f"wikibigedit:{step}", step, span) for step, span in enumerate(_STEPS, start=1)),
        Dataset(
            "hallucination",
            "sentences of biographies to correct, as used by WISE",
            "see its page",
            ("hallucination-edit.json", "hallucination-edit_300.json"),
            page=_EASYEDIT_DATA,
        ),
        Dataset(
            "temporal",
            "entities younger than the base, as used by WISE",
            "see its page",
            ("temporal-edit.json",),
            page=_EASYEDIT_DATA,
        ),
    )
}


def read_dataset(
    name_or_path: str | PathLike[str],
    limit: int | None = None,
    *,
    path: str | PathLike[str] | None = None,
    revision: str | None = None,
) -> tuple[Located, EditStream]:
    """Find a dataset as `locate_dataset` does and read its first `limit` edits (all without one).

    Raises:
        InputError: it is nowhere to be found, or holds records that cannot be used.
        UsageError: a revision was asked of what is not on the hub, or the limit is below 1.
    """
    located = locate_dataset(name_or_path, path=path, revision=revision)
    return located, read_edits(located.path, limit)


def resolve_dataset(
    name_or_path: str | PathLike[str],
    *,
    path: str | PathLike[str] | None = None,
    revision: str | None = None,
) -> Path:
    """The file alone of what `locate_dataset` finds."""
    return locate_dataset(name_or_path, path=path, revision=revision).path


def locate_dataset(
    name_or_path: str | PathLike[str],
    *,
    path: str | PathLike[str] | None = None,
    revision: str | None = None,
) -> Located:
    """The file of a dataset, with its name and the commit it came from.

    Looked for in this order: `path`; `name_or_path` itself as a file or folder; the package; the folder named by the
    environment variable WISE_DATA; the hub cache; the hub. A `revision` pins: only the hub's cache and the hub count.

    Args:
        name_or_path: a name in `DATASETS`, a file, or a folder that holds one.
        path: a file or folder to take the named dataset from; nothing else is tried.
        revision: branch, tag or commit on the hub.

    Raises:
        InputError: it is nowhere to be found; the hint says how to get it.
        UsageError: a revision was asked of what is not on the hub.
    """
    name, here = os.fspath(name_or_path), Path(name_or_path)
    known = DATASETS.get(name)
    if path is None and (here.is_file() or (here.is_dir() and known is None and name)):
        path = here
    if revision is not None and (path is not None or (known is not None and not known.repo)):
        what = f"the revision {revision} was asked of {path or name}, which is not read from the hub"
        raise UsageError(what, hint="Leave the revision out: only a dataset of the hub has one.")
    if path is not None:
        found = _from_path(Path(path), known)
    elif known is None:
        raise _unknown(name)
    elif revision is not None:
        found = _from_hub(known, revision)
    else:
        found = _accepted(here, known) or _shipped(known) or _in_variable(known) or _from_hub(known, known.revision)
    return Located(found, known.name if known else found.name.partition(".")[0] or found.name, _commit_of(found))


def _commit_of(path: Path) -> str | None:
    """The commit that the hub's cache names in a path of its own: datasets--../snapshots/COMMIT/.."""
    parts = path.absolute().parts
    for repo, folder, commit in zip(parts, parts[1:], parts[2:], strict=False):
        if repo.startswith("datasets--") and folder == "snapshots" and _COMMIT.fullmatch(commit):
            return commit
    return None


def _from_path(path: Path, known: Dataset | None) -> Path:
    """A file as it is, or the one dataset file of a folder."""
    if path.is_file():
        return path
    if not path.exists():
        raise missing_file(path)
    found = _in_folder(path, known)
    if found is not None:
        return found
    names = sorted(p.name for p in path.iterdir() if p.name.endswith(_SUFFIXES))
    expected = f" named {' or '.join(known.local)}" if known else ""
    if not names:
        raise InputError(f"the folder {path} holds no file{expected} of edits", hint="Name a .json or .jsonl file.")
    shown = ", ".join(names[:5]) + (", .." if len(names) > 5 else "")
    raise InputError(f"the folder {path} holds {len(names)} files: {shown}", hint=f"Name one, as {path / names[0]}.")


def _in_folder(folder: Path, known: Dataset | None) -> Path | None:
    """The first accepted name in the folder, else its only .json or .jsonl file, else None."""
    if known is not None and (found := _accepted(folder, known)):
        return found
    files_there = [p for p in folder.iterdir() if p.is_file() and p.name.endswith(_SUFFIXES)]
    return files_there[0] if len(files_there) == 1 else None


def _accepted(folder: Path, known: Dataset) -> Path | None:
    """The first accepted name that is a file in the folder."""
    return next((folder / name for name in known.local if (folder / name).is_file()), None)


def _shipped(known: Dataset) -> Path | None:
    if not known.shipped:
        return None
    path = Path(str(files("wisecli.data") / known.shipped))
    if path.is_file():
        return path
    raise InputError(f"the shipped dataset {known.name} is missing: no {path}", hint="Install the package again.")


def _in_variable(known: Dataset) -> Path | None:
    """An accepted name in the folder that WISE_DATA names, or in a folder directly inside it."""
    value = os.environ.get(FOLDER_VARIABLE)
    if not value:
        return None
    folder = Path(value)
    if not folder.is_dir():
        raise InputError(f"{FOLDER_VARIABLE} is {value}, which is no folder", hint=f"Mend or unset {FOLDER_VARIABLE}.")
    places = (place for name in known.local for place in (folder / name, *sorted(folder.glob(f"*/{name}"))))
    return next((place for place in places if place.is_file()), None)


def _from_hub(known: Dataset, revision: str) -> Path:
    """The cached file, or the file fetched from the hub.

    The hub is first asked for the revision, once and with a time limit: the download alone would try for some twenty
    seconds before it found that there is no network.
    """
    if not known.repo:
        raise _absent(known, revision, "it is not on the hub in a form this tool reads")
    from huggingface_hub import dataset_info, errors, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(known.repo, known.file, repo_type="dataset", revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    try:
        dataset_info(known.repo, revision=revision, timeout=_PATIENCE_S)
        return Path(hf_hub_download(known.repo, known.file, repo_type="dataset", revision=revision))
    except errors.RevisionNotFoundError as err:
        raise _absent(known, revision, f"{known.repo} has no revision {revision}") from err
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as err:
        raise _absent(known, revision, "the hub is out of reach or switched off") from err
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, errors.HFValidationError) as err:
        raise _absent(known, revision, f"the hub answered with {type(err).__name__}") from err
    except OSError as err:
        raise _absent(known, revision, f"{type(err).__name__}: {err.strerror or err}") from err
    except Exception as err:  # the errors of the client's HTTP library, which is another one in other versions
        raise _absent(known, revision, f"the hub is out of reach, {type(err).__name__}: {err}") from err


def _absent(known: Dataset, revision: str, why: str) -> InputError:
    """The error for a known dataset that could not be had, with the ways to get it."""
    get = f"run `{known.command(revision)}` where there is a network" if known.repo else f"fetch it from {known.page}"
    local = f"give a local file in place of the name, such as path/to/{known.local[0]}"
    if known.repo and known.page:
        local += f" (one is at {known.page})"
    folder = f"set {FOLDER_VARIABLE} to a folder that holds {known.local[0]}"
    message = f"the dataset {known.name} is not on this machine and could not be fetched ({why})"
    return InputError(message, hint=f"{get[0].upper()}{get[1:]}, {local}, or {folder}.")


def _unknown(name: str) -> InputError:
    """The error for what is neither a path nor a name, with the known names, the closest first."""
    if "/" in name or os.sep in name or name.endswith(_SUFFIXES):
        return missing_file(Path(name))
    parts = [known for known in DATASETS if known.startswith(f"{name.partition(':')[0]}:")] if ":" in name else []
    names = parts or _closest_first(name, [known for known in DATASETS if ":" not in known])
    return InputError(
        f'"{name}" is neither a file nor a known dataset',
        hint=f"Use one of {', '.join(names)}, or a path to a file of edits.",
    )


def _closest_first(name: str, names: Sequence[str]) -> list[str]:
    def likeness(other: str) -> float:
        return difflib.SequenceMatcher(None, name.casefold(), other).ratio()

    return sorted(names, key=likeness, reverse=True)
