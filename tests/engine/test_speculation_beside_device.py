"""Drafts on a device that computes beside the host: the same answers, and the overlap where nothing is drafted."""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceABC
from typing import Any

import pytest
from engines import Driver
from fake_device import VOCAB_SIZE, FakeChainDevice, FakePipelinedDevice
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schedules import SIZE, Abort, Arrival, Check, Steps, actions, alone, engine_on
from test_speculation import Guesser

from autobot_llm.engine.batching.plan import ScheduledSequence, StepPlan
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.executor import Features
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.sequence import UNKNOWN_TOKEN, SamplingParams, Sequence
from autobot_llm.engine.speculative.draft_model import DraftModel
from autobot_llm.engine.speculative.ngram import NgramProposer
from autobot_llm.engine.speculative.policy import Always, CostlyOffer, Decision, Histories
from autobot_llm.engine.speculative.proposer import Computed, Draft
from autobot_llm.engine.speculative.speculator import READ_EVERY, Speculator


class AfterKnown(Guesser):
    """The guesser, asked while a token is under way."""

    def propose(self, sequence: Sequence, num_tokens: int) -> Draft | None:
        if sequence.token_ids[-1] != UNKNOWN_TOKEN:
            return super().propose(sequence, num_tokens)
        known = Sequence(sequence.id, sequence.token_ids[:-1], sequence.params)
        return super().propose(known, num_tokens)


class Now(Always):
    """Drafts at random steps."""

    def __init__(self, num_tokens: int, seed: int, chance: float = 0.5) -> None:
        super().__init__(num_tokens)
        self._rng = random.Random(seed)
        self._chance = chance

    def wants_offer(self) -> bool:
        return self._rng.random() < self._chance

    def may_pay(self, free: Histories, costly: CostlyOffer | None, room: int) -> bool:
        return self._rng.random() < self._chance

    def decide(self, free: Histories, costly: CostlyOffer | None, room: int) -> Decision | None:
        return super().decide(free, costly, room) if self._rng.random() < self._chance else None


def draft_model(num_blocks: int, max_tokens: int = 16, *, target: FakePipelinedDevice | None = None) -> DraftModel:
    """The fake device's model as its own draft, with a cache and a queue of its own; with the queue of its `target` it
    launches chains."""
    device = FakePipelinedDevice(num_blocks, SIZE) if target is None else FakeChainDevice(num_blocks, SIZE, target)
    pool = device.pool = BlockPool(num_blocks, SIZE, prefix_caching=True)
    return DraftModel(device, pool, vocab_size=VOCAB_SIZE, max_tokens=max_tokens, max_model_len=32)


