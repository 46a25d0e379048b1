"""Where the nodes of a draft tree's levels stand, and what of the cache they see, before the first of them is known.
Knows places and work items; knows nothing of tokens.

A level's nodes follow each other in the cache, behind the context and the levels before theirs. Its work items are
those of the root, the last one of a sequence so much longer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from autobot_llm.engine.attention.paged import BLOCK_SIZE
from autobot_llm.engine.kernels.gpu.launch import first_launch_options, lean


# S sequences, B branches, L levels, M nodes of a level of all sequences, I work items
@lean
@triton.jit(do_not_specialize=["num_items"])
def _levels_kernel(  # type: ignore[no-untyped-def]
    root_items_ptr, tables_ptr, context_lens_ptr, root_positions_ptr,
    items_ptr, tree_rows_ptr, positions_ptr, slots_ptr, table_stride, num_items,
    B: tl.constexpr, M: tl.constexpr, ITEMS: tl.constexpr, PAGE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    level = tl.program_id(0)
    i = tl.arange(0, ITEMS)
    inside = i < num_items
    root_ptrs = root_items_ptr + i * 8
    item_ptrs = items_ptr + (level * num_items + i) * 8
    is_item = inside & (tl.load(root_ptrs, inside, -1) >= 0)
    context = tl.load(root_ptrs + 7, inside, 0) + (level + 1) * B
    is_last = i == tl.load(root_ptrs + 3, inside, 0) + tl.load(root_ptrs + 4, inside, 0) - 1
    for field in tl.static_range(8):
        value = tl.load(root_ptrs + field, inside, 0)
        if field == 2:  # its end
            value = tl.where(is_last, context, value)
        elif field == 5:  # its first query row
            value *= B
        elif field == 6:  # its query rows
            value = value * 0 + B
        elif field == 7:
            value = context
        tl.store(item_ptrs + field, tl.where(is_item, value, -1), inside)

    m = tl.arange(0, M)
    sequence = m // B
    length = tl.load(context_lens_ptr + sequence)
    place = length + level * B + m % B
    block = tl.load(tables_ptr + sequence * table_stride + place // PAGE, length > 0, 0)
    node = level * M + m
    tl.store(slots_ptr + node, tl.where(length > 0, block * PAGE + place % PAGE, -1))
    tl.store(positions_ptr + node, tl.load(root_positions_ptr + sequence) + level + 1)
    tl.store(tree_rows_ptr + node * 4 + 2, length)  # before it, all is seen; behind it, what the mask says
    tl.store(tree_rows_ptr + node * 4 + 3, length + level)


def write_levels(root: Mapping[str, torch.Tensor], levels: Mapping[str, torch.Tensor], num_branches: int) -> None:
    """Fill the `levels`, arrays of `levels_layout` but for their masks, from the `root`'s, those of `draft_layout`. The
    kernel after it must start when it has ended: later ones read before they wait."""
    num_levels, num_items, _ = levels["items"].shape
    num_nodes = levels["slots"].shape[1]
    assert num_nodes == triton.next_power_of_2(num_nodes) == len(root["context_lens"]) * num_branches
    _levels_kernel[(num_levels,)](
        root["items"],
        root["block_tables"],
        root["context_lens"],
        root["root_positions"],
        levels["items"],
        levels["tree_rows"],
        levels["positions"],
        levels["slots"],
        root["block_tables"].stride(0),
        num_items,
        B=num_branches,
        M=num_nodes,
        ITEMS=triton.next_power_of_2(num_items),
        PAGE=BLOCK_SIZE,
        num_warps=4,
        **first_launch_options(root["items"].device),
    )
