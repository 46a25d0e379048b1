"""What a step on a GPU asks of attention, and the host's planning of it. Knows block tables and lengths; knows nothing
of kernels.

The cache is paged by head: a layer's keys and values are [num_blocks, K, 16, D], so that a block's 16 positions of one
head are adjacent. Keys and values of the step's own tokens are in the cache before attention runs.

A decode step is bound by reading the cache, and its contexts may differ a thousandfold. So each context is cut into
work items of one size, chosen per step such that the items fill the device once: one launch, of one fixed grid, is
evenly loaded whatever the lengths. An item carries all that its program needs, so that no load waits for another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from autobot_llm.engine.batching.plan import Int32Array, StepBatch
from autobot_llm.engine.kv_cache import policy

BLOCK_SIZE: Final = policy.BLOCK_SIZE

MAX_DECODE_QUERIES: Final = 16
"""New tokens of one sequence that one decode program takes."""

TREE_FIELDS: Final = 4
"""What a query row of a step with trees sees: a mask, its low word and its high one; the position that bit 0 stands
for; the row's own position. It sees all before that position, and bit j says that it sees the j-th after it."""

CHUNK_QUANTUM: Final = 64
"""A work item's size is a multiple of so many positions."""

PROGRAMS_PER_PROCESSOR: Final = 2
"""Decode programs that one multiprocessor holds at a time, and so what a step's items should fill."""

LONG_PROGRAMS_PER_PROCESSOR: Final = 3
"""The same where contexts are long: there more of them hide what each waits for, and starting them costs little."""

ITEM_FIELDS: Final = 8
"""sequence (padding is -1 throughout), start, stop, first item of the sequence, its number of items, first query row,
number of query rows, context length. Positions [start, stop) are this item's part of the context."""

UNEVEN: Final = 1.2
"""Items of one load may be so much longer than an even share of the positions before shorter ones are worth more."""

_LAST_CANDIDATE: Final = 16
_CANDIDATES: Final = np.arange(_LAST_CANDIDATE + 1, dtype=np.int32)


# T packed tokens, S sequences, B blocks of the longest sequence, I work items
# H query heads, K key/value heads, D head size
@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What attention depends on in a model: `windows` has an entry for each layer, 0 where every position is seen."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    windows: tuple[int, ...]

    @property
    def group_size(self) -> int:
        """Query heads that share a key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def widest_window(self) -> int:
        """The longest context that any layer reads; 0: all of it."""
        return 0 if 0 in self.windows else max(self.windows)


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """A decode step in device memory (int32). `max_queries` bounds the query rows of a sequence;
    `is_long` says that contexts are thousands of tokens long, which another tile is best for.

    The items say all that our kernels need; a step that is captured also has what other kernels do: sequence s owns
    query rows [query_starts[s], query_starts[s + 1]), and `context_lens_S` include the step's own tokens, with 0 for
    padding. `tree_rows_T4` hold TREE_FIELDS of every query row; None: plain causal.
    """

    block_tables_SB: torch.Tensor
    items_I8: torch.Tensor
    max_queries: int
    is_long: bool = False
    query_starts: torch.Tensor | None = None
    context_lens_S: torch.Tensor | None = None
    tree_rows_T4: torch.Tensor | None = None

    @classmethod
    def over(cls, arrays: Mapping[str, torch.Tensor], max_queries: int, *, is_long: bool = False) -> PagedBatch:
        """Take the tensors named in `decode_sizes` for one: they stay the caller's, who rewrites them each step."""
        return cls(
            query_starts=arrays["query_starts"],
            context_lens_S=arrays["context_lens"],
            block_tables_SB=arrays["block_tables"],
            items_I8=arrays["items"],
            max_queries=max_queries,
            is_long=is_long,
        )


class PagedAttention(Protocol):
    """Causal, paged, grouped-query attention over caches that already hold the step's own keys and values.

    `reason` says why this one was chosen, for the start-up line. `can_capture`: it takes `prepare_captured`, and its
    `attend` may then run inside a CUDA graph.
    """

    name: str
    reason: str
    can_capture: bool

    def prepare(self, batch: StepBatch) -> Any:
        """Build and upload what every layer of this step shares: called once per step that is not captured."""
        ...

    def prepare_captured(self, batch: PagedBatch, arrays: Mapping[str, Int32Array]) -> Any:
        """The same for a decode step in fixed device arrays: called before the capture and before each replay.

        `arrays` are the host's copies, as `fill_decode_arrays` left them.
        """
        ...

    def attend(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        out_THD: torch.Tensor,
        metadata: Any,
    ) -> None:
        """Attend every query row to its context, into `out_THD`. Rows of padding keep what they hold.

        k_TKD and v_TKD are the step's own, rotated, as the cache has them too; q, k and v may be strided in T.
        """
        ...


