"""Anthropic as a provider: a client of its Messages API, and prompt caching placed where it pays."""

from autobot_llm.providers.anthropic.provider import AnthropicProvider

__all__ = ["AnthropicProvider"]
