"""Attention in plain torch that keeps account of what was attended to. Knows the cache's slots; knows nothing of who is
let go for it.

The slow twin of the compiled step's sums, one sequence after the other, and what the eager step runs when heavy hitters
are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from autobot_llm.engine.attention.sdpa import SdpaAttention
from autobot_llm.engine.batching.plan import StepBatch
from autobot_llm.engine.kv_cache.heavy_hitters import keep_heavy_hitters


# T packed tokens, N slots, H query heads, K key/value heads, G = H/K, D head size, L context places, Q new tokens
class SummingAttention(SdpaAttention):
    """AttentionBackend whose cache holds, for each slot and head, the sum of the weights it was given.

    Its metadata is a list with each sequence's rows and slots. For models without sliding windows.
    """

    name = "summing"

    def prepare(self, batch: StepBatch) -> list[tuple[slice, torch.Tensor]]:  # type: ignore[override]
        assert self._windows == [0], "the places of what is kept do not tell how far back it was"
        found = []
        for s, length in enumerate(batch.context_lens.tolist()):
            rows = slice(int(batch.query_starts[s]), int(batch.query_starts[s + 1]))
            places_L = np.arange(length)
            blocks_L = batch.block_tables_SB[s, places_L // self._block_size].astype(np.int64)
            found.append((rows, torch.from_numpy(blocks_L * self._block_size + places_L % self._block_size)))
        return found

    def attend(  # type: ignore[override]
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        metadata: list[tuple[slice, torch.Tensor]],
    ) -> torch.Tensor:
        assert self.storage.attention_LNK is not None
        given_NK = self.storage.attention_LNK[layer]
        out_THD = torch.empty_like(q_THD)
        for rows, slots_L in metadata:
            new_Q = slots_L[rows.start - rows.stop :]
            self._keys[layer].write(new_Q, k_TKD[rows])
            self._values[layer].write(new_Q, v_TKD[rows])
            given_NK[new_Q] = 0
            k_LKD, v_LKD = self._keys[layer].slots(slots_L), self._values[layer].slots(slots_L)
            q_QKGD = q_THD[rows].view(len(new_Q), self._num_kv_heads, self._group_size, self._head_size)
            scores_KGQL = torch.einsum("qkgd,lkd->kgql", q_QKGD, k_LKD) / math.sqrt(self._head_size)
            hidden_QL = torch.ones(len(new_Q), len(slots_L), dtype=torch.bool).triu(len(slots_L) - len(new_Q) + 1)
            weights_KGQL = scores_KGQL.masked_fill(hidden_QL, float("-inf")).softmax(-1)
            given_NK.index_add_(0, slots_L, weights_KGQL.sum((1, 2)).t())
            out_THD[rows] = torch.einsum("kgql,lkd->qkgd", weights_KGQL, v_LKD).reshape(q_THD[rows].shape)
        return out_THD

    def evict(self, block_ids: Sequence[int], num_kept: int, num_candidates: int) -> None:
        """See EvictingExecutor."""
        storage = self.storage
        assert storage.attention_LNK is not None
        tensors = [*storage.numbers_2LNKD, *(() if storage.scales_2LNK is None else storage.scales_2LNK)]
        parts = [self._by_place(tensor) for tensor in tensors]
        keep_heavy_hitters(parts, self._by_place(storage.attention_LNK), block_ids, num_kept, num_candidates)

    def _by_place(self, tensor_LNK: torch.Tensor) -> torch.Tensor:
        """The view LBKP... of a tensor LNK..."""
        return tensor_LNK.view(len(tensor_LNK), -1, self._block_size, *tensor_LNK.shape[2:]).transpose(2, 3)
