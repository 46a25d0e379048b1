"""Read a model folder a layer at a time, so that quantizing it needs memory for a layer and not for the model.

Knows names and files; knows nothing of what becomes of the layers. models/weights.py reads whole models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from autobot_llm.engine.models.checkpoint import open_checkpoint
from autobot_llm.engine.models.config import ModelConfig
from autobot_llm.engine.models.shapes import expected_shapes
from autobot_llm.engine.quantization.layerwise import DenseLayer


class StoredModel:
    """The tensors of a folder that is not quantized. Raises ModelLoadError for one that is not whole."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        tied = frozenset({"lm_head.weight"} if model.tie_word_embeddings else ())  # some exports store it again
        self._model = model
        self._checkpoint = open_checkpoint(folder, expected_shapes(model), model_type=model.model_type, may_ignore=tied)

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest that holds every tensor exactly."""
        return self._checkpoint.dtype

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(stored.shape) for stored in self._checkpoint.tensors.values()) * self.dtype.itemsize

    def tensors(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Copies of the named tensors; none stays mapped."""
        return {name: self._checkpoint.read(name).to(dtype, copy=True) for name in names}

    def rest(self) -> dict[str, torch.Tensor]:
        """What belongs to no layer: embedding, last norm and, if it has its own, the head."""
        names = ["model.embed_tokens.weight", "model.norm.weight"]
        return self.tensors(names if self._model.tie_word_embeddings else [*names, "lm_head.weight"], self.dtype)

    def layer(self, index: int) -> DenseLayer:
        """Layer number `index` in float32."""

        def read(modules: Iterable[str], kind: str) -> torch.Tensor | None:
            """Below each other; None where there are none."""
            names = [f"model.layers.{index}.{module}.{kind}" for module in modules]
            there = [name for name in names if name in self._checkpoint.tensors]
            return torch.cat(list(self.tensors(there, torch.float32).values())) if there else None

        def must(found: torch.Tensor | None) -> torch.Tensor:
            assert found is not None, "the folder has every tensor that its configuration asks for"
            return found

        modules = modules_of(self._model)
        return DenseLayer(
            matrices={name: must(read(rows, "weight")) for name, rows in modules.items()},
            biases={name: read(rows, "bias") for name, rows in modules.items()},
            input_norm_E=must(read(["input_layernorm"], "weight")),
            post_norm_E=must(read(["post_attention_layernorm"], "weight")),
            q_norm_D=read(["self_attn.q_norm"], "weight"),
            k_norm_D=read(["self_attn.k_norm"], "weight"),
        )

    def refuse_changed_files(self) -> None:
        """Raise ModelLoadError if a file was written to meanwhile: the layers may be of two models."""
        self._checkpoint.refuse_changed_files()


def modules_of(model: ModelConfig) -> Mapping[str, Mapping[str, slice]]:
    """The stored modules of each matrix of a DenseLayer, and their rows in it."""
    q, kv, size = model.num_heads * model.head_size, model.num_kv_heads * model.head_size, model.intermediate_size
    return {
        "qkv": {
            "self_attn.q_proj": slice(0, q),
            "self_attn.k_proj": slice(q, q + kv),
            "self_attn.v_proj": slice(q + kv, q + 2 * kv),
        },
        "o": {"self_attn.o_proj": slice(0, model.hidden_size)},
        "gate_up": {"mlp.gate_proj": slice(0, size), "mlp.up_proj": slice(size, 2 * size)},
        "down": {"mlp.down_proj": slice(0, model.hidden_size)},
    }
