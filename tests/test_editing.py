"""Editing: what must hold of every learned shard, whatever the base."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import SITES, few_pool_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from wisecli.data import pool
from wisecli.data.records import EditRecord
from wisecli.data.stream import EditStream
from wisecli.editing.batch import ROWS, TOKENS, CapturedEdit, batches, capture_edits, edit_rows
from wisecli.editing.config import EditConfig
from wisecli.editing.editor import Editor, slices
from wisecli.editing.margins import Margins
from wisecli.editing.merge import MergeConfig, merge_run, merge_shards
from wisecli.editing.negatives import about_edits, hard_negatives, template_of
from wisecli.editing.published import Published
from wisecli.editing.rehearsal import Outcome, Rehearsal
from wisecli.editing.rewording import Rewording
from wisecli.editing.run import EditRun
from wisecli.editing.steps import Step, take, take_all, together
from wisecli.errors import BaseMismatch, InputError, ModelError, UsageError
from wisecli.memory.bits import draw_mask
from wisecli.memory.shard import RunFolder
from wisecli.models.base import Base, load_base
from wisecli.models.captured import StackedRows
from wisecli.models.prompts import PromptEncoder
from wisecli.models.site import find_site
from wisecli.models.upper import UpperModel
from wisecli.routing.attach import attach

COUNTRIES = ("France", "Spain", "Italy", "Norway", "Kenya", "Peru")
CITIES = ("Paris", "Madrid", "Rome", "Oslo", "Nairobi", "Lima")


def records(n: int = 6) -> list[EditRecord]:
    pairs = list(zip(COUNTRIES, reversed(CITIES), strict=True))[:n]
    return [EditRecord(f"e{i}", f"The capital of {c} is", t, subject=c) for i, (c, t) in enumerate(pairs)]


def finish(learner: Rehearsal | Published, edits: Sequence[CapturedEdit]) -> list[Outcome]:
    """Let a learner learn edits to the end and give its outcomes."""
    for _ in together(learner.upper, [learner.learning(edits)]):
        pass
    return learner.outcomes()


@pytest.fixture(autouse=True)
def _small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    few_pool_prompts(monkeypatch)


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
    outcomes = finish(learner, capture_edits(upper, records(3), 1, 0))
    delta = learner.result()
    assert len(outcomes) == 3
    assert bool((delta[~mask] == 0).all())
    assert bool((delta[mask] != 0).any())
    for name, value in upper.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_rehearsal_holds_every_edit_of_a_shard(upper: UpperModel) -> None:
    config = EditConfig(contexts=1, block=2, max_steps=150, lr=0.2, mask_density=1.0)
    learner = Rehearsal(upper, torch.ones(upper.site.d_out, upper.site.d_in), config, 0)
    outcomes = finish(learner, capture_edits(upper, records(), 1, 0))
    assert all(o.took for o in outcomes)
    assert all(o.steps > 0 for o in outcomes)


def test_rows_that_fell_off_unseen_are_found_before_learning_ends(upper: UpperModel) -> None:
    """Rows that held well when last seen are looked at last, but all are looked at."""
    config = EditConfig(contexts=1, block=3, max_steps=150, lr=0.2, mask_density=1.0)
    learner = Rehearsal(upper, torch.ones(upper.site.d_out, upper.site.d_in), config, 0)
    edits = capture_edits(upper, records(3), 1, 0)
    learner.arrive(edits)
    with torch.no_grad():
        learner.delta.zero_()
    learner.worst.fill_(0.0)
    learner.right.fill_(True)
    learner.seen = False
    outcomes = finish(learner, edits)
    assert learner.seen
    assert all(o.took for o in outcomes)
    again = Rehearsal(upper, learner.mask, config, 0, start=learner.result())
    again._admit(edits)
    again._sweep()
    torch.testing.assert_close(again.worst, learner.worst)


def test_steps_are_halved_where_rows_fall_off_while_others_are_practised(
    upper: UpperModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And they are as long as before when it is over."""
    config = EditConfig(contexts=0, max_steps=60, lr=0.2, mask_density=1.0, dropout=0.0, rewording=0.0)
    learner = Rehearsal(upper, torch.ones(upper.site.d_out, upper.site.d_in), config, 0)
    learner.arrive(capture_edits(upper, records(3), 0, 0))
    monkeypatch.setattr(learner, "_sweep", lambda *_: learner.worst.fill_(torch.inf))  # as if all fell off, each time
    before, sizes = learner.optimiser.param_groups[0]["lr"], []
    for step in learner._consolidate(3):
        sizes.append(learner.optimiser.param_groups[0]["lr"])
        take(upper, [step])
    found = sorted(set(sizes), reverse=True)
    assert found == [before / 2**i for i in range(len(found))]
    assert len(found) > 1
    assert learner.optimiser.param_groups[0]["lr"] == before


