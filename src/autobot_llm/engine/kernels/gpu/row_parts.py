"""Parts of the kernels that multiply a weight matrix with few rows: loads before, sums and stores after. Knows tiles
and what surrounds a product; knows nothing of how W is stored.
"""

# T rows, P rows padded to a power of two, O outputs (of each half of W where it is gated), I inputs, S splits of I

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(ptrs, start, inputs, num_inputs, WHOLE_TILES: tl.constexpr, EVICT_FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    """What lies `start` inputs further along; zeros past the last input."""
    policy: tl.constexpr = "evict_first" if EVICT_FIRST else ""
    if WHOLE_TILES:
        return tl.load(ptrs + start, eviction_policy=policy)
    return tl.load(ptrs + start, mask=start + inputs < num_inputs, other=0.0, eviction_policy=policy)


@triton.jit
def rows_of(x_IP, start, inputs_I, end, rows_P, num_rows, WHOLE_TILES: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of x^T; zeros past the last row and the last input."""
    inside_IP = (rows_P < num_rows)[None, :]
    if not WHOLE_TILES:
        inside_IP = inside_IP & (start + inputs_I < end)[:, None]
    return tl.load(x_IP + start, mask=inside_IP, other=0.0)


@triton.jit
def scale_rows(x, g_I, squares_IP):  # type: ignore[no-untyped-def]
    """x * g, and the sums of squares of x so far."""
    wide = x.to(tl.float32)
    return (wide * g_I.to(tl.float32)[:, None]).to(x.dtype), squares_IP + wide * wide


@triton.jit
def prefetch(ptrs_O, NUM_BYTES: tl.constexpr, BLOCK_O: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
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


@triton.jit
def sum_splits(  # type: ignore[no-untyped-def]
    y_OP, up_y_OP, squares_P, partial_ptr, arrivals_ptr, tile, split,
    NORM: tl.constexpr, GATED: tl.constexpr, NUM_SPLITS: tl.constexpr, PADDED_ROWS: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """The sums over all stretches of the inputs, in their order, and whether this program is the one that has them.

    Each program leaves its partial sums in memory, and the last one to arrive adds them up.
    """
    is_last = True
    if NUM_SPLITS > 1:
        size: tl.constexpr = (1 + GATED) * BLOCK_O * PADDED_ROWS + PADDED_ROWS
        rows_P = tl.arange(0, PADDED_ROWS)
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
            if GATED:
                up_y_OP = tl.zeros((BLOCK_O, PADDED_ROWS), tl.float32)
            if NORM:
                squares_P = tl.zeros((PADDED_ROWS,), tl.float32)
            for other in tl.static_range(NUM_SPLITS):
                theirs = partial_ptr + other * size
                y_OP += tl.load(theirs + sums_OP, cache_modifier=".cg")
                if GATED:
                    up_y_OP += tl.load(theirs + BLOCK_O * PADDED_ROWS + sums_OP, cache_modifier=".cg")
                if NORM:
                    squares_P += tl.load(theirs + (size - PADDED_ROWS) + rows_P, cache_modifier=".cg")
    return y_OP, up_y_OP, squares_P, is_last


@triton.jit
def finish_rows(  # type: ignore[no-untyped-def]
    y_OP, up_y_OP, squares_P, bias_ptr, residual_ptr, residual_stride, out_ptr, out_stride, outputs_O,
    num_rows, num_outputs, num_inputs, eps,
    NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, PADDED_ROWS: tl.constexpr,
):  # fmt: skip
    """Norm, bias, gate and residual of a tile of sums, and its way to memory."""
    rows_O = tl.minimum(outputs_O, num_outputs - 1).to(tl.int64)
    rows_P = tl.arange(0, PADDED_ROWS)
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
