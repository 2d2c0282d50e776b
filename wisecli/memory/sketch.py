"""What a delta makes of activations, estimated from a few rows of it.

With many memories the router cannot afford ||delta_j a|| of every one. A sketch of rank s keeps of each delta the part
that a random projection finds largest, and of the rest only how long each of its columns is:

    ||delta a||^2  ~  ||L a||^2 + sum_f r_f a_f^2,    L = (delta Q^T) Q,   r_f = ||column f of delta - delta Q^T Q||^2,

where the rows of Q [s, F] are an orthonormal basis of what the rows of (R delta) (delta^T delta) span, with R [s, D]
Gaussian (randomised range finding, Halko et al., arXiv:0909.4061). The columns of what is left point in all directions,
as a random mask leaves them: the cross terms that are dropped cancel. On learned deltas this is several times closer
than the same number of rows of R delta alone. It ranks memories and decides nothing.

Shapes: `M` memories, `D` model width, `F` FFN width, `T` tokens, `s` rank.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

RANK = 8
MISSED = 0.2  # an indicator is taken to be no more than this share above its estimate: no memory that passes is missed
NEARLY = 0.1  # the same where it is only about which of two that pass is the stronger
_SEED = 0


class Sketches:
    """Sketches of deltas, in fp32 on the device they are used on: (s + 1) F numbers each.

    Args:
        deltas: each [D, F], of one shape; they are read one at a time.
    """

    def __init__(self, deltas: Iterable[Tensor], rank: int = RANK) -> None:
        with torch.inference_mode(False), torch.no_grad():
            found = [_sketch(d.float().cpu(), rank) for d in deltas]
            self._main = torch.stack([main for main, _ in found])
            self._rest = torch.stack([rest for _, rest in found])

    @torch.no_grad()
    def indicators(self, a: Tensor, content: Tensor) -> Tensor:
        """Estimated mean over content tokens of ||a_t delta_j^T|| (eq. 3), fp32 [M].

        Args:
            a: input of the edited projection for one prompt [T, F].
            content: its content mask [T].
        """
        if self._main.device != a.device:
            with torch.inference_mode(False):
                self._main, self._rest = self._main.to(a.device), self._rest.to(a.device)
        a = a[content.to(a.device, torch.bool)].float()
        if not len(a):
            return a.new_zeros(len(self))
        main = (a @ self._main.flatten(0, 1).T).view(len(a), *self._main.shape[:2])
        return (main.square().sum(-1) + a.square() @ self._rest.T).sqrt().mean(0)

    def __len__(self) -> int:
        return len(self._main)


def _sketch(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L [s, F] up to a rotation, which no length sees, and r [F] of a delta [D, F]."""
    rank = min(rank, *delta.shape)
    draw = torch.randn(rank, len(delta), generator=torch.Generator().manual_seed(_SEED))
    q = torch.linalg.qr((((draw @ delta) @ delta.T) @ delta).T).Q  # [F, s]
    image = delta @ q
    main = torch.linalg.qr(image).R @ q.T
    return main, (delta - image @ q.T).square().sum(0)
