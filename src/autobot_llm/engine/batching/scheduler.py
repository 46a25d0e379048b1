"""Choose which sequences advance, and by how many tokens. Knows blocks and budgets; knows nothing of tensors.

There is one rule: a sequence has tokens, `num_computed_tokens` of them are in the cache, and a step lets it catch up.
Each step hands out its budget of tokens in this order:

1. Running sequences that lack one token (they decode) get it, so that no prompt can make them stall.
2. Running sequences that lack more (a long prompt, or a recomputation) get a chunk, oldest first.
3. Waiting sequences join, first come first served (within their priority), as long as budget, seats and blocks allow.

A prompt longer than a whole step's budget takes no more than half of what is left while somebody else could use the
rest, so short prompts pass beside it. While somebody decodes, prompts get no more tokens than add
`max_waiting_time_ms` to the step, by the measured cost of a token.

Memory. Blocks are taken for the tokens of the step at hand. When a decoding sequence finds none, the last one of the
running (the lowest priority, the latest admission) is preempted: its tokens are kept, its blocks are copied to host
memory or given up, and it waits at the head of its queue to be brought back or recomputed (its published blocks often
survive, which makes that cheap). Sequences are only ever preempted from the tail, so the first always advances, and a
sequence alone always fits: there is no livelock. A chunk preempts nobody; it shrinks to the free blocks.

Admission asks for more than the step needs: blocks for all tokens of the newcomer, beyond what admitted prompts still
lack, and one to spare for every running sequence. Else the newcomer would be let in, computed, and thrown out when
its elders grow by a block: work for nothing, again and again.

A step's life: `plan`, `advance` when it is under way, `resolve` when its tokens are known. The next step may be planned
and advanced between the two, so that the host works while the device does: it takes the one under way as done, with
tokens nobody knows yet. What rests on their values waits for `resolve`: publishing blocks, releasing followers. So
does letting a preempted sequence back in.

Guesses at the tokens after the last one are computed with it and dropped where they were wrong: drafts.py.

All calls come from one thread, and `abort` between `plan` and `advance` is a programming error, unless the plan has
drafts: then both come with its verdict. A call's work grows with the step's sequences, not with those that wait.
"""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from collections.abc import Sequence as SequenceABC

from autobot_llm.engine.batching.drafts import add_drafts, drop_rejected
from autobot_llm.engine.batching.plan import ScheduledSequence, StepPlan
from autobot_llm.engine.batching.preemption import SwapSpace, count_victims
from autobot_llm.engine.batching.prefixes import publish_full_blocks, take_prefix, will_publish
from autobot_llm.engine.batching.profiles import SchedulingPolicy, check_limits, check_policy
from autobot_llm.engine.batching.queue import WaitingQueue
from autobot_llm.engine.batching.retention import KeepsAll, Retention, give_up, take_blocks
from autobot_llm.engine.batching.step_cost import StepCost
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.sequence import NO_ROW, UNKNOWN_TOKEN, Sequence
from autobot_llm.errors import ContextLengthError


