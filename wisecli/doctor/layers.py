"""Which layers to look at, and how well the gate would do at each, from one pass over the pool.

Gate figures are held out: no fact is tried in a key space that was fitted on it.
Where a layer cannot be edited the reason is kept, not raised.

Shapes: `P` pool prompts, `D` model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wisecli.data.pool import Pool
from wisecli.doctor.report import Candidate
from wisecli.errors import UsageError, WiseError, first_line
from wisecli.evaluation.asking import Progress, Steps
from wisecli.evaluation.metrics import auc, mean
from wisecli.memory.calibration import DEFAULT_SCOPE, key_threshold, try_on_pool
from wisecli.models.base import Base
from wisecli.models.prompts import PromptEncoder
from wisecli.models.site import auto_layer, find_site
from wisecli.models.upper import UpperModel
from wisecli.models.upper import entries_at as _entries_at

_CANDIDATES = 4


def candidate_layers(n_layers: int, wanted: Sequence[int] = ()) -> tuple[int, ...]:
    """Layers from the middle up that have at least one layer above, the default one among them; or those wanted.

    Raises:
        UsageError: a wanted layer does not exist.
    """
    if wanted:
        missing = next((i for i in wanted if not -n_layers <= i < n_layers), None)
        if missing is not None:
            raise UsageError(f"There is no layer {missing}: this base has layers 0 to {n_layers - 1}.")
        return tuple(sorted({i % n_layers for i in wanted}))
    default, last = auto_layer(n_layers), max(0, n_layers - 2)
    first = max(0, min(n_layers // 2, last - 2))
    step = (last - first) / (_CANDIDATES - 1)
    spread = {round(first + step * i) for i in range(_CANDIDATES)}
    if default not in spread:
        inner = [i for i in spread if i not in (first, last)] or sorted(spread)
        spread = spread - {min(inner, key=lambda i: abs(i - default))} | {default}
    return tuple(sorted(spread))


def probe_layer(base: Base, layer: int, encoder: PromptEncoder) -> Candidate:
    """Whether a layer has an edit site, and whether what lies above it can be run on its own."""
    try:
        site = find_site(base.model, layer)
        UpperModel(base.model, site, encoder)
    except Exception as e:
        return Candidate(layer, reason=why(e))
    return Candidate(layer, site=site.path, shape=(site.d_out, site.d_in))


def why(e: Exception) -> str:
    """What stopped a trial, in words.

    Raises:
        Exception: the same one, where it says nothing about the base: memory ran out, or the options do not fit.
    """
    if isinstance(e, MemoryError | UsageError) or type(e).__name__ == "OutOfMemoryError":
        raise e
    return e.message.rstrip(".") if isinstance(e, WiseError) else f"{type(e).__name__}: {first_line(e)}"


def entries_at(
    base: Base, encoder: PromptEncoder, layers: Sequence[int], prompts: Sequence[str]
) -> Steps[dict[int, Tensor]]:
    """The residual stream [P, D] that enters each of some layers at the last content token, in one pass over prompts.

    The same numbers as `UpperModel.capture` gives one layer at a time.
    """
    rows = [encoder.prompt(p) for p in prompts]
    found: dict[int, Tensor] = {}
    done = 0
    for picked, at in _entries_at(base.model, encoder, layers, rows):
        for layer, h in at.items():
            found.setdefault(layer, torch.zeros(len(rows), h.shape[1], dtype=h.dtype))[picked] = h.cpu()
        done += len(picked)
        yield Progress("pool", done, len(rows))
    return found


def gate_figures(h: Tensor, pool: Pool, rank: int) -> dict[str, float | None]:
    """How well keys tell wordings of a fact from near prompts, on facts the key space was not fitted on.

    Args:
        h: what the pool's prompts bring into the layer [P, D].
        pool: the prompts and their groups.
        rank: directions kept.

    Returns:
        `auc`; `epsilon` of the default scope; `routed` and `opened`, the shares of wordings and near prompts above it.
    """
    trial = try_on_pool(h, torch.tensor(pool.group), rank)
    nothing = torch.zeros(0)
    epsilon = key_threshold(trial, trial.edits, nothing, nothing, nothing, DEFAULT_SCOPE)
    return {
        "auc": auc(trial.inside.tolist(), trial.near.tolist()),
        "epsilon": epsilon,
        "routed": mean((trial.inside > epsilon).tolist()),
        "opened": mean((trial.near > epsilon).tolist()),
    }
