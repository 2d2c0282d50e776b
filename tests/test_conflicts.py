"""Edits that ask for the same fact in other words: found by the gate, settled for the later one, reported."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import few_pool_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from wisecli.cli.app import main
from wisecli.data.records import EditRecord
from wisecli.data.stream import EditStream, read_edits
from wisecli.editing import conflicts
from wisecli.editing.config import EditConfig
from wisecli.editing.conflicts import Conflicts, find_conflicts
from wisecli.editing.editor import Editor
from wisecli.editing.merge import merge_run
from wisecli.editing.run import EditRun
from wisecli.evaluation.evaluate import as_learned
from wisecli.memory.calibration import Trial
from wisecli.memory.keys import KeySpace
from wisecli.memory.lookup import SHARE
from wisecli.memory.shard import Gate
from wisecli.models.base import Base

EDITS = Path(__file__).parents[1] / "examples" / "edits.jsonl"
BAR = 0.5

# -- which pairs there are ---------------------------------------------------------------------------------------------


def slow_conflicts(
    records: Sequence[EditRecord], v: torch.Tensor, crowded: torch.Tensor, bar: float
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Every pair written out."""
    superseded, alike = {}, []
    for i, one in enumerate(records):
        decided = None
        for j in range(i + 1, len(records)):
            other = records[j]
            close = 1 - float((v[i] - v[j]).norm()) / 2**0.5
            if min(close - SHARE * float(crowded[j]), close - SHARE * float(crowded[i])) <= bar:
                continue
            if one.subject and other.subject:
                same = one.subject.lower() == other.subject.lower()
            else:
                same = (one.subject or "").lower() in other.prompt.lower()
                same = same and (other.subject or "").lower() in one.prompt.lower()
            if same and one.target.strip().lower() != other.target.strip().lower():
                decided = other.id
            else:
                alike.append((one.id, other.id))
                decided = None if same else decided
        if decided is not None:
            superseded[one.id] = decided
    return superseded, [(a, b) for a, b in alike if a not in superseded and b not in superseded]


written = st.builds(
    lambda about, named, target: EditRecord("-", f"Where is {about}?", target, subject=named),
    st.sampled_from(["France", "SPAIN"]),
    st.sampled_from([None, "France", "Spain"]),
    st.sampled_from(["Rome", "rome ", "Oslo"]),
)


@given(st.lists(written, min_size=2, max_size=9), st.integers(0, 1000), st.floats(-0.2, 0.9), st.integers(1, 10))
@settings(deadline=None, max_examples=150)
def test_conflicts_are_those_of_every_pair(made: list[EditRecord], seed: int, bar: float, rows: int) -> None:
    """Whatever the number of rows that are compared at a time."""
    records = [replace(r, id=f"e{i}") for i, r in enumerate(made)]
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 4, generator=g)[torch.randint(3, (len(records),), generator=g)]
    v = torch.nn.functional.normalize(centres + 0.3 * torch.randn(len(records), 4, generator=g), dim=-1)
    crowded = torch.rand(len(records), generator=g)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(conflicts, "_ROWS", rows)
        found = find_conflicts(records, v, crowded, bar)
    superseded, alike = slow_conflicts(records, v, crowded, bar)
    assert dict(found.superseded) == superseded
    assert list(found.alike) == alike


FIRST, SECOND, THIRD = (
    EditRecord("a", "The capital of France is", "Rome", subject="France"),
    EditRecord("b", "France is ruled from", "Oslo", subject="France"),
    EditRecord("c", "Which city is France's capital?", "Lima", subject="France"),
)
ELSEWHERE = EditRecord("d", "The capital of Kenya is", "Rome", subject="Kenya")


@pytest.mark.parametrize(
    ("records", "superseded", "alike"),
    [
        ((FIRST, SECOND), {"a": "b"}, ()),
        ((SECOND, FIRST), {"b": "a"}, ()),
        ((FIRST, replace(SECOND, target="ROME ")), {}, (("a", "b"),)),
        ((FIRST, ELSEWHERE), {}, (("a", "d"),)),
        ((FIRST, replace(SECOND, subject=None)), {"a": "b"}, ()),  # its prompt names France
        ((FIRST, replace(ELSEWHERE, target="Oslo", subject=None)), {}, (("a", "d"),)),  # its prompt does not
        ((FIRST, SECOND, THIRD), {"a": "c", "b": "c"}, ()),
        ((FIRST, SECOND, replace(THIRD, target="Rome")), {"b": "c"}, (("a", "c"),)),  # the last takes the second back
        ((FIRST, ELSEWHERE, SECOND), {"a": "b"}, (("d", "b"),)),  # of a pair that is alike, both are learned
    ],
)
def test_the_last_of_those_that_ask_for_the_same_decides(
    records: Sequence[EditRecord], superseded: dict[str, str], alike: tuple[tuple[str, str], ...]
) -> None:
    same = torch.ones(len(records), 1)
    assert find_conflicts(records, same, torch.zeros(len(records)), BAR) == Conflicts(superseded, alike)


