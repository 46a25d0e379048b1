"""Paged attention by our own Triton kernels. Knows which sequences of a step go to which kernel; knows no arithmetic.

Few new tokens on a long context are bound by reading the cache, and go to the split-context kernel. Many are bound by
arithmetic: those on top of a cached beginning read the cache, fresh prompts read the step's own packed rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from autobot_llm.engine.attention.paged import (
    ITEM_FIELDS,
    MAX_DECODE_QUERIES,
    AttentionShape,
    PagedBatch,
    max_items,
    plan_items,
)
from autobot_llm.engine.batching.plan import Int32Array, StepBatch
from autobot_llm.engine.kernels.gpu.decode_attention import DecodeWorkspace, paged_decode
from autobot_llm.engine.kernels.gpu.prefill_attention import (
    PrefillTile,
    choose_prefill_tile,
    fresh_prefill,
    paged_prefill,
    plan_tiles,
)


@dataclass(frozen=True, slots=True)
class TritonStep:
    """Which kernels a step needs, and what they read; None: nothing of that kind is in it."""

    decode: PagedBatch | None
    block_tables_SB: torch.Tensor | None
    on_prefix: torch.Tensor | None
    fresh: torch.Tensor | None
    tile: PrefillTile | None


class TritonPagedAttention:
    """PagedAttention for CUDA devices, in bfloat16 or float16, with heads of 64 or 128."""

    name = "triton"
    can_capture = True

    def __init__(
        self,
        shape: AttentionShape,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        *,
        max_num_seqs: int,
        reason: str,
    ) -> None:
        self.reason = reason
        self._shape = shape
        self._keys, self._values = keys, values
        self._device = keys[0].device
        self._num_processors = _num_processors(self._device)
        self._max_num_seqs = max_num_seqs
        # The most rows of partial results: every item with one new token, or fewer sequences with several.
        self._max_queries = min(MAX_DECODE_QUERIES, 128 // shape.group_size)
        self._workspaces: dict[int, DecodeWorkspace] = {}

    def prepare(self, batch: StepBatch) -> TritonStep:
        query_lens = np.diff(batch.query_starts)
        is_decode = (query_lens <= self._max_queries) & (batch.context_lens > query_lens)
        is_fresh = ~is_decode & (batch.context_lens == query_lens)
        decode, on_prefix, fresh = (
            np.flatnonzero(chosen).astype(np.int32) for chosen in (is_decode, ~is_decode & ~is_fresh, is_fresh)
        )
        tables_SB = self._upload(batch.block_tables_SB) if len(decode) or len(on_prefix) else None
        num_tokens = batch.num_tokens - int(query_lens[decode].sum())
        tile = choose_prefill_tile(num_tokens, self._shape.num_heads, self._shape.group_size, self._num_processors)

        def tiles(members: Int32Array) -> torch.Tensor | None:
            tokens_per_tile = tile.block_m // self._shape.group_size
            if not len(members):
                return None
            return self._upload(plan_tiles(batch.query_starts, batch.context_lens, members, tokens_per_tile))

        return TritonStep(
            decode=self._decode_batch(batch, decode, query_lens, tables_SB) if len(decode) else None,
            block_tables_SB=tables_SB,
            on_prefix=tiles(on_prefix),
            fresh=tiles(fresh),
            tile=tile,
        )

    def prepare_captured(self, batch: PagedBatch, arrays: Mapping[str, Int32Array]) -> TritonStep:
        self._workspace(batch)  # before the capture: it must outlive the graph's own memory
        return TritonStep(batch, batch.block_tables_SB, None, None, None)

    def attend(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        out_THD: torch.Tensor,
        metadata: TritonStep,
    ) -> None:
        keys, values, window = self._keys[layer], self._values[layer], self._shape.windows[layer]
        if metadata.decode is not None:
            workspace = self._workspace(metadata.decode)
            paged_decode(q_THD, keys, values, metadata.decode, out_THD, workspace, window=window)
        if metadata.on_prefix is not None:
            assert metadata.block_tables_SB is not None and metadata.tile is not None
            paged_prefill(
                q_THD,
                keys,
                values,
                metadata.block_tables_SB,
                metadata.on_prefix,
                out_THD,
                tile=metadata.tile,
                window=window,
            )
        if metadata.fresh is not None:
            assert metadata.tile is not None
            fresh_prefill(q_THD, k_TKD, v_TKD, metadata.fresh, out_THD, tile=metadata.tile, window=window)

    def _decode_batch(
        self, batch: StepBatch, members: Int32Array, query_lens: Int32Array, tables_SB: torch.Tensor | None
    ) -> PagedBatch:
        assert tables_SB is not None
        num_items = max_items(len(members), self._shape.num_kv_heads, self._num_processors)
        items_I8 = np.full((num_items, ITEM_FIELDS), -1, np.int32)
        plan_items(
            items_I8,
            batch.query_starts,
            batch.context_lens,
            spare_items=num_items - len(members),
            window=self._shape.widest_window,
            members=members,
        )
        return PagedBatch(
            query_starts=self._upload(batch.query_starts),
            context_lens_S=self._upload(batch.context_lens),
            block_tables_SB=tables_SB,
            items_I8=self._upload(items_I8),
            max_queries=1 if int(query_lens[members].max()) == 1 else self._max_queries,
        )

    def _workspace(self, batch: PagedBatch) -> DecodeWorkspace:
        """Memory for partial results, by the new tokens of a sequence. It never moves: graphs hold its address."""
        workspace = self._workspaces.get(batch.max_queries)
        if workspace is None:
            workspace = self._workspaces[batch.max_queries] = DecodeWorkspace.allocate(
                max_items(self._max_num_seqs, self._shape.num_kv_heads, self._num_processors)
                + self._max_num_seqs,  # graphs are padded to a size that may be above it
                max_queries=batch.max_queries,
                group_size=self._shape.group_size,
                num_kv_heads=self._shape.num_kv_heads,
                head_size=self._shape.head_size,
                device=self._device,
            )
        return workspace

    def _upload(self, array: Int32Array) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
