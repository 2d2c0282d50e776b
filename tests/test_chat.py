"""Chatting: streamed answers and routes against the plain evaluation, conversations, and the whole command."""

from __future__ import annotations

import contextlib
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import build_tokenizer

from wisecli.chat import ChatSession, Turn, _Generation
from wisecli.cli._output import Output
from wisecli.cli._why import printable, route_line
from wisecli.cli.app import main
from wisecli.cli.chat import Dialogue, _converse, _document, _history_path
from wisecli.errors import InputError, UsageError
from wisecli.evaluation.answers import generate_answers
from wisecli.models.base import Base
from wisecli.models.prompts import PromptEncoder, Row
from wisecli.routing.attach import Attached, attach
from wisecli.routing.explain import Explanation, explain
from wisecli.routing.routers import Route

EDITED = ("the capital of France is", "who is Paris")
OTHER = "hello world hello world, what when where"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and m.content == 'refuse' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ {'user': '<|user|>', 'assistant': '<|bot|>', 'system': '<|system|>'}[m.role] }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def base(tiny_model: Callable[..., Any], tokenizer: Any) -> Base:
    return Base(tiny_model("llama", fresh=True), tokenizer, "tiny")


@pytest.fixture
def attached(base: Base, make_side_memory: Callable[..., Any]) -> Iterator[Attached]:
    with attach(base.model, make_side_memory(base.model, EDITED)) as attached:
        yield attached


@pytest.fixture(scope="module")
def chat_base(base: Base) -> Base:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return replace(base, tokenizer=tokenizer)


def session_of(base: Base, attached: Attached | None = None, **kwargs: Any) -> ChatSession:
    return ChatSession(base, attached, **{"chat": False, "max_new_tokens": NEW_TOKENS, **kwargs})


def expected(base: Base, prompt: str, attached: Attached | None = None) -> Any:
    [(_, answer)] = generate_answers(base, PromptEncoder(base.tokenizer), [prompt], [NEW_TOKENS], attached)
    return answer


def turn_of(session: ChatSession) -> Turn:
    assert session.turn is not None
    return session.turn


# -- answers and routes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [*EDITED, OTHER])
def test_pieces_join_to_the_answer_and_the_route_is_the_decision(base: Base, attached: Attached, prompt: str) -> None:
    session = session_of(base, attached)
    pieces = list(session.ask(prompt))
    turn, want = turn_of(session), expected(base, prompt, attached)
    assert "".join(pieces) == turn.answer == want.text
    assert len(pieces) > 1
    assert not turn.stopped
    [decided] = attached.decide(session.encoder.batch([session.encoder.prompt(prompt)]))
    assert turn.route == decided == want.route
    assert decided.routed == (prompt in EDITED)


def why_of(session: ChatSession) -> Explanation:
    why = session.explain()
    assert why is not None
    return why


def test_the_explanation_is_of_the_route_that_was_taken(base: Base, attached: Attached) -> None:
    session = session_of(base, attached)
    for prompt in (*EDITED, OTHER):
        list(session.ask(prompt))
        why, turn = why_of(session), turn_of(session)
        assert why.route == turn.route
        assert why.nearest[0].entry == turn.edit
        assert [why] == explain(attached, session.encoder, [prompt])
    assert turn.edit in attached.side_memory.edits  # main memory answered, and it is named all the same
    assert len(session.explain(top=1).nearest) == 1


def test_explaining_leaves_the_turn_and_the_next_answer(base: Base, attached: Attached) -> None:
    session = session_of(base, attached, max_new_tokens=200)
    list(session.ask(EDITED[0]))
    turn = turn_of(session)
    session.explain()
    assert session.turn is turn
    list(session.ask(OTHER))
    session.explain()
    list(session.ask(EDITED[0]))
    assert turn_of(session) == turn


def test_the_activation_router_names_no_edit(base: Base, make_side_memory: Callable[..., Any]) -> None:
    with attach(base.model, make_side_memory(base.model, EDITED), router="activation") as attached:
        session = session_of(base, attached)
        list(session.ask(EDITED[0]))
        why = why_of(session)
    assert (why.router, why.route.memory, why.nearest) == ("activation", 0, ())


def test_the_plain_base_has_no_route(base: Base) -> None:
    session = session_of(base)
    list(session.ask(OTHER))
    assert turn_of(session).answer == expected(base, OTHER).text
    assert turn_of(session).route is None
    assert session.explain() is None


