"""Put an engine together from a model folder and a handful of options. Knows every part's constructor, and sizes."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from autobot_llm.engine.attention.sdpa import SdpaAttention
from autobot_llm.engine.batching.preemption import SwapSpace
from autobot_llm.engine.batching.profiles import SchedulingPolicy, get_batching_config
from autobot_llm.engine.batching.scheduler import Scheduler
from autobot_llm.engine.description import OnProgress
from autobot_llm.engine.eager import EagerExecutor
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.executor import Executor, SwappingExecutor
from autobot_llm.engine.gpu.options import GpuLimits, GpuOptions, why_not_fused
from autobot_llm.engine.kernels.cpu.build import CannotCompileError, load_library
from autobot_llm.engine.kernels.cpu.compiled import BLOCK_SIZE, CompiledExecutor, check_coverage
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.kv_cache.storage import bytes_per_block
from autobot_llm.engine.models.config import ModelConfig, load_config
from autobot_llm.engine.models.decoder import Decoder
from autobot_llm.engine.models.weights import DecoderWeights, load_weights
from autobot_llm.engine.quantization.online import quantize_online
from autobot_llm.engine.quantization.scheme import QuantizationType
from autobot_llm.engine.sampler import Sampler
from autobot_llm.engine.speculative.build import SpeculationOptions, Target, build_speculator, make_draft_model
from autobot_llm.engine.speculative.draft_model import DraftModel
from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.errors import ConfigurationError, ModelLoadError

log = logging.getLogger(__name__)

# On a CPU, a step with a full chunk is a pause between two tokens of everyone else: about 40 ms for the embedded model
# on two cores (docs/log.md), and rows beyond 64 make it no more efficient.
MAX_NUM_BATCHED_TOKENS_ON_CPU = 256
# The cache holds so many sequences of full length, or more shorter ones and the prefixes worth keeping; unless that is
# more than this share of the free memory.
NUM_FULL_SEQUENCES = 16
KV_MEMORY_SHARE = 0.25


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
    kv_cache_dtype: Literal["auto", "int8", "fp8", "float16"] = "auto"  # the model's own; on a GPU also 8 bits
    kv_cache_memory: int | None = None  # bytes; on a CPU see NUM_FULL_SEQUENCES, on a GPU what the share leaves
    gpu_memory_utilization: float = 0.9  # share of the GPU's memory, for everything
    attention_backend: Literal["auto", "triton", "flashinfer", "flash_attention", "sdpa"] = "auto"  # on a GPU
    cuda_graphs: Literal["auto", "on", "off"] = "auto"  # on a GPU
    cpu_threads: int | None = None  # measured
    quantization: QuantizationType = QuantizationType.NONE  # of a folder that is not quantized, as it is loaded; a CPU
    speculation: SpeculationOptions = field(default_factory=SpeculationOptions)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What the options come to for this model: the profile's values where they name none."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_waiting_time_ms: float
    scheduling_policy: SchedulingPolicy


def load_engine(options: EngineOptions, on_progress: OnProgress | None = None) -> Engine:
    """Read, check and set up everything; nothing is left half-made. `on_progress` hears how far that is.

    Raises ModelLoadError for the folder, ConfigurationError for an option or for memory that does not suffice.
    """
    config = load_config(options.folder)
    tokenizer = Tokenizer.from_folder(options.folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelLoadError(
            f"{options.folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}"
        )
    device = _device(options)
    sizes = _sizes(config, options, device)
    # A CPU computes in float32, whatever the checkpoint holds; a GPU in the checkpoint's own type.
    dtype = torch.float32 if device.type == "cpu" else getattr(torch, config.checkpoint_dtype or "float32")
    cache_dtype = _cache_dtype(config, options, dtype, device)
    block_bytes = bytes_per_block(config, BLOCK_SIZE, cache_dtype)
    executor, num_blocks = _executor(config, options, sizes, device, dtype, cache_dtype, block_bytes, on_progress)
    pool = BlockPool(num_blocks, BLOCK_SIZE, prefix_caching=options.prefix_caching, scattered=device.type == "cuda")
    scheduler = Scheduler(
        pool,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        max_model_len=sizes.max_model_len,
        max_waiting_time_ms=sizes.max_waiting_time_ms,
        scheduling_policy=sizes.scheduling_policy,
        swap_space=_swap_space(options, executor, device, block_bytes),
    )
    log.info("%s: %s step (%s), %d cache blocks", options.folder.name, executor.name, executor.reason, num_blocks)
    target = _target(config, tokenizer, options, sizes, num_blocks)
    make_draft = partial(_draft_executor, options, sizes, device)
    try:
        speculator, speculation_reason = build_speculator(options.speculation, target, make_draft)
    except BaseException:
        executor.close()
        raise
    log.info("speculation: %s", speculation_reason)
    return Engine(
        config,
        tokenizer,
        executor,
        scheduler,
        Sampler(config.vocab_size),
        bytes_per_block=block_bytes,
        speculator=speculator,
        speculation_reason=speculation_reason,
    )


def load_draft_model(folder: Path, draft_folder: Path, options: EngineOptions) -> DraftModel:
    """A draft model for the model in `folder`, without that model. Raises what `load_engine` does."""
    config, device = load_config(folder), _device(options)
    sizes = _sizes(config, options, device)
    num_blocks = NUM_FULL_SEQUENCES * -(-sizes.max_model_len // BLOCK_SIZE)
    target = _target(config, Tokenizer.from_folder(folder), replace(options, folder=folder), sizes, num_blocks)
    return make_draft_model(draft_folder, target, partial(_draft_executor, options, sizes, device))


def _target(
    config: ModelConfig, tokenizer: Tokenizer, options: EngineOptions, sizes: _Sizes, num_blocks: int
) -> Target:
    return Target(
        folder=options.folder,
        is_on_cpu=_device(options).type == "cpu",
        tokenizer=tokenizer,
        vocab_size=config.vocab_size,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        prefix_caching=options.prefix_caching,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        max_model_len=sizes.max_model_len,
    )


def _draft_executor(
    options: EngineOptions,
    sizes: _Sizes,
    device: torch.device,
    folder: Path,
    config: ModelConfig,
    context: int,
    num_blocks: int,
) -> Executor:
    options, sizes = replace(options, folder=folder), replace(sizes, max_model_len=context)
    if device.type == "cpu":
        return _cpu_executor(config, options, sizes, device, num_blocks, None)
    return _eager_executor(config, options, sizes, device, num_blocks, None, reason="a draft model")


def _device(options: EngineOptions) -> torch.device:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("AUTOBOT_DEVICE='cuda': this torch sees no GPU; expected auto or cpu")
    if options.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _cache_dtype(config: ModelConfig, options: EngineOptions, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What keys and values are stored as. Raises ConfigurationError where that is not to be had."""
    asked = options.kv_cache_dtype
    own = str(dtype).removeprefix("torch.")
    if asked in ("auto", own):
        return dtype
    if asked == "float16":
        expected = "auto" if device.type == "cpu" else "auto, int8 or fp8"
        raise ConfigurationError(f"AUTOBOT_KV_CACHE_DTYPE='float16': the model computes in {own}; expected {expected}")
    why_not = "this engine runs on a CPU" if device.type == "cpu" else why_not_fused(config, dtype)
    if why_not is not None:
        raise ConfigurationError(
            f"AUTOBOT_KV_CACHE_DTYPE={asked!r}: keys and values are rounded by the GPU kernels only, and {why_not}; "
            "expected auto"
        )
    return torch.int8 if asked == "int8" else torch.float8_e4m3fn


