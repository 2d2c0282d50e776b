"""A run one can trust: interrupted anywhere and taken up, added to, learned side by side, kept from two writers."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import few_pool_prompts

from wisecli.cli.app import main
from wisecli.data.records import EditRecord
from wisecli.data.stream import EditStream
from wisecli.editing import run as run_module
from wisecli.editing.config import EditConfig
from wisecli.editing.merge import merge_run
from wisecli.editing.parallel import learn_side_by_side
from wisecli.editing.rewording import Rewording
from wisecli.editing.run import EditRun
from wisecli.errors import InputError, OutputError, UsageError
from wisecli.memory.shard import Gate, RunFolder
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base, load_base
from wisecli.models.prompts import PromptEncoder
from wisecli.models.site import find_site
from wisecli.models.upper import UpperModel
from wisecli.routing.attach import attach

CONFIG = EditConfig(contexts=1, max_steps=6, shards=2, rank=8, block=2)
PLACES = ("Kenya", "Peru", "Malta", "Nepal", "Chad", "Cuba", "Laos", "Oman", "Togo", "Fiji")
TOWNS = ("Oslo", "Rome", "Lima")


def records(n: int, start: int = 0) -> list[EditRecord]:
    some = [(PLACES[i % len(PLACES)], i // len(PLACES)) for i in range(start, start + n)]
    return [
        EditRecord(
            f"e{start + i}", f"The {('capital', 'port', 'river')[k]} of {p} is", TOWNS[(start + i) % 3], subject=p
        )
        for i, (p, k) in enumerate(some)
    ]


@pytest.fixture
def few_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    few_pool_prompts(monkeypatch)


@pytest.fixture(scope="module")
def tiny(tiny_model: Any, tokenizer: Any) -> Base:
    return Base(tiny_model("llama"), tokenizer, "tiny")


@pytest.fixture
def base(tiny: Base, few_pool: None) -> Base:
    return tiny


def learned(folder: Path) -> dict[str, bytes]:
    """What a run leaves, but for the times in its journal and the lock."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(("journal.jsonl", ".lock"))}


def finish(run: EditRun) -> RunFolder:
    for _ in run:
        pass
    return run.folder


def begin(base: Base, edits: Sequence[EditRecord], out: Path, **options: Any) -> EditRun:
    return EditRun(base, EditStream.of(edits), CONFIG, out, **options)


@pytest.mark.parametrize(
    ("schedule", "at_once", "blocks"),
    [("rehearsal", 1, 5), ("published", 1, 9), ("rehearsal", 2, 3), ("published", 2, 5)],
)
def test_a_run_stopped_after_any_block_ends_in_the_same_bytes(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str, at_once: int, blocks: int
) -> None:
    monkeypatch.setattr(run_module, "_RARELY", 0)  # written at every block
    config = replace(CONFIG, max_steps=4, schedule=schedule, shards_at_once=at_once)
    stream = EditStream.of(records(9))
    whole = learned(finish(EditRun(base, stream, config, tmp_path / "whole")).path)
    steps = 0
    while True:
        run = EditRun(base, stream, config, tmp_path / "broken")
        for step in run:
            if not step.finished:
                steps += 1
                break
        else:
            break
    assert steps == blocks  # each but the first taken up
    assert learned(tmp_path / "broken") == whole
    assert not list((tmp_path / "broken").glob("partial-*"))


def test_a_shard_in_the_making_that_cannot_be_read_is_begun_anew(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "_RARELY", 0)
    whole = learned(finish(begin(base, records(6), tmp_path / "whole")).path)
    run = begin(base, records(6), tmp_path / "broken")
    next(iter(run))
    partial = run.folder.partial_path(0)
    partial.write_bytes(partial.read_bytes()[:50])
    assert learned(finish(begin(base, records(6), tmp_path / "broken")).path) == whole


def test_what_a_kill_leaves_beside_a_finished_shard_goes(base: Base, tmp_path: Path) -> None:
    whole = learned(finish(begin(base, records(6), tmp_path)).path)
    for name in ("partial-00000.safetensors", ".lock-00000", ".writer-00000"):
        (tmp_path / name).write_bytes(b"left behind")
    finish(begin(base, records(6), tmp_path))
    assert learned(tmp_path) == whole
    assert not list(tmp_path.glob(".*-0*"))


def test_a_torn_ledger_and_journal_are_mended(base: Base, tmp_path: Path) -> None:
    folder = finish(begin(base, records(6), tmp_path))
    whole = folder.ledger_path.read_bytes()
    for path in (folder.ledger_path, folder.journal_path):
        path.write_bytes(path.read_bytes()[:-20])
    assert len(folder.ledger()) == 5
    finish(begin(base, records(6), tmp_path))
    assert folder.ledger_path.read_bytes() == whole
    folder.note("learned", shard=1, done=3)
    assert all("time" in line for line in folder.ledger())


