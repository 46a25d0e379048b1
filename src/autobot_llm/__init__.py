"""autobot_llm: one async interface, and one OpenAI-compatible server, in front of local and cloud language models.

    async with LLMInterface.from_env() as llm:
        answer = await llm.chat_completion([{"role": "user", "content": "Tell me a story about a fox"}])

Importing this package never imports torch; the engine comes with the native provider, when that is started.
"""

from __future__ import annotations

from autobot_llm.errors import (
    AuthenticationError,
    ConfigurationError,
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    LLMError,
    ModelLoadError,
    ModelNotFoundError,
    OverloadedError,
    ProviderError,
    ProviderTimeout,
    ProviderUnavailable,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedError,
)
from autobot_llm.interface import LLMInterface
from autobot_llm.report import OptimizationOutcome
from autobot_llm.settings import Settings, load_settings
from autobot_llm.types import (
    ChatMessage,
    ChoiceEnd,
    Event,
    Finish,
    LLMRequest,
    LLMResponse,
    Start,
    TextDelta,
    ToolCallDelta,
    Usage,
)

__version__ = "0.1.0"

__all__ = [
    "AuthenticationError",
    "ChatMessage",
    "ChoiceEnd",
    "ConfigurationError",
    "ContextLengthError",
    "EngineError",
    "Event",
    "Finish",
    "InvalidRequestError",
    "LLMError",
    "LLMInterface",
    "LLMRequest",
    "LLMResponse",
    "ModelLoadError",
    "ModelNotFoundError",
    "OptimizationOutcome",
    "OverloadedError",
    "ProviderError",
    "ProviderTimeout",
    "ProviderUnavailable",
    "RequestTimeout",
    "RequestTooLarge",
    "Settings",
    "Start",
    "TextDelta",
    "ToolCallDelta",
    "UnsupportedError",
    "Usage",
    "__version__",
    "load_settings",
]
