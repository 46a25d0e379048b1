"""What a compression did, and how tokens are counted for it. Knows texts and counts; knows no strategy."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

CountTokens = Callable[[str], int]
"""Tokens of a text, as the model that will read it counts them."""

CHARACTERS_PER_TOKEN = 4


class CompressionResult(msgspec.Struct, frozen=True, kw_only=True):
    """A text before and after. `compression_ratio` is compressed / original tokens: 0.7 means 30 % fewer.

    `is_estimate`: no tokenizer was given, and a token was taken for four characters.
    """

    original_tokens: int
    compressed_tokens: int
    compression_ratio: float
    compressed_text: str
    is_estimate: bool = False

    @property
    def tokens_saved(self) -> int:
        return self.original_tokens - self.compressed_tokens


def estimated_tokens(text: str) -> int:
    """About as many tokens as an English text has; of other languages and of code it knows nothing."""
    return len(text) // CHARACTERS_PER_TOKEN


def measured(original: str, compressed: str, count_tokens: CountTokens | None) -> CompressionResult:
    """The result of turning `original` into `compressed`; without a tokenizer its counts are estimates."""
    count = count_tokens or estimated_tokens
    before, after = count(original), count(compressed)
    return CompressionResult(
        original_tokens=before,
        compressed_tokens=after,
        compression_ratio=after / before if before else 1.0,
        compressed_text=compressed,
        is_estimate=count_tokens is None,
    )
