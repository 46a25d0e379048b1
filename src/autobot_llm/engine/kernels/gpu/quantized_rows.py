"""Products of a quantized weight matrix with few rows, as fast as its bytes can be read. Knows how W is stored; chooses
no tiles.

As in skinny.py, reading W is what a product of few rows costs, so 8-bit weights halve it and 4-bit ones quarter it.
The integers become numbers of the activations' dtype in registers (exactly: 8 bits of precision hold them) on their way
into the matrix units; the scales are applied to sums in float32, never to single weights.
"""

# T rows, P rows padded to a power of two, O outputs (of each half of W where it is gated), I inputs, G groups of
# inputs, S splits of I

from __future__ import annotations

import triton
import triton.language as tl

from autobot_llm.engine.kernels.gpu.launch import (
    lean,
    let_next_kernel_start,
    wait_for_previous_kernel,
)
from autobot_llm.engine.kernels.gpu.narrow import numbers_of_bytes
from autobot_llm.engine.kernels.gpu.row_parts import finish_rows, prefetch, rows_of, scale_rows, sum_splits, tile_of


@lean
@triton.jit(do_not_specialize=["num_rows"])
def quantized_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [T, I]
    x_stride,
    norm_ptr,  # [I], read if NORM
    weight_ptr,  # [O, I] in one byte each; or [O, I / 2], two to a byte, if GROUP. 2 O rows if GATED
    weight_stride,  # bytes of a row
    scales_ptr,  # float32 [O]; or [G, O] of the activations' dtype if GROUP. 2 O entries of each group if GATED
    offsets_ptr,  # [G, O] as the scales, read if OFFSETS: what to add to each weight of a group, before its scale
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
    eps,
    GROUP: tl.constexpr,  # inputs that share a scale, of 4-bit weights; 0: 8-bit ones with a scale for each output
    OFFSETS: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    WHOLE_TILES: tl.constexpr,  # a step's inputs divide I
    EVICT_FIRST: tl.constexpr,
    PREFETCH_BYTES: tl.constexpr,  # of each row of W into the second-level cache before the previous kernel has ended
    NUM_SPLITS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,  # inputs of one dot; a step of 4-bit weights does two of them, so it is GROUP there
    PDL: tl.constexpr,
):
    """Several rows: tiles of W on the left of the matrix units, x^T on the right. Programs, splits: as rows_kernel."""
    let_next_kernel_start(PDL)
    STEP: tl.constexpr = 2 * GROUP if GROUP else BLOCK_I
    tile = tl.program_id(0) // NUM_SPLITS
    split = tl.program_id(0) % NUM_SPLITS
    outputs_O = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    rows_O = tl.minimum(outputs_O, num_outputs - 1).to(tl.int64)  # past the end: read the last row, store nothing
    steps = tl.cdiv(tl.cdiv(num_inputs, STEP), NUM_SPLITS)
    start = split * steps * STEP
    end = tl.minimum(start + steps * STEP, num_inputs)
    inputs_I = tl.arange(0, BLOCK_I)
    rows_P = tl.arange(0, PADDED_ROWS)
    bytes_OI = weight_ptr + rows_O[:, None] * weight_stride + inputs_I[None, :]
    up_bytes_OI = bytes_OI + tl.cast(num_outputs, tl.int64) * weight_stride
    x_IP = x_ptr + rows_P[None, :] * x_stride + inputs_I[:, None]
    norm_I = norm_ptr + inputs_I if NORM else inputs_I

    if PREFETCH_BYTES:
        ahead = weight_ptr + rows_O * weight_stride + (start // 2 if GROUP else start)
        prefetch(ahead, PREFETCH_BYTES, BLOCK_O, PDL)
        if GATED:
            prefetch(ahead + tl.cast(num_outputs, tl.int64) * weight_stride, PREFETCH_BYTES, BLOCK_O, PDL)
    wait_for_previous_kernel(PDL)

    y_OP = tl.zeros((BLOCK_O, PADDED_ROWS), tl.float32)
    up_y_OP = tl.zeros((BLOCK_O, PADDED_ROWS), tl.float32)
    squares_IP = tl.zeros((BLOCK_I, PADDED_ROWS), tl.float32)
    if GROUP:
        width = num_outputs * (1 + GATED)
        scales_O = scales_ptr + rows_O
        offsets_O = offsets_ptr + rows_O if OFFSETS else scales_O
        # A step's scales are asked for a step ahead: nothing else hides the time they take.
        a_O, b_O = _of_two_groups(scales_O, start // GROUP, width)
        up_a_O, up_b_O = _of_two_groups(scales_O + num_outputs, start // GROUP, width) if GATED else (a_O, b_O)
    for at in range(start, end, STEP):
        x = rows_of(x_IP, at, inputs_I, end, rows_P, num_rows, WHOLE_TILES)
        if NORM:
            x, squares_IP = scale_rows(x, tile_of(norm_I, at, inputs_I, end, WHOLE_TILES, False), squares_IP)
        if GROUP:
            x_2 = rows_of(x_IP, at + GROUP, inputs_I, end, rows_P, num_rows, WHOLE_TILES)
            if NORM:
                g_2 = tile_of(norm_I, at + GROUP, inputs_I, end, WHOLE_TILES, False)
                x_2, squares_IP = scale_rows(x_2, g_2, squares_IP)
            group = at // GROUP
            following = tl.where(at + STEP < end, group + 2, group)
            next_a_O, next_b_O = _of_two_groups(scales_O, following, width)
            sums_OP, sums_2_OP = _sums_of_two_groups(
                bytes_OI + at // 2, offsets_O, group, width, x, x_2, OFFSETS, EVICT_FIRST, PDL
            )
            y_OP += a_O[:, None] * sums_OP + b_O[:, None] * sums_2_OP
            a_O, b_O = next_a_O, next_b_O
            if GATED:
                next_a_O, next_b_O = _of_two_groups(scales_O + num_outputs, following, width)
                sums_OP, sums_2_OP = _sums_of_two_groups(
                    up_bytes_OI + at // 2, offsets_O + num_outputs, group, width, x, x_2, OFFSETS, EVICT_FIRST, PDL
                )
                up_y_OP += up_a_O[:, None] * sums_OP + up_b_O[:, None] * sums_2_OP
                up_a_O, up_b_O = next_a_O, next_b_O
        else:
            w = tile_of(bytes_OI, at, inputs_I[None, :], end, WHOLE_TILES, EVICT_FIRST)
            y_OP = tl.dot(numbers_of_bytes(w, x, PDL), x, y_OP)
            if GATED:
                u = tile_of(up_bytes_OI, at, inputs_I[None, :], end, WHOLE_TILES, EVICT_FIRST)
                up_y_OP = tl.dot(numbers_of_bytes(u, x, PDL), x, up_y_OP)
    if not GROUP:
        y_OP *= tl.load(scales_ptr + rows_O)[:, None]
        if GATED:
            up_y_OP *= tl.load(scales_ptr + num_outputs + rows_O)[:, None]
    squares_P = tl.sum(squares_IP, axis=0) if NORM else tl.zeros((PADDED_ROWS,), tl.float32)

    y_OP, up_y_OP, squares_P, is_last = sum_splits(
        y_OP, up_y_OP, squares_P, partial_ptr, arrivals_ptr, tile, split,
        NORM, GATED, NUM_SPLITS, PADDED_ROWS, BLOCK_O,
    )  # fmt: skip
    if is_last:
        finish_rows(
            y_OP, up_y_OP, squares_P, bias_ptr, residual_ptr, residual_stride, out_ptr, out_stride, outputs_O,
            num_rows, num_outputs, num_inputs, eps, NORM, GATED, BIAS, ADD, PADDED_ROWS,
        )  # fmt: skip


@triton.jit
def _of_two_groups(values_O, group, width):  # type: ignore[no-untyped-def]
    """What each output has for a group of inputs and for the next one."""
    at_O = values_O + group * width
    return tl.load(at_O).to(tl.float32), tl.load(at_O + width).to(tl.float32)


@triton.jit
def _sums_of_two_groups(  # type: ignore[no-untyped-def]
    bytes_OI, offsets_O, group, width, x, x_2, OFFSETS: tl.constexpr, EVICT_FIRST: tl.constexpr, PDL: tl.constexpr
):
    """Unscaled: the low halves of the bytes are the first group's weights, the high halves the second's."""
    policy: tl.constexpr = "evict_first" if EVICT_FIRST else ""
    low, high = _halves(tl.load(bytes_OI, eviction_policy=policy), x, PDL)
    sums_OP = tl.dot(low, x)
    sums_2_OP = tl.dot(high, x_2)
    if OFFSETS:
        offset_O, offset_2_O = _of_two_groups(offsets_O, group, width)
        sums_OP += offset_O[:, None] * tl.sum(x.to(tl.float32), 0)[None, :]
        sums_2_OP += offset_2_O[:, None] * tl.sum(x_2.to(tl.float32), 0)[None, :]
    return sums_OP, sums_2_OP


@triton.jit
def _halves(packed, like, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """The low and the high four bits of each byte, less 8, in the dtype of `like`.

    In bfloat16 by putting the four bits into the fraction of 128, whose last place is worth 1, and taking 136 off: two
    weights in each instruction, where a conversion of integers does one in several. For devices from Ampere on; PDL,
    which means a later one, stands for "not in the interpreter".
    """
    if PDL and like.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 a, b, c, d, one, less;
            mov.b32 one, 0x3f803f80; mov.b32 less, 0xc308c308;
            prmt.b32 a, $4, 0, 0x4140; prmt.b32 b, $4, 0, 0x4342;
            shr.u32 c, a, 4; shr.u32 d, b, 4;
            lop3.b32 a, a, 0x000f000f, 0x43004300, 0xea; lop3.b32 b, b, 0x000f000f, 0x43004300, 0xea;
            lop3.b32 c, c, 0x000f000f, 0x43004300, 0xea; lop3.b32 d, d, 0x000f000f, 0x43004300, 0xea;
            fma.rn.bf16x2 $0, a, one, less; fma.rn.bf16x2 $1, b, one, less;
            fma.rn.bf16x2 $2, c, one, less; fma.rn.bf16x2 $3, d, one, less; }""",
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    values = packed.to(tl.int32)
    return ((values & 15) - 8).to(like.dtype), (((values >> 4) & 15) - 8).to(like.dtype)
