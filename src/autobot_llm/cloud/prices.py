"""What providers charge, in US dollars per million tokens, each price with the day it was read. Data only.

Anthropic's: https://platform.claude.com/docs/en/about-claude/pricing; a cache write is that of five minutes.
OpenAI's: https://developers.openai.com/api/docs/pricing, the standard tier. A job in a batch costs half at both.
AUTOBOT_CLOUD_PRICES adds to this table and replaces what is out of date in it.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class Rates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Dollars per million tokens of the prompt, of its cached part (None: as the rest), of the part that is written to
    the provider's cache (None: as the rest) and of the answer.
    """

    input: float
    output: float
    cached_input: float | None = None
    cache_write: float | None = None


class Price(Rates, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The rates of one model. `batch` is a batch job's share of them.

    `long_prompt` are the rates of a whole request whose prompt has more than `long_prompt_from` tokens.
    """

    dated: str
    batch: float = 0.5
    long_prompt_from: int | None = None
    long_prompt: Rates | None = None


def _claude(dated: str, input: float, output: float, cached_share: float = 0.1) -> Price:
    return Price(
        input=input, output=output, cached_input=cached_share * input, cache_write=1.25 * input, dated=dated
    )  # fmt: skip


def _openai(dated: str, input: float, output: float, cached_input: float | None = None) -> Price:
    return Price(input=input, output=output, cached_input=cached_input, dated=dated)


PRICES: Mapping[str, Price] = {
    "anthropic/claude-fable-5-1": _claude("2026-10-24", 10.0, 50.0, 0.025),
    "anthropic/claude-fable-5": _claude("2026-10-24", 10.0, 50.0),
    "anthropic/claude-opus-5-5": _claude("2026-10-24", 4.0, 20.0, 0.05),
    "anthropic/claude-opus-5": _claude("2026-10-24", 5.0, 25.0),
    "anthropic/claude-opus-4-8": _claude("2026-10-24", 5.0, 25.0),
    "anthropic/claude-opus-4-7": _claude("2026-10-24", 5.0, 25.0),
    "anthropic/claude-opus-4-6": _claude("2026-10-24", 5.0, 25.0),
    "anthropic/claude-opus-4-5": _claude("2026-10-24", 5.0, 25.0),
    "anthropic/claude-opus-4-1": _claude("2026-10-24", 15.0, 75.0),
    "anthropic/claude-sonnet-5-5": _claude("2026-10-24", 2.0, 10.0, 0.05),
    "anthropic/claude-sonnet-5": _claude("2026-10-24", 2.0, 10.0),
    "anthropic/claude-sonnet-4-6": _claude("2026-10-24", 3.0, 15.0),
    "anthropic/claude-sonnet-4-5": _claude("2026-10-24", 3.0, 15.0),
    "anthropic/claude-haiku-5-5": Price(
        input=0.10, output=0.50, cached_input=0.01, cache_write=0.125, dated="2026-10-24", long_prompt_from=100_000,
        long_prompt=Rates(input=0.50, output=2.50, cached_input=0.05, cache_write=0.625),
    ),
    "anthropic/claude-haiku-4-5": _claude("2026-10-24", 1.0, 5.0),
    "openai/gpt-5.5": _openai("2026-05-04", 5.0, 30.0, 0.5),
    "openai/gpt-5.4": _openai("2026-05-04", 2.5, 15.0, 0.25),
    "openai/gpt-5.4-mini": _openai("2026-05-04", 0.75, 4.5, 0.075),
    "openai/gpt-5.4-nano": _openai("2026-05-04", 0.2, 1.25, 0.02),
    "openai/gpt-5.2": _openai("2026-03-01", 1.75, 14.0, 0.175),
    "openai/gpt-5": _openai("2026-03-01", 1.25, 10.0, 0.125),
    "openai/gpt-5-mini": _openai("2026-03-01", 0.25, 2.0, 0.025),
    "openai/gpt-4.1": _openai("2026-03-01", 2.0, 8.0, 0.5),
    "openai/gpt-4o": _openai("2026-03-01", 2.5, 10.0, 1.25),
    "openai/gpt-4o-mini": _openai("2026-03-01", 0.15, 0.6, 0.075),
    "openai/text-embedding-3-small": _openai("2026-03-01", 0.02, 0.0),
    "openai/text-embedding-3-large": _openai("2026-03-01", 0.13, 0.0),
}  # fmt: skip
