"""lm-evaluation-harness on a routed model: one route per context, and where nothing is routed, lm_eval bit for bit."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from wisecli.errors import InputError, RoutingError, UsageError
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base
from wisecli.models.prompts import Row
from wisecli.routing.attach import attach

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed (pip install 'wisecli[harness]')"
)

DOCS = (
    ("the capital of France is", (" Paris", " hello world who", " what")),
    ("hello", (" world", " the capital of", " who where")),
    ("who what where", (" when", " Paris hello", " is is is")),
    ("when the world is what", (" what", " hello the", " of")),
    ("Paris is where", (" France", " the world the world", " who")),
)
LONG = "the capital of France is Paris what who where when hello world " * 6
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
fewshot_split: test
output_type: {kind}
doc_to_text: '{text}'
doc_to_target: {target}
target_delimiter: ''
metadata: {{version: 3}}
"""
CHOICE = "doc_to_choice: '{{choices}}'\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
GENERATE = """generation_kwargs: {until: [zzz], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLL = "metric_list: [{metric: word_perplexity}]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks a user might have: a choice, a generation and a perplexity task, and a group of the first two."""
    path = tmp_path_factory.mktemp("tasks")
    rows = [{"q": q, "choices": list(c), "gold": i % 3} for i, (q, c) in enumerate(DOCS)]
    data = path / "docs.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    common = {"data": data, "cache": path / "cache"}
    tasks = {
        "tiny_choice": TASK.format(kind="multiple_choice", text="{{q}}", target="gold", name="tiny_choice", **common)
        + CHOICE,
        "tiny_answer": TASK.format(
            kind="generate_until", text="{{q}}", target="'{{choices[0]}}'", name="tiny_answer", **common
        )
        + GENERATE,
        "tiny_text": TASK.format(
            kind="loglikelihood_rolling",
            text="",
            target="'{{q}}{{choices[1]}}'",
            name="tiny_text",
            **common,
        )
        + ROLL,
        "tiny_group": "group: tiny_group\ntask: [tiny_choice, tiny_answer]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n",
    }
    for name, text in tasks.items():
        (path / f"{name}.yaml").write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(tiny_model: Any, tokenizer: Any) -> Base:
    return Base(tiny_model("llama"), tokenizer, "tiny")


@pytest.fixture(scope="module", params=["activation", "key"])
def sm(request: pytest.FixtureRequest, base: Base, make_side_memory: Any, encoder: Any) -> SideMemory:
    """A side memory that some of the contexts pass to and some do not."""
    known = [DOCS[0][0], DOCS[2][0]]
    made = make_side_memory(base.model, known, router=request.param, epsilon=[{request.param: 0.0}])
    return amid(base, made, encoder)


@pytest.fixture(scope="module")
def by_activation(base: Base, make_side_memory: Any, encoder: Any) -> SideMemory:
    made = make_side_memory(base.model, [DOCS[0][0]], router="activation", epsilon=[{"activation": 0.0}])
    return amid(base, made, encoder)


def amid(base: Base, sm: SideMemory, encoder: Any) -> SideMemory:
    """The side memory with its threshold amid the indicators of the contexts."""
    with attach(base.model, sm) as on:
        found = sorted(on.decide(encoder.batch([encoder.prompt(q)]))[0].indicator for q, _ in DOCS)
    return with_epsilon(sm, (found[-2] + found[-3]) / 2)


def with_epsilon(sm: SideMemory, epsilon: float) -> SideMemory:
    memories = tuple(dataclasses.replace(m, epsilon={sm.router: epsilon}) for m in sm.memories)
    return dataclasses.replace(sm, memories=memories)


@pytest.fixture
def make_lm(base: Base) -> Callable[..., Any]:
    """`make_lm(attached_or_none, batch_size=3, ...)`: lm_eval's own model where `plain=True`."""

    def make(attached: Any = None, *, plain: bool = False, **options: Any) -> Any:
        from lm_eval.models.huggingface import HFLM

        from wisecli.harness import WiseLM

        options = {"tokenizer": base.tokenizer, "batch_size": 3, "max_length": 128} | options
        return HFLM(base.model, **options) if plain else WiseLM(base.model, attached, **options)

    return make


def instances(kind: str, asked: Sequence[tuple[Any, ...]], task: str = "t") -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, a, i, metadata=(task, i, 1)) for i, a in enumerate(asked)]


def choices(docs: Sequence[tuple[str, Sequence[str]]] = DOCS) -> list[Any]:
    return instances("loglikelihood", [(q, c) for q, options in docs for c in options])


