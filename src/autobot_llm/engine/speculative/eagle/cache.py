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

    def __init__(self, layer: ModelConfig, first_position: int, device: torch.device) -> None:
        self.first_position = first_position
        self.keys_KLD = torch.empty(layer.num_kv_heads, 0, layer.head_size, device=device)
        self.values_KLD = torch.empty_like(self.keys_KLD)

    @property
    def num_bytes(self) -> int:
        return 2 * self.keys_KLD.numel() * self.keys_KLD.element_size()

    def reserve(self, num_rows: int) -> None:
        """Make room for so many rows; those that are there stay."""
        if num_rows > self.keys_KLD.shape[1]:
            self.keys_KLD, self.values_KLD = _enlarged(self.keys_KLD, num_rows), _enlarged(self.values_KLD, num_rows)


def _enlarged(rows_KLD: torch.Tensor, num_rows: int) -> torch.Tensor:
    num_kv_heads, num_before, head_size = rows_KLD.shape
    larger = rows_KLD.new_empty(num_kv_heads, max(_LEAST_ROWS, num_rows, 2 * num_before), head_size)
    larger[:, :num_before] = rows_KLD
    return larger


class Part(NamedTuple):
    """One sequence's tokens of a pass, which go to rows from `first_row` on. A line where `visible` is None: each sees
    the rows up to its own. Else a level of a tree whose rows begin at `tree_row`: all are `depth` positions behind the
    one before that row, and each sees the rows before it, and those of the tree that `visible` names."""

    cache: DraftCache
    first_row: int
    ids: SequenceABC[int]
    tree_row: int = 0
    depth: int = 0
    visible: SequenceABC[list[int]] | None = None

    @property
    def positions(self) -> SequenceABC[int]:
        first = self.cache.first_position
        if self.visible is not None:
            return [first + self.tree_row + self.depth - 1] * len(self.ids)
        return range(first + self.first_row, first + self.first_row + len(self.ids))

    def mask(self) -> torch.Tensor:
        """Which of L rows each of Q tokens sees: mask_QL."""
        num_queries = len(self.ids)
        mask_QL = torch.ones(num_queries, self.first_row + num_queries, dtype=torch.bool)
        if self.visible is None:
            return mask_QL.tril_(self.first_row)
        mask_QL[:, self.tree_row :] = False
        for i, rows in enumerate(self.visible):
            mask_QL[i, rows] = True
        return mask_QL


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
    for part in parts:
        part.cache.reserve(part.first_row + len(part.ids))

    def attend(q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
        attended, begin = [], 0
        for part in parts:
            rows = slice(begin, begin + len(part.ids))
            begin += len(part.ids)
            attended.append(_attend(part, q_THD[rows], k_TKD[rows], v_TKD[rows]))
        return torch.cat(attended)

    device = embed_VE.device
    ids_T = torch.tensor([token_id for part in parts for token_id in part.ids], device=device)
    positions_T = torch.tensor([position for part in parts for position in part.positions], device=device)
    cos_PD, sin_PD = rope_PD
    cos_sin = cos_PD[positions_T, None], sin_PD[positions_T, None]
    returned: torch.Tensor = draft(F.embedding(ids_T, embed_VE).to(features_TE.dtype), features_TE, cos_sin, attend)
    return returned


def _attend(part: Part, q_QHD: torch.Tensor, k_QKD: torch.Tensor, v_QKD: torch.Tensor) -> torch.Tensor:
    num_queries, num_heads, head_size = q_QHD.shape
    rows, num_rows = slice(part.first_row, part.first_row + num_queries), part.first_row + num_queries
    cache = part.cache
    cache.keys_KLD[:, rows] = k_QKD.transpose(0, 1)
    cache.values_KLD[:, rows] = v_QKD.transpose(0, 1)
    keys_KLD, values_KLD = cache.keys_KLD[None, :, :num_rows], cache.values_KLD[None, :, :num_rows]
    if num_queries == 1 and part.visible is None:
        # the query heads of a key/value head are rows of one product, and see all that is cached
        q_1KGD = q_QHD.reshape(1, keys_KLD.shape[1], -1, head_size)
        return F.scaled_dot_product_attention(q_1KGD, keys_KLD, values_KLD).reshape(1, num_heads, head_size)
    group = num_heads // keys_KLD.shape[1]
    attended_1HQD = F.scaled_dot_product_attention(
        q_QHD.transpose(0, 1)[None],
        keys_KLD.repeat_interleave(group, dim=1),
        values_KLD.repeat_interleave(group, dim=1),
        attn_mask=part.mask().to(q_QHD.device),
    )
    return attended_1HQD[0].transpose(0, 1)
