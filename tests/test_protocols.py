"""Protocols that make edits: evaluating changes no learning, a kill no result; oracles for every score."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model, few_pool_prompts
from torch import Tensor
from transformers import GenerationMixin

from wisecli.data.records import SAME_RELATION, UNRELATED, EditRecord, Probe
from wisecli.data.stream import EditStream
from wisecli.editing.config import EditConfig
from wisecli.editing.conflicts import Conflicts
from wisecli.editing.editor import SUPERSEDED, Editor, OpenShard, slices
from wisecli.editing.merge import MergeConfig, merge_run, merge_shards
from wisecli.editing.run import EditRun
from wisecli.errors import InputError, UsageError
from wisecli.evaluation.answers import Forced, generate_answers
from wisecli.evaluation.asking import Asker, drain
from wisecli.evaluation.evaluate import EvalOptions, EvalReport, evaluate
from wisecli.evaluation.evidence import routing_evidence
from wisecli.evaluation.protocols import (
    BOTH,
    FRESH,
    RollbackEvaluation,
    StreamEvaluation,
    _Probe,
    attached_by,
    checkpoints_of,
    router_of,
)
from wisecli.evaluation.questions import EDIT, REPHRASE, Item, questions_of
from wisecli.evaluation.scores import plain, scores_of
from wisecli.evaluation.store import AnswerStore
from wisecli.evaluation.wilke import WilkeEvaluation, _checkpoint
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base
from wisecli.models.prompts import PromptEncoder
from wisecli.routing.attach import attach

COUNTRIES = ("France", "Spain", "Italy", "Norway", "Kenya", "Peru")
ISLANDS = ("Malta", "Cuba", "Fiji", "Samoa", "Java")
CONFIG = EditConfig(contexts=0, max_steps=2, rank=16, shards=2, block=1, mask_density=0.5)
SLOW = ("timings", "peak_memory")


@pytest.fixture(autouse=True)
def _small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    few_pool_prompts(monkeypatch, prompts=32)


@pytest.fixture(scope="module")
def base(tiny_model: Callable[..., Any], tokenizer: Any) -> Base:
    return Base(tiny_model("llama", seed=3), tokenizer, "tiny")


@pytest.fixture(scope="module")
def stream() -> EditStream:
    """Eleven edits of two relations, with hard negatives; the second is superseded by the eighth."""
    records = []
    for i, name in enumerate((*COUNTRIES, *ISLANDS)):
        asked = f"The capital of {name} is" if i < len(COUNTRIES) else f"Who would ever rule over {name}?"
        probes = (Probe("hello world"), Probe(f"{name} lies where", None, SAME_RELATION)) if i % 3 == 0 else ()
        rephrases = (f"when {asked}",) if i % 2 == 0 else ()
        records.append(EditRecord(f"e{i}", asked, f"w{i}", subject=name, rephrases=rephrases, locality=probes))
    records[7] = dataclasses.replace(records[1], id="e7", target="other")
    made = EditStream.of(records)
    assert made.superseded == {"e1"}
    return made


def short(stream: EditStream, n: int) -> EditStream:
    return EditStream.of(stream.records[:n])


def options(cache: Path | None = None, **changes: Any) -> EvalOptions:
    return EvalOptions(**{"ability": False, "open_gate": False, "cache": cache} | changes)


def finish(run: Any, close: bool = True) -> EvalReport:
    for _ in run:
        pass
    if close:
        run.close()
    return run.report


def timeless(report: EvalReport) -> dict[str, Any]:
    """All of a report that must be the same again; where the side memory lies is up to the test."""
    out = {k: v for k, v in report.to_json().items() if k not in SLOW}
    return out | {"side_memory": {**(out["side_memory"] or {}), "path": None}}


def learned(folder: Path) -> dict[str, bytes]:
    """What learning and merging wrote; the journal says when, and differs from run to run."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "journal.jsonl")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


# -- learning a stream, and asking while learning ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def untouched(base: Base, stream: EditStream, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """`untouched(config)`: the bytes of a run and a merge that nothing was asked in between."""
    made: dict[str, dict[str, bytes]] = {}

    def make(config: EditConfig) -> dict[str, bytes]:
        if str(config) not in made:
            folder = tmp_path_factory.mktemp("untouched")
            run = EditRun(base, stream, config, folder / "shards")
            for _ in run:
                pass
            merge_run(run.folder, base=base).save(folder / "sm.safetensors")
            made[str(config)] = learned(folder)
        return made[str(config)]

    return make


@pytest.mark.parametrize(
    ("protocol", "changes"),
    [
        (BOTH, {}),
        (FRESH, {"block": 2}),
        (FRESH, {"schedule": "published", "max_steps": 2}),
        ("end-of-stream", {}),
    ],
    ids=str,
)
def test_asking_does_not_change_what_is_learned(
    base: Base,
    stream: EditStream,
    untouched: Callable[..., dict],
    protocol: str,
    changes: dict[str, Any],
    tmp_path: Path,
) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    finish(StreamEvaluation(base, stream, config, tmp_path, protocol, options=options()))
    got, want = learned(tmp_path), untouched(config)
    assert sorted(got) == sorted(want)
    assert [name for name in want if got[name] != want[name]] == []


