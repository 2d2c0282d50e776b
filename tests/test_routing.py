"""A side memory on a live model, against the same model with the delta folded into its weight.

Each scene is one architecture and one router with a threshold that sends two of four left-padded prompts to the side
memory. What is routed must equal the folded model, what is not must equal the base bit for bit, however it is called.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from conftest import KINDS
from torch import Tensor, nn
from transformers import GenerationConfig, TextIteratorStreamer, pipeline

from wisecli.errors import BaseMismatch, InputError, RoutingError, UsageError, WiseError
from wisecli.memory.indicator import activation_indicator
from wisecli.memory.side_memory import SideMemory
from wisecli.models.site import EditSite, find_site
from wisecli.models.upper import UpperModel
from wisecli.routing.attach import Attached, attach
from wisecli.routing.routers import MAIN, ROUTERS, ActivationRouter, Routes, Seen, build_router
from wisecli.routing.shelf import SideMemories

PROMPTS = ["the capital of France is", "hello", "what who where world", "Paris?"]
NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
TRACED = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}


@contextlib.contextmanager
def folded(model: Any, site: EditSite, delta: Tensor) -> Iterator[None]:
    """The delta added to the weight itself; the weight's bytes are put back, as subtracting would not."""
    weight = site.module(model).weight
    kept = weight.detach().clone()
    weight.data += (delta.T if site.conv1d else delta).to(weight.dtype)
    try:
        yield
    finally:
        weight.data.copy_(kept)


