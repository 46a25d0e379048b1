"""The names of models: how a client may ask for one, and which one it asks for. Knows names only."""

from __future__ import annotations

from collections.abc import Sequence

from autobot_llm.errors import ModelNotFoundError
from autobot_llm.types import ModelInfo


def name_for(model: ModelInfo, default_provider: str) -> str:
    """The name that a client may ask for: with its provider's before it, unless that answers by default."""
    return model.id if model.provider == default_provider else f"{model.provider}/{model.id}"


def find_model(models: Sequence[ModelInfo], wanted: str) -> ModelInfo:
    """The model called `wanted`, with or without its provider's name before it. Raises ModelNotFoundError."""
    for model in models:
        if wanted in (model.id, f"{model.provider}/{model.id}"):
            return model
    known = ", ".join(model.id for model in models) or "none"
    raise ModelNotFoundError(f"model {wanted!r} is not served here; served are {known}", param="model")
