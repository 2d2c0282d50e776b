"""What another wording of a prompt would do to its activations, borrowed from facts of the pool.

While an edit is practised, the activations from which its target is predicted are moved as one wording of a pool fact
differs from another where its answer is predicted, so that the delta does not rest on the wording it was given. No
paraphrase is generated and no evaluation prompt is used.

Shapes: `n` tokens of an answer, `F` FFN width, `D` model width, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from wisecli.cache import digest_of
from wisecli.data.pool import pool_facts
from wisecli.editing.kept import place
from wisecli.errors import InputError, OutputError
from wisecli.memory.files import load_tensors, save_tensors
from wisecli.models.base import Base
from wisecli.models.captured import CapturedRow
from wisecli.models.upper import UpperModel

_FACTS = 400
_MEASURED: WeakKeyDictionary[UpperModel, Rewording] = WeakKeyDictionary()
_CACHES: WeakKeyDictionary[UpperModel, tuple[Base, Path | None]] = WeakKeyDictionary()
_REACH = 0.7  # of a displacement; the rest of it belongs to the fact it was taken from


@dataclass(frozen=True)
class Rewording:
    """Displacements of `a` [n, F] and of the stream [n, D] from one wording to another, per answer token predicted.

    Each counts twice: from the first wording to the second, and back.
    """

    moves: Sequence[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, upper: UpperModel) -> Rewording:
        """As measured before on the same upper part, else as it was kept or measured now."""
        if upper not in _MEASURED:
            base, cache = _CACHES.get(upper, (None, None))
            path = place(cache, "rewordings", base, upper, wordings=digest_of(wordings())) if base is not None else None
            _MEASURED[upper] = cls.measure(upper) if path is None else cls._kept(upper, path)
        return _MEASURED[upper]

    @classmethod
    def keep(cls, upper: UpperModel, base: Base, cache: Path | None) -> None:
        """From now on keep what is measured on this upper part of a base for the next run, and take what was kept.

        Args:
            cache: folder; None for none.
        """
        _CACHES[upper] = base, cache

    @classmethod
    def measure(cls, upper: UpperModel) -> Rewording:
        """Between the first two wordings of pool facts."""
        rows = [upper.encoder.pair(*wording) for wording in wordings()]
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        for i, row in upper.capturing(rows):  # of a row only this is kept
            at = row.predicting
            seen[i] = row.a[at], row.stream[at]
        return cls([_move(seen[i], seen[i + 1]) for i in range(0, len(rows), 2)])

    @classmethod
    def _kept(cls, upper: UpperModel, path: Path) -> Rewording:
        with suppress(InputError):  # none there, or a damaged one
            tensors, about = load_tensors(path)
            return cls(list(zip(*(tensors[k].split(about["counts"]) for k in ("a", "stream")), strict=True)))
        made = cls.measure(upper)
        a, stream = (torch.cat(parts).cpu() for parts in zip(*made.moves, strict=True))
        with suppress(OutputError):  # a cache that cannot be written is no fault
            save_tensors(path, {"a": a, "stream": stream}, {"counts": [len(move) for move, _ in made.moves]})
        return made

    def __call__(self, row: CapturedRow, generator: torch.Generator) -> CapturedRow:
        """The row as if its prompt were worded otherwise, as `generator` chooses; long targets keep the last move."""
        which, back = divmod(int(torch.randint(2 * len(self.moves), (), generator=generator)), 2)
        sign, at = -1 if back else 1, row.predicting
        a, stream = (_moved(x, at, m, sign) for x, m in zip((row.a, row.stream), self.moves[which], strict=True))
        return replace(row, a=a, stream=stream)


def wordings() -> list[tuple[str, str]]:
    """The first two wordings of pool facts, one after the other, each with the fact's answer."""
    return [(p, f.answer) for f in pool_facts()[:_FACTS] if len(f.prompts) > 1 for p in f.prompts[:2]]


def _moved(x: Tensor, at: slice, move: Tensor, sign: int) -> Tensor:
    """x with these positions moved one by one; those behind the last move are moved by that, too."""
    x = x.clone()
    first, rest = x[at][: len(move)], x[at][len(move) :]
    first.add_(move[: len(first)], alpha=sign)
    rest.add_(move[-1], alpha=sign)
    return x


def _move(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    n = min(len(one[0]), len(other[0]))
    return _REACH * (other[0][:n] - one[0][:n]), _REACH * (other[1][:n] - one[1][:n])
