"""Merging: Ties against peft's implementation, and the properties WISE relies on (disjoint entries keep their size)."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils
from torch import Tensor

from wisecli.errors import UsageError
from wisecli.memory.bits import BLOCK, SparseDelta, draw_mask
from wisecli.memory.merge import METHODS, merge_deltas

SHAPE = (13, 29)
LARGE = (300, 451)  # three blocks, the last of them short
quick = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**32)


def normal(seed: int, shape: tuple[int, int] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def masked(seed: int, density: float = 0.3) -> Tensor:
    return torch.where(draw_mask(SHAPE, density, seed), normal(seed), 0.0)


def disjoint(n: int, seed: int = 0) -> list[Tensor]:
    """n deltas of which each entry belongs to at most one."""
    owner = torch.randint(-1, n, SHAPE, generator=torch.Generator().manual_seed(seed))
    return [torch.where(owner == i, normal(seed + i), 0.0) for i in range(n)]


def in_one_piece(deltas: list[Tensor], method: str, density: float, weights: list[float], seed: int) -> Tensor:
    """What `merge_deltas` computes, on whole tensors and by sorting."""
    how, generator = METHODS[method], torch.Generator().manual_seed(seed)
    top = max(weights)
    parts = []
    for delta, w in zip(deltas, weights, strict=True):
        if how.drop and density < 1:
            delta = torch.where(torch.rand(delta.shape, generator=generator) < density, delta / density, 0.0)
        elif how.trim and density < 1:
            keep = torch.zeros(delta.numel(), dtype=torch.bool)
            keep[delta.abs().flatten().sort(descending=True, stable=True).indices[: int(density * delta.numel())]] = (
                True
            )
            delta = torch.where(keep.view_as(delta), delta, 0.0)
        parts.append(w / top * delta)
    if not how.elect:
        return torch.stack(parts).sum(0) * top
    elected = torch.where(sum(parts) >= 0, 1.0, -1.0)
    keeps = [torch.sign(p) == elected for p in parts]
    total = sum(torch.where(k, p, 0.0) for k, p in zip(keeps, parts, strict=True))
    divisor = sum(k * torch.tensor(w / top) for k, w in zip(keeps, weights, strict=True))
    return total / divisor.masked_fill(divisor == 0, 1.0) if how.normalise else total * top


def peft_ties(deltas: list[Tensor], density: float) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that density 1 prunes nothing
        return merge_utils.ties(deltas, weights=torch.ones(len(deltas)), density=density)


@quick
@given(seeds, st.integers(2, 4), st.sampled_from([0.2, 0.53, 1.0]), st.sampled_from([0.2, 1.0]))
def test_ties_equals_peft(seed: int, n: int, density: float, mask_density: float) -> None:
    deltas = [masked(seed + i, mask_density) for i in range(n)]
    torch.testing.assert_close(merge_deltas(deltas, "ties", density=density), peft_ties(deltas, density))


@pytest.mark.parametrize("method", list(METHODS))
@settings(deadline=None, max_examples=15)
@given(
    seed=seeds,
    n=st.integers(1, 4),
    density=st.sampled_from([1e-6, 0.1, 0.53, 0.999, 1.0]),
    mask_density=st.sampled_from([0.2, 1.0]),
    whole=st.booleans(),
)
def test_merging_block_by_block_gives_the_same_bits(
    method: str, seed: int, n: int, density: float, mask_density: float, whole: bool
) -> None:
    """Whole numbers: many entries are equally large, so that the limit of what is trimmed falls among equals."""
    assert LARGE[0] * LARGE[1] > 2 * BLOCK
    deltas = [normal(seed + i, LARGE) * draw_mask(LARGE, mask_density, seed + i) for i in range(n)]
    deltas = [(d * 3).round() if whole else d for d in deltas]
    weights = [1.0 + i % 2 for i in range(n)]
    want = in_one_piece(deltas, method, density, weights, seed)
    packed = [SparseDelta.pack(d) for d in deltas]
    for given_ in (deltas, packed, [d.T.contiguous().T for d in deltas]):
        assert torch.equal(merge_deltas(given_, method, density=density, weights=weights, seed=seed), want)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_ties_equals_peft_where_entries_cancel_exactly(n: int) -> None:
    """Small integers: sums are often exactly zero, where the elected sign is plus."""
    g = torch.Generator().manual_seed(n)
    deltas = [torch.randint(-3, 4, (40, 40), generator=g).float() for _ in range(n)]
    assert (torch.stack(deltas).sum(0) == 0).sum() > 100
    torch.testing.assert_close(merge_deltas(deltas), peft_ties(deltas, 1.0))


@quick
@given(seeds, st.integers(2, 4))
def test_dare_ties_with_the_same_drops_is_sign_election_without_normalising(seed: int, n: int) -> None:
    deltas = [normal(seed + i) for i in range(n)]
    got = merge_deltas(deltas, "dare-ties", weights=[1.0] * n)
    stack = torch.stack(deltas)
    sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    torch.testing.assert_close(got, torch.where(stack.sign() == sign, stack, 0.0).sum(0))


@quick
@given(seeds, st.integers(1, 4))
def test_disjoint_deltas_keep_their_full_size_under_ties_and_sign(seed: int, n: int) -> None:
    deltas = disjoint(n, seed)
    total = torch.stack(deltas).sum(0)
    for method in ("ties", "sign"):
        assert torch.equal(merge_deltas(deltas, method), total)
        weights = [0.1 + i for i in range(n)]
        torch.testing.assert_close(merge_deltas(deltas, method, weights=weights), total, rtol=1e-6, atol=0)


def test_of_opposite_signs_the_larger_stays_whole() -> None:
    a, b = torch.tensor([[3.0, -3.0, 2.0, -2.0]]), torch.tensor([[-1.0, 1.0, -2.5, 2.5]])
    want = torch.tensor([[3.0, -3.0, -2.5, 2.5]])
    for method in ("ties", "sign"):
        assert torch.equal(merge_deltas([a, b], method), want)


def test_of_equal_signs_the_mean_is_taken() -> None:
    assert merge_deltas([torch.tensor([[1.0, -1.0]]), torch.tensor([[3.0, -3.0]])]).tolist() == [[2.0, -2.0]]


@pytest.mark.parametrize("method", ["ties", "sign"])
@pytest.mark.parametrize("values", [(1, -1), (1, 2, -3), (5, 2, -7), (1, 1, -1, -1)])
def test_exact_cancellation_elects_plus_whatever_the_order(method: str, values: tuple[float, ...]) -> None:
    parts = [torch.full((1, 1), float(v)) for v in values]
    positive = [v for v in values if v > 0]
    for order in itertools.permutations(parts):
        assert merge_deltas(list(order), method).item() == pytest.approx(sum(positive) / len(positive))


@pytest.mark.parametrize("method", ["ties", "sign", "linear"])
@quick
@given(seed=seeds, n=st.integers(2, 4), density=st.sampled_from([0.53, 1.0]))
def test_order_of_the_shards_does_not_matter(method: str, seed: int, n: int, density: float) -> None:
    deltas = [masked(seed + i) for i in range(n)]
    weights = [1.0 + i for i in range(n)]
    first = merge_deltas(deltas, method, density=density, weights=weights)
    again = merge_deltas(deltas[::-1], method, density=density, weights=weights[::-1])
    torch.testing.assert_close(first, again, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", list(METHODS))
def test_merging_one_delta_gives_it_back(method: str) -> None:
    torch.testing.assert_close(merge_deltas([masked(1)], method), masked(1))


@pytest.mark.parametrize("method", list(METHODS))
def test_merging_keeps_inputs_and_global_random_state(method: str) -> None:
    deltas = [masked(0), masked(1)]
    copies = [d.clone() for d in deltas]
    before = torch.get_rng_state()
    merge_deltas(deltas, method, density=0.5)
    assert torch.equal(torch.get_rng_state(), before)
    for d, c in zip(deltas, copies, strict=True):
        assert torch.equal(d, c)


@pytest.mark.parametrize("method", list(METHODS))
def test_what_no_shard_touched_stays_zero(method: str) -> None:
    deltas = [masked(i, 0.2) for i in range(3)]
    untouched = torch.stack(deltas).abs().sum(0) == 0
    merged = merge_deltas(deltas, method, density=0.5)
    assert (merged[untouched] == 0).all()
    assert merged.dtype == torch.float32
    assert merged.isfinite().all()


def test_linear_is_the_weighted_sum() -> None:
    a, b = masked(0), masked(1)
    torch.testing.assert_close(merge_deltas([a, b], "linear"), (a + b) / 2)
    torch.testing.assert_close(merge_deltas([a, b], "linear", weights=[0.3, 2]), 0.3 * a + 2 * b)


def test_weights_shift_the_mean_and_the_election() -> None:
    a, b = torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, -2.0]])
    assert merge_deltas([a, b], weights=[3, 1]).tolist() == [[1.5, 1.0]]
    assert merge_deltas([a, b], weights=[1, 1]).tolist() == [[2.0, -2.0]]


@pytest.mark.parametrize("method", ["ties", "sign"])
def test_only_the_ratio_of_the_weights_matters_where_it_is_normalised(method: str) -> None:
    deltas = [masked(i) for i in range(3)]
    one = merge_deltas(deltas, method, weights=[1, 2, 4])
    torch.testing.assert_close(one, merge_deltas(deltas, method, weights=[0.01, 0.02, 0.04]))


@pytest.mark.parametrize("density", [0.2, 0.53])
def test_trimming_keeps_the_largest_entries(density: float) -> None:
    delta = normal(0)
    kept = merge_deltas([delta], "ties", density=density)
    assert int((kept != 0).sum()) == int(density * delta.numel())
    assert kept[kept != 0].abs().min() >= delta[kept == 0].abs().max()


def test_of_equally_large_entries_trimming_keeps_the_first() -> None:
    delta = torch.full((2, BLOCK), -2.0)
    delta[0, :3] = torch.tensor([1.0, 5.0, 2.0])
    kept = merge_deltas([delta], "ties", density=(BLOCK + 10) / (2 * BLOCK)).flatten()
    want = delta.flatten().clone()
    want[0] = 0.0
    want[BLOCK + 11 :] = 0.0
    assert torch.equal(kept, want)


def test_packed_deltas_of_half_precision_are_merged_as_their_dense_form() -> None:
    packed = [SparseDelta.pack(normal(i, LARGE) * draw_mask(LARGE, 0.2, i), dtype=torch.bfloat16) for i in range(3)]
    assert torch.equal(merge_deltas(packed, density=0.1), merge_deltas([p.dense() for p in packed], density=0.1))


def test_dropping_is_seeded_and_keeps_the_mean() -> None:
    delta = torch.ones(200, 200)
    one, two, other = (merge_deltas([delta], "dare", density=0.25, seed=s) for s in (5, 5, 6))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert set(one.unique().tolist()) == {0.0, 4.0}
    assert abs(one.mean().item() - 1) < 0.05


def test_shards_drop_different_entries() -> None:
    ones = torch.ones(50, 50)
    merged = merge_deltas([ones, ones], "dare", density=0.5, weights=[1, 10])
    assert set(merged.unique().tolist()) == {0.0, 2.0, 20.0, 22.0}


def test_half_precision_deltas_are_merged_in_fp32() -> None:
    deltas = [masked(i).bfloat16() for i in range(3)]
    assert torch.equal(merge_deltas(deltas), merge_deltas([d.float() for d in deltas]))


@pytest.mark.parametrize(
    ("deltas", "options", "says"),
    [
        ([], {}, "nothing to merge"),
        ([masked(0)], {"method": "slerp"}, "slerp"),
        ([masked(0)], {"density": 0.0}, "density"),
        ([masked(0)], {"density": 1.5}, "density"),
        ([masked(0)], {"density": float("nan")}, "density"),
        ([masked(0)], {"weights": [1, 2]}, "1 shards but 2 weights"),
        ([masked(0), masked(1)], {"weights": []}, "2 shards but 0 weights"),
        ([masked(0), masked(1)], {"weights": [1, 0]}, "positive"),
        ([masked(0), masked(1)], {"weights": [1, -1]}, "positive"),
        ([masked(0), masked(1)], {"weights": [1, float("nan")]}, "positive"),
        ([masked(0), masked(0).T.contiguous()], {}, "shape"),
    ],
)
def test_bad_requests_are_refused(deltas: list[Tensor], options: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        merge_deltas(deltas, **options)