def test_a_second_writer_is_kept_out_and_the_lock_of_a_dead_one_is_not_heeded(base: Base, tmp_path: Path) -> None:
    run = begin(base, records(6), tmp_path)
    steps = iter(run)
    next(steps)
    with pytest.raises(OutputError, match=f"being written by process {os.getpid()}") as e:
        next(iter(begin(base, records(6), tmp_path)))
    assert "Wait" in str(e.value.hint)
    steps.close()  # type: ignore[attr-defined]
    (tmp_path / ".writer").write_text("process 1\n")  # left behind
    finish(begin(base, records(6), tmp_path))


def test_another_stream_gets_shards_of_its_own(base: Base, tmp_path: Path) -> None:
    folder = finish(begin(base, records(6), tmp_path))
    before = learned(tmp_path)
    with pytest.raises(InputError, match="holds other edits") as e:
        begin(base, records(4, 6), tmp_path)
    assert "--shards" in str(e.value.hint)
    folder = finish(begin(base, records(4, 6), tmp_path, append=True))
    assert folder.n_shards == 4
    after = learned(tmp_path)
    assert all(after[n] == before[n] for n in before if n.startswith(("shard-", "gate")))
    assert [line["id"] for line in folder.ledger()] == [f"e{i}" for i in range(10)]
    again = finish(begin(base, records(4, 6), tmp_path, append=True))  # the same once more adds nothing
    assert again.n_shards == 4
    assert learned(tmp_path) == after
    finish(begin(base, records(6), tmp_path))  # nor does the first command
    assert learned(tmp_path) == after
    assert [e.id for e in merge_run(folder).edits] == [f"e{i}" for i in range(10)]


def test_an_added_stream_that_is_interrupted_ends_in_the_same_bytes(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "_RARELY", 0)
    for name in ("whole", "broken"):
        finish(begin(base, records(6), tmp_path / name))
    finish(begin(base, records(6, 6), tmp_path / "whole", append=True))
    for _ in range(3):
        next(iter(begin(base, records(6, 6), tmp_path / "broken", append=True)))
    with pytest.raises(InputError, match="did not finish"):
        begin(base, records(2, 12), tmp_path / "broken", append=True)
    finish(begin(base, records(6, 6), tmp_path / "broken", append=True))
    assert learned(tmp_path / "broken") == learned(tmp_path / "whole")


def test_a_later_stream_supersedes_edits_of_an_earlier_one(base: Base, tmp_path: Path) -> None:
    finish(begin(base, records(6), tmp_path))
    [old] = records(1)
    new = EditRecord("new", old.prompt, "Havana", subject=old.subject)
    folder = finish(begin(base, [new, *records(1, 6)], tmp_path, append=True))
    assert folder.superseded == {"e0": "new"}
    first = folder.ledger()[0]
    assert (first["id"], first["outcome"], first["by"]) == ("e0", "superseded", "new")
    sm = merge_run(folder, base=base)
    keyed = {sm.edits[i].id for i in sm.keys.owner.tolist()}
    assert "new" in keyed
    assert "e0" not in keyed
    assert {e.id for e in sm.edits} == {*(f"e{i}" for i in range(7)), "new"}


def test_ids_that_are_taken_are_refused(base: Base, tmp_path: Path) -> None:
    finish(begin(base, records(6), tmp_path))
    before = learned(tmp_path)
    with pytest.raises(InputError, match="e5") as e:
        begin(base, records(3, 5), tmp_path, append=True)
    assert "other ids" in str(e.value.hint)
    assert learned(tmp_path) == before


# -- through the command line ------------------------------------------------------------------------------------------


@pytest.fixture
def edits_file(tmp_path: Path) -> Path:
    path = tmp_path / "edits.jsonl"
    path.write_text("".join(json.dumps(r.to_json()) + "\n" for r in records(12)))
    return path


def command(model: Path, edits: Path, out: Path, *more: str) -> list[str]:
    options = ["--model", str(model), "--max-steps", "6", "--block", "2", "--contexts", "1", "--shards", "3"]
    return [sys.executable, "-m", "wisecli", "edit", str(edits), "--out", str(out), *options, *more]


@pytest.mark.parametrize("at_once", [1, 2])
def test_side_by_side_gives_the_same_bytes(tiny_model_dir: Path, tmp_path: Path, at_once: int) -> None:
    stream = EditStream.of(records(6))
    # the rewording would be measured anew in each process
    config = replace(CONFIG, rewording=0.0, shards=at_once + 1, shards_at_once=at_once)
    loading = {"name": str(tiny_model_dir), "device": "cpu"}
    for jobs in (1, 2):
        run = EditRun(load_base(**loading), stream, config, tmp_path / str(jobs))
        steps = list(learn_side_by_side(run, jobs, loading))
        assert steps[-1].done == 6
        assert sorted(e["id"] for s in steps for e in s.finished) == [f"e{i}" for i in range(6)]
    assert learned(tmp_path / "1") == learned(tmp_path / "2")


