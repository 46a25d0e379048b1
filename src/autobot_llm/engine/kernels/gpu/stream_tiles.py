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

MAX_STREAMED_ROWS = 16


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
    ring is twice as long. One row of x is small, and waiting for it would show; several are read again for each tile,
    from the first-level cache.
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


def _same(narrow: StreamTile, wide: StreamTile) -> Shapes:
    """One tile for products with many outputs to a multiprocessor, one for the others."""
    return _shapes(wide, narrow, wide, narrow)


_DEEP = StreamTile(8, 2048, 3, 2, resident=1)
_ONE = StreamTile(4, 1024, 5, 1, x_stays=True)
_ONE_WIDE = StreamTile(8, 2048, 2, 2, resident=1, x_stays=True)
_EIGHT_BITS = (
    (1, _shapes(_ONE, _ONE, _ONE_WIDE, _ONE)),
    (8, _same(StreamTile(8, 1024, 5, 1), StreamTile(8, 1024, 2, 2))),
    (16, _same(StreamTile(8, 1024, 3, 1), StreamTile(4, 1024, 2, 2))),
)

# For each format: the most rows of a table, ascending, and the table.
TABLES: Mapping[Format, tuple[tuple[int, Shapes], ...]] = {
    Format.BF16: ((8, _same(_DEEP, _DEEP)),),
    Format.INT8: _EIGHT_BITS,
    Format.FLOAT8: _EIGHT_BITS,
    Format.INT4: ((16, _same(StreamTile(4, 1024, 5, 1), StreamTile(4, 1024, 2, 2))),),
}


def choose_stream_tile(kind: Kind, num_rows: int, num_outputs: int, num_inputs: int, fmt: Format) -> StreamTile | None:
    """The tile for this product; None for more rows than one is made for, and where another kernel is as fast."""
    if fmt is Format.BF16 and num_rows == 1:
        return None
    for most_rows, shapes in TABLES[fmt]:
        if num_rows <= most_rows:
            return nearest(shapes[kind], (num_outputs, num_inputs))
    return None