class Scheduler:
    """Continuous batching over one block pool. `num_preemptions` counts all so far, `num_evicted_blocks` the blocks
    that running sequences let go, as `retention` says.

    `max_num_seqs` bounds the running sequences, `max_num_batched_tokens` the tokens of one step, `max_model_len` the
    tokens of one sequence, its answer included; `max_waiting_time_ms` what prompts add to a step of others (None: no
    bound), from what the owner tells `step_cost`. Without a `swap_space`, who is preempted is recomputed.
    """

    def __init__(
        self,
        block_pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_waiting_time_ms: float | None = None,
        scheduling_policy: SchedulingPolicy = "fcfs",
        swap_space: SwapSpace | None = None,
        retention: Retention | None = None,
    ) -> None:
        self.retention: Retention = retention or KeepsAll()
        self._max_new_tokens = self.retention.policy.longest_step(0, max_num_batched_tokens)
        num_kept_tokens = self.retention.policy.most_tokens(max_model_len, self._max_new_tokens)
        check_limits(block_pool, max_num_seqs, max_num_batched_tokens, max_model_len, num_kept_tokens)
        check_policy(scheduling_policy, max_waiting_time_ms)
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.max_waiting_time_ms = max_waiting_time_ms
        self.num_preemptions = 0
        self.num_evicted_blocks = 0
        self.block_pool = block_pool
        self.swap_space = swap_space
        self.step_cost = StepCost()
        self._block_size = block_pool.block_size
        self._running: OrderedDict[int, Sequence] = OrderedDict()  # by priority, then in order of admission
        self._waiting = WaitingQueue(heeds_priority=scheduling_policy == "priority")
        # The head of the queue that memory was too short for, and the blocks to spare then: no second look-up of its
        # prefix before there are more of them, or another prompt was published.
        self._refused: tuple[int, int] | None = None
        self._longest_chunk = max_num_batched_tokens  # in the step at hand

    @property
    def decoding(self) -> list[Sequence]:
        """The running sequences that lack one token, and whose tokens are all known: the next step may draft for them.

        It gets to them in this order as far as blocks last.
        """
        return [
            s
            for s in self._running.values()
            if len(s.token_ids) - s.num_computed_tokens == 1 and s.pending_row == NO_ROW
        ]

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def blocks_per_sequence(self) -> int:
        """The most blocks that a sequence of full length holds at once."""
        return self._most_blocks(self.max_model_len)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence and set its `queue_position`, the number of sequences that wait before it.

        Raises ContextLengthError where prompt and answer exceed `max_model_len`.
        """
        num_tokens = sequence.max_num_tokens
        if num_tokens > self.max_model_len:
            raise ContextLengthError(
                f"{sequence.num_prompt_tokens} prompt tokens and max_tokens={sequence.params.max_tokens} make "
                f"{num_tokens}: expected at most {self.max_model_len} together"
            )
        assert not self._holds(sequence), f"sequence {sequence.id} was added already"
        sequence.queue_position = self._waiting.num_before(sequence)
        leader = sequence.leader
        if leader is not None and self._holds(leader) and will_publish(leader, self.block_pool):
            self._waiting.hold(sequence)
        else:
            self._waiting.push(sequence)

    def plan(self, max_draft_tokens: int | None = None) -> StepPlan | None:
        """Choose the next step and take its blocks; None when there is nothing to do before a step is resolved.

        Drafts are computed with it up to `max_draft_tokens` (None: as many as the step holds).
        """
        if self._waiting.heeds_priority:
            self._preempt_for_the_head()
        scheduled = self._plan_decodes()
        num_decodes = len(scheduled)
        room = self.max_num_batched_tokens - len(self._running)
        num_draft_tokens = add_drafts(
            scheduled,
            self.block_pool,
            num_running=len(self._running),
            budget=room if max_draft_tokens is None else min(max_draft_tokens, room),
            is_contended=num_decodes < len(self._running) or self._waiting.head is not None,
        )
        budget = self._prompt_budget(num_decodes + num_draft_tokens)
        num_blocks_lacking = 0
        if num_decodes < len(self._running):
            budget, num_blocks_lacking = self._plan_chunks(scheduled, budget)
        if self._waiting.head is not None:
            self._plan_admissions(scheduled, budget, num_blocks_lacking)
        if not scheduled:
            # Admission left a block for everything the admitted prompts lack. Decoding sequences that used some up give
            # them back; so without any there is room for the first prompt, or, in a window, when a step is resolved.
            assert not self._running or self._has_ending() or self.retention.policy.max_new_tokens is not None
            return None
        num_prompt_tokens = sum(item.num_tokens for item in scheduled[num_decodes:])
        num_tokens = num_decodes + num_draft_tokens + num_prompt_tokens
        return StepPlan(tuple(scheduled), num_tokens, num_prompt_tokens, num_draft_tokens)

    def advance(self, plan: StepPlan) -> None:
        """Take a plan as computed: its sequences go on, those that sample by a token that is not known yet. With
        drafts it is called when the verdict is there: who has left meanwhile stays where it is."""
        row = 0
        for sequence, start, num_tokens, samples, epoch, num_draft in plan.scheduled:
            if sequence.epoch != epoch:
                assert plan.num_draft_tokens, f"sequence {sequence.id} left between plan and advance"
                row += samples * (1 + num_draft)
                continue
            assert sequence.num_computed_tokens == start
            sequence.num_computed_tokens = start + num_tokens
            if samples:
                sequence.token_ids.extend(sequence.draft_ids[:num_draft])
                sequence.token_ids.append(UNKNOWN_TOKEN)
                sequence.pending_row = row + num_draft
                row += 1 + num_draft

    def resolve(
        self, plan: StepPlan, tokens: SequenceABC[int | None], num_accepted: SequenceABC[int] | None = None
    ) -> None:
        """Fill in the tokens of a plan that was computed, publish full blocks, release followers.

        `tokens` holds one token for each item of the plan that samples, in the plan's order; None for one whose
        sampling failed, which the caller must abort before the next plan. Those of sequences that left are dropped.
        `num_accepted` says of as many items how many of its draft tokens were right: `tokens` has the one after them.
        A plan with drafts is resolved before the next one is made.
        """
        assert num_accepted is not None or plan.num_draft_tokens == 0, "a plan with drafts needs its verdict"
        sampled = iter(tokens)
        accepted = iter(num_accepted or ())
        size, publishes = self._block_size, self.block_pool.prefix_caching
        for sequence, start, num_tokens, samples, epoch, num_draft in plan.scheduled:
            stop = start + num_tokens
            token = next(sampled) if samples else None
            has_blocks = sequence.epoch == epoch
            if samples and num_accepted is not None:
                num_rejected = num_draft - next(accepted)
                if num_draft and has_blocks:
                    stop = drop_rejected(sequence, stop, num_rejected, self.block_pool)
            if samples and (has_blocks or sequence in self._waiting):
                sequence.fill_in(stop, token)
            if not has_blocks:
                continue
            if publishes and stop // size > len(sequence.published):
                publish_full_blocks(sequence, stop, self.block_pool)
                if num_tokens > 1:
                    self._refused = None
            self.num_evicted_blocks += self.retention.trim(sequence, stop, self.block_pool)
            if stop >= sequence.num_prompt_tokens and self._waiting.has_followers(sequence):
                self._waiting.release(sequence)
        assert next(sampled, None) is None, "more tokens than sampling sequences"

    def commit(self, plan: StepPlan, tokens: SequenceABC[int | None]) -> None:
        """Record a plan that was computed while nothing else was under way: `advance` and `resolve`."""
        self.advance(plan)
        self.resolve(plan, tokens)

    def finish(self, sequence: Sequence) -> None:
        """Let a sequence go: its answer is complete, its blocks are free, its prefix stays reusable."""
        assert self._holds(sequence), f"sequence {sequence.id} has left already"
        self.abort(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Give a sequence up in whatever state it is, its blocks at once; no effect where it has left already.

        A step under way may still write to these blocks: it comes before every later step, so nobody sees that.
        """
        if self._running.pop(sequence.id, None) is None and not self._waiting.remove(sequence):
            return
        self._drop_blocks(sequence)
        if self.swap_space is not None:
            self.swap_space.drop(sequence)
        self._waiting.release(sequence)

    def _plan_decodes(self) -> list[ScheduledSequence]:
        scheduled: list[ScheduledSequence] = []
        running, size = self._running, self._block_size
        for sequence in list(running.values()):
            if sequence.id not in running:
                break  # preempted for an elder, and with it everyone behind it
            start = sequence.num_computed_tokens
            num_tokens = len(sequence.token_ids)
            if num_tokens - start != 1:
                assert num_tokens > start, f"sequence {sequence.id} has nothing to compute: abort it"
                continue
            if num_tokens == sequence.max_num_tokens:
                assert sequence.pending_row != NO_ROW, f"sequence {sequence.id} is complete: finish it"
                continue
            if start - sequence.num_evicted_tokens == len(sequence.block_ids) * size and not self._make_room(sequence):
                continue
            scheduled.append(ScheduledSequence(sequence, start, 1, True, sequence.epoch))
        return scheduled

    def _make_room(self, sequence: Sequence) -> bool:
        """Give a decoding sequence its next block, preempting from the tail; False where it has to wait for it."""
        while (block_ids := self.block_pool.allocate(1)) is None:
            # The blocks of a sequence whose last token is under way are free after the step: not worth a preemption.
            if self._has_ending() or self._preempt_last() is sequence:
                return False
        sequence.block_ids.extend(block_ids)
        return True

    def _is_ending(self, sequence: Sequence) -> bool:
        """Whether a step under way samples this sequence's last token."""
        return sequence.pending_row != NO_ROW and len(sequence.token_ids) == sequence.max_num_tokens

    def _has_ending(self) -> bool:
        return any(self._is_ending(sequence) for sequence in self._running.values())

    def _prompt_budget(self, num_decodes: int) -> int:
        self._longest_chunk = self.max_num_batched_tokens
        if self.max_waiting_time_ms is not None and num_decodes > 0:
            limit = self.step_cost.num_prompt_tokens_within(self.max_waiting_time_ms / 1e3)
            if limit is not None:
                self._longest_chunk = min(limit, self.max_num_batched_tokens)
        return min(self._longest_chunk, self.max_num_batched_tokens - num_decodes)

    def _plan_chunks(self, scheduled: list[ScheduledSequence], budget: int) -> tuple[int, int]:
        """Let unfinished prompts catch up; returns what is left of the budget, and the blocks they will still lack."""
        lagging = [s for s in self._running.values() if len(s.token_ids) - s.num_computed_tokens > 1]
        is_contended = len(lagging) > 1 or self._may_admit()
        num_blocks_lacking = 0
        for sequence in lagging:
            start = sequence.num_computed_tokens - sequence.num_evicted_tokens
            num_slots = (len(sequence.block_ids) + self.block_pool.num_free) * self._block_size
            num_tokens = min(self._chunk(sequence, budget, is_contended), num_slots - start)
            if num_tokens > 0:
                scheduled.append(self._schedule(sequence, num_tokens))
                budget -= num_tokens
            num_blocks_lacking += self._num_lacking(sequence)
        return budget, num_blocks_lacking

    def _plan_admissions(self, scheduled: list[ScheduledSequence], budget: int, num_blocks_lacking: int) -> None:
        while budget > 0 and len(self._running) < self.max_num_seqs:
            sequence = self._waiting.head
            if sequence is None or not self._admit(sequence, num_blocks_lacking):
                return
            num_tokens = self._chunk(sequence, budget, self._may_admit())
            scheduled.append(self._schedule(sequence, num_tokens))
            budget -= num_tokens
            num_blocks_lacking += self._num_lacking(sequence)

    def _admit(self, sequence: Sequence, num_blocks_lacking: int) -> bool:
        """Move the head of the queue to the running ones with the blocks it has already, if memory allows.

        Those are the prefix it shares, or what it had when it was preempted.
        """
        if sequence.pending_row != NO_ROW:
            return False  # its next token is under way
        pool = self.block_pool
        num_reserved = num_blocks_lacking + len(self._running)
        num_spare_blocks = pool.num_free - num_reserved
        if self._refused is not None and self._refused[0] == sequence.id and num_spare_blocks <= self._refused[1]:
            return False
        num_swapped = 0 if self.swap_space is None else self.swap_space.num_blocks_of(sequence)
        num_blocks = max(num_swapped, self._most_blocks(len(sequence.token_ids)))
        if not num_swapped:
            take_prefix(sequence, pool)
            self.retention.trim(sequence, sequence.num_computed_tokens, pool)
        if num_blocks - len(sequence.block_ids) + num_reserved > pool.num_free:
            if not num_swapped:
                give_up(sequence, pool)
            self._refused = (sequence.id, num_spare_blocks)
            return False
        self._refused = None
        self._waiting.remove(sequence)
        self._waiting.join(self._running, sequence)
        if num_swapped:
            self._bring_back(sequence, num_swapped)
            return True
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            pool.count_lookup(len(sequence.token_ids), sequence.num_cached_tokens)
            sequence.first_scheduled_time = time.monotonic()
        return True

    def _bring_back(self, sequence: Sequence, num_swapped: int) -> None:
        assert self.swap_space is not None
        block_ids = self.block_pool.allocate(num_swapped)
        assert block_ids is not None, "admission has looked"
        sequence.block_ids = array("i", block_ids)
        self.swap_space.bring_back(sequence)

    def _may_admit(self) -> bool:
        """Whether somebody waits, and neither a seat nor, as far as known, memory is missing."""
        return self._waiting.head is not None and self._refused is None and len(self._running) < self.max_num_seqs

    def _chunk(self, sequence: Sequence, budget: int, is_contended: bool) -> int:
        num_tokens = len(sequence.token_ids) - sequence.num_computed_tokens
        if is_contended and num_tokens > self._longest_chunk:
            budget = (budget + 1) // 2
        return min(num_tokens, self.retention.policy.longest_step(sequence.num_computed_tokens, budget))

    def _schedule(self, sequence: Sequence, num_tokens: int) -> ScheduledSequence:
        start = sequence.num_computed_tokens
        stop = start + num_tokens
        has_blocks = take_blocks(sequence, stop, self.block_pool)
        assert has_blocks, "a chunk is cut to the free blocks first"
        return ScheduledSequence(sequence, start, num_tokens, stop == len(sequence.token_ids), sequence.epoch)

    def _most_blocks(self, num_tokens: int) -> int:
        """The most blocks that a sequence of so many tokens holds at once."""
        return -(-self.retention.policy.most_tokens(num_tokens, self._max_new_tokens) // self._block_size)

    def _num_lacking(self, sequence: Sequence) -> int:
        """How many more blocks a sequence may hold at once before its tokens are computed."""
        return max(0, self._most_blocks(len(sequence.token_ids)) - len(sequence.block_ids))

    def _preempt_for_the_head(self) -> None:
        """Make a seat and blocks for the head of the queue where those of lower priority have enough of them."""
        head = self._waiting.head
        if head is None or head.pending_row != NO_ROW:
            return
        num_victims = count_victims(
            head,
            list(self._running.values()),
            self.block_pool,
            level_of=self._waiting.level_of,
            num_blocks=self._most_blocks,
            max_num_seqs=self.max_num_seqs,
        )
        for _ in range(num_victims or 0):
            self._preempt_last()

    def _preempt_last(self) -> Sequence:
        _, sequence = self._running.popitem()
        if self.swap_space is not None:  # with what the step under way leaves of it
            self.num_evicted_blocks += self.retention.trim(sequence, sequence.num_computed_tokens, self.block_pool)
        if self.swap_space is None or not self.swap_space.take_in(sequence):
            give_up(sequence, self.block_pool)
        self._drop_blocks(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting.push_front(sequence)
        self._refused = None
        return sequence

    def _drop_blocks(self, sequence: Sequence) -> None:
        sequence.draft_ids, sequence.draft_parents, sequence.draft_rows = [], [], []
        self.block_pool.free(sequence.block_ids)
        sequence.block_ids = array("i")
        # what it had let go before will not be computed again if the rest comes back
        del sequence.published[sequence.num_evicted_tokens // self._block_size :]
        sequence.epoch += 1

    def _holds(self, sequence: Sequence) -> bool:
        return sequence.id in self._running or sequence in self._waiting
