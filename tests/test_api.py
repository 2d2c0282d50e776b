"""The Python surface, on a model that the caller loaded: the bytes of the command line, and a model left as it was."""

from __future__ import annotations

import copy
import functools
import json
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHAT_TEMPLATE, build_model, few_pool_prompts
from test_shelf import hooks_of

import wisecli
from wisecli.cli.app import main
from wisecli.data.stream import edits_of
from wisecli.errors import InputError, ModelError, OutputError, UsageError, WiseError
from wisecli.models.base import demo_base_path
from wisecli.routing.engine import carries_side_memory

EDITS = [
    {
        "id": f"t{i}",
        "prompt": f"The capital of {name} is",
        "target": f"w{i}",
        "subject": name,
        "rephrases": [f"when the capital of {name} is"],
        "locality": [{"prompt": "hello world"}, {"prompt": f"{name} lies", "kind": "same-subject"}],
    }
    for i, name in enumerate(("France", "Spain", "Italy", "Norway"))
]
SETTINGS = {"contexts": 1, "max_steps": 15, "seed": 3}
FLAGS = ("--contexts", "1", "--max-steps", "15", "--seed", "3", "-q")
EXAMPLE = Path(__file__).parents[1] / "examples" / "from_python.py"


@pytest.fixture(scope="module", autouse=True)
def few_prompts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        few_pool_prompts(patched)
        yield


@pytest.fixture(scope="module")
def load(tiny_model_dir: Path) -> Callable[[], tuple[Any, Any]]:
    """A model and its tokenizer, loaded as anyone would."""

    def plain() -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        return AutoModelForCausalLM.from_pretrained(tiny_model_dir), AutoTokenizer.from_pretrained(tiny_model_dir)

    return plain


@pytest.fixture(scope="module")
def plain(load: Any) -> tuple[Any, Any]:
    return load()


