"""Put an engine together from a model folder and a handful of options. Knows every part's constructor, and sizes."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from autobot_llm.engine.batching.preemption import SwapSpace
from autobot_llm.engine.batching.retention import Evictor, HeavyHitters, KeepsAll, Retention, SlidingWindow
from autobot_llm.engine.batching.scheduler import Scheduler
from autobot_llm.engine.description import CacheDescription, OnProgress
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.executor import (
    NO_FEATURES,
    Executor,
    FeatureExecutor,
    FeatureKinds,
    PipelinedExecutor,
    SwappingExecutor,
)
from autobot_llm.engine.executors import NUM_FULL_SEQUENCES, make_cpu_executor, make_executor
from autobot_llm.engine.gpu.options import ChainPlace, DraftPlace
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.kv_cache.policy import BLOCK_SIZE, CachePolicy
from autobot_llm.engine.kv_cache.storage import bytes_per_block
from autobot_llm.engine.models.config import ModelConfig, load_config
from autobot_llm.engine.options import (
    EngineOptions,
    Sizes,
    choose_cache_dtype,
    choose_cache_policy,
    choose_device,
    choose_sizes,
)
from autobot_llm.engine.quantization.scheme import QuantizationType
from autobot_llm.engine.sampler import Sampler
from autobot_llm.engine.speculative.build import (
    Target,
    build_speculator,
    make_draft_model,
    no_speculation_beside_heavy_hitters,
    wanted_features,
)
from autobot_llm.engine.speculative.draft_model import DraftModel
from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.errors import ConfigurationError, ModelLoadError

log = logging.getLogger(__name__)


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
    device = choose_device(options)
    config, policy = choose_cache_policy(config, options, device)
    sizes = choose_sizes(config, options, device, policy)
    # A CPU computes in float32, whatever the checkpoint holds; a GPU in the checkpoint's own type.
    dtype = torch.float32 if device.type == "cpu" else getattr(torch, config.checkpoint_dtype or "float32")
    cache_dtype = choose_cache_dtype(config, options, dtype, device)
    block_bytes = bytes_per_block(config, BLOCK_SIZE, cache_dtype)
    kinds = NO_FEATURES if device.type == "cpu" else wanted_features(options.speculation, options.folder, config)
    executor, num_blocks = make_executor(
        config, options, sizes, device, dtype, cache_dtype, block_bytes, on_progress,
        sums_attention=policy.heavy_hitters > 0, features=kinds,
    )  # fmt: skip
    with ExitStack() as made:
        made.callback(executor.close)
        prefix_caching = options.prefix_caching and not policy.heavy_hitters  # whose blocks change while they are used
        pool = BlockPool(num_blocks, BLOCK_SIZE, prefix_caching=prefix_caching, scattered=device.type == "cuda")
        scheduler = Scheduler(
            pool,
            max_num_seqs=sizes.max_num_seqs,
            max_num_batched_tokens=sizes.max_num_batched_tokens,
            max_model_len=sizes.max_model_len,
            max_waiting_time_ms=sizes.max_waiting_time_ms,
            scheduling_policy=sizes.scheduling_policy,
            swap_space=_swap_space(options, executor, device, block_bytes),
            retention=_retention(policy, executor),
        )
        log.info("%s: %s step (%s), %d cache blocks", options.folder.name, executor.name, executor.reason, num_blocks)
        target = _target(
            config,
            tokenizer,
            options,
            sizes,
            max(num_blocks, -(-sizes.max_model_len // BLOCK_SIZE)),  # a draft model keeps whole sequences
            features=_features_of(executor, kinds, device),
            place=_place(executor, options),
        )
        make_draft = partial(_draft_executor, options, sizes, device, target)
        speculator, speculation_reason = (
            no_speculation_beside_heavy_hitters(options.speculation)
            if policy.heavy_hitters
            else build_speculator(options.speculation, target, make_draft)
        )
        if speculator is not None:
            made.callback(speculator.close)
        log.info("speculation: %s", speculation_reason)
        engine = Engine(
            config,
            tokenizer,
            executor,
            scheduler,
            Sampler(config.vocab_size),
            bytes_per_block=block_bytes,
            cache=CacheDescription(
                policy=policy,
                dtype=str(cache_dtype).removeprefix("torch."),
                is_rounded=cache_dtype != dtype,
                bytes_per_token=block_bytes // BLOCK_SIZE,
                plain_bytes_per_token=bytes_per_block(config, BLOCK_SIZE, dtype) // BLOCK_SIZE,
            ),
            speculator=speculator,
            speculation_reason=speculation_reason,
        )
        made.pop_all()  # from here on the engine closes them
    return engine


def _retention(policy: CachePolicy, executor: Executor) -> Retention:
    if policy.heavy_hitters:
        assert isinstance(executor, Evictor), "it was asked to sum attention"
        return HeavyHitters(policy, executor)
    return SlidingWindow(policy) if policy.window else KeepsAll()


def _features_of(executor: Executor, kinds: FeatureKinds, device: torch.device) -> FeatureKinds | None:
    """What steps keep; None: whatever they are asked for."""
    if device.type == "cpu" and isinstance(executor, FeatureExecutor):
        return None
    return kinds if isinstance(executor, PipelinedExecutor) else NO_FEATURES


def _place(executor: Executor, options: EngineOptions) -> DraftPlace | None:
    if executor.name != "gpu":
        return None
    from autobot_llm.engine.gpu.executor import GpuExecutor  # triton is needed only here

    assert isinstance(executor, GpuExecutor)
    return DraftPlace(
        executor.stream,
        executor.embeddings,
        executor.limits,
        options.attention_backend,
        uses_graphs=options.cuda_graphs != "off",
        tokens_R=executor.tokens,
        first_draft_row=executor.first_draft_row,
    )


def load_draft_model(folder: Path, draft_folder: Path, options: EngineOptions) -> DraftModel:
    """A draft model for the model in `folder`, without that model. Raises what `load_engine` does."""
    config, device = load_config(folder), choose_device(options)
    sizes = choose_sizes(config, options, device, CachePolicy())
    num_blocks = NUM_FULL_SEQUENCES * -(-sizes.max_model_len // BLOCK_SIZE)
    options = replace(options, folder=folder)
    target = _target(config, Tokenizer.from_folder(folder), options, sizes, num_blocks, features=NO_FEATURES)
    return make_draft_model(draft_folder, target, partial(_draft_executor, options, sizes, device, target))


def _target(
    config: ModelConfig,
    tokenizer: Tokenizer,
    options: EngineOptions,
    sizes: Sizes,
    num_blocks: int,
    *,
    features: FeatureKinds | None,
    place: DraftPlace | None = None,
) -> Target:
    return Target(
        folder=options.folder,
        is_on_cpu=choose_device(options).type == "cpu",
        tokenizer=tokenizer,
        config=config,
        features=features,
        place=place,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        prefix_caching=options.prefix_caching,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        max_model_len=sizes.max_model_len,
    )


def _draft_executor(
    options: EngineOptions,
    sizes: Sizes,
    device: torch.device,
    target: Target,
    folder: Path,
    config: ModelConfig,
    context: int,
    num_blocks: int,
) -> tuple[Executor, int]:
    options = replace(options, folder=folder)
    sizes = replace(sizes, max_model_len=context, max_cached_tokens=context)
    if device.type == "cpu":
        return make_cpu_executor(config, options, sizes, device, num_blocks, None), num_blocks
    dtype = getattr(torch, config.checkpoint_dtype or "float32")
    block_bytes = bytes_per_block(config, BLOCK_SIZE, dtype)
    room = torch.cuda.mem_get_info(device)[0] // 4  # of what the target has left
    options = replace(options, kv_cache_memory=min(num_blocks * block_bytes, room), quantization=QuantizationType.NONE)
    chain = _chain_place(target, config, options.speculation.num_tokens)
    return make_executor(config, options, sizes, device, dtype, dtype, block_bytes, None, chain=chain)


def _chain_place(target: Target, draft: ModelConfig, longest: int) -> ChainPlace | None:
    """None for a draft that is loaded alone, and where one may draw what the target has no embedding of."""
    place = target.place
    if place is None or draft.vocab_size > target.config.vocab_size:
        return None
    return ChainPlace(longest, place.stream, place.tokens_R, place.first_draft_row)


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
