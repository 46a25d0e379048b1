"""Attention over the GPU's paged cache in plain torch: the slow twin of every faster one. Knows block tables; knows
nothing of kernels.

One call of scaled_dot_product_attention for each sequence, over keys gathered from its blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch.nn.attention import SDPBackend, sdpa_kernel

from autobot_llm.engine.attention.paged import BLOCK_SIZE, AttentionShape, PagedBatch, trees_of
from autobot_llm.engine.batching.plan import Int32Array, StepBatch
from autobot_llm.engine.kv_cache.storage import take_blocks

FreshKernel = Literal["triton", "cudnn", "flash"]
"""Who attends a prompt that starts in a step: our kernel, or one of torch's."""

_TORCH_KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


# T packed tokens, Q query rows and L context positions of one sequence, H query heads, K key/value heads, D head size
@dataclass(frozen=True, slots=True)
class Span:
    """One sequence of a step: query rows [start, stop), and its context in `blocks`.

    `tree_masks_Q`: bit j says that a row sees new token j, and `positions_Q` how deep it stands; None: plain causal.
    """

    start: int
    stop: int
    context_len: int
    blocks: torch.Tensor
    tree_masks_Q: torch.Tensor | None = None
    positions_Q: torch.Tensor | None = None


class SdpaPagedAttention:
    """PagedAttention for any device that torch has. `math_dtype` is what it computes in; None: the cache's own."""

    name = "sdpa"
    can_capture = False

    def __init__(
        self,
        shape: AttentionShape,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        *,
        reason: str,
        math_dtype: torch.dtype | None = None,
    ) -> None:
        self.reason = reason
        self._windows = shape.windows
        self._keys, self._values = keys, values
        self._math_dtype = math_dtype

    def prepare(self, batch: StepBatch) -> tuple[Span, ...]:
        return spans_of(batch, self._keys[0].device)

    def prepare_captured(self, batch: PagedBatch, arrays: Mapping[str, Int32Array]) -> NoReturn:
        raise NotImplementedError("sdpa gathers keys by lengths that the host knows: it cannot be captured")

    def attend(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        out_THD: torch.Tensor,
        metadata: tuple[Span, ...],
    ) -> None:
        for span in metadata:
            out_THD[span.start : span.stop] = attend_span(
                q_THD[span.start : span.stop],
                self._keys[layer],
                self._values[layer],
                span,
                window=self._windows[layer],
                math_dtype=self._math_dtype or q_THD.dtype,
            )


def spans_of(batch: StepBatch, device: torch.device) -> tuple[Span, ...]:
    """A step's sequences, their blocks and masks uploaded."""
    tables_SB = torch.from_numpy(batch.block_tables_SB).to(device)
    has_tree_S = trees_of(batch)
    spans = []
    for s in range(batch.num_sequences):
        start, stop = int(batch.query_starts[s]), int(batch.query_starts[s + 1])
        masks_Q = positions_Q = None
        if has_tree_S is not None and has_tree_S[s]:
            assert batch.tree_masks_T is not None
            masks_Q = torch.from_numpy(batch.tree_masks_T[start:stop].view(np.int64)).to(device)
            positions_Q = torch.from_numpy(batch.places[start:stop]).to(device)
        spans.append(Span(start, stop, int(batch.context_lens[s]), tables_SB[s], masks_Q, positions_Q))
    return tuple(spans)


def attend_span(
    q_QHD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    span: Span,
    *,
    window: int,
    math_dtype: torch.dtype,
) -> torch.Tensor:
    """Attention of one sequence's query rows over its context, computed in `math_dtype`; out_QHD in q's dtype."""
    is_seen_QL = _is_seen(span, window)
    out_HQD = F.scaled_dot_product_attention(
        q_QHD.transpose(0, 1).to(math_dtype),
        _gather(keys, span, q_QHD.shape[2]).to(math_dtype),
        _gather(values, span, q_QHD.shape[2]).to(math_dtype),
        attn_mask=is_seen_QL,
        enable_gqa=True,
    )
    return out_HQD.transpose(0, 1).to(q_QHD.dtype)


def _gather(cache: torch.Tensor, span: Span, head_size: int) -> torch.Tensor:
    """Keys or values KLD of a sequence's context, from a layer's cache."""
    blocks = span.blocks[: -(-span.context_len // BLOCK_SIZE)]
    context_KLD = take_blocks(cache, blocks, head_size).transpose(0, 1).flatten(1, 2)
    return context_KLD[:, : span.context_len]


def _is_seen(span: Span, window: int) -> torch.Tensor:
    device, num_queries = span.blocks.device, span.stop - span.start
    first_new = span.context_len - num_queries
    new_L = torch.arange(-first_new, num_queries, device=device)  # a position as an index among the new tokens
    query_Q1 = torch.arange(num_queries, device=device).unsqueeze(1)
    if span.tree_masks_Q is None or span.positions_Q is None:
        is_seen_QL = new_L <= query_Q1
        return is_seen_QL & (new_L > query_Q1 - window) if window else is_seen_QL
    is_seen_QL = (new_L < 0) | ((span.tree_masks_Q.unsqueeze(1) >> new_L.clamp_min(0)) & 1).bool()
    if window:  # trees are less deep than windows are wide
        is_seen_QL &= (new_L >= 0) | (new_L + first_new > span.positions_Q.unsqueeze(1) - window)
    return is_seen_QL


def attend_fresh(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    out_THD: torch.Tensor,
    spans: Sequence[tuple[int, int]],
    kernel: FreshKernel,
) -> None:
    """Causal attention of the rows [start, stop) of each span among themselves, by one of torch's own kernels."""
    with sdpa_kernel(_TORCH_KERNELS[kernel]):
        for start, stop in spans:
            q_1HQD, k_1KQD, v_1KQD = (x[start:stop].transpose(0, 1).unsqueeze(0) for x in (q_THD, k_TKD, v_TKD))
            out_1HQD = F.scaled_dot_product_attention(q_1HQD, k_1KQD, v_1KQD, is_causal=True, enable_gqa=True)
            out_THD[start:stop] = out_1HQD[0].transpose(0, 1)
