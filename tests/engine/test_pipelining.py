"""Planning a step while the one before is computed: the same answers as without, and nothing is lost or leaked."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from engines import num_leaked_blocks
from fake_device import FakeDevice, FakePipelinedDevice
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schedules import SIZE, Abort, Arrival, Check, Steps, actions, alone, engine_on

from autobot_llm.engine.engine import Engine
from autobot_llm.engine.executor import PipelinedExecutor
from autobot_llm.engine.request import EngineRequest, RequestStats
from autobot_llm.engine.sequence import SamplingParams
from autobot_llm.engine.service import EngineService
from autobot_llm.errors import EngineError, ProviderUnavailable


def pipelined(num_blocks: int = 32, *, lazy: bool = True, fault: Any = None, **limits: Any) -> Engine:
    return engine_on(FakePipelinedDevice(num_blocks, SIZE, lazy=lazy, fault=fault), num_blocks, **limits)


@dataclass
class Coverage:
    """What happened in a run of schedules."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, check: Check) -> None:
        scheduler = check.engine.scheduler
        swap = scheduler.swap_space
        facts = {
            "preempted": scheduler.num_preemptions,
            "swapped": swap.num_swaps if swap else 0,
            "shared": scheduler.block_pool.num_hit_tokens,
            "stopped": sum(end.end == "stop" for end in check.ended.values()),
            "aborted": len(check.aborted),
            "overlapped": isinstance(check.engine.executor, FakePipelinedDevice)
            and check.engine.executor.most_unwaited == 2,
        }
        for name, value in facts.items():
            self.counts[name] = self.counts.get(name, 0) + (value > 0)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    actions=actions,
    num_blocks=st.integers(8, 16),
    max_num_seqs=st.integers(1, 6),
    num_extra_tokens=st.integers(0, 20),
    prefix_caching=st.booleans(),
    lazy=st.booleans(),
    num_swap_blocks=st.sampled_from([0, 3, 100]),
    scheduling_policy=st.sampled_from(["fcfs", "priority"]),
)
def test_any_schedule_gives_the_answers_that_each_request_gets_alone(
    actions: list[Arrival | Steps | Abort],
    num_blocks: int,
    max_num_seqs: int,
    num_extra_tokens: int,
    prefix_caching: bool,
    lazy: bool,
    num_swap_blocks: int,
    scheduling_policy: str,
) -> None:
    engine = pipelined(
        num_blocks,
        lazy=lazy,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + num_extra_tokens,
        prefix_caching=prefix_caching,
        num_swap_blocks=num_swap_blocks,
        scheduling_policy=scheduling_policy,
    )
    check = Check(engine)
    check.play(actions)
    check.finish()
    assert isinstance(engine.executor, FakePipelinedDevice)
    assert engine.executor.most_unwaited <= 2


@pytest.mark.parametrize("is_pipelined", [True, False])
def test_crowded_schedules_preempt_swap_share_stop_and_abort(is_pipelined: bool) -> None:
    """The same promises where everything that can go wrong is known to happen."""
    coverage = Coverage()
    for seed in range(60):
        rng = random.Random(seed)
        num_seqs, num_blocks = rng.randint(2, 6), rng.randint(8, 14)
        device = (FakePipelinedDevice if is_pipelined else FakeDevice)(num_blocks, SIZE)
        engine = engine_on(
            device,
            num_blocks,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=num_seqs + rng.randint(0, 8),
            num_swap_blocks=rng.choice([0, 6, 50]),
            scheduling_policy=rng.choice(["fcfs", "priority"]),
        )
        check = Check(engine)
        for _ in range(12):
            check.arrive(
                Arrival(
                    prefix=rng.randrange(3),
                    num_shared=rng.randrange(15),
                    own=tuple(rng.choices(range(20, 26), k=rng.randint(1, 5))),
                    max_tokens=rng.randint(1, 12),
                    num_choices=rng.choice([1, 1, 2, 3]),
                    stop=rng.choice([(), ("7",), ("&", ":", "=")]),
                    temperature=rng.choice([0.0, 1.0]),
                    priority=rng.randrange(3),
                )
            )
            for _ in range(rng.randrange(4)):
                check.step()
            if check.open_requests() and rng.random() < 0.2:
                check.abort(rng.choice(check.open_requests()))
        check.finish()
        coverage.add(check)
    fewest = {"preempted": 20, "swapped": 10, "shared": 20, "stopped": 30, "aborted": 20}
    assert all(coverage.counts[name] >= count for name, count in fewest.items()), coverage
    assert coverage.counts["overlapped"] == (60 if is_pipelined else 0)


