"""Products of few rows by streamed_rows.cu. Knows its constants and what fits it; chooses no tiles."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from autobot_llm.engine.kernels.gpu.nvrtc import CudaKernel, find_nvrtc
from autobot_llm.engine.kernels.gpu.row_launch import ALIGNMENT, capability_of
from autobot_llm.engine.kernels.gpu.stream_tiles import MAX_STREAMED_ROWS, Format, StreamTile
from autobot_llm.engine.quantization.packed import PackedWeight

Weight: TypeAlias = torch.Tensor | PackedWeight

HOPPER = 9  # major capability: older ones have no copies that barriers count, newer ones may have less shared memory
_LINE = 128  # bytes: two chunks of a row
_BLOCK = 16  # rows of W
GROUPS = (64, 128)
MAGIC = 0x43004300  # 128.0 twice, in bfloat16: the kernel's compiler must not see it

_kernel = CudaKernel("streamed_rows.cu", "streamed_rows")


def format_of(weight: Weight) -> Format:
    if isinstance(weight, torch.Tensor):
        return Format.BF16
    if weight.group:
        return Format.INT4
    return Format.INT8 if weight.values.dtype == torch.int8 else Format.FLOAT8


def why_not_streamed(x_TI: torch.Tensor, weight: Weight, out_dtype: torch.dtype) -> str | None:
    """Why the kernel cannot multiply these; None: it can."""
    num_rows, num_inputs = x_TI.shape
    values = weight if isinstance(weight, torch.Tensor) else weight.values
    if not 0 < num_rows <= MAX_STREAMED_ROWS:
        return f"{num_rows} rows, not 1 to {MAX_STREAMED_ROWS}"
    if not x_TI.is_cuda or capability_of(x_TI.device)[0] != HOPPER:
        return "no Hopper GPU"
    if find_nvrtc() is None or _kernel.refusal is not None:
        return "no compiler for it"
    dense = weight.dtype if isinstance(weight, torch.Tensor) else x_TI.dtype
    if any(dtype != torch.bfloat16 for dtype in (x_TI.dtype, dense, out_dtype)):
        return f"{x_TI.dtype} times {dense} to {out_dtype}, not all in bfloat16"
    if isinstance(weight, PackedWeight) and weight.group and weight.group not in GROUPS:
        return f"groups of {weight.group}"
    if isinstance(weight, PackedWeight) and weight.group and 2 * values.shape[1] != num_inputs:
        return "inputs that were padded"
    if values.shape[0] % (2 * _BLOCK):
        return f"{values.shape[0]} outputs, not a multiple of {2 * _BLOCK}"
    row_bytes = values.shape[1] * values.element_size()
    strides = (values.stride(0) * values.element_size(), x_TI.stride(0) * x_TI.element_size())
    addresses = (values.data_ptr(), x_TI.data_ptr(), *strides)
    if row_bytes % _LINE or any(address % ALIGNMENT for address in addresses):
        return "rows that are not whole lines"
    if values.stride(1) != 1 or x_TI.stride(1) != 1:
        return "numbers of a row that lie apart"
    return None


def stage_bytes(tile: StreamTile, fmt: Format, group: int, max_rows: int, *, offsets: bool) -> int:
    """Shared memory of one stage of the ring, as streamed_rows.cu lays it out."""
    inputs = tile.segment // 2 if fmt is Format.BF16 else tile.segment * (2 if fmt is Format.INT4 else 1)
    groups = 2 * tile.segment // group if fmt is Format.INT4 else 0
    x_stride = 2 * inputs + (64 if fmt is Format.BF16 else 16)
    size = _BLOCK * tile.blocks * (tile.segment + 64) + groups * tile.blocks * 32 * (1 + offsets)
    return -(-(size + (max_rows * x_stride if tile.x_in_ring else 0)) // _LINE) * _LINE


def multiply_streamed(
    tile: StreamTile,
    x_TI: torch.Tensor,
    weight: Weight,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """The product with what surrounds it, as `multiply` in linear.py; a norm comes before it."""
    product = prepare(tile, x_TI, weight, out, bias=bias, residual=residual, gated=gated)
    multiprocessors = torch.cuda.get_device_properties(x_TI.device).multi_processor_count
    _kernel.launch(
        product.constants,
        (product.arguments, ctypes.c_uint(MAGIC)),
        programs=min(product.num_tiles, multiprocessors * tile.resident),
        threads=32 * (tile.num_warps + 1),
        shared_bytes=product.shared_bytes,
        device=x_TI.device,
    )
    return out


@dataclass(frozen=True, slots=True)
class Prepared:
    """A product as the kernel is told of it. `arguments` holds addresses: the tensors must stay."""

    constants: dict[str, int]
    arguments: ctypes.Structure
    num_tiles: int
    shared_bytes: int


def prepare(
    tile: StreamTile,
    x_TI: torch.Tensor,
    weight: Weight,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> Prepared:
    """See `multiply_streamed`."""
    num_rows, num_inputs = x_TI.shape
    fmt = format_of(weight)
    values = weight if isinstance(weight, torch.Tensor) else weight.values
    scales, offsets = (None, None) if isinstance(weight, torch.Tensor) else (weight.scales, weight.offsets)
    group = weight.group if fmt is Format.INT4 and isinstance(weight, PackedWeight) else GROUPS[0]
    halves = 2 if gated else 1
    num_outputs = values.shape[0] // halves
    if gated:
        tile = replace(tile, blocks=2)  # one of each half
    max_rows = 1 if num_rows == 1 else -(-num_rows // 8) * 8
    assert out.shape == (num_rows, num_outputs) and out.stride(1) == 1 and out.dtype == x_TI.dtype
    assert bias is None or (bias.shape == (values.shape[0],) and bias.dtype == x_TI.dtype)
    assert residual is None or (residual.shape == out.shape and residual.stride(1) == 1)
    assert residual is None or residual.dtype == x_TI.dtype
    assert fmt is not Format.INT4 or (scales is not None and scales.dtype == x_TI.dtype)
    arguments = _Product(
        *(address_of(x_TI), x_TI.stride(0), address_of(values), values.stride(0) * values.element_size()),
        *(address_of(scales), address_of(offsets), address_of(bias)),
        *(address_of(residual), 0 if residual is None else residual.stride(0)),
        *(address_of(out), out.stride(0), num_rows, num_outputs),
    )
    constants = {
        "FORMAT": int(fmt),
        "INPUTS": num_inputs,
        "GROUP": group,
        "OFFSETS": int(offsets is not None),
        "GATED": int(gated),
        "X_ROWS": max_rows,
        "X_IN_RING": int(tile.x_in_ring),
        "WARPS": tile.num_warps,
        "BLOCKS": tile.blocks,
        "SEGMENT": tile.segment,
        "STAGES": tile.num_stages,
        "RESIDENT": tile.resident,
    }
    shared = tile.num_stages * stage_bytes(tile, fmt, group, max_rows, offsets=offsets is not None)
    return Prepared(constants, arguments, values.shape[0] // (_BLOCK * tile.blocks), shared)


class _Product(ctypes.Structure):
    """`Product` of streamed_rows.cu."""

    _fields_ = (
        *(("x", ctypes.c_void_p), ("x_stride", ctypes.c_longlong)),
        *(("weight", ctypes.c_void_p), ("weight_stride", ctypes.c_longlong)),
        *((name, ctypes.c_void_p) for name in ("scales", "offsets", "bias")),
        *(("residual", ctypes.c_void_p), ("residual_stride", ctypes.c_longlong)),
        *(("out", ctypes.c_void_p), ("out_stride", ctypes.c_longlong)),
        *(("num_rows", ctypes.c_int), ("num_outputs", ctypes.c_int)),
    )


def address_of(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
