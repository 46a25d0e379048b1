"""Quantized weights on a GPU, and their products with few rows. Knows formats and operators; knows nothing of layers,
of checkpoints, or of how the numbers were chosen.

`PackedWeight` is the layout that quantized_rows.py reads. Its twin is `dequantized()`: the same numbers, one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from autobot_llm.engine.kernels.gpu.launch import launch_options
from autobot_llm.engine.kernels.gpu.linear import ALIGNMENT, prefetchable, split_inputs, workspace
from autobot_llm.engine.kernels.gpu.quantized_rows import quantized_rows_kernel
from autobot_llm.engine.kernels.gpu.tiles import RowsTile

EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)
ZERO_OF_4_BITS = 8  # what a 4-bit weight of value 0 is stored as

# With so few rows, or few warps, Triton takes the older matrix instructions: their operand goes from memory to
# registers sixteen bytes at a time, where Hopper's own takes one-byte numbers two by two.
_MIN_PADDED_ROWS = 8


# T rows, O outputs, I inputs, G groups of inputs
@dataclass(frozen=True, slots=True)
class PackedWeight:
    """W, [O, I], as `values` times `scales`.

    With `group` 0, `values` is int8 or float8_e4m3fn [O, I], and `scales` float32 [O]. Otherwise `group` inputs share a
    scale: `values` is int8 [O, I' / 2], where I' is I rounded up to whole pairs of groups; byte j of a pair holds input
    j of its first group in the low four bits and of its second in the high ones, each plus 8; `scales` is [G, O], in
    the activations' dtype, with G even; so is `offsets` where the zero of a group is not 8: 8 less that zero.
    """

    values: torch.Tensor
    scales: torch.Tensor
    num_inputs: int
    group: int = 0
    offsets: torch.Tensor | None = None

    @property
    def num_outputs(self) -> int:
        return self.values.shape[0]

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def num_bytes(self) -> int:
        parts = (self.values, self.scales) if self.offsets is None else (self.values, self.scales, self.offsets)
        return sum(part.numel() * part.element_size() for part in parts)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """[O, I] in this dtype, computed in float32."""
        if not self.group:
            return (self.values.float() * self.scales[:, None]).to(dtype)
        pairs = self.values.view(torch.uint8).view(self.num_outputs, -1, self.group).to(torch.int16)
        values_OGI = torch.stack((pairs & 15, pairs >> 4), 2).flatten(1, 2).float() - ZERO_OF_4_BITS
        if self.offsets is not None:
            values_OGI += self.offsets.t().float()[:, :, None]
        values_OGI *= self.scales.t().float()[:, :, None]
        return values_OGI.flatten(1)[:, : self.num_inputs].to(dtype)


def pack_4_bits(
    values_OI: torch.Tensor, scales_OG: torch.Tensor, zeros_OG: torch.Tensor | None = None, *, group: int
) -> PackedWeight:
    """From whole numbers 0 to 15, and for each group of inputs its scale and its zero (8 where None)."""
    num_outputs, num_inputs = values_OI.shape
    missing = -num_inputs % (2 * group)
    padded = torch.nn.functional.pad(values_OI.to(torch.uint8), (0, missing), value=ZERO_OF_4_BITS)
    pairs = padded.view(num_outputs, -1, 2, group)
    values = (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1).contiguous().view(torch.int8)
    missing_groups = padded.shape[1] // group - scales_OG.shape[1]

    def by_group(of_groups: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(of_groups, (0, missing_groups)).t().contiguous().to(scales_OG.dtype)

    offsets = None if zeros_OG is None else by_group(ZERO_OF_4_BITS - zeros_OG.to(torch.int16))
    return PackedWeight(values, by_group(scales_OG), num_inputs, group, offsets)


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