@dataclass
class Scene:
    """A model, its side memory, four prompts as ids [4, T] and mask [4, T], and which of them are routed [4]."""

    model: Any
    site: EditSite
    delta: Tensor
    memory: SideMemory
    ids: Tensor
    mask: Tensor
    routed: Tensor

    def generate(self, **options: Any) -> Any:
        return self.model.generate(self.ids, attention_mask=self.mask, **{**GREEDY, **options})

    def alone(self, i: int) -> dict[str, Tensor]:
        """Row i without padding."""
        ids = self.ids[i, self.mask[i].bool()][None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def references(self, call: Callable[[], Any]) -> tuple[Any, Any]:
        """What the base gives, and what it gives with the delta folded in."""
        base = call()
        with folded(self.model, self.site, self.delta):
            return base, call()

    @contextlib.contextmanager
    def attached(self) -> Iterator[tuple[Attached, list[Routes]]]:
        """Attach, and note every decision that is taken."""
        with attach(self.model, self.memory) as on:
            seen: list[Routes] = []
            decide = on.router.decide
            on.router.decide = lambda prompts: (seen.append(decide(prompts)), seen[-1])[1]
            yield on, seen

    def expect(self, got: Tensor, base: Tensor, side: Tensor, per: int = 1) -> None:
        """Rows of integers: routed ones equal the folded model's, the others the base's; `per` rows per prompt."""
        routed = self.routed.repeat_interleave(per)
        assert torch.equal(got[routed], side[routed])
        assert torch.equal(got[~routed], base[~routed])


def threshold(scores: Tensor) -> float:
    """Between the second and the third largest."""
    top = scores.sort(descending=True).values
    assert top[1] - top[2] > 1e-3 * top[1].abs()  # a clear case, or the tests would hang on rounding
    return float(top[1] + top[2]) / 2


def with_epsilon(sm: SideMemory, name: str, *epsilon: float) -> SideMemory:
    memories = [dataclasses.replace(m, epsilon={name: e}) for m, e in zip(sm.memories, epsilon, strict=True)]
    return dataclasses.replace(sm, memories=tuple(memories), router=name)


def left_padded(encoder: Any) -> tuple[Tensor, Tensor]:
    batch = encoder.batch([encoder.prompt(p) for p in PROMPTS])
    assert len(set(batch.attention_mask.sum(1).tolist())) == len(PROMPTS)
    return batch.input_ids, batch.attention_mask


@pytest.fixture(scope="module")
def build_scene(tiny_model: Any, encoder: Any, random_delta: Any, make_side_memory: Any) -> Callable[..., Scene]:
    done: dict[tuple[str, str], Scene] = {}

    def build(kind: str, router: str) -> Scene:
        if (kind, router) not in done:
            model = tiny_model(kind)
            site = find_site(model)
            delta = random_delta((site.d_out, site.d_in))
            ids, mask = left_padded(encoder)
            known = [PROMPTS[0], PROMPTS[2]]
            sm = with_epsilon(make_side_memory(model, known, site=site, deltas=[delta]), router, 0.0)
            with attach(model, sm) as on:
                model.generate(ids, attention_mask=mask, max_new_tokens=1)
                scores = on.last.indicator
            epsilon = threshold(scores)
            sm = with_epsilon(sm, router, epsilon)
            base = model.generate(ids, attention_mask=mask, **GREEDY)
            with folded(model, site, delta):
                side = model.generate(ids, attention_mask=mask, **GREEDY)
            assert (base != side).any(1).all()  # or equal tokens would prove nothing
            done[kind, router] = Scene(model, site, delta, sm, ids, mask, scores > epsilon)
        return done[kind, router]

    return build


@pytest.fixture(params=[(k, r) for k in KINDS for r in ROUTERS], ids=lambda p: "-".join(p))
def scene(request: pytest.FixtureRequest, build_scene: Any) -> Iterator[Scene]:
    made = build_scene(*request.param)
    yield made
    assert untouched(made.model)


@pytest.fixture(params=[(k, ROUTERS[i % 2]) for i, k in enumerate(KINDS)], ids=lambda p: "-".join(p))
def either(request: pytest.FixtureRequest, build_scene: Any) -> Iterator[Scene]:
    """Every kind with one of the routers in turn, for what has nothing to do with how a route is found."""
    made = build_scene(*request.param)
    yield made
    assert untouched(made.model)


@pytest.fixture(params=ROUTERS)
def llama(request: pytest.FixtureRequest, build_scene: Any) -> Iterator[Scene]:
    made = build_scene("llama", request.param)
    yield made
    assert untouched(made.model)


def untouched(model: nn.Module) -> bool:
    return not {"generate", "__deepcopy__"} & model.__dict__.keys() and not any(
        m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_always_called for m in model.modules()
    )


# -- what an answer is -------------------------------------------------------------------------------------------------


def test_routed_rows_are_the_folded_model_and_the_others_the_base_bit_for_bit(scene: Scene) -> None:
    base, side = scene.references(lambda: scene.generate(**TRACED))
    with scene.attached() as (on, seen):
        got = scene.generate(**TRACED)
    assert len(seen) == 1  # one decision per generate
    assert on.last is seen[0]
    assert scene.routed.sum() == 2
    assert (seen[0].memory != MAIN).tolist() == scene.routed.tolist()
    scene.expect(got.sequences, base.sequences, side.sequences)
    logits, plain, other = (torch.stack(x.logits, 1) for x in (got, base, side))
    assert torch.equal(logits[~scene.routed], plain[~scene.routed])
    gap = (logits[scene.routed] - other[scene.routed]).abs().max()
    assert gap <= 1e-5 * (1 + other.abs().max())
    for i in scene.routed.nonzero()[:, 0]:
        assert (logits[i] - plain[i]).abs().max() > 0.1  # the delta does something
    assert torch.equal(scene.generate(**TRACED).sequences, base.sequences)  # and is gone


def test_a_prompt_is_decided_alike_alone_in_a_batch_and_with_either_padding(scene: Scene, encoder: Any) -> None:
    rows = [encoder.prompt(p) for p in PROMPTS]
    right = encoder.batch(rows, side="right")
    with scene.attached() as (on, seen):
        scene.generate(max_new_tokens=1)
        together = seen[-1]
        scene.model(**right.inputs)
        others = [seen[-1]]
        on.decide(right)
        others.append(seen[-1])
        on.decide(encoder.batch(rows, side="left"))
        others.append(seen[-1])
        for i in range(len(rows)):
            scene.model.generate(**scene.alone(i), max_new_tokens=1)
            for name in ("memory", "edit"):
                assert torch.equal(getattr(seen[-1], name), getattr(together, name)[i : i + 1])
            torch.testing.assert_close(seen[-1].indicator, together.indicator[i : i + 1], rtol=1e-4, atol=1e-5)
    for other in others:
        assert torch.equal(other.memory, together.memory)
        assert torch.equal(other.edit, together.edit)
        torch.testing.assert_close(other.indicator, together.indicator, rtol=1e-4, atol=1e-5)


def test_decide_explains_itself(scene: Scene, encoder: Any) -> None:
    with attach(scene.model, scene.memory) as on:
        routes = on.decide(encoder.batch([encoder.prompt(p) for p in PROMPTS], side="right"))
    epsilon = scene.memory.memories[0].epsilon[scene.memory.router]
    assert [r.routed for r in routes] == scene.routed.tolist()
    for r in routes:
        assert r.epsilon == pytest.approx(epsilon)
        assert r.routed == (r.indicator > r.epsilon)
        assert r.edit in (("e0", "e1") if scene.memory.router == "key" else (None,))
    if scene.memory.router == "key":
        assert (routes[0].edit, routes[2].edit) == ("e0", "e1")
        assert routes[0].indicator == pytest.approx(1, abs=1e-2)


def test_nothing_routed_is_the_base_bit_for_bit(scene: Scene) -> None:
    base = scene.generate(**TRACED)
    with attach(scene.model, with_epsilon(scene.memory, scene.memory.router, 1e9)):
        got = scene.generate(**TRACED)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, base.logits, strict=True))


# -- ways of generating ------------------------------------------------------------------------------------------------


def test_several_return_sequences_follow_their_prompt(scene: Scene) -> None:
    def sample() -> Tensor:
        torch.manual_seed(0)
        return scene.generate(do_sample=True, num_return_sequences=3)

    base, side = scene.references(sample)
    with scene.attached() as (_, seen):
        got = sample()
    assert len(seen) == 1
    scene.expect(got, base, side, per=3)


