"""Paged attention by our own Triton kernels. Knows which kernel takes which sequence; knows nothing of their insides.

A step may mix three kinds of sequences, each with a kernel of its own: few new tokens on a long context (decode), many
new tokens after a cached prefix, and a prompt that starts here, whose keys are read where the projection left them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from autobot_llm.engine.attention.paged import (
    ITEM_FIELDS,
    MAX_DECODE_QUERIES,
    TREE_FIELDS,
    AttentionShape,
    ItemCut,
    PagedBatch,
    fill_tree_rows,
    full_load,
    plan_items,
    plan_items_by_queries,
    trees_of,
)
from autobot_llm.engine.attention.sdpa_paged import FreshKernel, attend_fresh
from autobot_llm.engine.batching.plan import Int32Array, StepBatch
from autobot_llm.engine.gpu.staging import Layout
from autobot_llm.engine.kernels.gpu.decode_attention import MAX_ROWS, DecodeWorkspace, item_counts, paged_decode
from autobot_llm.engine.kernels.gpu.prefill_attention import (
    SMALL_TILE,
    TILE_FIELDS,
    PrefillTile,
    choose_prefill_tile,
    fresh_prefill,
    paged_prefill,
    plan_tiles,
)

SPLIT_TOKENS = 128
"""Captured steps with prompts of up to so many tokens are attended by the decode kernel alone: tiles of so few query
rows would leave most of the device idle while each walks its whole context."""

FRESH_KERNEL: FreshKernel = "triton"
"""What attends prompts that start in a step; benchmarks/attention_gpu.py measures all of them. A window is Triton's."""


# T packed tokens, S sequences, W tiles, H query heads, K key/value heads, D head size
@dataclass(frozen=True, slots=True)
class _Tiles:
    """Query rows for a prefill kernel: its work list, and what it was planned for."""

    tiles_W8: torch.Tensor
    tile: PrefillTile


@dataclass(frozen=True, slots=True)
class TritonMetadata:
    """One step by kind of sequence; None where there is none. `fresh_spans` are the rows of each fresh prompt."""

    decode: PagedBatch | None
    workspace: DecodeWorkspace
    prefixed: _Tiles | None = None
    fresh: _Tiles | None = None
    fresh_spans: tuple[tuple[int, int], ...] = ()
    block_tables_SB: torch.Tensor | None = None