def test_ask_base_is_the_detached_base_and_leaves_the_turn(base: Base, make_side_memory: Callable[..., Any]) -> None:
    want = expected(base, EDITED[0]).text
    with attach(base.model, make_side_memory(base.model, EDITED)) as attached:
        session = session_of(base, attached)
        list(session.ask(EDITED[0]))
        turn = turn_of(session)
        assert turn.answer != want
        assert "".join(session.ask_base()) == want
        assert "".join(session.ask_base(OTHER)) == expected(base, OTHER).text
        assert session.turn is turn
        assert attached._override.get() is None
        list(session.ask(EDITED[0]))
        assert turn_of(session) == turn


def test_an_override_of_the_caller_holds_in_the_thread(base: Base, attached: Attached) -> None:
    session = session_of(base, attached)
    list(session.ask(OTHER))
    with attached.override(None):
        list(session.ask(EDITED[0]))
    assert turn_of(session).route is None
    assert "".join(session.ask_base(EDITED[0])) == turn_of(session).answer


def test_an_answer_ends_at_eos(base: Base, tokenizer: Any) -> None:
    """The end is the tokenizer's, whether or not the generation settings stop there."""
    free = expected(base, OTHER)
    ending = Base(base.model, build_tokenizer(), "tiny")
    ending.tokenizer.eos_token = tokenizer.convert_ids_to_tokens(free.ids[4])
    session = session_of(ending)
    pieces = list(session.ask(OTHER))
    assert "".join(pieces) == turn_of(session).answer == expected(ending, OTHER).text
    assert len(turn_of(session).answer) < len(free.text)


@pytest.mark.parametrize("text", ["naïve café — 東京 🗼 end", "  two\n    indented lines\n", "🗼", " "])
def test_pieces_never_split_a_character(base: Base, text: str) -> None:
    encoder = PromptEncoder(base.tokenizer)
    run = _Generation(base, encoder, Row((1,)), 8, None, False)
    ids = encoder.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    run.put(ids[None])
    for token in ids[:, None]:
        run.put(token)
    run._queue.put(None)
    pieces = list(iter(run._queue.get, None))
    assert "".join(pieces) == text.strip()
    assert not any("\ufffd" in p for p in pieces)


# -- interruption and errors -------------------------------------------------------------------------------------------


def test_closing_the_iterator_stops_and_the_session_goes_on(base: Base, attached: Attached) -> None:
    session = session_of(base, attached, max_new_tokens=200)
    with contextlib.closing(session.ask(EDITED[0])) as pieces:
        first = next(pieces)
    turn = turn_of(session)
    assert turn.stopped
    assert turn.answer.startswith(first)
    assert turn.route is not None
    assert turn.route.routed
    assert not any(t.name == "wise-chat" for t in threading.enumerate())
    session = session_of(base, attached)
    list(session.ask(EDITED[0]))
    assert turn_of(session).answer == expected(base, EDITED[0], attached).text
    assert turn_of(session).answer.startswith(first)


def test_an_answer_stopped_before_its_decision(
    base: Base, attached: Attached, capsys: pytest.CaptureFixture[str]
) -> None:
    session = session_of(base, attached)
    session.turn = Turn("what", "", stopped=True)
    assert session.explain() is None
    Dialogue(Output(), session, echo=False).handle("/why")
    assert capsys.readouterr().out == "The answer was stopped before a memory was chosen.\n"


def test_asking_again_stops_an_unfinished_answer(base: Base, attached: Attached) -> None:
    session = session_of(base, attached)
    left = session.ask(EDITED[0])
    next(left)
    assert "".join(session.ask(OTHER)) == expected(base, OTHER, attached).text
    assert turn_of(session).question == OTHER
    assert list(left) == []


