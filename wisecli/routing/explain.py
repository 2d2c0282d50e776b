"""Why a prompt goes to the memory it goes to: the decision itself, the nearest edits, and what each token reaches.

The decision is the one that `generate` takes, read off at the edit site, where the forward ends: explaining costs the
layers up to there and generates nothing. Prompts are batched; each is explained as it would be alone. What the key
router says of a token is the score the prompt would have if it ended there; the activation router's tokens are what its
indicator is the mean of. This module shows nothing: the command line does.

Shapes: `B` rows, `T` tokens, `N` edits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from wisecli.errors import InputError, UsageError
from wisecli.memory.side_memory import EditEntry
from wisecli.models.base import context_of
from wisecli.models.prompts import PromptEncoder, Row
from wisecli.routing.routers import Ranking, Route

if TYPE_CHECKING:
    from torch import Tensor

    from wisecli.routing.attach import Attached

TOP = 3
_WINDOW = 8  # tokens decoded before one, so that it comes out as it does in its place
_INCOMPLETE = "\ufffd"  # what a character decodes to while some of its bytes are still to come


@dataclass(frozen=True)
class TokenScore:
    """A token of the prompt as rendered: its text, whether the router counts it as content, and what it reaches.

    `text` is empty where a character goes on in the next token; the texts join to the rendered prompt.
    """

    text: str
    content: bool
    score: float


@dataclass(frozen=True)
class NearEdit:
    """An edit near a prompt: its ledger entry, its own score, and the threshold of the memory that holds it."""

    entry: EditEntry
    score: float
    epsilon: float

    def to_json(self) -> dict[str, Any]:
        e = self.entry
        texts = {"prompt": e.prompt, "target": e.target}
        numbers = {"score": _finite(self.score), "epsilon": _finite(self.epsilon)}
        return {"id": e.id, "memory": e.memory, "took": e.took, **texts, **numbers, "details": dict(e.details)}


@dataclass(frozen=True)
class Explanation:
    """Why a prompt goes where it goes.

    Attributes:
        prompt: as the user wrote it.
        router: name of what decided.
        memories: how many memories it decided among, main memory apart.
        route: the decision.
        nearest: the nearest edits, best first; none where the router knows no single edits.
        tokens: of the prompt as rendered, special tokens and chat template included.
        shown: the range of `tokens` to show: all of them, or with a chat template those the user wrote last.
    """

    prompt: str
    router: str
    memories: int
    route: Route
    nearest: tuple[NearEdit, ...]
    tokens: tuple[TokenScore, ...]
    shown: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "router": self.router,
            **self.route.to_json(),
            "nearest": [e.to_json() for e in self.nearest],
            "tokens": [{"text": t.text, "content": t.content, "score": _finite(t.score)} for t in self.tokens],
        }


def explain(
    attached: Attached, encoder: PromptEncoder, prompts: Sequence[str], top: int = TOP, batch_size: int = 32
) -> list[Explanation]:
    """Explain the decision about each prompt.

    Args:
        attached: the side memory on its model.
        encoder: as prompts are rendered for it, with `SideMemory.chat` in the base's chat template.
        prompts: as a user writes them.
        top: nearest edits to name, at most.
        batch_size: prompts per forward, at most.

    Raises:
        InputError: a prompt is empty, no valid text, or longer than the base takes.
    """
    if top < 1 or batch_size < 1:
        raise UsageError(f"top and batch_size must be at least 1, not {top} and {batch_size}.")
    rows = [_row(attached, encoder, p) for p in prompts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: dict[int, Explanation] = {}
    for at in range(0, len(order), batch_size):
        picked = order[at : at + batch_size]
        some = [(prompts[i], rows[i]) for i in picked]
        found |= zip(picked, _explain(attached, encoder, some, top), strict=True)
    return [found[i] for i in range(len(rows))]


def explain_conversation(
    attached: Attached, encoder: PromptEncoder, messages: Sequence[Mapping[str, str]], top: int = TOP
) -> Explanation:
    """Explain the decision about a conversation that ends with a user's message."""
    return _explain(attached, encoder, [(messages[-1]["content"], encoder.conversation(messages))], top)[0]


def _explain(
    attached: Attached, encoder: PromptEncoder, asked: Sequence[tuple[str, Row]], top: int
) -> list[Explanation]:
    """One batch of prompts with their rows."""
    batch = encoder.batch([row for _, row in asked])
    routes, seen = attached.look(batch)
    scores, ranking = attached.router.per_token(seen), attached.router.ranking(seen, top)
    out = []
    for i, (route, (prompt, row)) in enumerate(zip(attached.explain(routes), asked, strict=True)):
        real = slice(-len(row), None)  # padding is on the left
        tokens = _tokens(encoder, row, seen.content[i, real], scores[i, real])
        nearest = _nearest(attached, ranking, i)
        shown = _shown(tokens) if encoder.chat else (0, len(tokens))
        memories = len(attached.side_memory.memories)
        out.append(Explanation(prompt, attached.router.name, memories, route, nearest, tokens, shown))
    return out


def check_prompt(prompt: str, what: str = "prompt") -> None:
    """Refuse what is no prompt.

    Raises:
        InputError: it is empty, or no valid text.
    """
    if not prompt.strip():
        raise InputError(f"The {what} is empty.", hint="Give at least one word.")
    try:
        prompt.encode()
    except UnicodeEncodeError as e:
        raise InputError(f"The {what} is not valid text.", hint="Give it in UTF-8.") from e


def _row(attached: Attached, encoder: PromptEncoder, prompt: str) -> Row:
    check_prompt(prompt)
    row = encoder.prompt(prompt)
    limit = context_of(attached.model)
    if limit < len(row):
        about = " ".join(prompt.split())[:40]
        raise InputError(
            f"The prompt {about!r}... has {len(row)} tokens; the base takes {limit}.", hint="Shorten the prompt."
        )
    return row


def _tokens(encoder: PromptEncoder, row: Row, content: Tensor, scores: Tensor) -> tuple[TokenScore, ...]:
    texts = token_texts(encoder.tokenizer, row.prompt)
    return tuple(TokenScore(*t) for t in zip(texts, content.tolist(), scores.tolist(), strict=True))


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text each token adds where it stands, spaces included; a character of several tokens counts to its last."""

    def text(some: Sequence[int]) -> str:
        decoded = tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(decoded).rstrip(_INCOMPLETE)

    out = []
    for at in range(len(ids)):
        start = max(0, at - _WINDOW)
        out.append(text(ids[start : at + 1])[len(text(ids[start:at])) :])
    return out


def _nearest(attached: Attached, ranking: Ranking, i: int) -> tuple[NearEdit, ...]:
    edits = attached.side_memory.edits
    columns = (x[i].tolist() for x in (ranking.edit, ranking.score, ranking.epsilon))
    return tuple(NearEdit(edits[k], score, epsilon) for k, score, epsilon in zip(*columns, strict=True))


def _shown(tokens: Sequence[TokenScore]) -> tuple[int, int]:
    """From the first to the last content token."""
    content = [i for i, t in enumerate(tokens) if t.content]
    return content[0], content[-1] + 1


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
