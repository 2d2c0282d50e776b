"""Finding the file of a dataset: paths, the folder variable, a hub cache made by the test, and no network."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import pytest

from wisecli.data import (
    DATASETS,
    Located,
    contexts,
    locate_dataset,
    ordinary_prompts,
    read_dataset,
    read_edits,
    resolve_dataset,
)
from wisecli.errors import InputError, UsageError

ROOT = Path(__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
EDIT = json.dumps({"prompt": "p", "target": "t"})


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No dataset folder, and a working folder without files that could be mistaken for datasets."""
    monkeypatch.delenv("WISE_DATA", raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and a hub that is switched off."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(EDIT, encoding="utf-8")
    return path


def fill(cache: Path, name: str, commit: str | None = None, ref: str = "") -> Path:
    """Lay one dataset's file out as the hub client does: at the pinned commit, or at another that a branch names."""
    known = DATASETS[name]
    commit = commit or (known.revision if known.revision != "main" else COMMIT)
    repo = cache / f"datasets--{known.repo.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    if ref or known.revision == "main":
        (repo / "refs" / (ref or "main")).write_text(commit)
    return write(repo / "snapshots" / commit / known.file)


def refusal(*args: object, **options: object) -> InputError:
    with pytest.raises(InputError) as caught:
        resolve_dataset(*args, **options)  # type: ignore[arg-type]
    return caught.value


def test_a_file_is_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl")
    assert resolve_dataset(path) == path
    assert resolve_dataset(str(path)) == path
    assert resolve_dataset("zsre", path=path) == path


def test_a_folder_with_one_file_of_edits(tmp_path: Path) -> None:
    path = write(tmp_path / "d" / "only.jsonl")
    write(tmp_path / "d" / "README.md")
    assert resolve_dataset(tmp_path / "d") == path
    assert resolve_dataset("zsre", path=tmp_path / "d") == path


def test_a_folder_with_several_files(tmp_path: Path) -> None:
    for name in ("a.json", "b.jsonl.gz"):
        write(tmp_path / "d" / name)
    error = refusal(tmp_path / "d")
    assert "holds 2 files: a.json, b.jsonl.gz" in error.message
    assert str(tmp_path / "d" / "a.json") in str(error.hint)
    expected = write(tmp_path / "d" / "zsre_mend_eval.json")
    assert resolve_dataset("zsre", path=tmp_path / "d") == expected


def test_a_folder_with_nothing_to_read(tmp_path: Path) -> None:
    assert "holds no file named counterfact.json or" in refusal("counterfact", path=tmp_path / "cwd").message
    assert "holds no file of edits" in refusal(tmp_path / "cwd").message


def test_a_path_that_leads_nowhere_names_its_neighbours(tmp_path: Path) -> None:
    path = write(tmp_path / "edits.json")
    assert f"Did you mean {path}?" in str(refusal(tmp_path / "edit.json").hint)
    assert f"Did you mean {path}?" in str(refusal("zsre", path=tmp_path / "edit.json").hint)
    assert "does not exist" in refusal("edits.jsonl").message


def test_unknown_names_list_the_known_ones_closest_first() -> None:
    error = refusal("zsr")
    assert error.message == '"zsr" is neither a file nor a known dataset'
    assert str(error.hint).startswith("Use one of zsre, ")
    assert all(name in str(error.hint) for name in DATASETS if ":" not in name)
    assert ":" not in str(error.hint)
    assert str(refusal("wikibigedit:9").hint).startswith("Use one of wikibigedit:1, wikibigedit:2, ")
    assert str(refusal("zsre:2").hint).startswith("Use one of zsre, ")
    assert str(refusal("WikiBigEdits").hint).startswith("Use one of wikibigedit, ")
    assert "neither a file nor" in refusal("").message


@pytest.mark.parametrize("below", ["", "zsre"])
def test_the_folder_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str) -> None:
    folder = tmp_path / "sets"
    path = write(folder / below / "ZsRE-test-all.json")
    monkeypatch.setenv("WISE_DATA", str(folder))
    assert resolve_dataset("zsre") == path
    preferred = write(folder / below / "zsre_mend_edit.json")
    assert resolve_dataset("zsre") == preferred


def test_the_folder_variable_must_name_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WISE_DATA", "nowhere")
    assert refusal("zsre").message == "WISE_DATA is nowhere, which is no folder"


def test_a_path_goes_before_the_folder_variable_and_that_before_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    cached = fill(cache, "zsre")
    assert resolve_dataset("zsre") == cached
    in_folder = write(tmp_path / "sets" / "zsre_mend_edit.json")
    monkeypatch.setenv("WISE_DATA", str(tmp_path / "sets"))
    assert resolve_dataset("zsre") == in_folder
    local = write(tmp_path / "cwd" / "zsre" / "zsre_mend_eval.json")
    assert resolve_dataset("zsre") == Path("zsre") / local.name
    assert resolve_dataset("zsre", path=cached) == cached


