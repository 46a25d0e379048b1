"""Who goes first and for how long others wait: profiles, the bound on waiting, priorities, swapping."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import TINY, Driver, greedy, num_leaked_blocks, request, tiny_engine
from fake_device import VOCAB_SIZE, FakeDevice

from autobot_llm.engine.attention.sdpa import SdpaAttention
from autobot_llm.engine.batching.plan import StepBatch
from autobot_llm.engine.batching.preemption import SwapSpace
from autobot_llm.engine.batching.profiles import BatchingConfig, get_batching_config
from autobot_llm.engine.batching.queue import WaitingQueue
from autobot_llm.engine.batching.scheduler import Scheduler
from autobot_llm.engine.batching.step_cost import FEWEST_TOKENS, NUM_SAMPLES, StepCost
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.executor import SwappingExecutor
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.noise import noise_keys
from autobot_llm.engine.request import RequestStats
from autobot_llm.engine.sampler import Sampler, SamplingArraysBuilder
from autobot_llm.engine.sequence import UNKNOWN_TOKEN, SamplingParams, Sequence
from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.errors import ConfigurationError

SIZE = 4


# --- profiles ---------------------------------------------------------------------------------------------------------


def test_the_profiles_are_those_of_the_design() -> None:
    assert get_batching_config("interactive") == BatchingConfig(64, 4096, 10, "fcfs")
    assert get_batching_config("batch") == BatchingConfig(256, 16384, 100, "fcfs")
    assert get_batching_config("mixed") == BatchingConfig(128, 8192, 50, "fcfs")
    assert get_batching_config("anything else") == get_batching_config("mixed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_waiting_time_ms": 0}, "max_waiting_time_ms=0: expected a time above 0"),
        ({"scheduling_policy": "lifo"}, "scheduling_policy='lifo': expected fcfs or priority"),
    ],
)
def test_policies_that_cannot_work_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Scheduler(BlockPool(8, SIZE), max_num_seqs=1, max_num_batched_tokens=8, max_model_len=8, **options)


# --- the bound on waiting ---------------------------------------------------------------------------------------------


class TimedDevice(FakeDevice):
    """Keeps a clock: a step takes 4 ms, and 50 us for each token beyond one per sequence."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks, SIZE)
        self.now = 0.0
        self.steps: list[tuple[bool, int, float]] = []
        """Whether somebody decoded, tokens of prompts, seconds."""

    def execute(self, batch: StepBatch) -> torch.Tensor:
        logits_RV = super().execute(batch)
        lens = np.diff(batch.query_starts)
        num_prompt_tokens = int(lens[lens > 1].sum())
        seconds = 4e-3 + 50e-6 * num_prompt_tokens
        self.now += seconds
        self.steps.append((bool((lens == 1).any()), num_prompt_tokens, seconds))
        return logits_RV


def run_prompts_beside_a_decoder(max_waiting_time_ms: float | None) -> TimedDevice:
    device = TimedDevice(2000)
    scheduler = Scheduler(
        BlockPool(2000, SIZE, prefix_caching=False),
        max_num_seqs=8,
        max_num_batched_tokens=1000,
        max_model_len=1000,
        max_waiting_time_ms=max_waiting_time_ms,
    )
    engine = Engine(
        load_config(TINY),
        Tokenizer.from_folder(TINY),
        device,
        scheduler,
        Sampler(VOCAB_SIZE),
        bytes_per_block=1,
        clock=lambda: device.now,
    )
    engine.add(0, request([20] * 600, greedy(40)), RequestStats())
    for _ in range(5):
        engine.step()
    engine.add(1, request([21] * 700, greedy(2)), RequestStats())
    engine.add(2, request([22] * 500, greedy(2)), RequestStats())
    while engine.has_work:
        engine.step()
    return device


def test_prompts_add_no_more_than_the_bound_to_a_step_in_which_somebody_decodes() -> None:
    device = run_prompts_beside_a_decoder(10)
    assert device.steps[0] == (False, 600, pytest.approx(34e-3)), "nobody decodes: the whole prompt at once"
    shared = [(num, seconds) for decodes, num, seconds in device.steps if decodes and num]
    assert sum(num for num, _ in shared) == 1200
    assert max(seconds for _, seconds in shared) <= 4e-3 + 10e-3 + 1e-9
    assert max(num for num, _ in shared) >= 150, "and they use what the bound allows"


def test_without_a_bound_prompts_take_the_whole_budget() -> None:
    device = run_prompts_beside_a_decoder(None)
    assert max(num for decodes, num, _ in device.steps if decodes) > 900


def test_prompts_advance_however_small_the_bound() -> None:
    device = run_prompts_beside_a_decoder(0.001)
    shared = [num for decodes, num, _ in device.steps if decodes and num]
    assert shared and max(shared) == FEWEST_TOKENS


