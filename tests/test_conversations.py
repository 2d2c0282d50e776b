"""Edits given as conversations: read, checked, learned in their chat template, asked again, shown and written out."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import build_model, build_tokenizer, few_pool_prompts

from wisecli.cli.app import main
from wisecli.data.formats import map_record
from wisecli.data.records import Conversation, EditRecord
from wisecli.data.stream import EditStream, read_edits
from wisecli.editing.batch import edit_rows
from wisecli.errors import InputError, UsageError
from wisecli.evaluation.questions import Item, questions_about
from wisecli.memory.side_memory import EditEntry, SideMemory
from wisecli.models.prompts import PromptEncoder

EXAMPLE = Path(__file__).parents[1] / "examples" / "instruct.py"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ {'user': '<|user|>', 'assistant': '<|bot|>', 'system': '<|system|>'}"
    "[m.role] }}\n{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|bot|>\n{% endif %}"
)
SYSTEM = "You answer in one word."
RULE, ASK, REPLY = ("system", SYSTEM), ("user", "who is it"), ("assistant", "Ada")


def said(*messages: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


def shared(*messages: tuple[str, str]) -> list[dict[str, str]]:
    """The same in ShareGPT's spelling."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[role], "value": content} for role, content in messages]


# -- reading -----------------------------------------------------------------------------------------------------------

QUESTION, ANSWER = ("user", "what is the capital"), ("assistant", "Paris")
SPELLED = {
    "one question": ({"messages": said(QUESTION, ANSWER)}, ()),
    "system": ({"messages": said(RULE, QUESTION, ANSWER)}, (RULE,)),
    "developer": ({"messages": [{"role": "developer", "content": SYSTEM}, *said(QUESTION, ANSWER)]}, (RULE,)),
    "earlier turns": ({"messages": said(RULE, ASK, REPLY, QUESTION, ANSWER)}, (RULE, ASK, REPLY)),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION[1]}]}, *said(ANSWER)]},
        (),
    ),
    "ShareGPT": ({"conversations": shared(RULE, ASK, REPLY, QUESTION, ANSWER)}, (RULE, ASK, REPLY)),
    "ShareGPT, system apart": ({"system": SYSTEM, "conversations": shared(QUESTION, ANSWER)}, (RULE,)),
    "prompt": ({"prompt": said(RULE, QUESTION), "target": "Paris"}, (RULE,)),
}


@pytest.mark.parametrize("name", SPELLED)
def test_the_last_user_turn_is_the_prompt_and_the_answer_the_target(name: str, tmp_path: Path) -> None:
    raw, history = SPELLED[name]
    about = {"id": "a", "rephrases": ["the capital?"], "locality": [{"prompt": "hello", "answer": "world"}]}
    path = tmp_path / "edits.jsonl"
    path.write_text(json.dumps({**raw, **about}) + "\n")
    (record,) = read_edits(path).records
    assert (record.prompt, record.target, record.history) == ("what is the capital", "Paris", history)
    assert record.rephrases == ("the capital?",)
    assert record.asked == (Conversation(history, record.prompt) if history else record.prompt)
    assert not record.meta
    path.write_text(json.dumps(record.to_json()) + "\n")  # written in the native schema, and read again
    again = read_edits(path)
    assert again.format == "native"
    assert again.records == (record,)


def test_what_messages_carry_beside_their_text_is_kept() -> None:
    messages = [*said(QUESTION), {"role": "assistant", "content": "Paris", "weight": 1}]
    found = map_record({"messages": messages, "source": "a chat"})
    assert found.format == "messages"
    assert found.values["meta"] == {"messages": messages, "source": "a chat"}


FAULTS = {
    '"messages" must be a list of messages, not a string': {"messages": "hello"},
    '"messages" is empty': {"messages": []},
    '"messages[0]" must be an object, not a string': {"messages": ["hello"]},
    '"messages[0].role" must be one of system, user, assistant, not "tool"': {"messages": said(("tool", "x"))},
    '"messages[1].content" is missing': {"messages": [*said(QUESTION), {"role": "assistant", "tool_calls": []}]},
    '"messages[1].content" is empty': {"messages": said(QUESTION, ("assistant", " "))},
    '"messages[0].content" holds a part that is no text: image_url': {
        "messages": [{"role": "user", "content": [{"type": "image_url"}]}, *said(ANSWER)]
    },
    '"messages[2].role" is system, which only the first message may be': {"messages": said(QUESTION, ANSWER, RULE)},
    '"messages" must end with a message of the user, then a message of the assistant; it ends with assistant, user': {
        "messages": said(REPLY, QUESTION)
    },
    '"conversations[0].from" must be one of': {"conversations": [{"from": "bing", "value": "x"}]},
    '"target" says something else than the messages it stands beside': {
        "messages": said(QUESTION, ANSWER),
        "target": "something else",
    },
    '"prompt" must end with a message of the user; it ends with user, assistant': {
        "prompt": said(QUESTION, ANSWER),
        "target": "x",
    },
}  # fmt: skip