@pytest.fixture(scope="module")
def whole(base: Base, stream: EditStream, tmp_path_factory: pytest.TempPathFactory) -> tuple[EvalReport, Path]:
    """An uninterrupted run of "both" and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patched:
        few_pool_prompts(patched, prompts=32)
        return finish(StreamEvaluation(base, stream, CONFIG, folder, BOTH, options=options())), folder


def test_what_both_reports(whole: tuple[EvalReport, Path], base: Base, stream: EditStream) -> None:
    report, folder = whole
    s = report.sections
    assert s["protocol"]["name"] == BOTH
    sm = SideMemory.load(folder / "sm.safetensors")
    assert s["side_memory"]["digest"] == sm.digest
    assert s["side_memory"]["path"] == str(folder / "sm.safetensors")
    direct = evaluate(base, stream, sm, options=options())
    assert direct.items == report.items
    assert direct.scores == report.scores
    assert s["seeds"]["edit"] == 0
    assert (report.edits, report.superseded) == (11, 1)


def test_fresh_scores_cover_every_live_edit_once(whole: tuple[EvalReport, Path], stream: EditStream) -> None:
    fresh = whole[0].sections["fresh"]
    got = [(i["edit"], i["kind"], i["prompt"]) for i in fresh["items"]]
    want = [(q.edit, q.kind, q.prompt) for q in questions_of(stream)]
    assert sorted(got) == sorted(want)
    assert len(set(got)) == len(got)
    assert fresh["scores"]["rel"]["exact"]["n"] == len(stream) - 1
    assert fresh["scores"] == scores_of([Item.from_json(i) for i in fresh["items"]])


def test_the_curve_ends_with_the_scores_at_the_end(whole: tuple[EvalReport, Path]) -> None:
    report, _ = whole
    curve = report.sections["retention"]
    assert [p["edits"] for p in curve] == [1, 10, 11]
    assert report.sections["protocol"]["checkpoints"] == [1, 10]
    assert curve[-1]["scores"] == {name: m["exact"]["after"] for name, m in report.scores.items()}


def test_fresh_items_and_the_curve_are_those_of_the_shards_as_they_were(
    whole: tuple[EvalReport, Path], base: Base, stream: EditStream
) -> None:
    """Learned again by hand, block by block."""
    report, _ = whole
    editor = Editor(base, CONFIG)
    run, asker = editor.describe(stream), Asker(base, questions_of(stream))
    superseded = editor.settle(stream).superseded
    drain(asker.before())
    want: list[Item] = []
    curve = []
    shards: list[Any] = []
    for index, records in enumerate(slices(stream.records, 2)):
        shard = editor.open(index, stream)
        start = sum(len(s) for s in slices(stream.records, 2)[:index])
        seen = 0
        for arrived in shard.learn(records, superseded):
            new = [e.record.id for e in shard.captured[seen:]]
            seen = len(shard.captured)
            memory = merge_shards([shard.shard()], editor.gate, run, how=MergeConfig(rehearse=False))
            with attach(base.model, memory) as on:
                want += drain(asker.after(on, [i for i, q in enumerate(asker.questions) if q.edit in new]))
            if start + arrived in (1, 10):
                memory = merge_shards([*shards, shard.shard()], editor.gate, run, upper=editor.upper)
                ids = {r.id for r in stream.records[: start + arrived]}
                with attach(base.model, memory) as on:
                    items = drain(asker.after(on, [i for i, q in enumerate(asker.questions) if q.edit in ids]))
                curve.append({"edits": start + arrived, "scores": plain(items)})
        shards.append(shard.shard())
    assert [i.to_json() for i in want] == report.sections["fresh"]["items"]
    assert curve == report.sections["retention"][:-1]


def test_fresh_alone_reports_fresh_items(
    whole: tuple[EvalReport, Path], base: Base, stream: EditStream, tmp_path: Path
) -> None:
    report = finish(StreamEvaluation(base, stream, CONFIG, tmp_path, FRESH, options=options()))
    assert [i.to_json() for i in report.items] == whole[0].sections["fresh"]["items"]
    assert report.scores == whole[0].sections["fresh"]["scores"]
    assert (report.sections["retention"], report.sections["fresh"]) == (None, None)


class Killed(Exception):
    """Stands for a kill."""


def _puts(monkeypatch: pytest.MonkeyPatch, last: int | None, after: bool = False) -> list[str]:
    """Count what is put into the cache; the `last`-th raises, before it is written or after."""
    seen: list[str] = []

    def put(store: AnswerStore, key: str, value: Any) -> None:
        seen.append(key)
        dies = len(seen) == last
        if dies and not after:
            raise Killed
        old(store, key, value)
        if dies:
            raise Killed

    old = AnswerStore.put
    monkeypatch.setattr(AnswerStore, "put", put)
    return seen


@pytest.mark.parametrize(("moment", "after"), [(0.1, True), (0.5, True), (0.6, False), (0.75, True), (0.9, False)])
def test_a_kill_changes_nothing(
    whole: tuple[EvalReport, Path],
    base: Base,
    stream: EditStream,
    puts: int,
    moment: float,
    after: bool,
    tmp_path: Path,
) -> None:
    def run() -> StreamEvaluation:
        return StreamEvaluation(base, stream, CONFIG, tmp_path / "out", BOTH, options=options(tmp_path / "cache"))

    with pytest.MonkeyPatch.context() as patched:
        _puts(patched, max(1, round(moment * puts)), after)
        with pytest.raises(Killed):
            finish(run())
    assert timeless(finish(run())) == timeless(whole[0])
    assert learned(tmp_path / "out") == learned(whole[1])
    assert len(list((tmp_path / "cache" / "answers").iterdir())) == 1


@pytest.fixture(scope="module")
def puts(base: Base, stream: EditStream, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How often an uninterrupted run puts something into the cache."""
    folder = tmp_path_factory.mktemp("puts")
    with pytest.MonkeyPatch.context() as patched:
        few_pool_prompts(patched, prompts=32)
        seen = _puts(patched, None)
        finish(StreamEvaluation(base, stream, CONFIG, folder / "out", BOTH, options=options(folder / "cache")))
    return len(seen)


