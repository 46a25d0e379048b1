"""How likely a model finds a text that is given: log probabilities of its tokens, without generating any.

Knows steps, blocks and logits; knows nothing of what the figures are for. Runs between two steps of the engine, on its
thread, in blocks of its own that nobody else finds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceABC
from dataclasses import replace

import numpy as np
import torch

from autobot_llm.engine.batching.plan import ScheduledSequence, build_batch
from autobot_llm.engine.batching.retention import give_blocks_back, take_blocks_beside_the_schedule
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.errors import ContextLengthError, EngineError, OverloadedError

LOGIT_BYTES = 64 * 2**20  # of one step: each row holds a float for every token of the vocabulary
MAX_STEP_TOKENS = 256  # everybody else's next token waits for them
_SEQUENCE_ID = -2


class PromptScoring:
    """Scores one text in steps: call `advance` until it is true, then `release`, which may be called at any time.

    `logprobs` holds the log probability (natural logarithm) of each token but the first, given those before it.
    """

    def __init__(self, token_ids: SequenceABC[int]) -> None:
        self.logprobs: list[float] = []
        self._sequence = Sequence(_SEQUENCE_ID, list(token_ids), SamplingParams(max_tokens=1))
        self._num_wanted = len(token_ids) - 1

    def advance(self, engine: Engine) -> bool:
        """Compute up to MAX_STEP_TOKENS more; true once all are known.

        Raises ContextLengthError for more tokens than the model's context, OverloadedError where the KV cache has no
        room beside those who use it now, and EngineError for NaN.
        """
        self._take_blocks(engine)
        start = len(self.logprobs)
        num_rows = max(1, LOGIT_BYTES // (4 * engine.config.vocab_size))
        limit = min(num_rows, MAX_STEP_TOKENS, engine.scheduler.max_num_batched_tokens)
        limit = engine.scheduler.retention.policy.longest_step(start, limit)
        if (num_tokens := min(limit, self._num_wanted - start)) > 0:
            self.logprobs += self._step(engine, start, num_tokens)
        return len(self.logprobs) == self._num_wanted

    def release(self, engine: Engine) -> None:
        """Give the blocks back."""
        give_blocks_back(self._sequence, engine.scheduler.block_pool)

    def _take_blocks(self, engine: Engine) -> None:
        num_tokens, limit = self._num_wanted + 1, engine.scheduler.max_model_len
        if num_tokens > limit:
            raise ContextLengthError(
                f"a text of {num_tokens:,} tokens cannot be scored: the model's context is {limit:,}"
            )
        scheduler, num_done = engine.scheduler, len(self.logprobs)
        if not take_blocks_beside_the_schedule(
            self._sequence, num_done, MAX_STEP_TOKENS, scheduler.retention, scheduler.block_pool
        ):
            raise OverloadedError("the KV cache has no room for a text to be scored", retry_after=1.0)

    # R rows whose logits are wanted, V vocabulary
    def _step(self, engine: Engine, start: int, num_tokens: int) -> list[float]:
        scheduled = [ScheduledSequence(self._sequence, start, num_tokens, samples=True)]
        batch = build_batch(scheduled, engine.scheduler.block_pool.block_size)
        batch = replace(batch, logit_rows_R=np.arange(num_tokens, dtype=np.int64))
        logits_RV = engine.executor.execute(batch)
        targets_R1 = torch.tensor(self._sequence.token_ids[start + 1 : start + 1 + num_tokens])[:, None]
        logprobs_RV = logits_RV.float().log_softmax(-1)
        found: list[float] = logprobs_RV.gather(1, targets_R1.to(logits_RV.device)).flatten().tolist()
        if any(map(math.isnan, found)):
            engine.executor.discard(list(self._sequence.block_ids))
            raise EngineError("the model made NaN of a text to be scored")
        return found
