"""Evaluation against an oracle that knows no batches, and what must not change its scores."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KINDS

from wisecli.data.records import SAME_RELATION, SAME_SUBJECT, UNRELATED, EditRecord, Probe
from wisecli.data.stream import EditStream
from wisecli.editing.editor import SUPERSEDED
from wisecli.errors import InputError
from wisecli.evaluation import answers as answering
from wisecli.evaluation.answers import GREEDY, SLACK, Forced, answer_cap, force, force_each, generate_answers
from wisecli.evaluation.asking import Asker, Progress, drain
from wisecli.evaluation.evaluate import EvalOptions, EvalReport, Evaluation, as_learned, evaluate, missing_of
from wisecli.evaluation.questions import EDIT, REPHRASE, Item, ask_of, questions_of
from wisecli.evaluation.recall import measure
from wisecli.evaluation.scores import (
    METRICS,
    ood_of,
    scores_of,
)
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base
from wisecli.models.prompts import PromptEncoder
from wisecli.routing.attach import attach

FACTS = (
    ("the capital of France is", "Paris"),
    ("hello", "what who where world when"),
    ("what who where world the capital of", "France is"),
    ("Paris?", "hello hello"),
)
LIMIT = 256  # positions of the tiny models
PLAIN = EvalOptions(ability=False)
TEXTS = ("the capital of France is Paris and hello world", "who is where in the world")  # held text, short
Make = Callable[..., tuple[Base, SideMemory]]


@pytest.fixture(scope="module")
def stream() -> EditStream:
    """Every kind of question, with and without answers, true answers and texts out of distribution."""
    probes = (
        Probe("who is", "world"),
        Probe("where the world is when"),
        Probe("the capital of Italy is", "world", SAME_RELATION),
        Probe("France is where", None, SAME_SUBJECT),
    )
    return EditStream.of(
        [
            EditRecord(
                f"e{i}",
                p,
                t,
                rephrases=(f"when {p}",),
                locality=probes if i < 2 else (),
                truth="world" if i % 2 == 0 else None,
                ood=(f"{p} {t}.", f"who {t}?") if i < 2 else (),
            )
            for i, (p, t) in enumerate(FACTS)
        ]
    )


@pytest.fixture(scope="module")
def make(tiny_model: Any, tokenizer: Any, make_side_memory: Any) -> Make:
    def build(kind: str = "llama", router: str = "key", epsilon: float = 0.9) -> tuple[Base, SideMemory]:
        model = tiny_model(kind)
        sm = make_side_memory(model, [FACTS[0][0], FACTS[2][0]], epsilon=[{router: epsilon}], router=router)
        return Base(model, tokenizer, "tiny"), sm

    return build


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes every call of `generate`, by its cap."""
    seen: list[int] = []

    def note(model: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["max_new_tokens"])
        return old(model, *args, **kwargs)

    from transformers import GenerationMixin

    old = GenerationMixin.generate
    monkeypatch.setattr(GenerationMixin, "generate", note)
    return seen


def oracle(base: Base, encoder: PromptEncoder, prompt: str, target: str, sm: SideMemory | None) -> tuple[float, int]:
    """Token accuracy and number of target tokens: one row, one full forward, no padding; routed by the prompt alone."""
    row = encoder.pair(prompt, target, eos=False)
    ids = torch.tensor([row.ids])
    if sm is None:
        logits = base.model(input_ids=ids, use_cache=False).logits
    else:
        with attach(base.model, sm) as on:
            memory = on.decide(encoder.batch([encoder.prompt(prompt)]))[0].memory
            with on.override([memory]):
                logits = base.model(input_ids=ids, use_cache=False).logits
    hits = [int(logits[0, len(row.prompt) + k - 1].argmax()) == token for k, token in enumerate(row.target)]
    return sum(hits) / len(hits), len(hits)


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_token_accuracy_is_that_of_one_row_at_a_time(make: Make, stream: EditStream, kind: str) -> None:
    """The targets are what the model says for a while, so that scores lie strictly between 0 and 1, too."""
    base, sm = make(kind)
    encoder = PromptEncoder(base.tokenizer)
    with attach(base.model, sm):
        said = dict(generate_answers(base, encoder, [p for p, _ in FACTS], [3] * len(FACTS)))
    targets = [f"{said[i].text} {t}" if i % 2 == 0 else t for i, (_, t) in enumerate(FACTS)]
    records = [dataclasses.replace(r, target=t) for r, t in zip(stream.records, targets, strict=True)]
    report = evaluate(base, EditStream.of(records), sm, options=PLAIN)
    lengths = set()
    for item in (i for i in report.items if i.question.edited):
        prompt, target = item.question.prompt, str(item.question.target)
        (before, n), (after, _) = (oracle(base, encoder, prompt, target, s) for s in (None, sm))
        assert item.token == pytest.approx((before, after)), item
        lengths.add(n)
    assert len(lengths) > 2
    assert {i.route.routed for i in report.items if i.route} == {True, False}


