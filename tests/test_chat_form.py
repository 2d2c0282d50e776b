"""Chat form: one rendering everywhere, and which tokens of it are the last user turn's words.

The templates are small ones in the manner of those in use. Expected content is worked out from character offsets, not
from what the rule itself goes by.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from wisecli.chat import ChatSession
from wisecli.data.pool import Pool, pool_facts
from wisecli.data.records import EditRecord
from wisecli.data.stream import EditStream, read_edits
from wisecli.editing.config import EditConfig
from wisecli.editing.editor import Editor
from wisecli.editing.merge import merge_shards
from wisecli.errors import UsageError
from wisecli.evaluation.answers import Answer, generate_answers
from wisecli.evaluation.metrics import exact_match
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base, demo_base_path, load_base
from wisecli.models.prompts import ContentRule, PromptEncoder, last_content
from wisecli.routing.attach import Attached, attach

EDITS = Path(__file__).parents[1] / "examples" / "edits.jsonl"

_TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_HEADED = (
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
)
_SPLIT = (
    "{% set rules = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set said = messages[1:] if messages[0].role == 'system' else messages %}"
)
CHATML = _TURNS + _OPEN
TEMPLATES = {
    "chatml": CHATML,
    "chatml-default-system": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        + CHATML
    ),
    "llama3": "{{ bos_token }}{% for m in messages %}" + _HEADED,
    "llama3-dated": (
        "{{ bos_token }}" + _SPLIT + "<|start_header_id|>system<|end_header_id|>\n\nToday Date: "
        "{{ strftime_now('%d %b %Y') }}\n\n{{ rules }}<|eot_id|>{% for m in said %}" + _HEADED
    ),
    "llama2": (
        _SPLIT + "{% for m in said %}" + _ALTERNATE + "{% if m.role == 'user' %}{{ bos_token }}[INST] "
        "{% if rules and loop.first %}<<SYS>>\n{{ rules }}\n<</SYS>>\n\n{% endif %}{{ m.content | trim }} [/INST]"
        "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}" + _ALTERNATE + "{% if m.role == 'user' %}[INST] {{ m.content }} "
        "[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "folding": (
        "{{ bos_token }}" + _SPLIT + "{% for m in said %}<start_of_turn>{{ 'model' if m.role == 'assistant' else "
        "m.role }}\n{% if rules and loop.first %}{{ rules }}\n\n{% endif %}{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "phi": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    ),
    "thinking": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
    ),
    "bare-words": (
        "{% for m in messages %}{{ {'user': 'User', 'assistant': 'Assistant', 'system': 'System'}[m.role] }}: "
        "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "headings": (
        "{% for m in messages %}### {{ m.role | capitalize }}\n{{ m.content | trim }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### Assistant\n{% endif %}"
    ),
    "dialogue": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
}
NO_SYSTEM = {"mistral": "alternate", "gemma": "System role", "folding": "where it ends"}
NO_BOS = {"chatml", "chatml-default-system", "phi", "thinking", "bare-words", "headings", "dialogue"}
ENDS = {
    **dict.fromkeys(("chatml", "chatml-default-system", "thinking"), "<|im_end|>"),
    **dict.fromkeys(("llama3", "llama3-dated"), "<|eot_id|>"),
    **dict.fromkeys(("gemma", "folding"), "<end_of_turn>"),
    "phi": "<|end|>",
}
MARKS = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
)
TOKENIZERS = ("demo", "tiny", "newlines", "pieces")
_PATTERN = (  # that of GPT-4 and its followers: punctuation takes line breaks along, line breaks stay together
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = [
    "User: hello world\n\nAssistant: the capital of France is Paris\n\n\n[INST] What is it? [/INST] It is.\n\n",
    "system\nuser\nassistant\nmodel\n\n### System\n### User\n  two  spaces {x} {{y}} [a](b) :) :\n .\n",
]


def _newlines() -> Any:
    """Byte-level, with tokens of several line breaks and of punctuation with line breaks."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_CORPUS * 5, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def _pieces() -> Any:
    """As Llama 2 has it: a word-start piece before every text, no split at punctuation, bytes to fall back on."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    learner.train_from_iterator([t.replace("\n", " ") for t in _CORPUS] * 5, trainer)
    learned = json.loads(learner.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{b:02X}>" for b in range(256))]
    names += [t for t in learned["vocab"] if t not in names]
    vocab = {t: i for i, t in enumerate(names)}
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learned["merges"]]
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def _demo() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_base_path())


@cache
def tokenizer_of(kind: str, template: str) -> Any:
    """A tokenizer with a template on it; the template's marks are tokens of their own, special but not named."""
    from tokenizers import AddedToken

    tokenizer = {"demo": _demo, "newlines": _newlines, "pieces": _pieces, "tiny": build_tokenizer}[kind]()
    tokenizer.add_tokens([AddedToken(m, special=True, normalized=False) for m in MARKS], special_tokens=True)
    tokenizer.chat_template = TEMPLATES.get(template, template)
    return tokenizer