def test_left_between_two_steps_it_goes_on(
    whole: tuple[EvalReport, Path], base: Base, stream: EditStream, tmp_path: Path
) -> None:
    """Stopped again and again, each time a little later."""
    for stop in (3, 40, 80, 120, None):
        run = StreamEvaluation(base, stream, CONFIG, tmp_path / "out", BOTH, options=options(tmp_path / "cache"))
        for k, _ in enumerate(run):
            if k == stop:
                break
    assert run.report is not None
    assert timeless(run.report) == timeless(whole[0])


def test_finished_shards_without_their_answers_are_left_alone(base: Base, stream: EditStream, tmp_path: Path) -> None:
    """No cache, another protocol, router or merge than before, or an evaluation that was closed: nothing to go on."""
    some = EditStream.of([dataclasses.replace(r, locality=()) for r in stream.records[:4]])
    out, cache = tmp_path / "out", tmp_path / "cache"

    def run(protocol: str = BOTH, how: MergeConfig | None = None, **changes: Any) -> StreamEvaluation:
        given = options(**({"cache": cache} | changes))
        return StreamEvaluation(base, some, CONFIG, out, protocol, how, given)

    want = finish(run(), close=False)
    kept = learned(out / "shards")
    assert {"shard-00000.safetensors", "shard-00001.safetensors"} <= set(kept)
    other = MergeConfig(method="linear", rehearse=False)
    for changed in (run(cache=None), run(FRESH), run(router="activation"), run(how=other)):
        with pytest.raises(InputError, match="shard-00000") as refused:
            finish(changed, close=False)
        assert "Choose another folder" in str(refused.value.hint)
        assert learned(out / "shards") == kept
    again = finish(run())
    assert timeless(again) == timeless(want)
    with pytest.raises(InputError, match="shard-00000"):
        finish(run())
    assert learned(out / "shards") == kept


def test_one_finished_shard_without_its_answers_is_left_alone(base: Base, stream: EditStream, tmp_path: Path) -> None:
    """Stopped without a cache while the second shard was learned; asking at the end alone goes on."""
    some = short(stream, 4)
    run = StreamEvaluation(base, some, CONFIG, tmp_path, FRESH, options=options())
    for _ in run:
        if (tmp_path / "shards" / "shard-00000.safetensors").exists():
            break
    kept = learned(tmp_path / "shards")
    assert "shard-00001.safetensors" not in kept
    with pytest.raises(InputError, match="shard-00000"):
        finish(StreamEvaluation(base, some, CONFIG, tmp_path, FRESH, options=options()))
    assert learned(tmp_path / "shards") == kept
    report = finish(StreamEvaluation(base, some, CONFIG, tmp_path, "end-of-stream", options=options()))
    assert report.scores["rel"]["exact"]["n"] == len(some)
    name = "shard-00000.safetensors"
    assert learned(tmp_path / "shards")[name] == kept[name]


# -- one router per evaluation that learns -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "asked", "router"),
    [
        ("rehearsal", None, "key"),
        ("published", None, "activation"),
        ("rehearsal", "activation", "activation"),
        ("published", "key", "key"),
    ],
)
def test_the_router_is_what_was_asked_for_or_goes_with_the_schedule(
    schedule: Any, asked: str | None, router: str
) -> None:
    assert router_of(dataclasses.replace(CONFIG, schedule=schedule), options(router=asked)) == router


def test_a_memory_without_a_threshold_for_the_router_stays_shut(
    base: Base, make_side_memory: Callable[..., SideMemory], random_delta: Callable[..., Tensor]
) -> None:
    """It neither falls back to the other router nor keeps memories from answering that have one."""
    prompts = ["hello world", "who is where"]
    shape = make_side_memory(base.model, prompts).site
    deltas = [random_delta((shape.d_out, shape.d_in), seed=s) for s in (1, 2)]
    epsilon = [{"key": -2.0}, {"key": -2.0, "activation": -1.0}]
    sm = make_side_memory(base.model, prompts, deltas=deltas, memory_of=[0, 1], epsilon=epsilon)
    with pytest.raises(UsageError):
        attach(base.model, sm, router="activation")
    encoder = PromptEncoder(base.tokenizer)
    for router, opened in (("activation", {1}), ("key", {0, 1})):
        with attached_by(base, sm, router) as on:
            assert on.router.name == router
            assert on.side_memory.digest == sm.digest
            routes = on.decide(encoder.batch([encoder.prompt(p) for p in prompts]))
        assert {r.memory for r in routes} == opened
    assert [set(m.epsilon) for m in sm.memories] == [{"key"}, {"key", "activation"}]