def test_an_edit_that_is_not_learned_is_reported_as_such(upper: UpperModel) -> None:
    learner = Rehearsal(upper, torch.ones(upper.site.d_out, upper.site.d_in), EditConfig(max_steps=1, lr=1e-9), 0)
    outcomes = finish(learner, capture_edits(upper, records(2), 0, 0))
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


def test_what_cannot_hold_is_taken_back(upper: UpperModel) -> None:
    """Two edits of one prompt with different targets never hold together; the others are not their victims."""
    config = EditConfig(contexts=0, max_steps=200, lr=0.2, mask_density=1.0, dropout=0.0, rewording=0.0)
    *others, one = records(4)
    against = dataclasses.replace(one, id="against", target="Reykjavik")
    learner = Rehearsal(upper, torch.ones(upper.site.d_out, upper.site.d_in), config, 0)
    learner.arrive(capture_edits(upper, others, 0, 0))
    assert not learner.aside.any()
    before = learner.result()
    learner.arrive(capture_edits(upper, [one, against], 0, 0))
    assert torch.equal(learner.result(), before)
    assert learner.aside.tolist() == [False, False, False, True, True]
    learner.worst[:] = torch.inf
    drawn = {i for _ in range(20) for i in learner._choose(learner._pending(), config.rows, len(learner.rows))}
    assert drawn == {0, 1, 2}
    take_all(upper, learner._finish())
    assert all(o.took for o in learner.outcomes()[:3])
    learner.replace(3, capture_edits(upper, [dataclasses.replace(one, target="Oslo")], 0, 0)[0])
    assert not learner.aside[3]  # tried anew
    assert learner.outcomes()[3].took


def test_what_contradicts_does_not_hide_rows_that_fell_off(upper: UpperModel) -> None:
    """Where some rows never hold, the others are looked at all the same, and learned."""
    config = EditConfig(contexts=0, max_steps=60, lr=0.2, mask_density=1.0, dropout=0.0, rewording=0.0)
    *others, one = records(6)
    edits = capture_edits(upper, [*others, one, dataclasses.replace(one, id="against", target="Reykjavik")], 0, 0)
    learner = Rehearsal(upper, torch.ones(upper.site.d_out, upper.site.d_in), config, 0)
    learner._admit(edits)
    learner.worst[: len(others)] = 0.0  # as if they had held long ago
    take_all(upper, learner._consolidate(len(edits)))
    take_all(upper, learner._finish())
    outcomes = learner.outcomes()
    assert all(o.took for o in outcomes[: len(others)])
    assert sum(o.took for o in outcomes[len(others) :]) <= 1


@pytest.mark.parametrize("rows", [1, 2])
def test_the_smallest_steps_learn_too(upper: UpperModel, rows: int) -> None:
    config = EditConfig(contexts=0, block=2, rows=rows, max_steps=200, lr=0.2, mask_density=1.0)
    learner = Rehearsal(upper, torch.ones(upper.site.d_out, upper.site.d_in), config, 0)
    assert all(o.took for o in finish(learner, capture_edits(upper, records(2), 0, 0)))


@given(st.lists(st.integers(1, 10_000), max_size=400))
@settings(deadline=None, max_examples=60)
def test_batches_hold_every_row_once_and_fit_with_their_padding(lengths: list[int]) -> None:
    found = list(batches(lengths))
    assert sorted(i for picked in found for i in picked) == list(range(len(lengths)))
    for picked in found:
        assert len(picked) == 1 or len(picked) * max(lengths[i] for i in picked) <= TOKENS
        assert len(picked) <= ROWS


def test_an_edit_without_a_finite_key_is_named(tiny_model: Callable[..., Any], encoder: PromptEncoder) -> None:
    model = tiny_model("llama", fresh=True)
    editor = Editor(Base(model, encoder.tokenizer, "tiny"), EditConfig(contexts=0))
    with torch.no_grad():
        model.model.embed_tokens.weight[encoder.prompt(records(2)[1].prompt).ids[-1]] = torch.inf
    with pytest.raises(ModelError, match=r"e\d: what the base makes of this prompt is not finite in float32"):
        editor.capture(records(2))