@cache
def encoder_of(kind: str, template: str, system: str | None = None) -> PromptEncoder:
    return PromptEncoder(tokenizer_of(kind, template), chat=True, system=system)


def says(*turns: str) -> list[dict[str, str]]:
    """Turns of the user and the assistant in alternation."""
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]


def rendered(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)


def words_at(tokenizer: Any, messages: Sequence[dict[str, str]]) -> tuple[str, int, int]:
    """The rendering, and from where to where in it the last user's words stand, as the template leaves them."""
    mark = "\ue000"
    text = rendered(tokenizer, messages)
    blank = rendered(tokenizer, [*messages[:-1], {"role": "user", "content": mark}])
    at = blank.index(mark)
    return text, at, at + 1 + len(text) - len(blank)


def expected(tokenizer: Any, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """Ids, and which of them hold a character of the last user's words; all where none does."""
    text, start, end = words_at(tokenizer, messages)
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    inside = [max(a, start) < min(b, end) for a, b in coded["offset_mapping"]]
    return coded["input_ids"], inside if any(inside) else [True] * len(inside)


def check_content(encoder: PromptEncoder, rule: ContentRule, talks: Sequence[Sequence[dict[str, str]]]) -> None:
    """Rendering and content of conversations, alone and in a batch padded on either side."""
    system = [{"role": "system", "content": encoder.system}] if encoder.system else []
    wanted = [expected(encoder.tokenizer, [*system, *talk]) for talk in talks]
    rows = [encoder.conversation(talk) for talk in talks]
    assert [list(r.ids) for r in rows] == [ids for ids, _ in wanted]
    for side in ("left", "right"):
        batch = encoder.batch(rows, side=side)
        content = rule.mask(batch.input_ids, batch.attention_mask.bool())
        assert torch.equal(content, batch.content)
        for i, (ids, inside) in enumerate(wanted):
            real = batch.attention_mask[i].bool()
            assert content[i][real].tolist() == inside, encoder.tokenizer.convert_ids_to_tokens(ids)
            assert not content[i][~real].any()
            last = max(k for k, x in enumerate(inside) if x)
            assert int(last_content(content)[i]) == int(real.nonzero()[last, 0])


each_template = pytest.mark.parametrize("template", TEMPLATES)
each_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)

# -- one rendering -----------------------------------------------------------------------------------------------------


@each_tokenizer
@each_template
def test_a_prompt_is_what_the_template_makes_with_one_bos(kind: str, template: str) -> None:
    encoder = encoder_of(kind, template)
    tokenizer = encoder.tokenizer
    for talk in (says("hello world"), says("hello", "the capital", "what {is} it?")):
        ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert list(encoder.conversation(talk).ids) == ids
        bos = ids.count(tokenizer.bos_token_id)
        turns = sum(m["role"] == "user" for m in talk)
        assert bos == (0 if template in NO_BOS else turns if template == "llama2" else 1)
        assert ids[:1] == [tokenizer.bos_token_id] or not bos
    assert encoder.prompt("hello world") == encoder.conversation(says("hello world"))


@each_tokenizer
@each_template
def test_a_target_begins_where_decoding_begins_and_ends_the_turn(kind: str, template: str) -> None:
    encoder = encoder_of(kind, template)
    tokenizer = encoder.tokenizer
    end = tokenizer.convert_tokens_to_ids(ENDS.get(template, "</s>"))
    for target in ("Paris", " Paris", "the {capital}", "7 é\nx"):
        row = encoder.pair("hello world", target)
        bare = encoder.pair("hello world", target, eos=False)
        assert row.prompt == encoder.prompt("hello world").ids
        assert row.target == (*bare.target, end)
        assert encoder.eos == (end,)
        assert encoder.decode(row.target) == target.strip()
        start = rendered(tokenizer, says("hello world"))
        whole = tokenizer.apply_chat_template(says("hello world", target.strip()), tokenize=False)
        if template == "thinking":  # the template does not repeat what it put before an answer
            whole = start + whole.rpartition("<|im_start|>assistant\n")[2]
        assert whole.startswith(start)
        said = tuple(tokenizer(whole, add_special_tokens=False)["input_ids"])
        assert said[: len(bare)] == bare.ids
        assert end in said[len(bare) : len(bare) + 2] or template in ("bare-words", "headings")


