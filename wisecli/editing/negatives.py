"""What lies outside an edit's scope, as stream and pool tell: hard negatives, and ordinary prompts that are none.

For an edit with a known subject there are two ways to ask for something close: its prompt with another subject, and its
subject in another relation. Where the pool has facts of the edit's kind, they say which subjects and relations go
together (`kindred_negatives`). Elsewhere the subjects of two edits change places (`hard_negatives`); the two prompts
must have little wording in common once their subjects are taken out, which keeps most, though not all, swaps from
asking for an edited fact in other words. The other way round, an ordinary prompt that names an edited subject may ask
for the edited fact, and is no example of what lies outside.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence

from wisecli.data.pool import PoolFact
from wisecli.data.records import EditRecord

_SLOT = "{}"
_MOST_OVERLAP = 0.34  # Jaccard overlap of two wordings that surely ask different things
_TRIES = 12


def template_of(record: EditRecord) -> str | None:
    """The prompt with its subject taken out, None when the subject is unknown or not in it."""
    if not record.subject or record.subject not in record.prompt:
        return None
    return record.prompt.replace(record.subject, _SLOT, 1)


def hard_negatives(
    records: Sequence[EditRecord], per_edit: int = 2, seed: int = 0, exclude: Collection[str] = ()
) -> list[str]:
    """Up to `per_edit` such prompts for each record, in order, without repeats and without those in `exclude`."""
    known = [(r, t) for r in records if (t := template_of(r))]
    templates: dict[str, list[set[str]]] = {}
    for record, template in known:
        templates.setdefault(str(record.subject), []).append(_words(template))
    prompts = {r.prompt for r in records} | set(exclude)
    out: dict[str, None] = {}
    for record, template in known:
        rng = random.Random(f"{seed}|{record.id}")
        made, words = 0, _words(template)
        for other, _ in rng.sample(known, min(_TRIES, len(known))):
            asked = template.replace(_SLOT, str(other.subject), 1)
            clear = all(_overlap(words, w) <= _MOST_OVERLAP for w in templates[str(other.subject)])
            if made < per_edit and clear and asked not in prompts:
                out[asked] = None
                made += 1
    return list(out)


def kindred_negatives(
    records: Sequence[EditRecord],
    nearest: Sequence[PoolFact | None],
    facts: Sequence[PoolFact],
    seed: int = 0,
    exclude: Collection[str] = (),
) -> list[str]:
    """For each record with a pool fact of its kind: its prompt with that fact's subject, and, where the pool shows the
    same subjects in another relation too, that relation asked of the record's subject. Without repeats.

    Args:
        records: edits.
        nearest: for each, the pool fact it is closest to, None where none is close.
        facts: of the pool.
        seed: chooses among relations and wordings.
        exclude: prompts that must not be made.
    """
    subjects = Counter(_bare(r.subject).casefold() for r in records if r.subject)
    kin = _kindred(facts)
    prompts = {r.prompt for r in records} | set(exclude)
    out: dict[str, None] = {}
    for record, fact in zip(records, nearest, strict=True):
        template = template_of(record)
        if fact is None or template is None:
            continue
        made = []
        if _bare(fact.subject).casefold() not in subjects:
            made.append(template.replace(_SLOT, fact.subject, 1))
        if kin[fact.relation] and subjects[_bare(str(record.subject)).casefold()] == 1:
            rng = random.Random(f"{seed}|{record.id}")
            other = rng.choice(kin[fact.relation])
            made.append(rng.choice(other.prompts).replace(other.subject, str(record.subject), 1))
        out |= dict.fromkeys(p for p in made if p not in prompts)
    return list(out)


def _kindred(facts: Sequence[PoolFact]) -> dict[str, list[PoolFact]]:
    """Per relation, facts of the other relations in which the pool knows some of its subjects, subject in the text."""
    of_subject: dict[str, set[str]] = defaultdict(set)
    for f in facts:
        of_subject[f.subject].add(f.relation)
    shared: dict[str, set[str]] = defaultdict(set)
    for relations in of_subject.values():
        for r in relations:
            shared[r] |= relations - {r}
    told = [f for f in facts if all(f.subject in p for p in f.prompts)]
    return defaultdict(list, {r: [f for f in told if f.relation in others] for r, others in shared.items()})


def about_edits(prompts: Sequence[str], records: Sequence[EditRecord]) -> list[int]:
    """Positions of the prompts that name the subject of an edit, or are an edit's own prompt."""
    names = {_bare(r.subject) for r in records if r.subject}
    own = {r.prompt.casefold() for r in records}
    words = {n: re.compile(rf"(?<!\w){re.escape(n)}(?!\w)") for n in names}

    def named(prompt: str) -> bool:
        return any(n in prompt and words[n].search(prompt) for n in names)  # most are ruled out without the pattern

    return [i for i, p in enumerate(prompts) if p.casefold() in own or named(p)]


def _bare(subject: str) -> str:
    """A subject without its article, which changes its case at the start of a sentence."""
    return re.sub(r"^(the|a|an) ", "", subject.strip(), flags=re.IGNORECASE)


def _words(template: str) -> set[str]:
    return set(re.findall(r"\w+", template.casefold()))


def _overlap(a: set[str], b: set[str]) -> float:
    return len(a & b) / max(1, len(a | b))
