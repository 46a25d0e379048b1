"""Read what is left of the rate limits from an answer's headers. Knows the headers; knows nothing of waiting.

Format: https://platform.openai.com/docs/guides/rate-limits (`x-ratelimit-limit-requests`, `-remaining-`, `-reset-`);
compatible servers use the same names, Azure without a reset.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from autobot_llm.dialects.rate_limits import RateLimit, RateLimits

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def read_rate_limits(headers: Mapping[str, str]) -> RateLimits | None:
    """The limits in `headers` (lower-case names), or None where there are none."""
    requests, tokens = _limit(headers, "requests"), _limit(headers, "tokens")
    return None if requests is None and tokens is None else RateLimits(requests=requests, tokens=tokens)


def _limit(headers: Mapping[str, str], kind: str) -> RateLimit | None:
    remaining = _whole(headers.get(f"x-ratelimit-remaining-{kind}"))
    if remaining is None:
        return None
    return RateLimit(
        limit=_whole(headers.get(f"x-ratelimit-limit-{kind}")),
        remaining=remaining,
        reset_seconds=_seconds(headers.get(f"x-ratelimit-reset-{kind}")),
    )


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def _seconds(text: str | None) -> float | None:
    """ "6m0s", "120ms", or seconds without a unit."""
    if text is None:
        return None
    parts = _PART.findall(text)
    if parts and "".join(number + unit for number, unit in parts) == text:
        return sum(float(number) * _UNITS[unit] for number, unit in parts)
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None
