"""The command line as a user meets it: exit codes, messages, modes, and the whole job end to end on a few edits."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import CHAT_TEMPLATE, build_model, build_tokenizer, few_pool_prompts

import wisecli.cli.app as application
from wisecli.cli import _options as options
from wisecli.cli._errors import guarded
from wisecli.cli._options import Loading
from wisecli.cli._output import Output, short
from wisecli.cli.app import main
from wisecli.cli.eval import _warn_endless
from wisecli.cli.merge import _warn_open
from wisecli.data.stream import read_edits
from wisecli.errors import InputError, OutputError

EDITS = Path(__file__).parents[1] / "examples" / "edits.jsonl"
GOOD = '{"prompt": "The capital of France is", "target": "Lyon"}\n'


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="session")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which twelve demonstration edits were learned and merged through the command line, elsewhere."""
    folder = tmp_path_factory.mktemp("job")
    code = f"from wisecli.cli.app import main; raise SystemExit(any(main(c) for c in {worked_in(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
    return folder


def worked_in(folder: Path) -> tuple[list[str], list[str]]:
    return (
        ["edit", str(EDITS), "--limit", "12", "--out", str(folder / "shards"), "-q"],
        ["merge", str(folder / "shards"), "-o", str(folder / "sm.safetensors"), "-q"],
    )


def test_help_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys; from wisecli.cli.app import main; main(['--help']); print('torch' in sys.modules, file=sys.stderr)"
    )
    best = min(_timed([sys.executable, "-c", code]) for _ in range(3))
    assert best[1].strip().endswith("False")
    assert best[0] < 1.5  # generous: a benchmark holds the real bound


def _timed(command: list[str]) -> tuple[float, str]:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - start, done.stderr


COMMANDS = (
    "doctor",
    "edit",
    "merge",
    "forget",
    "package",
    "pull",
    "fold",
    "eval",
    "report",
    "compare",
    "chat",
    "route",
    "log",
    "show",
    "inspect",
    "verify",
    "diff",
)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    listed = re.findall(r"^[│|] (\w+) ", out, flags=re.MULTILINE)  # what is wrapped stands further to the right
    assert [name for name in listed if name in COMMANDS] == list(COMMANDS)
    assert [c.name for c in application.app.registered_commands] == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert "Example: wise " + command in out


def test_the_module_and_the_script_are_the_same_program() -> None:
    done = subprocess.run([sys.executable, "-m", "wisecli", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("wise ")


BAD_FILES = {
    "empty": ("", "empty"),
    "broken JSON": (GOOD * 6 + '{"prompt": "x", \n', ":7"),
    "no prompt": ('{"target": "Lyon"}\n', "prompt"),
    "no target": ('{"prompt": "The capital of France is"}\n', "target"),
    "wrong type": ('{"prompt": 7, "target": "Lyon"}\n', ":1"),
}


@pytest.mark.parametrize("name", list(BAD_FILES))
def test_a_bad_edit_file_is_one_clear_error(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, named = BAD_FILES[name]
    path = tmp_path / "edits.jsonl"
    path.write_text(text)
    code, out, err = run(capsys, "edit", path, "--out", tmp_path / "shards")
    assert code == 1
    assert named in err
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "shards").exists()


def test_a_missing_edit_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "edit", tmp_path / "none.jsonl")
    assert code == 1
    assert "none.jsonl" in err
    assert "Traceback" not in err


def test_a_missing_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "edit", EDITS, "--model", tmp_path / "nowhere", "--out", tmp_path / "shards")
    assert code == 1
    assert "nowhere" in err
    assert "Traceback" not in err


def test_an_output_path_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, "edit", EDITS, "--out", tmp_path / "file" / "shards")
    assert code == 1
    assert "Cannot write" in err
    assert "Traceback" not in err


def test_errors_in_json_mode_are_one_object_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "edit", tmp_path / "none.jsonl", "--json")
    assert code == 1
    assert out == ""
    assert set(json.loads(err)) >= {"type", "message", "hint"}


