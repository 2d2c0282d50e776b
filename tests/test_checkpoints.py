"""Forms of a checkpoint: safetensors whole and in pieces, pickles, code of its own, quantisers that are not taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SITES

from wisecli.cli.app import main
from wisecli.errors import ModelError
from wisecli.models.base import fingerprint, load_base, matches, matrix_of
from wisecli.models.checkpoint import quantizing, stored_matrix
from wisecli.models.site import find_site


@pytest.fixture
def plain(tiny_model_dir: Path) -> Any:
    return load_base(str(tiny_model_dir), device="cpu").model


@pytest.fixture
def copied(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))


def pickle_of(folder: Path, model: Any, name: str = "pytorch_model.bin") -> None:
    torch.save({k: v.clone() for k, v in model.state_dict().items()}, folder / name)


def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(5, 17)[None]).logits


@pytest.mark.parametrize("size", ["1GB", "40KB"])
def test_safetensors_whole_and_in_pieces_are_the_same_base(
    copied: Path, plain: Any, tokenizer: Any, tmp_path: Path, size: str
) -> None:
    folder = tmp_path / "saved"
    plain.save_pretrained(folder, max_shard_size=size)
    tokenizer.save_pretrained(folder)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (size == "40KB")
    model = load_base(str(folder), device="cpu").model
    assert torch.equal(logits(model), logits(plain))
    site = find_site(model)
    stored = stored_matrix(model, site.path, site.shape(model))
    assert stored is not None
    assert fingerprint(stored) == fingerprint(site.module(plain).weight.detach())


def test_pickles_are_refused_by_name_and_read_when_allowed(copied: Path, plain: Any) -> None:
    (copied / "model.safetensors").unlink()
    pickle_of(copied, plain)
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, a pickle") as refused:
        load_base(str(copied), device="cpu")
    assert "--allow-pickle" in str(refused.value.hint)
    assert torch.equal(logits(load_base(str(copied), device="cpu", allow_pickle=True).model), logits(plain))


def test_a_pickle_that_runs_code_is_not_run(copied: Path, tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    (copied / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Runs()}, copied / "pytorch_model.bin")
    with pytest.raises(ModelError, match="Cannot load"):
        load_base(str(copied), device="cpu", allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_safetensors_go_before_a_pickle(copied: Path, plain: Any, tiny_model: Callable[..., Any]) -> None:
    pickle_of(copied, tiny_model("llama", seed=7))
    for allow in (False, True):
        assert torch.equal(logits(load_base(str(copied), device="cpu", allow_pickle=allow).model), logits(plain))


@pytest.mark.parametrize(("name", "said"), [("model.pt", "no form that transformers reads"), ("model.gguf", "GGUF")])
def test_files_of_other_tools_are_refused_by_name(copied: Path, name: str, said: str) -> None:
    (copied / "model.safetensors").rename(copied / name)
    for allow in (False, True):
        with pytest.raises(ModelError, match=said) as refused:
            load_base(str(copied), device="cpu", allow_pickle=allow)
        assert name in str(refused.value)


def test_code_that_comes_with_a_base_runs_only_when_trusted(copied: Path, tmp_path: Path, plain: Any) -> None:
    config = json.loads((copied / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (copied / "config.json").write_text(json.dumps({**config, "model_type": "own_llama", "auto_map": auto}))
    (copied / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(ModelError, match="needs code of its own") as refused:
        load_base(str(copied), device="cpu")
    assert "--trust-remote-code" in str(refused.value.hint)
    assert not (tmp_path / "ran").exists()
    model = load_base(str(copied), device="cpu", trust_remote_code=True).model
    assert (type(model).__name__, (tmp_path / "ran").exists()) == ("OwnModel", True)
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "torchao"])
def test_other_quantisers_are_refused_by_name(
    copied: Path, method: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    (tmp_path / "edits.jsonl").write_text('{"prompt": "hello", "target": "world"}\n')
    argv = ["edit", str(tmp_path / "edits.jsonl"), "--model", str(copied), "--out", str(tmp_path / "out")]
    assert main([*argv, "--device", "cpu"]) == 1
    err = capsys.readouterr().err
    assert f"quantised by {method}" in err
    assert "Traceback" not in err


def test_a_form_that_nobody_knows_is_a_usage_error(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "hello", "--model", str(tiny_model_dir), "--quantize", "3bit"]) == 2
    assert "4bit, 8bit, none" in capsys.readouterr().err
    assert quantizing(load_base(str(tiny_model_dir), device="cpu").model.config, "none", torch.float32) == {}


def test_a_stored_matrix_is_read_in_the_modules_orientation(
    tiny_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    """GPT-2's file names lack the prefix of the model's body, and its matrix is stored the other way round."""
    body = tiny_model("gpt2")
    body.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_base(str(tmp_path), device="cpu", dtype="bfloat16").model
    site = find_site(model)
    assert site.path == SITES["gpt2"]
    stored = stored_matrix(model, site.path, site.shape(model))
    assert stored is not None
    assert stored.shape == (site.d_in, site.d_out)
    assert matches(matrix_of(model, site), fingerprint(stored))
    (tmp_path / "model.safetensors").unlink()
    assert stored_matrix(model, site.path, site.shape(model)) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_unrouted_rows_are_the_bases_in_every_dtype(
    tiny_model_dir: Path, make_side_memory: Callable[..., Any], tokenizer: Any, dtype: str
) -> None:
    from wisecli.routing.attach import attach

    model = load_base(str(tiny_model_dir), device="cpu", dtype=dtype).model
    prompts = ["hello world", "the capital of France is", "who"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    before = model(**batch).logits
    sm = make_side_memory(model, prompts[:1])
    with attach(model, sm) as attached:
        after = model(**batch).logits
        assert attached.last is not None
        routed = attached.last.memory >= 0
    assert routed.tolist()[0]
    assert not routed.all()
    assert torch.equal(after[~routed], before[~routed])
    assert not torch.equal(after[routed], before[routed])
