"""Train Medusa heads on a frozen model (Medusa-1). Knows the loss and its labels; knows nothing of texts.

Head k learns, at each position of an answer, the target's own choice two and more tokens ahead: the label is the
target's argmax after the text as it stands, which on greedy answers is the text itself. Later heads count less.
Source: section 2.2.1 of the paper (weights 0.8^k).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from autobot_llm.engine.speculative.medusa.checkpoint import save_medusa_heads
from autobot_llm.engine.speculative.medusa.heads import MedusaHeads
from autobot_llm.engine.speculative.medusa.tree import choose_tree
from autobot_llm.training.accuracy import NUM_RANKS, Accuracies, RankCounts
from autobot_llm.training.answers import Answers, Batch
from autobot_llm.training.forward import Model

WEIGHT_DECAY = 0.8  # of a head's weight against the one before it
NUM_TREE_NODES = 64


# B sequences, S positions, R rows that count, E hidden size, K heads
@dataclass(frozen=True, slots=True)
class MedusaOptions:
    """`num_layers` residual blocks a head. `shares_lm_head` None: where the model ties its embeddings, heads use its
    projection; else each has its own, as published."""

    num_heads: int = 5
    num_layers: int | None = None
    shares_lm_head: bool | None = None


class MedusaTask:
    name = "medusa"

    def __init__(self, model: Model, options: MedusaOptions) -> None:
        shares = options.shares_lm_head
        if shares is None:
            shares = model.config.tie_word_embeddings
        weights = model.weights
        self.model = model
        self.heads = MedusaHeads(
            options.num_heads,
            model.config.hidden_size,
            model.config.vocab_size,
            num_layers=options.num_layers or (2 if shares else 1),
            lm_head_VE=weights.lm_head_VE if shares else None,
        ).to(weights.device)
        if not shares:
            with torch.no_grad():
                for head in self.heads:
                    head[-1].weight.copy_(weights.lm_head_VE)  # type: ignore[index]

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        return self.heads.parameters()

    def learn(self, batch: Batch) -> torch.Tensor:
        total = torch.zeros((), device=batch.ids_BS.device)
        for head, (rows_RE, labels_R) in enumerate(self._rows(batch)):
            with self._autocast():
                logits_RV = self.heads.head_logits(head, rows_RE)
            loss = WEIGHT_DECAY**head * F.cross_entropy(logits_RV.float(), labels_R, reduction="sum")
            loss = loss / max(1, labels_R.shape[0])
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()  # a head's graph is given up before the next one's is made
        return total

    @torch.no_grad()
    def evaluate(self, answers: Answers, batch_size: int) -> Accuracies:
        counts = RankCounts()
        for category in sorted(set(answers.categories)):
            members = answers.rows([i for i, name in enumerate(answers.categories) if name == category])
            for batch in members.batches(batch_size, random.Random(0)):
                for head, (rows_RE, labels_R) in enumerate(self._rows(batch)):
                    with self._autocast():
                        best_RN = self.heads.head_logits(head, rows_RE).topk(NUM_RANKS, dim=-1).indices
                    counts.add(category, head, best_RN, labels_R)
        return counts.accuracies()

    def state(self) -> dict[str, torch.Tensor]:
        return self.heads.state_dict()

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.heads.load_state_dict(state)

    def export(self, folder: Path, accuracies: Accuracies) -> None:
        shares = accuracies.overall
        tree = choose_tree(shares, NUM_TREE_NODES)
        save_medusa_heads(folder, self.heads, base_model=self.model.name, choices=tree.rank_paths(), accuracies=shares)

    def _rows(self, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each head the hidden states at which its drafts begin, and its labels there."""
        with torch.no_grad():
            normed_RE = self.model.hidden(batch.ids_BS).normed_BSE.flatten(0, 1)
            known_R = batch.drafts_from(1)
            choice_R = torch.zeros(normed_RE.shape[0], dtype=torch.int64, device=normed_RE.device)
            choice_R[known_R] = self.model.logits(normed_RE[known_R]).argmax(dim=-1)
        for head in range(len(self.heads)):
            # the target's choice after token p + 1 + head is what head `head` proposes at p
            rows_R = batch.drafts_from(2 + head)
            yield normed_RE[rows_R], choice_R[rows_R + 1 + head]

    def _autocast(self) -> torch.autocast:
        """bfloat16 on a GPU; master weights stay float32."""
        device = self.model.weights.device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")
