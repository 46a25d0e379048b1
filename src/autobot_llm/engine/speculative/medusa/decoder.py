"""Medusa as one object: load heads, make a tree of candidates, verify it. Knows heads, trees and acceptance; knows
nothing of the scheduler, and keeps no cache.

`generate` is the whole method in its plainest form, all of the context computed again in every step: what the engine
does with a cache must give the same tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from autobot_llm.engine.speculative.medusa.acceptance import (
    Accepted,
    accept_exact,
    accepted_leaf,
    is_typical,
)
from autobot_llm.engine.speculative.medusa.checkpoint import load_medusa_heads
from autobot_llm.engine.speculative.medusa.config import NUM_RANKS, MedusaConfig
from autobot_llm.engine.speculative.medusa.heads import StackedHeads
from autobot_llm.engine.speculative.medusa.tree import CandidateTree, choose_tree
from autobot_llm.errors import ConfigurationError

log = logging.getLogger(__name__)

Acceptance = Literal["exact", "typical"]


def assumed_accuracies(num_heads: int) -> list[list[float]]:
    """A guess for heads that nobody measured: 60 % for the first choice of head 0 as in the paper, less for each rank
    and head. Only the shape of the tree depends on it."""
    first = [0.6, 0.12, 0.055, 0.033, 0.022, 0.016, 0.012, 0.009, 0.007, 0.006]
    return [[share * 0.75**head for share in first] for head in range(num_heads)]


# T tokens, N nodes, E hidden size, V vocabulary
@dataclass(frozen=True, slots=True)
class Candidates:
    """A tree and its tokens: `tokens_N[0]` is the root's, which the model itself chose. int64 on the heads' device."""

    tree: CandidateTree
    tokens_N: torch.Tensor


class Target(Protocol):
    """A model without a cache. Row t sees the rows that `mask_TT` says; positions are int64."""

    def __call__(
        self, ids_T: torch.Tensor, positions_T: torch.Tensor, mask_TT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed hidden states TE and the logits TV."""


