"""Run every kind of step once, so that no request meets a compiler. Knows kinds of steps, not their speed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import triton

from autobot_llm.engine.attention.paged import BLOCK_SIZE
from autobot_llm.engine.batching.plan import StepBatch
from autobot_llm.engine.executor import SamplingArrays
from autobot_llm.engine.gpu.executor import GpuExecutor
from autobot_llm.engine.gpu.options import GpuLimits

# What steps that are not captured are made of: (sequences that decode, tokens of a prompt's next part, tokens of the
# prompt in the cache before it). Each line leads to kernels, or sizes of their tiles, of its own.
_MIXES = (
    *((1, 64, 64), (30, 64, 64), (90, 64, 64), (1, 8, 24), (1, 16, 16), (1, 64, 0), (1, 2048, 64)),
    *((1, 4, 28), (12, 4, 28), (30, 4, 28), (90, 4, 28), (30, 8, 24)),  # the rest of a prompt, beside few and many
)


def warm_up(executor: GpuExecutor) -> None:
    """Launch steps of a prompt beside decoding sequences, drawing in every way. The cache stays as it is."""
    for mix in _MIXES:
        if (batch := _mixed_batch(executor.limits, *mix)) is not None:
            executor.launch(batch, _drawn(is_restricted=True)).wait()
            executor.launch(batch, _drawn(is_restricted=False)).wait()


def num_compiled_kernels() -> int:
    """How many kernels the cache on disk holds."""
    folder = Path(triton.knobs.cache.dir)
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0


def _mixed_batch(limits: GpuLimits, num_decoding: int, num_new: int, num_cached: int) -> StepBatch | None:
    """Decoding sequences and a prompt's part; None where the limits allow no such step."""
    query_lens = np.array([*[1] * num_decoding, num_new], np.int32)
    context_lens = np.array([*[2] * num_decoding, num_new + num_cached], np.int32)
    num_tokens = int(query_lens.sum())
    if (
        len(query_lens) > limits.max_num_seqs
        or num_tokens > limits.max_num_batched_tokens
        or num_new + num_cached > limits.max_model_len
    ):
        return None
    positions = [np.arange(c - q, c, dtype=np.int32) for q, c in zip(query_lens, context_lens, strict=True)]
    return StepBatch(
        ids_T=np.zeros(num_tokens, np.int64),
        positions_T=np.concatenate(positions),
        slots_T=np.full(num_tokens, -1, np.int64),  # nothing is written
        query_starts=np.cumsum([0, *query_lens], dtype=np.int32),
        context_lens=context_lens,
        block_tables_SB=np.zeros((len(query_lens), -(-int(context_lens[-1]) // BLOCK_SIZE)), np.int32),
        logit_rows_R=np.zeros(1, np.int64),
        pending_rows_T=np.full(num_tokens, -1, np.int32),
    )


def _drawn(*, is_restricted: bool) -> SamplingArrays:
    return SamplingArrays(
        any_drawn=True,
        any_restricted=is_restricted,
        is_drawn_R=np.ones(1, np.bool_),
        temperature_R=np.ones(1, np.float32),
        top_k_R=np.zeros(1, np.int32),
        top_p_R=np.full(1, 0.9 if is_restricted else 1.0, np.float32),
        min_p_R=np.zeros(1, np.float32),
        keys_R=np.zeros(1, np.uint64),
    )