# -- what a run makes of them ------------------------------------------------------------------------------------------

CONFIG = EditConfig(contexts=1, max_steps=6, shards=2, rank=4)
STREAM = (FIRST, ELSEWHERE, SECOND)
ASKS = {FIRST.prompt: 0, SECOND.prompt: 0, THIRD.prompt: 0, ELSEWHERE.prompt: 1}


@pytest.fixture
def base(tiny_model: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Base:
    few_pool_prompts(monkeypatch)
    return Base(tiny_model("llama"), tokenizer, "tiny")


def seeing(editor: Editor, asks: Mapping[str, int]) -> Gate:
    """A gate in whose key space prompts that ask the same are the same; others, and the pool, are at right angles."""
    h = editor.upper.entries([editor.encoder.prompt(p) for p in asks]).double()
    unit = torch.nn.functional.one_hot(torch.tensor(list(asks.values())), CONFIG.rank).double()
    centre = torch.zeros(h.shape[1])
    space = KeySpace(centre.half(), (torch.linalg.pinv(h) @ unit).half(), torch.ones(1))
    vectors = space(h)
    assert float((vectors @ vectors.T - (unit @ unit.T)).abs().max()) < 0.1
    pool = torch.eye(CONFIG.rank)[-1:].repeat(len(editor.pool.prompts), 1).half()
    return Gate(space, pool, torch.tensor(editor.pool.group), Trial(torch.zeros(0), torch.tensor([0.1, BAR]), 1))


def begun(base: Base, out: Path, records: Sequence[EditRecord] = STREAM) -> EditRun:
    """A run whose folder holds such a gate already."""
    run = EditRun(base, EditStream.of(records), CONFIG, out)
    if not run.folder.gate_path.exists():
        seeing(run.editor, ASKS).save(run.folder.gate_path)
    return run


def test_the_later_edit_takes_the_place_of_one_in_other_words(base: Base, tmp_path: Path) -> None:
    run = begun(base, tmp_path)
    for _ in run:
        pass
    assert run.settled == Conflicts({"a": "b"})
    first, other, later = run.folder.ledger()
    assert (first["id"], first["outcome"], first["steps"], first["by"]) == ("a", "superseded", 0, "b")
    assert all(e["outcome"] != "superseded" and e["steps"] > 0 and "by" not in e for e in (other, later))
    entries = [e for shard in run.folder.shards() for e in shard.edits]
    assert [{k: v for k, v in line.items() if k not in ("shard", "time")} for line in run.folder.ledger()] == entries
    merged = merge_run(run.folder)
    assert {merged.edits[i].id for i in merged.keys.owner.tolist()} == {"b", "d"}
    assert as_learned(run.stream, merged).superseded == {"a"}  # evaluation asks only what was learned


def test_edits_that_agree_or_are_about_another_subject_are_all_learned(base: Base, tmp_path: Path) -> None:
    records = [FIRST, replace(SECOND, target=FIRST.target), replace(ELSEWHERE, id="e", prompt=THIRD.prompt)]
    run = begun(base, tmp_path, records)
    for _ in run:
        pass
    assert run.settled == Conflicts({}, (("a", "b"), ("a", "e"), ("b", "e")))
    assert all(line["outcome"] != "superseded" for line in run.folder.ledger())
    assert {i for s in run.folder.shards() for i in s.owner.tolist()} == {0, 1}


def test_equal_prompts_are_settled_with_the_rest(base: Base) -> None:
    again = replace(FIRST, id="again", target="Lima")
    editor = Editor(base, CONFIG)
    editor.gate = seeing(editor, ASKS)
    found = editor.settle(EditStream.of([FIRST, again, ELSEWHERE, SECOND]))
    assert found == Conflicts({"a": "again", "again": "b"})


def test_without_a_trial_only_equal_prompts_clash(base: Base) -> None:
    editor = Editor(base, CONFIG)
    gate = seeing(editor, ASKS)
    editor.gate = replace(gate, trial=Trial(torch.zeros(0), torch.zeros(0), 0))
    assert editor.conflicts(STREAM) == Conflicts({})


def test_an_interrupted_run_continues_to_the_same_bytes(base: Base, tmp_path: Path) -> None:
    for name in ("whole", "broken"):
        run = begun(base, tmp_path / name)
        for step in run:
            if name == "broken" and step.finished:
                break
    assert run.finished == 1
    again = begun(base, tmp_path / "broken")
    for _ in again:
        pass
    assert again.settled.superseded == {"a": "b"}
    names = sorted(p.name for p in (tmp_path / "whole").iterdir() if p.name not in ("journal.jsonl", ".lock"))
    assert len(names) == 5
    for name in names:
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("schedule", ["rehearsal", "published"])
def test_an_edit_that_arrives_takes_the_place_of_all_that_ask_the_same(base: Base, schedule: str) -> None:
    editor = Editor(base, replace(CONFIG, schedule=schedule, block=1))
    editor.gate = seeing(editor, ASKS)
    shard = editor.open(0, EditStream.of(STREAM))
    for record in (FIRST, replace(SECOND, target=FIRST.target), ELSEWHERE):
        shard.arrive(record)
    assert [e.record.id for e in shard.captured] == ["a", "b", "d"]  # the first two agree
    shard.arrive(THIRD)
    assert [e.record.id for e in shard.captured] == ["c", "d"]
    made = shard.shard()
    assert [(e["id"], e.get("by")) for e in made.edits] == [("a", "c"), ("b", "c"), ("d", None), ("c", None)]
    assert [made.edits[i]["id"] for i in made.owner.unique().tolist()] == ["d", "c"]
    outcomes = shard.learner.outcomes()
    assert len(outcomes) == 2
    if schedule == "rehearsal":
        c, d = shard.captured
        held = [*c.rows, *d.rows]
        assert all(a is b for a, b in zip(shard.learner.rows, held, strict=True))
        assert shard.learner.owner == [0] * len(c.rows) + [1] * len(d.rows)
        assert shard.learner.firsts == [0, len(c.rows)]
        assert len(shard.learner.worst) == len(shard.learner.right) == len(held)


def test_the_edit_that_arrives_may_have_fewer_rows(base: Base) -> None:
    """A long prompt stands behind no context; its neighbours' rows stay as they are."""
    editor = Editor(base, replace(CONFIG, block=1))
    long = replace(THIRD, prompt="Once upon a time " * 12 + THIRD.prompt)
    editor.gate = seeing(editor, {**ASKS, long.prompt: 0})
    shard = editor.open(0, EditStream.of(STREAM))
    for record in (FIRST, ELSEWHERE, long):
        shard.arrive(record)
    c, d = shard.captured
    assert (c.record, len(c.rows), len(d.rows)) == (long, 1, 2)
    assert all(a is b for a, b in zip(shard.learner.rows, [*c.rows, *d.rows], strict=True))
    assert shard.learner.owner == [0, 1, 1]
    assert shard.learner.firsts == [0, 1]
    assert torch.isfinite(shard.learner.worst).all()


# -- on the demonstration base, through the command line ---------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[object, ...]]:
    """Four demonstration edits; the first again in other words with another target, the second with the same."""
    folder = tmp_path_factory.mktemp("job")
    some = list(read_edits(EDITS, 4).records)
    more = [
        replace(some[0], id="other", prompt=some[0].rephrases[0], target="Agatha Christie", rephrases=()),
        replace(some[1], id="same", prompt=some[1].rephrases[0], rephrases=()),
    ]
    path = folder / "edits.jsonl"
    path.write_text("".join(json.dumps(r.to_json()) + "\n" for r in [*some, *more]))
    argv = ("edit", path, "--out", folder / "shards", "--contexts", "1", "--max-steps", "20")
    with pytest.MonkeyPatch.context() as patched:
        few_pool_prompts(patched, prompts=60, facts=60)
        assert main([str(a) for a in (*argv, "-q")]) == 0
    return folder / "shards", argv


@pytest.fixture
def _same_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    few_pool_prompts(monkeypatch, prompts=60, facts=60)


@pytest.mark.usefixtures("_same_pool")
def test_the_command_line_shows_edits_that_ask_for_the_same(
    learned: tuple[Path, tuple[object, ...]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    capsys.readouterr()
    assert main([str(a) for a in learned[1]]) == 0
    out = capsys.readouterr().out
    table = out[out.index("Edits that ask for the same") :]
    lines = [line.strip(" │|").split() for line in table.splitlines()]
    (replaced,) = [words for words in lines if "replaced" in words]
    (pair,) = [words for words in lines if "both" in words]
    assert (replaced[0], pair[0]) == ("demo-001", "demo-002")
    assert "other" in replaced
    assert "same" in pair


@pytest.mark.usefixtures("_same_pool")
def test_the_document_names_both_kinds_of_pairs(
    learned: tuple[Path, tuple[object, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main([*(str(a) for a in learned[1]), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["alike"] == [["demo-002", "same"]]
    assert {e["id"]: e["by"] for e in said["edits"] if "by" in e} == {"demo-001": "other"}
    assert said["superseded"] == 1
    assert said["took"] + said["failed"] == 5
    assert {e["id"] for e in said["edits"] if e["outcome"] == "took"} >= {"other", "same", "demo-002"}