def drafting(device: FakePipelinedDevice, num_blocks: int, speculator: Speculator, **limits: Any) -> Engine:
    engine = engine_on(device, num_blocks, **limits)
    engine.speculator = speculator
    return engine


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    actions=actions,
    num_blocks=st.integers(8, 16),
    max_num_seqs=st.integers(1, 6),
    num_extra_tokens=st.integers(0, 20),
    lazy=st.booleans(),
    num_swap_blocks=st.sampled_from([0, 3, 100]),
    scheduling_policy=st.sampled_from(["fcfs", "priority"]),
    skill=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    drafts_by=st.sampled_from(["nothing", "passes", "chains"]),
    num_draft_blocks=st.integers(1, 40),
    num_tokens=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_any_schedule_gives_the_answers_without_drafts(
    actions: list[Arrival | Steps | Abort],
    num_blocks: int,
    max_num_seqs: int,
    num_extra_tokens: int,
    lazy: bool,
    num_swap_blocks: int,
    scheduling_policy: str,
    skill: float,
    drafts_by: str,
    num_draft_blocks: int,
    num_tokens: int,
    seed: int,
) -> None:
    device, most_tokens = FakePipelinedDevice(num_blocks, SIZE, lazy=lazy), max_num_seqs + num_extra_tokens
    target = device if drafts_by == "chains" else None
    draft = None if drafts_by == "nothing" else draft_model(num_draft_blocks, most_tokens, target=target)
    engine = drafting(
        device,
        num_blocks,
        Speculator(
            num_tokens,
            make_free=lambda _: AfterKnown(skill, seed),
            costly=draft,
            policy=Now(num_tokens, seed),
            clock=lambda: 0.0,
        ),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + num_extra_tokens,
        num_swap_blocks=num_swap_blocks,
        scheduling_policy=scheduling_policy,
    )
    check = Check(engine)
    check.play(actions)
    check.finish()
    if draft is not None:
        assert isinstance(draft.executor, FakePipelinedDevice)
        assert draft.executor.most_unwaited <= 2 and draft.executor.num_unwaited == 0
        assert draft.pool.num_free == draft.pool.num_blocks, "what a draft model kept of who has left"


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("is_chained", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("most_read", [0, 64])
def test_a_draft_model_equal_to_its_target_is_always_right(
    temperature: float, is_chained: bool, lazy: bool, most_read: int
) -> None:
    device = FakePipelinedDevice(32, SIZE, lazy=lazy)
    draft = draft_model(40, target=device if is_chained else None)
    draft.most_read = most_read
    speculator = Speculator(4, costly=draft, policy=Always(4), clock=lambda: 0.0)
    driver = Driver(drafting(device, 32, speculator))
    arrivals = [Arrival(prefix=i, max_tokens=11, temperature=temperature) for i in range(3)]
    for i, arrival in enumerate(arrivals):
        driver.add(i, arrival.request())
    driver.run()
    for i, arrival in enumerate(arrivals):
        (expected,) = alone(repr(arrival), arrival.request).values()
        end = driver.ended[i, 0]
        assert (driver.texts[i, 0], end.num_tokens, end.end) == expected
    assert speculator.num_proposed > 0
    assert speculator.num_accepted == speculator.num_proposed
    if isinstance(draft.executor, FakeChainDevice):
        assert draft.executor.num_chains > 1
        is_left = draft.executor.num_before > 0  # prompts are longer than what a chain's first pass takes
        assert is_left == (most_read == 0)
        assert draft.pool.num_free == draft.pool.num_blocks


def test_a_draft_whose_logits_are_broken_is_not_gone_on_with() -> None:
    """Where two prompts take two steps, the first one's token is looked at before the next pass is launched."""
    draft = draft_model(40, max_tokens=8)
    assert isinstance(draft.executor, FakePipelinedDevice)

    def fault(number: int, logits_RV: Any) -> None:
        if number == 0:
            logits_RV[0] = float("nan")

    draft.executor.fault = fault
    sequences = [
        Sequence(i, list(range(20 + i, 27 + i)), SamplingParams(max_tokens=9, temperature=0.0)) for i in (0, 1)
    ]
    broken, good = draft.propose(sequences, 3)
    assert broken is None or not broken.token_ids
    assert good is not None and len(good.token_ids) == 3


def test_a_chain_draws_what_its_passes_do() -> None:
    """Slow and fast twin, from the same state; a position whose logits were broken ends a draft."""
    prompts = [[20, 21, 22, 20, 21], [24, 23, 22, 21, 20, 25], [22]]
    sequences = [
        Sequence(i, prompt, SamplingParams(max_tokens=9, temperature=i / 2, seed=i)) for i, prompt in enumerate(prompts)
    ]
    by_passes, chained = draft_model(40), draft_model(40, target=FakePipelinedDevice(40, SIZE))
    for draft in (by_passes, chained):
        draft.propose(sequences, 1)
    for number in (5, 1, 3):
        drafts = by_passes.propose(sequences, number)
        launched = chained.launch(sequences, number)
        assert launched is not None and [len(rows) for rows in launched.rows] == [number] * 3
        assert launched.wait() == (drafts, 0.0)
        for sequence, draft in zip(sequences, drafts, strict=True):
            assert draft is not None
            sequence.token_ids += [*draft.token_ids[: sequence.id + 1], 25]
    assert isinstance(chained.executor, FakeChainDevice)

    def fault(number: int, logits_RV: Any) -> None:
        if number == 1:
            logits_RV[2] = float("nan")

    chained.executor.fault = fault
    launched = chained.launch(sequences, 3)
    assert launched is not None
    drafts, _ = launched.wait()
    assert [len(draft.token_ids) for draft in drafts if draft is not None] == [3, 3, 1]


class Lengths(Always):
    """Always as many tokens, or now more and now fewer of them, and sometimes none."""

    def __init__(self, seed: int) -> None:
        super().__init__(3)
        self._rng = random.Random(seed)
        self._is_varied = seed >= 3

    def decide(self, free: Histories, costly: CostlyOffer | None, room: int) -> Decision | None:
        decision = super().decide(free, costly, room)
        if not self._is_varied:
            return decision
        number = self._rng.choice([0, 1, 2, 3, 3])
        return decision._replace(num_costly=number) if number else None

    def goes_on(self, free: Histories, costly: CostlyOffer, room: int) -> bool:
        return not self._is_varied and super().goes_on(free, costly, room)


class Counting(Speculator):
    """Counts the steps whose drafts were taken without a further look."""

    num_gone_on = 0

    def go_on(self, sequences: list[Sequence], room: int) -> bool:
        goes_on = super().go_on(sequences, room)
        self.num_gone_on += goes_on
        return goes_on


class NeverBehind(DraftModel):
    """Waits for each verdict before it drafts again."""

    def launch_behind(self, sequences: SequenceABC[Sequence], num_tokens: int, first_rows: list[int]) -> bool:
        return False


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(11))
def test_drafts_behind_a_step_are_those_after_its_verdict(seed: int, temperature: float, lazy: bool) -> None:
    """A draft that is wrong at one position of each chain makes the same drafts, whichever way; half of them for
    nobody to wait for."""
    figures, num_right = [], seed % 4
    for kind in (DraftModel, NeverBehind):
        device = FakePipelinedDevice(40, SIZE, lazy=lazy)
        chains = FakeChainDevice(40, SIZE, device)
        chains.fault = lambda number, logits_RV: logits_RV.__imul__(-1) if number == num_right else None
        chains.pool = BlockPool(40, SIZE, prefix_caching=True)
        draft = kind(chains, chains.pool, vocab_size=VOCAB_SIZE, max_tokens=16, max_model_len=32)
        policy = Lengths(seed)
        speculator = Counting(3, costly=draft, policy=policy, clock=lambda: 0.0)
        driver = Driver(drafting(device, 40, speculator))
        arrivals = [Arrival(prefix=i, own=(21 + i,), max_tokens=18, temperature=temperature) for i in range(2)]
        for i, arrival in enumerate(arrivals):
            driver.add(i, arrival.request())
        driver.run()
        for i, arrival in enumerate(arrivals):
            (expected,) = alone(repr(arrival), arrival.request).values()
            assert (driver.texts[i, 0], driver.ended[i, 0].num_tokens, driver.ended[i, 0].end) == expected
        figures.append((speculator.num_steps, speculator.num_proposed, speculator.num_accepted))
        if kind is DraftModel:
            assert policy._is_varied or chains.num_behind > 1
            assert (speculator.num_gone_on > 0) != policy._is_varied
            assert policy._is_varied or chains.num_chains <= speculator.num_steps + 5, (
                "those that were launched are given out"
            )
        assert draft.pool.num_free == draft.pool.num_blocks
    assert figures[0] == figures[1]
    assert num_right == 0 or policy._is_varied or figures[0][2] > 0


