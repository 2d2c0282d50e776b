"""What there is to ask about a stream of edits, and what one answer to it is: `Question`, `Item`.

A question is one prompt of one edit: the edit itself, a rephrase, or a locality probe. An item is a question with what
the base and the edited model made of it. Nothing here runs a model or averages anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from wisecli.data.records import SAME_RELATION, SAME_SUBJECT, UNRELATED, EditRecord, Prompt, Said, asked_behind, said_of
from wisecli.data.stream import EditStream, prompt_key, squeeze
from wisecli.routing.routers import Route

EDIT, REPHRASE = "edit", "rephrase"
NEAR = (SAME_RELATION, SAME_SUBJECT)

# Score name -> the kinds of questions it averages.
SCORES: dict[str, tuple[str, ...]] = {"rel": (EDIT,), "gen": (REPHRASE,), "loc": (UNRELATED,), "loc_near": NEAR}


@dataclass(frozen=True)
class Question:
    """One prompt to ask.

    Attributes:
        edit: id of the edit it belongs to.
        kind: "edit", "rephrase", or a kind of locality probe.
        prompt: the text to ask.
        target: the text to reach, of an edit or a rephrase; None for a probe.
        answer: the dataset's answer to a probe; it only says on which tokens agreement is measured.
        contrast: a text whose probability is compared: for an edit or a rephrase the true answer, for a near probe the
            edit's target; None where the dataset gives no true answer.
        history: the messages before the prompt, where the edit is a conversation.
    """

    edit: str
    kind: str
    prompt: str
    target: str | None = None
    answer: str | None = None
    contrast: str | None = None
    history: tuple[Said, ...] = ()

    @property
    def asked(self) -> Prompt:
        """The prompt as it is put to a base."""
        return asked_behind(self.history, self.prompt)

    @property
    def edited(self) -> bool:
        return self.target is not None

    @property
    def wanted(self) -> str | None:
        """The text the model is led along."""
        return self.target or self.answer


@dataclass(frozen=True)
class Item:
    """A question with what the base (before) and the edited model (after) made of it; pairs are (before, after).

    Attributes:
        before, after: generated texts.
        exact: whether the generated text is the target; for a probe whether its tokens are the base's own.
        token: share of tokens that are right under teacher forcing; for a probe, that are the base's own argmax.
        match: whether all of them are.
        nll: mean negative log-likelihood per token of the target, or of a probe's answer, in nats.
        contrast: the same of the question's contrast.
        route: who answered, and why; None without a side memory.
        opened: text and `exact` with the gate always open, where that was asked.
        answered: for a probe with an answer in the dataset, whether all of that answer's tokens are argmax.
    """

    question: Question
    before: str
    after: str
    exact: tuple[bool, bool]
    token: tuple[float, float] | None = None
    match: tuple[bool, bool] | None = None
    nll: tuple[float, float] | None = None
    contrast: tuple[float, float] | None = None
    route: Route | None = None
    opened: tuple[str, bool] | None = None
    answered: tuple[bool, bool] | None = None

    def to_json(self) -> dict[str, Any]:
        """As results.json holds it; what was not measured is left out."""
        q, r = self.question, self.route
        out: dict[str, Any] = {"edit": q.edit, "kind": q.kind, "prompt": q.prompt}
        out |= {
            k: v for k, v in (("target", q.target), ("answer", q.answer), ("contrast", q.contrast)) if v is not None
        }
        out |= {"history": [list(said) for said in q.history]} if q.history else {}
        out |= {"before": self.before, "after": self.after, "exact": list(self.exact)}
        pairs = {"token": self.token, "match": self.match, "answered": self.answered, "nll": self.nll}
        pairs["nll_contrast"] = self.contrast
        out |= {k: list(v) for k, v in pairs.items() if v is not None}
        out |= {"open": self.opened[0], "open_exact": self.opened[1]} if self.opened is not None else {}
        out |= {"route": r.to_json()} if r is not None else {}
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Item:
        """The item that `to_json` wrote."""
        named, texts = ("edit", "kind", "prompt"), ("target", "answer", "contrast")
        question = Question(*(data[k] for k in named), *(data.get(k) for k in texts))
        question = replace(question, history=said_of(data.get("history", ())))
        route = data.get("route")
        names = {"token": "token", "match": "match", "answered": "answered", "nll": "nll", "contrast": "nll_contrast"}
        pairs: dict[str, Any] = {k: tuple(data[name]) for k, name in names.items() if name in data}
        return cls(
            question,
            data["before"],
            data["after"],
            tuple(data["exact"]),
            route=None if route is None else Route.from_json(route),
            opened=(data["open"], data["open_exact"]) if "open" in data else None,
            **pairs,
        )

    def with_opened(self, text: str, exact: bool) -> Item:
        return replace(self, opened=(text, exact))


@dataclass(frozen=True)
class Asked:
    """The questions about a stream, and how many were left out because the stream itself gives them another answer.

    Attributes:
        rephrases: rephrases that another edit learns with another target.
        probes: locality probes that are the prompt or a rephrase of an edit: editing must change them.
    """

    questions: tuple[Question, ...]
    rephrases: int = 0
    probes: int = 0


def questions_of(stream: EditStream) -> list[Question]:
    """Everything there is to ask about a stream, in order; see `ask_of`."""
    return list(ask_of(stream).questions)


def ask_of(stream: EditStream) -> Asked:
    """The questions about a stream, in order.

    Left out are edits that a later one contradicts, and prompts that no editor could answer as wanted, because another
    edit of the stream wants something else of the same prompt.
    """
    live = [r for r in stream.records if r.id not in stream.superseded]
    targets = {prompt_key(r.asked): squeeze(r.target) for r in live}
    changed = targets.keys() | {prompt_key(asked_behind(r.history, p)) for r in live for p in r.rephrases}
    kept: list[Question] = []
    rephrases = probes = 0
    for q in (q for r in live for q in questions_about(r)):
        key = prompt_key(q.asked)
        if q.kind == REPHRASE and key in targets and targets[key] != squeeze(str(q.target)):
            rephrases += 1
        elif not q.edited and key in changed:
            probes += 1
        else:
            kept.append(q)
    return Asked(tuple(kept), rephrases, probes)


def questions_about(record: EditRecord) -> list[Question]:
    """The edit itself, its rephrases, its locality probes; of a conversation, all as its last user turn."""
    truth, history = record.truth, record.history
    wordings = [(EDIT, record.prompt), *((REPHRASE, p) for p in record.rephrases)]
    own = [Question(record.id, kind, p, record.target, contrast=truth, history=history) for kind, p in wordings]
    for probe in record.locality:
        contrast = record.target if truth is not None and probe.near and probe.answer is not None else None
        own.append(Question(record.id, probe.kind, probe.prompt, None, probe.answer, contrast, history))
    return own