def test_a_folder_that_happens_to_have_the_name_of_a_dataset(tmp_path: Path, cache: Path) -> None:
    write(tmp_path / "cwd" / "zsre" / "package.json")
    assert "out of reach or switched off" in refusal("zsre").message


def test_a_pinned_revision_is_looked_up_in_the_cache(cache: Path) -> None:
    cached = fill(cache, "wiki-counterfact", COMMIT)
    assert locate_dataset("wiki-counterfact", revision=COMMIT) == Located(cached, "wiki-counterfact", COMMIT)
    other = "f" * 40
    assert f"--repo-type dataset --revision {other}`" in str(refusal("wiki-counterfact", revision=other).hint)


def test_the_default_revision_is_a_commit_where_one_is_known_and_resolved_to_one_where_not(cache: Path) -> None:
    pinned = DATASETS["counterfact"].revision
    assert len(pinned) == 40
    located = locate_dataset("counterfact:train", path=fill(cache, "counterfact:train"))
    assert located.revision == pinned
    assert locate_dataset("counterfact:train") == located
    cached = fill(cache, "wikibigedit:3")
    assert locate_dataset("wikibigedit:3") == Located(cached, "wikibigedit:3", COMMIT)
    assert resolve_dataset("wikibigedit:3") == cached


def test_a_branch_may_hold_another_version_than_the_pinned_one(cache: Path) -> None:
    pinned, latest = fill(cache, "zsre"), fill(cache, "zsre", COMMIT, ref="main")
    assert locate_dataset("zsre").path == pinned
    assert locate_dataset("zsre", revision="main") == Located(latest, "zsre", COMMIT)


def test_a_revision_goes_before_local_copies(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = write(tmp_path / "sets" / "zsre_mend_edit.json")
    monkeypatch.setenv("WISE_DATA", str(tmp_path / "sets"))
    cached = fill(cache, "zsre")
    assert resolve_dataset("zsre") == local
    assert resolve_dataset("zsre", revision=DATASETS["zsre"].revision) == cached


@pytest.mark.parametrize("name", ["demo", "temporal", "mine.jsonl"])
def test_a_revision_is_refused_where_there_is_no_repository(tmp_path: Path, name: str) -> None:
    write(tmp_path / "cwd" / "mine.jsonl")
    with pytest.raises(UsageError, match=f"the revision abc was asked of {name}"):
        locate_dataset(name, revision="abc")


def test_files_outside_the_cache_have_no_revision(tmp_path: Path) -> None:
    path = write(tmp_path / "snapshots" / COMMIT / "mine.v2.jsonl")
    assert locate_dataset(path) == Located(path, "mine", None)
    assert locate_dataset("temporal", path=path) == Located(path, "temporal", None)
    assert locate_dataset(write(tmp_path / ".hidden")).name == ".hidden"


def test_one_call_finds_and_reads(tmp_path: Path, cache: Path) -> None:
    cached = fill(cache, "zsre")
    located, stream = read_dataset("zsre", limit=1)
    assert located == Located(cached, "zsre", DATASETS["zsre"].revision)
    assert [(edit.prompt, edit.target) for edit in stream] == [("p", "t")]
    path = tmp_path / "two.jsonl"
    path.write_text(f"{EDIT}\n{EDIT}\n")
    located, stream = read_dataset(str(path), limit=1)
    assert (located, len(stream)) == (Located(path, "two"), 1)
    with pytest.raises(InputError):
        read_dataset("nothing")


@pytest.mark.usefixtures("cache")
def test_offline_tells_how_to_get_the_file() -> None:
    error = refusal("zsre")
    assert "zsre is not on this machine" in error.message
    command = "hf download zjunlp/KnowEdit benchmark/ZsRE/ZsRE-test-all.json --repo-type dataset --revision "
    assert f"`{command}{DATASETS['zsre'].revision}`" in str(error.hint)
    assert "such as path/to/zsre_mend_edit.json" in str(error.hint)
    assert "WISE_DATA" in str(error.hint)
    followed = "hf download lukasthede/WikiBigEdit wiki_big_edit_20240201_20240220.json --repo-type dataset`"
    assert followed in str(refusal("wikibigedit").hint)


@pytest.mark.parametrize("name", ["hallucination", "temporal"])
def test_a_set_that_is_not_on_the_hub_tells_where_it_is(name: str) -> None:
    error = refusal(name)
    assert "https://github.com/zjunlp/EasyEdit" in str(error.hint)
    assert f"such as path/to/{name}-edit.json" in str(error.hint)


@pytest.mark.parametrize("place", ["dataset_info", "hf_hub_download"])
@pytest.mark.parametrize(
    ("raised", "words"),
    [
        ("LocalEntryNotFoundError", "out of reach"),
        ("HFValidationError", "answered with HFValidationError"),
        ("EntryNotFoundError", "answered with EntryNotFoundError"),
        ("OSError", "OSError: no"),
        ("RuntimeError", "out of reach, RuntimeError: no"),
    ],
)
@pytest.mark.usefixtures("cache")
def test_every_failure_of_the_hub_is_an_input_error(
    monkeypatch: pytest.MonkeyPatch, raised: str, words: str, place: str
) -> None:
    import huggingface_hub

    def fail(*args: object, **options: object) -> str:
        kind = getattr(huggingface_hub.errors, raised, None) or {"OSError": OSError}.get(raised, RuntimeError)
        raise kind("no")

    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda *args, **options: None)
    monkeypatch.setattr(huggingface_hub, place, fail)
    assert words in refusal("zsre").message


