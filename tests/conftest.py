"""Tiny random models of six architectures, a local tokenizer, and side memories for them. Nothing is downloaded.

Fixtures that give a factory: `tiny_model(kind)` (one shared instance per kind; leave it as you found it, or ask for
`fresh=True`), `random_delta(model, site)`, `make_side_memory(model, site, prompts)`.
"""

from __future__ import annotations

import os
import shutil
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

KINDS = ("llama", "gpt2", "gpt_neox", "qwen2", "opt", "gemma2")
"""llama and qwen2: rotary, gated; gpt2: Conv1D, absolute positions; gpt_neox: parallel residual; opt: offset positions
from the mask; gemma2: a norm behind the projection (not additive), sliding windows, capped logits."""

SITES = {
    "llama": "model.layers.2.mlp.down_proj",
    "gpt2": "transformer.h.2.mlp.c_proj",
    "gpt_neox": "gpt_neox.layers.2.mlp.dense_4h_to_h",
    "qwen2": "model.layers.2.mlp.down_proj",
    "opt": "model.decoder.layers.2.fc2",
    "gemma2": "model.layers.2.mlp.down_proj",
}
WIDTH, FFN, LAYERS = 64, 160, 4
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|system|>' }}\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>\n{% endif %}"
)
_CORPUS = "hello world the capital of France is Paris what who where when"


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    os.environ["WISE_CACHE"] = tempfile.mkdtemp(prefix="wise-cache-")


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["WISE_CACHE"], ignore_errors=True)


def build_tokenizer() -> Any:
    """Byte-level BPE that puts <s> before every text, as Llama's does; ids: pad 0, bos 1, eos 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>", "<|user|>", "<|bot|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([_CORPUS] * 5, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def _config(kind: str, vocab: int) -> Any:
    from transformers import AutoConfig

    ids = {"vocab_size": vocab, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    usual = {
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    }
    sizes: dict[str, dict[str, Any]] = {
        "llama": {**usual, "num_key_value_heads": 2},
        "qwen2": {**usual, "num_key_value_heads": 2},
        "gpt_neox": usual,
        "gpt2": {"n_embd": WIDTH, "n_inner": FFN, "n_layer": LAYERS, "n_head": 4, "n_positions": 256},
        "opt": {
            "hidden_size": WIDTH,
            "word_embed_proj_dim": WIDTH,
            "ffn_dim": FFN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
        },
        "gemma2": {
            **usual,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "tie_word_embeddings": False,  # else its scaled embeddings make every answer repeat the last token
        },
        "mixtral": {**usual, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    }
    return AutoConfig.for_model(kind, **sizes[kind], **ids)


def build_model(kind: str, vocab: int, seed: int = 0) -> Any:
    """A random model with weights large enough that a changed activation shows in the logits."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_config(kind, vocab)).float().eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
        elif name.endswith("bias"):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None  # runs to the asked length
    return model


def few_pool_prompts(patched: pytest.MonkeyPatch, prompts: int = 48, facts: int = 8) -> None:
    """A small pool is enough for a tiny model, and many times as quick."""
    # Imported before anything is patched: a module that is first imported later would keep the patched function.
    from wisecli.data import pool
    from wisecli.editing import margins, merge, rewording

    ordinary, known = pool.ordinary_prompts()[:prompts], pool.pool_facts()[:facts]
    for module in (pool, rewording):
        patched.setattr(module, "pool_facts", lambda: known)
    for module in (pool, merge, margins):
        patched.setattr(module, "ordinary_prompts", lambda: ordinary)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Folder of a tiny random Llama with its tokenizer, as a user would have one."""
    path = tmp_path_factory.mktemp("tiny") / "base"
    build_model("llama", len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_model(tokenizer: Any) -> Callable[..., Any]:
    """`tiny_model(kind, fresh=False, seed=0)`."""
    shared: dict[tuple[str, int], Any] = {}

    def make(kind: str, *, fresh: bool = False, seed: int = 0) -> Any:
        if fresh:
            return build_model(kind, len(tokenizer), seed)
        if (kind, seed) not in shared:
            shared[kind, seed] = build_model(kind, len(tokenizer), seed)
        return shared[kind, seed]

    return make


@pytest.fixture(scope="session")
def encoder(tokenizer: Any) -> Any:
    from wisecli.models.prompts import PromptEncoder

    return PromptEncoder(tokenizer)


def _random_delta(shape: tuple[int, int], *, density: float = 0.2, scale: float = 0.5, seed: int = 1) -> Tensor:
    from wisecli.memory.bits import draw_mask

    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return torch.where(draw_mask(shape, density, seed), values, 0.0)


@pytest.fixture(scope="session")
def random_delta() -> Callable[..., Tensor]:
    """`random_delta(shape, density=.2, scale=.5, seed=1)`: fp32 [D, F], zero outside a seeded mask."""
    return _random_delta


@pytest.fixture(scope="session")
def make_side_memory(encoder: Any) -> Callable[..., Any]:
    """`make_side_memory(model, prompts, ...)`: one edit per prompt, its key the prompt's real activation.

    Args of the factory: `site` (auto when None), `deltas` (one random one when None), `memory_of` (memory of each
    edit), `epsilon` (per memory, a dict per router), `encoder` (to encode with another).
    """
    from wisecli.data.pool import ALONE
    from wisecli.memory.bits import SparseDelta
    from wisecli.memory.keys import KeySpace, KeyStore
    from wisecli.memory.side_memory import EditEntry, Memory, SideMemory
    from wisecli.models.base import fingerprint
    from wisecli.models.site import find_site
    from wisecli.models.upper import UpperModel

    def make(
        model: Any,
        prompts: Sequence[str],
        *,
        site: Any = None,
        deltas: Sequence[Tensor] | None = None,
        memory_of: Sequence[int] | None = None,
        epsilon: Sequence[dict[str, float]] | None = None,
        router: str = "key",
    ) -> Any:
        site = site or find_site(model)
        deltas = deltas or [_random_delta((site.d_out, site.d_in))]
        memory_of = memory_of or [0] * len(prompts)
        epsilon = epsilon or [{"key": 0.9, "activation": 0.0}] * len(deltas)
        captured = UpperModel(model, site, encoder).capture([encoder.prompt(p) for p in prompts])
        background = torch.cat([r.stream for r in captured]).float()
        space = KeySpace.fit(background, torch.full((len(background),), ALONE), 16)
        keys = space(torch.stack([r.entry for r in captured]))
        return SideMemory(
            base={
                "name": "tiny",
                "revision": None,
                "model_type": model.config.model_type,
                "fingerprint": fingerprint(site.module(model).weight.detach()),
            },
            site=site,
            rule=encoder.rule,
            memories=tuple(
                Memory(SparseDelta.pack(d), e, tuple(f"e{i}" for i, m in enumerate(memory_of) if m == j), {"seed": j})
                for j, (d, e) in enumerate(zip(deltas, epsilon, strict=True))
            ),
            keys=KeyStore.of(space, keys, torch.arange(len(prompts)), torch.zeros(len(prompts))),
            edits=tuple(
                EditEntry(f"e{i}", m, True, p, " Paris", {"note": i})
                for i, (p, m) in enumerate(zip(prompts, memory_of, strict=True))
            ),
            router=router,
            config={"layer": site.layer},
            statistics={"edits": len(prompts)},
            versions={"wisecli": "test"},
        )

    return make
