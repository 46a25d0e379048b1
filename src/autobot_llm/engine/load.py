"""Put an engine together from a model folder and a handful of options. Knows every part's constructor, and sizes."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from autobot_llm.engine.attention.sdpa import SdpaAttention
from autobot_llm.engine.batching.scheduler import Scheduler
from autobot_llm.engine.eager import EagerExecutor
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.executor import Executor
from autobot_llm.engine.kernels.cpu.build import CannotCompileError, load_library
from autobot_llm.engine.kernels.cpu.compiled import BLOCK_SIZE, CompiledExecutor, check_coverage
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.kv_cache.storage import bytes_per_block
from autobot_llm.engine.models.config import ModelConfig, load_config
from autobot_llm.engine.models.decoder import Decoder
from autobot_llm.engine.models.weights import load_weights
from autobot_llm.engine.sampler import Sampler
from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.errors import ConfigurationError, ModelLoadError

log = logging.getLogger(__name__)

MAX_NUM_SEQS = 64
# A step with a full chunk is a pause between two tokens of everyone else: about 40 ms for the embedded model on two
# cores (docs/log.md), and rows beyond 64 make it no more efficient.
MAX_NUM_BATCHED_TOKENS = {"cpu": 256, "cuda": 4096}
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
    max_num_seqs: int | None = None  # 64
    max_num_batched_tokens: int | None = None  # 256 on a CPU, 4096 on a GPU
    kv_cache_memory: int | None = None  # bytes; see NUM_FULL_SEQUENCES
    cpu_threads: int | None = None  # measured


@dataclass(frozen=True, slots=True)
class _Sizes:
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int


def load_engine(options: EngineOptions, on_progress: Callable[[int, int], None] | None = None) -> Engine:
    """Read, check and set up everything; nothing is left half-made. `on_progress` gets (tensors read, in all).

    Raises ModelLoadError for the folder, ConfigurationError for an option or for memory that does not suffice.
    """
    config = load_config(options.folder)
    tokenizer = Tokenizer.from_folder(options.folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelLoadError(
            f"{options.folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}"
        )
    device = _device(options)
    # A CPU computes in float32, whatever the checkpoint holds; a GPU in the checkpoint's own type.
    cache_dtype = torch.float32 if device.type == "cpu" else getattr(torch, config.checkpoint_dtype or "float32")
    block_bytes = bytes_per_block(config, BLOCK_SIZE, cache_dtype)
    sizes = _sizes(config, options, device, block_bytes)
    try:
        executor = _executor(config, options, sizes, device, on_progress)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ConfigurationError(
            f"the memory of this {device.type} does not suffice for {options.folder.name} and "
            f"{sizes.num_blocks * block_bytes / 2**20:,.0f} MiB of cache: {error}; set AUTOBOT_KV_CACHE_MEMORY or "
            "AUTOBOT_MAX_MODEL_LEN lower"
        ) from error
    pool = BlockPool(sizes.num_blocks, BLOCK_SIZE, prefix_caching=options.prefix_caching)
    scheduler = Scheduler(
        pool,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        max_model_len=sizes.max_model_len,
    )
    log.info("%s: %s step (%s), %d cache blocks", options.folder.name, executor.name, executor.reason, sizes.num_blocks)
    sampler = Sampler(config.vocab_size)
    return Engine(config, tokenizer, executor, scheduler, sampler, bytes_per_block=block_bytes)


def _device(options: EngineOptions) -> torch.device:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("AUTOBOT_DEVICE='cuda': this torch sees no GPU; expected auto or cpu")
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(options.device)


def _sizes(config: ModelConfig, options: EngineOptions, device: torch.device, block_bytes: int) -> _Sizes:
    max_model_len = options.max_model_len or config.max_position_embeddings
    if max_model_len > config.max_position_embeddings:
        raise ConfigurationError(
            f"AUTOBOT_MAX_MODEL_LEN={max_model_len}: the model's context is {config.max_position_embeddings} tokens"
        )
    max_num_seqs = options.max_num_seqs or MAX_NUM_SEQS
    blocks_per_sequence = -(-max_model_len // BLOCK_SIZE)
    memory = options.kv_cache_memory or min(
        int(_free_memory(device) * KV_MEMORY_SHARE), NUM_FULL_SEQUENCES * blocks_per_sequence * block_bytes
    )
    num_blocks = memory // block_bytes
    if num_blocks < blocks_per_sequence:
        raise ConfigurationError(
            f"one sequence of {max_model_len} tokens needs {blocks_per_sequence * block_bytes / 2**20:.0f} MiB of "
            f"cache, and there are {memory / 2**20:.0f} MiB: set AUTOBOT_KV_CACHE_MEMORY higher, or "
            f"AUTOBOT_MAX_MODEL_LEN to at most {memory // block_bytes * BLOCK_SIZE}"
        )
    return _Sizes(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(options.max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS[device.type], max_num_seqs),
        num_blocks=num_blocks,
    )


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
    on_progress: Callable[[int, int], None] | None,
) -> Executor:
    """The compiled step where it can run, else torch, and why."""
    if device.type != "cpu":
        if options.compiled_step == "on":
            raise ConfigurationError("AUTOBOT_COMPILED_STEP='on': expected auto or off on a GPU, or AUTOBOT_DEVICE=cpu")
        why_eager = "the compiled step is for CPUs"
    elif options.compiled_step == "off":
        why_eager = "switched off by AUTOBOT_COMPILED_STEP"
    else:
        try:
            return _compiled_executor(config, options, sizes, on_progress)
        except CannotCompileError as error:
            if options.compiled_step == "on":
                raise ConfigurationError(f"AUTOBOT_COMPILED_STEP='on': {error}") from error
            log.warning("torch runs the steps, several times slower than the compiled step: %s", error)
            why_eager = str(error)
    return _eager_executor(config, options, sizes, device, on_progress, why_eager)


def _compiled_executor(
    config: ModelConfig, options: EngineOptions, sizes: _Sizes, on_progress: Callable[[int, int], None] | None
) -> CompiledExecutor:
    check_coverage(config)
    library = load_library(options.cache_dir)  # before the weights, which may take minutes
    # The weights as they are stored: the step widens bfloat16 by itself.
    weights = load_weights(options.folder, config, dtype=None, device="cpu", on_progress=on_progress)
    _use_one_torch_thread_here()
    return CompiledExecutor(
        config,
        weights,
        library,
        num_blocks=sizes.num_blocks,
        max_tokens=sizes.max_num_batched_tokens,
        max_model_len=sizes.max_model_len,
        num_threads=options.cpu_threads,
    )


def _use_one_torch_thread_here() -> None:
    """Let torch compute on the calling thread alone, and leave every other thread of the program as it was.

    Beside the compiled step torch only samples, and rows so short lose more by being shared out than they gain: 16
    sequences with top-k decode half as fast on two torch threads (docs/log.md). The number is kept twice, for the
    calling thread and for the process; a second thread puts the process's back.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    restorer = threading.Thread(target=torch.set_num_threads, args=(num_threads,))
    restorer.start()
    restorer.join()


def _eager_executor(
    config: ModelConfig,
    options: EngineOptions,
    sizes: _Sizes,
    device: torch.device,
    on_progress: Callable[[int, int], None] | None,
    reason: str,
) -> EagerExecutor:
    dtype = torch.float32 if device.type == "cpu" else None
    weights = load_weights(options.folder, config, dtype=dtype, device=device, on_progress=on_progress)
    if device.type == "cpu" and options.cpu_threads:
        torch.set_num_threads(options.cpu_threads)
    attention = SdpaAttention(
        config, num_blocks=sizes.num_blocks, block_size=BLOCK_SIZE, dtype=weights.dtype, device=device
    )
    decoder = Decoder(config, weights, max_context=sizes.max_model_len)
    return EagerExecutor(decoder, attention, reason=reason)
