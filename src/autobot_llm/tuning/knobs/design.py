"""The configurations of the older design, kept as valid inputs of the translator. Knows names and values only."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

OPTIMIZED_VLLM_CONFIG: Mapping[str, Any] = MappingProxyType(
    {
        "num_scheduler_steps": 8,
        "enable_async_output_proc": True,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 8192,
        "enable_prefix_caching": True,
        "gpu_memory_utilization": 0.9,
        "swap_space": 4,  # GiB
        "speculative_model": "[ngram]",
        "num_speculative_tokens": 5,
    }
)

KV_CACHE_CONFIG: Mapping[str, Any] = MappingProxyType(
    {"sliding_window": 4096, "kv_cache_dtype": "int8", "block_size": 16}
)

CONTINUOUS_BATCHING_CONFIG: Mapping[str, Any] = MappingProxyType(
    {
        "max_num_seqs": 256,
        "max_num_batched_tokens": 8192,
        "scheduling_policy": "fcfs",
        "preemption_mode": "swap",
    }
)

CUDA_GRAPH_CONFIG: Mapping[str, Any] = MappingProxyType(
    {
        "cuda_graph_batch_sizes": (1, 2, 4, 8, 16, 32),
        "max_seq_len_to_capture": 8192,
        "cuda_graph_memory_pool": True,
    }
)

DESIGN_CONFIGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "OPTIMIZED_VLLM_CONFIG": OPTIMIZED_VLLM_CONFIG,
        "KV_CACHE_CONFIG": KV_CACHE_CONFIG,
        "CONTINUOUS_BATCHING_CONFIG": CONTINUOUS_BATCHING_CONFIG,
        "CUDA_GRAPH_CONFIG": CUDA_GRAPH_CONFIG,
    }
)
