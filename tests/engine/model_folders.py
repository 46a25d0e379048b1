"""Small random model folders of every family, written as Hugging Face writes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

TINY = Path(__file__).parents[2] / "src" / "autobot_llm" / "assets" / "tiny"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}

SMALL = {
    "vocab_size": 8192,  # the embedded model's tokenizer
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 4,
    "pad_token_id": 0,
    "initializer_range": 0.25,  # logits some units apart, as a trained model's are
    "sliding_window": None,
}


def write_random_model(
    folder: Path, family: str, *, dtype: str = "float32", seed: int = 0, max_shard_size: str = "1GB", **overrides: Any
) -> transformers.PreTrainedModel:
    """Write a random model and the embedded model's tokenizer to `folder`; return transformers' own model of it.

    `overrides` go to transformers' configuration. Biases and norm weights are random too: their defaults, 0 and 1,
    would hide that they are not read.
    """
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SMALL, **overrides})).to(getattr(torch, dtype)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0.0, 0.2)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    for name in TOKENIZER_FILES:
        shutil.copy(TINY / name, folder / name)
    return model


def change_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    value = json.loads(path.read_text())
    for name, change in changes.items():
        if change is None:
            value.pop(name, None)
        else:
            value[name] = change
    path.write_text(json.dumps(value))
