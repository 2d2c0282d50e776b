"""What a run is said to take beforehand: sums by hand, and what a base without weights tells of itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FFN, KINDS, LAYERS, WIDTH, few_pool_prompts
from test_lifelong import records

from wisecli.cli.app import main
from wisecli.editing import footprint
from wisecli.editing.config import EditConfig
from wisecli.editing.footprint import Footprint, predict
from wisecli.models.base import outline
from wisecli.models.site import find_site, likely_site

CPU = torch.device("cpu")


def told(base: Any, *, n: int = 8, dtype: torch.dtype = torch.float32, device: torch.device = CPU, **more: Any) -> Any:
    config = EditConfig(**{k: more.pop(k) for k in ("rewording", "shards", "shards_at_once", "rows") if k in more})
    return predict(base, records(n), config, dtype=dtype, device=device, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_without_weights_tells_the_site_that_will_be_found(
    tiny_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, kind: str
) -> None:
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    bare = outline(str(tmp_path)).model
    assert all(p.is_meta for p in bare.parameters())
    assert likely_site(bare) == find_site(model)
    assert likely_site(bare, 1) == find_site(model, 1)


def test_the_parts_are_what_they_say(tiny_model_dir: Path, tiny_model: Callable[..., Any]) -> None:
    base = outline(str(tiny_model_dir))
    numbers = tiny_model("llama").num_parameters()
    whole = told(base)
    assert whole.base == 4 * numbers
    assert whole.delta == 7 * 4 * FFN * WIDTH
    assert whole.total == sum(vars(whole).values())
    assert told(base, dtype=torch.bfloat16).base == 2 * numbers
    assert told(base, n=16).captured > whole.captured > told(base, shards=4).captured
    assert told(base, rewording=0.0).captured < whole.captured
    assert told(base, rows=4).step < whole.step
    apart, several = told(base, shards=4), told(base, shards=4, shards_at_once=3)
    assert several.delta == 3 * apart.delta
    assert several.captured > apart.captured
    assert several.step > apart.step
    packed = told(base, quantize=4)
    linear = LAYERS * (3 * FFN * WIDTH + 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2)
    assert packed.base == 4 * (numbers - linear) + linear // 2 + linear // 16


def test_a_group_of_fewer_shards_with_longer_texts_hides_no_other(tiny_model_dir: Path) -> None:
    base, config = outline(str(tiny_model_dir)), EditConfig(rewording=0.0, contexts=0, shards=3, shards_at_once=2)
    some = [*records(4), *(replace(r, prompt=" ".join([r.prompt] * 3)) for r in records(2))]
    found = predict(base, some, config, dtype=torch.float32, device=torch.device("cpu"))
    assert found.delta == 2 * 7 * 4 * FFN * WIDTH


def test_with_the_lower_layers_off_the_device_both_sides_are_told(tiny_model_dir: Path) -> None:
    base, there = outline(str(tiny_model_dir)), torch.device("cuda")
    whole, part = told(base, device=there), told(base, device=there, lower_off=True)
    below = 2 * sum(p.numel() for p in base.model.model.layers[0].parameters()) * 4
    assert whole.base - part.base == below == part.host - whole.host
    assert (part.delta, part.captured, part.step) == (whole.delta, whole.captured, whole.step)


def test_edit_says_it_and_warns_where_there_is_less(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few_pool_prompts(monkeypatch)
    edits = tmp_path / "edits.jsonl"
    edits.write_text("".join(json.dumps(r.to_json()) + "\n" for r in records(4)))
    monkeypatch.setattr(footprint, "room", lambda device: 1 << 20)
    argv = ["edit", str(edits), "--model", str(tiny_model_dir), "--out", str(tmp_path / "out"), "--max-steps", "2"]
    assert main([*argv, "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "memory: about" in out
    assert "--offload-lower, --dtype bfloat16 or --quantize 4bit" in " ".join(err.split())
    noted = [json.loads(x) for x in (tmp_path / "out" / "journal.jsonl").read_text().splitlines()]
    (memory,) = [e for e in noted if e["event"] == "memory"]
    assert memory["predicted"] > 0
    assert memory["resident_bytes"] > 0


def test_a_total_is_the_devices_alone() -> None:
    one = Footprint(1, 2, 3, 4, 5)
    assert one.total == replace(one, host=7).total == 15


def test_a_container_has_no_more_than_it_was_granted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, limit = torch.device("cpu"), tmp_path / "memory.max"
    monkeypatch.setattr(footprint, "_LIMITS", (limit,))
    machine = footprint.room(cpu)
    for said, room in (("max", machine), ("", machine), (str(machine * 8), machine), (f"{1 << 20}\n", 1 << 20)):
        limit.write_text(said)
        assert footprint.room(cpu) == room
