"""Folding: a checkpoint that is the base with W + delta, what rounding takes, and what is refused."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KINDS
from test_routing import GREEDY, PROMPTS, folded, left_padded, untouched
from torch import Tensor

import wisecli
from wisecli.cli.app import main
from wisecli.errors import BaseMismatch, ModelError, OutputError, UsageError
from wisecli.folding import DTYPES, MANIFEST, MOST_LOST, check_fold, loss_of, share_of_rank
from wisecli.memory.bits import SparseDelta
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base, load_base
from wisecli.models.site import find_site
from wisecli.routing.attach import attach

Made = Callable[..., tuple[Base, SideMemory]]


@pytest.fixture(scope="module")
def made(tiny_model: Any, tokenizer: Any, make_side_memory: Any) -> Made:
    """`made(kind, deltas)`: a tiny base and a side memory of two edits for it."""

    def make(kind: str = "llama", deltas: list[Tensor] | None = None) -> tuple[Base, SideMemory]:
        model = tiny_model(kind)
        where = list(range(len(deltas))) if deltas else None
        sm = make_side_memory(model, PROMPTS[: len(deltas) if deltas else 2], deltas=deltas, memory_of=where)
        if deltas is not None:
            sm = replace(sm, memories=tuple(replace(m, epsilon={"key": 0.9}) for m in sm.memories))
        return Base(model, tokenizer, "tiny"), sm

    return make


@pytest.fixture
def on_disk(tiny_model_dir: Path, make_side_memory: Any, tmp_path: Path) -> tuple[Path, SideMemory]:
    """A side memory's file, of a base that can be loaded."""
    base = load_base(str(tiny_model_dir), device="cpu")
    sm = make_side_memory(base.model, PROMPTS[:2])
    sm = replace(sm, base={**sm.base, "name": str(tiny_model_dir)})
    sm.save(tmp_path / "sm.safetensors")
    return tmp_path / "sm.safetensors", sm


def reloaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# -- the checkpoint ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_fold_in_float32_is_the_base_with_the_sum_bit_for_bit(
    made: Made, encoder: Any, kind: str, tmp_path: Path
) -> None:
    base, sm = made(kind)
    model, delta = base.model, sm.memories[0].delta.dense()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = model.config.to_dict()
    ids, mask = left_padded(encoder)
    wisecli.fold(base, sm, tmp_path / "folded")
    assert untouched(model)
    assert model.config.to_dict() == config
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    back = reloaded(tmp_path / "folded")
    key = f"{sm.site.path}.weight"
    want = {**before, key: before[key] + (delta.T if sm.site.conv1d else delta)}
    assert back.state_dict().keys() == want.keys()
    assert all(torch.equal(v, want[k]) for k, v in back.state_dict().items())
    with folded(model, sm.site, delta):
        logits = model(ids, attention_mask=mask).logits
    assert torch.equal(back(ids, attention_mask=mask).logits, logits)
    with attach(model, sm) as on, on.override([0]):  # the same answers as with a router that is always open
        routed = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(back.generate(ids, attention_mask=mask, **GREEDY), routed)


