"""Which tile a product of few rows with quantized weights runs with, from a table. Knows shapes; knows no tensors.

As in tiles.py the table's shapes are those of a 7B model, and another shape takes the tile of the nearest one. No tile
means that products of so many rows are computed otherwise (quantized.py). Reading the weights is what few rows cost,
whatever the device, so the tables serve all that can run them. Measured on an H200 by
`benchmarks/quantized_linear_gpu.py` (docs/results/quantized_linear_gpu.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from autobot_llm.engine.kernels.gpu.tiles import Kind, RowsTile, nearest

MAX_EXACT_ROWS = 16
"""Up to so many rows activations are kept as they are, even where the scheme rounds them: closer to the unrounded
model, and hardly slower. At 32 rounding them takes 15 % off."""

# For each kind: (outputs, inputs) to tile. The outputs of a gated product are those of one half of its weight.
Shapes: TypeAlias = Mapping[Kind, Mapping[tuple[int, int], RowsTile]]
_QKV, _O, _GATE_UP, _DOWN = (6144, 4096), (4096, 4096), (14336, 4096), (4096, 14336)


def _shapes(qkv: RowsTile, o: RowsTile, gate_up: RowsTile, down: RowsTile) -> Shapes:
    return {Kind.PLAIN: {_O: o, _DOWN: down}, Kind.NORM: {_QKV: qkv}, Kind.GATED: {_GATE_UP: gate_up}}


def _tile(block_o: int, num_warps: int, num_stages: int, num_splits: int, block_i: int = 128) -> RowsTile:
    return RowsTile(
        block_o, block_i, num_warps, num_stages, num_splits, fold_norm=False, prefetch_bytes=512, evict_first=True
    )


# For each width in bits: the most rows of a table, ascending, and the table.
TABLES: Mapping[int, tuple[tuple[int, Shapes], ...]] = {
    8: (
        (8, _shapes(_tile(64, 4, 4, 4, block_i=256), _tile(64, 4, 6, 8), _tile(16, 1, 6, 1), _tile(64, 4, 6, 8))),
        (16, _shapes(_tile(32, 2, 4, 4), _tile(64, 2, 4, 8), _tile(32, 2, 4, 4), _tile(64, 2, 4, 8))),
        (32, _shapes(_tile(32, 2, 4, 4), _tile(64, 2, 4, 8), _tile(32, 2, 4, 1), _tile(64, 2, 4, 8))),
    ),
    4: (
        (8, _shapes(_tile(64, 4, 6, 4), _tile(32, 2, 6, 4), _tile(64, 4, 6, 1), _tile(64, 4, 6, 4))),
        (16, _shapes(_tile(32, 2, 4, 4), _tile(64, 2, 4, 8), _tile(32, 2, 4, 1), _tile(64, 2, 4, 8))),
        (32, _shapes(_tile(64, 4, 4, 2), _tile(64, 4, 4, 4), _tile(64, 4, 4, 2), _tile(64, 4, 4, 4))),
    ),
}


def choose_quantized_tile(
    kind: Kind, num_rows: int, num_outputs: int, num_inputs: int, num_bits: int, *, may_round: bool = False
) -> RowsTile | None:
    """The tile for this product; None for more rows than one is made for, or where rounding activations is quicker."""
    if may_round and num_rows > MAX_EXACT_ROWS:
        return None
    for most_rows, shapes in TABLES[num_bits]:
        if num_rows <= most_rows:
            return nearest(shapes[kind], (num_outputs, num_inputs))
    return None