SOME = dataclasses.replace(CONFIG, mask_density=1.0, contexts=0)
NOTHING = dataclasses.replace(CONFIG, schedule="published", max_steps=1, lr=1e-9)
"""The published schedule with steps too small for any edit to take: there is nothing to calibrate its router on."""


def _protocol_runs(base: Base, stream: EditStream, config: EditConfig, out: Path) -> dict[str, Callable[..., Any]]:
    return {
        "rollback": lambda given: RollbackEvaluation(base, stream, config, [1], options=given),
        "fresh": lambda given: StreamEvaluation(base, stream, config, out / str(given.router), FRESH, options=given),
        "both": lambda given: StreamEvaluation(base, stream, config, out / str(given.router), BOTH, options=given),
        "wilke": lambda given: WilkeEvaluation(base, stream, config, given),
    }


@pytest.mark.parametrize("protocol", ["rollback", "both", "wilke"])
def test_where_no_edit_took_the_gate_stays_shut(sure: Base, known: EditStream, protocol: str, tmp_path: Path) -> None:
    """The published schedule after one step, at T=1, has no threshold; the key router does not step in."""
    some = EditStream.of([r for r in known.records if r.id in ("e2", "e4")])
    run = _protocol_runs(sure, some, NOTHING, tmp_path)[protocol]
    report = finish(run(options(tmp_path / "cache")), close=False)
    s = report.sections
    assert "activation router" in s["method"]
    assert s["routing"]["router"] == "activation"
    assert s["routing"]["epsilon"] == [None]
    assert {i.route.edit for i in report.items if i.route is not None} == {None}  # the key router would name one
    assert not any(i.route is None or i.route.routed for i in report.items)
    assert all(i.before == i.after and i.nll and i.nll[0] == i.nll[1] for i in report.items)
    if protocol != "both":
        assert s["protocol"]["router"] == "activation"
        again = finish(run(options(tmp_path / "cache")))  # read from the cache, which knows no infinity
        assert timeless(again) == timeless(report)


@pytest.mark.parametrize("protocol", ["rollback", "fresh", "both", "wilke"])
def test_what_was_kept_under_another_router_is_not_taken_up(
    sure: Base, known: EditStream, protocol: str, tmp_path: Path
) -> None:
    """The first evaluation leaves all it asked in the cache, as if it had been killed at its very end."""
    some = EditStream.of([r for r in known.records if r.id in ("e2", "e4", "e5")])
    kept = _protocol_runs(sure, some, SOME, tmp_path / "kept")[protocol]
    alone = _protocol_runs(sure, some, SOME, tmp_path / "alone")[protocol]
    cache = tmp_path / "cache"
    by_key = finish(kept(options(cache, router="key")), close=False)
    by_activation = finish(kept(options(cache, router="activation")), close=False)
    assert timeless(by_activation) == timeless(finish(alone(options(router="activation"))))
    seen = [i.to_json() for i in by_key.items], [i.to_json() for i in by_activation.items]
    assert seen[0] != seen[1]
    assert by_key.routing is not None
    assert by_activation.routing is not None
    assert (by_key.routing["router"], by_activation.routing["router"]) == ("key", "activation")


@pytest.mark.parametrize("router", ["key", "activation"])
@pytest.mark.parametrize("protocol", ["rollback", "wilke"])
def test_routing_evidence_is_that_of_the_items(
    sure: Base, known: EditStream, protocol: str, router: str, tmp_path: Path
) -> None:
    some = EditStream.of([r for r in known.records if r.id in ("e2", "e4", "e5", "e6")])
    report = finish(_protocol_runs(sure, some, WILKE, tmp_path)[protocol](options(router=router)))
    routes = [i.route for i in report.items if i.route is not None]
    assert len(routes) == len(report.items)
    gates = sorted({round(r.epsilon, 6) for r in routes})
    assert report.routing == routing_evidence(report.items, router, gates)
    assert report.routing["epsilon"] == gates
    if router == "activation":
        assert len(gates) > 1  # a threshold per memory that was made
    assert report.sections["protocol"]["router"] == router
    assert report.sections["method"].endswith(f"{router} router")


def test_checkpoints_are_powers_of_ten() -> None:
    assert [checkpoints_of(n) for n in (1, 2, 10, 11, 100, 1001)] == [
        *([], [1], [1], [1, 10], [1, 10], [1, 10, 100, 1000]),
    ]


