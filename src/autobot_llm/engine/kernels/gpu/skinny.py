"""Products of a weight matrix with few rows, as fast as the weights can be read. Knows tiles; chooses none of them.

At few rows a product costs what reading W costs, so both kernels are built around that stream: 16-byte loads, enough
of them in flight, and the first ones asked for before the previous kernel has ended (launch.py), because no kernel
writes weights. What surrounds a product rides along: RMSNorm before it; bias, residual or gated SiLU after it.

RMSNorm needs no pass of its own: W (g x / rms(x)) = (W (g x)) / rms(x), and the sum of squares is taken from the same
tiles of x that the product reads.
"""

# T rows, P rows padded to a power of two, O outputs (of each half of W where it is gated), I inputs, S splits of I

from __future__ import annotations

import triton
import triton.language as tl

from autobot_llm.engine.kernels.gpu.launch import (
    lean,
    let_next_kernel_start,
    wait_for_previous_kernel,
)
from autobot_llm.engine.kernels.gpu.row_parts import finish_rows, prefetch, rows_of, scale_rows, sum_splits, tile_of


@lean
@triton.jit
def matvec_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [I]
    norm_ptr,  # [I], read if NORM
    weight_ptr,  # [O, I], or [2 O, I] if GATED
    bias_ptr,  # [O] or [2 O], read if BIAS
    residual_ptr,  # [O], read if ADD
    out_ptr,  # [O]
    num_outputs,
    num_inputs,
    eps,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    WHOLE_TILES: tl.constexpr,  # BLOCK_I divides I
    EVICT_FIRST: tl.constexpr,
    PREFETCH_BYTES: tl.constexpr,  # of each row of W, past its first tile, into the second-level cache
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row: multiply and add without matrix units. A program owns BLOCK_O outputs and walks along their rows of W,
    with the next tile always on its way into registers."""
    let_next_kernel_start(PDL)
    outputs_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    rows_O = tl.minimum(outputs_O, num_outputs - 1).to(tl.int64)  # past the end: read the last row, store nothing
    inputs_I = tl.arange(0, BLOCK_I)
    weight_OI = weight_ptr + rows_O[:, None] * num_inputs + inputs_I[None, :]
    up_OI = weight_OI + tl.cast(num_outputs, tl.int64) * num_inputs

    w_OI = tile_of(weight_OI, 0, inputs_I[None, :], num_inputs, WHOLE_TILES, EVICT_FIRST)
    u_OI = tile_of(up_OI, 0, inputs_I[None, :], num_inputs, WHOLE_TILES, EVICT_FIRST) if GATED else w_OI
    g_I = tile_of(norm_ptr + inputs_I, 0, inputs_I, num_inputs, WHOLE_TILES, False) if NORM else inputs_I
    if PREFETCH_BYTES:
        prefetch(weight_ptr + rows_O * num_inputs + BLOCK_I, PREFETCH_BYTES, BLOCK_O, PDL)
        if GATED:
            prefetch(weight_ptr + (rows_O + num_outputs) * num_inputs + BLOCK_I, PREFETCH_BYTES, BLOCK_O, PDL)
    wait_for_previous_kernel(PDL)
    x_I = tile_of(x_ptr + inputs_I, 0, inputs_I, num_inputs, WHOLE_TILES, False)
    residual_O = tl.load(residual_ptr + rows_O).to(tl.float32) if ADD else 0.0

    y_OI = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    up_y_OI = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    squares_I = tl.zeros((BLOCK_I,), tl.float32)
    for start in range(BLOCK_I, num_inputs, BLOCK_I):
        next_w_OI = tile_of(weight_OI, start, inputs_I[None, :], num_inputs, WHOLE_TILES, EVICT_FIRST)
        next_u_OI = (
            tile_of(up_OI, start, inputs_I[None, :], num_inputs, WHOLE_TILES, EVICT_FIRST) if GATED else next_w_OI
        )
        next_g_I = tile_of(norm_ptr + inputs_I, start, inputs_I, num_inputs, WHOLE_TILES, False) if NORM else g_I
        next_x_I = tile_of(x_ptr + inputs_I, start, inputs_I, num_inputs, WHOLE_TILES, False)
        y_OI, up_y_OI, squares_I = _multiply_add(y_OI, up_y_OI, squares_I, w_OI, u_OI, g_I, x_I, NORM, GATED)
        w_OI, u_OI, g_I, x_I = next_w_OI, next_u_OI, next_g_I, next_x_I
    y_OI, up_y_OI, squares_I = _multiply_add(y_OI, up_y_OI, squares_I, w_OI, u_OI, g_I, x_I, NORM, GATED)

    y_O = tl.sum(y_OI, axis=1)
    up_y_O = tl.sum(up_y_OI, axis=1) if GATED else y_O
    if NORM:
        inverse_rms = tl.rsqrt(tl.sum(squares_I, axis=0) / num_inputs + eps)
        y_O *= inverse_rms
        up_y_O *= inverse_rms
    if BIAS:
        y_O += tl.load(bias_ptr + rows_O).to(tl.float32)
        up_y_O += tl.load(bias_ptr + num_outputs + rows_O).to(tl.float32) if GATED else 0.0
    if GATED:
        y_O = y_O * tl.sigmoid(y_O) * up_y_O
    if ADD:
        y_O += residual_O
    tl.store(out_ptr + outputs_O, y_O.to(out_ptr.dtype.element_ty), mask=outputs_O < num_outputs)


@triton.jit
def _multiply_add(  # type: ignore[no-untyped-def]
    y_OI, up_y_OI, squares_I, w_OI, u_OI, g_I, x_I, NORM: tl.constexpr, GATED: tl.constexpr
):
    x_I = x_I.to(tl.float32)
    if NORM:
        squares_I += x_I * x_I
        x_I *= g_I.to(tl.float32)
    y_OI += w_OI.to(tl.float32) * x_I[None, :]
    if GATED:
        up_y_OI += u_OI.to(tl.float32) * x_I[None, :]
    return y_OI, up_y_OI, squares_I


@lean
@triton.jit(do_not_specialize=["num_rows"])
def rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [T, I]
    x_stride,
    norm_ptr,  # [I], read if NORM
    weight_ptr,  # [O, I], or [2 O, I] if GATED
    bias_ptr,  # [O] or [2 O], read if BIAS
    residual_ptr,  # [T, O], read if ADD
    residual_stride,
    out_ptr,  # [T, O]
    out_stride,
    partial_ptr,  # float32: [tiles of O, S, (1 + GATED) BLOCK_O P + P], if S > 1
    arrivals_ptr,  # int32: [tiles of O], zeros before and after, if S > 1
    num_rows,
    num_outputs,
    num_inputs,
    eps,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    WHOLE_TILES: tl.constexpr,  # BLOCK_I divides I
    EVICT_FIRST: tl.constexpr,
    PREFETCH_TILE: tl.constexpr,  # the first tile of W into registers before the previous kernel has ended
    PREFETCH_BYTES: tl.constexpr,  # of each row of W, past that tile, into the second-level cache
    NUM_SPLITS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PDL: tl.constexpr,
):
    """Several rows: tiles of W on the left of the matrix units, x^T on the right, so that few rows waste little.

    A program owns BLOCK_O outputs and one of NUM_SPLITS stretches of the inputs. With several stretches, each program
    leaves its partial sums in memory and the last one to arrive adds them up, in order of the stretches.
    """
    let_next_kernel_start(PDL)
    tile = tl.program_id(0) // NUM_SPLITS
    split = tl.program_id(0) % NUM_SPLITS
    outputs_O = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    rows_O = tl.minimum(outputs_O, num_outputs - 1).to(tl.int64)  # past the end: read the last row, store nothing
    steps = tl.cdiv(tl.cdiv(num_inputs, BLOCK_I), NUM_SPLITS)
    start = split * steps * BLOCK_I
    end = tl.minimum(start + steps * BLOCK_I, num_inputs)
    inputs_I = tl.arange(0, BLOCK_I)
    rows_P = tl.arange(0, PADDED_ROWS)
    weight_OI = weight_ptr + rows_O[:, None] * num_inputs + inputs_I[None, :]
    up_OI = weight_OI + tl.cast(num_outputs, tl.int64) * num_inputs
    x_IP = x_ptr + rows_P[None, :] * x_stride + inputs_I[:, None]
    norm_I = norm_ptr + inputs_I if NORM else inputs_I

    if PREFETCH_TILE:
        w_OI = tile_of(weight_OI, start, inputs_I[None, :], end, WHOLE_TILES, EVICT_FIRST)
        u_OI = tile_of(up_OI, start, inputs_I[None, :], end, WHOLE_TILES, EVICT_FIRST) if GATED else w_OI
    if PREFETCH_BYTES:
        ahead = start + PREFETCH_TILE * BLOCK_I
        prefetch(weight_ptr + rows_O * num_inputs + ahead, PREFETCH_BYTES, BLOCK_O, PDL)
        if GATED:
            prefetch(weight_ptr + (rows_O + num_outputs) * num_inputs + ahead, PREFETCH_BYTES, BLOCK_O, PDL)
    wait_for_previous_kernel(PDL)

    y_OP = tl.zeros((BLOCK_O, PADDED_ROWS), tl.float32)
    up_y_OP = tl.zeros((BLOCK_O, PADDED_ROWS), tl.float32)
    squares_IP = tl.zeros((BLOCK_I, PADDED_ROWS), tl.float32)
    if PREFETCH_TILE:
        x = rows_of(x_IP, start, inputs_I, end, rows_P, num_rows, WHOLE_TILES)
        if NORM:
            g_I = tile_of(norm_I, start, inputs_I, end, WHOLE_TILES, False)
            x, squares_IP = scale_rows(x, g_I, squares_IP)
        y_OP = tl.dot(w_OI, x, y_OP)
        if GATED:
            up_y_OP = tl.dot(u_OI, x, up_y_OP)
        start += BLOCK_I
    for at in range(start, end, BLOCK_I):
        w = tile_of(weight_OI, at, inputs_I[None, :], end, WHOLE_TILES, EVICT_FIRST)
        x = rows_of(x_IP, at, inputs_I, end, rows_P, num_rows, WHOLE_TILES)
        if NORM:
            g_I = tile_of(norm_I, at, inputs_I, end, WHOLE_TILES, False)
            x, squares_IP = scale_rows(x, g_I, squares_IP)
        y_OP = tl.dot(w, x, y_OP)
        if GATED:
            u = tile_of(up_OI, at, inputs_I[None, :], end, WHOLE_TILES, EVICT_FIRST)
            up_y_OP = tl.dot(u, x, up_y_OP)
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
