"""Medusa's heads as a method of the engine. Knows heads and the last hidden state of each sequence; knows nothing of
caches: what it needs of a step is one row, so a prefix that was found, a chunk or a preemption make no difference.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC

import torch

from autobot_llm.engine.executor import FeatureKinds, Features
from autobot_llm.engine.sequence import Sequence
from autobot_llm.engine.speculative.guesses import rank_guesses
from autobot_llm.engine.speculative.medusa.heads import StackedHeads
from autobot_llm.engine.speculative.proposer import Computed, Draft


# S sequences, K heads, E hidden size, V vocabulary, N ranks
class MedusaProposer:
    """CostlyProposer of the best token of each head, one after the other."""

    name = "medusa"
    wanted: FeatureKinds | None = FeatureKinds(hidden=True)

    def __init__(self, heads: StackedHeads) -> None:
        self._heads = heads
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
        num_tokens = min(num_tokens, self._heads.num_heads)
        ready = [i for i, sequence in enumerate(sequences) if self._is_known(sequence)]
        drafts: list[Draft | None] = [None] * len(sequences)
        if not ready:
            return drafts
        hidden_SE = torch.stack([self._hidden[sequences[i].id][1] for i in ready])
        logits_KSV = self._heads.logits(hidden_SE, num_tokens)
        ids_RN = rank_guesses(
            logits_KSV.flatten(0, 1),
            [sequences[i].params for i in ready] * num_tokens,
            [len(sequences[i].token_ids) + head for head in range(num_tokens) for i in ready],
            1,
        )
        for i, ids_K in zip(ready, ids_RN.reshape(num_tokens, len(ready)).T.tolist(), strict=True):
            drafts[i] = Draft(ids_K)
        return drafts

    def forget(self, sequence: Sequence) -> None:
        self._hidden.pop(sequence.id, None)

    def close(self) -> None:
        """Nothing to release: the heads go with this object."""

    def _is_known(self, sequence: Sequence) -> bool:
        return sequence.id in self._hidden and self._hidden[sequence.id][0] == len(sequence.token_ids)
