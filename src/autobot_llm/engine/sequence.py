"""One sequence of tokens on its way through the engine. Knows tokens and blocks; knows nothing of tensors or text.

There is no "prefill" and no "decode": a sequence has tokens, of which `num_computed_tokens` are in the KV cache,
and each step lets it catch up.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autobot_llm.engine.grammar.matcher import Grammar
    from autobot_llm.engine.kv_cache.block_pool import PrefixBlock

UNKNOWN_TOKEN = -1  # stands in token_ids for a token that the device has not told yet
NO_ROW = -1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when to end. Already validated; every value is concrete.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off. `seed` makes the
    sequence's tokens a function of (prompt, parameters, seed) alone. `num_logprobs` None: none are wanted;
    0: the chosen token's only. Under a `grammar` only tokens that it allows are chosen. Stop strings live with the
    text, in the engine's detokenizer.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    num_logprobs: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    grammar: Grammar | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


class Sequence:
    """The mutable state of one sequence. Only the device thread touches it after it was queued.

    `block_ids[i]` holds the keys and values of tokens [16 i, 16 i + 16), and `published[i]` is that block's entry in
    the pool's prefix index (the list is as long as its full blocks of resolved steps). `salt` keeps tenants' prefixes
    apart. `priority`: lower goes sooner, where the scheduling policy heeds it.

    Between a step's launch and its end the sequence counts the step as done, with UNKNOWN_TOKEN as its last token;
    `pending_row` is then the row of that step which samples it, else NO_ROW. `epoch` counts how often the sequence
    lost its blocks, so that what a step says of blocks it no longer has can be told apart.

    `num_evicted_tokens` of the computed tokens have left the cache again (batching/retention.py), so `block_ids` hold
    as many fewer: unless it is 0, block_ids[i] is not that of tokens [16 i, 16 i + 16).

    `draft_ids` are guesses at the tokens after the last one, to be computed and verified in the next step. Where they
    branch, `draft_parents` says which follows which (draft_tree.py); it is empty for a line. While only the device
    knows them they are UNKNOWN_TOKEN, and `draft_rows` says where it finds each.

    `leader` is an earlier sequence with the same prompt (another choice of one request): this one waits until the
    leader's prompt is computed, then shares its blocks. `matcher` is where its answer stands in its grammar.
    """

    __slots__ = (
        "arrival_time", "block_ids", "draft_ids", "draft_parents", "draft_rows", "epoch", "first_scheduled_time",
        "id", "leader", "matcher", "max_num_tokens", "num_cached_tokens", "num_computed_tokens", "num_evicted_tokens",
        "num_preemptions", "num_prompt_tokens", "params", "pending_row", "priority", "published", "queue_position",
        "salt", "token_ids",
    )  # fmt: skip

    def __init__(
        self,
        sequence_id: int,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        salt: str = "",
        leader: Sequence | None = None,
        priority: int = 0,
    ) -> None:
        assert prompt_ids, "an empty prompt is refused before it becomes a sequence"
        self.id = sequence_id
        self.token_ids = list(prompt_ids)
        self.num_prompt_tokens = len(prompt_ids)
        self.max_num_tokens = len(prompt_ids) + params.max_tokens
        self.params = params
        self.salt = salt
        self.leader = leader
        self.matcher = None if params.grammar is None else params.grammar.start()
        self.priority = priority
        self.num_computed_tokens = 0
        self.num_evicted_tokens = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.pending_row = NO_ROW
        self.draft_ids: list[int] = []
        self.draft_parents: list[int] = []
        self.draft_rows: list[int] = []
        self.epoch = 0
        self.block_ids: array[int] = array("i")  # int32, so that a step's block table takes it as one copy
        self.published: list[PrefixBlock] = []
        self.queue_position = 0
        self.arrival_time = time.monotonic()
        self.first_scheduled_time: float | None = None

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def fill_in(self, position: int, token: int | None) -> None:
        """Replace the placeholder at this position by what was sampled; None: drop it and what follows."""
        if len(self.token_ids) == position + 1:  # else a later step goes on from this token
            self.pending_row = NO_ROW
        if token is None:
            del self.token_ids[position:]
        else:
            self.token_ids[position] = token
