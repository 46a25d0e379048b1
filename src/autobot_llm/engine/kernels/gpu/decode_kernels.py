"""The kernel of attention of a few new tokens to long paged contexts. Knows tiles; chooses none of them.

Positions are the rows of its products and queries their columns, of which there may be as few as eight: the matrix
units take keys and values as they lie, and scores of few queries fill few registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from autobot_llm.engine.kernels.gpu.launch import (
    lean,
    let_next_kernel_start,
    wait_for_previous_kernel,
)
from autobot_llm.engine.kernels.gpu.narrow import halves_of_words

# M query rows of a program (query token by head of the group), N positions of a tile, D head size, C a part of it


@lean
@triton.jit(do_not_specialize=["table_stride"])  # it changes from step to step
def decode_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    keys_ptr,  # int8 ones as they are, float8 ones as int16, two numbers in each
    values_ptr,  # int16, two numbers in each, if quantized
    key_scales_ptr,  # int16, bfloat16's bits; None: keys and values are what they are
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
    ROUNDED: tl.constexpr = key_scales_ptr is not None
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
    if ROUNDED:  # scales are read a tile ahead, so their blocks are looked up two ahead
        scale_blocks_N = tl.load(table_ptr + (n + N) // PAGE, mask=n + N < stop, other=0)
    wait_for_previous_kernel(PDL)
    if sequence < 0:
        return

    m = tl.arange(0, M)
    query_M = m // G
    is_row_M = query_M < num_queries
    heads_M = head * G + m % G
    q_ptrs_M = q_ptr + (first_query + query_M) * q_stride + heads_M * D
    C: tl.constexpr = D // 2 if ROUNDED else D
    c = tl.arange(0, C)
    scale_M = tl.zeros((M,), tl.float32) + scale
    if ROUNDED:
        scales_N = _scales(key_scales_ptr, value_scales_ptr, blocks_N, n < stop, head, N, PAGE, K, D)
        odd_acc_CM = tl.zeros((C, M), tl.float32)
        largest_M = tl.full((M,), 1e-30, tl.float32)  # value scale so far: what weights are divided by, to be float16
        if FLOAT8:
            even_CM = tl.load(q_ptrs_M[None, :] + 2 * c[:, None], mask=is_row_M[None, :], other=0.0).to(tl.float32)
            odd_CM = tl.load(q_ptrs_M[None, :] + 2 * c[:, None] + 1, mask=is_row_M[None, :], other=0.0).to(tl.float32)
            high_M = tl.maximum(tl.max(tl.maximum(tl.abs(even_CM), tl.abs(odd_CM)), 0), 1e-30)
            unit_M = tl.exp2(tl.ceil(tl.log2(high_M)))  # a power of two, so that q loses nothing
            q_CM = (even_CM / unit_M[None, :]).to(tl.float16)
            q_odd_CM = (odd_CM / unit_M[None, :]).to(tl.float16)
        else:
            d = tl.arange(0, D)
            q_DM = tl.load(q_ptrs_M[None, :] + d[:, None], mask=is_row_M[None, :], other=0.0).to(tl.float32)
            unit_M = tl.maximum(tl.max(tl.abs(q_DM), 0), 1e-30) / 32639.0
            scaled_DM = q_DM / unit_M[None, :]
            whole_DM = (scaled_DM + tl.where(scaled_DM >= 0, 0.5, -0.5)).to(tl.int32)
            high_DM = (whole_DM + 128) >> 8
            low_DM = (whole_DM - (high_DM << 8)).to(tl.int8)
            high_DM = high_DM.to(tl.int8)
        scale_M *= unit_M
    else:
        q_CM = tl.load(q_ptrs_M[None, :] + c[:, None], mask=is_row_M[None, :], other=0.0)
    # Where a position lies in the cache, in units of 16 bytes, so that 32 bits say it. Parts begin with a block.
    BLOCK: tl.constexpr = K * PAGE * (D + 2) // 16 if ROUNDED else K * PAGE * D // 8
    LINE: tl.constexpr = D // 16 if ROUNDED else D // 8
    line_N = (head * PAGE + tl.arange(0, N) % PAGE) * LINE
    acc_CM = tl.zeros((C, M), tl.float32)
    first_new = context - num_queries
    if trees_ptr is not None:
        tree_ptrs_M = trees_ptr + (first_query + query_M) * 4
        low_word_M = tl.load(tree_ptrs_M, mask=is_row_M, other=0)
        high_word_M = tl.load(tree_ptrs_M + 1, mask=is_row_M, other=0)
        first_new_M = tl.load(tree_ptrs_M + 2, mask=is_row_M, other=0)
        position_M = tl.load(tree_ptrs_M + 3, mask=is_row_M, other=0)
    else:
        limit_M = tl.minimum(first_new + query_M + 1, stop)  # so far a row sees in this item

    max_M = tl.full((M,), float("-inf"), tl.float32)
    sum_NM = tl.zeros((N, M), tl.float32)
    for _ in tl.range(start, stop, N):
        is_part_N = n < stop
        at_N = (blocks_N * BLOCK + line_N).to(tl.int64) * 8  # words
        blocks_N = tl.load(table_ptr + (n + N) // PAGE, mask=n + N < stop, other=0)
        if ROUNDED:  # what lies after the part is read, too: numbers of block 0, or of its sequence's block
            v_CN = tl.load(values_ptr + at_N[None, :] + c[:, None])
            next_scales_N = _scales(key_scales_ptr, value_scales_ptr, scale_blocks_N, n + N < stop, head, N, PAGE, K, D)
            scale_blocks_N = tl.load(table_ptr + (n + 2 * N) // PAGE, mask=n + 2 * N < stop, other=0)
            if FLOAT8:
                k_NC = tl.load(keys_ptr + at_N[:, None] + c[None, :])
                scores_NM = tl.dot(halves_of_words(k_NC, False, True, PDL), q_CM)
                scores_NM = tl.dot(halves_of_words(k_NC, True, True, PDL), q_odd_CM, scores_NM)
            else:
                k_ND = tl.load(keys_ptr + 2 * at_N[:, None] + d[None, :])
                high_NM = tl.dot(k_ND, high_DM, out_dtype=tl.int32)
                low_NM = tl.dot(k_ND, low_DM, out_dtype=tl.int32)
                scores_NM = ((high_NM << 8) + low_NM).to(tl.float32)
            scales_N1 = scales_N[:, None]
            key_scales_N1 = (scales_N1 << 16).to(tl.float32, bitcast=True)
            value_scales_N1 = (scales_N1 & -65536).to(tl.float32, bitcast=True)
            scores_NM = scores_NM * key_scales_N1 * scale_M[None, :]
        else:
            k_NC = tl.load(keys_ptr + at_N[:, None] + c[None, :])
            v_CN = tl.load(values_ptr + at_N[None, :] + c[:, None], mask=is_part_N[None, :], other=0)
            scores_NM = tl.dot(k_NC, q_CM) * scale
        if trees_ptr is not None:
            new_NM = n[:, None] - first_new_M[None, :]
            word_NM = tl.where(new_NM < 32, low_word_M[None, :], high_word_M[None, :])
            is_seen_NM = (new_NM < 0) | (((word_NM >> (new_NM & 31)) & 1) != 0)
            if WINDOW:  # trees are less deep than windows are wide
                is_seen_NM = is_seen_NM & ((new_NM >= 0) | (n[:, None] > position_M[None, :] - WINDOW))
            is_seen_NM = is_seen_NM & is_part_N[:, None]
        else:
            is_seen_NM = n[:, None] < limit_M[None, :]
            if WINDOW:
                is_seen_NM = is_seen_NM & ((n - first_new)[:, None] > query_M[None, :] - WINDOW)
        scores_NM = tl.where(is_seen_NM, scores_NM, float("-inf"))
        if ROUNDED:
            tile_max_M, tile_largest_M = tl.reduce(
                (scores_NM, tl.broadcast_to(value_scales_N1, (N, M))), 0, _larger_of_each
            )
            new_max_M = tl.maximum(max_M, tile_max_M)
        else:
            new_max_M = tl.maximum(max_M, tl.max(scores_NM, 0))
        base_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M)  # a row that has seen nothing yet
        shrink_M = tl.exp2(max_M - base_M)
        weights_NM = tl.exp2(scores_NM - base_M[None, :])
        sum_NM = sum_NM * shrink_M[None, :] + weights_NM
        max_M = new_max_M
        if ROUNDED:
            # In float16 weights have three bits more than in bfloat16. Multiplied by their values' scales they are
            # measured by the largest of those, times 2^14: the smallest that counts is then 2^-38 of the largest.
            new_largest_M = tl.maximum(largest_M, tile_largest_M)
            weights_NM *= value_scales_N1 * (16384.0 / new_largest_M)[None, :]
            shrink_M *= largest_M / new_largest_M
            largest_M = new_largest_M
            p_NM = weights_NM.to(tl.float16)
            v_odd_CN = halves_of_words(v_CN, True, FLOAT8, PDL)
            odd_acc_CM = tl.dot(v_odd_CN, p_NM, odd_acc_CM * shrink_M[None, :])
            v_CN = halves_of_words(v_CN, False, FLOAT8, PDL)
            acc_CM = tl.dot(v_CN, p_NM, acc_CM * shrink_M[None, :])
            scales_N = next_scales_N
        else:
            acc_CM = tl.dot(v_CN, weights_NM.to(v_CN.dtype), acc_CM * shrink_M[None, :])
        n += N

    sum_M = tl.sum(sum_NM, 0)
    if ROUNDED:
        unit_1M = (largest_M / 16384.0)[None, :]
        acc_MD = tl.interleave(tl.trans(acc_CM * unit_1M), tl.trans(odd_acc_CM * unit_1M))
    else:
        acc_MD = tl.trans(acc_CM)
    d = tl.arange(0, D)
    out_ptrs_MD = out_ptr + (first_query + query_M)[:, None] * out_stride + heads_M[:, None] * D + d[None, :]
    if num_items == 1:
        out_MD = acc_MD / tl.where(is_row_M, sum_M, 1.0)[:, None]
        tl.store(out_ptrs_MD, out_MD.to(out_ptr.dtype.element_ty), mask=is_row_M[:, None])
        return
    rows_M = (item * K + head) * M + m
    tl.store(partials_ptr + rows_M[:, None] * D + d[None, :], acc_MD, mask=is_row_M[:, None])
    tl.store(stats_ptr + rows_M * 2, max_M, mask=is_row_M)
    tl.store(stats_ptr + rows_M * 2 + 1, sum_M, mask=is_row_M)
    tl.debug_barrier()  # every thread's parts are written before one thread counts them as arrived
    arrivals_ptr += first_item * K + head
    if tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == num_items - 1:
        tl.store(arrivals_ptr, 0)  # for the next launch
        out_MD = _merge(partials_ptr, stats_ptr, first_item, num_items, head, is_row_M, K, D, M, UNROLL)
        tl.store(out_ptrs_MD, out_MD.to(out_ptr.dtype.element_ty), mask=is_row_M[:, None])


@triton.jit
def _scales(  # type: ignore[no-untyped-def]
    key_scales_ptr, value_scales_ptr, blocks_N, is_part_N, head,
    N: tl.constexpr, PAGE: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The bfloat16 scales of these positions, a key's the low half and a value's the high half of a word: they lie
    behind all numbers of their block."""
    at_N = (
        blocks_N.to(tl.int64) * (K * PAGE * (D + 2) // 2) + (K * PAGE * D // 2 + head * PAGE) + tl.arange(0, N) % PAGE
    )
    of_keys_N = tl.load(key_scales_ptr + at_N, mask=is_part_N, other=0).to(tl.int32) & 0xFFFF
    return of_keys_N | (tl.load(value_scales_ptr + at_N, mask=is_part_N, other=0).to(tl.int32) << 16)


@triton.jit
def _larger_of_each(a, b, c, d):  # type: ignore[no-untyped-def]
    return tl.maximum(a, c), tl.maximum(b, d)


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
