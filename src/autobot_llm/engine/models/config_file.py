"""A Llama's configuration as Hugging Face writes it, the inverse of `load_config`. Knows fields; writes no file."""

from __future__ import annotations

from typing import Any

import torch

from autobot_llm.engine.models.config import ModelConfig, RopeScaling


def llama_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a model with `model_type` "llama" whose weights are stored in `dtype`."""
    assert config.model_type == "llama"
    about: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "eos_token_id": sorted(config.eos_token_ids),
    }
    if config.bos_token_id is not None:
        about["bos_token_id"] = config.bos_token_id
    if config.rope_scaling is not None:
        about["rope_scaling"] = _rope_scaling(config.rope_scaling)
    return about


def _rope_scaling(scaling: RopeScaling) -> dict[str, Any]:
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        fields |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return fields