@pytest.mark.parametrize(
    "argv",
    [
        ("edit", EDITS, "--schedule", "hasty"),
        ("edit", EDITS, "--layer", "99"),
        ("edit", EDITS, "--mask-density", "2"),
        ("edit", EDITS, "--limit", "2", "--shards", "3"),
        ("edit", EDITS, "--no-such-option"),
        ("eval", "--dataset", "demo", "--dtype", "int3"),
    ],
)
def test_usage_errors_exit_with_2(argv: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert "Traceback" not in err


ODD = "x[/b]y[a] :fire: [bold]z\\"


def test_text_of_the_user_is_never_markup(capsys: pytest.CaptureFixture[str]) -> None:
    sink = Output()
    sink.line(f"Wrote {ODD}. Next:", command=f"wise merge {ODD}")
    sink.facts([(ODD, ODD)])
    sink.table(ODD, ("id", "prompt"), [(ODD, short(ODD))], left=2)
    sink.warn(ODD)
    sink.error(ODD, ODD, [ODD])
    out, err = capsys.readouterr()
    assert f"Wrote {ODD}. Next: wise merge {ODD}\n" in out
    assert out.count(ODD) == 7
    assert err == f"warning: {ODD}\nerror: {ODD}\n  {ODD}\n{ODD}\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("edit", EDITS, "--no-such-option"), "--no-such-option"),
        (("edit",), "EDITS"),
        (("edit", EDITS, "--limit", "many"), "--limit"),
        (("no-such-command",), "no-such-command"),
        (("edit", EDITS, "--schedule", "hasty"), "hasty"),
    ],
)
def test_usage_errors_in_json_mode_are_one_object(
    argv: tuple, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *argv, "--json")
    assert (code, out) == (2, "")
    error = json.loads(err)
    assert set(error) == {"type", "message", "hint"}
    assert error["type"] == "UsageError"
    assert said in error["message"]


def test_help_and_json_together(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "edit", "--json", "--help")
    assert (code, err) == (0, "")
    assert "Example: wise edit" in out


def test_warnings_in_json_mode_are_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    Output(json_mode=True).warn(ODD)
    Output(quiet=True).warn(ODD)
    assert json.loads(capsys.readouterr().err) == {"type": "warning", "message": ODD}


@pytest.mark.parametrize("json_mode", [False, True])
@pytest.mark.parametrize("command", ["edit", "merge"])
def test_an_interrupt_offers_to_continue_only_where_that_holds(
    command: str, json_mode: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: str, json: bool = False) -> None:
        raise KeyboardInterrupt

    app = application.typer.Typer()
    app.command("edit")(interrupted)
    app.command("merge")(interrupted)
    monkeypatch.setattr(application, "app", app)
    code, out, err = run(capsys, command, "x", *(["--json"] if json_mode else []))
    assert (code, out) == (130, "")
    assert "Stopped." in err
    assert ("Run the same command again" in err) == (command == "edit")