def test_a_short_prompt_passes_beside_one_that_the_bound_stretches_over_many_steps() -> None:
    pool = BlockPool(200, SIZE, prefix_caching=False)
    scheduler = Scheduler(pool, max_num_seqs=4, max_num_batched_tokens=500, max_model_len=400, max_waiting_time_ms=10)
    scheduler.step_cost.record(0, 0.004)
    scheduler.step_cost.record(100, 0.014 + 0.015)  # 40 tokens in 10 ms
    scheduler.add(sequence(0, max_tokens=50))
    step(scheduler)
    scheduler.add(sequence(1, num_prompt_tokens=300))
    scheduler.add(sequence(2, num_prompt_tokens=15))
    plan = scheduler.plan()
    assert plan is not None
    assert [(item.sequence.id, item.num_tokens) for item in plan.scheduled] == [(0, 1), (1, 20), (2, 15)]


def test_the_cost_of_a_token_is_what_a_step_takes_beyond_one_without_prompts() -> None:
    cost = StepCost()
    assert cost.num_prompt_tokens_within(0.01) is None
    cost.record(0, 0.004)
    cost.record(100, 0.014)
    assert cost.seconds_per_prompt_token == pytest.approx(1e-4)
    assert cost.num_prompt_tokens_within(0.01015) == 101


def test_one_step_that_met_a_compiler_does_not_change_the_estimate() -> None:
    cost = StepCost()
    for seconds in (0.01, 5.0, 0.01, 0.01):
        cost.record(100, seconds)
    assert cost.seconds_per_prompt_token == pytest.approx(1e-4)
    for _ in range(NUM_SAMPLES):
        cost.record(100, 0.02)
    assert cost.seconds_per_prompt_token == pytest.approx(2e-4), "a lasting change is learned"


def test_a_step_of_few_prompt_tokens_teaches_nothing() -> None:
    cost = StepCost()
    cost.record(FEWEST_TOKENS - 1, 1.0)
    assert cost.num_prompt_tokens_within(0.01) is None


# --- priorities -------------------------------------------------------------------------------------------------------


def sequence(sequence_id: int, num_prompt_tokens: int = 4, max_tokens: int = 8, priority: int = 0) -> Sequence:
    return Sequence(sequence_id, [sequence_id] * num_prompt_tokens, greedy(max_tokens), priority=priority)


def scheduler_of(num_blocks: int, *, max_num_seqs: int = 4, policy: Any = "priority") -> Scheduler:
    pool = BlockPool(num_blocks, SIZE, prefix_caching=False)
    return Scheduler(
        pool,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=64,
        max_model_len=min(32, num_blocks * SIZE),
        scheduling_policy=policy,
    )


def step(scheduler: Scheduler) -> list[int]:
    """One step; the ids of who took part, in their order."""
    plan = scheduler.plan()
    if plan is None:
        return []
    scheduler.commit(plan, [1] * sum(item.samples for item in plan.scheduled))
    for item in plan.scheduled:
        if item.samples and len(item.sequence.token_ids) == item.sequence.max_num_tokens:
            scheduler.finish(item.sequence)
    return [item.sequence.id for item in plan.scheduled]


def test_the_queue_is_in_order_of_priority_and_then_of_arrival() -> None:
    queue = WaitingQueue(heeds_priority=True)
    sequences = [sequence(i, priority=priority) for i, priority in enumerate([0, 2, -1, 0, 2, -1])]
    for one in sequences:
        queue.push(one)
    assert queue.num_before(sequence(9, priority=0)) == 4
    queue.push_front(last := sequence(6, priority=2))
    order = []
    while (head := queue.head) is not None:
        order.append(head.id)
        assert head in queue and queue.remove(head) and head not in queue
    assert order == [2, 5, 0, 3, 6, 1, 4]
    assert not queue.remove(last) and len(queue) == 0


@pytest.mark.parametrize(("policy", "order"), [("priority", [1, 2, 0, 3]), ("fcfs", [0, 1, 2, 3])])
def test_priorities_count_under_their_policy_only(policy: str, order: list[int]) -> None:
    scheduler = scheduler_of(16, max_num_seqs=1, policy=policy)
    for i, priority in enumerate([5, -1, 0, 7]):
        scheduler.add(sequence(i, priority=priority, max_tokens=1))
    assert [step(scheduler)[0] for _ in range(4)] == order