def test_what_generate_raises_surfaces(base: Base, attached: Attached, monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of(base, attached)
    list(session.ask(EDITED[0]))
    turn = turn_of(session)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no memory left")

    with monkeypatch.context() as m:
        m.setattr(attached.router, "decide", broken)
        with pytest.raises(RuntimeError, match="no memory left"):
            list(session.ask(OTHER))
    assert session.turn is turn
    assert "".join(session.ask(OTHER)) == expected(base, OTHER, attached).text


def test_questions_that_cannot_be_asked(base: Base) -> None:
    session = session_of(base)
    for question in ("", "  \n", "\udcff"):
        with pytest.raises(InputError, match="question"):
            session.ask(question)
    with pytest.raises(InputError, match="the base takes 256"):
        session.ask("hello " * 300)
    for nothing_yet in (session.ask_base, session.explain):
        with pytest.raises(InputError, match="Nothing has been asked"):
            nothing_yet()


def test_an_answer_is_cut_where_the_base_ends(base: Base) -> None:
    session = session_of(base, max_new_tokens=10_000)
    prompt = "hello " * 100
    room = 256 - len(session.encoder.prompt(prompt))
    assert session._run([{"role": "user", "content": prompt}]).cap == room
    list(session.ask(prompt))


@pytest.mark.parametrize("kwargs", [{"system": "be brief"}, {"max_new_tokens": 0}, {"chat": True}])
def test_contradicting_settings_are_usage_errors(base: Base, kwargs: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        session_of(base, **kwargs)


# -- conversations -----------------------------------------------------------------------------------------------------


def recorded(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """The rows a session sends to the model."""
    rows: list[Row] = []
    render = session.encoder.conversation
    monkeypatch.setattr(session.encoder, "conversation", lambda m: rows.append(render(m)) or rows[-1])
    return rows


@pytest.mark.parametrize("system", [None, "be brief"])
def test_turns_contain_the_turns_before_and_one_bos(
    chat_base: Base, monkeypatch: pytest.MonkeyPatch, system: str | None
) -> None:
    session = session_of(chat_base, chat=True, system=system)
    rows = recorded(session, monkeypatch)
    list(session.ask(EDITED[0]))
    answer = turn_of(session).answer
    list(session.ask(OTHER))
    first, second = (r.prompt for r in rows)
    assert first == session.encoder.prompt(EDITED[0]).prompt
    assert second[: len(first)] == first
    assert [r.count(1) for r in (first, second)] == [1, 1]
    text = chat_base.tokenizer.decode(second)
    start = f"<s><|system|>{system}<|user|>" if system else "<s><|user|>"
    assert text == f"{start}{EDITED[0]}<|bot|>{answer}<|user|>{OTHER}<|bot|>"


def test_base_and_stopped_answers_do_not_enter_the_conversation(
    chat_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(chat_base, chat=True)
    rows = recorded(session, monkeypatch)
    list(session.ask(EDITED[0]))
    list(session.ask(OTHER))
    list(session.ask_base())
    with contextlib.closing(session.ask("what")) as pieces:
        next(pieces)
    list(session.ask_base("what"))
    list(session.ask("what"))
    _, second, again, *three = rows
    assert again == second
    assert three == [three[0]] * 3
    session.reset()
    assert session.turn is None
    list(session.ask(OTHER))
    assert rows[-1] == session.encoder.prompt(OTHER)


def test_each_turn_is_decided_anew(chat_base: Base, make_side_memory: Callable[..., Any]) -> None:
    """The last content token of the whole conversation is that of its last question."""
    encoder = PromptEncoder(chat_base.tokenizer, True)
    sm = replace(make_side_memory(chat_base.model, EDITED), rule=encoder.rule, chat=True)
    with attach(chat_base.model, sm) as attached:
        session = session_of(chat_base, attached, chat=True)
        indicators = []
        for question in (OTHER, EDITED[0], OTHER):
            list(session.ask(question))
            [decided] = attached.decide(session.encoder.batch([session.encoder.conversation(session._asked)]))
            assert turn_of(session).route == decided
            why = why_of(session)
            assert why.route == decided
            assert "".join(t.text for t in why.tokens[slice(*why.shown)]).strip() == question
            indicators.append(decided.indicator)
    assert len(set(indicators)) == 3


def test_a_template_that_refuses_a_system_message(chat_base: Base) -> None:
    with pytest.raises(UsageError, match="System role not supported"):
        session_of(chat_base, chat=True, system="refuse")


def test_several_messages_need_a_template(encoder: PromptEncoder) -> None:
    with pytest.raises(UsageError, match="chat template"):
        encoder.conversation([{"role": "user", "content": "a"}] * 3)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def side_memory(
    tmp_path_factory: pytest.TempPathFactory, base: Base, tiny_model_dir: Path, make_side_memory: Callable[..., Any]
) -> Path:
    path = tmp_path_factory.mktemp("chat") / "sm.safetensors"
    sm = make_side_memory(base.model, EDITED)
    replace(sm, base={**sm.base, "name": str(tiny_model_dir)}).save(path)
    return path


class Wise:
    """Runs `wise chat` with lines on stdin and gives what came out."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capsys, self.monkeypatch = capsys, monkeypatch

    def __call__(self, *args: Any, stdin: str = "", code: int = 0) -> tuple[str, str]:
        self.monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        got = main(["chat", *map(str, args), "--max-new-tokens", str(NEW_TOKENS), "--device", "cpu"])
        out, err = self.capsys.readouterr()
        assert got == code, err
        assert "Traceback" not in err
        return out, err


@pytest.fixture
def wise(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Wise:
    return Wise(capsys, monkeypatch)


@pytest.fixture
def answers(base: Base, attached: Attached) -> dict[str, str]:
    """As they are printed."""
    return {p: printable(expected(base, p, attached).text) for p in (*EDITED, OTHER)}


def own(text: str) -> str:
    """The text with the score of an edit's own prompt, which is 1 but for the rounding of its key, as 1.000."""
    return re.sub(r"indicator 0\.99\d", "indicator 1.000", text)


def test_lines_of_a_pipe_are_answered_in_turn(wise: Wise, side_memory: Path, answers: dict[str, str]) -> None:
    out, _ = wise("-s", side_memory, stdin=f"{EDITED[0]}\n\n  \n{OTHER}\n")
    assert own(out).startswith(
        f"> {EDITED[0]}\n{answers[EDITED[0]]}\nside memory · indicator 1.000 > 0.900 · edit e0\n> {OTHER}\n"
    )
    rest = out.split(f"> {OTHER}\n")[1]
    assert rest.startswith(f"{answers[OTHER]}\nmain memory · indicator ")
    assert rest.endswith(" <= 0.900\n")


def test_one_shot_questions(wise: Wise, side_memory: Path, answers: dict[str, str]) -> None:
    out, _ = wise(OTHER, "-p", EDITED[0], "-p", EDITED[1], "-s", side_memory, stdin="never read\n")
    assert [line for line in out.split("\n") if line.startswith("> ")] == [f"> {q}" for q in (OTHER, *EDITED)]
    assert answers[EDITED[1]] in out


def test_the_plain_base_answers_without_a_side_memory(wise: Wise, tiny_model_dir: Path, base: Base) -> None:
    out, _ = wise("-m", tiny_model_dir, "-p", OTHER)
    assert out == f"> {OTHER}\n{printable(expected(base, OTHER).text)}\n"


def test_commands_in_a_pipe(wise: Wise, side_memory: Path) -> None:
    lines = [EDITED[0], "/why", "/base", f"/base {OTHER}", "/what now", "/help", "/reset", "/quit", "never asked"]
    out, _ = wise("-s", side_memory, stdin="\n".join(lines))
    [why] = re.findall(r"<s>the capital .*?no content\n", out, re.DOTALL)
    text, bars, verdict, nearest, *_ = why.splitlines()
    assert text == f"<s>{EDITED[0]}"
    assert bars.startswith("···")
    assert own(verdict) == "side memory · indicator 1.000 > 0.900 · edit e0 · key router"
    assert f"e0: {EDITED[0]} -> Paris" in nearest
    assert out.count("the unedited base\n") == 2
    assert "There is no command /what. Commands: /why, /base, /reset, /help, /quit." in out
    assert "/why    which memory" in out
    assert "A new conversation." in out
    assert "never asked" not in out


def test_why_of_the_plain_base(wise: Wise, tiny_model_dir: Path) -> None:
    out, _ = wise("-m", tiny_model_dir, stdin=f"{OTHER}\n/why\n")
    assert out.endswith("The plain base answered: no side memory is attached.\n")


def test_base_shows_the_unedited_answer(wise: Wise, side_memory: Path, tiny_model_dir: Path) -> None:
    plain, _ = wise("-m", tiny_model_dir, "-p", EDITED[0])
    out, _ = wise("-s", side_memory, stdin=f"/base {EDITED[0]}\n")
    assert out == plain + "the unedited base\n"


def test_json_is_one_object_per_answer(wise: Wise, side_memory: Path, base: Base) -> None:
    stdin = "\n".join([EDITED[0], OTHER, "/why", "/base", f"/base {EDITED[0]}", "/nothing", "/help"])
    out, err = wise("-s", side_memory, "--json", stdin=stdin)

    def no_constants(name: str) -> None:
        raise AssertionError(name)

    turns = [json.loads(line, parse_constant=no_constants) for line in out.splitlines()]
    keys = {"question", "answer", "memory", "indicator", "epsilon", "edit"}
    assert [set(t) - keys for t in turns] == [set(), set(), {"base_answer"}, {"base_answer"}]
    edited, other, other_base, edited_base = turns
    assert edited["memory"] == 0
    assert edited["edit"] == {"id": "e0", "prompt": EDITED[0], "target": " Paris"}
    assert other["memory"] is None
    assert other["indicator"] <= other["epsilon"]
    assert {k: other_base[k] for k in keys} == other
    assert other_base["base_answer"] == other["answer"] == expected(base, OTHER).text
    assert (edited_base["question"], edited_base["answer"]) == (EDITED[0], None)
    assert edited_base["base_answer"] == expected(base, EDITED[0]).text
    assert f"<s>{OTHER}\n" in err
    assert "main memory · indicator" in err
    assert "There is no command /nothing" in err
    assert "/why    which memory" in err


def test_numbers_that_json_lacks_are_null() -> None:
    document = _document("q", Turn("q", "a", Route(0, float("nan"), float("inf"))))
    assert (document["indicator"], document["epsilon"]) == (None, None)


def test_why_before_a_question_is_an_error(wise: Wise, side_memory: Path) -> None:
    out, err = wise("-s", side_memory, stdin=f"/why\n{OTHER}\n", code=1)
    assert "Nothing has been asked yet." in err
    assert OTHER in out + err  # what stands behind it is asked


def test_a_missing_side_memory(wise: Wise, tmp_path: Path) -> None:
    _, err = wise("-s", tmp_path / "none.safetensors", code=1)
    assert "does not exist" in err


def test_options_that_do_not_fit_the_base(wise: Wise, side_memory: Path, tiny_model_dir: Path) -> None:
    _, err = wise("-s", side_memory, "--chat", code=2)
    assert "no chat template" in err
    assert "learned without the chat template" in err
    _, err = wise("-m", tiny_model_dir, "--system", "be brief", code=2)
    assert "needs a chat template" in err
    _, err = wise("-s", side_memory, "--router", "oracle", code=2)
    assert "Unknown router" in err


def test_another_base_only_when_asked(
    wise: Wise, side_memory: Path, tmp_path: Path, tiny_model: Any, tokenizer: Any
) -> None:
    tiny_model("llama", fresh=True, seed=5).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    wise("-s", side_memory, "-m", tmp_path, "-p", OTHER, code=1)
    wise("-s", side_memory, "-m", tmp_path, "-p", OTHER, "--allow-other-base")


def test_the_template_of_the_base_is_used_by_default(wise: Wise, tmp_path: Path, chat_base: Base) -> None:
    chat_base.model.save_pretrained(tmp_path)
    chat_base.tokenizer.save_pretrained(tmp_path)
    session = session_of(chat_base, chat=True)
    list(session.ask(OTHER))
    out, _ = wise("-m", tmp_path, "--json", "-p", OTHER)
    assert json.loads(out)["answer"] == turn_of(session).answer
    out, _ = wise("-m", tmp_path, "--json", "-p", OTHER, "--no-chat")
    assert json.loads(out)["answer"] == expected(chat_base, OTHER).text


# -- at a terminal -----------------------------------------------------------------------------------------------------


def test_a_conversation_survives_interrupts_and_errors(
    base: Base, attached: Attached, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Ctrl-C at the prompt, an error, Ctrl-C in an answer, a question, Ctrl-D."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    typed: list[Any] = [KeyboardInterrupt, "/why", "interrupted", EDITED[0], EOFError]

    def read(prompt: str) -> str:
        line = typed.pop(0)
        if isinstance(line, str):
            return line
        raise line

    session = session_of(base, attached)
    ask = session.ask

    def ask_until_interrupted(text: str) -> Any:
        if text != "interrupted":
            return ask(text)
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(session, "ask", ask_until_interrupted)
    sink = Output()
    _converse(sink, Dialogue(sink, session, echo=False))
    out, err = capsys.readouterr()
    assert "Ctrl-D or /quit leaves." in out
    assert "Nothing has been asked yet." in err
    assert "stopped" in out
    assert f"{printable(turn_of(session).answer)}\nside memory · indicator 1.000 > 0.900 · edit e0\n" in own(out)
    assert typed == []


def test_history_lives_in_the_state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert _history_path() == tmp_path / "wise" / "history"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _history_path() == tmp_path / ".local" / "state" / "wise" / "history"


def test_route_lines_number_several_memories() -> None:
    route = Route(1, 12.3456, 10.0)
    assert route_line(route, None, 2) == "side memory 1 · indicator 12.346 > 10.000"
    assert route_line(replace(route, memory=None), None, 2) == "main memory · indicator 12.346 <= 10.000"


def test_an_answer_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2J\tb\r\n\x9bc é 東") == "a\ufffd[2J\tb\ufffd\n\ufffdc é 東"