def test_beams_follow_their_prompt(scene: Scene) -> None:
    base, side = scene.references(lambda: scene.generate(num_beams=3, num_return_sequences=2))
    with scene.attached() as (_, seen):
        got = scene.generate(num_beams=3, num_return_sequences=2)
    assert len(seen) == 1
    scene.expect(got, base, side, per=2)


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}],
    ids=["static cache", "no cache"],
)
def test_the_kind_of_cache_does_not_matter(scene: Scene, options: dict[str, Any]) -> None:
    base, side = scene.references(lambda: scene.generate())
    with scene.attached() as (_, seen):
        for _ in range(2):  # a static cache is used again
            scene.expect(scene.generate(**options), base, side)
    assert len(seen) == (2 if "cache_implementation" in options else 2 * NEW)
    for routes in seen:
        assert (routes.memory != MAIN).tolist() == scene.routed.tolist()


@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=["2-D mask", "4-D mask"]
)
def test_what_is_padded_with_does_not_matter(scene: Scene, options: dict[str, Any]) -> None:
    """An ordinary word behind the attention mask: here the content rule's special tokens are no help."""
    other = dataclasses.replace(scene, ids=scene.ids.where(scene.mask.bool(), scene.ids[0, -1]))
    with scene.attached() as (_, seen):
        scene.generate(max_new_tokens=1)
        other.generate(max_new_tokens=1, **options)
    assert torch.equal(seen[0].memory, seen[1].memory)
    torch.testing.assert_close(seen[0].indicator, seen[1].indicator, rtol=1e-4, atol=1e-5)


def test_a_copied_cache_keeps_its_decision(scene: Scene) -> None:
    for i in range(len(PROMPTS)):
        prompt = scene.alone(i)
        longer = torch.cat([prompt["input_ids"], torch.tensor([[9]])], 1)
        base, side = scene.references(lambda ids=longer: scene.model(input_ids=ids).logits[:, -1])
        with scene.attached() as (_, seen):
            cache = scene.model(**prompt, use_cache=True).past_key_values
            copied = copy.deepcopy(cache)
            mask = torch.ones_like(longer)
            for c in (copied, cache):
                out = scene.model(input_ids=longer[:, -1:], attention_mask=mask, past_key_values=c, use_cache=True)
                want = side if scene.routed[i] else base
                torch.testing.assert_close(out.logits[:, -1], want, rtol=1e-4, atol=1e-4)
        assert len(seen) == 1


def test_a_continued_generation_keeps_its_decision(llama: Scene) -> None:
    """A second call of generate with the first one's cache; its first prompt decides."""
    for i in range(len(PROMPTS)):
        whole = llama.references(lambda i=i: llama.model.generate(**llama.alone(i), **GREEDY))[int(llama.routed[i])]
        with llama.attached() as (_, seen):
            first = llama.model.generate(
                **llama.alone(i), max_new_tokens=2, do_sample=False, return_dict_in_generate=True
            )
            rest = llama.model.generate(
                first.sequences, past_key_values=first.past_key_values, max_new_tokens=NEW - 2, do_sample=False
            )
        assert torch.equal(rest, whole)
        assert len(seen) == 1


@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
def test_assisted_decoding_gives_the_same_tokens(scene: Scene, tiny_model: Any, how: str) -> None:
    kind = scene.model.config.model_type
    options = (
        {"prompt_lookup_num_tokens": 3}
        if how == "prompt lookup"
        else {"assistant_model": tiny_model(kind, seed=7), "num_assistant_tokens": 3}
    )
    with scene.attached() as (_, seen):
        for i in (int(scene.routed.nonzero()[0]), int((~scene.routed).nonzero()[0])):
            plain = scene.model.generate(**scene.alone(i), **GREEDY)
            seen.clear()
            got = scene.model.generate(**scene.alone(i), **GREEDY, **options)
            assert torch.equal(got, plain)
            assert [(r.memory != MAIN).tolist() for r in seen] == [[bool(scene.routed[i])]]


def test_a_text_generation_pipeline_routes_its_batch(scene: Scene, tokenizer: Any) -> None:
    pipe = pipeline("text-generation", model=scene.model, tokenizer=tokenizer, device="cpu")

    def texts() -> list[str]:
        return [x[0]["generated_text"] for x in pipe(PROMPTS, batch_size=4, **GREEDY)]

    base, side = scene.references(texts)
    with scene.attached() as (_, seen):
        got = texts()
    assert len(seen) == 1
    assert got == [s if r else b for b, s, r in zip(base, side, scene.routed.tolist(), strict=True)]
    assert base != side


def test_streaming_from_a_thread_gives_the_same_text(either: Scene, tokenizer: Any) -> None:
    i = int(either.routed.nonzero()[0])
    prompt = either.alone(i)
    with attach(either.model, either.memory):
        want = tokenizer.decode(either.model.generate(**prompt, **GREEDY)[0, prompt["input_ids"].shape[1] :])
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        thread = Thread(target=either.model.generate, kwargs={**prompt, **GREEDY, "streamer": streamer})
        thread.start()
        got = "".join(streamer)
        thread.join()
    assert got == want


