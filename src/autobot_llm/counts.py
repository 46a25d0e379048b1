"""Count requests, how they ended, and tokens. Knows nothing of who answers."""

from __future__ import annotations

import enum
from collections.abc import Mapping

from autobot_llm.types import Usage


class Ending(enum.StrEnum):
    """How a request can end."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Counts:
    """What the interface itself has seen."""

    def __init__(self) -> None:
        self.num_requests = 0
        self.num_in_flight = 0
        self.num_ended = dict.fromkeys(Ending, 0)
        self.num_prompt_tokens = 0
        self.num_completion_tokens = 0
        self.num_cached_tokens = 0

    def add_usage(self, usage: Usage) -> None:
        self.num_prompt_tokens += usage.prompt_tokens
        self.num_completion_tokens += usage.completion_tokens
        self.num_cached_tokens += usage.cached_tokens

    def figures(self) -> dict[str, float]:
        return {
            "num_requests": self.num_requests,
            "num_in_flight": self.num_in_flight,
            **{f"num_{ending}": count for ending, count in self.num_ended.items()},
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_completion_tokens": self.num_completion_tokens,
            "num_cached_tokens": self.num_cached_tokens,
        }


def summed(*parts: Mapping[str, float]) -> dict[str, float]:
    """The figures of all parts; those of one name are added up (the retries of a provider and of what is before it)."""
    figures: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            figures[name] = figures.get(name, 0) + value
    return figures
