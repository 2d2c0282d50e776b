"""The paper's schedule: one edit after the other, plain SGD, with the margin loss that shapes the gate.

Kept for fidelity and comparison; the stream forgets inside a shard (see `rehearsal`). Per edit and step, over its
rows and one irrelevant prompt:

    L = L_edit + L_a                                                             (eq. 8)

and L_memo beside them where prompts of earlier shards are replayed; see `margins`. No weight decay: it would move
entries outside the mask.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wisecli.editing.batch import CapturedEdit
from wisecli.editing.config import EditConfig
from wisecli.editing.margins import Margins, Replay
from wisecli.editing.rehearsal import Outcome
from wisecli.editing.steps import Arrived, Learning, Step, take_all
from wisecli.memory.indicator import content_shares
from wisecli.models.captured import CapturedRow, StackedRows
from wisecli.models.upper import UpperModel

DEFAULT_LR = 1.0
_CLAMP = 1.0  # largest entry of the delta, as published
_FLAT, _LOW = 1e-4, 0.02  # stop when two losses differ by less, and are this low


class Published:
    """Learns a shard's delta [D, F] edit by edit. Same interface as `Rehearsal`."""

    def __init__(
        self,
        upper: UpperModel,
        mask: Tensor,
        config: EditConfig,
        seed: int,
        margins: Margins | None = None,
        replay: Replay | None = None,
    ) -> None:
        self.upper, self.config, self.replay = upper, config, replay
        self.margins = margins or Margins(upper, config.margins)
        device = upper.site.device(upper.model)
        self.mask = mask.to(device, torch.float32)
        self.delta = torch.zeros(mask.shape, device=device, requires_grad=True)
        self.edits: list[CapturedEdit] = []
        self.steps: list[int] = []

    def learning(self, edits: Sequence[CapturedEdit]) -> Learning:
        """Learn edits in order, giving out the steps to be taken, and behind each edit how many have arrived."""
        if len(self.steps) == len(edits):
            yield Arrived(len(edits), True)
        for i in range(len(self.steps), len(edits)):
            yield from self._arriving(edits[i])
            yield Arrived(i + 1, i + 1 == len(edits))

    def arrive(self, block: Sequence[CapturedEdit]) -> None:
        """Learn edits, one after the other."""
        for edit in block:
            take_all(self.upper, self._arriving(edit))

    def replace(self, i: int, edit: CapturedEdit) -> None:
        """Learn an edit that contradicts the i-th, which then no longer counts."""
        take_all(self.upper, self._replacing(i, edit))

    def drop(self, i: int) -> None:
        """The i-th edit counts no longer; those behind it move up."""
        del self.edits[i], self.steps[i]

    def outcomes(self) -> list[Outcome]:
        """How it went for each edit that has arrived, asked again now."""
        return [self._outcome(e, n) for e, n in zip(self.edits, self.steps, strict=True)]

    def result(self) -> Tensor:
        """The delta [D, F], exactly zero outside the mask."""
        return self.delta.detach() * self.mask

    def state(self) -> dict[str, Tensor]:
        """All that learning goes on from, between two edits; the captured edits apart."""
        state = {"delta": self.delta.detach()[self.mask != 0], "steps": torch.tensor(self.steps)}
        return state | ({"replay": self.replay.generator.get_state()} if self.replay is not None else {})

    @torch.no_grad()
    def load_state(self, edits: Sequence[CapturedEdit], state: Mapping[str, Tensor]) -> None:
        """Go on from a state in which these edits had arrived."""
        self.delta[self.mask != 0] = state["delta"].to(self.delta.device)
        self.edits, self.steps = list(edits), state["steps"].tolist()
        if self.replay is not None:
            self.replay.generator.set_state(state["replay"])

    def _irrelevant(self, edit: CapturedEdit, i: int) -> CapturedRow:
        """x_i of eq. 5: the record's own irrelevant text, else an ordinary prompt."""
        text = edit.record.irrelevant
        if text:
            return self.upper.capture([self.upper.encoder.prompt(text[0])])[0]
        return self.margins.pool[i % len(self.margins.pool)]

    def _arriving(self, edit: CapturedEdit) -> Iterator[Step]:
        self.steps.append((yield from self._edit(edit, self._irrelevant(edit, len(self.steps)))))
        self.edits.append(edit)

    def _replacing(self, i: int, edit: CapturedEdit) -> Iterator[Step]:
        self.steps[i] = yield from self._edit(edit, self._irrelevant(edit, i))
        self.edits[i] = edit

    def _edit(self, edit: CapturedEdit, other: CapturedRow) -> Generator[Step, None, int]:
        """The steps of an edit; returns how many were taken."""
        lr = self.config.lr or DEFAULT_LR
        rows, n = StackedRows.of(edit.rows), sum(len(r.ids) for r in edit.rows)
        a = torch.cat([rows.a, other.a]).float()
        means = torch.block_diag(*(content_shares(r.content.to(a)) for r in (*edit.rows, other)))
        share = torch.tensor([1 / (c * len(rows.counts)) for c in rows.counts for _ in range(c)], device=a.device)
        losses = [float("inf")]
        for step in range(self.config.max_steps):
            moved = F.linear(a, self.delta)  # one product for both
            margin = self.margins.loss(means @ moved.norm(dim=-1))

            def loss(logits: Tensor, margin: Tensor = margin) -> Tensor | None:
                each = F.cross_entropy(logits.float(), rows.targets, reduction="none")
                whole = each @ share + margin  # the mean over rows of their means over tokens
                if self.replay is not None:
                    whole = whole + self.replay.loss(self.delta)
                losses.append(float(whole.detach()))
                return None if _is_over(*losses[-2:]) else whole

            self.delta.grad = None
            yield Step(edit.rows, rows, moved[:n], loss)
            if _is_over(*losses[-2:]):
                return step
            with torch.no_grad():  # plain SGD inside the mask
                self.delta.addcmul_(self.delta.grad, self.mask, value=-lr)  # type: ignore[arg-type]
                self.delta.clamp_(-_CLAMP, _CLAMP)
        return self.config.max_steps

    @torch.no_grad()
    def _outcome(self, edit: CapturedEdit, steps: int) -> Outcome:
        bare = StackedRows.of(edit.rows[:1])
        logits = self.upper.logits(bare, self.delta)
        losses = F.cross_entropy(logits.float(), bare.targets, reduction="none")
        return Outcome(bool(bare.right(logits)), steps, float(losses.max()))


def _is_over(before: float, now: float) -> bool:
    """Whether an edit's loss has come to rest, and low."""
    return abs(before - now) <= _FLAT and now <= _LOW
