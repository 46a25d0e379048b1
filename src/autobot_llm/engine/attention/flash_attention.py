"""Paged attention by FlashAttention-3, where it is installed. Knows its one entry point; knows nothing of schedules,
which it makes for itself on the device.

FlashAttention-2's paged kernels take blocks of 256 positions and more, sixteen times ours, so only version 3 serves.

Source: FlashAttention-3 (arXiv 2407.08608); the interface is flash_attn_interface.flash_attn_with_kvcache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import torch

from autobot_llm.engine.attention.paged import AttentionShape, PagedBatch
from autobot_llm.engine.batching.plan import Int32Array, StepBatch


# T packed tokens, S sequences, B blocks of the longest, H query heads, K key/value heads, D head size
@dataclass(frozen=True, slots=True)
class _Step:
    query_starts: torch.Tensor
    context_lens_S: torch.Tensor
    block_tables_SB: torch.Tensor
    max_queries: int


class FlashAttention:
    """PagedAttention over one layer's caches [num_blocks, K, 16, D] for each layer. Needs a Hopper GPU."""

    name = "flash_attention"

    def __init__(
        self,
        shape: AttentionShape,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        *,
        reason: str,
        can_capture: bool = True,
    ) -> None:
        self.reason = reason
        self.can_capture = can_capture
        self._attend = import_module("flash_attn_interface").flash_attn_with_kvcache  # an option
        self._windows = shape.windows
        self._device = keys[0].device
        # it wants [num_blocks, 16, K, D], whatever the strides
        self._keys = tuple(layer.transpose(1, 2) for layer in keys)
        self._values = tuple(layer.transpose(1, 2) for layer in values)

    def prepare(self, batch: StepBatch) -> _Step:
        starts, lens_S, tables_SB = (
            torch.from_numpy(a).to(self._device)
            for a in (batch.query_starts, batch.context_lens, batch.block_tables_SB)
        )
        return _Step(starts, lens_S, tables_SB, int(np.diff(batch.query_starts).max()))

    def prepare_captured(self, batch: PagedBatch, arrays: Mapping[str, Int32Array]) -> _Step:
        if batch.tree_rows_T4 is not None:
            raise ValueError("flash_attention has no tree masks: use the triton backend for them")
        assert batch.query_starts is not None and batch.context_lens_S is not None
        return _Step(batch.query_starts, batch.context_lens_S, batch.block_tables_SB, batch.max_queries)

    def attend(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        out_THD: torch.Tensor,
        metadata: _Step,
    ) -> None:
        window = self._windows[layer]
        out_THD.copy_(
            self._attend(
                q_THD,
                self._keys[layer],
                self._values[layer],
                cache_seqlens=metadata.context_lens_S,
                page_table=metadata.block_tables_SB,
                cu_seqlens_q=metadata.query_starts,
                max_seqlen_q=metadata.max_queries,
                causal=True,
                window_size=(window - 1, 0) if window else (-1, -1),
            )
        )
