"""Settings of the scheduler that fit a kind of traffic. Knows numbers; knows nothing of how they are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
