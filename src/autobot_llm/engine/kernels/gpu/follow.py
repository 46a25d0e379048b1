"""Move a chain of passes behind the drafts that a step has accepted, before the host knows how many. Knows tokens, rows
and the arrays of a chain; knows nothing of what the passes compute.

The host describes the chain as if no draft were right. How many are is a comparison of the step's tokens with what was
drafted; positions, slots, contexts and noise follow from that number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from autobot_llm.engine.attention.paged import BLOCK_SIZE
from autobot_llm.engine.kernels.gpu.launch import lean

MOST_DRAFTS = 16
"""Draft tokens of a sequence that are looked at, and one: the last of so many is never one."""


# S sequences (padded to W), K passes, I work items of a pass, B blocks of a table
@dataclass(frozen=True, slots=True)
class FollowArrays:
    """int32, but for keys of int64. `first_rows` are rows of the step's tokens, one for each sequence: the choice after
    its last known token; below 0 a sequence's chain stays as it is. Its drafts are in `draft_rows`, `num_drafts` of
    them. `first_positions`: that of the token which `first_rows` holds.

    What is written: two tokens of the first pass (`ids`, `positions`, `slots`, [2 W]), of the others `next_positions`
    and `next_slots` ([K - 1, W]; None: there is no other), `items_KI8`, cut in `item_size`, and `keys_KW`, which are
    taken from a longer table (None: nothing is drawn)."""

    first_rows: torch.Tensor
    num_drafts: torch.Tensor
    draft_rows: torch.Tensor
    first_positions: torch.Tensor
    block_tables_SB: torch.Tensor
    item_size: torch.Tensor
    items_KI8: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    next_positions: torch.Tensor | None
    next_slots: torch.Tensor | None
    keys_table: torch.Tensor | None
    keys_KW: torch.Tensor | None


@triton.jit
def _slots(table_ptr, positions, inside, PAGE: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(table_ptr + positions // PAGE, inside, 0) * PAGE + positions % PAGE


@lean
@triton.jit
def _follow_kernel(  # type: ignore[no-untyped-def]
    tokens_ptr,
    first_rows_ptr,
    num_drafts_ptr,
    draft_rows_ptr,
    first_positions_ptr,
    tables_ptr,
    item_size_ptr,
    items_ptr,
    ids_ptr,
    positions_ptr,
    slots_ptr,
    next_positions_ptr,
    next_slots_ptr,
    keys_table_ptr,
    keys_ptr,
    table_stride,
    width,
    num_items,
    K: tl.constexpr,
    PASSES: tl.constexpr,
    ITEMS: tl.constexpr,
    DRAFTS: tl.constexpr,
    PAGE: tl.constexpr,
):
    s = tl.program_id(0)
    first_row = tl.load(first_rows_ptr + s)
    if first_row < 0:
        return
    number = tl.load(num_drafts_ptr + s)
    j = tl.arange(0, DRAFTS)
    is_draft = j < number
    drafts = tl.load(tokens_ptr + tl.load(draft_rows_ptr + s * DRAFTS + j, is_draft, 0), is_draft, 0)
    chosen = tl.load(tokens_ptr + first_row + j, is_draft, 0)
    num_right = tl.min(tl.where(is_draft & (drafts == chosen), DRAFTS, j), 0)
    last_right = tl.sum(tl.where(j == num_right - 1, drafts, 0), 0)
    tl.store(ids_ptr + 2 * s, last_right, num_right > 0)  # else it is the last token that the host knows
    tl.store(ids_ptr + 2 * s + 1, tl.load(tokens_ptr + first_row + num_right))

    table_ptr = tables_ptr + s * table_stride
    position = tl.load(first_positions_ptr + s) + num_right
    two = tl.arange(0, 2)
    firsts = position - 1 + two
    tl.store(positions_ptr + 2 * s + two, firsts)
    tl.store(slots_ptr + 2 * s + two, _slots(table_ptr, firsts, two < 2, PAGE))
    k = tl.arange(0, PASSES)
    if next_positions_ptr is not None:
        is_next = k < K - 1
        laters = position + 1 + k
        tl.store(next_positions_ptr + k * width + s, laters, is_next)
        tl.store(next_slots_ptr + k * width + s, _slots(table_ptr, laters, is_next, PAGE), is_next)
    if keys_ptr is not None:
        keys = tl.load(keys_table_ptr + (k + num_right) * width + s, k < K, 0)
        tl.store(keys_ptr + k * width + s, keys, k < K)
    size = tl.load(item_size_ptr)
    i = tl.arange(0, ITEMS)
    item_ptrs_KI = items_ptr + (k[:, None] * num_items + i[None, :]) * 8
    inside_KI = (k[:, None] < K) & (i[None, :] < num_items)
    is_own_KI = inside_KI & (tl.load(item_ptrs_KI, inside_KI, -1) == s)
    contexts_KI = position + 1 + k[:, None] + 0 * i[None, :]
    tl.store(item_ptrs_KI + 7, contexts_KI, is_own_KI)
    starts_KI = tl.load(item_ptrs_KI + 1, is_own_KI, 0)
    tl.store(item_ptrs_KI + 2, tl.minimum(starts_KI + size, contexts_KI), is_own_KI)


def follow(tokens_R: torch.Tensor, arrays: FollowArrays) -> None:
    """Queue it: every later kernel sees what it wrote. `tokens_R` (int32) holds the step's tokens and the drafts."""
    num_passes, num_items, _ = arrays.items_KI8.shape
    _follow_kernel[(arrays.block_tables_SB.shape[0],)](
        tokens_R,
        arrays.first_rows,
        arrays.num_drafts,
        arrays.draft_rows,
        arrays.first_positions,
        arrays.block_tables_SB,
        arrays.item_size,
        arrays.items_KI8,
        arrays.ids,
        arrays.positions,
        arrays.slots,
        arrays.next_positions,
        arrays.next_slots,
        arrays.keys_table,
        arrays.keys_KW,
        arrays.block_tables_SB.stride(0),
        arrays.first_rows.shape[0],
        num_items,
        K=num_passes,
        PASSES=triton.next_power_of_2(num_passes),
        ITEMS=triton.next_power_of_2(num_items),
        DRAFTS=MOST_DRAFTS,
        PAGE=BLOCK_SIZE,
        num_warps=4,
    )