def test_killed_the_command_ends_in_the_same_bytes(tiny_model_dir: Path, edits_file: Path, tmp_path: Path) -> None:
    """A short form of the campaign in benchmarks/kill.py: killed once its first shard is there."""
    broken = tmp_path / "broken"
    with subprocess.Popen(command(tiny_model_dir, edits_file, broken), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (broken / "shard-00000.safetensors").exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (broken / "shard-00002.safetensors").exists()
    for folder in (broken, tmp_path / "whole"):
        assert main(command(tiny_model_dir, edits_file, folder, "-q")[3:]) == 0
    assert learned(broken) == learned(tmp_path / "whole")


def test_edits_are_added_with_the_settings_of_the_run(
    few_pool: None, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, more = tmp_path / "first.jsonl", tmp_path / "more.jsonl"
    first.write_text("".join(json.dumps(r.to_json()) + "\n" for r in records(4)))
    more.write_text("".join(json.dumps(r.to_json()) + "\n" for r in records(4, 4)))
    out = tmp_path / "shards"
    assert main(command(tiny_model_dir, first, out, "-q", "--shards", "2")[3:]) == 0
    assert main(["edit", str(more), "--shards", str(out), "-q"]) == 0
    assert RunFolder.open(out).n_shards == 4
    capsys.readouterr()
    assert main(["edit", str(more), "--shards", str(out), "--lr", "0.5"]) == 1
    assert "config.lr was None and is now 0.5" in " ".join(capsys.readouterr().err.split())
    assert main(["edit", str(more), "--shards", str(tmp_path / "nowhere")]) == 1
    assert main(["edit", str(more), "--shards", str(out), "--out", str(out)]) == 2


def test_a_kept_gate_is_the_one_that_would_be_worked_out(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    plain = learned(finish(begin(base, records(4), tmp_path / "plain")).path)
    for name in ("first", "second"):
        assert learned(finish(begin(base, records(4), tmp_path / name, cache=cache)).path) == plain
        monkeypatch.setattr(Gate, "fit", None)  # from here on it can only be read
    (kept,) = (cache / "gates").iterdir()
    other = EditRun(base, EditStream.of(records(4)), CONFIG, tmp_path / "other", extra_pool=["Why?"], cache=cache)
    with pytest.raises(TypeError):
        other.prepare()  # of another pool
    monkeypatch.undo()
    few_pool_prompts(monkeypatch)
    kept.write_bytes(kept.read_bytes()[:50])
    assert learned(finish(begin(base, records(4), tmp_path / "third", cache=cache)).path) == plain
    assert kept.stat().st_size > 50
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    assert learned(finish(begin(base, records(4), tmp_path / "fourth", cache=nowhere)).path) == plain


def test_a_kept_rewording_is_the_one_that_would_be_measured(
    tiny: Base, few_pool: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While learning and while merging, in this process and the next: both make an upper part of their own."""
    cache = tmp_path / "cache"

    def made(name: str, **options: Any) -> tuple[dict[str, bytes], str]:
        folder = finish(begin(tiny, records(4), tmp_path / name, **options))
        return learned(folder.path), merge_run(folder, base=tiny, **options).digest

    plain = made("plain")
    assert made("first", cache=cache) == plain
    monkeypatch.setattr(Rewording, "measure", None)  # from here on it can only be read
    assert made("second", cache=cache) == plain
    (kept,) = (cache / "rewordings").iterdir()
    monkeypatch.undo()
    few_pool_prompts(monkeypatch)
    kept.write_bytes(kept.read_bytes()[:50])
    assert made("third", cache=cache) == plain
    assert kept.stat().st_size > 50


def test_what_is_kept_of_a_base_does_not_keep_it_in_memory(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    base = Base(tiny_model("llama", fresh=True), tokenizer, "tiny")
    upper = UpperModel(base.model, find_site(base.model), PromptEncoder(tokenizer))
    Rewording.keep(upper, base, tmp_path)
    gone = [weakref.ref(upper), weakref.ref(base.model)]
    del upper, base
    gc.collect()
    assert [r() for r in gone] == [None, None]


# -- several memories --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_shards(tiny: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of nine edits; not to be written to."""
    config = EditConfig(contexts=1, max_steps=40, lr=0.2, shards=3, rank=8, block=3)
    out = tmp_path_factory.mktemp("three") / "shards"
    with pytest.MonkeyPatch.context() as patched:
        few_pool_prompts(patched)
        return finish(EditRun(tiny, EditStream.of(records(9)), config, out)).path


@pytest.fixture
def run_of_three(base: Base, three_shards: Path, tmp_path: Path) -> RunFolder:
    return RunFolder.open(Path(shutil.copytree(three_shards, tmp_path / "shards")))


def test_every_shard_may_be_a_memory_of_its_own(base: Base, run_of_three: RunFolder, tmp_path: Path) -> None:
    sm = merge_run(run_of_three, base=base, memories=None, rehearse=False)
    assert [m.edits for m in sm.memories] == [tuple(f"e{i}" for i in range(k, k + 3)) for k in (0, 3, 6)]
    for m, shard in zip(sm.memories, run_of_three.shards(), strict=True):
        assert torch.equal(m.delta.dense(), shard.delta.dense().bfloat16().float())
    assert [e.memory for e in sm.edits] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    sm.save(tmp_path / "sm.safetensors")
    with attach(base.model, SideMemory.load(tmp_path / "sm.safetensors")) as on:
        encoder = PromptEncoder(base.tokenizer)
        routes = on.decide(encoder.batch([encoder.prompt(r.prompt) for r in records(9)]))
    assert [r.edit for r in routes] == [f"e{i}" for i in range(9)]
    assert {r.memory for r in routes if r.routed} <= {0, 1, 2}
    assert all(r.memory in (None, int(str(r.edit)[1:]) // 3) for r in routes)


@pytest.mark.parametrize("memories", [1, 2, 3])
def test_shards_are_grouped_in_order(base: Base, run_of_three: RunFolder, memories: int) -> None:
    sm = merge_run(run_of_three, memories=memories)
    assert [e for m in sm.memories for e in m.edits] == [f"e{i}" for i in range(9)]
    assert len(sm.memories) == memories
    together = merge_run(run_of_three)
    assert torch.equal(sm.keys.keys, together.keys.keys)
    assert {m.epsilon["key"] for m in sm.memories} == {together.memories[0].epsilon["key"]}


def test_no_more_memories_than_shards(run_of_three: RunFolder) -> None:
    for wrong in (0, 4):
        with pytest.raises(UsageError, match="3 shards cannot make"):
            merge_run(run_of_three, memories=wrong)
    with pytest.raises(UsageError, match="--weights"):
        merge_run(run_of_three, memories=2, weights=[1.0, 1.0, 1.0])


# -- withdrawing -------------------------------------------------------------------------------------------------------


def test_a_withdrawn_edit_is_answered_by_main_memory_and_no_other_is_touched(
    base: Base, run_of_three: RunFolder
) -> None:
    whole = merge_run(run_of_three, base=base)
    gone = ("e1", "e4")
    closed = whole.withdrawn(gone)
    encoder = PromptEncoder(base.tokenizer)
    batch = encoder.batch([encoder.prompt(r.prompt) for r in records(9)])
    with attach(base.model, whole) as on:
        before = on.decide(batch)
    with attach(base.model, closed) as on:
        after = on.decide(batch)
    assert before[1].routed or before[4].routed
    for record, was, now in zip(records(9), before, after, strict=True):
        assert now.edit == record.id
        assert (not now.routed) if record.id in gone else now == was
    assert [e.details["outcome"] for e in closed.edits if e.id in gone] == ["withdrawn"] * 2
    merged = merge_run(run_of_three.withdraw(gone), base=base)
    with attach(base.model, merged) as on:
        assert not any(r.routed for r in on.decide(batch) if r.edit in gone)
    assert [line["outcome"] for line in run_of_three.ledger() if line["id"] in gone] == ["withdrawn"] * 2


def test_forgetting_through_the_command_line(
    base: Base, run_of_three: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "sm.safetensors", tmp_path / "less.safetensors"
    merge_run(run_of_three, base=base).save(file)
    before = file.read_bytes()
    assert main(["forget", "e3", "-s", str(file), "-o", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["withdrawn"] == ["e3"]
    assert file.read_bytes() == before
    assert [e.id for e in SideMemory.load(out).edits if e.memory == -1] == ["e3"]
    assert main(["forget", "e3", "e5", "-s", str(file), "--shards", str(run_of_three.path)]) == 0
    assert [e.id for e in SideMemory.load(file).edits if e.memory == -1] == ["e3", "e5"]
    assert RunFolder.open(run_of_three.path).withdrawn == {"e3", "e5"}
    for wrong, said in (
        (["e33", "-s", str(file)], "Did you mean"),
        (["e3"], "--side-memory FILE"),
        (["e99", "--shards", str(run_of_three.path)], "wise log"),
    ):
        assert main(["forget", *wrong]) in (1, 2)
        assert said in " ".join(capsys.readouterr().err.split())
