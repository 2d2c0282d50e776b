"""General ability against an oracle of one row and one forward, and the passages it is measured on."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHAT_TEMPLATE, KINDS

from wisecli.data.pool import contexts, held_text, ordinary_prompts
from wisecli.errors import InputError
from wisecli.evaluation.ability import GIVEN, SHIPPED, measure_ability, read_texts
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base
from wisecli.models.prompts import PromptEncoder
from wisecli.routing.attach import attach

EDITS = Path(__file__).parents[1] / "examples" / "edits.jsonl"
TEXTS = (
    "hello world the capital of France is Paris what who",
    "where when",
    "Paris is the capital of the world, hello? what is France when the world is hello",
    "who is France",
)
CONTEXT = 256  # of the tiny models
Make = Callable[..., tuple[Base, SideMemory]]


@pytest.fixture(scope="module")
def make(tiny_model: Any, tokenizer: Any, encoder: PromptEncoder, make_side_memory: Any) -> Make:
    """A base with a side memory whose one key is the first half of the first text."""

    def build(kind: str = "llama", epsilon: float = 0.9) -> tuple[Base, SideMemory]:
        prompt, _ = halves(encoder, TEXTS[0])
        sm = make_side_memory(tiny_model(kind), [encoder.decode(prompt), "when"], epsilon=[{"key": epsilon}])
        return Base(tiny_model(kind), tokenizer, "tiny"), sm

    return build


def halves(encoder: PromptEncoder, text: str) -> tuple[list[int], list[int]]:
    """Token ids in front of and behind the middle; <s> stands before the text and is in neither count."""
    bos, *ids = encoder.tokenizer(text)["input_ids"]
    assert bos == encoder.tokenizer.bos_token_id
    return [bos, *ids[: len(ids) // 2]], ids[len(ids) // 2 :]


def oracle(base: Base, encoder: PromptEncoder, text: str, sm: SideMemory | None) -> tuple[list[float], list[int], bool]:
    """Losses, argmaxes and whether it was routed: the route from the prompt half alone, then one unpadded forward."""
    prompt, target = halves(encoder, text)
    ids = torch.tensor([prompt + target])
    routed = False
    if sm is None:
        logits = base.model(input_ids=ids, use_cache=False).logits
    else:
        with attach(base.model, sm) as on:
            base.model(input_ids=torch.tensor([prompt]), use_cache=False)
            assert on.last is not None
            memory = on.explain(on.last)[0].memory
            with on.override([memory]):
                logits = base.model(input_ids=ids, use_cache=False).logits
        routed = memory is not None
    scored = logits[0, len(prompt) - 1 : -1].double()
    losses = -scored.log_softmax(-1)[torch.arange(len(target)), torch.tensor(target)]
    return losses.tolist(), scored.argmax(-1).tolist(), routed


# -- the measurement ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_ability_is_that_of_one_passage_at_a_time(make: Make, encoder: PromptEncoder, kind: str) -> None:
    base, sm = make(kind)
    with attach(base.model, sm) as on:
        found = measure_ability(base, encoder, on, TEXTS, batch_size=3)
    before = [oracle(base, encoder, t, None) for t in TEXTS]
    after = [oracle(base, encoder, t, sm) for t in TEXTS]
    losses = [[x for nll, _, _ in side for x in nll] for side in (before, after)]
    assert found.tokens == len(losses[0])
    assert found.passages == len(TEXTS)
    for got, nll in zip(found.perplexity, losses, strict=True):
        assert got == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
    same = [a == b for x, y in zip(before, after, strict=True) for a, b in zip(x[1], y[1], strict=True)]
    assert found.agreement == pytest.approx(sum(same) / len(same))
    assert found.routed == sum(r for _, _, r in after) / len(TEXTS)
    assert found.routed >= 1 / len(TEXTS)  # the first text is routed, so there is something to see
    assert found.perplexity[0] != found.perplexity[1]


def test_with_nothing_attached_nothing_changes(make: Make, encoder: PromptEncoder) -> None:
    base, _ = make()
    found = measure_ability(base, encoder, None, TEXTS)
    assert found.perplexity[0] == found.perplexity[1] > 1
    assert (found.agreement, found.routed, found.text) == (1, None, GIVEN)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_that_never_opens_changes_nothing_at_all(make: Make, encoder: PromptEncoder, kind: str) -> None:
    base, sm = make(kind, epsilon=math.inf)
    plain = measure_ability(base, encoder, None, TEXTS)
    with attach(base.model, sm) as on:
        found = measure_ability(base, encoder, on, TEXTS)
    assert found.perplexity == plain.perplexity
    assert (found.agreement, found.routed) == (1, 0)


def test_a_gate_that_is_always_open_is_seen(make: Make, encoder: PromptEncoder) -> None:
    base, sm = make(epsilon=-2)
    plain = measure_ability(base, encoder, None, TEXTS)
    with attach(base.model, sm) as on:
        found = measure_ability(base, encoder, on, TEXTS)
    assert found.routed == 1
    assert found.perplexity[0] == plain.perplexity[0] != found.perplexity[1]
    assert found.agreement < 1


def test_the_router_does_not_see_the_half_that_is_scored(make: Make, encoder: PromptEncoder) -> None:
    base, sm = make()
    prompt, target = halves(encoder, TEXTS[0])
    known = encoder.decode(prompt)
    tail = " who" * (len(prompt) - 1)
    other = " who" * (len(target) + len(prompt)) + " " + known
    assert [halves(encoder, t)[0] == prompt for t in (known + tail, other)] == [True, False]
    with attach(base.model, sm) as on:
        assert measure_ability(base, encoder, on, [known + tail]).routed == 1
        assert measure_ability(base, encoder, on, [other]).routed == 0


def test_a_passage_beyond_the_context_is_cut_there(make: Make, encoder: PromptEncoder) -> None:
    base, _ = make("gpt2")  # it has a table of positions and fails beyond its end
    long = " ".join(["what who where when"] * 200)
    found = measure_ability(base, encoder, None, [long])
    assert found.tokens == CONTEXT - 1 - (CONTEXT - 1) // 2
    ids = encoder.tokenizer(long)["input_ids"][1:CONTEXT]
    assert found.perplexity == measure_ability(base, encoder, None, [encoder.tokenizer.decode(ids)]).perplexity


def test_passages_are_plain_text_whatever_the_encoder_renders(make: Make, encoder: PromptEncoder) -> None:
    base, sm = make()
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    with attach(base.model, sm) as on:
        rendered = measure_ability(base, PromptEncoder(tokenizer, chat=True), on, TEXTS)
        assert rendered == measure_ability(base, encoder, on, TEXTS)


def test_batches_do_not_matter(make: Make, encoder: PromptEncoder) -> None:
    base, sm = make()
    with attach(base.model, sm) as on:
        one, all_ = (measure_ability(base, encoder, on, TEXTS, batch_size=n) for n in (1, 4))
    assert one.perplexity == pytest.approx(all_.perplexity, rel=1e-5)
    assert (one.tokens, one.agreement, one.routed) == (all_.tokens, all_.agreement, all_.routed)


@pytest.mark.parametrize(("texts", "said"), [(["who is", "a"], "Passage 2"), ([" "], "Passage 1"), ([], "no passage")])
def test_what_cannot_be_halved_is_named(make: Make, encoder: PromptEncoder, texts: list[str], said: str) -> None:
    base, _ = make()
    with pytest.raises(InputError, match=said) as caught:
        measure_ability(base, encoder, None, texts)
    assert caught.value.hint


def test_the_shipped_text_is_measured_when_none_is_given(make: Make, encoder: PromptEncoder) -> None:
    base, sm = make()
    with attach(base.model, sm) as on:
        found = measure_ability(base, encoder, on)
    said = found.to_json()
    assert json.loads(json.dumps(said, allow_nan=False)) == said
    assert list(said) == ["text", "passages", "tokens", "perplexity", "agreement", "routed"]
    assert (said["text"], said["passages"]) == (SHIPPED, len(held_text()))
    assert said["perplexity"] == dict(zip(("before", "after"), found.perplexity, strict=True))
    assert said["tokens"] > 20 * said["passages"]


# -- the passages ------------------------------------------------------------------------------------------------------


def test_the_shipped_passages_are_of_like_length_and_without_odd_characters() -> None:
    assert 55 <= len(held_text()) <= 70
    for passage in held_text():
        assert 50 <= len(passage.split()) <= 90, passage
        assert passage.isascii()
        assert passage.isprintable()
        assert re.match(r'^["A-Z].*[.?!"]$', passage), passage


def test_the_shipped_passages_repeat_neither_each_other_nor_the_other_texts() -> None:
    seen: dict[tuple[str, ...], str] = {}
    others = " \n ".join((*ordinary_prompts(), *contexts())).lower()
    for passage in held_text():
        words = re.findall(r"[\w']+", passage.lower())
        runs = {tuple(words[i : i + 6]) for i in range(len(words) - 5)}
        assert not runs & seen.keys(), passage
        seen |= dict.fromkeys(runs, passage)
        assert not [run for run in runs if " ".join(run) in others], passage


def test_no_shipped_passage_is_about_an_edit_of_the_examples() -> None:
    records = [json.loads(line) for line in EDITS.read_text(encoding="utf-8").splitlines()]
    subjects = {re.sub(r"^(the|an?) ", "", r["subject"]) for r in records}
    assert len(subjects) > 100
    text = "\n".join(held_text())
    assert not [s for s in subjects if re.search(rf"(?<!\w){re.escape(s)}(?:e?s)?(?!\w)", text, re.IGNORECASE)]


def test_a_file_of_passages_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeffOne caf\u00e9.\r\n\r\n  Two\u2028still two. \n   \nThree.".encode())
    assert read_texts(path) == ["One caf\u00e9.", "Two\u2028still two.", "Three."]
    assert read_texts(str(path)) == read_texts(path)


@pytest.mark.parametrize(
    ("data", "said"), [(b" \n\n", "holds no passage"), (b"caf\xe9", "not UTF-8"), (b"a\0b", "zero bytes")]
)
def test_a_file_without_passages_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes(data)
    with pytest.raises(InputError, match=said) as caught:
        read_texts(path)
    assert caught.value.hint


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("Some text.", encoding="utf-8")
    with pytest.raises(InputError, match="does not exist") as caught:
        read_texts(tmp_path / "text.txt")
    assert caught.value.hint is not None
    assert "texts.txt" in caught.value.hint
    with pytest.raises(InputError, match="folder"):
        read_texts(tmp_path)
