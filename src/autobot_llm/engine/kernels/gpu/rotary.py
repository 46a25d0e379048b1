"""Rotary embedding of queries and keys, and the write into the paged cache, in one launch. Knows a step's fused q|k|v
rows and slots; knows nothing of attention or of sequences.

Memory-bound with many tokens, a matter of latency with one: so a program takes few heads of a token when tokens are
few, and 16 when they are many, to read a position's angles less often.
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
from autobot_llm.engine.kv_cache.policy import BLOCK_SIZE
from autobot_llm.engine.kv_cache.storage import QUANTIZED_DTYPES, numbers_and_scales, quantize_positions, scales_of

_FEW_TOKENS = 16


# T packed tokens, H query heads, K key/value heads, D head size, P positions, B cache blocks
@lean
@triton.jit
def _rotate_and_store_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr, positions_ptr, slots_ptr, cos_sin_ptr, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr,
    q_norm_ptr, k_norm_ptr, qkv_stride, eps,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, NORMED: tl.constexpr,
    HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_kernel_start(PDL)
    half: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    first_head = tl.program_id(1) * HEADS
    heads = (first_head + tl.arange(0, HEADS))[:, None]
    dims = tl.arange(0, half)[None, :]
    # No kernel of the step writes positions, slots and angles; two loads, one after the other, are off the chain.
    # Every row loads the angles: cheaper than moving one row to the threads that need it.
    angle_ptrs = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * D + heads * 0 + dims
    is_rotated = (heads < H + K) & (dims < half)
    cos = tl.load(angle_ptrs, is_rotated, 1.0)  # values turn by no angle
    sin = tl.load(angle_ptrs + half, is_rotated, 0.0)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    wait_for_previous_kernel(PDL)

    low_ptrs = qkv_ptr + token * qkv_stride + heads * D + dims
    inside = (heads < H + 2 * K) & (dims < half)
    low = tl.load(low_ptrs, inside, 0.0).to(tl.float32)
    high = tl.load(low_ptrs + half, inside, 0.0).to(tl.float32)
    if NORMED:
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / D + eps)[:, None]
        is_query = heads < H
        is_key = is_rotated & (heads >= H)
        norm_low = tl.load(q_norm_ptr + heads * 0 + dims, is_query, 0.0).to(tl.float32)
        norm_low += tl.load(k_norm_ptr + heads * 0 + dims, is_key, 0.0).to(tl.float32)
        norm_high = tl.load(q_norm_ptr + half + heads * 0 + dims, is_query, 0.0).to(tl.float32)
        norm_high += tl.load(k_norm_ptr + half + heads * 0 + dims, is_key, 0.0).to(tl.float32)
        low = tl.where(is_rotated, low * scale * norm_low, low)
        high = tl.where(is_rotated, high * scale * norm_high, high)
    rotated_low = (low * cos - high * sin).to(qkv_ptr.dtype.element_ty)
    rotated_high = (high * cos + low * sin).to(qkv_ptr.dtype.element_ty)
    tl.store(low_ptrs, rotated_low, is_rotated)
    tl.store(low_ptrs + half, rotated_high, is_rotated)

    if first_head + HEADS > H:
        cache_head = tl.where(heads < H + K, heads - H, heads - H - K)
        block = slot // BLOCK_SIZE
        offsets = (block * K + cache_head) * (BLOCK_SIZE * D) + slot % BLOCK_SIZE * D + dims
        is_key_stored = inside & (heads >= H) & (slot >= 0) & (heads < H + K)
        is_value_stored = inside & (slot >= 0) & (heads >= H + K)
        if key_scales_ptr is not None:
            offsets += block * (K * BLOCK_SIZE * 2)  # bytes of scales
            stored_low, stored_high, scales = _rounded(rotated_low, rotated_high, keys_ptr.dtype.element_ty)
            scale_offsets = block * (K * BLOCK_SIZE * (D + 2) // 2) + K * BLOCK_SIZE * D // 2
            scale_offsets += cache_head * BLOCK_SIZE + slot % BLOCK_SIZE
            tl.store(key_scales_ptr + scale_offsets, scales, (heads >= H) & (heads < H + K) & (slot >= 0))
            tl.store(value_scales_ptr + scale_offsets, scales, (heads >= H + K) & (heads < H + 2 * K) & (slot >= 0))
        else:
            stored_low, stored_high = rotated_low, rotated_high
        tl.store(keys_ptr + offsets, stored_low, is_key_stored)
        tl.store(keys_ptr + offsets + half, stored_high, is_key_stored)
        tl.store(values_ptr + offsets, stored_low, is_value_stored)
        tl.store(values_ptr + offsets + half, stored_high, is_value_stored)


@triton.jit
def _rounded(low, high, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves of each head in one byte a number, and the bfloat16 scales that turn them back."""
    low, high = low.to(tl.float32), high.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))[:, None]
    limit: tl.constexpr = 127.0 if tl.int8 == KIND else 448.0
    scales = (largest / limit).to(tl.bfloat16)
    inverse = 1.0 / tl.where(scales == 0, 1.0, scales.to(tl.float32))  # of zeros nothing is left whatever they meet
    return _in_bytes(low * inverse, limit, KIND), _in_bytes(high * inverse, limit, KIND), scales


