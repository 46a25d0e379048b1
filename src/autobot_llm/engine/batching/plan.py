"""What one step will compute, and the same as arrays. Knows sequences and blocks; knows nothing of torch."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from autobot_llm.engine.batching import draft_tree
from autobot_llm.engine.sequence import NO_ROW, Sequence

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]
UInt64Array = npt.NDArray[np.uint64]


class ScheduledSequence(NamedTuple):
    """Tokens [start, start + num_tokens) of one sequence. It samples when they reach the sequence's end.

    The last `num_draft` of them are the first of its `draft_ids`: guesses, so it samples after each of them, too. Where
    they are a tree, "tokens" counts places in the cache; two guesses at one token of the sequence have two.
    `epoch` is the sequence's own at the time of the plan: another one later means that it has lost these blocks.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    epoch: int = 0
    num_draft: int = 0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: at least one sequence, each with blocks for all the tokens it is to compute.

    The sequences that decode come first; `num_prompt_tokens` of the `num_tokens` belong to the others, and
    `num_draft_tokens` are guesses.
    """

    scheduled: tuple[ScheduledSequence, ...]
    num_tokens: int
    num_prompt_tokens: int
    num_draft_tokens: int = 0


_FEW_SEQUENCES, _FEW_TOKENS = 6, 64  # up to so many, lists are quicker than arrays


# T packed tokens, S sequences, B blocks of the longest sequence, R rows whose logits are wanted
@dataclass(frozen=True, slots=True)
class StepBatch:
    """A step's inputs as packed arrays, built once and read by every layer.

    Sequence s owns packed tokens [query_starts[s], query_starts[s + 1]); its context after this step is
    context_lens[s] tokens, all or those it keeps, stored in blocks block_tables[s]. Token t goes to cache slot
    slots_T[t] = block * block_size + offset. Unused entries of block_tables are 0 and must not be read.

    Where pending_rows_T[t] is not -1, the host does not know token t yet: it is the one that row pending_rows_T[t]
    (of R) of the step launched last before this one samples, and ids_T[t] is -1. Rows from that device's first draft
    row on are drafts that it has not told yet either (ChainExecutor).

    Where a draft is a tree, its tokens have slots in the order of the draft and positions by their depth in the tree.
    Bit j of tree_masks_T[t] then says that token t sees new token j of its sequence: itself, and those before it on its
    path. The context before the new tokens it sees whole, or as far as a sliding window reaches. Tokens of other
    sequences have the mask 0, and see all before them. None where no draft of the step is a tree.
    """

    ids_T: Int64Array
    positions_T: Int32Array
    slots_T: Int64Array
    query_starts: Int32Array
    context_lens: Int32Array
    block_tables_SB: Int32Array
    logit_rows_R: Int64Array
    pending_rows_T: Int32Array
    tree_masks_T: UInt64Array | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.ids_T)

    @property
    def num_sequences(self) -> int:
        return len(self.context_lens)

    @property
    def places(self) -> Int32Array:
        """T positions less what a sequence has let go: places in its table, or on their path where they are a tree."""
        num_new_S = np.diff(self.query_starts)
        num_evicted_S = self.positions_T[self.query_starts[:-1]] - (self.context_lens - num_new_S)
        places_T: Int32Array = self.positions_T - num_evicted_S.repeat(num_new_S).astype(np.int32)
        return places_T


class BatchBuilder:
    """`build_batch`, step after step. Where the same sequences as before decode one more token, which is nearly always,
    the arrays follow from those of the step before, at a fraction of the cost."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._batch: StepBatch | None = None  # the last step, if everybody decoded
        self._sequences: tuple[Sequence, ...] = ()  # its sequences, each with its epoch, row and number of blocks
        self._epochs: tuple[int, ...] = ()
        self._pending_rows: list[int] = []
        self._num_blocks: list[int] = []
        self._num_evicted: list[int] = []

    def build(self, plan: StepPlan) -> StepBatch:
        """Pack the scheduled tokens of a plan; each plan once, in order."""
        before, self._batch = self._batch, None
        if plan.num_prompt_tokens or plan.num_draft_tokens:
            return build_batch(plan.scheduled, self._block_size)
        sequences, _starts, _counts, _samples, epochs, _drafts = zip(*plan.scheduled, strict=True)
        pending_rows = [sequence.pending_row for sequence in sequences]
        num_evicted = [sequence.num_evicted_tokens for sequence in sequences]
        is_later = sequences == self._sequences and epochs == self._epochs and num_evicted == self._num_evicted
        if before is None or not is_later:
            self._sequences, self._epochs = sequences, epochs
            self._batch = build_batch(plan.scheduled, self._block_size)
        else:
            self._batch = self._one_later(before, plan.scheduled, pending_rows)
        self._pending_rows = pending_rows
        self._num_blocks = [len(sequence.block_ids) for sequence in sequences]
        self._num_evicted = num_evicted
        return self._batch

    def _one_later(
        self, before: StepBatch, scheduled: SequenceABC[ScheduledSequence], pending_rows: list[int]
    ) -> StepBatch:
        positions_T = before.positions_T + np.int32(1)
        assert positions_T[-1] == scheduled[-1].start, "a step was left out"
        tables_SB = self._grown_tables(before.block_tables_SB)
        is_same = pending_rows == self._pending_rows and NO_ROW not in pending_rows  # an unknown token is -1
        tokens = before if is_same else _tokens_of(scheduled)
        return StepBatch(
            ids_T=tokens.ids_T,
            positions_T=positions_T,
            slots_T=_slots(tables_SB, np.arange(len(tables_SB)), before.context_lens, self._block_size),
            query_starts=before.query_starts,
            context_lens=before.context_lens + np.int32(1),
            block_tables_SB=tables_SB,
            logit_rows_R=before.logit_rows_R,
            pending_rows_T=tokens.pending_rows_T,
        )

    def _grown_tables(self, tables_SB: Int32Array) -> Int32Array:
        """The block tables with the blocks that came since. Those of a step that was built stay as they are."""
        blocks = [sequence.block_ids for sequence in self._sequences]
        if list(map(len, blocks)) == self._num_blocks:
            return tables_SB
        if max(map(len, blocks)) > tables_SB.shape[1]:
            return _block_tables(blocks)
        tables_SB = tables_SB.copy()
        for s, (block_ids, num_before) in enumerate(zip(blocks, self._num_blocks, strict=True)):
            if len(block_ids) > num_before:
                tables_SB[s, num_before : len(block_ids)] = block_ids[num_before:]
        return tables_SB


