"""What each optimization did for one request. Knows names and savings; knows nothing of how they were made."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

SHARING = "request_deduplication"  # the line by which an answer is known that another request has paid for
RESPONSE_CACHING = "response_caching"  # the line by which a kept answer is known
SEMANTIC_CACHING = "semantic_caching"  # the line by which the kept answer to another question is known
CACHING = (RESPONSE_CACHING, SEMANTIC_CACHING)


class OptimizationOutcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a request's report: an optimization that was considered, whether it ran, and what it bought.

    Savings are measured or counted, never estimated without saying so in `reason`; an unknown one stays None.
    Dollars are the United States'. `matched_question` is the one whose kept answer this is, and `similarity` how
    similar the two are, at most 1.
    """

    name: str
    applied: bool
    reason: str
    tokens_saved: int | None = None
    milliseconds_saved: float | None = None
    bytes_saved: int | None = None
    dollars_spent: float | None = None
    dollars_saved: float | None = None
    lossy: bool = False
    similarity: float | None = None
    matched_question: str | None = None


def dollars_worth(lines: Sequence[OptimizationOutcome]) -> float | None:
    """What an answer cost by its report, whoever paid for it; None where that is not known."""
    costs = [line.dollars_spent for line in lines if line.dollars_spent is not None]
    if not costs:
        costs = [line.dollars_saved for line in lines if line.name == SHARING and line.dollars_saved is not None]
    return sum(costs) if costs else None


def without_costs(lines: Sequence[OptimizationOutcome]) -> tuple[OptimizationOutcome, ...]:
    """The report of an answer for one of those who did not pay for it."""
    return tuple(line for line in lines if line.dollars_spent is None)


def reused_from(lines: Sequence[OptimizationOutcome]) -> OptimizationOutcome | None:
    """The line that says that the answer was given to another question before; None where it was not."""
    return next((line for line in lines if line.name == SEMANTIC_CACHING and line.applied), None)