def test_an_interrupt_that_reaches_the_guard(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert guarded(interrupted, command="chat") == 130
    assert capsys.readouterr().err == "error: Stopped.\n"


def test_a_single_edit_with_an_odd_id_and_path(
    few: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One shard without being asked, ids and paths with brackets as they are, and a warning when nothing took."""
    path, out = tmp_path / "e[b].jsonl", tmp_path / "shards[a]"
    path.write_text(json.dumps({"id": "x[/b]y", "prompt": "The capital of France is", "target": "Lyon"}) + "\n")
    argv = ("edit", path, "-m", tiny_model_dir, "--out", out, "--max-steps", "1", "--lr", "1e-9")
    code, stdout, err = run(capsys, *argv, "-v")
    assert code == 0, err
    assert "x[/b]y" in stdout
    assert f"Wrote {out}. Next: wise merge {shlex.quote(str(out))} -o sm.safetensors\n" in stdout
    assert "as they are, no chat template" in stdout
    assert "none of the 1 edits took" in err
    assert json.loads((out / "run.json").read_text())["streams"][0]["shards"] == 1
    code, _, err = run(capsys, *argv, "--shards", "2")
    assert code == 2
    assert "--shards 1" in err


@pytest.mark.parametrize(("flags", "chat"), [((), True), (("--no-chat",), False), (("--chat",), True)])
def test_edit_uses_the_template_of_the_base_by_default(
    flags: tuple[str, ...],
    chat: bool,
    few: Path,
    tmp_path: Path,
    tiny_model_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, path = tmp_path / "base", tmp_path / "edits.jsonl"
    shutil.copytree(tiny_model_dir, base)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(base)
    path.write_text(GOOD)
    argv = ("edit", path, "-m", base, "--out", tmp_path / "shards", "--max-steps", "1", *flags)
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    assert ("in the base's chat template" in out) == chat
    assert json.loads((tmp_path / "shards" / "run.json").read_text())["config"]["chat"] == chat


def test_merge_warns_of_an_activation_router_that_lets_most_prompts_pass(
    tiny_model: Callable[..., Any], make_side_memory: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    sm = make_side_memory(tiny_model("llama"), ["hello world"], epsilon=[{"key": 0.9, "activation": 1.0}])
    for router, median, warned in (("activation", 1.5, True), ("activation", 0.5, False), ("key", 1.5, False)):
        statistics = {"activation": {"out_of_scope": [0.1, 0.2, median, 3.0, 4.0], "in_scope": []}}
        _warn_open(Output(), replace(sm, router=router, statistics=statistics))
        assert ("more than half of the ordinary prompts" in capsys.readouterr().err) == warned


def test_eval_warns_of_a_base_that_cannot_end_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    for eos, warned in ((None, True), (2, False)):
        _warn_endless(Output(), SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=eos)))  # type: ignore[arg-type]
        assert ("no EOS" in capsys.readouterr().err) == warned


@pytest.mark.parametrize(
    ("model", "revision", "loaded"),
    [
        (None, None, ("org/base", "abc")),
        (None, "main", ("org/base", "main")),
        ("other", None, ("other", None)),
        ("other", "v2", ("other", "v2")),
    ],
)
def test_the_recorded_base_is_pinned(
    model: str | None, revision: str | None, loaded: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wisecli.models.base.load_base", lambda name, *, revision, **_: (name, revision))
    recorded = {"name": "org/base", "revision": "abc"}
    assert Loading(model, revision).base(recorded) == loaded


def test_what_nothing_records_is_said_again_in_the_next_command() -> None:
    assert Loading(model="x", dtype="bfloat16", quantize="4bit", revision="v1").again == ()
    again = Loading(device="cuda:1", device_map="auto", offload_lower=True, trust_remote_code=True).again
    assert again == ("--device", "cuda:1", "--device-map", "auto", "--offload-lower", "--trust-remote-code")


def test_the_whole_job(worked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sm = worked / "sm.safetensors"
    code, out, err = run(capsys, "eval", "-d", EDITS, "--limit", "12", "-s", sm, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["protocol"]["name"] == "end-of-stream"
    assert report["scores"]["rel"]["exact"]["before"] < 0.2
    assert report["scores"]["rel"]["exact"]["after"] >= 0.9
    assert report["scores"]["gen"]["exact"]["after"] >= 0.6
    assert report["scores"]["loc"]["exact"]["after"] >= 0.95
    assert {i["kind"] for i in report["items"]} >= {"edit", "rephrase", "unrelated", "same-relation"}


def test_minimum_scores_exit_with_3(worked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("eval", "-d", EDITS, "--limit", "4", "--no-ability", "-q")
    code, _, err = run(capsys, *argv, "--min-rel", "0.9")
    assert code == 3
    assert "below 0.9" in err
    code, _, _ = run(capsys, *argv, "-s", worked / "sm.safetensors", "--min-rel", "0.5")
    assert code == 0


def test_without_a_side_memory_after_equals_before(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "eval", "-d", EDITS, "--limit", "4", "--json")
    for scores in json.loads(out)["scores"].values():
        for metric in scores.values():
            assert metric["before"] == metric["after"]


def test_the_same_command_gives_the_same_bytes(worked: Path, tmp_path: Path) -> None:
    """Here, and in the process in which the folder was made."""
    assert [main(command) for command in worked_in(tmp_path)] == [0, 0]
    for name in (
        *("shards/shard-00000.safetensors", "shards/shard-00001.safetensors", "shards/ledger.jsonl"),
        *("shards/gate.safetensors", "sm.safetensors"),
    ):
        assert (tmp_path / name).read_bytes() == (worked / name).read_bytes()


def test_another_run_in_the_same_folder_is_refused_with_the_difference(
    worked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "edit", EDITS, "--limit", "12", "--seed", "5", "--out", worked / "shards")
    assert code == 1
    assert "config.seed was 0 and is now 5" in err


def test_an_unfinished_run_cannot_be_merged(worked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("run.json", "gate.safetensors", "shard-00000.safetensors"):
        (tmp_path / name).write_bytes((worked / "shards" / name).read_bytes())
    code, _, err = run(capsys, "merge", tmp_path, "-o", tmp_path / "sm.safetensors")
    assert code == 1
    assert "1 of 2 shards" in err


def test_a_truncated_side_memory(worked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((worked / "sm.safetensors").read_bytes()[:5000])
    for argv in (("eval", "-s", cut), ("chat", "-s", cut), ("package", cut, "-o", tmp_path / "p")):
        code, _, err = run(capsys, *argv)
        assert code == 1
        assert "truncated or damaged" in err
        assert "Traceback" not in err


def test_a_side_memory_of_another_base(worked: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "eval", "-s", worked / "sm.safetensors", "--model", tiny_model_dir)
    assert code == 1
    assert "wise-demo" in err
    assert "Traceback" not in err


# -- wise eval, on a tiny base -----------------------------------------------------------------------------------------

TINY = [
    {
        "id": f"t{i}",
        "prompt": f"The capital of {name} is",
        "target": f"w{i}",
        "subject": name,
        "rephrases": [f"when the capital of {name} is"],
        "locality": [{"prompt": "hello world"}, {"prompt": f"{name} lies", "kind": "same-subject"}],
    }
    for i, name in enumerate(("France", "Spain", "Italy", "Norway"))
]
QUICK = ("--no-ability", "--device", "cpu")


def learn_quickly(patched: pytest.MonkeyPatch) -> None:
    """A few prompts are the pool, and learning takes few steps whatever is asked: enough for some edits to take."""
    few_pool_prompts(patched)
    made = options.edit_config
    patched.setattr(options, "edit_config", lambda *args, **given: made(*args, **given | {"max_steps": 20}))


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset of four edits; the cache is in a folder of the test, and little is learned."""
    monkeypatch.setenv("WISE_CACHE", str(tmp_path / "cache"))
    learn_quickly(monkeypatch)
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in TINY))
    return path