class MedusaDecoder:
    """Heads, their tree and a rule of acceptance.

    `lm_head_VE` is the model's own projection: for heads without one, and for the root's token where the caller does
    not give it. `tree` None takes the one that was measured with the heads, else one for `assumed_accuracies`.
    `acceptance` "exact" is lossless; "typical" is lossy and says so in what it returns.
    """

    def __init__(
        self,
        config: MedusaConfig | None = None,
        *,
        lm_head_VE: torch.Tensor | None = None,
        tree: CandidateTree | None = None,
        acceptance: Acceptance = "exact",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if acceptance not in ("exact", "typical"):
            raise ConfigurationError(f"acceptance={acceptance!r}: expected exact or typical")
        self.config = config or MedusaConfig()
        self._lm_head_VE = lm_head_VE
        self._given_tree = tree
        self._acceptance = acceptance
        self._dtype, self._device = dtype, torch.device(device)
        self._heads: StackedHeads | None = None
        self._tree = tree or self._fitting(None, None, self.config.num_heads)

    @property
    def tree(self) -> CandidateTree:
        return self._tree

    @property
    def num_heads(self) -> int:
        """Heads that are loaded; 0 before `load_heads`."""
        return 0 if self._heads is None else self._heads.num_heads

    def load_heads(self, path: str | Path | Mapping[str, Any]) -> bool:
        """Take the heads of a folder, a file or a dictionary: True. False where nothing is at `path`.

        Raises ModelLoadError for what is there and does not fit (see `load_medusa_heads`), ConfigurationError for a
        tree that asks for more heads.
        """
        if isinstance(path, str):
            path = Path(path)
        if isinstance(path, Path) and not path.exists():
            log.warning("%s: no Medusa heads there", path)
            return False
        config = self.config
        loaded = load_medusa_heads(
            path,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            max_heads=config.num_heads,
            lm_head_VE=self._lm_head_VE,
            dtype=self._dtype,
            device=self._device,
        )
        num_heads = len(loaded.heads)
        about = loaded.about
        tree = self._given_tree or self._fitting(about.medusa_choices, about.medusa_head_accuracies, num_heads)
        if tree.max_depth > num_heads:
            raise ConfigurationError(f"the tree is {tree.max_depth} tokens deep, and there are {num_heads} heads")
        self._heads, self._tree = StackedHeads(loaded.heads), tree
        return True

    def _fitting(
        self, choices: list[list[int]] | None, accuracies: list[list[float]] | None, num_heads: int
    ) -> CandidateTree:
        """The tree for the configured number of nodes: by accuracies if they are known, else the stored one."""
        limit = self.config.tree_candidates
        if accuracies is None and choices is not None and len(choices) < limit:
            return CandidateTree.from_rank_paths(choices)
        return choose_tree((accuracies or assumed_accuracies(num_heads))[:num_heads], limit)

    def generate_candidates(self, hidden_states: torch.Tensor, next_token: int | None = None) -> Candidates:
        """The best `NUM_RANKS` tokens of each head at their places in the tree.

        `hidden_states` is the normed hidden state E (or TE, whose last row counts) that the model computes its next
        token from; `next_token` is that token, by default the model's likeliest.
        """
        if self._heads is None:
            raise ConfigurationError("no Medusa heads are loaded: call load_heads first")
        if hidden_states.shape[-1] != self.config.hidden_size:
            raise ConfigurationError(
                f"hidden states of {hidden_states.shape[-1]} for heads of hidden_size={self.config.hidden_size}"
            )
        hidden_1E = hidden_states.reshape(-1, self.config.hidden_size)[-1:].to(self._dtype)
        if next_token is None:
            if self._lm_head_VE is None:
                raise ConfigurationError("next_token is needed where the model's projection was not given")
            next_token = int(F.linear(hidden_1E, self._lm_head_VE.to(self._dtype)).argmax())
        tree = self._tree
        num_ranks = min(max(NUM_RANKS, tree.max_rank + 1), self.config.vocab_size)
        best_KR = self._heads.top_tokens(hidden_1E, num_ranks)[0]
        tokens_N = torch.empty(tree.num_nodes, dtype=torch.int64, device=best_KR.device)
        tokens_N[0] = next_token
        if tree.num_nodes > 1:
            heads = torch.tensor(tree.depths[1:], device=best_KR.device) - 1
            tokens_N[1:] = best_KR[heads, torch.tensor(tree.ranks[1:], device=best_KR.device)]
        return Candidates(tree, tokens_N)

    def verify_and_accept(self, candidates: Candidates, target_probs: torch.Tensor) -> Accepted:
        """The path that stands, given the model's probabilities NV after each node.

        Exact: every token is the likeliest one, as in greedy decoding, and the result is lossless. (A sampling caller
        draws each node's token with the noise of its position and calls `accept_exact`.) Typical: lossy; the deepest
        path of likely enough tokens stands, and the likeliest token follows it.
        """
        tree, tokens_N = candidates.tree, candidates.tokens_N
        if target_probs.shape[0] != tree.num_nodes:
            raise ConfigurationError(f"probabilities of {target_probs.shape[0]} rows for {tree.num_nodes} nodes")
        likeliest = target_probs.argmax(dim=-1).tolist()
        tokens: Sequence[int] = tokens_N.tolist()
        if self._acceptance == "exact":
            return accept_exact(tree, tokens, likeliest)
        threshold = self.config.typical_acceptance_threshold
        stands_1N = is_typical(tree, tokens_N[None], target_probs[None], threshold)
        path = tree.path_to(int(accepted_leaf(tree, stands_1N)[0]))
        return Accepted(path, (*(tokens[i] for i in path[1:]), likeliest[path[-1]]), lossless=False)

    def generate(self, target: Target, prompt_ids: Sequence[int], max_tokens: int) -> Iterator[Accepted]:
        """Decode greedily, a step at a time, until `max_tokens` tokens or `max_steps` steps; the slow twin.

        The tokens of the steps, one after the other, are the answer; the first step yields the model's first token
        alone. End-of-sequence tokens are the caller's to see.
        """
        ids = list(prompt_ids)
        hidden_TE, logits_TV = target(*_causal(ids, self._device))
        hidden, token = hidden_TE[-1], int(logits_TV[-1].argmax())
        yield Accepted((), (token,))
        num_tokens = 1
        for _ in range(self.config.max_steps):
            if num_tokens >= max_tokens:
                return
            candidates = self.generate_candidates(hidden, token)
            hidden_TE, logits_TV = target(*_with_tree(ids, candidates, self._device))
            first = len(ids)
            probabilities_NV = logits_TV[first:].double().softmax(dim=-1)  # float32 would round near-ties to ties
            accepted = self.verify_and_accept(candidates, probabilities_NV)
            ids += candidates.tokens_N[list(accepted.nodes)].tolist()
            hidden, token = hidden_TE[first + accepted.nodes[-1]], accepted.tokens[-1]
            num_tokens += len(accepted.tokens)
            yield accepted


def _causal(ids: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens = len(ids)
    mask_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril_()
    return torch.tensor(ids, device=device), torch.arange(num_tokens, device=device), mask_TT


def _with_tree(
    ids: Sequence[int], candidates: Candidates, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows of the context and then of the tree, whose nodes see the context and their ancestors."""
    tree, first = candidates.tree, len(ids)
    ids_T, positions_T, mask_TT = _causal([*ids, *candidates.tokens_N.tolist()], device)
    positions_T[first:] = first + torch.tensor(tree.depths, device=device)
    mask_TT[first:, first:] = tree.mask.to(device)
    return ids_T, positions_T, mask_TT
