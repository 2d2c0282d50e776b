"""Packages on the Hugging Face hub: fetch one, pinned to a commit, and upload one.

A package is named `ORG/NAME`, or `ORG/NAME@REVISION` for a branch, tag or commit. Only files with the names of a
package are ever fetched; they are safetensors, JSON and text, and nothing in them is run. What the manifest says of
their content is checked, the model card apart: people edit that on the hub. A commit that is in the local cache is used
without asking the network; a branch is asked for on the hub first, and where that is out of reach the cached state of
it is used. The folder's own rules are `packaging`'s; attaching is `routing.attach`'s.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wisecli.errors import InputError, OutputError, UsageError, WiseError, first_line

SCHEMA = "wise-package"
SIDE_MEMORY, LEDGER, CARD, MANIFEST = "side_memory.safetensors", "ledger.jsonl", "README.md", "manifest.json"
FILES = (SIDE_MEMORY, LEDGER, CARD, MANIFEST)
_PATIENCE_S = 5.0  # for the one request that tells whether the hub answers
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]*))?")
_COMMIT = re.compile("[0-9a-f]{40}")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class HubId:
    """`ORG/NAME`, and the revision behind the @, None for the main branch."""

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubId:
        """Read `ORG/NAME[@REVISION]`.

        Raises:
            UsageError: it is none.
        """
        found = _ID.fullmatch(text)
        if found is None or any(bad in found[1] for bad in ("..", "--")):
            raise UsageError(
                f"{text!r} names no package on the hub.",
                hint="Give ORG/NAME, or ORG/NAME@REVISION for one state of it.",
            )
        return cls(found[1], found[2])

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


@dataclass(frozen=True)
class Fetched:
    """A package of the hub on this machine.

    Attributes:
        folder: in the hub's cache.
        commit: the one it is of, 40 hex digits.
        checked: the files whose SHA-256 is the manifest's; none where there is no manifest.
    """

    repo: str
    commit: str
    folder: Path
    checked: tuple[str, ...]

    @property
    def side_memory(self) -> Path:
        return self.folder / SIDE_MEMORY

    @property
    def label(self) -> str:
        """The id pinned to its commit; it fetches the same again."""
        return f"{self.repo}@{self.commit}"


@dataclass(frozen=True)
class Pushed:
    """What an upload came to: the commit now holds the package, None where the hub did not name it."""

    repo: str
    commit: str | None
    url: str

    def to_json(self) -> dict[str, Any]:
        return {"repo": self.repo, "commit": self.commit, "url": self.url}


def is_hub_id(source: str | Path) -> bool:
    """Whether something that is not on disk can be meant as a package on the hub, and not as a file."""
    text = str(source)
    try:
        HubId.parse(text)
    except UsageError:
        return False
    return not text.endswith((".safetensors", ".json", ".jsonl"))


# -- fetching ---------------------------------------------------------------------------------------------------------


def fetch(name: str) -> Fetched:
    """A package, from the cache or from the hub, checked.

    Args:
        name: `ORG/NAME` or `ORG/NAME@REVISION`.

    Raises:
        UsageError: the name is none.
        InputError: it is out of reach, unknown, not to be read, no package, or damaged.
    """
    wanted = HubId.parse(name)
    folder = _cached(wanted) if wanted.revision and _COMMIT.fullmatch(wanted.revision) else None
    if folder is None:
        folder = _fetched(wanted)
    if not (folder / SIDE_MEMORY).is_file():
        raise InputError(
            f"{wanted} is no package: it holds no {SIDE_MEMORY}.", hint="Give a repository made by wise package --push."
        )
    commit = folder.name if _COMMIT.fullmatch(folder.name) else wanted.revision or ""
    return Fetched(wanted.repo, commit, folder, check_files(folder, str(wanted)))


def _fetched(wanted: HubId) -> Path:
    """From the hub; where it is out of reach, what the cache has of that revision.

    The hub is first asked for the commit, once and with a time limit: the download alone would try for some twenty
    seconds before it found that there is no network.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        commit = api.repo_info(wanted.repo, revision=wanted.revision, timeout=_PATIENCE_S).sha
        return Path(str(api.snapshot_download(wanted.repo, revision=commit, allow_patterns=list(FILES))))
    except Exception as e:
        reason = _reason(e, wanted)
        if reason is None:
            raise
        kept = _cached(wanted) if reason.away else None
        if kept is not None:
            return kept
        raise InputError(
            f"{wanted} is neither here nor to be had from the hub: {reason.what}.",
            hint=f"{reason.hint} A local file or folder needs no hub.",
        ) from e


def _cached(wanted: HubId) -> Path | None:
    """The folder of a revision in the hub's cache, if all that its manifest lists is there."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    try:
        found = HfApi().snapshot_download(
            wanted.repo, revision=wanted.revision, allow_patterns=list(FILES), local_files_only=True
        )
    except (OSError, HFValidationError):
        return None
    folder = Path(str(found))
    listed = _listed(folder) or {}
    return folder if all((folder / n).is_file() for n in (SIDE_MEMORY, *listed)) else None


def check_files(folder: Path, name: str) -> tuple[str, ...]:
    """Check the files of a package against the digests in its manifest; the names of those checked.

    Raises:
        InputError: a file is missing or has other content, or the manifest is none.
    """
    listed = _listed(folder)
    if listed is None:
        if (folder / MANIFEST).is_file():
            raise InputError(f"The {MANIFEST} of {name} is no manifest of a package.", hint="Push the package again.")
        return ()
    again = "Fetch it again; if that does not help, its author must push it again."
    for file, digest in listed.items():
        if not (folder / file).is_file():
            raise InputError(f"{name} lacks {file}, which its manifest lists.", hint=again)
        if file != CARD and _sha256(folder / file) != digest:
            raise InputError(f"{file} of {name} is damaged: its SHA-256 is not the manifest's.", hint=again)
    return tuple(f for f in listed if f != CARD)


def _listed(folder: Path) -> dict[str, str] | None:
    """SHA-256 of each known file by the manifest; None where there is no readable manifest of a package."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA or SIDE_MEMORY not in manifest["files"]:
            return None
        return {str(n): str(about["sha256"]) for n, about in manifest["files"].items() if n in FILES}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


