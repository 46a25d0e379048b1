"""Causal attention of many new tokens per sequence, prompts and chunks of prompts. Knows tiles of query rows; knows
nothing of who made them.

Here arithmetic is the limit. The G query heads of a key/value head are rows of one product, so a tile of M rows is
M / G tokens wide, and the causal edge wastes that little. Two variants: keys from the paged cache, for a sequence with
a cached prefix; and keys from the step's own packed rows, for a sequence that starts here, where a tile of keys is one
strided rectangle.

Source: FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from autobot_llm.engine.attention.paged import BLOCK_SIZE
from autobot_llm.engine.batching.plan import Int32Array
from autobot_llm.engine.kernels.gpu.launch import (
    launch_options,
    lean,
    let_next_kernel_start,
    wait_for_previous_kernel,
)
from autobot_llm.engine.kernels.gpu.narrow import numbers_of_bytes
from autobot_llm.engine.kv_cache.storage import scales_of

TILE_FIELDS = 8
"""sequence, first token of the tile within the step's tokens of the sequence, first query row of the sequence, number
of its query rows, context length; the rest is padding to 32 bytes."""


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """What one program computes: M query rows against N positions at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


LARGE_TILE = PrefillTile(block_m=128, block_n=64, num_warps=8, num_stages=3)
SMALL_TILE = PrefillTile(block_m=64, block_n=64, num_warps=4, num_stages=3)


def choose_prefill_tile(num_tokens: int, num_heads: int, group_size: int, num_processors: int) -> PrefillTile:
    """Large tiles where they fill the device twice, so that long and short ones even out; else small ones.

    By judgement; benchmarks/attention_gpu.py measures the alternatives.
    """
    if group_size > SMALL_TILE.block_m or num_tokens * num_heads >= 2 * num_processors * LARGE_TILE.block_m:
        return LARGE_TILE
    return SMALL_TILE


