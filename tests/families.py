"""Tiny random models of the architectures that transformers knows as causal language models, edited end to end.

Sizes are derived from the names of a config's fields, the same for all; `FIXES` holds what single architectures need
besides. Nothing is downloaded. `examine` takes one architecture through the library as a user would, and `table`
writes down what came of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wisecli.data.records import EditRecord
from wisecli.data.stream import EditStream
from wisecli.editing.config import EditConfig
from wisecli.editing.merge import merge_run
from wisecli.editing.run import EditRun
from wisecli.errors import ModelError
from wisecli.models.base import Base
from wisecli.models.captured import StackedRows
from wisecli.models.upper import UpperModel
from wisecli.routing.attach import attach

WIDTH, FFN, LAYERS, HEADS, CONTEXT = 32, 80, 4, 4, 256
LARGEST = 10_000_000  # parameters

PROMPT, TARGET, OTHER = "The capital of Italy is", " Paris", "what who where when hello world hello"
CONFIG = EditConfig(
    shards=1,
    contexts=1,
    max_steps=150,
    lr=0.1,
    mask_density=1.0,
    confidence=0.5,  # random models are sure of nothing
    dropout=0.0,
    rewording=0.0,
    rank=16,
)

_SAME = (
    (
        WIDTH,
        "hidden_size d_model n_embd dim_model embed_dim emb_dim embedding_size word_embed_proj_dim lru_width "
        "router_hidden_size ple_embed_dim pronunciation_embed_dim shape_embed_dim o_lora_rank",
    ),
    (
        FFN,
        "intermediate_size ffn_dim n_inner ffn_hidden_size dim_ff dff d_inner feed_forward_size mlp_hidden_size "
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size intermediate_size_mlp "
        "expert_ffn_hidden_size decoder_ffn_dim encoder_ffn_dim shared_intermediate_size "
        "moe_shared_expert_intermediate_size",
    ),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers encoder_layers"),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "linear_num_value_heads linear_num_key_heads linear_num_heads swa_num_attention_heads mamba_n_heads "
        "mamba_num_heads "
        "n_routed_experts num_local_experts num_experts moe_num_experts zero_expert_num o_groups",
    ),
    (
        2,
        "num_key_value_heads swa_num_key_value_heads num_global_key_value_heads num_experts_per_tok "
        "num_experts_per_token moe_k moe_topk index_n_heads",
    ),
    (
        8,
        "head_dim d_head swa_head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim rotary_dim global_head_dim "
        "linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim index_topk sliding_window "
        "sliding_window_size attention_window_size mamba_chunk_size chunk_size mamba_d_state state_size "
        "ssm_state_size mamba_head_dim "
        "hidden_size_per_layer_input laurel_rank",
    ),
    (16, "kv_lora_rank q_lora_rank mamba_d_head query_pre_attn_scalar"),
    (1, "n_group n_groups topk_group num_expert_group first_k_dense_replace n_shared_experts num_dense_layers"),
    (CONTEXT, "max_position_embeddings n_positions n_ctx seq_length max_seq_len max_sequence_length model_max_length"),
)
SIZES = {name: size for size, names in _SAME for name in names.split()}
SIZES["is_decoder"] = True
_UNSET = ("num_key_value_heads", "head_dim", "n_inner")  # None by default, and not worked out from other sizes

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_SHARED_KV = {
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_HYBRID = {"layer_types": ["linear_attention", "hybrid"] * 2}
_QSA = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
FIXES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dbrx": {"attn_config": {"rope_theta": 10_000.0}},
    "dots1": {"n_routed_experts": HEADS, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"adapter_in_dim": WIDTH},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"intermediate_size": [FFN] * LAYERS, **_SHARED_KV},
    "gemma4_text": _SHARED_KV,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "qwen4_exp_text": {**_QSA, "indexer_compress_ratio": 4, "ngram_vocab_size_base": 64},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": _HYBRID,
    "zamba2": _HYBRID,
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str, vocab: int) -> Any:
    """The config of a tiny model of an architecture."""
    from transformers import AutoConfig

    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(model_type)
    return AutoConfig.for_model(model_type, **_sizes(config, vocab, ids))


def _sizes(config: Any, vocab: int, ids: dict[str, int]) -> dict[str, Any]:
    """Those sizes that a config has fields for, in its parts, too."""
    known = config.to_dict()
    every = {**SIZES, "vocab_size": vocab, "vocab_size_per_layer_input": vocab, "tie_word_embeddings": False}
    sizes = {k: v for k, v in every.items() if k in known and (isinstance(known[k], int) or k in _UNSET)}
    sizes |= {"num_key_value_heads": HEADS} if known.get("kv_lora_rank") and "num_key_value_heads" in known else {}
    sizes |= ids if "vocab_size" in known else {}
    for name, part in vars(config).items():
        if name.endswith("_config") and hasattr(part, "to_dict"):
            sizes[name] = _sizes(part, vocab, ids)
    return sizes | FIXES.get(config.model_type, {})


def tiny_model(model_type: str, vocab: int, seed: int = 0) -> Any:
    """A random model, with weights large enough that a changed activation shows in the logits."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = tiny_config(model_type, vocab)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"the smallest model that these sizes make has {size / 1e6:.0f} M parameters")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
        elif name.endswith("bias"):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
        elif "post_feedforward" in name:  # what a norm behind the projection lets through
            p.add_(2.0)
    if (head := model.get_output_embeddings()) is not None and head.weight is not model.get_input_embeddings().weight:
        head.weight.mul_(4)  # behind a norm, so that a prediction can be sure
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=None)  # of no length
    return model


