"""Which path of a candidate tree stands, once the model has spoken at every node. Knows tokens and distributions; knows
nothing of who proposed them.

Exact acceptance is lossless: a node stands if its token is the one that the model chose after the node's parent, by
argmax or by a draw with the noise of that position, so the result is what decoding one by one gives. Typical acceptance
is lossy: it takes tokens that the model finds likely enough, whatever it would have chosen itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autobot_llm.engine.speculative.medusa.tree import CandidateTree


@dataclass(frozen=True, slots=True)
class Accepted:
    """`nodes` is the path that stands, the root first; `tokens` are those of its nodes after the root, and then the
    model's own next one. `lossless`: they are what decoding one by one gives."""

    nodes: tuple[int, ...]
    tokens: tuple[int, ...]
    lossless: bool = True

    @property
    def num_accepted(self) -> int:
        """Proposed tokens that stand."""
        return len(self.nodes) - 1


# B sequences, N nodes, V vocabulary
def accept_exact(tree: CandidateTree, tokens: Sequence[int], target_tokens: Sequence[int]) -> Accepted:
    """Follow the model's own choices down the tree.

    `tokens[i]` is node i's token, `target_tokens[i]` what the model chooses after it.
    """
    node, path = 0, [0]
    while True:
        wanted = target_tokens[node]
        following = next((child for child in tree.children[node] if tokens[child] == wanted), None)
        if following is None:
            return Accepted(tuple(path), (*(tokens[i] for i in path[1:]), wanted))
        path.append(following)
        node = following


def accepted_leaf(tree: CandidateTree, stands_BN: torch.Tensor) -> torch.Tensor:
    """The deepest node for each sequence that stands together with all of its ancestors; the first of several. int64 B.

    `stands_BN` says of each node whether it may follow its parent; the root always stands. No value leaves the device.
    """
    device = stands_BN.device
    mask_NN = tree.mask.to(device)
    root = torch.zeros(tree.num_nodes, dtype=torch.bool, device=device)
    root[0] = True
    whole_BN = ((stands_BN | root)[:, None, :] | ~mask_NN).all(dim=-1)
    depths_N = torch.tensor(tree.depths, device=device)
    return torch.where(whole_BN, depths_N, -1).argmax(dim=-1)


def matches_target(tree: CandidateTree, tokens_BN: torch.Tensor, target_BN: torch.Tensor) -> torch.Tensor:
    """`stands_BN` of exact acceptance."""
    parents_N = torch.tensor(tree.parents, device=tokens_BN.device).clamp_(min=0)
    return tokens_BN == target_BN.index_select(1, parents_N)


def is_typical(
    tree: CandidateTree, tokens_BN: torch.Tensor, probabilities_BNV: torch.Tensor, threshold: float
) -> torch.Tensor:
    """`stands_BN` of typical acceptance: p(token) > min(threshold, sqrt(threshold) * exp(-entropy)), after the parent.

    A flat distribution lowers the bar, a sharp one leaves it at `threshold`. Lossy. Source: section 2.3.1 of the paper
    (epsilon = `threshold`, delta = its root).
    """
    parents_N = torch.tensor(tree.parents, device=tokens_BN.device).clamp_(min=0)
    after_parent_BNV = probabilities_BNV.index_select(1, parents_N).float()
    entropy_BN = -torch.special.xlogy(after_parent_BNV, after_parent_BNV).sum(dim=-1)
    bar_BN = (threshold**0.5 * torch.exp(-entropy_BN)).clamp_(max=threshold)
    likely_BN: torch.Tensor = after_parent_BNV.gather(-1, tokens_BN[..., None])[..., 0] > bar_BN
    return likely_BN


def cache_moves(nodes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Which rows of a verification to move where, so that the keys and values of the path that stands lie in a row.

    Sources and destinations, counted from the root's row, in an order in which nothing is overwritten before it is
    read. Rows that lie where they should are left out, and all rows after the path are free.
    """
    moves = [(node, place) for place, node in enumerate(nodes) if node != place]
    return [source for source, _ in moves], [place for _, place in moves]