@pytest.mark.usefixtures("cache")
def test_the_hub_is_asked_for_the_file_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, object] = {}

    def download(repo: str, file: str, **options: str) -> str:
        asked.update(options, repo=repo, file=file)
        return str(write(tmp_path / "datasets--a--b" / "snapshots" / COMMIT / "got.json"))

    def about(repo: str, **options: object) -> None:
        asked.update(first=(repo, options["revision"]), timeout=options["timeout"])

    monkeypatch.setattr(huggingface_hub, "dataset_info", about)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    located = locate_dataset("wikibigedit")
    assert (located.path.name, located.revision) == ("got.json", COMMIT)
    wikibigedit = DATASETS["wikibigedit"]
    expected = {"repo": wikibigedit.repo, "file": wikibigedit.file, "repo_type": "dataset", "revision": "main"}
    assert asked == expected | {"first": (wikibigedit.repo, "main"), "timeout": 5.0}


def test_a_hub_whose_name_cannot_be_resolved_fails_quickly(tmp_path: Path) -> None:
    code = (
        "from wisecli.data import datasets\n"
        "try: datasets.locate_dataset('zsre')\n"
        "except datasets.InputError as err: print(err.message)\n"
    )
    kept = {key: value for key, value in os.environ.items() if not key.lower().startswith(("hf_", "http", "all_proxy"))}
    env = kept | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "https://hub.invalid", "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, timeout=60)
    assert "could not be fetched (the hub is out of reach" in run.stdout, run.stderr
    assert time.monotonic() - began < 10  # the limit is 5 s; the rest is starting Python on a busy machine


def test_in_a_process_of_its_own_with_a_cache_and_no_heavy_imports(tmp_path: Path) -> None:
    cached = fill(tmp_path / "home" / "hub", "zsre")
    code = (
        "import sys, wisecli.data as data\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "print(data.resolve_dataset('zsre'))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE", "WISE_"))}
    env = kept | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip()) == (0, str(cached)), run.stderr


def test_the_table_is_complete() -> None:
    for name, dataset in DATASETS.items():
        assert dataset.name == name
        assert dataset.about
        assert dataset.licence
        assert dataset.local
        assert dataset.repo or dataset.page or dataset.shipped
        assert dataset.revision == "main" or re.fullmatch("[0-9a-f]{40}", dataset.revision)
        if dataset.file:
            assert Path(dataset.file).name in dataset.local


def test_the_time_steps_of_wikibigedit_follow_one_another() -> None:
    spans = [DATASETS[f"wikibigedit:{step}"].file.removesuffix(".json").split("_")[-2:] for step in range(1, 9)]
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
    assert DATASETS["wikibigedit"].file == DATASETS["wikibigedit:1"].file


def test_the_shipped_demonstration(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (files("wisecli.data") / "demo_edits.jsonl").is_file():
        assert "Install the package again." in str(refusal("demo").hint)
        pytest.skip("the demonstration edits are not in this checkout")
    assert read_edits(resolve_dataset("demo")).format == "native"


@pytest.mark.parametrize(("name", "read"), [("pool.txt", ordinary_prompts), ("contexts.txt", contexts)])
def test_the_shipped_texts(name: str, read) -> None:
    if not (files("wisecli.data") / name).is_file():
        pytest.skip(f"{name} is not in this checkout")
    lines = read()
    assert lines
    assert all(line == line.strip() and line for line in lines)
    assert len(set(lines)) == len(lines)
    assert read() is lines
