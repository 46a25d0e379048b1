"""autobot_llm: one async interface, and one OpenAI-compatible server, in front of local and cloud language models.

    async with LLMInterface.from_env() as llm:
        answer = await llm.chat_completion([{"role": "user", "content": "Tell me a story about a fox"}])

Importing this package never imports torch; the engine comes with the native provider, when that is started, and with
the names of its own that are asked for (`PrefixCacheManager`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autobot_llm.cloud.request_batching import CloudRequestBatcher
from autobot_llm.cloud.retry import RateLimitHandler
from autobot_llm.errors import (
    AuthenticationError,
    BudgetExceededError,
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
from autobot_llm.routing import OptimizationRouter, ProviderType
from autobot_llm.settings import Settings, load_settings
from autobot_llm.tuning.knobs import (
    CONTINUOUS_BATCHING_CONFIG,
    CUDA_GRAPH_CONFIG,
    KV_CACHE_CONFIG,
    OPTIMIZED_VLLM_CONFIG,
)
from autobot_llm.types import (
    ChatMessage,
    ChoiceEnd,
    EmbeddingRequest,
    EmbeddingResponse,
    Event,
    Finish,
    LLMRequest,
    LLMResponse,
    ReasoningDelta,
    RefusalDelta,
    Start,
    TextDelta,
    ToolCallDelta,
    Usage,
)

if TYPE_CHECKING:
    from autobot_llm.cloud.batch_jobs import BatchJobs as BatchJobs
    from autobot_llm.providers.native import CACHED_PREFIXES as CACHED_PREFIXES
    from autobot_llm.providers.native import DRAFT_MODEL_RECOMMENDATIONS as DRAFT_MODEL_RECOMMENDATIONS
    from autobot_llm.providers.native import MEDUSA_CHECKPOINTS as MEDUSA_CHECKPOINTS
    from autobot_llm.providers.native import QUANTIZED_MODEL_REGISTRY as QUANTIZED_MODEL_REGISTRY
    from autobot_llm.providers.native import BatchingConfig as BatchingConfig
    from autobot_llm.providers.native import MedusaConfig as MedusaConfig
    from autobot_llm.providers.native import MedusaDecoder as MedusaDecoder
    from autobot_llm.providers.native import MedusaHead as MedusaHead
    from autobot_llm.providers.native import PrefixCacheConfig as PrefixCacheConfig
    from autobot_llm.providers.native import PrefixCacheManager as PrefixCacheManager
    from autobot_llm.providers.native import QuantizationConfig as QuantizationConfig
    from autobot_llm.providers.native import QuantizationType as QuantizationType
    from autobot_llm.providers.native import QuantizedModelLoader as QuantizedModelLoader
    from autobot_llm.providers.native import SpeculativeConfig as SpeculativeConfig
    from autobot_llm.providers.native import SpeculativeDecoder as SpeculativeDecoder
    from autobot_llm.providers.native import get_batching_config as get_batching_config
    from autobot_llm.universal.compression import COMPRESSED_SYSTEM_PROMPTS as COMPRESSED_SYSTEM_PROMPTS
    from autobot_llm.universal.compression import CompressionResult as CompressionResult
    from autobot_llm.universal.compression import PromptCompressor as PromptCompressor

__version__ = "0.1.0"

__all__ = [
    "CONTINUOUS_BATCHING_CONFIG",
    "CUDA_GRAPH_CONFIG",
    "KV_CACHE_CONFIG",
    "OPTIMIZED_VLLM_CONFIG",
    "AuthenticationError",
    "BudgetExceededError",
    "ChatMessage",
    "ChoiceEnd",
    "CloudRequestBatcher",
    "ConfigurationError",
    "ContextLengthError",
    "EmbeddingRequest",
    "EmbeddingResponse",
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
    "OptimizationRouter",
    "OverloadedError",
    "ProviderError",
    "ProviderTimeout",
    "ProviderType",
    "ProviderUnavailable",
    "RateLimitHandler",
    "ReasoningDelta",
    "RefusalDelta",
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

# Not in __all__: a light install has no engine, and `import *` would ask for them.
_OF_THE_ENGINE = frozenset(
    {
        "CACHED_PREFIXES",
        "MEDUSA_CHECKPOINTS",
        "QUANTIZED_MODEL_REGISTRY",
        "BatchingConfig",
        "MedusaConfig",
        "MedusaDecoder",
        "MedusaHead",
        "PrefixCacheConfig",
        "PrefixCacheManager",
        "QuantizationConfig",
        "QuantizationType",
        "QuantizedModelLoader",
        "DRAFT_MODEL_RECOMMENDATIONS",
        "SpeculativeConfig",
        "SpeculativeDecoder",
        "get_batching_config",
    }
)
# Loaded when it is asked for: phrases and patterns cost milliseconds that few programs need.
_OF_COMPRESSION = frozenset({"COMPRESSED_SYSTEM_PROMPTS", "CompressionResult", "PromptCompressor"})


def __getattr__(name: str) -> Any:
    if name == "BatchJobs":  # sqlite and the rest are for those who have such jobs
        from autobot_llm.cloud.batch_jobs import BatchJobs

        return BatchJobs
    if name in _OF_COMPRESSION:
        from autobot_llm.universal import compression

        return getattr(compression, name)
    if name not in _OF_THE_ENGINE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from autobot_llm.providers import native

    return getattr(native, name)
