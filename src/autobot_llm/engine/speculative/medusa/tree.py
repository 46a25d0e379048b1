"""A tree of candidate tokens: who follows whom, who sees whom, and which shape is worth its rows. Knows ranks and
probabilities; knows nothing of models.

Node 0 is the root: the token that is known already and goes into the step as its first row. Every other node is "the
token that head `depth - 1` ranks `rank`-th", after its parent. Nodes are in order of depth, so that a parent comes
before its children and an accepted path has rising numbers.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from autobot_llm.errors import ConfigurationError

RankPath = tuple[int, ...]
"""A node by the ranks on the way to it: (0, 2) is the third choice of head 1 after the first choice of head 0."""


# N nodes, L leaves, P length of the longest path
@dataclass(frozen=True)
class CandidateTree:
    """`parents[i] < i` for every node but the root, whose parent is -1; `ranks[0]` is 0 and means nothing."""

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.parents) != len(self.ranks):
            raise ConfigurationError(f"a tree of {len(self.parents)} parents and {len(self.ranks)} ranks")
        if not self.parents or self.parents[0] != -1:
            raise ConfigurationError("a tree begins with its root, whose parent is -1")
        for node, parent in enumerate(self.parents[1:], start=1):
            if not 0 <= parent < node:
                raise ConfigurationError(f"node {node} of a tree has parent {parent}: expected 0 to {node - 1}")

    @classmethod
    def from_rank_paths(cls, paths: Sequence[Sequence[int]]) -> CandidateTree:
        """The tree of these nodes, the root aside, in any order. Format: `medusa_choices` of published heads.

        Raises ConfigurationError for a node whose parent is missing or that is named twice.
        """
        ordered: list[RankPath] = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
        number: dict[RankPath, int] = {(): 0}
        for path in ordered:
            if path in number:
                raise ConfigurationError(f"the tree names the path {list(path)} twice")
            if path[:-1] not in number:
                raise ConfigurationError(f"the tree has {list(path)} without its parent {list(path[:-1])}")
            number[path] = len(number)
        return cls(parents=(-1, *(number[path[:-1]] for path in ordered)), ranks=(0, *(path[-1] for path in ordered)))

    @property
    def num_nodes(self) -> int:
        """Rows of a verification, the root's included."""
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Positions after the root's; a node's position in the sequence is the root's plus this."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @property
    def max_depth(self) -> int:
        return max(self.depths)

    @property
    def max_rank(self) -> int:
        return max(self.ranks)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        found: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], start=1):
            found[parent].append(node)
        return tuple(map(tuple, found))

    def path_to(self, node: int) -> tuple[int, ...]:
        """The nodes from the root to `node`, both included."""
        path = []
        while node >= 0:
            path.append(node)
            node = self.parents[node]
        return tuple(reversed(path))

    def rank_paths(self) -> list[list[int]]:
        """What `from_rank_paths` makes this tree of."""
        return [[self.ranks[node] for node in self.path_to(leaf)[1:]] for leaf in range(1, self.num_nodes)]

    @cached_property
    def retrieval(self) -> torch.Tensor:
        """The nodes from the root to each leaf, filled up with -1: int64 on the CPU."""
        leaves = [node for node, below in enumerate(self.children) if not below]
        rows = [list(self.path_to(leaf)) for leaf in leaves]
        width = self.max_depth + 1
        return torch.tensor([row + [-1] * (width - len(row)) for row in rows])

    @cached_property
    def mask(self) -> torch.Tensor:
        """True where the row's node sees the column's: itself and its ancestors. bool on the CPU."""
        mask = torch.zeros(self.num_nodes, self.num_nodes, dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                mask[node] = mask[parent]
            mask[node, node] = True
        return mask


def choose_tree(accuracies: Sequence[Sequence[float]], num_nodes: int) -> CandidateTree:
    """The tree of at most `num_nodes` nodes, the root included, with the most expected tokens for a step.

    `accuracies[k][r]` is the measured share of positions at which the r-th candidate of head k is the right token. A
    path's probability is taken for the product of its nodes', as in the paper. A child is never more probable than its
    parent, so taking the most probable node that can be attached, again and again, is optimal.
    """
    if num_nodes < 1:
        raise ConfigurationError(f"num_nodes={num_nodes}: expected 1 or more")
    chosen: list[RankPath] = []
    attachable = _children((), 1.0, accuracies)
    heapq.heapify(attachable)
    while attachable and len(chosen) < num_nodes - 1:
        negative, path = heapq.heappop(attachable)
        chosen.append(path)
        for child in _children(path, -negative, accuracies):
            heapq.heappush(attachable, child)
    return CandidateTree.from_rank_paths(chosen)


def _children(
    path: RankPath, probability: float, accuracies: Sequence[Sequence[float]]
) -> list[tuple[float, RankPath]]:
    if len(path) >= len(accuracies):
        return []
    ranked = accuracies[len(path)]
    return [(-probability * share, (*path, rank)) for rank, share in enumerate(ranked) if share > 0.0]


def expected_tokens(tree: CandidateTree, accuracies: Sequence[Sequence[float]]) -> float:
    """Tokens that one step is expected to yield: the model's own and one for each node on the accepted path.

    The same assumption as in `choose_tree`; nodes beyond the accuracies count as never right.
    """
    probabilities = [1.0]
    for parent, rank, depth in zip(tree.parents[1:], tree.ranks[1:], tree.depths[1:], strict=True):
        known = depth <= len(accuracies) and rank < len(accuracies[depth - 1])
        probabilities.append(probabilities[parent] * (accuracies[depth - 1][rank] if known else 0.0))
    return sum(probabilities)
