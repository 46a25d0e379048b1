"""What quantized_linear_gpu.py tries: ways to multiply by quantized weights, for each format and number of rows."""

from __future__ import annotations

import itertools
from typing import Any, TypeAlias

from linear_gpu import Shape

from autobot_llm.engine.kernels.gpu.block_tiles import FEWEST_ROWS, MOST_ROWS, BlockTile, filled
from autobot_llm.engine.kernels.gpu.many_tiles import Library, ManyTile, Way
from autobot_llm.engine.kernels.gpu.quantized_tiles import MAX_EXACT_ROWS
from autobot_llm.engine.kernels.gpu.stream_tiles import MAX_STREAMED_ROWS, Format, StreamTile
from autobot_llm.engine.kernels.gpu.streamed import MULTIPROCESSOR_BYTES, SYSTEM_BYTES, shared_bytes
from autobot_llm.engine.kernels.gpu.tiles import Kind, RowsTile

GROUP = 128  # inputs that share a scale, of 4 bits
MULTIPROCESSORS = 132
STREAMED = {"int8": Format.INT8, "fp8": Format.FLOAT8, "int4": Format.INT4}

Candidate: TypeAlias = RowsTile | StreamTile | BlockTile | Way


def candidates(fmt: str, num_rows: int, shape: Shape) -> list[Candidate]:
    """What is worth a try: no more sums than half of a thread's registers."""
    tiles: list[Candidate] = block_candidates(fmt, num_rows, shape)
    if not fmt.endswith("a8"):
        tiles += row_candidates(fmt, num_rows)
        tiles += stream_candidates(fmt, num_rows, shape)
    if num_rows >= 32:
        tiles += rounded_candidates(fmt, num_rows) if fmt.endswith("a8") else many_candidates(fmt, num_rows)
    halves = 2 if shape.kind is Kind.GATED else 1
    return [
        tile
        for tile in tiles
        if not isinstance(tile, ManyTile) or halves * tile.block_t * tile.block_o <= 128 * 32 * tile.num_warps
    ]


def row_candidates(fmt: str, num_rows: int) -> list[Candidate]:
    """Few bytes are in flight in each program, so many programs or many stages are wanted."""
    options: dict[str, Any] = {"fold_norm": False, "prefetch_bytes": 512, "evict_first": True}
    tiles: list[Candidate] = []
    if num_rows <= 8:  # the older matrix instructions, whatever the warps
        tiles += [RowsTile(64, 128, 4, 6, num_splits=n, **options) for n in (1, 2, 4, 8)]
        tiles += [RowsTile(32, 128, 2, 6, num_splits=n, **options) for n in (2, 4)]
        farther = options | {"prefetch_bytes": 1024}
        tiles += [RowsTile(64, 128, 4, 6, num_splits=n, **farther) for n in (2, 4)]
        tiles += [RowsTile(16, 128, 1, 6, num_splits=n, **options) for n in (1, 2)]
        tiles += [RowsTile(64, 256, 4, 4, num_splits=n, **options) for n in (1, 2, 4)] if fmt != "int4" else []
    elif num_rows <= 32:
        tiles += [RowsTile(64, 128, 2, 4, num_splits=n, **options) for n in (1, 2, 4, 8)]
        tiles += [RowsTile(32, 128, 2, 4, num_splits=n, **options) for n in (1, 2, 4)]
        tiles += [RowsTile(64, 128, 4, 4, num_splits=n, **options) for n in (2, 4)]
    elif num_rows <= 128:
        tiles += [RowsTile(64, 128, 4, 2, num_splits=2, **options), RowsTile(128, 128, 8, 2, num_splits=2, **options)]
    return tiles


def stream_candidates(fmt: str, num_rows: int, shape: Shape) -> list[Candidate]:
    """As many stages as shared memory has room for, for each program of a multiprocessor."""
    if num_rows > MAX_STREAMED_ROWS:
        return []
    weight_rows, num_inputs = shape.weight_shape
    tiles: list[Candidate] = []
    for warps, segment, blocks, resident, x_stays in itertools.product(
        (4, 8), (512, 1024, 2048), (1, 2, 4), (1, 2), (False, True)
    ):
        is_whole = segment // warps >= 128 and weight_rows % (16 * blocks) == 0
        if (
            not is_whole
            or weight_rows // (16 * blocks) < 2 * MULTIPROCESSORS // 3
            or (shape.kind is Kind.GATED and blocks == 1)
        ):
            continue
        for num_stages in range(8, 1, -1):
            tile = StreamTile(warps, segment, num_stages, blocks, resident, x_stays)
            size = shared_bytes(tile, STREAMED[fmt], GROUP, num_inputs, num_rows, offsets=False) + SYSTEM_BYTES
            if size * resident <= MULTIPROCESSOR_BYTES:
                tiles.append(tile)
                break
    return tiles


