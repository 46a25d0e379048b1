"""Contexts and sequences that fit beside the weights. Knows the engine's arithmetic of memory; knows no providers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autobot_llm.engine.batching.profiles import get_batching_config
from autobot_llm.engine.kv_cache.policy import BLOCK_SIZE, CachePolicy, choose_policy
from autobot_llm.engine.memory import (
    DeviceMemory,
    MemoryDemand,
    estimated_activation_bytes,
    estimated_graph_bytes,
    kv_bytes_per_token,
    plan_cache,
    weight_bytes,
)
from autobot_llm.engine.models.config import ModelConfig, load_config
from autobot_llm.engine.quantization.scheme import QuantizationConfig, QuantizationType, Scheme, scheme_of
from autobot_llm.errors import ConfigurationError

CONTEXTS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
UTILIZATION = 0.9  # the default of AUTOBOT_GPU_MEMORY_UTILIZATION
# The driver's context and loaded kernels: taken before an engine allocates anything. Measured figures differ from card
# to card by some hundred MiB; this is on the safe side of an H100's.
CONTEXT_BYTES = 600 * 2**20
_BYTES_EACH = {"float32": 4, "bfloat16": 2, "float16": 2}
# A scale of 16 bits for keys, and one for values, of each token and head.
_SCALE_BYTES = 2


@dataclass(frozen=True, slots=True)
class Row:
    """One way to store weights and cache, all in bytes. `sequences` holds for each context how many fit at once; of
    their tokens those are in the cache that the plan's window leaves there.

    `max_context` is the longest single sequence; 0: the weights alone are too large.
    """

    weights: str
    kv_cache: str
    weight_bytes: int
    kv_bytes_per_token: int
    activation_bytes: int
    graph_bytes: int
    reserve_bytes: int
    cache_bytes: int
    max_context: int
    sequences: dict[int, int]

    @property
    def fits(self) -> bool:
        return self.max_context > 0


@dataclass(frozen=True, slots=True)
class Plan:
    """A model on a device of `memory_bytes`, with steps of `num_batched_tokens` for up to `max_num_seqs`.

    `window`: how far back its layers look, by themselves or because it was asked for, so that what is before that
    leaves the cache; 0 where some layer sees everything. `is_window_lossy`: it is narrower than the model's own.
    """

    model: str
    model_type: str
    num_parameters: int
    max_context: int
    memory_bytes: int
    max_num_seqs: int
    num_batched_tokens: int
    window: int
    is_window_lossy: bool
    rows: tuple[Row, ...]


def make_plan(model: Path, memory_bytes: int, *, workload: str = "mixed", sliding_window: int = 0) -> Plan:
    """Plan from the config.json in `model`, a folder, or from that file itself; weights are not needed.

    With a `sliding_window` (AUTOBOT_KV_SLIDING_WINDOW) every layer looks back so many tokens at most. Raises
    ModelLoadError for a configuration that the engine does not know, ConfigurationError for a window that cannot be.
    """
    folder = model.parent if model.name == "config.json" else model
    config = load_config(folder)
    longest = config.max_position_embeddings
    config, policy = choose_policy(config, sliding_window=sliding_window, heavy_hitters=0, max_model_len=longest)
    profile = get_batching_config(workload)
    each = _BYTES_EACH[config.checkpoint_dtype or "bfloat16"]
    rows = [
        _row(config, policy, memory_bytes, each, name, scheme, kv, profile.max_num_seqs, profile.max_num_batched_tokens)
        for name, scheme in _weights(config)
        for kv in ("16-bit" if each == 2 else "32-bit", "8-bit")
    ]
    return Plan(
        model=folder.name,
        model_type=config.model_type,
        num_parameters=weight_bytes(config, 1),
        max_context=config.max_position_embeddings,
        memory_bytes=memory_bytes,
        max_num_seqs=profile.max_num_seqs,
        num_batched_tokens=profile.max_num_batched_tokens,
        window=policy.window,
        is_window_lossy=policy.is_window_asked,
        rows=tuple(rows),
    )


def _weights(config: ModelConfig) -> list[tuple[str, Scheme | None]]:
    """The ways to store the weights: of a quantized model its own alone."""
    if config.quantization is not None:
        return [(config.quantization.scheme.name, config.quantization.scheme)]
    eight, four = (scheme_of(QuantizationConfig(type=kind)) for kind in (QuantizationType.W8A8, QuantizationType.GPTQ))
    return [(config.checkpoint_dtype or "bfloat16", None), ("8-bit", eight), ("4-bit", four)]


def _row(
    config: ModelConfig,
    policy: CachePolicy,
    memory_bytes: int,
    each: int,
    name: str,
    scheme: Scheme | None,
    kv: str,
    max_num_seqs: int,
    num_batched_tokens: int,
) -> Row:
    per_token = kv_bytes_per_token(config, each)
    if kv == "8-bit":
        per_token = kv_bytes_per_token(config, 1) + 2 * config.num_layers * config.num_kv_heads * _SCALE_BYTES
    memory = DeviceMemory(total=memory_bytes, free=max(0, memory_bytes - CONTEXT_BYTES))
    demand = MemoryDemand(
        weight_bytes=weight_bytes(config, each, scheme),
        activation_bytes=estimated_activation_bytes(
            config, num_batched_tokens=num_batched_tokens, num_rows=max_num_seqs, num_bytes_each=each
        ),
        graph_bytes=estimated_graph_bytes(
            config,
            max_num_seqs=max_num_seqs,
            max_model_len=config.max_position_embeddings,
            num_batched_tokens=num_batched_tokens,
            num_bytes_each=each,
        ),
        block_bytes=per_token * BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        max_model_len=BLOCK_SIZE,
        max_num_seqs=2**31,  # so that nothing but the memory limits the cache
        utilization=UTILIZATION,
        num_weight_bytes_each=each,
    )
    try:
        num_tokens = plan_cache(memory, demand).num_tokens
    except ConfigurationError:
        num_tokens = 0
    longest = config.max_position_embeddings
    contexts = sorted({context for context in CONTEXTS if context < longest} | {longest})
    kept = {context: _num_cached(context, policy, num_batched_tokens) for context in contexts}
    return Row(
        weights=name,
        kv_cache=kv,
        weight_bytes=demand.weight_bytes,
        kv_bytes_per_token=per_token,
        activation_bytes=demand.activation_bytes,
        graph_bytes=demand.graph_bytes,
        reserve_bytes=CONTEXT_BYTES + memory.reserve,
        cache_bytes=num_tokens * per_token,
        max_context=longest if kept[longest] <= num_tokens else num_tokens,
        sequences={context: num_tokens // kept[context] for context in contexts},
    )


def _num_cached(context: int, policy: CachePolicy, num_batched_tokens: int) -> int:
    """The most tokens that a sequence of this length has in the cache at once; whole blocks where not all stay."""
    num_new = min(policy.max_new_tokens or num_batched_tokens, num_batched_tokens)
    most = policy.most_tokens(context, num_new)
    return context if most == context else -(-most // BLOCK_SIZE) * BLOCK_SIZE
