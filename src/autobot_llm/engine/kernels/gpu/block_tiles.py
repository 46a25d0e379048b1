"""How streamed_blocks.cu cuts a product of 17 to 128 rows. Knows shapes; knows no tensors.

Chosen by a rule, from what was measured on an H200 by `benchmarks/quantized_linear_gpu.py`
(docs/results/quantized_linear_gpu.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from autobot_llm.engine.kernels.gpu.stream_tiles import Format

FEWEST_ROWS, MOST_ROWS = 17, 128
_RING_BYTES = 200 << 10  # of a multiprocessor's shared memory; small kernels find room beside it
_MOST_STAGES = 16
_MULTIPROCESSORS = 132
_ALIGNMENT = 1024
_OTHER_REGISTERS = 44  # of a thread, beside its sums and its numbers of W


@dataclass(frozen=True, slots=True)
class BlockTile:
    """Warpgroups of a program; programs that share a tile's inputs; bytes of a row of W in a stage of the ring; stages;
    programs on a multiprocessor.

    Of 4 bits also: units of 64 rows of W in a tile (0: one a warpgroup), rows of x in a tile, and of those how many a
    warpgroup multiplies with at a time (0: all; otherwise 32, 64 or 128).
    """

    num_warpgroups: int
    parts: int
    segment: int
    num_stages: int = 0
    resident: int = 1
    units: int = 0
    rows: int = 0
    columns: int = 0

    @property
    def weight_rows(self) -> int:
        """Of W, in a tile."""
        return 64 * (self.units or self.num_warpgroups)

    def tile_rows(self, num_rows: int) -> int:
        """Of x, in a tile."""
        return self.rows or padded_rows(num_rows)


def padded_rows(num_rows: int) -> int:
    """What the kernel is compiled for: 32, 64 or 128 rows."""
    return next(most for most in (32, 64, MOST_ROWS) if num_rows <= most)


def stage_bytes(tile: BlockTile, num_rows: int, fmt: Format, *, rounded: bool, offsets: bool) -> int:
    """Shared memory of one stage of the ring, as streamed_blocks.cu lays it out."""
    rows, inputs = tile.tile_rows(num_rows), tile.segment * (2 if fmt is Format.INT4 else 1)
    scales = 2 * tile.weight_rows * 2 * (1 + offsets) if fmt is Format.INT4 else 0
    size = tile.weight_rows * tile.segment + inputs * rows * (1 if rounded else 2) + scales
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def shared_bytes(tile: BlockTile, num_rows: int, fmt: Format, *, rounded: bool, offsets: bool) -> int:
    """Of a program: the ring, where a tile's sums come once it is empty, and two barriers for each stage."""
    ring = tile.num_stages * stage_bytes(tile, num_rows, fmt, rounded=rounded, offsets=offsets)
    return max(ring, tile.tile_rows(num_rows) * (tile.weight_rows + 4) * 4) + tile.num_stages * 16


def filled(tile: BlockTile, num_rows: int, fmt: Format, *, rounded: bool, offsets: bool) -> BlockTile:
    """This tile with as many stages as there is room for."""
    stage = stage_bytes(tile, num_rows, fmt, rounded=rounded, offsets=offsets) + 16
    return replace(tile, num_stages=min(_RING_BYTES // tile.resident // stage, _MOST_STAGES))


def moves_registers(tile: BlockTile, num_rows: int, fmt: Format) -> bool:
    """Whether the sums of 4 bits need more registers than a program's threads have if each has the same."""
    rows, warps = tile.tile_rows(num_rows), 4 * tile.num_warpgroups + 1
    own_units = -(-tile.weight_rows // 64 // tile.num_warpgroups)
    needed = own_units * rows // 2 + (tile.columns or rows) // 2 + tile.segment // 4 + _OTHER_REGISTERS
    return fmt is Format.INT4 and tile.resident == 1 < tile.num_warpgroups and needed > 512 // -(-warps // 4)


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
    segment = 128
    if not rounded and (num_rows > 64 or (group and group % 128)):
        segment = 64  # x is most of a stage; a stage's scales are those of one group
    num_tiles = weight_rows // 64
    if row_bytes % segment:
        return None
    parts = 2 if 2 * num_tiles <= _MULTIPROCESSORS and row_bytes % (2 * segment) == 0 else 1
    is_wide = num_tiles >= 2 * _MULTIPROCESSORS
    # Where little is left of a program's time between its first bytes and its sums, or there are several for each
    # multiprocessor, half a ring each lets the next ones begin.
    if rounded:
        halves = is_wide or (parts == 2 and num_rows <= 32 and row_bytes <= 8192)
    else:
        halves = num_rows <= 64 and parts == 1
    tile = BlockTile(2 if is_wide and (rounded or num_rows > 64) else 1, parts, segment, resident=2 if halves else 1)
    return filled(tile, num_rows, fmt, rounded=rounded, offsets=offsets)
