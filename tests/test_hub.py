"""Packages from and to a hub: a cache laid out on disk, and a hub client made by the test. No network is asked."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from wisecli import hub
from wisecli.cli.app import main
from wisecli.errors import InputError, OutputError, UsageError
from wisecli.memory.side_memory import SideMemory
from wisecli.packaging import package_side_memory
from wisecli.routing.attach import attach, side_memory_file
from wisecli.routing.shelf import SideMemories

ROOT = Path(__file__).resolve().parent.parent
http = importlib.import_module(errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0])  # the client's own library
REPO = "org/facts"
COMMIT, OTHER = "1" * 40, "2" * 40
ALL = ["README.md", "ledger.jsonl", "manifest.json", "side_memory.safetensors"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tiny_model: Any) -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def side_memory(model: Any, make_side_memory: Any) -> SideMemory:
    return make_side_memory(model, ["hello", "Paris?"])


@pytest.fixture(scope="module")
def package(side_memory: SideMemory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("package") / "package"
    package_side_memory(side_memory, out)
    return out


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, a hub that is switched off, and a working folder of the test's own."""
    folder = tmp_path / "hub"
    folder.mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def fill(cache: Path, package: Path, commit: str = COMMIT, ref: str = "main", **changed: bytes) -> Path:
    """Lay a package out as the hub client does; `changed` replaces files by name, up to the first dot."""
    repo = cache / f"models--{REPO.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / ref).write_text(commit)
    folder = repo / "snapshots" / commit
    folder.mkdir(parents=True)
    for p in package.iterdir():
        (folder / p.name).write_bytes(changed.get(p.name.split(".")[0], p.read_bytes()))
    return folder


class Hub:
    """Stands for `huggingface_hub.HfApi`: packages by revision, and a record of what was asked."""

    def __init__(self, cache: Path, package: Path | None = None) -> None:
        self.cache, self.package = cache, package
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.fails: dict[str, Exception] = {}
        self.private: bool | None = None

    def __call__(self) -> Hub:
        return self

    def _note(self, name: str, **options: Any) -> None:
        self.asked.append((name, options))
        if name in self.fails:
            raise self.fails[name]

    def repo_info(self, repo: str, **options: Any) -> Any:
        self._note("repo_info", repo=repo, **options)
        return SimpleNamespace(sha=COMMIT, private=self.private)

    def snapshot_download(self, repo: str, **options: Any) -> str:
        if options.get("local_files_only"):
            return str(huggingface_hub.snapshot_download(repo, **options))
        self._note("snapshot_download", repo=repo, **options)
        assert self.package is not None
        return str(fill(self.cache, self.package))

    def create_repo(self, repo: str, **options: Any) -> None:
        self._note("create_repo", repo=repo, **options)

    def create_branch(self, repo: str, **options: Any) -> None:
        self._note("create_branch", repo=repo, **options)

    def upload_folder(self, **options: Any) -> Any:
        self._note("upload_folder", **options)
        return SimpleNamespace(oid=OTHER)

    @property
    def calls(self) -> list[str]:
        return [name for name, _ in self.asked]


@pytest.fixture
def online(cache: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(cache, package)
    monkeypatch.setattr(huggingface_hub, "HfApi", made)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    return made


def answer(kind: Any, status: int) -> Exception:
    """An error as the hub's client raises it."""
    response = http.Response(status, request=http.Request("GET", "https://hub.invalid"))
    return kind(f"{status} from the hub", response=response)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*argv: object) -> tuple[int, str, str]:
        code = main([str(a) for a in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("org/facts", "org/facts", None),
        ("org/facts@main", "org/facts", "main"),
        ("Org-1/facts_2.x@refs/pr/1", "Org-1/facts_2.x", "refs/pr/1"),
        (f"org/facts@{COMMIT}", "org/facts", COMMIT),
    ],
)
def test_a_hub_id_is_read_and_written(text: str, repo: str, revision: str | None) -> None:
    found = hub.HubId.parse(text)
    assert (found.repo, found.revision, str(found)) == (repo, revision, text)
    assert hub.is_hub_id(text)


@pytest.mark.parametrize(
    "text", ["facts", "/org/facts", "./org/facts", "../facts", "a/b/c", "org/facts@", "org/..", "a--b/c", "org/f x", ""]
)
def test_what_is_no_hub_id_is_a_usage_error(text: str, run: Run) -> None:
    with pytest.raises(UsageError):
        hub.HubId.parse(text)
    assert not hub.is_hub_id(text)
    code, _, err = run("pull", text)
    assert code == 2
    assert "ORG/NAME" in err


def test_a_missing_file_is_not_looked_for_on_the_hub(run: Run, online: Hub) -> None:
    code, _, err = run("route", "-s", "out/sm.safetensors", "hello")
    assert code == 1
    assert "out/sm.safetensors does not exist" in err
    assert not online.asked


