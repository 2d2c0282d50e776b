"""Ask a side memory its own edits, or any prompts, through its router: free greedy answers with their routes.

`evaluation.recall` gives shares of the same; here each answer is kept, to be shown or set beside another's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wisecli.data.records import Prompt
from wisecli.evaluation.answers import Answer, answer_cap, generate_answers
from wisecli.evaluation.metrics import exact_match
from wisecli.inspection.ledger import outcome_of
from wisecli.memory.shard import FAILED, TOOK, WITHDRAWN
from wisecli.memory.side_memory import EditEntry, SideMemory
from wisecli.models.base import Base
from wisecli.models.prompts import PromptEncoder
from wisecli.routing.attach import attach

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class AskedEdit:
    """An edit with what it was answered.

    Attributes:
        outcome: as recorded. The target of an edit that took or failed is to be answered; that of a withdrawn one is
            not, unless main memory says so by itself or another edit asks for it.
    """

    entry: EditEntry
    outcome: str
    answer: Answer
    passed: bool

    def to_json(self) -> dict[str, Any]:
        e, route = self.entry, self.answer.route
        return {
            **{"id": e.id, "outcome": self.outcome, "prompt": e.prompt, "target": e.target},
            **{"answer": self.answer.text, "passed": self.passed, "route": route.to_json() if route else None},
        }


def ask_edits(base: Base, sm: SideMemory, progress: Report | None = None) -> list[AskedEdit]:
    """Ask every edit whose text is known, but for superseded ones, whose prompts belong to others.

    Args:
        base: the side memory's base, loaded.
        progress: called with the prompts answered and their total.

    Raises:
        BaseMismatch: the base is another one.
        InputError: an edit does not fit the base's context.
    """
    edits = [e for e in sm.edits if outcome_of(e) in (TOOK, FAILED, WITHDRAWN) and e.prompt and e.target is not None]
    answers = ask_prompts(base, sm, caps_of(base, sm, edits), progress)
    targets = {e.id: e.target for e in sm.edits}
    found = []
    for e in edits:
        answer = answers[e.asked]
        said = exact_match(answer.text, str(e.target))
        passed = not _leaks(e, answer, targets) if outcome_of(e) == WITHDRAWN else said
        found.append(AskedEdit(e, outcome_of(e), answer, passed))
    return found


def ask_prompts(
    base: Base, sm: SideMemory, caps: Mapping[Prompt, int], progress: Report | None = None
) -> dict[Prompt, Answer]:
    """The answer to each prompt.

    Args:
        caps: the prompts, each with the tokens its answer may take.

    Raises:
        BaseMismatch: the base is another one.
    """
    encoder, prompts = PromptEncoder(base.tokenizer, chat=sm.chat), list(caps)
    answers: dict[Prompt, Answer] = {}
    with attach(base.model, sm) as attached:
        for i, answer in generate_answers(base, encoder, prompts, list(caps.values()), attached):
            answers[prompts[i]] = answer
            if progress is not None:
                progress(len(answers), len(prompts))
    return answers


def unlike_base(base: Base, sm: SideMemory, prompts: Mapping[str, Prompt]) -> list[str]:
    """Of some edits' prompts, by id, those that a side memory does not answer with the base's own text.

    Raises:
        BaseMismatch: the base is another one.
    """
    caps = caps_of_prompts(base, sm, list(dict.fromkeys(prompts.values())))
    encoder, asked = PromptEncoder(base.tokenizer, chat=sm.chat), list(caps)
    plain = {asked[i]: a.ids for i, a in generate_answers(base, encoder, asked, list(caps.values()))}
    answers = ask_prompts(base, sm, caps)
    return [edit for edit, prompt in prompts.items() if answers[prompt].ids != plain[prompt]]


def caps_of(base: Base, sm: SideMemory, edits: Sequence[EditEntry]) -> dict[Prompt, int]:
    """Each distinct prompt of some edits with the tokens its answer may take, by its longest target.

    Raises:
        InputError: an edit does not fit the base's context.
    """
    encoder = PromptEncoder(base.tokenizer, chat=sm.chat)
    caps: dict[Prompt, int] = {}
    for e in edits:
        cap = answer_cap(base, encoder, e.id, e.asked, e.target)
        caps[e.asked] = max(caps.get(e.asked, 0), cap)
    return caps


def caps_of_prompts(base: Base, sm: SideMemory, prompts: Sequence[Prompt]) -> dict[Prompt, int]:
    """Prompts that no target is known of, each with the tokens its answer may take.

    Raises:
        InputError: a prompt does not fit the base's context.
    """
    encoder = PromptEncoder(base.tokenizer, chat=sm.chat)
    return {p: answer_cap(base, encoder, f"line {i}", p, None) for i, p in enumerate(prompts, 1)}


def _leaks(e: EditEntry, answer: Answer, targets: Mapping[str, str | None]) -> bool:
    """Whether a side memory still answers a withdrawn edit's prompt with its target, for no other edit's sake."""
    route = answer.route
    if route is None or not route.routed or not exact_match(answer.text, str(e.target)):
        return False
    other = targets.get(route.edit) if route.edit not in (None, e.id) else None
    return other is None or not exact_match(other, str(e.target))
