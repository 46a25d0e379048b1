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

    w_OI = _tile(weight_OI, 0, inputs_I[None, :], num_inputs, WHOLE_TILES, EVICT_FIRST)
    u_OI = _tile(up_OI, 0, inputs_I[None, :], num_inputs, WHOLE_TILES, EVICT_FIRST) if GATED else w_OI
    g_I = _tile(norm_ptr + inputs_I, 0, inputs_I, num_inputs, WHOLE_TILES, False) if NORM else inputs_I
    if PREFETCH_BYTES:
        _prefetch(weight_ptr + rows_O * num_inputs + BLOCK_I, PREFETCH_BYTES, BLOCK_O, PDL)
        if GATED:
            _prefetch(weight_ptr + (rows_O + num_outputs) * num_inputs + BLOCK_I, PREFETCH_BYTES, BLOCK_O, PDL)
    wait_for_previous_kernel(PDL)
    x_I = _tile(x_ptr + inputs_I, 0, inputs_I, num_inputs, WHOLE_TILES, False)
    residual_O = tl.load(residual_ptr + rows_O).to(tl.float32) if ADD else 0.0

    y_OI = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    up_y_OI = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    squares_I = tl.zeros((BLOCK_I,), tl.float32)
    for start in range(BLOCK_I, num_inputs, BLOCK_I):
        next_w_OI = _tile(weight_OI, start, inputs_I[None, :], num_inputs, WHOLE_TILES, EVICT_FIRST)
        next_u_OI = _tile(up_OI, start, inputs_I[None, :], num_inputs, WHOLE_TILES, EVICT_FIRST) if GATED else next_w_OI
        next_g_I = _tile(norm_ptr + inputs_I, start, inputs_I, num_inputs, WHOLE_TILES, False) if NORM else g_I
        next_x_I = _tile(x_ptr + inputs_I, start, inputs_I, num_inputs, WHOLE_TILES, False)
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


