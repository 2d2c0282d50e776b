"""General ability: how well a model continues plain text that has nothing to do with its edits, before and after.

A small measurement that needs no download: passages that ship with the tool, or a file of the user's. It finds damage
and false openings of the gate on running text; it is no benchmark of knowledge or reasoning.

Each passage is split in its middle between two tokens. The first half is the prompt, and the only thing the router
sees; the second is scored under teacher forcing. Passages are read as plain text, without a chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wisecli.data.pool import held_text
from wisecli.data.source import missing_file
from wisecli.errors import InputError
from wisecli.evaluation.answers import Forced, force
from wisecli.evaluation.metrics import perplexity
from wisecli.evaluation.store import AnswerStore
from wisecli.models.base import Base, context_of
from wisecli.models.prompts import PromptEncoder, Row

if TYPE_CHECKING:
    from wisecli.routing.attach import Attached

BATCH = 16
PASSAGE_TOKENS = 2048  # of a passage at most, so that a book on one line takes no more memory than a page
SHIPPED, GIVEN = "held text shipped with the tool", "text given by the user"


@dataclass(frozen=True)
class Ability:
    """What a side memory changes on text that no edit is about.

    Attributes:
        passages: passages measured, each with one decision of the router.
        tokens: tokens scored, in the second halves.
        perplexity: (before, after), exp of the mean negative log-likelihood over all scored tokens.
        agreement: share of scored positions at which base and attached model have the same argmax.
        routed: share of passages that a side memory answered; None where none is attached.
        text: which text it was.
    """

    passages: int
    tokens: int
    perplexity: tuple[float, float]
    agreement: float
    routed: float | None
    text: str = SHIPPED

    def to_json(self) -> dict[str, Any]:
        before, after = self.perplexity
        return {
            "text": self.text,
            "passages": self.passages,
            "tokens": self.tokens,
            "perplexity": {"before": before, "after": after},
            "agreement": self.agreement,
            "routed": self.routed,
        }


def measure_ability(
    base: Base,
    encoder: PromptEncoder,
    attached: Attached | None,
    texts: Sequence[str] | None = None,
    batch_size: int = BATCH,
    stores: tuple[AnswerStore | None, AnswerStore | None] = (None, None),
) -> Ability:
    """Score the second half of each passage, by the base and with a side memory attached.

    Perplexity is exp(1/N sum_t nll_t) over the N scored tokens of all passages together. Where the gate opens for no
    passage, and where nothing is attached, after equals before exactly.

    Args:
        encoder: gives the tokenizer; the passages are encoded as plain text even if it renders chats.
        attached: the side memory attached to the base's model, None for the base alone.
        texts: passages; the shipped ones when None. What of a passage exceeds the base's context, or PASSAGE_TOKENS,
            is left out, since it serves to measure only.
        stores: where finished batches of the base, and of the attached model, are kept.

    Raises:
        InputError: there is no passage, or one of which a half has no token.
    """
    passages = held_text() if texts is None else tuple(texts)
    if not passages:
        raise InputError("There is no passage to measure on.", hint="Give at least one, or use the shipped text.")
    plain = PromptEncoder(encoder.tokenizer)
    limit = _longest(base)
    rows = [_split(plain, passage, number, limit) for number, passage in enumerate(passages, 1)]
    with nullcontext() if attached is None else attached.override(None):
        before = force(base, plain, rows, batch_size=batch_size, store=stores[0])
    after = before if attached is None else force(base, plain, rows, attached, batch_size=batch_size, store=stores[1])
    same = [a == b for a, b in zip(_predicted(before), _predicted(after), strict=True)]
    routes = [f.route for f in after if f.route is not None]
    return Ability(
        passages=len(rows),
        tokens=len(same),
        perplexity=(perplexity(_nll(before)), perplexity(_nll(after))),
        agreement=sum(same) / len(same),
        routed=sum(r.routed for r in routes) / len(routes) if routes else None,
        text=SHIPPED if texts is None else GIVEN,
    )


def read_texts(path: str | Path) -> list[str]:
    """The passages of a file: one per line, UTF-8, empty lines skipped.

    Raises:
        InputError: there is no such file, it is no UTF-8 text, or it holds no passage.
    """
    path = Path(path)
    how = "Give a text file saved as UTF-8, one passage per line."
    if not path.exists():
        raise missing_file(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a file of passages", hint="Name one file in it.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as err:
        raise InputError(f"{path} cannot be read: {err.strerror or err}", hint="Check its permissions.") from err
    except UnicodeDecodeError as err:
        what = f"{path} is not UTF-8 text (byte 0x{err.object[err.start]:02x} at offset {err.start})"
        raise InputError(what, hint=how) from err
    if "\0" in text:
        raise InputError(f"{path} is not text: it holds zero bytes", hint=how)
    passages = [line.strip() for line in text.split("\n") if line.strip()]
    if not passages:
        raise InputError(f"{path} holds no passage", hint=how)
    return passages


def _longest(base: Base) -> int:
    """Tokens a passage may have."""
    return min(context_of(base.model), PASSAGE_TOKENS)


def _split(encoder: PromptEncoder, passage: str, number: int, limit: int) -> Row:
    """A passage as prompt and target of equal length; special tokens in front of the text count for neither half."""
    ids = encoder.prompt(passage).prompt[:limit] if passage.strip() else ()
    special = encoder.special
    start = next((i for i, token in enumerate(ids) if token not in special), len(ids))
    middle = start + (len(ids) - start) // 2
    if middle == start:
        raise InputError(
            f"Passage {number} is too short to be halved: {passage[:60]!r} gives {len(ids) - start} tokens; "
            "at least 2 are needed.",
            hint="Leave it out, or join it with the next.",
        )
    return Row(ids[:middle], ids[middle:])


def _predicted(forced: Sequence[Forced]) -> tuple[int, ...]:
    return tuple(chain.from_iterable(f.predicted for f in forced))


def _nll(forced: Sequence[Forced]) -> tuple[float, ...]:
    return tuple(chain.from_iterable(f.nll for f in forced))
