"""The shape of a draft that branches. Knows which token follows which; knows nothing of sequences, logits or tensors.

A shape is a list of parents: for each drafted token the index of the one that it follows, -1 for the sequence's last
token. Parents come before their children, so the first tokens of a tree are a tree, and a path has rising indices.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC

ROOT = -1
"""The sequence's last token, as a parent."""

MAX_TREE_TOKENS = 64
"""New tokens of a sequence in one step whose draft is a tree, its last token included: the bits of a mask."""

Parents = SequenceABC[int]


def is_tree(parents: Parents) -> bool:
    """Whether every parent comes before its children."""
    return all(ROOT <= parent < node for node, parent in enumerate(parents))


def is_line(parents: Parents) -> bool:
    """Whether each token follows the one before it."""
    return all(parent == node - 1 for node, parent in enumerate(parents))


def depths(parents: Parents) -> list[int]:
    """How many places after the sequence's last token each drafted one stands: at least 1."""
    found: list[int] = []
    for parent in parents:
        found.append(1 if parent == ROOT else found[parent] + 1)
    return found


def masks(parents: Parents) -> list[int]:
    """Which new tokens each new token sees, the sequence's last one being the first of them: bit j for the j-th."""
    found = [1]
    for node, parent in enumerate(parents):
        found.append(found[parent + 1] | 1 << (node + 1))
    return found


def path_to(parents: Parents, node: int) -> list[int]:
    """The tokens from the first one to `node`."""
    path = []
    while node != ROOT:
        path.append(node)
        node = parents[node]
    return path[::-1]


def first_path(parents: Parents) -> list[int]:
    """The first child of the first child and so on: what a proposer takes for the best guess."""
    path: list[int] = []
    last = ROOT
    for node, parent in enumerate(parents):
        if parent == last:
            path.append(node)
            last = node
    return path


def leaves(parents: Parents) -> list[int]:
    """The tokens that none follows."""
    followed = set(parents)
    return [node for node in range(len(parents)) if node not in followed]


def renumbered(parents: Parents, kept: SequenceABC[int]) -> list[int]:
    """The parents of the tokens that are kept, in rising order and each with its parent."""
    place = {ROOT: ROOT} | {node: i for i, node in enumerate(kept)}
    return [place[parents[node]] for node in kept]