def test_where_most_do_not_hold_none_is_set_aside(upper: UpperModel) -> None:
    config = EditConfig(contexts=0, block=3, max_steps=4, lr=1e-9)
    learner = Rehearsal(upper, torch.ones(upper.site.d_out, upper.site.d_in), config, 0)
    learner.arrive(capture_edits(upper, records(3), 0, 0))
    assert learner.held_at.isinf().all()
    assert not learner.aside.any()
    again = Rehearsal(upper, torch.ones(upper.site.d_out, upper.site.d_in), config, 0)
    again.hold(capture_edits(upper, records(3), 0, 0), failed=[0, 2])
    assert not again.aside.any()


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
            bare = StackedRows.of(edit.rows[:1])
            logits = upper.logits(bare, learner.result())
        assert bool((logits.argmax(-1) == bare.targets).all()) == holds, edit.record


class TestOpenShard:
    """A shard that takes edits in whenever they come."""

    config = EditConfig(contexts=1, max_steps=6, rank=16, shards=1, block=1)

    @pytest.fixture
    def editor(self, tiny_model: Callable[..., Any], tokenizer: Any) -> Editor:
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
        whole = editor.vectors(prompts)
        editor._vectors.clear()
        for at in range(0, len(prompts), 7):
            editor.vectors(prompts[at : at + 7])
        assert torch.equal(editor.vectors(prompts), whole)

    def test_a_whole_stream_in_memory_is_that_of_a_run(self, editor: Editor, tmp_path: Any) -> None:
        stream = EditStream.of(records(4))
        run = EditRun(editor.base, stream, self.config, tmp_path)
        for _ in run:
            pass
        (shard,) = editor.learn(stream)
        shard.save(tmp_path / "mine.safetensors")
        assert (tmp_path / "mine.safetensors").read_bytes() == run.folder.shard_path(0).read_bytes()
        assert run.open == ()


# -- other wordings ----------------------------------------------------------------------------------------------------


