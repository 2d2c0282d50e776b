"""Write `edits.jsonl`: edits of the demonstration base with rephrases and locality probes.

Counterfactual edits change facts the base was trained on; updates are true facts that it has stale or not at all
(`updates.tsv`). The prompt is a phrasing the base knows, the rephrases are the held-out phrasings of the same fact.
Each edit comes with probes that must not change: two unrelated questions, another subject in the same relation, and,
where the base knows one, the same subject in another relation. No probe asks for an edited fact, and neither an edit
nor a near probe is about a subject of the gate's pool. No model is needed.

    python examples/demo_base/build_edits.py examples/edits.jsonl
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from functools import cache
from pathlib import Path

import jsonlines
from facts import HERE, Fact, load_facts, load_questions, make_fact

POOL = HERE.parents[1] / "wisecli" / "data" / "pool_facts.jsonl"
SEED = 7


@cache
def pool_subjects(path: Path = POOL) -> set[str]:
    """Subjects set aside for calibrating the gate."""
    with jsonlines.open(path) as reader:
        return {fact["subject"] for fact in reader}


def load_updates(path: Path = HERE / "updates.tsv") -> list[Fact]:
    """True facts that are newer than the base's world; `answer` is what it should learn."""
    rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line)
    return [make_fact(relation, subject, answer) for relation, subject, answer in rows]


def choose(facts: list[Fact], updates: list[Fact], n: int, rng: random.Random) -> list[tuple[Fact, str, str]]:
    """(fact, target, kind): every update, and counterfactual edits spread over the relations, in random order."""
    taken, aside = {(u.relation, u.subject) for u in updates}, pool_subjects()
    answers = defaultdict(set)
    by_relation = defaultdict(list)
    for f in facts:
        answers[f.relation].add(f.answer)
        if (f.relation, f.subject) not in taken:
            by_relation[f.relation].append(f)
    edits = [(u, u.answer, "update") for u in updates]
    relations = sorted(by_relation)
    for r in relations:
        rng.shuffle(by_relation[r])
        by_relation[r] = [f for f in by_relation[r] if f.subject not in aside]
    turns = (by_relation[r][i] for i in range(len(facts)) for r in relations if i < len(by_relation[r]))
    while len(edits) < n:
        fact = next(turns)
        target = rng.choice(sorted(answers[fact.relation] - {fact.answer}))
        edits.append((fact, target, "counterfactual"))
    rng.shuffle(edits)
    return edits


def probes(fact: Fact, facts: list[Fact], edited: set[tuple[str, str]], rng: random.Random) -> list[dict[str, str]]:
    """Near probes: one other subject in this relation, and this subject in another relation where there is one."""
    free, aside = [f for f in facts if (f.relation, f.subject) not in edited], pool_subjects()
    out = []
    for kind, fits in (
        ("same-relation", [f for f in free if f.relation == fact.relation and f.subject != fact.subject]),
        ("same-subject", [f for f in free if f.relation != fact.relation and f.subject == fact.subject]),
    ):
        if not {f.subject for f in fits} <= aside:
            other = rng.choice(fits)
            while other.subject in aside:
                other = rng.choice(fits)
            out.append({"prompt": rng.choice(other.trained), "answer": other.answer, "kind": kind})
    return out


def build(n: int, seed: int = SEED) -> list[dict]:
    rng = random.Random(seed)
    facts, updates = load_facts(), load_updates()
    known = {(f.relation, f.subject): f.answer for f in facts}
    edits = choose(facts, updates, n, rng)
    edited = {(f.relation, f.subject) for f, _, _ in edits}
    questions = load_questions()
    rng.shuffle(questions)
    records = []
    for i, (fact, target, kind) in enumerate(edits):
        unrelated = [questions[(2 * i + k) % len(questions)] for k in range(2)]
        meta = {"kind": kind, "relation": fact.relation}
        if (fact.relation, fact.subject) in known:
            meta["before"] = known[fact.relation, fact.subject]
        records.append(
            {
                "id": f"demo-{i + 1:03d}",
                "prompt": rng.choice(fact.trained),
                "target": target,
                "subject": fact.subject,
                "rephrases": list(fact.held),
                "locality": [{"prompt": q, "answer": a} for q, a in unrelated] + probes(fact, facts, edited, rng),
                "meta": meta,
            }
        )
    return records


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("out", type=Path, nargs="+")
    ap.add_argument("--edits", type=int, default=210)
    ap.add_argument("--seed", type=int, default=SEED)
    args = ap.parse_args()
    for out in args.out:
        with jsonlines.open(out, "w", sort_keys=False) as writer:
            writer.write_all(build(args.edits, args.seed))


if __name__ == "__main__":
    main()
