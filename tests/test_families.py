"""Every causal language model of transformers, tiny and random, is edited end to end, or refused with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import transformers
from conftest import few_pool_prompts
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

DOCUMENT = Path(__file__).parents[1] / "docs" / "architectures.md"
EVERY = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LEAST = 100  # architectures that have to be supported
FAST = ("llama", "gpt2", "gpt_neox", "opt", "qwen2", "gemma2", "mistral", "phi3", "falcon", "gptj", "olmo2")
FAST_MOE = ("deepseek_v3", "mixtral")  # shared experts; fused ones alone
FOUND: dict[str, families.Finding] = {}


@pytest.fixture(autouse=True)
def _small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    few_pool_prompts(monkeypatch)


@pytest.mark.parametrize("model_type", [*FAST, *FAST_MOE])
def test_a_family_is_edited_end_to_end_or_refused_as_the_table_says(
    tokenizer: Any, tmp_path: Path, model_type: str
) -> None:
    found = families.examine(model_type, tokenizer, tmp_path)
    assert not found.unbuilt
    assert bool(found.refused) == (model_type == "mixtral")
    if f"transformers {transformers.__version__}:" in DOCUMENT.read_text(encoding="utf-8"):
        assert families.row(found) in DOCUMENT.read_text(encoding="utf-8").splitlines()


@pytest.mark.families
@pytest.mark.parametrize("model_type", EVERY)
def test_every_family_is_edited_end_to_end_or_refused(tokenizer: Any, tmp_path: Path, model_type: str) -> None:
    found = families.examine(model_type, tokenizer, tmp_path)
    assert "cannot be edited: " not in found.refused  # foreseen, and not merely caught
    FOUND[model_type] = found


@pytest.mark.families
def test_the_table_of_all_families_is_written() -> None:
    assert set(FOUND) == set(EVERY), "an architecture failed, or not all were run: the table stays as it is"
    DOCUMENT.write_text(families.table([FOUND[t] for t in EVERY], transformers.__version__), encoding="utf-8")
    assert sum(bool(f.module) for f in FOUND.values()) >= LEAST