def _sizes(config: ModelConfig, options: EngineOptions, device: torch.device) -> _Sizes:
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
    return _Sizes(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(options.max_num_batched_tokens or max_num_batched_tokens, max_num_seqs),
        max_waiting_time_ms=options.max_waiting_time_ms or profile.max_waiting_time_ms,
        scheduling_policy=options.scheduling_policy or profile.scheduling_policy,
    )


def _swap_space(options: EngineOptions, executor: Executor, device: torch.device, block_bytes: int) -> SwapSpace | None:
    """On a GPU, copying a cache back costs a tenth of computing it again; on a CPU it is the same memory."""
    can_swap = isinstance(executor, SwappingExecutor)
    if options.preemption == "swap" and not can_swap:
        raise ConfigurationError(
            f"AUTOBOT_PREEMPTION='swap': the {executor.name} step cannot move its cache; expected auto or recompute"
        )
    if not can_swap or options.preemption == "recompute" or (options.preemption == "auto" and device.type == "cpu"):
        return None
    assert isinstance(executor, SwappingExecutor)
    return SwapSpace(executor, max_bytes=max(options.swap_memory, block_bytes), bytes_per_block=block_bytes)


def _num_blocks(
    config: ModelConfig, options: EngineOptions, sizes: _Sizes, device: torch.device, block_bytes: int
) -> int:
    """Blocks of a cache that nothing measured has sized: see NUM_FULL_SEQUENCES."""
    blocks_per_sequence = -(-sizes.max_model_len // BLOCK_SIZE)
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


def _executor(
    config: ModelConfig,
    options: EngineOptions,
    sizes: _Sizes,
    device: torch.device,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    block_bytes: int,
    on_progress: OnProgress | None,
) -> tuple[Executor, int]:
    """The fastest step that can run here, and its number of cache blocks: fused on a GPU, compiled on a CPU, torch."""
    if device.type == "cuda":
        if options.quantization is not QuantizationType.NONE:
            raise ConfigurationError(
                f"AUTOBOT_QUANTIZATION_TYPE={options.quantization.value!r}: quantized products on a GPU are not built "
                "yet; expected none, or AUTOBOT_DEVICE=cpu"
            )
        if options.compiled_step == "on":
            raise ConfigurationError("AUTOBOT_COMPILED_STEP='on': expected auto or off on a GPU, or AUTOBOT_DEVICE=cpu")
        why_eager = why_not_fused(config, dtype)
        if why_eager is None:
            return _gpu_executor(config, options, sizes, device, cache_dtype, on_progress)
        log.warning("torch runs the steps, several times slower than the GPU kernels: %s", why_eager)
        num_blocks = _num_blocks(config, options, sizes, device, block_bytes)
        make: Callable[..., Executor] = partial(_eager_executor, reason=why_eager)
    else:
        num_blocks = _num_blocks(config, options, sizes, device, block_bytes)
        make = _cpu_executor
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
    sizes: _Sizes,
    device: torch.device,
    cache_dtype: torch.dtype,
    on_progress: OnProgress | None,
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
        ),
        GpuLimits(sizes.max_num_seqs, sizes.max_num_batched_tokens, sizes.max_model_len),
        device,
        on_progress,
    )
    return executor, plan.num_blocks


