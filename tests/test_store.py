"""The answer cache: what survives a kill, what is asked again, what never hits another state's answers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHAT_TEMPLATE, build_model, build_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from wisecli.cache import default_folder
from wisecli.data.records import SAME_RELATION, EditRecord, Probe
from wisecli.data.stream import EditStream
from wisecli.errors import OutputError
from wisecli.evaluation import answers as answering
from wisecli.evaluation.asking import Asker, drain
from wisecli.evaluation.evaluate import EvalOptions, EvalReport, Evaluation, evaluate
from wisecli.evaluation.questions import questions_of
from wisecli.evaluation.store import AnswerStore
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base
from wisecli.routing.attach import attach

PROMPTS = ("the capital of France is", "hello", "what who where world the capital of", "Paris?", "who is the world")


@pytest.fixture(scope="module")
def stream() -> EditStream:
    probes = (Probe("who is", "world"), Probe("the capital of Italy is", "world", SAME_RELATION))
    return EditStream.of(
        [
            EditRecord(f"e{i}", p, "Paris", rephrases=(f"when {p}",), locality=probes, truth="world", ood=(f"{p} so",))
            for i, p in enumerate(PROMPTS)
        ]
    )


@pytest.fixture(scope="module")
def base(tiny_model: Callable[..., Any], tokenizer: Any) -> Base:
    return Base(tiny_model("llama"), tokenizer, "tiny")


@pytest.fixture(scope="module")
def side_memory(base: Base, make_side_memory: Callable[..., SideMemory]) -> SideMemory:
    epsilon = [{"key": 0.9, "activation": 0.5}]
    return make_side_memory(base.model, [PROMPTS[0], PROMPTS[2]], epsilon=epsilon)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes every batch that is really asked: "generate" and "force"; `stop_at` in it raises at that call."""
    seen: list[str] = []
    for kind, name in (("generate", "_generated"), ("force", "_led")):

        def note(*args: Any, _old: Any = getattr(answering, name), _kind: str = kind, **kwargs: Any) -> Any:
            seen.append(_kind)
            return _old(*args, **kwargs)

        monkeypatch.setattr(answering, name, note)
    return seen


def options(cache: Path | None, **changes: Any) -> EvalOptions:
    return EvalOptions(**{"ability": False, "batch_size": 4, "cache": cache} | changes)


def timeless(report: EvalReport | None) -> dict[str, Any]:
    """All of a report that must be the same again."""
    assert report is not None
    return {k: v for k, v in report.to_json().items() if k not in ("timings", "peak_memory")}


def files(cache: Path) -> set[str]:
    return {p.name for p in (cache / "answers").iterdir()} if (cache / "answers").exists() else set()


# -- the file ----------------------------------------------------------------------------------------------------------


def test_a_file_cut_anywhere_in_its_last_line_loses_that_line_alone(tmp_path: Path) -> None:
    """Two of the values end in characters of several bytes, so that some cuts fall inside one."""
    store = AnswerStore(tmp_path, {"a": 1})
    values = {"one": ["é\u2028x", [1, 2], None], "two": [0.1, "日本"], "three": {"text": "Ünï 語", "route": None}}
    for key, value in values.items():
        store.put(key, value)
    whole = store.path.read_bytes()
    last = whole.rstrip(b"\n").rindex(b"\n") + 1
    for end in range(last, len(whole) + 1):
        store.path.write_bytes(whole[:end])
        cut = AnswerStore(tmp_path, {"a": 1})
        found = {key: cut.get(key) for key in values}
        complete = end >= len(whole) - 1  # the line itself may be whole without its line break
        assert found == values | ({} if complete else {"three": None}), end
        cut.put("four", "after")
        cut.put("three", "again")
        fresh = AnswerStore(tmp_path, {"a": 1})
        assert {k: fresh.get(k) for k in ("one", "two")} == {k: values[k] for k in ("one", "two")}, end
        assert (fresh.get("four"), fresh.get("three")) == ("after", "again"), end


def test_what_is_put_before_anything_is_read_follows_a_cut_line(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path, {})
    store.put("one", 1)
    store.path.write_bytes(store.path.read_bytes() + b'{"key": "tw')
    AnswerStore(tmp_path, {}).put("three", 3)
    again = AnswerStore(tmp_path, {})
    assert (again.get("one"), again.get("two"), again.get("three")) == (1, None, 3)


@pytest.mark.parametrize(
    "line", ["[1]", "7", "null", '{"key": []}', '{"key": [], "value": 1}', '{"value": 1}', "", "{"]
)
def test_lines_that_are_no_entries_are_passed_over(tmp_path: Path, line: str) -> None:
    store = AnswerStore(tmp_path, {})
    store.put("one", 1)
    store.path.write_text(line + "\n" + store.path.read_text() + line + "\n")
    assert AnswerStore(tmp_path, {}).get("one") == 1


