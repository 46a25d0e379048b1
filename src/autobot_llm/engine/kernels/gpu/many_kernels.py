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
from autobot_llm.engine.kernels.gpu.narrow import numbers_of_bytes
from autobot_llm.engine.kernels.gpu.row_parts import finish_rows, prefetch, sum_splits, tile_of


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


@lean
@triton.jit
def round_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [T, I]
    x_stride,
    norm_ptr,  # [I], read if NORM
    out_ptr,  # int8 or float8_e4m3 [T, I]
    scales_ptr,  # float32 [T]
    num_inputs,
    eps,
    NORM: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each row in 8 bits by its largest number, after RMSNorm if NORM."""
    let_next_kernel_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    inputs_I = tl.arange(0, BLOCK_I)
    inside_I = inputs_I < num_inputs
    norm_I = tl.load(norm_ptr + inputs_I, inside_I, 0.0).to(tl.float32) if NORM else 1.0
    wait_for_previous_kernel(PDL)
    x_I = tl.load(x_ptr + row * x_stride + inputs_I, inside_I, 0.0).to(tl.float32)
    if NORM:
        x_I *= tl.rsqrt(tl.sum(x_I * x_I) / num_inputs + eps) * norm_I
    KIND: tl.constexpr = out_ptr.dtype.element_ty
    LIMIT: tl.constexpr = 127.5 if tl.int8 == KIND else 448.0  # half of the 255 steps on either side
    scale = tl.maximum(tl.max(tl.abs(x_I)), 1e-8) / LIMIT  # as round_activations of engine/quantization/rounding.py
    x_I /= scale
    if tl.int8 == KIND:
        x_I = (x_I + 12582912.0) - 12582912.0  # to the nearest whole number, the even one of two: 1.5 * 2^23
        x_I = tl.minimum(tl.maximum(x_I, -128.0), 127.0)
    else:
        x_I = tl.minimum(tl.maximum(x_I, -LIMIT), LIMIT)
    tl.store(out_ptr + row * num_inputs + inputs_I, x_I.to(KIND), inside_I)
    tl.store(scales_ptr + row, scale)


@lean
@triton.jit(do_not_specialize=["num_rows"])
def many_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [T, I]: numbers, or as W if ROUNDED
    x_stride,
    x_scales_ptr,  # float32 [T], read if ROUNDED
    weight_ptr,  # [O, I] in one byte each; or [O, I' / 2], two to a byte, if GROUP. 2 O rows if GATED
    weight_stride,  # bytes of a row
    scales_ptr,  # float32 [O]; or [G, O] of the activations' dtype if GROUP. 2 O entries of each group if GATED
    offsets_ptr,  # [G, O] as the scales, read if OFFSETS
    bias_ptr,  # [O] or [2 O], read if BIAS
    residual_ptr,  # [T, O], read if ADD
    residual_stride,
    out_ptr,  # [T, O]
    out_stride,
    partial_ptr,  # as rows_kernel's
    arrivals_ptr,
    num_rows,
    num_outputs,
    num_inputs,
    row_bytes,  # of W that count: I, or I' / 2
    GROUP: tl.constexpr,  # inputs that share a scale, of 4-bit weights; 0: 8-bit ones with a scale for each output
    OFFSETS: tl.constexpr,
    ROUNDED: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    WHOLE_TILES: tl.constexpr,  # BLOCK_I divides I, or all groups of I' are of I
    PREFETCH_BYTES: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    TILES_T: tl.constexpr,  # so many tiles of rows take turns with a tile of W, and share it in the second-level cache
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,  # bytes of a row of W in a step
    PDL: tl.constexpr,
):
    """Tiles of rows times tiles of W, turned into numbers on their way unless both are in 8 bits."""
    let_next_kernel_start(PDL)
    split = tl.program_id(0) % NUM_SPLITS
    tile = tl.program_id(0) // NUM_SPLITS
    tiles_o = tl.cdiv(num_outputs, BLOCK_O)
    first_t = tile // (TILES_T * tiles_o) * TILES_T
    tiles_t = tl.minimum(tl.cdiv(num_rows, BLOCK_T) - first_t, TILES_T)
    in_turn = tile % (TILES_T * tiles_o)
    first_row = (first_t + in_turn % tiles_t) * BLOCK_T
    outputs_O = in_turn // tiles_t * BLOCK_O + tl.arange(0, BLOCK_O)
    rows_O = tl.minimum(outputs_O, num_outputs - 1).to(tl.int64)  # past the end: read the last row, store nothing
    rows_T = first_row + tl.arange(0, BLOCK_T)
    inside_T1 = (rows_T < num_rows)[:, None]
    steps = tl.cdiv(tl.cdiv(row_bytes, BLOCK_I), NUM_SPLITS)
    start = split * steps * BLOCK_I
    end = tl.minimum(start + steps * BLOCK_I, row_bytes)
    inputs_I = tl.arange(0, BLOCK_I)
    x_TI = x_ptr + rows_T.to(tl.int64)[:, None] * x_stride + inputs_I[None, :]
    bytes_OI = weight_ptr + rows_O[:, None] * weight_stride + inputs_I[None, :]
    up_bytes_OI = bytes_OI + tl.cast(num_outputs, tl.int64) * weight_stride
    if PREFETCH_BYTES:
        ahead = weight_ptr + rows_O * weight_stride + start
        prefetch(ahead, PREFETCH_BYTES, BLOCK_O, PDL)
        if GATED:
            prefetch(ahead + tl.cast(num_outputs, tl.int64) * weight_stride, PREFETCH_BYTES, BLOCK_O, PDL)
    wait_for_previous_kernel(PDL)

    SUMS: tl.constexpr = tl.int32 if ROUNDED and x_ptr.dtype.element_ty == tl.int8 else tl.float32
    y_TO = tl.zeros((BLOCK_T, BLOCK_O), SUMS)
    up_y_TO = tl.zeros((BLOCK_T, BLOCK_O if GATED else 1), SUMS)
    width = num_outputs * (1 + GATED)
    for at in range(start, end, BLOCK_I):
        if GROUP:
            # byte j of pair p holds input j of group 2 p, and of group 2 p + 1
            group = at // GROUP * 2
            first = tl.multiple_of(group * GROUP + at % GROUP, BLOCK_I)
            x = _inputs(x_TI, first, inputs_I, num_inputs, inside_T1, WHOLE_TILES)
            x_2 = _inputs(x_TI, first + GROUP, inputs_I, num_inputs, inside_T1, WHOLE_TILES)
            packed = tl.load(bytes_OI + at)
            of_group = group * width + rows_O
            w = _numbers_of_half(packed, x, scales_ptr, offsets_ptr, of_group, False, OFFSETS, PDL)
            y_TO = tl.dot(x, tl.trans(w), y_TO)
            w = _numbers_of_half(packed, x, scales_ptr, offsets_ptr, of_group + width, True, OFFSETS, PDL)
            y_TO = tl.dot(x_2, tl.trans(w), y_TO)
            if GATED:
                packed = tl.load(up_bytes_OI + at)
                of_group += num_outputs
                w = _numbers_of_half(packed, x, scales_ptr, offsets_ptr, of_group, False, OFFSETS, PDL)
                up_y_TO = tl.dot(x, tl.trans(w), up_y_TO)
                w = _numbers_of_half(packed, x, scales_ptr, offsets_ptr, of_group + width, True, OFFSETS, PDL)
                up_y_TO = tl.dot(x_2, tl.trans(w), up_y_TO)
        else:
            x = _inputs(x_TI, at, inputs_I, num_inputs, inside_T1, WHOLE_TILES)
            w = tile_of(bytes_OI, at, inputs_I[None, :], num_inputs, WHOLE_TILES, False)
            y_TO = tl.dot(x, tl.trans(w if ROUNDED else numbers_of_bytes(w, x, PDL)), y_TO, out_dtype=SUMS)
            if GATED:
                u = tile_of(up_bytes_OI, at, inputs_I[None, :], num_inputs, WHOLE_TILES, False)
                u = u if ROUNDED else numbers_of_bytes(u, x, PDL)
                up_y_TO = tl.dot(x, tl.trans(u), up_y_TO, out_dtype=SUMS)
    y_TO = y_TO.to(tl.float32)
    up_y_TO = up_y_TO.to(tl.float32)
    if not GROUP:
        y_TO *= tl.load(scales_ptr + rows_O)[None, :]
        if GATED:
            up_y_TO *= tl.load(scales_ptr + num_outputs + rows_O)[None, :]
    if ROUNDED:
        x_scales_T1 = tl.load(x_scales_ptr + rows_T, rows_T < num_rows, 0.0)[:, None]
        y_TO *= x_scales_T1
        up_y_TO *= x_scales_T1

    nothing_O = tl.zeros((BLOCK_O,), tl.float32)
    y_TO, up_y_TO, nothing_O, is_last = sum_splits(
        y_TO, up_y_TO, nothing_O, partial_ptr, arrivals_ptr, tile, split, False, GATED, NUM_SPLITS, BLOCK_O, BLOCK_T,
    )  # fmt: skip
    if is_last:
        finish_rows(
            tl.trans(y_TO), tl.trans(up_y_TO), nothing_O, bias_ptr,
            residual_ptr + tl.cast(first_row, tl.int64) * residual_stride if ADD else residual_ptr, residual_stride,
            out_ptr + tl.cast(first_row, tl.int64) * out_stride, out_stride, outputs_O,
            num_rows - first_row, num_outputs, num_inputs, 0.0, False, GATED, BIAS, ADD, BLOCK_T,
        )  # fmt: skip


@triton.jit
def _inputs(x_TI, at, inputs_I, num_inputs, inside_T1, WHOLE_TILES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of x from input `at` on; zeros past the last row and the last input."""
    if WHOLE_TILES:
        return tl.load(x_TI + at, mask=inside_T1, other=0.0)
    return tl.load(x_TI + at, mask=inside_T1 & (at + inputs_I < num_inputs)[None, :], other=0.0)


