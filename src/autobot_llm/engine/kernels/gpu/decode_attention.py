"""Attention of a few new tokens per sequence to long paged contexts. Knows work items; knows nothing of who made them.

Reading the cache is all the time there is, so one program reads its part of a context once, for every query row that
needs it: the G query heads of a key/value head and all new tokens of the sequence are the rows of one matrix product.
A sequence in several parts is put together by whichever of its programs ends last, so a layer is one launch.

Source: split-K attention over the context, "Flash-Decoding" (Dao and others, 2023); the online softmax of
FlashAttention (arXiv 2205.14135), in base 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from autobot_llm.engine.attention.paged import BLOCK_SIZE, PagedBatch
from autobot_llm.engine.kernels.gpu.decode_kernels import decode_kernel
from autobot_llm.engine.kernels.gpu.launch import launch_options
from autobot_llm.engine.kv_cache.storage import QUANTIZED_DTYPES

MAX_ROWS = 128
"""Query rows (tokens times query heads of a group) of one program: what its accumulators hold without spilling."""


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """How one program walks its part: positions in a step of it, warps, and loads in flight."""

    block_n: int
    num_warps: int
    num_stages: int


# S sequences, Q query rows, K key/value heads, G query heads of each, D head size, I work items
# M rows of a program (query token by head of the group), N positions of a tile
@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """Where programs leave parts of a sequence for the last of them. Launches of one stream may share it."""

    partials: torch.Tensor
    stats: torch.Tensor
    arrivals: torch.Tensor

    @classmethod
    def allocate(
        cls,
        num_items: int,
        *,
        max_queries: int,
        group_size: int,
        num_kv_heads: int,
        head_size: int,
        device: torch.device,
    ) -> DecodeWorkspace:
        """Room for so many items with so many new tokens per sequence; float32, and int32 counters of zero."""
        num_rows = num_items * num_kv_heads * rows_of(max_queries, group_size)
        return cls(
            partials=torch.empty(num_rows * head_size, dtype=torch.float32, device=device),
            stats=torch.empty(num_rows * 2, dtype=torch.float32, device=device),
            arrivals=torch.zeros(num_items * num_kv_heads, dtype=torch.int32, device=device),
        )


def rows_of(max_queries: int, group_size: int) -> int:
    """M: the rows a program works on, a size that a matrix product takes."""
    return max(8, 1 << (max_queries * group_size - 1).bit_length())


def choose_decode_tile(num_rows: int, num_items: int, *, rounded: bool = False, is_long: bool = False) -> DecodeTile:
    """The best measured for M rows, and so many work items: many small programs keep a full device busiest."""
    if is_long and num_rows <= 16:
        return _ROUNDED_LONG_TILE if rounded else _LONG_TILE
    for most_rows, few_items, tile in _ROUNDED_TILES if rounded else _TILES:
        if num_rows <= most_rows and num_items <= few_items:
            return tile
    raise ValueError(f"{num_rows} query rows for one key/value head: expected at most {MAX_ROWS}")


def item_counts(most: int) -> tuple[int, ...]:
    """Numbers of work items, up to `most`, that lead to every tile there is for so many."""
    return tuple(sorted({min(few_items, most) for _, few_items, _ in (*_TILES, *_ROUNDED_TILES)}))


_ANY = 1 << 30

# (most rows, most items, tile): the quickest of a layer by itself on an H200 (docs/log.md), which has
# 33 items beside one for each sequence; of 128 rows by judgement.
_TILES = (
    (16, 36, DecodeTile(block_n=64, num_warps=2, num_stages=2)),
    (16, 48, DecodeTile(block_n=64, num_warps=2, num_stages=3)),
    (16, 100, DecodeTile(block_n=32, num_warps=2, num_stages=4)),
    (16, _ANY, DecodeTile(block_n=32, num_warps=2, num_stages=2)),
    (32, 36, DecodeTile(block_n=64, num_warps=8, num_stages=2)),
    (32, _ANY, DecodeTile(block_n=32, num_warps=4, num_stages=3)),
    (MAX_ROWS, _ANY, DecodeTile(block_n=32, num_warps=8, num_stages=3)),
)

# The same over keys and values of one byte.
_ROUNDED_TILES = (
    (16, 36, DecodeTile(block_n=64, num_warps=4, num_stages=3)),
    (16, 48, DecodeTile(block_n=128, num_warps=4, num_stages=3)),
    (16, 100, DecodeTile(block_n=64, num_warps=4, num_stages=3)),
    (16, _ANY, DecodeTile(block_n=32, num_warps=1, num_stages=4)),
    (32, 36, DecodeTile(block_n=64, num_warps=8, num_stages=2)),
    (32, _ANY, DecodeTile(block_n=64, num_warps=4, num_stages=2)),
    (MAX_ROWS, _ANY, DecodeTile(block_n=32, num_warps=8, num_stages=3)),
)

# Of long contexts, with three programs a multiprocessor.
_LONG_TILE = DecodeTile(block_n=64, num_warps=4, num_stages=3)
_ROUNDED_LONG_TILE = DecodeTile(block_n=128, num_warps=4, num_stages=3)


def paged_decode(
    q_QHD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: PagedBatch,
    out_QHD: torch.Tensor,
    workspace: DecodeWorkspace,
    *,
    window: int = 0,
    tile: DecodeTile | None = None,
) -> None:
    """Attend the query rows of the batch's items to their contexts, into `out_QHD`; rows of no item are left alone.

    keys and values are one layer's [num_blocks, K, 16, D], or quantized as PagedStorage says; contiguous. q and out may
    be strided in Q. Launches one kernel of a grid that depends on shapes alone, so it may be captured. `window`:
    positions a query sees, 0 for all.
    """
    num_kv_heads, head_size = keys.shape[1], q_QHD.shape[2]
    group_size = q_QHD.shape[1] // num_kv_heads
    num_rows = rows_of(batch.max_queries, group_size)
    num_items = batch.items_I8.shape[0]
    is_rounded = keys.dtype in QUANTIZED_DTYPES
    tile = tile or choose_decode_tile(num_rows, num_items, rounded=is_rounded, is_long=batch.is_long)
    decode_kernel[(num_kv_heads, num_items)](
        q_QHD,
        keys if keys.dtype == torch.int8 else _words(keys),
        _words(values),
        _words(keys) if is_rounded else None,
        _words(values) if is_rounded else None,
        out_QHD,
        batch.items_I8,
        batch.block_tables_SB,
        batch.tree_rows_T4,
        workspace.partials,
        workspace.stats,
        workspace.arrivals,
        q_QHD.stride(0),
        out_QHD.stride(0),
        batch.block_tables_SB.stride(0),
        math.log2(math.e) / math.sqrt(head_size),
        WINDOW=window,
        PAGE=BLOCK_SIZE,
        K=num_kv_heads,
        G=group_size,
        D=head_size,
        M=num_rows,
        N=tile.block_n,
        UNROLL=max(1, min(8, 32 * tile.num_warps // num_rows)),
        FLOAT8=keys.dtype == torch.float8_e4m3fn,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(q_QHD.device),
    )


def _words(cache: torch.Tensor) -> torch.Tensor:
    return cache.view(torch.int16) if cache.dtype in QUANTIZED_DTYPES else cache
