"""The doctor: probe edits that the pool knows nothing of, figures that are the run's own, a verdict instead of a
traceback, and a config that gives the run it describes."""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHAT_TEMPLATE, KINDS, build_model

from wisecli.cli.app import main
from wisecli.data.pool import Pool, ordinary_prompts, pool_facts
from wisecli.doctor import Candidate, DoctorOptions, Figure, Learned, examine
from wisecli.doctor.layers import candidate_layers, entries_at, gate_figures
from wisecli.doctor.probes import FEWEST, MOST, probe_edits
from wisecli.doctor.report import LIMITED, READY, UNSUPPORTED, UNUSABLE, judge
from wisecli.editing.config import EditConfig
from wisecli.editing.config_file import BASE, DTYPES, ConfigFile, write_config
from wisecli.editing.editor import Editor
from wisecli.errors import InputError, OutputError, UsageError
from wisecli.evaluation.asking import drain
from wisecli.models.base import Base, load_base
from wisecli.models.site import auto_layer, find_site
from wisecli.models.upper import UpperModel

EDITS = Path(__file__).parents[1] / "examples" / "edits.jsonl"


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def _shrink(patched: pytest.MonkeyPatch) -> None:
    """A pool of a few hundred prompts, the best layer alone and few steps, so that it takes no minutes."""
    kinds = sorted({f.relation for f in pool_facts()})[:9]
    facts = tuple(f for k in kinds for f in [f for f in pool_facts() if f.relation == k][:9])
    ordinary = ordinary_prompts()[:40]
    patched.setattr("wisecli.doctor.examination._LEARNED", 1)
    patched.setattr("wisecli.doctor.examination.EditConfig", partial(EditConfig, max_steps=25))
    for module in ("doctor.probes", "data.pool", "editing.rewording"):
        patched.setattr(f"wisecli.{module}.pool_facts", lambda: facts)
    for module in ("data.pool", "editing.merge"):
        patched.setattr(f"wisecli.{module}.ordinary_prompts", lambda: ordinary)


@pytest.fixture
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    _shrink(monkeypatch)


