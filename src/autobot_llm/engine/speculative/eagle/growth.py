"""A draft tree that grows level by level. Knows tokens and probabilities; knows nothing of the network that gives them.

Level by level, the best tokens after each of the most probable nodes are found; of all nodes found the most probable
stay. A parent is never less probable than its child, so they form a tree. Source: EAGLE-2 (arXiv 2406.16858). With one
token after one node it is a chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Node:
    token: int
    parent: int  # its number; -1: none
    rank: int
    depth: int
    log_probability: float  # of the whole path
    row: int = -1  # in the draft's cache, once it is expanded


class Growth:
    """Node 0 is the root: the known token. `frontier` holds the nodes that the next level follows."""

    def __init__(self, root_token: int) -> None:
        self.nodes = [Node(root_token, -1, 0, 0, 0.0)]
        self.frontier = [0]
        self._level: list[int] = []

    def add_level(self, tokens_MN: Sequence[Sequence[int]], log_shares_MN: Sequence[Sequence[float]]) -> None:
        """The best tokens after each node of the frontier, with the logarithms of their probabilities there."""
        self._level = []
        for parent, tokens, shares in zip(self.frontier, tokens_MN, log_shares_MN, strict=True):
            before = self.nodes[parent]
            for rank, (token, share) in enumerate(zip(tokens, shares, strict=True)):
                self._level.append(len(self.nodes))
                self.nodes.append(Node(token, parent, rank, before.depth + 1, before.log_probability + share))

    def advance(self, num_nodes: int, first_row: int) -> list[int]:
        """Let the most probable nodes of the last level be the frontier, in rows from `first_row` on. Returns the
        place of each one's parent in the frontier before."""
        place = {node: i for i, node in enumerate(self.frontier)}
        self.frontier = sorted(self._level, key=lambda node: -self.nodes[node].log_probability)[:num_nodes]
        for i, node in enumerate(self.frontier):
            self.nodes[node].row = first_row + i
        return [place[self.nodes[node].parent] for node in self.frontier]

    def rows_to(self, node: int) -> list[int]:
        """The rows of an expanded node and of its ancestors, the root's aside."""
        rows = []
        while node > 0:
            rows.append(self.nodes[node].row)
            node = self.nodes[node].parent
        return rows

    def best(self, num_nodes: int) -> list[Node]:
        """The most probable nodes, the root included, in order of depth and with `parent` counted among them."""
        found = range(1, len(self.nodes))
        ranked = sorted(found, key=lambda node: (-self.nodes[node].log_probability, self.nodes[node].depth))
        kept = [0, *sorted(ranked[: num_nodes - 1], key=lambda node: (self.nodes[node].depth, node))]
        number = {node: i for i, node in enumerate(kept)} | {-1: -1}
        return [
            Node(node.token, number[node.parent], node.rank, node.depth, node.log_probability)
            for node in (self.nodes[i] for i in kept)
        ]
