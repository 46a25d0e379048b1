"""What a sequence computes for others: full blocks that are found again. Knows one sequence and the pool."""

from __future__ import annotations

from array import array

from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.sequence import Sequence


def take_prefix(sequence: Sequence, pool: BlockPool) -> None:
    """Let a sequence begin with what the cache has of it. The last token is always computed, for its logits."""
    sequence.published = pool.match(sequence.token_ids, sequence.salt, len(sequence.token_ids) - 1)
    sequence.block_ids = array("i", [entry.block_id for entry in sequence.published])
    sequence.num_computed_tokens = len(sequence.published) * pool.block_size


def publish_full_blocks(sequence: Sequence, num_tokens: int, pool: BlockPool) -> None:
    """Publish every full block of the first `num_tokens` tokens that is not published yet.

    What was let go from its beginning was published before, or nothing after it can be found.
    """
    published, size = sequence.published, pool.block_size
    num_evicted = sequence.num_evicted_tokens // size
    if num_evicted > len(published):
        return
    for i in range(len(published), num_tokens // size):
        tokens = sequence.token_ids[i * size : (i + 1) * size]
        parent = published[-1] if published else None
        published.append(pool.publish(sequence.block_ids[i - num_evicted], tokens, parent, sequence.salt))


def will_publish(leader: Sequence, pool: BlockPool) -> bool:
    """Whether followers gain by waiting for `leader`: its prompt is long enough for a block and yet to be computed."""
    return (
        pool.prefix_caching
        and leader.num_prompt_tokens > pool.block_size
        and leader.num_computed_tokens < leader.num_prompt_tokens
    )