@triton.jit
def _tile(ptrs, start, inputs, num_inputs, WHOLE_TILES: tl.constexpr, EVICT_FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    """What lies `start` inputs further along; zeros past the last input."""
    policy: tl.constexpr = "evict_first" if EVICT_FIRST else ""
    if WHOLE_TILES:
        return tl.load(ptrs + start, eviction_policy=policy)
    return tl.load(ptrs + start, mask=start + inputs < num_inputs, other=0.0, eviction_policy=policy)


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
        w_OI = _tile(weight_OI, start, inputs_I[None, :], end, WHOLE_TILES, EVICT_FIRST)
        u_OI = _tile(up_OI, start, inputs_I[None, :], end, WHOLE_TILES, EVICT_FIRST) if GATED else w_OI
    if PREFETCH_BYTES:
        ahead = start + PREFETCH_TILE * BLOCK_I
        _prefetch(weight_ptr + rows_O * num_inputs + ahead, PREFETCH_BYTES, BLOCK_O, PDL)
        if GATED:
            _prefetch(weight_ptr + (rows_O + num_outputs) * num_inputs + ahead, PREFETCH_BYTES, BLOCK_O, PDL)
    wait_for_previous_kernel(PDL)

    y_OP = tl.zeros((BLOCK_O, PADDED_ROWS), tl.float32)
    up_y_OP = tl.zeros((BLOCK_O, PADDED_ROWS), tl.float32)
    squares_IP = tl.zeros((BLOCK_I, PADDED_ROWS), tl.float32)
    if PREFETCH_TILE:
        x = _rows(x_IP, start, inputs_I, end, rows_P, num_rows, WHOLE_TILES)
        if NORM:
            g_I = _tile(norm_I, start, inputs_I, end, WHOLE_TILES, False)
            x, squares_IP = _scale(x, g_I, squares_IP)
        y_OP = tl.dot(w_OI, x, y_OP)
        if GATED:
            up_y_OP = tl.dot(u_OI, x, up_y_OP)
        start += BLOCK_I
    for at in range(start, end, BLOCK_I):
        w = _tile(weight_OI, at, inputs_I[None, :], end, WHOLE_TILES, EVICT_FIRST)
        x = _rows(x_IP, at, inputs_I, end, rows_P, num_rows, WHOLE_TILES)
        if NORM:
            g_I = _tile(norm_I, at, inputs_I, end, WHOLE_TILES, False)
            x, squares_IP = _scale(x, g_I, squares_IP)
        y_OP = tl.dot(w, x, y_OP)
        if GATED:
            u = _tile(up_OI, at, inputs_I[None, :], end, WHOLE_TILES, EVICT_FIRST)
            up_y_OP = tl.dot(u, x, up_y_OP)
    squares_P = tl.sum(squares_IP, axis=0) if NORM else tl.zeros((PADDED_ROWS,), tl.float32)

    is_last = True
    if NUM_SPLITS > 1:
        size: tl.constexpr = (1 + GATED) * BLOCK_O * PADDED_ROWS + PADDED_ROWS
        sums_OP = tl.arange(0, BLOCK_O)[:, None] * PADDED_ROWS + rows_P[None, :]
        partial_ptr += tile * NUM_SPLITS * size
        mine = partial_ptr + split * size
        tl.store(mine + sums_OP, y_OP)
        if GATED:
            tl.store(mine + BLOCK_O * PADDED_ROWS + sums_OP, up_y_OP)
        if NORM:
            tl.store(mine + (size - PADDED_ROWS) + rows_P, squares_P)
        tl.debug_barrier()  # every thread's sums are written before one thread announces them
        is_last = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == NUM_SPLITS - 1
        if is_last:
            tl.debug_barrier()
            tl.store(arrivals_ptr + tile, 0)  # for the next kernel that splits
            y_OP = tl.zeros((BLOCK_O, PADDED_ROWS), tl.float32)
            up_y_OP = tl.zeros((BLOCK_O, PADDED_ROWS), tl.float32)
            squares_P = tl.zeros((PADDED_ROWS,), tl.float32)
            for other in tl.static_range(NUM_SPLITS):
                theirs = partial_ptr + other * size
                y_OP += tl.load(theirs + sums_OP, cache_modifier=".cg")
                if GATED:
                    up_y_OP += tl.load(theirs + BLOCK_O * PADDED_ROWS + sums_OP, cache_modifier=".cg")
                if NORM:
                    squares_P += tl.load(theirs + (size - PADDED_ROWS) + rows_P, cache_modifier=".cg")
    if is_last:
        stored_OP = (outputs_O < num_outputs)[:, None] & (rows_P < num_rows)[None, :]
        if NORM:
            inverse_rms_P = tl.rsqrt(squares_P / num_inputs + eps)
            y_OP *= inverse_rms_P[None, :]
            up_y_OP *= inverse_rms_P[None, :]
        if BIAS:
            y_OP += tl.load(bias_ptr + rows_O).to(tl.float32)[:, None]
            if GATED:
                up_y_OP += tl.load(bias_ptr + num_outputs + rows_O).to(tl.float32)[:, None]
        if GATED:
            y_OP = y_OP * tl.sigmoid(y_OP) * up_y_OP
        if ADD:
            residual_OP = residual_ptr + rows_P[None, :] * residual_stride + outputs_O[:, None]
            y_OP += tl.load(residual_OP, mask=stored_OP, other=0.0).to(tl.float32)
        out_OP = out_ptr + rows_P[None, :] * out_stride + outputs_O[:, None]
        tl.store(out_OP, y_OP.to(out_ptr.dtype.element_ty), mask=stored_OP)


@triton.jit
def _rows(x_IP, start, inputs_I, end, rows_P, num_rows, WHOLE_TILES: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of x^T; zeros past the last row and the last input."""
    inside_IP = (rows_P < num_rows)[None, :]
    if not WHOLE_TILES:
        inside_IP = inside_IP & (start + inputs_I < end)[:, None]
    return tl.load(x_IP + start, mask=inside_IP, other=0.0)


@triton.jit
def _scale(x, g_I, squares_IP):  # type: ignore[no-untyped-def]
    """x * g, and the sums of squares of x so far."""
    wide = x.to(tl.float32)
    return (wide * g_I.to(tl.float32)[:, None]).to(x.dtype), squares_IP + wide * wide


@triton.jit
def _prefetch(ptrs_O, NUM_BYTES: tl.constexpr, BLOCK_O: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Ask the second-level cache for NUM_BYTES from each address. Threads past the first BLOCK_O hold copies."""
    if PDL:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.lt.u32 p, t, $2;"
            " @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.u32 $0, 0; }",
            "=r,l,r,r",
            [ptrs_O, BLOCK_O, NUM_BYTES],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
