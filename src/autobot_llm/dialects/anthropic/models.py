"""What differs from one Claude model to another. Knows names and figures; knows nothing of requests.

Figures: the model pages and the page on prompt caching of https://platform.claude.com/docs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = re.compile(r"claude-(?P<line>[a-z]+)-(?P<major>\d{1,2})(?:[-.](?P<minor>\d{1,2}))?(?!\d)")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """`max_output_tokens` is the most one answer may have, `min_cacheable_tokens` the shortest prefix that is cached.

    `takes_system_turns`: whether a system message may stand in the conversation, after a user's turn.
    """

    max_output_tokens: int
    min_cacheable_tokens: int
    takes_system_turns: bool


UNKNOWN = ModelFacts(8_192, 1_024, False)

# (line, first version, facts), of which the first that fits counts. No minimum is published for Haiku 5.5 and Sonnet
# 5.5: it is taken for that of Sonnet 5. Too low a minimum costs nothing, since Anthropic ignores a mark that comes too
# early.
_KNOWN: tuple[tuple[str, tuple[int, int], ModelFacts], ...] = (
    ("haiku", (5, 0), ModelFacts(128_000, 1_024, True)),
    ("sonnet", (5, 5), ModelFacts(128_000, 1_024, True)),
    ("sonnet", (5, 0), ModelFacts(128_000, 1_024, False)),
    ("", (5, 0), ModelFacts(128_000, 512, True)),
    ("opus", (4, 8), ModelFacts(128_000, 1_024, True)),
    ("opus", (4, 7), ModelFacts(128_000, 2_048, False)),
    ("opus", (4, 6), ModelFacts(128_000, 4_096, False)),
    ("opus", (4, 5), ModelFacts(64_000, 4_096, False)),
    ("haiku", (4, 0), ModelFacts(64_000, 4_096, False)),
    ("sonnet", (4, 0), ModelFacts(64_000, 1_024, False)),
    ("opus", (4, 0), ModelFacts(32_000, 1_024, False)),
)


def facts_about(model: str) -> ModelFacts:
    """The facts about a model, by its line and version ("claude-opus-4-8"); cautious ones for any other name."""
    name = _NAME.search(model)
    if name is None:
        return UNKNOWN
    version = (int(name["major"]), int(name["minor"] or 0))
    return next((facts for line, first, facts in _KNOWN if line in ("", name["line"]) and version >= first), UNKNOWN)