class TestRewording:
    """Activations moved as another wording would move them."""

    @staticmethod
    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    @pytest.mark.parametrize("kind", ["llama", "gemma2"])
    def test_a_move_is_what_the_wordings_of_a_fact_differ_by(
        self, kind: str, tiny_model: Callable[..., Any], encoder: PromptEncoder
    ) -> None:
        model = tiny_model(kind)
        upper = UpperModel(model, find_site(model), encoder)
        made = Rewording.measure(upper)
        facts = pool.pool_facts()
        assert len(made.moves) == len(facts)
        one, other = upper.capture([encoder.pair(p, facts[1].answer) for p in facts[1].prompts[:2]])
        for move, value in zip(made.moves[1], ("a", "stream"), strict=True):
            first, second = (getattr(r, value)[r.predicting.start] for r in (one, other))
            torch.testing.assert_close(move[0], 0.7 * (second - first), atol=1e-4, rtol=1e-4)
            assert bool(move.any())

    @pytest.mark.parametrize("back", [False, True])
    def test_a_row_is_moved_where_its_target_is_predicted_and_nowhere_else(self, upper: UpperModel, back: bool) -> None:
        made = Rewording.measure(upper)
        (edit,) = capture_edits(upper, [dataclasses.replace(records(1)[0], target="a rather long target it is")], 0, 0)
        (row,) = edit.rows
        before = row.a.clone(), row.stream.clone()
        at = list(range(len(row.ids)))[row.predicting]
        assert at[0] == int(row.content.nonzero()[-1])
        assert len(at) > max(len(a) for a, _ in made.moves)  # the last move serves the rest of a long target
        drawn = {s: int(torch.randint(2 * len(made.moves), (), generator=self.seeded(s))) for s in range(20)}
        seed, i = next((s, i) for s, i in drawn.items() if i % 2 == back)
        moved = made(row, self.seeded(seed))
        for was, is_, move in zip(before, (moved.a, moved.stream), made.moves[i // 2], strict=True):
            want = was.clone()
            for k, place in enumerate(at):
                want[place] += (-1 if back else 1) * move[min(k, len(move) - 1)]
            torch.testing.assert_close(is_, want)
            assert not torch.equal(is_, was)
        assert torch.equal(row.a, before[0])  # what was captured stays
        assert torch.equal(row.stream, before[1])
        assert all(getattr(moved, name) is getattr(row, name) for name in ("ids", "content", "entry"))

    @pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.5, 20, 80), (1.0, 100, 100)])
    def test_as_many_rows_are_moved_as_the_config_says(
        self, upper: UpperModel, share: float, least: int, most: int
    ) -> None:
        config = EditConfig(rewording=share)
        learner = Rehearsal(upper, torch.ones(upper.site.d_out, upper.site.d_in), config, 0)
        assert (learner.rewording is None) == (share == 0)
        (edit,) = capture_edits(upper, records(1), 0, 0)
        moved = sum(learner._reworded(edit.rows[0]) is not edit.rows[0] for _ in range(100))
        assert least <= moved <= most

    def test_without_it_no_wording_is_run(
        self, tiny_model: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Rewording, "measure", lambda *_: pytest.fail("measured"))
        config = EditConfig(rewording=0, contexts=0, max_steps=2, rank=16, shards=1)
        editor = Editor(Base(tiny_model("llama"), tokenizer, "tiny"), config)
        assert len(editor.learn(EditStream.of(records(2)))) == 1

    @pytest.mark.parametrize("kind", ["llama", "gemma2"])
    @pytest.mark.parametrize("setting", ["dropout", "rewording"])
    def test_it_reaches_the_delta_whether_the_layer_is_replayed_or_not(
        self, tiny_model: Callable[..., Any], encoder: PromptEncoder, kind: str, setting: str
    ) -> None:
        model = tiny_model(kind)
        upper = UpperModel(model, find_site(model), encoder)
        mask = draw_mask((upper.site.d_out, upper.site.d_in), 0.2, 3)
        edits = capture_edits(upper, records(2), 1, 0)
        found = []
        for share in (0.0, 0.5):
            rest = {"dropout": 0.0, "rewording": 0.0, setting: share}
            learner = Rehearsal(upper, mask, EditConfig(max_steps=3, **rest), 0)
            finish(learner, edits)
            found.append(learner.result())
        assert not torch.equal(*found)

    def test_a_loss_that_is_no_number_does_not_hold(self, upper: UpperModel) -> None:
        learner = Rehearsal(upper, torch.ones(upper.site.d_out, upper.site.d_in), EditConfig(rewording=0.0), 0)
        learner._admit(capture_edits(upper, records(2), 1, 0))
        learner.worst[:] = torch.nan
        assert learner._pending().tolist() == list(range(len(learner.rows)))
        assert sorted(learner._within_budget([0, 1])) == [0, 1]

    def test_the_same_seed_gives_the_same_delta_and_nothing_moves_outside_the_mask(self, upper: UpperModel) -> None:
        mask = draw_mask((upper.site.d_out, upper.site.d_in), 0.2, 3)
        edits = capture_edits(upper, records(3), 1, 0)
        rows = [(r, r.a.clone(), r.stream.clone()) for e in edits for r in e.rows]

        def learned(share: float, seed: int) -> torch.Tensor:
            learner = Rehearsal(upper, mask, EditConfig(rewording=share, dropout=0.0, max_steps=5), seed)
            finish(learner, edits)
            return learner.result()

        one, again, other, plain = learned(1.0, 0), learned(1.0, 0), learned(1.0, 1), learned(0.0, 0)
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
        assert not torch.equal(one, plain)
        assert bool((one[~mask] == 0).all())
        assert bool((one[mask] != 0).any())
        assert all(torch.equal(r.a, a) and torch.equal(r.stream, stream) for r, a, stream in rows)


# -- scale -------------------------------------------------------------------------------------------------------------


def rescaled(model: Any, kind: str, times: float) -> Any:
    """The same function with `times` larger activations before the edited matrix, which is as much smaller."""
    if kind == "llama":
        mlp = model.model.layers[2].mlp
        larger, smaller = [mlp.up_proj.weight], mlp.down_proj.weight
    elif kind == "opt":
        layer = model.model.decoder.layers[2]
        larger, smaller = [layer.fc1.weight, layer.fc1.bias], layer.fc2.weight
    else:
        mlp = model.transformer.h[2].mlp
        larger, smaller = [mlp.c_fc.weight, mlp.c_fc.bias], mlp.c_proj.weight
    for p in larger:
        p.mul_(times)
    smaller.div_(times)
    return model


