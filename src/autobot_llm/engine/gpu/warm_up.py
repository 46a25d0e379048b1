"""Run every kind of step once, so that no request meets a compiler. Knows kinds of steps, not their speed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import triton

from autobot_llm.engine.batching.plan import StepBatch
from autobot_llm.engine.executor import SamplingArrays
from autobot_llm.engine.gpu.executor import GpuExecutor
from autobot_llm.engine.gpu.options import GpuLimits

_BLOCK_SIZE = 16
_CHUNK = 64  # tokens of a prompt's part, whose beginning is in the cache


def warm_up(executor: GpuExecutor) -> None:
    """Launch steps of a prompt beside a decoding sequence, drawing in every way. The cache stays as it is."""
    for sampling in (_drawn(is_restricted=True), _drawn(is_restricted=False)):
        executor.launch(_mixed_batch(executor.limits), sampling).wait()


def num_compiled_kernels() -> int:
    """How many kernels the cache on disk holds."""
    folder = Path(triton.knobs.cache.dir)
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0


def _mixed_batch(limits: GpuLimits) -> StepBatch:
    """One sequence that decodes, and one that goes on with its prompt: as far as the limits allow the latter."""
    chunk = min(_CHUNK, limits.max_model_len // 2, limits.max_num_batched_tokens - 1)
    query_lens, context_lens = [1], [2]
    if chunk > 1 and limits.max_num_seqs > 1:
        query_lens, context_lens = [1, chunk], [2, 2 * chunk]
    num_tokens = sum(query_lens)
    starts = np.cumsum([0, *query_lens])
    positions = [np.arange(c - q, c, dtype=np.int32) for q, c in zip(query_lens, context_lens, strict=True)]
    return StepBatch(
        ids_T=np.zeros(num_tokens, np.int64),
        positions_T=np.concatenate(positions),
        slots_T=np.full(num_tokens, -1, np.int64),  # nothing is written
        query_starts=starts.astype(np.int32),
        context_lens=np.array(context_lens, np.int32),
        block_tables_SB=np.zeros((len(query_lens), -(-max(context_lens) // _BLOCK_SIZE)), np.int32),
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
