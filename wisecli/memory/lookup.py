"""The key of the largest score among very many: what a product of matrices rules out is not measured.

One product of matrices gives the distance of a query to all keys, ||z - k||^2 = ||z||^2 + ||k||^2 - 2 z k, several
times quicker than measuring it, but rounded so that what is next to its key may seem 0.01 away. The bound on that
rounding gives the most that each key can score. Those that can reach what the most promising of them does score, one or
two as a rule, are measured. The result is the one of measuring all, bit for bit, and no index has to be built.

Shapes: `N` queries, `n` keys, `r` directions of the key space, `p` pairs of a query and a key.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

SHARE = 0.5  # of the crowding that is taken off
_SMALL = 1024  # keys up to which how they lie in memory does not matter
_FEW = 4096  # pairs of a query and a key up to which measuring all is as quick
_BLOCK = 1 << 24  # queries times keys at a time, so that many of both take no more memory
_PAIRS = 1 << 18  # measured one by one at most; so many come only of keys that are all alike
_EXACT = "donot_use_mm_for_euclid_dist"


def alike(z: Tensor, keys: Tensor) -> Tensor:
    """1 - ||z - k|| / sqrt(2) for queries [.., r] and keys [n, r]: [.., n]."""
    # Through products of matrices, what is next to its key would be as far off as the rounding of its length.
    apart = torch.cdist(z.reshape(-1, z.shape[-1]), keys, compute_mode=_EXACT)
    return 1 - apart.view(*z.shape[:-1], len(keys)) / 2**0.5


def score(z: Tensor, keys: Tensor, crowding: Tensor) -> Tensor:
    """alike(z, k) - crowding / 2 for queries [.., r], keys [n, r] and the crowding of each key [n]: [.., n]."""
    return alike(z, keys) - SHARE * crowding


class Index:
    """Keys where queries are: vectors [n, r] and the crowding of each [n], fp32."""

    def __init__(self, keys: Tensor, crowding: Tensor) -> None:
        self._off = SHARE * crowding
        # Each direction of all keys in one piece: for few queries, the product is twice as quick that way.
        self._keys = keys if len(keys) <= _SMALL else keys.T.contiguous().T
        # Worst case of a sum of r products in either computation, and as much again for the square root and the rest.
        self._slack = 4 * keys.shape[1] * torch.finfo(torch.float32).eps
        self._lengths = (1 - self._slack) * keys.square().sum(1)

    def nearest(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Largest score [N] and its key [N], the first of equal ones, for queries [N, r]."""
        if len(z) * len(self._keys) <= _FEW or not _full_precision():
            return self._measured(z)
        found = [self._nearest(part) for part in z.split(max(1, _BLOCK // len(self._keys)))]
        return torch.cat([best for best, _ in found]), torch.cat([at for _, at in found])

    def _nearest(self, z: Tensor) -> tuple[Tensor, Tensor]:
        most = self._most(z)
        at = most.argmax(1)
        best = self._score(z, at)
        row, key = (most >= best[:, None]).nonzero().T
        if len(row) > _PAIRS:
            return self._measured(z)
        scores = self._score(z[row], key)
        best = best.scatter_reduce(0, row, scores, "amax")
        won = scores == best[row]
        first = torch.full_like(at, len(self._keys)).scatter_reduce(0, row[won], key[won], "amin")
        return best, torch.where(first < len(self._keys), first, at)  # a query that is no number reaches nothing

    def _measured(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Largest score [N] and its key [N], by measuring all."""
        best, at = (alike(z, self._keys) - self._off).max(1)
        return best, at

    def _most(self, z: Tensor) -> Tensor:
        """What each key can score at most [N, n]."""
        with no_autocast(z.device):
            square = torch.addmm(self._lengths, z, self._keys.T, alpha=-2)
        square += (1 - self._slack) * z.square().sum(1, keepdim=True)
        return square.clamp_(min=0).sqrt_().mul_(-(0.5**0.5)).add_(1 + 1e-6).sub_(self._off)

    def _score(self, z: Tensor, at: Tensor) -> Tensor:
        """Measured, of pairs [p]: a query each [p, r] with the key it is paired with."""
        apart = torch.cdist(z[:, None], self._keys[at][:, None], compute_mode=_EXACT)[:, 0, 0]
        return 1 - apart / 2**0.5 - self._off[at]


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Within it nothing is computed in half precision; entering torch's own takes longer than a small product."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def _full_precision() -> bool:
    """Whether products of matrices in fp32 are computed in fp32."""
    return all(b.matmul.fp32_precision in ("none", "ieee") for b in (torch.backends.cuda, torch.backends.mkldnn))