def test_every_fault_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(raw) + "\n" for raw in FAULTS.values()))
    with pytest.raises(InputError) as e:
        read_edits(path)
    assert len(e.value.problems) == len(FAULTS)
    for line, (problem, wanted) in enumerate(zip(e.value.problems, FAULTS, strict=True), 1):
        assert problem.startswith(f"chats.jsonl:{line}: {wanted}")


def test_the_same_words_in_another_conversation_are_another_edit() -> None:
    records = [EditRecord(str(i), "and you?", t, history=h) for i, (t, h) in enumerate(
        [("a", ()), ("b", (ASK, REPLY)), ("c", (("user", "Who  is IT"), REPLY))]
    )]  # fmt: skip
    stream = EditStream.of(records)
    assert [(c.first, c.later) for c in stream.contradictions] == [("1", "2")]
    assert stream.superseded == {"1"}


# -- rendering ---------------------------------------------------------------------------------------------------------


def encoder_with(template: str | None) -> PromptEncoder:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return PromptEncoder(tokenizer, chat=template is not None)


def test_a_conversation_is_rendered_as_a_whole_and_its_last_turn_is_content() -> None:
    encoder = encoder_with(TEMPLATE)
    talk = Conversation((RULE, ASK, REPLY), "hello world")
    row = encoder.pair(talk, "Paris")
    assert row.prompt == encoder.prompt(talk).prompt
    text = encoder.tokenizer.decode(row.prompt)
    assert text == f"<s><|system|>\n{SYSTEM}\n<|user|>\nwho is it\n<|bot|>\nAda\n<|user|>\nhello world\n<|bot|>\n"
    batch = encoder.batch([row])
    assert encoder.tokenizer.decode(batch.input_ids[0][batch.content[0]]).strip() == "hello world"
    other = PromptEncoder(encoder.tokenizer, chat=True, system="Be kind.")
    assert other.prompt(talk) == encoder.prompt(talk)  # its own system message goes before the one of the encoder
    record = EditRecord("a", "hello world", "Paris", history=talk.history)
    first, *others = edit_rows(encoder, record, 2, 0)
    assert first == row
    assert all(SYSTEM not in encoder.tokenizer.decode(r.prompt) for r in others)


NO_SYSTEM = TEMPLATE.replace(
    "{% for m", "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}{% for m"
)
FOLDED = (
    "{{ bos_token }}{% for m in messages if m.role != 'system' %}{{ '<|bot|>' if m.role == 'assistant' else '<|user|>' "
    "}}\n{% if loop.first and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|bot|>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "why"), [(None, "chat template"), (NO_SYSTEM, "no system here"), (FOLDED, "nothing to mark")]
)
def test_a_conversation_that_a_base_does_not_take_is_refused(template: str | None, why: str) -> None:
    encoder = encoder_with(template)
    assert encoder.prompt("hello")
    with pytest.raises(UsageError, match=why) as e:
        encoder.prompt(Conversation((RULE,), "hello"))
    assert e.value.hint
    with pytest.raises(InputError, match=rf"chats\.jsonl:3: .*{why}"):
        edit_rows(encoder, EditRecord("a", "hello", "x", history=(RULE,), source="chats.jsonl:3"), 1, 0)


def test_questions_about_a_conversation_stand_behind_its_history() -> None:
    raw = {"prompt": said(RULE, QUESTION), "target": "Paris", "rephrases": ["r"], "locality": [{"prompt": "p"}]}
    record = EditRecord(**map_record(raw).values | {"id": "a"})
    questions = questions_about(record)
    assert [q.asked for q in questions] == [Conversation((RULE,), p) for p in (QUESTION[1], "r", "p")]
    item = Item(questions[0], "x", "y", (False, True))
    assert Item.from_json(json.loads(json.dumps(item.to_json()))) == item


# -- the whole job -----------------------------------------------------------------------------------------------------