# -- fetching ----------------------------------------------------------------------------------------------------------


def test_a_commit_in_the_cache_is_used_without_asking(cache: Path, package: Path, online: Hub) -> None:
    folder = fill(cache, package)
    fetched = hub.fetch(f"{REPO}@{COMMIT}")
    assert not online.asked
    assert (fetched.folder, fetched.commit, fetched.label) == (folder, COMMIT, f"{REPO}@{COMMIT}")
    assert sorted(fetched.checked) == ["ledger.jsonl", "side_memory.safetensors"]


@pytest.mark.parametrize(("name", "ref"), [(REPO, "main"), (f"{REPO}@v1", "v1")])
def test_offline_the_cached_state_of_a_branch_is_used(cache: Path, package: Path, name: str, ref: str) -> None:
    folder = fill(cache, package, OTHER, ref)
    fetched = hub.fetch(name)
    assert (fetched.folder, fetched.commit) == (folder, OTHER)


@pytest.mark.parametrize("revision", [None, "v1"])
def test_the_hub_is_asked_once_for_the_commit_and_only_for_known_files(online: Hub, revision: str | None) -> None:
    fetched = hub.fetch(REPO if revision is None else f"{REPO}@{revision}")
    assert fetched.commit == COMMIT
    (first, asked), (second, got) = online.asked
    assert (first, asked) == ("repo_info", {"repo": REPO, "revision": revision, "timeout": 5.0})
    assert (second, got["revision"], sorted(got["allow_patterns"])) == ("snapshot_download", COMMIT, ALL)


FAILURES = [
    (lambda: errors.OfflineModeIsEnabled("off"), "switched off", True),
    (lambda: http.ConnectError("no route"), "out of reach", True),
    (lambda: http.ConnectTimeout("slow"), "out of reach", True),
    (lambda: OSError("no space"), "out of reach", True),
    (lambda: errors.LocalEntryNotFoundError("none"), "out of reach", True),
    (lambda: answer(errors.HfHubHTTPError, 503), "answered 503", True),
    (lambda: answer(errors.RepositoryNotFoundError, 404), "knows none of that name", False),
    (lambda: answer(errors.GatedRepoError, 403), "gated", False),
    (lambda: answer(errors.RevisionNotFoundError, 404), "has no revision v9", False),
    (lambda: answer(errors.HfHubHTTPError, 401), "no permission", False),
    (lambda: answer(errors.HfHubHTTPError, 403), "no permission", False),
    (lambda: answer(errors.HfHubHTTPError, 429), "answered 429", False),
]


@pytest.mark.parametrize("at", ["repo_info", "snapshot_download"])
@pytest.mark.parametrize(("failure", "says", "away"), FAILURES, ids=[f[1] for f in FAILURES])
def test_every_failure_is_an_error_with_a_next_step_and_the_cache_serves_where_the_hub_is_away(
    cache: Path, package: Path, online: Hub, run: Run, failure: Any, says: str, away: bool, at: str
) -> None:
    online.fails[at] = failure()
    code, out, err = run("pull", f"{REPO}@v9", "--json")
    assert (code, out) == (1, "")
    error = json.loads(err)
    assert error["type"] == "InputError"
    assert says in error["message"]
    assert error["hint"]
    fill(cache, package, OTHER, "v9")
    if away:
        assert hub.fetch(f"{REPO}@v9").commit == OTHER
    else:
        with pytest.raises(InputError, match=says):
            hub.fetch(f"{REPO}@v9")


def test_a_fault_of_ours_is_not_taken_for_the_hub(online: Hub) -> None:
    online.fails["repo_info"] = ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError):
        hub.fetch(REPO)


@pytest.mark.parametrize("lost", ["side_memory.safetensors", "ledger.jsonl"])
def test_a_cache_that_was_filled_in_part_is_fetched_again(cache: Path, package: Path, online: Hub, lost: str) -> None:
    folder = fill(cache, package)
    (folder / lost).unlink()
    online.fails["repo_info"] = errors.OfflineModeIsEnabled("off")
    with pytest.raises(InputError, match="neither here nor"):
        hub.fetch(f"{REPO}@{COMMIT}")
    assert online.calls == ["repo_info"]


# -- what is not to be trusted -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["side_memory", "ledger"])
def test_a_file_that_is_not_the_manifests_is_refused(cache: Path, package: Path, file: str, run: Run) -> None:
    name = next(p.name for p in package.iterdir() if p.name.startswith(file))
    damaged = bytearray((package / name).read_bytes())
    damaged[-1] ^= 1
    fill(cache, package, **{file: bytes(damaged)})
    code, _, err = run("pull", REPO, "-o", "there")
    assert code == 1
    assert f"{name} of {REPO} is damaged" in err
    assert not Path("there").exists()
    with pytest.raises(InputError, match="damaged"):
        side_memory_file(REPO)


