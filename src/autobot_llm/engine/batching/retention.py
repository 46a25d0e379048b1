"""Which of a sequence's tokens stay in the cache. Knows sequences, blocks and counts; knows nothing of tensors.

A sequence's block table holds what it keeps, in order, and `num_evicted_tokens` counts what it has let go: the next
token, p, goes to place p - num_evicted_tokens. Attention reads places; positions are in the keys since they were
written, so no kernel has to know what is missing.

What leaves is whole blocks of the table, so nothing is copied when a window moves on. Blocks that were published stay
findable until somebody overwrites them.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as SequenceABC
from typing import Protocol, runtime_checkable

from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.kv_cache.policy import EVICTION_INTERVAL, CachePolicy
from autobot_llm.engine.sequence import Sequence


class Retention(Protocol):
    """What a scheduler asks of one. `policy` says how much it keeps."""

    policy: CachePolicy

    def trim(self, sequence: Sequence, num_tokens: int, pool: BlockPool) -> int:
        """Let go what a sequence does without after its first `num_tokens` tokens; returns the number of blocks.

        Those are in the cache, or under way there. Blocks of them that are not published yet will not be.
        """
        ...


class KeepsAll:
    """Every token stays as long as its sequence."""

    policy = CachePolicy()

    def trim(self, sequence: Sequence, num_tokens: int, pool: BlockPool) -> int:
        return 0


class SlidingWindow:
    """Blocks leave that no layer will look back to: a token sees `policy.window` positions, its own included.

    That loses nothing which the model's attention has not given up already.
    """

    def __init__(self, policy: CachePolicy) -> None:
        assert policy.window, "some layer sees everything"
        self.policy = policy

    def trim(self, sequence: Sequence, num_tokens: int, pool: BlockPool) -> int:
        num_unseen = num_tokens - self.policy.window + 1  # by the next token, at position num_tokens
        num_blocks = (num_unseen - sequence.num_evicted_tokens) // pool.block_size
        if num_blocks <= 0:
            return 0
        evict_blocks(sequence, 0, num_blocks, pool)
        return num_blocks


@runtime_checkable
class Evictor(Protocol):
    """The device's side of letting tokens go one by one. It takes effect in the order of all calls, steps too."""

    def evict(self, block_ids: SequenceABC[int], num_kept: int, num_candidates: int) -> None:
        """Of a sequence's first `num_candidates` places keep the `num_kept` most attended, in its first `num_kept`."""
        ...


class HeavyHitters:
    """Recent tokens stay, and of those before them the ones that were attended to most, for each head of its own.

    When blocks of recent tokens have grown old, what is kept of them takes the places of what is not, which happens at
    multiples of EVICTION_INTERVAL tokens (heavy_hitters.py). Nobody else may hold the blocks, because their places
    change hands.
    """

    def __init__(self, policy: CachePolicy, evictor: Evictor) -> None:
        self.policy = policy
        self._evictor = evictor

    def trim(self, sequence: Sequence, num_tokens: int, pool: BlockPool) -> int:
        assert not pool.prefix_caching, "what is published must not change"
        size, budget = pool.block_size, self.policy.heavy_hitters
        num_blocks = (num_tokens - sequence.num_evicted_tokens - budget) // size
        if num_blocks <= 0 or num_tokens % EVICTION_INTERVAL:
            return 0
        num_heavy = budget // 2
        self._evictor.evict(sequence.block_ids, num_heavy, num_heavy + num_blocks * size)
        evict_blocks(sequence, num_heavy // size, num_blocks, pool)
        return num_blocks


def evict_blocks(sequence: Sequence, first: int, num_blocks: int, pool: BlockPool) -> None:
    """Give these blocks of a sequence's table back, whatever the places they held."""
    pool.free(sequence.block_ids[first : first + num_blocks])
    del sequence.block_ids[first : first + num_blocks]
    sequence.num_evicted_tokens += num_blocks * pool.block_size


def num_missing_blocks(sequence: Sequence, num_tokens: int, block_size: int) -> int:
    """How many blocks a sequence lacks for its first `num_tokens` tokens, less those it has let go."""
    num_kept = num_tokens - sequence.num_evicted_tokens
    return max(0, -(-num_kept // block_size) - len(sequence.block_ids))


def take_blocks(sequence: Sequence, num_tokens: int, pool: BlockPool) -> bool:
    """Give a sequence the blocks it lacks for so many tokens; False, and none given, where fewer are free."""
    block_ids = pool.allocate(num_missing_blocks(sequence, num_tokens, pool.block_size))
    if block_ids is None:
        return False
    sequence.block_ids.extend(block_ids)
    return True


def take_blocks_beside_the_schedule(
    sequence: Sequence, num_done: int, num_new: int, retention: Retention, pool: BlockPool
) -> bool:
    """Let go what a sequence that nobody schedules does without after `num_done` tokens, and give it blocks for all
    others, or for as many as it keeps beside `num_new` new ones; False where there is no room."""
    retention.trim(sequence, num_done, pool)
    num_tokens = len(sequence.token_ids)
    num_kept = retention.policy.most_tokens(num_tokens, num_new)
    return take_blocks(sequence, min(num_tokens, sequence.num_evicted_tokens + num_kept), pool)


def give_blocks_back(sequence: Sequence, pool: BlockPool) -> None:
    """Let go everything that a sequence holds."""
    block_ids, sequence.block_ids = sequence.block_ids, array("i")
    sequence.num_evicted_tokens = 0
    pool.free(block_ids)


def give_up(sequence: Sequence, pool: BlockPool) -> None:
    """Forget what was computed of a sequence."""
    give_blocks_back(sequence, pool)
    sequence.num_computed_tokens = 0
    sequence.published = []
