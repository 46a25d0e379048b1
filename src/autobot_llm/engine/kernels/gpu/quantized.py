"""Products of quantized weights on a GPU. Knows operators; knows nothing of layers, or of how the numbers were chosen.

With few rows they are one kernel that streams W in its own format (quantized_rows.py): of the numbers that the weights
stand for with the activations as they are, whatever the scheme allows. With more rows, quantized_many.py's.
"""

from __future__ import annotations

import torch
import triton

from autobot_llm.engine.kernels.gpu.launch import launch_options
from autobot_llm.engine.kernels.gpu.quantized_rows import quantized_rows_kernel
from autobot_llm.engine.kernels.gpu.row_launch import ALIGNMENT, prefetchable, split_inputs, workspace
from autobot_llm.engine.kernels.gpu.tiles import RowsTile
from autobot_llm.engine.quantization.packed import PackedWeight

# With so few rows, or few warps, Triton takes the older matrix instructions: their operand goes from memory to
# registers sixteen bytes at a time, where Hopper's own takes one-byte numbers two by two.
_MIN_PADDED_ROWS = 8


def multiply_quantized(
    tile: RowsTile,
    x_TI: torch.Tensor,
    weight: PackedWeight,
    out: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """The product with what surrounds it by one Triton kernel with this tile, as `multiply` in linear.py."""
    num_rows, num_inputs = x_TI.shape
    num_outputs = weight.num_outputs // (2 if gated else 1)
    assert weight.num_inputs == num_inputs and out.shape == (num_rows, num_outputs)
    assert x_TI.stride(1) == out.stride(1) == weight.values.stride(1) == 1
    assert not weight.group or weight.scales.dtype == x_TI.dtype
    assert residual is None or (residual.shape == out.shape and residual.stride(1) == 1)
    if num_rows == 0:
        return out
    block_i = weight.group or tile.block_i
    step = 2 * block_i if weight.group else block_i
    num_tiles = triton.cdiv(num_outputs, tile.block_o)
    padded_rows = max(triton.next_power_of_2(num_rows), _MIN_PADDED_ROWS)
    num_sums = num_tiles * ((2 if gated else 1) * tile.block_o + 1) * padded_rows
    num_splits, shortest = split_inputs(tile.num_splits, step, num_tiles, num_inputs, num_sums)
    partial, arrivals = workspace(x_TI.device) if num_splits > 1 else (None, None)
    row_bytes = weight.values.stride(0)
    ahead = tile.prefetch_bytes if row_bytes % ALIGNMENT == 0 else 0
    quantized_rows_kernel[(num_tiles * num_splits,)](
        x_ptr=x_TI,
        x_stride=x_TI.stride(0),
        norm_ptr=norm,
        weight_ptr=weight.values,
        weight_stride=row_bytes,
        scales_ptr=weight.scales,
        offsets_ptr=weight.offsets,
        bias_ptr=bias,
        residual_ptr=residual,
        residual_stride=0 if residual is None else residual.stride(0),
        out_ptr=out,
        out_stride=out.stride(0),
        partial_ptr=partial,
        arrivals_ptr=arrivals,
        num_rows=num_rows,
        num_outputs=num_outputs,
        num_inputs=num_inputs,
        eps=eps,
        GROUP=weight.group,
        OFFSETS=weight.offsets is not None,
        NORM=norm is not None,
        GATED=gated,
        BIAS=bias is not None,
        ADD=residual is not None,
        WHOLE_TILES=num_inputs % step == 0,
        EVICT_FIRST=tile.evict_first,
        PREFETCH_BYTES=prefetchable(weight.values, ahead, shortest // (2 if weight.group else 1)),
        NUM_SPLITS=num_splits,
        PADDED_ROWS=padded_rows,
        BLOCK_O=tile.block_o,
        BLOCK_I=block_i,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(x_TI.device),
    )
    return out