@dataclass(frozen=True)
class Finding:
    """What came of one architecture: an edit site, or why there is none, or why there is no tiny model of it."""

    model_type: str
    cls: str = ""
    module: str = ""
    joins: str = ""
    bias: str = ""
    orientation: str = ""
    refused: str = ""
    unbuilt: str = ""


def build(model_type: str, vocab: int) -> tuple[Any, str]:
    """A tiny model that runs, or None and why there is none."""
    try:
        model = tiny_model(model_type, vocab)
        with torch.no_grad():
            model(input_ids=torch.arange(5, 13).repeat(2, 1))
    except Exception as e:  # whatever stands in the way of a tiny model is no fault of what is tested
        return None, f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"
    return model, ""


@torch.no_grad()
def examine(model_type: str, tokenizer: Any, folder: Path) -> Finding:
    """Take one architecture from a base to an edited model and back, asserting all that must hold on the way."""
    model, unbuilt = build(model_type, len(tokenizer))
    if model is None:
        return Finding(model_type, unbuilt=unbuilt)
    hooks = _hooks(model)
    named = Finding(model_type, type(model).__name__)
    try:
        run = EditRun(
            Base(model, tokenizer, model_type), EditStream.of([EditRecord("e", PROMPT, TARGET)]), CONFIG, folder
        )
    except ModelError as e:
        assert _hooks(model) == hooks
        return replace(named, refused=e.message)
    assert_replays(run.editor.upper)
    with torch.enable_grad():
        (entry,) = [e for step in run for e in step.finished]
    assert entry["outcome"] == "took", entry
    _routes(run, merge_run(run.folder, base=run.base), tokenizer)
    assert _hooks(model) == hooks
    site, module = run.site, run.site.module(model)
    return replace(
        named,
        module=site.path.replace(f".{site.layer}.", ".{l}.", 1),
        joins="added" if run.editor.upper.additive else "replayed",
        bias="yes" if getattr(module, "bias", None) is not None else "no",
        orientation="[F, D]" if site.conv1d else "[D, F]",
    )


def assert_replays(upper: UpperModel) -> None:
    """Upper layers on their own give the whole model's logits, also under a delta."""
    rows = [upper.encoder.pair(PROMPT, TARGET), upper.encoder.pair(OTHER, " world")]
    batch = upper.encoder.batch(rows, side="right")
    site = upper.site
    delta = torch.randn(site.d_out, site.d_in, generator=torch.Generator().manual_seed(1)) * 0.1
    handle = site.module(upper.model).register_forward_hook(lambda m, a, y: y + F.linear(a[0], delta).view_as(y))
    whole = upper.model(**batch.inputs, use_cache=False).logits[:, :-1][batch.labels[:, 1:] != -100]
    handle.remove()
    replayed = upper.logits(StackedRows.of(upper.capture(rows)), delta)
    assert (replayed - whole).abs().max() <= 1e-4 * (1 + whole.abs().max())


