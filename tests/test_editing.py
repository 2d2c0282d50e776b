"""Editing: what must hold of every learned shard, whatever the base."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from wisecli.data.pool import ordinary_prompts
from wisecli.data.records import EditRecord
from wisecli.data.stream import EditStream
from wisecli.editing.batch import capture_edits, edit_rows
from wisecli.editing.config import EditConfig
from wisecli.editing.editor import Editor, slices
from wisecli.editing.merge import merge_run
from wisecli.editing.negatives import about_edits, hard_negatives, template_of
from wisecli.editing.published import Published
from wisecli.editing.rehearsal import Outcome, Rehearsal
from wisecli.editing.run import EditRun
from wisecli.errors import BaseMismatch, InputError, UsageError
from wisecli.memory.bits import draw_mask
from wisecli.memory.calibration import key_threshold
from wisecli.memory.shard import RunFolder
from wisecli.models.base import Base, load_base
from wisecli.models.prompts import PromptEncoder
from wisecli.models.site import find_site
from wisecli.models.upper import UpperModel

COUNTRIES = ("France", "Spain", "Italy", "Norway", "Kenya", "Peru")
CITIES = ("Paris", "Madrid", "Rome", "Oslo", "Nairobi", "Lima")


def records(n: int = 6) -> list[EditRecord]:
    pairs = list(zip(COUNTRIES, reversed(CITIES), strict=True))[:n]
    return [EditRecord(f"e{i}", f"The capital of {c} is", t, subject=c) for i, (c, t) in enumerate(pairs)]


def finish(learning: Any) -> list[Outcome]:
    """Run a learner to its end and give its outcomes."""
    while True:
        try:
            next(learning)
        except StopIteration as done:
            return done.value


@pytest.fixture(scope="module")
def upper(tiny_model: Callable[..., Any], encoder: PromptEncoder) -> UpperModel:
    model = tiny_model("llama")
    return UpperModel(model, find_site(model), encoder)


@pytest.mark.parametrize("learner_type", [Rehearsal, Published])
def test_nothing_moves_outside_the_mask(upper: UpperModel, learner_type: type) -> None:
    config = EditConfig(max_steps=5, contexts=1, schedule="published" if learner_type is Published else "rehearsal")
    mask = draw_mask((upper.site.d_out, upper.site.d_in), 0.2, 3)
    before = {k: v.clone() for k, v in upper.model.state_dict().items()}
    learner = learner_type(upper, mask, config, 0)
    outcomes = finish(learner.learn(capture_edits(upper, records(3), 1, 0)))
    delta = learner.result()
    assert len(outcomes) == 3
    assert bool((delta[~mask] == 0).all())
    assert bool((delta[mask] != 0).any())
    for name, value in upper.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_rehearsal_holds_every_edit_of_a_shard(upper: UpperModel) -> None:
    config = EditConfig(contexts=2, block=2, max_steps=150, lr=0.2, mask_density=1.0)
    learner = Rehearsal(upper, torch.ones(upper.site.d_out, upper.site.d_in), config, 0)
    outcomes = finish(learner.learn(capture_edits(upper, records(), 2, 0)))
    assert all(o.took for o in outcomes)
    assert all(o.steps > 0 for o in outcomes)


def test_an_edit_that_is_not_learned_is_reported_as_such(upper: UpperModel) -> None:
    learner = Rehearsal(upper, torch.ones(upper.site.d_out, upper.site.d_in), EditConfig(max_steps=1, lr=1e-9), 0)
    outcomes = finish(learner.learn(capture_edits(upper, records(2), 0, 0)))
    assert not any(o.took for o in outcomes)


def test_rows_of_an_edit_do_not_depend_on_its_neighbours(encoder: PromptEncoder) -> None:
    first, second = records(2)
    assert edit_rows(encoder, first, 3, 0) == edit_rows(encoder, first, 3, 0)
    assert edit_rows(encoder, first, 3, 0) != edit_rows(encoder, first, 3, 1)
    assert len({row.ids for row in edit_rows(encoder, second, 3, 0)}) == 4
    assert all(row.target == edit_rows(encoder, second, 0, 0)[0].target for row in edit_rows(encoder, second, 3, 0))


def test_a_record_too_long_for_the_base_is_named(upper: UpperModel) -> None:
    long = EditRecord("long", "word " * 50, "end", source="edits.jsonl:4")
    with pytest.raises(InputError, match=r"edits.jsonl:4: prompt and target take \d+ tokens, the base allows 20"):
        capture_edits(upper, [long], 0, 0, max_length=20)


def test_slices_keep_order_and_differ_by_at_most_one() -> None:
    parts = slices(records(), 4)
    assert [r for part in parts for r in part] == records()
    assert {len(p) for p in parts} <= {1, 2}


def test_hard_negatives_never_ask_for_an_edited_fact() -> None:
    other = [
        EditRecord(f"o{c}", f"Which currency do people in {c} pay with?", "gold", subject=c) for c in COUNTRIES[:3]
    ]
    other.append(EditRecord("e", "Who wrote Emma?", "Jane", subject="Emma"))
    stream = records(3) + other
    edited = {r.prompt for r in stream} | {f"Which currency do people in {c} pay with?" for c in COUNTRIES[:3]}
    made = hard_negatives(stream)
    assert made
    assert not set(made) & edited
    assert template_of(other[-1]) == "Who wrote {}?"


def test_ordinary_prompts_that_name_an_edited_subject_are_found() -> None:
    edits = [EditRecord("a", "Who made the Model T?", "Fiat", subject="the Model T"), EditRecord("b", "Hi there", "Ho")]
    prompts = ["The Model T was made by", "Which model train is best?", "hi there", "Who made the Model TX?"]
    assert about_edits(prompts, edits) == [0, 2]


def test_an_edit_that_is_out_of_line_does_not_move_the_gate() -> None:
    ordinary, hard = torch.linspace(0, 0.5, 1000), torch.linspace(0, 0.9, 100)
    in_scope = torch.full((100,), 0.9)
    none = torch.zeros(0)
    usual = key_threshold(ordinary, none, hard, in_scope).epsilon
    in_scope[7] = -0.4
    assert key_threshold(ordinary, none, hard, in_scope).epsilon == pytest.approx(usual, abs=1e-3)
    assert key_threshold(ordinary, none, hard, torch.full((9,), -1.0)).epsilon >= 0.49


def test_a_stream_of_few_edits_does_not_open_the_gate_to_its_neighbours() -> None:
    ordinary, neighbours = torch.linspace(-0.1, 0.2, 1000), torch.linspace(0.1, 0.6, 1000)
    epsilon = key_threshold(ordinary, neighbours, torch.zeros(0), torch.full((3,), 0.9)).epsilon
    assert epsilon >= 0.5


# -- edits that arrive one by one --------------------------------------------------------------------------------------


@pytest.mark.parametrize("learner_type", [Rehearsal, Published])
def test_an_edit_in_the_place_of_another(upper: UpperModel, learner_type: type) -> None:
    """The replaced edit's rows are gone, the others' are the same objects, and nothing moves outside the mask."""
    published = learner_type is Published
    config = EditConfig(max_steps=5, contexts=1, block=1, schedule="published" if published else "rehearsal")
    mask = draw_mask((upper.site.d_out, upper.site.d_in), 0.2, 3)
    learner = learner_type(upper, mask, config, 0)
    first, second, third = capture_edits(upper, records(3), 1, 0)
    (other,) = capture_edits(upper, [dataclasses.replace(records(3)[1], id="new", target="Oslo")], 1, 0)
    for edit in (first, second, third):
        learner.arrive([edit])
    before = learner.result().clone()
    learner.replace(1, other)
    if published:
        assert [e.record.id for e in learner.edits] == ["e0", "new", "e2"]
    else:
        want = [*first.rows, *other.rows, *third.rows]
        assert len(learner.rows) == len(want)
        assert all(a is b for a, b in zip(learner.rows, want, strict=True))
        assert learner.owner == [0] * len(first.rows) + [1] * len(other.rows) + [2] * len(third.rows)
    delta = learner.result()
    assert not torch.equal(delta, before)
    assert bool((delta[~mask] == 0).all())
    assert len(learner.outcomes()) == 3


def test_a_replaced_edit_is_learned_and_the_others_stay(upper: UpperModel) -> None:
    config = EditConfig(contexts=0, block=1, max_steps=200, lr=0.2, mask_density=1.0)
    learner = Rehearsal(upper, torch.ones(upper.site.d_out, upper.site.d_in), config, 0)
    captured = capture_edits(upper, records(3), 0, 0)
    (other,) = capture_edits(upper, [dataclasses.replace(records(3)[1], target="Oslo")], 0, 0)
    learner.arrive(captured)
    assert all(o.took for o in learner.outcomes())
    learner.replace(1, other)
    assert learner.outcomes()[1].took
    for edit, holds in ((captured[0], True), (captured[1], False), (other, True), (captured[2], True)):
        with torch.no_grad():
            logits, targets = upper.logits(edit.rows[:1], learner.result())
        assert bool((logits.argmax(-1) == targets).all()) == holds, edit.record


class TestOpenShard:
    """A shard that takes edits in whenever they come."""

    config = EditConfig(contexts=1, max_steps=6, rank=16, shards=1, block=1)

    @pytest.fixture
    def editor(self, tiny_model: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Editor:
        monkeypatch.setattr("wisecli.editing.editor.ordinary_prompts", lambda: ordinary_prompts()[:48])
        return Editor(Base(tiny_model("llama"), tokenizer, "tiny"), self.config)

    def test_the_same_prompt_takes_the_place_of_the_earlier_edit(self, editor: Editor) -> None:
        one, two = records(2)
        back = dataclasses.replace(one, id="back", target="Vienna")
        shard = editor.open(0, EditStream.of([one, two]))
        before = {k: v.clone() for k, v in editor.base.model.state_dict().items()}
        for record in (one, two, back):
            shard.arrive(record)
        assert [e.record.id for e in shard.captured] == ["back", "e1"]
        made = shard.shard()
        assert [(e["id"], e["outcome"] == "superseded") for e in made.edits] == [
            *(("e0", True), ("e1", False), ("back", False)),
        ]
        assert {made.edits[i]["id"] for i in made.owner.tolist()} == {"e1", "back"}
        again = dataclasses.replace(one, id="again")
        shard.arrive(again)
        outcomes = {e["id"]: e["outcome"] for e in shard.shard().edits}
        assert [k for k, v in outcomes.items() if v == "superseded"] == ["e0", "back"]
        dense = shard.shard().delta.dense()
        assert bool((dense[~shard.mask] == 0).all())
        assert bool((dense[shard.mask] != 0).any())
        for name, value in editor.base.model.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_reading_a_shard_off_changes_nothing(self, editor: Editor) -> None:
        deltas = []
        for read in (False, True):
            shard = editor.open(0, EditStream.of(records(3)))
            for _ in shard.learn(records(3)):
                if read:
                    shard.shard()
            deltas.append(shard.shard())
        assert torch.equal(deltas[0].delta.values, deltas[1].delta.values)
        assert torch.equal(deltas[0].keys, deltas[1].keys)
        assert deltas[0].edits == deltas[1].edits

    def test_negatives_do_not_depend_on_what_was_asked_before(self, editor: Editor) -> None:
        """Else the bytes of a shard would depend on when it was read off."""
        prompts = [f"{'where is ' * (i % 5)}the capital of {c} {i}" for i, c in enumerate(COUNTRIES * 12)]
        whole = editor.whitened(prompts)
        editor._vectors.clear()
        for at in range(0, len(prompts), 7):
            editor.whitened(prompts[at : at + 7])
        assert torch.equal(editor.whitened(prompts), whole)

    def test_a_whole_stream_in_memory_is_that_of_a_run(self, editor: Editor, tmp_path: Any) -> None:
        stream = EditStream.of(records(4))
        run = EditRun(editor.base, stream, self.config, tmp_path)
        for _ in run:
            pass
        (shard,) = editor.learn(stream)
        shard.save(tmp_path / "mine.safetensors")
        assert (tmp_path / "mine.safetensors").read_bytes() == run.folder.shard_path(0).read_bytes()
        assert run.open is None


class TestRun:
    """The run folder, on a tiny random base."""

    config = EditConfig(contexts=1, max_steps=6, rank=16)

    def learn(self, tiny_model_dir: Any, out: Any, edits: Sequence[EditRecord], **options: Any) -> RunFolder:
        run = EditRun(load_base(str(tiny_model_dir), device="cpu"), EditStream.of(edits), self.config, out, **options)
        for _ in run:
            pass
        return run.folder

    def test_a_contradicted_edit_is_not_learned(self, tiny_model_dir: Any, tmp_path: Any) -> None:
        again = EditRecord("later", "The capital of France is", "Oslo", subject="France")
        folder = self.learn(tiny_model_dir, tmp_path, [*records(3), again])
        by_id = {line["id"]: line for line in folder.ledger()}
        assert by_id["e0"]["outcome"] == "superseded"
        assert by_id["later"]["outcome"] in ("took", "failed")
        side_memory = merge_run(folder)
        owners = {side_memory.edits[i].id for i in side_memory.keys.owner.tolist()}
        assert owners == {"e1", "e2", "later"}

    def test_without_texts_no_prompt_is_written(self, tiny_model_dir: Any, tmp_path: Any) -> None:
        self.learn(tiny_model_dir, tmp_path, records(2), texts=False)
        for file in tmp_path.iterdir():
            assert b"France" not in file.read_bytes(), file

    def test_shards_and_merge_are_refused_on_another_base(
        self, tiny_model_dir: Any, tmp_path: Any, tiny_model: Callable[..., Any]
    ) -> None:
        folder = self.learn(tiny_model_dir, tmp_path, records(2))
        base = load_base(str(tiny_model_dir), device="cpu")
        other = type(base)(tiny_model("llama", seed=9), base.tokenizer, "other")
        with pytest.raises(BaseMismatch):
            merge_run(folder, base=other)

    def test_merging_tells_whether_it_rehearsed(self, tiny_model_dir: Any, tmp_path: Any) -> None:
        folder = self.learn(tiny_model_dir, tmp_path, records(2))
        base = load_base(str(tiny_model_dir), device="cpu")
        said = [merge_run(folder, base=base, rehearse=r).memories[0].origin["rehearsed"] for r in (True, False)]
        assert said == [True, False]
        with pytest.raises(UsageError, match="not -1"):
            merge_run(folder, density=-1)

    def test_a_damaged_shard_is_named(self, tiny_model_dir: Any, tmp_path: Any) -> None:
        folder = self.learn(tiny_model_dir, tmp_path, records(2))
        file = folder.shard_path(1)
        file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(InputError, match="shard-00001"):
            merge_run(folder)


@pytest.mark.parametrize(
    "bad",
    [{"shards": 0}, {"mask_density": 0.0}, {"mask_density": 1.5}, {"schedule": "fast"}, {"lr": -1.0}, {"contexts": -1}],
)
def test_settings_out_of_range_are_usage_errors(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        EditConfig(**bad)


def test_settings_survive_json() -> None:
    config = EditConfig(layer=3, margins=(1.0, 2.0, 3.0), lr=0.1)
    assert EditConfig.from_json(config.to_json()) == config
