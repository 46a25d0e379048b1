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
import triton
import triton.language as tl

from autobot_llm.engine.attention.paged import BLOCK_SIZE, PagedBatch
from autobot_llm.engine.kernels.gpu.launch import (
    launch_options,
    lean,
    let_next_kernel_start,
    wait_for_previous_kernel,
)
from autobot_llm.engine.kernels.gpu.narrow import numbers_of_words
from autobot_llm.engine.kv_cache.storage import QUANTIZED_DTYPES, scales_of

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
    return max(16, 1 << (max_queries * group_size - 1).bit_length())


def choose_decode_tile(num_rows: int, num_items: int, *, rounded: bool = False, is_long: bool = False) -> DecodeTile:
    """The best measured for M rows, and so many work items: many small programs keep a full device busiest."""
    if is_long and num_rows <= 16 and not rounded:
        return _LONG_TILE
    for most_rows, few_items, tile in _ROUNDED_TILES if rounded else _TILES:
        if num_rows <= most_rows and num_items <= few_items:
            return tile
    raise ValueError(f"{num_rows} query rows for one key/value head: expected at most {MAX_ROWS}")


_ANY = 1 << 30

# (most rows, most items, tile): measured for 16 rows in whole steps on an H200 (docs/log.md), by judgement for more. An
# H200 has 33 items beside one for each sequence.
_TILES = (
    (16, 36, DecodeTile(block_n=64, num_warps=4, num_stages=2)),
    (16, 100, DecodeTile(block_n=128, num_warps=8, num_stages=2)),
    (16, _ANY, DecodeTile(block_n=32, num_warps=1, num_stages=2)),
    (32, _ANY, DecodeTile(block_n=64, num_warps=4, num_stages=2)),
    (64, _ANY, DecodeTile(block_n=32, num_warps=4, num_stages=3)),
    (MAX_ROWS, _ANY, DecodeTile(block_n=32, num_warps=8, num_stages=3)),
)

_LONG_TILE = DecodeTile(block_n=128, num_warps=4, num_stages=2)
"""At 8 x 16,384 141 us a layer on an H200, where the tile of short contexts takes 177; at 32 x 576 29 and 24."""

