"""Move keys and values of single positions within the paged cache, in every layer at once. Knows slots; knows nothing
of whose they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from autobot_llm.engine.kernels.gpu.launch import (
    launch_options,
    lean,
    let_next_kernel_start,
    wait_for_previous_kernel,
)
from autobot_llm.engine.kv_cache.storage import PagedStorage, scales_of

MOVES_PER_PROGRAM = 32


# L layers, B blocks, K key/value heads, P positions of a block, D head size, M moves
def move_slots(storage: PagedStorage, moves_M2: torch.Tensor, head_size: int) -> None:
    """Copy slot moves_M2[m, 0] to slot moves_M2[m, 1], all M at once: what is written is what was there before.

    int32 on the cache's device, MOVES_PER_PROGRAM at most; a move from below 0 is none.
    """
    cache = storage.cache_L2BK
    assert moves_M2.shape[0] <= MOVES_PER_PROGRAM and moves_M2.is_contiguous()
    scales = scales_of(storage.keys[0])
    num_kv_heads, block_size = storage.num_kv_heads, storage.block_size
    _move_slots[(cache.shape[0] * 2 * num_kv_heads,)](
        cache,
        None if scales is None else cache.view(torch.int16),
        moves_M2,
        moves_M2.shape[0],
        storage.num_blocks,
        K=num_kv_heads,
        P=block_size,
        D=head_size,
        BLOCK_NUMBERS=cache[0, 0, 0].numel(),
        M=MOVES_PER_PROGRAM,
        num_warps=4,
        **launch_options(cache.device),
    )


@lean
@triton.jit(do_not_specialize=["num_moves", "num_blocks"])
def _move_slots(  # type: ignore[no-untyped-def]
    cache_ptr,
    scales_ptr,  # None: keys and values are what they are
    moves_ptr,
    num_moves,
    num_blocks,
    K: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_NUMBERS: tl.constexpr,  # K P D of a block, and the bytes of K P scales
    M: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_kernel_start(PDL)
    layer = (tl.program_id(0) // K).to(tl.int64)  # keys and values count apart
    head = tl.program_id(0) % K
    m = tl.arange(0, M)
    d = tl.arange(0, D)
    wait_for_previous_kernel(PDL)
    from_M = tl.load(moves_ptr + m * 2, mask=m < num_moves, other=-1)
    to_M = tl.load(moves_ptr + m * 2 + 1, mask=m < num_moves, other=-1)
    is_move_M = from_M >= 0
    blocks_from_M = (layer * num_blocks + from_M // P) * BLOCK_NUMBERS
    blocks_to_M = (layer * num_blocks + to_M // P) * BLOCK_NUMBERS
    place_from_M, place_to_M = head * P + from_M % P, head * P + to_M % P
    numbers_from_MD = (blocks_from_M + place_from_M * D)[:, None] + d[None, :]
    numbers_to_MD = (blocks_to_M + place_to_M * D)[:, None] + d[None, :]
    numbers_MD = tl.load(cache_ptr + numbers_from_MD, mask=is_move_M[:, None])
    if scales_ptr is not None:
        scales_M = tl.load(scales_ptr + blocks_from_M // 2 + K * P * D // 2 + place_from_M, mask=is_move_M)
    tl.debug_barrier()  # a slot may be read by one thread and written by another: all is read first
    tl.store(cache_ptr + numbers_to_MD, numbers_MD, mask=is_move_M[:, None])
    if scales_ptr is not None:
        tl.store(scales_ptr + blocks_to_M // 2 + K * P * D // 2 + place_to_M, scales_M, mask=is_move_M)
