"""Make room for guesses in a step, and take back what was wrong. Knows sequences and blocks, and not who guessed.

A sequence that decodes may have guesses at its next tokens (`draft_ids`). A step computes them with its one token, as
far as the budget, the free blocks and the answer's limit allow. Nothing is copied where one was wrong: its place in the
cache is overwritten by the token that comes there. A draft preempts nobody, and while somebody waits drafts take no
more than half of what a step has left.

A tree becomes a line once its verdict is there: the tokens on the right path come first, in the sequence and, by moving
their keys and values, in the cache. From then on it is a line whose end was wrong.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC

import numpy as np

from autobot_llm.engine.batching.draft_tree import MAX_TREE_TOKENS, depths
from autobot_llm.engine.batching.plan import Int64Array, ScheduledSequence, StepBatch, StepPlan
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.sequence import Sequence


def add_drafts(
    scheduled: list[ScheduledSequence], pool: BlockPool, *, num_running: int, budget: int, is_contended: bool
) -> int:
    """Extend the items of sequences that decode by as much of their drafts as there is room for, and take the blocks.

    Of a tree these are its first tokens, as far as none is deeper than the answer's limit. Returns the number of tokens
    added, at most `budget`.
    """
    if not any(item.sequence.draft_ids for item in scheduled):
        return 0
    if is_contended:
        budget //= 2
    num_added = 0
    for i, item in enumerate(scheduled):
        sequence, start = item.sequence, item.start - item.sequence.num_evicted_tokens
        most = sequence.max_num_tokens - len(sequence.token_ids) - 1
        num_draft = max(0, min(_num_usable(sequence, most), budget - num_added))
        num_blocks = -(-(start + 1 + num_draft) // pool.block_size) - len(sequence.block_ids)
        if num_blocks > 0:
            # One block for every running sequence stays: whoever needs it next is not preempted for a guess.
            block_ids = pool.allocate(num_blocks) if pool.num_free - num_blocks >= num_running else None
            if block_ids is None:
                num_draft = len(sequence.block_ids) * pool.block_size - start - 1
            else:
                sequence.block_ids.extend(block_ids)
        if num_draft:
            scheduled[i] = item._replace(num_tokens=1 + num_draft, num_draft=num_draft)
            num_added += num_draft
    return num_added


def _num_usable(sequence: Sequence, most: int) -> int:
    """How many tokens of a draft may be verified where no more than `most` in a row can be used."""
    parents = sequence.draft_parents[: MAX_TREE_TOKENS - 1]
    if not parents:
        return min(len(sequence.draft_ids), most)
    return next((node for node, depth in enumerate(depths(parents)) if depth > most), len(parents))


def straighten(plan: StepPlan, batch: StepBatch, paths: SequenceABC[SequenceABC[int]]) -> tuple[Int64Array, Int64Array]:
    """Make the trees of a computed plan lines, right tokens first. `paths` holds the indices of these in their drafts,
    for each item that samples. Returns the slots whose keys and values belong elsewhere, and where.

    No slot is written that is yet to be read where the moves are made one after the other.
    """
    slots_from: list[int] = []
    slots_to: list[int] = []
    samples = (s for s, item in enumerate(plan.scheduled) if item.samples)
    for s, path in zip(samples, paths, strict=True):
        sequence = plan.scheduled[s].sequence
        if not sequence.draft_parents:
            continue
        ids, right = sequence.draft_ids, set(path)
        sequence.draft_ids = [ids[node] for node in path] + [ids[node] for node in range(len(ids)) if node not in right]
        sequence.draft_parents = []
        slots = batch.slots_T[batch.query_starts[s] + 1 : batch.query_starts[s + 1]].tolist()
        for place, node in enumerate(path):
            if place != node:
                slots_from.append(slots[node])
                slots_to.append(slots[place])
    return np.array(slots_from, np.int64), np.array(slots_to, np.int64)


def drop_rejected(sequence: Sequence, stop: int, num_rejected: int, pool: BlockPool) -> int:
    """Take back the last draft tokens of a sequence that was advanced to `stop`, and the blocks they alone need.
    Returns where it stops now."""
    sequence.draft_ids, sequence.draft_parents, sequence.draft_rows = [], [], []
    if not num_rejected:
        return stop
    del sequence.token_ids[stop - num_rejected : stop]
    sequence.num_computed_tokens = stop - num_rejected
    num_blocks = -(-(sequence.num_computed_tokens - sequence.num_evicted_tokens) // pool.block_size)
    if num_blocks < len(sequence.block_ids):
        pool.free(sequence.block_ids[num_blocks:])
        del sequence.block_ids[num_blocks:]
    return stop - num_rejected
