"""Several side memories on one live model: by name, stacked, row by row, in threads, and off again without a trace.

`a` and `b` are deltas of one site, `c` of an earlier layer. Each knows some of four left-padded prompts; the third is
known to all. What a row answers must be what the model answers with that delta folded in, or the base's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from test_routing import GREEDY, NEW, PROMPTS, TRACED, folded, left_padded, untouched, with_epsilon
from torch import Tensor, nn
from transformers import TextIteratorStreamer

import wisecli
from wisecli.errors import BaseMismatch, InputError, RoutingError, UsageError
from wisecli.memory.side_memory import SideMemory
from wisecli.models.site import find_site
from wisecli.routing.attach import attach
from wisecli.routing.shelf import SideMemories

KNOWN = {"a": (0, 2), "b": (2, 3), "c": (1, 2)}
KINDS = ("llama", "gpt2", "gemma2")


@dataclass
class Scene:
    """A model, prompts, side memories by name, and the answers [4, T + NEW] by name, "" for the base."""

    model: Any
    ids: Tensor
    mask: Tensor
    memories: dict[str, SideMemory]
    answers: dict[str | None, Tensor]

    def generate(self, **options: Any) -> Any:
        return self.model.generate(self.ids, attention_mask=self.mask, **{**GREEDY, **options})

    def shelf(self, names: str = "abc") -> SideMemories:
        shelf = SideMemories(self.model)
        for name in names:
            shelf.load(name, self.memories[name])
        return shelf

    def expect(self, got: Tensor, names: list[str | None], per: int = 1) -> None:
        """Row i is answered by the i-th name; None is the base."""
        for i, name in enumerate(names):
            for row in got[i * per : (i + 1) * per]:
                assert torch.equal(row, self.answers[name][i]), (i, name)


@pytest.fixture(scope="module")
def build(tiny_model: Any, encoder: Any, random_delta: Any, make_side_memory: Any) -> Callable[[str], Scene]:
    done: dict[str, Scene] = {}

    def make(kind: str) -> Scene:
        if kind not in done:
            model = tiny_model(kind)
            ids, mask = left_padded(encoder)
            scene = Scene(model, ids, mask, {}, {})
            scene.answers[None] = scene.generate()
            for seed, (name, known) in zip((1, 2, 5), KNOWN.items(), strict=True):
                site = find_site(model, 1 if name == "c" else "auto")
                delta = random_delta((site.d_out, site.d_in), seed=seed)
                sm = make_side_memory(model, [PROMPTS[i] for i in known], site=site, deltas=[delta])
                scene.memories[name] = with_epsilon(sm, "key", 0.98)
                with folded(model, site, delta):
                    scene.answers[name] = scene.generate()
            for i in range(len(PROMPTS)):  # or equal tokens would prove nothing
                assert len({tuple(x[i].tolist()) for x in scene.answers.values()}) == 4
            done[kind] = scene
        return done[kind]

    return make


@pytest.fixture(params=KINDS)
def scene(request: pytest.FixtureRequest, build: Any) -> Iterator[Scene]:
    made = build(request.param)
    yield made
    assert untouched(made.model)


@pytest.fixture
def llama(build: Any) -> Iterator[Scene]:
    made = build("llama")
    yield made
    assert untouched(made.model)


# -- by name -----------------------------------------------------------------------------------------------------------

STACKS: list[tuple[tuple[str, ...], list[str | None]]] = [
    ((), [None, None, None, None]),
    (("a",), ["a", None, "a", None]),
    (("b",), [None, None, "b", "b"]),
    (("a", "b"), ["a", None, "b", "b"]),  # both claim the third: the one named last answers, and alone
    (("b", "a"), ["a", None, "a", "b"]),
    (("c",), [None, "c", "c", None]),
    (("a", "c"), ["a", "c", "c", None]),  # of two layers, in either order
    (("c", "a"), ["a", "c", "a", None]),
    (("a", "b", "c"), ["a", "c", "c", "b"]),
]


def test_what_is_used_answers_and_the_last_named_goes_first(scene: Scene) -> None:
    with scene.shelf() as shelf:
        assert shelf.last is None
        for used, want in STACKS:
            shelf.use(*used)
            assert shelf.used == used
            scene.expect(scene.generate(), want)
            assert shelf.last == tuple(want)
        shelf.use(None)
        scene.expect(scene.generate(), [None] * 4)


def test_rows_that_ask_for_nothing_are_the_base_bit_for_bit(scene: Scene) -> None:
    base = torch.stack(scene.generate(**TRACED).logits, 1)
    with scene.shelf() as shelf:
        assert torch.equal(torch.stack(scene.generate(**TRACED).logits, 1), base)  # loaded, and not used
        shelf.use("a", "b", "c")
        with shelf.requests(["a", None, None, ("a", "c")]):
            got = torch.stack(scene.generate(**TRACED).logits, 1)
    assert torch.equal(got[1:], base[1:])
    assert (got[0] - base[0]).abs().max() > 0.1


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=str)
def test_one_batch_mixes_requests(scene: Scene, options: dict[str, Any]) -> None:
    with scene.shelf() as shelf:
        shelf.use("b")  # gives way to requests, and is back afterwards
        for each, want in (
            (["a", "c", ("a", "b"), None], ["a", "c", "b", None]),
            (["b", None, ("b", "a"), "b"], [None, None, "a", "b"]),
            ([("a", "b"), "a", ("c", "b", "a"), ["c", "b"]], ["a", None, "a", "b"]),
            ([None, None, ("a", "c"), ("c", "b")], [None, None, "c", "b"]),
            ([("a", "b", "c")], ["a", "c", "c", "b"]),  # one entry for all rows
        ):
            with shelf.requests(each):
                scene.expect(scene.generate(**options), want)
                assert shelf.last == tuple(want)
        scene.expect(scene.generate(**options), STACKS[2][1])


def test_a_row_of_a_mixed_batch_is_the_row_alone(scene: Scene) -> None:
    each = [("a", "b"), "c", ("c", "b"), ("b", "a", "c")]
    with scene.shelf() as shelf:
        with shelf.requests(each):
            together = torch.stack(scene.generate(**TRACED).logits, 1)
        for i, one in enumerate(each):
            real = scene.ids[i, scene.mask[i].bool()][None]
            shelf.use(*([one] if isinstance(one, str) else one))
            alone = scene.model.generate(real, attention_mask=torch.ones_like(real), **TRACED)
            torch.testing.assert_close(together[i], torch.stack(alone.logits, 1)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 3}, {"num_beams": 2}], ids=str)
def test_rows_expand_for_beams(llama: Scene, options: dict[str, Any]) -> None:
    want: list[str | None] = ["a", None, "b", "b"]
    answers = {}
    for name in (None, "a", "b"):
        with llama.shelf() as shelf, shelf.requests([name]):
            answers[name] = llama.generate(**options)
    per = options.get("num_return_sequences", 1)
    with llama.shelf() as shelf, shelf.requests(["a", "a", ("a", "b"), "b"]):
        got = llama.generate(**options)
    for i, name in enumerate(want):
        assert torch.equal(got[i * per : (i + 1) * per], answers[name][i * per : (i + 1) * per])


def test_without_a_cache_and_in_assisted_decoding_it_is_the_same(llama: Scene) -> None:
    with llama.shelf() as shelf, shelf.requests([("a", "c")]):
        llama.expect(llama.generate(use_cache=False), ["a", "c", "c", None])
        for i, name in enumerate(["a", "c", "c", None]):
            real = llama.ids[i, llama.mask[i].bool()][None]
            got = llama.model.generate(real, attention_mask=torch.ones_like(real), **GREEDY, prompt_lookup_num_tokens=3)
            assert torch.equal(got[0, -NEW:], llama.answers[name][i, -NEW:])


def test_each_keeps_its_own_router(llama: Scene) -> None:
    """`a` by activation opens for everything, `b` stays with its keys on top of it."""
    memory = llama.memories["a"]
    wide = with_epsilon(memory, "activation", 0.0)
    with SideMemories(llama.model) as shelf:
        shelf.load("wide", wide)
        shelf.load("b", llama.memories["b"])
        shelf.use("wide", "b")
        llama.expect(llama.generate(), ["a", "a", "b", "b"])


def test_a_sequence_keeps_what_it_was_started_with(llama: Scene) -> None:
    i = 2
    real = llama.ids[i, llama.mask[i].bool()][None]
    for used in ((), ("a",), ("a", "b"), ("a", "c")):
        with llama.shelf() as shelf:
            shelf.use(*used)
            started = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
            first = llama.model.generate(real, **started)
            copied = copy.deepcopy(first.past_key_values)
            for cache, others in ((first.past_key_values, ("b",)), (copied, ())):
                shelf.use(*others)
                rest = llama.model.generate(
                    first.sequences, past_key_values=cache, max_new_tokens=NEW - 2, do_sample=False
                )
                assert torch.equal(rest[0, -NEW:], llama.answers[used[-1] if used else None][i, -NEW:])


def test_a_sequence_whose_side_memory_is_gone_is_refused(llama: Scene) -> None:
    real = llama.ids[2, llama.mask[2].bool()][None]
    with llama.shelf() as shelf:
        shelf.use("a")
        cache = llama.model(real, use_cache=True).past_key_values
        shelf.unload("a")
        with pytest.raises(RoutingError, match="no longer"):
            llama.model(torch.tensor([[9]]), past_key_values=cache)
    foreign = llama.model(real, use_cache=True).past_key_values
    with llama.shelf() as shelf:
        llama.model(torch.tensor([[9]]), past_key_values=foreign)  # nothing is asked of it
        shelf.use("a")
        with pytest.raises(RoutingError, match="before the side memory"):
            llama.model(torch.tensor([[9]]), past_key_values=foreign)


# -- loading and unloading ---------------------------------------------------------------------------------------------


def hooks_of(model: nn.Module) -> list[Any]:
    """All that hooks and attributes a model and its modules have, in order."""
    names = [n for n in vars(nn.Module()) if "hooks" in n]
    return [(name, {n: dict(getattr(m, n)) for n in names}, list(vars(m))) for name, m in model.named_modules()]


@pytest.mark.parametrize("how", ["exit", "unload", "detach", "error in the block", "error in generate"])
def test_taking_them_off_leaves_the_model_as_it_was(scene: Scene, how: str) -> None:
    model = scene.model
    mine = model.lm_head.register_forward_hook(lambda *a: None)  # someone else's hook stays
    before, attributes = hooks_of(model), {k: id(v) for k, v in vars(model).items()}
    base = torch.stack(scene.generate(**TRACED).logits, 1)
    try:
        shelf = scene.shelf()
        shelf.use("a", "b", "c")
        scene.generate()
        assert hooks_of(model) != before
        if how == "exit":
            with shelf:
                pass
        elif how == "unload":
            for name in "bca":
                shelf.unload(name)
        elif how == "detach":
            shelf.detach()
            shelf.detach()
        else:
            fails = model.lm_head.register_forward_hook(lambda *a: 1 / 0)
            with pytest.raises(ZeroDivisionError), shelf, shelf.requests(["a"]):
                scene.generate() if how.endswith("generate") else 1 / 0
            fails.remove()
        assert shelf.names == shelf.used == ()
        assert hooks_of(model) == before
        assert {k: id(v) for k, v in vars(model).items()} == attributes
        assert torch.equal(torch.stack(scene.generate(**TRACED).logits, 1), base)
    finally:
        mine.remove()


def test_switching_at_run_time(llama: Scene, tmp_path: Any) -> None:
    llama.memories["b"].save(tmp_path / "b.safetensors")
    with wisecli.SideMemories(llama.model) as shelf:
        shelf.load("a", llama.memories["a"])
        shelf.use("a")
        llama.expect(llama.generate(), STACKS[1][1])
        shelf.load("b", tmp_path / "b.safetensors")
        llama.expect(llama.generate(), STACKS[1][1])  # loading alone changes nothing
        shelf.use("a", "b")
        llama.expect(llama.generate(), STACKS[3][1])
        shelf.unload("b")
        assert shelf.used == ("a",)
        llama.expect(llama.generate(), STACKS[1][1])
        shelf.unload("a")
        assert untouched(llama.model)
        shelf.load("a", llama.memories["b"])  # the name is free again
        shelf.use("a")
        llama.expect(llama.generate(), STACKS[2][1])
        assert shelf["a"] is llama.memories["b"]


def test_beside_an_attachment_or_another_shelf_nothing_can_be_loaded(llama: Scene) -> None:
    """Two that know nothing of each other could both answer a row."""
    a, b = llama.memories["a"], llama.memories["b"]
    shelf = SideMemories(llama.model)  # empty, it is not on the model yet
    with wisecli.attach(llama.model, a):
        for load in (lambda: shelf.load("b", b), lambda: SideMemories(llama.model)):
            with pytest.raises(UsageError, match="already"):
                load()
        with pytest.raises(UsageError, match="already"), shelf.requests([None]):
            pass
        assert shelf.names == ()
        llama.expect(llama.generate(), STACKS[1][1])
    shelf.load("b", b)
    shelf.use("b")
    for other in (lambda: wisecli.attach(llama.model, a), lambda: SideMemories(llama.model).load("a", a)):
        with pytest.raises(UsageError, match="already"):
            other()
        llama.expect(llama.generate(), STACKS[2][1])
    shelf.detach()
    assert untouched(llama.model)


def test_a_copy_of_the_model_is_the_plain_base(llama: Scene) -> None:
    with llama.shelf() as shelf:
        shelf.use("a", "c")
        twin = copy.deepcopy(llama.model)
        assert untouched(twin)
        llama.expect(twin.generate(llama.ids, attention_mask=llama.mask, **GREEDY), [None] * 4)
        assert shelf.last is None
        llama.expect(llama.generate(), STACKS[6][1])


@pytest.mark.parametrize(
    ("wrong", "kind", "match"),
    [
        (lambda s, m: s.load("a", m), UsageError, "already loaded"),
        (lambda s, m: s.load("", m), UsageError, "no name"),
        (lambda s, m: s.load("d", "missing.safetensors"), InputError, "does not exist"),
        (lambda s, m: s.load("d", m, router="nonsense"), UsageError, "nonsense"),
        (lambda s, m: s.use("d"), UsageError, "'d'"),
        (lambda s, m: s.use("a", None), UsageError, "None stands alone|None"),
        (lambda s, m: s.use("a", "a"), UsageError, "twice"),
        (lambda s, m: s.unload("d"), UsageError, "'d'"),
        (lambda s, m: s["d"], UsageError, "'d'"),
        (lambda s, m: s.requests("a").__enter__(), UsageError, "no list"),
        (lambda s, m: s.requests([]).__enter__(), UsageError, "no list"),
        (lambda s, m: s.requests(["a", "d"]).__enter__(), UsageError, "'d'"),
        (lambda s, m: s.requests([("b", "b")]).__enter__(), UsageError, "twice"),
    ],
)
def test_what_is_wrong_is_refused_and_changes_nothing(llama: Scene, wrong: Any, kind: Any, match: str) -> None:
    with llama.shelf("ab") as shelf:
        shelf.use("a")
        with pytest.raises(kind, match=match) as e:
            wrong(shelf, llama.memories["a"])
        assert e.value.hint
        assert (shelf.names, shelf.used) == (("a", "b"), ("a",))
        llama.expect(llama.generate(), STACKS[1][1])


def test_another_base_and_other_rows_are_refused(llama: Scene, tiny_model: Any) -> None:
    other = SideMemories(tiny_model("llama", seed=7))
    with pytest.raises(BaseMismatch):
        other.load("a", llama.memories["a"])
    assert untouched(other.model)
    with llama.shelf() as shelf:
        with shelf.requests(["a"] * 3), pytest.raises(RoutingError, match="3 requests"):
            llama.generate()
        with shelf.requests(["a"]):
            shelf.unload("a")
            with pytest.raises(RoutingError, match="unloaded"):
                llama.generate()


# -- threads -----------------------------------------------------------------------------------------------------------


def test_threads_that_generate_at_once_each_get_their_own(scene: Scene) -> None:
    with scene.shelf() as shelf, ThreadPoolExecutor(4) as pool:
        shelf.use("b")
        together = Barrier(4)
        requests: list[Any] = [["a"], [None], [("a", "c")], None]
        want = [STACKS[1][1], [None] * 4, STACKS[6][1], STACKS[2][1]]

        def one(i: int) -> Tensor:
            together.wait(60)
            if requests[i] is None:
                return scene.generate()
            with shelf.requests(requests[i]):
                return scene.generate()

        for _ in range(2):  # the pool's threads are used again: nothing is left in them
            for got, names in zip(pool.map(one, range(4)), want, strict=True):
                scene.expect(got, names)


def stream(scene: Scene, tokenizer: Any, i: int, generate: Callable[..., Any]) -> str:
    real = scene.ids[i, scene.mask[i].bool()][None]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=generate, args=(real,), kwargs={**GREEDY, "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    return text


def test_a_stream_gets_its_routes_through_bind_and_only_so(llama: Scene, tokenizer: Any) -> None:
    i = 2
    texts = {name: tokenizer.decode(x[i, llama.ids.shape[1] :]) for name, x in llama.answers.items()}
    with llama.shelf() as shelf:
        shelf.use("b")
        with shelf.requests(["a"]):
            carried = shelf.bind(llama.model.generate)
            assert stream(llama, tokenizer, i, carried) == texts["a"]
            assert stream(llama, tokenizer, i, llama.model.generate) == texts["b"]  # a bare thread knows no block
        assert stream(llama, tokenizer, i, carried) == texts["a"]  # it stays with what it was bound to
        assert stream(llama, tokenizer, i, llama.model.generate) == texts["b"]
    with attach(llama.model, llama.memories["a"]) as on:
        with on.override(None):
            carried = on.bind(llama.model.generate)
        with ThreadPoolExecutor(2) as pool:  # at the same time, one bound and one not
            both = pool.map(lambda g: stream(llama, tokenizer, i, g), (carried, llama.model.generate))
            assert list(both) == [texts[None], texts["a"]]