def test_who_leaves_while_its_drafts_are_verified_is_gone_at_once() -> None:
    device = FakePipelinedDevice(32, SIZE)
    draft = draft_model(40, target=device)
    speculator = Speculator(4, costly=draft, policy=Always(4), clock=lambda: 0.0)
    check = Check(drafting(device, 32, speculator))
    for i in range(3):
        check.arrive(Arrival(prefix=i, max_tokens=12))
    while not device.draft_tokens:
        check.step()
    check.step()
    assert device.num_unwaited == 1, "a step with drafts is under way"
    num_drafting = len(draft._shadows)
    check.abort(check.open_requests()[0])
    assert len(draft._shadows) == num_drafting - 1
    check.finish()
    assert draft.pool.num_free == draft.pool.num_blocks and not speculator.experience.num_texts


def test_prompts_are_taken_in_while_the_device_computes_them() -> None:
    """In the parts that steps compute, all but the last token, before anybody asks for a draft, and once."""
    heard: list[tuple[int, int]] = []

    class Reading(AfterKnown):
        def read(self, sequence: Sequence, num_tokens: int) -> None:
            assert sequence.id not in asked and num_tokens < len(sequence.token_ids)
            heard.append((sequence.id, num_tokens))

        def propose(self, sequence: Sequence, num_tokens: int) -> Draft | None:
            asked.add(sequence.id)
            return super().propose(sequence, num_tokens)

    asked: set[int] = set()
    speculator = Speculator(3, make_free=lambda _: Reading(1.0, 0), policy=Always(3), clock=lambda: 0.0)
    driver = Driver(drafting(FakePipelinedDevice(32, SIZE), 32, speculator, max_num_batched_tokens=10))
    arrivals = [Arrival(prefix=i, max_tokens=6, temperature=0.0) for i in range(3)]
    for i, arrival in enumerate(arrivals):
        driver.add(i, arrival.request())
    driver.run()
    lengths = [len(arrival.request().prompt_ids) for arrival in arrivals]
    last = dict(heard)
    assert sorted(last.values()) == sorted(length - 1 for length in lengths) and len(heard) > len(last)
    assert asked == set(last)


