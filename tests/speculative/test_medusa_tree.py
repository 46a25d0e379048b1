"""Candidate trees: their shape follows the accuracies, and acceptance on them follows the model."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autobot_llm.engine.speculative.medusa import CandidateTree, choose_tree, expected_tokens
from autobot_llm.engine.speculative.medusa.acceptance import (
    accept_exact,
    accepted_leaf,
    cache_moves,
    is_typical,
    matches_target,
)
from autobot_llm.errors import ConfigurationError

PATHS = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1]]
ACCURACIES = [[0.6, 0.2, 0.1], [0.4, 0.15, 0.05], [0.3, 0.1, 0.1]]


@st.composite
def trees(draw: st.DrawFn) -> CandidateTree:
    num_nodes = draw(st.integers(1, 24))
    parents = [-1] + [draw(st.integers(0, node - 1)) for node in range(1, num_nodes)]
    num_children = [0] * num_nodes
    paths: list[list[int]] = [[]]
    for node in range(1, num_nodes):
        paths.append([*paths[parents[node]], num_children[parents[node]]])
        num_children[parents[node]] += 1
    return CandidateTree.from_rank_paths(paths[1:])


def test_a_tree_of_rank_paths_has_their_parents_depths_and_mask() -> None:
    tree = CandidateTree.from_rank_paths(reversed(PATHS))  # type: ignore[arg-type]
    assert tree.rank_paths() == PATHS
    assert tree.parents == (-1, 0, 0, 0, 1, 1, 2, 4, 4)
    assert tree.depths == (0, 1, 1, 1, 2, 2, 2, 3, 3)
    assert tree.retrieval.tolist() == [[0, 3, -1, -1], [0, 1, 5, -1], [0, 2, 6, -1], [0, 1, 4, 7], [0, 1, 4, 8]]
    assert tree.mask[8].nonzero().flatten().tolist() == [0, 1, 4, 8]


@given(trees())
def test_a_node_sees_itself_and_its_ancestors_alone(tree: CandidateTree) -> None:
    for node in range(tree.num_nodes):
        assert tree.mask[node].nonzero().flatten().tolist() == sorted(tree.path_to(node))
    assert CandidateTree.from_rank_paths(tree.rank_paths()) == tree


@pytest.mark.parametrize("paths", [[[0], [0]], [[1, 0]], [[0], [1, 2]]])
def test_a_tree_without_a_parent_or_with_a_node_twice_is_refused(paths: list[list[int]]) -> None:
    with pytest.raises(ConfigurationError):
        CandidateTree.from_rank_paths(paths)


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 4, 5, 6])
def test_the_chosen_tree_is_the_best_of_all_trees_of_its_size(num_nodes: int) -> None:
    nodes = [path for depth in (1, 2, 3) for path in itertools.product(range(3), repeat=depth)]
    best = 0.0
    for chosen in itertools.combinations(nodes, num_nodes - 1):
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen):
            best = max(best, expected_tokens(CandidateTree.from_rank_paths(chosen), ACCURACIES))
    assert expected_tokens(choose_tree(ACCURACIES, num_nodes), ACCURACIES) == pytest.approx(best)


def test_more_nodes_yield_more_and_never_more_nodes_than_asked_for() -> None:
    yields = []
    for num_nodes in (1, 2, 8, 16, 40):
        tree = choose_tree(ACCURACIES, num_nodes)
        assert tree.num_nodes == min(num_nodes, 40)
        yields.append(expected_tokens(tree, ACCURACIES))
    assert yields == sorted(yields)
    assert yields[0] == 1.0
    assert yields[-1] == pytest.approx(1 + 0.9 + 0.9 * 0.6 + 0.9 * 0.6 * 0.5)


@given(trees(), st.data())
def test_exact_acceptance_is_the_longest_path_of_the_models_choices(tree: CandidateTree, data: st.DataObject) -> None:
    tokens = [data.draw(st.integers(0, 50)) for _ in range(tree.num_nodes)]
    for siblings in tree.children:  # siblings propose different tokens
        for i, node in enumerate(siblings):
            tokens[node] = 3 * (tokens[node] % 3) + i if i < 3 else 100 + i
    target = [data.draw(st.integers(0, 8)) for _ in range(tree.num_nodes)]
    accepted = accept_exact(tree, tokens, target)
    standing = [
        node
        for node in range(tree.num_nodes)
        if all(tokens[i] == target[tree.parents[i]] for i in tree.path_to(node)[1:])
    ]
    deepest = max(standing, key=lambda node: tree.depths[node])
    assert accepted.nodes == tree.path_to(deepest)
    assert accepted.tokens == (*(tokens[i] for i in accepted.nodes[1:]), target[deepest])
    assert accepted.lossless and accepted.num_accepted == tree.depths[deepest]
    tokens_1N, target_1N = torch.tensor([tokens]), torch.tensor([target])
    assert accepted_leaf(tree, matches_target(tree, tokens_1N, target_1N)).tolist() == [deepest]


def test_a_batch_is_accepted_row_by_row() -> None:
    tree = CandidateTree.from_rank_paths(PATHS)
    tokens_BN = torch.arange(9).expand(3, 9)
    target_BN = torch.full((3, 9), 99)
    target_BN[0, 0], target_BN[0, 1], target_BN[0, 4] = 1, 4, 8
    target_BN[2, 0], target_BN[2, 4] = 2, 7  # node 7's own parent agrees, the nodes above do not
    assert accepted_leaf(tree, matches_target(tree, tokens_BN, target_BN)).tolist() == [8, 0, 2]


def test_typical_acceptance_takes_likely_tokens_and_is_stricter_where_the_model_is_sure() -> None:
    tree = CandidateTree.from_rank_paths([[0], [1]])
    sure = torch.tensor([0.75, 0.25, 0.0, 0.0])
    flat = torch.tensor([0.25, 0.25, 0.25, 0.25])
    tokens_1N = torch.tensor([[3, 0, 1]])
    for distribution, expected in ((sure, [True, False]), (flat, [True, True])):
        stands = is_typical(tree, tokens_1N, distribution.expand(1, 3, 4), 0.3)
        assert stands[0, 1:].tolist() == expected


@given(trees())
def test_moving_the_accepted_rows_lays_the_path_in_a_row(tree: CandidateTree) -> None:
    for leaf in range(tree.num_nodes):
        rows = list(range(tree.num_nodes))
        path = tree.path_to(leaf)
        for source, place in zip(*cache_moves(path), strict=True):
            rows[place] = rows[source]
        assert tuple(rows[: len(path)]) == path
