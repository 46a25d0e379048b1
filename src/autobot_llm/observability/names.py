"""Every metric by its name: what it counts, its labels, and the provider's figure that it shows. Data alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LATENCY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)
QUEUE_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
POSITION_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric: counters are exposed with Prometheus' `_total` ending. `figure` is the provider's name for it."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    figure: str = ""


REQUESTS = MetricSpec(
    "autobot_llm_requests", "counter", "Requests answered, by HTTP status.", ("endpoint", "model", "status")
)
IN_FLIGHT = MetricSpec("autobot_llm_in_flight", "gauge", "Requests being answered now.", ("endpoint",))
ERRORS = MetricSpec("autobot_llm_errors", "counter", "Requests that ended in an error, by its code.", ("code",))
LATENCY = MetricSpec(
    "autobot_llm_request_latency_seconds",
    "histogram",
    "Time from a request's arrival to the end of its answer.",
    ("endpoint", "model"),
    LATENCY_BUCKETS,
)
FIRST_TOKEN = MetricSpec(
    "autobot_llm_time_to_first_token_seconds",
    "histogram",
    "Time from a request's arrival to the first piece of its answer.",
    ("model",),
    LATENCY_BUCKETS,
)
INTER_TOKEN = MetricSpec(
    "autobot_llm_inter_token_latency_seconds",
    "histogram",
    "Time between two pieces of the same choice.",
    ("model",),
    TOKEN_BUCKETS,
)
TOKENS = MetricSpec(
    "autobot_llm_tokens",
    "counter",
    "Tokens of finished answers; kind is prompt, completion, or cached (the part of prompt not computed again).",
    ("model", "kind"),
)
QUEUE_WAIT = MetricSpec(
    "autobot_llm_queue_wait_seconds",
    "histogram",
    "Time a finished request had waited before its work began.",
    ("model",),
    QUEUE_BUCKETS,
)
QUEUE_POSITION = MetricSpec(
    "autobot_llm_queue_position",
    "histogram",
    "Number of requests that were ahead of a finished request when it arrived.",
    ("model",),
    POSITION_BUCKETS,
)
REQUEST_METRICS = (
    REQUESTS,
    IN_FLIGHT,
    ERRORS,
    LATENCY,
    FIRST_TOKEN,
    INTER_TOKEN,
    TOKENS,
    QUEUE_WAIT,
    QUEUE_POSITION,
)


def _figure(name: str, figure: str, kind: Literal["counter", "gauge"], help: str) -> MetricSpec:
    return MetricSpec(name, kind, help, ("provider",), figure=figure)


PROVIDER_METRICS = (
    _figure("autobot_llm_cache_l1_hits", "num_l1_hits", "counter", "Requests answered from this process's memory."),
    _figure("autobot_llm_cache_l2_hits", "num_l2_hits", "counter", "Requests answered from the shared store."),
    _figure("autobot_llm_cache_misses", "num_cache_misses", "counter", "Requests that no kept answer was found for."),
    _figure(
        "autobot_llm_semantic_cache_hits",
        "num_semantic_hits",
        "counter",
        "Requests answered with the kept answer to the same question in other words (lossy).",
    ),
    _figure(
        "autobot_llm_semantic_cache_misses",
        "num_semantic_misses",
        "counter",
        "Requests that the semantic cache looked for and had no answer to.",
    ),
    _figure(
        "autobot_llm_embedding_cache_l1_hits",
        "num_vector_l1_hits",
        "counter",
        "Inputs whose vectors were in this process's memory.",
    ),
    _figure(
        "autobot_llm_embedding_cache_l2_hits",
        "num_vector_l2_hits",
        "counter",
        "Inputs whose vectors were in the shared store.",
    ),
    _figure(
        "autobot_llm_embedding_cache_misses", "num_vector_misses", "counter", "Inputs that the provider had to embed."
    ),
    _figure(
        "autobot_llm_embedding_cache_shared",
        "num_vectors_joined",
        "counter",
        "Inputs whose vectors were being made for another request.",
    ),
    _figure(
        "autobot_llm_deduplicated_requests",
        "num_joined",
        "counter",
        "Requests that shared the call of an equal one under way.",
    ),
    _figure("autobot_kv_cache_memory_mb", "kv_cache_memory_mb", "gauge", "KV cache memory in use, in megabytes."),
    _figure(
        "autobot_prefix_cache_hit_rate",
        "prefix_cache_hit_rate",
        "gauge",
        "Share of prompt tokens found in the prefix cache, 0 to 1.",
    ),
    _figure(
        "autobot_speculation_acceptance_rate",
        "speculation_acceptance_rate",
        "gauge",
        "Share of drafted tokens that were accepted, 0 to 1.",
    ),
    _figure("autobot_speculation_tokens_proposed", "num_draft_tokens", "counter", "Tokens drafted."),
    _figure("autobot_speculation_tokens_accepted", "num_accepted_tokens", "counter", "Drafted tokens accepted."),
    _figure("autobot_llm_engine_kv_cache_usage", "kv_cache_usage", "gauge", "Share of the KV cache in use, 0 to 1."),
    _figure("autobot_llm_replicas", "num_replicas", "gauge", "Servers of the provider."),
    _figure("autobot_llm_replicas_up", "num_replicas_up", "gauge", "Servers of the provider that can be reached."),
    _figure(
        "autobot_llm_model_loads", "num_model_loads", "counter", "Answers that waited for their model to be loaded."
    ),
    _figure(
        "autobot_llm_context_growths",
        "num_context_growths",
        "counter",
        "Times that a model's context was made larger, which loads it anew.",
    ),
    _figure("autobot_llm_retries", "num_retries", "counter", "Calls to the provider that were made again."),
    _figure("autobot_llm_retry_wait_seconds", "retry_wait_seconds", "counter", "Time waited before retries."),
    _figure(
        "autobot_llm_rate_limit_waits",
        "num_rate_limit_waits",
        "counter",
        "Requests that waited for a place within the provider's rate limits.",
    ),
    _figure(
        "autobot_llm_rate_limit_wait_seconds",
        "rate_limit_wait_seconds",
        "counter",
        "Time that requests waited for a place within the provider's rate limits.",
    ),
    _figure(
        "autobot_llm_rate_limit_queued",
        "num_rate_limit_queued",
        "gauge",
        "Requests that wait for a place within the provider's rate limits.",
    ),
    _figure(
        "autobot_llm_shared_limits_up",
        "shared_limits_up",
        "gauge",
        "1 while rate limits are shared through Redis, 0 while each worker keeps within its share.",
    ),
    _figure(
        "autobot_llm_shared_budgets_up",
        "shared_budgets_up",
        "gauge",
        "1 while budgets are shared through Redis, 0 while each host keeps them by what it knows.",
    ),
    _figure(
        "autobot_llm_shared_limit_failures",
        "num_shared_limit_failures",
        "counter",
        "Questions about shared rate limits that Redis did not answer, or too late.",
    ),
    _figure(
        "autobot_llm_shared_budget_failures",
        "num_shared_budget_failures",
        "counter",
        "Questions about shared budgets that Redis did not answer, or too late.",
    ),
    _figure("autobot_llm_hedges", "num_hedges", "counter", "Calls made a second time because the first was slow."),
    _figure("autobot_llm_hedges_won", "num_hedges_won", "counter", "Second calls that began to answer first."),
    _figure(
        "autobot_llm_circuit_open",
        "circuit_open",
        "gauge",
        "1 while the provider is not asked because its calls fail, else 0.",
    ),
    _figure(
        "autobot_llm_circuit_openings",
        "num_circuit_openings",
        "counter",
        "Times that the provider's calls failed so often that it was no longer asked.",
    ),
    _figure("autobot_llm_cost_dollars", "dollars_spent", "counter", "US dollars spent on answers and embeddings."),
    _figure(
        "autobot_llm_cost_saved_dollars",
        "dollars_saved",
        "gauge",
        "US dollars saved by the provider's own cache, less what writing to it cost.",
    ),
    _figure(
        "autobot_llm_compressed_requests",
        "num_compressed_requests",
        "counter",
        "Requests whose prompt was made shorter (lossy).",
    ),
    _figure(
        "autobot_llm_compression_saved_tokens",
        "num_tokens_saved_by_compression",
        "counter",
        "Prompt tokens that compression left out; estimated where the model's tokenizer is not known.",
    ),
    _figure("autobot_llm_batched_calls", "num_shared_calls", "counter", "Calls that several requests shared."),
    _figure(
        "autobot_llm_batched_requests",
        "num_requests_in_shared_calls",
        "counter",
        "Requests that shared a call with others.",
    ),
    _figure("autobot_llm_engine_running", "num_running", "gauge", "Sequences in the running batch."),
    _figure("autobot_llm_engine_waiting", "num_waiting", "gauge", "Sequences that wait to be scheduled."),
    _figure("autobot_llm_engine_free_blocks", "num_free_blocks", "gauge", "KV cache blocks that nobody holds."),
    _figure("autobot_llm_engine_blocks", "num_blocks", "gauge", "KV cache blocks in all."),
    _figure("autobot_llm_engine_preemptions", "num_preemptions", "counter", "Sequences put back for want of blocks."),
    _figure(
        "autobot_llm_engine_evicted_blocks", "num_evicted_blocks", "counter", "Blocks that answers under way let go."
    ),
    _figure("autobot_llm_engine_steps", "num_steps", "counter", "Steps of the engine."),
    _figure(
        "autobot_llm_engine_generated_tokens",
        "num_generated_tokens",
        "counter",
        "Tokens generated, those of cancelled requests included.",
    ),
)
