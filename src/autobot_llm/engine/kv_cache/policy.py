"""What a cache does to be smaller than all its tokens: what was asked for, checked, and in words. Knows the windows of
a model, and counts; knows no tensors and no schedule.

A window that every layer of a model has by itself costs nothing: blocks behind it are given back by default. Everything
else here changes answers, and runs only where it was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from autobot_llm.engine.models.config import ModelConfig
from autobot_llm.errors import ConfigurationError

BLOCK_SIZE = 16
"""Tokens of a cache block. The compiled step's vectors and the kernels' tiles are built for it."""
SHORTEST_CHUNK = 256
"""So many tokens may a step always add to what a sequence keeps: the products of shorter chunks are less efficient."""
EVICTION_INTERVAL = 64
"""Heavy hitters are chosen whenever a sequence has a multiple of so many tokens, and no step goes beyond that: so what
is kept does not depend on how a prompt was cut into chunks, or on anybody else. More rows would gain a CPU little."""
FEWEST_KEPT = 2 * BLOCK_SIZE
"""A block of heavy hitters and one of recent tokens."""


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """Which of a sequence's tokens stay in the cache.

    `window`: the widest of a model whose every layer has one, 0 where some layer sees everything. `is_window_asked`: it
    is narrower than the model's own. `heavy_hitters`: a sequence keeps so many tokens, half of them recent ones and
    half those of the others that were attended to most; 0 is off.
    """

    window: int = 0
    heavy_hitters: int = 0
    is_window_asked: bool = False
    block_size: int = BLOCK_SIZE

    @property
    def is_lossy(self) -> bool:
        return self.is_window_asked or self.heavy_hitters > 0

    @property
    def num_kept_tokens(self) -> int | None:
        """Tokens that the next one of a long sequence finds in the cache; None: all of them."""
        return self.heavy_hitters or (self.window - 1 if self.window else None)

    @property
    def max_new_tokens(self) -> int | None:
        """So many tokens of one sequence go into a step at most; None: as many as the step holds."""
        if self.heavy_hitters:
            return EVICTION_INTERVAL
        return max(SHORTEST_CHUNK, self.window // 4) if self.window else None

    def longest_step(self, num_computed: int, limit: int) -> int:
        """How many tokens, at most `limit`, may follow the first `num_computed` of a sequence in one step."""
        if self.max_new_tokens is None:
            return limit
        return min(limit, self.max_new_tokens - (num_computed % EVICTION_INTERVAL if self.heavy_hitters else 0))

    def most_tokens(self, num_tokens: int, num_new: int) -> int:
        """The most tokens that a sequence of `num_tokens` has in the cache at once, where a step brings `num_new`.

        Only whole blocks leave, so what is kept may be a block longer, less one token.
        """
        kept = self.num_kept_tokens
        return num_tokens if kept is None else min(num_tokens, kept + self.block_size - 1 + num_new)

    def lines(self) -> Iterator[str]:
        """What a user reads of it."""
        if self.window and self.is_window_asked:
            yield f"a window of {self.window:,} tokens, lossy, because AUTOBOT_KV_SLIDING_WINDOW says so"
        elif self.window:
            yield f"the model's own window of {self.window:,} tokens: blocks behind it are given back"
        if self.heavy_hitters:
            yield (
                f"{self.heavy_hitters:,} tokens of a sequence, half of them the most attended ones, lossy, because "
                "AUTOBOT_KV_HEAVY_HITTERS says so"
            )


def choose_policy(
    config: ModelConfig, *, sliding_window: int, heavy_hitters: float, max_model_len: int
) -> tuple[ModelConfig, CachePolicy]:
    """What becomes of the two settings for a model, and the model as it then attends.

    `heavy_hitters` up to 1 is a share of `max_model_len`, from 2 up a number of tokens; it is cut down to whole blocks.
    A policy that would never let go of anything is no policy. Raises ConfigurationError.
    """
    if 0 < sliding_window < BLOCK_SIZE:
        raise ConfigurationError(
            f"AUTOBOT_KV_SLIDING_WINDOW={sliding_window}: expected 0 (the model's own), or at least the {BLOCK_SIZE} "
            "tokens of a cache block"
        )
    budget = _budget(heavy_hitters, max_model_len)
    if budget and sliding_window:
        raise ConfigurationError(
            f"AUTOBOT_KV_HEAVY_HITTERS={heavy_hitters:g} and AUTOBOT_KV_SLIDING_WINDOW={sliding_window}: expected one "
            "of them to be 0; half of what heavy hitters keep is a window already"
        )
    if budget and any(config.sliding_windows):
        raise ConfigurationError(
            f"AUTOBOT_KV_HEAVY_HITTERS={heavy_hitters:g}: layers of this model have a sliding window of their own, and "
            "the places of what is kept do not tell how far back it was; expected 0"
        )
    own = config.sliding_windows
    if 0 < sliding_window < max_model_len:  # a wider one hides nothing
        config = replace(config, sliding_windows=tuple(min(w or sliding_window, sliding_window) for w in own))
    windows = config.sliding_windows
    widest = 0 if 0 in windows else max(windows)
    return config, CachePolicy(
        window=widest if widest < max_model_len else 0,
        heavy_hitters=budget if budget < max_model_len else 0,
        is_window_asked=windows != own,
    )


def _budget(heavy_hitters: float, max_model_len: int) -> int:
    num_tokens = int(heavy_hitters * max_model_len) if heavy_hitters <= 1 else int(heavy_hitters)
    is_whole = heavy_hitters <= 1 or heavy_hitters == num_tokens
    if heavy_hitters and not (is_whole and num_tokens >= FEWEST_KEPT):
        raise ConfigurationError(
            f"AUTOBOT_KV_HEAVY_HITTERS={heavy_hitters:g}: expected 0 (off), a whole number of at least {FEWEST_KEPT} "
            f"tokens, or a share of the context up to 1 that is as many of its {max_model_len:,} tokens"
        )
    return num_tokens if num_tokens >= max_model_len else num_tokens // FEWEST_KEPT * FEWEST_KEPT
