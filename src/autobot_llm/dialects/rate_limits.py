"""What providers tell of their rate limits with an answer, in one shape. Knows no headers."""

from __future__ import annotations

import msgspec


class RateLimit(msgspec.Struct, frozen=True, kw_only=True):
    """One limit: how much in all, how much of it is left, and in how many seconds it is whole again."""

    limit: int | None
    remaining: int
    reset_seconds: float | None


class RateLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a provider said of its limits with an answer; None for a limit that it does not tell."""

    requests: RateLimit | None
    tokens: RateLimit | None