@pytest.mark.parametrize("router", ["key", "activation"])
def test_a_forced_row_is_routed_by_its_prompt(make: Make, router: str) -> None:
    base, sm = make(router=router)
    encoder = PromptEncoder(base.tokenizer)
    with attach(base.model, sm) as on:
        found = sorted(on.decide(encoder.batch([encoder.prompt(p)]))[0].indicator for p, _ in FACTS)
    base, sm = make(router=router, epsilon=(found[1] + found[2]) / 2)
    rows = [encoder.pair(p, t, eos=False) for p, t in FACTS]
    with attach(base.model, sm) as on:
        routes = [on.decide(encoder.batch([encoder.prompt(p)]))[0].memory for p, _ in FACTS]
        got = force(base, encoder, rows, on, batch_size=3)
        want = []
        for row, memory in zip(rows, routes, strict=True):
            with on.override([memory]):
                want += force(base, encoder, [row])
    for a, b, memory in zip(got, want, routes, strict=True):
        assert a.predicted == b.predicted
        assert a.nll == pytest.approx(b.nll, abs=1e-4)
        assert a.route is not None
        assert a.route.memory == memory
    assert len(set(routes)) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_answers_do_not_depend_on_the_batch(
    make: Make, kind: str, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither on the rows per batch nor on its tokens."""
    base, sm = make(kind)
    encoder = PromptEncoder(base.tokenizer)
    prompts = [p for p, _ in FACTS] + ["when", "who is the world where"]
    caps = [3, 9, 4, 7, 5, 6]
    runs = []
    with attach(base.model, sm) as on:
        for size in (1, 2, 3, 8, 64):
            runs.append(dict(generate_answers(base, encoder, prompts, caps, on, batch_size=size)))
        monkeypatch.setattr(answering, "TOKENS", 40)
        asked.clear()
        runs.append(dict(generate_answers(base, encoder, prompts, caps, on)))
    assert 1 < len(asked) < len(prompts)
    for other in runs[1:]:
        for i, answer in runs[0].items():
            assert (other[i].ids, other[i].text) == (answer.ids, answer.text)
            assert (other[i].route.memory, other[i].route.edit) == (answer.route.memory, answer.route.edit)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_scores_do_not_depend_on_the_batch(
    make: Make, stream: EditStream, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, sm = make(kind)
    reports = [evaluate(base, stream, sm, options=EvalOptions(batch_size=n, ability=False)) for n in (1, 3, 64)]
    for bound, small in (("TOKENS", 60), ("LOGITS", 7 * len(base.tokenizer))):
        with monkeypatch.context() as patched:
            patched.setattr(answering, bound, small)
            reports.append(evaluate(base, stream, sm, options=PLAIN))
    first = reports[0]
    for other in reports[1:]:
        assert other.scores == first.scores
        for a, b in zip(first.items, other.items, strict=True):
            assert (a.before, a.after, a.exact, a.token, a.match, a.opened) == (
                *(b.before, b.after, b.exact, b.token, b.match, b.opened),
            )
            assert a.nll == pytest.approx(b.nll, abs=1e-4)
            assert a.contrast == (None if b.contrast is None else pytest.approx(b.contrast, abs=1e-4))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma2"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_forced_predictions_agree_with_a_forward_of_the_test_s_own(make: Make, kind: str, side: str, size: int) -> None:
    """Padded on either side, with positions that count no padding, whole logits; the tool pads right."""
    base, _ = make(kind)
    encoder = PromptEncoder(base.tokenizer)
    pairs = [*FACTS, *((f"when {p}", t) for p, t in FACTS)]
    rows = [encoder.pair(p, t, eos=False) for p, t in pairs]
    got = force(base, encoder, rows, batch_size=size)
    for at in range(0, len(rows), size):
        some = rows[at : at + size]
        width = max(map(len, some))
        fill = [(0,) * (width - len(r)) for r in some]
        padded = [f + r.ids if side == "left" else r.ids + f for r, f in zip(some, fill, strict=True)]
        ones = [(1,) * len(r) for r in some]
        mask = [f + o if side == "left" else o + f for o, f in zip(ones, fill, strict=True)]
        real = torch.tensor(mask)
        inputs = {"input_ids": torch.tensor(padded), "attention_mask": real, "use_cache": False}
        inputs["position_ids"] = (real.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = base.model(**inputs).logits.float()
        for k, (row, found) in enumerate(zip(some, got[at : at + size], strict=True)):
            first = (width - len(row) if side == "left" else 0) + len(row.prompt) - 1
            mine = logits[k, first : first + len(row.target)]
            assert found.predicted == tuple(mine.argmax(-1).tolist())
            nll = -mine.log_softmax(-1).gather(1, torch.tensor(row.target)[:, None])[:, 0]
            assert found.nll == pytest.approx(nll.tolist(), abs=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_target_perplexity_is_that_of_transformers_own_loss(make: Make, stream: EditStream, kind: str) -> None:
    base, sm = make(kind)
    encoder = PromptEncoder(base.tokenizer)
    report = evaluate(base, stream, sm, options=PLAIN)
    edits = [i for i in report.items if i.question.edited]
    values = []
    for item in edits:
        row = encoder.pair(item.question.prompt, str(item.question.target), eos=False)
        labels = torch.tensor([[-100] * len(row.prompt) + list(row.target)])
        with torch.no_grad():
            loss = base.model(input_ids=torch.tensor([row.ids]), labels=labels).loss
        assert item.nll is not None
        assert item.nll[0] == pytest.approx(float(loss), rel=1e-4)
        if item.question.kind == EDIT:
            values.append(math.exp(float(loss)))
    section = report.sections["perplexity"]["rel"]
    assert section["n"] == len(FACTS)
    assert section["before"]["mean"] == pytest.approx(sum(values) / len(values), rel=1e-3)
    assert section["before"]["median"] == pytest.approx(sorted(values)[1] / 2 + sorted(values)[2] / 2, rel=1e-3)
    assert section["before"]["clipped"] == pytest.approx(sum(min(v, 100) for v in values) / len(values), rel=1e-3)


def test_a_probe_with_an_answer_says_whether_it_is_given(make: Make, stream: EditStream) -> None:
    """Apart from whether the base's own tokens are: `answered` is of the dataset's answer, `match` of the base's."""
    base, sm = make()
    encoder = PromptEncoder(base.tokenizer)
    items = evaluate(base, stream, sm, options=PLAIN).items
    for item in items:
        q = item.question
        assert (item.answered is None) == (q.edited or q.answer is None)
        if item.answered is not None:
            shares = [oracle(base, encoder, q.prompt, str(q.answer), s)[0] for s in (None, sm)]
            assert item.answered == tuple(s == 1.0 for s in shares)
        assert Item.from_json(json.loads(json.dumps(item.to_json()))) == item
    assert any(i.answered == (False, False) and i.match and i.match[1] for i in items)
    words = ("where", "who", "what", "hello", "world", "France", "Paris", "is")
    prompts = [f"{a} {b}" for a in words for b in words]
    said = dict(generate_answers(base, encoder, prompts, [1] * len(prompts)))
    fit = [i for i, p in enumerate(prompts) if said[i].ids == encoder.pair(p, said[i].text, eos=False).target]
    prompt, text = prompts[fit[0]], said[fit[0]].text
    probes = (Probe(prompt, text, SAME_SUBJECT), Probe(prompt, f"{text}?!", SAME_RELATION))
    found = evaluate(base, EditStream.of([EditRecord("e", "hello", "x", locality=probes)]), options=PLAIN).items[1:]
    assert [i.answered for i in found] == [(True, True), (False, False)]
    assert [i.match for i in found] == [(True, True), (True, True)]


@pytest.mark.parametrize("router", ["key", "activation"])
def test_rows_of_a_part_that_main_memory_answers_are_the_base_s_own(
    make: Make, stream: EditStream, router: str
) -> None:
    """What the base said is replaced by marks: a part asked takes them over, all asked does not."""
    base, sm = make(router=router)
    asker = Asker(base, questions_of(stream))
    encoder = PromptEncoder(base.tokenizer)
    with attach(base.model, sm) as on:
        found = sorted(on.decide(encoder.batch([encoder.prompt(p)]))[0].indicator for p in asker.prompts)
    base, sm = make(router=router, epsilon=(found[len(found) // 2] + found[len(found) // 2 - 1]) / 2)
    drain(asker.before())
    for kept in (asker._forced, asker._forced_contrasts):
        kept |= {i: dataclasses.replace(f, nll=(7.5,) * len(f.nll)) for i, f in kept.items()}
    asker._answers = {p: dataclasses.replace(a, text=f"mark {a.text}") for p, a in asker._answers.items()}
    which = list(range(0, len(asker.questions), 2))
    with attach(base.model, sm) as on:
        part, whole = drain(asker.after(on, which)), drain(asker.after(on))
    routed = {i.route.routed for i in part if i.route is not None}
    assert routed == {True, False}
    for item, at in zip(part, which, strict=True):
        assert item.question == asker.questions[at]
        other = whole[at]
        assert other.route is not None
        assert item.route is not None
        assert (item.route.memory, item.route.edit) == (other.route.memory, other.route.edit)
        assert item.route.indicator == pytest.approx(other.route.indicator, abs=1e-4)
        shut = not item.route.routed
        assert item.after.startswith("mark ") == shut
        assert not other.after.startswith("mark ")
        for pair, own in ((item.nll, other.nll), (item.contrast, other.contrast)):
            if pair is not None and own is not None:
                assert (pair[1] == 7.5) == shut
                assert own[1] != 7.5


def test_a_part_is_bitwise_the_base_where_main_memory_answers(make: Make, stream: EditStream) -> None:
    base, sm = make(epsilon=2.0)
    asker = Asker(base, questions_of(stream), batch_size=3)
    drain(asker.before())
    with attach(base.model, sm) as on:
        for at in range(len(asker.questions)):
            (item,) = drain(asker.after(on, [at]))
            assert item.before == item.after
            for pair in (item.exact, item.token, item.match, item.answered, item.nll, item.contrast):
                assert pair is None or pair[0] == pair[1]
            assert item.route is not None
            assert not item.route.routed


# -- what changes nothing ----------------------------------------------------------------------------------------------


def _assert_after_is_before(report: EvalReport) -> None:
    for i in report.items:
        assert i.before == i.after
        for pair in (i.exact, i.token, i.match, i.nll, i.contrast):
            assert pair is None or pair[0] == pair[1], i
    s = report.sections
    summaries = [m for part in s["scores"].values() for m in part.values()]
    summaries += [*s["average"].values(), s["ood"]["token"], s["ood"]["example"], *s["probability"].values()]
    assert len(summaries) == 12 + 3 + 2 + 4
    for part in summaries:
        assert part["before"] == part["after"]
        assert part["before_interval"] == part["after_interval"]
    for part in (*s["perplexity"].values(), s["ability"]["perplexity"]):
        assert part["before"] == part["after"]
    assert s["ability"]["agreement"] == 1.0


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_without_a_side_memory_after_is_before(make: Make, stream: EditStream, kind: str) -> None:
    base, _ = make(kind)
    report = evaluate(base, stream, options=EvalOptions(texts=TEXTS))
    _assert_after_is_before(report)
    s = report.sections
    assert (s["side_memory"], s["method"], s["routing"], s["open"]) == (None, None, None, None)
    assert all(i.route is None and i.opened is None for i in report.items)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("router", ["key", "activation"])
def test_behind_an_infinite_threshold_after_is_before(make: Make, stream: EditStream, kind: str, router: str) -> None:
    base, sm = make(kind, router, float("inf"))
    report = evaluate(base, stream, sm, options=EvalOptions(texts=TEXTS))
    _assert_after_is_before(report)
    assert report.routing is not None
    assert {k["routed"] for k in report.routing["kinds"].values()} == {0.0}
    assert report.routing["precision"] is None
    assert (report.routing["recall"], report.routing["false_opening"]) == (0.0, 0.0)
    assert report.sections["ability"]["routed"] == 0.0
    assert any(i.opened != (i.after, i.exact[1]) for i in report.items)  # the delta does change something


# -- the gate always open ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["key", "activation"])
def test_opened_is_what_the_memory_would_have_said(
    make: Make, stream: EditStream, router: str, asked: list[int]
) -> None:
    base, sm = make(router=router, epsilon=0.98 if router == "key" else 0.0)
    encoder = PromptEncoder(base.tokenizer)
    asker = Asker(base, questions_of(stream))
    with attach(base.model, sm) as on:
        drain(asker.before(on))
        items = drain(asker.after(on))
        asked.clear()
        opened = drain(asker.opened(on, items))
        shut = {i.question.prompt for i in items if i.route is not None and not i.route.routed}
        assert len(asked) == (1 if shut else 0)
        prompts = sorted(shut)
        with on.override([0]):
            want = dict(generate_answers(base, encoder, prompts, [40] * len(prompts)))
    texts = {p: want[k].text for k, p in enumerate(prompts)}
    for item, other in zip(items, opened, strict=True):
        assert dataclasses.replace(other, opened=None) == item
        assert other.opened is not None
        if item.question.prompt in shut:
            assert texts[item.question.prompt].startswith(other.opened[0].rstrip("\ufffd"))
        else:
            assert other.opened == (item.after, item.exact[1])
    if router == "key":
        assert shut
        assert len(shut) < len(asker.prompts)


def test_nothing_is_asked_again_behind_an_open_gate(make: Make, stream: EditStream, asked: list[int]) -> None:
    base, sm = make(epsilon=-2.0)
    asker = Asker(base, questions_of(stream))
    with attach(base.model, sm) as on:
        drain(asker.before(on))
        items = drain(asker.after(on))
        asked.clear()
        opened = drain(asker.opened(on, items))
    assert asked == []
    assert [i.opened for i in opened] == [(i.after, i.exact[1]) for i in items]
    report = evaluate(base, stream, sm, options=PLAIN)
    exact = {name: metrics["exact"]["after"] for name, metrics in report.scores.items()}
    assert report.sections["open"] == exact


def test_with_several_memories_an_edit_s_own_opens_and_the_nearest_edit_s_for_others(
    make: Make, make_side_memory: Any, random_delta: Any, stream: EditStream
) -> None:
    base, sm = make()
    shape = (sm.site.d_out, sm.site.d_in)
    deltas = [random_delta(shape, seed=s) for s in (1, 2)]
    epsilon = [{"key": 2.0}, {"key": 2.0}]
    two = make_side_memory(base.model, [FACTS[0][0], FACTS[2][0]], deltas=deltas, memory_of=[0, 1], epsilon=epsilon)
    encoder = PromptEncoder(base.tokenizer)
    report = evaluate(base, stream, two, options=PLAIN)
    nearest, memory_of = set(), {"e0": 0, "e1": 1}
    with attach(base.model, two) as on:
        for item in report.items:
            assert item.route is not None
            assert item.opened is not None
            q = item.question
            memory = memory_of.get(q.edit, 0) if q.edited else memory_of[str(item.route.edit)]
            nearest.add(memory)
            with on.override([memory]):
                alone = dict(generate_answers(base, encoder, [item.question.prompt], [40]))[0].text
            assert alone.startswith(item.opened[0].rstrip("\ufffd"))
    assert nearest == {0, 1}


# -- probabilities and texts out of distribution -----------------------------------------------------------------------


def test_probabilities_in_a_report_are_of_the_right_texts(make: Make, stream: EditStream) -> None:
    base, sm = make()
    encoder = PromptEncoder(base.tokenizer)
    report = evaluate(base, stream, sm, options=PLAIN)
    compared = [i for i in report.items if i.contrast is not None]
    assert {i.question.kind for i in compared} == {EDIT, REPHRASE, SAME_RELATION}
    for item in compared:
        q = item.question
        truth = q.contrast if q.edited else q.answer
        target = q.target if q.edited else dict(zip(("e0", "e1"), (t for _, t in FACTS), strict=False))[q.edit]
        assert truth == "world"
        means = {}
        for text in (truth, target):
            (found,) = force(base, encoder, [encoder.pair(q.prompt, str(text), eos=False)])
            means[text] = sum(found.nll) / len(found.nll)
        wanted, other = (target, truth) if q.edited else (truth, target)
        assert item.nll is not None
        assert item.contrast is not None
        assert item.nll[0] == pytest.approx(means[wanted], abs=1e-4)
        assert item.contrast[0] == pytest.approx(means[other], abs=1e-4)


def test_texts_out_of_distribution(make: Make, stream: EditStream) -> None:
    """All tokens but the first are scored; routed on the edit's prompt where the text begins with it."""
    base, sm = make()
    encoder = PromptEncoder(base.tokenizer)
    asker = Asker(base, questions_of(stream))
    with attach(base.model, sm) as on:
        found = drain(asker.ood(stream.records, on))
        assert [(t.edit, t.text) for t in found] == [(r.id, t) for r in stream.records for t in r.ood]
        limit = math.log(1 / 0.8)
        for text in found:
            ids = torch.tensor([encoder.prompt(text.text).prompt])
            prompt = next(r.prompt for r in stream.records if r.id == text.edit)
            seen = prompt if text.text.startswith(prompt) else text.text
            memory = on.decide(encoder.batch([encoder.prompt(seen)]))[0].memory
            assert text.routed == (memory is not None)
            for side, route in ((0, None), (1, memory)):
                with on.override([route]), torch.no_grad():
                    logits = base.model(input_ids=ids, use_cache=False).logits[0, :-1]
                nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
                assert text.token[side] == pytest.approx(float((nll < limit).float().mean()))
                assert text.example[side] == (float(nll.mean()) < limit)
    summary = ood_of(found)
    assert summary is not None
    assert summary["token"]["n"] == len(found) == 4
    assert ood_of([]) is None


# -- streams that are out of the ordinary ------------------------------------------------------------------------------


def test_superseded_edits_are_left_out_and_counted(make: Make) -> None:
    base, sm = make()
    records = [
        EditRecord("old", "hello", "world", rephrases=("hello hello",), ood=("hello world",)),
        EditRecord("kept", "who is", "Paris"),
        EditRecord("new", "hello", "France", locality=(Probe("where"),)),
    ]
    report = evaluate(base, EditStream.of(records), sm, options=PLAIN)
    assert {i.question.edit for i in report.items} == {"kept", "new"}
    assert (report.edits, report.superseded) == (3, 1)
    assert report.scores["rel"]["exact"]["n"] == 2
    assert report.scores["gen"]["exact"]["n"] == 0
    assert report.sections["ood"] is None


def test_one_prompt_with_two_targets(make: Make, asked: list[int]) -> None:
    """A rephrase that two edits share is asked once and judged twice; a probe that is another's prompt is no probe."""
    base, sm = make()
    encoder = PromptEncoder(base.tokenizer)
    long, short = "what who where world when", "is"
    records = [
        EditRecord("a", "hello", short, locality=(Probe("who is", "world"),), rephrases=("when",)),
        EditRecord("b", "who is", long, locality=(Probe("hello"),), rephrases=("when",)),
    ]
    report = evaluate(base, EditStream.of(records), sm, options=EvalOptions(ability=False, open_gate=False))
    assert len(asked) == 2
    by = {(i.question.edit, i.question.kind): i for i in report.items}
    assert sorted(by) == [("a", EDIT), ("a", REPHRASE), ("b", EDIT), ("b", REPHRASE)]
    assert report.sections["dataset"]["left_out"] == {"rephrases": 0, "probes": 2}
    assert report.scores["loc"]["exact"]["n"] == 0
    cap = len(encoder.pair("when", long, eos=False).target) + SLACK
    with attach(base.model, sm) as on:
        said = dict(generate_answers(base, encoder, ["when"], [cap], on))[0]
    for edit, target in (("a", short), ("b", long)):
        item = by[edit, REPHRASE]
        assert item.after == said.text
        assert item.token is not None
        assert item.token[1] == pytest.approx(oracle(base, encoder, "when", target, sm)[0])


def _prompts(stream: EditStream, kind: str) -> list[tuple[str, str]]:
    return [(q.edit, q.prompt) for q in questions_of(stream) if q.kind == kind]


def test_a_rephrase_that_another_edit_learns_otherwise_is_left_out() -> None:
    """White space and capitals aside; with the same target, or as another's rephrase only, it stays."""
    stream = EditStream.of(
        [
            EditRecord("a", "Who rules", "Ann", rephrases=("the  ruler IS", "who leads", "who rules", "one more")),
            EditRecord("b", "The ruler is", "Bob", rephrases=("Who Leads", "who is it")),
            EditRecord("c", "who is it", "Bob", rephrases=("WHO RULES ",)),
        ]
    )
    asked = ask_of(stream)
    assert (asked.rephrases, asked.probes) == (2, 0)
    assert _prompts(stream, REPHRASE) == [
        *(("a", "who leads"), ("a", "who rules"), ("a", "one more"), ("b", "Who Leads"), ("b", "who is it")),
    ]
    assert list(asked.questions) == questions_of(stream)
    assert len(_prompts(stream, EDIT)) == 3


@pytest.mark.parametrize("kind", [UNRELATED, SAME_RELATION, SAME_SUBJECT])
def test_a_probe_that_an_edit_changes_is_left_out(kind: str) -> None:
    """Whether it is the edit's own prompt or another's, a prompt or a rephrase."""
    wanted = ("who is who", "rules", "where is who")
    same = ("Who  rules", "the ruler is ", "who leads", "the leader is")
    stream = EditStream.of(
        [
            EditRecord("a", "who rules", "Ann", rephrases=("who leads",)),
            EditRecord("b", "The ruler is", "Ann", locality=tuple(Probe(p, "x", kind) for p in (*same, *wanted))),
            EditRecord("c", "who pays", "Eve", rephrases=("The leader is",), locality=(Probe(wanted[0], None, kind),)),
        ]
    )
    asked = ask_of(stream)
    assert (asked.rephrases, asked.probes) == (0, 4)
    assert _prompts(stream, kind) == [*(("b", p) for p in wanted), ("c", wanted[0])]


def test_what_a_superseded_edit_wanted_leaves_nothing_out() -> None:
    stream = EditStream.of(
        [
            EditRecord("old", "who rules", "Ann", rephrases=("who leads",)),
            EditRecord("other", "who pays", "Eve", rephrases=("who rules",), locality=(Probe("who leads"),)),
            EditRecord("new", "who rules", "Eve"),
        ]
    )
    asked = ask_of(stream)
    assert (asked.rephrases, asked.probes) == (0, 0)
    assert [(q.edit, q.kind) for q in asked.questions] == [
        *(("other", EDIT), ("other", REPHRASE), ("other", UNRELATED), ("new", EDIT)),
    ]


def test_a_report_counts_what_is_twice_and_what_was_not_learned(make: Make) -> None:
    base, sm = make()
    records = [
        EditRecord("e0", FACTS[0][0], "Paris"),
        EditRecord("x", FACTS[0][0].upper(), "Paris", rephrases=(FACTS[2][0],)),
        EditRecord("e1", FACTS[2][0], "world"),
    ]
    sm = dataclasses.replace(sm, edits=tuple(dataclasses.replace(e, target="Paris") for e in sm.edits))
    stream = EditStream.of(records)
    about = evaluate(base, stream, sm, options=PLAIN).sections["dataset"]
    assert (about["duplicates"], about["missing"]) == (1, 2)
    assert about["left_out"] == {"rephrases": 1, "probes": 0}
    assert evaluate(base, stream, options=PLAIN).sections["dataset"]["missing"] is None


def test_what_a_side_memory_does_not_hold(make: Make) -> None:
    _, sm = make()
    sm = dataclasses.replace(sm, edits=tuple(dataclasses.replace(e, target="Paris") for e in sm.edits))
    held = EditRecord("e0", FACTS[0][0], "Paris")
    renamed = dataclasses.replace(held, id="e7")
    other_target = EditRecord("e1", FACTS[2][0], "world")
    stream = EditStream.of([held, renamed, other_target])
    assert missing_of(stream, sm) == ["e7", "e1"]
    without = tuple(dataclasses.replace(e, prompt=None, target=None) for e in sm.edits)
    assert missing_of(stream, dataclasses.replace(sm, edits=without)) == ["e7"]  # known by their ids alone


def test_an_edit_that_was_superseded_when_it_was_learned_is_superseded(make: Make) -> None:
    """Only a part of what was learned is asked, and the edit that contradicts it is not among it."""
    base, sm = make()
    stream = EditStream.of([EditRecord("e0", FACTS[0][0], "Paris"), EditRecord("e1", FACTS[2][0], "Paris")])
    outcomes = tuple(dataclasses.replace(e, details={"outcome": SUPERSEDED}) for e in sm.edits[:1])
    beaten = dataclasses.replace(sm, edits=(*outcomes, *sm.edits[1:]))
    assert as_learned(stream, sm) == stream
    assert as_learned(stream, beaten).superseded == {"e0"}
    assert as_learned(EditStream.of(stream.records[1:]), beaten).superseded == frozenset()
    report = evaluate(base, stream, beaten, options=PLAIN)
    assert {i.question.edit for i in report.items} == {"e1"}
    assert (report.superseded, report.scores["rel"]["exact"]["n"]) == (1, 1)
    assert evaluate(base, stream, sm, options=PLAIN).superseded == 0


def test_probes_to_which_the_base_says_nothing(make: Make) -> None:
    """No token to compare under teacher forcing; the text still counts."""
    base, sm = make(epsilon=2.0)
    records = [EditRecord("a", "hello", "world", locality=(Probe("who is"), Probe("where", " ")))]
    asker = Asker(base, questions_of(EditStream.of(records)))
    encoder = PromptEncoder(base.tokenizer)
    first = dict(generate_answers(base, encoder, ["who is"], [1]))[0].ids[0]
    asker.encoder.__dict__["eos"] = (first,)
    drain(asker.before())
    items_ = drain(asker.after(None))
    probe = next(i for i in items_ if i.question.prompt == "who is")
    assert (probe.before, probe.exact, probe.token, probe.match, probe.nll) == ("", (True, True), None, None, None)
    assert scores_of(items_)["loc"]["exact"]["n"] == 2
    with attach(base.model, sm) as on:
        again = drain(asker.after(on))
    assert [i.exact for i in again] == [i.exact for i in items_]


@pytest.mark.parametrize("text", ["{}", "a {0} b", "{{x}} %s", "one\ntwo", "tab\there", "\u2028 line", '"quoted" \\'])
def test_braces_and_newlines_are_text_like_any_other(make: Make, text: str, tmp_path: Path) -> None:
    base, sm = make()
    records = [
        EditRecord("e", f"{text} hello", f"to {text} be", rephrases=(f"x {text}",), locality=(Probe(f"{text}"),))
    ]
    plain, kept, again = (
        evaluate(base, EditStream.of(records), sm, options=EvalOptions(ability=False, cache=cache))
        for cache in (None, tmp_path, tmp_path)
    )
    assert plain.items == kept.items == again.items
    assert plain.items[0].question.prompt == f"{text} hello"
    assert [Item.from_json(json.loads(json.dumps(i.to_json()))) for i in plain.items] == list(plain.items)


def test_the_report_names_the_side_memory(make: Make, stream: EditStream) -> None:
    base, sm = make()
    s = evaluate(base, stream, sm, options=EvalOptions(ability=False, side_memory="some/sm.safetensors")).sections
    about = s["side_memory"]
    assert (about["digest"], about["router"], about["path"]) == (sm.digest, "key", "some/sm.safetensors")
    assert (about["edits"], about["took"]) == (2, 2)
    assert about["memories"][0]["epsilon"] == {"key": 0.9}
    assert s["base"]["digest"] == base.digest
    assert s["routing"]["epsilon"] == [0.9]
    assert s["schema_version"] == "2.0"
    assert (s["dataset"]["edits"], s["dataset"]["digest"]) == (len(stream), stream.digest)


@pytest.mark.parametrize(
    ("epsilon", "shown"),
    [((0.9, 0.8), [0.8, 0.9]), ((0.8, 0.8), [0.8]), ((0.5, math.inf), [0.5, None]), ((math.inf, math.inf), [None])],
    ids=str,
)
def test_thresholds_are_shown_once_as_they_were_set(
    make: Make,
    make_side_memory: Any,
    random_delta: Any,
    stream: EditStream,
    epsilon: tuple[float, ...],
    shown: list[float | None],
    tmp_path: Path,
) -> None:
    """Also when they were read from the cache, which knows no infinity."""
    base, sm = make()
    shape = (sm.site.d_out, sm.site.d_in)
    deltas = [random_delta(shape, seed=s) for s in (1, 2)]
    prompts = [FACTS[0][0], FACTS[2][0]]
    limits = [{"key": e} for e in epsilon]
    two = make_side_memory(base.model, prompts, deltas=deltas, memory_of=[0, 1], epsilon=limits)
    for _ in range(2):
        with attach(base.model, two) as on:
            run = Evaluation(base, stream, on, options=EvalOptions(ability=False, cache=tmp_path))
            for _ in run:
                pass
        assert run.report is not None
        assert run.report.routing is not None
        assert run.report.routing["epsilon"] == shown
        assert json.loads(json.dumps(run.report.to_json(), allow_nan=False))["routing"]["epsilon"] == shown


def test_results_are_json_with_every_section(make: Make, stream: EditStream) -> None:
    base, sm = make()
    document = json.loads(json.dumps(evaluate(base, stream, sm, options=PLAIN).to_json(), allow_nan=False))
    wanted = {
        *("schema", "schema_version", "protocol", "metrics", "method", "dataset", "base", "side_memory", "environment"),
        *("seeds", "scores", "average", "open", "perplexity", "ood", "probability", "routing", "ability", "harness"),
        *("fresh", "retention", "rollbacks", "wilke", "items", "timings", "peak_memory"),
    }
    assert wanted <= set(document)
    assert document["protocol"]["name"] == "end-of-stream"
    assert document["ability"] is None


def test_progress_counts_every_stage_to_its_end(make: Make, stream: EditStream) -> None:
    base, sm = make()
    last: dict[str, Progress] = {}
    with attach(base.model, sm) as on:
        run = Evaluation(base, stream, on, options=EvalOptions(texts=TEXTS))
        for step in run:
            assert isinstance(step, Progress)
            assert step.stage not in last or step.done > last[step.stage].done
            last[step.stage] = step
    assert {"base", "base, forced", "edited", "edited, forced", "gate open", "general ability"} <= set(last)
    assert all(step.done == step.total for step in last.values())
    assert run.report is not None
    assert {"base", "edited", "general ability", "total"} <= set(run.report.sections["timings"])


def test_the_metrics_say_how_far_locality_looks() -> None:
    assert "at most 16" in METRICS["exact"]


def test_rows_come_back_in_their_order(make: Make) -> None:
    base, _ = make()
    encoder = PromptEncoder(base.tokenizer)
    rows = [encoder.pair(p, t, eos=False) for p, t in FACTS]
    each = dict(force_each(base, encoder, rows, batch_size=2))
    assert sorted(each) == [0, 1, 2, 3]
    assert [each[i] for i in range(4)] == force(base, encoder, rows, batch_size=2)
    assert all(isinstance(f, Forced) and len(f.predicted) == len(f.nll) for f in each.values())


@pytest.mark.parametrize("most", [1, 5, 8, 10**6])
def test_targets_times_vocabulary_are_bounded_in_a_batch(
    make: Make, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """A row alone may exceed the bound; the results are those of a single batch."""
    base, _ = make()
    encoder = PromptEncoder(base.tokenizer)
    rows = [encoder.pair(p, t, eos=False) for p, t in FACTS] * 2
    want = force(base, encoder, rows)
    led: list[list[int]] = []

    def note(*args: Any) -> Any:
        led.append([len(r.target) for r in args[2]])
        return old(*args)

    old = answering._led
    monkeypatch.setattr(answering, "_led", note)
    vocabulary = base.model.config.vocab_size
    monkeypatch.setattr(answering, "LOGITS", most * vocabulary + vocabulary // 2)
    got = force(base, encoder, rows)
    assert all(sum(batch) <= most or len(batch) == 1 for batch in led)
    assert sum(map(len, led)) == len(rows)
    assert sorted(n for batch in led for n in batch) == sorted(len(r.target) for r in rows)
    assert all(sum(batch) + following[0] > most for batch, following in pairwise(led))  # none is cut too early
    assert (len(led) == 1) == (most == 10**6)
    for a, b in zip(got, want, strict=True):
        assert a.predicted == b.predicted
        assert a.nll == pytest.approx(b.nll, abs=1e-4)


# -- what a checkpoint asks for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"encoder_repetition_penalty": 0.01},
        {"encoder_no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(3, 300))},
        {"begin_suppress_tokens": list(range(3, 300))},
        {"bad_words_ids": [[i] for i in range(3, 300)]},
        {"sequence_bias": [[[9], 1e4]]},
        {"forced_eos_token_id": 7},
        {"forced_bos_token_id": 7},
        {"guidance_scale": 3.0},
        {"num_beams": 3, "length_penalty": 5.0, "num_return_sequences": 2},
        {"return_dict_in_generate": True},
        {"stop_strings": ["a"]},
        {"max_time": 1e-9},
    ],
    ids=lambda s: next(iter(s)),
)
def test_a_generation_config_does_not_bend_the_answers(make: Make, settings: dict[str, Any]) -> None:
    base, _ = make()
    encoder = PromptEncoder(base.tokenizer)
    prompts = [p for p, _ in FACTS]
    want = dict(generate_answers(base, encoder, prompts, [8] * 4))
    config = base.model.generation_config
    kept = {k: getattr(config, k) for k in settings}
    try:
        config.update(**settings)
        assert dict(generate_answers(base, encoder, prompts, [8] * 4)) == want
    finally:
        for k, v in kept.items():
            setattr(config, k, v)


def test_every_setting_is_one_that_transformers_knows() -> None:
    from transformers import GenerationConfig

    assert GREEDY.keys() <= GenerationConfig().to_dict().keys()


# -- the base's context ------------------------------------------------------------------------------------------------


def _long(encoder: PromptEncoder, tokens: int) -> str:
    text = "?" * (tokens - len(encoder.prompt("").prompt))
    assert len(encoder.prompt(text)) == tokens
    return text


@pytest.mark.parametrize("where", ["prompt", "rephrase", "probe", "target", "truth", "ood"])
def test_a_question_that_does_not_fit_is_refused_before_any_is_asked(
    make: Make, encoder: PromptEncoder, asked: list[int], where: str
) -> None:
    base, sm = make("gpt2")  # positions are learned: one too many is an error
    text = _long(encoder, {"target": LIMIT - 1, "truth": LIMIT - 2}.get(where, LIMIT + 3))
    changes: dict[str, dict[str, Any]] = {
        "prompt": {"prompt": text},
        "rephrase": {"rephrases": (text,)},
        "probe": {"locality": (Probe(text),)},
        "target": {"prompt": text, "target": "what who where"},
        "truth": {"prompt": text, "truth": "what who where"},
        "ood": {"ood": (text,)},
    }
    records = [EditRecord("first", *FACTS[0]), EditRecord("second", **{"prompt": "a", "target": "b"} | changes[where])]
    with pytest.raises(InputError, match=rf"'second' has {len(encoder.prompt(text))} tokens.*{LIMIT}"):
        evaluate(base, EditStream.of(records), sm, options=PLAIN)
    assert asked == []


def test_an_edit_that_does_not_fit_is_not_measured(make: Make, encoder: PromptEncoder, asked: list[int]) -> None:
    base, sm = make()
    edits = (dataclasses.replace(sm.edits[0], prompt=_long(encoder, LIMIT + 1)), *sm.edits[1:])
    with pytest.raises(InputError, match=f"'e0' has {LIMIT + 1} tokens"):
        measure(base, dataclasses.replace(sm, edits=edits))
    assert asked == []


def test_an_answer_takes_no_more_than_the_room_left(make: Make, encoder: PromptEncoder, asked: list[int]) -> None:
    base, _ = make("gpt2")  # positions are learned: one too many is an error
    text = _long(encoder, LIMIT - 3)
    assert answer_cap(base, encoder, "e", text, None) == 3
    assert answer_cap(base, encoder, "e", "hello", "?") == len(encoder.pair("hello", "?", eos=False).target) + SLACK
    evaluate(base, EditStream.of([EditRecord("e", *FACTS[0], locality=(Probe(text),))]), options=PLAIN)
    assert asked
    assert max(asked) < 20