@pytest.mark.parametrize("protocol", ["end-of-stream", BOTH, "rollback"])
def test_an_edit_that_the_gate_finds_superseded_is_not_asked(
    base: Base, stream: EditStream, protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(editor: Editor, records: Sequence[EditRecord]) -> Conflicts:
        return Conflicts({"e2": "e3"} if {"e2", "e3"} <= {r.id for r in records} else {})

    monkeypatch.setattr(Editor, "conflicts", found)
    some = short(stream, 4)
    if protocol == "rollback":
        report = finish(RollbackEvaluation(base, some, CONFIG, [1, 4], options=options()))
        (single, _) = report.sections["rollbacks"]
        assert single["scores"]["rel"]["exact"]["n"] == 4  # alone, the edit is learned
    else:
        report = finish(StreamEvaluation(base, some, CONFIG, tmp_path, protocol, options=options()))
        assert report.superseded == 1
    asked = report.items
    if protocol == BOTH:
        asked += tuple(Item.from_json(i) for i in report.sections["fresh"]["items"])
        assert all(point["scores"]["rel"] is not None for point in report.sections["retention"])
    assert {i.question.edit for i in asked} == {"e0", "e1", "e3"}


# -- rollbacks ---------------------------------------------------------------------------------------------------------


def weights(base: Base) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in base.model.state_dict().items()}


def _alone(base: Base, records: Sequence[EditRecord]) -> tuple[Item, ...]:
    """Learn records by themselves with an editor of their own, and ask them."""
    stream = EditStream.of(records)
    editor = Editor(base, dataclasses.replace(CONFIG, shards=min(CONFIG.shards, len(records))))
    sm = merge_shards(editor.learn(stream), editor.gate, editor.describe(stream), upper=editor.upper)
    return evaluate(base, stream, sm, options=options()).items


@pytest.mark.parametrize("t", [1, 2, 3])
def test_each_sequence_is_learned_from_the_base(base: Base, stream: EditStream, t: int) -> None:
    some = EditStream.of([*stream.records[:4], dataclasses.replace(stream.records[2], id="again", target="w9")])
    before = weights(base)
    report = finish(RollbackEvaluation(base, some, CONFIG, [t], options=options()))
    assert all(torch.equal(v, before[k]) for k, v in base.model.state_dict().items())
    (section,) = report.sections["rollbacks"]
    groups = len(some) // t
    assert (section["t"], section["groups"], section["identical"]) == (t, groups, True)
    assert section["left_out"] == len(some) % t
    want = [i for g in range(groups) for i in _alone(base, some.records[g * t : (g + 1) * t])]
    assert len(report.items) == len(want)
    for got, item in zip(report.items, want, strict=True):
        assert (got.question, got.before, got.after, got.exact) == (
            *(item.question, item.before, item.after, item.exact),
        )
        assert (got.token, got.match) == (item.token, item.match)
        assert got.nll == pytest.approx(item.nll, abs=1e-4)
        assert got.route is not None
        assert item.route is not None
        assert (got.route.memory, got.route.edit) == (item.route.memory, item.route.edit)
    assert section["scores"] == scores_of(report.items)
    asked = {i.question.edit for i in report.items}
    assert asked == {r.id for r in some.records[: groups * t]}  # the superseded one is in another sequence


def test_several_sizes_are_those_of_each_alone(base: Base, stream: EditStream) -> None:
    some = short(stream, 3)
    together = finish(RollbackEvaluation(base, some, CONFIG, [3, 1, 2, 2], options=options()))
    assert [r["t"] for r in together.sections["rollbacks"]] == [1, 2, 3]
    assert together.sections["protocol"]["t"] == [1, 2, 3]
    for found in together.sections["rollbacks"]:
        alone = finish(RollbackEvaluation(base, some, CONFIG, [found["t"]], options=options()))
        assert alone.sections["rollbacks"] == [found]
    assert together.scores == together.sections["rollbacks"][-1]["scores"]
    assert together.sections["side_memory"] is None


