"""Several shards learned at once: each takes the steps it would take by itself, and none hears of the others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import few_pool_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from wisecli.cli.app import main
from wisecli.data.records import EditRecord
from wisecli.data.stream import EditStream
from wisecli.editing import published, run, steps
from wisecli.editing.config import EditConfig
from wisecli.editing.editor import Editor
from wisecli.editing.run import EditRun
from wisecli.editing.steps import Arrived, Learning, Step, together
from wisecli.inspection.contents import describe_run
from wisecli.inspection.source import open_source
from wisecli.memory.shard import RunFolder, Shard
from wisecli.models.base import Base

COUNTRIES = ("France", "Spain", "Italy", "Norway", "Kenya", "Peru", "Malta", "Nepal")
TOWNS = ("Oslo", "Rome", "Lima", "Cairo")
CONFIG = EditConfig(contexts=1, block=2, max_steps=12, rank=16, shards=3, mask_density=0.5)


@pytest.fixture(autouse=True)
def few_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    few_pool_prompts(monkeypatch)


def stream(n: int = 8) -> EditStream:
    """Edits of unlike lengths, so that the shards' rows are padded otherwise together than alone."""
    some = zip(range(n), COUNTRIES, strict=False)
    return EditStream.of([EditRecord(f"e{i}", f"{'The ' * (i % 4)}capital of {c} is", TOWNS[i % 4]) for i, c in some])


@pytest.fixture
def edits_file(tmp_path: Path) -> Path:
    path = tmp_path / "edits.jsonl"
    path.write_text("".join(json.dumps(r.to_json()) + "\n" for r in stream(6).records))
    return path


def learned(base: Base, config: EditConfig, n: int = 8) -> list[Shard]:
    return Editor(base, config).learn(stream(n))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("schedule", ["published", "rehearsal"])
@pytest.mark.parametrize("at_once", [2, 3, 9])
def test_the_deltas_are_those_of_one_after_the_other(
    tiny_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, kind: str, schedule: str, at_once: int
) -> None:
    monkeypatch.setattr(published, "_FLAT", -1.0)
    base = Base(tiny_model(kind), tokenizer, kind)
    config = replace(CONFIG, schedule=schedule)
    alone, several = (learned(base, replace(config, shards_at_once=n)) for n in (1, at_once))
    for one, other in zip(alone, several, strict=True):
        assert one.delta.values.abs().max() > 1e-3
        torch.testing.assert_close(other.delta.dense(), one.delta.dense(), atol=1e-5, rtol=1e-4)
        assert [(e["id"], e["outcome"], e["steps"]) for e in other.edits] == [
            (e["id"], e["outcome"], e["steps"]) for e in one.edits
        ]


def test_shards_that_are_quiet_on_earlier_ones_may_be_learned_at_once(tiny_model: Any, tokenizer: Any) -> None:
    base = Base(tiny_model("llama"), tokenizer, "tiny")
    config = replace(CONFIG, replay=True, dropout=0.0, max_steps=4)
    alone, several = (learned(base, replace(config, shards_at_once=n)) for n in (1, 3))
    for one, other in zip(alone, several, strict=True):
        torch.testing.assert_close(other.delta.dense(), one.delta.dense(), atol=1e-5, rtol=1e-4)


def test_steps_are_taken_together(tiny_model: Any, tokenizer: Any) -> None:
    """As many passes through the upper layers as the shard with the most steps needs, not as all need together."""
    base = Base(tiny_model("llama"), tokenizer, "tiny")
    config = replace(CONFIG, schedule="published", max_steps=5)
    passes = []
    for at_once in (1, 3):
        with mock.patch.object(steps, "take", side_effect=steps.take) as take, mock.patch.object(published, "_LOW", -1):
            learned(base, replace(config, shards_at_once=at_once), 6)
        passes.append(take.call_count)
    assert passes == [6 * 5, 2 * 5]


@given(st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=5), st.data())
@settings(deadline=None, max_examples=80)
def test_learners_keep_their_own_order_and_wait_at_the_end_of_a_block(plan: list[list[int]], data: Any) -> None:
    """Each learner: steps per block, and two more steps once all its edits have arrived."""
    log: list[tuple[int, int | str]] = []
    before: list[int] = []

    def learner(me: int, blocks: Sequence[int]) -> Learning:
        if not blocks:
            yield Arrived(0, True)
        for k, n in enumerate(blocks):
            for _ in range(n):
                yield step(me)
                log.append((me, k))
            yield Arrived(k + 1, k + 1 == len(blocks))
        for _ in range(2):
            yield step(me)
            log.append((me, "end"))

    def step(me: int) -> Step:
        return mock.Mock(spec=Step, me=me)

    def take(upper: object, some: Sequence[Any]) -> None:
        assert len({s.me for s in some}) == len(some) > 0

    with mock.patch.object(steps, "take", take):
        for arrived in together(mock.Mock(), [learner(i, blocks) for i, blocks in enumerate(plan)]):
            blocks_seen = max(arrived)
            assert arrived == tuple(min(blocks_seen, len(blocks)) for blocks in plan)
            assert not before or blocks_seen > before[-1]
            assert all(place != "end" and place < blocks_seen for _, place in log)
            before.append(blocks_seen)
    for i, blocks in enumerate(plan):
        want = [*(k for k, n in enumerate(blocks) for _ in range(n)), "end", "end"]
        assert [place for who, place in log if who == i] == want


