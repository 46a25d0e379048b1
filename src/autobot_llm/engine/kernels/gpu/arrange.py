"""Rows of x as streamed_blocks.cu wants them: bfloat16, the inputs of every 64 in the order of its threads.

Rows stay rows: loads and stores are of whole lines, and what a tensor copy brings is what the matrix units take.
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


def arrange(x_TI: torch.Tensor, norm: torch.Tensor | None = None, eps: float = 0.0) -> torch.Tensor:
    """`x_TI`, after RMSNorm where there is a weight for it, in the kernel's order; I must be a multiple of 64."""
    num_rows, num_inputs = x_TI.shape
    assert num_inputs % 64 == 0 and x_TI.stride(1) == 1
    out_TI = torch.empty((num_rows, num_inputs), dtype=x_TI.dtype, device=x_TI.device)
    block = _INPUTS_AT_ONCE if norm is None else triton.next_power_of_2(num_inputs)
    arrange_kernel[(num_rows, triton.cdiv(num_inputs, block))](
        x_TI,
        x_TI.stride(0),
        norm,
        out_TI,
        num_inputs,
        eps,
        NORM=norm is not None,
        BLOCK_I=block,
        num_warps=min(max(block // 512, 1), 16),
        **launch_options(x_TI.device),
    )
    return out_TI


@lean
@triton.jit
def arrange_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [T, I]
    x_stride,
    norm_ptr,  # [I], read if NORM
    out_ptr,  # [T, I]
    num_inputs,
    eps,
    NORM: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_kernel_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    at_I = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside_I = at_I < num_inputs
    norm_I = tl.load(norm_ptr + at_I, inside_I, 0.0).to(tl.float32) if NORM else 1.0
    wait_for_previous_kernel(PDL)
    x_I = tl.load(x_ptr + row * x_stride + at_I, inside_I, 0.0)
    if NORM:
        x_I = x_I.to(tl.float32)
        x_I *= tl.rsqrt(tl.sum(x_I * x_I) / num_inputs + eps) * norm_I
    # A thread of four has 16 bytes of 64 of W: four words of two even and two odd bytes. An instruction takes a word
    # of each of the four threads, and says that they are the even ones of all first, then the odd ones.
    numbers = tl.reshape(x_I.to(out_ptr.dtype.element_ty), (BLOCK_I // 64, 4, 4, 2, 2))  # thread, word, half of it, odd
    numbers = tl.permute(numbers, (0, 2, 4, 1, 3))
    tl.store(out_ptr + row * num_inputs + at_I, tl.reshape(numbers, (BLOCK_I,)), inside_I)
