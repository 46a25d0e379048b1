"""Products of few rows by streamed_rows.cu. Knows its constants and what fits it; chooses no tiles."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from autobot_llm.engine.kernels.gpu.norm import rms_norm
from autobot_llm.engine.kernels.gpu.nvrtc import CudaKernel, TensorMap, find_nvrtc, map_of_bytes
from autobot_llm.engine.kernels.gpu.row_launch import ALIGNMENT, capability_of
from autobot_llm.engine.kernels.gpu.scaled_rows import X_GROUP, scale_rows
from autobot_llm.engine.kernels.gpu.stream_tiles import MAX_STREAMED_ROWS, Format, StreamTile
from autobot_llm.engine.quantization.packed import PackedWeight

Weight: TypeAlias = torch.Tensor | PackedWeight

HOPPER = 9  # major capability: older ones have no copies that barriers count, newer ones may have less shared memory
_LINE = 128  # bytes: two chunks of a row
_BLOCK = 16  # rows of W
MULTIPROCESSOR_BYTES = 227 << 10  # shared memory that a program may have on Hopper
SYSTEM_BYTES = 2 << 10  # of it, for each program: a kilobyte is the system's, and parts begin at whole ones
GROUPS = (64, 128)
INT4_MAGIC = 0x80808080  # the highest bit of each byte: the kernel's compiler must not see it
_WARP_SPAN = 512  # inputs of x that a warp scales at once, 8 registers each
_MOST_SPANS = 8
_INT4_UNIT = 16  # how much larger than they are it has numbers of 4 bits

_NO_MAP = TensorMap()
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
    row_bytes = row_bytes_of(weight)
    strides = (values.stride(0) * values.element_size(), x_TI.stride(0) * x_TI.element_size())
    addresses = (values.data_ptr(), x_TI.data_ptr(), *strides)
    if row_bytes % _LINE or any(address % ALIGNMENT for address in addresses):
        return "rows that are not whole lines"
    if values.stride(1) != 1 or x_TI.stride(1) != 1:
        return "numbers of a row that lie apart"
    return None


def shared_bytes(tile: StreamTile, fmt: Format, group: int, num_inputs: int, num_rows: int, *, offsets: bool) -> int:
    """Shared memory of a program, as streamed_rows.cu lays it out."""
    groups = 2 * tile.segment // group if fmt is Format.INT4 else 0
    stage = _BLOCK * tile.blocks * (tile.segment + 64) + groups * tile.blocks * 32 * (1 + offsets)
    size = tile.num_stages * (-(-stage // _LINE) * _LINE)
    max_rows = most_rows(num_rows)
    columns, number_bytes = (2 * max_rows, 1) if _is_integer(fmt) else (max_rows, 2)
    if tile.x_stays:
        size += columns * (num_inputs * number_bytes + (16 if fmt is Format.FLOAT8 else 64))
        size += 0 if fmt is Format.BF16 else max_rows * -(-num_inputs // (4 * X_GROUP)) * 16
    size += -(-columns // 8) * (4 * 24 if _is_integer(fmt) else 8 * 20) * 4 * tile.blocks * tile.num_warps
    segment_inputs = tile.segment // 2 if fmt is Format.BF16 else tile.segment * (2 if fmt is Format.INT4 else 1)
    return size + 8 * (2 * tile.num_stages + -(-num_inputs // segment_inputs))


def row_bytes_of(weight: Weight) -> int:
    """Bytes of a row of W."""
    values = weight if isinstance(weight, torch.Tensor) else weight.values
    return values.shape[1] * values.element_size()


def most_rows(num_rows: int) -> int:
    """What the kernel is compiled for: 1 or 8 rows."""
    return 1 if num_rows == 1 else MAX_STREAMED_ROWS


def _is_integer(fmt: Format) -> bool:
    return fmt in (Format.INT8, Format.INT4)


def multiply_streamed(
    tile: StreamTile,
    x_TI: torch.Tensor,
    weight: Weight,
    out: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """The product with what surrounds it, as `multiply` in linear.py, in one kernel or two."""
    tile = fitting(tile, weight, x_TI.shape[0], gated=gated)
    rows = rows_for(tile, weight, x_TI, norm, eps)
    prepared = prepare(tile, rows, weight, out, bias=bias, residual=residual, gated=gated)
    most_programs = torch.cuda.get_device_properties(x_TI.device).multi_processor_count * tile.resident
    _kernel.launch(
        prepared.constants,
        (*scale_maps(tile, weight), prepared.arguments, ctypes.c_uint(INT4_MAGIC)),
        programs=min(prepared.num_tiles, most_programs),
        threads=32 * (tile.num_warps + 1),
        shared_bytes=prepared.shared_bytes,
        device=x_TI.device,
    )
    return out


def scale_maps(tile: StreamTile, weight: Weight) -> tuple[TensorMap, TensorMap]:
    """Of scales and offsets of 4 bits: the groups of a stage, of 16 outputs."""
    if isinstance(weight, torch.Tensor) or not weight.group:
        return _NO_MAP, _NO_MAP
    groups = 2 * tile.segment // weight.group

    def map_of(of_groups: torch.Tensor) -> TensorMap:
        num_groups, num_outputs = of_groups.shape
        row_bytes = 2 * num_outputs
        return map_of_bytes(of_groups.data_ptr(), num_groups, row_bytes, row_bytes, groups, 2 * _BLOCK)

    return map_of(weight.scales), _NO_MAP if weight.offsets is None else map_of(weight.offsets)


@dataclass(frozen=True, slots=True)
class Rows:
    """x as the kernel is given it: bfloat16, which it may have to scale, after a norm; or of scaled_rows.py."""

    x: torch.Tensor
    scales: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    eps: float = 0.0


def rows_for(
    tile: StreamTile, weight: Weight, x_TI: torch.Tensor, norm: torch.Tensor | None = None, eps: float = 0.0
) -> Rows:
    """`x_TI`, after RMSNorm where there is a weight for it."""
    fmt = format_of(weight)
    if fmt is Format.BF16:
        return Rows(x_TI if norm is None else rms_norm(x_TI, norm, eps))
    if _scales_x(tile, *x_TI.shape) and (norm is None or norm.data_ptr() % ALIGNMENT == 0):
        return Rows(x_TI, None, norm, eps)
    unit = 1 / _INT4_UNIT if fmt is Format.INT4 else 1.0
    return Rows(*scale_rows(x_TI, integer=_is_integer(fmt), unit=unit, norm=norm, eps=eps))


def _scales_x(tile: StreamTile, num_rows: int, num_inputs: int) -> bool:
    """Whether every program had better scale all rows by itself, sooner than another kernel: if registers hold them."""
    spans = -(-num_inputs // (tile.num_warps * _WARP_SPAN))
    return tile.x_stays and most_rows(num_rows) * spans <= _MOST_SPANS


@dataclass(frozen=True, slots=True)
class Prepared:
    """A product as the kernel is told of it. `arguments` holds addresses: the tensors must stay."""

    constants: dict[str, int]
    arguments: ctypes.Structure
    num_tiles: int
    shared_bytes: int


def fitting(tile: StreamTile, weight: Weight, num_rows: int, *, gated: bool) -> StreamTile:
    """This tile with as many blocks as the product can be cut into, of both halves if gated, and with x and stages in
    shared memory as there is room."""
    fmt, (weight_rows, num_inputs) = format_of(weight), _shape(weight)
    blocks = max(tile.blocks, 2 if gated else 1)
    while weight_rows % (_BLOCK * blocks):
        blocks //= 2
    tile = replace(tile, blocks=blocks)
    offsets = isinstance(weight, PackedWeight) and weight.offsets is not None

    def fits(tile: StreamTile) -> bool:
        size = shared_bytes(tile, fmt, _group(weight), num_inputs, num_rows, offsets=offsets)
        return (size + SYSTEM_BYTES) * tile.resident <= MULTIPROCESSOR_BYTES

    if not fits(tile):
        tile = replace(tile, x_stays=False)
    while not fits(tile):  # the offsets of a stage are few bytes more than the table counts on
        tile = replace(tile, num_stages=tile.num_stages - 1)
    return tile


def _shape(weight: Weight) -> tuple[int, int]:
    return (
        (weight.shape[0], weight.shape[1])
        if isinstance(weight, torch.Tensor)
        else (weight.num_outputs, weight.num_inputs)
    )


def _group(weight: Weight) -> int:
    return GROUPS[0] if isinstance(weight, torch.Tensor) else weight.group or GROUPS[0]


def prepare(
    tile: StreamTile,
    rows: Rows,
    weight: Weight,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> Prepared:
    """What the kernel is launched with, of a fitting tile and rows for it."""
    x, (num_rows, num_outputs) = rows.x, out.shape
    fmt, (weight_rows, num_inputs) = format_of(weight), _shape(weight)
    values = weight if isinstance(weight, torch.Tensor) else weight.values
    scales, offsets = (None, None) if isinstance(weight, torch.Tensor) else (weight.scales, weight.offsets)
    assert x.shape[0] == num_rows and x.shape[-1] == num_inputs
    assert weight_rows == num_outputs * (2 if gated else 1) and out.stride(1) == 1
    assert bias is None or (bias.shape == (weight_rows,) and bias.dtype == out.dtype)
    assert residual is None or (residual.shape == out.shape and residual.stride(1) == 1)
    assert residual is None or residual.dtype == out.dtype
    assert fmt is not Format.INT4 or (scales is not None and scales.dtype == out.dtype and scales.is_contiguous())
    assert rows.norm is None or (rows.norm.shape == (num_inputs,) and rows.norm.dtype == out.dtype)
    arguments = _Product(
        *(address_of(x), x.stride(-2) * x.element_size()),
        *(address_of(rows.scales), 0 if rows.scales is None else rows.scales.stride(0)),
        *(address_of(rows.norm), rows.eps),
        *(address_of(values), values.stride(0) * values.element_size()),
        *(address_of(None if fmt is Format.INT4 else scales), address_of(bias)),
        *(address_of(residual), 0 if residual is None else residual.stride(0)),
        *(address_of(out), out.stride(0), num_rows, num_outputs),
    )
    constants = {
        "FORMAT": int(fmt),
        "INPUTS": num_inputs,
        "GROUP": _group(weight),
        "OFFSETS": int(offsets is not None),
        "GATED": int(gated),
        "X_ROWS": most_rows(num_rows),
        "X_STAYS": int(tile.x_stays),
        "SCALES_X": int(fmt is not Format.BF16 and rows.scales is None),
        "NORM": int(rows.norm is not None),
        "WARPS": tile.num_warps,
        "BLOCKS": tile.blocks,
        "SEGMENT": tile.segment,
        "STAGES": tile.num_stages,
        "RESIDENT": tile.resident,
    }
    shared = shared_bytes(tile, fmt, _group(weight), num_inputs, num_rows, offsets=offsets is not None)
    return Prepared(constants, arguments, weight_rows // (_BLOCK * tile.blocks), shared)


class _Product(ctypes.Structure):
    """`Product` of streamed_rows.cu."""

    _fields_ = (
        *(("x", ctypes.c_void_p), ("x_stride", ctypes.c_longlong)),
        *(("x_scales", ctypes.c_void_p), ("x_scales_stride", ctypes.c_longlong)),
        *(("norm", ctypes.c_void_p), ("eps", ctypes.c_float)),
        *(("weight", ctypes.c_void_p), ("weight_stride", ctypes.c_longlong)),
        *((name, ctypes.c_void_p) for name in ("scales", "bias")),
        *(("residual", ctypes.c_void_p), ("residual_stride", ctypes.c_longlong)),
        *(("out", ctypes.c_void_p), ("out_stride", ctypes.c_longlong)),
        *(("num_rows", ctypes.c_int), ("num_outputs", ctypes.c_int)),
    )


def address_of(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