@pytest.mark.parametrize(("length", "num_blocks"), [(33, 40), (20, 2)])
def test_a_prompt_that_a_draft_model_has_no_room_for_is_left_to_its_target(length: int, num_blocks: int) -> None:
    """It is longer than the draft's context, of 32, or than its cache."""
    draft = draft_model(num_blocks)
    sequence = Sequence(0, [1] * length, SamplingParams(max_tokens=9))
    draft.take_in([Computed(sequence, 0, list(range(length - 1)), None)], Features())
    assert isinstance(draft.executor, FakePipelinedDevice) and draft.executor.num_unwaited == 0
    assert draft.lag(sequence) == length and draft.propose([sequence], 2) == [None]
    draft.forget(sequence)
    assert draft.pool.num_free == draft.pool.num_blocks


def test_what_answers_have_got_is_taken_in_now_and_then_where_nobody_is_drafted_for() -> None:
    heard: list[tuple[int, int]] = []

    class Reading(AfterKnown):
        def read(self, sequence: Sequence, num_tokens: int) -> None:
            heard.append((sequence.id, num_tokens))

    speculator = Speculator(3, make_free=lambda _: Reading(1.0, 0), policy=Always(3), clock=lambda: 0.0)
    sequence = Sequence(7, [1, 2, 3], SamplingParams(max_tokens=99))
    for _ in range(2 * READ_EVERY):
        sequence.token_ids.append(4)
        start = len(sequence.token_ids) - 1
        speculator.read(StepPlan((ScheduledSequence(sequence, start, 1, True),), 1, 0), Features())
    assert heard == [(7, 3 + READ_EVERY - 2), (7, 3 + 2 * READ_EVERY - 2)]


def test_nothing_is_waited_for_while_nothing_is_drafted() -> None:
    """A speculator whose policy never drafts leaves the steps side by side."""
    device = FakePipelinedDevice(32, SIZE)
    speculator = Speculator(4, make_free=NgramProposer, policy=Now(4, 0, chance=0.0), clock=lambda: 0.0)
    driver = Driver(drafting(device, 32, speculator))
    driver.add(0, Arrival(max_tokens=12).request())
    num_calls = 0
    while driver.engine.has_work:
        driver.step()
        num_calls += 1
        assert device.num_unwaited == (1 if driver.engine.has_work else 0)
    assert device.most_unwaited == 2
    assert speculator.num_proposed == 0


def test_a_failed_step_with_drafts_fails_its_requests_and_no_later_one() -> None:
    def fault(number: int, logits_RV: Any) -> None:
        if number == 1:
            raise RuntimeError("the device is gone")

    device = FakePipelinedDevice(32, SIZE, fault=fault)
    speculator = Speculator(4, make_free=lambda _: AfterKnown(1.0, 0), policy=Always(4), clock=lambda: 0.0)
    engine = drafting(device, 32, speculator)
    driver = Driver(engine)
    driver.add(0, Arrival(max_tokens=12, own=(21, 22)).request())
    with pytest.raises(RuntimeError, match="the device is gone"):
        while engine.has_work:
            driver.step()
    (output,) = engine.fail_all("it failed", RuntimeError())
    assert output.error is not None and not engine.has_work
    arrival = Arrival(max_tokens=12)
    driver.add(1, arrival.request())
    driver.run()
    (expected,) = alone(repr(arrival), arrival.request).values()
    assert (driver.texts[1, 0], driver.ended[1, 0].num_tokens, driver.ended[1, 0].end) == expected


def test_broken_logits_at_a_drafted_position_fail_that_request_alone() -> None:
    def fault(number: int, logits_RV: Any) -> None:
        if number == 1:
            logits_RV[1] = float("nan")

    device = FakePipelinedDevice(32, SIZE, fault=fault)
    speculator = Speculator(4, make_free=lambda _: AfterKnown(1.0, 0), policy=Always(4), clock=lambda: 0.0)
    driver = Driver(drafting(device, 32, speculator))
    arrivals = [Arrival(prefix=i, max_tokens=10) for i in range(2)]
    for i, arrival in enumerate(arrivals):
        driver.add(i, arrival.request())
    driver.run()
    assert "NaN" in str(driver.ended[0, 0].error)
    (expected,) = alone(repr(arrivals[1]), arrivals[1].request).values()
    assert (driver.texts[1, 0], driver.ended[1, 0].num_tokens, driver.ended[1, 0].end) == expected
