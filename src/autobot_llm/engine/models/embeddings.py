"""Read a model's embeddings and its projection to the vocabulary alone. Knows their names; knows nothing of layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from autobot_llm.engine.models.checkpoint import open_checkpoint, stored_shapes
from autobot_llm.engine.models.config import ModelConfig

_EMBEDDINGS, _PROJECTION = "model.embed_tokens.weight", "lm_head.weight"


# V vocabulary, E hidden size
@dataclass(frozen=True, slots=True)
class Embeddings:
    """Both are as they are stored; the very same tensor where the model ties them."""

    embed_VE: torch.Tensor
    lm_head_VE: torch.Tensor


def load_embeddings(folder: Path, config: ModelConfig) -> Embeddings:
    """Raises ModelLoadError, naming file and tensor, as `load_weights` does."""
    names = (_EMBEDDINGS,) if config.tie_word_embeddings else (_EMBEDDINGS, _PROJECTION)
    shape = (config.vocab_size, config.hidden_size)
    checkpoint = open_checkpoint(
        folder,
        dict.fromkeys(names, shape),
        model_type=config.model_type,
        may_ignore=frozenset(stored_shapes(folder)),
    )
    found = [checkpoint.read(name) for name in names]
    checkpoint.refuse_changed_files()
    return Embeddings(found[0], found[-1])
