"""The activation indicator: how strongly a delta reacts to a prompt. Training, calibration and routing share it.

Eq. 3 of the paper, Delta_act(x) = ||A(x) (W' - W)||_2, taken per token and averaged over the prompt's content tokens,
so that padding, special tokens and the answer never enter.

Shapes: `B` rows, `T` tokens, `F` FFN width, `D` model width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def activation_indicator(a: Tensor, content: Tensor, delta: Tensor) -> Tensor:
    """mean over content tokens t of ||a_t delta^T||_2, fp32 [B].

    Args:
        a: input of the edited projection [B, T, F].
        content: content mask [B, T].
        delta: [D, F].
    """
    return indicator_of(F.linear(a.to(delta.dtype), delta), content)


def indicator_of(side: Tensor, content: Tensor) -> Tensor:
    """The same [B] where a delta^T [B, T, D] is known already."""
    return content_mean(side.float().norm(dim=-1), content)


def content_mean(per_token: Tensor, content: Tensor) -> Tensor:
    """The mean over content tokens [B] of something known of every token [B, T]."""
    weight = content.to(per_token)
    return (per_token * weight).sum(1) / weight.sum(1).clamp(min=1)


def layer_scale(a: Tensor, content: Tensor, weight: Tensor) -> Tensor:
    """mean over content tokens of ||a_t W^T||_2, fp32 [B]: the unit in which margins and thresholds are expressed."""
    return activation_indicator(a, content, weight)