def test_an_urgent_arrival_takes_the_seat_of_the_least_urgent_and_latest() -> None:
    scheduler = scheduler_of(64, max_num_seqs=3)
    for i, priority in enumerate([1, 2, 2]):
        scheduler.add(sequence(i, priority=priority))
    assert step(scheduler) == [0, 1, 2]
    scheduler.add(sequence(3, priority=0))
    assert step(scheduler) == [0, 1, 3], "2 came later than 1"
    scheduler.add(sequence(4, priority=2))
    assert step(scheduler) == [3, 0, 1], "an equal priority takes nobody's seat"
    while len(order := step(scheduler)) == 3:
        pass
    assert 2 in order or 2 in step(scheduler), "who was preempted goes before who came later"


def test_an_urgent_arrival_takes_the_memory_of_the_less_urgent() -> None:
    scheduler = scheduler_of(8)
    scheduler.add(sequence(0, num_prompt_tokens=10, priority=0))
    scheduler.add(sequence(1, num_prompt_tokens=10, priority=1))
    assert step(scheduler) == [0, 1]
    scheduler.add(urgent := sequence(2, num_prompt_tokens=12, priority=-1))
    assert step(scheduler) == [0, 2], "1 made room for it"
    assert scheduler.num_preemptions == 1 and urgent.num_computed_tokens == 12


def test_nobody_is_preempted_for_an_arrival_that_would_still_not_fit() -> None:
    scheduler = scheduler_of(8)
    scheduler.add(sequence(0, num_prompt_tokens=16, priority=0))
    scheduler.add(sequence(1, num_prompt_tokens=4, priority=2))
    assert step(scheduler) == [0, 1]
    scheduler.add(sequence(2, num_prompt_tokens=20, priority=1))
    assert step(scheduler) == [0, 1]
    assert scheduler.num_preemptions == 0


def test_memory_that_runs_out_costs_the_least_urgent_though_it_was_admitted_first() -> None:
    scheduler = scheduler_of(6, max_num_seqs=2)
    scheduler.add(low := sequence(0, max_tokens=16, priority=1))
    step(scheduler)
    scheduler.add(high := sequence(1, max_tokens=16, priority=0))
    while scheduler.num_running or scheduler.num_waiting:
        step(scheduler)
    assert low.num_preemptions > 0 and high.num_preemptions == 0


# --- swapping ---------------------------------------------------------------------------------------------------------


class RecordingCopier:
    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int]]] = []

    def copy_out(self, block_ids: SequenceABC[int]) -> Any:
        self.calls.append(("out", list(block_ids)))
        return list(block_ids)

    def copy_in(self, swapped: Any, block_ids: SequenceABC[int]) -> None:
        assert len(swapped) == len(block_ids)
        self.calls.append(("in", list(block_ids)))


def test_what_the_budget_does_not_hold_is_recomputed() -> None:
    copier = RecordingCopier()
    space = SwapSpace(copier, max_bytes=350, bytes_per_block=100)
    one, two = sequence(0), sequence(1)
    one.block_ids.extend([4, 5])
    two.block_ids.extend([6, 7])
    assert space.take_in(one) and not space.take_in(two)
    assert (space.num_blocks_of(one), space.num_blocks_of(two), space.num_blocks) == (2, 0, 2)
    space.drop(one)
    assert space.take_in(two) and space.num_blocks == 2
    space.bring_back(two)
    assert space.num_blocks == 0
    assert copier.calls == [("out", [4, 5]), ("out", [6, 7]), ("in", [6, 7])]


def test_a_swap_space_that_holds_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_bytes=99: expected at least one block of 100 bytes"):
        SwapSpace(RecordingCopier(), max_bytes=99, bytes_per_block=100)


def test_a_swapped_sequence_goes_on_where_it_was() -> None:
    copier = RecordingCopier()
    scheduler = scheduler_of(6, max_num_seqs=2, policy="fcfs")
    scheduler.swap_space = SwapSpace(copier, max_bytes=1000, bytes_per_block=100)
    scheduler.add(first := sequence(0, max_tokens=16))
    scheduler.add(second := sequence(1, max_tokens=16))
    while second.num_preemptions == 0:
        step(scheduler)
    num_computed = second.num_computed_tokens
    assert num_computed == len(second.token_ids) - 1 and copier.calls[0][0] == "out"
    while not second.block_ids:
        step(scheduler)
    assert second.num_computed_tokens == num_computed + 1, "nothing is computed twice"
    assert [name for name, _ in copier.calls] == ["out", "in"]
    while scheduler.num_running or scheduler.num_waiting:
        step(scheduler)
    assert (first.num_output_tokens, second.num_output_tokens) == (16, 16)
    assert scheduler.block_pool.num_free == 6 and scheduler.swap_space.num_blocks == 0


def test_an_aborted_sequence_leaves_no_swapped_blocks_behind() -> None:
    scheduler = scheduler_of(6, max_num_seqs=2, policy="fcfs")
    scheduler.swap_space = SwapSpace(RecordingCopier(), max_bytes=1000, bytes_per_block=100)
    scheduler.add(sequence(0, max_tokens=16))
    scheduler.add(second := sequence(1, max_tokens=16))
    while second.num_preemptions == 0:
        step(scheduler)
    assert scheduler.swap_space.num_blocks > 0
    scheduler.abort(second)
    assert scheduler.swap_space.num_blocks == 0


