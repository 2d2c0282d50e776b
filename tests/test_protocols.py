"""Protocols that make edits: evaluating changes no learning, a kill no result; oracles for every score."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wisecli.data.pool import ordinary_prompts
from wisecli.data.records import SAME_RELATION, UNRELATED, EditRecord, Probe
from wisecli.data.stream import EditStream
from wisecli.editing.config import EditConfig
from wisecli.editing.editor import SUPERSEDED, Editor, slices
from wisecli.editing.merge import MergeConfig, merge_run, merge_shards
from wisecli.editing.run import EditRun
from wisecli.errors import InputError, UsageError
from wisecli.evaluation.asking import Asker, drain
from wisecli.evaluation.evaluate import EvalOptions, EvalReport, evaluate
from wisecli.evaluation.protocols import BOTH, FRESH, RollbackEvaluation, StreamEvaluation, checkpoints_of
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
CONFIG = EditConfig(contexts=1, max_steps=4, rank=16, shards=2, block=1, mask_density=0.5)
SLOW = ("timings", "peak_memory")


@pytest.fixture(autouse=True)
def _small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty ordinary prompts are enough to whiten a tiny model, and ten times as quick."""
    for module in ("editor", "merge", "published"):
        monkeypatch.setattr(f"wisecli.editing.{module}.ordinary_prompts", lambda: ordinary_prompts()[:64])


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


def finish(run: Any) -> EvalReport:
    for _ in run:
        pass
    return run.report


def timeless(report: EvalReport) -> dict[str, Any]:
    """All of a report that must be the same again; where the side memory lies is up to the test."""
    out = {k: v for k, v in report.to_json().items() if k not in SLOW}
    return out | {"side_memory": {**(out["side_memory"] or {}), "path": None}}


def learned(folder: Path) -> dict[str, bytes]:
    """What learning and merging wrote."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


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
        for module in ("editor", "merge"):
            patched.setattr(f"wisecli.editing.{module}.ordinary_prompts", lambda: ordinary_prompts()[:64])
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
    drain(asker.before())
    want: list[Item] = []
    curve = []
    shards: list[Any] = []
    for index, records in enumerate(slices(stream.records, 2)):
        shard = editor.open(index, stream)
        start = sum(len(s) for s in slices(stream.records, 2)[:index])
        seen = 0
        for arrived in shard.learn(records, stream.superseded):
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
        for module in ("editor", "merge"):
            patched.setattr(f"wisecli.editing.{module}.ordinary_prompts", lambda: ordinary_prompts()[:64])
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


def test_without_a_cache_shards_that_were_not_asked_are_learned_again(
    whole: tuple[EvalReport, Path], base: Base, stream: EditStream, tmp_path: Path
) -> None:
    for stop in (60, None):
        run = StreamEvaluation(base, stream, CONFIG, tmp_path / "out", BOTH, options=options())
        for k, _ in enumerate(run):
            if k == stop:
                break
    assert run.report is not None
    assert timeless(run.report) == timeless(whole[0])


def test_what_was_asked_of_another_merge_is_not_taken_up(base: Base, stream: EditStream, tmp_path: Path) -> None:
    some, other = short(stream, 4), MergeConfig(method="linear", rehearse=False)
    some = EditStream.of([dataclasses.replace(r, locality=()) for r in some.records])

    def run(cache: Path | None, out: str, how: MergeConfig | None) -> StreamEvaluation:
        return StreamEvaluation(base, some, CONFIG, tmp_path / out, BOTH, how, options(cache))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("wisecli.evaluation.protocols.merge_run", lambda *_, **__: _raise())
        with pytest.raises(Killed):
            finish(run(tmp_path / "cache", "out", None))
    resumed = finish(run(tmp_path / "cache", "out", other))
    want = finish(run(None, "alone", other))
    assert timeless(resumed) == timeless(want)


def _raise() -> Any:
    raise Killed


def test_checkpoints_are_powers_of_ten() -> None:
    assert [checkpoints_of(n) for n in (1, 2, 10, 11, 100, 1001)] == [
        *([], [1], [1], [1, 10], [1, 10], [1, 10, 100, 1000]),
    ]


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
    some = short(stream, 5)
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


@pytest.mark.parametrize("sizes", [[0], [-1], [1, 6], []])
def test_sizes_that_no_sequence_can_have(base: Base, stream: EditStream, sizes: list[int]) -> None:
    with pytest.raises(UsageError):
        RollbackEvaluation(base, short(stream, 5), CONFIG, sizes, options=options())


def test_rollbacks_go_on_after_a_kill(base: Base, stream: EditStream, tmp_path: Path) -> None:
    some = short(stream, 4)
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
def known(stream: EditStream) -> EditStream:
    """Records of which the base's own answer is the original, and one with a true answer it does not give."""
    live = [r for r in stream.records if r.id not in stream.superseded][:7]
    live[2] = dataclasses.replace(live[2], truth="surely not")
    near = (Probe("where is the world", None, SAME_RELATION), Probe("hello", "world"))
    return EditStream.of([dataclasses.replace(r, rephrases=(f"so {r.prompt}",), locality=near) for r in live])