class TritonPagedAttention:
    """PagedAttention by our kernels, over caches of [num_blocks, K, 16, D] for each layer.

    `max_sequences` is how many decode in one step at most, give or take a graph's padding.
    """

    name = "triton"

    def __init__(
        self,
        shape: AttentionShape,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        *,
        max_sequences: int,
        reason: str,
        can_capture: bool = True,
        fresh_kernel: FreshKernel = FRESH_KERNEL,
    ) -> None:
        self.reason = reason
        self.can_capture = can_capture
        self._shape = shape
        self._keys, self._values = keys, values
        self._device = keys[0].device
        self._spare_items = full_load(shape.num_kv_heads, _num_processors(self._device))
        self.group_size = shape.group_size
        # a power of two, which steps are padded to
        self.max_queries = 1 << (min(MAX_DECODE_QUERIES, MAX_ROWS // shape.group_size).bit_length() - 1)
        self._fresh_kernel = fresh_kernel
        self._cut = ItemCut()
        # they never move and never go: graphs hold their addresses
        self._workspaces: dict[int, DecodeWorkspace] = {}
        self._most_items = max_sequences + self._spare_items
        self._workspace(self._most_items)

    def prepare(self, batch: StepBatch) -> TritonMetadata:
        if batch.tree_masks_T is not None:
            return self._prepare_trees(batch)
        num_queries = np.diff(batch.query_starts)
        is_fresh = (num_queries == batch.context_lens) & (num_queries > 1)
        is_decode = (num_queries <= self.max_queries) & ~is_fresh
        decoding, fresh, prefixed = (
            np.flatnonzero(kind).astype(np.int32) for kind in (is_decode, is_fresh, ~is_decode & ~is_fresh)
        )
        arrays: dict[str, Int32Array] = {"block_tables": batch.block_tables_SB}
        if len(decoding):
            arrays["items"] = self._plan_decode(batch, decoding)
        tiles: dict[str, PrefillTile] = {}
        for name, members in (("fresh", fresh), ("prefixed", prefixed)):
            if len(members):
                tile = tiles[name] = self._tile(int(num_queries[members].sum()))
                arrays[name] = plan_tiles(batch.query_starts, batch.context_lens, members, self._tokens_per_tile(tile))
        tensors = _upload(arrays, self._device)
        lists = {name: _Tiles(tensors[name], tile) for name, tile in tiles.items()}
        return TritonMetadata(
            decode=_decode_batch(tensors, int(num_queries[decoding].max())) if len(decoding) else None,
            workspace=self._workspace(len(arrays["items"]) if len(decoding) else 0),
            prefixed=lists.get("prefixed"),
            fresh=lists.get("fresh"),
            fresh_spans=tuple((int(batch.query_starts[s]), int(batch.query_starts[s + 1])) for s in fresh),
            block_tables_SB=tensors["block_tables"],
        )

    def prepare_captured(self, batch: PagedBatch, arrays: Mapping[str, Int32Array]) -> TritonMetadata:
        if batch.max_queries > self.max_queries:
            raise ValueError(
                f"a step with {batch.max_queries} new tokens of a sequence: the decode kernel takes up to "
                f"{self.max_queries} where {self._shape.group_size} query heads share keys"
            )
        return TritonMetadata(decode=batch, workspace=self._workspace(batch.items_I8.shape[0]))

    def prompt_sizes(
        self, num_tokens: int, num_sequences: int, table_width: int, *, takes_trees: bool = False
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of the int32 arrays of a captured step with prompts in it, padded to so many tokens and sequences, or
        with trees, of SPLIT_TOKENS at most."""
        sizes: dict[str, tuple[int, ...]] = {"block_tables": (num_sequences, table_width)}
        if takes_trees:
            assert num_tokens <= SPLIT_TOKENS, f"{num_tokens} tokens of steps with trees"
            sizes["tree_rows"] = (num_tokens, TREE_FIELDS)
        if num_tokens <= SPLIT_TOKENS:
            part = self._tree_part(num_tokens) if takes_trees else self.max_queries
            num_parts = num_sequences + num_tokens // part  # each may end with one that is not full
            return {"items": (num_parts + self._spare_items, ITEM_FIELDS)} | sizes
        num_tiles = num_sequences + -(-num_tokens // self._tokens_per_tile(SMALL_TILE))
        items = (num_sequences + self._spare_items, ITEM_FIELDS)
        return {"items": items, "tiles": (num_tiles, TILE_FIELDS)} | sizes

    def fill_prompt_arrays(self, arrays: Mapping[str, Int32Array], batch: StepBatch) -> None:
        """Write a step into arrays of `prompt_sizes`, and make what it leaves padding, which does nothing."""
        num_sequences, num_blocks = batch.block_tables_SB.shape
        arrays["block_tables"][:num_sequences, :num_blocks] = batch.block_tables_SB
        if "tiles" not in arrays:
            starts, lens = batch.query_starts, batch.context_lens
            if batch.tree_masks_T is None and not self._shape.widest_window and self._takes_whole(starts):
                num_items = self._cut.write_queries(arrays["items"], starts, lens, self._spare_items)
            else:
                trees = arrays.get("tree_rows")
                part = self.max_queries if trees is None else self._tree_part(len(trees))
                num_items = self._plan_by_queries(arrays["items"], batch, part)
            arrays["items"][num_items:] = -1
            if "tree_rows" in arrays:
                fill_tree_rows(arrays["tree_rows"], batch)
            return
        num_queries = np.diff(batch.query_starts)
        decoding = np.flatnonzero(num_queries == 1).astype(np.int32)
        prompts = np.flatnonzero(num_queries > 1).astype(np.int32)
        items_I8, tiles_W8 = arrays["items"], arrays["tiles"]
        planned_I8 = self._plan_decode(batch, decoding) if len(decoding) else items_I8[:0]
        items_I8[: len(planned_I8)] = planned_I8
        items_I8[len(planned_I8) :] = -1
        planned_W8 = plan_tiles(batch.query_starts, batch.context_lens, prompts, self._tokens_per_tile(SMALL_TILE))
        tiles_W8[: len(planned_W8)] = planned_W8
        tiles_W8[len(planned_W8) :] = 0

    def prepare_prompts(self, arrays: Mapping[str, torch.Tensor]) -> TritonMetadata:
        """A captured step's metadata over device arrays of `prompt_sizes`, once for all its replays."""
        workspace = self._workspace(arrays["items"].shape[0])
        if "tiles" not in arrays:
            trees = arrays.get("tree_rows")
            part = self.max_queries if trees is None else self._tree_part(len(trees))
            decode = PagedBatch(arrays["block_tables"], arrays["items"], part, tree_rows_T4=trees)
            return TritonMetadata(decode=decode, workspace=workspace)
        return TritonMetadata(
            decode=PagedBatch(arrays["block_tables"], arrays["items"], 1),
            workspace=workspace,
            prefixed=_Tiles(arrays["tiles"], SMALL_TILE),
            block_tables_SB=arrays["block_tables"],
        )

    def prepare_pass(self, block_tables_SB: torch.Tensor, items_I8: torch.Tensor, max_queries: int) -> TritonMetadata:
        """The same for a captured step of few new tokens of each sequence, `max_queries` at most."""
        decode = PagedBatch(block_tables_SB, items_I8, 1 << (max_queries - 1).bit_length())
        return TritonMetadata(decode=decode, workspace=self._workspace(items_I8.shape[0]))

    def attend(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        out_THD: torch.Tensor,
        metadata: TritonMetadata,
    ) -> None:
        keys, values, window = self._keys[layer], self._values[layer], self._shape.windows[layer]
        if metadata.fresh is not None:
            if self._fresh_kernel == "triton" or window:
                work = metadata.fresh
                fresh_prefill(q_THD, k_TKD, v_TKD, work.tiles_W8, out_THD, tile=work.tile, window=window)
            else:
                attend_fresh(q_THD, k_TKD, v_TKD, out_THD, metadata.fresh_spans, self._fresh_kernel)
        if metadata.prefixed is not None:
            work, tables_SB = metadata.prefixed, metadata.block_tables_SB
            assert tables_SB is not None
            paged_prefill(q_THD, keys, values, tables_SB, work.tiles_W8, out_THD, tile=work.tile, window=window)
        if metadata.decode is not None:
            paged_decode(q_THD, keys, values, metadata.decode, out_THD, metadata.workspace, window=window)

    def rehearse(self, dtype: torch.dtype) -> None:
        """Launch every kernel that a step may want, over no sequence at all: which it is depends on how many sequences
        there are and on how many tokens are new, and a step that met a compiler would keep all of them waiting."""
        shape, device = self._shape, self._device
        q_THD = torch.zeros((1, shape.num_heads, shape.head_size), dtype=dtype, device=device)
        kv_TKD = torch.zeros((1, shape.num_kv_heads, shape.head_size), dtype=dtype, device=device)
        table_SB = torch.zeros((1, 1), dtype=torch.int32, device=device)
        tiles_W8 = torch.zeros((1, TILE_FIELDS), dtype=torch.int32, device=device)
        items = [
            torch.full((n, ITEM_FIELDS), -1, dtype=torch.int32, device=device) for n in item_counts(self._most_items)
        ]
        for layer in {window: layer for layer, window in enumerate(shape.windows)}.values():
            for tile in {self._tile(1), self._tile(sys.maxsize)}:
                work = _Tiles(tiles_W8, tile)
                for fresh, prefixed in ((work, None), (None, work)):
                    metadata = TritonMetadata(None, self._workspace(0), prefixed, fresh, ((0, 1),), table_SB)
                    self.attend(layer, q_THD, kv_TKD, kv_TKD, q_THD, metadata)
            for items_I8 in items:
                for max_queries in (1 << i for i in range(self.max_queries.bit_length())):
                    batch = PagedBatch(table_SB, items_I8, max_queries)
                    metadata = TritonMetadata(batch, self._workspace(len(items_I8)))
                    self.attend(layer, q_THD, kv_TKD, kv_TKD, q_THD, metadata)

    def _takes_whole(self, query_starts: Int32Array) -> bool:
        """Whether an item takes all new tokens of each sequence."""
        return int((query_starts[1:] - query_starts[:-1]).max()) <= self.max_queries

    def _prepare_trees(self, batch: StepBatch) -> TritonMetadata:
        """All of a step with trees by the decode kernel, whatever else is in it."""
        part = self._tree_part(batch.num_tokens)
        num_parts = batch.num_sequences + batch.num_tokens // part
        items_I8 = np.empty((num_parts + self._spare_items, ITEM_FIELDS), np.int32)
        rows_T4 = np.empty((batch.num_tokens, TREE_FIELDS), np.int32)
        items_I8 = items_I8[: self._plan_by_queries(items_I8, batch, part)]
        fill_tree_rows(rows_T4, batch)
        arrays = {"block_tables": batch.block_tables_SB, "items": items_I8, "tree_rows": rows_T4}
        return self.prepare_prompts(_upload(arrays, self._device))

    def _tree_part(self, num_tokens: int) -> int:
        """Query rows of one program where so many tokens are attended as trees: small parts are many programs, and
        small products. Of 4, 8 and 16 tokens with 4 heads the best measured on an H200: 4.33 ms a step instead of 4.66
        for 16 tokens after 800, 4.62 instead of 4.87 for 32."""
        num_rows = 16 if num_tokens <= 16 else 32 if num_tokens <= 64 else MAX_ROWS
        return max(1, min(num_rows // self.group_size, self.max_queries))

    def _plan_by_queries(self, items_I8: Int32Array, batch: StepBatch, max_queries: int) -> int:
        return plan_items_by_queries(
            items_I8,
            batch.query_starts,
            batch.context_lens,
            max_queries=max_queries,
            spare_items=self._spare_items,
            window=self._shape.widest_window,
            has_tree_S=trees_of(batch),
        )

    def _plan_decode(self, batch: StepBatch, members: Int32Array) -> Int32Array:
        items_I8 = np.empty((len(members) + self._spare_items, ITEM_FIELDS), np.int32)
        num_items = plan_items(
            items_I8,
            batch.query_starts,
            batch.context_lens,
            spare_items=self._spare_items,
            window=self._shape.widest_window,
            members=members,
        )
        return items_I8[:num_items]

    def _tokens_per_tile(self, tile: PrefillTile) -> int:
        return tile.block_m // self._shape.group_size

    def _tile(self, num_tokens: int) -> PrefillTile:
        shape = self._shape
        return choose_prefill_tile(num_tokens, shape.num_heads, shape.group_size, _num_processors(self._device))

    def _workspace(self, num_items: int) -> DecodeWorkspace:
        """One that holds so many items: the first there is, or one more."""
        fitting = next((size for size in self._workspaces if size >= num_items), num_items)
        if fitting not in self._workspaces:
            self._workspaces[fitting] = DecodeWorkspace.allocate(
                fitting,
                max_queries=self.max_queries,
                group_size=self._shape.group_size,
                num_kv_heads=self._shape.num_kv_heads,
                head_size=self._shape.head_size,
                device=self._device,
            )
        return self._workspaces[fitting]


def _decode_batch(tensors: Mapping[str, torch.Tensor], max_queries: int) -> PagedBatch:
    # one of few sizes, so that few kernels are compiled
    return PagedBatch(tensors["block_tables"], tensors["items"], 1 << (max_queries - 1).bit_length())


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _upload(arrays: Mapping[str, Int32Array], device: torch.device) -> dict[str, torch.Tensor]:
    """All of a step's arrays in one copy, which the host does not wait for."""
    layout = Layout.for_arrays(arrays)
    staged = torch.empty(layout.num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for name, view in layout.on_host(staged.numpy()).items():
        view[...] = arrays[name]
    return layout.on_device(staged.to(device, non_blocking=True))
