"""Random steps over a paged cache, for the tests and twins of attention. Everything that must not matter is NaN."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from autobot_llm.engine.attention.paged import (
    BLOCK_SIZE,
    ITEM_FIELDS,
    MAX_DECODE_QUERIES,
    TREE_FIELDS,
    PagedBatch,
    decode_sizes,
    fill_decode_arrays,
    fill_tree_rows,
    full_load,
    plan_items_by_queries,
    trees_of,
)
from autobot_llm.engine.attention.sdpa_paged import attend_span, spans_of
from autobot_llm.engine.batching import draft_tree
from autobot_llm.engine.batching.plan import StepBatch
from autobot_llm.engine.kernels.gpu.decode_attention import MAX_ROWS


# T packed tokens, S sequences, B blocks of a sequence, H query heads, K key/value heads, D head size
@dataclass(frozen=True, slots=True)
class PagedStep:
    """One step of one layer: packed qkv as the projection leaves it (q THD, k and v TKD are views), and a cache that
    holds the step's own keys and values.
    """

    batch: StepBatch
    qkv: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    num_heads: int

    @property
    def num_kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def q(self) -> torch.Tensor:
        return self._heads[:, : self.num_heads]

    @property
    def k(self) -> torch.Tensor:
        return self._heads[:, self.num_heads : -self.num_kv_heads]

    @property
    def v(self) -> torch.Tensor:
        return self._heads[:, -self.num_kv_heads :]

    @property
    def _heads(self) -> torch.Tensor:
        return self.qkv.unflatten(1, (self.num_heads + 2 * self.num_kv_heads, -1))

    def expected(self, *, window: int = 0) -> torch.Tensor:
        """out_THD in float64."""
        out_THD = torch.empty_like(self.q, dtype=torch.float64)
        for span in spans_of(self.batch, self.qkv.device):
            q_QHD = self.q[span.start : span.stop].double()
            out_THD[span.start : span.stop] = attend_span(
                q_QHD, self.keys, self.values, span, window=window, math_dtype=torch.float64
            )
        return out_THD


def random_step(
    context_lens: list[int],
    query_lens: list[int],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> PagedStep:
    """Sequences in shuffled blocks. Unused blocks are NaN, and so is the rest of each sequence's last block."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    num_blocks_of = [-(-length // BLOCK_SIZE) for length in context_lens]
    num_blocks = sum(num_blocks_of) + 7
    free = rng.permutation(num_blocks).astype(np.int32)
    tables_SB = np.full((len(context_lens), max(num_blocks_of)), -1_000_000, np.int32)  # reading past a table faults
    starts = np.concatenate(([0], np.cumsum(query_lens))).astype(np.int32)
    qkv = torch.randn(int(starts[-1]), (num_heads + 2 * num_kv_heads) * head_size, generator=generator).to(dtype)
    keys = torch.full((num_blocks, num_kv_heads, BLOCK_SIZE, head_size), float("nan"), dtype=dtype)
    values = keys.clone()
    positions, slots = [], []
    for s, (length, num_queries) in enumerate(zip(context_lens, query_lens, strict=True)):
        blocks, free = free[: num_blocks_of[s]], free[num_blocks_of[s] :]
        tables_SB[s, : len(blocks)] = blocks
        at = np.arange(length, dtype=np.int32)
        slot = blocks[at // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + at % BLOCK_SIZE
        context = torch.randn(length, 2, num_kv_heads, head_size, generator=generator).to(dtype)
        own = qkv[int(starts[s]) : int(starts[s + 1])].unflatten(1, (-1, head_size))[:, num_heads:]
        context[length - num_queries :] = own.unflatten(1, (2, num_kv_heads))
        block, offset = torch.from_numpy(slot // BLOCK_SIZE), torch.from_numpy(slot % BLOCK_SIZE)
        keys[block, :, offset], values[block, :, offset] = context[:, 0], context[:, 1]
        positions.append(at[length - num_queries :])
        slots.append(slot[length - num_queries :])
    batch = StepBatch(
        ids_T=np.zeros(int(starts[-1]), np.int64),
        positions_T=np.concatenate(positions),
        slots_T=np.concatenate(slots),
        query_starts=starts,
        context_lens=np.array(context_lens, np.int32),
        block_tables_SB=tables_SB,
        logit_rows_R=(starts[1:] - 1).astype(np.int64),
        pending_rows_T=np.full(int(starts[-1]), -1, np.int32),
    )
    return PagedStep(batch, qkv.to(device), keys.to(device), values.to(device), num_heads)


def with_trees(step: PagedStep, *, seed: int = 1) -> PagedStep:
    """The same with a random tree for every sequence of more than one new token, except each fourth."""
    rng, batch = np.random.default_rng(seed), step.batch
    masks_T, positions_T = np.zeros(batch.num_tokens, np.uint64), batch.positions_T.copy()
    for s, (start, stop) in enumerate(pairwise(batch.query_starts.tolist())):
        if stop - start > 1 and s % 4 != 3:
            parents = [int(rng.integers(-1, node)) for node in range(stop - start - 1)]
            masks_T[start:stop] = draft_tree.masks(parents)
            positions_T[start + 1 : stop] = positions_T[start] + np.array(draft_tree.depths(parents), np.int32)
    return replace(step, batch=replace(batch, tree_masks_T=masks_T, positions_T=positions_T))


def device_batch(
    step: PagedStep,
    *,
    num_sequences: int | None = None,
    max_queries: int | None = None,
    num_processors: int = 8,
    window: int = 0,
) -> PagedBatch:
    """The step in device arrays, padded to `num_sequences`; whatever is not filled in is an absurd number."""
    batch = step.batch
    if batch.tree_masks_T is not None:
        return _batch_with_trees(step, num_processors, window)
    num_sequences = num_sequences or batch.num_sequences
    max_queries = max_queries or int(np.diff(batch.query_starts).max())
    sizes = decode_sizes(
        num_sequences,
        max_queries=max_queries,
        table_width=batch.block_tables_SB.shape[1] + 3,
        num_items=num_sequences + full_load(step.num_kv_heads, num_processors),
    )
    arrays = {name: np.full(shape, -1_234_567, np.int32) for name, shape in sizes.items()}
    fill_decode_arrays(arrays, batch, window=window)
    return PagedBatch.over({name: torch.from_numpy(a).to(step.qkv.device) for name, a in arrays.items()}, max_queries)


def _batch_with_trees(step: PagedStep, num_processors: int, window: int) -> PagedBatch:
    batch, group_size = step.batch, step.num_heads // step.num_kv_heads
    max_queries = min(MAX_DECODE_QUERIES, MAX_ROWS // group_size)
    spare_items = full_load(step.num_kv_heads, num_processors)
    num_parts = batch.num_sequences + batch.num_tokens // max_queries
    items_I8 = np.full((num_parts + spare_items, ITEM_FIELDS), -1_234_567, np.int32)
    num_items = plan_items_by_queries(
        items_I8,
        batch.query_starts,
        batch.context_lens,
        max_queries=max_queries,
        spare_items=spare_items,
        window=window,
        has_tree_S=trees_of(batch),
    )
    items_I8[num_items:] = -1
    rows_T4 = np.full((batch.num_tokens + 3, TREE_FIELDS), -1_234_567, np.int32)
    fill_tree_rows(rows_T4, batch)
    tables, items, rows = (
        torch.from_numpy(array).to(step.qkv.device) for array in (batch.block_tables_SB, items_I8, rows_T4)
    )
    return PagedBatch(tables, items, max_queries, tree_rows_T4=rows)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the worst row: a mean over all rows would forgive a wrong one. NaN where anything is NaN."""
    difference = torch.linalg.vector_norm(out.double() - expected, dim=-1)
    return float((difference / torch.linalg.vector_norm(expected, dim=-1)).max())
