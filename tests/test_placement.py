"""A base of which only a part is on the device."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import few_pool_prompts
from test_lifelong import learned, records

from wisecli.cli.app import main
from wisecli.errors import UsageError
from wisecli.models.base import fingerprint, load_base, matrix_of
from wisecli.models.site import find_site
from wisecli.routing.attach import attach

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
pytest.importorskip("accelerate", reason="needs accelerate, which pip install 'wisecli[big]' brings")


@pytest.mark.parametrize("layer", [0, 2, -1, "auto"])
def test_the_layers_below_are_off_the_device_and_the_base_is_the_same(tiny_model_dir: Path, layer: int | str) -> None:
    plain = load_base(str(tiny_model_dir), device="cpu")
    part = load_base(str(tiny_model_dir), device="cpu", offload_below=layer)
    site = find_site(plain.model, layer)
    away = {k.split(".")[2] for k, p in part.model.named_parameters() if p.is_meta}
    assert away == {str(i) for i in range(site.layer)}
    ids = torch.arange(5, 13)[None]
    assert torch.equal(part.model(ids).logits, plain.model(ids).logits)
    assert find_site(part.model, layer) == site


def test_editing_and_merging_give_the_same_bytes(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_pool_prompts(monkeypatch)
    edits = tmp_path / "edits.jsonl"
    edits.write_text("".join(json.dumps(r.to_json()) + "\n" for r in records(4)))
    found = []
    for name, more in (("plain", []), ("part", ["--offload-lower"])):
        out = tmp_path / name
        learn = ["edit", str(edits), "--model", str(tiny_model_dir), "--out", str(out), "--max-steps", "6"]
        assert main([*learn, "--contexts", "1", "-q", *more]) == 0
        assert main(["merge", str(out), "-o", str(out / "sm.safetensors"), "-q", *more]) == 0
        found.append(learned(out))
    assert found[0] == found[1]


def test_options_that_do_not_go_together_are_refused(tiny_model_dir: Path) -> None:
    for options, said in (
        ({"device_map": "auto", "offload_below": "auto"}, "goes without --offload-lower"),
        ({"device_map": "sequential"}, "must be auto, not 'sequential'"),
        ({"offload_below": 9}, "There is no layer 9"),
    ):
        with pytest.raises(UsageError, match=said):
            load_base(str(tiny_model_dir), device="cpu", **options)  # type: ignore[arg-type]
    assert load_base(str(tiny_model_dir), device_map="auto").model.device.type in ("cpu", "cuda", "mps")


def test_an_edited_layer_on_the_disk_is_recognised_and_routed(
    tiny_model_dir: Path, make_side_memory: Any, tokenizer: Any
) -> None:
    """Its weight is nowhere at hand: shape, weight and fingerprint come from the module, its work and its file."""
    plain = load_base(str(tiny_model_dir), device="cpu").model
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i == 2 else "cpu" for i in range(4)}
    part = load_base(str(tiny_model_dir), device="cpu", device_map=places).model
    site = find_site(part)
    assert site == find_site(plain)
    assert site.module(part).weight.is_meta
    assert torch.equal(site.weight(part), site.weight(plain))
    assert fingerprint(matrix_of(part, site)) == fingerprint(matrix_of(plain, site))
    prompts = ["hello world", "the capital of France is", "who"]
    sm = make_side_memory(plain, prompts[:1])
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    made = []
    for model in (plain, part):
        with attach(model, sm) as attached:
            made.append(model.generate(**batch, max_new_tokens=4, do_sample=False))
            assert attached.last is not None
            assert attached.last.memory.tolist() == [0, -1, -1]
    assert torch.equal(*made)


def test_what_asks_a_base_takes_it_in_parts(
    tiny_model_dir: Path, tmp_path: Path, make_side_memory: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chat, route and evaluation say the same of a base whose lower layers are away, and of one that is spread."""
    file = tmp_path / "sm.safetensors"
    make_side_memory(load_base(str(tiny_model_dir), device="cpu").model, ["hello", "who"]).save(file)
    common = ["-s", str(file), "--model", str(tiny_model_dir), "--device", "cpu", "--json"]
    (tmp_path / "edits.jsonl").write_text('{"id": "e0", "prompt": "hello", "target": "Paris"}\n')
    for command in (
        ["chat", "hello", "--max-new-tokens", "3"],
        ["route", "hello"],
        ["eval", "-d", str(tmp_path / "edits.jsonl"), "--no-ability"],
    ):
        said = []
        for more in ([], ["--offload-lower"], ["--device-map", "auto"]):
            assert main([*command, *common, *more]) == 0
            found = json.loads(capsys.readouterr().out)
            said.append({k: found[k] for k in ("metrics", "items") if k in found} or found)
        assert said[0] == said[1] == said[2]


@pytest.mark.parametrize("script", ["several_places.py", "quantised.py"])
def test_the_examples_run(
    tiny_model_dir: Path,
    tmp_path: Path,
    script: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [script, "--model", str(tiny_model_dir)]
    if script == "quantised.py":
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which pip install 'wisecli[bnb]' brings")
        few_pool_prompts(monkeypatch)
        argv += ["--edits", "2", "--steps", "4", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    out = capsys.readouterr().out
    assert "same logits: False" not in out
    assert out.count("same logits: True" if script == "several_places.py" else "before:") == (
        3 if "several" in script else 2
    )
