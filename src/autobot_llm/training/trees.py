"""What trees of so many nodes would yield with measured heads. Knows metrics.json; knows nothing of models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autobot_llm.engine.speculative.medusa.tree import choose_tree, expected_tokens
from autobot_llm.errors import ConfigurationError
from autobot_llm.training.accuracy import OVERALL, Accuracies, read_accuracies
from autobot_llm.training.loop import METRICS_FILE


@dataclass(frozen=True, slots=True)
class TreeYield:
    """`expected[category]`: tokens of a step, its own included, if accuracies at different places were independent.
    `num_nodes` counts the root; `rank_paths` are `medusa_choices`."""

    num_nodes: int
    max_depth: int
    expected: dict[str, float]
    rank_paths: list[list[int]]


def read_metrics(folder: Path) -> Accuracies:
    """Raises ConfigurationError where `folder` holds no finished training."""
    path = folder / METRICS_FILE
    try:
        return read_accuracies(json.loads(path.read_text(encoding="utf-8"))["accuracies"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigurationError(f"{path}: no metrics of a finished training: {exc!r}") from exc


def tree_yields(accuracies: Accuracies, sizes: Sequence[int]) -> list[TreeYield]:
    """One tree of each size, chosen by the overall accuracies, and what it yields in each category."""
    yields = []
    for size in sizes:
        tree = choose_tree(accuracies.overall, size)
        order = [OVERALL, *sorted(set(accuracies.by_category) - {OVERALL})]
        expected = {category: expected_tokens(tree, accuracies.by_category[category]) for category in order}
        yields.append(TreeYield(tree.num_nodes, tree.max_depth, expected, tree.rank_paths()))
    return yields
