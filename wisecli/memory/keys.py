"""Edit keys: where each edit lives among what the base makes of prompts.

A prompt is represented by the residual stream h that enters the edited layer at its last content token. A linear map
makes wordings of one fact alike and different facts unlike: with S_w the covariance between wordings of one pool fact
and S_t that of all pool prompts, the columns of P are the generalised eigenvectors of (S_t, S_w) with the largest
eigenvalues (Fisher's discriminant), in which S_w is the same in all directions, and

    z = c (h - mu) P,    alike(z, k) = 1 - ||z - k|| / sqrt(2),

with c such that the pool's prompts have a mean squared length of 1: 1 is the same place, and two prompts that have
nothing to do with one another are about 0 alike. An edit has one key for its prompt alone and one for each of its
forms behind a context. What an ordinary prompt reaches by chance differs from edit to edit, so the score of a query q
for an edit e takes half of it off:

    s_e(q) = max over keys k of e of  alike(z_q, k)  -  crowding_e / 2,
    crowding_e = max over ordinary prompts p of  alike(z_p, k_e),  with k_e the key of its prompt alone.

The edit of the largest score is the nearest, and names the answer's reason; `lookup` finds it. P and the keys are
kept in 8 bits. P is the same for keys and queries, so that this costs nothing; a key lies a little beside the entry it
was made of, and an edit's own prompt scores up to .01 less than 1.

Shapes: `N` prompts, `D` model width, `r` kept directions, `n` keys, `E` edits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from wisecli.data.pool import ALONE
from wisecli.memory.lookup import Index, alike, no_autocast, score

RIDGE = 0.1  # of the mean variance within a fact, added to every direction's
WIDEST = 1024  # principal directions at most in which the discriminant is sought


@dataclass(frozen=True)
class KeySpace:
    """mu [D] in bf16; the projection P [D, r] in int8 with a scale for each direction [r], which holds c too.

    mu is rounded: it keeps numbers small and cancels out of every distance.
    """

    mean: Tensor
    projection: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, h: Tensor, group: Tensor, rank: int, axes: Tensor | None = None) -> KeySpace:
        """Find the directions that tell facts apart.

        Args:
            h: entry of the layer for pool prompts [N, D].
            group: the fact that a prompt is a wording of [N]; -1 for prompts of no group. Without any group of two
                wordings the space is whitened by S_t instead.
            rank: directions kept at most.
            axes: within which to look for them [D, p], where they are known; see `principal_axes`.
        """
        h = h.cpu().double()
        axes = principal_axes(h) if axes is None else axes
        mean = h.mean(0)
        h = h - mean
        inside = h @ axes
        total = inside.T @ inside / max(1, len(h) - 1)
        within = _within(inside, group.cpu())
        if not within.any():
            within = total
        within = within + RIDGE * within.trace() / len(within) * torch.eye(len(within), dtype=h.dtype)
        spread, turn = torch.linalg.eigh(within)
        white = turn * spread.rsqrt()
        _, order = torch.linalg.eigh(white.T @ total @ white)
        projection = axes @ white @ order.flip(1)[:, :rank]
        # The sign of an eigenvector is arbitrary: fix it, so that the same activations give the same bytes.
        projection = projection * torch.sign(projection.gather(0, projection.abs().argmax(0, keepdim=True)))
        projection, step = to_int8(projection, 0)
        size = (h @ (projection * step)).square().sum(1).mean().clamp(min=1e-12)
        return cls(mean.bfloat16(), projection.contiguous(), (step * size.rsqrt()).float())

    def __call__(self, h: Tensor) -> Tensor:
        """Vectors [.., r] for entries [.., D]."""
        if h.device not in self._placed:
            with torch.inference_mode(False):
                mean, whole, scale = (t.to(h.device).float() for t in (self.mean, self.projection, self.scale))
                self._placed[h.device] = mean, whole * scale
        mean, projection = self._placed[h.device]
        with no_autocast(h.device):
            return (h.float() - mean) @ projection

    @cached_property
    def _placed(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        """mu and c P in fp32 by device."""
        return {}

    @property
    def rank(self) -> int:
        return self.projection.shape[1]


def principal_axes(h: Tensor) -> Tensor:
    """The directions in which prompts differ at all, `WIDEST` of them at most [D, p], from entries [N, D]."""
    h = h.cpu().double()
    h = h - h.mean(0)
    variance, axes = torch.linalg.eigh(h.T @ h / max(1, len(h) - 1))
    # Fewer prompts than directions: the rest of the spectrum is rounding noise, and so are its directions.
    return axes[:, -min(WIDEST, int((variance > 1e-12 * variance[-1]).sum())) :]


def _within(h: Tensor, group: Tensor) -> Tensor:
    """Covariance [p, p] of wordings about the mean of their fact."""
    sizes = group[group != ALONE].unique(return_counts=True)
    several = sizes[0][sizes[1] > 1]
    mine = torch.isin(group, several)
    if not mine.any():
        return torch.zeros(h.shape[1], h.shape[1], dtype=h.dtype)
    _, index = group[mine].unique(return_inverse=True)
    means = torch.zeros(len(several), h.shape[1], dtype=h.dtype).index_add_(0, index, h[mine])
    means /= index.bincount()[:, None]
    rest = h[mine] - means[index]
    return rest.T @ rest / (len(rest) - len(several))


@dataclass(frozen=True)
class KeyStore:
    """All keys of a side memory and the edit each belongs to [n]; crowding [E] (fp16) of each edit.

    A key is stored as whole numbers [r] (int8) and their step; where prompts are looked up, `vectors` are kept beside.
    """

    space: KeySpace
    keys: Tensor
    step: Tensor
    owner: Tensor
    crowding: Tensor

    @classmethod
    def of(cls, space: KeySpace, vectors: Tensor, owner: Tensor, crowding: Tensor) -> KeyStore:
        """The store of keys given as vectors [n, r]."""
        return cls(space, *to_int8(vectors.float(), 1), owner, crowding.half())

    @property
    def vectors(self) -> Tensor:
        """The keys [n, r] in fp32."""
        return self.keys.float() * self.step[:, None]

    @property
    def nbytes(self) -> int:
        """What the edits' keys take; the space, which is the same for one edit and for many, apart."""
        return sum(t.nbytes for t in (self.keys, self.step, self.owner, self.crowding))

    def scores(self, h: Tensor) -> Tensor:
        """s_k for every key [.., n], for entries [.., D]."""
        return score(self.space(h), self.vectors.to(h.device), self.off.to(h.device))

    @torch.no_grad()
    def nearest(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Largest score [N] and the edit [N] it belongs to, the first of equal ones, for entries [N, D]."""
        if h.device not in self._placed:
            with torch.inference_mode(False):
                owner = self.owner.to(h.device)
                self._placed[h.device] = Index(self.vectors.to(h.device), self.off.to(h.device)), owner
        index, owner = self._placed[h.device]
        best, at = index.nearest(self.space(h))
        return best, owner[at]

    @cached_property
    def _placed(self) -> dict[torch.device, tuple[Index, Tensor]]:
        """The keys and their owners by device."""
        return {}

    @property
    def off(self) -> Tensor:
        """The crowding of each key's edit [n]."""
        return self.crowding.float()[self.owner]


def to_int8(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Whole numbers (int8) and their step, with one step along `dim`: x is about one times the other."""
    step = (x.abs().amax(dim, keepdim=True) / 127).clamp(min=torch.finfo(x.dtype).tiny)
    return (x / step).round().to(torch.int8), step.squeeze(dim)


def crowding(keys: Tensor, ordinary: Tensor) -> Tensor:
    """How alike each key [n, r] is to the nearest ordinary prompt [P, r]; 0 without any."""
    return alike(keys, ordinary).max(1).values if len(ordinary) else torch.zeros(len(keys))