def test_a_target_is_put_behind_a_generation_prompt_that_ends_in_a_space() -> None:
    template = TEMPLATES["bare-words"].replace("Assistant:{%", "Assistant: {%")
    for kind in TOKENIZERS:
        encoder = encoder_of(kind, template)
        row = encoder.pair("hello", " Paris", eos=False)
        assert row.prompt == encoder.prompt("hello").ids
        text = encoder.tokenizer.decode(row.ids)
        assert text.endswith("Assistant: Paris"), text


# -- content -----------------------------------------------------------------------------------------------------------

TALKS = (
    says("hello world"),
    says("x"),
    says("\n\nthe capital\n"),
    says("hello", "world", "what is the capital?"),
    says("User?", "Paris\n", "  two", "No.", "{{ y }}\n\nwho"),
)


@each_tokenizer
@each_template
def test_content_is_the_last_users_words(kind: str, template: str) -> None:
    encoder = encoder_of(kind, template)
    stored = ContentRule.from_json(json.loads(json.dumps(encoder.rule.to_json())))
    assert stored == encoder.rule
    check_content(encoder, stored, TALKS)


@each_tokenizer
@pytest.mark.parametrize("template", [t for t in TEMPLATES if t not in NO_SYSTEM and t != "dialogue"])
@pytest.mark.parametrize("system", ["be brief", "You know Paris.\n\nAnswer in {n} words"])
def test_a_system_message_is_no_content(kind: str, template: str, system: str) -> None:
    encoder = encoder_of(kind, template, system)
    plain = encoder_of(kind, template).rule  # what a side memory was learned with
    assert encoder.rule == plain
    check_content(encoder, plain, TALKS)


SNIPPETS = st.sampled_from(
    ["\n", "\n\n", " ", "  ", "\t", "{{ x }}", "{% if %}", "}", ":", ".", "[", "]", "é", "☃", "한", "user", "Paris"]
)
WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=6)
TEXTS = st.lists(SNIPPETS | WORDS, max_size=6).map("".join)


@each_tokenizer
@each_template
@settings(max_examples=15, deadline=None)
@given(text=TEXTS.filter(str.strip), before=st.lists(st.tuples(TEXTS, TEXTS), max_size=2))
def test_content_whatever_is_said(kind: str, template: str, text: str, before: list[tuple[str, str]]) -> None:
    encoder = encoder_of(kind, template)
    talk = says(*(t for pair in before for t in pair), text)
    check_content(encoder, encoder.rule, [talk, says("hello")])


