"""How a product of a quantized weight with many rows is computed, from a table. Knows figures; knows no tensors.

The choice is between two libraries and a kernel of ours with one of these tiles: the quickest measured on an H200 by
`benchmarks/quantized_linear_gpu.py` (docs/results/quantized_linear_gpu.md).
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
    """The ways of one number of rows. `narrow`: at most NARROW outputs (the kernel needs splits to fill the device);
    `deep`: of these, products of more than NARROW inputs."""

    narrow: Way
    deep: Way
    wide: Way
    gated: Way


NARROW = 8192

# For each format, and whether rows are rounded, too: up to so many rows, these ways.
Table: TypeAlias = Mapping[tuple[str, bool], tuple[tuple[int, Ways], ...]]

_ANY = 1 << 62


def _rounded(num_splits: int = 1, *, block_i: int = 128, num_stages: int = 4) -> ManyTile:
    """Of few rows: what a tile does with them hides behind reading W."""
    return ManyTile(64, 64, block_i, 4, num_stages, num_splits, prefetch_bytes=512)


def _square(num_warps: int, num_stages: int, num_splits: int = 1, prefetch_bytes: int = 0) -> ManyTile:
    return ManyTile(128, 128, 128, num_warps, num_stages, num_splits, prefetch_bytes)


def _whole(block_o: int, num_splits: int = 1, prefetch_bytes: int = 0, *, num_stages: int = 3) -> ManyTile:
    """Of 128 unrounded rows, for which W becomes numbers on its way."""
    return ManyTile(128, block_o, 64, block_o // 16, num_stages, num_splits, prefetch_bytes)


_FEW_ROUNDED = (
    (32, Ways(narrow=_rounded(4), deep=_rounded(4), wide=_rounded(), gated=_rounded())),
    (64, Ways(narrow=_rounded(2, block_i=256, num_stages=3), deep=_rounded(4), wide=_rounded(), gated=_rounded())),
)
_128_BY_64 = ManyTile(128, 64, 128, 4, 4, prefetch_bytes=512)
_128_BY_64_IN_2 = ManyTile(128, 64, 128, 4, 4, num_splits=2, prefetch_bytes=512)
_128_BY_64_IN_4 = ManyTile(128, 64, 128, 4, 4, num_splits=4, prefetch_bytes=512)
_WIDE = ManyTile(128, 256, 128, 8, 3)
_PARTS, _SCALED = Library.PARTS, Library.SCALED
_BYTES = (
    (
        64,
        Ways(
            narrow=ManyTile(64, 64, 128, 4, 3, num_splits=4, prefetch_bytes=256),
            deep=ManyTile(64, 128, 64, 4, 3, num_splits=8, prefetch_bytes=256),
            wide=ManyTile(64, 64, 128, 4, 3, prefetch_bytes=256),
            gated=ManyTile(64, 64, 128, 4, 3, prefetch_bytes=256),
        ),
    ),
    (128, Ways(narrow=_whole(64, 4, 256), deep=_whole(64, 4, 256), wide=_whole(64, 1, 256), gated=_whole(64, 1, 256))),
    (256, Ways(narrow=_PARTS, deep=_whole(128, 2), wide=_PARTS, gated=_whole(64))),
    (1024, Ways(narrow=_PARTS, deep=_whole(64), wide=_PARTS, gated=_PARTS)),
    (_ANY, Ways(narrow=_PARTS, deep=_whole(128), wide=_PARTS, gated=_PARTS)),
)
HOPPER: Table = {
    ("int8", True): (
        *_FEW_ROUNDED,
        (128, Ways(narrow=_128_BY_64_IN_2, deep=_128_BY_64_IN_4, wide=_128_BY_64, gated=_square(8, 3, 1, 512))),
        (256, Ways(narrow=_square(8, 4), deep=_square(8, 3, 2), wide=_square(8, 4), gated=_square(8, 4))),
        (1024, Ways(narrow=_square(8, 3), deep=_square(8, 4), wide=_square(8, 4), gated=_square(8, 4))),
        (_ANY, Ways(narrow=_square(4, 3), deep=_square(4, 3), wide=_square(4, 3), gated=_square(8, 3))),
    ),
    ("fp8", True): (
        *_FEW_ROUNDED,
        (128, Ways(narrow=_128_BY_64_IN_2, deep=_128_BY_64_IN_4, wide=_128_BY_64, gated=_square(8, 3, 2, 512))),
        (256, Ways(narrow=_SCALED, deep=_SCALED, wide=_SCALED, gated=_square(8, 4))),
        (1024, Ways(narrow=_SCALED, deep=_SCALED, wide=_SCALED, gated=_SCALED)),
        # Alone _scaled_mm is as quick or quicker; in whole steps of 2,048 rows it takes 6 % longer.
        (_ANY, Ways(narrow=_WIDE, deep=_WIDE, wide=_WIDE, gated=_square(8, 3))),
    ),
    ("int8", False): _BYTES,
    ("fp8", False): _BYTES,
    ("int4", False): (
        (
            64,
            Ways(
                narrow=ManyTile(64, 128, 64, 4, 3, num_splits=8, prefetch_bytes=256),
                deep=ManyTile(64, 128, 64, 4, 3, num_splits=8, prefetch_bytes=256),
                wide=ManyTile(64, 128, 64, 4, 3, prefetch_bytes=256),
                gated=ManyTile(64, 128, 64, 4, 3, num_splits=2, prefetch_bytes=256),
            ),
        ),
        (
            128,
            Ways(
                narrow=_whole(64, 4, 256), deep=_whole(64, 4, 256), wide=_whole(64, 1, 256), gated=_whole(128, 1, 256)
            ),
        ),
        (256, Ways(narrow=_PARTS, deep=_whole(128, 2), wide=_PARTS, gated=_whole(128))),
        (1024, Ways(narrow=_PARTS, deep=_whole(64), wide=_PARTS, gated=_PARTS)),
        (_ANY, Ways(narrow=_PARTS, deep=_whole(128, num_stages=2), wide=_PARTS, gated=_PARTS)),
    ),
}


def choose_way(
    fmt: str,
    rounded: bool,
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    gated: bool,
    capability: tuple[int, int],
) -> Way:
    """The way for this product on a device of this compute capability. `num_outputs`: of one half, if gated.

    The kernel's tiles are Hopper's; rounded products of another device take the smallest of them.
    """
    ways = HOPPER[fmt, rounded]
    if capability[0] != 9:
        return _rounded() if rounded else Library.PARTS
    found = next(ways for most_rows, ways in ways if num_rows <= most_rows)
    if gated:
        return found.gated
    if num_outputs > NARROW:
        return found.wide
    return found.narrow if num_inputs <= NARROW else found.deep
