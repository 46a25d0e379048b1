"""The arrays of a captured draft of EAGLE-3: which there are for so many sequences and levels, and how a draft is
written into them. Knows layouts and work lists; captures and launches nothing.

All that the levels of a tree need is known before the first of them runs, but for tokens, features and masks: a level
has the same number of nodes whatever they are, so their rows in the cache and the contexts they see are set. So the
host writes where trees begin, and the device's first kernel what follows from that (kernels/gpu/draft_levels.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from autobot_llm.engine.attention.paged import ITEM_FIELDS, TREE_FIELDS, ItemCut, plan_items
from autobot_llm.engine.gpu.staging import Layout
from autobot_llm.engine.noise import noise_keys
from autobot_llm.engine.speculative.eagle.on_device import Roots, Taken

SIZES = (1, 2, 4, 8)
"""Numbers of sequences with graphs of their own; more take several."""

NUM_BRANCHES = 8
"""Tokens that are looked at after each node, and nodes of a level that go on."""

MAX_DEPTH = 8

_ROOT_ROWS = 8
_LONE_ROOT_ROWS = 32

Arrays = Mapping[str, npt.NDArray[Any]]


def root_rows(num_sequences: int) -> int:
    """Tokens of each of so many sequences that are taken in by a captured draft: as many as a step verifies and a few,
    and of the only one what a run of copies leaves, which would cost as much to take in by itself as a draft does."""
    return max(_ROOT_ROWS, _LONE_ROOT_ROWS // num_sequences)


def num_tree_rows(depth: int) -> int:
    """Rows of the cache that a tree of so many levels takes: its last level is never passed through."""
    return NUM_BRANCHES * (depth - 1)


# T tokens, S sequences, D levels, M nodes of a level of all sequences, I work items
def draft_layout(num_sequences: int, *, table_width: int, spare_items: int) -> Layout:
    """What the host writes of a draft, padded to so many sequences."""
    tokens, sequences = (num_sequences * root_rows(num_sequences),), (num_sequences,)
    shapes: dict[str, tuple[int, ...]] = {
        "items": (num_sequences + spare_items, ITEM_FIELDS),
        "block_tables": (num_sequences, table_width),
        "context_lens": sequences,
        "root_positions": sequences,
        "last_rows": sequences,
        "stream_rows": tokens,
        "ids": tokens,
        "positions": tokens,
        "slots": tokens,
        "num_chosen": (1,),
        "is_drawn": sequences,
        "top_k": sequences,
    }
    return Layout.of(
        {name: (shape, np.int32) for name, shape in shapes.items()}
        | dict.fromkeys(("temperature", "top_p", "min_p"), (sequences, np.float32))
        | {"keys": ((num_sequences, MAX_DEPTH), np.int64)}
    )


def levels_layout(num_sequences: int, depth: int, *, spare_items: int) -> Layout:
    """What the device writes of it: for each level but the first, its work items, and where its nodes stand."""
    nodes = (depth - 1, num_sequences * NUM_BRANCHES)
    shapes: dict[str, tuple[int, ...]] = {
        "items": (depth - 1, num_sequences + spare_items, ITEM_FIELDS),
        "tree_rows": (*nodes, TREE_FIELDS),
        "positions": nodes,
        "slots": nodes,
    }
    return Layout.of({name: (shape, np.int32) for name, shape in shapes.items()})


def fill_draft(
    host: Arrays,
    taken: Taken,
    stream_rows: npt.ArrayLike,
    roots: Roots,
    num_chosen: int,
    *,
    cut: ItemCut,
    window: int = 0,
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
        array = host[name]
        array[:num_tokens] = values
        array[num_tokens:] = padding
    lens_S, tables_SB = roots.context_lens_S, roots.block_tables_SB
    num_sequences = len(lens_S)
    for name, values in (
        ("context_lens", lens_S),
        ("last_rows", roots.last_rows_S),
        ("root_positions", taken.positions_T[roots.last_rows_S]),
    ):
        array = host[name]
        array[:num_sequences] = values
        array[num_sequences:] = 0
    host["num_chosen"][0] = num_chosen
    host["is_drawn"][:] = 0
    for s, (params, position) in enumerate(roots.draws):
        if not params.is_greedy:
            host["is_drawn"][s] = 1
            for name in ("temperature", "top_k", "top_p", "min_p"):
                host[name][s] = getattr(params, name)
            keys_D1 = noise_keys([(params.seed, position + level) for level in range(MAX_DEPTH)])
            host["keys"][s] = keys_D1[:, 0].view(np.int64)
    host["block_tables"][:num_sequences, : tables_SB.shape[1]] = tables_SB
    items_I8 = host["items"]
    spare_items = len(items_I8) - len(host["block_tables"])
    if window:
        starts = np.arange(num_sequences + 1, dtype=np.int32)
        num_items = plan_items(items_I8, starts, lens_S, spare_items=spare_items, window=window)
    else:
        num_items = cut.write(items_I8, lens_S, spare_items)
    items_I8[num_items:] = -1
