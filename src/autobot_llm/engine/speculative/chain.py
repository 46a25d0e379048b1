"""Passes of a draft one after the other on a device that works beside the host. Knows launches and sampled rows; knows
nothing of what a pass computes.

A token reaches the next pass on the device, and the host while that one is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceABC

from autobot_llm.engine.batching.plan import ScheduledSequence, StepBatch
from autobot_llm.engine.executor import LaunchedStep, PipelinedExecutor
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.sampler import SamplingArraysBuilder
from autobot_llm.engine.sequence import NO_ROW, UNKNOWN_TOKEN, Sequence


class Chain:
    """The passes of one round of drafts. `target_id` says what a sampled id is called by the target, and UNKNOWN_TOKEN
    for what it has not."""

    def __init__(
        self, executor: PipelinedExecutor, sampling_arrays: SamplingArraysBuilder, target_id: Callable[[int], int]
    ) -> None:
        self._executor = executor
        self._sampling_arrays = sampling_arrays
        self._target_id = target_id
        self._before: tuple[LaunchedStep, list[Sequence]] | None = None

    def launch(self, parts: SequenceABC[ScheduledSequence], batch: StepBatch) -> None:
        """Queue a pass, and then fill in what the one before it has drawn. Each sequence that samples gets a token that
        nobody knows yet."""
        sampling = [part.sequence for part in parts if part.samples]
        launched = self._executor.launch(batch, self._sampling_arrays.build(sampling))
        self.settle()
        for row, sequence in enumerate(sampling):
            sequence.token_ids.append(UNKNOWN_TOKEN)
            sequence.pending_row = row
        self._before = launched, sampling

    def settle(self) -> None:
        """Wait for the last pass: its tokens, one after each sequence's last; without good logits it stays unknown."""
        if self._before is None:
            return
        launched, sampling = self._before
        self._before = None
        for sequence, token_id, best in zip(sampling, *launched.wait(), strict=True):
            sequence.pending_row = NO_ROW
            if math.isfinite(best):
                sequence.token_ids[-1] = self._target_id(token_id)


def known(token_ids: list[int]) -> list[int]:
    """Those before the first that stayed unknown."""
    return token_ids[: token_ids.index(UNKNOWN_TOKEN)] if UNKNOWN_TOKEN in token_ids else token_ids


def make_room(
    pool: BlockPool,
    shadow: Sequence,
    num_rows: int,
    idle: Iterable[Sequence] = (),
    give_up: Callable[[Sequence], None] = lambda _: None,
) -> bool:
    """Take blocks for so many rows of a sequence; where none are left, those that the `idle` hold, in their order."""
    num_blocks = -(-num_rows // pool.block_size) - len(shadow.block_ids)
    if num_blocks <= 0:
        return True
    others = iter(idle)
    while (block_ids := pool.allocate(num_blocks)) is None:
        other = next(others, None)
        if other is None:
            return False
        give_up(other)
    shadow.block_ids.extend(block_ids)
    return True