def block_candidates(fmt: str, num_rows: int, shape: Shape) -> list[Candidate]:
    """As many programs as fill the device once or twice, or, of wide products, whatever there are."""
    stored, rounded = fmt.removesuffix("a8"), fmt.endswith("a8")
    fewest = MAX_EXACT_ROWS + 1 if rounded else FEWEST_ROWS
    if stored not in STREAMED or not fewest <= num_rows <= MOST_ROWS:
        return []
    weight_rows, num_inputs = shape.weight_shape
    tiles: list[Candidate] = []
    tiles_of_x = (0, 64) if stored == "int4" and num_rows > 64 else (0,)
    for (groups, turns), rows, parts, segment, resident in itertools.product(
        ((1, 1), (2, 1), (2, 2)), tiles_of_x, (1, 2, 4), (64, 128), (1, 2, 3)
    ):
        if turns > 1 and (rounded or resident > 1):
            continue
        programs = weight_rows // (64 * groups // turns) * parts * (2 if rows else 1)
        if programs < 2 * MULTIPROCESSORS // 3 or (parts > 1 and programs > 2 * MULTIPROCESSORS + 36):
            continue
        if segment != 128 and (rounded or (stored != "int4" and num_rows <= 64)):
            continue
        if (num_inputs // 2 if stored == "int4" else num_inputs) % (segment * parts):
            continue
        empty = BlockTile(groups, parts, segment, resident=resident, rows=rows, turns=turns)
        tile = filled(empty, num_rows, STREAMED[stored], rounded=rounded, offsets=False)
        if tile.num_stages >= 2:
            tiles.append(tile)
    return tiles


def many_candidates(fmt: str, num_rows: int) -> list[Candidate]:
    """Weights become numbers on their way: a large tile of rows shares that work, several programs hide it."""
    if num_rows <= 64:
        return [
            *(ManyTile(64, 64, 64, 4, 4, num_splits=n, prefetch_bytes=256) for n in (1, 2, 4)),
            *(ManyTile(64, 64, 128, 4, 3, num_splits=n, prefetch_bytes=256) for n in (1, 2, 4)),
            *(ManyTile(64, 128, 64, 4, 3, num_splits=n, prefetch_bytes=256) for n in (2, 4, 8)),
        ]
    if num_rows <= 128:
        return [
            *(ManyTile(128, 64, 64, 4, 3, num_splits=n, prefetch_bytes=256) for n in (1, 2, 4)),
            *(ManyTile(128, 128, 64, 8, 3, num_splits=n, prefetch_bytes=256) for n in (1, 2, 4)),
            *(ManyTile(128, 128, 64, 8, 2, num_splits=n, prefetch_bytes=256) for n in (1, 2, 4)),
            ManyTile(64, 128, 64, 4, 3, num_splits=2),
            ManyTile(128, 128, 32, 8, 4, num_splits=4),
        ]
    tiles: list[Candidate] = [ManyTile(128, 128, 64, 8, 3, num_splits=n) for n in ((1, 2) if num_rows <= 256 else (1,))]
    tiles += [ManyTile(128, 64, 64, 4, 3), ManyTile(128, 128, 64, 8, 2), Library.PARTS]
    return tiles if fmt == "int4" else [*tiles, ManyTile(256, 128, 64, 8, 2)]


def rounded_candidates(fmt: str, num_rows: int) -> list[Candidate]:
    tiles: list[Candidate] = [Library.SCALED] if fmt == "fp8a8" else []
    if num_rows <= 64:
        tiles += [ManyTile(64, 64, 128, 4, 4, num_splits=n, prefetch_bytes=512) for n in (1, 2, 4)]
        tiles += [ManyTile(64, 128, 128, 4, 4, num_splits=n, prefetch_bytes=512) for n in (2, 4)]
        tiles += [ManyTile(64, 64, 256, 4, 3, num_splits=2, prefetch_bytes=512)]
    elif num_rows <= 128:
        tiles += [ManyTile(128, 64, 128, 4, 4, num_splits=n, prefetch_bytes=512) for n in (1, 2, 4)]
        tiles += [ManyTile(128, 128, 128, 8, 3, num_splits=n, prefetch_bytes=512) for n in (1, 2, 4)]
        tiles += [ManyTile(64, 128, 128, 4, 4, num_splits=2, prefetch_bytes=512)]
    else:
        tiles += [ManyTile(128, 128, 128, 8, 3), ManyTile(128, 128, 128, 8, 4), ManyTile(128, 128, 128, 4, 3)]
        tiles += [ManyTile(128, 256, 128, 8, 3), ManyTile(256, 128, 128, 8, 3)]
        tiles += [ManyTile(128, 128, 128, 8, 3, num_splits=n) for n in (2, 4)] if num_rows <= 256 else []
    return tiles
