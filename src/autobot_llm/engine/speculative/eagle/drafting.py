"""Draft a chain or a tree of tokens for one sequence with EAGLE-3. Knows the draft and its own keys and values; knows
nothing of the target but its features, its embeddings and its ids.

The cache holds the positions whose features the target has computed. Rows behind them belong to the draft under way and
are given up with it, so a rejected draft costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from autobot_llm.engine.speculative.eagle.growth import Growth
from autobot_llm.engine.speculative.eagle.model import EagleDraft, draft_rope
from autobot_llm.engine.speculative.medusa.tree import CandidateTree
from autobot_llm.errors import ContextLengthError


# T tokens, L cached rows, N nodes, E hidden size, W draft vocabulary, M nodes expanded at a level
@dataclass(frozen=True, slots=True)
class EagleTree:
    """`tokens_N` are the target's ids, `tokens_N[0]` the known token at the root; `log_probabilities_N` are the
    draft's, of the whole path to each node."""

    tree: CandidateTree
    tokens_N: torch.Tensor
    log_probabilities_N: torch.Tensor


class EagleDrafter:
    """The draft of one sequence. `embed_VE` are the target's embeddings; `max_context` in tokens, drafts included."""

    def __init__(self, draft: EagleDraft, embed_VE: torch.Tensor, *, max_context: int) -> None:
        layer = draft.config.layer
        device, dtype = embed_VE.device, embed_VE.dtype
        self._draft = draft
        self._embed_VE = embed_VE
        self._target_ids_W = draft.target_ids
        self._cos_PD, self._sin_PD = draft_rope(draft.config, max_context, dtype, device)
        shape = (layer.num_kv_heads, max_context, layer.head_size)
        self._keys_KLD = torch.zeros(shape, dtype=dtype, device=device)
        self._values_KLD = torch.zeros(shape, dtype=dtype, device=device)
        self._max_context = max_context
        self._num_computed = 0
        self._feature_1E: torch.Tensor | None = None
        self._next_token = -1

    @property
    def num_computed_tokens(self) -> int:
        """Positions whose target features were taken in."""
        return self._num_computed

    @torch.inference_mode()
    def extend(self, features_TF: torch.Tensor, next_ids_T: torch.Tensor) -> None:
        """Take in the target's three streams side by side [T, 3 E] of the next T positions, and the token after each.

        The last of `next_ids_T` is the token that the target chose last: the root of what is drafted next.
        """
        num_tokens = next_ids_T.shape[0]
        first = self._num_computed
        if first + num_tokens > self._max_context:
            raise ContextLengthError(f"{first + num_tokens} tokens for a draft of at most {self._max_context}")
        positions_T = torch.arange(first, first + num_tokens, device=next_ids_T.device)
        num_rows = first + num_tokens
        mask_TL = positions_T[:, None] >= torch.arange(num_rows, device=next_ids_T.device)
        returned_TE = self._forward(next_ids_T, self._draft.fuse(features_TF), positions_T, first, mask_TL)
        self._num_computed = num_rows
        self._feature_1E = returned_TE[-1:]
        self._next_token = int(next_ids_T[-1])

    def truncate(self, num_tokens: int) -> None:
        """Forget all but the first positions; `extend` comes before the next draft."""
        assert 0 <= num_tokens <= self._num_computed
        self._num_computed = num_tokens
        self._feature_1E = None

    @torch.inference_mode()
    def chain(self, num_tokens: int) -> list[int]:
        """The likeliest next tokens, one after the other, as the target's ids; fewer at the end of the context."""
        feature_1E = self._ready()
        first, tokens = self._num_computed, list[int]()
        for i in range(min(num_tokens, self._max_context - first + 1)):
            if i > 0:
                row = first + i - 1
                ids = torch.tensor([tokens[-1]], device=feature_1E.device)
                mask = torch.ones(1, row + 1, dtype=torch.bool, device=feature_1E.device)
                feature_1E = self._forward(ids, feature_1E, torch.tensor([row], device=ids.device), row, mask)
            tokens.append(int(self._target_ids_W[self._draft.logits(feature_1E)[0].argmax()]))
        return tokens

    @torch.inference_mode()
    def tree(self, num_nodes: int, *, max_depth: int, top_k: int) -> EagleTree:
        """The most probable tree of at most `num_nodes` nodes, the root included: `top_k` tokens after each of `top_k`
        nodes of a level (growth.py)."""
        features_ME = self._ready()
        device, first = features_ME.device, self._num_computed
        growth = Growth(self._next_token)
        num_rows = first
        for depth in range(1, max_depth + 1):
            log_MW = self._draft.logits(features_ME).float().log_softmax(dim=-1)
            best = log_MW.topk(min(top_k, log_MW.shape[1]), dim=-1)
            growth.add_level(self._target_ids_W[best.indices].tolist(), best.values.tolist())
            if depth == max_depth:
                break
            parents = growth.advance(top_k, num_rows)
            num_expanded = len(growth.frontier)
            if num_rows + num_expanded > self._max_context:
                break
            mask_ML = torch.zeros(num_expanded, num_rows + num_expanded, dtype=torch.bool, device=device)
            mask_ML[:, :first] = True
            for i, node in enumerate(growth.frontier):
                mask_ML[i, growth.rows_to(node)] = True
            ids_M = torch.tensor([growth.nodes[node].token for node in growth.frontier], device=device)
            positions_M = torch.full_like(ids_M, first + depth - 1)
            features_ME = self._forward(ids_M, features_ME[parents], positions_M, num_rows, mask_ML)
            num_rows += num_expanded
        kept = growth.best(num_nodes)
        return EagleTree(
            CandidateTree(tuple(node.parent for node in kept), tuple(node.rank for node in kept)),
            torch.tensor([node.token for node in kept], device=device),
            torch.tensor([node.log_probability for node in kept], device=device),
        )

    def _ready(self) -> torch.Tensor:
        assert self._feature_1E is not None, "extend comes before a draft"
        return self._feature_1E

    def _forward(
        self,
        ids_T: torch.Tensor,
        features_TE: torch.Tensor,
        positions_T: torch.Tensor,
        first_row: int,
        mask_TL: torch.Tensor,
    ) -> torch.Tensor:
        """What the draft returns, TE; keys and values go to rows from `first_row` on, and row t sees `mask_TL`."""
        num_rows = mask_TL.shape[1]

        def attend(q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
            rows = slice(first_row, first_row + ids_T.shape[0])
            self._keys_KLD[:, rows] = k_TKD.transpose(0, 1)
            self._values_KLD[:, rows] = v_TKD.transpose(0, 1)
            group = q_THD.shape[1] // k_TKD.shape[1]
            keys = self._keys_KLD[:, :num_rows].repeat_interleave(group, dim=0)
            values = self._values_KLD[:, :num_rows].repeat_interleave(group, dim=0)
            attended_HTD = F.scaled_dot_product_attention(
                q_THD.transpose(0, 1)[None], keys[None], values[None], attn_mask=mask_TL
            )[0]
            return attended_HTD.transpose(0, 1)

        cos_sin = (self._cos_PD[positions_T][:, None], self._sin_PD[positions_T][:, None])
        embedded_TE = F.embedding(ids_T, self._embed_VE)
        returned: torch.Tensor = self._draft(embedded_TE, features_TE, cos_sin, attend)
        return returned