def test_the_fake_device_is_an_executor_that_overlaps() -> None:
    assert isinstance(FakePipelinedDevice(4, SIZE), PipelinedExecutor)
    assert not isinstance(FakeDevice(4, SIZE), PipelinedExecutor)


def test_the_next_step_is_under_way_before_the_last_one_is_waited_for() -> None:
    check = Check(pipelined())
    check.arrive(Arrival(max_tokens=8))
    check.step()
    device = check.engine.executor
    assert isinstance(device, FakePipelinedDevice)
    for num_launched in range(2, 9):
        check.step()
        assert (device.num_launched, device.num_unwaited) == (num_launched, 1)
    check.finish()
    assert device.num_launched == 8, "no step is computed for a token that max_tokens excludes"


def test_an_answer_that_ends_by_itself_costs_one_step_too_many_and_shows_nothing_of_it() -> None:
    arrival = next(
        a for i in range(50) if alone(repr(a := Arrival(own=(20 + i % 6, 20 + i // 6))), a.request)[0][1] < 6
    )
    expected = alone(repr(arrival), arrival.request)[0]
    check = Check(pipelined())
    check.arrive(arrival)
    check.finish()
    device = check.engine.executor
    assert isinstance(device, FakePipelinedDevice)
    assert device.num_launched == expected[1] + 1
    assert check.engine.num_generated_tokens == expected[1]


def test_a_request_whose_tokens_the_host_chooses_waits_for_the_step_under_way() -> None:
    check = Check(pipelined())
    check.arrive(Arrival(max_tokens=10))
    check.step()
    check.step()
    check.arrive(Arrival(own=(21,), max_tokens=2, num_logprobs=0))
    device = check.engine.executor
    assert isinstance(device, FakePipelinedDevice)
    num_launched = device.num_launched
    check.step()
    assert device.num_unwaited == 0, "the step under way is taken in first"
    check.step()
    check.step()
    assert device.num_launched == num_launched, "while it is there, steps run one by one"
    check.step()
    check.step()
    assert device.num_launched > num_launched, "and then they overlap again"
    check.finish()
    assert len(check.logprobs[1, 0]) == 2


@pytest.mark.parametrize("is_under_way", [True, False])
def test_an_abort_returns_the_blocks_at_once_though_a_step_writes_to_them(is_under_way: bool) -> None:
    check = Check(pipelined())
    request_id = check.arrive(Arrival(max_tokens=10))
    if is_under_way:
        check.step()
    check.abort(request_id)
    assert num_leaked_blocks(check.engine) == 0
    assert check.engine.has_work == is_under_way
    check.arrive(Arrival(max_tokens=10, prefix=1))  # takes the same blocks
    check.finish()
    assert (request_id, 0) not in check.texts


def test_no_prefix_is_published_before_its_step_is_resolved() -> None:
    check = Check(pipelined())
    check.arrive(Arrival(num_shared=6, max_tokens=10))  # 7 tokens, and the first of the answer fills a block of 4
    num_published = []
    for _ in range(3):
        check.step()
        num_published.append(len(check.engine.scheduler.block_pool._index))
    assert num_published == [0, 1, 2]
    check.finish()


@pytest.mark.parametrize("when", [0, 1, 2, 3])
@pytest.mark.parametrize("lazy", [True, False])
def test_a_step_that_raises_ends_every_request_with_an_error_and_the_engine_goes_on(when: int, lazy: bool) -> None:
    def fail(number: int, logits_RV: Any) -> None:
        if number == when:
            raise MemoryError("out of memory, as a device would say")

    engine = pipelined(lazy=lazy, fault=fail)
    for i in range(2):
        engine.add(i, Arrival(own=(20 + i,), max_tokens=8).request(), RequestStats())
    num_tokens = {0: 0, 1: 0}
    with pytest.raises(MemoryError) as caught:
        for _ in range(10):
            for output in engine.step():
                num_tokens[output.request_id] = output.num_tokens
    outputs = engine.fail_all("the engine failed", caught.value)
    assert [(output.request_id, output.num_tokens) for output in outputs] == list(num_tokens.items())
    assert all(isinstance(output.error, EngineError) for output in outputs)
    device = engine.executor
    assert isinstance(device, FakePipelinedDevice)
    assert device.num_unwaited == 0 and num_leaked_blocks(engine) == 0 and not engine.has_work
    check = Check(engine)
    check.arrive(Arrival())
    check.finish()


def test_a_launch_that_raises_leaves_the_step_before_it_to_be_given_up() -> None:
    class Refusing(FakePipelinedDevice):
        def launch(self, batch: Any, sampling: Any) -> Any:
            if self.num_launched == 2:
                self.num_launched += 1
                raise RuntimeError("no more graphs")
            return super().launch(batch, sampling)

    device = Refusing(32, SIZE)
    engine = engine_on(device, 32)
    engine.add(0, Arrival(max_tokens=8).request(), RequestStats())
    with pytest.raises(RuntimeError, match="no more graphs") as caught:
        for _ in range(10):
            engine.step()
    [output] = engine.fail_all("the engine failed", caught.value)
    assert isinstance(output.error, EngineError) and output.num_tokens == 1
    assert device.num_unwaited == 0 and num_leaked_blocks(engine) == 0
    check = Check(engine)
    check.arrive(Arrival())
    check.finish()


def test_nan_ends_its_own_request_only_and_nobody_finds_its_blocks() -> None:
    def spoil_the_second_row(number: int, logits_RV: Any) -> None:
        if number == 3:
            logits_RV[1] = np.nan

    check = Check(pipelined(fault=spoil_the_second_row))
    check.arrive(Arrival(max_tokens=12))
    bad = check.arrive(Arrival(own=(21, 22), num_shared=8, max_tokens=12))
    check.aborted.add(bad)
    check.finish()
    assert isinstance(check.ended[bad, 0].error, EngineError) and "NaN" in str(check.ended[bad, 0].error)
    assert check.ended[bad, 0].num_tokens == 3


def test_closing_waits_for_the_step_under_way() -> None:
    check = Check(pipelined())
    check.arrive(Arrival())
    check.step()
    check.engine.close()
    device = check.engine.executor
    assert isinstance(device, FakePipelinedDevice)
    assert device.is_closed


def test_a_preempted_sequence_keeps_the_token_that_was_under_way() -> None:
    num_preempted = 0
    for prefix_caching in (True, False):
        check = Check(pipelined(6, max_num_seqs=2, max_model_len=24, prefix_caching=prefix_caching))
        for i in range(2):
            check.arrive(Arrival(num_shared=3, own=(20 + i,), max_tokens=16))
        check.finish()
        num_preempted += check.engine.scheduler.num_preemptions
    assert num_preempted > 0


async def test_a_service_answers_is_left_and_closes_while_steps_are_under_way() -> None:
    made: list[Engine] = []

    def build() -> Engine:
        made.append(pipelined(400, max_model_len=1600))
        return made[0]

    service = EngineService(build, max_queued_requests=8)
    await service.start()
    arrival = Arrival(max_tokens=9)
    with service.submit(arrival.request()) as handle:
        outputs = []
        while handle.is_open:
            outputs += await handle.next_outputs()
    text = "".join(output.text for output in outputs)
    assert (text, outputs[-1].num_tokens, outputs[-1].end) == alone(repr(arrival), arrival.request)[0]
    long = SamplingParams(max_tokens=1500, temperature=0.0)
    with service.submit(EngineRequest([20, 21], (long,))) as given_up:
        await given_up.next_outputs()
    with service.submit(EngineRequest([20, 22], (long,))) as cut_off:
        await cut_off.next_outputs()
        await service.close()
        with pytest.raises(ProviderUnavailable, match="stopped"):
            while cut_off.is_open:
                await cut_off.next_outputs()
    device = made[0].executor
    assert isinstance(device, FakePipelinedDevice)
    assert device.is_closed and device.num_unwaited == 0