@pytest.fixture(scope="module")
def learned(plain: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[wisecli.SideMemory, Path]:
    """A side memory of the four edits, and the folder of its shards."""
    out = tmp_path_factory.mktemp("learned") / "shards"
    return wisecli.edit(*plain, EDITS, out=out, **SETTINGS), out


def written(folder: Path) -> dict[str, bytes]:
    """The files of a run, but for its journal, which notes when things happened."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.suffix in (".safetensors", ".json")}


def saved(sm: wisecli.SideMemory, folder: Path) -> bytes:
    sm.save(folder / "saved.safetensors")
    return (folder / "saved.safetensors").read_bytes()


# -- the same as the commands ------------------------------------------------------------------------------------------


def test_edit_and_merge_give_the_bytes_of_the_commands(
    plain: Any, learned: Any, tiny_model_dir: Path, tmp_path: Path
) -> None:
    side_memory, out = learned
    shards, sm, other = tmp_path / "shards", tmp_path / "sm.safetensors", tmp_path / "other.safetensors"
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps(e) + "\n" for e in EDITS))
    assert main(["edit", str(file), "--model", str(tiny_model_dir), "--out", str(shards), *FLAGS]) == 0
    assert main(["merge", str(shards), "-o", str(sm), "-q"]) == 0
    assert main(["merge", str(shards), "-o", str(other), "--retrieve", "--scope", "wide", "-q"]) == 0
    assert written(out) == written(shards)
    assert len([name for name in written(out) if name.startswith("shard-")]) == 2
    assert saved(side_memory, tmp_path) == sm.read_bytes()
    assert saved(wisecli.load_side_memory(sm), tmp_path) == sm.read_bytes()
    assert saved(wisecli.merge(*plain, out, memories=None, scope="wide"), tmp_path) == other.read_bytes()
    base = wisecli.load_base(str(tiny_model_dir), device="cpu")
    assert saved(wisecli.edit(base, file, **SETTINGS), tmp_path) == sm.read_bytes()  # no folder is kept


def test_a_later_stream_is_learned_as_the_command_would(
    plain: Any, learned: Any, tiny_model_dir: Path, tmp_path: Path
) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    shutil.copytree(learned[1], mine)
    shutil.copytree(learned[1], theirs)
    more = [{"id": "m", "prompt": "The capital of Peru is", "target": "w9"}]
    file = tmp_path / "more.jsonl"
    file.write_text(json.dumps(more[0]) + "\n")
    wisecli.edit(*plain, more, out=mine, append=True)
    assert main(["edit", str(file), "--shards", str(theirs), "-q"]) == 0
    assert written(mine) == written(theirs)
    assert wisecli.RunFolder.open(mine).run["config"]["seed"] == 3


def test_evaluate_takes_a_model_or_a_base(plain: Any, learned: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    options = wisecli.EvalOptions(ability=False)
    base, steps = wisecli.load_base(str(tiny_model_dir), device="cpu"), []
    learned[0].save(tmp_path / "sm.safetensors")
    mine = wisecli.evaluate(*plain, EDITS, learned[0], options=options, progress=steps.append)
    theirs = wisecli.evaluate(base, wisecli.EditStream.of(edits_of(EDITS).records), tmp_path / "sm.safetensors")
    assert [i.to_json() for i in mine.items] == [i.to_json() for i in theirs.items]
    assert mine.scores == theirs.scores
    assert mine.sections["base"] == theirs.sections["base"]
    assert steps[-1].done == steps[-1].total
    alone = wisecli.evaluate(*plain, EDITS, options=options)
    assert [i.before for i in alone.items] == [i.before for i in mine.items]
    assert not carries_side_memory(plain[0])


def test_edits_come_in_any_form(tmp_path: Path) -> None:
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps(e) + "\n" for e in EDITS))
    read = wisecli.read_edits(file)
    for given in (EDITS, read.records, (e for e in EDITS), [EDITS[0], *read.records[1:]]):
        found = edits_of(given)
        assert (found.records, found.digest, found.format) == (read.records, read.digest, read.format)
    rewrite = {"prompt": "{} is in", "subject": "Rome", "target_new": {"str": "Peru"}, "target_true": {"str": "Italy"}}
    assert edits_of([{"case_id": 1, "requested_rewrite": rewrite}]).records[0].prompt == "Rome is in"
    with pytest.raises(InputError) as e:
        edits_of([EDITS[0], {"prompt": "x"}, "text", EDITS[0]])
    assert [p.split(":")[0] for p in e.value.problems] == ["edits[1]", "edits[2]", "edits[3]"]


def test_model_and_tokenizer_may_be_named_one_by_one(plain: Any, learned: Any) -> None:
    model, tokenizer = plain
    for call in (
        lambda: wisecli.edit(model, tokenizer=tokenizer, edits=EDITS, **SETTINGS),
        lambda: wisecli.edit(tokenizer=tokenizer, model=model, edits=EDITS, **SETTINGS),
    ):
        assert call().digest == learned[0].digest


def test_a_base_whose_weights_have_changed_gets_a_gate_of_its_own(load: Any) -> None:
    base = wisecli.Base.of(*load())
    before = wisecli.edit(base, EDITS[:2], **SETTINGS)
    with torch.no_grad():
        base.model.model.layers[0].mlp.down_proj.weight.mul_(3.0)
    kept, anew = (wisecli.edit(base, EDITS[:2], cache=cache, **SETTINGS) for cache in (True, False))
    assert kept.digest == anew.digest
    assert not torch.equal(kept.keys.space.projection, before.keys.space.projection)


def test_no_run_begins_among_other_files(plain: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(OutputError, match=r"holds model\.safetensors"):
        wisecli.edit(*plain, EDITS, out=tmp_path, **SETTINGS)
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["model.safetensors"]


def test_an_error_says_all_that_is_known_of_it(plain: Any) -> None:
    with pytest.raises(InputError) as e:
        wisecli.edit(*plain, [{"prompt": "x"}, {"prompt": 3, "target": "x"}])
    assert len(e.value.problems) == 2
    assert all(part in str(e.value) for part in (e.value.message, str(e.value.hint), *e.value.problems))


def test_progress_and_a_single_edit(plain: Any) -> None:
    seen: list[Any] = []
    sm = wisecli.edit(*plain, EDITS[0], progress=seen.append, texts=False, **SETTINGS)
    assert (seen[-1].done, seen[-1].total) == (1, 1)
    assert [e["id"] for step in seen for e in step.finished] == ["t0"]
    assert [(e.id, e.prompt) for e in sm.edits] == [("t0", None)]
    assert len(sm.memories[0].origin["shards"]) == 1


def test_the_chat_template_is_used_where_there_is_one(load: Any) -> None:
    model, tokenizer = load()
    tokenizer.chat_template = CHAT_TEMPLATE
    assert wisecli.edit(model, tokenizer, EDITS[:1], **SETTINGS).chat
    assert not wisecli.edit(model, tokenizer, EDITS[:1], chat=False, **SETTINGS).chat


# -- the model is the caller's -----------------------------------------------------------------------------------------


def state_of(model: Any) -> Any:
    """All that an owner may rely on: modes, flags, gradients, weights, hooks, config, and global random state."""
    return (
        [m.training for m in model.modules()],
        [(p.requires_grad, p.grad, p.dtype, id(p)) for p in model.parameters()],
        {k: v.clone() for k, v in model.state_dict().items()},
        hooks_of(model),
        {k: id(v) for k, v in vars(model).items()},
        (model.config.to_dict(), model.generation_config.to_dict()),
        torch.get_rng_state(),
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_model_in_training_is_read_as_the_base_and_left_as_it_was(
    load: Any, learned: Any, tmp_path: Path, mode: Any
) -> None:
    model, tokenizer = load()
    model.train()
    model.model.layers[1].eval()  # an owner may have frozen a part
    model.model.embed_tokens.weight.requires_grad_(False)
    model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    before = state_of(model)
    with mode():
        sm = wisecli.edit(model, tokenizer, EDITS, out=tmp_path / "shards", **SETTINGS)
        assert same(state_of(model), before)
        wisecli.merge(model, tokenizer, tmp_path / "shards")
        wisecli.evaluate(model, tokenizer, EDITS, sm, options=wisecli.EvalOptions(ability=False))
        wisecli.fold(model, tokenizer, sm, tmp_path / "folded")
    assert same(state_of(model), before)
    assert written(tmp_path / "shards") == written(learned[1])
    assert saved(sm, tmp_path) == saved(learned[0], tmp_path)

    def stop(step: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wisecli.edit(model, tokenizer, EDITS, progress=stop, **SETTINGS)
    assert same(state_of(model), before)


def test_editing_within_a_trainer_changes_nothing_of_the_training(load: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    data = [{"input_ids": torch.arange(5 + i, 13 + i), "labels": torch.arange(5 + i, 13 + i)} for i in range(4)]
    made = []

    class Editing(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            made.append(wisecli.edit(kwargs["model"], tokenizer, EDITS[:1], **SETTINGS))
            wisecli.evaluate(kwargs["model"], tokenizer, EDITS[:1], made[-1], options=options)

    options = wisecli.EvalOptions(ability=False, open_gate=False)
    weights = []
    for callbacks in ([], [Editing()]):
        model, tokenizer = load()
        args = TrainingArguments(
            str(tmp_path / "trained"), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
            use_cpu=True, disable_tqdm=True, save_strategy="no", activation_checkpointing=True,
        )  # fmt: skip
        Trainer(model, args, train_dataset=data, callbacks=callbacks).train()
        weights.append(model.state_dict())
    assert same(*weights)
    fingerprints = [sm.base["fingerprint"]["float32"] for sm in made]
    assert len(set(fingerprints)) == 2  # each belongs to the weights of its moment


def test_where_a_base_comes_from(plain: Any, tiny_model_dir: Path) -> None:
    model, tokenizer = copy.copy(plain[0]), plain[1]
    model.config = copy.deepcopy(model.config)
    for noted, commit, name, revision in (
        (str(tiny_model_dir), "c" * 40, str(tiny_model_dir), None),
        (str(demo_base_path()), None, "wise-demo", None),
        ("org/base", "c" * 40, "org/base", "c" * 40),
        ("", None, "unnamed", None),
    ):
        model.config._name_or_path, model.config._commit_hash = noted, commit
        base = wisecli.Base.of(model, tokenizer)
        assert (base.name, base.revision) == (name, revision)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "kind", "match"),
    [
        (lambda m, t, s: wisecli.edit(m, EDITS), UsageError, "its tokenizer, not a list"),
        (lambda m, t, s: wisecli.edit(m), UsageError, "its tokenizer"),
        (lambda m, t, s: wisecli.edit("org/base", t, EDITS), UsageError, "no causal language model"),
        (lambda m, t, s: wisecli.edit(m.model, t, EDITS), UsageError, "no causal language model"),
        (lambda m, t, s: wisecli.edit(m, t, 7), UsageError, "holds no edits"),
        (lambda m, t, s: wisecli.edit(m, t, []), InputError, "no edits"),
        (lambda m, t, s: wisecli.edit(m, t, "missing.jsonl"), InputError, "missing"),
        (lambda m, t, s: wisecli.edit(m, t, EDITS, steps=3), UsageError, "steps"),
        (lambda m, t, s: wisecli.edit(m, t, EDITS, shards="two"), UsageError, "'str'"),
        (lambda m, t, s: wisecli.edit(m, t, EDITS, shards=9), UsageError, "9 shards"),
        (lambda m, t, s: wisecli.edit(m, t, EDITS, append=True), UsageError, "append"),
        (lambda m, t, s: wisecli.edit(m, t, EDITS, out=__file__), OutputError, "Cannot write"),
        (lambda m, t, s: wisecli.merge(m, t, "missing"), InputError, "missing"),
        (lambda m, t, s: wisecli.merge(m, t, s, method="mean"), UsageError, "mean"),
        (lambda m, t, s: wisecli.merge(m, t, s, scope="huge"), UsageError, "huge"),
        (lambda m, t, s: wisecli.merge(m, t, s, how=1), UsageError, "how"),
        (lambda m, t, s: wisecli.evaluate(m, t, EDITS, "missing.safetensors"), InputError, "does not exist"),
        (lambda m, t, s: wisecli.load_side_memory("missing.safetensors"), InputError, "does not exist"),
        (lambda m, t, s: wisecli.load_side_memory(s), InputError, "not merged yet"),
    ],
)
def test_what_cannot_be_done_says_so(plain: Any, learned: Any, call: Any, kind: type[WiseError], match: str) -> None:
    before = state_of(plain[0])
    with pytest.raises(kind, match=match) as e:
        call(*plain, learned[1])
    assert e.value.hint or kind is InputError
    assert same(state_of(plain[0]), before)


def test_a_model_that_carries_a_side_memory_is_no_base(plain: Any, learned: Any, tmp_path: Path) -> None:
    with wisecli.attach(plain[0], learned[0]) as attached:
        for call in (
            lambda: wisecli.edit(*plain, EDITS),
            lambda: wisecli.merge(*plain, learned[1]),
            lambda: wisecli.evaluate(*plain, EDITS),
            lambda: wisecli.fold(*plain, learned[0], tmp_path / "folded"),
        ):
            with pytest.raises(UsageError, match="carries a side memory"):
                call()
        assert attached.last is None
    assert not carries_side_memory(plain[0])


def test_a_model_made_in_inference_mode_is_refused(tokenizer: Any) -> None:
    with torch.inference_mode():
        model = build_model("llama", len(tokenizer))
    with pytest.raises(ModelError, match="inference_mode"):
        wisecli.edit(model, tokenizer, EDITS)


# -- the example -------------------------------------------------------------------------------------------------------


def test_the_example_runs(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = functools.partial(wisecli.edit, contexts=0, max_steps=5)
    monkeypatch.setattr(wisecli, "edit", quick, raising=False)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--model", str(tiny_model_dir), "--out", str(tmp_path)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    out = capsys.readouterr().out
    for said in ("learned 3 of 3", "before", "attached", "after", "Loc near", "folded into"):
        assert said in out, said
    assert (tmp_path / "sm.safetensors").exists()
    assert (tmp_path / "folded" / "wise_fold.json").exists()
