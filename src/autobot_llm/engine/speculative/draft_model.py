"""Drafts from a small model of the same vocabulary. Knows an executor of its own, with a KV cache of its own; knows
nothing of the target.

It draws with the target's noise (seed, position, token id) and the request's temperature and limits, so that both
choose the same token wherever their distributions allow: see acceptance.py. Penalties, bias and grammars are left to
the target.

The cache is a pool apart from the target's: blocks of both would have to be of one size, and the target's scheduler
would have to preempt for guesses. It is paged and finds prefixes in the same way. Where it is full, the sequences that
were not drafted for lately give their blocks up; what is missing is computed again.
"""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as SequenceABC
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from autobot_llm.engine.batching.plan import ScheduledSequence, StepBatch, build_batch
from autobot_llm.engine.executor import (
    ChainExecutor,
    Executor,
    FeatureKinds,
    Features,
    LaunchedChain,
    PipelinedExecutor,
    Unverified,
)
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.sampler import Sampler, SamplingArraysBuilder, SamplingFailure
from autobot_llm.engine.sequence import NO_ROW, UNKNOWN_TOKEN, SamplingParams, Sequence
from autobot_llm.engine.speculative.chain import Chain, known, make_room
from autobot_llm.engine.speculative.proposer import Computed, Draft, LaunchedDrafts


class _Chain(NamedTuple):
    """Passes under way, for whom, and how many of the tokens are given out."""

    launched: LaunchedChain
    shadows: list[Sequence]
    num_tokens: int
    num_given: int

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """Of those that are given out, for each sequence."""
        return self.launched.rows.reshape(self.num_tokens, len(self.shadows))[: self.num_given].T


