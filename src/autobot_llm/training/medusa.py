"""Train Medusa heads on a frozen model (Medusa-1). Knows the loss and its labels; knows nothing of texts.

Head k learns, at each position of an answer, the target's own choice two and more tokens ahead: the label is the
target's argmax after the text as it stands, which on greedy answers is the text itself. Later heads count less.
Source: section 2.2.1 of the paper (weights 0.8^k).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
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
from autobot_llm.training.loop import Group

WEIGHT_DECAY = 0.8  # of a head's weight against the one before it
NUM_TREE_NODES = 64
NUM_HEADS = 5


# B sequences, S positions, R rows that count, E hidden size, K heads
@dataclass(frozen=True, slots=True)
class MedusaOptions:
    """`num_layers` residual blocks a head; None: 1, or 2 with a shared projection. `shares_lm_head` None: where the
    model ties its embeddings, heads use its projection; else each has its own, as published."""

    num_heads: int = NUM_HEADS
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

    def groups(self) -> list[Group]:
        return [Group(list(self.heads.parameters()))]

    def learn(self, batch: Batch) -> torch.Tensor:
        total = torch.zeros((), device=batch.ids_BS.device)
        normed_TE, choice_R = _of_target(self.model, batch)
        for head, (rows_RE, labels_R) in enumerate(rows_and_labels(batch, normed_TE, choice_R, len(self.heads))):
            with self._autocast():
                logits_RV = self.heads.head_logits(head, rows_RE)
            loss = WEIGHT_DECAY**head * F.cross_entropy(logits_RV.float(), labels_R, reduction="sum")
            loss = loss / max(1, labels_R.shape[0])
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()  # a head's graph is given up before the next one's is made
        return total

    def evaluate(self, answers: Answers, batch_size: int) -> Accuracies:
        return count_right(self.model, self.heads, answers, batch_size, self._autocast)

    def state(self) -> dict[str, torch.Tensor]:
        return self.heads.state_dict()

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.heads.load_state_dict(state)

    def export(self, folder: Path, accuracies: Accuracies) -> None:
        save(folder, self.heads, self.model.name, accuracies)

    def _autocast(self) -> torch.autocast:
        """bfloat16 on a GPU; master weights stay float32."""
        device = self.model.weights.device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")


def rows_and_labels(
    batch: Batch, normed_TE: torch.Tensor, choice_R: torch.Tensor, num_heads: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each head the hidden states at which its drafts begin, and its labels there.

    `normed_TE`: those of all positions. `choice_R`: what the target chooses where that is part of the answer, in the
    order of `batch.drafts_from(1)`.
    """
    known_R = batch.drafts_from(1)
    choice_T = torch.zeros(normed_TE.shape[0], dtype=torch.int64, device=normed_TE.device)
    choice_T[known_R] = choice_R
    for head in range(num_heads):
        # the target's choice after token p + 1 + head is what head `head` proposes at p
        rows_R = batch.drafts_from(2 + head)
        yield normed_TE[rows_R], choice_T[rows_R + 1 + head]


@torch.no_grad()
def count_right(
    model: Model, heads: MedusaHeads, answers: Answers, batch_size: int, autocast: Callable[[], torch.autocast]
) -> Accuracies:
    """How often the heads' candidates are the choice of `model`."""
    counts = RankCounts()
    for category in sorted(set(answers.categories)):
        members = answers.rows([i for i, name in enumerate(answers.categories) if name == category])
        for batch in members.batches(batch_size, random.Random(0)):
            with autocast():
                normed_TE, choice_R = _of_target(model, batch)
                for head, (rows_RE, labels_R) in enumerate(rows_and_labels(batch, normed_TE, choice_R, len(heads))):
                    best_RN = heads.head_logits(head, rows_RE).topk(NUM_RANKS, dim=-1).indices
                    counts.add(category, head, best_RN, labels_R)
    return counts.accuracies()


def save(folder: Path, heads: MedusaHeads, model: str, accuracies: Accuracies) -> None:
    """Write the heads with their accuracies and the tree that is best by them."""
    shares = accuracies.overall
    tree = choose_tree(shares, NUM_TREE_NODES)
    save_medusa_heads(folder, heads, base_model=model, choices=tree.rank_paths(), accuracies=shares)


@torch.no_grad()
def _of_target(model: Model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states of all positions, and the choices where they are part of the answer."""
    normed_TE = model.hidden(batch.ids_BS).normed_BSE.flatten(0, 1)
    return normed_TE, model.logits(normed_TE[batch.drafts_from(1)]).argmax(dim=-1)
