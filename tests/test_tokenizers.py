"""Prompts and targets on tokenizers of many kinds, whatever is in them.

The tokenizers are built here, in the manner of those in use. What a row should be is said by texts and by `tokenizers`
itself, not by the encoder's own steps.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from wisecli.errors import InputError
from wisecli.models.prompts import PromptEncoder

CORPUS = [
    "the capital of France is Paris, the currency of Bulgaria is the euro. Which unit of money is used?",
    "Who wrote it? What is 42? New York, Straße, Ærø, naïve café Émilie über",
    "столица Франции Париж какая валюта",
    "ما هي عاصمة فرنسا باريس",
    "東京は日本の首都です 한국 서울 עברית",
    "Answer: yes\nQuestion: no\n\n\tcode();  // two  spaces\n- a\n- b",
]
_GPT4 = (  # the manner of GPT-4's and Llama 3's: a sign goes with the letters behind it, line breaks with punctuation
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bytes(pre: Any, specials: list[str]) -> Tokenizer:
    """Byte-level BPE."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS * 4,
        trainers.BpeTrainer(
            vocab_size=480, special_tokens=specials, initial_alphabet=alphabet, show_progress=False, min_frequency=2
        ),
    )
    return core


def _begins(core: Tokenizer, form: str) -> Tokenizer:
    names = [t for t in form.split() if t != "$A"]
    core.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[(t, core.token_to_id(t)) for t in names]
    )
    return core


