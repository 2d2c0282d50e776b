"""Merge the deltas of several shards into one: a family of methods, one function, settings in a table.

All methods are instances of generalised task arithmetic (Goddard et al., MergeKit): sparsify each delta, weigh it, let
the signs be elected, sum, normalise. Ties is the paper's choice for WISE. Merging is elementwise and runs in fp32,
block by block: beside the result, memory does not grow with the matrix, but for one byte per entry where entries are
dropped at random. Trimming finds the size from which entries are kept by counting, in passes over the bits of the
numbers, and sorts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wisecli.errors import UsageError
from wisecli.memory.bits import BLOCK, SparseDelta, draw


@dataclass(frozen=True)
class MergeMethod:
    """How deltas are combined.

    Attributes:
        trim: keep only the `density` share of largest entries of each delta.
        drop: keep a random `density` share instead, divided by the density.
        elect: only entries whose sign agrees with the elected one take part.
        normalise: divide by the weights that took part, so an entry touched by one shard keeps its full size.
    """

    paper: str
    trim: bool = False
    drop: bool = False
    elect: bool = False
    normalise: bool = False


METHODS: dict[str, MergeMethod] = {
    "ties": MergeMethod("TIES-Merging, arXiv:2306.01708", trim=True, elect=True, normalise=True),
    "sign": MergeMethod("TIES-Merging without trimming, arXiv:2306.01708", elect=True, normalise=True),
    "dare": MergeMethod("DARE, arXiv:2311.03099", drop=True),
    "dare-ties": MergeMethod("DARE with sign election, arXiv:2311.03099", drop=True, elect=True),
    "linear": MergeMethod("Task arithmetic, arXiv:2212.04089"),
}


def merge_deltas(
    deltas: Sequence[Tensor | SparseDelta],
    method: str = "ties",
    *,
    density: float = 1.0,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Tensor:
    """One delta from several of the same shape.

    With sparsified deltas d_i and weights w_i, m_i = w_i d_i, and the elected sign s = +1 where sum_i m_i >= 0 else -1:
    the result is sum_i K_i m_i / sum_i K_i w_i with K_i = [sign(m_i) = s] for Ties; without election K_i = 1, without
    normalisation the divisor is 1.

    Args:
        deltas: tensors of one shape, or packed deltas, which are then never unpacked as a whole.
        method: a name in `METHODS`.
        density: share of entries kept by trimming or dropping, in (0, 1]. Of entries equally large at the limit of
            what is trimmed, the first in row-major order are kept.
        weights: one per delta; 1/n each when None.
        seed: of the random drop.

    Returns:
        The merged delta, dense, fp32.
    """
    weights = _checked(deltas, method, density, weights)
    how = METHODS[method]
    # Relative to the largest, equal weights are exactly 1: thirds of 1, 2 and -3 would not cancel in every order.
    top = max(weights)
    shares = [w / top for w in weights]
    generator = torch.Generator().manual_seed(seed)
    streams = [_sparsified(d, how, density, generator) for d in deltas]
    shape = deltas[0].shape
    merged = torch.empty(math.prod(shape))
    for out, *blocks in zip(merged.split(BLOCK), *streams, strict=True):
        parts = [b if w == 1.0 else b * w for b, w in zip(blocks, shares, strict=True)]
        if how.elect:
            _elected(parts, shares, how.normalise, out)
        else:
            torch.sum(torch.stack(parts), 0, out=out)
            if how.normalise:
                out /= sum(shares)
        if not how.normalise:
            out *= top
    return merged.view(shape)


def _checked(
    deltas: Sequence[Tensor | SparseDelta], method: str, density: float, weights: Sequence[float] | None
) -> list[float]:
    """The weights, once it is sure that these deltas can be merged so."""
    if not deltas:
        raise UsageError("There is nothing to merge.")
    if method not in METHODS:
        raise UsageError(f"Unknown merge method {method!r}.", hint=f"Use one of {', '.join(METHODS)}.")
    if not 0 < density <= 1:
        raise UsageError(f"--density must lie in (0, 1], not {density}.")
    weights = list(weights) if weights is not None else [1 / len(deltas)] * len(deltas)
    if len(weights) != len(deltas):
        raise UsageError(f"There are {len(deltas)} shards but {len(weights)} weights.", hint="Give one per shard.")
    if not all(0 < w < math.inf for w in weights):
        raise UsageError("Merge weights must be positive.")
    if any(tuple(d.shape) != tuple(deltas[0].shape) for d in deltas):
        raise UsageError("The shards do not have one shape.", hint="Merge shards of one base and one edit site.")
    return weights


def _elected(parts: Sequence[Tensor], shares: Sequence[float], normalise: bool, out: Tensor) -> None:
    """Into `out`, the sum of the entries whose sign is the elected one, normalised by their weights if wanted.

    Entries are multiplied by the elected sign, +1 or -1: those that agree are then the positive ones.
    """
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    sign = total.ge_(0).mul_(2).sub_(1)
    divisor = torch.zeros_like(out)
    out.zero_()
    for part, share in zip(parts, shares, strict=True):
        agreeing = (part * sign).clamp_(min=0)
        out += agreeing
        divisor.add_(agreeing.sign_(), alpha=share)
    out *= sign
    if normalise:
        out /= divisor.clamp_(min=min(shares))


def _blocks(delta: Tensor | SparseDelta) -> Iterator[Tensor]:
    """The entries in row-major order, fp32, block by block; not to be written to."""
    if isinstance(delta, SparseDelta):
        yield from delta.blocks()
    else:
        for block in delta.detach().reshape(-1).split(BLOCK):
            yield block.to("cpu", torch.float32)


def _sparsified(
    delta: Tensor | SparseDelta, how: MergeMethod, density: float, generator: torch.Generator
) -> Iterator[Tensor]:
    """The blocks of a delta, trimmed or dropped from. What is drawn is drawn now."""
    if density < 1.0 and how.drop:
        return _dropped(_blocks(delta), draw(math.prod(delta.shape), density, generator), density)
    if density < 1.0 and how.trim:
        limit, ties = _limit(delta, int(density * math.prod(delta.shape)))
        return _trimmed(_blocks(delta), limit, ties) if limit else _blocks(delta)
    return _blocks(delta)


def _dropped(blocks: Iterator[Tensor], keep: Tensor, density: float) -> Iterator[Tensor]:
    for block, kept in zip(blocks, keep.split(BLOCK), strict=True):
        yield torch.where(kept, block / density, 0.0)


def _trimmed(blocks: Iterator[Tensor], limit: int, ties: int) -> Iterator[Tensor]:
    """The blocks without what is smaller than the limit, and with the first `ties` of the entries that equal it."""
    least = float(torch.tensor(limit, dtype=torch.int32).view(torch.float32))
    for block in blocks:
        size = block.abs()
        equal = size.eq(least).nonzero()[:ties, 0]
        keep = size.gt_(least)
        keep[equal] = 1.0
        ties -= len(equal)
        yield keep.mul_(block)


def _size(block: Tensor) -> Tensor:
    """|x| of fp32 numbers as integers of the same order: their bits without the sign."""
    return block.view(torch.int32) & 0x7FFFFFFF


def _limit(delta: Tensor | SparseDelta, k: int) -> tuple[int, int]:
    """The size (as `_size` has it) from which the k largest entries are kept, and how many of exactly that size.

    0, 0 where no more than k are not zero: then all of those are kept, and zeros need not be told apart.
    """
    entries = delta.values if isinstance(delta, SparseDelta) else delta
    if k >= sum(int(block.count_nonzero()) for block in _blocks(entries)):
        return 0, 0
    upper = torch.zeros(1 << 15, dtype=torch.long)
    for block in _blocks(entries):
        upper += torch.bincount(_size(block) >> 16, minlength=1 << 15)
    high, k = _from_the_top(upper, k)
    lower = torch.zeros(1 << 16, dtype=torch.long)
    for block in _blocks(entries):
        size = _size(block)
        lower += torch.bincount(size[size >> 16 == high] & 0xFFFF, minlength=1 << 16)
    low, k = _from_the_top(lower, k)
    return high << 16 | low, k


def _from_the_top(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin in which the k-th entry from the top lies, and how many of its entries are among the k."""
    above = counts.flip(0).cumsum(0)
    at = int(torch.searchsorted(above, k))
    return len(counts) - 1 - at, k - (int(above[at - 1]) if at else 0)
