"""Read what is left of the rate limits from an answer's headers. Knows the headers; knows nothing of waiting.

Format: https://platform.claude.com/docs/en/api/rate-limits (`anthropic-ratelimit-requests-remaining`, ...). The headers
for "tokens" tell of the limit, of input or of output, that is nearest to being reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from autobot_llm.dialects.rate_limits import RateLimit, RateLimits


def read_rate_limits(headers: Mapping[str, str], now: datetime | None = None) -> RateLimits | None:
    """The limits in `headers` (lower-case names), or None where there are none. `now` has a time zone."""
    moment = now or datetime.now(UTC)
    requests, tokens = _limit(headers, "requests", moment), _limit(headers, "tokens", moment)
    return None if requests is None and tokens is None else RateLimits(requests=requests, tokens=tokens)


def _limit(headers: Mapping[str, str], kind: str, now: datetime) -> RateLimit | None:
    remaining = _whole(headers.get(f"anthropic-ratelimit-{kind}-remaining", ""))
    if remaining is None:
        return None
    return RateLimit(
        limit=_whole(headers.get(f"anthropic-ratelimit-{kind}-limit", "")),
        remaining=remaining,
        reset_seconds=_seconds_until(headers.get(f"anthropic-ratelimit-{kind}-reset", ""), now),
    )


def _whole(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() else None


def _seconds_until(text: str, now: datetime) -> float | None:
    """From `now` to a moment in RFC 3339."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return None if moment.tzinfo is None else max(0.0, (moment - now).total_seconds())
