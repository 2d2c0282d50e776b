"""Looking into runs and side memories: what is said against what lies in the files, and each way one can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model, few_pool_prompts
from hypothesis import given
from hypothesis import strategies as st

from wisecli.cli.app import main
from wisecli.cli.inspect import _strip
from wisecli.data.records import EditRecord
from wisecli.data.stream import EditStream
from wisecli.editing.config import EditConfig
from wisecli.editing.merge import merge_run
from wisecli.editing.run import EditRun
from wisecli.errors import InputError, UsageError
from wisecli.evaluation.recall import measure
from wisecli.inspection import (
    ask_edits,
    check_base,
    check_file,
    compare_answers,
    compare_side_memories,
    describe_run,
    describe_side_memory,
    ledger_of,
    open_side_memory,
    open_source,
    select,
    view_edit,
)
from wisecli.inspection.ledger import LedgerLine, counts
from wisecli.memory.bits import SparseDelta
from wisecli.memory.files import load_tensors, save_tensors
from wisecli.memory.shard import RunFolder
from wisecli.memory.side_memory import EditEntry, SideMemory
from wisecli.models.base import Base, load_base
from wisecli.models.prompts import PromptEncoder
from wisecli.packaging import package_side_memory
from wisecli.routing.attach import attach
from wisecli.routing.explain import explain

EDITS = (
    ("Quarzheim is twinned with", "Old Vexby"),
    ("The mayor of Zyndorf is", "Wujkopf"),
    ("Quarzheim is twinned with", "Jyxmoor"),
    ("Who painted the Vlotz?", "Ghwazy"),
    ("The river through Plimsk is", "Orrow"),
)
Run = Callable[..., tuple[int, str, str]]
Change = Callable[[SideMemory], SideMemory]


@pytest.fixture(scope="module")
def base(tiny_model_dir: Path) -> Base:
    return load_base(str(tiny_model_dir), device="cpu")


@pytest.fixture(scope="module")
def folder(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five edits really learned by a tiny random model in two shards; the first is superseded by the third."""
    stream = EditStream.of(
        [EditRecord(prompt=p, target=t, id=f"edit-{i}", subject=p.split()[0]) for i, (p, t) in enumerate(EDITS)]
    )
    config = EditConfig(
        shards=2, contexts=2, mask_density=0.8, max_steps=300, rank=32, dropout=0.0, rewording=0.0, confidence=0.7
    )
    out = tmp_path_factory.mktemp("inspected") / "shards"
    with pytest.MonkeyPatch.context() as patched:
        few_pool_prompts(patched)
        for _ in EditRun(base, stream, config, out):
            pass
    return out


