"""Learn the edits of one shard so that none is lost: arriving edits are rehearsed together with the earlier ones.

The published algorithm learns one edit after the other with SGD and forgets inside a shard. Here each edit's frozen
activations are captured once; when a block of edits arrives, every step mixes its rows with rows of earlier edits,
those least well held first. Only entries inside the shard's mask ever move. Learning stops when every row of the shard
holds: when each of its target tokens has at least the wanted probability. An edit that does not hold after far more
steps than the others took is set aside: what it did to the delta is taken back, and the rest goes on without it. At the
end it is tried once more, and taken back again if that fails, so that it bends the delta at nobody's cost.

Three choices carry edits over to other wordings: plain SGD with momentum, which keeps the delta in the span of the
activations it saw; dropout on those activations, which makes it rest on many of them; and moving them as other wordings
would (`rewording`). The same loop, started from a merged delta, restores what merging disturbed (`hold`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wisecli.editing.batch import CapturedEdit, batches
from wisecli.editing.config import EditConfig
from wisecli.editing.margins import Replay
from wisecli.editing.rewording import Rewording
from wisecli.editing.steps import Arrived, Learning, Step, take_all
from wisecli.models.captured import CapturedRow, StackedRows
from wisecli.models.upper import UpperModel

DEFAULT_LR = 0.07
MOMENTUM = 0.9
_ROUND = 6  # least number of steps between two sweeps
_SWEPT = 0.3  # steps between two sweeps at least, per step's worth of rows swept: else sweeps outweigh steps
_NEAR = 0.25  # of the largest loss that holds, from which a row may fall off in a few steps
_SHORT = 8  # tokens of a target up to which the loss is a plain mean over all tokens of a step
_HARDER = 2  # times as many steps as the usual edit needs after which one counts as harder than the others
_LATE = 30  # edits at least whose steps those set aside are given in the end


@dataclass(frozen=True)
class Outcome:
    """How learning one edit went.

    Attributes:
        took: the prompt alone gives every target token by argmax, under the shard's final delta.
        steps: optimisation steps in which rows of this edit took part.
        loss: largest negative log-likelihood of a target token of the bare prompt.
    """

    took: bool
    steps: int
    loss: float


class Rehearsal:
    """Learns a shard's delta [D, F] from captured edits.

    Args:
        upper: the part of the base above the edit site.
        mask: trainable entries [D, F].
        config: of the run.
        seed: of minibatches and dropout.
        start: the delta to start from; zero when None.
        replay: prompts of earlier shards on which the delta is to stay quiet, if any.
    """

    def __init__(
        self,
        upper: UpperModel,
        mask: Tensor,
        config: EditConfig,
        seed: int,
        start: Tensor | None = None,
        replay: Replay | None = None,
    ) -> None:
        device = upper.site.device(upper.model)
        self.upper, self.config, self.replay = upper, config, replay
        self.rewording = Rewording.of(upper) if config.rewording else None
        self.mask = mask.to(device, torch.float32)
        start = torch.zeros(mask.shape) if start is None else start
        self.delta = start.to(device, torch.float32).clone().requires_grad_()
        fused = device.type in ("cpu", "cuda")
        self.optimiser = torch.optim.SGD([self.delta], lr=1.0, momentum=MOMENTUM, nesterov=True, fused=fused)
        self.noise = torch.Generator(device).manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.limit = -math.log(config.confidence)
        self.rows: list[CapturedRow] = []
        self.owner: list[int] = []
        self.worst = torch.empty(0)
        self.right = torch.empty(0, dtype=torch.bool)
        self.held_at = torch.empty(0)
        self.aside = torch.empty(0, dtype=torch.bool)
        self.steps: list[int] = []
        self.seen = False  # whether `worst` and `right` of all rows are those of the delta as it is
        self.firsts: list[int] = []

    def learning(self, edits: Sequence[CapturedEdit]) -> Learning:
        """Learn edits in blocks, in order, then go over all until each holds or the cap is reached.

        Edits that have arrived already, as after `load_state`, are not learned again. Gives out the steps to be taken,
        and behind each block how many edits have arrived.
        """
        if len(self.steps) == len(edits):
            yield Arrived(len(edits), True)
        for at in range(len(self.steps), len(edits), self.config.block):
            yield from self._arriving(edits[at : at + self.config.block])
            yield Arrived(len(self.steps), len(self.steps) == len(edits))
        yield from self._finish()

    def hold(self, edits: Sequence[CapturedEdit], failed: Sequence[int] = ()) -> list[Outcome]:
        """Practise edits that were learned before, until each holds or the cap is reached.

        Args:
            edits: all of them.
            failed: positions of those that did not take; unless most did not, they are tried last.
        """
        self._admit(edits)
        if 2 * len(failed) < len(edits):
            self.aside[list(failed)] = True
        take_all(self.upper, self._finish())
        return self.outcomes()

    def arrive(self, block: Sequence[CapturedEdit]) -> None:
        """Learn edits that arrive together, keeping the earlier ones alive."""
        take_all(self.upper, self._arriving(block))

    def replace(self, i: int, edit: CapturedEdit) -> None:
        """Learn an edit in the place of the i-th, which it contradicts: that one is no longer rehearsed."""
        self._put(i, edit.rows)
        self.steps[i], self.held_at[i], self.aside[i] = 0, torch.inf, False
        first = self.firsts[i]
        take_all(self.upper, self._practise(first, first + len(edit.rows), len(self.rows)))

    def drop(self, i: int) -> None:
        """Rehearse the i-th edit no longer; those behind it move up."""
        self._put(i, ())
        del self.firsts[i], self.steps[i]
        self.held_at, self.aside = (torch.cat([t[:i], t[i + 1 :]]) for t in (self.held_at, self.aside))
        self.owner = [o - (o > i) for o in self.owner]

    def outcomes(self) -> list[Outcome]:
        """How learning went for each edit that has arrived, as last seen."""
        worst, right = self.worst.tolist(), self.right.tolist()
        return [Outcome(right[r], steps, worst[r]) for r, steps in zip(self.firsts, self.steps, strict=True)]

    def result(self) -> Tensor:
        """The delta [D, F], exactly zero outside the mask."""
        return self.delta.detach() * self.mask

    def state(self) -> dict[str, Tensor]:
        """All that learning goes on from, between two blocks; the captured edits apart."""
        inside = self.mask != 0
        momentum = self._momentum
        state = {
            "delta": self.delta.detach()[inside],
            "momentum": torch.empty(0) if momentum is None else momentum[inside],
            "lr": torch.tensor([g["lr"] for g in self.optimiser.param_groups], dtype=torch.float64),
            "noise": self.noise.get_state(),
            "generator": self.generator.get_state(),
            "worst": self.worst,
            "right": self.right,
            "held_at": self.held_at,
            "aside": self.aside,
            "steps": torch.tensor(self.steps),
        }
        return state | ({"replay": self.replay.generator.get_state()} if self.replay is not None else {})

    @torch.no_grad()
    def load_state(self, edits: Sequence[CapturedEdit], state: Mapping[str, Tensor]) -> None:
        """Go on from a state in which these edits had arrived."""
        inside = self.mask != 0
        self._admit(edits)
        self.delta[inside] = state["delta"].to(self.delta.device)
        if len(state["momentum"]):
            momentum = torch.zeros_like(self.delta)
            momentum[inside] = state["momentum"].to(self.delta.device)
            self.optimiser.state[self.delta]["momentum_buffer"] = momentum
        for group, lr in zip(self.optimiser.param_groups, state["lr"].tolist(), strict=True):
            group["lr"] = lr
        self.noise.set_state(state["noise"])
        self.generator.set_state(state["generator"])
        self.worst, self.right = state["worst"], state["right"]
        self.held_at, self.aside, self.steps = state["held_at"], state["aside"], state["steps"].tolist()
        if self.replay is not None:
            self.replay.generator.set_state(state["replay"])

    # -- the loop ------------------------------------------------------------------------------------------------------

    def _arriving(self, block: Sequence[CapturedEdit]) -> Iterator[Step]:
        before = self._here()
        first = self._admit(block)
        yield from self._practise(first, len(self.rows), first)
        if self._set_aside(range(len(self.steps) - len(block), len(self.steps))):
            self._restore(before)
            self.worst[first:] = torch.inf
            yield from self._practise(first, len(self.rows), first)

    def _finish(self) -> Iterator[Step]:
        yield from self._consolidate(len(self.steps))
        late = self.aside.nonzero()[:, 0].tolist()
        if late:
            before = self._here()
            self.aside[late] = False
            yield from self._consolidate(max(_LATE, len(late)))
            self._sweep()
            wrong = [i for i in late if not self.right[self.firsts[i]]]
            if wrong:
                self._restore(before)
                self.aside[wrong] = True
                yield from self._consolidate(len(late))
        self._sweep()

    def _here(self) -> tuple[Tensor, ...]:
        """Delta and momentum as they are, to go back to."""
        return tuple(t.detach().clone() for t in (self.delta, self._momentum) if t is not None)

    @property
    def _momentum(self) -> Tensor | None:
        return self.optimiser.state[self.delta].get("momentum_buffer")

    @torch.no_grad()
    def _restore(self, state: tuple[Tensor, ...]) -> None:
        self.delta.copy_(state[0])
        self.seen = False
        self.optimiser.state[self.delta].clear()
        if len(state) > 1:
            self.optimiser.state[self.delta]["momentum_buffer"] = state[1].clone()

    def _set_aside(self, edits: Sequence[int]) -> bool:
        """Set those of these edits aside that are harder than the others; whether there were any.

        Where most edits do not hold, as with very long targets, none is harder than the others.
        """
        usual = float(self.held_at.quantile(0.5, interpolation="higher"))
        hard = [i for i in edits if self.held_at[i].isinf() and self.steps[i] >= _HARDER * usual]
        self.aside[hard] = True
        return bool(hard)

    def _admit(self, edits: Sequence[CapturedEdit]) -> int:
        """Take rows in as not yet held; returns the index of the first."""
        if not self.rows and edits:
            self._set_step(edits)
        first = len(self.rows)
        self.seen = False
        for edit in edits:
            self.firsts.append(len(self.rows))
            self.steps.append(0)
            self.rows += edit.rows
            self.owner += [len(self.steps) - 1] * len(edit.rows)
        new = torch.full((len(self.rows) - first,), torch.inf)
        self.held_at = torch.cat([self.held_at, torch.full((len(edits),), torch.inf)])
        self.aside = torch.cat([self.aside, torch.zeros(len(edits), dtype=torch.bool)])
        self.worst = torch.cat([self.worst, new])
        self.right = torch.cat([self.right, torch.zeros(len(new), dtype=torch.bool)])
        return first

    def _put(self, i: int, rows: Sequence[CapturedRow]) -> None:
        """Rows that do not yet hold in the place of the i-th edit's, which may be more or fewer."""
        self.seen = False
        span = self._span(i)
        first, end, count = span.start, span.stop, span.stop - span.start
        self.rows[first:end] = rows
        self.owner[first:end] = [i] * len(rows)
        self.firsts = [f + len(rows) - count if j > i else f for j, f in enumerate(self.firsts)]
        new = torch.full((len(rows),), torch.inf)
        self.worst = torch.cat([self.worst[:first], new, self.worst[end:]])
        self.right = torch.cat([self.right[:first], new < 0, self.right[end:]])

    def _span(self, i: int) -> slice:
        """Where the rows of the i-th edit are."""
        return slice(self.firsts[i], self.firsts[i + 1] if i + 1 < len(self.firsts) else len(self.rows))

    def _set_step(self, edits: Sequence[CapturedEdit]) -> None:
        """lr in units of (|h| / |a|)^2, with h the stream that enters the layer, at the edits' last content tokens.

        A gradient step moves the stream by lr |a|^2 dL/dh, and a final norm makes dL/dh go as 1/|h|: in these units a
        step moves the stream by the same share of itself whatever the scale of activations and weights.
        """
        a = torch.stack([r.last for e in edits for r in e.rows]).float()
        h = torch.cat([e.entries for e in edits]).float()
        unit = float((h.norm(dim=-1) / a.norm(dim=-1).clamp(min=1e-6)).square().median())
        for group in self.optimiser.param_groups:
            group["lr"] = (self.config.lr or DEFAULT_LR) * unit

    def _practise(self, first: int, end: int, before: int) -> Iterator[Step]:
        """Step until rows [first, end) hold, mixing in rows before `before`; at most `max_steps` times."""
        for _ in range(self.config.max_steps):
            pending = self._pending(first, end)
            if not len(pending):
                break
            yield from self._step(self._within_budget(self._choose(pending, max(1, self.config.rows * 3 // 4), before)))

    def _consolidate(self, edits: int) -> Iterator[Step]:
        """Practise what does not hold, wherever in the shard it is.

        Between rounds of steps the rows are looked at that may not hold any more, and all of them once those hold, or,
        every now and then, where no fewer are left than before. Steps are halved where that shows that nothing was won:
        rows fall off while others are practised. Ends when everything holds, when the steps due to so many edits are
        spent, or when `max_steps` of them helped nothing: edits that contradict one another in other words never hold
        together.
        """
        sizes = [group["lr"] for group in self.optimiser.param_groups]
        yield from self._consolidating(edits)
        for group, size in zip(self.optimiser.param_groups, sizes, strict=True):
            group["lr"] = size

    def _consolidating(self, edits: int) -> Iterator[Step]:
        cap = math.ceil(self.config.max_steps * max(edits, 10) / 10)
        spent, fewest, reached, last = 0, len(self.rows) + 1, 0, len(self.rows) + 1
        seldom, swept = _SWEPT * len(self.rows) / self.config.rows, 0
        while spent < cap:
            near = self._near()
            if not self.seen:
                self._look(near)
            pending = self._pending()
            if not len(pending) or (len(pending) >= last and spent - swept >= seldom):
                self._sweep(near)
                known, pending, swept = len(pending), self._pending(), spent
                if len(pending) < fewest:
                    fewest, reached = len(pending), spent
                elif len(pending) > known:
                    for group in self.optimiser.param_groups:
                        group["lr"] /= 2
                if not len(pending) or spent - reached >= self.config.max_steps:
                    return
            last = len(pending)
            due = math.ceil(max(2 * len(pending), _SWEPT * len(near)) / self.config.rows)
            for _ in range(max(_ROUND, due)):
                picked = self._choose(pending, max(1, self.config.rows // 2), len(self.rows))
                yield from self._step(self._within_budget(picked))
                spent += 1
                pending = self._pending()
                if not len(pending):
                    break

    def _near(self) -> list[int]:
        """Rows that did not hold when last seen, or hardly, but for those set aside."""
        found: list[int] = (~(self.worst <= _NEAR * self.limit) & ~self._out()).nonzero()[:, 0].tolist()
        return found

    def _pending(self, first: int = 0, end: int | None = None) -> Tensor:
        """Rows in [first, end) that did not hold when last seen, but for those set aside."""
        return (~(self.worst[first:end] <= self.limit) & ~self._out()[first:end]).nonzero()[:, 0] + first

    def _out(self) -> Tensor:
        """Rows of the edits that are set aside [rows]."""
        return self.aside[torch.tensor(self.owner, dtype=torch.long)]

    def _choose(self, pending: Tensor, share: int, before: int) -> list[int]:
        """Up to `share` pending rows, the rest drawn from rows before `before`, those least well held more often."""
        order = pending[torch.randperm(len(pending), generator=self.generator)][:share]
        others = self.config.rows - len(order)
        if before == 0 or others <= 0:
            return order.tolist()
        weight = self.worst[:before].nan_to_num(5.0).clamp(1e-3, 5.0) + 0.05
        weight[self._out()[:before]] = 0.0
        weight[order[order < before]] = 0.0
        others = min(others, int((weight > 0).sum()))
        drawn = torch.multinomial(weight, others, generator=self.generator) if others else order[:0]
        return torch.cat([order, drawn]).tolist()

    def _within_budget(self, picked: list[int]) -> list[int]:
        """The rows that fit `tokens`, pending and earlier ones in turn; two at least."""
        earlier = [i for i in picked if self.worst[i] <= self.limit]
        pending = [i for i in picked if not self.worst[i] <= self.limit]  # a loss that is no number does not hold
        out: list[int] = []
        spent = 0
        for i in (i for pair in zip_longest(pending, earlier) for i in pair if i is not None):
            spent += len(self.rows[i].ids)
            if spent > self.config.tokens and len(out) > 1:
                break
            out.append(i)
        return out if len(out) < len(picked) else picked

    def _step(self, picked: list[int]) -> Iterator[Step]:
        rows = [self._reworded(self.rows[i]) for i in picked]
        stacked = self._dropped(StackedRows.of(rows))
        seen: list[Tensor] = []

        def loss(logits: Tensor) -> Tensor:
            losses = F.cross_entropy(logits.float(), stacked.targets, reduction="none")
            seen.extend((losses.detach(), logits.detach()))
            # A plain mean would move each token of a long target by next to nothing.
            length = len(losses) / len(picked)
            mean = losses.mean() * max(1.0, math.sqrt(length / _SHORT))
            return mean if self.replay is None else mean + self.replay.loss(self.delta)

        self.optimiser.zero_grad()
        yield Step(rows, stacked, stacked.moved(self.delta), loss)
        self._note(picked, stacked, *seen)
        self.delta.grad.mul_(self.mask)  # type: ignore[union-attr]
        self.optimiser.step()
        self.seen = False
        for edit in {self.owner[i] for i in picked}:
            self.steps[edit] += 1

    def _reworded(self, row: CapturedRow) -> CapturedRow:
        """A share of the rows as if they were worded otherwise."""
        if self.rewording is None or torch.rand((), generator=self.generator) >= self.config.rewording:
            return row
        return self.rewording(row, self.generator)

    def _dropped(self, rows: StackedRows) -> StackedRows:
        """The rows with a random share of their activations dropped and the others scaled up, anew at every step."""
        p = self.config.dropout
        if p == 0:
            return rows
        keep = torch.rand(rows.a.shape, generator=self.noise, device=rows.a.device).ge_(p)
        return replace(rows, a=keep.mul_(rows.a).div_(1 - p))

    def _sweep(self, just_seen: Sequence[int] = ()) -> None:
        """See how all rows fare under the delta as it is, but those of which it is known."""
        if not self.seen:
            known = set(just_seen)
            self._look([i for i in range(len(self.rows)) if i not in known])
            self.seen = True

    @torch.no_grad()
    def _look(self, some: Sequence[int]) -> None:
        """See how some rows fare under the delta as it is."""
        for batch in batches([len(self.rows[i].ids) for i in some]):
            picked = [some[k] for k in batch]
            rows = StackedRows.of([self.rows[i] for i in picked])
            logits = self.upper.logits(rows, self.delta)
            self._note(picked, rows, F.cross_entropy(logits.float(), rows.targets, reduction="none"), logits)

    def _note(self, picked: list[int], rows: StackedRows, losses: Tensor, logits: Tensor) -> None:
        """Keep, per row, its largest token loss and whether all its tokens are right."""
        seen = torch.stack([losses, (logits.argmax(-1) == rows.targets).to(losses.dtype)]).cpu()  # one transfer
        worst, right = seen.float().numpy()
        starts = np.cumsum((0, *rows.counts[:-1]))
        self.worst[picked] = torch.from_numpy(np.maximum.reduceat(worst, starts))
        self.right[picked] = torch.from_numpy(np.minimum.reduceat(right, starts) > 0)
        for edit in {self.owner[i] for i in picked}:
            if self.held_at[edit].isinf() and (self.worst[self._span(edit)] <= self.limit).all():
                self.held_at[edit] = self.steps[edit]
