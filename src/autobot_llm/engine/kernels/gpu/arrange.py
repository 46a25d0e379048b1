"""Rows of x as streamed_blocks.cu reads them: in its order, whole stages in one piece. Knows that order, and rounding.

The kernel's matrix units take x as blocks of 8 rows by 16 bytes, and W from registers, where a thread has 16
neighbouring bytes of every 64 of a row instead of those that the instruction speaks of. So the same inputs of x change
places: within every 64 of them, words of four numbers of 8 bits, or pairs of bfloat16.
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
from autobot_llm.engine.kernels.gpu.many_kernels import rounded_row

# T rows, I inputs

_INPUTS_AT_ONCE = 1024  # of a program, where nothing has to be known of the whole row


def arrange(
    x_TI: torch.Tensor,
    most_rows: int,
    rounded_to: torch.dtype | None = None,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`x_TI`, after RMSNorm where there is a weight for it, as the kernel for `most_rows` rows wants it.

    Returns the arranged numbers, whose rows from T to `most_rows` hold whatever was there, and float32 scales_T if rows
    are rounded to int8 or float8_e4m3fn. Inputs must be a multiple of 64.
    """
    num_rows, num_inputs = x_TI.shape
    assert num_rows <= most_rows and num_inputs % 64 == 0 and x_TI.stride(1) == 1
    out = torch.empty(most_rows * num_inputs, dtype=rounded_to or x_TI.dtype, device=x_TI.device)
    scales_T = None
    if rounded_to is not None:
        scales_T = torch.empty(num_rows, dtype=torch.float32, device=x_TI.device)
    needs_row = norm is not None or rounded_to is not None
    block = triton.next_power_of_2(num_inputs) if needs_row else _INPUTS_AT_ONCE
    arrange_kernel[(num_rows, triton.cdiv(num_inputs, block))](
        x_TI,
        x_TI.stride(0),
        norm,
        out,
        scales_T,
        num_inputs,
        eps,
        NORM=norm is not None,
        ROUNDED=rounded_to is not None,
        MOST_ROWS=most_rows,
        BLOCK_I=block,
        num_warps=min(max(block // 512, 1), 16),
        **launch_options(x_TI.device),
    )
    return out, scales_T


@lean
@triton.jit
def arrange_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [T, I]
    x_stride,
    norm_ptr,  # [I], read if NORM
    out_ptr,  # [I / 16 bytes, MOST_ROWS, 16 bytes]
    scales_ptr,  # float32 [T], written if ROUNDED
    num_inputs,
    eps,
    NORM: tl.constexpr,
    ROUNDED: tl.constexpr,
    MOST_ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_kernel_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    at_I = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside_I = at_I < num_inputs
    # A thread t of four has bytes 16 t and so on of W. In an instruction it stands for words t and 4 + t of eight, or for
    # pairs t and 4 + t: so these are its first word (pair) and its second, then its third and fourth.
    if ROUNDED:
        inputs_I = at_I // 64 * 64 + at_I // 4 % 4 * 16 + at_I // 32 % 2 * 8 + at_I // 16 % 2 * 4 + at_I % 4
        PER_BLOCK: tl.constexpr = 16  # numbers in 16 bytes
    else:
        inputs_I = at_I // 64 * 64 + at_I // 2 % 4 * 16 + at_I // 16 % 4 * 4 + at_I // 8 % 2 * 2 + at_I % 2
        PER_BLOCK: tl.constexpr = 8
    norm_I = tl.load(norm_ptr + inputs_I, inside_I, 0.0).to(tl.float32) if NORM else 1.0
    wait_for_previous_kernel(PDL)
    x_I = tl.load(x_ptr + row * x_stride + inputs_I, inside_I, 0.0)
    if NORM:
        x_I = x_I.to(tl.float32)
        x_I *= tl.rsqrt(tl.sum(x_I * x_I) / num_inputs + eps) * norm_I
    if ROUNDED:
        x_I, scale = rounded_row(x_I.to(tl.float32), out_ptr.dtype.element_ty)
        tl.store(scales_ptr + row, scale)
    places_I = at_I // PER_BLOCK * (MOST_ROWS * PER_BLOCK) + row * PER_BLOCK + at_I % PER_BLOCK
    tl.store(out_ptr + places_I, x_I.to(out_ptr.dtype.element_ty), inside_I)
