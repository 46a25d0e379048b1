"""Every server that speaks OpenAI's language as a provider: OpenAI, Azure OpenAI, compatible clouds and engines."""

from autobot_llm.providers.openai.client import OpenAIClient
from autobot_llm.providers.openai.endpoint import Endpoint
from autobot_llm.providers.openai.provider import OpenAIProvider

__all__ = ["Endpoint", "OpenAIClient", "OpenAIProvider"]