def texts(given: Sequence[str]) -> list[Any]:
    return instances("loglikelihood_rolling", [(t,) for t in given])


def prompts(given: Sequence[str] = tuple(q for q, _ in DOCS)) -> list[Any]:
    return instances("generate_until", [(q, {"until": ["zzz"], "max_gen_toks": 6, "do_sample": False}) for q in given])


def oracle(on: Any, lm: Any, context: str, answer: str, route: int | None) -> float:
    """Log-likelihood of an answer: one row, one forward, no padding, the route set by hand."""
    start, answered = lm._encode_pair(context, answer)
    ids = torch.tensor([start + answered])
    with torch.no_grad(), on.override([route]):
        logits = on.model(ids[:, :-1], use_cache=False).logits[0, len(start) - 1 :]
    return float(F.log_softmax(logits, -1).gather(1, torch.tensor(answered)[:, None]).sum())


def ids_of(lm: Any, context: str, answer: str) -> tuple[int, ...]:
    start, answered = lm._encode_pair(context, answer)
    return (*start, *answered)


def route_of(on: Any, encoder: Any, context: str) -> int | None:
    return on.decide(encoder.batch([encoder.prompt(context)]))[0].memory


# -- nothing routed: lm_eval itself ------------------------------------------------------------------------------------


@needs_lm_eval
@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("state", ["nothing attached", "all main", "closed"])
def test_without_a_route_every_answer_is_lm_evals_bit_for_bit(
    base: Base, sm: SideMemory, make_lm: Any, batch_size: int, state: str
) -> None:
    plain = make_lm(plain=True, batch_size=batch_size, max_length=48)
    wanted = plain.loglikelihood(choices()), plain.loglikelihood_rolling(texts([LONG, "hello"]))
    generated = plain.generate_until(prompts())
    on = (
        None if state == "nothing attached" else attach(base.model, with_epsilon(sm, 1e9 if state == "all main" else 0))
    )
    try:
        lm = make_lm(on, batch_size=batch_size, max_length=48)
        lm.closed = state == "closed"
        assert (lm.loglikelihood(choices()), lm.loglikelihood_rolling(texts([LONG, "hello"]))) == wanted
        assert lm.generate_until(prompts()) == generated
    finally:
        if on is not None:
            on.detach()


# -- some routed -------------------------------------------------------------------------------------------------------


