"""Which tile a product of few rows runs with, from a table. Knows shapes and figures; knows no tensors and no kernels.

The shapes in the table are those of a 7B model (Mistral); another shape takes the tile of the nearest one, by the
ratios of its sides. None, or no entry for a number of rows, means that torch's own product (cuBLAS) is as fast there.
"""

# Measured on an H200 by benchmarks/linear_gpu.py, which prints such a table (docs/log.md).

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias, TypeVar


class Kind(Enum):
    """What rides along with a product, as far as its speed is concerned."""

    PLAIN = "plain"  # alone, or added to a residual
    NORM = "norm"  # RMSNorm before it
    GATED = "gated"  # RMSNorm before it, gated SiLU after it


@dataclass(frozen=True, slots=True)
class MatvecTile:
    """How `matvec_kernel` cuts a product of one row: outputs and inputs of a tile of W, warps of a program."""

    block_o: int
    block_i: int
    num_warps: int
    fold_norm: bool = True
    prefetch_bytes: int = 0
    evict_first: bool = False


@dataclass(frozen=True, slots=True)
class RowsTile:
    """How `rows_kernel` cuts a product: outputs and inputs of a tile of W, warps, tiles in flight, splits of inputs.

    `fold_norm`: RMSNorm in the kernel, not before it. `prefetch_*`: what is asked for before the previous kernel ends.
    """

    block_o: int
    block_i: int
    num_warps: int
    num_stages: int
    num_splits: int = 1
    fold_norm: bool = True
    prefetch_tile: bool = False
    prefetch_bytes: int = 0
    evict_first: bool = False


Tile: TypeAlias = MatvecTile | RowsTile
AnyTile = TypeVar("AnyTile")

MAX_ROWS = 128  # above it every product is torch's

# For each kind and number of rows (rounded up to a power of two): (outputs, inputs) to tile. The outputs of a gated
# product are those of one half of its weight.
Table: TypeAlias = Mapping[tuple[Kind, int], Mapping[tuple[int, int], Tile | None]]

HOPPER: Table = {
    (Kind.PLAIN, 1): {
        (4096, 4096): MatvecTile(16, 512, 8, prefetch_bytes=2048, evict_first=True),
        (4096, 14336): MatvecTile(16, 512, 8, prefetch_bytes=2048, evict_first=True),
    },
    (Kind.NORM, 1): {
        (6144, 4096): MatvecTile(16, 256, 4, prefetch_bytes=1024, evict_first=True),
        (32000, 4096): MatvecTile(16, 256, 4, prefetch_bytes=1024, evict_first=True),
    },
    (Kind.GATED, 1): {(14336, 4096): MatvecTile(8, 256, 4, fold_norm=False, prefetch_bytes=1024, evict_first=True)},
    **{
        (kind, rows): shapes
        for rows in (2, 4, 8, 16)
        for kind, shapes in {
            Kind.PLAIN: {
                (4096, 4096): RowsTile(64, 128, 4, 4, num_splits=2, prefetch_bytes=2048),
                (4096, 14336): RowsTile(64, 128, 4, 4, num_splits=4, prefetch_bytes=512),
            },
            Kind.NORM: {
                (6144, 4096): RowsTile(64, 128, 4, 4, num_splits=2, fold_norm=False, prefetch_bytes=512),
                (32000, 4096): RowsTile(64, 128, 4, 4, fold_norm=False, prefetch_bytes=512),
            },
            Kind.GATED: {(14336, 4096): RowsTile(64, 128, 4, 3, fold_norm=False, prefetch_bytes=512)},
        }.items()
    },
    (Kind.PLAIN, 32): {
        (4096, 4096): RowsTile(64, 128, 4, 4, num_splits=4, prefetch_bytes=512),
        (4096, 14336): RowsTile(128, 128, 8, 4, num_splits=4, prefetch_bytes=512),
    },
    (Kind.NORM, 32): {
        (6144, 4096): RowsTile(64, 128, 4, 4, num_splits=2, fold_norm=False, prefetch_bytes=512),
        (32000, 4096): RowsTile(64, 128, 4, 4, fold_norm=False, prefetch_bytes=512),
    },
    (Kind.GATED, 32): {(14336, 4096): RowsTile(64, 64, 4, 4, fold_norm=False, prefetch_bytes=512)},
    (Kind.PLAIN, 64): {
        (4096, 4096): None,
        (4096, 14336): RowsTile(128, 128, 8, 3, num_splits=4, prefetch_bytes=512),
    },
    (Kind.NORM, 64): {
        (6144, 4096): None,
        (32000, 4096): RowsTile(128, 128, 8, 3, fold_norm=False, prefetch_bytes=512),
    },
    (Kind.GATED, 64): {(14336, 4096): RowsTile(128, 64, 8, 4, fold_norm=False, prefetch_bytes=512)},
    (Kind.NORM, 128): {
        (6144, 4096): None,
        (32000, 4096): RowsTile(128, 64, 8, 4, fold_norm=False, prefetch_bytes=512),
    },
    (Kind.GATED, 128): {(14336, 4096): RowsTile(128, 64, 8, 4, fold_norm=False, prefetch_bytes=512)},
}


def choose_tile(
    kind: Kind, num_rows: int, num_outputs: int, num_inputs: int, capability: tuple[int, int]
) -> Tile | None:
    """The tile for this product on a device of this compute capability, or None where torch's product is to be used.

    One row needs no matrix units, so its tiles serve every device; the others are Hopper's.
    """
    if num_rows > MAX_ROWS or (num_rows > 1 and capability[0] != 9):
        return None
    shapes = HOPPER.get((kind, 1 << (num_rows - 1).bit_length()))
    return None if shapes is None else nearest(shapes, (num_outputs, num_inputs))


def nearest(shapes: Mapping[tuple[int, int], AnyTile], shape: tuple[int, int]) -> AnyTile:
    """What the table has for the shape that is most like this one, by the ratios of its sides."""
    return min(shapes.items(), key=lambda entry: _distance(entry[0], shape))[1]


def _distance(shape: tuple[int, int], other: tuple[int, int]) -> float:
    return sum(abs(math.log(side / other_side)) for side, other_side in zip(shape, other, strict=True))
