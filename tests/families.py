"""Tiny random models of the architectures that transformers knows as causal language models.

Sizes are derived from the names of a config's fields, the same for all; `FIXES` holds what single architectures need
besides. Nothing is downloaded. This module builds models; `test_families` does something with them.
"""

from __future__ import annotations

from typing import Any

import torch

WIDTH, FFN, LAYERS, HEADS, CONTEXT = 32, 80, 4, 4, 256
LARGEST = 10_000_000

_SAME = (
    (WIDTH, "hidden_size d_model n_embd dim_model embed_dim emb_dim embedding_size word_embed_proj_dim lru_width "
    "router_hidden_size ple_embed_dim pronunciation_embed_dim shape_embed_dim o_lora_rank"),
    (FFN, "intermediate_size ffn_dim n_inner ffn_hidden_size dim_ff dff d_inner feed_forward_size mlp_hidden_size "
    "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size intermediate_size_mlp "
    "expert_ffn_hidden_size decoder_ffn_dim encoder_ffn_dim shared_intermediate_size moe_shared_expert_intermediate_size"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers encoder_layers"),
    (HEADS, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "linear_num_value_heads linear_num_key_heads linear_num_heads swa_num_attention_heads mamba_n_heads mamba_num_heads "
    "n_routed_experts num_local_experts num_experts moe_num_experts zero_expert_num o_groups"),
    (2, "num_key_value_heads swa_num_key_value_heads num_global_key_value_heads num_experts_per_tok "
    "num_experts_per_token moe_k moe_topk index_n_heads"),
    (8, "head_dim d_head swa_head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim rotary_dim global_head_dim "
    "linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim index_topk sliding_window "
    "sliding_window_size attention_window_size mamba_chunk_size chunk_size mamba_d_state state_size ssm_state_size mamba_head_dim "
    "hidden_size_per_layer_input laurel_rank"),
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
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=None)  # of no length
    return model
