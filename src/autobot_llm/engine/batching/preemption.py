"""Who is preempted for whom, and where their keys and values go meanwhile. Knows blocks and a byte budget, no tensors.

Swapped blocks come back as they were, for two copies over the bus; without them the sequence is computed again, for
time of the device. What the budget does not hold is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from typing import Protocol

from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.sequence import Sequence
from autobot_llm.errors import ConfigurationError


class SwappedBlocks(Protocol):
    """The content of some blocks in host memory, in the order they were given. Dropping it frees the memory."""


class BlockCopier(Protocol):
    """The device's side of swapping. Copies may be queued: they take effect in the order of all calls, steps too.

    The blocks may be given to somebody else as soon as `copy_out` returns, and the swapped memory may be dropped as
    soon as `copy_in` does: the copier keeps what its queue still needs.
    """

    def copy_out(self, block_ids: SequenceABC[int]) -> SwappedBlocks: ...

    def copy_in(self, swapped: SwappedBlocks, block_ids: SequenceABC[int]) -> None:
        """Write the swapped blocks to these, as many as were copied out."""
        ...


class SwapSpace:
    """Host memory for the blocks of preempted sequences, at most `max_bytes` of it.

    `num_swaps` counts the sequences that were taken in so far.
    """

    def __init__(self, copier: BlockCopier, *, max_bytes: int, bytes_per_block: int) -> None:
        if max_bytes < bytes_per_block:
            raise ConfigurationError(f"max_bytes={max_bytes}: expected at least one block of {bytes_per_block} bytes")
        self.num_swaps = 0
        self._copier = copier
        self._max_blocks = max_bytes // bytes_per_block
        self._num_blocks = 0
        self._swapped: dict[int, tuple[SwappedBlocks, int]] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks in host memory now."""
        return self._num_blocks

    def take_in(self, sequence: Sequence) -> bool:
        """Copy a sequence's blocks out; False, and nothing copied, where the budget does not hold them."""
        num_blocks = len(sequence.block_ids)
        if self._num_blocks + num_blocks > self._max_blocks:
            return False
        self._swapped[sequence.id] = self._copier.copy_out(sequence.block_ids), num_blocks
        self._num_blocks += num_blocks
        self.num_swaps += 1
        return True

    def num_blocks_of(self, sequence: Sequence) -> int:
        """How many blocks this sequence has here; 0 where it was not taken in."""
        return self._swapped[sequence.id][1] if sequence.id in self._swapped else 0

    def bring_back(self, sequence: Sequence) -> None:
        """Copy a sequence's blocks into those it holds now, and let its host memory go."""
        swapped, num_blocks = self._swapped[sequence.id]
        assert len(sequence.block_ids) == num_blocks
        self._copier.copy_in(swapped, sequence.block_ids)
        self.drop(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Let a sequence's host memory go; no effect where it has none."""
        _, num_blocks = self._swapped.pop(sequence.id, (None, 0))
        self._num_blocks -= num_blocks


def count_victims(
    head: Sequence,
    running: SequenceABC[Sequence],
    pool: BlockPool,
    *,
    level_of: Callable[[Sequence], int],
    num_blocks: Callable[[int], int],
    max_num_seqs: int,
) -> int | None:
    """How many of the running, from the tail, have to go so that `head` gets a seat and its blocks; None where those
    of lower priority do not have enough. `num_blocks` says how many blocks a sequence of so many tokens takes.
    """
    lower = [s for s in reversed(running) if level_of(s) > level_of(head)]
    # as admission will count, after every running sequence has taken its blocks
    num_lacking = {s.id: max(0, num_blocks(len(s.token_ids)) - len(s.block_ids)) for s in running}
    num_spare = pool.num_free - sum(num_lacking.values()) - num_blocks(len(head.token_ids))
    num_running = len(running)
    for num_victims in range(len(lower) + 1):
        if num_running < max_num_seqs and num_spare >= num_running:
            return num_victims
        if num_victims < len(lower):
            victim = lower[num_victims]
            num_own = sum(pool.num_references(block_id) == 1 for block_id in victim.block_ids)
            num_spare += num_own + num_lacking[victim.id]
            num_running -= 1
    return None
