"""Probe edits: shipped facts made counterfactual, and the pool without them.

Each gets the answer of another fact of its kind for a target, its other wordings as rephrases, and questions about
other facts of its kind as near probes. No fact of these kinds stays in the pool: the gate then knows as little of them
as it will of a user's own edits.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from wisecli.data.pool import Pool, PoolFact, pool_facts
from wisecli.data.records import SAME_RELATION, EditRecord, Probe
from wisecli.data.stream import EditStream
from wisecli.errors import UsageError

FEWEST, MOST = 4, 60
KINDS = 12  # of facts at most, so that the pool keeps most of its own
NEAR = 3  # probes of each edit
_ENOUGH = MOST // KINDS + NEAR + 1  # facts a kind must have


@dataclass(frozen=True)
class Probes:
    """A stream of probe edits, and the facts that may stay in the pool."""

    stream: EditStream
    rest: tuple[PoolFact, ...]

    def pool(self, lines: Sequence[str] = ()) -> Pool:
        """The pool without the probes' kinds of facts, and lines of one's own."""
        return Pool.of(lines, self.rest)


def probe_edits(n: int, seed: int, facts: Sequence[PoolFact] | None = None) -> Probes:
    """`n` probe edits of different kinds, drawn by a seed.

    Args:
        n: how many, from FEWEST to MOST; with more than KINDS of them some share their kind.
        seed: the same seed draws the same edits.
        facts: to draw from; the shipped ones when None.
    """
    if not FEWEST <= n <= MOST:
        raise UsageError(f"--edits must lie between {FEWEST} and {MOST}, not {n}.")
    facts = pool_facts() if facts is None else facts
    rng = random.Random(f"probe edits|{seed}")
    by_kind: dict[str, list[PoolFact]] = {}
    for fact in facts:
        by_kind.setdefault(fact.relation, []).append(fact)
    fit = sorted(k for k, mine in by_kind.items() if len(mine) >= _ENOUGH and len({f.answer for f in mine}) > 1)
    kinds = rng.sample(fit, min(n, KINDS, len(fit)))
    records: list[EditRecord] = []
    for i, kind in enumerate(kinds):
        mine = by_kind[kind]
        rng.shuffle(mine)
        count = n // len(kinds) + (i < n % len(kinds))
        records += [_edit(kind, mine, k, count, rng) for k in range(count)]
    return Probes(EditStream.of(records), tuple(f for f in facts if f.relation not in set(kinds)))


def _edit(kind: str, facts: Sequence[PoolFact], k: int, count: int, rng: random.Random) -> EditRecord:
    """The k-th fact of its kind, changed; the first `count` facts are edited, the others give near probes."""
    fact, others = facts[k], facts[count:]
    target = rng.choice([f.answer for f in facts if f.answer.casefold() != fact.answer.casefold()])
    near = [Probe(rng.choice(f.prompts), f.answer, SAME_RELATION) for f in rng.sample(others, min(NEAR, len(others)))]
    return EditRecord(
        id=f"{kind}-{k + 1}",
        prompt=fact.prompts[0],
        target=target,
        subject=fact.subject,
        rephrases=fact.prompts[1:],
        locality=tuple(near),
        truth=fact.answer,
    )
