"""A base in 4 or 8 bits by bitsandbytes: the delta beside it is fp32, and its base is still recognised."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import few_pool_prompts
from test_lifelong import records

from wisecli.cli.app import main
from wisecli.errors import BaseMismatch, RoutingError, UsageError
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import fingerprint, load_base, matrix_of
from wisecli.models.captured import StackedRows
from wisecli.models.prompts import PromptEncoder, Row
from wisecli.models.site import find_site
from wisecli.models.upper import UpperModel
from wisecli.routing.attach import attach

FORMS = ("4bit", "8bit")
each_form = pytest.mark.parametrize("form", FORMS)


def test_without_bitsandbytes_it_is_said(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match="needs bitsandbytes") as refused:
        load_base(str(tiny_model_dir), device="cpu", quantize="4bit")
    assert "wisecli[bnb]" in str(refused.value.hint)


@pytest.fixture(scope="module")
def packed(tiny_model_dir: Path) -> Callable[[str], Any]:
    """The tiny base in a form, loaded once."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which pip install 'wisecli[bnb]' brings")
    loaded: dict[str, Any] = {}

    def load(form: str) -> Any:
        if form not in loaded:
            loaded[form] = load_base(str(tiny_model_dir), device="cpu", quantize=form)
        return loaded[form]

    return load


@each_form
def test_the_site_is_found_and_the_base_is_recognised(packed: Any, tiny_model_dir: Path, form: str) -> None:
    whole, base = load_base(str(tiny_model_dir), device="cpu"), packed(form)
    assert base.quantization["bits"] == int(form[0])
    site = find_site(base.model)
    assert site == find_site(whole.model)
    assert not site.module(base.model).weight.is_floating_point()
    assert fingerprint(matrix_of(base.model, site)) == fingerprint(matrix_of(whole.model, site))
    w, near = site.weight(whole.model), site.weight(base.model)
    assert 0 < float((near - w).norm() / w.norm()) < (0.3 if form == "4bit" else 0.02)


@each_form
def test_replayed_logits_and_gradient_are_those_of_the_same_weights_unpacked(
    packed: Any, tiny_model: Callable[..., Any], encoder: PromptEncoder, form: str
) -> None:
    model, plain = packed(form).model, tiny_model("llama", fresh=True)
    with torch.no_grad():
        for name, m in plain.named_modules():
            if ".layers." in name and type(m).__name__ == "Linear":
                other = model.get_submodule(name)
                m.weight.copy_(other(torch.eye(m.in_features)).T)
    site, found = find_site(model), []
    rows = [Row((1, 7, 9, 11, 13), (20, 21)), Row((1, 8, 30), (31,))]
    for one in (model, plain):
        upper = UpperModel(one, site, encoder)
        delta = torch.zeros(site.d_out, site.d_in, requires_grad=True)
        stacked = StackedRows.of(upper.capture(rows))
        logits = upper.logits(stacked, delta)
        torch.nn.functional.cross_entropy(logits.float(), stacked.targets).backward()
        found.append((logits.detach(), delta.grad))
    tolerance = 1e-4 if form == "4bit" else 0.1  # 8 bits round the activations as well
    for ours, plainly in zip(*found, strict=True):
        assert plainly.abs().max() > 0
        assert (ours - plainly).abs().max() <= tolerance * plainly.abs().max()


@each_form
def test_a_side_memory_goes_from_the_whole_base_to_the_packed_one_and_back(
    packed: Any, tiny_model_dir: Path, make_side_memory: Callable[..., Any], tokenizer: Any, form: str
) -> None:
    whole = load_base(str(tiny_model_dir), device="cpu").model
    prompts = ["hello world", "the capital of France is", "who"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    model = packed(form).model
    sm = make_side_memory(whole, prompts[:1])
    before = model(**batch).logits
    with attach(model, sm) as attached:
        after = model(**batch).logits
        assert attached.deltas.dtype == torch.float32
        routed = attached.last.memory >= 0  # type: ignore[union-attr]
    assert routed.tolist() == [True, False, False]
    assert torch.equal(after[~routed], before[~routed])
    assert not torch.equal(after[routed], before[routed])


def learned(base: Path, out: Path, *more: str) -> Path:
    edits = out.parent / "edits.jsonl"
    edits.write_text("".join(json.dumps(r.to_json()) + "\n" for r in records(4)))
    learn = ["edit", str(edits), "--model", str(base), "--out", str(out), "--max-steps", "8", "--contexts", "1"]
    assert main([*learn, "--device", "cpu", "-q", *more]) == 0
    assert main(["merge", str(out), "-o", str(out / "sm.safetensors"), "--device", "cpu", "-q"]) == 0
    return out / "sm.safetensors"


def test_the_job_in_4_bits(
    packed: Any,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Edited in 4 bits, the later commands load it so again; the side memory goes onto the whole base, too."""
    few_pool_prompts(monkeypatch)
    whole = load_base(str(tiny_model_dir), device="cpu").model
    file = learned(tiny_model_dir, tmp_path / "packed", "--quantize", "4bit")
    sm = SideMemory.load(file)
    assert sm.base["quantization"] == {"method": "bitsandbytes", "bits": 4, "type": "nf4"}
    assert sm.base["fingerprint"] == fingerprint(sm.site.module(whole).weight.detach())
    capsys.readouterr()
    asked = ["chat", "hello", "-s", str(file), "--max-new-tokens", "3", "--device", "cpu", "--json"]
    said = []
    for more in ([], ["--quantize", "4bit"], ["--quantize", "none"]):
        assert main([*asked, *more]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] == said[1]
    assert main(["verify", str(file), "--no-ask", "--device", "cpu"]) == 0


def test_a_checkpoint_stored_in_4_bits_loads_as_it_is(
    packed: Any, tokenizer: Any, make_side_memory: Callable[..., Any], tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    made = packed("4bit")
    made.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = load_base(str(tmp_path), device="cpu")
    ids = torch.arange(5, 17)[None]
    assert torch.equal(base.model(ids).logits, made.model(ids).logits)
    with pytest.raises(UsageError, match="stored in 4 bits"):
        load_base(str(tmp_path), device="cpu", quantize="8bit")
    of_whole = make_side_memory(tiny_model("llama"), ["hello"])
    with pytest.raises(BaseMismatch, match="packed") as refused:
        attach(base.model, of_whole)
    assert "--allow-other-base" in str(refused.value.hint)
    attach(base.model, of_whole, allow_other_base=True).detach()
    again = SideMemory(**{**vars(of_whole), "base": {"fingerprint": fingerprint(matrix_of(base.model, of_whole.site))}})
    attach(load_base(str(tmp_path), device="cpu").model, again).detach()


def test_an_8_bit_model_whose_rows_depend_on_one_another_is_refused(
    packed: Any, tiny_model_dir: Path, make_side_memory: Callable[..., Any], tiny_model: Callable[..., Any]
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    sm, how = make_side_memory(tiny_model("llama"), ["hello"]), BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=how, device_map={"": "cpu"})
    with pytest.raises(RoutingError, match="depend on one another"):
        attach(model, sm)


def test_packed_layers_are_not_moved(packed: Any, tiny_model_dir: Path) -> None:
    with pytest.raises(UsageError, match="--offload-lower moves whole layers"):
        load_base(str(tiny_model_dir), device="cpu", quantize="4bit", offload_below="auto")