@triton.jit
def _in_bytes(x, limit: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    x = tl.minimum(tl.maximum(x, -limit), limit)  # the scale was rounded, so the largest may be a little beyond
    if tl.int8 == KIND:
        x = x + tl.where(x >= 0, 0.5, -0.5)  # the conversion cuts off
    return x.to(KIND)


def rotate_and_store(
    qkv_TX: torch.Tensor,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
    cos_sin_PD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    q_norm_D: torch.Tensor | None = None,
    k_norm_D: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Rotate q and k where they are, and write k and v into the cache.

    `qkv_TX` holds rows of (H + 2 K) D entries, q|k|v; rows may lie any distance apart. `cos_sin_PD` is float32: D / 2
    cosines, then D / 2 sines, of each position (rotary embedding by halves). `keys` and `values` are
    [B, K, BLOCK_SIZE, D], or quantized as PagedStorage says, contiguous; nothing is written there for a token whose
    slot is negative. Positions and slots are int32 or int64. With both norm weights, each head of q and k is first
    divided by its root mean square (Qwen3).
    Source: RoFormer (arXiv 2104.09864).
    """
    num_tokens, num_all_heads = qkv_TX.shape[0], num_heads + 2 * num_kv_heads
    assert head_size >= 2 and head_size & (head_size - 1) == 0, f"head size {head_size}: expected a power of 2"
    assert qkv_TX.shape[1] == num_all_heads * head_size and qkv_TX.stride(1) == 1
    assert cos_sin_PD.dtype == torch.float32 and cos_sin_PD.shape[1] == head_size and cos_sin_PD.is_contiguous()
    assert keys.shape == values.shape and keys.shape[1] == num_kv_heads and keys.dtype == values.dtype
    assert keys.dtype in QUANTIZED_DTYPES or keys.shape[2:] == (BLOCK_SIZE, head_size)
    assert keys.dtype in (qkv_TX.dtype, *QUANTIZED_DTYPES) and keys.is_contiguous() and values.is_contiguous()
    assert positions_T.shape == slots_T.shape == (num_tokens,)
    assert positions_T.is_contiguous() and slots_T.is_contiguous()
    assert (q_norm_D is None) == (k_norm_D is None)
    heads = 4 if num_tokens <= _FEW_TOKENS else 16
    if num_tokens:
        _rotate_and_store_kernel[(num_tokens, triton.cdiv(num_all_heads, heads))](
            qkv_TX,
            positions_T,
            slots_T,
            cos_sin_PD,
            keys,
            values,
            scales_of(keys),
            scales_of(values),
            q_norm_D if q_norm_D is not None else qkv_TX,
            k_norm_D if k_norm_D is not None else qkv_TX,
            qkv_TX.stride(0),
            eps,
            H=num_heads,
            K=num_kv_heads,
            D=head_size,
            BLOCK_SIZE=BLOCK_SIZE,
            NORMED=q_norm_D is not None,
            HEADS=heads,
            num_warps=max(heads * head_size // 512, 1),  # a 16-byte load of each half in each thread
            **launch_options(qkv_TX.device),
        )


def rotate_and_store_reference(
    qkv_TX: torch.Tensor,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
    cos_sin_PD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    q_norm_D: torch.Tensor | None = None,
    k_norm_D: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """The slow twin, which computes in float64 and writes to the same places."""
    heads_THD = qkv_TX.view(qkv_TX.shape[0], -1, head_size)
    q_THD, k_TKD, v_TKD = torch.split(heads_THD, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    cos_T1D, sin_T1D = (
        table.double().repeat(1, 2)[positions_T.long()].unsqueeze(1) for table in cos_sin_PD.chunk(2, dim=1)
    )
    for part, norm_D in ((q_THD, q_norm_D), (k_TKD, k_norm_D)):
        wide = part.double()
        if norm_D is not None:
            wide = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * norm_D.double()
        low, high = wide.chunk(2, dim=-1)
        part.copy_(wide * cos_T1D + torch.cat((-high, low), dim=-1) * sin_T1D)
    stored_T = slots_T >= 0
    slots = slots_T[stored_T].long()
    for cache, part in ((keys, k_TKD), (values, v_TKD)):
        if cache.dtype not in QUANTIZED_DTYPES:
            cache[slots // BLOCK_SIZE, :, slots % BLOCK_SIZE] = part[stored_T]
            continue
        numbers_TKD, scales_TK = quantize_positions(part[stored_T], cache.dtype)
        blocks, places = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        numbers, scales = numbers_and_scales(cache, head_size)
        numbers[blocks, :, places] = numbers_TKD.view(torch.int8)
        scales[blocks, :, places] = scales_TK
