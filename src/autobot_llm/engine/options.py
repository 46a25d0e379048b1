"""What an engine is asked for, and what that comes to for a model on a device. Knows values; makes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from autobot_llm.engine.batching.draft_tree import MAX_TREE_TOKENS
from autobot_llm.engine.batching.profiles import SchedulingPolicy, get_batching_config
from autobot_llm.engine.gpu.options import why_not_fused
from autobot_llm.engine.kv_cache.policy import CachePolicy, choose_policy
from autobot_llm.engine.models.config import ModelConfig
from autobot_llm.engine.quantization.scheme import QuantizationType
from autobot_llm.engine.speculative.build import SpeculationOptions
from autobot_llm.errors import ConfigurationError

# On a CPU, a step with a full chunk is a pause between two tokens of everyone else: about 40 ms for the embedded model
# on two cores (docs/log.md), and rows beyond 64 make it no more efficient.
MAX_NUM_BATCHED_TOKENS_ON_CPU = 256


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to run a model folder. None: the engine chooses, as the field's comment says."""

    folder: Path
    cache_dir: Path
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compiled_step: Literal["auto", "on", "off"] = "auto"
    prefix_caching: bool = True
    max_model_len: int | None = None  # the model's own
    workload: Literal["interactive", "batch", "mixed"] = "mixed"  # the profile of the four that follow
    max_num_seqs: int | None = None  # the workload's
    max_num_batched_tokens: int | None = None  # the workload's
    max_waiting_time_ms: float | None = None  # the workload's
    scheduling_policy: Literal["fcfs", "priority"] | None = None  # the workload's
    preemption: Literal["auto", "recompute", "swap"] = "auto"  # swap on a GPU
    swap_memory: int = 4 * 2**30  # bytes of the host's memory
    kv_cache_dtype: Literal["auto", "int8", "fp8", "float16"] = "auto"  # the model's own
    kv_sliding_window: int = 0  # tokens that every layer looks back at most; 0: as the model does
    kv_heavy_hitters: float = (
        0  # tokens of a sequence that stay in the cache, or up to 1 a share of its context; 0: all
    )
    kv_cache_memory: int | None = None  # bytes; on a CPU see executors.py, on a GPU what the share leaves
    gpu_memory_utilization: float = 0.9  # share of the GPU's memory, for everything
    attention_backend: Literal["auto", "triton", "flashinfer", "flash_attention", "sdpa"] = "auto"  # on a GPU
    cuda_graphs: Literal["auto", "on", "off"] = "auto"  # on a GPU
    cpu_threads: int | None = None  # measured
    quantization: QuantizationType = QuantizationType.NONE  # of a folder that is not quantized, as it is loaded; a CPU
    speculation: SpeculationOptions = field(default_factory=SpeculationOptions)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the options come to for this model: the profile's values where they name none.

    A sequence has at most `max_cached_tokens` of its `max_model_len` in the cache at once.
    """

    max_model_len: int
    max_cached_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_waiting_time_ms: float
    scheduling_policy: SchedulingPolicy


def choose_device(options: EngineOptions) -> torch.device:
    """The GPU where there is one and nothing else is asked for. Raises ConfigurationError for one that is not there."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("AUTOBOT_DEVICE='cuda': this torch sees no GPU; expected auto or cpu")
    if options.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def choose_cache_dtype(
    config: ModelConfig, options: EngineOptions, dtype: torch.dtype, device: torch.device
) -> torch.dtype:
    """What keys and values are stored as. Raises ConfigurationError where that is not to be had."""
    asked = options.kv_cache_dtype
    own = str(dtype).removeprefix("torch.")
    if asked in ("auto", own):
        return dtype
    if asked == "float16":
        raise ConfigurationError(
            f"AUTOBOT_KV_CACHE_DTYPE='float16': the model computes in {own}; expected auto, int8 or fp8"
        )
    why_not = None if device.type == "cpu" else why_not_fused(config, dtype)
    if why_not is not None:
        raise ConfigurationError(
            f"AUTOBOT_KV_CACHE_DTYPE={asked!r}: on a GPU the fused kernels alone round keys and values, and {why_not}; "
            "expected auto"
        )
    return torch.int8 if asked == "int8" else torch.float8_e4m3fn


def choose_cache_policy(
    config: ModelConfig, options: EngineOptions, device: torch.device
) -> tuple[ModelConfig, CachePolicy]:
    """What stays in the cache, and the model as it then attends. Raises ConfigurationError."""
    if options.kv_heavy_hitters and device.type != "cpu":
        raise ConfigurationError(
            f"AUTOBOT_KV_HEAVY_HITTERS={options.kv_heavy_hitters:g}: the GPU kernels do not tell what was attended to; "
            "expected 0 (AUTOBOT_KV_SLIDING_WINDOW keeps as few tokens, AUTOBOT_KV_CACHE_DTYPE=int8 all in half the "
            "bytes), or AUTOBOT_DEVICE=cpu"
        )
    if 0 < options.kv_sliding_window < MAX_TREE_TOKENS and device.type != "cpu":
        raise ConfigurationError(
            f"AUTOBOT_KV_SLIDING_WINDOW={options.kv_sliding_window}: on a GPU expected 0, or at least the "
            f"{MAX_TREE_TOKENS} tokens that a tree of guesses may have"
        )
    return choose_policy(
        config,
        sliding_window=options.kv_sliding_window,
        heavy_hitters=options.kv_heavy_hitters,
        max_model_len=options.max_model_len or config.max_position_embeddings,
    )


def choose_sizes(config: ModelConfig, options: EngineOptions, device: torch.device, policy: CachePolicy) -> Sizes:
    """Raises ConfigurationError for a context that the model does not have."""
    max_model_len = options.max_model_len or config.max_position_embeddings
    if max_model_len > config.max_position_embeddings:
        raise ConfigurationError(
            f"AUTOBOT_MAX_MODEL_LEN={max_model_len}: the model's context is {config.max_position_embeddings} tokens"
        )
    profile = get_batching_config(options.workload)
    max_num_seqs = options.max_num_seqs or profile.max_num_seqs
    max_num_batched_tokens = profile.max_num_batched_tokens
    if device.type == "cpu":
        max_num_batched_tokens = min(max_num_batched_tokens, MAX_NUM_BATCHED_TOKENS_ON_CPU)
    max_num_batched_tokens = max(options.max_num_batched_tokens or max_num_batched_tokens, max_num_seqs)
    max_new_tokens = min(policy.max_new_tokens or max_num_batched_tokens, max_num_batched_tokens)
    return Sizes(
        max_model_len=max_model_len,
        max_cached_tokens=policy.most_tokens(max_model_len, max_new_tokens),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_waiting_time_ms=options.max_waiting_time_ms or profile.max_waiting_time_ms,
        scheduling_policy=options.scheduling_policy or profile.scheduling_policy,
    )