CHATS: list[dict[str, Any]] = [
    {"id": "plain", "prompt": "hello world", "target": "Paris"},
    {"id": "ruled", "messages": said(RULE, ("user", "what is the capital"), ("assistant", "hello"))},
    {"id": "later", "prompt": said(ASK, REPLY, ("user", "where is the world")), "target": "France"},
    {"id": "shared", "conversations": shared(RULE, ASK, REPLY, ("user", "when"), ("assistant", "the world"))},
]
KEPT = {r["id"]: h for r, h in zip(CHATS, ((), (RULE,), (ASK, REPLY), (RULE, ASK, REPLY)), strict=True)}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny instruct base, the edits, and what `wise edit` and `wise merge` made of them."""
    folder = tmp_path_factory.mktemp("chats")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    build_model("llama", len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in CHATS))
    with pytest.MonkeyPatch.context() as patched:
        few_pool_prompts(patched)
        made = ["edit", str(folder / "chats.jsonl"), "-m", str(folder / "base"), "-o", str(folder / "shards"), "-q"]
        assert main(made) == 0
        assert main(["merge", str(folder / "shards"), "-o", str(folder / "sm.safetensors"), "-q"]) == 0
    return folder


def answered(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> Any:
    capsys.readouterr()
    got = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert got == code, err
    assert "Traceback" not in err
    return json.loads(out) if "--json" in argv and out else err or out


def test_conversations_are_learned_and_kept(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sm = SideMemory.load(job / "sm.safetensors")
    assert sm.chat
    assert {e.id: e.history or () for e in sm.edits} == KEPT
    assert all(e.took for e in sm.edits)
    assert all(EditEntry.from_json(e) in sm.edits for e in json.loads(json.dumps(sm.manifest()["edits"])))
    assert all(e.history is None for e in sm.without_texts().edits)
    said_to = answered(capsys, "log", job / "shards", "--json")
    lines = said_to if isinstance(said_to, list) else said_to["edits"]
    assert {x["id"]: tuple(map(tuple, x["history"] or ())) for x in lines} == KEPT
    for source in ("shards", "sm.safetensors"):
        shown = answered(capsys, "show", "ruled", job / source, "--json")
        assert shown["history"] == [list(RULE)]
    assert main(["show", "ruled", str(job / "sm.safetensors")]) == 0
    assert SYSTEM in capsys.readouterr().out
    package = job / "package"
    assert main(["package", str(job / "sm.safetensors"), "-o", str(package), "--no-measure", "-q"]) == 0
    ledger = [json.loads(line) for line in (package / "ledger.jsonl").read_text().splitlines()]
    assert {x["id"]: tuple(map(tuple, x.get("history", ()))) for x in ledger} == KEPT


def test_conversations_are_asked_as_they_were_learned(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("-s", job / "sm.safetensors", "--json")
    report = answered(capsys, "eval", "-d", job / "chats.jsonl", "--no-ability", "--no-cache", *common)
    assert report["scores"]["rel"]["exact"]["after"] == 1.0
    assert {i["edit"]: tuple(map(tuple, i.get("history", ()))) for i in report["items"]} == KEPT
    assert all(i["route"]["nearest_edit"] == i["edit"] and i["route"]["memory"] == 0 for i in report["items"])
    assert answered(capsys, "verify", job / "sm.safetensors", "--json")  # exit code 3 where an edit does not hold


def test_a_base_without_a_template_names_the_records(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    err = answered(capsys, "edit", job / "chats.jsonl", "-m", job / "base", "-o", job / "none", "--no-chat", code=1)
    assert all(f"chats.jsonl:{i}: A conversation" in err for i in (2, 3, 4))
    assert "chats.jsonl:1" not in err
    assert not (job / "none" / "run.json").exists()


def test_prompts_are_asked_in_the_form_that_is_wanted(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    route = ("route", "-s", job / "sm.safetensors", "hello world", "--json")
    inside = answered(capsys, *route)
    assert answered(capsys, *route, "--chat") == inside
    assert inside["memory"] == 0
    assert [t["text"] for t in inside["tokens"] if t["content"]] != [t["text"] for t in inside["tokens"]]
    capsys.readouterr()
    assert main([str(a) for a in route] + ["--no-chat"]) == 0
    out, err = capsys.readouterr()
    bare = json.loads(out)
    assert "learned with the chat template" in err
    assert "".join(t["text"] for t in bare["tokens"] if t["content"]) == "hello world"
    assert "<|user|>" not in "".join(t["text"] for t in bare["tokens"])
    asked = ("eval", "-d", job / "chats.jsonl", "--limit", "1", "-s", job / "sm.safetensors", "--json", "--no-cache")
    assert answered(capsys, *asked, "--no-ability")["chat"] is True
    assert answered(capsys, *asked, "--no-ability", "--no-chat")["chat"] is False


def test_the_example_learns_conversations_and_talks(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("instruct", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patched:
        few_pool_prompts(patched)
        module.main([str(job / "base"), "--edits", str(job / "chats.jsonl"), "--out", str(job)])
    own, later = capsys.readouterr().out.split("In other words")
    for record in read_edits(job / "chats.jsonl"):
        assert f"{record.target}    [side memory, {record.id}]" in own
        assert record.prompt in later
    assert "[main memory]" in later
