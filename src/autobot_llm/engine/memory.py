"""Decide how many cache blocks a GPU has room for, and say what would fit where it has not. Pure arithmetic on bytes.

Knows sizes and the names of the settings that change them; asks no device, so the same functions answer before the
weights are loaded (from the headers) and after a profiling run (from what was measured).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from autobot_llm.engine.gpu.graph_sizes import (
    BYTES_PER_CHAIN,
    BYTES_PER_GRAPH,
    chain_sizes,
    crowd_graph_sizes,
    decode_graph_sizes,
    long_graph_sizes,
    prompt_graph_sizes,
    tree_graph_sizes,
)
from autobot_llm.engine.models.config import ModelConfig
from autobot_llm.engine.models.shapes import expected_shapes, matrix_names
from autobot_llm.engine.quantization.scheme import Scheme
from autobot_llm.errors import ConfigurationError

MIB, GIB = 2**20, 2**30
# More blocks than this multiple of what all sequences hold at full length would find no use, and each costs the host
# some memory and start-up time. What is beyond the first multiple keeps prefixes.
MAX_FULL_LOADS = 2


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A device's memory in bytes: `total`, and what was `free` before the engine allocated anything."""

    total: int
    free: int

    @property
    def reserve(self) -> int:
        """What is never planned for: workspaces of libraries, kernels loaded later, and fragments."""
        return max(256 * MIB, self.total // 100)

    @property
    def num_bytes_of_others(self) -> int:
        """Held by other programs and engines, and by the driver."""
        return self.total - self.free


@dataclass(frozen=True, slots=True)
class MemoryDemand:
    """What an engine wants of a device. Sizes in bytes.

    `activation_bytes` is the peak of a step above the weights, as the allocator reserved it; `graph_bytes` is what
    captured graphs hold. `num_weight_bytes_each` is the size of one number, in the weights and in the cache.
    A sequence has at most `max_cached_tokens` of its `max_model_len` in the cache at once; None: all of them.
    `utilization` is the share of the device's total that all of it may take; `cache_bytes` replaces it by a size of
    the cache alone.
    """

    weight_bytes: int
    activation_bytes: int
    graph_bytes: int
    block_bytes: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    utilization: float
    cache_bytes: int | None = None
    max_cached_tokens: int | None = None
    num_weight_bytes_each: int = 2

    @property
    def fixed_bytes(self) -> int:
        """Everything but the cache."""
        return self.weight_bytes + self.activation_bytes + self.graph_bytes

    @property
    def blocks_per_sequence(self) -> int:
        num_tokens = self.max_model_len
        if self.max_cached_tokens is not None:
            num_tokens = min(num_tokens, self.max_cached_tokens)
        return -(-num_tokens // self.block_size)

    @property
    def sequence_bytes(self) -> int:
        """The cache of one sequence of full length, the least that an engine can work with."""
        return self.blocks_per_sequence * self.block_bytes


@dataclass(frozen=True, slots=True)
class CachePlan:
    """The cache that fits: its blocks, and how many sequences of full length they hold at once."""

    num_blocks: int
    num_tokens: int
    num_bytes: int
    num_full_sequences: int


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change that makes a demand fit: what to do, and the memory and demand that it leads to."""

    text: str
    memory: DeviceMemory
    demand: MemoryDemand


def plan_cache(memory: DeviceMemory, demand: MemoryDemand, *, name: str = "the model") -> CachePlan:
    """The largest useful cache that leaves the device its reserve.

    Raises ConfigurationError where not even one sequence of full length fits, or a demanded cache size does not; it
    says what does fit, for `name`.
    """
    if _shortfall(memory, demand) > 0:
        raise ConfigurationError(_explanation(memory, demand, name))
    if demand.cache_bytes is not None:
        num_blocks = demand.cache_bytes // demand.block_bytes
    else:
        most_useful = MAX_FULL_LOADS * demand.max_num_seqs * demand.blocks_per_sequence
        num_blocks = min(most_useful, _room_for_cache(memory, demand) // demand.block_bytes)
    return CachePlan(
        num_blocks=num_blocks,
        num_tokens=num_blocks * demand.block_size,
        num_bytes=num_blocks * demand.block_bytes,
        num_full_sequences=num_blocks // demand.blocks_per_sequence,
    )


def remedies(memory: DeviceMemory, demand: MemoryDemand) -> list[Remedy]:
    """Single changes that make a demand fit; where none does, changes that do together with others; else none."""
    no_graphs = Remedy("AUTOBOT_CUDA_GRAPHS=off with ", memory, replace(demand, graph_bytes=0))
    whole = Remedy("AUTOBOT_GPU_MEMORY_UTILIZATION=1 with ", memory, replace(demand, utilization=1.0))
    both = Remedy(whole.text + no_graphs.text, memory, replace(whole.demand, graph_bytes=0))
    for base in (Remedy("", memory, demand), no_graphs, whole, both):
        fitting = [
            Remedy(base.text + change.text, change.memory, change.demand)
            for change in _changes(memory, base.demand)
            if _shortfall(change.memory, change.demand) <= 0
        ]
        if fitting:
            return fitting
    return []


def kv_bytes_per_token(config: ModelConfig, num_bytes_each: float) -> int:
    """Keys and values of one token over all layers."""
    return int(2 * config.num_layers * config.num_kv_heads * config.head_size * num_bytes_each)


def weight_bytes(config: ModelConfig, num_bytes_each: int, scheme: Scheme | None = None) -> int:
    """All tensors of the model; under a scheme the layers' matrices take what it stores, scales included."""
    quantized = frozenset() if scheme is None else matrix_names(config)
    total = 0
    for name, shape in expected_shapes(config).items():
        if scheme is not None and name in quantized:
            total += scheme.bytes_of(*shape, scale_bytes=num_bytes_each)
        else:
            total += math.prod(shape) * num_bytes_each
    return total


def estimated_graph_bytes(
    config: ModelConfig,
    *,
    max_num_seqs: int,
    max_model_len: int,
    num_batched_tokens: int,
    num_bytes_each: int,
    takes_trees: bool = False,
    longest_chain: int = 0,
) -> int:
    """What the captured graphs of a GPU hold: one set of tensors that all of them share, and their kernels."""
    sizes = decode_graph_sizes(max_num_seqs)
    prompt_sizes = prompt_graph_sizes(num_batched_tokens)
    shared = estimated_activation_bytes(
        config,
        num_batched_tokens=max((*sizes, *prompt_sizes)),
        num_rows=sizes[-1],
        num_bytes_each=num_bytes_each,
    )
    num_graphs = len(sizes) + len(long_graph_sizes(max_num_seqs, max_model_len)) + len(prompt_sizes)
    num_graphs += len(crowd_graph_sizes(num_batched_tokens, max_num_seqs))
    if takes_trees:
        num_graphs += len(tree_graph_sizes(num_batched_tokens))
    num_chains = 2 * sum(chain_sizes(max_num_seqs, longest_chain).values())
    return shared + BYTES_PER_GRAPH * num_graphs + BYTES_PER_CHAIN * num_chains


def estimated_activation_bytes(
    config: ModelConfig, *, num_batched_tokens: int, num_rows: int, num_bytes_each: int
) -> int:
    """Bytes that one step holds at its peak, before it can be measured: `num_rows` sequences sample from it.

    Counts what one layer keeps at once (residual, normed input, and the wider of attention's and the feed-forward's
    own tensors), and the logits in float32 with as much again, twice, for sampling.
    """
    q_size, kv_size = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    widest = max(2 * q_size + 2 * kv_size, 3 * config.intermediate_size)
    layer_bytes = num_batched_tokens * (2 * config.hidden_size + widest) * num_bytes_each
    return layer_bytes + 3 * 4 * num_rows * config.vocab_size


def _allowance(memory: DeviceMemory, demand: MemoryDemand) -> int:
    """Bytes that the whole engine may take."""
    physical = memory.free - memory.reserve
    return physical if demand.cache_bytes is not None else min(physical, int(memory.total * demand.utilization))


def _room_for_cache(memory: DeviceMemory, demand: MemoryDemand) -> int:
    return _allowance(memory, demand) - demand.fixed_bytes


def _shortfall(memory: DeviceMemory, demand: MemoryDemand) -> int:
    """Bytes that are missing for the cache that must fit; 0 or less: it does."""
    must_fit = demand.sequence_bytes
    if demand.cache_bytes is None:
        return must_fit - _room_for_cache(memory, demand)
    num_usable = demand.cache_bytes // demand.block_bytes * demand.block_bytes
    return max(must_fit - num_usable, demand.cache_bytes - _room_for_cache(memory, demand))


def _changes(memory: DeviceMemory, demand: MemoryDemand) -> Iterator[Remedy]:
    """Everything a user could change, each by as little as may suffice."""
    room = _room_for_cache(memory, demand)
    yield from _shorter_contexts(memory, demand, min(room, room if demand.cache_bytes is None else demand.cache_bytes))
    if demand.cache_bytes is None:
        share = math.ceil((demand.fixed_bytes + demand.sequence_bytes) / memory.total * 100) / 100
        if demand.utilization < share <= 1:
            text = f"AUTOBOT_GPU_MEMORY_UTILIZATION={share:g} or more"
            yield Remedy(text, memory, replace(demand, utilization=share))
    elif demand.cache_bytes < demand.sequence_bytes:
        num_mib = -(-demand.sequence_bytes // MIB)
        yield Remedy(
            f"AUTOBOT_KV_CACHE_MEMORY={num_mib}MiB or more", memory, replace(demand, cache_bytes=num_mib * MIB)
        )
    elif room >= MIB:
        num_mib = room // MIB
        yield Remedy(
            f"AUTOBOT_KV_CACHE_MEMORY={num_mib}MiB or less", memory, replace(demand, cache_bytes=num_mib * MIB)
        )
    if demand.graph_bytes:
        yield Remedy("AUTOBOT_CUDA_GRAPHS=off", memory, replace(demand, graph_bytes=0))
    if demand.num_weight_bytes_each > 2:
        yield Remedy("a copy of the model that is stored in bfloat16", memory, _in_16_bits(demand))
    missing = _shortfall(memory, demand)
    if 0 < missing <= memory.num_bytes_of_others:
        text = f"{_gib(missing)} more free memory on this GPU, of which others hold {_gib(memory.num_bytes_of_others)}"
        yield Remedy(text, replace(memory, free=memory.free + missing), demand)


def _shorter_contexts(memory: DeviceMemory, demand: MemoryDemand, room: int) -> Iterator[Remedy]:
    longest = room // demand.block_bytes * demand.block_size
    if not 0 < longest < demand.max_model_len:
        return
    text = f"AUTOBOT_MAX_MODEL_LEN={longest} or less"
    together = room // demand.block_bytes // demand.max_num_seqs * demand.block_size
    if demand.max_num_seqs > 1 and together:
        text += f" ({together} or less for {demand.max_num_seqs} such sequences at once)"
    yield Remedy(text, memory, replace(demand, max_model_len=longest))


def _in_16_bits(demand: MemoryDemand) -> MemoryDemand:
    narrower = demand.num_weight_bytes_each // 2
    return replace(
        demand,
        weight_bytes=demand.weight_bytes // narrower,
        activation_bytes=demand.activation_bytes // narrower,
        block_bytes=demand.block_bytes // narrower,
        num_weight_bytes_each=2,
    )


def _explanation(memory: DeviceMemory, demand: MemoryDemand, name: str) -> str:
    cache_bytes, what_for = demand.sequence_bytes, f"one sequence of {demand.max_model_len} tokens"
    if demand.cache_bytes is not None and demand.cache_bytes > cache_bytes:
        cache_bytes, what_for = demand.cache_bytes, "AUTOBOT_KV_CACHE_MEMORY"
    parts = {
        "weights": demand.weight_bytes,
        "activations": demand.activation_bytes,
        "CUDA graphs": demand.graph_bytes,
        f"KV cache for {what_for}": cache_bytes,
    }
    needs = ", ".join(f"{part} {_gib(size)}" for part, size in parts.items() if size)
    limit = f"{_gib(memory.total)} has {_gib(memory.free)} free, less a reserve of {_gib(memory.reserve)}"
    if demand.cache_bytes is None:
        allowed = _gib(int(memory.total * demand.utilization))
        limit += f", and AUTOBOT_GPU_MEMORY_UTILIZATION={demand.utilization:g} allows {allowed}"
    elif demand.cache_bytes < demand.sequence_bytes:
        limit += f", and AUTOBOT_KV_CACHE_MEMORY is {_gib(demand.cache_bytes)}"
    found = [remedy.text for remedy in remedies(memory, demand)]
    advice = f"it fits with {'; or with '.join(found)}" if found else "it takes a larger GPU or a smaller model"
    return f"{name} does not fit: it needs {needs}; this GPU of {limit}: {advice}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