def timeless(document: dict[str, Any]) -> dict[str, Any]:
    """Results without what differs from run to run, and without the place of the side memory."""
    out = {k: v for k, v in document.items() if k not in ("timings", "peak_memory")}
    return out | {"side_memory": {**(out["side_memory"] or {}), "path": None}}


def cached(folder: Path) -> int:
    """Finished batches in the cache below a folder."""
    return sum(p.read_bytes().count(b"\n") for p in (folder / "answers").glob("*.jsonl"))


def test_eval_writes_results_and_report(
    few: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("eval", "-d", few, "-m", tiny_model_dir, *QUICK)
    code, out, err = run(capsys, *argv, "-o", tmp_path / "out")
    assert code == 0, err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "results.json"]
    assert "<html" in (tmp_path / "out" / "report.html").read_text()
    assert str(tmp_path / "out" / "results.json") in out
    code, out, err = run(capsys, *argv, "-o", tmp_path / "alone" / "mine.json", "-q")
    assert (code, out) == (0, f"{tmp_path / 'alone' / 'mine.json'}\n"), err
    assert [p.name for p in (tmp_path / "alone").iterdir()] == ["mine.json"]
    written = [json.loads(p.read_text()) for p in (tmp_path / "out" / "results.json", tmp_path / "alone" / "mine.json")]
    code, out, err = run(capsys, *argv, "--json")
    assert code == 0, err
    for document in (*written, json.loads(out)):
        assert timeless(document) == timeless(written[0])
    assert written[0]["dataset"]["file"] == "few.jsonl"
    assert written[0]["base"]["parameters"] > 0
    code, out, err = run(capsys, *argv, "-o", tmp_path / "out", "-q")
    assert (code, out) == (0, f"{tmp_path / 'out' / 'results.json'}\n"), err
    code, _, err = run(capsys, "report", tmp_path / "out" / "results.json", "-o", tmp_path / "again.html", "-q")
    assert code == 0, err