# The same over keys and values of one byte: large tiles in few warps share what each position costs. The first is the
# quickest at 8 x 16,384 and 32 x 576 on an H200, the others are by judgement.
_ROUNDED_TILES = (
    (16, 100, DecodeTile(block_n=128, num_warps=4, num_stages=3)),
    (16, _ANY, DecodeTile(block_n=64, num_warps=2, num_stages=3)),
    *_TILES[3:],
)


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
    tile = tile or choose_decode_tile(
        num_rows, num_items, rounded=keys.dtype in QUANTIZED_DTYPES, is_long=batch.is_long
    )
    _decode[(num_kv_heads, num_items)](
        q_QHD,
        _words(keys),
        _words(values),
        scales_of(keys),
        scales_of(values),
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
        UNROLL=max(1, 64 // num_rows),
        FLOAT8=keys.dtype == torch.float8_e4m3fn,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(q_QHD.device),
    )


def _words(cache: torch.Tensor) -> torch.Tensor:
    return cache.view(torch.int16) if cache.dtype in QUANTIZED_DTYPES else cache


@lean
@triton.jit(do_not_specialize=["table_stride"])  # it changes from step to step
def _decode(  # type: ignore[no-untyped-def]
    q_ptr,
    keys_ptr,  # int16, two numbers in each, if quantized
    values_ptr,
    key_scales_ptr,  # None: keys and values are what they are
    value_scales_ptr,
    out_ptr,
    items_ptr,
    tables_ptr,
    trees_ptr,
    partials_ptr,
    stats_ptr,
    arrivals_ptr,
    q_stride,
    out_stride,
    table_stride,
    scale,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    UNROLL: tl.constexpr,
    FLOAT8: tl.constexpr,  # or int8, if quantized
    PDL: tl.constexpr,
):
    let_next_kernel_start(PDL)
    head = tl.program_id(0)
    item = tl.program_id(1)
    # items and tables come with a copy that ends before the step's first kernel starts, and no kernel writes them;
    # padding is -1 throughout, so that it has no positions
    item_ptr = items_ptr + item * 8
    sequence = tl.load(item_ptr)
    start = tl.load(item_ptr + 1)
    stop = tl.load(item_ptr + 2)
    first_item = tl.load(item_ptr + 3)
    num_items = tl.load(item_ptr + 4)
    first_query = tl.load(item_ptr + 5)
    num_queries = tl.load(item_ptr + 6)
    context = tl.load(item_ptr + 7)
    table_ptr = tables_ptr + sequence * table_stride
    if WINDOW:
        first_position = context - num_queries
        if trees_ptr is not None:
            first_position = tl.load(trees_ptr + first_query * 4 + 2, mask=sequence >= 0, other=0)
        start = tl.maximum(start, tl.maximum(first_position + 1 - WINDOW, 0) // PAGE * PAGE)
    # blocks are looked up a tile ahead by hand: looking up inside the loop would take the tiles' pipeline stages
    n = start + tl.arange(0, N)
    blocks_N = tl.load(table_ptr + n // PAGE, mask=n < stop, other=0)
    if key_scales_ptr is not None:  # scales are read a tile ahead, so their blocks are looked up two ahead
        scale_blocks_N = tl.load(table_ptr + (n + N) // PAGE, mask=n + N < stop, other=0)
    wait_for_previous_kernel(PDL)
    if sequence < 0:
        return

    m = tl.arange(0, M)
    query_M = m // G
    is_row_M = query_M < num_queries
    heads_M = head * G + m % G
    q_ptrs_M = q_ptr + (first_query + query_M) * q_stride + heads_M * D
    if key_scales_ptr is not None:  # even and odd dimensions apart: the low and the high bytes of words
        c = tl.arange(0, D // 2)
        q_MC = tl.load(q_ptrs_M[:, None] + 2 * c[None, :], mask=is_row_M[:, None], other=0.0)
        q_odd_MC = tl.load(q_ptrs_M[:, None] + 2 * c[None, :] + 1, mask=is_row_M[:, None], other=0.0)
        odd_acc_MC = tl.zeros((M, D // 2), tl.float32)
        key_scales_N, value_scales_N = _scales(
            key_scales_ptr, value_scales_ptr, blocks_N, n, n < stop, head, PAGE, K, D
        )
    else:
        c = tl.arange(0, D)
        q_MC = tl.load(q_ptrs_M[:, None] + c[None, :], mask=is_row_M[:, None], other=0.0)
    C: tl.constexpr = c.shape[0]
    ROW: tl.constexpr = PAGE * D if key_scales_ptr is None else PAGE * (D + 2) // 2  # of a head's block
    acc_MC = tl.zeros((M, C), tl.float32)
    first_new = context - num_queries
    if trees_ptr is not None:
        tree_ptrs_M = trees_ptr + (first_query + query_M) * 4
        low_word_M = tl.load(tree_ptrs_M, mask=is_row_M, other=0)
        high_word_M = tl.load(tree_ptrs_M + 1, mask=is_row_M, other=0)
        first_new_M = tl.load(tree_ptrs_M + 2, mask=is_row_M, other=0)
        position_M = tl.load(tree_ptrs_M + 3, mask=is_row_M, other=0)

    high_M = tl.full((M,), float("-inf"), tl.float32)
    sum_M = tl.zeros((M,), tl.float32)
    for _ in tl.range(start, stop, N):
        is_part_N = n < stop
        offsets_N = (blocks_N.to(tl.int64) * K + head) * ROW + (n % PAGE) * C
        if key_scales_ptr is None:
            k_CN = tl.trans(tl.load(keys_ptr + offsets_N[:, None] + c[None, :], mask=is_part_N[:, None], other=0))
        else:  # nothing may lie between a load and its conversion
            k_CN = tl.load(keys_ptr + offsets_N[None, :] + c[:, None], mask=is_part_N[None, :], other=0)
        v_NC = tl.load(values_ptr + offsets_N[:, None] + c[None, :], mask=is_part_N[:, None], other=0)
        if key_scales_ptr is not None:
            next_key_scales_N, next_value_scales_N = _scales(
                key_scales_ptr, value_scales_ptr, scale_blocks_N, n + N, n + N < stop, head, PAGE, K, D
            )
            scale_blocks_N = tl.load(table_ptr + (n + 2 * N) // PAGE, mask=n + 2 * N < stop, other=0)
            scores_MN = tl.dot(q_odd_MC, numbers_of_words(k_CN, q_MC, True, FLOAT8, PDL))
            k_CN = numbers_of_words(k_CN, q_MC, False, FLOAT8, PDL)
            scores_MN = tl.dot(q_MC, k_CN, scores_MN) * (key_scales_N * scale)[None, :]
        else:
            scores_MN = tl.dot(q_MC, k_CN) * scale
        blocks_N = tl.load(table_ptr + (n + N) // PAGE, mask=n + N < stop, other=0)
        if trees_ptr is not None:
            new_MN = n[None, :] - first_new_M[:, None]
            word_MN = tl.where(new_MN < 32, low_word_M[:, None], high_word_M[:, None])
            is_seen_MN = (new_MN < 0) | (((word_MN >> (new_MN & 31)) & 1) != 0)
            if WINDOW:  # trees are less deep than windows are wide
                is_seen_MN = is_seen_MN & ((new_MN >= 0) | (n[None, :] > position_M[:, None] - WINDOW))
        else:
            new_N = n - first_new
            is_seen_MN = new_N[None, :] <= query_M[:, None]
            if WINDOW:
                is_seen_MN = is_seen_MN & (new_N[None, :] > query_M[:, None] - WINDOW)
        scores_MN = tl.where(is_seen_MN & is_part_N[None, :], scores_MN, float("-inf"))
        new_high_M = tl.maximum(high_M, tl.max(scores_MN, 1))
        base_M = tl.where(new_high_M == float("-inf"), 0.0, new_high_M)  # a row that has seen nothing yet
        shrink_M = tl.exp2(high_M - base_M)
        weights_MN = tl.exp2(scores_MN - base_M[:, None])
        sum_M = sum_M * shrink_M + tl.sum(weights_MN, 1)
        if key_scales_ptr is not None:
            weights_MN *= value_scales_N[None, :]
            v_odd_NC = numbers_of_words(v_NC, q_MC, True, FLOAT8, PDL)
            odd_acc_MC = tl.dot(weights_MN.to(q_MC.dtype), v_odd_NC, odd_acc_MC * shrink_M[:, None])
            v_NC = numbers_of_words(v_NC, q_MC, False, FLOAT8, PDL)
            key_scales_N, value_scales_N = next_key_scales_N, next_value_scales_N
        acc_MC = tl.dot(weights_MN.to(q_MC.dtype), v_NC, acc_MC * shrink_M[:, None])
        high_M = new_high_M
        n += N

    acc_MD = tl.interleave(acc_MC, odd_acc_MC) if key_scales_ptr is not None else acc_MC
    d = tl.arange(0, D)
    out_ptrs_MD = out_ptr + (first_query + query_M)[:, None] * out_stride + heads_M[:, None] * D + d[None, :]
    if num_items == 1:
        out_MD = acc_MD / tl.where(is_row_M, sum_M, 1.0)[:, None]
        tl.store(out_ptrs_MD, out_MD.to(out_ptr.dtype.element_ty), mask=is_row_M[:, None])
        return
    rows_M = (item * K + head) * M + m
    tl.store(partials_ptr + rows_M[:, None] * D + d[None, :], acc_MD, mask=is_row_M[:, None])
    tl.store(stats_ptr + rows_M * 2, high_M, mask=is_row_M)
    tl.store(stats_ptr + rows_M * 2 + 1, sum_M, mask=is_row_M)
    tl.debug_barrier()  # every thread's parts are written before one thread counts them as arrived
    arrivals_ptr += first_item * K + head
    if tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == num_items - 1:
        tl.store(arrivals_ptr, 0)  # for the next launch
        out_MD = _merge(partials_ptr, stats_ptr, first_item, num_items, head, is_row_M, K, D, M, UNROLL)
        tl.store(out_ptrs_MD, out_MD.to(out_ptr.dtype.element_ty), mask=is_row_M[:, None])


@triton.jit
def _scales(  # type: ignore[no-untyped-def]
    key_scales_ptr, value_scales_ptr, blocks_N, n, is_part_N, head,
    PAGE: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """float32 scales of these positions: they lie behind the numbers of their block."""
    at_N = (blocks_N.to(tl.int64) * K + head) * (PAGE * (D + 2) // 2) + PAGE * D // 2 + n % PAGE
    key_scales_N = tl.load(key_scales_ptr + at_N, mask=is_part_N, other=0.0)
    return key_scales_N.to(tl.float32), tl.load(value_scales_ptr + at_N, mask=is_part_N, other=0.0).to(tl.float32)


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    partials_ptr,
    stats_ptr,
    first_item,
    num_items,
    head,
    is_row_M,
    K: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The softmax-weighted mean over all parts of a sequence, past the L1 cache: other programs wrote them."""
    m = tl.arange(0, M)
    d = tl.arange(0, D)
    high_M = tl.full((M,), float("-inf"), tl.float32)
    sum_M = tl.zeros((M,), tl.float32)
    acc_MD = tl.zeros((M, D), tl.float32)
    for part in range(0, num_items, UNROLL):
        for i in tl.static_range(UNROLL):  # so many loads in flight
            is_there_M = is_row_M & (part + i < num_items)
            rows_M = ((first_item + part + i) * K + head) * M + m
            part_high_M = tl.load(stats_ptr + rows_M * 2, mask=is_there_M, other=float("-inf"), cache_modifier=".cg")
            part_sum_M = tl.load(stats_ptr + rows_M * 2 + 1, mask=is_there_M, other=0.0, cache_modifier=".cg")
            part_acc_MD = tl.load(
                partials_ptr + rows_M[:, None] * D + d[None, :],
                mask=is_there_M[:, None],
                other=0.0,
                cache_modifier=".cg",
            )
            new_high_M = tl.maximum(high_M, part_high_M)
            base_M = tl.where(new_high_M == float("-inf"), 0.0, new_high_M)
            shrink_M = tl.exp2(high_M - base_M)
            part_shrink_M = tl.exp2(part_high_M - base_M)
            sum_M = sum_M * shrink_M + part_sum_M * part_shrink_M
            acc_MD = acc_MD * shrink_M[:, None] + part_acc_MD * part_shrink_M[:, None]
            high_M = new_high_M
    return acc_MD / tl.where(is_row_M, sum_M, 1.0)[:, None]
