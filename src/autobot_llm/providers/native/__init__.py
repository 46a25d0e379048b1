"""Our own engine as a provider: the only package outside of engine/ that imports it.

What is meant for callers is found here by name and loaded when it is asked for, so that looking at a batching profile
does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autobot_llm.engine.batching.profiles import BatchingConfig, get_batching_config
    from autobot_llm.engine.kv_cache.prefix_cache import CACHED_PREFIXES, PrefixCacheConfig, PrefixCacheManager
    from autobot_llm.engine.quantization.loader import QuantizedModelLoader
    from autobot_llm.engine.quantization.registry import QUANTIZED_MODEL_REGISTRY
    from autobot_llm.engine.quantization.scheme import QuantizationConfig, QuantizationType
    from autobot_llm.engine.speculative.decoder import SpeculativeConfig, SpeculativeDecoder
    from autobot_llm.engine.speculative.medusa import MEDUSA_CHECKPOINTS, MedusaConfig, MedusaDecoder, MedusaHead
    from autobot_llm.engine.speculative.pairs import DRAFT_MODEL_RECOMMENDATIONS
    from autobot_llm.providers.native.provider import NativeProvider

__all__ = [
    "CACHED_PREFIXES",
    "DRAFT_MODEL_RECOMMENDATIONS",
    "MEDUSA_CHECKPOINTS",
    "QUANTIZED_MODEL_REGISTRY",
    "BatchingConfig",
    "MedusaConfig",
    "MedusaDecoder",
    "MedusaHead",
    "NativeProvider",
    "PrefixCacheConfig",
    "PrefixCacheManager",
    "QuantizationConfig",
    "QuantizationType",
    "QuantizedModelLoader",
    "SpeculativeConfig",
    "SpeculativeDecoder",
    "get_batching_config",
]

_MODULES = {
    "NativeProvider": "autobot_llm.providers.native.provider",
    "BatchingConfig": "autobot_llm.engine.batching.profiles",
    "get_batching_config": "autobot_llm.engine.batching.profiles",
    "CACHED_PREFIXES": "autobot_llm.engine.kv_cache.prefix_cache",
    "PrefixCacheConfig": "autobot_llm.engine.kv_cache.prefix_cache",
    "PrefixCacheManager": "autobot_llm.engine.kv_cache.prefix_cache",
    "MEDUSA_CHECKPOINTS": "autobot_llm.engine.speculative.medusa",
    "MedusaConfig": "autobot_llm.engine.speculative.medusa",
    "MedusaDecoder": "autobot_llm.engine.speculative.medusa",
    "MedusaHead": "autobot_llm.engine.speculative.medusa",
    "QUANTIZED_MODEL_REGISTRY": "autobot_llm.engine.quantization.registry",
    "QuantizationConfig": "autobot_llm.engine.quantization.scheme",
    "QuantizationType": "autobot_llm.engine.quantization.scheme",
    "QuantizedModelLoader": "autobot_llm.engine.quantization.loader",
    "SpeculativeConfig": "autobot_llm.engine.speculative.decoder",
    "SpeculativeDecoder": "autobot_llm.engine.speculative.decoder",
    "DRAFT_MODEL_RECOMMENDATIONS": "autobot_llm.engine.speculative.pairs",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