def build_batch(scheduled: SequenceABC[ScheduledSequence], block_size: int) -> StepBatch:
    """Pack the scheduled tokens of a plan, in plan order; R rows are those of sequences that sample, for each draft
    token one more."""
    block_tables_SB = _block_tables([item.sequence.block_ids for item in scheduled])
    num_tokens = sum(item.num_tokens for item in scheduled)
    if num_tokens > _FEW_SEQUENCES and num_tokens == len(scheduled):
        return single_token_batch(scheduled, block_tables_SB, block_size)
    if num_tokens <= _FEW_TOKENS and not any(item.num_draft and item.sequence.draft_parents for item in scheduled):
        return few_tokens_batch(scheduled, block_tables_SB, block_size)
    return many_tokens_batch(scheduled, block_tables_SB, block_size)


def many_tokens_batch(
    scheduled: SequenceABC[ScheduledSequence], block_tables_SB: Int32Array, block_size: int
) -> StepBatch:
    """Any step, in arrays: of a sequence, only what it has in lists takes Python."""
    ids: list[int] = []
    pending_rows: list[int] = []
    for sequence, start, num_new_tokens, _samples, _epoch, num_draft in scheduled:
        ids += sequence.token_ids[start : start + num_new_tokens - num_draft]
        if num_draft:
            ids += sequence.draft_ids[:num_draft]
        pending_rows += _pending_rows(sequence, num_new_tokens, num_draft)
    starts_S, num_new_S, num_draft_S, num_evicted_S = np.array(
        [(item.start, item.num_tokens, item.num_draft, item.sequence.num_evicted_tokens) for item in scheduled],
        np.int32,
    ).T
    query_starts = np.zeros(len(scheduled) + 1, np.int32)
    np.cumsum(num_new_S, out=query_starts[1:])
    sequences_T = np.arange(len(scheduled)).repeat(num_new_S)
    rows_T = np.arange(len(ids), dtype=np.int32)
    positions_T = rows_T + (starts_S - query_starts[:-1])[sequences_T]
    slots_T = _slots(block_tables_SB, sequences_T, positions_T - num_evicted_S[sequences_T], block_size)
    first_logits_S = np.where([item.samples for item in scheduled], query_starts[1:] - 1 - num_draft_S, len(ids))
    tree_masks_T = None
    for item, row in zip(scheduled, query_starts[:-1].tolist(), strict=True):
        sequence, start, num_new_tokens, _samples, _epoch, num_draft = item
        if num_draft and sequence.draft_parents:
            if tree_masks_T is None:
                tree_masks_T = np.zeros(len(ids), np.uint64)
            end, parents = row + num_new_tokens, sequence.draft_parents[:num_draft]
            assert num_new_tokens == 1 + num_draft <= draft_tree.MAX_TREE_TOKENS
            positions_T[row + 1 : end] = np.add(draft_tree.depths(parents), start)
            tree_masks_T[row:end] = draft_tree.masks(parents)
    return StepBatch(
        ids_T=np.array(ids, np.int64),
        positions_T=positions_T,
        slots_T=slots_T,
        query_starts=query_starts,
        context_lens=starts_S + num_new_S - num_evicted_S,
        block_tables_SB=block_tables_SB,
        logit_rows_R=np.flatnonzero(rows_T >= first_logits_S[sequences_T]),
        pending_rows_T=np.array(pending_rows, np.int32),
        tree_masks_T=tree_masks_T,
    )


