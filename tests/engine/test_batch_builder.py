"""A step's arrays that follow from those of the step before are the ones that would be built anew."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from autobot_llm.engine.batching.plan import (
    BatchBuilder,
    ScheduledSequence,
    StepBatch,
    StepPlan,
    build_batch,
    few_tokens_batch,
    many_tokens_batch,
    single_token_batch,
)
from autobot_llm.engine.batching.scheduler import Scheduler
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.sequence import SamplingParams, Sequence

SIZE = 4


@pytest.mark.parametrize("is_pipelined", [True, False], ids=["tokens unknown", "tokens known"])
@pytest.mark.parametrize("seed", range(25))
def test_every_step_is_what_it_would_be_alone(seed: int, is_pipelined: bool) -> None:
    rng = random.Random(seed)
    scheduler = Scheduler(BlockPool(20, SIZE), max_num_seqs=5, max_num_batched_tokens=12, max_model_len=40)
    builder = BatchBuilder(SIZE)
    running: dict[int, Sequence] = {}
    under_way: list[StepPlan] = []
    built: list[tuple[StepBatch, StepBatch]] = []

    def resolve(plan: StepPlan) -> None:
        scheduler.resolve(plan, [rng.randrange(100) for item in plan.scheduled if item.samples])
        for sequence in list(running.values()):
            is_complete = len(sequence.token_ids) == sequence.max_num_tokens and sequence.token_ids[-1] >= 0
            if is_complete or rng.random() < 0.02:
                scheduler.abort(running.pop(sequence.id))

    for i in range(150):
        if rng.random() < 0.15:
            params = SamplingParams(max_tokens=rng.randint(1, 24))
            running[i] = Sequence(i, [rng.randrange(100) for _ in range(rng.randint(1, 16))], params)
            scheduler.add(running[i])
        plan = scheduler.plan()
        if plan is not None:
            batch, expected = builder.build(plan), build_batch(plan.scheduled, SIZE)
            assert_equal(batch, expected)
            built.append((batch, expected))
            scheduler.advance(plan)
            under_way.append(plan)
        if under_way and (not is_pipelined or plan is None or len(under_way) > 1):
            resolve(under_way.pop(0))
    assert len(built) > 40
    for batch, expected in built:  # nothing that was handed out has changed since
        assert_equal(batch, expected)


@pytest.mark.parametrize("seed", range(10))
def test_few_tokens_in_lists_are_what_they_are_in_arrays(seed: int) -> None:
    """With drafts that are known, with drafts that only the device knows, and after tokens that left the cache."""
    rng, scheduled = random.Random(seed), []
    for i in range(rng.randint(1, 5)):
        sequence = Sequence(i, [rng.randrange(100) for _ in range(rng.randint(9, 30))], SamplingParams(max_tokens=9))
        sequence.block_ids.extend(rng.sample(range(90), 12))
        sequence.num_evicted_tokens = rng.choice([0, 0, SIZE, 2 * SIZE])
        start = len(sequence.token_ids) - rng.randint(1, 1 if seed % 3 == 0 else 5)
        start = max(start, sequence.num_evicted_tokens)
        num_draft = rng.choice([0, 3]) if start == len(sequence.token_ids) - 1 and seed % 3 else 0
        sequence.draft_ids = [rng.randrange(100) for _ in range(num_draft + rng.randint(0, 2))]
        if num_draft and rng.random() < 0.5:
            sequence.draft_ids = [-1] * len(sequence.draft_ids)
            sequence.draft_rows = [200 + j for j in range(len(sequence.draft_ids))]
        elif not num_draft and start == len(sequence.token_ids) - 1 and rng.random() < 0.5:
            sequence.token_ids[-1], sequence.pending_row = -1, i
        samples = num_draft > 0 or rng.random() < 0.7
        number = len(sequence.token_ids) + num_draft - start
        scheduled.append(ScheduledSequence(sequence, start, number, samples, 0, num_draft))
    tables_SB = build_batch(scheduled, SIZE).block_tables_SB
    few, many = (build(scheduled, tables_SB, SIZE) for build in (few_tokens_batch, many_tokens_batch))
    assert_equal(few, many)
    if seed % 3 == 0:
        assert_equal(few, single_token_batch(scheduled, tables_SB, SIZE))


def assert_equal(batch: StepBatch, expected: StepBatch) -> None:
    for field in dataclasses.fields(StepBatch):
        found, wanted = getattr(batch, field.name), getattr(expected, field.name)
        if wanted is None:
            assert found is None, field.name
            continue
        assert found.dtype == wanted.dtype, field.name
        if field.name == "block_tables_SB":  # what a table says past a sequence's blocks is not read
            width = min(found.shape[1], wanted.shape[1])
            found, wanted = found[:, :width], wanted[:, :width]
        assert np.array_equal(found, wanted), (field.name, found, wanted)
