"""How often a proposal is the target's own choice: by category, by place in the draft, by rank. Knows counts; knows
nothing of who proposes.

The target's choice is its argmax after the real text before that place, so every figure is for a draft whose earlier
tokens were right: what decides how far a draft gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

NUM_RANKS = 10
OVERALL = "overall"


# R rows, N ranks
@dataclass(slots=True)
class RankCounts:
    """Counts of hits by (category, place) and rank, and of rows looked at."""

    hits: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    rows: dict[tuple[str, int], int] = field(default_factory=dict)

    def add(self, category: str, place: int, best_RN: torch.Tensor, right_R: torch.Tensor) -> None:
        """Count rows of proposals, the best first, against the right tokens."""
        hits_N = (best_RN == right_R[:, None]).sum(dim=0).cpu()
        key = category, place
        self.hits[key] = self.hits[key] + hits_N if key in self.hits else hits_N
        self.rows[key] = self.rows.get(key, 0) + right_R.shape[0]

    def accuracies(self) -> Accuracies:
        categories = sorted({category for category, _ in self.hits})
        places = 1 + max((place for _, place in self.hits), default=-1)
        by_category = {category: self._shares([category], places) for category in categories}
        return Accuracies({OVERALL: self._shares(categories, places), **by_category})

    def _shares(self, categories: Sequence[str], places: int) -> list[list[float]]:
        shares = []
        for place in range(places):
            keys = [(category, place) for category in categories if (category, place) in self.hits]
            num_rows = max(1, sum(self.rows[key] for key in keys))
            hits = sum((self.hits[key] for key in keys), torch.zeros(NUM_RANKS, dtype=torch.int64))
            shares.append([hit / num_rows for hit in hits.tolist()])
        return shares


@dataclass(frozen=True, slots=True)
class Accuracies:
    """`by_category[category][place][rank]`: the share of rows whose rank-th proposal was right. "overall" is one."""

    by_category: Mapping[str, list[list[float]]]

    @property
    def overall(self) -> list[list[float]]:
        return self.by_category[OVERALL]

    def top(self, num_ranks: int, category: str = OVERALL) -> list[float]:
        """The share of rows, for each place, with the right token among the first `num_ranks`."""
        return [sum(shares[:num_ranks]) for shares in self.by_category[category]]

    def document(self) -> dict[str, Any]:
        """As JSON: for each category the shares within the first 1, 5 and 10, and each rank's."""
        return {
            category: {
                **{f"top{n}": [round(share, 4) for share in self.top(n, category)] for n in (1, 5, 10)},
                "by_rank": [[round(share, 5) for share in shares] for shares in by_rank],
            }
            for category, by_rank in self.by_category.items()
        }


def read_accuracies(document: Mapping[str, Any]) -> Accuracies:
    """The inverse of `Accuracies.document`. Raises KeyError for what is none."""
    return Accuracies({category: value["by_rank"] for category, value in document.items()})
