"""The arrays of a captured draft of EAGLE-3: which there are for so many sequences and levels, and how a draft is
written into them. Knows layouts and work lists; captures and launches nothing.

All that the levels of a tree need is known before the first of them runs, but for tokens, features and masks: a level
has the same number of nodes whatever they are, so their rows in the cache and the contexts they see are set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from autobot_llm.engine.attention.paged import BLOCK_SIZE, ITEM_FIELDS, TREE_FIELDS, plan_items
from autobot_llm.engine.gpu.staging import Layout
from autobot_llm.engine.speculative.eagle.on_device import Roots, Taken

SIZES = (1, 2, 4, 8)
"""Numbers of sequences with graphs of their own; more take several."""

NUM_BRANCHES = 8
"""Tokens that are looked at after each node, and nodes of a level that go on."""

MAX_DEPTH = 8

ROOT_ROWS = 8
"""Tokens of a sequence that are taken in by a captured draft: as many as a step verifies, and a few."""

Arrays = Mapping[str, npt.NDArray[Any]]


def num_tree_rows(depth: int) -> int:
    """Rows of the cache that a tree of so many levels takes: its last level is never passed through."""
    return NUM_BRANCHES * (depth - 1)


# T tokens, S sequences, D levels, M nodes of a level of all sequences, I work items
def draft_layout(num_sequences: int, depth: int, *, table_width: int, spare_items: int) -> Layout:
    """Arrays of a draft, padded to so many sequences. Those of levels have entries for all but the first."""
    num_tokens, num_nodes = num_sequences * ROOT_ROWS, num_sequences * NUM_BRANCHES
    shapes: dict[str, tuple[int, ...]] = {
        "items": (depth, num_sequences + spare_items, ITEM_FIELDS),
        "block_tables": (num_sequences, table_width),
        "stream_rows": (num_tokens,),
        "ids": (num_tokens,),
        "positions": (num_tokens,),
        "slots": (num_tokens,),
        "last_rows": (num_sequences,),
        "num_chosen": (1,),
    }
    if depth > 1:
        levels = (depth - 1, num_nodes)
        shapes |= {"tree_rows": (*levels, TREE_FIELDS), "level_positions": levels, "level_slots": levels}
    return Layout.of({name: (shape, np.int32) for name, shape in shapes.items()})


def fill_draft(
    host: Arrays, taken: Taken, stream_rows: npt.ArrayLike, roots: Roots, num_chosen: int, *, window: int = 0
) -> None:
    """Write a draft into arrays of `draft_layout`, and make what it leaves padding, which touches no cache.
    `stream_rows`: where the features of the tokens lie; `window`: what the layer sees, 0 for all."""
    num_tokens = len(taken.ids_T)
    for name, values, padding in (
        ("stream_rows", stream_rows, 0),
        ("ids", taken.ids_T, 0),
        ("positions", taken.positions_T, 0),
        ("slots", taken.slots_T, -1),
    ):
        host[name][:num_tokens] = values
        host[name][num_tokens:] = padding
    lens_S, tables_SB = roots.context_lens_S, roots.block_tables_SB
    num_sequences = len(lens_S)
    host["last_rows"][:num_sequences] = roots.last_rows_S
    host["last_rows"][num_sequences:] = 0
    host["num_chosen"][0] = num_chosen
    host["block_tables"][:num_sequences, : tables_SB.shape[1]] = tables_SB
    items_DI8 = host["items"]
    spare_items = items_DI8.shape[1] - len(host["block_tables"])
    starts = np.arange(num_sequences + 1, dtype=np.int32)
    num_items = plan_items(items_DI8[0], starts, lens_S, spare_items=spare_items, window=window)
    items_DI8[:, num_items:] = -1
    num_levels = len(items_DI8) - 1
    if num_levels:
        items_I8 = items_DI8[0, :num_items]
        _fill_levels(host, items_I8, num_levels, taken.positions_T[roots.last_rows_S], roots)


def _fill_levels(host: Arrays, items_I8: npt.NDArray[Any], num_levels: int, positions_S: Any, roots: Roots) -> None:
    """The levels after the first. Each has the work items of the first, the last one of a sequence so much longer."""
    lens_S, tables_SB = roots.context_lens_S, roots.block_tables_SB
    num_sequences, sequences_I = len(lens_S), items_I8[:, 0]
    levels_L = np.arange(1, num_levels + 1, dtype=np.int32)
    items_LI8 = host["items"][1:, : len(items_I8)]
    items_LI8[:] = items_I8
    items_LI8[:, :, 5] *= NUM_BRANCHES
    items_LI8[:, :, 6] = NUM_BRANCHES
    items_LI8[:, :, 7] += (levels_L * NUM_BRANCHES)[:, None]
    is_last_I = np.append(sequences_I[1:] != sequences_I[:-1], True)
    items_LI8[:, is_last_I, 2] = items_LI8[:, is_last_I, 7]

    num_nodes = num_sequences * NUM_BRANCHES
    offsets_LB = np.arange(num_levels * NUM_BRANCHES, dtype=np.int32).reshape(num_levels, 1, NUM_BRANCHES)
    places_LSB = lens_S[:, None] + offsets_LB
    blocks_LSB = tables_SB[np.arange(num_sequences)[:, None], places_LSB // BLOCK_SIZE]
    slots_LSB = blocks_LSB * BLOCK_SIZE + places_LSB % BLOCK_SIZE
    host["level_slots"][:, :num_nodes] = slots_LSB.reshape(num_levels, num_nodes)
    host["level_slots"][:, num_nodes:] = -1
    depths_L11 = levels_L[:, None, None]
    host["level_positions"][:, :num_nodes].reshape(num_levels, num_sequences, NUM_BRANCHES)[:] = (
        positions_S[:, None] + depths_L11
    )
    host["level_positions"][:, num_nodes:] = 0
    rows_LSB4 = host["tree_rows"][:, :num_nodes].reshape(num_levels, num_sequences, NUM_BRANCHES, TREE_FIELDS)
    rows_LSB4[..., 2] = lens_S[:, None]  # before it, all is seen; what is seen behind it, the levels find out
    rows_LSB4[..., 3] = lens_S[:, None] + depths_L11 - 1