@pytest.fixture
def few_steps(small_pool: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that do not look at what was learned."""
    monkeypatch.setattr("wisecli.doctor.examination.EditConfig", partial(EditConfig, max_steps=2))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[[str], Path]:
    """`model_dir(kind)`: folder of a tiny random model with its tokenizer."""

    def make(kind: str) -> Path:
        path = tmp_path_factory.mktemp(kind) / "base"
        build_model(kind, len(tokenizer)).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return make


# -- probe edits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "seed"), [(FEWEST, 0), (12, 0), (12, 1), (17, 2), (MOST, 3)])
def test_probe_edits_are_counterfactual_and_unknown_to_the_pool(n: int, seed: int) -> None:
    probes = probe_edits(n, seed)
    facts = {f.prompts[0]: f for f in pool_facts()}
    answers: dict[str, set[str]] = {}
    for f in pool_facts():
        answers.setdefault(f.relation, set()).add(f.answer)
    records = probes.stream.records
    assert len(records) == n == len({r.id for r in records})
    assert not probes.stream.contradictions
    assert not probes.stream.duplicates
    edited = {r.prompt for r in records}
    pool = set(probes.pool().prompts)
    for r in records:
        fact = facts[r.prompt]
        assert r.target.casefold() != fact.answer.casefold()
        assert r.target in answers[fact.relation]
        assert (r.truth, r.rephrases) == (fact.answer, fact.prompts[1:])
        near = {p.prompt for p in r.locality}
        assert near
        assert not any(facts[e] for e in edited if near & set(facts[e].prompts))
        assert not pool & {r.prompt, *r.rephrases, *near}
    assert len(probes.rest) > 0.7 * len(pool_facts())
    assert {f.relation for f in probes.rest}.isdisjoint(facts[p].relation for p in edited)


def test_the_seed_draws_the_probe_edits() -> None:
    assert probe_edits(12, 0).stream.digest == probe_edits(12, 0).stream.digest
    assert probe_edits(12, 0).stream.digest != probe_edits(12, 1).stream.digest


@pytest.mark.parametrize("n", [0, FEWEST - 1, MOST + 1])
def test_a_number_of_probe_edits_out_of_range_is_refused(n: int) -> None:
    with pytest.raises(UsageError, match=str(n)):
        probe_edits(n, 0)


# -- layers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 100))
def test_candidate_layers_hold_the_default_and_leave_one_above(n: int) -> None:
    layers = candidate_layers(n)
    assert list(layers) == sorted(set(layers))
    assert auto_layer(n) in layers
    assert 1 <= len(layers) <= 4
    assert len(layers) >= min(3, n - 1)
    assert max(layers) <= max(0, n - 2)


def test_wanted_layers_are_taken_as_they_are() -> None:
    assert candidate_layers(32, (18, 10, -1, 10)) == (10, 18, 31)
    with pytest.raises(UsageError, match="no layer 32"):
        candidate_layers(32, (32,))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_one_pass_gives_every_layer_what_a_capture_of_its_own_gives(kind: str, tiny_model: Any, encoder: Any) -> None:
    model = tiny_model(kind)
    base, prompts = Base(model, encoder.tokenizer, "tiny"), ordinary_prompts()[:70]
    found = drain(entries_at(base, encoder, (0, 1, 2), prompts))
    for layer, h in found.items():
        captured = UpperModel(model, find_site(model, layer), encoder).capture([encoder.prompt(p) for p in prompts])
        assert torch.equal(h, torch.stack([r.entry for r in captured]))
    assert not torch.equal(found[0], found[1])


def test_gate_figures_are_held_out() -> None:
    """Features that only memory could tell apart: a space fitted on the same facts would, a held-out one cannot."""
    generator = torch.Generator().manual_seed(0)
    pool = Pool.of(facts=pool_facts()[:200])
    noise = torch.randn(len(pool.prompts), 512, generator=generator)
    fact = torch.randn(max(pool.group) + 1, 512, generator=generator)[torch.tensor(pool.group)]
    assert abs(float(gate_figures(noise, pool, 32)["auc"] or 0) - 0.5) < 0.1
    told = gate_figures(noise + 3 * fact, pool, 32)
    assert float(told["auc"] or 0) > 0.95
    assert float(told["routed"] or 0) > 0.9
    assert float(told["opened"] or 0) < 0.05


def test_an_editor_takes_a_pool_as_it_is(tiny_model: Any, tokenizer: Any) -> None:
    base = Base(tiny_model("llama"), tokenizer, "tiny")
    pool = probe_edits(12, 0).pool(["A line\tA wording of it"])
    assert Editor(base, EditConfig(), pool=pool).pool == pool != Editor(base, EditConfig()).pool
    assert "A wording of it" in pool.prompts


# -- the verdict -------------------------------------------------------------------------------------------------------


def _figure(value: float | None, n: int = 12) -> Figure:
    return Figure(value, 0.0, 1.0, n)


GOOD = Learned(
    edits=12, took=12, rel=_figure(1.0), gen=_figure(0.9), gen_open=0.95, loc_near=_figure(1.0), loc_near_open=0.9,
    routed=0.9, near_opened=0.02, auc=0.99, ordinary_opened=0.0, known=0.95, epsilon=0.4, seconds_per_edit=1.0,
    merge_seconds=1.0, bytes=10, bytes_per_edit=1,
)  # fmt: skip
CANDIDATE = Candidate(5, site="x", shape=(2, 3), auc=0.99, epsilon=0.4, routed=0.9, opened=0.02, learned=GOOD)
SEEN = {
    "nothing": ({}, {}, READY, ""),
    "no edit took": ({"rel": _figure(0.0), "took": 0}, {}, UNUSABLE, "0 of 12 probe edits"),
    "some edits took": ({"rel": _figure(0.75), "took": 10}, {}, LIMITED, "9 of 12 probe edits"),
    "the gate keeps wordings out": ({"gen": _figure(0.3), "gen_open": 0.9}, {}, LIMITED, "keeps the others out: 90 %"),
    "wordings are not carried": ({"gen": _figure(0.3), "gen_open": 0.35}, {}, LIMITED, "hardly more"),
    "near prompts change": ({"loc_near": _figure(0.75)}, {}, LIMITED, "25 % of near prompts"),
    "ordinary prompts pass": ({"ordinary_opened": 0.1}, {}, LIMITED, "10 % of ordinary prompts"),
    "the base knows nothing": ({"known": 0.5}, {}, LIMITED, "knows too few of the probe facts (50 %"),
    "the gate is blind": ({}, {"auc": 0.6}, LIMITED, "AUC 0.60"),
}


@pytest.mark.parametrize("name", list(SEEN))
def test_the_verdict_names_what_was_seen(name: str) -> None:
    learned, candidate, level, words = SEEN[name]
    chosen = replace(CANDIDATE, learned=replace(GOOD, **learned), **candidate)  # type: ignore[arg-type]
    verdict = judge((chosen,), chosen)
    assert verdict.level == level
    assert words in verdict.text
    assert len(verdict.reasons) == (level != READY)


def test_a_base_that_cannot_be_edited_is_told_everything_that_was_seen() -> None:
    found = replace(GOOD, rel=_figure(0.0), took=0, known=0.5)
    chosen = replace(CANDIDATE, learned=found, auc=0.5)
    verdict = judge((chosen,), chosen)
    assert verdict.level == UNUSABLE
    for words in ("0 of 12 probe edits", "AUC 0.50", "knows too few"):
        assert words in verdict.text


def test_without_a_site_nothing_is_supported_and_without_a_trial_nothing_is_usable() -> None:
    none = [Candidate(i, reason="its experts are fused") for i in (3, 4)]
    assert judge(none, None).text == "not supported: its experts are fused."
    failed = replace(CANDIDATE, learned=None, reason="RuntimeError: no")
    assert judge((*none, failed), None).level == UNUSABLE


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_any_architecture_gets_a_verdict(
    kind: str, small_pool: None, model_dir: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model_dir(kind)
    capsys.readouterr()  # saving draws a bar
    code, out, err = run(capsys, "doctor", "--model", folder, "--edits", 4, "--layers", "1,2", "--json")
    report = json.loads(out)
    level, chosen = report["verdict"]["level"], report["layer"]
    assert err == ""
    assert level in (READY, LIMITED, UNUSABLE)
    assert code == (3 if level == UNUSABLE else 0)
    assert [c["layer"] for c in report["candidates"]] == [1, 2]
    assert all(0 <= c[k] <= 1 for c in report["candidates"] for k in ("auc", "routed", "opened"))
    assert [c["layer"] for c in report["candidates"] if c["learned"]] == [chosen]
    (found,) = (c["learned"] for c in report["candidates"] if c["learned"])
    assert found["edits"] == found["rel"]["n"] == 4
    assert found["gen"]["n"] == 12
    assert (level == UNUSABLE) == (found["rel"]["value"] < 0.5)
    assert level != READY or found["known"] > 0.7  # a random model knows nothing, unless by chance
    assert found["bytes"] > found["bytes_per_edit"] * 4 > 0
    assert (report["config"] is None) == (code == 3)


def test_a_base_with_a_chat_template_is_asked_in_it(
    few_steps: None, tiny_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wisecli.doctor.report.LEAST", 0.0)  # whatever a random model makes of its edits
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = CHAT_TEMPLATE
    base = Base(tiny_model("llama"), chatty, "tiny")
    for chat, used in ((None, True), (False, False)):
        report = drain(examine(base, DoctorOptions(layers=(2,), edits=4, chat=chat)))
        assert report.verdict.usable, report.verdict.text
        assert (report.config or {})["chat"] is used


def test_fused_experts_are_a_verdict_not_a_traceback(
    small_pool: None, model_dir: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder = tmp_path / "wise-edit.json", model_dir("mixtral")
    capsys.readouterr()
    code, out, err = run(capsys, "doctor", "--model", folder, "-o", config)
    assert code == 3
    assert "not supported" in out
    assert "experts are fused" in out.replace("\n", " ")
    assert err.startswith("warning: ")
    assert f"{config.name} is not written" in err
    assert not config.exists()
    code, out, _ = run(capsys, "doctor", "--model", folder, "--json")
    assert (code, json.loads(out)["verdict"]["level"]) == (3, UNSUPPORTED)


def test_a_base_of_no_use_is_said_to_be_so(
    small_pool: None, tiny_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", fresh=True)
    model.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    report = drain(examine(Base(model, tokenizer, "tiny"), DoctorOptions(layers=(2,), edits=4)))
    assert not report.verdict.usable
    assert report.config is None

    def fails(*args: Any) -> Any:
        raise RuntimeError("this kernel is not there\nand more")
        yield

    monkeypatch.setattr("wisecli.doctor.examination.learn_probes", fails)
    base = Base(tiny_model("llama"), tokenizer, "tiny")
    report = drain(examine(base, DoctorOptions(layers=(2,), edits=4)))
    assert report.verdict.text == "not usable: RuntimeError: this kernel is not there."
    monkeypatch.setattr("wisecli.doctor.examination.learn_probes", _out_of_memory)
    with pytest.raises(MemoryError):
        drain(examine(base, DoctorOptions(layers=(2,), edits=4)))


def _out_of_memory(*args: Any) -> Any:
    raise MemoryError
    yield


def test_the_base_is_left_as_it_was(few_steps: None, tiny_model: Any, tokenizer: Any) -> None:
    model = tiny_model("llama", fresh=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    drain(examine(Base(model, tokenizer, "tiny"), DoctorOptions(layers=(2,), edits=4)))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "generate" not in model.__dict__


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        (("--edits", "2"), 2, "--edits"),
        (("--layers", "1,x"), 2, "--layers"),
        (("--layers", "9"), 2, "no layer 9"),
        (("--chat",), 2, "chat template"),
        (("--pool", "nowhere.txt"), 1, "nowhere.txt"),
        (("--model", "/nowhere/at/all"), 1, "/nowhere/at/all"),
        (("--out", str(EDITS)), 1, "is no config"),
    ],
)
def test_what_cannot_be_done_is_one_clear_error(
    options: tuple[str, ...], code: int, named: str, small_pool: None, capsys: pytest.CaptureFixture[str]
) -> None:
    got, out, err = run(capsys, "doctor", *options)
    assert got == code
    assert named in err
    assert out == ""
    assert "Traceback" not in err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor", "--help")
    assert code == 0
    assert "Example: wise doctor" in out


# -- the config --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config that the doctor wrote for the demonstration base."""
    path = tmp_path_factory.mktemp("doctor") / "wise-edit.json"
    argv = ["doctor", "--layers", "4", "--edits", "4", "--seed", "7", "-o", str(path), "-q"]
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(io.StringIO()) as out:
        _shrink(patched)
        assert main(argv) == 0
    assert out.getvalue() == f"{path}\n"
    return path


@pytest.fixture
def described(small_pool: None, written: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copy(written, tmp_path))


def test_a_config_gives_the_run_it_describes(described: Path, tmp_path: Path, capsys: Any) -> None:
    content = json.loads(described.read_text())
    assert (content["layer"], content["seed"], content["model"]) == (4, 7, "wise-demo")
    code, _, err = run(
        capsys, "edit", EDITS, "--limit", 2, "--config", described, "--out", tmp_path / "a", "--json"
    )  # fmt: skip
    assert code == 0, err
    made = json.loads((tmp_path / "a" / "run.json").read_text())
    assert made["config"] == {k: v for k, v in content.items() if k not in BASE}
    assert (made["base"]["name"], made["base"]["dtype"]) == (content["model"], content["dtype"])

    options = ("--layer", 5, "--seed", 0, "--shards", 1, "--max-steps", 3)
    code, _, err = run(
        capsys, "edit", EDITS, "--limit", 2, "--config", described, *options, "--out", tmp_path / "b", "--json"
    )  # fmt: skip
    assert code == 0, err
    other = json.loads((tmp_path / "b" / "run.json").read_text())
    assert other["config"] == made["config"] | {"layer": 5, "seed": 0, "shards": 1, "max_steps": 3}


def test_what_belongs_to_a_models_layer_goes_with_it(
    small_pool: None, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file's revision and module say nothing about another model and another layer."""
    path = tmp_path / "c.json"
    site = "model.layers.2.mlp.down_proj"
    write_config(path, {"model": "nobody/nothing", "revision": "abc", "module": site, "max_steps": 1, "contexts": 0})
    options = ("--limit", 1, "--config", path, "--model", tiny_model_dir, "--json")
    for more, layer in (((), 2), (("--layer", 1), 1)):
        code, _, err = run(capsys, "edit", EDITS, *options, *more, "--out", tmp_path / f"run{layer}")
        assert code == 0, err
        made = json.loads((tmp_path / f"run{layer}" / "run.json").read_text())
        assert made["site"]["layer"] == layer
        assert (made["config"]["max_steps"], made["config"]["contexts"]) == (1, 0)
        assert made["base"]["revision"] is None


def test_a_config_is_written_over_and_nothing_else_is(described: Path, tmp_path: Path) -> None:
    write_config(described, {"layer": 3})
    assert ConfigFile.read(described).settings == {"layer": 3}
    for text in ("not json", '{"text": "something else"}', "[]"):
        other = tmp_path / "other.json"
        other.write_text(text)
        with pytest.raises(OutputError, match="no config"):
            write_config(other, {"layer": 3})
        assert other.read_text() == text


def test_every_setting_goes_through_a_config(tmp_path: Path) -> None:
    config = EditConfig(layer=3, module="a.b", shards=3, lr=0.5, margins=(1.0, 2.0, 3.0), rank=9, chat=True)
    path = tmp_path / "c.json"
    write_config(path, {"model": "m", "revision": None, "dtype": "auto", **config.to_json()})
    file = ConfigFile.read(path)
    assert EditConfig(**file.settings) == config
    assert file.base == {"model": "m", "revision": None, "dtype": "auto"}
    for dtype in DTYPES:
        assert load_base(None, dtype=dtype).model is not None


BAD = {
    '{"layr": 3}': 'unknown key "layr"; did you mean "layer"?',
    '{"text": 1}': 'unknown key "text"',
    '{"layer": "last"}': '"layer" must be a whole number or "auto", not "last"',
    '{"layer": 3.5}': '"layer" must be',
    '{"layer": true}': '"layer" must be',
    '{"shards": 0}': '"shards" must be at least 1, not 0',
    '{"shards": null}': '"shards" must be a whole number, not null',
    '{"rank": "128"}': '"rank" must be a whole number, not "128"',
    '{"mask_density": 3}': '"mask_density" must lie in (0, 1], not 3',
    '{"mask_density": NaN}': '"mask_density" must be a number',
    '{"lr": -1}': '"lr" must be positive and 1e+06 at most, not -1',
    '{"chat": 1}': '"chat" must be true or false, not 1',
    '{"margins": [1, 2]}': '"margins" must be a list of 3 numbers',
    '{"schedule": "fast"}': "rehearsal or published",
    '{"dtype": "int8"}': '"dtype" must be one of auto, float32, bfloat16, float16, not "int8"',
    '{"model": null}': '"model" must be text, not null',
    '{"model": ""}': '"model" must be text',
    '{"dtype": ["auto"]}': '"dtype" must be',
    "[]": "is not a JSON object",
    "{": "is not JSON",
}


@pytest.mark.parametrize("text", list(BAD))
def test_a_bad_config_is_one_clear_error(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    code, out, err = run(capsys, "edit", EDITS, "--config", path, "--out", tmp_path / "shards")
    assert (code, out) == (1, "")
    assert "mine.json" in err
    assert BAD[text] in err
    assert "Traceback" not in err
    assert not (tmp_path / "shards").exists()


def test_all_faults_of_a_config_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"shards": 0, "layr": 3, "seed": 1, "block": "x"}')
    with pytest.raises(InputError) as e:
        ConfigFile.read(path)
    assert len(e.value.problems) == 3
    with pytest.raises(InputError, match="Cannot read"):
        ConfigFile.read(tmp_path / "none.json")
