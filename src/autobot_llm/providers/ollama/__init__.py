"""An Ollama server as a provider: its native API, with the model kept in memory and its context pinned."""

from __future__ import annotations

from autobot_llm.providers.ollama.provider import OllamaProvider

__all__ = ["OllamaProvider"]