@settings(max_examples=150, deadline=None)
@given(entries=st.dictionaries(st.text(), st.tuples(st.text(), st.lists(st.floats(allow_nan=False)), st.none())))
def test_what_was_put_is_found_by_another_reader(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("store")
    store = AnswerStore(folder, {})
    for key, value in entries.items():
        store.put(key, value)
    again = AnswerStore(folder, {})
    for key, (text, numbers, nothing) in entries.items():
        assert again.get(key) == store.get(key) or store.get(key) == (text, numbers, nothing)
        assert again.get(key) == [text, numbers, nothing]


def test_a_surrogate_in_an_answer_is_kept(tmp_path: Path) -> None:
    AnswerStore(tmp_path, {}).put("k", "a\ud800b")
    assert AnswerStore(tmp_path, {}).get("k") == "a\ud800b"


def test_discarding_forgets(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path, {})
    store.discard()
    store.put("k", 1)
    store.discard()
    assert store.get("k") is None
    assert not store.path.exists()


def test_a_folder_that_cannot_be_written_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError) as refused:
        AnswerStore(tmp_path / "file", {}).put("k", 1)
    assert "--no-cache" in str(refused.value.hint)


def test_the_folder_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WISE_CACHE", str(tmp_path / "own"))
    assert default_folder() == tmp_path / "own"
    monkeypatch.delenv("WISE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "wise"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "wise"


# -- what is asked -----------------------------------------------------------------------------------------------------


def test_a_kept_batch_is_not_asked_again(
    base: Base, side_memory: SideMemory, stream: EditStream, calls: list[str], tmp_path: Path
) -> None:
    """The base's answers serve the next evaluation; the side memory's only an interrupted one."""
    first = evaluate(base, stream, options=options(tmp_path))
    asked_of_base = len(calls)
    assert asked_of_base > 5
    calls.clear()
    assert timeless(evaluate(base, stream, options=options(tmp_path))) == timeless(first)
    assert calls == []
    reports = []
    for _ in range(2):
        calls.clear()
        reports.append(timeless(evaluate(base, stream, side_memory, options=options(tmp_path))))
        assert 0 < len(calls) <= 2 * asked_of_base
    assert reports[0] == reports[1]
    calls.clear()
    assert timeless(evaluate(base, stream, side_memory, options=options(None))) == reports[0]
    assert len(calls) > asked_of_base


@pytest.mark.parametrize("router", ["key", "activation"])
def test_the_last_of_an_evaluation_leaves_the_base_s_file_alone(
    base: Base, side_memory: SideMemory, stream: EditStream, router: str, tmp_path: Path
) -> None:
    evaluate(base, stream, options=options(tmp_path))
    before = files(tmp_path)
    assert len(before) == 1
    with attach(base.model, side_memory, router=router) as attached:
        run = Evaluation(base, stream, attached, options=options(tmp_path))
        run.close()  # before anything was asked there is nothing to drop
        for _ in run:
            pass
    kept = files(tmp_path)
    assert before < kept  # whoever writes the report may still fail
    run.close()
    run.close()
    assert files(tmp_path) == before


def test_an_evaluation_that_ended_and_was_not_closed_is_answered_from_the_cache(
    base: Base, side_memory: SideMemory, stream: EditStream, calls: list[str], tmp_path: Path
) -> None:
    """As after a crash while results are written."""
    reports = []
    for _ in range(2):
        calls.clear()
        with attach(base.model, side_memory) as attached:
            run = Evaluation(base, stream, attached, options=options(tmp_path))
            for _ in run:
                pass
        reports.append(timeless(run.report))
    assert calls == []
    assert reports[0] == reports[1]


def test_resuming_after_any_batch_gives_the_same_report(
    base: Base, side_memory: SideMemory, stream: EditStream, calls: list[str], tmp_path: Path
) -> None:
    want = timeless(evaluate(base, stream, side_memory, options=options(None)))
    total = len(calls)
    assert total > 15
    for stop in range(1, total, 5):
        calls.clear()
        cache = tmp_path / str(stop)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(AnswerStore, "get", _until(AnswerStore.get, lambda stop=stop: len(calls) >= stop))
            with pytest.raises(Killed):
                evaluate(base, stream, side_memory, options=options(cache))
        calls.clear()
        assert timeless(evaluate(base, stream, side_memory, options=options(cache))) == want, stop
        assert len(calls) == total - stop


class Killed(Exception):
    """Stands for a kill."""


def _until(call: Callable[..., Any], over: Callable[[], bool]) -> Callable[..., Any]:
    """The call, until it is over: then it raises."""

    def either(*args: Any) -> Any:
        if over():
            raise Killed
        return call(*args)

    return either


# -- states that must not be mistaken for one another ------------------------------------------------------------------


def _with_epsilon(sm: SideMemory, value: float) -> SideMemory:
    (memory,) = sm.memories
    return dataclasses.replace(sm, memories=(dataclasses.replace(memory, epsilon={**memory.epsilon, "key": value}),))


@pytest.mark.parametrize("change", ["side memory", "router", "epsilon", "memory of an edit", "batch size"])
def test_another_state_of_the_edited_model_is_asked_itself(
    base: Base,
    side_memory: SideMemory,
    make_side_memory: Callable[..., SideMemory],
    random_delta: Callable[..., torch.Tensor],
    stream: EditStream,
    calls: list[str],
    tmp_path: Path,
    change: str,
) -> None:
    """The first state's answers lie in the cache, as after an interruption."""
    asker = Asker(base, questions_of(stream), cache=tmp_path, batch_size=4)
    with attach(base.model, side_memory) as attached:
        drain(asker.before(attached))
        drain(asker.after(attached))
        calls.clear()
        drain(asker.after(attached))
        assert calls == []
        drain(asker.opened(attached, drain(asker.after(attached))))
    sm, router, size = side_memory, "key", 4
    if change == "side memory":
        delta = random_delta((sm.site.d_out, sm.site.d_in), seed=7)
        epsilon = [dict(sm.memories[0].epsilon)]
        sm = make_side_memory(base.model, [PROMPTS[0], PROMPTS[2]], deltas=[delta], epsilon=epsilon)
    elif change == "router":
        router = "activation"
    elif change == "epsilon":
        sm = _with_epsilon(sm, -2.0)
    elif change == "memory of an edit":
        sm = dataclasses.replace(sm, config={**sm.config, "note": "other"})
    else:
        size = 3
    calls.clear()
    with attach(base.model, sm, router=router) as attached:
        kept, plain = (
            Evaluation(base, stream, attached, options=options(c, batch_size=size)) for c in (tmp_path, None)
        )
        for _ in kept:
            pass
        asked = len(calls)
        for _ in plain:
            pass
    in_all = len(calls) - asked
    base_alone = len(AnswerStore(tmp_path, asker.state())._read())
    assert asked == in_all if change == "batch size" else asked >= in_all - base_alone
    assert timeless(kept.report) == timeless(plain.report)


def _other_bases(base: Base) -> Iterator[tuple[str, Base]]:
    tokenizer = base.tokenizer
    changed = build_model("llama", len(tokenizer))
    changed.get_decoder().layers[3].mlp.up_proj.weight[0, 0] += 1e-3
    yield "weight", Base(changed, tokenizer, "tiny")
    half = build_model("llama", len(tokenizer)).to(torch.bfloat16)
    yield "dtype", Base(half, tokenizer, "tiny")
    other = build_tokenizer()
    other.chat_template = CHAT_TEMPLATE
    yield "chat", Base(base.model, other, "tiny")
    config = build_model("llama", len(tokenizer))
    config.config.rms_norm_eps = 1e-2
    yield "config", Base(config, tokenizer, "tiny")


def test_another_base_is_asked_itself(base: Base, stream: EditStream, calls: list[str], tmp_path: Path) -> None:
    evaluate(base, stream, options=options(tmp_path))
    asked = len(calls)
    for name, other in _other_bases(base):
        calls.clear()
        kept = evaluate(other, stream, chat=name == "chat", options=options(tmp_path))
        assert len(calls) == asked, name
        plain = evaluate(other, stream, chat=name == "chat", options=options(None))
        assert timeless(kept) == timeless(plain), name
        calls.clear()
        assert timeless(evaluate(other, stream, chat=name == "chat", options=options(tmp_path))) == timeless(plain)
        assert calls == [], name


def test_the_same_weights_are_recognised(base: Base, stream: EditStream, calls: list[str], tmp_path: Path) -> None:
    """Whatever the base is called and whichever object holds it."""
    evaluate(base, stream, options=options(tmp_path))
    calls.clear()
    twin = Base(build_model("llama", len(base.tokenizer)), build_tokenizer(), "elsewhere/tiny")
    evaluate(twin, stream, options=options(tmp_path))
    assert calls == []


def test_batches_of_other_prompts_or_other_company_are_asked(
    base: Base, stream: EditStream, calls: list[str], tmp_path: Path
) -> None:
    evaluate(base, stream, options=options(tmp_path))
    asked = len(calls)
    calls.clear()
    evaluate(base, stream, options=options(tmp_path, batch_size=3))
    assert len(calls) > asked
    calls.clear()
    fewer = EditStream.of(stream.records[:-1])
    kept = evaluate(base, fewer, options=options(tmp_path))
    assert calls
    assert timeless(kept) == timeless(evaluate(base, fewer, options=options(None)))


def test_a_base_whose_weights_are_not_at_hand_keeps_nothing(base: Base, stream: EditStream, tmp_path: Path) -> None:
    without = Base(base.model, base.tokenizer, "tiny")
    without.__dict__["digest"] = None
    evaluate(without, stream, options=options(tmp_path))
    assert files(tmp_path) == set()


def test_kept_answers_are_what_results_hold(base: Base, stream: EditStream, tmp_path: Path) -> None:
    """No score lies in the cache: only texts, tokens, likelihoods and routes."""
    report = evaluate(base, stream, options=options(tmp_path))
    (path,) = (tmp_path / "answers").iterdir()
    texts = set()
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        for entry in json.loads(line)["value"]:
            assert len(entry) == 3
            texts |= {entry[0]} if isinstance(entry[0], str) else set()
    assert texts == {i.before for i in report.items}
