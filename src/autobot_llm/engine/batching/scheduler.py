"""Choose which sequences advance, and by how many tokens. Knows blocks and budgets; knows nothing of tensors.

There is one rule: a sequence has tokens, `num_computed_tokens` of them are in the cache, and a step lets it catch up.
Each step hands out its budget of tokens in this order:

1. Running sequences that lack one token (they decode) get it, so that no prompt can make them stall.
2. Running sequences that lack more (a long prompt, or a recomputation) get a chunk, oldest first.
3. Waiting sequences join, first come first served, as long as budget, seats and blocks allow.

A prompt longer than a whole step's budget takes no more than half of what is left while somebody else could use the
rest, so short prompts pass beside it.

Memory. Blocks are taken for the tokens of the step at hand. When a decoding sequence finds none, the last admitted
one is preempted: its blocks are freed, its tokens are kept, and it waits at the head of the queue to be recomputed
(its published blocks often survive, which makes that cheap). Sequences are only ever preempted from the tail, so the
oldest always advances, and a sequence alone always fits: there is no livelock. A chunk preempts nobody; it shrinks to
the free blocks.

Admission asks for more than the step needs: blocks for all tokens of the newcomer, beyond what admitted prompts still
lack, and one to spare for every running sequence. Else the newcomer would be let in, computed, and thrown out when
its elders grow by a block: work for nothing, again and again.

All calls come from one thread, between steps: `abort` after `plan` and before its `commit` is a programming error.
The work of a call grows with the sequences of the step and not with those that wait.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence as SequenceABC

from autobot_llm.engine.batching.plan import ScheduledSequence, StepPlan
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.sequence import Sequence
from autobot_llm.errors import ConfigurationError, ContextLengthError


class Scheduler:
    """Continuous batching over one block pool. `num_preemptions` counts all so far.

    `max_num_seqs` bounds the running sequences, `max_num_batched_tokens` the tokens of one step, `max_model_len` the
    tokens of one sequence, its answer included.
    """

    def __init__(
        self, block_pool: BlockPool, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int
    ) -> None:
        if max_num_seqs < 1:
            raise ConfigurationError(f"max_num_seqs={max_num_seqs}: expected at least 1")
        if max_num_batched_tokens < max_num_seqs:
            raise ConfigurationError(
                f"max_num_batched_tokens={max_num_batched_tokens}: expected at least max_num_seqs={max_num_seqs}, "
                "so that every running sequence gets a token in each step"
            )
        num_blocks_needed = -(-max_model_len // block_pool.block_size)
        if max_model_len < 1 or num_blocks_needed > block_pool.num_blocks:
            raise ConfigurationError(
                f"max_model_len={max_model_len} needs {num_blocks_needed} KV cache blocks and there are "
                f"{block_pool.num_blocks}: expected 1 to {block_pool.num_blocks * block_pool.block_size} tokens"
            )
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.num_preemptions = 0
        self.block_pool = block_pool
        self._block_size = block_pool.block_size
        self._running: OrderedDict[int, Sequence] = OrderedDict()  # in order of admission
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()
        self._followers: dict[
            int, OrderedDict[int, Sequence]
        ] = {}  # by their leader's id, until its prompt is computed
        self._num_followers = 0
        # The head of the queue that memory was too short for, and the blocks to spare then: no second look-up of its
        # prefix before there are more of them, or another prompt was published.
        self._refused: tuple[int, int] | None = None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + self._num_followers

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence and set its `queue_position`, the number of sequences that wait before it.

        Raises ContextLengthError where prompt and answer exceed `max_model_len`.
        """
        num_tokens = sequence.num_prompt_tokens + sequence.params.max_tokens
        if num_tokens > self.max_model_len:
            raise ContextLengthError(
                f"{sequence.num_prompt_tokens} prompt tokens and max_tokens={sequence.params.max_tokens} make "
                f"{num_tokens}: expected at most {self.max_model_len} together"
            )
        assert not self._holds(sequence), f"sequence {sequence.id} was added already"
        sequence.queue_position = self.num_waiting
        leader = sequence.leader
        if leader is not None and self._is_worth_waiting_for(leader):
            self._followers.setdefault(leader.id, OrderedDict())[sequence.id] = sequence
            self._num_followers += 1
        else:
            self._waiting[sequence.id] = sequence

    def plan(self) -> StepPlan | None:
        """Choose the next step and take its blocks; None when there is nothing to do."""
        scheduled = self._plan_decodes()
        num_blocks_lacking = self._plan_chunks(scheduled)
        # Admission left a block for everything the admitted prompts lack. Decoding sequences may have used some up;
        # they give them back when they leave. So a step without any always finds room for the first prompt.
        assert scheduled or not self._running
        self._plan_admissions(scheduled, num_blocks_lacking)
        if not scheduled:
            return None
        return StepPlan(scheduled=tuple(scheduled), num_tokens=sum(item.num_tokens for item in scheduled))

    def commit(self, plan: StepPlan, tokens: SequenceABC[int | None]) -> None:
        """Record that a plan was computed: advance its sequences, publish full blocks, append sampled tokens.

        `tokens` holds one token for each item of the plan that samples, in the plan's order; None for one whose
        sampling failed, which the caller must abort before the next plan.
        """
        sampled = iter(tokens)
        for item in plan.scheduled:
            sequence = item.sequence
            assert sequence.id in self._running, f"sequence {sequence.id} left between plan and commit"
            assert sequence.num_computed_tokens == item.start
            stop = item.start + item.num_tokens
            sequence.num_computed_tokens = stop
            if self.block_pool.prefix_caching and stop // self._block_size > len(sequence.published):
                self._publish_full_blocks(sequence)
                if item.num_tokens > 1:
                    self._refused = None
            if item.start < sequence.num_prompt_tokens <= stop and sequence.id in self._followers:
                self._release_followers(sequence)
            if item.samples:
                token = next(sampled)
                if token is not None:
                    sequence.token_ids.append(token)
        assert next(sampled, None) is None, "more tokens than sampling sequences"

    def finish(self, sequence: Sequence) -> None:
        """Let a running sequence go: its answer is complete, its blocks are free, its prefix stays reusable."""
        assert sequence.id in self._running, f"sequence {sequence.id} is not running"
        self.abort(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Give a sequence up in whatever state it is, its blocks at once; no effect where it has left already."""
        if self._running.pop(sequence.id, None) is None and self._waiting.pop(sequence.id, None) is None:
            leader = sequence.leader
            held = self._followers.get(leader.id) if leader is not None else None
            if held is None or held.pop(sequence.id, None) is None:
                return
            self._num_followers -= 1
        self._drop_blocks(sequence)
        if sequence.id in self._followers:
            self._release_followers(sequence)

    def _plan_decodes(self) -> list[ScheduledSequence]:
        scheduled: list[ScheduledSequence] = []
        for sequence in list(self._running.values()):
            if sequence.id not in self._running:
                break  # preempted for an elder, and with it everyone behind it
            start = sequence.num_computed_tokens
            if len(sequence.token_ids) - start != 1:
                assert len(sequence.token_ids) > start, f"sequence {sequence.id} has nothing to compute: abort it"
                continue
            if start == len(sequence.block_ids) * self._block_size and not self._make_room(sequence):
                break
            scheduled.append(ScheduledSequence(sequence, start, 1, True))
        return scheduled

    def _make_room(self, sequence: Sequence) -> bool:
        """Give a decoding sequence its next block, preempting from the tail; False where it was the tail itself."""
        while (block_ids := self.block_pool.allocate(1)) is None:
            if self._preempt_last() is sequence:
                return False
        sequence.block_ids += block_ids
        return True

    def _plan_chunks(self, scheduled: list[ScheduledSequence]) -> int:
        """Let unfinished prompts catch up; returns how many blocks they will still lack after this step."""
        if len(scheduled) == len(self._running):
            return 0
        budget = self.max_num_batched_tokens - len(scheduled)
        lagging = [s for s in self._running.values() if len(s.token_ids) - s.num_computed_tokens > 1]
        is_contended = len(lagging) > 1 or self._may_admit()
        num_blocks_lacking = 0
        for sequence in lagging:
            start = sequence.num_computed_tokens
            num_slots = (len(sequence.block_ids) + self.block_pool.num_free) * self._block_size
            num_tokens = min(self._chunk(sequence, budget, is_contended), num_slots - start)
            if num_tokens > 0:
                scheduled.append(self._schedule(sequence, num_tokens))
                budget -= num_tokens
            num_blocks_lacking += self._num_blocks(len(sequence.token_ids)) - len(sequence.block_ids)
        return num_blocks_lacking

    def _plan_admissions(self, scheduled: list[ScheduledSequence], num_blocks_lacking: int) -> None:
        budget = self.max_num_batched_tokens - sum(item.num_tokens for item in scheduled)
        while self._waiting and budget > 0 and len(self._running) < self.max_num_seqs:
            sequence = next(iter(self._waiting.values()))
            if not self._admit(sequence, num_blocks_lacking):
                return
            num_tokens = self._chunk(sequence, budget, self._may_admit())
            scheduled.append(self._schedule(sequence, num_tokens))
            budget -= num_tokens
            num_blocks_lacking += self._num_blocks(len(sequence.token_ids)) - len(sequence.block_ids)

    def _admit(self, sequence: Sequence, num_blocks_lacking: int) -> bool:
        """Move the head of the queue to the running ones with the prefix it shares, if memory allows."""
        pool = self.block_pool
        num_reserved = num_blocks_lacking + len(self._running)
        num_spare_blocks = pool.num_free - num_reserved
        if self._refused is not None and self._refused[0] == sequence.id and num_spare_blocks <= self._refused[1]:
            return False
        num_tokens = len(sequence.token_ids)
        # The last token is always computed, for its logits.
        prefix = pool.match(sequence.token_ids, sequence.salt, num_tokens - 1)
        block_ids = [entry.block_id for entry in prefix]
        num_new_blocks = self._num_blocks(num_tokens) - len(block_ids)
        if num_new_blocks + num_reserved > pool.num_free:
            pool.free(block_ids)
            self._refused = (sequence.id, num_spare_blocks)
            return False
        self._refused = None
        del self._waiting[sequence.id]
        self._running[sequence.id] = sequence
        sequence.block_ids = block_ids
        sequence.published = prefix
        sequence.num_computed_tokens = len(block_ids) * self._block_size
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            pool.count_lookup(num_tokens, sequence.num_cached_tokens)
            sequence.first_scheduled_time = time.monotonic()
        return True

    def _may_admit(self) -> bool:
        """Whether somebody waits, and neither a seat nor, as far as known, memory is missing."""
        return bool(self._waiting) and self._refused is None and len(self._running) < self.max_num_seqs

    def _chunk(self, sequence: Sequence, budget: int, is_contended: bool) -> int:
        num_tokens = len(sequence.token_ids) - sequence.num_computed_tokens
        if is_contended and num_tokens > self.max_num_batched_tokens:
            return (budget + 1) // 2
        return min(num_tokens, budget)

    def _schedule(self, sequence: Sequence, num_tokens: int) -> ScheduledSequence:
        start = sequence.num_computed_tokens
        stop = start + num_tokens
        block_ids = self.block_pool.allocate(max(0, self._num_blocks(stop) - len(sequence.block_ids)))
        assert block_ids is not None, "a chunk is cut to the free blocks first"
        sequence.block_ids += block_ids
        return ScheduledSequence(sequence, start, num_tokens, stop == len(sequence.token_ids))

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _preempt_last(self) -> Sequence:
        sequence_id, sequence = self._running.popitem()
        self._drop_blocks(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting[sequence_id] = sequence
        self._waiting.move_to_end(sequence_id, last=False)
        self._refused = None
        return sequence

    def _drop_blocks(self, sequence: Sequence) -> None:
        self.block_pool.free(sequence.block_ids)
        sequence.block_ids = []
        sequence.published = []

    def _publish_full_blocks(self, sequence: Sequence) -> None:
        published, size = sequence.published, self._block_size
        for i in range(len(published), sequence.num_computed_tokens // size):
            tokens = sequence.token_ids[i * size : (i + 1) * size]
            parent = published[-1] if published else None
            published.append(self.block_pool.publish(sequence.block_ids[i], tokens, parent, sequence.salt))

    def _is_worth_waiting_for(self, leader: Sequence) -> bool:
        """Whether a leader will publish a block for its followers: its prompt is long enough and yet to be computed."""
        return (
            self.block_pool.prefix_caching
            and leader.num_prompt_tokens > self._block_size
            and leader.num_computed_tokens < leader.num_prompt_tokens
            and self._holds(leader)
        )

    def _holds(self, sequence: Sequence) -> bool:
        if sequence.id in self._running or sequence.id in self._waiting:
            return True
        return sequence.leader is not None and sequence.id in self._followers.get(sequence.leader.id, ())

    def _release_followers(self, leader: Sequence) -> None:
        """Queue the followers where their leader stood: at the head, in their order."""
        followers = self._followers.pop(leader.id)
        self._num_followers -= len(followers)
        for sequence_id, follower in reversed(followers.items()):
            self._waiting[sequence_id] = follower
            self._waiting.move_to_end(sequence_id, last=False)