def test_eval_writes_plots_beside_the_results(
    few: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("eval", "-d", few, "-m", tiny_model_dir, *QUICK, "--png", "-o")
    for out, plots in (("a", "a/plots"), ("b/r.json", "b/plots")):
        code, _, err = run(capsys, *argv, tmp_path / out)
        assert code == 0, err
        made = list((tmp_path / plots).iterdir())
        assert made
        assert all(p.read_bytes().startswith(b"\x89PNG") for p in made)


@pytest.fixture(scope="session")
def learned(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `wise eval --learn` wrote, with a dataset in it."""
    folder = tmp_path_factory.mktemp("learned")
    path = folder / "few.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in TINY))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("WISE_CACHE", str(folder / "cache"))
        learn_quickly(patched)
        argv = ["eval", "-d", path, "-m", tiny_model_dir, *QUICK, "--learn", "-o", folder / "out", "-q"]
        assert main([str(a) for a in argv]) == 0
    took = {e["outcome"] == "took" for e in ledger_of(folder / "out" / "shards")}
    assert took == {True, False}
    return folder


def ledger_of(shards: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (shards / "ledger.jsonl").read_text().splitlines()]


def test_a_run_that_lost_a_shard_continues_to_the_same_bytes(
    learned: Path, few: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    whole = learned / "out" / "shards"
    part = tmp_path / "shards"
    part.mkdir()
    for name in ("run.json", "gate.safetensors", "shard-00000.safetensors"):
        (part / name).write_bytes((whole / name).read_bytes())
    assert main(["edit", str(few), "-m", str(tiny_model_dir), "--device", "cpu", "--out", str(part), "-q"]) == 0
    for name in ("shard-00001.safetensors", "ledger.jsonl"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()


def test_quiet_prints_only_the_path(
    learned: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again.safetensors"
    code, stdout, _ = run(capsys, "merge", learned / "out" / "shards", "-o", out, "-q")
    assert code == 0
    assert stdout.strip() == str(out)


def test_eval_learns_what_edit_and_merge_would(
    learned: Path, few: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {str(p.relative_to(learned / "out")) for p in (learned / "out").rglob("*") if p.is_file()}
    assert {"results.json", "report.html", "sm.safetensors", "shards/run.json", "shards/ledger.jsonl"} <= names
    base = ("-m", tiny_model_dir, "--device", "cpu")
    assert run(capsys, "edit", few, *base, "-o", tmp_path / "shards", "-q")[0] == 0
    assert run(capsys, "merge", tmp_path / "shards", *base, "-o", tmp_path / "sm.safetensors", "-q")[0] == 0
    assert (tmp_path / "sm.safetensors").read_bytes() == (learned / "out" / "sm.safetensors").read_bytes()
    argv = ("eval", "-d", few, "-s", tmp_path / "sm.safetensors", *base, "--no-ability", "--json")
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    results = json.loads((learned / "out" / "results.json").read_text())
    assert timeless(json.loads(out)) == timeless(results)
    assert results["scores"]["rel"]["exact"]["after"] is not None
    assert results["side_memory"]["edits"] == len(TINY)


def test_eval_says_what_it_leaves_out_and_what_was_not_learned(
    learned: Path, few: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [dict(r) for r in TINY]
    records[1] |= {"rephrases": [records[0]["prompt"].upper(), "when Spain"]}
    records[2] |= {"locality": [{"prompt": f" {records[3]['prompt']}"}, {"prompt": records[0]["rephrases"][0]}]}
    records += [{"id": "more", "prompt": "who", "target": "x"}, {"id": "most", "prompt": "who", "target": "y"}]
    few.write_text("".join(json.dumps(r) + "\n" for r in records))
    argv = ("eval", "-d", few, "-m", tiny_model_dir, *QUICK)
    said = {
        "1 edits are contradicted by later ones and were not scored.": True,
        "1 rephrases ask what another edit changes otherwise and were not scored.": True,
        "2 locality probes ask what an edit changes and were not scored.": True,
        "2 edits are not in the side memory, and were scored all the same.": False,
    }
    code, out, err = run(capsys, *argv, "-s", learned / "out" / "sm.safetensors")
    assert code == 0, err
    lines = [line for line in out.splitlines() if line]
    assert [line for line in lines if line in said] == list(said)
    assert "2 of 6 edits of this dataset are not in the side memory" in err
    code, out, err = run(capsys, *argv)  # the base alone: nothing was learned, nothing is missing
    assert code == 0, err
    assert [line for line in out.splitlines() if line in said] == [line for line, plain in said.items() if plain]
    code, out, err = run(capsys, *argv, "-o", tmp_path / "r.json", "--json")
    assert code == 0, err
    about = json.loads(out)["dataset"]
    assert about["left_out"] == {"rephrases": 1, "probes": 2}
    assert (about["superseded"], about["duplicates"], about["missing"]) == (1, 0, None)
    few.write_text("".join(json.dumps(r) + "\n" for r in TINY))
    code, out, err = run(capsys, *argv, "-s", learned / "out" / "sm.safetensors")
    assert code == 0, err
    assert "not scored" not in out
    assert "not in the side memory" not in out + err


def test_results_are_safe_before_the_harness_runs(
    learned: Path, few: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """The harness may run for hours and fail; what was asked is on disk by then, and again complete after it."""
    seen: list[dict[str, Any]] = []
    out = tmp_path / "out"
    found = {"tasks": {"some_task": {"acc": {"before": 0.5, "after": 0.25}}}}

    def harness(*_: Any, **__: Any) -> dict[str, Any]:
        seen.append(json.loads((out / "results.json").read_text()))
        assert "<html" in (out / "report.html").read_text()
        assert len(list((tmp_path / "cache" / "answers").iterdir())) == 1  # the base's; there is nothing to go on with
        if len(seen) == 1:
            raise InputError("the harness failed.", hint="None.")
        return found

    monkeypatch.setattr("wisecli.harness.check_tasks", lambda *_: None)
    monkeypatch.setattr("wisecli.harness.run_harness", harness)
    side_memory = learned / "out" / "sm.safetensors"
    argv = ("eval", "-d", few, "-m", tiny_model_dir, *QUICK, "-s", side_memory, "-o", out, "--harness", "some_task")
    code, stdout, err = run(capsys, *argv)
    assert (code, "the harness failed" in err) == (1, True)
    assert "Wrote" not in stdout
    code, stdout, err = run(capsys, *argv)
    assert code == 0, err
    assert f"Wrote {out / 'results.json'}, {out / 'report.html'}. Next:" in " ".join(stdout.split())
    assert [s["harness"] for s in seen] == [None, None]
    written = json.loads((out / "results.json").read_text())
    assert written["harness"] == found
    assert timeless(written) == timeless(seen[0] | {"harness": found}) == timeless(seen[1] | {"harness": found})


def test_a_report_that_cannot_be_written_costs_no_answers(
    learned: Path, few: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    side_memory = learned / "out" / "sm.safetensors"
    argv = ("eval", "-d", few, "-m", tiny_model_dir, *QUICK, "-s", side_memory, "-o", tmp_path / "r.json", "-q")
    answers = tmp_path / "cache" / "answers"

    def full(*_: Any) -> None:
        raise OutputError("Cannot write.", hint="Free space.")

    with monkeypatch.context() as patched:
        patched.setattr("wisecli.memory.files.write_json", full)
        assert run(capsys, *argv)[0] == 1
    assert len(list(answers.iterdir())) > 1
    assert run(capsys, *argv)[0] == 0
    assert len(list(answers.iterdir())) == 1


def test_package_takes_the_results_of_eval(learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = learned / "out"
    argv = ("package", out / "sm.safetensors", "--eval", out / "results.json", "--no-measure", "-o", tmp_path / "p")
    code, _, err = run(capsys, *argv)
    assert code == 0, err
    assert "Protocol `end-of-stream`; dataset `few" in (tmp_path / "p" / "README.md").read_text()
    old = json.loads((out / "results.json").read_text()) | {"schema_version": "1.0"}
    (tmp_path / "old.json").write_text(json.dumps(old))
    code, _, err = run(capsys, *argv[:3], tmp_path / "old.json", "--no-measure", "-o", tmp_path / "q")
    assert code == 1
    assert "again with wise eval" in err


@pytest.mark.parametrize("protocol", ["fresh", "both"])
def test_eval_while_learning(
    protocol: str,
    learned: Path,
    few: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ("eval", "-d", few, "-m", tiny_model_dir, *QUICK, "--protocol", protocol, "--block", "10", "--json")
    code, out, err = run(capsys, *argv, "-o", tmp_path / "out")
    assert code == 0, err
    report = json.loads(out)
    assert report["protocol"]["name"] == protocol
    assert (report["fresh"] is None, report["retention"] is None) == ((protocol == "fresh",) * 2)
    assert (tmp_path / "out" / "sm.safetensors").read_bytes() == (learned / "out" / "sm.safetensors").read_bytes()
    assert "<html" in (tmp_path / "out" / "report.html").read_text()


def test_eval_with_rollbacks_needs_no_folder(
    few: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("eval", "-d", few, "-m", tiny_model_dir, *QUICK)
    code, out, err = run(capsys, *argv, "--limit", "3", "--t", "1,2", "-o", tmp_path / "t.json", "--json")
    assert code == 0, err
    found = json.loads(out)["rollbacks"]
    assert [(r["t"], r["groups"], r["left_out"], r["identical"]) for r in found] == [(1, 3, 0, True), (2, 1, 1, True)]
    assert json.loads(out)["routing"]["router"] == json.loads(out)["protocol"]["router"] == "key"
    assert json.loads((tmp_path / "t.json").read_text())["protocol"] == json.loads(out)["protocol"]
    assert len(list((tmp_path / "cache" / "answers").iterdir())) == 1


def test_eval_by_wilke_s_protocol_needs_no_folder(
    few: Path, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base that says nothing but words, and then stops, has answers that can be gone back to."""
    model = build_model("llama", len(tokenizer), seed=3)
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    silent = [i for i, p in enumerate(pieces) if i != tokenizer.eos_token_id and not (p[0] == "Ġ" and len(p) > 3)]
    model.lm_head.weight[silent] = 0
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    argv = ("eval", "-d", few, "-m", tmp_path / "base", *QUICK, "--protocol", "wilke")
    code, out, err = run(capsys, *argv, "--json")
    assert code == 0, err
    section = json.loads(out)["wilke"]
    assert (section["known"], section["left_out"], section["edited"], section["checkpoints"]) == (2, 2, 1, [1])
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    assert "WilKE" in out
    assert len(list((tmp_path / "cache" / "answers").iterdir())) == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--t", "1", "--protocol", "both"), "--protocol"),
        (("--learn", "-s", "sm.safetensors", "-o", "out"), "--side-memory"),
        (("--t", "1", "-s", "sm.safetensors"), "--side-memory"),
        (("--protocol", "wilke", "-s", "sm.safetensors"), "--side-memory"),
        (("--learn",), "--out"),
        (("--learn", "-o", "x.json"), "--out"),
        (("--protocol", "both", "-o", "x.json"), "--out"),
        (("--protocol", "fresh"), "--out"),
        (("--protocol", "often"), "often"),
        (("--t", "1,x"), "1,x"),
        (("--t", ""), "--t"),
        (("--t", "0"), "0"),
        (("--t", "1,9"), "9"),
        (("--png",), "--out"),
        (("-o", "page.html"), "--out"),
        (("-o", "page.htm"), "--out"),
        (("-o", "deep/page.md"), "--out"),
        (("-o", "plot.png", "--png"), "--out"),
        (("--protocol", "wilke", "--shards", "2"), "--shards"),
        (("--protocol", "wilke", "--block", "1"), "--block"),
        (("--t", "1", "--harness", "arc_easy"), "--harness"),
        (("--batch-size", "0"), "batch-size"),
        (("--min-rel", "1.5"), "min-rel"),
    ],
    ids=" ".join,
)
def test_eval_refuses_what_does_not_go_together_before_it_loads_a_base(
    argv: tuple[str, ...],
    said: str,
    few: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("wisecli.models.base.load_base", never)
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "eval", "-d", few, *argv, "--json")
    assert (code, out) == (2, "")
    error = json.loads(err)
    assert error["type"] == "UsageError"
    assert said in f"{error['message']} {error['hint']}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["few.jsonl"]


