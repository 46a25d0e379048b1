"""Count requests, how they ended, and tokens. Knows nothing of who answers."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import TracebackType

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

    def asked(self) -> Asked:
        """`with counts.asked() as asked:` around the work for one request."""
        return Asked(self)

    def figures(self) -> dict[str, float]:
        return {
            "num_requests": self.num_requests,
            "num_in_flight": self.num_in_flight,
            **{f"num_{ending}": count for ending, count in self.num_ended.items()},
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_completion_tokens": self.num_completion_tokens,
            "num_cached_tokens": self.num_cached_tokens,
        }


class Asked:
    """One request, counted from its beginning to however it ends."""

    __slots__ = ("_counts", "_is_complete")

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._is_complete = False

    def complete(self, usage: Usage) -> None:
        """The whole answer is there; what comes after is the caller's affair."""
        self._is_complete = True
        self._counts.add_usage(usage)

    def __enter__(self) -> Asked:
        self._counts.num_requests += 1
        self._counts.num_in_flight += 1
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ending = Ending.COMPLETED if self._is_complete else Ending.CANCELLED
        if exc_type is not None and issubclass(exc_type, Exception):
            ending = Ending.FAILED
        self._counts.num_in_flight -= 1
        self._counts.num_ended[ending] += 1


def summed(*parts: Mapping[str, float]) -> dict[str, float]:
    """The figures of all parts; those of one name are added up (the retries of a provider and of what is before it)."""
    figures: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            figures[name] = figures.get(name, 0) + value
    return figures