@triton.jit
def _numbers_of_half(  # type: ignore[no-untyped-def]
    packed, like, scales_ptr, offsets_ptr, of_group_O, HIGH: tl.constexpr, OFFSETS: tl.constexpr, FAST: tl.constexpr
):
    """The low or high four bits of each byte as the numbers they stand for, rounded once."""
    scale = tl.load(scales_ptr + of_group_O)
    offset = tl.load(offsets_ptr + of_group_O) if OFFSETS else scale
    if FAST and like.dtype == tl.bfloat16:
        # as _halves of quantized_rows.py; what is taken off holds the zero point, and the product is rounded
        less = (offset.to(tl.float32) - 136.0).to(tl.bfloat16) if OFFSETS else tl.full(scale.shape, -136.0, tl.bfloat16)
        shift: tl.constexpr = "shr.u32 a, a, 4; shr.u32 b, b, 4; " if HIGH else ""
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, one; mov.b32 one, 0x3f803f80;"
            "prmt.b32 a, $2, 0, 0x4140; prmt.b32 b, $2, 0, 0x4342; "
            + shift
            + "lop3.b32 a, a, 0x000f000f, 0x43004300, 0xea; lop3.b32 b, b, 0x000f000f, 0x43004300, 0xea;"
            "fma.rn.bf16x2 a, a, one, $3; fma.rn.bf16x2 b, b, one, $4;"
            "mul.rn.bf16x2 $0, a, $5; mul.rn.bf16x2 $1, b, $6; }",
            "=r,=r,r,r,r,r,r",
            [packed, less[:, None], scale[:, None]],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    values = packed.to(tl.int32)
    numbers = (((values >> 4 if HIGH else values) & 15) - 8).to(tl.float32)
    if OFFSETS:
        numbers += offset.to(tl.float32)[:, None]
    return (numbers * scale.to(tl.float32)[:, None]).to(like.dtype)
