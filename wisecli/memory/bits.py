"""Masks as seeded draws and as packed bits, and deltas as bits plus values.

A delta is zero outside its mask, so it is kept as one bit per entry and one value per set bit (26 % of the dense bf16
matrix at density .2). Everything runs block by block over the flat matrix, in pieces that stay in the processor's
cache: beside what is returned, memory does not grow with the matrix. Nothing here knows about files or models.

Shapes: a mask or delta is [D, F] = [d_out, d_in]; its packed bits are uint8 [ceil(D*F/8)], most significant bit first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wisecli.errors import InputError, UsageError

BLOCK = 1 << 16  # entries per block; a multiple of 8, so that blocks begin at whole bytes of bits


def draw_mask(shape: tuple[int, int], density: float, seed: int) -> Tensor:
    """Bernoulli mask (bool, on the CPU): each entry is trainable with probability `density` (eq. 6, rho).

    The same seed gives the same mask on every machine; global random state is neither read nor changed.
    """
    if not 0 < density <= 1:
        raise UsageError(f"Mask density must lie in (0, 1], not {density}.")
    return draw(shape[0] * shape[1], density, torch.Generator().manual_seed(seed)).view(shape)


def draw(n: int, density: float, generator: torch.Generator) -> Tensor:
    """n draws (bool) that are true with probability `density`: the same as `torch.rand(n) < density` gives."""
    out = torch.empty(n, dtype=torch.bool)
    for part in out.split(BLOCK):
        torch.lt(torch.rand(len(part), generator=generator), density, out=part)
    return out


def pack_bits(mask: Tensor) -> Tensor:
    """Packed bits (uint8) of a boolean tensor."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpack_bits(bits: Tensor, shape: tuple[int, int]) -> Tensor:
    """The boolean tensor of the given shape that was packed."""
    n = shape[0] * shape[1]
    _check_fit(bits, shape)
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=n).view(bool)).view(shape)


@dataclass(frozen=True)
class SparseDelta:
    """A delta [D, F] as packed mask bits and the values at the set bits, in row-major order."""

    bits: Tensor
    values: Tensor
    shape: tuple[int, int]

    @classmethod
    def pack(cls, delta: Tensor, mask: Tensor | None = None, dtype: torch.dtype = torch.float32) -> SparseDelta:
        """Pack a dense delta; without a mask, the non-zero entries (after rounding to `dtype`) are kept."""
        entries = delta.detach().cpu().reshape(-1)
        kept = mask.cpu().reshape(-1) if mask is not None else None
        bits = torch.empty((len(entries) + 7) // 8, dtype=torch.uint8)
        values = [torch.empty(0, dtype=dtype)]
        for at in range(0, len(entries), BLOCK):
            block = entries[at : at + BLOCK].to(dtype)
            inside = block != 0 if kept is None else kept[at : at + BLOCK]
            packed = pack_bits(inside)
            bits[at // 8 : at // 8 + len(packed)] = packed
            values.append(block[torch.from_numpy(np.flatnonzero(inside.numpy()))])
        return cls(bits, torch.cat(values), (delta.shape[0], delta.shape[1]))

    def mask(self) -> Tensor:
        return unpack_bits(self.bits, self.shape)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The delta as a dense [D, F] tensor.

        Raises:
            InputError: bits and values do not belong together.
        """
        out = torch.empty(self.numel, dtype=dtype)
        for part, block in zip(out.split(BLOCK), self.blocks(dtype), strict=True):
            part.copy_(block)
        return out.view(self.shape)

    def blocks(self, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        """The dense delta in row-major order, `BLOCK` entries at a time, the last block shorter.

        Raises:
            InputError: bits and values do not belong together.
        """
        self._check()
        seen = 0
        for inside in self._inside():
            at = torch.from_numpy(np.flatnonzero(inside))
            block = torch.zeros(len(inside), dtype=dtype)
            yield block.scatter_(0, at, self.values[seen : seen + len(at)].to(dtype))
            seen += len(at)

    def _inside(self) -> Iterator[np.ndarray]:
        """The mask's blocks (bool)."""
        bits = self.bits.numpy()
        for at in range(0, self.numel, BLOCK):
            some = bits[at // 8 : (at + BLOCK) // 8]
            yield np.unpackbits(some, count=min(BLOCK, self.numel - at)).view(bool)

    def _check(self) -> None:
        _check_fit(self.bits, self.shape)
        entries = sum(int(np.count_nonzero(inside)) for inside in self._inside())
        if entries != self.values.numel():
            raise InputError(f"The mask has {entries} entries but there are {self.values.numel()} values.")

    @property
    def numel(self) -> int:
        """Entries of the dense delta."""
        return self.shape[0] * self.shape[1]

    @property
    def density(self) -> float:
        """Share of stored entries."""
        return self.values.numel() / self.numel


def _check_fit(bits: Tensor, shape: tuple[int, int]) -> None:
    if bits.numel() != (shape[0] * shape[1] + 7) // 8:
        raise InputError(f"A mask of {bits.numel()} bytes does not fit a {shape[0]} x {shape[1]} matrix.")
