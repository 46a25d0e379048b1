"""A step's arrays that follow from those of the step before are the ones that would be built anew."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from autobot_llm.engine.batching.plan import BatchBuilder, StepBatch, StepPlan, build_batch
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
