"""Find a model by the name in a path. Knows names only."""

from __future__ import annotations

from collections.abc import Sequence

from autobot_llm.errors import ModelNotFoundError
from autobot_llm.types import ModelInfo


def find_model(models: Sequence[ModelInfo], wanted: str) -> ModelInfo:
    """The model called `wanted`, with or without its provider's name before it. Raises ModelNotFoundError."""
    for model in models:
        if wanted in (model.id, f"{model.provider}/{model.id}"):
            return model
    known = ", ".join(model.id for model in models) or "none"
    raise ModelNotFoundError(f"model {wanted!r} is not served here; served are {known}", param="model")