@pytest.mark.parametrize(("dtype", "wanted"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_half_precision_casts_the_sum_once(made: Made, dtype: str, wanted: torch.dtype, tmp_path: Path) -> None:
    base, sm = made("gpt2")
    result = wisecli.fold(base, sm, tmp_path / "folded", dtype=dtype)
    back, key = reloaded(tmp_path / "folded"), f"{sm.site.path}.weight"
    assert back.dtype == wanted
    assert back.lm_head.weight.data_ptr() == back.transformer.wte.weight.data_ptr()
    for name, w in base.model.state_dict().items():
        full = w + sm.memories[0].delta.dense().T if name == key else w
        assert torch.equal(back.state_dict()[name], full.to(wanted)), name
    left = back.state_dict()[key].double() - base.model.state_dict()[key].to(wanted).double()
    d = sm.memories[0].delta.dense().T.double()
    assert result.loss.error == pytest.approx(float((left - d).norm() / d.norm()), rel=1e-9)
    assert result.loss.vanished == float((left[d != 0] == 0).double().mean())


def test_auto_is_the_dtype_of_the_base(made: Made, tiny_model: Any, tmp_path: Path) -> None:
    shared, sm = made()
    base = Base(tiny_model("llama", fresh=True).to(torch.bfloat16), shared.tokenizer, "tiny")
    assert wisecli.fold(base, sm, tmp_path / "a", dtype="auto").dtype == "bfloat16"
    assert wisecli.fold(base, sm, tmp_path / "b").dtype == "float32"
    assert base.model.dtype == torch.bfloat16
    assert reloaded(tmp_path / "a").dtype == torch.bfloat16
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("sd", [1e-5, 1e-4, 1e-3, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_is_that_of_the_whole_matrix_at_once(sd: float, dtype: str) -> None:
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(300, 700, generator=g) * 0.02  # several blocks, the last one shorter
    delta = torch.where(torch.rand(300, 700, generator=g) < 0.2, torch.randn(300, 700, generator=g) * sd, 0.0)
    cast = DTYPES[dtype]
    left = (weight + delta).to(cast).double() - weight.to(cast).double()
    found = loss_of(weight.T.contiguous().T, SparseDelta.pack(delta), cast)
    assert found.error == pytest.approx(float((left - delta).norm() / delta.double().norm()), rel=1e-9)
    assert found.vanished == pytest.approx(float((left[delta != 0] == 0).double().mean()), rel=1e-12)


def test_a_dtype_that_the_matrix_does_not_fit_has_no_loss(made: Made, tiny_model: Any, tmp_path: Path) -> None:
    shared, sm = made()
    model = tiny_model("llama", fresh=True)
    sm.site.module(model).weight[0, 0] = 1e6
    result = wisecli.fold(Base(model, shared.tokenizer, "large"), sm, tmp_path / "folded", allow_other_base=True)
    assert list(result.losses) == ["float32", "bfloat16"]
    assert "| float16 |" not in (tmp_path / "folded" / "README.md").read_text()


def test_nothing_is_lost_of_an_empty_delta() -> None:
    found = loss_of(torch.randn(8, 16), SparseDelta.pack(torch.zeros(8, 16)), torch.bfloat16)
    assert (found.error, found.vanished) == (0.0, 0.0)


def test_the_memory_asked_for_is_folded(made: Made, random_delta: Any, tmp_path: Path) -> None:
    site = find_site(made()[0].model)
    deltas = [random_delta((site.d_out, site.d_in), seed=s) for s in (1, 2)]
    base, sm = made(deltas=deltas)
    with pytest.raises(UsageError, match="2 memories") as e:
        wisecli.fold(base, sm, tmp_path / "folded")
    assert "--memory 0 to 1" in str(e.value.hint)
    for wrong in (2, -1):
        with pytest.raises(UsageError, match=f"no memory {wrong}"):
            wisecli.fold(base, sm, tmp_path / "folded", memory=wrong)
    assert not (tmp_path / "folded").exists()
    result = wisecli.fold(base, sm, tmp_path / "folded", memory=1)
    weight = site.weight(base.model)
    assert torch.equal(site.weight(reloaded(tmp_path / "folded")), weight + sm.memories[1].delta.dense())
    assert (result.memory, result.edits) == (1, ("e1",))
    card = (tmp_path / "folded" / "README.md").read_text()
    assert PROMPTS[1] in card
    assert f"`{PROMPTS[0]}`" not in card


def test_the_folder_says_what_it_is(made: Made, tmp_path: Path) -> None:
    base, sm = made()
    sm = replace(sm, base={**sm.base, "name": "org/base", "revision": "c" * 40})
    result = wisecli.fold(base, sm, tmp_path / "folded", dtype="bfloat16")
    manifest = json.loads((tmp_path / "folded" / MANIFEST).read_text())
    assert manifest["base"] == dict(sm.base)
    assert manifest["side_memory"] == sm.digest
    assert manifest["edits"] == ["e0", "e1"]
    assert manifest["losses"]["bfloat16"]["error"] == result.loss.error
    assert {*manifest["files"], MANIFEST} == {p.name for p in (tmp_path / "folded").iterdir()}
    card = (tmp_path / "folded" / "README.md").read_text()
    for said in ("always on", "org/base", "c" * 40, f"{result.loss.error:.2g}", PROMPTS[0], sm.digest):
        assert said in card
    assert re.search(r"^base_model: org/base$", card, re.MULTILINE)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_bases_that_cannot_be_folded_into_are_refused(made: Made, tiny_model: Any, tmp_path: Path) -> None:
    base, sm = made()
    out = tmp_path / "folded"
    with pytest.raises(BaseMismatch):
        wisecli.fold(Base(tiny_model("llama", seed=7), base.tokenizer, "other"), sm, out)
    tied = tiny_model("llama", fresh=True)
    tied.model.layers[1].mlp.down_proj.weight = tied.model.layers[2].mlp.down_proj.weight
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.weight"):
        wisecli.fold(Base(tied, base.tokenizer, "tied"), sm, out)
    packed = tiny_model("llama", fresh=True)
    packed.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ModelError, match="quantised"):
        wisecli.fold(Base(packed, base.tokenizer, "packed"), sm, out)
    large = tiny_model("llama", fresh=True)
    large.lm_head.weight[0, 0] = 1e6
    with pytest.raises(ModelError, match="do not fit"):
        wisecli.fold(Base(large, base.tokenizer, "large"), sm, out, dtype="float16")
    with pytest.raises(UsageError, match="int8"):
        wisecli.fold(base, sm, out, dtype="int8")
    assert not list(tmp_path.iterdir())


def test_an_offloaded_base_is_refused_and_a_spread_one_is_not(on_disk: tuple[Path, SideMemory], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    _, sm = on_disk
    away = load_base(sm.base["name"], device="cpu", offload_below=2)
    with pytest.raises(ModelError, match="offloaded"):
        wisecli.fold(away, sm, tmp_path / "folded")
    spread, plain = (load_base(sm.base["name"], **how) for how in ({"device_map": "auto"}, {"device": "cpu"}))
    for name, base in (("a", spread), ("b", plain)):
        wisecli.fold(base, sm, tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_withdrawn_edits_are_not_brought_back(made: Made, tmp_path: Path) -> None:
    _, sm = made()
    gone = sm.withdrawn(["e1"])
    with pytest.raises(UsageError, match="e1: withdrawn") as e:
        check_fold(gone, tmp_path / "folded")
    assert "--rebuild" in str(e.value.hint)
    rebuilt = [replace(e, details={**e.details, "steps": 0}) if e.id == "e1" else e for e in gone.edits]
    assert check_fold(replace(gone, edits=tuple(rebuilt)), tmp_path / "folded") == 0


# -- the folder --------------------------------------------------------------------------------------------------------


def test_a_generation_config_that_saving_would_refuse_is_written_as_it_is(made: Made, tmp_path: Path) -> None:
    base, side_memory = made("llama")
    own = base.model.generation_config
    base.model.generation_config = copy.deepcopy(own)
    base.model.generation_config.temperature = 0.3  # without sampling: transformers loads it and will not save it
    try:
        wisecli.fold(base, side_memory, tmp_path / "folded")
        assert base.model.generation_config.temperature == 0.3
    finally:
        base.model.generation_config = own
    written = json.loads((tmp_path / "folded" / "generation_config.json").read_text(encoding="utf-8"))
    assert written["temperature"] == 0.3
    assert written["pad_token_id"] == own.pad_token_id


def test_a_fold_is_replaced_only_with_force_and_wholly(made: Made, tmp_path: Path) -> None:
    base, sm = made()
    out = tmp_path / "folded"
    wisecli.fold(base, sm, out)
    first = contents(out)
    with pytest.raises(OutputError, match="already holds a fold"):
        wisecli.fold(base, sm, out)
    wisecli.fold(base, sm, out, dtype="float16", force=True)
    assert contents(out) != first
    wisecli.fold(base, sm, out, force=True)
    assert contents(out) == first  # the same input gives the same bytes
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        wisecli.fold(base, sm, out, force=True)
    assert contents(out) == {**first, "notes.txt": b"mine"}
    with pytest.raises(OutputError, match="is a file"):
        wisecli.fold(base, sm, out / "notes.txt", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["folded"]


def test_a_fold_that_fails_leaves_what_was_there(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, sm = made()
    out = tmp_path / "folded"

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(type(base.tokenizer), "save_pretrained", full)
        with pytest.raises(OutputError, match="No space left"):
            wisecli.fold(base, sm, out)
    assert not list(tmp_path.iterdir())
    wisecli.fold(base, sm, out)
    first = contents(out)
    with monkeypatch.context() as patched:
        patched.setattr(type(base.tokenizer), "save_pretrained", full)
        with pytest.raises(OutputError, match="No space left"):
            wisecli.fold(base, sm, out, dtype="float16", force=True)
    assert contents(out) == first
    assert [p.name for p in tmp_path.iterdir()] == ["folded"]


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_what_the_library_does(
    on_disk: tuple[Path, SideMemory], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, sm = on_disk
    kept = contents(Path(sm.base["name"]))
    assert main(["fold", "-s", str(file), "-o", str(tmp_path / "a"), "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert (document["dtype"], document["memory"], document["edits"]) == ("float32", 0, ["e0", "e1"])
    assert main(["fold", "-s", str(file), "-o", str(tmp_path / "b"), "-q"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'b'}\n"
    wisecli.fold(load_base(sm.base["name"], device="cpu"), sm, tmp_path / "c")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    assert contents(Path(sm.base["name"])) == kept
    assert main(["fold", "-s", str(file), "-o", str(tmp_path / "a")]) == 1
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize("sd", [1e-4, 0.5])
def test_the_command_warns_of_a_delta_that_rounding_takes(
    on_disk: tuple[Path, SideMemory], sd: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, sm = on_disk
    delta = torch.randn(sm.memories[0].delta.shape, generator=torch.Generator().manual_seed(1)) * sd
    replace(sm, memories=(replace(sm.memories[0], delta=SparseDelta.pack(delta)),)).save(file)
    assert main(["fold", "-s", str(file), "-o", str(tmp_path / "folded"), "--dtype", "bfloat16"]) == 0
    out, err = capsys.readouterr()
    assert ("--dtype float32" in err) == (sd < 0.1)
    assert "always on" in " ".join(out.split())
    found = re.search(r"bfloat16, as written\s+│\s+([\d.e-]+)", out)
    assert found is not None
    assert (float(found[1]) > MOST_LOST) == (sd < 0.1)


def test_a_lora_is_refused_with_what_it_would_hold(
    on_disk: tuple[Path, SideMemory], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, sm = on_disk
    small = torch.randn(64, 160, generator=torch.Generator().manual_seed(2))
    replace(sm, memories=(replace(sm.memories[0], delta=SparseDelta.pack(small)),)).save(file)
    assert main(["fold", "-s", str(file), "-o", str(tmp_path / "folded"), "--lora"]) == 2
    err = capsys.readouterr().err
    assert "LoRA" in err
    assert "100%" in err  # rank 64 of a matrix with 64 rows
    assert not (tmp_path / "folded").exists()
    state = torch.get_rng_state()
    values = torch.linalg.svdvals(small.double()).square()
    for rank in (4, 16, 32):
        exact = float(values[:rank].sum() / values.sum())
        assert exact - 0.02 <= share_of_rank(small, rank) <= exact + 1e-5
    assert torch.equal(torch.get_rng_state(), state)
