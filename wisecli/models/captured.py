"""What the frozen part of a base makes of a row, kept so that the part above can be run on it alone, and rows put
together for that.

Shapes: `B` rows, `T` tokens, `F` FFN width, `D` model width, `N` real tokens of all rows, `n` supervised positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class CapturedRow:
    """What is constant about one row: its ids [T], `a` [T, F] and the stream it joins [T, D].

    `stream` is the edited layer's own output when the projection is added to it unchanged, else the layer's input.
    `content` [T] marks the prompt's content tokens. `entry` [D] is the residual stream that enters the edited layer, at
    the last content token: what the prompt's key is made of. Of S residual streams, `stream` is [T, S, D] and `entry`
    [S D]. `prompt` is how many tokens the prompt has; `beside` what lower layers leave to upper ones past the stream,
    as keys and values that these share.
    """

    ids: Tensor
    content: Tensor
    a: Tensor
    stream: Tensor
    entry: Tensor
    prompt: int
    beside: Any = None

    @property
    def predicting(self) -> slice:
        """Positions from which the tokens of the target are predicted."""
        return slice(self.prompt - 1, len(self.ids) - 1)

    def alone(self) -> CapturedRow:
        """The row in memory of its own."""
        names = ("ids", "content", "a", "stream", "entry")
        return replace(self, **{name: getattr(self, name).clone() for name in names})

    @property
    def last(self) -> Tensor:
        """`a` [F] at the last content token."""
        return self.a[int(self.content.nonzero()[-1])]


@dataclass(frozen=True)
class StackedRows:
    """Captured rows made ready for the upper part: put together once, asked as often as wanted.

    Attributes:
        ids: [B, T], padded on the right with zeros, as all that is padded.
        a: input of the edited projection at the real tokens of all rows, one after the other [N, F].
        stream: [B, T, D].
        at: where a supervised token is predicted, as positions in [B T], row by row [n].
        targets: the ids predicted there [n].
        beside: what goes past the rows' streams, padded; see `CapturedRow`.
        counts: how many of them each row has.
        tokens: where the real tokens are, as positions in [B T], row by row [N].
    """

    ids: Tensor
    a: Tensor
    stream: Tensor
    at: Tensor
    targets: Tensor
    counts: tuple[int, ...]
    tokens: Tensor
    beside: Any = None

    @classmethod
    def of(cls, rows: Sequence[CapturedRow]) -> StackedRows:
        """The rows, in order."""
        ids = pad_sequence([r.ids for r in rows], batch_first=True)
        width = ids.shape[1]  # told here, so that nothing is asked back from an accelerator in every step
        places = [k * width + t for k, r in enumerate(rows) for t in range(r.prompt - 1, len(r.ids) - 1)]
        at = torch.tensor(places, dtype=torch.long, device=ids.device)
        real = torch.arange(width) < torch.tensor([len(r.ids) for r in rows])[:, None]
        return cls(
            ids=ids,
            a=torch.cat([r.a for r in rows]),
            stream=pad_sequence([r.stream for r in rows], batch_first=True),
            at=at,
            targets=ids.flatten()[at + 1],
            counts=tuple(len(r.ids) - r.prompt for r in rows),
            tokens=real.flatten().nonzero()[:, 0].to(ids.device),
            beside=_padded([r.beside for r in rows]),
        )

    def right(self, logits: Tensor) -> Tensor:
        """Whether logits [n, V] give every token of a row's target by argmax [B]."""
        return torch.stack([x.all() for x in (logits.argmax(-1) == self.targets).split(self.counts)])

    def moved(self, delta: Tensor) -> Tensor:
        """a delta^T at the real tokens of all rows, one after the other [N, D], under a delta [D, F]."""
        return F.linear(self.a.to(delta.dtype), delta)

    def side(self, delta: Tensor) -> Tensor:
        """a delta^T [B, T, D] under a delta [D, F], worked out at the real tokens alone."""
        return self.padded(self.moved(delta))

    def padded(self, x: Tensor) -> Tensor:
        """What is known of the real tokens of all rows, one after the other [N, D], as a batch [B, T, D] with zeros."""
        rows, width = self.ids.shape
        return x.new_zeros(rows * width, x.shape[-1]).index_copy_(0, self.tokens, x).view(rows, width, -1)


def cut(beside: Any, row: int, n: int) -> Any:
    """What goes past the stream of one row, without padding: its keys and values [H, n, d]; None for nothing."""
    if isinstance(beside, dict):
        return {k: cut(v, row, n) for k, v in beside.items()} or None
    if isinstance(beside, tuple | list):
        return tuple(cut(v, row, n) for v in beside)
    return beside[row, :, :n].clone()


def _padded(beside: Sequence[Any]) -> Any:
    """What goes past the streams of rows, as a batch: keys and values [B, H, T, d]."""
    first = beside[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {k: _padded([b[k] for b in beside]) for k in first}
    if isinstance(first, tuple):
        return tuple(_padded(each) for each in zip(*beside, strict=True))
    return pad_sequence([b.transpose(0, 1) for b in beside], batch_first=True).transpose(1, 2)
