"""Tiny random language models of twenty families, built from their configurations.

Two layers, sizes that are no powers of two, grouped-query attention and partial rotary embeddings where the family
has them, sliding windows shorter than the prompts. Norms, biases and embeddings are drawn at random, since the
initial values (ones, zeros) hide mistakes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 131
WINDOW = 7
PROMPT = 12


@dataclass(frozen=True)
class Family:
    """``model_type`` of transformers and what its configuration is given."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)


# The grouped products of torch take rows of a multiple of 16 bytes, hence 104 and 56 for experts.
def _modern(**more: Any) -> dict[str, Any]:
    """The argument names of Llama and its descendants."""
    return {
        "hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 128, **more,
    }  # fmt: skip


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", _modern()),
    "mistral": Family("mistral", _modern(sliding_window=WINDOW)),
    "qwen2": Family("qwen2", _modern()),
    "qwen3": Family("qwen3", _modern(head_dim=16)),
    "gemma": Family("gemma", _modern(num_key_value_heads=1, head_dim=20)),
    "gemma2": Family(  # with its softcap, which sdpa leaves out
        "gemma2",
        _modern(sliding_window=WINDOW, query_pre_attn_scalar=15, head_dim=16, attn_implementation="eager"),
    ),
    "gemma3": Family(
        "gemma3_text",
        _modern(
            sliding_window=WINDOW, query_pre_attn_scalar=15, layer_types=["sliding_attention", "full_attention"]
        ),
    ),
    "phi3": Family("phi3", _modern(sliding_window=None)),
    "olmo2": Family("olmo2", _modern(num_key_value_heads=3)),
    "smollm3": Family("smollm3", _modern(no_rope_layers=[1, 0])),
    "gpt2": Family("gpt2", {"n_embd": 60, "n_layer": 2, "n_head": 5, "n_positions": 128}),
    "gpt_neox": Family(
        "gpt_neox",
        {
            "hidden_size": 80, "intermediate_size": 92, "num_hidden_layers": 2, "num_attention_heads": 5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
            "max_position_embeddings": 128,
        },
    ),
    "opt": Family(
        "opt",
        {
            "hidden_size": 60, "ffn_dim": 92, "num_hidden_layers": 2, "num_attention_heads": 5,
            "word_embed_proj_dim": 60, "max_position_embeddings": 128,
        },
    ),
    "gptj": Family("gptj", {"n_embd": 60, "n_layer": 2, "n_head": 5, "rotary_dim": 8, "n_positions": 128}),
    "falcon": Family(
        "falcon",
        {"hidden_size": 60, "num_hidden_layers": 2, "num_attention_heads": 5, "max_position_embeddings": 128},
    ),
    "bloom": Family("bloom", {"hidden_size": 60, "n_layer": 2, "n_head": 5}),
    "mpt": Family("mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, "expansion_ratio": 2}),
    "gpt_bigcode": Family("gpt_bigcode", {"n_embd": 60, "n_layer": 2, "n_head": 5, "n_positions": 128}),
    "mixtral": Family(
        "mixtral", _modern(num_local_experts=4, intermediate_size=104, num_experts_per_tok=2, sliding_window=WINDOW)
    ),
    "qwen3_moe": Family(
        "qwen3_moe",
        _modern(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=56, mlp_only_layers=[0]),
    ),
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def build(
    name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **overrides: Any
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A model of the family ``name`` in evaluation mode and inputs for it: input_ids and attention_mask [1, 12].

    ``overrides`` go to the configuration. The same arguments give the same weights.
    """
    family = FAMILIES[name]
    config = CONFIG_MAPPING[family.model_type](**{"vocab_size": VOCABULARY, **TOKENS, **family.config, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sorted(FAMILIES).index(name))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomise(model)
    model.generation_config.eos_token_id = None
    return model.to(device, dtype).eval(), prompt(PROMPT, device=device)


def prompt(length: int, batch: int = 1, padding: int = 0, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Random token ids [batch, length]; the first row starts with ``padding`` masked tokens."""
    ids = torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    ids[0, :padding] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Matrices that keep the scale of what they multiply, norms around their initial value, biases around 0.

    Embeddings are small, so that the layers decide on the next token: most heads are tied to them.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            table = any(part in name for part in ("embed_tokens", "embeddings", "embed_positions", "wte", "wpe"))
            parameter.normal_(0, 0.02 if table else 1.5 * parameter.shape[-1] ** -0.5)
        elif "norm" in name or "ln_" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
        else:
            parameter.normal_(0, 0.2)
