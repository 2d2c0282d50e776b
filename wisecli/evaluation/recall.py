"""Does a side memory still answer its own edits? Asked with nothing but the side memory and its base.

Every edit whose text the side memory carries is asked again in the words it was learned with, and the shipped ordinary
prompts are sent to the gate to see how many it lets through. What is not here: rephrases and locality probes, which a
side memory does not carry (`evaluation.evaluate` asks those from a dataset).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from wisecli.data.pool import ordinary_prompts
from wisecli.data.records import Prompt
from wisecli.evaluation.answers import BATCH, Answer, answer_cap, generate_answers
from wisecli.evaluation.metrics import exact_match, mean
from wisecli.memory.shard import SUPERSEDED, WITHDRAWN
from wisecli.memory.side_memory import EditEntry, SideMemory
from wisecli.models.base import Base, dtype_name
from wisecli.models.prompts import PromptEncoder
from wisecli.routing.attach import Attached, attach

NO_TEXTS = "the side memory does not carry the edits' prompts and targets"


@dataclass(frozen=True)
class Measured:
    """What was found by asking again.

    Attributes:
        base, dtype, router: what it was measured on and with.
        edits: edits asked; superseded and withdrawn ones and those without text are not.
        reliability: share answered with their target, exact match of free greedy generation; None for no edits.
        routed: share of these edits that a side memory answered.
        ordinary, opened: number of shipped ordinary prompts, and the share that a side memory answered.
        reason: why no edit was asked.
    """

    base: str
    dtype: str
    router: str
    edits: int
    reliability: float | None
    routed: float | None
    ordinary: int
    opened: float | None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(base: Base, side_memory: SideMemory, progress: Callable[[int, int], None] | None = None) -> Measured:
    """Ask every edit of a side memory again, and every ordinary prompt for its route.

    Args:
        base: the side memory's base, loaded.
        side_memory: to be measured; its own router decides.
        progress: called with the prompts done and their total.

    Raises:
        BaseMismatch: the base is another one.
        InputError: an edit does not fit the base's context.
    """
    encoder = PromptEncoder(base.tokenizer, chat=side_memory.chat)
    live = [e for e in side_memory.edits if e.details.get("outcome") not in (SUPERSEDED, WITHDRAWN)]
    edits = [e for e in live if e.prompt is not None and e.target is not None]
    caps = _caps(base, encoder, edits)
    ordinary = ordinary_prompts()
    total = len(caps) + len(ordinary)

    def report(done: int) -> None:
        if progress is not None:
            progress(done, total)

    with attach(base.model, side_memory) as attached:
        answers: dict[Prompt, Answer] = {}
        prompts = list(caps)
        for i, answer in generate_answers(base, encoder, prompts, list(caps.values()), attached):
            answers[prompts[i]] = answer
            report(len(answers))
        opened = _opened(encoder, ordinary, attached, lambda done: report(len(caps) + done))
        router = attached.router.name
    asked = [(answers[e.asked], str(e.target)) for e in edits]
    return Measured(
        base=base.label,
        dtype=dtype_name(base.model.dtype),
        router=router,
        edits=len(edits),
        reliability=mean([exact_match(answer.text, target) for answer, target in asked]),
        routed=mean([answer.route is not None and answer.route.routed for answer, _ in asked]),
        ordinary=len(ordinary),
        opened=mean(opened),
        reason=None if edits else (NO_TEXTS if live else "it holds no edit that is in force"),
    )


def _caps(base: Base, encoder: PromptEncoder, edits: Sequence[EditEntry]) -> dict[Prompt, int]:
    """Each distinct prompt with the tokens its answer may take, by its longest target."""
    caps: dict[Prompt, int] = {}
    for e in edits:
        prompt = e.asked
        n = answer_cap(base, encoder, e.id, prompt, str(e.target))
        caps[prompt] = max(caps.get(prompt, 0), n)
    return caps


def _opened(
    encoder: PromptEncoder, prompts: Sequence[str], attached: Attached, report: Callable[[int], None]
) -> list[bool]:
    """Whether a side memory answers each prompt, at the cost of the layers below the edit site; in no set order."""
    rows = sorted((encoder.prompt(p) for p in prompts), key=len)
    out: list[bool] = []
    for at in range(0, len(rows), BATCH):
        out += [r.routed for r in attached.decide(encoder.batch(rows[at : at + BATCH]))]
        report(len(out))
    return out
