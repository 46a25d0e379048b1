"""The bridge from asyncio to the device thread: nobody waits for ever, and nobody pays for a neighbour."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from engines import Driver, greedy, num_leaked_blocks, request, tiny_engine

from autobot_llm.engine.batching.plan import StepBatch
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.executor import Executor
from autobot_llm.engine.request import Output
from autobot_llm.engine.service import MAX_CONSECUTIVE_FAILURES, EngineService, RequestHandle
from autobot_llm.errors import EngineError, ModelLoadError, OverloadedError, ProviderUnavailable

PROMPT = [100, 200, 300, 400]


class FaultyExecutor:
    """Runs the real steps, except those that `fault` answers for: it may raise, wait, or spoil the logits."""

    def __init__(self, inner: Executor, fault: Callable[[StepBatch, torch.Tensor], None]) -> None:
        self._inner = inner
        self._fault = fault
        self.name, self.reason = inner.name, inner.reason

    def execute(self, batch: StepBatch) -> torch.Tensor:
        logits_RV = self._inner.execute(batch)
        self._fault(batch, logits_RV)
        return logits_RV

    def discard(self, block_ids: list[int]) -> None:
        self._inner.discard(block_ids)

    def close(self) -> None:
        self._inner.close()


def engine_with(tmp_path: Path, fault: Callable[[StepBatch, torch.Tensor], None] | None = None) -> Engine:
    engine = tiny_engine(tmp_path, compiled=False)
    if fault is not None:
        engine.executor = FaultyExecutor(engine.executor, fault)
    return engine


async def read(handle: RequestHandle) -> list[Output]:
    outputs: list[Output] = []
    with handle:
        while handle.is_open:
            outputs += await handle.next_outputs()
    return outputs


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[EngineService]:
    made = EngineService(partial(engine_with, tmp_path), max_queued_requests=8)
    await made.start()
    yield made
    await made.close()


async def settled(service: EngineService) -> Engine:
    """The engine, once the thread has read every command and finished every request."""
    assert service.engine is not None
    while service.engine.has_work or not service._commands.empty():
        await asyncio.sleep(0.005)
    return service.engine


async def test_many_requests_are_answered_at_once(service: EngineService) -> None:
    answers = await asyncio.gather(*(read(service.submit(request(PROMPT, greedy(10 + i)))) for i in range(8)))
    assert [answer[-1].num_tokens for answer in answers] == list(range(10, 18))
    assert all(answer[-1].end == "length" for answer in answers)
    assert num_leaked_blocks(await settled(service)) == 0


async def test_a_request_given_up_returns_its_blocks_at_once(service: EngineService) -> None:
    handle = service.submit(request(PROMPT, greedy(300)))
    with handle:
        await handle.next_outputs()
        assert service.engine is not None and num_leaked_blocks(service.engine) > 0
    engine = await settled(service)
    assert engine.num_generated_tokens < 300
    assert num_leaked_blocks(engine) == 0
    assert not service._handles


async def test_a_cancelled_reader_gives_its_request_up(service: EngineService) -> None:
    task = asyncio.create_task(read(service.submit(request(PROMPT, greedy(300)))))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    engine = await settled(service)
    assert engine.num_generated_tokens < 300
    assert num_leaked_blocks(engine) == 0


async def test_a_slow_reader_delays_nobody_and_loses_nothing(service: EngineService) -> None:
    with service.submit(request(PROMPT, greedy(60))) as slow:
        others = await asyncio.gather(*(read(service.submit(request(PROMPT, greedy(60)))) for _ in range(3)))
        assert all(answer[-1].end == "length" for answer in others)
        await settled(service)  # the slow one is complete too, though nobody has read it
        text = "".join(output.text for output in await read(slow))
    assert text == "".join(output.text for output in others[0])


async def test_a_full_queue_is_an_error_that_says_when_to_come_back(tmp_path: Path) -> None:
    gate = threading.Event()
    service = EngineService(
        partial(engine_with, tmp_path, lambda batch, logits_RV: gate.wait(10) and None), max_queued_requests=2
    )
    await service.start()
    running = [service.submit(request(PROMPT, greedy(2)))]
    while service.engine is None or service.engine.scheduler.num_running == 0:
        await asyncio.sleep(0.005)
    running += [service.submit(request(PROMPT, greedy(2))) for _ in range(2)]
    with pytest.raises(OverloadedError, match="2 requests are waiting for the engine, the limit is 2") as caught:
        service.submit(request(PROMPT, greedy(2)))
    assert caught.value.retry_after >= 1
    gate.set()
    assert len(await asyncio.gather(*(read(handle) for handle in running))) == 3
    await service.close()


async def test_a_failed_step_reaches_every_waiting_request_and_the_next_one_works(tmp_path: Path) -> None:
    num_left = 1

    def fail_once(batch: StepBatch, logits_RV: torch.Tensor) -> None:
        nonlocal num_left
        if num_left:
            num_left -= 1
            raise MemoryError("out of memory, as a device would say")

    service = EngineService(partial(engine_with, tmp_path, fail_once), max_queued_requests=8)
    await service.start()
    handles = [service.submit(request(PROMPT, greedy(5))) for _ in range(3)]
    results = await asyncio.gather(*(read(handle) for handle in handles), return_exceptions=True)
    assert any(isinstance(result, EngineError) and "out of memory" in str(result) for result in results)
    assert all(isinstance(result, EngineError) or result[-1].end == "length" for result in results)
    assert (await read(service.submit(request(PROMPT, greedy(5)))))[-1].end == "length"
    assert num_leaked_blocks(await settled(service)) == 0
    await service.close()


async def test_an_engine_that_keeps_failing_stops_and_says_so(tmp_path: Path) -> None:
    def fail(batch: StepBatch, logits_RV: torch.Tensor) -> None:
        raise RuntimeError("the device is gone")

    service = EngineService(partial(engine_with, tmp_path, fail), max_queued_requests=8)
    await service.start()
    for _ in range(MAX_CONSECUTIVE_FAILURES):
        with pytest.raises(EngineError, match="the device is gone"):
            await read(service.submit(request(PROMPT, greedy(5))))
    while service.state != "failed":
        await asyncio.sleep(0.005)
    with pytest.raises(EngineError, match="the engine failed and has stopped"):
        service.submit(request(PROMPT, greedy(5)))
    await service.close()


async def test_nan_logits_end_their_own_sequence_only(tmp_path: Path) -> None:
    def spoil_the_second_row(batch: StepBatch, logits_RV: torch.Tensor) -> None:
        if len(logits_RV) == 2:
            logits_RV[1] = torch.nan

    service = EngineService(partial(engine_with, tmp_path, spoil_the_second_row), max_queued_requests=8)
    await service.start()
    first = asyncio.create_task(read(service.submit(request(PROMPT, greedy(100)))))
    await asyncio.sleep(0.05)
    with pytest.raises(EngineError, match="NaN"):
        await read(service.submit(request([7, 8, 9], greedy(100))))
    assert (await first)[-1].end == "length"
    assert num_leaked_blocks(await settled(service)) == 0
    await service.close()


def test_nan_in_the_cache_does_not_reach_the_blocks_next_owners(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path, compiled=False, num_blocks=20)
    healthy, attention = engine.executor, engine.executor._attention

    def poison(batch: StepBatch, logits_RV: torch.Tensor) -> None:
        logits_RV[:] = torch.nan
        attention.storage.numbers_2LNKD[:, :, batch.slots_T] = torch.nan

    def two_answers(first_id: int) -> list[str]:
        """Of two lengths, so that they are computed together with padding."""
        driver = Driver(engine)
        driver.add(first_id, request(PROMPT, greedy(4)))
        driver.add(first_id + 1, request(PROMPT * 5, greedy(4)))
        driver.run()
        return list(driver.texts.values())

    expected = two_answers(0)
    engine.executor = FaultyExecutor(healthy, poison)
    failing = Driver(engine)
    failing.add(2, request(list(range(100, 400)), greedy(4)))  # 19 of the 20 blocks
    failing.run()
    assert isinstance(failing.ended[2, 0].error, EngineError)
    engine.executor = healthy
    for first_id in range(3, 25, 2):  # every block is taken again
        assert two_answers(first_id) == expected


async def test_closing_ends_every_request_with_an_error(service: EngineService) -> None:
    handles = [service.submit(request(PROMPT, greedy(300))) for _ in range(3)]
    readers = [asyncio.create_task(read(handle)) for handle in handles]
    await asyncio.sleep(0.05)
    await service.close()
    for reader in readers:
        with pytest.raises(ProviderUnavailable, match="stopped"):
            await reader
    with pytest.raises(ProviderUnavailable, match="stopped"):
        service.submit(request(PROMPT, greedy(3)))


async def test_a_reader_that_comes_back_after_the_end_is_told_too(service: EngineService) -> None:
    with service.submit(request(PROMPT, greedy(300))) as handle:
        await handle.next_outputs()
        await service.close()
        with pytest.raises(ProviderUnavailable, match="stopped"):
            while handle.is_open:
                await handle.next_outputs()
            pytest.fail("the stream was cut short, and looked complete")


async def test_an_engine_that_cannot_be_built_raises_the_reason(tmp_path: Path) -> None:
    def build() -> Engine:
        raise ModelLoadError("model.safetensors: truncated")

    service = EngineService(build, max_queued_requests=8)
    with pytest.raises(ModelLoadError, match="truncated"):
        await service.start()
    with pytest.raises(ModelLoadError, match="truncated"):
        service.submit(request(PROMPT, greedy(3)))


async def test_a_closed_service_can_be_started_again(service: EngineService) -> None:
    await service.close()
    await service.start()
    assert (await read(service.submit(request(PROMPT, greedy(3)))))[-1].num_tokens == 3


async def test_no_thread_outlives_its_service(tmp_path: Path) -> None:
    before = threading.active_count()
    for _ in range(3):
        service = EngineService(partial(engine_with, tmp_path), max_queued_requests=8)
        await service.start()
        await read(service.submit(request(PROMPT, greedy(3))))
        await service.close()
    gc.collect()
    # asyncio keeps its own pool for to_thread
    assert [t for t in threading.enumerate() if t.name == "autobot-engine"] == []
    assert threading.active_count() - before <= 3


def test_an_event_loop_that_dies_takes_nobody_with_it(tmp_path: Path) -> None:
    service = EngineService(partial(engine_with, tmp_path), max_queued_requests=8)

    async def start_and_leave() -> None:
        await service.start()
        service.submit(request(PROMPT, greedy(300)))

    asyncio.run(start_and_leave())

    async def use() -> None:
        assert (await read(service.submit(request(PROMPT, greedy(5)))))[-1].end == "length"
        await service.close()

    asyncio.run(use())