@pytest.mark.parametrize("times", [0.125, 10.0])
@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])  # gated; with biases; Conv1D
def test_learning_and_routing_do_not_see_the_scale_of_the_activations(
    kind: str, times: float, tiny_model: Callable[..., Any], tokenizer: Any
) -> None:
    config = EditConfig(contexts=1, max_steps=8, rank=16, shards=2, block=2, layer=2)
    stream = EditStream.of(records(4))
    prompts = [r.prompt for r in records()] + list(pool.ordinary_prompts()[:6])
    made = []
    for factor in (1.0, times):
        model = tiny_model(kind, fresh=True)
        if kind == "gpt2":
            model.transformer.h[2].mlp.act = torch.nn.ReLU()  # a GELU does see the scale
        editor = Editor(Base(rescaled(model, kind, factor), tokenizer, "tiny"), config)
        assert editor.site.path == SITES[kind]
        shards = editor.learn(stream)
        how = MergeConfig(values=torch.float32)
        sm = merge_shards(shards, editor.gate, editor.describe(stream), upper=editor.upper, how=how)
        rows = [editor.encoder.prompt(p) for p in prompts]
        reached = sm.keys.nearest(editor.upper.entries(rows))[0].sort().values
        half = {"key": float(reached[5:7].mean()), "activation": 0.0}
        calibrated = sm.memories[0].epsilon["key"]
        sm = dataclasses.replace(sm, memories=(dataclasses.replace(sm.memories[0], epsilon=half),))
        batch = editor.encoder.batch(rows, side="right")
        plain = model(**batch.inputs).logits
        routes = {}
        for router in ("activation", "key"):
            with attach(model, sm, router=router) as on:
                logits = model(**batch.inputs).logits
                routes[router] = on.explain(on.last)
        made.append((shards, sm, plain, logits, routes, calibrated))
    (shards, sm, plain, logits, routes, epsilon), other = made
    scaled, other_sm, other_plain, other_logits, other_routes, other_epsilon = other
    torch.testing.assert_close(other_plain, plain, rtol=1e-4, atol=1e-4)
    for one, two in zip(shards, scaled, strict=True):
        assert [(e["outcome"], e["steps"]) for e in two.edits] == [(e["outcome"], e["steps"]) for e in one.edits]
        delta = one.delta.dense()
        assert float(delta.abs().max()) > 1e-3
        torch.testing.assert_close(two.delta.dense() * times, delta, rtol=0, atol=2e-3 * float(delta.abs().max()))
        torch.testing.assert_close(two.keys, one.keys)
    torch.testing.assert_close(other_sm.keys.crowding, sm.keys.crowding)
    assert other_epsilon == pytest.approx(epsilon, rel=1e-3)
    assert {r.routed for r in routes["key"]} == {True, False}
    assert all(r.indicator > 1e-3 for r in routes["activation"])
    for router, of in routes.items():
        assert [(r.memory, r.edit) for r in other_routes[router]] == [(r.memory, r.edit) for r in of]
        assert [r.indicator for r in other_routes[router]] == pytest.approx([r.indicator for r in of], rel=1e-2)
    torch.testing.assert_close(other_logits, logits, rtol=0, atol=1e-2 * float(logits.abs().max()))


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


numbers = st.floats(0.0, 4.0)


@settings(max_examples=60, deadline=None)
@given(inside=st.lists(numbers, min_size=1, max_size=5), outside=numbers, unit=st.floats(0.5, 2.0))
def test_the_margins_are_those_of_the_paper(inside: list[float], outside: float, unit: float) -> None:
    margins = Margins.__new__(Margins)
    margins.alpha, margins.beta, margins.gamma, margins.unit = 0.5, 2.0, 1.0, unit
    d, o = [x / unit for x in inside], outside / unit

    def mean(hinges: list[float]) -> float:  # over those that violate it
        found = [h for h in hinges if h > 0]
        return sum(found) / len(found) if found else 0.0

    wanted = mean([1.0 + o - x for x in d]) + mean([o - 0.5]) + mean([2.0 - x for x in d])
    assert float(margins.loss(torch.tensor([*inside, outside]))) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("lr", [1.0, 0.37])
def test_a_published_step_is_plain_sgd_inside_the_mask(tiny_model: Any, encoder: PromptEncoder, lr: float) -> None:
    model = tiny_model("llama")
    upper = UpperModel(model, find_site(model), encoder)
    config = EditConfig(schedule="published", lr=lr, max_steps=1)
    mask = draw_mask((upper.site.d_out, upper.site.d_in), 0.3, 0)
    learner = Published(upper, mask, config, 0)
    (edit,) = capture_edits(upper, records(1), config.contexts, config.seed)
    start = 0.01 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    learner.delta.data.copy_(start)
    steps = learner.learning([edit])
    step = next(steps)
    assert isinstance(step, Step)
    take(upper, [step])
    assert learner.delta.grad is not None
    twin = start.clone().requires_grad_()
    twin.grad = learner.delta.grad * mask
    next(steps)
    torch.optim.SGD([twin], lr=lr).step()
    torch.testing.assert_close(learner.delta.detach(), twin.detach().clamp(-1, 1), atol=1e-7, rtol=1e-6)
    assert not learner.delta.detach()[mask == 0].any()
