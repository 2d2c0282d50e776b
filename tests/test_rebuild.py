"""Withdrawn without a trace: shards learned anew, merged again, asked again; and shards learned one by one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import few_pool_prompts
from test_lifelong import CONFIG, finish, learned, records

from wisecli.cli.app import main
from wisecli.data.stream import EditStream
from wisecli.editing.config import EditConfig
from wisecli.editing.editor import slices
from wisecli.editing.merge import merge_run, merged_as
from wisecli.editing.rebuild import Rebuild, plan_rebuild
from wisecli.editing.run import EditRun
from wisecli.errors import BaseMismatch, InputError, OutputError
from wisecli.evaluation.evaluate import EvalOptions, evaluate
from wisecli.inspection.asking import unlike_base
from wisecli.memory.shard import RunFolder, locked
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base
from wisecli.models.prompts import PromptEncoder
from wisecli.routing.attach import attach

GONE = ("e1", "e2")


@pytest.fixture
def base(tiny_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Base:
    few_pool_prompts(monkeypatch)
    return Base(tiny_model("llama"), tokenizer, "tiny")


@pytest.fixture
def folder(base: Base, tmp_path: Path) -> RunFolder:
    """Nine edits in three shards."""
    return finish(EditRun(base, EditStream.of(records(9)), replace(CONFIG, shards=3), tmp_path / "shards"))


def rebuild(base: Base, folder: RunFolder, ids: Sequence[str], **options: Any) -> RunFolder:
    folder = folder.withdraw(ids)
    for _ in Rebuild(base, folder, **options):
        pass
    return folder


# -- shards without the withdrawn --------------------------------------------------------------------------------------


@pytest.mark.parametrize("replay", [False, True])
def test_a_rebuilt_shard_is_the_one_that_never_saw_the_edit(base: Base, tmp_path: Path, replay: bool) -> None:
    config = replace(CONFIG, shards=3, replay=replay)
    folder = finish(EditRun(base, EditStream.of(records(9)), config, tmp_path / "shards"))
    before = learned(folder.path)
    folder = rebuild(base, folder, GONE)
    after = learned(folder.path)
    changed = {n for n in before if before[n] != after[n] and n.startswith("shard-")}
    assert changed == {"shard-00000.safetensors"}
    without = EditStream.of([r for r in records(9) if r.id not in GONE])
    run = EditRun(base, without, config, tmp_path / "other")
    first, second, third = slices(records(9), 3)
    run.slices = {0: [r for r in first if r.id not in GONE], 1: second, 2: third}
    mine, wanted = folder.shards()[0], finish(run).shards()[0]
    assert torch.equal(mine.delta.values, wanted.delta.values)
    assert torch.equal(mine.keys, wanted.keys)
    assert torch.equal(mine.negatives, wanted.negatives)
    assert [e["id"] for e in mine.edits] == ["e0", "e1", "e2"]
    assert [mine.edits[i]["id"] for i in mine.owner.unique().tolist()] == ["e0"]
    assert mine.edits[0] == wanted.edits[0]


def test_nothing_of_a_withdrawn_edit_is_left(base: Base, folder: RunFolder) -> None:
    by_id = {r.id: r for r in records(9)}
    rebuild(base, folder, ["e1", "e8"])
    text = b"".join(learned(folder.path).values())
    for edit in ("e1", "e8"):
        assert by_id[edit].prompt.encode() not in text
    assert [e["outcome"] for e in folder.ledger()][1::7] == ["withdrawn", "withdrawn"]
    assert {e["id"] for e in folder.ledger()} == set(by_id)


def test_a_rebuild_that_was_interrupted_goes_on(base: Base, tmp_path: Path) -> None:
    stream, config = EditStream.of(records(9)), replace(CONFIG, shards=3)
    folders = [finish(EditRun(base, stream, config, tmp_path / name)) for name in ("whole", "broken")]
    rebuild(base, folders[0], ["e1", "e8"])
    broken = folders[1].withdraw(["e1", "e8"])
    steps = iter(Rebuild(base, broken))
    while not any("rebuilt" in line for line in broken.journal_path.read_text().splitlines()):
        next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert plan_rebuild(broken).shards == (2,)
    rebuild(base, broken, ["e1"])
    assert learned(broken.path) == learned(folders[0].path)
    assert plan_rebuild(broken).shards == ()


def test_a_shard_of_withdrawn_edits_alone(base: Base, folder: RunFolder) -> None:
    folder = rebuild(base, folder, ["e3", "e4", "e5"])
    shard = folder.shards()[1]
    assert not shard.delta.dense().any()
    assert not len(shard.keys)
    for memories in (1, None):
        sm = merge_run(folder, base=base, memories=memories)
        assert unlike_base(base, sm, {r.id: r.prompt for r in records(9)[3:6]}) == []


def test_what_a_rebuild_takes(base: Base, folder: RunFolder) -> None:
    plan = plan_rebuild(folder, ["e1", "e7"])
    assert plan.shards == (0, 2)
    assert plan.edits == 4
    assert plan.seconds is not None
    folder.journal_path.unlink()
    assert plan_rebuild(folder, ["e1"]).seconds is None
    assert plan_rebuild(folder).shards == ()


def test_what_cannot_be_rebuilt_is_refused(base: Base, folder: RunFolder, tiny_model: Any, tmp_path: Path) -> None:
    other = Base(tiny_model("llama", seed=1), base.tokenizer, "other")
    with pytest.raises(BaseMismatch, match="differs at"):
        Rebuild(other, folder.withdraw(["e1"]))
    with pytest.raises(InputError, match="another pool"):
        Rebuild(base, folder, ["What is the tallest tree?"])
    bare = finish(EditRun(base, EditStream.of(records(4)), CONFIG, tmp_path / "bare", texts=False))
    with pytest.raises(InputError, match="holds no texts"):
        plan_rebuild(bare, ["e1"])


def test_a_side_memory_says_how_it_was_merged(base: Base, folder: RunFolder) -> None:
    for how in (
        {"method": "sign", "density": 0.5, "memories": 1, "rehearse": False, "scope": "wide"},
        {"memories": 2, "rehearse": True, "scope": "narrow", "values": torch.float32},
        {"memories": None, "rehearse": False},
    ):
        sm = merge_run(folder, base=base, **how)  # type: ignore[arg-type]
        assert merge_run(folder, base=base, **merged_as(sm)).digest == sm.digest


def test_forget_rebuild_through_the_command_line(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few_pool_prompts(monkeypatch)
    edits, shards, file = tmp_path / "edits.jsonl", tmp_path / "shards", tmp_path / "sm.safetensors"
    edits.write_text("".join(json.dumps(r.to_json()) + "\n" for r in records(6)))
    learn = ["--max-steps", "6", "--block", "2", "--contexts", "1", "--shards", "2", "-q"]
    assert main(["edit", str(edits), "--model", str(tiny_model_dir), "--out", str(shards), *learn]) == 0
    assert main(["merge", str(shards), "-o", str(file), "-q"]) == 0
    pool = tmp_path / "pool.txt"
    pool.write_text("What is the tallest tree?\n")
    before = learned(shards), file.read_bytes()
    capsys.readouterr()
    where = ["-s", str(file), "--shards", str(shards)]
    assert main(["forget", "e1", *where, "--rebuild", "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["plan"]["shards"] == [0]
    assert said["plan"]["edits"] == 2
    assert (learned(shards), file.read_bytes()) == before
    for wrong, message in (
        (["e1", "-s", str(file), "--rebuild"], "--shards FOLDER"),
        (["e1", *where, "--dry-run"], "Add --rebuild"),
        (["e77", *where, "--rebuild"], "has no edit e77"),
        (["e1", *where, "--model", str(tiny_model_dir)], "--model is for learning anew"),
        (["e1", *where, "--rebuild", "--pool", str(pool)], "another pool"),
    ):
        assert main(["forget", *wrong]) in (1, 2)
        assert message in " ".join(capsys.readouterr().err.split())
    assert (learned(shards), file.read_bytes()) == before
    assert main(["forget", "e1", *where, "--rebuild", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["unlike_base"] == []
    assert done["others"] == 5
    sm = SideMemory.load(file)
    assert [(e.memory, e.prompt) for e in sm.edits if e.id == "e1"] == [(-1, None)]
    assert records(6)[1].prompt.encode() not in file.read_bytes()


# -- shards learned one by one -----------------------------------------------------------------------------------------


def unit(base: Base, out: Path, index: int) -> Iterator[Any]:
    return EditRun(base, EditStream.of(records(9)), replace(CONFIG, shards=3), out).one_shard(index)


def test_shards_learned_one_by_one_in_any_order_are_the_run(base: Base, folder: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "units"
    for index in (2, 0, 0, 1):
        last = list(unit(base, out, index))[-1]
        assert [e["id"] for e in last.finished] == [f"e{3 * index + k}" for k in range(3)]
        if index == 2:
            with pytest.raises(InputError, match="1 of 3 shards"):
                RunFolder.open(out).check_finished()
    assert learned(out) == learned(folder.path)


def test_two_places_learn_two_shards_at_once_but_never_the_same(base: Base, tmp_path: Path) -> None:
    first = unit(base, tmp_path, 0)
    next(first)
    list(unit(base, tmp_path, 1))  # another one meanwhile
    with pytest.raises(OutputError, match="being written by process"):
        next(unit(base, tmp_path, 0))
    with pytest.raises(OutputError, match="being written by process"):
        next(iter(EditRun(base, EditStream.of(records(9)), replace(CONFIG, shards=3), tmp_path)))
    list(first)
    assert not list(tmp_path.glob(".lock-*"))


def test_a_unit_waits_for_its_turn_to_write_the_ledger(base: Base, tmp_path: Path) -> None:
    steps = unit(base, tmp_path, 0)
    next(steps)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(tmp_path):
            held.set()
            done.wait(0.5)

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    list(steps)
    other.join()
    assert len(RunFolder.open(tmp_path).ledger()) == 3


def test_the_unit_of_the_command_line(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few_pool_prompts(monkeypatch)
    edits = tmp_path / "edits.jsonl"
    edits.write_text("".join(json.dumps(r.to_json()) + "\n" for r in records(6)))
    command = ["edit", str(edits), "--model", str(tiny_model_dir), "--max-steps", "6", "--contexts", "1"]
    assert main([*command, "--out", str(tmp_path / "whole"), "--shards", "2", "-q"]) == 0
    out = ["--out", str(tmp_path / "units")]
    assert main([*command, *out, "--shard", "2/2"]) == 0
    assert "To be learned before merging: 1/2" in " ".join(capsys.readouterr().out.split())
    assert main([*command, *out, "--shard", "1/2", "-q"]) == 0
    assert learned(tmp_path / "units") == learned(tmp_path / "whole")
    for wrong in (["--shard", "3/2"], ["--shard", "0/2"], ["--shard", "1"], ["--shard", "1/2", "--jobs", "2"]):
        assert main([*command, *out, *wrong]) == 2
    assert main([*command, *out, "--shard", "1/2", "--shards", "4"]) == 2
    assert main([*command, *out, "--shards", "1.5"]) == 2
    assert "whole number or a folder" in " ".join(capsys.readouterr().err.split())


# -- replay, oracle, indicators ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["rehearsal", "published"])
def test_replay_keeps_later_shards_quiet_on_earlier_prompts(base: Base, tmp_path: Path, schedule: str) -> None:
    """And leaves the first shard, which has nothing before it, as it is."""
    lr = {"rehearsal": 0.3, "published": 1.0}[schedule]
    config = EditConfig(contexts=1, max_steps=30, lr=lr, shards=2, rank=8, block=4, schedule=schedule)
    deltas = {}
    for replay in (False, True):
        run = EditRun(base, EditStream.of(records(8)), replace(config, replay=replay), tmp_path / str(replay))
        shards, editor = finish(run).shards(), run.editor
        deltas[replay] = [s.delta.dense() for s in shards]
    assert torch.equal(deltas[False][0], deltas[True][0])
    earlier = editor.upper.capture([editor.encoder.prompt(r.prompt) for r in records(4)])
    reached = {
        replay: float(torch.stack([(r.a[r.content] @ d[1].T).norm(dim=-1).mean() for r in earlier]).mean())
        for replay, d in deltas.items()
    }
    assert reached[True] < 0.9 * reached[False]


def test_settings_newer_than_a_run_do_not_keep_it_from_going_on(base: Base, folder: RunFolder) -> None:
    old = {k: v for k, v in folder.run["config"].items() if k != "replay"}
    folder.update(config=old)
    finish(EditRun(base, EditStream.of(records(9)), replace(CONFIG, shards=3), folder.path))
    with pytest.raises(InputError, match=r"config\.replay was False and is now True"):
        EditRun(base, EditStream.of(records(9)), replace(CONFIG, shards=3, replay=True), folder.path)


def test_an_oracle_sends_every_prompt_where_it_belongs(base: Base, folder: RunFolder) -> None:
    stream = EditStream.of([replace(r, rephrases=(f"Tell me: {r.prompt}",)) for r in records(9)])
    sm = merge_run(folder, base=base, memories=None, rehearse=False).withdrawn(["e4"])
    report = evaluate(base, stream, sm, options=EvalOptions(router="oracle"))
    encoder = PromptEncoder(base.tokenizer)
    assert report.routing is None
    assert report.sections["method"].endswith("oracle")
    with attach(base.model, sm) as on:
        for item in report.items:
            own = {e.id: e.memory for e in sm.edits}[item.question.edit]
            batch = encoder.batch([encoder.prompt(item.question.prompt)])
            with on.override([own if item.question.edited else None]):
                out = base.model.generate(**batch.inputs, max_new_tokens=24, do_sample=False, pad_token_id=encoder.pad)
            ids = [t for t in out[0, batch.input_ids.shape[1] :].tolist() if t not in encoder.special]
            assert any(encoder.decode(ids[:n]) == item.after for n in range(len(ids) + 1))
    assert all(i.before == i.after for i in report.items if i.question.edit == "e4" or not i.question.edited)


def test_the_ledger_says_what_each_prompt_reaches(base: Base, folder: RunFolder) -> None:
    run = EditRun(base, EditStream.of(records(9)), replace(CONFIG, shards=3), folder.path)
    for shard in folder.shards():
        delta = shard.delta.dense()
        for e in shard.edits:
            row = run.editor.upper.capture([run.editor.encoder.prompt(e["prompt"])])[0]
            wanted = float((row.a[row.content] @ delta.T).norm(dim=-1).mean())
            assert e["indicator"] == pytest.approx(wanted, rel=1e-4)
    sm = merge_run(folder, base=base)
    assert all(e.details["indicator"] > 0 for e in sm.edits)
