"""How a product of a quantized weight with many rows is computed, from a table. Knows figures; knows no tensors.

The choice is between two libraries and a kernel of ours with one of these tiles. By judgement from the arithmetic until
`benchmarks/quantized_linear_gpu.py`, which prints such a table, says better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias


class Library(Enum):
    """A product that is not ours, and what we do around it."""

    PARTS = "weights in numbers, some outputs after the other, then cuBLAS"
    SCALED = "torch._scaled_mm, of two float8 matrices"


@dataclass(frozen=True, slots=True)
class ManyTile:
    """How `many_rows_kernel` cuts a product: rows, outputs and bytes of a row of W in a tile; warps, tiles in flight,
    splits of the inputs; bytes of each row of W that are asked for before the previous kernel ends."""

    block_t: int
    block_o: int
    block_i: int
    num_warps: int
    num_stages: int
    num_splits: int = 1
    prefetch_bytes: int = 0


Way: TypeAlias = ManyTile | Library


@dataclass(frozen=True, slots=True)
class Ways:
    """The ways of one number of rows. `narrow`: at most NARROW outputs (the kernel needs splits to fill the device)."""

    narrow: Way
    wide: Way
    gated: Way


NARROW = 8192

# For each format, and whether rows are rounded, too: up to so many rows, these ways.
Table: TypeAlias = Mapping[tuple[str, bool], tuple[tuple[int, Ways], ...]]

_ANY = 1 << 62
_ROUNDED = (
    (
        64,
        Ways(
            narrow=ManyTile(64, 64, 128, 4, 4, num_splits=4, prefetch_bytes=512),
            wide=ManyTile(64, 64, 128, 4, 4, prefetch_bytes=512),
            gated=ManyTile(64, 64, 128, 4, 3, prefetch_bytes=512),
        ),
    ),
    (
        128,
        Ways(
            narrow=ManyTile(128, 64, 128, 4, 4, num_splits=4, prefetch_bytes=512),
            wide=ManyTile(128, 64, 128, 4, 4, prefetch_bytes=512),
            gated=ManyTile(128, 64, 128, 8, 3, prefetch_bytes=512),
        ),
    ),
    (
        256,
        Ways(
            narrow=ManyTile(128, 128, 128, 8, 4, num_splits=2),
            wide=ManyTile(128, 128, 128, 8, 4),
            gated=ManyTile(128, 128, 128, 8, 3),
        ),
    ),
    (
        _ANY,
        Ways(
            narrow=ManyTile(128, 256, 128, 8, 3),
            wide=ManyTile(128, 256, 128, 8, 3),
            gated=ManyTile(128, 128, 128, 8, 3),
        ),
    ),
)
_PARTS = Ways(narrow=Library.PARTS, wide=Library.PARTS, gated=Library.PARTS)
_BYTES = (
    (
        64,
        Ways(
            narrow=ManyTile(64, 64, 128, 4, 3, num_splits=4, prefetch_bytes=512),
            wide=ManyTile(64, 64, 128, 4, 3, prefetch_bytes=512),
            gated=ManyTile(64, 64, 128, 4, 2, prefetch_bytes=512),
        ),
    ),
    (
        1024,
        Ways(
            narrow=ManyTile(128, 128, 64, 8, 3, num_splits=4),
            wide=ManyTile(128, 128, 64, 8, 3),
            gated=ManyTile(128, 64, 64, 8, 3),
        ),
    ),
    (_ANY, _PARTS),
)
HOPPER: Table = {
    ("int8", True): _ROUNDED,
    ("fp8", True): _ROUNDED,
    ("int8", False): _BYTES,
    ("fp8", False): _BYTES,
    ("int4", False): (
        (
            64,
            Ways(
                narrow=ManyTile(64, 64, 64, 4, 3, num_splits=4, prefetch_bytes=256),
                wide=ManyTile(64, 64, 64, 4, 3, prefetch_bytes=256),
                gated=ManyTile(64, 64, 64, 4, 3, prefetch_bytes=256),
            ),
        ),
        (
            1024,
            Ways(
                narrow=ManyTile(128, 128, 64, 8, 3, num_splits=4),
                wide=ManyTile(128, 128, 64, 8, 3),
                gated=ManyTile(128, 64, 64, 8, 3),
            ),
        ),
        (_ANY, _PARTS),
    ),
}


def choose_way(
    fmt: str, rounded: bool, num_rows: int, num_outputs: int, gated: bool, capability: tuple[int, int]
) -> Way:
    """The way for this product on a device of this compute capability. `num_outputs`: of one half, if gated.

    The kernel's tiles are Hopper's; rounded products of another device take the smallest of them.
    """
    ways = HOPPER[fmt, rounded]
    if capability[0] != 9:
        return _ROUNDED[0][1].wide if rounded else Library.PARTS
    found = next(ways for most_rows, ways in ways if num_rows <= most_rows)
    if gated:
        return found.gated
    return found.narrow if num_outputs <= NARROW else found.wide