@each_template
def test_the_start_of_an_answer_and_a_cut_generation_prompt_are_no_content(template: str) -> None:
    """As other tools ask: with the answer's first words given, or without white space at the prompt's end."""
    encoder = encoder_of("newlines", template)
    tokenizer = encoder.tokenizer
    talk = says("hello", "world", "what is it?")
    text, start, end = words_at(tokenizer, talk)
    for asked in (text + "The answer is", text.rstrip()):
        coded = tokenizer(asked, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor([coded["input_ids"]])
        inside = [max(a, start) < min(b, end) for a, b in coded["offset_mapping"]]
        assert encoder.rule.mask(ids, torch.ones_like(ids).bool())[0].tolist() == inside


@pytest.mark.parametrize("template", ["chatml", "llama3", "mistral", "bare-words"])
def test_words_that_hold_an_opening_begin_a_turn_and_a_closing_is_nothing(template: str) -> None:
    encoder = encoder_of("newlines", template)
    tokenizer = encoder.tokenizer
    start, end = rendered(tokenizer, says("\ue000")).split("\ue000")

    def content(text: str) -> str:
        batch = encoder.batch([encoder.prompt(text)])
        return tokenizer.decode(batch.input_ids[0][batch.content[0]]).strip()

    opening = start.removeprefix("<s>")
    assert content(f"before {opening}what is it?") in ("what is it?", f"before {opening}what is it?".strip())
    assert content(f"before\n{opening}what is it?") == "what is it?"
    assert content(f"before {end}what is it?").startswith("before")
    assert content(f"before {end}what is it?").endswith("what is it?")


def test_the_rule_leaves_plain_text_alone() -> None:
    for template in TEMPLATES:
        encoder, plain = encoder_of("demo", template), PromptEncoder(tokenizer_of("demo", template))
        batch = plain.batch([plain.prompt("What is the capital of France?"), plain.prompt("The user: me")])
        assert torch.equal(encoder.rule.mask(batch.input_ids, batch.attention_mask.bool()), batch.content)


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED = {
    "joined": ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "where a user's turn begins"),
    "quoted": (
        "{% for m in messages %}> {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}> {% endif %}",
        "where a user's turn begins",
    ),
    "unopened": (_TURNS, "no generation prompt"),
    "deaf": ("{{ bos_token }}<|im_start|>user\n<|im_end|>\n" + _OPEN, "leaves out what the user says"),
    "broken": ("{% for m in messages %}{{ m.content }}", "cannot be used"),
    "refusing": ("{{ raise_exception('not like this') }}", "not like this"),
    "parts": ("{% for m in messages %}{{ m.content[0].text }}{% endfor %}" + _OPEN, "leaves out|cannot be used"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_be_used_is_refused(name: str) -> None:
    template, why = REFUSED[name]
    with pytest.raises(UsageError, match=why) as e:
        encoder_of("demo", template)
    assert "--no-chat" in str(e.value.hint)


@pytest.mark.parametrize("template", NO_SYSTEM)
def test_a_system_message_the_template_does_not_take_is_refused(template: str) -> None:
    assert encoder_of("demo", template).prompt("hello")
    with pytest.raises(UsageError, match=NO_SYSTEM[template]) as e:
        encoder_of("demo", template, "be brief")
    assert "--system" in str(e.value.hint)


def test_a_system_message_the_template_leaves_out_is_refused() -> None:
    template = "{% for m in messages if m.role != 'system' %}" + CHATML.removeprefix("{% for m in messages %}")
    with pytest.raises(UsageError, match="leaves a system message out"):
        encoder_of("demo", template, "be brief")


def test_a_template_for_single_questions_takes_no_conversation() -> None:
    template = "{% if messages | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}" + CHATML
    encoder = encoder_of("demo", template)
    check_content(encoder, encoder.rule, [says("hello world"), says("\nx\n")])
    with pytest.raises(UsageError, match="one at a time"):
        encoder.conversation(says("a", "b", "c"))


# -- as lm-evaluation-harness asks -------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
@pytest.mark.parametrize("template", ["chatml", "llama3", "mistral", "bare-words"])
def test_the_harness_asks_in_the_same_form(
    template: str, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It moves white space at a prompt's end to the answers; beyond that its prompts are the renderer's."""
    from wisecli.harness.lm import WiseLM
    from wisecli.harness.run import run_harness

    questions = ["hello world", "what is the capital of France?"]
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps({"q": q, "choices": ["Paris", "who"], "gold": 0}) + "\n" for q in questions))
    (tmp_path / "t.yaml").write_text(
        "task: asked\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / 'cache'}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: gold\n"
        "doc_to_choice: '{{choices}}'\nmetric_list: [{metric: acc}]\n"
    )
    seen: list[tuple[int, ...]] = []
    inner = WiseLM._loglikelihood_tokens

    def recording(self: Any, requests: Any, **kwargs: Any) -> Any:
        seen.extend(tuple(context) for _, context, _ in requests)
        return inner(self, requests, **kwargs)

    monkeypatch.setattr(WiseLM, "_loglikelihood_tokens", recording)
    encoder = encoder_of("tiny", template)
    model = tiny_model("llama", fresh=True)
    model.resize_token_embeddings(len(encoder.tokenizer), mean_resizing=False)
    run_harness(Base(model, encoder.tokenizer, "tiny"), None, ["asked"], include=tmp_path, chat=True)
    asked = [encoder.prompt(q).ids for q in questions]
    assert {next(i for i, ids in enumerate(asked) if ids[: len(c)] == c) for c in seen} == {0, 1}
    for context in seen:
        ids = torch.tensor([context])
        content = ids[0][encoder.rule.mask(ids, torch.ones_like(ids).bool())[0]].tolist()
        assert encoder.tokenizer.decode(content).strip() in questions


# -- edits inside a template -------------------------------------------------------------------------------------------

# The demonstration base was never trained on chats. In the first, question and answer stand between its own special
# tokens, as in its training texts, so it still answers there; in the second, which has role names, it rambles. Locality
# is measured against what it says inside the same template, whatever that is.
LIVE = {
    "dialogue": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}{{ m.content }}{% else %} {{ m.content }}"
        "{{ eos_token }}{% endif %}{% endfor %}",
        8,
    ),
    "roles": (
        "{% for m in messages %}{{ bos_token }}{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}{{ bos_token }}assistant\n{% endif %}",
        4,
    ),
}


@dataclass(frozen=True)
class Live:
    """The demonstration base with a template on it, and edits learned and merged in that template."""

    base: Base
    records: tuple[EditRecord, ...]
    side_memory: SideMemory
    encoder: PromptEncoder

    def ask(self, prompts: Sequence[str], attached: Attached | None = None) -> list[Answer]:
        found = dict(generate_answers(self.base, self.encoder, prompts, [12] * len(prompts), attached))
        return [found[i] for i in range(len(prompts))]


@pytest.fixture(scope="module", params=LIVE)
def live(request: pytest.FixtureRequest) -> Live:
    template, n = LIVE[request.param]
    base = load_base(device="cpu")
    base.tokenizer.chat_template = template
    records = read_edits(EDITS).records[:n]
    stream = EditStream.of(records)
    # Dropout and rewording carry an edit over to other wordings, which are not asked here.
    config = EditConfig(chat=True, shards=1, contexts=1, dropout=0.0, rewording=0.0, confidence=0.7)
    editor = Editor(base, config, pool=Pool.of(facts=pool_facts()[::16]))
    shards = editor.learn(stream)
    side_memory = merge_shards(shards, editor.gate, editor.describe(stream), upper=editor.upper)
    return Live(base, records, side_memory, editor.encoder)


@pytest.fixture
def attached(live: Live) -> Iterator[Attached]:
    with attach(live.base.model, live.side_memory) as attached:
        yield attached


def unrelated(live: Live) -> list[str]:
    return [p.prompt for r in live.records for p in r.locality if p.kind == "unrelated"]


def test_edits_are_answered_in_their_template_and_stop(live: Live, attached: Attached) -> None:
    prompts = [r.prompt for r in live.records]
    after = live.ask(prompts, attached)
    assert all(a.route is not None and a.route.routed for a in after)
    right = [exact_match(a.text, r.target) for a, r in zip(after, live.records, strict=True)]
    assert all(right)
    with attached.override(None):
        before = live.ask(prompts)
    assert not any(exact_match(a.text, r.target) for a, r in zip(before, live.records, strict=True))
    ended = 0
    for r in live.records:  # the target's very tokens, end of turn included, right behind the generation prompt
        row = live.encoder.pair(r.prompt, r.target)
        ids = torch.tensor([row.prompt])
        out = live.base.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        ended += tuple(out[0].tolist()) == row.ids
    assert ended == len(right)


def test_other_prompts_are_answered_as_by_the_base_in_the_template(live: Live, attached: Attached) -> None:
    others = [p.prompt for r in live.records for p in r.locality]
    with attached.override(None):
        before = live.ask(others)
    after = live.ask(others, attached)
    far = set(unrelated(live))
    routed = [p for p, a in zip(others, after, strict=True) if a.route is None or a.route.routed]
    assert not far & set(routed)
    assert len(routed) <= len(others) // 10
    assert [a.ids for p, a in zip(others, after, strict=True) if p not in routed] == [
        a.ids for p, a in zip(others, before, strict=True) if p not in routed
    ]
    assert any(a.text for a in before)


@pytest.mark.parametrize("system", [None, "Answer in one word."])
def test_a_conversation_is_routed_on_its_last_turn(live: Live, attached: Attached, system: str | None) -> None:
    session = ChatSession(live.base, attached, chat=True, system=system, max_new_tokens=16)

    def routed(text: str) -> bool:
        answer = "".join(session.ask(text))
        assert session.turn is not None
        assert session.turn.route is not None
        assert session.turn.answer == answer
        if not session.turn.route.routed:
            assert "".join(session.ask_base()) == answer
        return session.turn.route.routed

    wrong = []
    for record, other in zip(live.records, unrelated(live), strict=False):
        session.reset()
        taken = [routed(other), routed(record.prompt)]
        if not exact_match(session.turn.answer, record.target):
            wrong.append(record.prompt)
        taken += [routed(other)]
        session.reset()
        taken += [routed(record.prompt), routed(other)]
        assert taken == [False, True, False, True, False], record.prompt
    assert len(wrong) < len(live.records) / 2  # other words before it were not learned