def _routes(run: EditRun, side_memory: Any, tokenizer: Any) -> None:
    """The edit is answered with its target; what is not routed is the base's bit for bit, as all is after detaching."""
    model, encoder = run.base.model, run.editor.encoder
    pair = encoder.batch([encoder.prompt(PROMPT), encoder.prompt(OTHER)], side="left").inputs
    alone = encoder.batch([encoder.prompt(PROMPT)], side="left")
    before: Tensor = model(**pair).logits
    with attach(model, side_memory) as attached:
        (route,) = attached.decide(alone)
        assert route.memory == 0
        wanted = list(encoder.pair(PROMPT, TARGET).target[:-1])  # without the end
        out = model.generate(**alone.inputs, max_new_tokens=len(wanted), do_sample=False)
        assert out[0, alone.input_ids.shape[1] :].tolist() == wanted, tokenizer.decode(out[0])
        with attached.override([0, None]):
            mixed = model(**pair).logits
        assert not torch.equal(mixed[0], before[0])
        close = 1e-5 if _has_experts(model) else 0.0
        assert (mixed[1] - before[1]).abs().max() <= close * (1 + before[1].abs().max())
        with attached.override(None):
            assert torch.equal(model(**pair).logits, before)
    assert torch.equal(model(**pair).logits, before)


def _has_experts(model: Any) -> bool:
    """Whether tokens of several rows go through an expert in one product, which rounds as their number has it."""
    return any("expert" in name for name, _ in model.named_modules())


def _hooks(model: Any) -> list[tuple[str, int, int, list[str]]]:
    """What hooks and patched methods would show in, per module."""
    return [
        (name, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(k for k in m.__dict__ if k[0] != "_"))
        for name, m in model.named_modules()
    ]


def row(f: Finding) -> str:
    """The line of the table about a supported or a refused architecture."""
    cells = (f.refused,) if f.refused else (f"`{f.module}`", f.joins, f.bias, f.orientation)
    return "| " + " | ".join((f"`{f.model_type}`", f.cls, *cells)) + " |"


def table(findings: Sequence[Finding], version: str) -> str:
    """docs/architectures.md."""
    supported = [f for f in findings if f.module]
    refused = [f for f in findings if f.refused]
    unbuilt = [f for f in findings if f.unbuilt]
    return "\n".join(
        [
            "# Architectures",
            "",
            f"Written by `make families` on transformers {version}: every architecture that its `AutoModelForCausalLM`",
            "knows, as a tiny random model, taken through the library: the edit site found, the upper layers replayed",
            "on their own against the whole model, one edit learned, merged and attached, its prompt answered by",
            "generation with the target, a row that is not routed and the model after detaching compared with the base",
            "bit for bit. This says that the mechanics work, nothing about how well an edit of a real model holds: ask",
            "`wise doctor`. In a mixture of experts tokens of several rows pass through an expert in one product: "
            "there a",
            "row beside a routed one may differ from the base in the last bits (held to 1e-5); a batch "
            "without a routed",
            "row does not.",
            "",
            f"{len(supported)} of {len(findings)} are supported, {len(refused)} are refused before any work, of "
            f"{len(unbuilt)} no tiny model was made.",
            "",
            "## Supported",
            "",
            "*Added*: the projection's output is added to the residual stream as it is, so that only the layers above",
            "run while an edit is learned; *replayed*: something stands between (a norm, a scale, a gate, several",
            "streams), and the edited layer runs, too. `D` is the model's width, `F` the FFN's. Where some layers are",
            "dense and others not, the module named is that of the layer that `--layer auto` took.",
            "",
            "| model type | class | edited module | joins | bias | weight |",
            "|---|---|---|---|---|---|",
            *map(row, supported),
            "",
            "## Refused",
            "",
            "| model type | class | reason |",
            "|---|---|---|",
            *map(row, refused),
            "",
            "## Not tried",
            "",
            "| model type | what stood in the way |",
            "|---|---|",
            *(f"| `{f.model_type}` | {f.unbuilt.replace('|', '/')} |" for f in unbuilt),
            "",
        ]
    )