@pytest.fixture
def wilke(base: Base, known: EditStream) -> EvalReport:
    return finish(WilkeEvaluation(base, known, WILKE, options()))


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
        assert item.match is not None
        match.setdefault(item.question.kind, []).append(item.match[1])
        exact.setdefault(item.question.kind, []).append(item.exact[1])
    names = {"es": EDIT, "gs": REPHRASE, "ls": SAME_RELATION}
    for name, kind in names.items():
        assert section[name] == _share(match[kind])
        assert section["exact"][name] == _share(exact[kind])
    assert UNRELATED in match  # asked, but not in LS where there are near prompts
    assert (section["edited"], section["left_out"]) == (3, 1)
    assert section["checkpoints"] == wilke.sections["protocol"]["checkpoints"] == [1, 2, 3]
    for ers, ors, s in zip(section["ers"], section["ors"], section["s"], strict=True):
        parts = [max(v, 1e-4) for v in (section["es"], section["gs"], section["ls"], ers, ors)]
        assert s == pytest.approx(5 / sum(1 / v for v in parts))


def test_wilke_by_hand(base: Base, known: EditStream, wilke: EvalReport) -> None:
    """The same edits made and taken back here, and every match worked out from one row's own forward."""
    editor = Editor(base, dataclasses.replace(WILKE, shards=1, block=1))
    encoder = editor.encoder
    said = {
        i.question.edit: i.before for i in evaluate(base, known, options=options()).items if i.question.kind == EDIT
    }
    records = [r for r in known.records if r.truth is None]
    assert all(said[r.id] for r in records)
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


def test_a_true_answer_that_the_base_gives_is_the_original(base: Base, known: EditStream) -> None:
    encoder = PromptEncoder(base.tokenizer)
    records = []
    for record in known.records[:4]:
        candidates = [w for w in ("w", "the", "is", "a", "x", "world", "e", "?", "(", "5") if w != record.target]
        given = [w for w in candidates if _forced(base, encoder, record.prompt, w, None)]
        records.append(dataclasses.replace(record, truth=given[0] if given else "surely not"))
    run = WilkeEvaluation(base, EditStream.of(records), WILKE, options())
    drain(run.asker.before())
    assert [r.id for r in run._known()] == [r.id for r in records if r.truth != "surely not"]


def test_checkpoints_of_wilke() -> None:
    got = [n for n in range(1, 121) if _checkpoint(n, 120)]
    assert got == [1, 2, 4, 8, 16, 32, 50, 64, 100, 120]


def test_wilke_goes_on_after_a_kill(base: Base, known: EditStream, wilke: EvalReport, tmp_path: Path) -> None:
    for last in (3, 2, 2, 2):
        with pytest.MonkeyPatch.context() as patched:
            _puts(patched, last)
            with pytest.raises(Killed):
                finish(WilkeEvaluation(base, known, WILKE, options(tmp_path)))
    assert timeless(finish(WilkeEvaluation(base, known, WILKE, options(tmp_path)))) == timeless(wilke)


def test_wilke_needs_two_records_the_base_knows(base: Base, known: EditStream) -> None:
    unknown = EditStream.of([dataclasses.replace(r, truth="surely not") for r in known.records[:3]])
    with pytest.raises(InputError, match="0 of 3"):
        finish(WilkeEvaluation(base, unknown, WILKE, options()))


def test_wilke_leaves_the_base_as_it_was(base: Base, known: EditStream) -> None:
    before = weights(base)
    finish(WilkeEvaluation(base, known, WILKE, options()))
    assert all(torch.equal(v, before[k]) for k, v in base.model.state_dict().items())
    assert "generate" not in base.model.__dict__
