"""Keep of a sequence's cache what was attended to most, and move it together. Knows tensors and places in a block
table; knows no schedule.

The heavy-hitter oracle (Zhang et al. 2023, arXiv 2306.14048): a token's score is the sum of the attention that every
query since has given to it, and each head of each layer keeps the tokens with the highest scores beside the recent
ones. Differences from the paper: tokens leave whenever 64 more have come, the older blocks of the recent ones being up
for choice, and not one by one; query heads that share a key share its score; a prompt is treated like an answer, while
the paper reads it whole and then chooses, so the later tokens of a long one do not see what left.

A block table is shared by all heads, and heads keep different tokens. That is no contradiction: keys carry their
position since they were rotated, so a place may hold one token for one head and another one for the next. What is kept
out of the older blocks moves into the places of what is not, head by head, and those blocks are free.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


# L layers, B blocks, K key/value heads, P positions of a block, C candidates, M moves
def keep_heavy_hitters(
    parts_LBKP: Sequence[torch.Tensor],
    attention_LBKP: torch.Tensor,
    block_ids: Sequence[int],
    num_kept: int,
    num_candidates: int,
) -> None:
    """Of a sequence's first `num_candidates` places bring the `num_kept` most attended ones to the front.

    For each layer and head by itself; what else those places held is gone. `parts_LBKP` are the tensors that hold
    something of each token (views in any order of memory), the scores are moved with them. Both counts are whole
    blocks.
    """
    size = attention_LBKP.shape[3]
    assert num_kept % size == num_candidates % size == 0 and num_kept <= num_candidates
    blocks = torch.tensor(list(block_ids[: num_candidates // size]))
    scores_LKC = attention_LBKP[:, blocks].transpose(1, 2).flatten(2)
    is_kept_LKC = torch.zeros_like(scores_LKC, dtype=torch.bool)
    is_kept_LKC.scatter_(2, scores_LKC.topk(num_kept, dim=2).indices, True)
    # as many of each head, in the same order of layers and heads
    layers_M, heads_M, holes_M = (~is_kept_LKC[:, :, :num_kept]).nonzero().unbind(1)
    places_M = is_kept_LKC[:, :, num_kept:].nonzero()[:, 2] + num_kept
    for part in (*parts_LBKP, attention_LBKP):
        moved = part[layers_M, blocks[places_M // size], heads_M, places_M % size]
        part[layers_M, blocks[holes_M // size], heads_M, holes_M % size] = moved
