"""Products of 9 to 128 rows by streamed_blocks.cu. Knows its constants and what fits it; chooses no tiles."""

from __future__ import annotations

import ctypes

import torch

from autobot_llm.engine.kernels.gpu.arrange import arrange
from autobot_llm.engine.kernels.gpu.block_tiles import (
    BlockTile,
    choose_block_tile,
    copying_threads,
    shared_bytes,
)
from autobot_llm.engine.kernels.gpu.nvrtc import CudaKernel, find_nvrtc, map_of_bytes
from autobot_llm.engine.kernels.gpu.quantized_many import round_rows
from autobot_llm.engine.kernels.gpu.quantized_tiles import MAX_EXACT_ROWS
from autobot_llm.engine.kernels.gpu.row_launch import ALIGNMENT, capability_of
from autobot_llm.engine.kernels.gpu.stream_tiles import Format
from autobot_llm.engine.kernels.gpu.streamed import GROUPS, HOPPER, Prepared, address_of, format_of
from autobot_llm.engine.quantization.packed import PackedWeight

X_COPY_BYTES = 128  # of a row of x: what is copied at a time
MAGIC = 0x43004300  # 128.0 twice, in bfloat16: the kernel's compiler must not see it

_kernel = CudaKernel("streamed_blocks.cu", "streamed_blocks")


def rounds(weight: PackedWeight, num_rows: int) -> bool:
    """Whether rows are multiplied in 8 bits: if the scheme says so, and there are several."""
    return weight.activations is not None and num_rows > MAX_EXACT_ROWS


def block_tile_for(x_TI: torch.Tensor, weight: PackedWeight, out: torch.Tensor) -> BlockTile | None:
    """The tile for this product, or None where the kernel cannot compute it."""
    num_rows, num_inputs = x_TI.shape
    values = weight.values
    possible = (
        x_TI.is_cuda
        and capability_of(x_TI.device)[0] == HOPPER
        and find_nvrtc() is not None
        and _kernel.refusal is None
        and x_TI.dtype == out.dtype == torch.bfloat16
        and x_TI.stride(1) == values.stride(1) == 1
        and num_inputs == values.shape[1] * (2 if weight.group else 1)
        and (not weight.group or weight.group in GROUPS)
        and values.stride(0) % ALIGNMENT == values.data_ptr() % ALIGNMENT == 0
        and out.stride(0) % 4 == out.data_ptr() % 8 == 0  # four outputs are written at a time
    )
    if not possible:
        return None
    fmt, offsets = format_of(weight), weight.offsets is not None
    return choose_block_tile(
        num_rows,
        values.shape[0],
        values.shape[1],
        fmt,
        rounded=rounds(weight, num_rows),
        offsets=offsets,
        group=weight.group,
    )


def multiply_blocks(
    tile: BlockTile,
    x_TI: torch.Tensor,
    weight: PackedWeight,
    out: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    is_arranged: bool = False,
    arranges: bool = False,
) -> torch.Tensor:
    """The product with what surrounds it, as `multiply_many` in quantized_many.py, in two kernels.

    `arranges`: the outputs, as arrange.py would; with such rows, `is_arranged`, it is one kernel.
    """
    num_rows, values = x_TI.shape[0], weight.values
    x, x_scales_T = x_TI, None
    if rounds(weight, num_rows):
        assert not is_arranged
        x, x_scales_T = round_rows(x_TI, values.dtype, norm, eps)
    elif not is_arranged:
        x = arrange(x_TI, norm, eps)
    assert not is_arranged or (norm is None and x.is_contiguous())
    w_map = map_of_bytes(values.data_ptr(), *values.shape, values.stride(0), tile.weight_rows // 2, tile.segment)
    row_bytes = x.shape[1] * x.element_size()
    x_map = map_of_bytes(x.data_ptr(), num_rows, row_bytes, row_bytes, tile.tile_rows(num_rows), X_COPY_BYTES)
    prepared = prepare(tile, x_scales_T, weight, out, bias=bias, residual=residual, gated=gated, arranges=arranges)
    _kernel.launch(
        prepared.constants,
        (w_map, x_map, prepared.arguments, ctypes.c_uint(MAGIC)),
        programs=prepared.num_tiles * tile.parts,
        threads=128 * tile.num_warpgroups + prepared.constants["COPYING_THREADS"],
        shared_bytes=prepared.shared_bytes,
        device=out.device,
        cluster=tile.parts,
    )
    return out


def prepare(
    tile: BlockTile,
    x_scales_T: torch.Tensor | None,
    weight: PackedWeight,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gated: bool,
    arranges: bool = False,
) -> Prepared:
    """What the kernel is launched with beside maps of W and of x: as `arrange` has left it, or rounded, with scales."""
    rounded = x_scales_T is not None
    num_rows, num_outputs = out.shape
    fmt, offsets = format_of(weight), weight.offsets
    halves = 2 if gated else 1
    assert weight.values.shape[0] == num_outputs * halves and out.stride(1) == 1 and out.dtype == torch.bfloat16
    assert bias is None or (bias.shape == (weight.values.shape[0],) and bias.dtype == out.dtype)
    assert residual is None or (residual.shape == out.shape and residual.stride(1) == 1)
    assert residual is None or (residual.dtype == out.dtype and residual.stride(0) % 4 == 0 and not gated)
    assert not (rounded and (fmt is Format.INT4 or tile.segment != 128))
    assert fmt is not Format.INT4 or weight.scales.dtype == out.dtype
    assert tile.num_stages >= 2 and tile.num_stages % tile.turns == 0
    assert not arranges or (num_outputs % 64 == 0 and residual is None)
    num_tiles, rest = divmod(weight.values.shape[0], tile.weight_rows)
    rows = tile.tile_rows(num_rows)
    x_tiles = -(-num_rows // rows)
    assert not rest and weight.values.shape[1] % (tile.segment * tile.parts) == 0
    arguments = _Product(
        *(address_of(x_scales_T), address_of(weight.scales), address_of(offsets)),
        *(address_of(bias), address_of(residual), 0 if residual is None else residual.stride(0)),
        *(address_of(out), out.stride(0), num_rows, num_outputs),
    )
    constants = {
        "FORMAT": int(fmt),
        "ROUNDED": int(rounded),
        "INPUTS": weight.num_inputs,
        "GROUP": weight.group or GROUPS[0],
        "OFFSETS": int(offsets is not None),
        "GATED": int(gated),
        "ROWS": rows,
        "X_TILES": x_tiles,
        "WARPGROUPS": tile.num_warpgroups,
        "TURNS": tile.turns,
        "COPYING_THREADS": copying_threads(tile, num_rows, fmt),
        "PARTS": tile.parts,
        "SEGMENT": tile.segment,
        "STAGES": tile.num_stages,
        "RESIDENT": tile.resident,
        "ARRANGES": int(arranges),
    }
    shared = shared_bytes(tile, num_rows, fmt, rounded=rounded, offsets=offsets is not None)
    return Prepared(constants, arguments, num_tiles * x_tiles, shared)


class _Product(ctypes.Structure):
    """`Product` of streamed_blocks.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x_scales", "scales", "offsets", "bias", "residual")),
        ("residual_stride", ctypes.c_longlong),
        *(("out", ctypes.c_void_p), ("out_stride", ctypes.c_longlong)),
        *(("num_rows", ctypes.c_int), ("num_outputs", ctypes.c_int)),
    )
