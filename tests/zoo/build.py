"""A tiny random model of every type in ``MODEL_FOR_CAUSAL_LM_MAPPING``, from its configuration alone.

Sizes are set by name, wherever a configuration has that name, so that a type of a later transformers needs nothing here
unless its sizes depend on each other in a way of its own: then a line in ``FIXES``.
"""

from __future__ import annotations

from typing import Any
from zlib import crc32

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.models import TOKENS, VOCABULARY, WINDOW, randomise

LAYERS, HEADS, HEAD_DIM, HIDDEN, EXPERTS = 2, 4, 16, 64, 4
POSITIONS = 256


def _named(size: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), size)


SIZES: dict[str, Any] = {
    **_named(HIDDEN, "hidden_size n_embd d_model dim emb_dim embedding_size word_embed_proj_dim n_embed"),
    **_named(104, "intermediate_size ffn_dim n_inner ffn_hidden_size encoder_ffn_dim decoder_ffn_dim d_ff"),
    **_named(LAYERS, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers"),
    **_named(HEADS, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"),
    **_named(2, "num_key_value_heads num_kv_heads n_head_kv"),
    **_named(HEAD_DIM, "head_dim kv_channels d_kv attention_head_dim"),
    **_named(POSITIONS, "max_position_embeddings n_positions max_seq_len max_target_positions"),
    **_named(EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts"),
    **_named(2, "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts"),
    **_named(56, "moe_intermediate_size expert_intermediate_size moe_ffn_hidden_size expert_ffn_hidden_size"),
    **_named(40, "shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size"),
    **_named(1, "n_group topk_group"),
    **_named(WINDOW, "sliding_window attention_window_size attn_window_size"),
    **_named(VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    **_named(97, "pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab"),
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "rotary_dim": 8,
}  # fmt: skip

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SPATIAL_ROPE = {**ROPE, "mrope_section": [3, 3, 2]}
HYBRID = {
    "num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": HEADS,
    "attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 32,
}  # fmt: skip
OMIT: Any = object()  # a size that the type refuses to be given
FIXES: dict[str, dict[str, Any]] = {  # what a type needs beside SIZES
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), SPATIAL_ROPE)},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"], "num_hidden_layers": 3,
        "n_input_layers": 1, "n_output_layers": 1,
    },
    "dots1": {
        "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 56,
    },
    "dots3_note_text": {
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "kv_lora_rank": 16, "head_dim": 24,
        "per_layer_config": {"1": {"num_attention_heads": 2, "num_key_value_heads": 2}},
        "qk_nope_head_dim": 16, "index_head_dim": HEAD_DIM, "index_n_heads": 2, "index_topk": 8,
    },
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_state": 16, "mamba_chunk_size": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_state": 16, "mamba_chunk_size": 16,
    },
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": HEAD_DIM},
    "nemotron": {"num_key_value_heads": 2},
    "prophetnet": {"num_hidden_layers": OMIT, "num_encoder_layers": LAYERS, "num_decoder_layers": LAYERS},
    "qwen4_exp_text": {
        "indexer_budget": 8, "indexer_compress_ratio": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [24, 40], "axial_pos_shape": [16, 16]},
    "xlnet": {"max_position_embeddings": OMIT},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"qk_dim_factor": 1.0},
    "zamba": {**HYBRID, "mamba_dt_rank": 4},
    "zamba2": {**HYBRID, "hybrid_layer_ids": [1, 3], "mamba_headdim": 16},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def config(model_type: str, sizes: dict[str, Any] | None = None, fixes: dict[str, Any] | None = None) -> Any:
    """The configuration of a tiny model; ``sizes`` and ``fixes`` on top of ``SIZES`` and ``FIXES``. Raises what
    transformers raises for one that it cannot make."""
    return _shrunk(CONFIG_MAPPING[model_type], FIXES.get(model_type, {}) | (fixes or {}), SIZES | (sizes or {}))


def _shrunk(cls: type, fixes: dict[str, Any], named: dict[str, Any]) -> Any:
    default = cls()
    sizes = {name: size for name, size in named.items() if _settable(cls, name) and _value(default, name) is not None}
    if "qk_rope_head_dim" in sizes:
        sizes |= {"head_dim": sizes["qk_rope_head_dim"], "num_key_value_heads": HEADS}
    kinds = _value(default, "layer_types")
    if isinstance(kinds, list) and _settable(cls, cls.attribute_map.get("layer_types", "layer_types")):
        kinds = list(dict.fromkeys(kinds))
        sizes["layer_types"] = kinds * (LAYERS // len(kinds) or 1)
        sizes["num_hidden_layers"] = len(sizes["layer_types"])
    parts = {name: _value(default, name) for name in cls.sub_configs}
    sizes |= {
        name: _shrunk(type(part), FIXES.get(part.model_type, {}), named)
        for name, part in parts.items()
        if isinstance(part, PreTrainedConfig)
    }
    tokens = TOKENS if "vocab_size" in sizes else {}
    return cls(**{name: value for name, value in {**tokens, **sizes, **fixes}.items() if value is not OMIT})


def _settable(cls: type, name: str) -> bool:
    attribute = getattr(cls, name, None)
    return not isinstance(attribute, property) or attribute.fset is not None


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a size that differs from layer to layer
        return None


def build(model_type: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """In evaluation mode; the same type gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(crc32(model_type.encode()))
        model = AutoModelForCausalLM.from_config(config(model_type), dtype=torch.float32)
        randomise(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()
