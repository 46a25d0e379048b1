"""Paged attention by FlashInfer, where it is installed. Knows its wrappers and their plans; knows nothing of steps'
origins.

FlashInfer plans on the host before it runs on the device, for one window at a time: so there is a wrapper for every
distinct window of the model, and for every captured size one with buffers of its own.

Source: FlashInfer (arXiv 2501.01005); the interface is that of version 0.6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
import torch

from autobot_llm.engine.attention.paged import BLOCK_SIZE, AttentionShape, PagedBatch
from autobot_llm.engine.batching.plan import Int32Array, StepBatch

_WORKSPACE_BYTES = 128 * 2**20  # what its documentation recommends


# T packed tokens, S sequences, B blocks of the longest, H query heads, K key/value heads, D head size
@dataclass(frozen=True, slots=True)
class Pages:
    """A step's contexts as FlashInfer wants them: pages of sequence s are indices[indptr[s] : indptr[s + 1]]."""

    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor

    @classmethod
    def of(cls, context_lens_S: Int32Array, block_tables_SB: Int32Array) -> Pages:
        # a sequence without positions is not defined there: padding reads one position of some block
        lens_S = np.maximum(context_lens_S, 1)
        num_pages_S = -(-lens_S // BLOCK_SIZE)
        is_page_SB = np.arange(block_tables_SB.shape[1]) < num_pages_S[:, None]
        pages_SB = np.where(context_lens_S[:, None] > 0, block_tables_SB, 0)
        indptr = np.concatenate(([0], np.cumsum(num_pages_S))).astype(np.int32)
        last_S = (lens_S - (num_pages_S - 1) * BLOCK_SIZE).astype(np.int32)
        return cls(*(torch.from_numpy(a) for a in (indptr, pages_SB[is_page_SB].astype(np.int32), last_S)))


@dataclass(slots=True)
class _Captured:
    """A captured size: one wrapper for each window, and when the device had read their last plans."""

    wrappers: dict[int, Any]
    has_read_plan: torch.cuda.Event = field(default_factory=torch.cuda.Event)


class FlashInferAttention:
    """PagedAttention over one layer's caches [num_blocks, K, 16, D] for each layer. Needs flashinfer and a GPU."""

    name = "flashinfer"

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
        self._flashinfer = import_module("flashinfer")  # an option, and slow to import
        self._shape = shape
        self._caches = tuple(zip(keys, values, strict=True))
        self._dtype, self._device = keys[0].dtype, keys[0].device
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)
        self._windows = sorted(set(shape.windows))
        make_prefill = self._flashinfer.BatchPrefillWithPagedKVCacheWrapper
        self._prefill = {window: make_prefill(self._workspace, "HND") for window in self._windows}
        self._captured: dict[int, _Captured] = {}

    def prepare(self, batch: StepBatch) -> Mapping[int, Any]:
        pages = Pages.of(batch.context_lens, batch.block_tables_SB)
        for window, wrapper in self._prefill.items():
            wrapper.plan(
                torch.from_numpy(batch.query_starts),
                pages.indptr,
                pages.indices,
                pages.last_page_len,
                self._shape.num_heads,
                self._shape.num_kv_heads,
                self._shape.head_size,
                BLOCK_SIZE,
                causal=True,
                window_left=window - 1,  # positions before the query's own; -1: all of them
                q_data_type=self._dtype,
                kv_data_type=self._dtype,
            )
        # the plans' host memory is written again by the next step's
        torch.cuda.current_stream(self._device).synchronize()
        return self._prefill

    def prepare_captured(self, batch: PagedBatch, arrays: Mapping[str, Int32Array]) -> Mapping[int, Any]:
        if batch.max_queries != 1 or batch.tree_rows_T4 is not None:
            raise ValueError(
                f"flashinfer steps are captured with one token of each sequence and no tree, not {batch.max_queries} "
                f"tokens{'' if batch.tree_rows_T4 is None else ' of a tree'}: use the triton backend for them"
            )
        num_sequences, table_width = arrays["block_tables"].shape
        captured = self._captured.get(num_sequences)
        if captured is None:
            captured = _Captured({window: self._decode_wrapper(num_sequences, table_width) for window in self._windows})
            self._captured[num_sequences] = captured
        else:
            captured.has_read_plan.synchronize()
        pages = Pages.of(arrays["context_lens"], arrays["block_tables"])
        for window, wrapper in captured.wrappers.items():
            wrapper.plan(
                pages.indptr,
                pages.indices,
                pages.last_page_len,
                self._shape.num_heads,
                self._shape.num_kv_heads,
                self._shape.head_size,
                BLOCK_SIZE,
                window_left=window - 1,
                q_data_type=self._dtype,
                kv_data_type=self._dtype,
            )
        captured.has_read_plan.record()
        return captured.wrappers

    def attend(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        out_THD: torch.Tensor,
        metadata: Mapping[int, Any],
    ) -> None:
        metadata[self._shape.windows[layer]].run(q_THD.contiguous(), self._caches[layer], out=out_THD)

    def _decode_wrapper(self, num_sequences: int, table_width: int) -> Any:
        def buffer(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=self._device)

        return self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=self._shape.group_size >= 4,  # as its documentation advises for grouped heads
            paged_kv_indptr_buffer=buffer(num_sequences + 1),
            paged_kv_indices_buffer=buffer(num_sequences * table_width),
            paged_kv_last_page_len_buffer=buffer(num_sequences),
        )
