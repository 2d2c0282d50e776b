"""A plain editor to measure against: the published schedule, done the way the paper writes it down.

One edit after the other, plain SGD, L = L_edit + L_a (eq. 8, eq. 5), as `wisecli.editing.published` defines its rows,
its units and its margins, so that both learn the same delta. What is plain about it: every step is a forward of the
whole model over all rows and the irrelevant prompt, with the delta inside the FFN projection; logits at all positions
over the whole vocabulary; a backward from there to the delta; the mask on its gradient. Nothing is captured or reused.
Weights of the base are frozen, so that the backward ends at the edited layer, as in any careful implementation.

Shapes: `B` rows, `T` tokens, `F` FFN width, `D` model width, `V` vocabulary.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wisecli.data.pool import ordinary_prompts
from wisecli.data.records import EditRecord
from wisecli.editing.batch import CapturedEdit, edit_rows
from wisecli.editing.config import EditConfig
from wisecli.editing.rehearsal import Outcome
from wisecli.editing.steps import Arrived, Learning
from wisecli.models.base import Base
from wisecli.models.prompts import Batch, PromptEncoder, Row
from wisecli.models.site import EditSite

FLAT, LOW, CLAMP, POOL = 1e-4, 0.02, 1.0, 64


class Reference:
    """Learns a delta [D, F] from edits.

    Args:
        base: only read.
        site: where the delta goes.
        mask: trainable entries [D, F].
        config: `max_steps`, `lr`, `contexts`, `margins` and `seed` count.
        early_stop: stop an edit whose loss is low and flat, as published.

    Attributes:
        cpu_s: CPU seconds spent learning so far.
    """

    def __init__(
        self, base: Base, site: EditSite, mask: Tensor, config: EditConfig, *, early_stop: bool = False
    ) -> None:
        self.model, self.config, self.early_stop = base.model, config, early_stop
        self.ffn = site.module(base.model)
        self.encoder = PromptEncoder(base.tokenizer, chat=config.chat)
        self.mask = mask.to(self.ffn.weight.device, torch.float32)
        self.delta = torch.zeros(mask.shape, device=self.ffn.weight.device, requires_grad=True)
        self.pool = [self.encoder.prompt(p) for p in ordinary_prompts()[:POOL]]
        self.scale = float(
            torch.cat([self._sizes([row], site.weight(base.model).float()) for row in self.pool]).median()
        )
        self.done: list[tuple[EditRecord, int]] = []
        self.cpu_s = 0.0

    def edit(self, record: EditRecord) -> int:
        """Learn one edit; returns the steps taken."""
        start = time.process_time()
        rows = edit_rows(self.encoder, record, self.config.contexts, self.config.seed)
        other = self.encoder.prompt(record.irrelevant[0]) if record.irrelevant else self.pool[len(self.done) % POOL]
        batch = self.encoder.batch([*rows, other], side="right").to(self.delta.device)
        optimiser = torch.optim.SGD([self.delta], lr=self.config.lr or 1.0)
        before, taken = float("inf"), self.config.max_steps
        for step in range(self.config.max_steps):
            loss = self._loss(batch)
            now = float(loss.detach())
            if self.early_stop and abs(before - now) <= FLAT and now <= LOW:
                taken = step
                break
            before = now
            optimiser.zero_grad()
            loss.backward()
            self.delta.grad.mul_(self.mask)  # type: ignore[union-attr]
            optimiser.step()
            with torch.no_grad():
                self.delta.clamp_(-CLAMP, CLAMP)
        self.done.append((record, taken))
        self.cpu_s += time.process_time() - start
        return taken

    def result(self) -> Tensor:
        """The delta [D, F], exactly zero outside the mask."""
        return self.delta.detach() * self.mask

    @torch.no_grad()
    def epsilon(self) -> float:
        """Threshold of the activation router (eq. 4): act_ratio times the least indicator of an edit that took."""
        records = [r for r, _ in self.done if self._outcome(r, 0).took]
        found = [self._sizes([self.encoder.prompt(r.prompt)], self.delta) for r in records]
        return self.config.act_ratio * float(torch.cat(found).min())

    # -- the same interface as `Published`, so that shards can be made of it -------------------------------------------

    def learning(self, edits: Sequence[CapturedEdit]) -> Learning:
        """Learn edits in order; of what was captured of them only the records are looked at, and no step is shared."""
        for i, edit in enumerate(edits):
            self.edit(edit.record)
            yield Arrived(i + 1, i + 1 == len(edits))

    def outcomes(self) -> list[Outcome]:
        """How it went for each edit, asked again now."""
        return [self._outcome(record, steps) for record, steps in self.done]

    # -- the pieces ----------------------------------------------------------------------------------------------------

    def _loss(self, batch: Batch) -> Tensor:
        """L_edit + L_a of a batch whose last row is the irrelevant prompt."""
        with self._edited() as seen:
            logits = self.model(**batch.inputs, use_cache=False).logits.to(self.delta.dtype)  # [B, T, V]
        losses = _losses(logits, batch.labels)
        wanted = batch.labels[:-1, 1:] != -100
        per_row = (losses[:-1] * wanted).sum(1) / wanted.sum(1)
        indicator = _indicator(seen[0], batch.content) / self.scale
        return per_row.mean() + self._margin_loss(indicator[:-1], indicator[-1:])

    def _margin_loss(self, inside: Tensor, outside: Tensor) -> Tensor:
        alpha, beta, gamma = self.config.margins
        hinges = (gamma + outside - inside, outside - alpha, beta - inside)
        return torch.stack([x[x > 0].mean() if (x > 0).any() else x.new_zeros(()) for x in hinges]).sum()

    @contextlib.contextmanager
    def _edited(self) -> Iterator[list[Tensor]]:
        """Within it the projection gives y + a delta^T; what is added [B, T, D] is noted."""
        seen: list[Tensor] = []

        def add(module: object, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            seen.append(F.linear(args[0].to(self.delta.dtype), self.delta))
            return y + seen[-1].to(y.dtype)

        handle = self.ffn.register_forward_hook(add)
        try:
            yield seen
        finally:
            handle.remove()

    @torch.no_grad()
    def _sizes(self, rows: Sequence[Row], matrix: Tensor) -> Tensor:
        """mean over content tokens of ||a_t matrix^T||_2 [B], by a forward of the whole model."""
        batch = self.encoder.batch(rows).to(self.mask.device)
        seen: list[Tensor] = []
        handle = self.ffn.register_forward_hook(lambda m, args, y: seen.append(args[0]))
        try:
            self.model(**batch.inputs, use_cache=False)
        finally:
            handle.remove()
        return _indicator(F.linear(seen[0].float(), matrix), batch.content)

    @torch.no_grad()
    def _outcome(self, record: EditRecord, steps: int) -> Outcome:
        """Whether the bare prompt gives every target token by argmax."""
        batch = self.encoder.batch([self.encoder.pair(record.prompt, record.target)]).to(self.mask.device)
        with self._edited():
            logits = self.model(**batch.inputs, use_cache=False).logits.float()
        labels = batch.labels[:, 1:]
        losses = _losses(logits, batch.labels)
        right = (logits[:, :-1].argmax(-1) == labels) | (labels == -100)
        return Outcome(bool(right.all()), steps, float(losses.max()))


def _indicator(moved: Tensor, content: Tensor) -> Tensor:
    """mean over content tokens t of ||moved_t||_2 [B], of [B, T, D]."""
    weight = content.float()
    return (moved.norm(dim=-1) * weight).sum(1) / weight.sum(1)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of every next token [B, T-1], 0 where nothing is supervised."""
    targets = labels[:, 1:]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
