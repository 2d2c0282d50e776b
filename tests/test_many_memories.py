"""Routing among many memories and many keys, against the plain ways that compute every indicator and every distance.

Estimates and bounds may leave memories and keys out, and dense deltas come and go; none may change a decision or an
answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wisecli.memory import lookup
from wisecli.memory.bits import SparseDelta, draw_mask
from wisecli.memory.dense import FEW, DenseDeltas
from wisecli.memory.indicator import activation_indicator
from wisecli.memory.keys import KeySpace, KeyStore
from wisecli.memory.lookup import Index, score
from wisecli.memory.side_memory import SideMemory
from wisecli.memory.sketch import MISSED, NEARLY, RANK, Sketches
from wisecli.models.site import find_site
from wisecli.routing.attach import Attached, attach
from wisecli.routing.routers import MAIN, ActivationRouter, Seen, build_router

MEMORIES, D, F = 24, 48, 96
PROMPTS = ["the capital of France is", "hello", "what who where world", "Paris?"]
GREEDY = {"max_new_tokens": 5, "do_sample": False}
seeds = st.integers(0, 10_000)
quick = settings(max_examples=40, deadline=None)


def drawn(seed: int, n: int = MEMORIES, *, density: float = 0.2) -> list[Tensor]:
    """Masked deltas of different sizes, each also with a strong direction, as learned ones have."""
    g = torch.Generator().manual_seed(seed)
    deltas = []
    for j in range(n):
        dense = torch.randn(D, F, generator=g) + 2 * torch.randn(D, 1, generator=g) @ torch.randn(1, F, generator=g)
        size = 0.5 + torch.rand((), generator=g)
        deltas.append(torch.where(draw_mask((D, F), density, seed + j), size * dense, 0.0))
    return deltas


def prompts(seed: int, rows: int = 6, tokens: int = 9) -> Seen:
    """Activations [B, T, F] with a few large entries, left-padded content."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, tokens, F, generator=g) * torch.randn(rows, tokens, F, generator=g).exp()
    padding = torch.randint(0, tokens - 1, (rows, 1), generator=g)
    return Seen(a, a, torch.arange(tokens)[None] >= padding)


def indicators(seen: Seen, deltas: Sequence[Tensor]) -> Tensor:
    """Every exact indicator [B, M], each row alone."""
    rows = zip(seen.a.split(1), seen.content.split(1), strict=True)
    return torch.cat([torch.stack([activation_indicator(*row, d) for d in deltas], 1) for row in rows])


def row_of(seen: Seen, i: int) -> Seen:
    return Seen(*(x[i : i + 1] for x in (seen.a, seen.entry, seen.content)))


# -- estimates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.1, 0.2, 1.0])
def test_estimates_lie_within_their_margins(density: float) -> None:
    above = []
    for seed in range(40):
        deltas, seen = drawn(seed, 10, density=density), prompts(seed)
        sketches = Sketches(deltas)
        rows = zip(seen.a, seen.content, strict=True)
        above.append(indicators(seen, deltas) / torch.stack([sketches.indicators(*row) for row in rows]))
    ratio = torch.cat(above) - 1
    assert (ratio > MISSED).float().mean() < 0.001
    assert (ratio > NEARLY).float().mean() < 0.02
    assert (ratio < -MISSED).float().mean() < 0.001


@given(seeds, st.integers(1, RANK))
@quick
def test_a_delta_of_low_rank_is_estimated_exactly(seed: int, rank: int) -> None:
    g = torch.Generator().manual_seed(seed)
    deltas = [torch.randn(D, rank, generator=g) @ torch.randn(rank, F, generator=g)]
    seen = prompts(seed, rows=1)
    got = Sketches(deltas).indicators(seen.a[0], seen.content[0])
    torch.testing.assert_close(got, indicators(seen, deltas)[0], rtol=1e-3, atol=1e-3)