class DraftModel:
    """LaunchingProposer over an executor that nobody else uses. `vocab_size` is the target's, which the executor's
    logits are cut to; `max_tokens` and `max_model_len` are the executor's limits for a step and for a sequence."""

    name = "draft"
    wanted: FeatureKinds | None = None
    most_read = 64

    def __init__(
        self, executor: Executor, pool: BlockPool, *, vocab_size: int, max_tokens: int, max_model_len: int
    ) -> None:
        self.executor = executor
        self.pool = pool
        self._vocab_size = vocab_size
        self._sampler = Sampler(vocab_size)
        self._sampling_arrays = SamplingArraysBuilder(vocab_size)
        self._pipelined = executor if isinstance(executor, PipelinedExecutor) else None
        self._chains = executor if isinstance(executor, ChainExecutor) else None
        self._max_tokens = max_tokens
        self._max_model_len = max_model_len
        self._shadows: OrderedDict[int, Sequence] = OrderedDict()  # least recently drafted for first
        self._under_way: _Chain | None = None  # whose drafts a step of the target verifies
        self._behind: _Chain | None = None  # and the one that goes on from its verdict

    def observe(self, computed: SequenceABC[Computed], features: Features) -> None:
        """It looks at tokens alone."""

    def take_in(self, computed: SequenceABC[Computed], features: Features) -> None:
        """Queue the passes over prompts that the step under way ends."""
        shadows = []
        for sequence, start, token_rows, _ in computed:
            ends = start + len(token_rows) == sequence.num_prompt_tokens - 1
            if ends and sequence.id not in self._shadows and len(sequence.token_ids) <= self._max_model_len:
                shadow = self._shadows[sequence.id] = self._shadow(sequence)
                if make_room(self.pool, shadow, len(shadow.token_ids)):
                    shadows.append(shadow)
        for parts in self._steps(shadows, num_left=1):
            self.executor.execute(build_batch(parts, self.pool.block_size))

    def lag(self, sequence: Sequence) -> int:
        shadow = self._shadows.get(sequence.id)
        if shadow is None:
            return len(sequence.token_ids)
        if sequence.token_ids[-1] == UNKNOWN_TOKEN:
            return len(sequence.token_ids) - min(shadow.num_prompt_tokens, shadow.num_computed_tokens)
        self._follow(shadow, sequence)
        return len(shadow.token_ids) - shadow.num_computed_tokens

    def propose(self, sequences: SequenceABC[Sequence], num_tokens: int) -> list[Draft | None]:
        """One pass over what is missing of every sequence, then one for each further token."""
        drafting = self._catch_up_with(sequences, num_tokens)
        if self._pipelined is not None:
            self._chain(self._pipelined, [self._shadows[i] for i in drafting], num_tokens)
        else:
            for _ in range(num_tokens):
                drafting = self._pass(drafting)
        drafts = (known(self._shadows[s.id].token_ids[len(s.token_ids) :]) for s in sequences)
        return [Draft(token_ids) if token_ids else None for token_ids in drafts]

    def launch(self, sequences: SequenceABC[Sequence], num_tokens: int) -> LaunchedDrafts | None:
        """The same passes as one launch, where all have room. What a chain's first pass does not take is computed
        before it."""
        if self._chains is None or not sequences:
            return None
        drafting = self._catch_up_with(sequences, num_tokens)
        shadows = [self._shadows[i] for i in drafting]
        behind, self._behind = self._behind, None
        if behind is not None and behind.shadows == shadows and behind.num_tokens >= num_tokens:
            return self._give_out(behind._replace(num_given=num_tokens))
        if len(drafting) < len(sequences) or not self._chains.takes_chain([1] * len(shadows), num_tokens):
            return None
        before: list[StepBatch] = []
        missing = [_num_missing(shadow) for shadow in shadows]
        if not self._chains.takes_chain(missing, num_tokens):
            before = [build_batch(parts, self.pool.block_size) for parts in self._steps(shadows, num_left=1)]
            missing = [_num_missing(shadow) for shadow in shadows]
        parts = [ScheduledSequence(s, s.num_computed_tokens, n, True) for s, n in zip(shadows, missing, strict=True)]
        batch = build_batch(parts, self.pool.block_size)
        offsets = [offset for offset in range(num_tokens) for _ in shadows]
        sampling = self._sampling_arrays.build(shadows * num_tokens, offsets)
        launched = self._chains.launch_chain(batch, sampling, num_tokens, before=before)
        return self._give_out(_Chain(launched, shadows, num_tokens, num_tokens))

    def launch_behind(self, sequences: SequenceABC[Sequence], num_tokens: int, first_rows: list[int]) -> bool:
        before, wanted = self._under_way, {s.id for s in sequences}
        shadows = [self._shadows[s.id] for s in sequences if s.id in self._shadows]
        if self._chains is None or before is None or before.shadows != shadows:
            return False
        # as far as if all drafts were right, and one token more
        has_room = all(self._make_room(shadow, num_tokens + 1, wanted) for shadow in shadows)
        if not has_room or not self._chains.takes_chain([2] * len(shadows), num_tokens):
            return False
        parts = [ScheduledSequence(s, len(s.token_ids) - before.num_tokens - 1, 2, True) for s in shadows]
        batch = build_batch(parts, self.pool.block_size)
        number = before.num_given + num_tokens
        offsets = [offset for offset in range(1 - before.num_tokens, 1 - before.num_tokens + number) for _ in shadows]
        sampling = self._sampling_arrays.build(shadows * number, offsets)
        after = Unverified(np.array(first_rows), before.rows)
        self._behind = _Chain(
            self._chains.launch_chain(batch, sampling, num_tokens, after), shadows, num_tokens, num_tokens
        )
        return True

    def drop_behind(self) -> None:
        self._behind = None

    def num_passes(self, num_tokens: int) -> int:
        return num_tokens

    def forget(self, sequence: Sequence) -> None:
        shadow = self._shadows.pop(sequence.id, None)
        if shadow is not None:
            self.pool.free(shadow.block_ids)
            self._sampler.forget(shadow)

    def close(self) -> None:
        self.executor.close()

    def _catch_up_with(self, sequences: SequenceABC[Sequence], num_tokens: int) -> list[int]:
        """Follow the sequences; returns the ids of those that have room for so many tokens more."""
        for sequence in sequences:
            if (shadow := self._shadows.get(sequence.id)) is not None:
                self._follow(shadow, sequence)
                self._shadows.move_to_end(sequence.id)
            else:
                self._shadows[sequence.id] = self._shadow(sequence)
        wanted = {s.id for s in sequences}
        return [s.id for s in sequences if self._make_room(self._shadows[s.id], num_tokens, wanted)]

    def _give_out(self, chain: _Chain) -> LaunchedDrafts:
        """Take a chain as computed."""
        number, shadows = chain.num_tokens, chain.shadows
        for shadow in shadows:
            shadow.num_computed_tokens = len(shadow.token_ids) + number - 1
            shadow.token_ids.extend([UNKNOWN_TOKEN] * number)
        self._under_way = chain
        return LaunchedDrafts(chain.rows.tolist(), lambda: self._settle(chain))

    def _settle(self, chain: _Chain) -> tuple[list[Draft | None], float]:
        """Fill in what a chain has drawn."""
        self._under_way = None
        token_ids, bests = chain.launched.wait()
        drafts: list[Draft | None] = []
        for i, shadow in enumerate(chain.shadows):
            found = [
                self._target_id(token_ids[row]) if math.isfinite(bests[row]) else UNKNOWN_TOKEN
                for row in range(i, len(token_ids), len(chain.shadows))
            ]
            shadow.token_ids[-chain.num_tokens :] = found
            if UNKNOWN_TOKEN in found:
                self._behind = None  # the device has compared it all the same
            given = known(found[: chain.num_given])
            drafts.append(Draft(given) if given else None)
        return drafts, chain.launched.seconds * chain.num_given / chain.num_tokens

    def _shadow(self, sequence: Sequence) -> Sequence:
        shadow = Sequence(sequence.id, sequence.token_ids, _plain(sequence.params), salt=sequence.salt)
        shadow.published = self.pool.match(shadow.token_ids, shadow.salt, len(shadow.token_ids) - 1)
        shadow.block_ids = array("i", (entry.block_id for entry in shadow.published))
        shadow.num_computed_tokens = len(shadow.block_ids) * self.pool.block_size
        return shadow

    def _follow(self, shadow: Sequence, sequence: Sequence) -> None:
        """Take over what the target has made of the drafts: the cache is right as far as they were."""
        ours, theirs = shadow.token_ids, sequence.token_ids
        same = shadow.num_prompt_tokens  # the tokens that were known when this was done last
        while same < len(ours) and same < len(theirs) and ours[same] == theirs[same]:
            same += 1
        ours[same:] = theirs[same:]
        shadow.num_computed_tokens = min(shadow.num_computed_tokens, same, len(theirs) - 1)
        shadow.num_prompt_tokens = len(theirs)
        size = self.pool.block_size
        if self.pool.prefix_caching:
            for i in range(len(shadow.published), shadow.num_computed_tokens // size):
                parent = shadow.published[-1] if shadow.published else None
                tokens = ours[i * size : (i + 1) * size]
                shadow.published.append(self.pool.publish(shadow.block_ids[i], tokens, parent, shadow.salt))

    def _make_room(self, shadow: Sequence, num_tokens: int, wanted: set[int]) -> bool:
        """Take blocks for the tokens of a draft, from sequences that get none now if need be."""
        num_needed = len(shadow.token_ids) + num_tokens - 1
        if num_needed > self._max_model_len:
            return False
        idle = (other for i, other in self._shadows.items() if i not in wanted and other.block_ids)
        return make_room(self.pool, shadow, num_needed, idle, self._give_up)

    def _give_up(self, shadow: Sequence) -> None:
        self.pool.free(shadow.block_ids)
        shadow.block_ids = array("i")
        shadow.published = []
        shadow.num_computed_tokens = 0

    def _pass(self, drafting: list[int]) -> list[int]:
        """Compute what is missing, and draw one more token for each; returns whose logits were good."""
        shadows = [self._shadows[sequence_id] for sequence_id in drafting]
        return [sequence_id for parts in self._steps(shadows) for sequence_id in self._run(parts)]

    def _steps(self, shadows: list[Sequence], num_left: int = 0) -> Iterator[list[ScheduledSequence]]:
        """What is missing of each, in steps that the executor takes; all but the last `num_left` tokens, which then
        nobody samples from."""
        parts: list[ScheduledSequence] = []
        budget = self._max_tokens
        for shadow in shadows:
            if shadow.token_ids[-1] == UNKNOWN_TOKEN and shadow.pending_row == NO_ROW:
                continue  # its logits were not good, and not even the device knows the token
            end = len(shadow.token_ids) - num_left
            while (missing := end - shadow.num_computed_tokens) > 0:
                number = min(missing, budget)
                samples = number == missing and not num_left
                parts.append(ScheduledSequence(shadow, shadow.num_computed_tokens, number, samples))
                shadow.num_computed_tokens += number
                budget -= number
                if budget == 0:
                    yield parts
                    parts, budget = [], self._max_tokens
        if parts:
            yield parts

    def _chain(self, executor: PipelinedExecutor, shadows: list[Sequence], num_tokens: int) -> None:
        """All passes in a row."""
        chain = Chain(executor, self._sampling_arrays, self._target_id)
        for _ in range(num_tokens):
            for parts in self._steps(shadows):
                chain.launch(parts, build_batch(parts, self.pool.block_size))
        chain.settle()

    def _target_id(self, token_id: int) -> int:
        return token_id if token_id < self._vocab_size else UNKNOWN_TOKEN

    def _run(self, parts: list[ScheduledSequence]) -> list[int]:
        logits_RV = self.executor.execute(build_batch(parts, self.pool.block_size))[:, : self._vocab_size]
        sampling = [part.sequence for part in parts if part.samples]
        if not sampling:
            return []
        good = []
        for shadow, outcome in zip(sampling, self._sampler.sample(logits_RV, sampling), strict=True):
            if not isinstance(outcome, SamplingFailure):
                shadow.token_ids.append(outcome.token_id)
                good.append(shadow.id)
        return good


def _num_missing(shadow: Sequence) -> int:
    return len(shadow.token_ids) - shadow.num_computed_tokens


def _plain(params: SamplingParams) -> SamplingParams:
    """What a draft is drawn with: the same noise and limits, and nothing that looks at the tokens before."""
    return dataclasses.replace(
        params,
        min_tokens=0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        logit_bias={},
        num_logprobs=None,
        grammar=None,
    )
