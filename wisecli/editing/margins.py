"""What shapes a delta's activation indicator while it is learned: the hinges of the paper's losses.

With d the indicator (eq. 3) in the layer's own unit ||a W^T||, over the rows r of an edit, an irrelevant prompt o,
prompts m of earlier shards, and [.]_+ the hinge, each a mean over those that violate it:

    L_a    = [gamma + d_o - d_r]_+ + [d_o - alpha]_+ + [beta - d_r]_+      (eq. 5)
    L_memo = [d_m - alpha]_+                                               (eq. B.5)

L_memo, replay, keeps a later shard's delta quiet on what earlier shards hold, so that retrieval does not take the later
one for it, and merging disturbs less. It needs the earlier *prompts*, not the earlier deltas: shards stay independent.

Shapes: `B` rows, `T` tokens, `F` FFN width, `D` model width.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from wisecli.data.pool import ordinary_prompts
from wisecli.data.records import EditRecord
from wisecli.editing.batch import CapturedEdit, batches
from wisecli.memory.indicator import activation_indicator, layer_scale
from wisecli.models.captured import CapturedRow
from wisecli.models.upper import UpperModel

_KEPT = 256  # earlier prompts that a shard replays at most, so that a long stream takes no more memory than a short one
_DRAWN = 16  # of them in a step


class Margins:
    """The layer's unit, and ordinary prompts to be quiet on.

    Args:
        upper: its base and edit site.
        margins: alpha, beta, gamma, in units of the layer's own scale, so that one set of defaults serves every base.
    """

    def __init__(self, upper: UpperModel, margins: tuple[float, float, float]) -> None:
        self.alpha, self.beta, self.gamma = margins
        self.pool = upper.capture([upper.encoder.prompt(p) for p in ordinary_prompts()[:64]])
        self.unit = float(layer_scale(*stack(self.pool), upper.site.weight(upper.model).float()).median())

    def indicator(self, rows: tuple[Tensor, Tensor], delta: Tensor) -> Tensor:
        """d [B] of rows as `stack` gives them."""
        return activation_indicator(*rows, delta) / self.unit

    def loss(self, d: Tensor) -> Tensor:
        """L_a (eq. 5) of the indicators of an edit's rows and, last, of an irrelevant one [B + 1]."""
        d = d / self.unit
        d_in, d_out = d[:-1], d[-1]
        quiet = (d_out - self.alpha).expand_as(d_in)  # their mean is the one's
        return violators(torch.stack([self.gamma + d_out - d_in, quiet, self.beta - d_in])).sum()


class Replay:
    """L_memo over prompts of earlier shards.

    Args:
        margins: of the layer.
        records: edits of earlier shards; a seeded sample is kept.
        seed: of the sample, and of what is drawn from it at each step.
    """

    def __init__(self, upper: UpperModel, margins: Margins, records: Sequence[EditRecord], seed: int) -> None:
        kept = random.Random(seed).sample(list(records), min(_KEPT, len(records)))
        self.margins = margins
        self.rows = upper.capture([upper.encoder.prompt(r.asked) for r in kept])
        self.generator = torch.Generator().manual_seed(seed)

    def loss(self, delta: Tensor) -> Tensor:
        """L_memo of a few of the prompts, drawn anew each time."""
        picked = torch.randperm(len(self.rows), generator=self.generator)[:_DRAWN].tolist()
        rows: list[CapturedRow] = [self.rows[i] for i in picked]
        return violators(self.margins.indicator(stack(rows), delta) - self.margins.alpha)


@torch.no_grad()
def indicators_of(edits: Sequence[CapturedEdit], delta: Tensor) -> dict[str, float]:
    """What each edit's bare prompt reaches under a delta [D, F] (eq. 3), in the activations' own unit, by its id."""
    found = indicators([e.rows[0] for e in edits], delta).tolist()
    return {e.record.id: float(f"{x:.6g}") for e, x in zip(edits, found, strict=True)}


@torch.no_grad()
def indicators(rows: Sequence[CapturedRow], delta: Tensor) -> Tensor:
    """What the prompts of rows reach under a delta [D, F] (eq. 3), on the CPU [N]."""
    found = torch.zeros(len(rows))
    for picked in batches([len(r.ids) for r in rows]):
        found[picked] = activation_indicator(*stack([rows[i] for i in picked]), delta).cpu()
    return found


def stack(rows: Sequence[CapturedRow]) -> tuple[Tensor, Tensor]:
    """`a` [B, T, F] and content [B, T] of rows, padded."""
    a = pad_sequence([r.a for r in rows], batch_first=True)
    return a.float(), pad_sequence([r.content for r in rows], batch_first=True)


def violators(hinge: Tensor) -> Tensor:
    """Mean of the positive entries [..] of [.., n], 0 where there are none."""
    positive = F.relu(hinge)
    return positive.sum(-1) / (positive > 0).sum(-1).clamp(min=1)