def test_a_card_edited_on_the_hub_is_no_damage(cache: Path, package: Path) -> None:
    fill(cache, package, README=b"another card")
    assert "README.md" not in hub.fetch(REPO).checked


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"schema": "other"}', b'{"schema": "wise-package", "files": 1}'])
def test_a_manifest_that_is_none_is_refused(cache: Path, package: Path, text: bytes) -> None:
    fill(cache, package, manifest=text)
    with pytest.raises(InputError, match=r"no manifest"):
        hub.fetch(REPO)


def test_a_manifest_names_no_files_outside_the_package(cache: Path, package: Path) -> None:
    manifest = json.loads((package / "manifest.json").read_text())
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": "0"}
    fill(cache, package, manifest=json.dumps(manifest).encode())
    assert sorted(hub.fetch(REPO).checked) == ["ledger.jsonl", "side_memory.safetensors"]


def test_a_repository_without_a_side_memory_is_no_package(online: Hub, tmp_path: Path, run: Run) -> None:
    online.package = tmp_path / "empty"
    online.package.mkdir()
    (online.package / "README.md").write_text("a model")
    code, _, err = run("pull", REPO)
    assert code == 1
    assert "is no package: it holds no side_memory.safetensors" in err


# -- using what was fetched --------------------------------------------------------------------------------------------


def test_what_can_be_attached_can_be_a_hub_id_and_what_is_here_goes_first(
    cache: Path, package: Path, model: Any, side_memory: SideMemory, online: Hub
) -> None:
    fill(cache, package, OTHER, "v1")
    online.fails["repo_info"] = errors.OfflineModeIsEnabled("off")
    with attach(model, f"{REPO}@v1") as on:
        assert on.side_memory.digest == side_memory.digest
    with SideMemories(model) as shelf:
        shelf.load("facts", f"{REPO}@{OTHER}")
        assert shelf["facts"].digest == side_memory.digest
    asked = len(online.asked)
    package.rename(package.with_name("kept"))
    try:
        here = Path(REPO)
        here.parent.mkdir()
        (package.with_name("kept")).rename(here)
        assert side_memory_file(REPO) == here / "side_memory.safetensors"
        assert len(online.asked) == asked
    finally:
        here.rename(package)


def test_the_commands_take_a_hub_id_and_tell_its_commit(
    cache: Path, package: Path, tiny_model_dir: Path, run: Run
) -> None:
    fill(cache, package, OTHER, "v1")
    asked = ("--model", tiny_model_dir, "hello")
    code, out, err = run("route", "-s", f"{REPO}@v1", *asked)
    assert code == 0, err
    assert f"{REPO}@{OTHER}" in err
    code, out, err = run("route", "-s", f"{REPO}@v1", "--json", *asked)
    assert json.loads(out)["nearest_edit"] == "e0"
    code, out, err = run("chat", "-s", f"{REPO}@v1", "--model", tiny_model_dir, "--max-new-tokens", 2, "hello")
    assert code == 0, err
    assert f"{REPO}@{OTHER}" in err
    code, _, err = run("chat", "-s", "org/unknown", "hello")
    assert code == 1
    assert "org/unknown is neither here nor to be had from the hub" in err