def few_tokens_batch(
    scheduled: SequenceABC[ScheduledSequence], block_tables_SB: Int32Array, block_size: int
) -> StepBatch:
    """The same for drafts that are lines, and other steps of few tokens: in lists, in a half of the time."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    pending_rows: list[int] = []
    starts, context_lens = [0], []
    logit_rows: list[int] = []
    for sequence, start, num_new_tokens, samples, _epoch, num_draft in scheduled:
        stop, num_evicted, block_ids = start + num_new_tokens, sequence.num_evicted_tokens, sequence.block_ids
        ids += sequence.token_ids[start : stop - num_draft]
        positions += range(start, stop)
        places = range(start - num_evicted, stop - num_evicted)
        slots += [block_ids[place // block_size] * block_size + place % block_size for place in places]
        if num_draft:
            ids += sequence.draft_ids[:num_draft]
        pending_rows += _pending_rows(sequence, num_new_tokens, num_draft)
        end = len(ids)
        if samples:
            logit_rows += range(end - 1 - num_draft, end)
        starts.append(end)
        context_lens.append(stop - num_evicted)
    return StepBatch(
        ids_T=np.array(ids, np.int64),
        positions_T=np.array(positions, np.int32),
        slots_T=np.array(slots, np.int64),
        query_starts=np.array(starts, np.int32),
        context_lens=np.array(context_lens, np.int32),
        block_tables_SB=block_tables_SB,
        logit_rows_R=np.array(logit_rows, np.int64),
        pending_rows_T=np.array(pending_rows, np.int32),
    )


def _pending_rows(sequence: Sequence, num_new_tokens: int, num_draft: int) -> list[int]:
    """Of a sequence's new tokens; only one that decodes has a token that is not known yet, besides drafts."""
    if num_new_tokens == 1:
        return [sequence.pending_row]
    return [NO_ROW] * (num_new_tokens - num_draft) + (sequence.draft_rows[:num_draft] or [NO_ROW] * num_draft)


def _block_tables(tables: SequenceABC[array[int]]) -> Int32Array:
    block_tables_SB = np.zeros((len(tables), max(map(len, tables))), np.int32)
    for s, block_ids in enumerate(tables):
        block_tables_SB[s, : len(block_ids)] = block_ids
    return block_tables_SB


def single_token_batch(
    scheduled: SequenceABC[ScheduledSequence], block_tables_SB: Int32Array, block_size: int
) -> StepBatch:
    """The common case, everybody decodes: no Python per sequence beyond reading its fields."""
    num_sequences = len(scheduled)
    starts = [item.start for item in scheduled]
    places_T = np.array([item.start - item.sequence.num_evicted_tokens for item in scheduled], np.int32)
    rows_T = np.arange(num_sequences, dtype=np.int64)
    samples = [item.samples for item in scheduled]
    tokens = _tokens_of(scheduled)
    return StepBatch(
        ids_T=tokens.ids_T,
        positions_T=np.array(starts, np.int32),
        slots_T=_slots(block_tables_SB, rows_T, places_T, block_size),
        query_starts=np.arange(num_sequences + 1, dtype=np.int32),
        context_lens=places_T + np.int32(1),
        block_tables_SB=block_tables_SB,
        logit_rows_R=rows_T if all(samples) else rows_T[samples],
        pending_rows_T=tokens.pending_rows_T,
    )


class _Tokens(NamedTuple):
    ids_T: Int64Array
    pending_rows_T: Int32Array


def _tokens_of(scheduled: SequenceABC[ScheduledSequence]) -> _Tokens:
    """The tokens to be computed, of sequences that have one each."""
    return _Tokens(
        np.array([item.sequence.token_ids[item.start] for item in scheduled], np.int64),
        np.array([item.sequence.pending_row for item in scheduled], np.int32),
    )


def _slots(block_tables_SB: Int32Array, sequences_T: Int64Array, places_T: Int32Array, block_size: int) -> Int64Array:
    """Where tokens go that have these places in the tables of these sequences."""
    blocks_T = block_tables_SB[sequences_T, places_T // block_size]
    return blocks_T.astype(np.int64) * block_size + places_T % block_size