@needs_lm_eval
@pytest.mark.parametrize("logits_cache", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_one_route_per_context_in_any_batch(
    base: Base, sm: SideMemory, make_lm: Any, encoder: Any, batch_size: int, logits_cache: bool
) -> None:
    options = {"batch_size": batch_size, "logits_cache": logits_cache}
    plain = [score for score, _ in make_lm(plain=True, **options).loglikelihood(choices())]
    with attach(base.model, sm) as on:
        routes = {q: route_of(on, encoder, q) for q, _ in DOCS}
        assert set(routes.values()) == {0, None}
        lm = make_lm(on, **options)
        got = [score for score, _ in lm.loglikelihood(choices())]
        assert lm.routes == {"t": routes}
        for r, score, before in zip(choices(), got, plain, strict=True):
            context, answer = r.args
            assert score == pytest.approx(oracle(on, lm, context, answer, routes[context]), abs=1e-4)
            assert (score == before) is (routes[context] is None), (
                "main memory answers bit for bit, a side memory does not"
            )


@needs_lm_eval
def test_inside_lm_evals_own_model_answers_take_part(
    base: Base, make_side_memory: Any, make_lm: Any, encoder: Any
) -> None:
    """What WiseLM is for: the same side memory inside plain HFLM decides by the end of each answer."""
    known = make_side_memory(base.model, [q for q, _ in DOCS], epsilon=[{"key": 0.999}])
    with attach(base.model, known) as on:
        lm = make_lm(plain=True)
        got = [score for score, _ in lm.loglikelihood(choices())]
        assert {route_of(on, encoder, q) for q, _ in DOCS} == {0}
        wanted = [oracle(on, lm, *r.args, 0) for r in choices()]
        kept = [score for score, _ in make_lm(on).loglikelihood(choices())]
    assert kept == pytest.approx(wanted, abs=1e-4)
    assert any(abs(a - b) > 1e-2 for a, b in zip(got, wanted, strict=True))


@needs_lm_eval
def test_the_route_is_the_one_of_a_padded_forward_told_the_prompt_lengths(
    base: Base, sm: SideMemory, make_lm: Any, encoder: Any
) -> None:
    with attach(base.model, sm) as on:
        lm = make_lm(on)
        lm.loglikelihood(choices())
        rows = [ids_of(lm, *r.args) for r in choices()]
        lengths = [len(lm._encode_pair(*r.args)[0]) for r in choices()]
        padded = encoder.batch(
            [Row(r) for r in rows], side="right"
        ).input_ids  # no mask: padding is a token like others
        with torch.no_grad(), on.prompt_lengths(lengths):
            base.model(padded, use_cache=False)
        told = [None if m < 0 else m for m in on.last.memory.tolist()]
        assert told == [lm.routes["t"][r.args[0]] for r in choices()]


@needs_lm_eval
def test_the_same_tokens_split_at_two_places_follow_their_own_contexts(
    base: Base, sm: SideMemory, make_lm: Any, encoder: Any
) -> None:
    """lm_eval scores equal rows once, whatever part of them is the context."""
    words = " ".join(q for q, _ in DOCS).split()
    with attach(base.model, sm) as on:
        lm = make_lm(on)
        heads = [" ".join(words[: i + 1]) for i in range(len(words) - 1)]
        routes = {h: route_of(on, encoder, h) for h in heads}
        assert set(routes.values()) == {0, None}
        asked = [(h, " " + " ".join(words[i + 1 :])) for i, h in enumerate(heads)]
        one_row = {ids_of(lm, *a) for a in asked}
        assert len(one_row) == 1
        got = dict(zip(heads, lm.loglikelihood(instances("loglikelihood", asked)), strict=True))
        for route in (0, None):
            these = [a for a in asked if routes[a[0]] == route]
            with on.override([route]):
                wanted = make_lm(plain=True).loglikelihood(instances("loglikelihood", these))
            assert [got[h] for h, _ in these] == wanted
        each = make_lm(on, logits_cache=False).loglikelihood(instances("loglikelihood", asked))
        for (context, answer), (score, _) in zip(asked, each, strict=True):
            assert score == pytest.approx(oracle(on, lm, context, answer, routes[context]), abs=1e-3)


@needs_lm_eval
def test_rows_that_end_like_padding_are_not_mistaken(base: Base, sm: SideMemory, make_lm: Any, encoder: Any) -> None:
    """Padding is token 0; a context may hold that token too."""
    asked = [(q + end, " who where when") for q, _ in DOCS for end in ("", "<pad>", "<pad><pad>")]
    asked += [(q, "<pad><pad> who") for q, _ in DOCS]
    with attach(base.model, sm) as on:
        lm = make_lm(on, batch_size=8)
        got = lm.loglikelihood(instances("loglikelihood", asked))
        for (context, answer), (score, _) in zip(asked, got, strict=True):
            route = route_of(on, encoder, context)
            assert score == pytest.approx(oracle(on, lm, context, answer, route), abs=1e-4)


@needs_lm_eval
def test_a_context_cut_to_fit_is_decided_once_for_all_its_answers(
    base: Base, sm: SideMemory, make_lm: Any, encoder: Any
) -> None:
    answers = (" Paris", " hello world who where when the capital of France is", " what")
    with attach(base.model, sm) as on:
        lm = make_lm(on, max_length=24, logits_cache=False)
        ids = lm.tok_encode(LONG.strip())[-24:]
        route = on.decide(encoder.batch([Row(tuple(ids))]))[0].memory
        seen: list[Any] = []
        real = on.override
        on.override = lambda routes: seen.extend(routes or []) or real(routes)
        lm.loglikelihood(instances("loglikelihood", [(LONG.strip(), a) for a in answers]))
    assert seen == [route] * 3


@needs_lm_eval
@pytest.mark.parametrize("batch_size", [1, 3])
def test_all_windows_of_a_text_follow_its_beginning(
    base: Base, sm: SideMemory, make_lm: Any, encoder: Any, batch_size: int
) -> None:
    given = [LONG, "Paris is where", LONG.replace("hello", "who"), "hello", LONG]
    with attach(base.model, sm) as on:
        lm = make_lm(on, max_length=40, batch_size=batch_size)
        got = lm.loglikelihood_rolling(texts(given))
        single = make_lm(on, max_length=40, batch_size=1)
        for text, score in zip(given, got, strict=True):
            route = on.decide(encoder.batch([Row(tuple(lm.tok_encode(text)[:40]))]))[0].memory
            assert lm.routes["t"][text] == route
            single.closed = True
            single._override = functools.partial(lambda _, r: on.override([r]), r=route)
            assert score == pytest.approx(single.loglikelihood_rolling(texts([text]))[0], rel=1e-4)


@needs_lm_eval
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_generations_are_those_of_the_attached_model(
    base: Base, sm: SideMemory, make_lm: Any, encoder: Any, batch_size: int
) -> None:
    plain = make_lm(plain=True, batch_size=batch_size).generate_until(prompts())
    with attach(base.model, sm) as on:
        lm = make_lm(on, batch_size=batch_size)
        got = lm.generate_until(prompts())
        for (q, _), text, before in zip(DOCS, got, plain, strict=True):
            ids = torch.tensor([encoder.prompt(q).prompt])
            out = base.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
            assert text == base.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            assert lm.routes["t"][q] == route_of(on, encoder, q)
            assert (text == before) or lm.routes["t"][q] is not None
        assert got != plain


@needs_lm_eval
def test_automatic_batch_sizes_keep_the_routes(base: Base, sm: SideMemory, make_lm: Any, encoder: Any) -> None:
    with attach(base.model, sm) as on:
        lm = make_lm(on, batch_size="auto", max_batch_size=4, max_length=48)
        got = lm.loglikelihood(choices())
        for r, (score, _) in zip(choices(), got, strict=True):
            assert score == pytest.approx(oracle(on, lm, *r.args, route_of(on, encoder, r.args[0])), abs=1e-4)


@needs_lm_eval
def test_an_unknown_order_of_rows_is_refused(base: Base, sm: SideMemory, make_lm: Any) -> None:
    with attach(base.model, sm) as on:
        lm = make_lm(on)
        lm._queue = iter([((1, 2, 3), 0), ((1, 2), None)])
        with pytest.raises(RoutingError, match="order"):
            lm._model_call(torch.tensor([[1, 2, 3], [1, 4, 0]]))


# -- as lm_eval's model ------------------------------------------------------------------------------------------------


@needs_lm_eval
def test_wise_is_a_model_of_lm_eval(
    tiny_model_dir: Path, make_side_memory: Any, tokenizer: Any, tmp_path: Path
) -> None:
    from lm_eval.api.registry import get_model
    from transformers import AutoModelForCausalLM

    from wisecli.harness import WiseLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    side = make_side_memory(model, [DOCS[0][0]], router="activation", epsilon=[{"activation": 0.0}])
    side.save(tmp_path / "sm.safetensors")
    assert get_model("wise") is WiseLM
    found = importlib.metadata.EntryPoint("wise", "wisecli.harness:WiseLM", "lm_eval.models")
    assert found.load() is WiseLM
    arguments = f"pretrained={tiny_model_dir},side_memory={tmp_path / 'sm.safetensors'},dtype=float32"
    lm = WiseLM.create_from_arg_string(arguments, {"batch_size": 2, "device": "cpu"})
    lm.loglikelihood(choices())
    assert set(lm.routes["t"].values()) == {0}
    other = attach(model, side)
    with pytest.raises(UsageError, match="another model"):
        WiseLM(lm.model, other, tokenizer=tokenizer)


# -- run_harness -------------------------------------------------------------------------------------------------------


@pytest.fixture
def only_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm_eval without its thousands of tasks, which take seconds to list."""
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))


@needs_lm_eval
@pytest.mark.usefixtures("only_ours")
def test_before_and_after_on_tasks_of_ones_own(
    base: Base, by_activation: SideMemory, encoder: Any, folder: Path
) -> None:
    from wisecli.harness import run_harness

    seen: list[tuple[str, int, int]] = []
    names = ["tiny_group", "tiny_text"]
    pad = base.tokenizer.pad_token
    got = run_harness(base, by_activation, names, batch_size=3, include=folder, progress=lambda *a: seen.append(a))
    alone = run_harness(base, None, names, batch_size=3, include=folder)
    open_ = run_harness(base, with_epsilon(by_activation, 1e9), names, batch_size=3, include=folder)
    json.dumps(got, allow_nan=False)
    assert set(got["tasks"]) == {"tiny_group", "tiny_choice", "tiny_answer", "tiny_text"}
    assert set(got["tasks"]["tiny_choice"]) == {"acc", "acc_norm"}
    for task, metrics in got["tasks"].items():
        for metric, figures in metrics.items():
            assert alone["tasks"][task][metric] == {"before": figures["before"], "after": None}
            assert open_["tasks"][task][metric] == {"before": figures["before"], "after": figures["before"]}
    always = run_harness(base, with_epsilon(by_activation, 0), ["tiny_text"], batch_size=3, include=folder)
    figures = always["tasks"]["tiny_text"]["word_perplexity"]
    assert always["routed"] == {"tiny_text": 1.0}
    assert figures["before"] == got["tasks"]["tiny_text"]["word_perplexity"]["before"] != figures["after"]
    with attach(base.model, by_activation) as on:
        share = sum(route_of(on, encoder, q) is not None for q, _ in DOCS) / len(DOCS)
    assert got["routed"]["tiny_choice"] == got["routed"]["tiny_answer"] == got["routed"]["tiny_group"] == share
    assert set(open_["routed"].values()) == {0.0}
    assert set(alone["routed"].values()) == {None}
    assert got["samples"] == {"tiny_choice": 5, "tiny_answer": 5, "tiny_group": 10, "tiny_text": 5}
    assert got["contexts"] == {"tiny_choice": 5, "tiny_answer": 5, "tiny_group": 10, "tiny_text": 5}
    assert got["task_versions"]["tiny_choice"] == 3
    assert got["higher_is_better"]["tiny_text"] == {"word_perplexity": False}
    assert got["lm_eval"]
    assert {what.split(":")[0] for what, _, _ in seen} == {"before", "after"}
    assert ("after", 15, 15) in seen
    assert base.tokenizer.pad_token == pad
    assert "generate" not in vars(base.model), "detached again"


@needs_lm_eval
@pytest.mark.usefixtures("only_ours")
def test_limits_and_few_shot_examples_reach_lm_eval(base: Base, by_activation: SideMemory, folder: Path) -> None:
    from wisecli.harness import run_harness

    with attach(base.model, by_activation) as on:
        got = run_harness(base, on, ["tiny_ch*"], limit=2, num_fewshot=1, batch_size=2, include=folder)
    assert got["samples"] == {"tiny_choice": 2}
    assert got["fewshot"] == {"tiny_choice": 1}
    assert (got["limit"], got["num_fewshot"], got["batch_size"]) == (2, 1, 2)


@needs_lm_eval
@pytest.mark.usefixtures("only_ours")
def test_a_task_asked_for_alone_and_in_its_group_counts_once(base: Base, folder: Path) -> None:
    from wisecli.harness import run_harness

    got = run_harness(base, None, ["tiny_group", "tiny_choice"], include=folder)
    assert got["samples"] == {"tiny_group": 10, "tiny_choice": 5, "tiny_answer": 5}
    assert got["tasks"]["tiny_group"]["acc"] == got["tasks"]["tiny_choice"]["acc"]


@needs_lm_eval
@pytest.mark.usefixtures("only_ours")
def test_an_unknown_task_gets_names_close_to_it(base: Base, folder: Path) -> None:
    from wisecli.harness import run_harness

    with pytest.raises(InputError, match="'qqqq', 'tiny_choise'") as e:
        run_harness(base, None, ["qqqq", "tiny_choise", "tiny_text"], include=folder)
    assert "tiny_choice" in str(e.value.hint)
    with pytest.raises(InputError) as e:
        run_harness(base, None, ["qqqq"], include=folder)
    assert "lm_eval ls tasks" in str(e.value.hint)


@needs_lm_eval
@pytest.mark.usefixtures("only_ours")
def test_what_cannot_be_asked_is_an_input_error(base: Base, folder: Path, tmp_path: Path) -> None:
    from wisecli.harness import run_harness

    ours = (folder / "tiny_choice.yaml").read_text(encoding="utf-8")
    definitions = {
        "absent": ours.replace("dataset_path: json", "dataset_path: nobody/no-such-data").replace(
            "dataset_kwargs", "#"
        ),
        "broken": ours.replace("docs.jsonl", "gone.jsonl"),
        "endless": (folder / "tiny_answer.yaml").read_text(encoding="utf-8").replace("toks: 6", "toks: 4000"),
    }
    for name, text in definitions.items():
        (tmp_path / f"{name}.yaml").write_text(text.replace("task: tiny", f"task: {name} #"), encoding="utf-8")
    for name in ("absent", "broken"):
        with pytest.raises(InputError, match=f"The task {name} cannot be loaded"):
            run_harness(base, None, [name], include=tmp_path)
    with pytest.raises(InputError, match="cannot ask endless of this base"):
        run_harness(base, None, ["endless"], include=tmp_path)
    with pytest.raises(InputError, match="no folder of tasks"):
        run_harness(base, None, ["absent"], include=tmp_path / "gone")
    with pytest.raises(UsageError, match="No tasks"):
        run_harness(base, None, [], include=tmp_path)


def test_without_lm_eval_it_can_be_imported_and_says_what_is_missing() -> None:
    code = """
import sys
sys.modules["lm_eval"] = None
from wisecli.errors import InputError
from wisecli.harness import WiseLM, run_harness
for use in (lambda: run_harness(None, None, ["arc_easy"]), WiseLM):
    try:
        use()
    except InputError as e:
        print(e.hint)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["pip install 'wisecli[harness]'"] * 2