def _fallback_bpe(normalizer: Any, pre: Any, decoder: Any) -> Tokenizer:
    """BPE on characters, with bytes for those it does not know: SentencePiece's, as converted."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(CORPUS[:2] * 4, trainers.BpeTrainer(vocab_size=220, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    names += [t for t in learned["vocab"] if t not in names]
    core = Tokenizer(
        models.BPE(
            vocab={t: i for i, t in enumerate(names)},
            merges=[tuple(m) for m in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    core.normalizer, core.decoder = normalizer, decoder
    if pre is not None:
        core.pre_tokenizer = pre
    return core


def _wrapped(core: Tokenizer, **named: Any) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=core, **named)


def _gpt2() -> Any:
    core = _bytes(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"])
    return _wrapped(core, **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>"))


def _gpt2_prefix() -> Any:
    core = _bytes(pre_tokenizers.ByteLevel(add_prefix_space=True), ["<pad>", "</s>"])
    return _wrapped(core, eos_token="</s>", pad_token="<pad>", padding_side="left")


def _llama3() -> Any:
    split = pre_tokenizers.Split(Regex(_GPT4), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core = _bytes(pre_tokenizers.Sequence([split, level]), ["<|begin|>", "<|end|>"])
    form = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), form])
    return _wrapped(core, bos_token="<|begin|>", eos_token="<|end|>", padding_side="right")


def _unsplit() -> Any:
    """No split at all: merges go across every boundary."""
    core = _bytes(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), ["<s>", "</s>"])
    return _wrapped(_begins(core, "<s> $A"), bos_token="<s>", eos_token="</s>")


def _llama2() -> Any:
    norm = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core = _fallback_bpe(norm, None, decoders.Sequence(parts))
    return _wrapped(_begins(core, "<s> $A"), bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left")


def _metaspace() -> Any:
    pre = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core = _fallback_bpe(None, pre, decoders.Sequence(parts))
    return _wrapped(_begins(core, "<s> $A"), bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>")


def _gemma() -> Any:
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    pre = pre_tokenizers.Split(" ", "merged_with_previous")
    core = _fallback_bpe(normalizers.Replace(" ", "▁"), pre, decoders.Sequence(parts))
    return _wrapped(_begins(core, "<s> $A"), bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _unigram() -> Any:
    """As T5's and XLNet's: letters folded, blanks joined, and an end behind every text."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    core.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    return _wrapped(_begins(core, "$A </s>"), eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def _wordpiece() -> Any:
    """As BERT's: lower case, marks before and behind every text, and no end of its own."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    core.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=names, show_progress=False)
    )
    return _wrapped(
        _begins(core, "[CLS] $A [SEP]"), pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def _words() -> Any:
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=["<unk>", "</s>"], show_progress=False))
    return _wrapped(core, unk_token="<unk>", eos_token="</s>")


@dataclass(frozen=True)
class Kind:
    """How to build a tokenizer; whether it keeps texts as they are; what it puts before each."""

    build: Callable[[], Any]
    lossless: bool = True
    bos: str | None = None


KINDS = {
    "gpt2": Kind(_gpt2),
    "gpt2-prefix": Kind(_gpt2_prefix),
    "llama3": Kind(_llama3, bos="<|begin|>"),
    "unsplit": Kind(_unsplit, bos="<s>"),
    "llama2": Kind(_llama2, bos="<s>"),
    "metaspace": Kind(_metaspace, bos="<s>"),
    "gemma": Kind(_gemma, bos="<s>"),
    "unigram": Kind(_unigram, lossless=False),
    "wordpiece": Kind(_wordpiece, lossless=False, bos="[CLS]"),
    "words": Kind(_words, lossless=False),
}
LOSSLESS = [name for name, kind in KINDS.items() if kind.lossless]
each_kind = pytest.mark.parametrize("name", KINDS)
each_lossless = pytest.mark.parametrize("name", LOSSLESS)


@cache
def encoder_of(name: str) -> PromptEncoder:
    return PromptEncoder(KINDS[name].build())


PIECES = st.sampled_from(
    [
        *("the capital", "Paris", " is ", "euro", "42", "New York", ".", "?", ":", "'s", "-", "(", '"', "</"),
        *("\n", "\n\n", "\t", "  ", "\r\n", "\u00a0", "\u3000", "\u2028"),
        *("é", "e\u0301", "a\u0308\u0323", "ﬁ", "Å", "\u212b", "ß", "İ"),
        *("👩‍👩‍👧", "👍🏽", "🇫🇷", "❤️", "\u200d", "\u200b", "\ufeff"),
        *("باريس", "עברית", "\u202e", "العاصمة", "東京", "서울", "Париж", "Ġ", "##a", "�"),
    ]
)
# U+2581 is how SentencePiece writes a space: its tokenizers read one for the other.
ANY = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0▁"), max_size=8)
TEXTS = st.lists(PIECES | ANY, min_size=1, max_size=5).map("".join)
PROMPTS = TEXTS.map(str.rstrip).filter(bool)  # as an edit record keeps them
TARGETS = TEXTS.map(str.strip).filter(bool)
bounded = settings(max_examples=25, deadline=None)


def plain_ids(encoder: PromptEncoder, text: str) -> list[int]:
    """A text's own ids, by the library underneath."""
    return list(encoder.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def shown(encoder: PromptEncoder, ids: Sequence[int]) -> str:
    return encoder.tokenizer.decode(list(ids), skip_special_tokens=True)


@each_kind
@bounded
@given(prompt=TEXTS)
@example(prompt="x</s>")
@example(prompt="hello<|endoftext|>")
@example(prompt="the capital " * 400)
def test_a_prompt_is_its_text_behind_one_bos(name: str, prompt: str) -> None:
    """Nothing is cut, and nothing stands behind it, whatever the tokenizer puts there or the text ends with."""
    encoder = encoder_of(name)
    ids = plain_ids(encoder, prompt)
    bos = KINDS[name].bos
    begins = [] if bos is None else [encoder.tokenizer.convert_tokens_to_ids(bos)]
    if begins or ids:
        assert list(encoder.prompt(prompt).ids) == begins + ids
    else:
        with pytest.raises(InputError, match="prompt has no tokens"):
            encoder.prompt(prompt)


@each_lossless
@bounded
@given(prompt=PROMPTS, target=TARGETS)
@example(prompt="hello", target="world")
@example(prompt="x\n-", target="-> é")
@example(prompt="a:", target="</")
@example(prompt="the capital" * 400, target="Paris")
def test_a_pair_says_the_prompt_and_the_target(name: str, prompt: str, target: str) -> None:
    encoder = encoder_of(name)
    row = encoder.pair(prompt, target)
    assert row.prompt == encoder.prompt(prompt).prompt  # what is asked is what was trained
    assert row.target[len(row.target) - len(encoder.eos) :] == encoder.eos
    said = row.target[: len(row.target) - len(encoder.eos)]
    assert encoder.decode(said) == target
    assert not encoder.unwritable(row)
    assert shown(encoder, row.prompt + said).removeprefix(" ") == f"{prompt} {target}".removeprefix(" ")


@each_kind
@bounded
@given(prompt=PROMPTS, target=TARGETS)
@example(prompt="the capital", target="Æ ☃ 👩‍👩‍👧")
@example(prompt="the capital", target="\u200b")
def test_a_target_is_said_as_the_tokenizer_writes_it_or_named(name: str, prompt: str, target: str) -> None:
    """Tokenizers that fold letters or know few say what they make of a text alone; what they do not know is named."""
    encoder = encoder_of(name)
    assume(encoder.tokenizer(prompt)["input_ids"])
    alone = plain_ids(encoder, target)
    if not alone:
        with pytest.raises(InputError, match="target has no tokens"):
            encoder.pair(prompt, target)
        return
    row = encoder.pair(prompt, target, eos=False)
    assert encoder.decode(row.target) == shown(encoder, alone).strip()
    unknown = encoder.tokenizer.unk_token_id in alone
    assert bool(encoder.unwritable(row)) == unknown


@pytest.mark.parametrize("name", [n for n in KINDS if n not in ("words", "wordpiece")])
@pytest.mark.parametrize("target", ["{}", "Paris{}", "{} Paris"])
def test_a_special_token_in_a_target_is_named(name: str, target: str) -> None:
    encoder = encoder_of(name)
    special = encoder.tokenizer.eos_token
    assert encoder.unwritable(encoder.pair("the capital is", target.format(special))) == (special,)
    assert encoder.unwritable(encoder.pair("the capital is", "Paris")) == ()


@each_kind
@settings(max_examples=15, deadline=None)
@given(texts=st.lists(st.tuples(PROMPTS, TARGETS), min_size=1, max_size=4))
def test_a_batch_is_its_rows(name: str, texts: list[tuple[str, str]]) -> None:
    """On either side, with a padding token, without one, or with one that is also the end."""
    encoder = encoder_of(name)
    rows = []
    for prompt, target in texts:
        with contextlib.suppress(InputError):  # no tokens
            rows.append(encoder.pair(prompt, target))
    assume(rows)
    for side in ("left", "right"):
        batch = encoder.batch(rows, side=side)
        for i, row in enumerate(rows):
            alone, real = encoder.batch([row]), batch.attention_mask[i].bool()
            assert batch.input_ids[i][real].tolist() == list(row.ids)
            assert batch.labels[i][real].tolist() == alone.labels[0].tolist()
            assert batch.content[i][real].tolist() == alone.content[0].tolist()
            assert batch.content[i].any()
            assert not batch.content[i][~real].any()
            assert (batch.labels[i][~real] == -100).all()
            place = 0 if side == "right" else len(real) - len(row)
            assert real.tolist() == [place <= j < place + len(row) for j in range(len(real))]


@each_kind
def test_a_tokenizer_saved_with_a_limit_and_padding_cuts_and_pads_nothing(name: str, tmp_path: Path) -> None:
    kept = copy.deepcopy(encoder_of(name).tokenizer)
    kept.backend_tokenizer.enable_truncation(max_length=4)
    kept.backend_tokenizer.enable_padding(length=16)
    kept.model_max_length = 4
    kept.save_pretrained(tmp_path)
    encoder, plain = PromptEncoder(AutoTokenizer.from_pretrained(tmp_path)), encoder_of(name)
    text = "the capital of France is Paris, the currency"
    assert encoder.prompt(text) == plain.prompt(text)
    assert encoder.pair(text, "the euro of Paris") == plain.pair(text, "the euro of Paris")