def _cpu_executor(
    config: ModelConfig,
    options: EngineOptions,
    sizes: _Sizes,
    device: torch.device,
    num_blocks: int,
    on_progress: OnProgress | None,
) -> Executor:
    """The compiled step where it can run, else torch, and why."""
    why_eager = "switched off by AUTOBOT_COMPILED_STEP"
    if options.compiled_step != "off":
        try:
            return _compiled_executor(config, options, sizes, num_blocks, on_progress)
        except CannotCompileError as error:
            if options.compiled_step == "on":
                raise ConfigurationError(f"AUTOBOT_COMPILED_STEP='on': {error}") from error
            log.warning("torch runs the steps, several times slower than the compiled step: %s", error)
            why_eager = str(error)
    return _eager_executor(config, options, sizes, device, num_blocks, on_progress, reason=why_eager)


def _compiled_executor(
    config: ModelConfig,
    options: EngineOptions,
    sizes: _Sizes,
    num_blocks: int,
    on_progress: OnProgress | None,
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


def _eager_executor(
    config: ModelConfig,
    options: EngineOptions,
    sizes: _Sizes,
    device: torch.device,
    num_blocks: int,
    on_progress: OnProgress | None,
    *,
    reason: str,
) -> EagerExecutor:
    dtype = torch.float32 if device.type == "cpu" else None
    if device.type == "cpu":
        weights = _cpu_weights(config, options, dtype, on_progress)
    else:
        weights = load_weights(options.folder, config, dtype=dtype, device=device, on_progress=_of_weights(on_progress))
    if device.type == "cpu" and options.cpu_threads:
        torch.set_num_threads(options.cpu_threads)
    attention = SdpaAttention(config, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=weights.dtype, device=device)
    decoder = Decoder(config, weights, max_context=sizes.max_model_len)
    return EagerExecutor(decoder, attention, reason=reason, quantization=weights.quantization)
