"""Products of quantized weights with many rows: prompts and large batches. Knows operators; knows nothing of layers.

With many rows arithmetic is the limit, and there are two ways to do it. What is stored in 8 bits can be multiplied in 8
bits, at twice the speed, if the activations are rounded, too (`round_activations`): each row with a scale of its own.
Schemes that round activations (W8A8, FP8 dynamic) allow that; they may still keep them whole where rows are few, which
is closer to the unrounded model, so a row's outputs depend a little on how many rows there are. Everything else gives
the numbers that the weights stand for with the activations as they are.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton

from autobot_llm.engine.kernels.gpu.activation import silu_mul
from autobot_llm.engine.kernels.gpu.launch import launch_options
from autobot_llm.engine.kernels.gpu.many_kernels import dequantize_kernel, many_rows_kernel, round_rows_kernel
from autobot_llm.engine.kernels.gpu.many_tiles import Library, ManyTile, Way, choose_way
from autobot_llm.engine.kernels.gpu.norm import rms_norm
from autobot_llm.engine.kernels.gpu.row_launch import ALIGNMENT, capability_of, prefetchable, split_inputs
from autobot_llm.engine.kernels.gpu.row_launch import workspace as split_sums
from autobot_llm.engine.quantization.packed import PackedWeight

# T rows, O outputs, I inputs

WORKSPACE_BYTES = 32 << 20
"""Of each device, for a part of a weight in numbers: what is written there is read before it leaves the second-level
cache."""

_ROWS_IN_TURN = 2048  # that share a tile of W in the second-level cache, and stay there themselves
_CONTIGUOUS = torch.contiguous_format


def multiply_many(
    x_TI: torch.Tensor,
    weight: PackedWeight,
    out: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    round_activations: bool = False,
) -> torch.Tensor:
    """The product with what surrounds it, as `multiply` in linear.py, of any number of rows. Returns `out`.

    `round_activations`: rows in the 8 bits of the weight, int8 or float8, which must have 8 bits. `residual` may be
    `out`. Memory for whatever lies between is torch's; weights in numbers share a workspace (WORKSPACE_BYTES), so all
    products of a device must run on one stream.
    """
    rounded = round_activations
    num_rows, num_inputs = x_TI.shape
    capability = capability_of(x_TI.device)
    way = choose_way(format_of(weight), rounded, num_rows, out.shape[1], num_inputs, gated, capability)
    if weight.group and isinstance(way, ManyTile) and weight.group % way.block_i:
        way = Library.PARTS  # a step of the kernel lies in one group
    if way is Library.SCALED and (num_inputs % 16 or weight.num_outputs % 16):
        way = ManyTile(128, 128, 128, num_warps=8, num_stages=3)  # the library's sizes are multiples of 16
    return multiply_by(
        way, x_TI, weight, out, norm=norm, eps=eps, bias=bias, residual=residual, gated=gated, rounded=rounded
    )


def format_of(weight: PackedWeight) -> str:
    """int4, int8 or fp8."""
    return "int4" if weight.group else "int8" if weight.values.dtype == torch.int8 else "fp8"


def multiply_by(
    way: Way,
    x_TI: torch.Tensor,
    weight: PackedWeight,
    out: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    rounded: bool = False,
) -> torch.Tensor:
    """`multiply_many` in this way."""
    num_rows, num_inputs = x_TI.shape
    num_outputs = weight.num_outputs // (2 if gated else 1)
    assert weight.num_inputs == num_inputs and out.shape == (num_rows, num_outputs)
    assert x_TI.stride(1) == out.stride(1) == weight.values.stride(1) == 1
    assert not weight.group or weight.scales.dtype == x_TI.dtype
    assert residual is None or (residual.shape == out.shape and residual.stride(1) == 1)
    assert not (rounded and weight.group), "rows are rounded to 8 bits, so the weight must have 8"
    assert way is not Library.SCALED or (rounded and weight.values.dtype == torch.float8_e4m3fn)
    assert way is not Library.PARTS or not rounded
    if num_rows == 0:
        return out
    scales_T = None
    if rounded:
        x_TI, scales_T = round_rows(x_TI, weight.values.dtype, norm, eps)
    elif norm is not None:
        x_TI = rms_norm(x_TI, norm, eps)
    if isinstance(way, ManyTile):
        _by_kernel(way, x_TI, scales_T, weight, out, bias, residual, gated)
        return out
    product = torch.empty((num_rows, weight.num_outputs), dtype=out.dtype, device=out.device) if gated else out
    if scales_T is None:
        multiply_in_parts(x_TI, weight, product, bias, residual, workspace(out.device))
    else:
        _by_scaled_mm(x_TI, scales_T, weight, product, bias, residual)
    return silu_mul(product, out) if gated else out


def round_rows(
    x_TI: torch.Tensor, dtype: torch.dtype, norm: torch.Tensor | None = None, eps: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row, after RMSNorm where there is a weight for it, in int8 or float8_e4m3fn, and its float32 scales_T.

    The twin is `round_activations` in engine/quantization/rounding.py.
    """
    num_rows, num_inputs = x_TI.shape
    out = torch.empty((num_rows, num_inputs), dtype=dtype, device=x_TI.device)
    scales_T = torch.empty(num_rows, dtype=torch.float32, device=x_TI.device)
    block = triton.next_power_of_2(num_inputs)
    round_rows_kernel[(num_rows,)](
        x_TI,
        x_TI.stride(0),
        norm,
        out,
        scales_T,
        num_inputs,
        eps,
        NORM=norm is not None,
        BLOCK_I=block,
        num_warps=min(max(block // 512, 1), 16),
        **launch_options(x_TI.device),
    )
    return out, scales_T


def _by_kernel(
    tile: ManyTile,
    x_TI: torch.Tensor,
    scales_T: torch.Tensor | None,
    weight: PackedWeight,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gated: bool,
) -> None:
    (num_rows, num_inputs), num_outputs, row_bytes = x_TI.shape, out.shape[1], weight.values.shape[1]
    assert not weight.group or weight.group % tile.block_i == 0, f"{tile}: a step lies in a group of {weight.group}"
    num_tiles = triton.cdiv(num_rows, tile.block_t) * triton.cdiv(num_outputs, tile.block_o)
    num_sums = num_tiles * ((2 if gated else 1) * tile.block_t + 1) * tile.block_o
    num_splits, shortest = split_inputs(tile.num_splits, tile.block_i, num_tiles, row_bytes, num_sums)
    partial, arrivals = split_sums(x_TI.device) if num_splits > 1 else (None, None)
    weight_stride = weight.values.stride(0)
    ahead = tile.prefetch_bytes if weight_stride % ALIGNMENT == 0 else 0
    step_inputs = 2 * weight.group if weight.group else tile.block_i
    many_rows_kernel[(num_tiles * num_splits,)](
        x_ptr=x_TI,
        x_stride=x_TI.stride(0),
        x_scales_ptr=scales_T,
        weight_ptr=weight.values,
        weight_stride=weight_stride,
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
        row_bytes=row_bytes,
        GROUP=weight.group,
        OFFSETS=weight.offsets is not None,
        ROUNDED=scales_T is not None,
        GATED=gated,
        BIAS=bias is not None,
        ADD=residual is not None,
        WHOLE_TILES=num_inputs % step_inputs == 0,
        PREFETCH_BYTES=prefetchable(weight.values, ahead, shortest),
        NUM_SPLITS=num_splits,
        TILES_T=max(1, _ROWS_IN_TURN // tile.block_t),
        BLOCK_T=tile.block_t,
        BLOCK_O=tile.block_o,
        BLOCK_I=tile.block_i,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(x_TI.device),
    )


def _by_scaled_mm(
    x_TI: torch.Tensor,
    scales_T: torch.Tensor,
    weight: PackedWeight,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> None:
    """cuBLAS or CUTLASS, as torch chooses: of Hopper and later, bfloat16 out, both sides multiples of 16."""
    product = out if residual is None and out.is_contiguous() else torch.empty_like(out, memory_format=_CONTIGUOUS)
    torch._scaled_mm(
        x_TI,
        weight.values.t(),
        scales_T[:, None],
        weight.scales[None, :],
        bias,
        out_dtype=out.dtype,
        use_fast_accum=True,
        out=product,
    )
    if residual is not None:
        torch.add(residual, product, out=out)
    elif product is not out:
        out.copy_(product)


def multiply_in_parts(
    x_TI: torch.Tensor,
    weight: PackedWeight,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    space: torch.Tensor,
) -> None:
    """Some outputs after the other: their weights in numbers, as many as fit the bytes of `space`, then torch's."""
    most = space.numel() // (weight.num_inputs * x_TI.element_size())
    assert most > 0, f"{weight.num_inputs} inputs do not fit the workspace"
    for start in range(0, weight.num_outputs, most):
        stop = min(start + most, weight.num_outputs)
        part = space[: (stop - start) * weight.num_inputs * x_TI.element_size()].view(x_TI.dtype)
        columns = dequantize(weight, start, part.view(stop - start, weight.num_inputs)).t()
        to = out[:, start:stop]
        if residual is not None:
            torch.addmm(residual[:, start:stop], x_TI, columns, out=to)
            if bias is not None:
                to += bias[start:stop]
        elif bias is not None:
            torch.addmm(bias[start:stop], x_TI, columns, out=to)
        else:
            torch.mm(x_TI, columns, out=to)


def dequantize(weight: PackedWeight, start: int, out: torch.Tensor) -> torch.Tensor:
    """Outputs `start` and so on of the weight in numbers, as many as `out` has rows: `weight.dequantized()` there."""
    num_outputs, num_inputs = out.shape
    assert out.is_contiguous() and start + num_outputs <= weight.num_outputs and num_inputs == weight.num_inputs
    row_bytes = weight.values.stride(0)
    block_i = weight.group or 512
    block_o = max(1, 4096 // block_i)
    dequantize_kernel[(triton.cdiv(num_outputs, block_o), triton.cdiv(weight.values.shape[1], block_i))](
        weight.values[start:],
        row_bytes,
        weight.scales[..., start:],
        None if weight.offsets is None else weight.offsets[..., start:],
        weight.num_outputs,
        out,
        num_outputs,
        num_inputs,
        GROUP=weight.group,
        OFFSETS=weight.offsets is not None,
        BLOCK_O=block_o,
        BLOCK_I=block_i,
        num_warps=4,
        **launch_options(out.device),
    )
    return out


@lru_cache
def workspace(device: torch.device) -> torch.Tensor:
    """Bytes that never move, because captured graphs hold their address."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the memory for weights in numbers would belong to a CUDA graph: run a step before capturing"
        )
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
