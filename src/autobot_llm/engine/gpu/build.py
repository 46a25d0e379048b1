"""Put a GPU executor together: weights, memory, attention, graphs. Knows every part's constructor, and the order.

Memory is measured, not guessed: the weights are loaded, the largest step is run once without a cache, and the cache
gets what that leaves. So nothing later can run out of memory, and what does not fit is known within seconds.
"""

from __future__ import annotations

import gc
import logging
import time
from functools import partial

import numpy as np
import torch

from autobot_llm.engine.attention.choice import make_attention
from autobot_llm.engine.attention.paged import BLOCK_SIZE, AttentionShape
from autobot_llm.engine.batching.plan import StepBatch
from autobot_llm.engine.description import GpuDescription, OnProgress
from autobot_llm.engine.executor import NO_FEATURES
from autobot_llm.engine.gpu.decoder import FusedDecoder
from autobot_llm.engine.gpu.executor import GpuExecutor
from autobot_llm.engine.gpu.options import GpuLimits, GpuOptions
from autobot_llm.engine.gpu.packing import WeightPacker
from autobot_llm.engine.gpu.warm_up import num_compiled_kernels, warm_up
from autobot_llm.engine.kernels.gpu.launch import compile_ahead
from autobot_llm.engine.kv_cache.storage import PagedStorage, bytes_per_block
from autobot_llm.engine.memory import (
    CachePlan,
    DeviceMemory,
    MemoryDemand,
    estimated_activation_bytes,
    estimated_graph_bytes,
    plan_cache,
)
from autobot_llm.engine.models.config import ModelConfig
from autobot_llm.engine.models.weights import DecoderWeights, load_weights, measure_weights
from autobot_llm.errors import ConfigurationError

log = logging.getLogger(__name__)


def build_gpu_executor(
    config: ModelConfig,
    options: GpuOptions,
    limits: GpuLimits,
    device: torch.device,
    on_progress: OnProgress | None,
) -> tuple[GpuExecutor, CachePlan]:
    """Load, measure, allocate and capture. Raises ConfigurationError for what does not fit, and says what would."""
    tell = on_progress or _tell_nobody
    builder = _Builder(config, options, limits, device, tell)
    builder.check_headers()
    weights = builder.load()
    activation_bytes = builder.measure_largest_step(weights)
    plan = builder.plan(weights.num_bytes, activation_bytes)
    try:
        return builder.executor(weights, plan), plan
    except torch.OutOfMemoryError as error:  # somebody else took memory meanwhile
        raise ConfigurationError(
            f"{options.folder.name}: the GPU ran out of memory while {plan.num_bytes / 2**30:.1f} GiB of cache were "
            f"set up: {error}; set AUTOBOT_GPU_MEMORY_UTILIZATION below {options.memory_utilization:g}"
        ) from error


def _tell_nobody(phase: str, num_done: int, num_total: int) -> None:
    """What loading tells where nobody asked."""


