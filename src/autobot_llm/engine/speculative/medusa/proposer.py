"""Medusa's heads as a method of the engine. Knows heads and the last hidden state of each sequence; knows nothing of
caches: what it needs of a step is one row, so a prefix that was found, a chunk or a preemption make no difference.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC

import torch

from autobot_llm.engine.executor import FeatureKinds, Features
from autobot_llm.engine.sequence import Sequence
from autobot_llm.engine.speculative.guesses import rank_guesses
from autobot_llm.engine.speculative.medusa.config import TREE_CANDIDATES
from autobot_llm.engine.speculative.medusa.heads import StackedHeads
from autobot_llm.engine.speculative.medusa.tree import choose_tree
from autobot_llm.engine.speculative.proposer import Computed, Draft


# S sequences, K heads, E hidden size, V vocabulary, N ranks
class MedusaProposer:
    """CostlyProposer of trees of the heads' best tokens.

    `accuracies[k][r]`: how often the r-th candidate of head k is right, which the trees are chosen by. A draft that is
    asked to be d tokens deep has at most `breadth` * d of them, and no more than `tree_candidates` with its root: where
    a token to verify has its price, as on a CPU, a `breadth` of 1 spends no more on a tree than on a line.
    """

    name = "medusa"
    wanted: FeatureKinds | None = FeatureKinds(hidden=True)

    def __init__(
        self,
        heads: StackedHeads,
        accuracies: SequenceABC[SequenceABC[float]],
        *,
        breadth: int = 1,
        tree_candidates: int = TREE_CANDIDATES,
    ) -> None:
        self.heads = heads
        self.trees = [
            choose_tree(accuracies[:depth], min(1 + breadth * depth, tree_candidates))
            for depth in range(1, heads.num_heads + 1)
        ]
        self._hidden: dict[int, tuple[int, torch.Tensor]] = {}  # by sequence id: its tokens then, and its state E

    def observe(self, computed: SequenceABC[Computed], features: Features) -> None:
        assert features.hidden_RE is not None
        for part in computed:
            if part.logit_row is not None:
                self._hidden[part.sequence.id] = (len(part.sequence.token_ids), features.hidden_RE[part.logit_row])

    def lag(self, sequence: Sequence) -> int:
        return 1

    def propose(self, sequences: SequenceABC[Sequence], num_tokens: int) -> list[Draft | None]:
        """One pass of the heads for all; nothing for a sequence whose last token was not seen to be chosen."""
        drafts: list[Draft | None] = [None] * len(sequences)
        ready = [i for i, sequence in enumerate(sequences) if self._is_known(sequence)]
        if not ready:
            return drafts
        tree = self.trees[min(num_tokens, len(self.trees)) - 1]
        num_heads, num_ready = tree.max_depth, len(ready)
        hidden_SE = torch.stack([self._hidden[sequences[i].id][1] for i in ready])
        ids_RN = rank_guesses(
            self.heads.logits(hidden_SE, num_heads).flatten(0, 1),
            [sequences[i].params for i in ready] * num_heads,
            [len(sequences[i].token_ids) + head for head in range(num_heads) for i in ready],
            tree.max_rank + 1,
        )
        ids_KSN = ids_RN.reshape(num_heads, num_ready, -1)
        heads, ranks = [depth - 1 for depth in tree.depths[1:]], list(tree.ranks[1:])
        parents = [parent - 1 for parent in tree.parents[1:]]  # a draft's tokens are counted without the root
        for place, i in enumerate(ready):
            drafts[i] = Draft(ids_KSN[heads, place, ranks].tolist(), parents=parents)
        return drafts

    def forget(self, sequence: Sequence) -> None:
        self._hidden.pop(sequence.id, None)

    def close(self) -> None:
        """Nothing to release: the heads go with this object."""

    def _is_known(self, sequence: Sequence) -> bool:
        return sequence.id in self._hidden and self._hidden[sequence.id][0] == len(sequence.token_ids)
