"""Texts as vectors: the mean of what the last layer made of a text's tokens, of length 1.

Knows steps, blocks and hidden states; knows nothing of what the vectors are for. Runs between two steps of the engine,
on its thread, in blocks of its own that nobody else finds. Several texts share a step. A text's vector does not depend
on which: its tokens are added up in their order, each as the step computed it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as SequenceABC
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from autobot_llm.engine.batching.plan import ScheduledSequence, build_batch
from autobot_llm.engine.batching.retention import give_blocks_back, take_blocks_beside_the_schedule
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.executor import HiddenExecutor
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.errors import ContextLengthError, EngineError, InvalidRequestError, OverloadedError, UnsupportedError

MAX_STEP_TOKENS = 256  # everybody else's next token waits for them
_SEQUENCE_ID = -3


class TextEmbedding:
    """Embeds texts in steps: call `advance` until it is true, then `release`, which may be called at any time.

    `vectors` then holds a text's vector (float32, Euclidean length 1) at its place. Raises InvalidRequestError for a
    text without tokens.
    """

    def __init__(self, texts: SequenceABC[SequenceABC[int]]) -> None:
        for place, token_ids in enumerate(texts):
            if not token_ids:
                raise InvalidRequestError(f"input[{place}]: it has no tokens", param=f"input[{place}]")
        self._texts = [_Text(token_ids) for token_ids in texts]
        self._first = 0  # of the texts that are not done
        self._is_checked = False

    @property
    def vectors(self) -> list[array[float]]:
        return [text.vector for text in self._texts]

    def advance(self, engine: Engine) -> bool:
        """Compute up to MAX_STEP_TOKENS tokens more; true once all are known.

        Raises UnsupportedError where the engine's executor has no hidden states to give, ContextLengthError and
        InvalidRequestError for a text that the model cannot read, OverloadedError where the KV cache has no room beside
        those who use it now, and EngineError for NaN.
        """
        executor = engine.executor
        if not isinstance(executor, HiddenExecutor):
            raise UnsupportedError(f"the step '{executor.name}' makes no embeddings", param="model")
        if not self._is_checked:
            self._check(engine)
            self._is_checked = True
        step = self._next_step(engine)
        scheduled = [
            ScheduledSequence(text.sequence, text.num_done, num_tokens, samples=True) for text, num_tokens in step
        ]
        batch = build_batch(scheduled, engine.scheduler.block_pool.block_size)
        batch = replace(batch, logit_rows_R=np.arange(batch.num_tokens, dtype=np.int64))
        hidden_RE = executor.hidden(batch).cpu().numpy()
        if not np.isfinite(hidden_RE).all():
            executor.discard([block for text, _ in step for block in text.sequence.block_ids])
            raise EngineError("the model made NaN of a text to be embedded")
        for (text, num_tokens), start in zip(step, batch.query_starts, strict=False):
            text.add(hidden_RE[start : start + num_tokens])
            if text.is_done:
                self._free(engine, text)
                self._first += 1
        return self._first == len(self._texts)

    def release(self, engine: Engine) -> None:
        """Give the blocks back."""
        for text in self._texts:
            self._free(engine, text)

    def _check(self, engine: Engine) -> None:
        context, vocab_size = engine.scheduler.max_model_len, engine.config.vocab_size
        for place, text in enumerate(self._texts):
            param = f"input[{place}]"
            if text.num_tokens > context:
                raise ContextLengthError(
                    f"{param}: a text of {text.num_tokens:,} tokens cannot be embedded: the model's context is "
                    f"{context:,}",
                    param=param,
                )
            wrong = next((i for i in text.sequence.token_ids if not 0 <= i < vocab_size), None)
            if wrong is not None:
                raise InvalidRequestError(
                    f"{param}: token id {wrong} is outside of the vocabulary (0 to {vocab_size - 1})", param=param
                )

    def _next_step(self, engine: Engine) -> list[tuple[_Text, int]]:
        """The texts of the next step and how many tokens of each: in order, as many as there are blocks for."""
        scheduler = engine.scheduler
        num_left = min(MAX_STEP_TOKENS, scheduler.max_num_batched_tokens)
        step: list[tuple[_Text, int]] = []
        for text in self._texts[self._first : self._first + scheduler.max_num_seqs]:
            if not num_left or not self._has_blocks(engine, text):
                break
            limit = scheduler.retention.policy.longest_step(text.num_done, num_left)
            num_tokens = min(limit, text.num_tokens - text.num_done)
            step.append((text, num_tokens))
            num_left -= num_tokens
        if not step:
            raise OverloadedError("the KV cache has no room for a text to be embedded", retry_after=1.0)
        return step

    @staticmethod
    def _has_blocks(engine: Engine, text: _Text) -> bool:
        scheduler = engine.scheduler
        return take_blocks_beside_the_schedule(
            text.sequence, text.num_done, MAX_STEP_TOKENS, scheduler.retention, scheduler.block_pool
        )

    @staticmethod
    def _free(engine: Engine, text: _Text) -> None:
        give_blocks_back(text.sequence, engine.scheduler.block_pool)


class _Text:
    """One text, and the sum of its tokens so far."""

    def __init__(self, token_ids: SequenceABC[int]) -> None:
        self.sequence = Sequence(_SEQUENCE_ID, list(token_ids), SamplingParams(max_tokens=1))
        self.num_tokens = len(token_ids)
        self.num_done = 0
        self._sum_E: npt.NDArray[np.float64] | None = None

    @property
    def is_done(self) -> bool:
        return self.num_done == self.num_tokens

    # N new tokens, E hidden size
    def add(self, hidden_NE: npt.NDArray[np.float32]) -> None:
        for hidden_E in hidden_NE.astype(np.float64):  # one after the other, so that no cut into steps shows
            self._sum_E = hidden_E if self._sum_E is None else self._sum_E + hidden_E
        self.num_done += len(hidden_NE)

    @property
    def vector(self) -> array[float]:
        assert self.is_done and self._sum_E is not None, "it was advanced to its end"
        unit_E = self._sum_E / max(float(np.linalg.norm(self._sum_E)), 1e-12)  # the mean and the sum point one way
        return array("f", unit_E.astype(np.float32).tobytes())