def test_a_change_of_the_base_would_be_seen(base: Base, stream: EditStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """`identical` is no constant."""
    weight = Editor(base, CONFIG).site.weight(base.model)
    kept = weight.clone()
    old = Editor.learn

    def learn(editor: Editor, stream: EditStream) -> Any:
        shards = old(editor, stream)
        weight[0, 0] += 1e-3
        return shards

    monkeypatch.setattr(Editor, "learn", learn)
    monkeypatch.setattr("wisecli.routing.attach.matches", lambda *_: True)
    try:
        report = finish(RollbackEvaluation(base, short(stream, 2), CONFIG, [2], options=options()))
    finally:
        weight.copy_(kept)
    assert report.sections["rollbacks"][0]["identical"] is False


def test_a_change_that_the_probe_s_logits_do_not_show_is_seen_in_the_weights(
    base: Base, stream: EditStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vector of a token that the probe does not hold."""
    vectors = base.model.get_input_embeddings().weight
    used = {31 * k % len(vectors) for k in range(16)}
    unused = next(i for i in range(len(vectors)) if i not in used)
    kept = vectors[unused].clone()
    probe = _Probe.of(base)
    old = Editor.learn

    def learn(editor: Editor, stream: EditStream) -> Any:
        shards = old(editor, stream)
        vectors[unused, 0] += 1e-3
        return shards

    monkeypatch.setattr(Editor, "learn", learn)
    run = RollbackEvaluation(base, short(stream, 3), CONFIG, [1, 3], options=options())
    try:
        report = finish(run)
        assert probe.same(base)
        assert not probe.same_weights(base)
    finally:
        vectors[unused] = kept
    assert [r["identical"] for r in report.sections["rollbacks"]] == [False, False]
    assert probe.same_weights(base)


def test_a_sequence_asks_what_its_own_edits_leave_to_ask(base: Base, stream: EditStream) -> None:
    """A probe that another edit of the sequence changes is left out there, and asked where the two are apart."""
    first, second = (stream.records[i] for i in (2, 3))
    first = dataclasses.replace(first, rephrases=(), locality=(Probe(second.prompt), Probe("hello world")))
    some = EditStream.of([first, dataclasses.replace(second, rephrases=(), locality=())])
    for t, asked in ((1, [second.prompt, "hello world"]), (2, ["hello world"])):
        report = finish(RollbackEvaluation(base, some, CONFIG, [t], options=options()))
        assert [i.question.prompt for i in report.items if i.question.kind == UNRELATED] == asked


@pytest.mark.parametrize("sizes", [[0], [-1], [1, 6], []])
def test_sizes_that_no_sequence_can_have(base: Base, stream: EditStream, sizes: list[int]) -> None:
    with pytest.raises(UsageError):
        RollbackEvaluation(base, short(stream, 5), CONFIG, sizes, options=options())


def test_rollbacks_go_on_after_a_kill(base: Base, stream: EditStream, tmp_path: Path) -> None:
    some = short(stream, 3)
    want = finish(RollbackEvaluation(base, some, CONFIG, [1, 2], options=options()))
    for last in (3, 3, 2):
        with pytest.MonkeyPatch.context() as patched:
            _puts(patched, last)
            with pytest.raises(Killed):
                finish(RollbackEvaluation(base, some, CONFIG, [1, 2], options=options(tmp_path)))
    assert timeless(finish(RollbackEvaluation(base, some, CONFIG, [1, 2], options=options(tmp_path)))) == timeless(want)


# -- WilKE -------------------------------------------------------------------------------------------------------------

WILKE = dataclasses.replace(CONFIG, max_steps=15, mask_density=1.0, contexts=0)


@pytest.fixture(scope="module")
def sure(tokenizer: Any) -> Base:
    """A base that says nothing but words, and then stops: what it says is read again as the same tokens."""
    model = build_model("llama", len(tokenizer), seed=3)
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    words = [i for i, piece in enumerate(pieces) if piece.startswith("Ġ") and len(piece) > 3]
    kept = torch.zeros(len(tokenizer), 1)
    kept[[*words, tokenizer.eos_token_id]] = 1
    model.lm_head.weight.mul_(kept)
    return Base(model, tokenizer, "sure")


@pytest.fixture(scope="module")
def known(stream: EditStream) -> EditStream:
    """Ten records: the base says nothing to two of them, and one has a true answer that it does not give."""
    live = [r for r in stream.records if r.id not in stream.superseded]
    live[2] = dataclasses.replace(live[2], truth="surely not")
    near = (
        Probe("where is the world", None, SAME_RELATION),
        Probe("Paris is in", "surely no place", SAME_RELATION),
        Probe("hello", "world"),
    )
    records = []
    for i, r in enumerate(live):
        target = ("world", "who", "what")[i % 3]
        records.append(dataclasses.replace(r, target=target, rephrases=(f"so {r.prompt}",), locality=near))
    return EditStream.of(records)


@pytest.fixture(scope="module")
def wilke(sure: Base, known: EditStream) -> EvalReport:
    with pytest.MonkeyPatch.context() as patched:
        few_pool_prompts(patched, prompts=32)
        return finish(WilkeEvaluation(sure, known, WILKE, options()))


def _forced(base: Base, encoder: PromptEncoder, prompt: str, text: str, sm: SideMemory | None) -> bool:
    """Whether every token of a text is the argmax: one row, no padding, routed on the prompt alone."""
    row = encoder.pair(prompt, text, eos=False)
    ids = torch.tensor([row.ids])
    with torch.no_grad():
        if sm is None:
            logits = base.model(input_ids=ids, use_cache=False).logits
        else:
            with attach(base.model, sm) as on:
                memory = on.decide(encoder.batch([encoder.prompt(prompt)]))[0].memory
                with on.override([memory]):
                    logits = base.model(input_ids=ids, use_cache=False).logits
    guessed = logits[0, len(row.prompt) - 1 : -1].argmax(-1).tolist()
    return guessed == list(row.target)


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def test_wilke_s_scores_are_those_of_its_items(wilke: EvalReport) -> None:
    section = wilke.sections["wilke"]
    match: dict[str, list[bool]] = {}
    exact: dict[str, list[bool]] = {}
    for item in wilke.items:
        judged = item.match if item.answered is None else item.answered
        assert judged is not None
        match.setdefault(item.question.kind, []).append(judged[1])
        exact.setdefault(item.question.kind, []).append(item.exact[1])
    names = {"es": EDIT, "gs": REPHRASE, "ls": SAME_RELATION}
    for name, kind in names.items():
        assert section[name] == _share(match[kind])
        assert section["exact"][name] == _share(exact[kind])
    assert UNRELATED in match  # asked, but not in LS where there are near prompts
    assert (section["edited"], section["known"], section["left_out"]) == (3, 7, 3)
    assert section["checkpoints"] == wilke.sections["protocol"]["checkpoints"] == [1, 2, 3]
    for ers, ors, s in zip(section["ers"], section["ors"], section["s"], strict=True):
        parts = [max(v, 1e-4) for v in (section["es"], section["gs"], section["ls"], ers, ors)]
        assert s == pytest.approx(5 / sum(1 / v for v in parts))


def test_locality_is_of_the_dataset_s_answer_where_there_is_one(wilke: EvalReport) -> None:
    """A probe whose answer is not given counts as 0, although the edited model says what the base says."""
    near = [i for i in wilke.items if i.question.kind == SAME_RELATION]
    answered = [i for i in near if i.question.answer is not None]
    free = [i for i in near if i.question.answer is None]
    assert len(answered) == len(free) == 3
    assert all(i.answered == (False, False) for i in answered)
    assert any(i.match and i.match[1] and i.exact[1] for i in answered)
    assert all(i.answered is None for i in free)
    section = wilke.sections["wilke"]
    assert section["ls"] == sum(bool(i.match and i.match[1]) for i in free) / 6
    assert section["ls"] <= 0.5 < section["exact"]["ls"]


def test_wilke_s_s_is_of_five_scores_or_of_none(sure: Base, known: EditStream) -> None:
    two = [r for r in known.records if r.id in ("e2", "e4")]
    for lacking, names in (({"rephrases": ()}, {"gs"}), ({"locality": ()}, {"ls"})):
        some = EditStream.of([dataclasses.replace(r, **lacking) for r in two])
        section = finish(WilkeEvaluation(sure, some, WILKE, options())).sections["wilke"]
        assert {name for name in ("es", "gs", "ls") if section[name] is None} == names
        assert (section["s"], len(section["ers"]), section["known"], section["left_out"]) == ([None], 1, 2, 0)


def _own_answers(base: Base, encoder: PromptEncoder, stream: EditStream) -> dict[str, str]:
    """What the base says by itself, of at most 47 tokens, where it says it again when led along it."""
    said = dict(generate_answers(base, encoder, [r.prompt for r in stream.records], [48] * len(stream)))
    ended = {r.id: said[i].text for i, r in enumerate(stream.records) if 0 < len(said[i].ids) < 48}
    own = {r.id: r.prompt for r in stream.records if r.truth is None}
    return {k: text for k, text in ended.items() if k in own and _forced(base, encoder, own[k], text, None)}


def test_wilke_by_hand(sure: Base, known: EditStream, wilke: EvalReport) -> None:
    """The same edits made and taken back here, and every match worked out from one row's own forward."""
    base = sure
    editor = Editor(base, dataclasses.replace(WILKE, shards=1, block=1))
    encoder = editor.encoder
    said = _own_answers(base, encoder, known)
    records = [r for r in known.records if r.id in said]
    assert len({len(encoder.pair("x", text).target) for text in said.values()}) > 3
    edited, rest = records[:3], records[3:]
    shard = editor.open(0, known)
    ers, ors, es, gs = [], [], [], []

    def memory() -> SideMemory:
        how = MergeConfig(rehearse=False)
        return merge_shards([shard.shard()], editor.gate, editor.describe(known), how=how)

    for i, record in enumerate(edited):
        shard.arrive(record)
        sm = memory()
        es.append(_forced(base, encoder, record.prompt, record.target, sm))
        gs += [_forced(base, encoder, p, record.target, sm) for p in record.rephrases]
        shard.arrive(dataclasses.replace(record, id=f"{record.id}~back", target=said[record.id]))
        sm = memory()
        ers.append(_share([_forced(base, encoder, r.prompt, said[r.id], sm) for r in edited[: i + 1]]))
        ors.append(_share([_forced(base, encoder, r.prompt, said[r.id], sm) for r in rest]))
        outcomes = {e["id"]: e["outcome"] for e in shard.shard().edits}
        assert all(outcomes[r.id] == SUPERSEDED for r in edited[: i + 1])
        assert all(outcomes[f"{r.id}~back"] != SUPERSEDED for r in edited[: i + 1])
        owners = {sm.edits[k].id for k in sm.keys.owner.tolist()}
        assert owners == {f"{r.id}~back" for r in edited[: i + 1]}
    section = wilke.sections["wilke"]
    assert (section["es"], section["gs"]) == (_share(es), _share(gs))
    assert (section["ers"], section["ors"]) == (ers, ors)
    assert section["es"] > 0  # the edits do take


def test_a_true_answer_that_the_base_gives_is_the_original(sure: Base, known: EditStream) -> None:
    encoder = PromptEncoder(sure.tokenizer)
    own = _own_answers(sure, encoder, known)
    records = []
    for i, record in enumerate(r for r in known.records if r.id in own):
        first = own[record.id].split()[0]  # a part of what it says: it goes on, but gives these tokens
        truth = first if i % 2 == 0 and first != record.target else "surely not"
        records.append(dataclasses.replace(record, truth=truth))
    run = WilkeEvaluation(sure, EditStream.of(records), WILKE, options())
    drain(run.asker.before())
    want = {r.id: r.truth for r in records if r.truth != "surely not"}
    assert len(want) > 1
    assert [r.id for r in run._known()] == list(want)
    assert run.original == want


def test_the_base_s_own_answer_is_one_that_ends_and_is_given_again(
    sure: Base, known: EditStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = _own_answers(sure, PromptEncoder(sure.tokenizer), known)
    run = WilkeEvaluation(sure, known, WILKE, options())
    drain(run.asker.before())
    assert [r.id for r in run._known()] == list(own)
    assert run.original == own
    longest = max(own, key=lambda k: len(own[k]))
    cap = len(run.asker.encoder.pair("x", own[longest], eos=False).target)
    monkeypatch.setattr("wisecli.evaluation.wilke._LONGEST", cap)  # it would end with the next token
    assert [r.id for r in run._known()] == [k for k in own if k != longest]
    monkeypatch.setattr("wisecli.evaluation.wilke._LONGEST", cap + 1)
    assert longest in {r.id for r in run._known()}
    with monkeypatch.context() as patched:
        patched.setattr(
            "wisecli.evaluation.wilke.force",
            lambda _base, _encoder, rows: [Forced((-1,) * len(r.target), (0.0,) * len(r.target)) for r in rows],
        )
        assert run._known() == []
    ending = sure.model.lm_head.weight[sure.tokenizer.eos_token_id]
    kept = ending.clone()
    try:
        ending.zero_()  # no answer ends
        assert run._known() == []
    finally:
        ending.copy_(kept)


def test_an_original_answer_that_is_wanted_anyway_is_no_edit(sure: Base, known: EditStream) -> None:
    own = _own_answers(sure, PromptEncoder(sure.tokenizer), known)
    first, second = list(own)[:2]
    changed = {first: f" {own[first]}.", second: f"{own[second]} so"}
    records = [dataclasses.replace(r, target=changed.get(r.id, r.target)) for r in known.records if r.id in own]
    run = WilkeEvaluation(sure, EditStream.of(records), WILKE, options())
    drain(run.asker.before())
    assert [r.id for r in run._known()] == [k for k in own if k != first]


def test_wilke_stays_within_the_base_s_context(sure: Base, known: EditStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer may run beyond it, neither the base's own nor the original ones at checkpoints."""
    encoder = PromptEncoder(sure.tokenizer)
    few = EditStream.of([r for r in known.records if r.id in ("e4", "e6", "e9")])
    limit = max(len(encoder.prompt(f"so {r.prompt}")) for r in few.records) + 4
    monkeypatch.setattr(sure.model.config, "max_position_embeddings", limit)
    reached = []
    old = GenerationMixin.generate

    def note(model: Any, *args: Any, **kwargs: Any) -> Any:
        reached.append(kwargs["input_ids"].shape[1] + kwargs["max_new_tokens"])
        return old(model, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", note)
    run = WilkeEvaluation(sure, few, WILKE, options())
    drain(run.asker.before())
    run._known()
    assert max(reached) == limit
    ended = run.original
    assert ended
    shard = OpenShard(run.editor, 0, set())
    shard.arrive(few.records[0])
    reached.clear()
    run.original = {r.id: "world who what" for r in few.records}
    limit = max(len(encoder.prompt(r.prompt)) for r in few.records) + 4
    monkeypatch.setattr(sure.model.config, "max_position_embeddings", limit)
    run._left(shard, few.records[:1], few.records[1:], None)
    assert max(reached) == limit


def test_checkpoints_of_wilke() -> None:
    got = [n for n in range(1, 121) if _checkpoint(n, 120)]
    assert got == [1, 2, 4, 8, 16, 32, 50, 64, 100, 120]


def test_wilke_goes_on_after_a_kill(sure: Base, known: EditStream, wilke: EvalReport, tmp_path: Path) -> None:
    for last in (3, 2, 2, 2):
        with pytest.MonkeyPatch.context() as patched:
            _puts(patched, last)
            with pytest.raises(Killed):
                finish(WilkeEvaluation(sure, known, WILKE, options(tmp_path)))
    assert timeless(finish(WilkeEvaluation(sure, known, WILKE, options(tmp_path)))) == timeless(wilke)


def test_wilke_needs_two_records_the_base_knows(sure: Base, known: EditStream) -> None:
    unknown = EditStream.of([dataclasses.replace(r, truth="surely not") for r in known.records[:3]])
    with pytest.raises(InputError, match="0 of 3"):
        finish(WilkeEvaluation(sure, unknown, WILKE, options()))


def test_wilke_leaves_the_base_as_it_was(sure: Base, known: EditStream) -> None:
    before = weights(sure)
    finish(WilkeEvaluation(sure, known, WILKE, options()))
    assert all(torch.equal(v, before[k]) for k, v in sure.model.state_dict().items())
    assert "generate" not in sure.model.__dict__