def test_threads_do_not_disturb_each_other(either: Scene) -> None:
    """Eight threads; every other one asks for the unedited model."""

    def one(on: Attached, job: int) -> list[int]:
        with on.override(None) if job % 2 else contextlib.nullcontext():
            return either.model.generate(**either.alone(job // 2), **GREEDY)[0].tolist()

    with attach(either.model, either.memory) as on, ThreadPoolExecutor(8) as pool:
        want = [one(on, job) for job in range(8)]
        assert list(pool.map(lambda job: one(on, job), range(8))) == want
    routed = int(either.routed.nonzero()[0])
    assert want[2 * routed] != want[2 * routed + 1]


def test_embeddings_instead_of_ids_are_routed(build_scene: Any) -> None:
    scene = build_scene("llama", "key")
    embedded = scene.model.get_input_embeddings()(scene.ids)
    base, side = scene.references(lambda: scene.generate()[:, scene.ids.shape[1] :])
    with attach(scene.model, scene.memory):
        for options in ({}, {"use_cache": False}):
            got = scene.model.generate(inputs_embeds=embedded, attention_mask=scene.mask, **GREEDY, **options)
            scene.expect(got, base, side)


def test_a_prompt_without_a_mask_is_routed(llama: Scene) -> None:
    for i in range(len(PROMPTS)):
        with llama.attached() as (_, seen), torch.no_grad():
            llama.model(input_ids=llama.alone(i)["input_ids"])
        assert (seen[0].memory != MAIN).tolist() == [bool(llama.routed[i])]


def test_half_precision_keeps_unrouted_rows_bit_for_bit(tiny_model: Any, make_side_memory: Any, encoder: Any) -> None:
    model = tiny_model("llama", fresh=True).bfloat16()
    ids, mask = left_padded(encoder)
    sm = with_epsilon(make_side_memory(model, [PROMPTS[0]]), "key", 0.98)
    base = torch.stack(model.generate(ids, attention_mask=mask, **TRACED).logits, 1)
    with attach(model, sm) as on:
        got = torch.stack(model.generate(ids, attention_mask=mask, **TRACED).logits, 1)
        assert on.last.memory.tolist() == [0, MAIN, MAIN, MAIN]
    assert torch.equal(got[1:], base[1:])
    assert not torch.equal(got[0], base[0])


# -- what is refused ---------------------------------------------------------------------------------------------------


def _by_argument(model: Any) -> dict[str, Any]:
    return {"prefill_chunk_size": 2}


def _by_config(model: Any) -> dict[str, Any]:
    return {"generation_config": GenerationConfig(prefill_chunk_size=2, max_new_tokens=NEW, pad_token_id=0)}


def _by_default(model: Any) -> dict[str, Any]:
    model.generation_config.prefill_chunk_size = 2
    return {}


@pytest.mark.parametrize("ask", [_by_argument, _by_config, _by_default], ids=lambda f: f.__name__.strip("_"))
def test_a_prefill_in_chunks_is_refused(llama: Scene, ask: Callable[[Any], dict[str, Any]]) -> None:
    base, side = llama.references(lambda: llama.generate())
    with attach(llama.model, llama.memory):
        try:
            with pytest.raises(RoutingError, match="chunks") as e:
                llama.generate(**ask(llama.model))
        finally:
            llama.model.generation_config.prefill_chunk_size = None
        assert e.value.hint
        llama.expect(llama.generate(), base, side)  # and the next call is as ever


def test_packed_sequences_are_refused(llama: Scene) -> None:
    ends = torch.tensor([0, 3, 6], dtype=torch.int32)
    packed = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 3, "max_length_k": 3}
    with attach(llama.model, llama.memory), pytest.raises(RoutingError, match="Packed"):
        llama.model(input_ids=torch.arange(6, 12)[None], **packed)


@pytest.mark.parametrize("before", ["base", "another attachment"])
def test_a_cache_filled_before_attaching_is_refused(either: Scene, before: str) -> None:
    prompt = either.alone(0)
    with attach(either.model, either.memory) if before != "base" else contextlib.nullcontext():
        cache = either.model(**prompt, use_cache=True).past_key_values
    with attach(either.model, either.memory), pytest.raises(RoutingError, match="before the side memory was attached"):
        either.model(input_ids=torch.tensor([[9]]), past_key_values=cache, use_cache=True)


def test_a_cache_with_other_rows_is_refused(llama: Scene) -> None:
    with attach(llama.model, llama.memory):
        cache = llama.model(input_ids=llama.ids, attention_mask=llama.mask, use_cache=True).past_key_values
        with pytest.raises(RoutingError, match="4 rows"):
            llama.model(input_ids=torch.tensor([[9]] * 3), past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("allow", [False, True])
def test_the_wrong_base_is_refused_unless_allowed(either: Scene, tiny_model: Any, allow: bool) -> None:
    other = tiny_model(either.model.config.model_type, seed=7)
    if not allow:
        with pytest.raises(BaseMismatch, match="differ") as e:
            attach(other, either.memory)
        assert "--allow-other-base" in e.value.hint
    else:
        with attach(other, either.memory, allow_other_base=True) as on, on.override([0]):
            got = other.generate(either.ids, attention_mask=either.mask, **GREEDY)
        with folded(other, either.site, either.delta):
            assert torch.equal(other.generate(either.ids, attention_mask=either.mask, **GREEDY), got)
    assert untouched(other)


@pytest.mark.parametrize("allow", [False, True])
def test_a_base_the_delta_does_not_fit_is_refused_in_any_case(build_scene: Any, tiny_model: Any, allow: bool) -> None:
    scene = build_scene("llama", "key")
    narrow = dataclasses.replace(scene.site, path="model.layers.2.self_attn.o_proj")
    for model, sm in (
        (tiny_model("gpt2"), scene.memory),
        (scene.model, dataclasses.replace(scene.memory, site=narrow)),
    ):
        with pytest.raises(BaseMismatch):
            attach(model, sm, allow_other_base=allow)
        assert untouched(model)


@pytest.mark.parametrize("router", ["nonsense", "activation"])
def test_a_router_that_cannot_be_built_is_refused_and_leaves_no_trace(build_scene: Any, router: str) -> None:
    scene = build_scene("llama", "key")  # has no threshold for the other router
    with pytest.raises(UsageError, match=router) as e:
        attach(scene.model, scene.memory, router=router)
    assert e.value.hint
    if router == "activation":
        assert all(cause in e.value.hint for cause in ("--no-calibrate", "--no-texts", "take"))
    assert untouched(scene.model)


# -- attaching and detaching -------------------------------------------------------------------------------------------


def test_detaching_leaves_the_model_as_it_was(either: Scene) -> None:
    model = either.model
    weights = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}
    base = either.generate()
    on = attach(model, either.memory)
    assert list(model.state_dict()) == list(weights)
    either.generate()
    assert on.detach() is None
    on.detach()  # again does nothing
    assert untouched(model)
    for k, v in model.state_dict().items():
        assert v.data_ptr() == weights[k][0]
        assert torch.equal(v, weights[k][1])
    assert torch.equal(either.generate(), base)


def test_an_exception_inside_the_block_detaches(either: Scene) -> None:
    base = either.generate()
    with pytest.raises(ZeroDivisionError), attach(either.model, either.memory):
        1 / 0  # noqa: B018
    assert untouched(either.model)
    assert torch.equal(either.generate(), base)


@pytest.mark.parametrize("layer", [0, 3])
def test_an_exception_in_a_forward_leaves_nothing_for_the_next(llama: Scene, layer: int) -> None:
    base, side = llama.references(lambda: llama.generate())

    def fail(*args: Any) -> None:
        raise ZeroDivisionError

    with llama.attached() as (_, seen):
        handle = llama.model.model.layers[layer].register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            llama.generate()
        handle.remove()
        seen.clear()
        llama.expect(llama.generate(), base, side)
        assert len(seen) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_the_projection_called_by_itself_stays_main(llama: Scene, fails: bool) -> None:
    projection = llama.site.module(llama.model)
    x = torch.randn(*llama.ids.shape, llama.site.d_in, generator=torch.Generator().manual_seed(0))
    want = projection(x)
    with attach(llama.model, llama.memory):
        if fails:
            handle = llama.model.model.layers[3].register_forward_hook(lambda m, a, y: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                llama.generate()
            handle.remove()
        else:
            llama.generate()
        assert torch.equal(projection(x), want)


def test_a_second_attachment_is_refused_and_disturbs_nothing(llama: Scene, make_side_memory: Any) -> None:
    base, side = llama.references(lambda: llama.generate())
    other = make_side_memory(llama.model, PROMPTS[1:2])
    with attach(llama.model, llama.memory):
        for again in (llama.memory, other):
            with pytest.raises(UsageError, match="already") as e:
                attach(llama.model, again)
            assert "SideMemories" in str(e.value.hint)
        with pytest.raises(UsageError, match="already"):
            SideMemories(llama.model)
        llama.expect(llama.generate(), base, side)
    assert untouched(llama.model)
    with attach(llama.model, llama.memory):
        llama.expect(llama.generate(), base, side)


def test_a_model_in_training_mode_is_refused(build_scene: Any) -> None:
    scene = build_scene("gpt2", "key")  # it has dropout
    base, side = scene.references(lambda: scene.generate())
    with attach(scene.model, scene.memory):
        scene.model.train()
        try:
            with pytest.raises(RoutingError, match="training mode"):
                scene.model(**scene.alone(0))
        finally:
            scene.model.eval()
        scene.expect(scene.generate(), base, side)
    assert untouched(scene.model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_mode_of_gradients_does_not_matter(either: Scene, mode: Any) -> None:
    base, side = either.references(lambda: either.generate())
    with mode(), attach(either.model, either.memory):
        either.expect(either.generate(), base, side)
        logits = either.model(either.ids, attention_mask=either.mask).logits
    with attach(either.model, either.memory), torch.no_grad():
        assert torch.equal(either.model(either.ids, attention_mask=either.mask).logits, logits)


def test_sampling_draws_what_base_and_folded_model_would(llama: Scene) -> None:
    def sampled() -> Tensor:
        torch.manual_seed(5)
        return llama.generate(do_sample=True, temperature=1.5, num_return_sequences=2)

    base, side = llama.references(sampled)
    with attach(llama.model, llama.memory):
        llama.expect(sampled(), base, side, per=2)


# -- copies and other users of the model -------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["model", "within another module", "decoder"])
def test_a_copy_is_the_plain_base_and_reaches_nothing_of_the_original(llama: Scene, part: str) -> None:
    model = llama.model
    base, side = llama.references(lambda: llama.generate())
    with attach(model, llama.memory) as on:
        llama.generate()
        routes = on.last
        if part == "model":
            twin = copy.deepcopy(model)
        elif part == "decoder":
            twin = copy.deepcopy(model)
            twin.model = copy.deepcopy(model.model)
        else:
            twin = copy.deepcopy(nn.ModuleList([model]))[0]
        assert part == "decoder" or untouched(twin)
        assert twin is not model
        assert twin.model.layers[2].mlp.down_proj is not model.model.layers[2].mlp.down_proj
        assert torch.equal(twin.generate(llama.ids, attention_mask=llama.mask, **GREEDY), base)
        assert on.last is routes
        twin.model.layers[2].mlp.down_proj.weight.zero_()  # and its weights are its own
        llama.expect(llama.generate(), base, side)
    if part == "decoder":
        return
    twin.load_state_dict(model.state_dict())
    with attach(twin, llama.memory) as mine:  # a copy can be attached to by itself
        llama.expect(twin.generate(llama.ids, attention_mask=llama.mask, **GREEDY), base, side)
        assert mine.last is not None
        assert torch.equal(llama.generate(), base)
    assert untouched(twin)


def test_a_trainer_evaluates_what_the_attached_model_computes(llama: Scene, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = copy.deepcopy(llama.model)  # a trainer writes into a model's config and leaves a forward of its own
    rows = [{k: v[0] for k, v in llama.alone(i).items()} for i in range(len(PROMPTS))]
    data = [{**row, "labels": row["input_ids"]} for row in rows]
    args = TrainingArguments(str(tmp_path), per_device_eval_batch_size=1, report_to=[], use_cpu=True, disable_tqdm=True)
    keys = set(model.state_dict())

    def losses() -> list[float]:
        with torch.no_grad():
            return [float(model(**{k: v[None] for k, v in row.items()}).loss) for row in data]

    plain = losses()
    with attach(model, llama.memory):
        want = losses()
        got = Trainer(model, args, eval_dataset=data).evaluate()["eval_loss"]
        assert set(model.state_dict()) == keys
    assert got == pytest.approx(sum(want) / len(want), rel=1e-5)
    assert [a != b for a, b in zip(want, plain, strict=True)] == llama.routed.tolist()


def test_a_generate_of_someone_elses_is_put_back(tiny_model: Any, build_scene: Any) -> None:
    scene = build_scene("llama", "key")
    model = tiny_model("llama", fresh=True)
    model.generate = mine = lambda *a, _old=model.generate, **k: _old(*a, **k)
    with attach(model, scene.memory):
        assert model.generate is not mine
    assert model.generate is mine


def test_saving_while_attached_saves_the_untouched_base(either: Scene, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = either.generate()
    with attach(either.model, either.memory):
        either.generate()
        keys = list(either.model.state_dict())
        either.model.save_pretrained(tmp_path)
    assert keys == list(either.model.state_dict())
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    want = either.model.state_dict()
    assert back.state_dict().keys() == want.keys()
    assert all(torch.equal(v, want[k]) for k, v in back.state_dict().items())
    assert torch.equal(back.generate(either.ids, attention_mask=either.mask, **GREEDY), base)


def test_a_file_or_a_folder_can_be_attached(llama: Scene, tmp_path: Path) -> None:
    base, side = llama.references(lambda: llama.generate())
    path = tmp_path / "side_memory.safetensors"
    llama.memory.save(path)
    for given in (path, str(path), tmp_path):
        with attach(llama.model, given):
            llama.expect(llama.generate(), base, side)
    with pytest.raises(InputError, match="does not exist"):
        attach(llama.model, tmp_path / "missing")
    assert untouched(llama.model)


# -- routes set from outside -------------------------------------------------------------------------------------------


def test_override_none_is_the_base_and_a_list_sets_each_row(scene: Scene) -> None:
    base, side = scene.references(lambda: scene.generate())
    with scene.attached() as (on, seen):
        with on.override(None):
            assert torch.equal(scene.generate(), base)
            with on.override([0]):  # nested; one for all rows
                assert torch.equal(scene.generate(), side)
            assert torch.equal(scene.generate(), base)
        for picked in ([None, 0, MAIN, 0], torch.tensor([MAIN, 0, MAIN, 0])):
            with on.override(picked):
                got = scene.generate()
            assert torch.equal(got[[1, 3]], side[[1, 3]])
            assert torch.equal(got[[0, 2]], base[[0, 2]])
        assert not seen
        with pytest.raises(ZeroDivisionError), on.override(None):
            1 / 0  # noqa: B018
        scene.expect(scene.generate(), base, side)


def test_an_overridden_row_keeps_its_route_in_its_beams(llama: Scene) -> None:
    base, side = llama.references(lambda: llama.generate(num_beams=2))
    with attach(llama.model, llama.memory) as on, on.override([None, 0, 0, None]):
        got = llama.generate(num_beams=2)
    assert torch.equal(got, torch.stack([base[0], side[1], side[2], base[3]]))


@pytest.mark.parametrize("picked", [[1], [-2], [0, 5, 0, 0], []])
def test_an_override_with_a_memory_that_is_not_there_is_refused(llama: Scene, picked: list[int]) -> None:
    with attach(llama.model, llama.memory) as on, pytest.raises(WiseError), on.override(picked):
        llama.generate()


def test_an_override_of_other_rows_is_refused(llama: Scene) -> None:
    with attach(llama.model, llama.memory) as on, on.override([0, 0, 0]), pytest.raises(RoutingError, match="3 rows"):
        llama.generate()


# -- prompts with their answers ----------------------------------------------------------------------------------------

TARGETS = ["Paris", "world the capital", "where", "what France is hello"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_answer_behind_its_prompt_takes_no_part_in_the_decision(scene: Scene, encoder: Any, side: str) -> None:
    rows = [encoder.pair(p, t) for p, t in zip(PROMPTS, TARGETS, strict=True)]
    batch = encoder.batch(rows, side=side)
    lengths = [len(r.prompt) for r in rows]
    positions = {}
    if side == "left" and scene.model.config.model_type in ("gpt2", "gpt_neox", "llama", "qwen2", "gemma2"):
        positions = {"position_ids": (batch.attention_mask.cumsum(1) - 1).clamp(min=0)}
    with scene.attached() as (on, seen), torch.no_grad():
        on.decide(encoder.batch([encoder.prompt(p) for p in PROMPTS], side=side))
        with on.prompt_lengths(lengths):
            scene.model(**batch.inputs, **positions, use_cache=False)
        with on.prompt_lengths(torch.tensor(lengths)):
            twice = {k: v.repeat_interleave(2, 0) for k, v in (batch.inputs | positions).items()}
            scene.model(**twice, use_cache=False)
        scene.model(**batch.inputs, **positions, use_cache=False)
    alone, together, doubled, counted = seen
    for got, want in ((together, alone), (doubled, alone.repeat(2))):
        assert torch.equal(got.memory, want.memory)
        assert torch.equal(got.edit, want.edit)
        torch.testing.assert_close(got.indicator, want.indicator, rtol=1e-4, atol=1e-5)
    if scene.memory.router == "key":
        assert not torch.allclose(counted.indicator, alone.indicator, atol=1e-3)  # afterwards the answer counts again


@pytest.mark.parametrize("lengths", [[], [0, 1, 1, 1], [1.5], [[1]]])
def test_lengths_that_are_none_are_refused(llama: Scene, lengths: list[Any]) -> None:
    with attach(llama.model, llama.memory) as on, pytest.raises(UsageError, match="no lengths"):
        on.prompt_lengths(lengths).__enter__()


def test_prompt_lengths_of_other_rows_are_refused(llama: Scene) -> None:
    with (
        attach(llama.model, llama.memory) as on,
        on.prompt_lengths([1] * 3),
        pytest.raises(RoutingError, match="3 pro"),
    ):
        llama.generate()


# -- several memories --------------------------------------------------------------------------------------------------


def check_two(scene: Scene, sm: SideMemory, deltas: Sequence[Tensor], want: list[int]) -> None:
    answers = {MAIN: scene.generate()}
    for j, delta in enumerate(deltas):
        with folded(scene.model, scene.site, delta):
            answers[j] = scene.generate()
    with attach(scene.model, sm) as on:
        got = scene.generate()
        assert on.last.memory.tolist() == want
    for i, j in enumerate(want):
        assert torch.equal(got[i], answers[j][i])


@pytest.mark.parametrize("kind", KINDS)
def test_of_two_memories_the_strongest_that_passes_answers(
    build_scene: Any, make_side_memory: Any, random_delta: Any, encoder: Any, kind: str
) -> None:
    scene = build_scene(kind, "activation")
    shape = (scene.site.d_out, scene.site.d_in)
    deltas = [random_delta(shape, seed=s) for s in (1, 2)]
    rows = UpperModel(scene.model, scene.site, encoder).capture([encoder.prompt(p) for p in PROMPTS])
    acts = torch.stack([torch.cat([activation_indicator(r.a[None], r.content[None], d) for r in rows]) for d in deltas])
    epsilon = [(a.sort().values[1] + a.sort().values[2]).item() / 2 for a in acts]  # two rows pass each
    want = []
    for pair in acts.T.tolist():
        passing = [(x, j) for j, x in enumerate(pair) if x > epsilon[j]]
        want.append(max(passing)[1] if passing else MAIN)
    sm = make_side_memory(scene.model, [PROMPTS[0]], site=scene.site, deltas=deltas)
    check_two(scene, with_epsilon(sm, "activation", *epsilon), deltas, want)


@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_key_names_the_memory(
    build_scene: Any, make_side_memory: Any, random_delta: Any, kind: str
) -> None:
    scene = build_scene(kind, "key")
    deltas = [random_delta((scene.site.d_out, scene.site.d_in), seed=s) for s in (1, 2)]
    known = [PROMPTS[0], PROMPTS[2], PROMPTS[3]]
    sm = make_side_memory(scene.model, known, site=scene.site, deltas=deltas, memory_of=[1, 0, 1])
    check_two(scene, with_epsilon(sm, "key", 0.98, 0.98), deltas, [1, MAIN, 0, 1])
    check_two(scene, with_epsilon(sm, "key", 0.98, 1.5), deltas, [MAIN, MAIN, 0, MAIN])  # each has its own threshold


def test_a_memory_below_its_own_threshold_hides_none_that_passes() -> None:
    one = torch.eye(2)
    router = ActivationRouter([10 * one, one], torch.tensor([50.0, 0.5]))
    a = torch.tensor([[[1.0, 0.0]], [[9.0, 0.0]], [[0.1, 0.0]]])
    routes = router.decide(Seen(a, a, torch.ones(3, 1, dtype=torch.bool)))
    assert routes.memory.tolist() == [1, 0, MAIN]
    torch.testing.assert_close(routes.indicator, torch.tensor([1.0, 90.0, 1.0]))
    torch.testing.assert_close(routes.epsilon, torch.tensor([0.5, 50.0, 50.0]))


def test_routes_repeat_row_by_row() -> None:
    routes = Routes.forced(torch.tensor([0, MAIN, 1])).repeat(2)
    assert routes.memory.tolist() == [0, 0, MAIN, MAIN, 1, 1]
    assert {j: r.tolist() for j, r in routes.rows.items()} == {0: [0, 1], 1: [4, 5]}


def test_a_side_memory_names_its_own_router(build_scene: Any) -> None:
    for name in ROUTERS:
        sm = build_scene("llama", name).memory
        assert build_router(sm, [m.delta.dense() for m in sm.memories]).name == name


# -- moving, packing, deciding -----------------------------------------------------------------------------------------


def test_the_delta_follows_a_model_that_is_cast(tiny_model: Any, build_scene: Any) -> None:
    """Cast after attaching is as attached after casting; cast back, the delta is the stored one again."""
    for name in ROUTERS:
        scene = build_scene("llama", name)
        model = tiny_model("llama", fresh=True)
        with attach(model, scene.memory) as on:
            before = [d.clone() for d in on.deltas]
            model.to(torch.bfloat16)
            cast = model.generate(scene.ids, attention_mask=scene.mask, **TRACED)
            assert [d.dtype for d in on.deltas] == [torch.bfloat16]
            assert (on.last.memory != MAIN).any()
            twin = copy.deepcopy(model)
            with attach(twin, scene.memory, allow_other_base=True):
                anew = twin.generate(scene.ids, attention_mask=scene.mask, **TRACED)
            assert all(torch.equal(a, b) for a, b in zip(cast.logits, anew.logits, strict=True))
            model.to(torch.float32)
            model.generate(scene.ids, attention_mask=scene.mask, **GREEDY)
            assert all(torch.equal(a, b) for a, b in zip(on.deltas, before, strict=True))


PACKED = torch.tensor([[0, 1, 2, 0, 1, 2]])


@pytest.mark.parametrize("positions", [PACKED, PACKED + 4, torch.tensor([[0, 0, 0, 0, 0, 0]])], ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_rows_packed_by_their_positions_alone_are_refused(llama: Scene, positions: Tensor, rows: int) -> None:
    ids = torch.arange(6, 12)[None].expand(rows, -1)
    with attach(llama.model, llama.memory) as on:
        for given in (positions, positions.expand(rows, -1)):
            with pytest.raises(RoutingError, match="Packed") as e:
                llama.model(input_ids=ids, position_ids=given)
        assert e.value.hint
        with on.override([0]):  # nothing is decided, so nothing is in the way
            llama.model(input_ids=ids, position_ids=positions)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("filler", [0, 1, 5])
def test_positions_of_padding_are_no_packing(llama: Scene, encoder: Any, side: str, filler: int) -> None:
    batch = encoder.batch([encoder.prompt(p) for p in PROMPTS], side=side)
    real = batch.attention_mask
    positions = (real.cumsum(1) - 1).masked_fill(real == 0, filler)
    with llama.attached() as (_, seen):
        llama.model(**batch.inputs, position_ids=positions)
        llama.model(**batch.inputs, position_ids=torch.arange(real.shape[1])[None])  # one row for all
        for options in ({}, {"num_beams": 2}, {"use_cache": False}, {"num_return_sequences": 2, "do_sample": True}):
            llama.generate(**options)
        for i in range(len(PROMPTS)):
            llama.model.generate(**llama.alone(i), **GREEDY, prompt_lookup_num_tokens=3)
    for routes in (seen[0], seen[2]):
        assert (routes.memory != MAIN).tolist() == llama.routed.tolist()


def test_deciding_takes_no_notice_of_an_override(llama: Scene, encoder: Any) -> None:
    batch = encoder.batch([encoder.prompt(p) for p in PROMPTS])
    base = llama.generate()
    with attach(llama.model, llama.memory) as on:
        want = on.decide(batch)
        for forced in (None, [0]):
            with on.override(forced):
                assert on.decide(batch) == want
        with on.override(None):
            on.look(batch)
            assert on.overridden
            assert torch.equal(llama.generate(), base)  # and it is in force as before
    assert [r.routed for r in want] == llama.routed.tolist()
