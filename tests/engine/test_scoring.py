"""Log probabilities of a given text: the same figures as generating it gives, and nobody else notices."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import torch
from engines import Driver, greedy, num_leaked_blocks, request, tiny_engine
from fake_device import logits_of
from test_pipelining import pipelined
from test_service import FaultyExecutor, engine_with, read, settled

from autobot_llm.engine.batching.plan import StepBatch
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.scoring import MAX_STEP_TOKENS, PromptScoring
from autobot_llm.engine.service import EngineService
from autobot_llm.errors import ContextLengthError, EngineError, OverloadedError, ProviderUnavailable

PROMPT = [100, 200, 300, 400]
LONG = [(7 * i) % 8000 + 10 for i in range(MAX_STEP_TOKENS + 40)]


def scored(engine: Engine, token_ids: list[int]) -> list[float]:
    scoring = PromptScoring(token_ids)
    try:
        while not scoring.advance(engine):
            pass
    finally:
        scoring.release(engine)
    return scoring.logprobs


@pytest.mark.parametrize("compiled", [False, True])
def test_a_texts_log_probabilities_are_those_that_generating_it_reports(tmp_path: Path, compiled: bool) -> None:
    driver = Driver(tiny_engine(tmp_path, compiled=compiled))
    driver.add(0, request(PROMPT, greedy(40, num_logprobs=0)))
    driver.run()
    key = (0, 0)
    generated = driver.token_ids[key]
    found = scored(driver.engine, PROMPT + generated)
    assert len(found) == len(PROMPT) + len(generated) - 1
    assert found[len(PROMPT) - 1 :] == pytest.approx(driver.logprobs[key], abs=2e-3)
    assert num_leaked_blocks(driver.engine) == 0


def test_a_long_text_is_scored_in_steps_to_the_same_figures(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path, compiled=False)
    scoring = PromptScoring(LONG)
    assert not scoring.advance(engine)
    assert len(scoring.logprobs) == MAX_STEP_TOKENS
    assert scoring.advance(engine)
    scoring.release(engine)
    small = tiny_engine(tmp_path, compiled=False, max_num_batched_tokens=64, max_num_seqs=8)
    assert scored(small, LONG) == pytest.approx(scoring.logprobs, abs=2e-3)


def test_what_was_scored_is_nobodys_prefix(tmp_path: Path) -> None:
    driver = Driver(tiny_engine(tmp_path, compiled=False))
    scored(driver.engine, LONG)
    stats = driver.add(0, request(LONG, greedy(2)))
    driver.run()
    assert stats.num_cached_tokens == 0


def test_a_single_token_has_nothing_to_score(tmp_path: Path) -> None:
    assert scored(tiny_engine(tmp_path, compiled=False), [5]) == []


def test_a_text_beyond_the_context_is_refused_and_one_beyond_the_cache_put_off(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path, compiled=False, num_blocks=20)
    with pytest.raises(ContextLengthError, match="321 tokens"):
        scored(engine, [9] * 321)
    taken = engine.scheduler.block_pool.allocate(10)
    assert taken is not None
    with pytest.raises(OverloadedError):
        scored(engine, [9] * 200)
    engine.scheduler.block_pool.free(taken)
    assert num_leaked_blocks(engine) == 0


def test_nan_is_an_error_and_leaves_no_block_behind(tmp_path: Path) -> None:
    def spoil(batch: StepBatch, logits_RV: torch.Tensor) -> None:
        logits_RV[0, 0] = math.nan

    engine = tiny_engine(tmp_path, compiled=False)
    engine.executor = FaultyExecutor(engine.executor, spoil)
    with pytest.raises(EngineError, match="NaN"):
        scored(engine, PROMPT)
    assert num_leaked_blocks(engine) == 0


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[EngineService]:
    made = EngineService(partial(engine_with, tmp_path), max_queued_requests=8)
    await made.start()
    yield made
    await made.close()


async def test_work_between_steps_changes_no_answer(service: EngineService) -> None:
    alone = await read(service.submit(request(PROMPT, greedy(60))))
    answer = asyncio.create_task(read(service.submit(request(PROMPT, greedy(60)))))
    figures = [await service.run(partial(scored, token_ids=LONG)) for _ in range(3)]
    assert "".join(o.text for o in await answer) == "".join(o.text for o in alone)
    assert figures[0] == figures[1] == figures[2]
    assert num_leaked_blocks(await settled(service)) == 0


async def test_what_work_raises_reaches_who_asked_and_nobody_else(service: EngineService) -> None:
    def fail(engine: Engine) -> None:
        raise ValueError("no")

    answer = asyncio.create_task(read(service.submit(request(PROMPT, greedy(30)))))
    with pytest.raises(ValueError, match="no"):
        await service.run(fail)
    assert (await answer)[-1].end == "length"


async def test_work_that_an_engine_no_longer_comes_to_is_told_so(service: EngineService) -> None:
    await service.close()
    with pytest.raises(ProviderUnavailable):
        await service.run(lambda engine: None)


@pytest.mark.parametrize("lazy", [True, False])
async def test_a_step_under_way_on_a_device_is_waited_for_first(lazy: bool) -> None:
    text = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    expected = [
        torch.from_numpy(logits_of(tuple(text[:end]))).log_softmax(-1)[text[end]].item() for end in range(1, len(text))
    ]
    service = EngineService(lambda: pipelined(lazy=lazy), max_queued_requests=8)
    await service.start()
    try:
        alone = await read(service.submit(request([7, 8, 9], greedy(20))))
        answer = asyncio.create_task(read(service.submit(request([7, 8, 9], greedy(20)))))
        for _ in range(5):
            assert await service.run(partial(scored, token_ids=text)) == pytest.approx(expected, abs=1e-5)
        assert "".join(o.text for o in await answer) == "".join(o.text for o in alone)
        assert num_leaked_blocks(await settled(service)) == 0
    finally:
        await service.close()
