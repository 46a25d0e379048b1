"""The scheduler: who advances, who waits, who is thrown out, and that no block is ever lost or shared for writing."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autobot_llm.engine.batching.plan import StepPlan
from autobot_llm.engine.batching.scheduler import Scheduler
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.errors import ConfigurationError, ContextLengthError

SIZE = 4


class Harness:
    """Drives a scheduler with a cache that remembers what was written, and checks every promise at every step.

    The stand-in for a model is a function of the tokens before a place, so a token sampled from wrong or missing
    cache content would be another one.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 16,
        max_model_len: int | None = None,
        prefix_caching: bool = True,
    ) -> None:
        self.pool = BlockPool(num_blocks, SIZE, prefix_caching=prefix_caching)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len or num_blocks * SIZE,
        )
        self.alive: dict[int, Sequence] = {}
        self.finished: dict[int, Sequence] = {}
        self.cache: list[tuple[str, tuple[int, ...]] | None] = [None] * (num_blocks * SIZE)
        self.ids = itertools.count()

    def add(
        self, prompt: Iterable[int], max_tokens: int = 1, *, salt: str = "", leader: Sequence | None = None
    ) -> Sequence:
        sequence = Sequence(
            next(self.ids), list(prompt), SamplingParams(max_tokens=max_tokens), salt=salt, leader=leader
        )
        self.scheduler.add(sequence)
        self.alive[sequence.id] = sequence
        return sequence

    def abort(self, sequence: Sequence) -> None:
        self.scheduler.abort(sequence)
        del self.alive[sequence.id]
        assert not sequence.block_ids
        self.check_blocks()

    def step(self) -> StepPlan | None:
        plan = self.scheduler.plan()
        self.check_blocks()
        if plan is None:
            assert not self.alive, "nothing is planned and somebody waits"
            return None
        self.check_plan(plan)
        self.compute(plan)
        sampling = [item.sequence for item in plan.scheduled if item.samples]
        self.scheduler.commit(plan, [next_token(s.token_ids) for s in sampling])
        self.check_blocks()
        for sequence in sampling:
            if sequence.num_output_tokens == sequence.params.max_tokens:
                self.scheduler.finish(sequence)
                del self.alive[sequence.id]
                self.finished[sequence.id] = sequence
        return plan

    def run(self, max_steps: int = 2000) -> int:
        for num_steps in range(max_steps):
            if self.step() is None:
                return num_steps
        raise AssertionError(f"not done after {max_steps} steps")

    def check_plan(self, plan: StepPlan) -> None:
        assert plan.num_tokens == sum(item.num_tokens for item in plan.scheduled)
        assert 1 <= plan.num_tokens <= self.scheduler.max_num_batched_tokens
        assert self.scheduler.num_running <= self.scheduler.max_num_seqs
        ids = [item.sequence.id for item in plan.scheduled]
        assert len(set(ids)) == len(ids)
        planned = set(ids)
        for item in plan.scheduled:
            sequence, stop = item.sequence, item.start + item.num_tokens
            assert sequence.id in self.alive
            assert item.num_tokens >= 1 and item.start == sequence.num_computed_tokens
            assert stop <= len(sequence.token_ids) and item.samples == (stop == len(sequence.token_ids))
            assert len(sequence.block_ids) == -(-stop // SIZE), "blocks are taken for this step and no more"
            written = sequence.block_ids[item.start // SIZE :]
            assert all(self.pool.num_references(block_id) == 1 for block_id in written), "shared blocks are read-only"
        for sequence in self.alive.values():
            decodes = sequence.block_ids and len(sequence.token_ids) - sequence.num_computed_tokens == 1
            assert not decodes or sequence.id in planned, "a decoding sequence advances in every step"

    def check_blocks(self) -> None:
        held = Counter(block_id for sequence in self.alive.values() for block_id in sequence.block_ids)
        counts = {b: self.pool.num_references(b) for b in range(self.pool.num_blocks)}
        assert {b: n for b, n in counts.items() if n} == dict(held)
        assert self.pool.num_free == self.pool.num_blocks - len(held)
        for sequence in self.alive.values():
            for i in range(sequence.num_computed_tokens):
                slot = sequence.block_ids[i // SIZE] * SIZE + i % SIZE
                assert self.cache[slot] == (sequence.salt, tuple(sequence.token_ids[: i + 1]))

    def compute(self, plan: StepPlan) -> None:
        for item in plan.scheduled:
            sequence = item.sequence
            for i in range(item.start, item.start + item.num_tokens):
                slot = sequence.block_ids[i // SIZE] * SIZE + i % SIZE
                self.cache[slot] = (sequence.salt, tuple(sequence.token_ids[: i + 1]))


def next_token(token_ids: list[int]) -> int:
    return (sum(token_ids) * 31 + len(token_ids)) % 3


def tokens_of(plan: StepPlan | None) -> dict[int, int]:
    assert plan is not None
    return {item.sequence.id: item.num_tokens for item in plan.scheduled}


def test_nothing_to_do_is_no_plan() -> None:
    assert Harness(4).scheduler.plan() is None


def test_a_new_sequence_joins_beside_a_decoding_one() -> None:
    h = Harness(16)
    first = h.add([1] * 5, 4)
    assert tokens_of(h.step()) == {first.id: 5}
    second = h.add([2] * 6, 4)
    assert tokens_of(h.step()) == {first.id: 1, second.id: 6}
    assert tokens_of(h.step()) == {first.id: 1, second.id: 1}


def test_a_long_prompt_comes_in_chunks_while_others_decode_in_every_step() -> None:
    h = Harness(40, max_num_batched_tokens=8)
    decoding = h.add([1], 20)
    h.step()
    long = h.add([2] * 30, 1)
    assert [tokens_of(h.step()) for _ in range(4)] == [{decoding.id: 1, long.id: 7}] * 4
    assert tokens_of(h.step()) == {decoding.id: 1, long.id: 2}


def test_a_short_prompt_passes_beside_one_that_fills_many_steps() -> None:
    h = Harness(64, max_num_batched_tokens=8)
    long = h.add([1] * 100, 1)
    short = h.add([2] * 4, 1)
    assert tokens_of(h.step()) == {long.id: 4, short.id: 4}
    assert short.id in h.finished
    assert tokens_of(h.step()) == {long.id: 8}, "alone, it has the whole budget"


def test_a_long_prompt_has_the_whole_budget_where_nobody_can_join_it() -> None:
    seats = Harness(64, max_num_seqs=1, max_num_batched_tokens=8)
    long = seats.add([1] * 100, 1)
    seats.add([2] * 4, 1)
    seats.step()
    assert tokens_of(seats.step()) == {long.id: 8}
    memory = Harness(28, max_num_batched_tokens=8, prefix_caching=False)
    long = memory.add([1] * 100, 1)
    memory.add([2] * 12, 1)
    memory.step()
    assert tokens_of(memory.step()) == {long.id: 8}


def test_sequences_are_admitted_in_their_order_of_arrival() -> None:
    h = Harness(64, max_num_seqs=2)
    sequences = [h.add([i + 1], 2) for i in range(6)]
    assert [s.queue_position for s in sequences] == list(range(6))
    h.run()
    assert list(h.finished) == [s.id for s in sequences]


def test_a_shared_prefix_is_not_computed_again_and_the_last_token_always_is() -> None:
    h = Harness(16)
    prompt = list(range(8))
    h.add(prompt)
    h.run()
    again = h.add(prompt)
    assert tokens_of(h.step()) == {again.id: 4}
    assert again.num_cached_tokens == 4
    longer = h.add([*prompt, 9])
    assert tokens_of(h.step()) == {longer.id: 1}
    assert (h.pool.num_query_tokens, h.pool.num_hit_tokens) == (8 + 8 + 9, 0 + 4 + 8)


def test_another_tenant_computes_the_same_prompt_itself() -> None:
    h = Harness(16)
    h.add(range(9), salt="alice")
    h.run()
    other = h.add(range(9), salt="bob")
    assert tokens_of(h.step()) == {other.id: 9}


def test_an_answer_extends_the_prefix_that_the_next_turn_finds() -> None:
    h = Harness(16)
    first = h.add(range(6), 8)
    h.run()
    h.add([*first.token_ids, 7, 7])
    h.step()
    assert h.pool.num_hit_tokens == 12, "13 of its 14 tokens were computed, 12 of them in full blocks"


def test_a_follower_waits_for_its_leader_and_shares_its_prompt() -> None:
    h = Harness(32, max_num_batched_tokens=6)
    leader = h.add(range(9), 3)
    followers = [h.add(range(9), 3, leader=leader) for _ in range(2)]
    other = h.add([7, 7], 1)
    assert h.scheduler.num_waiting == 4
    assert tokens_of(h.step()) == {leader.id: 3, other.id: 2}, "a held follower does not block those behind it"
    h.step()
    assert list(tokens_of(h.step()).items()) == [(leader.id, 1), (followers[0].id, 1), (followers[1].id, 1)]
    assert [f.num_cached_tokens for f in followers] == [8, 8]


@pytest.mark.parametrize("state", ["waiting", "running"])
def test_followers_go_on_without_a_leader_that_was_aborted(state: str) -> None:
    h = Harness(32, max_num_batched_tokens=4)
    leader = h.add(range(9), 3)
    follower = h.add(range(9), 3, leader=leader)
    if state == "running":
        h.step()
    h.abort(leader)
    h.run()
    assert follower.num_output_tokens == 3 and h.pool.num_free == 32


def test_a_follower_whose_leader_is_gone_or_computed_does_not_wait() -> None:
    h = Harness(32)
    leader = h.add(range(9), 3)
    h.step()
    computed = h.add(range(9), 1, leader=leader)
    assert computed.id in tokens_of(h.step())
    h.abort(leader)
    gone = h.add(range(9), 1, leader=leader)
    assert tokens_of(h.step()) == {gone.id: 1}


def test_a_held_follower_can_be_aborted() -> None:
    h = Harness(32, max_num_batched_tokens=4)
    leader = h.add(range(9), 1)
    followers = [h.add(range(9), 1, leader=leader) for _ in range(2)]
    h.abort(followers[0])
    assert h.scheduler.num_waiting == 2
    h.run()
    assert list(h.finished) == [leader.id, followers[1].id]


def test_aborting_returns_the_blocks_at_once_in_every_state() -> None:
    h = Harness(8, max_num_seqs=1, max_num_batched_tokens=4)
    running, waiting = h.add(range(10), 2), h.add(range(5), 2)
    h.step()
    assert h.pool.num_free == 7
    h.abort(waiting)
    h.abort(running)
    assert h.pool.num_free == 8 and h.scheduler.num_running == h.scheduler.num_waiting == 0
    h.scheduler.abort(running)  # it has left already: no effect
    assert h.pool.num_free == 8


def test_the_last_admitted_is_preempted_and_goes_on_with_the_same_tokens() -> None:
    h = Harness(6, prefix_caching=False)
    first, second = h.add([1] * 4, 16), h.add([2] * 4, 16)
    h.run()
    assert h.scheduler.num_preemptions > 0
    assert first.num_preemptions == 0 and second.num_preemptions == h.scheduler.num_preemptions
    alone = Harness(6)
    for sequence in (first, second):
        expected = alone.add(sequence.token_ids[:4], 16)
        alone.run()
        assert sequence.token_ids == expected.token_ids


def test_a_preempted_sequence_reports_the_cached_tokens_of_its_first_admission() -> None:
    h = Harness(6)
    first, second = h.add([1] * 4, 16), h.add([2] * 4, 16)
    h.run()
    assert second.num_preemptions > 0 and second.num_cached_tokens == 0
    assert (h.pool.num_query_tokens, h.pool.num_hit_tokens) == (8, 0), "recomputing is no hit"
    assert first.first_scheduled_time is not None


def test_a_newcomer_waits_until_its_whole_prompt_fits_beside_the_others() -> None:
    h = Harness(8, prefix_caching=False)
    first = h.add([1] * 12, 8)
    h.step()
    late = h.add([2] * 20, 1)
    for _ in range(7):
        assert late.id not in tokens_of(h.step())
    assert first.id in h.finished
    assert late.id in tokens_of(h.step())
    assert h.scheduler.num_preemptions == 0


def test_preemption_does_not_thrash() -> None:
    """Eight answers of six blocks in a pool of twelve: far more steps than preemptions, and all of them complete."""
    h = Harness(12, max_num_seqs=8, prefix_caching=False)
    for i in range(8):
        h.add([i + 1] * 4, 20)
    num_steps = h.run()
    assert len(h.finished) == 8
    assert h.scheduler.num_preemptions <= num_steps // 8


def test_a_preempted_sequence_resumes_before_those_that_came_later() -> None:
    h = Harness(6, max_num_seqs=2, prefix_caching=False)
    _, second, third = (h.add([i + 1] * 4, 16) for i in range(3))
    while second.num_preemptions == 0:
        h.step()
    while third.first_scheduled_time is None:
        planned = list(tokens_of(h.step()))
    assert planned.index(second.id) < planned.index(third.id)
    h.run()


def test_prompts_that_are_still_being_computed_keep_their_claim_to_the_free_blocks() -> None:
    h = Harness(10, max_num_seqs=3, max_num_batched_tokens=4, prefix_caching=False)
    first = h.add([1] * 20, 2)  # lacks four of its five blocks after the first step
    h.step()
    second = h.add([2] * 20, 2)  # its five blocks are free, but then first would lack some
    assert second.id not in tokens_of(h.step())
    h.run()
    assert h.scheduler.num_preemptions == 0 and list(h.finished) == [first.id, second.id]


def test_a_chunk_shrinks_to_the_blocks_that_decoding_sequences_left() -> None:
    h = Harness(7, max_num_seqs=2, max_num_batched_tokens=3, prefix_caching=False)
    first = h.add([1], 20)
    h.step()
    late = h.add([2] * 20, 1)  # its five blocks and a spare one are free, until first has grown by two
    assert [tokens_of(h.step()) for _ in range(8)] == [{first.id: 1, late.id: 2}] * 8
    assert tokens_of(h.step()) == {first.id: 1}
    assert late.num_preemptions == 0
    h.run()
    assert late.num_preemptions == 1 and list(h.finished) == [first.id, late.id]


def test_a_refused_newcomer_is_looked_at_again_when_its_prefix_was_published() -> None:
    h = Harness(12, max_num_seqs=4, max_num_batched_tokens=64)
    first = h.add([*range(20), 7], 8)
    second = h.add([*range(20), 8], 8)  # six blocks of its own do not fit beside first, one does
    assert list(tokens_of(h.step())) == [first.id]
    assert tokens_of(h.step()) == {first.id: 1, second.id: 1}
    assert second.num_cached_tokens == 20


def test_a_failed_row_gets_no_token_and_its_sequence_can_be_aborted() -> None:
    h = Harness(8)
    good, bad = h.add([1, 2], 2), h.add([3, 4], 2)
    plan = h.scheduler.plan()
    assert plan is not None
    h.compute(plan)
    h.scheduler.commit(plan, [5, None])
    assert good.output_ids == [5] and bad.output_ids == []
    h.abort(bad)
    assert tokens_of(h.step()) == {good.id: 1}


def test_the_number_of_tokens_must_match_the_plan() -> None:
    h = Harness(8)
    h.add([1, 2], 2)
    plan = h.scheduler.plan()
    assert plan is not None
    with pytest.raises(AssertionError, match="more tokens"):
        h.scheduler.commit(plan, [5, 6])


@pytest.mark.parametrize(
    ("num_blocks", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "message"),
    [
        (4, 0, 8, 16, "max_num_seqs=0: expected at least 1"),
        (4, 4, 3, 16, "max_num_batched_tokens=3: expected at least max_num_seqs=4"),
        (4, 4, 8, 17, "max_model_len=17 needs 5 KV cache blocks and there are 4: expected 1 to 16 tokens"),
        (4, 4, 8, 0, "max_model_len=0"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(
    num_blocks: int, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Scheduler(
            BlockPool(num_blocks, SIZE),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
        )


def test_a_sequence_that_cannot_fit_is_refused_before_it_waits() -> None:
    h = Harness(4)
    with pytest.raises(ContextLengthError, match=r"10 prompt tokens and max_tokens=7 make 17: expected at most 16"):
        h.add([1] * 10, 7)
    assert h.scheduler.num_waiting == 0


@dataclass(frozen=True)
class Arrival:
    """A request of the random schedules: few prefixes and token ids, so that prompts share much."""

    prefix: int
    num_shared: int
    num_own: int
    max_tokens: int
    salt: str
    num_followers: int

    def add_to(self, h: Harness) -> None:
        shared = [(self.prefix + i) % 3 for i in range(self.num_shared)]
        prompt = [*shared, *[next(h.ids) % 5] * self.num_own]
        leader = h.add(prompt, self.max_tokens, salt=self.salt)
        for _ in range(self.num_followers):
            h.add(prompt, self.max_tokens, salt=self.salt, leader=leader)


@dataclass(frozen=True)
class Steps:
    num_steps: int


@dataclass(frozen=True)
class Abort:
    which: int


arrivals = st.builds(
    Arrival,
    prefix=st.integers(0, 2),
    num_shared=st.integers(0, 14),
    num_own=st.integers(1, 6),
    max_tokens=st.integers(1, 12),
    salt=st.sampled_from(["", "", "other"]),
    num_followers=st.sampled_from([0, 0, 0, 1, 2]),
)
actions = st.lists(
    st.one_of(arrivals, arrivals, st.builds(Steps, st.integers(1, 6)), st.builds(Abort, st.integers(0, 30))),
    min_size=3,
    max_size=40,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    actions=actions,
    num_blocks=st.integers(8, 16),
    max_num_seqs=st.integers(1, 6),
    num_extra_tokens=st.integers(0, 20),
    prefix_caching=st.booleans(),
)
def test_any_schedule_keeps_every_promise(
    actions: list[Arrival | Steps | Abort],
    num_blocks: int,
    max_num_seqs: int,
    num_extra_tokens: int,
    prefix_caching: bool,
) -> None:
    h = Harness(
        num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + num_extra_tokens,
        max_model_len=32,
        prefix_caching=prefix_caching,
    )
    for action in actions:
        match action:
            case Arrival():
                action.add_to(h)
            case Steps(num_steps):
                for _ in range(num_steps):
                    h.step()
            case Abort(which) if h.alive:
                h.abort(list(h.alive.values())[which % len(h.alive)])
    h.run()
    check_the_end(h)


def test_the_random_schedules_do_preempt_share_and_wait() -> None:
    """Many arrivals into little memory: the same promises, where everything that can go wrong is known to happen."""
    num_preemptions = num_hits = num_waited = 0
    for seed in range(80):
        rng = random.Random(seed)
        num_seqs = rng.randint(2, 6)
        num_tokens = num_seqs + rng.randint(0, 5)
        h = Harness(rng.randint(8, 14), max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens, max_model_len=32)
        for _ in range(12):
            Arrival(
                prefix=rng.randrange(3),
                num_shared=rng.randrange(15),
                num_own=rng.randint(1, 6),
                max_tokens=rng.randint(1, 12),
                salt=rng.choice(["", "", "other"]),
                num_followers=rng.choice([0, 0, 1, 2]),
            ).add_to(h)
            num_waited += h.scheduler.num_waiting > 6
            for _ in range(rng.randrange(4)):
                h.step()
            if h.alive and rng.random() < 0.2:
                h.abort(rng.choice(list(h.alive.values())))
        h.run()
        check_the_end(h)
        num_preemptions += h.scheduler.num_preemptions
        num_hits += h.pool.num_hit_tokens > 0
    assert num_preemptions > 50 and num_hits > 30 and num_waited > 50


def check_the_end(h: Harness) -> None:
    assert h.scheduler.num_running == h.scheduler.num_waiting == 0
    assert h.pool.num_free == h.pool.num_blocks
    for sequence in h.finished.values():
        expected = sequence.token_ids[: sequence.num_prompt_tokens]
        while len(expected) < len(sequence.token_ids):
            expected.append(next_token(expected))
        assert sequence.token_ids == expected