class _Builder:
    def __init__(
        self, config: ModelConfig, options: GpuOptions, limits: GpuLimits, device: torch.device, tell: OnProgress
    ) -> None:
        self._tell = tell
        free, total = torch.cuda.mem_get_info(device)
        self._config = config
        self._options = options
        self._limits = limits
        self._device = device
        self._memory = DeviceMemory(total=total, free=free)
        self._dtype = getattr(torch, config.checkpoint_dtype or "float32")
        self._cache_dtype = options.cache_dtype or self._dtype
        self._shape = AttentionShape(config.num_heads, config.num_kv_heads, config.head_size, config.sliding_windows)
        self._uses_graphs = options.cuda_graphs != "off"
        self._num_compiled_kernels = num_compiled_kernels()
        capability = torch.cuda.get_device_capability(device)
        self._packer = WeightPacker.for_model(config, options.quantization, capability)

    def check_headers(self) -> None:
        """Refuse what cannot fit before any weight is read."""
        config, limits = self._config, self._limits
        activation_bytes = estimated_activation_bytes(
            config,
            num_batched_tokens=limits.max_num_batched_tokens,
            num_rows=limits.max_num_seqs,
            num_bytes_each=self._dtype.itemsize,
        )
        weight_bytes = measure_weights(self._options.folder, config, dtype=None)
        if self._packer is not None:
            weight_bytes = self._packer.expected_bytes(config, self._dtype.itemsize)
        self.plan(weight_bytes, activation_bytes)

    def load(self) -> DecoderWeights:
        """The weights on the device: what is or gets quantized in the kernels' layout, layer by layer."""
        packer = self._packer
        weights = load_weights(
            self._options.folder,
            self._config,
            dtype=None,
            device=self._device,
            on_progress=partial(self._tell, "weights"),
            keep_quantized=packer is not None,
            convert=packer,
        )
        if packer is not None:
            packer.warn()
        return weights

    def plan(self, weight_bytes: int, activation_bytes: int) -> CachePlan:
        options, limits = self._options, self._limits
        demand = MemoryDemand(
            weight_bytes=weight_bytes,
            activation_bytes=activation_bytes,
            graph_bytes=self._graph_bytes() if self._uses_graphs else 0,
            block_bytes=bytes_per_block(self._config, BLOCK_SIZE, self._cache_dtype),
            block_size=BLOCK_SIZE,
            max_model_len=limits.max_model_len,
            max_cached_tokens=limits.max_cached_tokens,
            max_num_seqs=limits.max_num_seqs,
            utilization=options.memory_utilization,
            cache_bytes=options.cache_memory,
            num_weight_bytes_each=self._dtype.itemsize,
        )
        return plan_cache(self._memory, demand, name=options.folder.name)

    def measure_largest_step(self, weights: DecoderWeights) -> int:
        """Bytes that the largest step takes beside the weights: run once, with a cache of one block.

        Every kind of step is gone through before, for its kernels' sake: they are compiled side by side.
        """
        before = torch.cuda.memory_allocated(self._device)
        largest = _largest_batch(self._limits)
        try:
            executor = self._bare_executor(weights, num_blocks=1)
            self._tell("kernels", 0, 0)
            with compile_ahead(self._device):
                executor.execute(largest)
                warm_up(executor)
                executor.rehearse()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            executor.execute(largest)
            executor.close()
        except torch.OutOfMemoryError as error:
            raise ConfigurationError(
                f"{self._options.folder.name}: the GPU has no room for a step of {self._limits.max_num_batched_tokens} "
                "tokens beside the weights: set AUTOBOT_MAX_NUM_BATCHED_TOKENS lower"
            ) from error
        peak = torch.cuda.max_memory_reserved(self._device) - before
        del executor
        gc.collect()
        torch.cuda.empty_cache()
        return peak

    def executor(self, weights: DecoderWeights, plan: CachePlan) -> GpuExecutor:
        executor = self._bare_executor(weights, num_blocks=plan.num_blocks)
        if self._options.cuda_graphs == "on" and not executor.attention.can_capture:
            raise ConfigurationError(
                f"AUTOBOT_CUDA_GRAPHS='on': attention by {executor.attention.name} cannot be captured; expected auto "
                "or off, or AUTOBOT_ATTENTION_BACKEND=triton"
            )
        start = time.perf_counter()
        warm_up(executor)
        executor.capture(partial(self._tell, "graphs"))
        executor.description = GpuDescription(
            device=torch.cuda.get_device_name(self._device),
            attention=executor.attention.name,
            attention_reason=executor.attention.reason,
            num_graphs=len(executor.graphs.keys),
            graphs_reason=f"attention by {executor.attention.name} cannot be captured"
            if self._uses_graphs
            else "switched off by AUTOBOT_CUDA_GRAPHS",
            capture_seconds=time.perf_counter() - start,
            had_compiled_kernels=num_compiled_kernels() == self._num_compiled_kernels,
            weights=None if self._packer is None else self._packer.text,
            weight_bytes=weights.num_bytes,
        )
        return executor

    def _bare_executor(self, weights: DecoderWeights, *, num_blocks: int) -> GpuExecutor:
        config, limits = self._config, self._limits
        storage = PagedStorage.allocate(config, num_blocks, BLOCK_SIZE, self._cache_dtype, self._device)
        attention = make_attention(
            self._options.attention_backend,
            self._shape,
            storage.keys,
            storage.values,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
        )
        features = self._options.features
        decoder = FusedDecoder(
            config, weights, storage, attention, max_context=limits.max_model_len, feature_layers=features.layers
        )
        return GpuExecutor(
            decoder,
            storage,
            attention,
            limits,
            vocab_size=config.vocab_size,
            widest_window=self._shape.widest_window,
            uses_graphs=self._uses_graphs,
            reason=f"fused kernels, attention by {attention.name}",
            features=features,
            chain=self._options.chain,
            quantization=None if self._packer is None else self._packer.text,
        )

    def _graph_bytes(self) -> int:
        return estimated_graph_bytes(
            self._config,
            max_num_seqs=self._limits.max_num_seqs,
            max_model_len=self._limits.max_model_len,
            num_batched_tokens=self._limits.max_num_batched_tokens,
            num_bytes_each=self._dtype.itemsize,
            takes_trees=self._options.features != NO_FEATURES,
            longest_chain=0 if self._options.chain is None else self._options.chain.longest,
        )


def _largest_batch(limits: GpuLimits) -> StepBatch:
    """As many fresh prompts as a step holds, none of which touches the cache."""
    num_tokens = limits.max_num_batched_tokens
    length = min(limits.max_model_len, num_tokens)
    starts = np.append(np.arange(0, num_tokens, length), num_tokens).astype(np.int32)
    lens = np.diff(starts)
    num_rows = min(len(lens), limits.max_num_seqs)
    return StepBatch(
        ids_T=np.zeros(num_tokens, np.int64),
        positions_T=np.concatenate([np.arange(n, dtype=np.int32) for n in lens]),
        slots_T=np.full(num_tokens, -1, np.int64),
        query_starts=starts,
        context_lens=lens.astype(np.int32),
        block_tables_SB=np.zeros((len(lens), -(-length // BLOCK_SIZE)), np.int32),
        logit_rows_R=(starts[1:].astype(np.int64) - 1)[:num_rows],
        pending_rows_T=np.full(num_tokens, -1, np.int32),
    )
