"""Which tensors a model of a configuration consists of, and their shapes. Knows names and sizes; knows no torch."""

from __future__ import annotations

from autobot_llm.engine.models.config import ModelConfig


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors a checkpoint of this configuration must hold, by name."""
    E, F, D = config.hidden_size, config.intermediate_size, config.head_size
    q_size, kv_size = config.num_heads * D, config.num_kv_heads * D
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, E),
        "model.norm.weight": (E,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, E)
    projections = (
        ("self_attn.q_proj", q_size, E, config.qkv_bias),
        ("self_attn.k_proj", kv_size, E, config.qkv_bias),
        ("self_attn.v_proj", kv_size, E, config.qkv_bias),
        ("self_attn.o_proj", E, q_size, config.o_bias),
        ("mlp.gate_proj", F, E, config.mlp_bias),
        ("mlp.up_proj", F, E, config.mlp_bias),
        ("mlp.down_proj", E, F, config.mlp_bias),
    )
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (E,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (E,)
        if config.qk_norm:
            shapes[f"{layer}.self_attn.q_norm.weight"] = (D,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (D,)
        for name, num_out, num_in, has_bias in projections:
            shapes[f"{layer}.{name}.weight"] = (num_out, num_in)
            if has_bias:
                shapes[f"{layer}.{name}.bias"] = (num_out,)
    return shapes


def matrix_names(config: ModelConfig) -> frozenset[str]:
    """The layers' matrices: what quantizing is about. The embedding and the head stay as they are."""
    shapes = expected_shapes(config)
    return frozenset(name for name, shape in shapes.items() if len(shape) == 2 and name.startswith("model.layers."))
