"""How streamed_blocks.cu cuts a product of 9 to 128 rows. Knows shapes; knows no tensors.

Chosen by a rule, from what was measured on an H200 by `benchmarks/quantized_linear_gpu.py`
(docs/results/quantized_linear_gpu.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from autobot_llm.engine.kernels.gpu.stream_tiles import Format

FEWEST_ROWS, MOST_ROWS = 9, 128
_RING_BYTES = 200 << 10  # of a multiprocessor's shared memory; small kernels find room beside it
_MOST_STAGES = 16
_MULTIPROCESSORS = 132
_ALIGNMENT = 1024


@dataclass(frozen=True, slots=True)
class BlockTile:
    """Warpgroups of a program, each with 64 rows of W; programs that share a tile's inputs; bytes of a row of W in a
    stage of the ring; stages; programs on a multiprocessor; rows of x in a tile (0: all); warpgroups that have the same
    rows of W, and take stages in turns."""

    num_warpgroups: int
    parts: int
    segment: int
    num_stages: int = 0
    resident: int = 1
    rows: int = 0
    turns: int = 1

    @property
    def weight_rows(self) -> int:
        """Of W, in a tile."""
        return 64 * self.num_warpgroups // self.turns

    def tile_rows(self, num_rows: int) -> int:
        """Of x, in a tile."""
        return self.rows or padded_rows(num_rows)


def padded_rows(num_rows: int) -> int:
    """What the kernel is compiled for: 16, 32, 64 or 128 rows."""
    return next(most for most in (16, 32, 64, MOST_ROWS) if num_rows <= most)


def stage_bytes(tile: BlockTile, num_rows: int, fmt: Format, *, rounded: bool, offsets: bool) -> int:
    """Shared memory of one stage of the ring, as streamed_blocks.cu lays it out."""
    rows, inputs = tile.tile_rows(num_rows), tile.segment * (2 if fmt is Format.INT4 else 1)
    scales = 2 * tile.weight_rows * 2 * (1 + offsets) if fmt is Format.INT4 else 0
    size = tile.weight_rows * tile.segment + inputs * rows * (1 if rounded else 2) + scales
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def shared_bytes(tile: BlockTile, num_rows: int, fmt: Format, *, rounded: bool, offsets: bool) -> int:
    """Of a program: the ring, where a tile's sums come once it is empty, and two barriers for each stage."""
    ring = tile.num_stages * stage_bytes(tile, num_rows, fmt, rounded=rounded, offsets=offsets)
    return max(ring, tile.turns * tile.tile_rows(num_rows) * (tile.weight_rows + 4) * 4) + tile.num_stages * 16


def filled(tile: BlockTile, num_rows: int, fmt: Format, *, rounded: bool, offsets: bool) -> BlockTile:
    """This tile with as many stages as there is room for, each of them always the same warpgroups'."""
    stage = stage_bytes(tile, num_rows, fmt, rounded=rounded, offsets=offsets) + 16
    num_stages = min(_RING_BYTES // tile.resident // stage, _MOST_STAGES)
    return replace(tile, num_stages=num_stages // tile.turns * tile.turns)


def copying_threads(tile: BlockTile, num_rows: int, fmt: Format) -> int:
    """Of a program, beside those that multiply: a warp, or a warpgroup that leaves those its registers.

    Numbers of 4 bits have sums of their group beside those of all. With 128 rows these are more than two warpgroups
    and a warp get.
    """
    return 128 if fmt is Format.INT4 and tile.num_warpgroups == 2 and tile.tile_rows(num_rows) == MOST_ROWS else 32


def choose_block_tile(
    num_rows: int,
    weight_rows: int,
    row_bytes: int,
    fmt: Format,
    *,
    rounded: bool = False,
    offsets: bool = False,
    group: int = 0,
) -> BlockTile | None:
    """The tile for a product; None where rows, outputs or inputs do not fit.

    `weight_rows`: rows of W, both halves' if gated; `row_bytes`: of one of them.
    """
    if not FEWEST_ROWS <= num_rows <= MOST_ROWS or weight_rows % 128:
        return None
    num_units = weight_rows // 64
    if rounded:
        tile = _rounded_tile(num_rows, num_units, row_bytes)
    elif num_rows <= 64 or fmt is Format.INT4:
        tile = _tile(num_rows, num_units, row_bytes, 64 if group and group % 128 else 128)
    else:  # x is most of a stage
        tile = BlockTile(2 if num_units >= 2 * _MULTIPROCESSORS else 1, _parts(num_units, row_bytes, 64), 64)
    if row_bytes % tile.segment:
        return None
    return filled(tile, num_rows, fmt, rounded=rounded, offsets=offsets)


def _parts(num_tiles: int, row_bytes: int, segment: int) -> int:
    return 2 if 2 * num_tiles <= _MULTIPROCESSORS and row_bytes % (2 * segment) == 0 else 1


def _tile(num_rows: int, num_units: int, row_bytes: int, segment: int) -> BlockTile:
    """`num_units`: of 64 rows of W; `segment`: a stage's scales are those of one group."""
    if num_units >= 2 * _MULTIPROCESSORS:
        return BlockTile(2, 1, segment, resident=2 if num_rows <= 32 else 1)
    if num_rows > 64:  # two tiles of x
        return BlockTile(2, _parts(num_units, row_bytes, segment), segment, rows=64)
    # few programs: two warpgroups have a multiprocessor's matrix units do more at once than one
    return BlockTile(2, _parts(num_units, row_bytes, segment), segment, turns=2)


def _rounded_tile(num_rows: int, num_units: int, row_bytes: int) -> BlockTile:
    parts = _parts(num_units, row_bytes, 128)
    is_wide = num_units >= 2 * _MULTIPROCESSORS
    # Where little is left of a program's time between its first bytes and its sums, or there are several for each
    # multiprocessor, half a ring each lets the next ones begin.
    halves = is_wide or (parts == 2 and num_rows <= 32 and row_bytes <= 8192)
    return BlockTile(2 if is_wide else 1, parts, 128, resident=2 if halves else 1)
