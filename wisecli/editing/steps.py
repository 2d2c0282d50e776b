"""Steps of optimisation, of one learner or of several at once.

A learner is a generator. It yields a `Step` whenever one is due and goes on when that has been taken, its gradient
being there; behind a block of edits it yields that those have `Arrived`. Learners that are driven together run the rows
of their steps through the layers above as one batch. They share no parameters, so that the gradient of the sum of their
losses is to each its own: their deltas are those of learning one after the other, but for what rounding does.

Shapes: `N` real tokens of a step's rows, `n` its supervised positions, `D` model width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wisecli.models.captured import CapturedRow, StackedRows
from wisecli.models.upper import UpperModel


@dataclass(frozen=True)
class Step:
    """A step that a learner waits for.

    Attributes:
        rows: what it is made of.
        stacked: the same, put together.
        moved: a delta^T at the rows' real tokens [N, D], differentiable.
        loss: gives the loss of the logits [n, V], or None where the learner goes on without a gradient.
    """

    rows: Sequence[CapturedRow]
    stacked: StackedRows
    moved: Tensor
    loss: Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Arrived:
    """How many edits of a learner have arrived, and whether these are all."""

    count: int
    all: bool


Learning = Iterator[Step | Arrived]


def take(upper: UpperModel, steps: Sequence[Step]) -> None:
    """Run the rows of some steps through the layers above, all at once, and send the gradients back."""
    rows = steps[0].stacked if len(steps) == 1 else StackedRows.of([r for s in steps for r in s.rows])
    moved = torch.cat([s.moved for s in steps]) if len(steps) > 1 else steps[0].moved
    logits = upper.logits(rows, None, rows.padded(moved))
    parts = logits.split([sum(s.stacked.counts) for s in steps])
    losses = [loss for s, part in zip(steps, parts, strict=True) if (loss := s.loss(part)) is not None]
    if losses:
        torch.stack(losses).sum().backward()


def take_all(upper: UpperModel, steps: Iterable[Step]) -> None:
    """Take the steps of one learner as they come."""
    for step in steps:
        take(upper, [step])


def together(upper: UpperModel, learners: Sequence[Learning]) -> Iterator[tuple[int, ...]]:
    """Take the steps of learners at once, until all have ended.

    Who has come to the end of a block waits for the others, and who has come to the end of its edits for the others'
    edits. So what is learned from there on follows from the learners' states alone, and learning may be interrupted and
    taken up there. Yields, there, how many edits of each have arrived, where a step was taken.
    """
    running = dict.fromkeys(range(len(learners)), Arrived(0, False))
    arrived = [0] * len(learners)
    while running:
        behind = [i for i, a in running.items() if not a.all]
        turn, stepped = behind or list(running), False
        while turn:
            waiting: dict[int, Step] = {}
            for i in turn:
                got = next(learners[i], None)
                if isinstance(got, Step):
                    waiting[i] = got
                elif got is None:
                    del running[i]
                else:
                    running[i], arrived[i] = got, got.count
            if waiting:
                take(upper, list(waiting.values()))
                stepped = True
            turn = list(waiting)
        if behind and stepped:
            yield tuple(arrived)
