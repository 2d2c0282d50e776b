"""Packages: what is in the folder, what is not, equal bytes, refusals, and figures that stand in the card."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open

import wisecli
from wisecli.cli.app import main
from wisecli.data.pool import ordinary_prompts
from wisecli.data.records import EditRecord
from wisecli.data.stream import EditStream
from wisecli.editing.config import EditConfig
from wisecli.editing.merge import merge_run
from wisecli.editing.run import EditRun
from wisecli.errors import BaseMismatch, InputError, OutputError, UsageError
from wisecli.evaluation.evaluate import EvalOptions, evaluate
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import DEMO_BASE, Base, load_base
from wisecli.models.prompts import PromptEncoder
from wisecli.packaging import Measured, measure, package_side_memory
from wisecli.routing.attach import attach

EDITS = (
    ("Quarzheim is twinned with", "Old Vexby"),
    ("The mayor of Zyndorf is", "Wujkopf"),
    ("Quarzheim is twinned with", "Jyxmoor"),
    ("Who painted the Vlotz?", "Ghwazy"),
)
TEXTS = [text for edit in EDITS for text in edit]
FILES = ["README.md", "ledger.jsonl", "manifest.json", "side_memory.safetensors"]
FIGURES = Measured("tiny", "float32", "key", 3, 0.667, 0.75, 700, 0.0123)
SCORE = {"before": 0.0, "after": 1.0, "n": 3}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def base(tiny_model_dir: Path) -> Base:
    return load_base(str(tiny_model_dir), device="cpu")


@pytest.fixture(scope="module")
def stream() -> EditStream:
    return EditStream.of([EditRecord(prompt=p, target=t, id=f"e{i}") for i, (p, t) in enumerate(EDITS)])


@pytest.fixture(scope="module")
def side_memory(base: Base, stream: EditStream, tmp_path_factory: pytest.TempPathFactory) -> SideMemory:
    """Four edits really learned by a tiny random model; the first is superseded by the third."""
    config = EditConfig(
        shards=1, contexts=0, mask_density=1.0, max_steps=300, rank=32, dropout=0.0, rewording=0.0, confidence=0.7
    )
    run = EditRun(base, stream, config, tmp_path_factory.mktemp("run"))
    for _ in run:
        pass
    return merge_run(run.folder, base=base)


@pytest.fixture(scope="module")
def file(side_memory: SideMemory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("merged") / "sm.safetensors"
    side_memory.save(path)
    return path


@pytest.fixture(scope="module")
def results(base: Base, stream: EditStream, side_memory: SideMemory) -> dict[str, Any]:
    """What `wise eval --out` writes, read again."""
    about = {"name": "four", "file": "four.jsonl", "revision": None}
    options = EvalOptions(ability=False, dataset=about, side_memory="sm.safetensors")
    return json.loads(json.dumps(evaluate(base, stream, side_memory, options=options).to_json()))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*argv: object) -> tuple[int, str, str]:
        code = main(["package", *(str(a) for a in argv)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def python_of(folder: Path) -> str:
    code = re.search(r"^```python\n(.*?)^```$", card_of(folder), re.DOTALL | re.MULTILINE)
    assert code is not None
    return code[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# -- what is in a package ----------------------------------------------------------------------------------------------


def test_a_package_attaches_like_the_file_it_was_made_of(base: Base, side_memory: SideMemory, tmp_path: Path) -> None:
    package_side_memory(side_memory, tmp_path / "package", ledger=False)
    encoder = PromptEncoder(base.tokenizer)
    batch = encoder.batch([encoder.prompt(p) for p in (*TEXTS[::2], *ordinary_prompts()[:8])])
    seen = []
    for source in (side_memory, tmp_path / "package"):
        with attach(base.model, source) as attached, torch.no_grad():
            logits = base.model(**batch.inputs, use_cache=False).logits
            seen.append((logits, attached.last.memory, attached.last.indicator))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert (seen[0][1] >= 0).any()
    assert (seen[0][1] < 0).any()


def test_no_base_weights_are_inside(base: Base, side_memory: SideMemory, tmp_path: Path) -> None:
    report = package_side_memory(side_memory, tmp_path / "package")
    assert sorted(contents(tmp_path / "package")) == FILES
    with safe_open(tmp_path / "package" / "side_memory.safetensors", "pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    keys = {f"keys.{name}" for name in ("mean", "projection", "scale", "vectors", "step", "owner", "crowding")}
    assert set(tensors) == keys | {"memory.0.mask", "memory.0.values"}
    weights = list(base.model.state_dict().values())
    assert not any(t.shape == w.shape and torch.equal(t.to(w.dtype), w) for t in tensors.values() for w in weights)
    site = side_memory.site
    assert tensors["memory.0.values"].numel() <= site.d_in * site.d_out
    assert sum(f.size for f in report.files) < sum(w.numel() * w.element_size() for w in weights) / 4


def test_the_manifest_describes_the_files(side_memory: SideMemory, tmp_path: Path) -> None:
    report = package_side_memory(side_memory, tmp_path / "package")
    manifest = json.loads((tmp_path / "package" / "manifest.json").read_text())
    assert manifest["side_memory"] == json.loads(json.dumps(side_memory.manifest()))
    described = {f.name: {"bytes": f.size, "sha256": f.sha256} for f in report.files if f.name != "manifest.json"}
    assert manifest["files"] == described
    assert report.edits == {"took": 3, "failed": 0, "superseded": 1}


def test_the_ledger_has_one_line_per_edit(side_memory: SideMemory, tmp_path: Path) -> None:
    package_side_memory(side_memory, tmp_path / "package")
    lines = [json.loads(x) for x in (tmp_path / "package" / "ledger.jsonl").read_text().splitlines()]
    assert [(x["prompt"], x["target"]) for x in lines] == list(EDITS)
    assert [x["outcome"] for x in lines] == ["superseded", "took", "took", "took"]
    assert all(set(x) == {"id", "prompt", "target", "outcome", "shard", "steps"} for x in lines)


def test_without_a_ledger_no_text_of_an_edit_is_in_any_byte(
    side_memory: SideMemory, results: dict[str, Any], tmp_path: Path
) -> None:
    report = package_side_memory(
        side_memory, tmp_path / "package", ledger=False, measured=FIGURES, evaluation=results, licence="mit"
    )
    files = contents(tmp_path / "package")
    assert sorted(files) == [f for f in FILES if f != "ledger.jsonl"]
    assert not report.texts
    for text in TEXTS:
        assert not any(text.encode() in data for data in files.values()), text
    with_texts = package_side_memory(side_memory, tmp_path / "full")
    assert with_texts.content == report.content


def test_the_same_input_gives_the_same_bytes(
    side_memory: SideMemory, results: dict[str, Any], file: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"measured": FIGURES, "evaluation": results, "licence": "mit"}
    package_side_memory(side_memory, tmp_path / "a", **options)
    package_side_memory(SideMemory.load(file), tmp_path / "elsewhere" / "b", **options)
    assert contents(tmp_path / "a") == contents(tmp_path / "elsewhere" / "b")


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_measured_reliability_is_that_of_the_evaluation(
    base: Base, stream: EditStream, side_memory: SideMemory
) -> None:
    """One target is replaced by another, so that both must come to two of three."""
    entries = (*side_memory.edits[:3], dataclasses.replace(side_memory.edits[3], target="Unlearned"))
    records = (*stream.records[:3], dataclasses.replace(stream.records[3], target="Unlearned"))
    steps: list[tuple[int, int]] = []
    measured = measure(base, dataclasses.replace(side_memory, edits=entries), lambda *step: steps.append(step))
    report = evaluate(base, EditStream.of(records), side_memory, options=EvalOptions(ability=False))
    assert measured.reliability == report.scores["rel"]["exact"]["after"] == pytest.approx(2 / 3)
    assert report.routing is not None
    assert measured.routed == report.routing["kinds"]["edit"]["routed"]
    assert (measured.edits, measured.ordinary) == (3, len(ordinary_prompts()))
    assert steps[-1] == (3 + len(ordinary_prompts()),) * 2


def test_the_share_of_ordinary_prompts_is_what_the_gate_decides(base: Base, side_memory: SideMemory) -> None:
    encoder = PromptEncoder(base.tokenizer)
    with attach(base.model, side_memory) as attached:
        routed = [attached.decide(encoder.batch([encoder.prompt(p)]))[0].routed for p in ordinary_prompts()]
    assert measure(base, side_memory).opened == sum(routed) / len(routed)


def test_without_texts_no_edit_is_asked_and_the_card_says_why(
    base: Base, side_memory: SideMemory, tmp_path: Path
) -> None:
    bare = side_memory.without_texts()
    measured = measure(base, bare)
    assert (measured.reliability, measured.routed, measured.edits) == (None, None, 0)
    assert measured.opened is not None
    package_side_memory(bare, tmp_path / "package", measured=measured)
    assert "No edit was asked: the side memory does not carry" in card_of(tmp_path / "package")
    assert "Reliability" not in card_of(tmp_path / "package")


def test_another_base_is_not_measured(tiny_model: Callable[..., Any], base: Base, side_memory: SideMemory) -> None:
    other = dataclasses.replace(base, model=tiny_model("llama", fresh=True, seed=5))
    with pytest.raises(BaseMismatch):
        measure(other, side_memory)


# -- the card ----------------------------------------------------------------------------------------------------------


def test_the_card_holds_the_figures_with_their_protocol(side_memory: SideMemory, tmp_path: Path) -> None:
    package_side_memory(side_memory, tmp_path / "package", measured=FIGURES, licence="Apache-2.0")
    text = card_of(tmp_path / "package")
    about = ModelCard(text).data.to_dict()
    assert about["library_name"] == "wise"
    assert about["license"] == "apache-2.0"
    assert about["tags"] == ["knowledge-editing", "wise", "side-memory"]
    for piece in ("| 0.667 | 3 edits |", "| 0.750 | 3 edits |", "| 0.012 | 700 prompts |", "free greedy generation"):
        assert piece in text
    assert "also used to calibrate" in text
    assert side_memory.base["fingerprint"]["float32"] in text


def test_a_card_without_figures_says_so(side_memory: SideMemory, tmp_path: Path) -> None:
    package_side_memory(side_memory, tmp_path / "package")
    assert "Nothing was measured" in card_of(tmp_path / "package")


def test_only_a_base_on_a_hub_is_named_as_base_model(side_memory: SideMemory, tmp_path: Path) -> None:
    commit = "0123456789abcdef"
    known = {
        "hub": {"name": "org/model", "revision": commit},
        "demo": {"name": DEMO_BASE, "revision": None},
        "local": {"name": "/home/me/models/thing", "revision": None},
    }
    cards = {}
    for kind, base in known.items():
        sm = dataclasses.replace(side_memory, base={**side_memory.base, **base})
        package_side_memory(sm, tmp_path / kind)
        cards[kind] = card_of(tmp_path / kind)
    about = {kind: ModelCard(text).data.to_dict() for kind, text in cards.items()}
    assert about["hub"]["base_model"] == "org/model"
    assert about["hub"]["base_model_relation"] == "adapter"
    assert f"load_base('org/model', revision='{commit}')" in cards["hub"]
    assert not any("base_model" in key for kind in ("demo", "local") for key in about[kind])
    assert "thing" in cards["local"]
    assert "/home/me" not in cards["local"]


@pytest.mark.parametrize("name", [DEMO_BASE, "org/it's", "folder"])
@pytest.mark.parametrize("chat", [False, True])
def test_the_python_lines_of_any_card_are_python(
    side_memory: SideMemory, name: str, chat: bool, tmp_path: Path
) -> None:
    base = {**side_memory.base, "name": name, "revision": "abc" if "/" in name else None}
    edits = (dataclasses.replace(side_memory.edits[1], prompt='A "quoted"\n```line` | in'),)
    package_side_memory(dataclasses.replace(side_memory, base=base, chat=chat, edits=edits), tmp_path / "package")
    compile(python_of(tmp_path / "package"), "card", "exec")


def test_the_python_lines_of_the_card_run(
    base: Base, side_memory: SideMemory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package_side_memory(side_memory, tmp_path / "package")
    program = python_of(tmp_path / "package").replace('"BASE"', repr(base.name))
    program = program.replace('"FOLDER"', repr(str(tmp_path / "package")))
    exec(program, {})  # the tiny model does not stop at its end-of-sequence token, so the answer only begins so
    assert capsys.readouterr().out.lstrip().startswith(EDITS[1][1])
    assert wisecli.attach is attach


def test_an_evaluation_becomes_a_table(side_memory: SideMemory, results: dict[str, Any], tmp_path: Path) -> None:
    package_side_memory(side_memory, tmp_path / "package", evaluation=results)
    text = card_of(tmp_path / "package")
    assert "| Rel | 0.000 [0.000, 0.708] | 1.000 [0.292, 1.000] | " in text
    assert "| Gen | - | - | - | - | 0 |" in text
    assert "Protocol `end-of-stream`; dataset `four` (`four.jsonl`); base `base`; router `key`" in text
    assert "edits 4, of which 1 superseded" in text
    kept = json.loads((tmp_path / "package" / "manifest.json").read_text())["evaluation"]
    assert kept["scores"] == results["scores"]
    assert kept["routing"]["recall"] == results["routing"]["recall"]
    assert kept["side_memory"] == {"digest": side_memory.digest, "router": "key"}


def test_intervals_stand_in_the_card(side_memory: SideMemory, results: dict[str, Any], tmp_path: Path) -> None:
    score = {"before": 0.25, "after": 0.5, "before_interval": None, "after_interval": [0.125, 0.75], "n": 8}
    scores = {"rel": {"exact": score, "token": {**score, "n": 7}}}
    package_side_memory(side_memory, tmp_path / "package", evaluation=results | {"scores": scores})
    assert "| Rel | 0.250 | 0.500 [0.125, 0.750] | 0.250 | 0.500 [0.125, 0.750] | 8 (token 7) |" in card_of(
        tmp_path / "package"
    )


def test_nothing_that_was_asked_or_answered_is_in_a_package(
    side_memory: SideMemory, results: dict[str, Any], tmp_path: Path
) -> None:
    """Items stand in several parts of the results; none of these parts may get into a file."""
    secret = "wholly-unlikely-words"
    items = [{**item, "prompt": secret, "before": secret, "after": secret} for item in results["items"]]
    told = {
        "items": items,
        "ood": {"token": None, "example": None, "texts": [{"edit": "e1", "text": secret}]},
        "fresh": {"scores": results["scores"], "items": items},
        "retention": [{"edits": 1, "scores": {}, "items": items}],
        "wilke": {"items": items},
        "unknown": secret,
    }
    package_side_memory(side_memory, tmp_path / "package", evaluation=results | told)
    assert not any(secret.encode() in data for data in contents(tmp_path / "package").values())


def test_a_card_without_texts_says_what_can_be_found_out(side_memory: SideMemory, tmp_path: Path) -> None:
    package_side_memory(side_memory, tmp_path / "package", ledger=False)
    assert "hash of prompt and target" in card_of(tmp_path / "package")


def test_the_digest_is_of_the_tensors_alone(side_memory: SideMemory, file: Path, tmp_path: Path) -> None:
    report = package_side_memory(side_memory, tmp_path / "package", ledger=False)
    loaded = SideMemory.load(tmp_path / "package" / "side_memory.safetensors")
    assert report.content == side_memory.digest == SideMemory.load(file).digest == loaded.digest
    keys = dataclasses.replace(side_memory.keys, keys=-side_memory.keys.keys)
    assert dataclasses.replace(side_memory, keys=keys).digest != side_memory.digest


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "other"}, "schema 'other'"),
        ({"schema_version": "3.0"}, r"schema version 3.0(.|\n)*newer wise"),
        ({"schema_version": "1.0"}, r"schema version 1.0(.|\n)*again with wise eval"),
        ({"schema_version": None}, r"schema version None(.|\n)*again with wise eval"),
        ({"side_memory": None, "method": None}, "base alone"),
        ({"side_memory": None}, "not of one side memory"),
        ({"side_memory": "sm.safetensors"}, "no readable side_memory"),
        ({"dataset": "four.jsonl", "base": "wise-demo"}, "no readable dataset, base"),
        ({"protocol": "end-of-stream"}, "no readable protocol"),
        ({"scores": {"rel": {"exact": {"after": "high"}}}}, "no readable scores"),
        ({"scores": {"rel": {"exact": SCORE | {"after_interval": [0.1]}}}}, "no readable scores"),
        ({"scores": {"rel": {"exact": SCORE | {"after_interval": "wide"}}}}, "no readable scores"),
        ({"scores": None}, "no readable scores"),
        ({"side_memory": {"router": "key"}}, "does not say which side memory"),
        (
            {"side_memory": {"path": "sm.safetensors", "digest": "0" * 64}},
            "of sm.safetensors with the digest 000000000000",
        ),
    ],
)
def test_other_evaluations_are_refused(
    side_memory: SideMemory, results: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as refused:
        package_side_memory(side_memory, tmp_path / "package", evaluation=results | change)
    assert re.search(message, f"{refused.value.message}\n{refused.value.hint}")
    assert not (tmp_path / "package").exists()


def test_an_evaluation_that_is_no_object_is_refused(side_memory: SideMemory, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="schema None"):
        package_side_memory(side_memory, tmp_path / "package", evaluation=[1])  # type: ignore[arg-type]


def test_a_folder_with_something_else_is_refused_even_with_force(side_memory: SideMemory, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(OutputError, match="not a package"):
        package_side_memory(side_memory, tmp_path, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        package_side_memory(side_memory, tmp_path / "file", force=True)


def test_a_package_is_replaced_only_with_force_and_wholly(side_memory: SideMemory, tmp_path: Path) -> None:
    package_side_memory(side_memory, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="already holds a package"):
        package_side_memory(side_memory, tmp_path, ledger=False)
    assert contents(tmp_path) == before
    package_side_memory(side_memory, tmp_path, ledger=False, force=True)
    assert "ledger.jsonl" not in contents(tmp_path)


def test_an_interrupted_package_has_no_manifest_and_can_be_made_again(
    side_memory: SideMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    package_side_memory(side_memory, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("wisecli.packaging.write_json", stop)
        with pytest.raises(KeyboardInterrupt):
            package_side_memory(side_memory, tmp_path, force=True)
    assert "manifest.json" not in contents(tmp_path)
    with pytest.raises(OutputError, match="not finished"):
        package_side_memory(side_memory, tmp_path)
    package_side_memory(side_memory, tmp_path, force=True)
    assert sorted(contents(tmp_path)) == FILES


@pytest.mark.parametrize("licence", ["", "my own: terms", "mit\nlicense: other"])
def test_a_licence_that_is_no_id_is_refused(side_memory: SideMemory, tmp_path: Path, licence: str) -> None:
    with pytest.raises(UsageError):
        package_side_memory(side_memory, tmp_path / "package", licence=licence)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_measures_and_packages(
    run: Run, file: Path, results: dict[str, Any], side_memory: SideMemory, base: Base, tmp_path: Path
) -> None:
    (tmp_path / "results.json").write_text(json.dumps(results))
    out = tmp_path / "package"
    code, text, err = run(file, "-o", out, "--eval", tmp_path / "results.json", "--license", "mit", "--device", "cpu")
    assert (code, sorted(contents(out))) == (0, FILES)
    for piece in (*FILES, "1.000 exact", "wise chat --side-memory", "3 took, 0 failed, 1 superseded"):
        assert piece in text
    assert "local folder" in err
    measured = measure(base, side_memory)
    package_side_memory(side_memory, tmp_path / "again", measured=measured, evaluation=results, licence="mit")
    assert contents(out) == contents(tmp_path / "again")


def test_the_command_in_json_and_quiet(run: Run, file: Path, tmp_path: Path) -> None:
    code, text, _ = run(file, "-o", tmp_path / "a", "--no-measure", "--no-ledger", "--json")
    document = json.loads(text)
    assert (code, document["texts"], document["measured"]) == (0, False, None)
    assert set(document["files"]) == set(FILES) - {"ledger.jsonl"}
    code, text, err = run(file, "-o", tmp_path / "b", "--no-measure", "-q")
    assert (code, text, err) == (0, f"{tmp_path / 'b'}\n", "")


def test_a_package_can_be_packaged_again(run: Run, file: Path, tmp_path: Path) -> None:
    """Texts are taken out of a package by packaging it in place."""
    assert run(file, "-o", tmp_path / "package", "--no-measure", "-q")[0] == 0
    code, _, _ = run(tmp_path / "package", "-o", tmp_path / "package", "--no-measure", "--no-ledger", "--force", "-q")
    assert code == 0
    assert not any(t.encode() in data for t in TEXTS for data in contents(tmp_path / "package").values())


def test_the_command_refuses_before_it_loads_the_base(
    run: Run, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("wisecli.models.base.load_base", never)
    (tmp_path / "wrong.json").write_text('{"schema": "something"}')
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("")
    cases = [
        ((file, "-o", tmp_path / "x", "--eval", tmp_path / "wrong.json"), 1, "schema 'something'"),
        ((file, "-o", tmp_path / "x", "--eval", tmp_path / "absent.json"), 1, "Cannot read"),
        ((file, "-o", tmp_path / "taken"), 1, "not a package"),
        ((file, "-o", tmp_path / "x", "--license", "no id"), 2, "licence id"),
        ((tmp_path / "absent.safetensors", "-o", tmp_path / "x"), 1, "does not exist"),
    ]
    for argv, exit_code, message in cases:
        code, text, err = run(*argv)
        assert (code, text) == (exit_code, ""), argv
        assert message in err
    assert not (tmp_path / "x").exists()


def test_the_texts_of_withdrawn_edits_are_not_shipped(side_memory: SideMemory, tmp_path: Path) -> None:
    gone, kept = (e for e in side_memory.edits if e.id in ("e1", "e2"))
    package_side_memory(side_memory.withdrawn([gone.id]), tmp_path / "package")
    shipped = SideMemory.load(tmp_path / "package" / "side_memory.safetensors")
    texts = {e.id: (e.prompt, e.target) for e in shipped.edits}
    assert (texts[gone.id], texts[kept.id]) == ((None, None), (kept.prompt, kept.target))
    for file in (tmp_path / "package").iterdir():
        assert str(gone.prompt).encode() not in file.read_bytes()
