"""Which optimizations run in an engine, apart from any one request. Knows the engine; knows nothing of requests."""

from __future__ import annotations

from collections.abc import Iterator

from autobot_llm.engine.description import DescribedExecutor, TellsQuantization
from autobot_llm.engine.engine import Engine
from autobot_llm.report import OptimizationOutcome


def why_no_prefixes(engine: Engine) -> str:
    """Why the engine's pool finds no prefixes."""
    if engine.cache is not None and engine.cache.policy.heavy_hitters:
        return "AUTOBOT_KV_HEAVY_HITTERS changes what blocks hold while they are used"
    return "switched off by AUTOBOT_PREFIX_CACHING"


def running_optimizations(engine: Engine) -> Iterator[OptimizationOutcome]:
    """A line for every optimization of weights and kernels that the router knows."""
    scheduler, executor = engine.scheduler, engine.executor
    prefix_caching = scheduler.block_pool.prefix_caching
    yield OptimizationOutcome(
        name="prefix_caching",
        applied=prefix_caching,
        reason="equal beginnings of a tenant's prompts are computed once"
        if prefix_caching
        else why_no_prefixes(engine),
    )
    yield OptimizationOutcome(
        name="continuous_batching",
        applied=scheduler.max_num_seqs > 1,
        reason=f"up to {scheduler.max_num_seqs} sequences share a step",
    )
    if isinstance(executor, DescribedExecutor):
        gpu = executor.description
        yield OptimizationOutcome(name="cuda_graphs", applied=gpu.num_graphs > 0, reason=gpu.graphs)
        yield OptimizationOutcome(
            name="flash_attention", applied=gpu.attention != "sdpa", reason=f"{gpu.attention}: {gpu.attention_reason}"
        )
    else:
        for name in ("cuda_graphs", "flash_attention"):
            yield OptimizationOutcome(name=name, applied=False, reason=f"the engine runs on a CPU: {executor.name}")
    if engine.cache is not None:
        lines = list(engine.cache.lines())
        yield OptimizationOutcome(
            name="kv_cache_optimization",
            applied=bool(lines),
            reason="; ".join(lines) or f"keys and values are stored as {engine.cache.dtype}, as computed, and all stay",
            lossy=engine.cache.is_lossy,
        )
    scheme = executor.quantization if isinstance(executor, TellsQuantization) else None
    yield OptimizationOutcome(
        name="quantization",
        applied=scheme is not None,
        reason=f"{scheme}: {executor.reason}" if scheme else "the weights are not quantized",
        lossy=scheme is not None,
    )
    yield OptimizationOutcome(
        name="speculative_decoding", applied=engine.speculator is not None, reason=engine.speculation_reason
    )
    methods = engine.speculator.methods if engine.speculator is not None else ()
    yield OptimizationOutcome(
        name="medusa_heads",
        applied="medusa" in methods,
        reason=engine.speculation_reason
        if "medusa" in methods or not methods
        else f"{' and '.join(methods)} drafts; AUTOBOT_SPECULATION_METHOD=medusa has heads do it",
    )
