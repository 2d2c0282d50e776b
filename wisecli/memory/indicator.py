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
    sizes = F.linear(a.to(delta.dtype), delta).float().norm(dim=-1)
    return (sizes * content_shares(content.to(sizes))).sum(-1)


def content_shares(content: Tensor) -> Tensor:
    """What each token counts in the mean over content tokens [.., T]."""
    return content / content.sum(-1, keepdim=True).clamp(min=1)


def layer_scale(a: Tensor, content: Tensor, weight: Tensor) -> Tensor:
    """mean over content tokens of ||a_t W^T||_2, fp32 [B]: the unit in which margins and thresholds are expressed."""
    return activation_indicator(a, content, weight)