# T packed tokens, S sequences, W tiles, H query heads, K key/value heads, G query heads of each, D head size
# M query rows of a tile (token by head of the group), N positions
def plan_tiles(
    query_starts: Int32Array, context_lens: Int32Array, members: Int32Array, tokens_per_tile: int
) -> Int32Array:
    """tiles_W8 of these sequences, those with the most positions to read first, so that the last ones to run are short.

    `tokens_per_tile` is the tile's M // G.
    """
    num_queries = query_starts[members + 1] - query_starts[members]
    counts = -(-num_queries // tokens_per_tile)
    tiles_W8 = np.zeros((int(counts.sum()), TILE_FIELDS), np.int32)
    sequences = members.repeat(counts)
    firsts = np.cumsum(counts) - counts
    tiles_W8[:, 0] = sequences
    tiles_W8[:, 1] = (np.arange(len(tiles_W8)) - firsts.repeat(counts)) * tokens_per_tile
    tiles_W8[:, 2] = query_starts[sequences]
    tiles_W8[:, 3] = num_queries.repeat(counts)
    tiles_W8[:, 4] = context_lens[sequences]
    first_positions = tiles_W8[:, 4] - tiles_W8[:, 3] + tiles_W8[:, 1]
    return tiles_W8[np.argsort(-first_positions, kind="stable")]


def paged_prefill(
    q_THD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables_SB: torch.Tensor,
    tiles_W8: torch.Tensor,
    out_THD: torch.Tensor,
    *,
    tile: PrefillTile,
    window: int = 0,
) -> None:
    """Attend the tiles' query rows to contexts in a layer's cache, as paged_decode's; other rows are left alone.

    The tiles were planned for `tile`. q and out may be strided in T. `window`: positions a query sees, 0 for all.
    """
    _launch(q_THD, keys, values, block_tables_SB, tiles_W8, out_THD, tile, window, num_kv_heads=keys.shape[1])


def fresh_prefill(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    tiles_W8: torch.Tensor,
    out_THD: torch.Tensor,
    *,
    tile: PrefillTile,
    window: int = 0,
) -> None:
    """The same for sequences that start in this step: their context is their own packed rows, which may be strided."""
    _launch(q_THD, k_TKD, v_TKD, None, tiles_W8, out_THD, tile, window, num_kv_heads=k_TKD.shape[1])


def _launch(
    q_THD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables_SB: torch.Tensor | None,
    tiles_W8: torch.Tensor,
    out_THD: torch.Tensor,
    tile: PrefillTile,
    window: int,
    *,
    num_kv_heads: int,
) -> None:
    head_size = q_THD.shape[2]
    _prefill[(num_kv_heads, tiles_W8.shape[0])](
        q_THD,
        keys,
        values,
        scales_of(keys),
        scales_of(values),
        out_THD,
        tiles_W8,
        block_tables_SB,
        q_THD.stride(0),
        keys.stride(0),
        out_THD.stride(0),
        block_tables_SB.stride(0) if block_tables_SB is not None else 0,
        math.log2(math.e) / math.sqrt(head_size),
        WINDOW=window,
        PAGE=BLOCK_SIZE,
        K=num_kv_heads,
        G=q_THD.shape[1] // num_kv_heads,
        D=head_size,
        M=tile.block_m,
        N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(q_THD.device),
    )


@lean
@triton.jit(do_not_specialize=["table_stride"])  # it changes from step to step
def _prefill(  # type: ignore[no-untyped-def]
    q_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,  # None: keys and values are what they are
    value_scales_ptr,
    out_ptr,
    tiles_ptr,
    tables_ptr,
    q_stride,
    kv_stride,
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
    PDL: tl.constexpr,
):
    let_next_kernel_start(PDL)
    head = tl.program_id(0)
    # tiles and tables come with a copy that ends before the step's first kernel starts, and no kernel writes them
    tile_ptr = tiles_ptr + tl.program_id(1) * 8
    sequence = tl.load(tile_ptr)
    first_token = tl.load(tile_ptr + 1)
    first_query = tl.load(tile_ptr + 2)
    num_queries = tl.load(tile_ptr + 3)
    context = tl.load(tile_ptr + 4)
    wait_for_previous_kernel(PDL)

    m = tl.arange(0, M)
    d = tl.arange(0, D)
    n = tl.arange(0, N)
    token_M = first_token + m // G
    is_row_M = (m < M // G * G) & (token_M < num_queries)
    heads_M = head * G + m % G
    row_M = (first_query + token_M).to(tl.int64)
    q_MD = tl.load(
        q_ptr + row_M[:, None] * q_stride + heads_M[:, None] * D + d[None, :], mask=is_row_M[:, None], other=0.0
    )
    position_M = context - num_queries + token_M
    first_position = context - num_queries + first_token
    end = tl.minimum(first_position + M // G, context)  # the last row sees up to here

    # one sequence's keys: its blocks, or its own rows of the step
    if tables_ptr is not None:
        lookup_ptr = tables_ptr + sequence * table_stride
    else:
        lookup_ptr = None
        base = first_query.to(tl.int64) * kv_stride + head * D
        keys_ptr += base
        values_ptr += base

    high_M = tl.full((M,), float("-inf"), tl.float32)
    sum_M = tl.zeros((M,), tl.float32)
    acc_MD = tl.zeros((M, D), tl.float32)
    if WINDOW:
        start = tl.maximum(first_position + 1 - WINDOW, 0) // N * N
    else:
        # every row sees all of these positions: no mask
        start = (first_position + 1) // N * N
        if lookup_ptr is not None:
            blocks_N = tl.load(lookup_ptr + n // PAGE, mask=n < context, other=0)
        for n0 in tl.range(0, start, N):
            if lookup_ptr is not None:
                # looked up a tile ahead by hand: looking up inside would take the tiles' pipeline stages
                next_blocks_N = tl.load(lookup_ptr + (n0 + N + n) // PAGE, mask=n0 + N + n < context, other=0)
                wide_blocks_N = blocks_N.to(tl.int64)
                offsets_N = (wide_blocks_N * K + head) * (PAGE * D) + (n % PAGE) * D
                blocks_N = next_blocks_N
            else:
                offsets_N = (n0 + n).to(tl.int64) * kv_stride
            if key_scales_ptr is not None:
                offsets_N += wide_blocks_N * (K * PAGE * 2)  # bytes of scales
                scales_N = _scales_at(wide_blocks_N, head, n, PAGE, K, D)
                key_scales_N = tl.load(key_scales_ptr + scales_N).to(tl.float32)
                value_scales_N = tl.load(value_scales_ptr + scales_N).to(tl.float32)
            k_ND = numbers_of_bytes(tl.load(keys_ptr + offsets_N[:, None] + d[None, :]), q_MD, PDL)
            v_ND = numbers_of_bytes(tl.load(values_ptr + offsets_N[:, None] + d[None, :]), q_MD, PDL)
            scores_MN = tl.dot(q_MD, tl.trans(k_ND))
            if key_scales_ptr is not None:
                scores_MN *= key_scales_N[None, :]
            new_high_M = tl.maximum(high_M, tl.max(scores_MN, 1) * scale)
            shrink_M = tl.exp2(high_M - new_high_M)
            weights_MN = tl.exp2(scores_MN * scale - new_high_M[:, None])
            sum_M = sum_M * shrink_M + tl.sum(weights_MN, 1)
            if value_scales_ptr is not None:
                weights_MN *= value_scales_N[None, :]
            acc_MD = tl.dot(weights_MN.to(v_ND.dtype), v_ND, acc_MD * shrink_M[:, None])
            high_M = new_high_M

    for n0 in tl.range(start, end, N):
        position_N = n0 + n
        is_there_N = position_N < context
        if lookup_ptr is not None:
            edge_blocks_N = tl.load(lookup_ptr + position_N // PAGE, mask=is_there_N, other=0)
            edge_blocks_N = edge_blocks_N.to(tl.int64)
            offsets_N = (edge_blocks_N * K + head) * (PAGE * D) + (position_N % PAGE) * D
        else:
            offsets_N = position_N.to(tl.int64) * kv_stride
        # positions after the context may hold anything, another sequence's NaN too: they are not read
        if key_scales_ptr is not None:
            offsets_N += edge_blocks_N * (K * PAGE * 2)
            scales_N = _scales_at(edge_blocks_N, head, position_N, PAGE, K, D)
            key_scales_N = tl.load(key_scales_ptr + scales_N, mask=is_there_N, other=0.0).to(tl.float32)
            value_scales_N = tl.load(value_scales_ptr + scales_N, mask=is_there_N, other=0.0).to(tl.float32)
        k_ND = tl.load(keys_ptr + offsets_N[:, None] + d[None, :], mask=is_there_N[:, None], other=0.0)
        k_ND = numbers_of_bytes(k_ND, q_MD, PDL)
        v_ND = tl.load(values_ptr + offsets_N[:, None] + d[None, :], mask=is_there_N[:, None], other=0.0)
        v_ND = numbers_of_bytes(v_ND, q_MD, PDL)
        is_seen_MN = position_N[None, :] <= position_M[:, None]
        if WINDOW:
            is_seen_MN = is_seen_MN & (position_N[None, :] > position_M[:, None] - WINDOW)
        scores_MN = tl.dot(q_MD, tl.trans(k_ND)) * scale
        if key_scales_ptr is not None:
            scores_MN *= key_scales_N[None, :]
        scores_MN = tl.where(is_seen_MN, scores_MN, float("-inf"))
        new_high_M = tl.maximum(high_M, tl.max(scores_MN, 1))
        base_M = tl.where(new_high_M == float("-inf"), 0.0, new_high_M)  # a row whose window starts later
        shrink_M = tl.exp2(high_M - base_M)
        weights_MN = tl.exp2(scores_MN - base_M[:, None])
        sum_M = sum_M * shrink_M + tl.sum(weights_MN, 1)
        if value_scales_ptr is not None:
            weights_MN *= value_scales_N[None, :]
        acc_MD = tl.dot(weights_MN.to(v_ND.dtype), v_ND, acc_MD * shrink_M[:, None])
        high_M = new_high_M

    out_MD = acc_MD / tl.where(is_row_M, sum_M, 1.0)[:, None]
    tl.store(
        out_ptr + row_M[:, None] * out_stride + heads_M[:, None] * D + d[None, :],
        out_MD.to(out_ptr.dtype.element_ty),
        mask=is_row_M[:, None],
    )


@triton.jit
def _scales_at(  # type: ignore[no-untyped-def]
    blocks_N, head, position_N, PAGE: tl.constexpr, K: tl.constexpr, D: tl.constexpr
):
    """Where the scales of positions lie: behind all numbers of their block."""
    return blocks_N * (K * PAGE * (D + 2) // 2) + (K * PAGE * D // 2 + head * PAGE) + position_N % PAGE
