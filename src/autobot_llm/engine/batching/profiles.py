"""Settings of the scheduler: those that fit a kind of traffic, those that cannot work. Knows numbers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.errors import ConfigurationError

SchedulingPolicy = Literal["fcfs", "priority"]


@dataclass(frozen=True, slots=True)
class BatchingConfig:
    """How much a step may hold, and how long it may make others wait.

    `max_waiting_time_ms` bounds the time that prompts add to a step in which somebody decodes, hence to the wait for
    everybody's next token, and for the next step of whoever has just arrived. `scheduling_policy` "priority" heeds a
    request's `priority` (lower goes sooner), "fcfs" its arrival alone.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_waiting_time_ms: float
    scheduling_policy: SchedulingPolicy = "fcfs"


BATCHING_PROFILES = {
    "interactive": BatchingConfig(max_num_seqs=64, max_num_batched_tokens=4096, max_waiting_time_ms=10),
    "batch": BatchingConfig(max_num_seqs=256, max_num_batched_tokens=16384, max_waiting_time_ms=100),
    "mixed": BatchingConfig(max_num_seqs=128, max_num_batched_tokens=8192, max_waiting_time_ms=50),
}


def get_batching_config(name: str) -> BatchingConfig:
    """The profile of that name: interactive, batch or mixed; any other name gives mixed."""
    return BATCHING_PROFILES.get(name, BATCHING_PROFILES["mixed"])


def check_limits(
    pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, num_kept_tokens: int
) -> None:
    """Raise ConfigurationError for limits of which some running sequence could not advance.

    A sequence of `max_model_len` tokens has at most `num_kept_tokens` of them in the cache at once.
    """
    if max_num_seqs < 1:
        raise ConfigurationError(f"max_num_seqs={max_num_seqs}: expected at least 1")
    if max_num_batched_tokens < max_num_seqs:
        raise ConfigurationError(
            f"max_num_batched_tokens={max_num_batched_tokens}: expected at least max_num_seqs={max_num_seqs}, "
            "so that every running sequence gets a token in each step"
        )
    num_blocks_needed = -(-num_kept_tokens // pool.block_size)
    if max_model_len < 1 or num_blocks_needed > pool.num_blocks:
        raise ConfigurationError(
            f"max_model_len={max_model_len} needs {num_blocks_needed} KV cache blocks and there are "
            f"{pool.num_blocks}: expected 1 to {pool.num_blocks * pool.block_size} tokens"
        )


def check_policy(scheduling_policy: str, max_waiting_time_ms: float | None) -> None:
    """Raise ConfigurationError for a policy that there is not, and for a time that is none."""
    if max_waiting_time_ms is not None and max_waiting_time_ms <= 0:
        raise ConfigurationError(f"max_waiting_time_ms={max_waiting_time_ms}: expected a time above 0")
    if scheduling_policy not in ("fcfs", "priority"):
        raise ConfigurationError(f"scheduling_policy={scheduling_policy!r}: expected fcfs or priority")