def test_blocks_come_back_as_they_were_and_elsewhere() -> None:
    attention = SdpaAttention(load_config(TINY), num_blocks=6, block_size=SIZE, dtype=torch.float32, device="cpu")
    tensors = attention.storage.numbers_2LNKD.flatten(0, 1).unbind()
    for tensor_NKD in tensors:
        tensor_NKD.normal_()
    before = [tensor_NKD.clone() for tensor_NKD in tensors]
    swapped = attention.copy_out([4, 1])
    attention.discard([4, 1])
    attention.copy_in(swapped, [0, 5])
    for tensor_NKD, old_NKD in zip(tensors, before, strict=True):
        blocks, old = tensor_NKD.view(6, SIZE, -1), old_NKD.view(6, SIZE, -1)
        assert torch.equal(blocks[[0, 5]], old[[4, 1]])
        assert torch.equal(blocks[[2, 3]], old[[2, 3]]), "the others are untouched"


@pytest.mark.parametrize("max_num_batched_tokens", [10, 300])
def test_greedy_answers_are_the_same_swapped_recomputed_and_never_preempted(
    tmp_path: Path, max_num_batched_tokens: int
) -> None:
    """In chunks of few tokens, prompts are preempted half-way, too."""
    prompts = [list(range(100 + 40 * i, 200 + 40 * i)) for i in range(3)]

    def answers(num_blocks: int, max_swap_blocks: int) -> tuple[dict[tuple[int, int], str], int, int]:
        engine = tiny_engine(
            tmp_path,
            compiled=False,
            num_blocks=num_blocks,
            prefix_caching=False,
            max_num_seqs=3,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        assert isinstance(engine.executor, SwappingExecutor)
        if max_swap_blocks:
            engine.scheduler.swap_space = SwapSpace(engine.executor, max_bytes=max_swap_blocks, bytes_per_block=1)
        driver = Driver(engine)
        for i, prompt in enumerate(prompts):
            driver.add(i, request(prompt, greedy(50)))
        driver.run()
        assert num_leaked_blocks(engine) == 0
        space = engine.scheduler.swap_space
        assert space is None or space.num_blocks == 0
        return driver.texts, engine.scheduler.num_preemptions, space.num_swaps if space else 0

    expected, num_preemptions, _ = answers(400, 0)
    assert num_preemptions == 0 and len(expected) == 3
    recomputed, num_preemptions, num_swaps = answers(24, 0)
    assert recomputed == expected and num_preemptions > 0 and num_swaps == 0
    swapped, num_preemptions, num_swaps = answers(24, 100)
    assert swapped == expected and num_swaps == num_preemptions > 0


# --- what a device is told about sampling -----------------------------------------------------------------------------


def drawing(sequence_id: int, **params: Any) -> Sequence:
    return Sequence(sequence_id, [1, 2, 3], SamplingParams(max_tokens=9, **params))


def test_rows_are_described_as_their_requests_ask() -> None:
    builder = SamplingArraysBuilder(vocab_size=100)
    rows = [
        drawing(0, temperature=0.0, top_k=5, top_p=0.5, min_p=0.1, seed=1),
        drawing(1, temperature=0.7, top_k=100, seed=2),
        drawing(2, temperature=1e-40, top_k=7, top_p=0.9, min_p=0.25, seed=3),
    ]
    arrays = builder.build(rows)
    assert arrays.any_drawn and arrays.any_restricted
    assert arrays.is_drawn_R.tolist() == [False, True, True]
    assert arrays.temperature_R.tolist() == pytest.approx([1.0, 0.7, 1e-30])
    assert arrays.top_k_R.tolist() == [0, 0, 7]
    assert arrays.top_p_R.tolist() == pytest.approx([1.0, 1.0, 0.9])
    assert arrays.min_p_R.tolist() == pytest.approx([0.0, 0.0, 0.25])
    assert not builder.build(rows[:2]).any_restricted
    greedy_only = builder.build(rows[:1])
    assert not greedy_only.any_drawn and len(greedy_only.keys_R) == 0


def test_noise_belongs_to_the_place_of_the_token_known_or_not() -> None:
    builder = SamplingArraysBuilder(vocab_size=100)
    rows = [drawing(0, seed=11), drawing(1, seed=12)]
    for position in (3, 4, 5):
        assert builder.build(rows).keys_R.tolist() == noise_keys([(11, position), (12, position)]).ravel().tolist()
        for one in rows:
            one.token_ids.append(UNKNOWN_TOKEN)