def test_what_is_in_the_making_is_seen(tiny_model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(run, "_RARELY", 0)
    base = Base(tiny_model("llama"), tokenizer, "tiny")
    begun = EditRun(base, stream(7), replace(CONFIG, shards_at_once=2), tmp_path)
    at_block = iter(begun)
    assert next(at_block).done == 4  # two each of the two first shards
    assert [s.index for s in begun.open] == [0, 1]
    at_block.close()  # type: ignore[attr-defined]
    source: Any = open_source(tmp_path)
    shards = describe_run(source)
    assert [(s.partial, s.edits) for s in shards.shards] == [(True, 2), (True, 2), (False, 0)]


def test_a_shard_that_is_learned_elsewhere_is_not_learned_at_once_with_others(
    tiny_model_dir: Path, edits_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["edit", str(edits_file), "--model", str(tiny_model_dir), "--out", str(tmp_path / "out")]
    assert main([*told, "--shard", "1/2", "--shards-at-once", "2"]) == 2
    assert "Leave --shards-at-once out" in capsys.readouterr().err
    assert main([*told, "--shards-at-once", "0"]) == 2
    assert "--shards-at-once must be at least 1, not 0" in capsys.readouterr().err


def test_the_command_learns_shards_at_once_and_goes_on_as_it_began(
    tiny_model_dir: Path, edits_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    told = ["edit", str(edits_file), "--model", str(tiny_model_dir), "--out", str(out), "--shards", "3"]
    told += ["--max-steps", "4", "--contexts", "0"]
    assert main([*told, "--shards-at-once", "2"]) == 0
    assert sorted(p.name for p in out.glob("shard-*")) == [f"shard-{i:05d}.safetensors" for i in range(3)]
    assert not list(out.glob("partial-*"))
    capsys.readouterr()
    assert main([*told, "--shards-at-once", "3"]) == 1
    assert "config.shards_at_once was 2 and is now 3" in " ".join(capsys.readouterr().err.split())


def killed_at_the_second_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk take one more shard, and no other."""
    save, saved = Shard.save, list[Path]()

    def once(shard: Shard, path: Path) -> None:
        if saved:
            raise KeyboardInterrupt
        saved.append(path)
        save(shard, path)

    monkeypatch.setattr(Shard, "save", once)


@pytest.mark.parametrize("schedule", ["rehearsal", "published"])
def test_a_kill_between_two_shards_costs_no_byte(
    tiny_model: Any, tokenizer: Any, tmp_path: Path, schedule: str
) -> None:
    base = Base(tiny_model("llama"), tokenizer, "tiny")
    config = replace(CONFIG, schedule=schedule, shards=2, shards_at_once=2, max_steps=4)
    list(EditRun(base, stream(5), config, tmp_path / "whole"))
    broken = EditRun(base, stream(5), config, tmp_path / "broken")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "_RARELY", 0)
        killed_at_the_second_shard(patched)
        with pytest.raises(KeyboardInterrupt):
            list(broken)
    taken_up = EditRun(base, stream(5), config, tmp_path / "broken")
    assert taken_up.finished == 1
    assert [p.done for p in taken_up] == [5]  # nothing is learned again but what comes after the last block
    for i in range(2):
        name = f"shard-{i:05d}.safetensors"
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "broken").glob("partial-*"))


def test_a_shard_that_is_there_is_not_written_over(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """It may have been rebuilt since without an edit that was withdrawn."""
    base = Base(tiny_model("llama"), tokenizer, "tiny")
    config = replace(CONFIG, shards=2, shards_at_once=2, max_steps=2)
    list(EditRun(base, stream(4), config, tmp_path))
    first, second = (tmp_path / f"shard-{i:05d}.safetensors" for i in range(2))
    rebuilt = replace(Shard.load(first), details={"rebuilt": True})
    rebuilt.save(first)
    before = second.read_bytes()
    second.unlink()
    list(EditRun(base, stream(4), config, tmp_path))
    assert second.read_bytes() == before
    assert Shard.load(first).details == {"rebuilt": True}


def test_a_shard_without_an_edit_in_force_is_learned_beside_others(
    tiny_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    base = Base(tiny_model("llama"), tokenizer, "tiny")
    old = stream(2).records
    again = [replace(r, id=f"{r.id}-again", target="Quito") for r in old]
    some = EditStream.of([*old, *again])
    assert set(some.superseded) == {"e0", "e1"}
    config = replace(CONFIG, shards=2, shards_at_once=2, max_steps=2)
    assert [p.done for p in EditRun(base, some, config, tmp_path)] == [2, 4]
    outcomes = [e["outcome"] for e in RunFolder.open(tmp_path).entries()]
    assert outcomes[:2] == ["superseded", "superseded"]
    assert "superseded" not in outcomes[2:]


def test_it_is_said_where_jobs_have_nothing_to_do(
    tiny_model_dir: Path, edits_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["edit", str(edits_file), "--model", str(tiny_model_dir), "--out", str(tmp_path / "out"), "--shards", "2"]
    told += ["--shards-at-once", "2"]
    assert main([*told, "--max-steps", "2", "--contexts", "0", "--jobs", "2"]) == 0
    assert "2 shards, 2 at once, keep 1 of 2 jobs busy" in " ".join(capsys.readouterr().err.split())
