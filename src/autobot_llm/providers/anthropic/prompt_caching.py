"""Decide whether a request's prefix is marked for Anthropic's cache, and say what it bought. Knows no connections."""

from __future__ import annotations

from typing import Any

from autobot_llm.dialects.anthropic.caching import has_marks, place_marks
from autobot_llm.dialects.anthropic.models import facts_about
from autobot_llm.dialects.anthropic.requests import PROMPT_CACHING
from autobot_llm.errors import InvalidRequestError
from autobot_llm.report import OptimizationOutcome
from autobot_llm.types import LLMRequest, Usage


def mark_prefix(body: dict[str, Any], request: LLMRequest, model: str, *, is_enabled: bool) -> str:
    """Mark `body`'s stable prefix unless somebody does not want that; returns what was done, for the report.

    Raises InvalidRequestError where the request's wish is neither true nor false.
    """
    wanted = request.extra_body.get(PROMPT_CACHING, True)
    if not isinstance(wanted, bool):
        raise InvalidRequestError(f"{PROMPT_CACHING}={wanted!r}: expected true or false", param=PROMPT_CACHING)
    if has_marks(body):
        return "marked by the caller"
    if not is_enabled:
        return "switched off by AUTOBOT_PREFIX_CACHING"
    if not wanted:
        return "switched off by the request"
    min_tokens = facts_about(model).min_cacheable_tokens
    num_marks = place_marks(body, min_tokens)
    if num_marks == 0:
        return f"no stable prefix of {min_tokens:,} tokens, the least that this model caches (estimated)"
    return f"marked in {num_marks} {'place' if num_marks == 1 else 'places'}"


def outcome(marking: str, usage: Usage) -> OptimizationOutcome:
    """The report's line, with what Anthropic says that it read from its cache and wrote to it."""
    figures = (
        f"{usage.cached_tokens:,} of {usage.prompt_tokens:,} prompt tokens read, {usage.cache_write_tokens:,} written"
    )
    return OptimizationOutcome(
        name=PROMPT_CACHING,
        applied=usage.cached_tokens > 0,
        reason=f"{marking}; {figures}",
        tokens_saved=usage.cached_tokens or None,
    )
