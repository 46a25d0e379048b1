"""Which tiles benchmarks/linear_gpu.py tries: at most a dozen for each kind and number of rows. Knows no device.

Bytes in flight decide while there are few rows: a multiprocessor needs some 40 KB of them to be busy. From 64 rows on,
x is read as often as W, so that wide tiles of W win, and the norm is better done once, beforehand.
"""

from __future__ import annotations

from dataclasses import replace

from autobot_llm.engine.kernels.gpu.tiles import Kind, MatvecTile, RowsTile, Tile


def candidates(kind: Kind, num_rows: int) -> list[Tile]:
    """What is worth a try for products of this kind and number of rows, a power of two."""
    gated = kind is Kind.GATED
    if num_rows == 1:
        tiles: list[Tile] = _one_row_gated() if gated else _one_row()
        return tiles if kind is Kind.PLAIN else tiles + [replace(tile, fold_norm=False) for tile in tiles]
    if num_rows <= 32:
        return _few_rows_gated() if gated else _few_rows()
    return _many_rows_gated(num_rows) if gated else _many_rows(num_rows)


def _one_row() -> list[Tile]:
    return [
        MatvecTile(4, 1024, 4, prefetch_bytes=2048, evict_first=True),
        MatvecTile(8, 512, 4, prefetch_bytes=2048, evict_first=True),
        MatvecTile(8, 512, 4, prefetch_bytes=2048),
        MatvecTile(8, 1024, 8, prefetch_bytes=2048, evict_first=True),
        MatvecTile(8, 1024, 4, prefetch_bytes=2048, evict_first=True),
        MatvecTile(16, 256, 4, prefetch_bytes=1024, evict_first=True),
        MatvecTile(16, 512, 8, prefetch_bytes=2048, evict_first=True),
        MatvecTile(4, 512, 2, prefetch_bytes=2048, evict_first=True),
    ]


def _one_row_gated() -> list[Tile]:
    return [
        MatvecTile(4, 512, 4, prefetch_bytes=2048, evict_first=True),
        MatvecTile(4, 512, 4, evict_first=True),
        MatvecTile(8, 512, 8, prefetch_bytes=2048, evict_first=True),
        MatvecTile(8, 256, 4, prefetch_bytes=1024, evict_first=True),
        MatvecTile(8, 256, 8, prefetch_bytes=1024, evict_first=True),
        MatvecTile(2, 256, 1, prefetch_bytes=1024, evict_first=True),
        MatvecTile(4, 256, 2, prefetch_bytes=1024, evict_first=True),
    ]


def _few_rows() -> list[Tile]:
    return [
        RowsTile(64, 128, 4, 4, num_splits=splits, fold_norm=False, prefetch_bytes=512) for splits in (1, 2, 3, 4, 6)
    ] + [
        RowsTile(64, 64, 4, 6, num_splits=3, fold_norm=False, prefetch_bytes=512),
        RowsTile(64, 64, 4, 6, num_splits=4, fold_norm=False, prefetch_bytes=512),
        RowsTile(64, 256, 4, 3, num_splits=4, fold_norm=False, prefetch_bytes=512),
        RowsTile(64, 128, 4, 5, num_splits=4, fold_norm=False, prefetch_bytes=512, evict_first=True),
        RowsTile(128, 64, 4, 5, num_splits=4, fold_norm=False, prefetch_bytes=512),
        RowsTile(128, 128, 8, 4, num_splits=4, fold_norm=False, prefetch_bytes=512),
        RowsTile(128, 128, 8, 4, num_splits=8, fold_norm=False, prefetch_bytes=512),
    ]


def _few_rows_gated() -> list[Tile]:
    return [
        RowsTile(64, 64, 4, 4, fold_norm=False, prefetch_bytes=512),
        RowsTile(64, 64, 4, 6, fold_norm=False, prefetch_bytes=512),
        RowsTile(64, 64, 4, 4, num_splits=2, fold_norm=False, prefetch_bytes=512),
        RowsTile(64, 64, 4, 6, num_splits=2, fold_norm=False, prefetch_bytes=512, evict_first=True),
        RowsTile(64, 128, 4, 3, fold_norm=False, prefetch_bytes=512),
        RowsTile(64, 128, 4, 3, num_splits=2, fold_norm=False, prefetch_bytes=512),
        RowsTile(64, 128, 8, 3, num_splits=2, fold_norm=False, prefetch_bytes=512),
        RowsTile(128, 64, 4, 3, num_splits=2, fold_norm=False, prefetch_bytes=512),
        RowsTile(128, 64, 8, 4, fold_norm=False, prefetch_bytes=512),
        RowsTile(128, 64, 8, 4, num_splits=2, fold_norm=False, prefetch_bytes=512),
        RowsTile(128, 64, 8, 3, num_splits=4, fold_norm=False, prefetch_bytes=512),
    ]


def _many_rows(num_rows: int) -> list[Tile]:
    wide = num_rows > 64
    return [
        RowsTile(64, 64, 4, 5, fold_norm=False, prefetch_bytes=512),
        RowsTile(64, 64, 4, 4, num_splits=2, fold_norm=False, prefetch_bytes=512),
        RowsTile(64, 128, 4, 3, num_splits=3, fold_norm=False, prefetch_bytes=512),
        RowsTile(128, 64, 8 if wide else 4, 4, fold_norm=False, prefetch_bytes=512),
        RowsTile(128, 64, 8 if wide else 4, 3, num_splits=3, fold_norm=False, prefetch_bytes=512),
        RowsTile(128, 64, 8 if wide else 4, 4, num_splits=4, fold_norm=False, prefetch_bytes=512),
        RowsTile(128, 64, 8, 3, num_splits=8, fold_norm=False, prefetch_bytes=512),
        RowsTile(128, 128, 8, 3, fold_norm=False, prefetch_bytes=512),
        RowsTile(128, 128, 8, 3, num_splits=4, fold_norm=False, prefetch_bytes=512),
        RowsTile(256, 64, 8, 4, fold_norm=False, prefetch_bytes=512),
    ]


def _many_rows_gated(num_rows: int) -> list[Tile]:
    wide = num_rows > 64
    return [
        RowsTile(64, 64, 4, 3, fold_norm=False, prefetch_bytes=512),
        RowsTile(64, 64, 4, 4, fold_norm=False, prefetch_bytes=512),
        RowsTile(64, 64, 8, 4, fold_norm=False, prefetch_bytes=512),
        RowsTile(64, 128, 8 if wide else 4, 3, fold_norm=False, prefetch_bytes=512),
        RowsTile(128, 64, 8, 3, fold_norm=False, prefetch_bytes=512),
        RowsTile(128, 64, 8, 4, fold_norm=False, prefetch_bytes=512),
        RowsTile(64, 64, 4, 3, num_splits=2, fold_norm=False, prefetch_bytes=512),
    ]