def test_the_same_deltas_give_the_same_sketches_and_random_state_is_left_alone() -> None:
    deltas, seen = drawn(3), prompts(3)
    before = torch.get_rng_state()
    one, two = (Sketches(deltas).indicators(seen.a[0], seen.content[0]) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(Sketches(deltas).indicators(seen.a[0], torch.zeros(9)), torch.zeros(MEMORIES))  # no content


# -- decisions ---------------------------------------------------------------------------------------------------------


@given(seeds, st.floats(0.05, 0.98))
@quick
def test_decisions_are_those_of_the_router_that_computes_everything(seed: int, closed: float) -> None:
    """`closed`: which share of a memory's indicators its epsilon is above."""
    deltas, seen = drawn(seed), prompts(seed)
    exact = indicators(seen, deltas)
    epsilon = exact.quantile(closed, dim=0) * (0.8 + 0.4 * torch.rand(MEMORIES, generator=torch.Generator()))
    got = ActivationRouter(deltas, epsilon, sketches=Sketches(deltas)).decide(seen)
    for i in range(len(seen.a)):
        want = ActivationRouter(deltas, epsilon).decide(row_of(seen, i))
        assert got.memory[i] == want.memory[0]
        if got.memory[i] == MAIN:  # what came closest is named by its estimate, and told exactly
            assert got.indicator[i] in exact[i][exact[i] * (1 + 3 * MISSED) > exact[i].max()]
            assert not (exact[i] > epsilon).any()
        else:
            assert torch.equal(got.indicator[i], want.indicator[0])
        assert got.epsilon[i] in epsilon[exact[i] == got.indicator[i]]


@given(seeds, st.integers(0, MEMORIES - 1), st.floats(0.01, 0.5))
@quick
def test_memories_below_their_own_threshold_hide_none_that_passes(seed: int, weak: int, size: float) -> None:
    """All others are stronger by far, and come as close to their thresholds as they can without passing."""
    deltas, seen = drawn(seed), prompts(seed)
    deltas[weak] = deltas[weak] * size / 10
    exact = indicators(seen, deltas)
    epsilon = exact.max(0).values
    epsilon[weak] = exact[:, weak].min() * 0.999
    routes = ActivationRouter(deltas, epsilon, sketches=Sketches(deltas)).decide(seen)
    assert routes.memory.tolist() == [weak] * len(seen.a)
    assert torch.equal(routes.indicator, exact[:, weak])


@given(seeds)
@quick
def test_a_batch_is_decided_as_its_rows_one_by_one(seed: int) -> None:
    deltas, seen = drawn(seed), prompts(seed)
    router = ActivationRouter(deltas, indicators(seen, deltas).quantile(0.9, dim=0), sketches=Sketches(deltas))
    together, tokens = router.decide(seen), router.per_token(seen)
    for i in range(len(seen.a)):
        alone = router.decide(row_of(seen, i))
        for name in ("memory", "indicator", "epsilon"):
            assert torch.equal(getattr(alone, name), getattr(together, name)[i : i + 1])
        inside = tokens[i][seen.content[i]].mean()  # the indicator is the mean of its tokens
        torch.testing.assert_close(inside, together.indicator[i], rtol=1e-5, atol=1e-5)


def test_padding_changes_no_decision() -> None:
    deltas, seen = drawn(5), prompts(5)
    router = ActivationRouter(deltas, indicators(seen, deltas).quantile(0.9, dim=0), sketches=Sketches(deltas))
    want = router.decide(seen)
    filler = torch.full((len(seen.a), 4, F), 50.0)
    content = torch.cat([seen.content, torch.zeros(len(seen.a), 4, dtype=torch.bool)], 1)
    a = torch.cat([seen.a, filler], 1)
    got = router.decide(Seen(a, a, content))
    assert torch.equal(got.memory, want.memory)
    torch.testing.assert_close(got.indicator, want.indicator)


class Counting(list[Tensor]):
    """Deltas that count how often one is asked for."""

    asked = 0

    def __getitem__(self, index: Any) -> Any:
        self.asked += 1
        return super().__getitem__(index)


def test_few_of_many_indicators_are_computed() -> None:
    deltas, seen = Counting(drawn(7, 100)), prompts(7)
    epsilon = indicators(seen, list(deltas)).quantile(0.5, dim=0)
    deltas.asked = 0
    ActivationRouter(deltas, epsilon, sketches=Sketches(list(deltas))).decide(seen)
    assert len(seen.a) <= deltas.asked < 25 * len(seen.a)


# -- dense deltas ------------------------------------------------------------------------------------------------------


def test_few_deltas_are_dense_before_they_are_used_and_many_when_they_are() -> None:
    packed = [SparseDelta.pack(d) for d in drawn(1, FEW + 1)]
    for n, ready in ((1, 1), (FEW, FEW), (FEW + 1, 0)):
        dense = DenseDeltas(packed[:n], keep_bytes=0)
        dense.follow(torch.device("cpu"), torch.float32)
        assert len(dense.kept) == ready
        for d, p in zip(dense, packed, strict=False):
            assert torch.equal(d, p.dense())
        assert len(dense.kept) == min(n, FEW)


def test_those_used_last_are_kept_within_the_bound() -> None:
    packed = [SparseDelta.pack(d) for d in drawn(1, 20)]
    dense = DenseDeltas(packed, keep_bytes=10 * D * F * 4)
    for j in range(20):
        dense[j]
    assert dense.kept == tuple(range(10, 20))
    kept = dense[12]
    assert dense[12] is kept
    dense[0]
    assert dense.kept == (11, 13, 14, 15, 16, 17, 18, 19, 12, 0)
    assert dense[-1] is dense[19]
    with pytest.raises(IndexError):
        dense[20]
    dense.follow(torch.device("cpu"), torch.bfloat16)
    assert dense.kept == ()
    assert torch.equal(dense[12], packed[12].dense().bfloat16())
    dense.follow(torch.device("cpu"), torch.float32)
    assert torch.equal(dense[12], kept)


def test_a_delta_made_while_inferring_may_take_part_in_learning() -> None:
    dense = DenseDeltas([SparseDelta.pack(d) for d in drawn(1, 20)])
    with torch.inference_mode():
        assert not dense[3].is_inference()
        assert not Sketches(dense)._main.is_inference()


def test_many_threads_get_the_right_deltas_and_keep_no_more_than_the_bound() -> None:
    packed = [SparseDelta.pack(d) for d in drawn(2, 30)]
    want = [p.dense() for p in packed]
    dense = DenseDeltas(packed, keep_bytes=9 * D * F * 4)

    def work(seed: int) -> bool:
        order = torch.randint(30, (200,), generator=torch.Generator().manual_seed(seed)).tolist()
        return all(torch.equal(dense[j], want[j]) and len(dense.kept) <= 9 for j in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


# -- keys --------------------------------------------------------------------------------------------------------------

WIDTH = 24


def keys_and_queries(seed: int, n: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [n, r] of which some are there several times, crowding [n], and queries at keys, beside them and far off."""
    g = torch.Generator().manual_seed(seed)
    keys = (scale * torch.randn(n, WIDTH, generator=g) / WIDTH**0.5).half().float()
    keys[n // 2 :: 3] = keys[n // 4].clone()
    crowding = torch.rand(n, generator=g) * 0.8
    crowding[n // 2 :: 6] = crowding[n // 4].clone()
    at = keys[torch.randint(n, (8,), generator=g)]
    beside = at + 1e-4 * scale * torch.randn(at.shape, generator=g)
    far = scale * torch.randn(8, WIDTH, generator=g)
    return keys, crowding, torch.cat([at, beside, far, keys[n // 4][None], torch.zeros(1, WIDTH)])


@given(seeds, st.integers(1, 1500), st.sampled_from([1e-3, 1.0, 1e3]))
@quick
def test_the_best_key_is_the_one_that_measuring_all_finds_bit_for_bit(seed: int, n: int, scale: float) -> None:
    keys, crowding, z = keys_and_queries(seed, n, scale)
    want = score(z, keys, crowding).max(1)
    with pytest.MonkeyPatch.context() as patched:
        for small, pairs, block in ((0, 1 << 18, 1 << 24), (0, 5, 1 << 24), (0, 1 << 18, 3 * n), (2000, 5, 5)):
            for name, value in (("_SMALL", small), ("_PAIRS", pairs), ("_BLOCK", block)):
                patched.setattr(lookup, name, value)
            index = Index(keys, crowding)
            best, at = index.nearest(z)
            assert torch.equal(best, want.values)
            assert torch.equal(at, want.indices)
            for i in range(len(z)):
                alone, key = index.nearest(z[i : i + 1])
                assert torch.equal(alone[0], best[i])
                assert torch.equal(key[0], at[i])


@given(seeds)
@quick
def test_no_key_scores_more_than_its_bound_and_few_are_measured(seed: int) -> None:
    keys, crowding, z = keys_and_queries(seed, 1500)
    most, scores = Index(keys, crowding)._most(z), score(z, keys, crowding)
    assert (most >= scores).all()
    assert (most - scores).max() < 0.02
    equal = (scores == scores.max(1, keepdim=True).values).sum(1)
    assert ((most >= scores.max(1, keepdim=True).values).sum(1) <= equal + 2).all()


def test_where_products_are_rounded_more_coarsely_all_keys_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, crowding, z = keys_and_queries(1, 1500)
    index = Index(keys, crowding)
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(index, "_nearest", lambda z: pytest.fail("a bound was used that does not hold"))
    try:
        torch.set_float32_matmul_precision("medium")
        best, at = index.nearest(z)
    finally:
        torch.set_float32_matmul_precision(before)
    want = score(z, keys, crowding).max(1)
    assert torch.equal(best, want.values)
    assert torch.equal(at, want.indices)


def test_autocast_changes_nothing_about_the_best_key() -> None:
    keys, crowding, z = keys_and_queries(2, 1500)
    index = Index(keys, crowding)
    with torch.autocast("cpu", torch.bfloat16):
        best, at = index.nearest(z)
    want = index.nearest(z)
    assert torch.equal(best, want[0])
    assert torch.equal(at, want[1])


def test_autocast_changes_nothing_about_where_a_prompt_goes() -> None:
    h = torch.randn(1500, WIDTH, generator=torch.Generator().manual_seed(0))
    space = KeySpace.fit(h, torch.full((len(h),), -1), WIDTH)
    store = KeyStore.of(space, space(h), torch.arange(1500), torch.zeros(1500))
    want = store.nearest(h)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert all(map(torch.equal, store.nearest(h), want))


def test_a_query_that_is_no_number_reaches_nothing() -> None:
    keys, crowding, z = keys_and_queries(3, 1500)
    z[4] = torch.nan
    best, at = Index(keys, crowding).nearest(z)
    assert best.isnan().tolist() == [i == 4 for i in range(len(z))]
    assert (at < len(keys)).all()


def test_a_store_of_many_keys_names_the_first_of_equal_edits() -> None:
    g = torch.Generator().manual_seed(0)
    h = torch.randn(1500, WIDTH, generator=g)
    space = KeySpace.fit(h, torch.full((len(h),), -1), WIDTH)
    vectors = space(h).half()
    store = KeyStore.of(space, torch.cat([vectors, vectors]), torch.arange(3000), torch.zeros(3000))
    best, edit = store.nearest(h)
    assert torch.equal(edit, torch.arange(1500))
    assert torch.equal(best, store.scores(h).max(1).values)
    other = dataclasses.replace(store, keys=-store.keys)  # another store, with keys of its own
    assert not torch.equal(other.nearest(h)[0], best)


# -- on a model --------------------------------------------------------------------------------------------------------


def with_epsilon(sm: SideMemory, epsilon: Sequence[float]) -> SideMemory:
    memories = [dataclasses.replace(m, epsilon={"activation": e}) for m, e in zip(sm.memories, epsilon, strict=True)]
    return dataclasses.replace(sm, memories=tuple(memories), router="activation")


@dataclasses.dataclass
class Scene:
    """A model with a side memory of many memories of which each but the last row's is the strongest for one."""

    model: Any
    memory: SideMemory
    ids: Tensor
    mask: Tensor

    def generate(self) -> Any:
        return self.model.generate(
            self.ids, attention_mask=self.mask, **GREEDY, return_dict_in_generate=True, output_logits=True
        )


@pytest.fixture(scope="module")
def scene(tiny_model: Any, encoder: Any, random_delta: Any, make_side_memory: Any) -> Scene:
    model = tiny_model("llama")
    site = find_site(model)
    deltas = [random_delta((site.d_out, site.d_in), seed=s) for s in range(FEW + 4)]
    sm = with_epsilon(make_side_memory(model, PROMPTS[:1], site=site, deltas=deltas), [0.0] * len(deltas))
    batch = encoder.batch([encoder.prompt(p) for p in PROMPTS])
    with attach(model, sm) as on:
        seen = on.look(batch)[1]
    acts = indicators(seen, deltas)
    epsilon = acts.max(0).values + 1
    for row, memory in ((0, 3), (1, 10), (2, 5)):
        others = acts[:, memory].clone()
        others[row] = -torch.inf
        if acts[row, memory] > others.max():  # else no threshold lets this row alone through
            epsilon[memory] = (acts[row, memory] + others.max()) / 2
    return Scene(model, with_epsilon(sm, epsilon.tolist()), batch.input_ids, batch.attention_mask)


@pytest.fixture
def attached(scene: Scene) -> Iterator[Attached]:
    with attach(scene.model, scene.memory) as on:
        yield on


def test_only_many_memories_are_sketched(scene: Scene) -> None:
    few = dataclasses.replace(scene.memory, memories=scene.memory.memories[:FEW])
    assert build_router(few, drawn(1, FEW)).sketches is None
    assert len(build_router(scene.memory, drawn(1)).sketches) == FEW + 4


def test_rows_of_many_memories_are_answered_by_their_own_and_the_others_by_the_base(scene: Scene) -> None:
    base = scene.generate()
    with attach(scene.model, scene.memory) as on:
        got = scene.generate()
        memory = on.last.memory
        used = set(on.deltas.kept)
    routed = memory != MAIN
    assert 0 < routed.sum() < len(PROMPTS)
    assert {int(m) for m in memory[routed]} <= used
    for i, m in enumerate(memory.tolist()):
        with attach(scene.model, scene.memory) as on, on.override([None if m == MAIN else m]):
            want = scene.model.generate(scene.ids, attention_mask=scene.mask, **GREEDY)
        assert torch.equal(got.sequences[i], want[i])
    for a, b in zip(got.logits, base.logits, strict=True):
        assert torch.equal(a[~routed], b[~routed])
        assert not torch.equal(a[routed], b[routed])


def test_many_memories_follow_a_model_that_is_cast(tiny_model: Callable[..., Any], scene: Scene) -> None:
    model = tiny_model("llama", fresh=True)
    with attach(model, scene.memory) as on:
        model.generate(scene.ids, attention_mask=scene.mask, **GREEDY)
        memory = on.last.memory
        model.to(torch.bfloat16)
        model.generate(scene.ids, attention_mask=scene.mask, **GREEDY)
        assert on.deltas[0].dtype == torch.bfloat16
        model.to(torch.float32)
        model.generate(scene.ids, attention_mask=scene.mask, **GREEDY)
        assert torch.equal(on.last.memory, memory)
        assert torch.equal(on.deltas[0], scene.memory.memories[0].delta.dense())


def test_threads_that_generate_at_once_share_the_dense_deltas(scene: Scene, attached: Attached) -> None:
    def run(memory: int) -> Tensor:
        with attached.override([memory]):
            return scene.model.generate(scene.ids, attention_mask=scene.mask, **GREEDY)

    attached.deltas._keep_bytes = 0
    wanted = [*range(FEW + 4)] * 2
    alone = [run(m) for m in wanted]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(run, wanted), alone, strict=True):
            assert torch.equal(got, want)
    assert len(attached.deltas.kept) == FEW
