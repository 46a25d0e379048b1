"""What one step will compute, and the same as arrays. Knows sequences and blocks; knows nothing of torch."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autobot_llm.engine.sequence import Sequence

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Tokens [start, start + num_tokens) of one sequence. It samples when they reach the sequence's end."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: at least one sequence, each with blocks for all the tokens it is to compute."""

    scheduled: tuple[ScheduledSequence, ...]
    num_tokens: int


# T packed tokens, S sequences, B blocks of the longest sequence, R rows whose logits are wanted
@dataclass(frozen=True, slots=True)
class StepBatch:
    """A step's inputs as packed arrays, built once and read by every layer.

    Sequence s owns packed tokens [query_starts[s], query_starts[s + 1]); its context after this step is
    context_lens[s] tokens, stored in blocks block_tables[s]. Token t goes to cache slot slots_T[t] =
    block * block_size + offset. Unused entries of block_tables are 0 and must not be read.
    """

    ids_T: Int64Array
    positions_T: Int32Array
    slots_T: Int64Array
    query_starts: Int32Array
    context_lens: Int32Array
    block_tables_SB: Int32Array
    logit_rows_R: Int64Array

    @property
    def num_tokens(self) -> int:
        return len(self.ids_T)

    @property
    def num_sequences(self) -> int:
        return len(self.context_lens)


def build_batch(scheduled: SequenceABC[ScheduledSequence], block_size: int) -> StepBatch:
    """Pack the scheduled tokens of a plan, in plan order; R rows are those of sequences that sample."""
    num_tokens = sum(item.num_tokens for item in scheduled)
    num_sequences = len(scheduled)
    num_blocks = max(len(item.sequence.block_ids) for item in scheduled)
    ids_T = np.empty(num_tokens, np.int64)
    positions_T = np.empty(num_tokens, np.int32)
    slots_T = np.empty(num_tokens, np.int64)
    query_starts = np.zeros(num_sequences + 1, np.int32)
    context_lens = np.empty(num_sequences, np.int32)
    block_tables_SB = np.zeros((num_sequences, num_blocks), np.int32)
    logit_rows = []
    row = 0
    for s, item in enumerate(scheduled):
        sequence, start, stop = item.sequence, item.start, item.start + item.num_tokens
        block_ids = sequence.block_ids
        end = row + item.num_tokens
        block_tables_SB[s, : len(block_ids)] = block_ids
        if item.num_tokens == 1:  # the common case, kept free of temporary arrays
            ids_T[row] = sequence.token_ids[start]
            positions_T[row] = start
            slots_T[row] = block_ids[start // block_size] * block_size + start % block_size
        else:
            positions = np.arange(start, stop, dtype=np.int32)
            ids_T[row:end] = sequence.token_ids[start:stop]
            positions_T[row:end] = positions
            blocks = block_tables_SB[s, positions // block_size].astype(np.int64)
            slots_T[row:end] = blocks * block_size + positions % block_size
        context_lens[s] = stop
        row = end
        query_starts[s + 1] = row
        if item.samples:
            logit_rows.append(row - 1)
    return StepBatch(
        ids_T=ids_T,
        positions_T=positions_T,
        slots_T=slots_T,
        query_starts=query_starts,
        context_lens=context_lens,
        block_tables_SB=block_tables_SB,
        logit_rows_R=np.array(logit_rows, np.int64),
    )
