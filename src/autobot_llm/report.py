"""What each optimization did for one request. Knows names and savings; knows nothing of how they were made."""

from __future__ import annotations

import msgspec

RESPONSE_CACHING = "response_caching"  # the line by which a kept answer is known


class OptimizationOutcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a request's report: an optimization that was considered, whether it ran, and what it bought.

    Savings are measured or counted, never estimated without saying so in `reason`; an unknown one stays None.
    Dollars are the United States'.
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
