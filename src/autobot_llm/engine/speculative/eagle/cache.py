"""What EAGLE-3's layer keeps of one sequence, and several sequences in one pass of it. Knows rows of keys and values;
knows nothing of where features or tokens come from.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from autobot_llm.engine.models.config import ModelConfig
from autobot_llm.engine.speculative.eagle.model import EagleDraft

_LEAST_ROWS = 64


# T packed tokens of all sequences, Q of one, L cached rows, H query heads, K key/value heads, D head size, E hidden
# size
class DraftCache:
    """Keys and values KLD of one sequence. Row i is position `first_position` + i. It doubles as it grows."""

    def __init__(self, layer: ModelConfig, first_position: int) -> None:
        self.first_position = first_position
        self._shape = (layer.num_kv_heads, layer.head_size)
        self.keys_KLD = torch.empty(layer.num_kv_heads, 0, layer.head_size)
        self.values_KLD = torch.empty(layer.num_kv_heads, 0, layer.head_size)

    @property
    def num_bytes(self) -> int:
        return 2 * self.keys_KLD.numel() * self.keys_KLD.element_size()

    def reserve(self, num_rows: int) -> None:
        """Make room for so many rows; those that are there stay."""
        num_before = self.keys_KLD.shape[1]
        if num_rows <= num_before:
            return
        num_kv_heads, head_size = self._shape
        for name in ("keys_KLD", "values_KLD"):
            larger = torch.empty(num_kv_heads, max(_LEAST_ROWS, num_rows, 2 * num_before), head_size)
            larger[:, :num_before] = getattr(self, name)
            setattr(self, name, larger)


class Part(NamedTuple):
    """One sequence's tokens of a pass: they go to rows from `first_row` on, and each sees the rows up to its own."""

    cache: DraftCache
    first_row: int
    ids: SequenceABC[int]


@torch.inference_mode()
def run_layer(
    draft: EagleDraft,
    embed_VE: torch.Tensor,
    rope_PD: tuple[torch.Tensor, torch.Tensor],
    parts: SequenceABC[Part],
    features_TE: torch.Tensor,
) -> torch.Tensor:
    """What the layer returns, TE, for the parts' tokens one after the other, and the features of the positions before
    theirs. Keys and values are written to the caches."""
    ids, positions = list[int](), list[int]()
    for cache, first_row, part_ids in parts:
        cache.reserve(first_row + len(part_ids))
        ids.extend(part_ids)
        first = cache.first_position + first_row
        positions.extend(range(first, first + len(part_ids)))

    def attend(q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
        attended, begin = [], 0
        for cache, first_row, part_ids in parts:
            rows = slice(begin, begin + len(part_ids))
            begin += len(part_ids)
            attended.append(_attend(cache, first_row, q_THD[rows], k_TKD[rows], v_TKD[rows]))
        return torch.cat(attended)

    positions_T = torch.tensor(positions)
    cos_PD, sin_PD = rope_PD
    embedded_TE = F.embedding(torch.tensor(ids), embed_VE).to(features_TE.dtype)
    returned: torch.Tensor = draft(
        embedded_TE, features_TE, (cos_PD[positions_T, None], sin_PD[positions_T, None]), attend
    )
    return returned


def _attend(
    cache: DraftCache, first_row: int, q_QHD: torch.Tensor, k_QKD: torch.Tensor, v_QKD: torch.Tensor
) -> torch.Tensor:
    num_queries, num_heads, head_size = q_QHD.shape
    num_rows = first_row + num_queries
    cache.keys_KLD[:, first_row:num_rows] = k_QKD.transpose(0, 1)
    cache.values_KLD[:, first_row:num_rows] = v_QKD.transpose(0, 1)
    keys_KLD, values_KLD = cache.keys_KLD[None, :, :num_rows], cache.values_KLD[None, :, :num_rows]
    if num_queries == 1:  # the query heads of a key/value head are rows of one product, and see all that is cached
        q_1KGD = q_QHD.reshape(1, keys_KLD.shape[1], -1, head_size)
        return F.scaled_dot_product_attention(q_1KGD, keys_KLD, values_KLD).reshape(1, num_heads, head_size)
    group = num_heads // keys_KLD.shape[1]
    mask_QL = torch.ones(num_queries, num_rows, dtype=torch.bool).tril_(first_row)
    attended_1HQD = F.scaled_dot_product_attention(
        q_QHD.transpose(0, 1)[None],
        keys_KLD.repeat_interleave(group, dim=1),
        values_KLD.repeat_interleave(group, dim=1),
        attn_mask=mask_QL,
    )
    return attended_1HQD[0].transpose(0, 1)
