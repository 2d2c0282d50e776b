"""Explaining a prompt's route: against the decision that is taken, alone and in a batch, and the whole command."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHAT_TEMPLATE, build_tokenizer
from rich.cells import cell_len
from rich.console import Console

import wisecli
from wisecli.cli._why import show_explanation, show_legend
from wisecli.cli.app import main
from wisecli.errors import InputError, UsageError
from wisecli.memory.keys import KeyStore
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base
from wisecli.models.prompts import PromptEncoder
from wisecli.routing.attach import Attached, attach
from wisecli.routing.explain import Explanation, explain, explain_conversation, token_texts
from wisecli.routing.routers import ROUTERS

EDITED = ("the capital of France is", "who is Paris", "when is the world")
OTHER = "hello world hello world, what when where"
PROMPTS = (*EDITED, OTHER, "hello", "what who where world", "naïve café — 東京 🗼 end")
BARS = "▁▂▃▄▅▆▇█·"


@pytest.fixture(scope="module")
def base(tiny_model: Callable[..., Any], tokenizer: Any) -> Base:
    return Base(tiny_model("llama", fresh=True), tokenizer, "tiny")


@pytest.fixture(scope="module")
def two_memories(base: Base, make_side_memory: Callable[..., Any], random_delta: Callable[..., Any]) -> SideMemory:
    """Three edits in two memories, with thresholds of their own that tell the prompts apart."""
    shape = make_side_memory(base.model, EDITED[:1]).site
    deltas = [random_delta((shape.d_out, shape.d_in), seed=s) for s in (1, 2)]
    sm = make_side_memory(
        base.model, EDITED, deltas=deltas, memory_of=[0, 1, 0], epsilon=[{"key": 0.9, "activation": 0.0}] * 2
    )
    with attach(base.model, sm, router="activation") as on:
        seen = sorted(e.route.indicator for e in explain(on, PromptEncoder(base.tokenizer), PROMPTS))
    middle = (seen[3] + seen[4]) / 2
    epsilon = ({"key": 0.9, "activation": middle}, {"key": 0.8, "activation": middle + 1e-3})
    return replace(sm, memories=tuple(replace(m, epsilon=e) for m, e in zip(sm.memories, epsilon, strict=True)))


@pytest.fixture(params=ROUTERS)
def attached(request: pytest.FixtureRequest, base: Base, two_memories: SideMemory) -> Iterator[Attached]:
    with attach(base.model, two_memories, router=request.param) as attached:
        yield attached


def close(one: Explanation, other: Explanation) -> None:
    """The same but for rounding, which differs with the shape of a batch."""

    def numbers(e: Explanation) -> list[float]:
        near = [x for n in e.nearest for x in (n.score, n.epsilon)]
        return [e.route.indicator, e.route.epsilon, *near, *(t.score for t in e.tokens)]

    def names(e: Explanation) -> list[Any]:
        return [e.prompt, e.route.memory, e.route.edit, [n.entry for n in e.nearest], [t.text for t in e.tokens]]

    assert names(one) == names(other)
    assert [t.content for t in one.tokens] == [t.content for t in other.tokens]
    assert numbers(one) == pytest.approx(numbers(other), rel=1e-4, abs=1e-5)


# -- what is explained -------------------------------------------------------------------------------------------------


def test_the_route_is_the_one_generate_takes(base: Base, attached: Attached, encoder: PromptEncoder) -> None:
    batch = encoder.batch([encoder.prompt(p) for p in PROMPTS])
    base.model.generate(**batch.inputs, max_new_tokens=2, do_sample=False)
    taken = attached.explain(attached.last)
    found = explain(attached, encoder, PROMPTS, batch_size=len(PROMPTS))
    assert [e.prompt for e in found] == list(PROMPTS)
    for explanation, route in zip(found, taken, strict=True):
        assert (explanation.route.memory, explanation.route.edit) == (route.memory, route.edit)
        assert explanation.route.epsilon == route.epsilon
        assert explanation.route.indicator == pytest.approx(route.indicator, rel=1e-5, abs=1e-6)
    assert {e.route.routed for e in found} == {True, False}


def test_a_batch_is_its_rows_one_by_one_in_any_order(attached: Attached, encoder: PromptEncoder) -> None:
    together = explain(attached, encoder, PROMPTS)
    for size in (1, 3):
        for one, other in zip(together, explain(attached, encoder, PROMPTS, batch_size=size), strict=True):
            close(one, other)
    for one, prompt in zip(together, PROMPTS, strict=True):
        close(one, explain(attached, encoder, [prompt])[0])
    backwards = explain(attached, encoder, PROMPTS[::-1])
    for one, other in zip(together, backwards[::-1], strict=True):
        close(one, other)


def test_padding_does_not_matter(attached: Attached, encoder: PromptEncoder) -> None:
    [alone] = explain(attached, encoder, [OTHER])
    padded, _ = explain(attached, encoder, [OTHER, "hello " * 60], batch_size=2)
    close(alone, padded)
    rows = [encoder.prompt(OTHER), encoder.prompt("hello " * 60)]
    right, seen = attached.look(encoder.batch(rows, side="right"))
    assert attached.explain(right)[0].indicator == pytest.approx(alone.route.indicator, rel=1e-4, abs=1e-5)
    scores = attached.router.per_token(seen)[0, : len(rows[0])].tolist()
    assert scores == pytest.approx([t.score for t in alone.tokens], rel=1e-4, abs=1e-5)


def test_a_token_reaches_what_the_prompt_would_that_ended_there(
    base: Base, two_memories: SideMemory, encoder: PromptEncoder
) -> None:
    with attach(base.model, two_memories) as on:
        for e in explain(on, encoder, PROMPTS):
            last = [t for t in e.tokens if t.content][-1]
            assert last.score == pytest.approx(e.route.indicator, abs=1e-5)
        [e] = explain(on, encoder, [EDITED[0]])
        ids = encoder.prompt(EDITED[0]).prompt
        for n in range(2, len(ids) + 1):
            cut = replace(encoder.prompt(EDITED[0]), prompt=ids[:n])
            [route] = on.decide(encoder.batch([cut]))
            assert route.indicator == pytest.approx(e.tokens[n - 1].score, abs=1e-5)
        assert len({round(t.score, 3) for t in e.tokens}) > 2


def test_the_activation_router_decides_on_the_mean_of_its_tokens(
    base: Base, two_memories: SideMemory, encoder: PromptEncoder
) -> None:
    with attach(base.model, two_memories, router="activation") as on:
        found = explain(on, encoder, PROMPTS)
    for e in found:
        content = [t.score for t in e.tokens if t.content]
        assert sum(content) / len(content) == pytest.approx(e.route.indicator, rel=1e-4)
        assert e.nearest == ()
    assert {e.route.memory for e in found} > {None}


def test_the_nearest_edits_are_ranked_distinct_and_begin_with_the_routes(
    base: Base, two_memories: SideMemory, encoder: PromptEncoder
) -> None:
    keys = two_memories.keys
    vectors = torch.cat([keys.vectors, keys.vectors.roll(1, 1)])
    doubled = KeyStore.of(keys.space, vectors, torch.cat([keys.owner, keys.owner]), keys.crowding)  # each named once
    with attach(base.model, replace(two_memories, keys=doubled)) as on:
        for top in (1, 2, 3, 9):
            for e in explain(on, encoder, PROMPTS, top=top):
                assert len(e.nearest) == len({n.entry.id for n in e.nearest}) == min(top, len(EDITED))
                assert [n.score for n in e.nearest] == sorted((n.score for n in e.nearest), reverse=True)
                assert e.nearest[0].entry.id == e.route.edit
                assert (e.nearest[0].score, e.nearest[0].epsilon) == (e.route.indicator, e.route.epsilon)
                for n in e.nearest:
                    want = two_memories.memories[n.entry.memory].epsilon["key"]
                    assert n.epsilon == pytest.approx(want, abs=1e-6)
        found = {e.prompt: e for e in explain(on, encoder, EDITED)}
    assert [e.route.edit for e in found.values()] == ["e0", "e1", "e2"]
    assert [e.route.memory for e in found.values()] == [0, 1, 0]


def test_of_equal_scores_the_first_edit_is_the_nearest_and_edits_without_keys_are_none(
    base: Base, make_side_memory: Callable[..., Any], encoder: PromptEncoder
) -> None:
    sm = make_side_memory(base.model, [EDITED[0], EDITED[0], EDITED[1]])
    with attach(base.model, sm) as on:
        [e] = explain(on, encoder, [EDITED[0]])
    assert [n.entry.id for n in e.nearest][:2] == ["e0", "e1"]
    assert e.route.edit == "e0"
    keys = sm.keys
    without = replace(sm, keys=KeyStore.of(keys.space, keys.vectors[1:], keys.owner[1:], keys.crowding))
    with attach(base.model, without) as on:
        [e] = explain(on, encoder, [EDITED[0]])
    assert [n.entry.id for n in e.nearest] == ["e1", "e2"]


def test_tokens_join_to_the_prompt_and_say_what_is_content(attached: Attached, encoder: PromptEncoder) -> None:
    for e in explain(attached, encoder, PROMPTS):
        assert "".join(t.text for t in e.tokens) == "<s>" + e.prompt
        assert [t.content for t in e.tokens] == [False] + [True] * (len(e.tokens) - 1)
        assert e.shown == (0, len(e.tokens))


def test_texts_of_tokens_join_however_long(encoder: PromptEncoder) -> None:
    text = "naïve café — 東京 🗼 end.  Hello , world\n\tx " * 4
    ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(token_texts(encoder.tokenizer, ids)) == text
    assert token_texts(encoder.tokenizer, encoder.tokenizer(" world")["input_ids"])[-1].startswith(" ")


def test_of_a_conversation_the_last_words_are_shown(base: Base, make_side_memory: Callable[..., Any]) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    encoder = PromptEncoder(tokenizer, True)
    sm = replace(make_side_memory(base.model, EDITED), rule=encoder.rule, chat=True)
    talk = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "what"},
        {"role": "user", "content": OTHER},
    ]
    with attach(base.model, sm) as on:
        found = [explain(on, encoder, [OTHER])[0], *(explain_conversation(on, encoder, m) for m in (talk[2:], talk))]
        [decided] = on.decide(encoder.batch([encoder.conversation(talk)]))
    for e in found:
        shown = e.tokens[slice(*e.shown)]
        assert "".join(t.text for t in shown).strip() == e.prompt == OTHER
        assert all(t.content for t in shown)
        assert not any(t.content for t in e.tokens[: e.shown[0]] + e.tokens[e.shown[1] :])
    close(found[0], found[1])
    assert found[2].route == decided
    assert len(found[2].tokens) > len(found[1].tokens)


def test_prompts_that_cannot_be_explained(attached: Attached, encoder: PromptEncoder) -> None:
    for prompt, why in (("", "empty"), (" \n", "empty"), ("\udcff", "valid text"), ("hello " * 300, "base takes 256")):
        with pytest.raises(InputError, match=why):
            explain(attached, encoder, [OTHER, prompt])
    with pytest.raises(UsageError, match="at least 1"):
        explain(attached, encoder, [OTHER], top=0)
    assert explain(attached, encoder, []) == []


def test_the_package_offers_it() -> None:
    assert wisecli.explain is explain
    assert wisecli.Explanation is Explanation


# -- how it looks ------------------------------------------------------------------------------------------------------


def screen(e: Explanation, width: int, *, colour: bool = False) -> str:
    out = io.StringIO()
    system = "truecolor" if colour else None
    console = Console(file=out, width=width, force_terminal=colour, color_system=system, no_color=not colour)  # type: ignore[arg-type]
    show_explanation(console, e)
    show_legend(console, e)
    return out.getvalue()


@pytest.mark.parametrize("width", [20, 60, 80, 120])
def test_nothing_runs_beyond_the_width_and_bars_stand_under_their_tokens(
    attached: Attached, encoder: PromptEncoder, width: int
) -> None:
    long = "hello world, 東京 🗼 " * 6 + "x" * 150
    for e in explain(attached, encoder, [*PROMPTS, long]):
        lines = screen(e, width).splitlines()
        assert max(map(cell_len, lines)) <= width
        end = next(i for i, line in enumerate(lines) if line.startswith(("main", "side")))
        assert "".join(lines[0:end:2]).replace(" ", "") == f"<s>{e.prompt}".replace(" ", "")
        for text, bars in zip(lines[0:end:2], lines[1:end:2], strict=True):
            assert cell_len(bars) == cell_len(text.rstrip())
            assert set(bars) <= {*BARS, " "}
        assert lines[1].startswith("···")
        assert set(lines[1][3:]) - {" ", "·"}


def test_bars_rise_above_the_threshold_only_there(base: Base, two_memories: SideMemory, encoder: PromptEncoder) -> None:
    with attach(base.model, two_memories) as on:
        inside, outside = explain(on, encoder, [EDITED[0], OTHER])
    assert inside.route.routed
    assert not outside.route.routed
    assert screen(inside, 80).splitlines()[1][-1] in "▆▇█"
    assert screen(outside, 80).splitlines()[1][-1] in "▁▂▃▄▅"


def test_colours_stand_in_for_the_bars(base: Base, two_memories: SideMemory, encoder: PromptEncoder) -> None:
    with attach(base.model, two_memories) as on:
        [e] = explain(on, encoder, [EDITED[0]])
    plain, coloured = screen(e, 80).splitlines(), screen(e, 80, colour=True).splitlines()
    assert "\x1b[" not in "".join(plain)
    assert "\x1b[2m<s>" in coloured[0]
    assert coloured[0].count("48;2;") == len([t for t in e.tokens if t.content and t.text])
    assert not set("".join(coloured)) & set("▁▂▃▄▅▆▇█")
    assert plain[1].count("█") + plain[1].count("▇") + plain[1].count("▆") > 0


def test_what_a_prompt_or_a_ledger_holds_cannot_steer_the_terminal(
    base: Base, two_memories: SideMemory, encoder: PromptEncoder
) -> None:
    evil = replace(two_memories.edits[0], prompt="a\x1b[2J", target="\x9bc", details={"note": "\x1b]0;x"})
    with attach(base.model, replace(two_memories, edits=(evil, *two_memories.edits[1:]))) as on:
        [e] = explain(on, encoder, ["hello\x1b[2J\nworld\tx"])
    text = screen(e, 80)
    assert not set(text) & {"\x1b", "\x9b", "\t"}
    assert "hello\ufffd[2J⏎world⇥x" in text


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def side_memory(
    tmp_path_factory: pytest.TempPathFactory, two_memories: SideMemory, tiny_model_dir: Path, base: Base
) -> Path:
    path = tmp_path_factory.mktemp("route") / "sm.safetensors"
    scopes = [{"narrow": 2.0, "wide": -2.0}] * 2
    memories = tuple(replace(m, scopes=s) for m, s in zip(two_memories.memories, scopes, strict=True))
    replace(two_memories, base={**two_memories.base, "name": str(tiny_model_dir)}, memories=memories).save(path)
    return path


class Wise:
    """Runs `wise route` with lines on stdin and gives what came out."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capsys, self.monkeypatch = capsys, monkeypatch

    def __call__(self, *args: Any, stdin: str = "", code: int = 0) -> tuple[str, str]:
        self.monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        got = main(["route", *map(str, args), "--device", "cpu"])
        out, err = self.capsys.readouterr()
        assert got == code, err
        assert "Traceback" not in err
        return out, err