def test_an_evaluation_records_the_commit(cache: Path, package: Path, tiny_model_dir: Path, run: Run) -> None:
    fill(cache, package)
    edits = Path("edits.jsonl")
    edits.write_text(json.dumps({"prompt": "hello", "target": "Paris"}) + "\n")
    code, out, err = run(
        "eval", "-d", edits, "-s", REPO, "--model", tiny_model_dir, "--no-ability", "--no-cache", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["side_memory"]["path"] == f"{REPO}@{COMMIT}"


def test_pull_writes_the_package_and_says_what_it_is(cache: Path, package: Path, run: Run) -> None:
    fill(cache, package)
    code, out, err = run("pull", REPO, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert (document["out"], document["repo"], document["commit"]) == ("facts", REPO, COMMIT)
    assert sorted(document["files"]) == ALL
    assert (document["base"]["name"], document["edits"]) == ("tiny", 2)
    for name in ALL:
        assert (Path("facts") / name).read_bytes() == (package / name).read_bytes()
        assert not (Path("facts") / name).is_symlink()
    code, _, err = run("pull", REPO)
    assert code == 1
    assert "already holds a package" in err
    code, out, err = run("pull", REPO, "--force", "-q")
    assert (code, out, err) == (0, "facts\n", "")
    code, out, err = run("pull", REPO, "-o", "other")
    assert code == 0
    assert COMMIT in out.replace("\n", "").replace(" ", "")
    assert "wise chat --side-memory other" in out


def test_pull_leaves_other_files_of_a_repository_alone(cache: Path, package: Path, run: Run) -> None:
    folder = fill(cache, package)
    (folder / "setup.py").write_text("raise SystemExit")
    assert run("pull", REPO, "-o", "there", "-q")[0] == 0
    assert sorted(p.name for p in Path("there").iterdir()) == ALL


def test_a_package_without_a_manifest_is_pulled_unchecked_and_says_so(cache: Path, package: Path, run: Run) -> None:
    (fill(cache, package) / "manifest.json").unlink()
    code, _, err = run("pull", REPO, "-o", "there")
    assert code == 0
    assert "could not be checked" in err


def test_a_hub_whose_name_cannot_be_resolved_fails_quickly(tmp_path: Path) -> None:
    code = "import sys; from wisecli.cli.app import main; sys.exit(main(['pull', 'org/facts', '-o', 'there']))"
    kept = {k: v for k, v in os.environ.items() if not k.lower().startswith(("hf_", "http", "all_proxy"))}
    env = kept | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "https://hub.invalid", "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "the hub is out of reach" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 20  # the limit is 5 s; the rest is starting Python on a busy machine


# -- uploading ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(side_memory: SideMemory, tmp_path: Path) -> Path:
    side_memory.save(tmp_path / "sm.safetensors")
    return tmp_path / "sm.safetensors"


def pushing(file: Path, *options: object) -> tuple[object, ...]:
    return ("package", file, "-o", "out", "--no-measure", *options)


def test_a_push_is_one_commit_of_the_packages_files(online: Hub, file: Path, run: Run) -> None:
    online.fails["repo_info"] = answer(errors.RepositoryNotFoundError, 404)  # it is to be made
    code, out, err = run(*pushing(file, "--push", REPO, "--private", "--json"))
    assert code == 0, err
    pushed = json.loads(out)["pushed"]
    assert pushed == {"repo": REPO, "commit": OTHER, "url": f"https://huggingface.co/{REPO}"}
    assert online.calls == ["repo_info", "create_repo", "upload_folder"]
    assert online.asked[1][1] == {"repo": REPO, "private": True, "exist_ok": True}
    upload = online.asked[2][1]
    assert (upload["repo_id"], upload["folder_path"], upload["revision"]) == (REPO, Path("out"), None)
    assert sorted(upload["allow_patterns"]) == sorted(upload["delete_patterns"]) == ALL  # an old ledger goes


def test_a_push_to_a_branch_makes_it_and_tells_the_commit(online: Hub, file: Path, run: Run) -> None:
    code, out, err = run(*pushing(file, "--push", f"{REPO}@v2"))
    assert code == 0, err
    assert online.calls == ["repo_info", "create_repo", "create_branch", "upload_folder"]
    assert online.asked[2][1] == {"repo": REPO, "branch": "v2", "exist_ok": True}
    assert online.asked[3][1]["revision"] == "v2"
    assert f"wise chat --side-memory {REPO}@{OTHER}" in out


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--private",), 2, "--push"),
        (("--push", "facts"), 2, "names no package"),
        (("--push", f"{REPO}@{COMMIT}"), 2, "commit cannot be pushed"),
        (("--push", REPO, "--private"), 2, "public"),
    ],
)
def test_a_push_that_cannot_be_meant_is_refused_before_any_work(
    online: Hub, file: Path, run: Run, options: tuple[str, ...], code: int, says: str
) -> None:
    online.private = False
    got, _, err = run(*pushing(file, *options))
    assert got == code
    assert says in err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("failure", "says"), [(f, says) for f, says, _ in FAILURES if "name" not in says], ids=lambda x: str(x)[:20]
)
def test_a_hub_that_cannot_take_it_is_told_of_before_any_work(
    online: Hub, file: Path, run: Run, failure: Any, says: str
) -> None:
    online.fails["repo_info"] = failure()
    code, _, err = run(*pushing(file, "--push", f"{REPO}@v9"))
    assert code == 1
    assert says in err
    assert not Path("out").exists()


def test_no_login_is_told_of_before_any_work(
    online: Hub, file: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    code, _, err = run(*pushing(file, "--push", REPO))
    assert code == 1
    assert "hf auth login" in err
    assert not Path("out").exists()


@pytest.mark.parametrize("at", ["create_repo", "upload_folder"])
def test_a_push_that_fails_leaves_the_package_and_says_how_to_go_on(
    online: Hub, package: Path, file: Path, run: Run, at: str
) -> None:
    online.fails[at] = answer(errors.HfHubHTTPError, 403)
    code, _, err = run(*pushing(file, "--push", REPO))
    assert code == 1
    assert "no permission" in err
    assert f"hf upload {REPO} out" in err
    assert (Path("out") / "manifest.json").exists()
    with pytest.raises(OutputError):
        hub.push(package, REPO)
