"""Medusa's heads as a method of the engine. Knows heads and the last hidden state of each sequence; knows nothing of
caches: what it needs of a step is one row, so a prefix that was found, a chunk or a preemption make no difference.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from autobot_llm.engine.executor import FeatureKinds, Features
from autobot_llm.engine.sequence import Sequence
from autobot_llm.engine.speculative.guesses import num_candidates, rank_candidates
from autobot_llm.engine.speculative.medusa.config import TREE_CANDIDATES
from autobot_llm.engine.speculative.medusa.tree import CandidateTree, choose_tree
from autobot_llm.engine.speculative.proposer import Computed, Draft

WANTED = FeatureKinds(hidden=True)


# S sequences, K heads, E hidden size, N ranks, C candidates
class Heads(Protocol):
    """What guesses from hidden states: StackedHeads on a CPU, DeviceHeads on a GPU."""

    num_heads: int

    def candidates(
        self, hidden_S: SequenceABC[torch.Tensor], num_heads: int, num_best: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The best tokens ids_KSC of the first heads, and their logits KSC, the best first, from S hidden states E."""
        ...

    def close(self) -> None: ...


class MedusaProposer:
    """CostlyProposer of trees of the heads' best tokens.

    `accuracies[k][r]`: how often the r-th candidate of head k is right, which the trees are chosen by. A draft that is
    asked to be d tokens deep has at most `breadth` * d of them, and no more than TREE_CANDIDATES with its root: where
    a token to verify has its price, as on a CPU, a `breadth` of 1 spends no more on a tree than on a line. `max_rows`:
    tokens of all trees of a step with their roots, where the step takes no more.
    """

    name = "medusa"
    wanted: FeatureKinds | None = WANTED

    def __init__(
        self,
        heads: Heads,
        accuracies: SequenceABC[SequenceABC[float]],
        *,
        breadth: int = 1,
        max_rows: int | None = None,
    ) -> None:
        self.heads = heads
        self._accuracies = accuracies
        self._breadth = breadth
        self._max_rows = max_rows
        self._trees: dict[tuple[int, int], CandidateTree] = {}
        self._hidden: dict[int, tuple[int, torch.Tensor]] = {}  # by sequence id: its tokens then, and its state E

    def observe(self, computed: SequenceABC[Computed], features: Features) -> None:
        assert features.hidden_RE is not None
        for part in computed:
            if part.logit_row is not None:
                num_known = part.start + len(part.token_rows) + 1  # with the token that was chosen
                self._hidden[part.sequence.id] = (num_known, features.hidden_RE[part.logit_row])

    def lag(self, sequence: Sequence) -> int:
        return 1

    def propose(self, sequences: SequenceABC[Sequence], num_tokens: int) -> list[Draft | None]:
        """One pass of the heads for all; nothing for a sequence whose last token was not seen to be chosen."""
        drafts: list[Draft | None] = [None] * len(sequences)
        ready = [i for i, sequence in enumerate(sequences) if self._is_known(sequence)]
        if not ready:
            return drafts
        num_ready = len(ready)
        tree = self.tree(num_tokens, num_ready)
        num_heads, num_ranks = tree.max_depth, tree.max_rank + 1
        params = [sequences[i].params for i in ready]
        ids_KSC, logits_KSC = self.heads.candidates(
            [self._hidden[sequences[i].id][1] for i in ready], num_heads, num_candidates(params, num_ranks)
        )
        num_rows = num_heads * num_ready
        ids_RN = rank_candidates(
            ids_KSC.reshape(num_rows, -1),
            logits_KSC.reshape(num_rows, -1),
            params * num_heads,
            [len(sequences[i].token_ids) + head for head in range(num_heads) for i in ready],
            num_ranks,
        )
        ids_KSN = ids_RN.reshape(num_heads, num_ready, -1)
        heads, ranks = [depth - 1 for depth in tree.depths[1:]], list(tree.ranks[1:])
        parents = [parent - 1 for parent in tree.parents[1:]]  # a draft's tokens are counted without the root
        for place, i in enumerate(ready):
            drafts[i] = Draft(ids_KSN[heads, place, ranks].tolist(), parents=parents)
        return drafts

    def num_passes(self, num_tokens: int) -> int:
        return 1

    def tree(self, num_tokens: int, num_sequences: int) -> CandidateTree:
        """The tree of so many tokens' depth for each of so many sequences."""
        depth = min(num_tokens, self.heads.num_heads)
        num_nodes = min(1 + self._breadth * depth, TREE_CANDIDATES)
        if self._max_rows is not None:  # one of few sizes, each of which is chosen once
            share = max(2, self._max_rows // num_sequences)
            num_nodes = min(num_nodes, 1 << (share.bit_length() - 1))
        tree = self._trees.get((depth, num_nodes))
        if tree is None:
            tree = self._trees[depth, num_nodes] = choose_tree(self._accuracies[:depth], num_nodes)
        return tree

    def forget(self, sequence: Sequence) -> None:
        self._hidden.pop(sequence.id, None)

    def close(self) -> None:
        self.heads.close()

    def _is_known(self, sequence: Sequence) -> bool:
        return sequence.id in self._hidden and self._hidden[sequence.id][0] == len(sequence.token_ids)
