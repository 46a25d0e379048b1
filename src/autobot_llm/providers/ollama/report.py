"""What was done for one answer, from what Ollama says about it. Knows its counts and durations; invents none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from autobot_llm.dialects.ollama.answers import WireLine
from autobot_llm.dialects.ollama.models import Shown, Tag
from autobot_llm.providers.ollama.variants import FULL_PRECISION
from autobot_llm.report import OptimizationOutcome

_DECIDED_BY = {
    "continuous_batching": "OLLAMA_NUM_PARALLEL (1 unless it is set)",
    "flash_attention": "OLLAMA_FLASH_ATTENTION",
    "kv_cache_optimization": "OLLAMA_KV_CACHE_TYPE",
}
A_LOAD = 0.5  # seconds from which `load_duration` is a load; finding a loaded model takes hundredths


def was_loaded(line: WireLine) -> bool:
    """Whether the request had to wait for the model to be loaded."""
    return (line.load_duration or 0) / 1e9 >= A_LOAD


def outcomes(line: WireLine, *, num_ctx: int, last_load: float | None, shown: Shown) -> Iterator[OptimizationOutcome]:
    """The report's lines. `last_load` is how many seconds the model's last load took, if one was seen."""
    yield _residency(line, num_ctx, last_load)
    yield _prefix_caching(line)
    if level := shown.details.quantization_level:
        is_full = level.upper() in FULL_PRECISION
        yield OptimizationOutcome(
            name="quantization",
            applied=not is_full,
            reason=f"the model's weights are stored as {level}",
            lossy=not is_full,
        )


def running_optimizations(tag: Tag | None, metrics: Mapping[str, float]) -> Iterator[OptimizationOutcome]:
    """What runs apart from any one request. `tag` is the default model's; settings of the server nobody can ask for."""
    rate = metrics.get("prefix_cache_hit_rate", 0.0)
    yield OptimizationOutcome(
        name="prefix_caching",
        applied=rate > 0,
        reason=f"{rate:.0%} of the prompt tokens so far were in Ollama's cache"
        if rate
        else "Ollama has not told of any prompt token in its cache so far",
    )
    for name, variable in _DECIDED_BY.items():
        reason = f"{variable} of the server decides, and it does not tell"
        yield OptimizationOutcome(name=name, applied=False, reason=reason)
    level = tag.details.quantization_level if tag is not None else ""
    is_quantized = bool(level) and level.upper() not in FULL_PRECISION
    reason = f"the default model's weights are stored as {level}" if level else "the default model is not there"
    yield OptimizationOutcome(name="quantization", applied=is_quantized, reason=reason, lossy=is_quantized)
    connects, requests = metrics.get("num_connects", 0), metrics.get("num_http_requests", 0)
    reason = f"{requests:.0f} requests went over {connects:.0f} connection{'' if connects == 1 else 's'}"
    yield OptimizationOutcome(name="connection_pooling", applied=requests > connects, reason=reason)


def _residency(line: WireLine, num_ctx: int, last_load: float | None) -> OptimizationOutcome:
    if line.load_duration is None:
        return OptimizationOutcome(name="keep_alive", applied=False, reason="Ollama did not tell its load_duration")
    seconds = line.load_duration / 1e9
    if was_loaded(line):
        reason = f"the model was loaded first, in {seconds:.1f} s, with a context of {num_ctx}"
        return OptimizationOutcome(name="keep_alive", applied=False, reason=reason)
    saved = None if last_load is None else max(0.0, last_load - seconds) * 1000
    reason = f"the model was in memory with a context of {num_ctx}, which was kept"
    return OptimizationOutcome(name="keep_alive", applied=True, reason=reason, milliseconds_saved=saved)


def _prefix_caching(line: WireLine) -> OptimizationOutcome:
    cached = line.prompt_eval_cached_count
    if cached:
        reason = f"{cached} of {line.prompt_eval_count} prompt tokens were in Ollama's cache"
        return OptimizationOutcome(name="prefix_caching", applied=True, reason=reason, tokens_saved=cached)
    if cached == 0:
        return OptimizationOutcome(name="prefix_caching", applied=False, reason="no prompt token was in Ollama's cache")
    if not line.prompt_eval_count:
        reason = "Ollama evaluated no prompt token: all of them were in its cache"
        return OptimizationOutcome(name="prefix_caching", applied=True, reason=reason)
    reason = "this version of Ollama does not tell how much of a prompt was in its cache"
    return OptimizationOutcome(name="prefix_caching", applied=False, reason=reason)
