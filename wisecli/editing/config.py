"""Settings of an editing run, with their defaults. Written into run.json, so that a run can be repeated and resumed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from wisecli.data.pool import contexts
from wisecli.errors import UsageError

SCHEDULES = ("rehearsal", "published")
_PER_SHARD = 50
_MOST_LR = 1e6
_OPTIONS = ("shards", "shards_at_once", "block", "max_steps", "mask_density")  # of the fields checked below


def shards_for(edits: int) -> int:
    """The default number of shards of a stream: so many that none is large, two at least, none empty.

    A large shard rehearses more rows for every edit that arrives, and its edits carry over less well to other wordings
    than those of several small ones, merged.
    """
    return min(max(1, edits), max(2, math.ceil(edits / _PER_SHARD)))


@dataclass(frozen=True)
class EditConfig:
    """Everything that decides the bytes of the shards, apart from the base and the stream.

    Attributes:
        layer: decoder layer to edit, or "auto".
        module: module path that overrides the search in that layer.
        shards: into how many consecutive slices the stream is cut, each with its own mask and delta.
        shards_at_once: shards that are learned side by side, the rows of their steps in one batch. Their deltas are
            those of one after the other, but for what rounding does to a loss close to a limit.
        mask_density: share of trainable entries per shard (rho).
        seed: of masks, context choice and minibatches.
        schedule: "rehearsal" (default) or "published", the paper's one-edit-after-the-other SGD.
        contexts: how many short sentences are put before each prompt, so that an edit holds in context; none before
            prompts of more than 64 tokens, which are context themselves.
        block: edits that arrive together (rehearsal only).
        max_steps: cap on the steps of each block of edits and, for every ten edits, of going over all of them again;
            learning stops earlier when everything holds. For the published schedule, the steps of each edit.
        lr: step size; for rehearsal in units of (|h| / |a|)^2, so that it fits any scale; absolute for published.
        rows: rows per step (rehearsal).
        tokens: tokens per step at most, so that long rows take no longer; at least two rows are taken (rehearsal).
        dropout: share of the FFN activations dropped at random in each step, so that an edit rests on many of them and
            carries over to other wordings (rehearsal).
        rewording: share of the rows of each step that are moved as another wording would move them (rehearsal).
        confidence: a row is learned when every target token has at least this probability.
        margins: alpha, beta, gamma of the published margin loss, in units of the layer's own scale.
        replay: keep each shard's delta quiet on prompts of earlier shards while it is learned (L_memo, paper B.5).
        act_ratio: epsilon of the activation router as a share of the smallest in-scope indicator.
        rank: directions kept for the edit keys.
        chat: render prompts with the base's chat template.
    """

    layer: int | str = "auto"
    module: str | None = None
    shards: int = 2
    shards_at_once: int = 1
    mask_density: float = 0.2
    seed: int = 0
    schedule: str = "rehearsal"
    contexts: int = 3
    block: int = 10
    max_steps: int = 70
    lr: float | None = None
    rows: int = 10
    tokens: int = 2048
    dropout: float = 0.5
    rewording: float = 0.5
    confidence: float = 0.95
    margins: tuple[float, float, float] = (0.1, 0.4, 0.2)
    replay: bool = False
    act_ratio: float = 0.88
    rank: int = 128
    chat: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UsageError(f"Unknown schedule {self.schedule!r}.", hint=f"Use {' or '.join(SCHEDULES)}.")
        for name in ("shards", "shards_at_once", "block", "max_steps", "rows", "tokens", "rank"):
            if getattr(self, name) < 1:
                raise UsageError(f"{_called(name)} must be at least 1, not {getattr(self, name)}.")
        most = len(contexts())
        if not 0 <= self.contexts <= most:
            raise UsageError(f"--contexts must lie between 0 and {most}, not {self.contexts}.")
        for name in ("mask_density", "confidence", "act_ratio"):
            if not 0 < getattr(self, name) <= 1:
                raise UsageError(f"{_called(name)} must lie in (0, 1], not {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout must lie in [0, 1), not {self.dropout}.")
        if not 0 <= self.rewording <= 1:
            raise UsageError(f"rewording must lie in [0, 1], not {self.rewording}.")
        if self.lr is not None and not 0 < self.lr <= _MOST_LR:
            raise UsageError(f"--lr must be positive and {_MOST_LR:g} at most, not {self.lr}.")

    @classmethod
    def for_stream(
        cls, edits: int, tokenizer: Any, *, shards: int | None = None, chat: bool | None = None, **settings: Any
    ) -> EditConfig:
        """The config of a run, with what the stream and the base decide where nothing was said.

        Args:
            edits: of the stream.
            tokenizer: of the base.
            shards: None for `shards_for` so many.
            chat: None for the chat template where the base has one.
            settings: other fields.
        """
        return cls(
            shards=shards if shards is not None else shards_for(edits),
            chat=bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat,
            **settings,
        )

    def mask_seed(self, shard: int) -> int:
        """Seed of a shard's mask: distinct per shard, fixed by the run's seed."""
        return self.seed * 100_003 + shard

    def to_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EditConfig:
        known: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in cls.__dataclass_fields__
        }
        return cls(**known)


def _called(field: str) -> str:
    """A field as a user knows it."""
    return f"--{field.replace('_', '-')}" if field in _OPTIONS else field
