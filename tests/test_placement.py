"""A base of which only a part is on the device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import few_pool_prompts
from test_lifelong import learned, records

from wisecli.cli.app import main
from wisecli.errors import UsageError
from wisecli.models.base import load_base
from wisecli.models.site import find_site

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