@pytest.fixture(scope="module")
def file(base: Base, folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patched:
        few_pool_prompts(patched)
        merge_run(RunFolder.open(folder), base=base).save(folder.parent / "sm.safetensors")
    return folder.parent / "sm.safetensors"


@pytest.fixture(scope="module")
def side_memory(file: Path) -> SideMemory:
    return SideMemory.load(file)


@pytest.fixture
def package(side_memory: SideMemory, tmp_path: Path) -> Path:
    package_side_memory(side_memory, tmp_path / "package")
    return tmp_path / "package"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    def call(*argv: object) -> tuple[int, str, str]:
        code = main([str(a) for a in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("COLUMNS", "100")
        yield call


def edited(sm: SideMemory, edit: str, **fields: Any) -> SideMemory:
    """The side memory with other fields of one edit."""
    return replace(sm, edits=tuple(replace(e, **fields) if e.id == edit else e for e in sm.edits))


def with_details(sm: SideMemory, edit: str, **details: Any) -> SideMemory:
    entry = entry_of(sm, edit)
    return edited(sm, edit, details={**entry.details, **details})


def entry_of(sm: SideMemory, edit: str) -> EditEntry:
    return next(e for e in sm.edits if e.id == edit)


def saved(sm: SideMemory, tmp_path: Path, name: str = "changed.safetensors") -> Path:
    sm.save(tmp_path / name)
    return tmp_path / name


# -- log ---------------------------------------------------------------------------------------------------------------


def test_the_log_of_a_run_is_its_ledger_with_times(folder: Path) -> None:
    lines = ledger_of(open_source(folder))
    assert [x.id for x in lines] == [f"edit-{i}" for i in range(5)]
    assert [x.outcome for x in lines] == ["superseded", "took", "took", "took", "took"]
    assert [x.shard for x in lines] == [0, 0, 1, 1, 1]
    assert (lines[0].by, lines[0].memory) == ("edit-2", None)
    assert all(x.time is not None and x.time.endswith("+00:00") for x in lines)
    assert all(x.loss is not None and x.steps for x in lines[1:])


def test_the_log_of_a_side_memory_and_of_its_package_are_the_same(file: Path, package: Path) -> None:
    lines = ledger_of(open_source(file))
    assert lines == ledger_of(open_source(package))
    assert [(x.id, x.outcome, x.memory) for x in lines[:2]] == [("edit-0", "superseded", 0), ("edit-1", "took", 0)]


def test_what_superseded_an_edit_is_inferred_from_equal_prompts(side_memory: SideMemory, tmp_path: Path) -> None:
    entry = side_memory.edits[0]
    bare = {k: v for k, v in entry.details.items() if k != "by"}
    silent = edited(side_memory, "edit-0", details=bare)
    assert ledger_of(open_source(saved(silent, tmp_path)))[0].by == "edit-2"
    unlike = edited(silent, "edit-0", prompt="What is Quarzheim's twin?")
    assert ledger_of(open_source(saved(unlike, tmp_path)))[0].by is None


def test_filters(folder: Path) -> None:
    lines = ledger_of(open_source(folder))
    assert [x.id for x in select(lines, outcome="superseded")] == ["edit-0"]
    assert [x.id for x in select(lines, grep="ZYNDORF")] == ["edit-1"]
    assert [x.id for x in select(lines, grep="jyx")] == ["edit-2"]
    assert [x.id for x in select(lines, outcome="took", last=2)] == ["edit-3", "edit-4"]
    assert select(lines, outcome="failed") == []
    with pytest.raises(UsageError, match="outcome 'lost'"):
        select(lines, outcome="lost")


@given(st.lists(st.sampled_from(("took", "failed", "superseded", "withdrawn"))), st.integers(1, 9))
def test_filters_keep_order_and_lose_nothing(outcomes: list[str], last: int) -> None:
    lines = [LedgerLine(str(i), o) for i, o in enumerate(outcomes)]
    parts = {o: select(lines, outcome=o) for o in set(outcomes)}
    assert sorted((x for part in parts.values() for x in part), key=lambda x: int(x.id)) == lines
    assert {o: len(part) for o, part in parts.items()} == counts(lines)
    assert select(lines, last=last) == lines[-last:]


def test_a_side_memory_may_carry_indicators_and_times(side_memory: SideMemory, tmp_path: Path, run: Run) -> None:
    told = with_details(side_memory, "edit-1", indicator=0.8125, time="2026-01-02T03:04:05+00:00", note="by hand")
    path = saved(told, tmp_path)
    line = ledger_of(open_source(path))[1]
    assert (line.indicator, line.time, line.more) == (0.8125, "2026-01-02T03:04:05+00:00", {"note": "by hand"})
    text = run("log", path)[1]
    assert "0.812" in text
    assert "2026-01-02 03:04:05" in text
    text = run("show", "edit-1", path)[1]
    assert all(piece in text for piece in ("0.8125", "2026-01-02 03:04:05 UTC", "by hand"))


def test_the_log_command(run: Run, folder: Path, file: Path) -> None:
    code, text, err = run("log", folder)
    assert (code, err) == (0, "")
    assert all(piece in text for piece in ("edit-4", "by edit-2", "Wujkopf", "4 took, 1 superseded"))
    assert max(len(line) for line in text.splitlines()) <= 100
    code, text, _ = run("log", file, "--outcome", "took", "-n", 1, "--json")
    document = json.loads(text)
    assert (code, document["kind"], document["total"]) == (0, "side memory", 5)
    assert [x["id"] for x in document["edits"]] == ["edit-4"]
    assert run("log", file, "--grep", "no such text")[:2] == (0, f"{file}: 4 took, 1 superseded; shown 0.\n")


def test_the_log_of_a_run_that_has_learned_nothing_yet(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    shutil.copy(folder / "run.json", tmp_path / "begun")
    code, text, _ = run("log", tmp_path / "begun")
    assert (code, text) == (0, f"{tmp_path / 'begun'}: no edit is learned yet.\n")
    code, text, _ = run("inspect", tmp_path / "begun")
    assert code == 0
    assert "0 of 2, not finished" in text
    assert "to be learned" in text
    assert run("show", "edit-1", tmp_path / "begun")[0] == 1


# -- show --------------------------------------------------------------------------------------------------------------


def test_scores_at_stored_keys_are_those_of_the_router(base: Base, file: Path, side_memory: SideMemory) -> None:
    with attach(base.model, side_memory) as on:
        asked = {e.prompt: e for e in explain(on, PromptEncoder(base.tokenizer), [p for p, _ in EDITS], top=5)}
    for i in (1, 2, 3, 4):
        view, why = view_edit(open_source(file), f"edit-{i}"), asked[EDITS[i][0]]
        assert (view.opening.open, view.opening.reached) == (why.route.routed, why.route.edit)
        assert view.opening.score == pytest.approx(why.route.indicator, abs=0.01)  # stored keys are rounded
        assert [n.line.id for n in view.nearest] == [n.entry.id for n in why.nearest if n.entry.id != f"edit-{i}"]
        expected = [n.score for n in why.nearest if n.entry.id != f"edit-{i}"]
        assert [n.score for n in view.nearest] == pytest.approx(expected, abs=0.01)
        assert (view.keys, len(view.own)) == (3, 2)
        assert view.crowding == pytest.approx(float(side_memory.keys.crowding[i]), abs=1e-3)


def test_the_keys_of_a_run_are_those_it_is_merged_with(folder: Path, file: Path) -> None:
    for i in range(5):
        shards, merged = (view_edit(open_source(p), f"edit-{i}") for p in (folder, file))
        assert (shards.keys, shards.own, shards.supersedes) == (merged.keys, merged.own, merged.supersedes)
        assert [(n.line.id, n.score) for n in shards.nearest] == [(n.line.id, n.score) for n in merged.nearest]
        assert shards.crowding == merged.crowding
        assert shards.opening.open is None


def test_superseded_and_superseding(folder: Path) -> None:
    old, new = (view_edit(open_source(folder), i) for i in ("edit-0", "edit-2"))
    assert (old.line.by, old.keys, old.nearest, old.crowding) == ("edit-2", 0, (), None)
    assert new.supersedes == ("edit-0",)


def test_the_gate_is_closed_to_what_is_below_the_threshold_or_withdrawn(
    side_memory: SideMemory, tmp_path: Path
) -> None:
    shut = tuple(replace(m, epsilon={**m.epsilon, "key": 2.0}) for m in side_memory.memories)
    view = view_edit(open_source(saved(replace(side_memory, memories=shut), tmp_path)), "edit-1")
    assert (view.opening.open, view.opening.epsilon) == (False, 2.0)
    view = view_edit(open_source(saved(side_memory.withdrawn(["edit-1"]), tmp_path)), "edit-1")
    assert (view.opening.open, view.opening.epsilon, view.line.outcome) == (False, None, "withdrawn")
    assert "withdrawn" in view.opening.why
    by_activation = replace(side_memory, router="activation")
    assert view_edit(open_source(saved(by_activation, tmp_path)), "edit-1").opening.open is None


def test_an_edit_next_to_another_is_answered_by_it(side_memory: SideMemory, tmp_path: Path) -> None:
    """With the keys of one edit given to another, its prompt reaches that one."""
    keys, owner = side_memory.keys.keys.clone(), side_memory.keys.owner
    keys[owner == 4] = keys[owner == 3]
    crowding = side_memory.keys.crowding.clone()
    crowding[4], crowding[3] = 0.0, 0.5
    step = side_memory.keys.step.clone()
    step[owner == 4] = step[owner == 3]
    moved = keyed(side_memory, keys=keys, step=step, crowding=crowding)
    view = view_edit(open_source(saved(moved, tmp_path)), "edit-3")
    assert (view.opening.reached, view.nearest[0].line.id) == ("edit-4", "edit-4")
    assert "edit-4" in view.opening.why


def test_the_show_command(run: Run, folder: Path, file: Path) -> None:
    code, text, _ = run("show", "edit-2", file, "--top", 2)
    assert code == 0
    assert all(p in text for p in ("Jyxmoor", "supersedes", "edit-0", "3, crowding", "open: ", "Nearest other edits"))
    document = json.loads(run("show", "edit-2", folder, "--json")[1])
    assert (document["id"], document["position"], document["keys"]["number"]) == ("edit-2", 3, 3)
    assert len(document["nearest"]) == 3
    code, text, err = run("show", "edt-2", file)
    assert (code, text) == (1, "")
    assert "no edit 'edt-2'" in err
    assert "Did you mean edit-2" in err
    assert "lists the edits" in run("show", "zzz", file)[2]


# -- inspect -----------------------------------------------------------------------------------------------------------


def test_the_parts_of_a_file_add_up(file: Path, package: Path, side_memory: SideMemory) -> None:
    contents = describe_side_memory(open_side_memory(file))
    assert contents.about + sum(p.size for p in contents.parts) == contents.size == file.stat().st_size
    assert contents.about > 0
    dense = side_memory.memories[0].delta.dense()
    assert contents.memories[0].delta.norm == pytest.approx(float(dense.double().norm()), rel=1e-9)
    assert contents.memories[0].delta.density == pytest.approx(float((dense != 0).float().mean()), abs=0.01)
    assert (contents.keys.number, contents.keys.edits, contents.keys.rank) == (12, 4, side_memory.keys.space.rank)
    assert contents.digest == side_memory.digest
    assert {s.router for s in contents.spreads} == {"key", "activation"}
    packed = describe_side_memory(open_side_memory(package))
    assert packed.files == {p.name: p.stat().st_size for p in package.iterdir()}


def test_a_run_is_described_finished_or_not(folder: Path, tmp_path: Path) -> None:
    whole = describe_run(open_source(folder))  # type: ignore[arg-type]
    assert (whole.finished, [s.edits for s in whole.shards], whole.outcomes) == (
        2,
        [2, 3],
        {"took": 4, "superseded": 1},
    )
    assert all(s.delta is not None and s.delta.norm > 0 for s in whole.shards)
    shutil.copytree(folder, tmp_path / "cut")
    (tmp_path / "cut" / "shard-00001.safetensors").unlink()
    save_tensors(tmp_path / "cut" / "partial-00001.safetensors", {}, {"shards": [1, 2], "arrived": [2, 1]})
    (tmp_path / "cut" / "partial-00002.safetensors").write_bytes(b"torn")
    cut = describe_run(open_source(tmp_path / "cut"))  # type: ignore[arg-type]
    assert (cut.finished, cut.shards[1].partial, cut.shards[1].edits) == (1, True, 2)


def test_the_inspect_command(run: Run, folder: Path, file: Path, package: Path) -> None:
    code, text, _ = run("inspect", file)
    assert code == 0
    for piece in ("wise-side-memory", "mlp.down_proj", "Memory 0", "per edit", "narrow", "╎ threshold", "manifest"):
        assert piece in text
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "Files of the package" in run("inspect", package)[1]
    assert "2 of 2, finished" in run("inspect", folder)[1]
    for path, kind in ((file, "side memory"), (package, "package"), (folder, "run folder")):
        document = json.loads(run("inspect", path, "--json")[1])
        assert (document["kind"], document["outcomes"]) == (kind, {"took": 4, "superseded": 1})


def test_statistics_of_several_memories_and_unknown_ones_are_read(side_memory: SideMemory, tmp_path: Path) -> None:
    five = [0.0, 1.0, 2.0, 3.0, 4.0]
    statistics = {"key": {"ordinary": five, "hard": []}, "activation": {"memories": [None, {"in_scope": five}]}, "n": 3}
    path = saved(replace(side_memory, statistics=statistics), tmp_path)
    found = describe_side_memory(open_side_memory(path)).spreads
    assert [(s.router, s.name) for s in found] == [("activation", "in_scope of memory 1"), ("key", "ordinary")]


@given(st.lists(st.floats(-3, 3), min_size=5, max_size=5).map(sorted), st.floats(-3, 3), st.integers(1, 60))
def test_a_strip_has_its_width_and_its_median(quantiles: list[float], epsilon: float, width: int) -> None:
    low, high = min(quantiles[0], epsilon), max(quantiles[-1], epsilon)
    strip = _strip(quantiles, [epsilon], low, high, width)
    assert len(strip) == width
    assert strip.count("┃") == 1
    assert set(strip) <= set(" ·━┃╎")


# -- verify ------------------------------------------------------------------------------------------------------------


def failing(path: Path) -> dict[str, str]:
    return {c.name: c.detail for c in check_file(path)[1] if c.ok is False}


def test_a_whole_side_memory_passes_and_its_edits_hold(base: Base, file: Path, side_memory: SideMemory) -> None:
    sm, checks = check_file(file)
    assert sm is not None
    assert all(c.ok for c in checks)
    assert check_base(base, sm).ok
    asked = ask_edits(base, sm)
    assert [(a.entry.id, a.passed) for a in asked] == [(f"edit-{i}", True) for i in range(1, 5)]
    measured = measure(base, side_memory)
    assert (measured.edits, measured.reliability) == (4, 1.0)


def first_delta(sm: SideMemory, **fields: Any) -> SideMemory:
    memory = sm.memories[0]
    return replace(sm, memories=(replace(memory, delta=replace(memory.delta, **fields)), *sm.memories[1:]))


def keyed(sm: SideMemory, **fields: Any) -> SideMemory:
    return replace(sm, keys=replace(sm.keys, **fields))


def poisoned(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t.view(-1)[1] = float("nan")
    return t


BROKEN: dict[str, tuple[Change, str, str]] = {
    "values": (lambda sm: first_delta(sm, values=poisoned(sm.memories[0].delta.values)), "values", "not finite"),
    "key": (lambda sm: keyed(sm, step=poisoned(sm.keys.step)), "values", "keys.step"),
    "popcount": (lambda sm: first_delta(sm, values=sm.memories[0].delta.values[1:]), "mask", "entries, but there are"),
    "mask": (lambda sm: first_delta(sm, bits=sm.memories[0].delta.bits[:-1]), "tensors", "memory.0.mask is"),
    "whole": (lambda sm: first_delta(sm, values=sm.memories[0].delta.values.int()), "tensors", "torch.int32"),
    "owner": (lambda sm: keyed(sm, owner=sm.keys.owner + 4), "keys", "belong to no edit"),
    "below": (lambda sm: keyed(sm, owner=sm.keys.owner - 2), "keys", "belong to no edit"),
    "owners": (lambda sm: keyed(sm, owner=sm.keys.owner[1:]), "tensors", "keys.vectors is 12 x"),
    "crowding": (lambda sm: keyed(sm, crowding=sm.keys.crowding[1:]), "tensors", "keys.crowding is 4, not 5"),
    "keyless": (lambda sm: keyed(sm, owner=sm.keys.owner.clamp(max=3)), "keys", "edit-4 took, but has no key"),
    "memory": (lambda sm: edited(sm, "edit-1", memory=7), "edits", "edit-1 is in memory 7; there are 1"),
    "word": (lambda sm: edited(sm, "edit-1", memory="one"), "edits", "malformed"),
    "lost": (lambda sm: edited(sm, "edit-1", memory=-1), "edits", "edit-1 is in memory -1"),
    "twice": (lambda sm: edited(sm, "edit-1", id="edit-2"), "edits", "edit-2 stands 2 times"),
    "renamed": (lambda sm: edited(sm, "edit-1", id="edit-9"), "edits", "lists edit-1, which is no edit"),
    "marked": (lambda sm: edited(sm, "edit-1", took=False), "edits", "edit-1 took, but is marked"),
    "router": (lambda sm: replace(sm, router="hash"), "thresholds", "'hash' is unknown"),
    "epsilon": (
        lambda sm: replace(sm, memories=(replace(sm.memories[0], epsilon={}),)),
        "thresholds",
        "memory 0 has none for the key router",
    ),
    "nan": (
        lambda sm: replace(sm, memories=(replace(sm.memories[0], epsilon={"key": float("nan")}),)),
        "thresholds",
        "is no number",
    ),
    "leaking": (
        lambda sm: edited(with_details(sm, "edit-1", outcome="withdrawn"), "edit-1", took=False),
        "keys",
        "its keys lead to memory 0",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_every_fault_is_found_and_named(name: str, side_memory: SideMemory, tmp_path: Path, run: Run) -> None:
    change, check, message = BROKEN[name]
    path = saved(change(side_memory), tmp_path)
    assert message in failing(path)[check]
    code, text, err = run("verify", path, "--no-base")
    assert (code, "FAILED" in text) == (3, True)
    assert message.split()[0] in err


def test_bits_beyond_the_matrix_are_found(
    make_side_memory: Callable[..., Any], tiny_model: Any, tmp_path: Path
) -> None:
    sm = make_side_memory(tiny_model("llama"), ["hello world"])
    site = replace(sm.site, d_out=sm.site.d_out - 1, d_in=sm.site.d_in - 1)  # 63 x 159: one bit of the last byte
    delta = SparseDelta.pack(torch.ones(site.d_out, site.d_in))
    bits = delta.bits.clone()
    bits[-1] |= 1
    wrong = replace(sm, site=site, memories=(replace(sm.memories[0], delta=replace(delta, bits=bits)),))
    assert "beyond the matrix" in failing(saved(wrong, tmp_path))["mask"]


def test_a_damaged_file_fails_and_an_absent_one_is_an_error(run: Run, file: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-100])
    tensors, manifest = load_tensors(file)
    del tensors["keys.owner"]
    save_tensors(tmp_path / "part.safetensors", tensors, manifest)
    for path in (tmp_path / "cut.safetensors", tmp_path / "part.safetensors", folder / "gate.safetensors"):
        code, _, err = run("verify", path)
        assert (code, err.startswith("error: readable: ")) == (3, True)
        assert ".." not in err.splitlines()[0]
    for path in (tmp_path / "absent.safetensors", tmp_path, folder):
        assert run("verify", path)[:2] == (1, "")


def test_a_package_is_checked_against_its_manifest(package: Path, run: Run) -> None:
    assert failing(package) == {}
    (package / "ledger.jsonl").write_text("{}\n")
    assert "ledger.jsonl" in failing(package)["package"]
    (package / "manifest.json").unlink()
    assert [c.ok for c in check_file(package)[1] if c.name == "package"] == [None]
    assert run("verify", package, "--no-base")[0] == 0


def test_another_base_fails(run: Run, file: Path, side_memory: SideMemory, tokenizer: Any, tmp_path: Path) -> None:
    build_model("llama", len(tokenizer), seed=5).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    code, text, err = run("verify", file, "--model", tmp_path / "other")
    assert code == 3
    assert "other weights" in err
    assert "--model" in err
    assert "No edit was asked" in text
    gpt2 = Base(build_model("gpt2", len(tokenizer)), tokenizer, "gpt2")
    assert "no module" in check_base(gpt2, side_memory).detail
    wider = replace(side_memory, site=replace(side_memory.site, d_in=side_memory.site.d_in + 8))
    assert " x " in check_base(Base(build_model("llama", len(tokenizer)), tokenizer, "t"), wider).detail


def test_an_edit_that_does_not_hold_fails(run: Run, side_memory: SideMemory, tmp_path: Path) -> None:
    path = saved(edited(side_memory, "edit-1", target="Somebody"), tmp_path)
    code, text, err = run("verify", path)
    assert code == 3
    assert "Edits that fail" in text
    assert "Wujkopf" in text
    assert "edit-1" in text
    assert "1 edit is not answered with its target." in err
    code, text, err = run("verify", path, "--json")
    document = json.loads(text)
    assert (code, document["ok"], [e["id"] for e in document["edits"]["failed"]]) == (3, False, ["edit-1"])
    assert document["edits"]["failed"][0]["answer"] == "Wujkopf"
    assert json.loads(err)["type"] == "CheckFailed"
    for option in ("--no-ask", "--no-base"):
        code, text, _ = run("verify", path, option)
        assert (code, "No edit was asked." in text) == (0, True)


def test_a_failed_edit_fails_unless_accepted(run: Run, side_memory: SideMemory, tmp_path: Path) -> None:
    failed = edited(with_details(side_memory, "edit-1", outcome="failed"), "edit-1", took=False, target="Somebody")
    path = saved(failed, tmp_path)
    assert run("verify", path)[0] == 3
    code, text, _ = run("verify", path, "--accept-failed")
    assert (code, "1 recorded as failed did not" in text) == (0, True)


def test_a_withdrawn_edit_must_not_be_answered_by_the_side_memory(
    base: Base, side_memory: SideMemory, tmp_path: Path, run: Run
) -> None:
    closed = side_memory.withdrawn(["edit-1"])
    assert run("verify", saved(closed, tmp_path))[0] == 0
    asked = {a.entry.id: a for a in ask_edits(base, closed)}
    route = asked["edit-1"].answer.route
    assert route is not None
    assert (asked["edit-1"].outcome, route.routed, asked["edit-1"].passed) == ("withdrawn", False, True)
    leaking = edited(with_details(side_memory, "edit-1", outcome="withdrawn"), "edit-1", took=False)
    assert [a.entry.id for a in ask_edits(base, leaking) if not a.passed] == ["edit-1"]
    keyless = side_memory.keys.owner != 1  # with no keys its prompt goes to another edit or to main memory
    without = keyed(closed, **{name: getattr(side_memory.keys, name)[keyless] for name in ("keys", "step", "owner")})
    assert failing(saved(without, tmp_path)) == {}
    assert all(a.passed for a in ask_edits(base, without))


def test_without_texts_nothing_can_be_asked(run: Run, side_memory: SideMemory, tmp_path: Path) -> None:
    path = saved(side_memory.without_texts(), tmp_path)
    code, text, _ = run("verify", path)
    assert (code, "texts were left out" in text) == (0, True)
    assert "(its texts were left out)" in run("log", path)[1]
    assert "(its texts were left out)" in run("show", "edit-1", path)[1]
    assert run("log", path, "--grep", "Zyndorf", "--json")[0] == 0


# -- diff --------------------------------------------------------------------------------------------------------------


def test_a_side_memory_and_its_package_do_not_differ(run: Run, file: Path, package: Path) -> None:
    assert compare_side_memories(open_side_memory(file), open_side_memory(package)).none
    code, text, _ = run("diff", file, package)
    assert (code, text.startswith("No difference: the same 5 edits")) == (0, True)


def test_edits_settings_and_tensors_that_differ(side_memory: SideMemory, file: Path, tmp_path: Path) -> None:
    other = edited(side_memory, "edit-1", target="Somebody")
    other = edited(other, "edit-2", id="renamed")
    other = edited(other, "edit-4", id="new", prompt="A new prompt")
    other = first_delta(other, values=-side_memory.memories[0].delta.values)
    other = replace(other, config={**other.config, "seed": 9}, chat=True)
    a, b = open_side_memory(file), open_side_memory(saved(other, tmp_path))
    found = compare_side_memories(a, b)
    assert ([x.id for x in found.only_a], [x.id for x in found.only_b]) == (["edit-4"], ["new"])
    assert [dict(c.changes) for c in found.changed] == [
        {"target": ("Wujkopf", "Somebody")},
        {"id": ("edit-2", "renamed")},
    ]
    assert (dict(found.settings), found.same) == ({"chat": (False, True), "config.seed": (0, 9)}, 2)
    assert dict(found.tensors) == {"memory.0.values": "other numbers"}
    back = compare_side_memories(b, a)
    assert (back.only_a, back.only_b, back.digests) == (found.only_b, found.only_a, found.digests[::-1])
    assert back.settings == {k: v[::-1] for k, v in found.settings.items()}


def test_another_number_of_memories(side_memory: SideMemory, file: Path, tmp_path: Path) -> None:
    delta = side_memory.memories[0].delta
    delta = replace(delta, bits=delta.bits.clone(), values=delta.values.clone())
    empty = replace(side_memory.memories[0], delta=delta, edits=())
    more = replace(side_memory, memories=(*side_memory.memories, empty))
    found = compare_side_memories(open_side_memory(file), open_side_memory(saved(more, tmp_path)))
    assert found.settings == {"memories": (1, 2)}
    assert dict(found.tensors) == {"memory.1.mask": "only in B", "memory.1.values": "only in B"}


def test_answers_that_differ(base: Base, side_memory: SideMemory, file: Path, tmp_path: Path) -> None:
    a, b = open_side_memory(file), open_side_memory(saved(side_memory.withdrawn(["edit-3"]), tmp_path))
    pairs, asked = compare_answers(base, a, b)
    assert (asked, [p.prompt for p in pairs]) == (4, [EDITS[3][0]])
    assert pairs[0].a.text == "Ghwazy"
    assert pairs[0].b.text != "Ghwazy"
    assert compare_answers(base, a, a)[0] == []
    pairs, asked = compare_answers(base, a, b, [EDITS[1][0], EDITS[3][0]])
    assert (asked, [p.prompt for p in pairs]) == (2, [EDITS[3][0]])


def test_the_diff_command(run: Run, side_memory: SideMemory, file: Path, folder: Path, tmp_path: Path) -> None:
    other = saved(side_memory.withdrawn(["edit-3"]), tmp_path)
    code, text, _ = run("diff", file, other, "--ask-edits")
    assert code == 0
    for piece in ("Edits that differ", "withdrawn", "Answers that differ", "(side memory)", "(main memory)"):
        assert piece in text
    (tmp_path / "prompts.txt").write_text(f"{EDITS[1][0]}\n\n{EDITS[1][0]}\n")
    document = json.loads(run("diff", file, other, "--ask", tmp_path / "prompts.txt", "--json")[1])
    assert document["answers"] == {"asked": 1, "differ": []}
    assert document["tensors"]["same"] is True
    (tmp_path / "empty.txt").write_text("\n")
    cases = [
        ((file, other, "--ask", tmp_path / "prompts.txt", "--ask-edits"), 2, "Give one of them"),
        ((file, other, "--ask", tmp_path / "absent.txt"), 1, "Cannot read"),
        ((file, other, "--ask", tmp_path / "empty.txt"), 1, "no prompts"),
        ((file, folder), 1, "not merged yet"),
        ((file, tmp_path / "absent.safetensors"), 1, "does not exist"),
    ]
    for argv, exit_code, message in cases:
        code, text, err = run("diff", *argv)
        assert (code, text) == (exit_code, ""), argv
        assert message in err


# -- damaged runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("run.json", '"streams"', '"rivers"'),
        ("run.json", '"supersedes"', '"beats"'),
        ("run.json", '"site"', '"place"'),
        ("run.json", '"shards": 2', '"shards": "two"'),
        ("ledger.jsonl", '"shard"', '"chunk"'),
        ("ledger.jsonl", '"outcome"', '"result"'),
        ("ledger.jsonl", '"id"', '"name"'),
    ],
)
def test_a_damaged_run_is_an_error_and_no_fault_of_ours(
    run: Run, folder: Path, tmp_path: Path, file: str, old: str, new: str
) -> None:
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / file
    before = path.read_text()
    assert old in before
    path.write_text(before.replace(old, new))
    for argv in (("log",), ("show", "edit-1"), ("inspect",)):
        code, _, err = run(*argv, tmp_path / "run")
        assert code == 1
        assert file in err
        assert "InternalError" not in err
        assert "fault in wise" not in err
    with pytest.raises(InputError):
        ledger_of(open_source(tmp_path / "run"))


def test_looking_changes_nothing(run: Run, folder: Path, file: Path) -> None:
    before = {p: p.read_bytes() for p in (file, *folder.iterdir())}
    for argv in (("log", folder), ("show", "edit-1", folder), ("inspect", folder), ("verify", file), ("inspect", file)):
        assert run(*argv)[0] == 0
    assert {p: p.read_bytes() for p in (file, *folder.iterdir())} == before