# -- uploading --------------------------------------------------------------------------------------------------------


def check_push(name: str, private: bool = False) -> None:
    """Find out, before any work is spent, whether the hub would take an upload; nothing is made there.

    Args:
        name: `ORG/NAME`, or `ORG/NAME@BRANCH`.
        private: the repository is to be private.

    Raises:
        UsageError: the name is none, or the repository is there and public although it is to be private.
        OutputError: the hub is out of reach or switched off, or no one is logged in.
    """
    wanted = HubId.parse(name)
    if wanted.revision and _COMMIT.fullmatch(wanted.revision):
        raise UsageError("A commit cannot be pushed to.", hint="Give a branch behind the @, or none.")
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    def ask() -> Any:
        try:
            return HfApi().repo_info(wanted.repo, timeout=_PATIENCE_S)
        except RepositoryNotFoundError as e:
            if isinstance(e, GatedRepoError):
                raise
            return None  # to be made

    about = _at_hub(wanted, ask)
    if get_token() is None:
        raise OutputError(
            "No one is logged in to the hub on this machine.", hint="Run hf auth login, or set HF_TOKEN, and try again."
        )
    if private and about is not None and not about.private:
        raise UsageError(
            f"{wanted.repo} is there already, and public.", hint="Leave --private out, or push to another name."
        )


def push(folder: Path, name: str, *, private: bool = False) -> Pushed:
    """Upload a package in one commit; files of an earlier package that this one lacks are taken out.

    Args:
        folder: written by `package_side_memory`.
        name: `ORG/NAME`, made where it is not there; `ORG/NAME@BRANCH` for another branch than main, made likewise.
        private: make the repository private.

    Raises:
        OutputError: the hub is out of reach, or does not allow it.
    """
    wanted = HubId.parse(name)
    from huggingface_hub import HfApi

    api = HfApi()

    def upload() -> Any:
        api.create_repo(wanted.repo, private=private or None, exist_ok=True)
        if wanted.revision:
            api.create_branch(wanted.repo, branch=wanted.revision, exist_ok=True)
        return api.upload_folder(
            repo_id=wanted.repo,
            folder_path=folder,
            revision=wanted.revision,
            allow_patterns=list(FILES),
            delete_patterns=list(FILES),
            commit_message="Upload a side memory",
        )

    branch = f" --revision {wanted.revision}" if wanted.revision else ""
    info = _at_hub(wanted, upload, f" {folder} is written; push it with: hf upload {wanted.repo} {folder}{branch}")
    commit = getattr(info, "oid", None)
    return Pushed(wanted.repo, commit, f"https://huggingface.co/{wanted.repo}")


def _at_hub(wanted: HubId, call: Callable[[], Any], then: str = "") -> Any:
    try:
        return call()
    except Exception as e:
        reason = _reason(e, wanted)
        if reason is None:
            raise
        raise OutputError(f"{wanted} cannot be pushed: {reason.what}.", hint=f"{reason.hint}{then}") from e


# -- what went wrong --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reason:
    """Why the hub did not do it, what to do, and whether it was out of reach, so that a cached state may serve."""

    what: str
    hint: str
    away: bool = False


def _reason(error: Exception, wanted: HubId) -> _Reason | None:
    """What an exception of the hub's client means; None for one that is not of the hub."""
    from huggingface_hub import errors

    if isinstance(error, WiseError):
        return None
    login = "Log in with hf auth login, or ask its owner for access."
    status = getattr(getattr(error, "response", None), "status_code", None)
    network = "Try again where there is a network."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return _Reason("the hub is switched off (HF_HUB_OFFLINE)", "Unset HF_HUB_OFFLINE.", True)
    if isinstance(error, errors.GatedRepoError):
        return _Reason("it is gated", login)
    if isinstance(error, errors.RepositoryNotFoundError):
        return _Reason("the hub knows none of that name, or it is private", f"Check the name. {login}")
    if isinstance(error, errors.RevisionNotFoundError):
        return _Reason(f"it has no revision {wanted.revision}", "Check the branch, tag or commit behind the @.")
    if status in (401, 403):
        return _Reason("you have no permission for it", login)
    if isinstance(error, errors.HFValidationError):
        return _Reason(first_line(error), "Give ORG/NAME, or ORG/NAME@REVISION.")
    if isinstance(error, errors.HfHubHTTPError):
        away = isinstance(status, int) and status >= 500
        return _Reason(f"the hub answered {status or type(error).__name__}", "Try again later.", away)
    # The client's HTTP library is another one in other versions; its transfers raise plain RuntimeErrors.
    http = {k.__module__.split(".")[0] for k in errors.HfHubHTTPError.__mro__} - {"builtins"}
    known = isinstance(error, OSError | RuntimeError | errors.EntryNotFoundError)
    if known or type(error).__module__.split(".")[0] in http:
        return _Reason(f"the hub is out of reach ({type(error).__name__}: {first_line(error)})", network, True)
    return None