def full_load(num_kv_heads: int, num_processors: int, *, is_long: bool = False) -> int:
    """Items that occupy the device once; each is one program for every key/value head."""
    programs = LONG_PROGRAMS_PER_PROCESSOR if is_long else PROGRAMS_PER_PROCESSOR
    return -(-programs * num_processors // num_kv_heads)


def decode_sizes(
    num_sequences: int,
    *,
    max_queries: int,
    table_width: int,
    num_items: int,
) -> dict[str, tuple[int, ...]]:
    """Shapes of the int32 arrays of a decode step: what to allocate, on the host and on the device.

    `items` starts at a
    multiple of 32 bytes if the caller can: a program reads its item whole.
    """
    return {
        "items": (num_items, ITEM_FIELDS),
        "query_starts": (num_sequences + 1,),
        "context_lens": (num_sequences,),
        "block_tables": (num_sequences, table_width),
    }


def fill_decode_arrays(
    arrays: Mapping[str, Int32Array],
    batch: StepBatch,
    *,
    window: int = 0,
    cut: ItemCut | None = None,
) -> None:
    """Write a step into arrays of `decode_sizes` (views of a pinned buffer, say), and pad what it leaves.

    `window` is the model's widest: nothing before it is planned. Table entries after a sequence's blocks are whatever
    was there, and are never read. With `cut`, and no window, the items are those that it keeps from step to step.
    Raises ValueError where the step has more sequences or blocks than the arrays.
    """
    num_sequences, num_blocks = batch.block_tables_SB.shape
    tables_SB = arrays["block_tables"]
    if num_sequences > tables_SB.shape[0] or num_blocks > tables_SB.shape[1]:
        raise ValueError(
            f"a step of {num_sequences} sequences and {num_blocks} blocks does not fit arrays of {tables_SB.shape}"
        )
    tables_SB[:num_sequences, :num_blocks] = batch.block_tables_SB
    starts, lens = arrays["query_starts"], arrays["context_lens"]
    starts[: num_sequences + 1] = batch.query_starts
    starts[num_sequences + 1 :] = batch.query_starts[num_sequences]
    lens[:num_sequences] = batch.context_lens
    lens[num_sequences:] = 0
    items_I8 = arrays["items"]
    spare_items = len(items_I8) - len(lens)
    if cut is not None and not window:
        num_items = cut.write(items_I8, batch.context_lens, spare_items)
    else:
        num_items = plan_items(items_I8, batch.query_starts, batch.context_lens, spare_items=spare_items, window=window)
    items_I8[num_items:] = -1


def fill_tree_rows(rows_T4: Int32Array, batch: StepBatch) -> None:
    """Write TREE_FIELDS of a step's tokens. One that is in no tree sees all before it, and itself."""
    assert batch.tree_masks_T is not None
    num_tokens, masks_T = batch.num_tokens, batch.tree_masks_T
    is_in_tree_T = masks_T != 0
    num_queries = np.diff(batch.query_starts)
    rows_T4[:num_tokens, :2] = np.where(is_in_tree_T, masks_T, np.uint64(1)).view(np.int32).reshape(-1, 2)
    first_new_T = (batch.context_lens - num_queries).repeat(num_queries)
    rows_T4[:num_tokens, 3] = places_T = batch.places
    rows_T4[:num_tokens, 2] = np.where(is_in_tree_T, first_new_T, places_T)


def trees_of(batch: StepBatch) -> npt.NDArray[np.bool_] | None:
    """Which sequences of a step have a tree; None where none has."""
    if batch.tree_masks_T is None:
        return None
    has_tree_S: npt.NDArray[np.bool_] = batch.tree_masks_T[batch.query_starts[:-1]] != 0
    return has_tree_S


def plan_items(
    items_I8: Int32Array,
    query_starts: Int32Array,
    context_lens: Int32Array,
    *,
    spare_items: int,
    window: int = 0,
    members: Int32Array | None = None,
) -> int:
    """Cut contexts into work items of one size, the smallest that fits; returns how many were written.

    `spare_items` is the device's full load; there is room for an item per sequence beside them. With `members`, only
    these sequences are planned; the items name them by their index in the whole step.
    """
    if members is None:
        members = np.arange(len(context_lens), dtype=np.int32)
    num_queries = query_starts[members + 1] - query_starts[members]
    lens = context_lens[members]
    parts = _Parts(members, query_starts[members], num_queries, lens, lens - num_queries)
    return _plan_parts(items_I8, parts, spare_items, window)


def plan_items_by_queries(
    items_I8: Int32Array,
    query_starts: Int32Array,
    context_lens: Int32Array,
    *,
    max_queries: int,
    spare_items: int,
    window: int = 0,
    has_tree_S: npt.NDArray[np.bool_] | None = None,
) -> int:
    """The same for sequences of any number of new tokens: each `max_queries` of them are planned as if a sequence.

    Of a tree every part gets all new tokens of its sequence to see: which of them it does, its rows say. There is room
    for as many items as there are such parts, beside the spare ones.
    """
    num_queries = query_starts[1:] - query_starts[:-1]
    counts = -(-num_queries // max_queries)
    sequences = np.arange(len(counts), dtype=np.int32).repeat(counts)
    firsts = (np.arange(len(sequences), dtype=np.int32) - (counts.cumsum() - counts).repeat(counts)) * max_queries
    part_queries = np.minimum(num_queries[sequences] - firsts, max_queries)
    first_new = context_lens[sequences] - num_queries[sequences]
    context, first_positions = first_new + firsts + part_queries, first_new + firsts
    if has_tree_S is not None:
        is_of_tree = has_tree_S[sequences]
        context = np.where(is_of_tree, context_lens[sequences], context)
        first_positions = np.where(is_of_tree, first_new, first_positions)
    parts = _Parts(sequences, query_starts[sequences] + firsts, part_queries, context, first_positions)
    return _plan_parts(items_I8, parts, spare_items, window)


class _Parts(NamedTuple):
    """What is planned, one entry each: new tokens of a sequence, the context that they see together, and the position
    of the first of them."""

    sequences: Int32Array
    first_rows: Int32Array
    num_queries: Int32Array
    context_lens: Int32Array
    first_positions: Int32Array


def _plan_parts(items_I8: Int32Array, parts: _Parts, spare_items: int, window: int) -> int:
    context = lens = parts.context_lens
    table_S8 = np.zeros((len(context), ITEM_FIELDS), np.int32)
    if window:  # the first query row sees the farthest back
        table_S8[:, 1] = np.maximum(parts.first_positions + 1 - window, 0) // BLOCK_SIZE * BLOCK_SIZE
        lens = context - table_S8[:, 1]
    table_S8[:, 0] = parts.sequences
    table_S8[:, 5] = parts.first_rows
    table_S8[:, 6] = parts.num_queries
    table_S8[:, 7] = context
    return _write_items(items_I8, table_S8, lens, _item_size(lens, spare_items))


class ItemCut:
    """How decoding sequences were cut into items, kept for their next steps.

    While every context still takes as many items of that size as before, all that changes is where the last one ends.
    """

    def __init__(self) -> None:
        self.size = 1
        self._spare_items = 0
        self._counts_S = np.zeros(0, np.int32)
        self._items_I8 = np.zeros((0, ITEM_FIELDS), np.int32)
        self._sequences_I = self._items_I8[:, 0]  # of the items, and where each ends unless its context does
        self._ends_I = self._items_I8[:, 2]

    def write(self, items_I8: Int32Array, lens: Int32Array, spare_items: int) -> int:
        """The same as `plan_items`, for a step of one token a sequence; the size may be that of an earlier step."""
        num_items = self._keep(lens, spare_items)
        items_I8[:num_items] = self._items_I8
        items_I8[:num_items, 7] = ends_I = lens[self._sequences_I]
        np.minimum(self._ends_I, ends_I, out=items_I8[:num_items, 2])
        return num_items

    def write_queries(self, items_I8: Int32Array, query_starts: Int32Array, lens: Int32Array, spare_items: int) -> int:
        """The same for any numbers of new tokens that one item takes."""
        num_items = self.write(items_I8, lens, spare_items)
        self._write_rows(items_I8, query_starts)
        return num_items

    def write_passes(
        self, items_KI8: Int32Array, query_starts: Int32Array, lens_KS: Int32Array, spare_items: int
    ) -> int:
        """The same for K steps whose contexts only grow, each cut as the last one: an item that lies behind a context
        is empty, which a kernel takes for no part of it. The first step has these numbers of new tokens, every other
        one of each sequence. Returns the number of items of each."""
        num_items = self._keep(lens_KS[-1], spare_items)
        items_KI8[:, :num_items] = self._items_I8
        items_KI8[:, :num_items, 7] = ends_KI = lens_KS[:, self._sequences_I]
        np.minimum(self._ends_I, ends_KI, out=items_KI8[:, :num_items, 2])
        self._write_rows(items_KI8[0], query_starts)
        return num_items

    def _write_rows(self, items_I8: Int32Array, query_starts: Int32Array) -> None:
        num_items = len(self._items_I8)
        items_I8[:num_items, 5] = query_starts[self._sequences_I]
        items_I8[:num_items, 6] = (query_starts[1:] - query_starts[:-1])[self._sequences_I]

    def _keep(self, lens: Int32Array, spare_items: int) -> int:
        """Cut anew where a context has grown into another item, or the room is another; returns the number of items."""
        is_known = spare_items == self._spare_items and len(lens) == len(self._counts_S)
        if not is_known or not (-(-lens // self.size) == self._counts_S).all():
            self._spare_items = spare_items
            self.size = _item_size(lens, spare_items)
            self._counts_S = -(-lens // self.size)
            table_S8 = np.zeros((len(lens), ITEM_FIELDS), np.int32)
            table_S8[:, 0] = table_S8[:, 5] = np.arange(len(lens))
            table_S8[:, 6] = 1
            table_S8[:, 7] = lens
            self._items_I8 = np.empty((int(self._counts_S.sum()), ITEM_FIELDS), np.int32)
            _write_items(self._items_I8, table_S8, lens, self.size)
            self._sequences_I = self._items_I8[:, 0].copy()
            self._ends_I = self._items_I8[:, 1] + np.int32(self.size)
        return len(self._items_I8)


def _write_items(items_I8: Int32Array, table_S8: Int32Array, lens: Int32Array, size: int) -> int:
    """Items of `size` positions from rows of whole sequences, each with the start of its first item and its end."""
    counts = (lens + (size - 1)) // size
    ends = counts.cumsum(dtype=np.int32)
    table_S8[:, 3] = ends - counts
    table_S8[:, 4] = counts
    num_items = int(ends[-1])
    planned = items_I8[:num_items]
    planned[:] = table_S8.repeat(counts, axis=0)
    planned[:, 1] += (np.arange(num_items, dtype=np.int32) - planned[:, 3]) * size
    np.minimum(planned[:, 1] + size, planned[:, 7], out=planned[:, 2])
    return num_items


def _item_size(lens: Int32Array, spare_items: int) -> int:
    """Positions in an item: so many that the items fill the device once, where that loads it evenly; else fewer."""
    total, longest = int(lens.sum()), int(lens.max())
    if len(lens) <= spare_items:
        size = _smallest_fitting(lens, spare_items, -(-total // spare_items), longest)
        if size * spare_items <= UNEVEN * total or size == CHUNK_QUANTUM:
            return size
    # at the upper bound each sequence rounds up to one item more than its share of the spare ones
    room, enough = len(lens) + spare_items, -(-total // spare_items)
    return _smallest_fitting(lens, room, -(-total // room), min(longest, enough))


def _smallest_fitting(lens: Int32Array, room: int, at_least: int, at_most: int) -> int:
    """The smallest size between the bounds that makes `room` items or fewer, to a quantum; `at_most` is such a size."""
    while True:
        sizes = at_least + (at_most - at_least) * _CANDIDATES // _LAST_CANDIDATE
        sizes = (sizes + (CHUNK_QUANTUM - 1)) // CHUNK_QUANTUM * CHUNK_QUANTUM
        counts = ((lens[:, None] + (sizes - 1)) // sizes).sum(axis=0)
        first = int((counts <= room).argmax())
        at_most = int(sizes[first])
        if first == 0 or at_most - (at_least := int(sizes[first - 1])) <= CHUNK_QUANTUM:
            return at_most