def test_checks_name_all_that_fell_short(
    few: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("eval", "-d", few, "-m", tiny_model_dir, *QUICK, "--json", "-o", tmp_path / "r.json")
    code, out, err = run(capsys, *argv, "--min-rel", "0.9", "--min-gen", "0.5", "--min-loc", "1")
    assert code == 3
    error = json.loads(err)
    assert error["message"] == "reliability is 0.000, below 0.9; generalization is 0.000, below 0.5."
    assert json.loads(out)["scores"] == json.loads((tmp_path / "r.json").read_text())["scores"]
    few.write_text(json.dumps({"prompt": "hello", "target": "world"}) + "\n")
    code, _, err = run(capsys, *argv, "--min-gen", "0", "--min-rel", "0")
    assert code == 3
    assert "generalization cannot be checked" in json.loads(err)["message"]
    assert run(capsys, *argv, "--min-rel", "0")[0] == 0


def test_the_cache_is_kept_unless_it_is_not_wanted(
    few: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("eval", "-d", few, "-m", tiny_model_dir, *QUICK, "-q")
    assert run(capsys, *argv, "--no-cache")[0] == 0
    assert not (tmp_path / "cache").exists()
    assert run(capsys, *argv)[0] == 0
    assert cached(tmp_path / "cache") > 0


def test_a_killed_evaluation_goes_on_to_the_same_results(
    learned: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """SIGKILL in the middle of asking the edited model."""
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"when {i} is", "target": f"x{i}"}) + "\n" for i in range(25)))
    argv = ["eval", "-d", path, "-m", tiny_model_dir, "-s", learned / "out" / "sm.safetensors", *QUICK, "--json"]
    argv = [str(a) for a in (*argv, "--batch-size", "1")]
    monkeypatch.setenv("WISE_CACHE", str(tmp_path / "whole"))
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    whole, base_batches = json.loads(out), cached(tmp_path / "whole")
    assert base_batches == 50
    cache = tmp_path / "cut"
    env = {**os.environ, "WISE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}  # as here: part of the key
    process = subprocess.Popen([sys.executable, "-m", "wisecli", *argv], env=env, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None and (not cache.exists() or cached(cache) < base_batches + 10):
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert len(list((cache / "answers").iterdir())) == 2
    before = cached(cache)
    assert base_batches + 10 <= before < 3 * base_batches
    monkeypatch.setenv("WISE_CACHE", str(cache))
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    assert timeless(json.loads(out)) == timeless(whole)
    assert cached(cache) == base_batches


def test_the_shipped_dataset_is_the_example_file() -> None:
    shipped = Path(__file__).parents[1] / "wisecli" / "data" / "demo_edits.jsonl"
    assert shipped.read_bytes() == EDITS.read_bytes()
    assert len(read_edits(EDITS).records) >= 200