@pytest.fixture
def wise(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Wise:
    monkeypatch.setenv("COLUMNS", "100")
    return Wise(capsys, monkeypatch)


def test_it_shows_the_route_the_tokens_and_the_nearest_edits(wise: Wise, side_memory: Path) -> None:
    out, _ = wise("-s", side_memory, EDITED[1], OTHER, "--top", 2)
    first, second, legend = out.split("\n\n")
    text, bars, verdict, *near = first.splitlines()
    assert text == f"<s>{EDITED[1]}"
    assert bars.startswith("···")
    score = verdict.split()[5]
    assert float(score) > 0.99
    assert verdict == f"side memory 1 · indicator {score} > 0.800 · edit e1 · key router"
    assert near[0].rstrip() == f" {score} >  0.800  e1: who is Paris -> Paris"
    assert near[1].strip() == "memory 1 · took · note 1"
    assert len(near) == 4
    assert "\nmain memory · indicator " in second
    assert "<= 0." in second
    assert "the score the prompt would have if it ended there" in legend


def test_json_is_one_object_per_prompt(wise: Wise, side_memory: Path) -> None:
    out, err = wise("-s", side_memory, "--json", *EDITED, OTHER)

    def no_constants(name: str) -> None:
        raise AssertionError(name)

    found = [json.loads(line, parse_constant=no_constants) for line in out.splitlines()]
    assert [e["prompt"] for e in found] == [*EDITED, OTHER]
    assert [e["memory"] for e in found] == [0, 1, 0, None]
    assert [e["nearest_edit"] for e in found[:3]] == ["e0", "e1", "e2"]
    assert {e["router"] for e in found} == {"key"}
    assert found[3]["indicator"] <= found[3]["epsilon"]
    assert found[0]["indicator"] > found[0]["epsilon"]
    near = found[0]["nearest"]
    assert {**near[0], "score": 0, "epsilon": 0} == {
        "id": "e0",
        "memory": 0,
        "took": True,
        "prompt": EDITED[0],
        "target": " Paris",
        "score": 0,
        "epsilon": 0,
        "details": {"note": 0},
    }
    assert len(near) == 3
    assert "".join(t["text"] for t in found[0]["tokens"]) == f"<s>{EDITED[0]}"
    assert set(found[0]["tokens"][0]) == {"text", "content", "score"}
    assert err == ""


def test_lines_of_stdin_are_prompts(wise: Wise, side_memory: Path) -> None:
    stdin = f"{EDITED[0]}\n\n   \n{OTHER}\r\n" + f"{EDITED[1]}\n" * 40
    piped, _ = wise("-s", side_memory, "--json", stdin=stdin)
    given, _ = wise("-s", side_memory, "--json", EDITED[0], OTHER, *[EDITED[1]] * 40, stdin="never read\n")
    one, other = ([json.loads(line) for line in out.splitlines()] for out in (piped, given))
    assert [(e["prompt"], e["memory"]) for e in one] == [(e["prompt"], e["memory"]) for e in other]
    assert len(one) == 42


def test_quiet_prints_only_where_prompts_go(wise: Wise, side_memory: Path) -> None:
    assert wise("-s", side_memory, "-q", *EDITED, OTHER) == ("side 0\nside 1\nside 0\nmain\n", "")


def test_router_and_scope_are_obeyed(wise: Wise, side_memory: Path) -> None:
    out, _ = wise("-s", side_memory, "--router", "activation", OTHER)
    assert "activation router\nThis router names no single edit.\n" in out
    assert "how much the side memory changes at the token" in out
    for scope, memory in (("narrow", None), ("wide", 0)):
        out, _ = wise("-s", side_memory, "--scope", scope, "--json", EDITED[0])
        assert json.loads(out)["memory"] == memory
    _, err = wise("-s", side_memory, "--scope", "vast", OTHER, code=2)
    assert "vast" in err


def test_texts_that_were_left_out_are_named_by_id(wise: Wise, side_memory: Path, tmp_path: Path) -> None:
    sm = SideMemory.load(side_memory)
    bare = tuple(replace(e, prompt=None, target=None, took=False, details={}) for e in sm.edits)
    replace(sm, edits=bare).save(tmp_path / "side_memory.safetensors")
    out, _ = wise("-s", tmp_path, EDITED[0])  # a folder stands for the file in it
    assert "e0: (its texts were left out)" in out
    assert "did not take" in out
    out, _ = wise("-s", tmp_path, "--json", EDITED[0])
    assert json.loads(out)["nearest"][0]["prompt"] is None


def test_bad_input_is_one_clear_error(wise: Wise, side_memory: Path, tmp_path: Path) -> None:
    for args, stdin, code, text in (
        ((side_memory, ""), "", 1, "The prompt is empty."),
        ((side_memory, OTHER, "  "), "", 1, "The prompt is empty."),
        ((side_memory,), "\n \n", 1, "There are no prompts on stdin."),
        ((tmp_path / "none.safetensors", OTHER), "", 1, "does not exist"),
        ((side_memory, OTHER, "--top", 0), "", 2, "--top"),
        ((side_memory, OTHER, "--router", "oracle"), "", 2, "Unknown router"),
        ((side_memory, "hello " * 300), "", 1, "the base takes 256"),
    ):
        out, err = wise("-s", *args, stdin=stdin, code=code)
        assert text in err
        assert out == ""
    _, err = wise(OTHER, code=2)
    assert "--side-memory" in err
    _, err = wise("-s", tmp_path / "none.safetensors", OTHER, "--json", code=1)
    assert set(json.loads(err)) >= {"type", "message", "hint"}


def test_no_prompts_at_a_terminal(
    side_memory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    assert main(["route", "-s", str(side_memory)]) == 2
    assert "No prompts were given." in capsys.readouterr().err


def test_another_base_only_when_asked(
    wise: Wise, side_memory: Path, tmp_path: Path, tiny_model: Any, tokenizer: Any
) -> None:
    tiny_model("llama", fresh=True, seed=5).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    _, err = wise("-s", side_memory, "-m", tmp_path, OTHER, code=1)
    assert "--allow-other-base" in err
    wise("-s", side_memory, "-m", tmp_path, OTHER, "--allow-other-base")


def test_help_has_an_example(wise: Wise, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["route", "--help"]) == 0
    assert "Example: wise route" in capsys.readouterr().out
