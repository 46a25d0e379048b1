"""Kernels for products of quantized weights with many rows. Knows tiles; chooses none of them."""

# T rows, O outputs, I inputs, G groups of inputs

from __future__ import annotations

import triton
import triton.language as tl

from autobot_llm.engine.kernels.gpu.launch import (
    lean,
    let_next_kernel_start,
    wait_for_previous_kernel,
)


@lean
@triton.jit
def dequantize_kernel(  # type: ignore[no-untyped-def]
    weight_ptr,  # [O, I] in one byte each; or [O, I' / 2], two to a byte, if GROUP (PackedWeight)
    weight_stride,  # bytes of a row
    scales_ptr,  # float32 [O]; or [G, O] if GROUP
    offsets_ptr,  # as the scales, read if OFFSETS
    scales_stride,  # from group to group
    out_ptr,  # [O, I]
    num_outputs,
    num_inputs,
    GROUP: tl.constexpr,
    OFFSETS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,  # bytes; GROUP of 4-bit weights
    PDL: tl.constexpr,
):
    """W in numbers, each rounded once."""
    let_next_kernel_start(PDL)
    outputs_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    rows_O = tl.minimum(outputs_O, num_outputs - 1)
    inside_O = outputs_O < num_outputs
    step = tl.program_id(1)
    inputs_I = step * BLOCK_I + tl.arange(0, BLOCK_I)
    bytes_OI = weight_ptr + rows_O.to(tl.int64)[:, None] * weight_stride + inputs_I[None, :]
    if GROUP:
        packed_OI = tl.load(bytes_OI).to(tl.int32)
        # byte j of pair p: input j of group 2 p, and of group 2 p + 1
        low_OI = ((packed_OI & 15) - 8).to(tl.float32)
        high_OI = (((packed_OI >> 4) & 15) - 8).to(tl.float32)
        at_O = 2 * step * scales_stride + rows_O
        if OFFSETS:
            low_OI += tl.load(offsets_ptr + at_O).to(tl.float32)[:, None]
            high_OI += tl.load(offsets_ptr + at_O + scales_stride).to(tl.float32)[:, None]
        low_OI *= tl.load(scales_ptr + at_O).to(tl.float32)[:, None]
        high_OI *= tl.load(scales_ptr + at_O + scales_stride).to(tl.float32)[:, None]
        wait_for_previous_kernel(PDL)  # it may read what is overwritten here
        first_I = 2 * step * GROUP + tl.arange(0, BLOCK_I)
        out_OI = out_ptr + outputs_O.to(tl.int64)[:, None] * num_inputs + first_I[None, :]
        element_ty: tl.constexpr = out_ptr.dtype.element_ty
        tl.store(out_OI, low_OI.to(element_ty), inside_O[:, None] & (first_I < num_inputs)[None, :])
        tl.store(out_OI + GROUP, high_OI.to(element_ty), inside_O[:, None] & (first_I + GROUP < num_inputs)[None, :])
    else:
        inside_OI = inside_O[:, None] & (inputs_I < num_inputs)[None, :]
        values_OI = tl.load(bytes_OI, inside_OI, 0.0).to(tl.float32) * tl.load(scales_ptr + rows_O)[:, None]
        wait_for_previous_kernel(PDL)
        out_OI = out_ptr + outputs_O.to(tl.int64)[:, None] * num_inputs + inputs_I[None, :]
        tl.store(out_OI, values_OI.to(out_ptr.dtype.element_ty), inside_OI)
