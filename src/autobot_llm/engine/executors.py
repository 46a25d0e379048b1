"""Make what runs the steps: fused on a GPU, compiled on a CPU, or torch. Knows executors and memory, no schedule."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from functools import partial

import torch

from autobot_llm.engine.attention.sdpa import SdpaAttention
from autobot_llm.engine.attention.summing import SummingAttention
from autobot_llm.engine.description import OnProgress
from autobot_llm.engine.eager import EagerExecutor
from autobot_llm.engine.executor import NO_FEATURES, Executor, FeatureKinds
from autobot_llm.engine.gpu.options import ChainPlace, GpuLimits, GpuOptions, why_not_fused
from autobot_llm.engine.kernels.cpu.build import CannotCompileError, load_library
from autobot_llm.engine.kernels.cpu.compiled import CompiledExecutor, check_coverage
from autobot_llm.engine.kv_cache.policy import BLOCK_SIZE
from autobot_llm.engine.models.config import ModelConfig
from autobot_llm.engine.models.decoder import Decoder
from autobot_llm.engine.models.weights import DecoderWeights, load_weights
from autobot_llm.engine.options import EngineOptions, Sizes
from autobot_llm.engine.quantization.online import quantize_online
from autobot_llm.engine.quantization.scheme import QuantizationType
from autobot_llm.errors import ConfigurationError

log = logging.getLogger(__name__)

# The cache holds so many sequences of full length, or more shorter ones and the prefixes worth keeping; unless that is
# more than this share of the free memory.
NUM_FULL_SEQUENCES = 16
KV_MEMORY_SHARE = 0.25


def _num_blocks(
    config: ModelConfig, options: EngineOptions, sizes: Sizes, device: torch.device, block_bytes: int
) -> int:
    """Blocks of a cache that nothing measured has sized: see NUM_FULL_SEQUENCES."""
    blocks_per_sequence = -(-sizes.max_cached_tokens // BLOCK_SIZE)
    memory = options.kv_cache_memory or min(
        int(_free_memory(device) * KV_MEMORY_SHARE), NUM_FULL_SEQUENCES * blocks_per_sequence * block_bytes
    )
    num_blocks = memory // block_bytes
    if num_blocks < blocks_per_sequence:
        raise ConfigurationError(
            f"one sequence of {sizes.max_model_len} tokens needs {blocks_per_sequence * block_bytes / 2**20:.0f} MiB "
            f"of cache, and there are {memory / 2**20:.0f} MiB: set AUTOBOT_KV_CACHE_MEMORY higher, or "
            f"AUTOBOT_MAX_MODEL_LEN to at most {memory // block_bytes * BLOCK_SIZE}"
        )
    return num_blocks


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"  # macOS has the latter only
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def make_executor(
    config: ModelConfig,
    options: EngineOptions,
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    block_bytes: int,
    on_progress: OnProgress | None,
    sums_attention: bool = False,
    features: FeatureKinds = NO_FEATURES,
    chain: ChainPlace | None = None,
) -> tuple[Executor, int]:
    """The fastest step that can run here, and its number of cache blocks: fused on a GPU, compiled on a CPU, torch.

    With `sums_attention`, which a GPU does not do, it is an Evictor. `features`: what the steps on a GPU are to keep;
    others are told step by step. `chain`: where a draft's passes go together.
    """
    if device.type == "cuda":
        if options.compiled_step == "on":
            raise ConfigurationError("AUTOBOT_COMPILED_STEP='on': expected auto or off on a GPU, or AUTOBOT_DEVICE=cpu")
        why_eager = why_not_fused(config, dtype)
        if why_eager is None:
            return _gpu_executor(config, options, sizes, device, cache_dtype, on_progress, features, chain)
        if options.quantization is not QuantizationType.NONE and config.quantization is None:
            raise ConfigurationError(
                f"AUTOBOT_QUANTIZATION_TYPE={options.quantization.value!r}: torch would run the steps, with weights "
                f"dequantized again ({why_eager}); expected none, or AUTOBOT_DEVICE=cpu"
            )
        log.warning("torch runs the steps, several times slower than the GPU kernels: %s", why_eager)
        num_blocks = _num_blocks(config, options, sizes, device, block_bytes)
        make: Callable[..., Executor] = partial(make_eager_executor, reason=why_eager)
    else:
        num_blocks = _num_blocks(config, options, sizes, device, block_bytes)
        make = partial(make_cpu_executor, cache_dtype=cache_dtype, sums_attention=sums_attention)
    try:
        return make(config, options, sizes, device, num_blocks, on_progress), num_blocks
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ConfigurationError(
            f"the memory of this {device.type} does not suffice for {options.folder.name} and "
            f"{num_blocks * block_bytes / 2**20:,.0f} MiB of cache: {error}; set AUTOBOT_KV_CACHE_MEMORY or "
            "AUTOBOT_MAX_MODEL_LEN lower"
        ) from error


def _gpu_executor(
    config: ModelConfig,
    options: EngineOptions,
    sizes: Sizes,
    device: torch.device,
    cache_dtype: torch.dtype,
    on_progress: OnProgress | None,
    features: FeatureKinds,
    chain: ChainPlace | None,
) -> tuple[Executor, int]:
    from autobot_llm.engine.gpu.build import build_gpu_executor  # triton is needed only here

    executor, plan = build_gpu_executor(
        config,
        GpuOptions(
            folder=options.folder,
            attention_backend=options.attention_backend,
            cuda_graphs=options.cuda_graphs,
            memory_utilization=options.gpu_memory_utilization,
            cache_memory=options.kv_cache_memory,
            cache_dtype=cache_dtype,
            features=features,
            quantization=options.quantization,
            chain=chain,
        ),
        GpuLimits(sizes.max_num_seqs, sizes.max_num_batched_tokens, sizes.max_model_len, sizes.max_cached_tokens),
        device,
        on_progress,
    )
    return executor, plan.num_blocks


def make_cpu_executor(
    config: ModelConfig,
    options: EngineOptions,
    sizes: Sizes,
    device: torch.device,
    num_blocks: int,
    on_progress: OnProgress | None,
    cache_dtype: torch.dtype = torch.float32,
    sums_attention: bool = False,
) -> Executor:
    """The compiled step where it can run, else torch, and why. With `sums_attention` it is an Evictor."""
    why_eager = "switched off by AUTOBOT_COMPILED_STEP"
    if options.compiled_step != "off":
        try:
            return _compiled_executor(config, options, sizes, num_blocks, on_progress, cache_dtype, sums_attention)
        except CannotCompileError as error:
            if options.compiled_step == "on":
                raise ConfigurationError(f"AUTOBOT_COMPILED_STEP='on': {error}") from error
            log.warning("torch runs the steps, several times slower than the compiled step: %s", error)
            why_eager = str(error)
    return make_eager_executor(
        config,
        options,
        sizes,
        device,
        num_blocks,
        on_progress,
        reason=why_eager,
        cache_dtype=cache_dtype,
        sums_attention=sums_attention,
    )


def _compiled_executor(
    config: ModelConfig,
    options: EngineOptions,
    sizes: Sizes,
    num_blocks: int,
    on_progress: OnProgress | None,
    cache_dtype: torch.dtype,
    sums_attention: bool,
) -> CompiledExecutor:
    check_coverage(config)
    library = load_library(options.cache_dir)  # before the weights, which may take minutes
    # The weights as they are stored: the step widens bfloat16 by itself.
    weights = _cpu_weights(config, options, None, on_progress)
    _use_one_torch_thread_here()
    return CompiledExecutor(
        config,
        weights,
        library,
        num_blocks=num_blocks,
        max_tokens=sizes.max_num_batched_tokens,
        max_model_len=sizes.max_model_len,
        num_threads=options.cpu_threads,
        cache_dtype=cache_dtype,
        sums_attention=sums_attention,
    )


def _cpu_weights(
    config: ModelConfig, options: EngineOptions, dtype: torch.dtype | None, on_progress: OnProgress | None
) -> DecoderWeights:
    """Quantized matrices as they are stored, or quantized now where that is asked for; others in `dtype`."""
    weights = load_weights(
        options.folder, config, dtype=dtype, device="cpu", on_progress=_of_weights(on_progress), keep_quantized=True
    )
    if options.quantization is QuantizationType.NONE or weights.is_quantized:
        return weights
    return quantize_online(weights, options.quantization)


def _of_weights(on_progress: OnProgress | None) -> Callable[[int, int], None] | None:
    return None if on_progress is None else partial(on_progress, "weights")


def _use_one_torch_thread_here() -> None:
    """Let torch compute on the calling thread alone, and leave every other thread of the program as it was.

    Beside the compiled step torch only samples, and rows so short lose more by being shared out than they gain: 16
    sequences with top-k decode half as fast on two torch threads (docs/log.md). The number is kept twice, for the
    calling thread and for the process; a second thread puts the process's back.
    """
    num_threads = torch.get_num_threads()
    if num_threads == 1:
        return  # as it is for a draft model, which is loaded on the thread of its target
    torch.set_num_threads(1)
    restorer = threading.Thread(target=torch.set_num_threads, args=(num_threads,))
    restorer.start()
    restorer.join()


def make_eager_executor(
    config: ModelConfig,
    options: EngineOptions,
    sizes: Sizes,
    device: torch.device,
    num_blocks: int,
    on_progress: OnProgress | None,
    *,
    reason: str,
    cache_dtype: torch.dtype | None = None,
    sums_attention: bool = False,
) -> EagerExecutor:
    dtype = torch.float32 if device.type == "cpu" else None
    if device.type == "cpu":
        weights = _cpu_weights(config, options, dtype, on_progress)
    else:
        weights = load_weights(options.folder, config, dtype=dtype, device=device, on_progress=_of_weights(on_progress))
    if device.type == "cpu" and options.cpu_threads:
        torch.set_num_threads(options.cpu_threads)
    attention = (SummingAttention if sums_attention else SdpaAttention)(
        config,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        dtype=weights.dtype,
        device=device,
        cache_dtype=cache_dtype,
        sums_attention=sums_attention,
    )
    decoder = Decoder(config, weights, max_context=sizes.max_model_len)
    quantization = weights.quantization
    if quantization is None and config.quantization is not None:
        quantization = f"{config.quantization.scheme.name}, dequantized at load"
    return EagerExecutor(decoder, attention, reason=reason, quantization=quantization)
