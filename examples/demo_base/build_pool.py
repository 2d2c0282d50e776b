"""Write the facts of the gate's pool (`wisecli/data/pool_facts.jsonl`): ordinary facts, each in several wordings.

They show the gate how activations differ between wordings of one fact and between facts of a kind. Their subjects are
taken from the demonstration base's facts and set aside: no edit and no probe of `edits.jsonl` names one, and
`build_edits.py` never picks one, whatever its seed.

    python examples/demo_base/build_pool.py examples/edits.jsonl wisecli/data/pool_facts.jsonl
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from pathlib import Path

import jsonlines
from facts import Fact, load_facts

SEED = 11
PER_RELATION = 14
WORDINGS = 4


def free_subjects(edits: Path) -> list[Fact]:
    """Facts whose subject neither an edit nor a probe of the file is about."""
    with jsonlines.open(edits) as reader:
        records = list(reader)
    asked = {p["prompt"] for r in records for p in r["locality"]}
    facts = load_facts()
    taken = {r["subject"] for r in records} | {f.subject for f in facts if asked & {*f.trained, *f.held}}
    return [f for f in facts if f.subject not in taken]


def pool_facts(edits: Path) -> list[dict]:
    """Facts of every relation, up to `PER_RELATION` of each and at most a quarter of them, in random order."""
    rng = random.Random(SEED)
    by_relation = defaultdict(list)
    for fact in free_subjects(edits):
        by_relation[fact.relation].append(fact)
    out = []
    for relation in sorted(by_relation):
        facts = by_relation[relation]
        for fact in rng.sample(facts, min(PER_RELATION, len(facts) // 4)):
            prompts = rng.sample([*fact.trained, *fact.held], WORDINGS)
            out.append({"subject": fact.subject, "relation": relation, "answer": fact.answer, "prompts": prompts})
    rng.shuffle(out)
    return out


def main() -> None:
    edits, pool = Path(sys.argv[1]), Path(sys.argv[2])
    with jsonlines.open(pool, "w", sort_keys=False) as writer:
        writer.write_all(pool_facts(edits))


if __name__ == "__main__":
    main()
