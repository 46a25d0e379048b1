"""Which tile streamed_rows.cu multiplies few rows with, from a table. Knows shapes; knows no tensors.

As in tiles.py the table's shapes are those of a 7B model, and another shape takes the tile of the nearest one. Measured
on an H200 by `benchmarks/quantized_linear_gpu.py` (docs/results/quantized_linear_gpu.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

from autobot_llm.engine.kernels.gpu.tiles import Kind, nearest

MAX_STREAMED_ROWS = 8


class Format(IntEnum):
    """What a matrix is stored in; the numbers are the kernel's."""

    BF16 = 0
    INT8 = 1
    FLOAT8 = 2
    INT4 = 3


@dataclass(frozen=True, slots=True)
class StreamTile:
    """How the kernel cuts a product: warps that multiply, bytes of a row in a stage, stages of the ring, blocks of 16
    rows of W in a tile, programs on a multiprocessor. `x_stays`: x is copied beside the ring, if there is room for it,
    and comes from the cache otherwise.

    Two programs to a multiprocessor leave room for the next kernel's while one's last tile is multiplied; with one, the
    ring is twice as long.
    """

    num_warps: int
    segment: int
    num_stages: int
    blocks: int
    resident: int = 2
    x_stays: bool = False


Shapes: TypeAlias = Mapping[Kind, Mapping[tuple[int, int], StreamTile]]
_QKV, _O, _GATE_UP, _DOWN = (6144, 4096), (4096, 4096), (14336, 4096), (4096, 14336)


def _shapes(qkv: StreamTile, o: StreamTile, gate_up: StreamTile, down: StreamTile) -> Shapes:
    return {Kind.PLAIN: {_O: o, _DOWN: down}, Kind.NORM: {_QKV: qkv}, Kind.GATED: {_GATE_UP: gate_up}}


_DEEP = StreamTile(8, 2048, 3, 2, resident=1)
_WIDE = StreamTile(8, 2048, 3, 2, resident=1, x_stays=True)
_NARROW = StreamTile(8, 1024, 2, 2, x_stays=True)
_SEVERAL_WIDE = StreamTile(4, 2048, 2, 2, resident=1, x_stays=True)
_SEVERAL_NARROW = StreamTile(8, 1024, 4, 2, resident=1, x_stays=True)
_SEVERAL_DOWN = StreamTile(8, 1024, 6, 2, resident=1)
_SEVERAL_OF_EIGHT_BITS = _shapes(
    StreamTile(8, 1024, 8, 1, resident=1, x_stays=True), _SEVERAL_NARROW, _SEVERAL_WIDE, _SEVERAL_DOWN
)
_SEVERAL_OF_FOUR_BITS = _shapes(
    StreamTile(4, 2048, 4, 1, resident=1, x_stays=True), _SEVERAL_NARROW, _SEVERAL_NARROW, _SEVERAL_DOWN
)
_ONE_OF_EIGHT_BITS = _shapes(
    _WIDE, StreamTile(8, 1024, 5, 1, x_stays=True), _WIDE, StreamTile(8, 2048, 5, 1, resident=1, x_stays=True)
)
_ONE_OF_FOUR_BITS = _shapes(_NARROW, _NARROW, _WIDE, StreamTile(8, 1024, 4, 1, x_stays=True))

# For each format: the most rows of a table, ascending, and the table.
TABLES: Mapping[Format, tuple[tuple[int, Shapes], ...]] = {
    Format.BF16: ((8, _shapes(_DEEP, _DEEP, _DEEP, _DEEP)),),
    Format.INT8: ((1, _ONE_OF_EIGHT_BITS), (8, _SEVERAL_OF_EIGHT_BITS)),
    Format.FLOAT8: ((1, _ONE_OF_EIGHT_BITS), (8, _SEVERAL_OF_EIGHT_BITS)),
    Format.INT4: ((1, _ONE_OF_FOUR_BITS), (8, _SEVERAL_OF_FOUR_BITS)),
}


def choose_stream_tile(kind: Kind, num_rows: int, num_outputs: int, num_inputs: int, fmt: Format) -> StreamTile | None:
    """The tile for this product; None for more rows than one is made for, and where another kernel is as fast."""
    if fmt is Format.BF16 and num_rows == 1:
        return None
    for most_rows, shapes in TABLES[fmt]:
        if num_rows <= most_rows:
            return nearest(shapes[kind], (num_outputs, num_inputs))
    return None
