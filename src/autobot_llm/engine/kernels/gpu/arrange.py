"""Rows of x as streamed_blocks.cu reads them: in its order, whole stages in one piece. Knows that order.

The kernel's matrix units take x as blocks of 8 rows by 16 bytes, and W from registers, where a thread has 16
neighbouring bytes of every 64 of a row instead of those that the instruction speaks of. So the same inputs of x change
places: within every 64 of them, pairs of bfloat16.
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

# T rows, I inputs

_INPUTS_AT_ONCE = 1024  # of a program, where nothing has to be known of the whole row


def arrange(x_TI: torch.Tensor, most_rows: int, norm: torch.Tensor | None = None, eps: float = 0.0) -> torch.Tensor:
    """`x_TI`, after RMSNorm where there is a weight for it, as the kernel for `most_rows` rows wants it.

    Rows from T to `most_rows` hold whatever was there. Inputs must be a multiple of 64.
    """
    num_rows, num_inputs = x_TI.shape
    assert num_rows <= most_rows and num_inputs % 64 == 0 and x_TI.stride(1) == 1
    out = torch.empty(most_rows * num_inputs, dtype=x_TI.dtype, device=x_TI.device)
    block = _INPUTS_AT_ONCE if norm is None else triton.next_power_of_2(num_inputs)
    arrange_kernel[(num_rows, triton.cdiv(num_inputs, block))](
        x_TI,
        x_TI.stride(0),
        norm,
        out,
        num_inputs,
        eps,
        NORM=norm is not None,
        MOST_ROWS=most_rows,
        BLOCK_I=block,
        num_warps=min(max(block // 512, 1), 16),
        **launch_options(x_TI.device),
    )
    return out


def arrange_halves(
    x_TI: torch.Tensor, tile_rows: int, norm: torch.Tensor | None = None, eps: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in float16, for weights of 4 bits, `tile_rows` rows at a time; and each row's float32 scales_T.

    A row is divided by a power of two so that its largest number is 2^14 to 2^15. So nothing of a bfloat16 is lost
    unless it is less than 2^-31 of that, and after RMSNorm three more bits are kept than bfloat16 has.
    """
    num_rows, num_inputs = x_TI.shape
    assert num_inputs % 64 == 0 and x_TI.stride(1) == 1
    num_tiles = triton.cdiv(num_rows, tile_rows)
    out = torch.empty(num_tiles * tile_rows * num_inputs, dtype=torch.float16, device=x_TI.device)
    scales_T = torch.empty(num_rows, dtype=torch.float32, device=x_TI.device)
    block = triton.next_power_of_2(num_inputs)
    arrange_halves_kernel[(num_rows,)](
        x_TI,
        x_TI.stride(0),
        norm,
        out,
        scales_T,
        num_inputs,
        eps,
        NORM=norm is not None,
        TILE_ROWS=tile_rows,
        BLOCK_I=block,
        num_warps=min(max(block // 512, 1), 16),
        **launch_options(x_TI.device),
    )
    return out, scales_T


@lean
@triton.jit
def arrange_halves_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # bfloat16 [T, I]
    x_stride,
    norm_ptr,  # [I], read if NORM
    out_ptr,  # float16 [T / TILE_ROWS, I / 8, TILE_ROWS, 8]
    scales_ptr,  # float32 [T]
    num_inputs,
    eps,
    NORM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_kernel_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    at_I = tl.arange(0, BLOCK_I)
    inside_I = at_I < num_inputs
    # As in arrange_kernel, but that a word's even bytes become one pair and its odd ones the other.
    inputs_I = at_I // 64 * 64 + at_I // 2 % 4 * 16 + at_I // 16 % 4 * 4 + at_I // 8 % 2 + at_I % 2 * 2
    norm_I = tl.load(norm_ptr + inputs_I, inside_I, 0.0).to(tl.float32) if NORM else 1.0
    wait_for_previous_kernel(PDL)
    x_I = tl.load(x_ptr + row * x_stride + inputs_I, inside_I, 0.0).to(tl.float32)
    if NORM:
        x_I *= tl.rsqrt(tl.sum(x_I * x_I) / num_inputs + eps) * norm_I
    largest = tl.maximum(tl.max(tl.abs(x_I)), 1e-30).to(tl.int32, bitcast=True) >> 23 << 23
    # 2^14 over that, of exponents that are 127 more than they say
    x_I *= ((254 << 23) - largest + (14 << 23)).to(tl.float32, bitcast=True)
    at_I = at_I // 8 * (TILE_ROWS * 8) + row % TILE_ROWS * 8 + at_I % 8
    tl.store(out_ptr + row // TILE_ROWS * TILE_ROWS * num_inputs + at_I, x_I.to(tl.float16), inside_I)
    tl.store(scales_ptr + row, (largest - (14 << 23)).to(tl.float32, bitcast=True))


@lean
@triton.jit
def arrange_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # bfloat16 [T, I]
    x_stride,
    norm_ptr,  # [I], read if NORM
    out_ptr,  # [I / 8, MOST_ROWS, 8]
    num_inputs,
    eps,
    NORM: tl.constexpr,
    MOST_ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_kernel_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    at_I = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside_I = at_I < num_inputs
    # A thread t of four has bytes 16 t and so on of W, four words. In an instruction, which takes one, it stands
    # for pairs t and 4 + t of eight: so these are the pairs that the word's first two and last two bytes meet.
    inputs_I = at_I // 64 * 64 + at_I // 2 % 4 * 16 + at_I // 16 % 4 * 4 + at_I // 8 % 2 * 2 + at_I % 2
    norm_I = tl.load(norm_ptr + inputs_I, inside_I, 0.0).to(tl.float32) if NORM else 1.0
    wait_for_previous_kernel(PDL)
    x_I = tl.load(x_ptr + row * x_stride + inputs_I, inside_I, 0.0)
    if NORM:
        x_I = x_I.to(tl.float32)
        x_I *= tl.rsqrt(tl.sum(x_I * x_I) / num_inputs + eps) * norm_I
    tl.store(out_ptr + at_I // 8 * (MOST_ROWS * 8) + row * 8 + at_I % 8, x_I.to(out_ptr.dtype.element_ty), inside_I)
