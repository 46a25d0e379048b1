"""Requests share a call exactly as the window and the size say, and each gets its own answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autobot_llm.cloud.request_batching import CloudRequestBatcher
from autobot_llm.errors import ProviderError, ProviderUnavailable


class Service:
    """Answers n with 10 n, and negative numbers with an error of their own."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.times: list[float] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.num_cancelled = 0

    async def __call__(self, requests: Sequence[int]) -> list[int | Exception]:
        self.calls.append(list(requests))
        self.times.append(asyncio.get_running_loop().time())
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        return [ValueError(str(one)) if one < 0 else 10 * one for one in requests]


def batcher(service: Service, window_ms: float = 20, size: int = 3) -> CloudRequestBatcher[int, int]:
    return CloudRequestBatcher(window_ms, size, send=service)


async def test_the_defaults_are_fifty_milliseconds_and_ten_requests() -> None:
    service = Service()
    one = CloudRequestBatcher[int, int](send=service)
    began = asyncio.get_running_loop().time()
    assert await asyncio.gather(*map(one.add_request, range(11))) == [10 * number for number in range(11)]
    assert [len(call) for call in service.calls] == [10, 1]
    assert 0.045 <= service.times[1] - began < 2.0


async def test_a_full_batch_does_not_wait_for_its_window() -> None:
    one = batcher(Service(), window_ms=600_000, size=3)
    async with asyncio.timeout(5):
        assert await asyncio.gather(*map(one.add_request, range(6))) == [0, 10, 20, 30, 40, 50]


@given(st.integers(1, 7), st.integers(0, 40))
@settings(max_examples=25, deadline=None)
def test_no_call_has_more_than_the_largest_size_and_all_but_the_last_are_full(size: int, num: int) -> None:
    async def check() -> None:
        service = Service()
        one = batcher(service, window_ms=1, size=size)
        assert await asyncio.gather(*map(one.add_request, range(num))) == [10 * number for number in range(num)]
        assert [len(call) for call in service.calls[:-1]] == [size] * max(0, -(-num // size) - 1)
        assert sum(map(len, service.calls)) == num == one.num_requests
        assert len(service.calls) == one.num_batches

    asyncio.run(check())


async def test_the_window_begins_with_the_first_request_and_later_ones_do_not_prolong_it() -> None:
    service = Service()
    one = batcher(service, window_ms=60, size=100)
    loop = asyncio.get_running_loop()
    began = loop.time()
    tasks = [asyncio.create_task(one.add_request(1))]
    while not service.calls:
        tasks.append(asyncio.create_task(one.add_request(2)))
        await asyncio.sleep(0.01)
    assert 0.055 <= service.times[0] - began < 2.0
    await asyncio.gather(*tasks)
    await one.close()


async def test_an_error_of_one_request_is_its_own_and_an_error_of_the_call_everybodys() -> None:
    one = batcher(Service())
    ended = await asyncio.gather(*map(one.add_request, (1, -2, 3)), return_exceptions=True)
    assert [ended[0], str(ended[1]), ended[2]] == [10, "-2", 30]

    async def fail(requests: Sequence[int]) -> list[int | Exception]:
        raise ProviderError("down")

    failing: CloudRequestBatcher[int, int] = CloudRequestBatcher(1, 3, send=fail)
    ended = await asyncio.gather(*map(failing.add_request, (1, 2, 3)), return_exceptions=True)
    assert [type(error) for error in ended] == [ProviderError] * 3


async def test_a_call_that_answers_too_few_is_an_error_and_never_somebody_elses_answer() -> None:
    async def forgetful(requests: Sequence[int]) -> list[int | Exception]:
        return [1]

    one: CloudRequestBatcher[int, int] = CloudRequestBatcher(1, 2, send=forgetful)
    ended = await asyncio.gather(*map(one.add_request, (1, 2)), return_exceptions=True)
    assert all(isinstance(error, ProviderError) for error in ended)


async def test_who_leaves_before_the_call_is_not_part_of_it() -> None:
    service = Service()
    one = batcher(service, size=3)
    first, second = (asyncio.create_task(one.add_request(number)) for number in (1, 2))
    await asyncio.sleep(0)
    first.cancel()
    assert await second == 20
    assert service.calls == [[2]]
    lonely = asyncio.create_task(one.add_request(5))
    await asyncio.sleep(0)
    lonely.cancel()
    await asyncio.gather(lonely, return_exceptions=True)
    assert await one.add_request(6) == 60
    assert service.calls == [[2], [6]]


async def test_a_call_goes_on_for_those_who_stay_and_is_given_up_with_the_last() -> None:
    service = Service()
    service.may_answer.clear()
    one = batcher(service, size=2)
    first, second = (asyncio.create_task(one.add_request(number)) for number in (1, 2))
    while not service.calls:
        await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    service.may_answer.set()
    assert await second == 20
    service.may_answer.clear()
    tasks = [asyncio.create_task(one.add_request(number)) for number in (3, 4)]
    while len(service.calls) < 2:
        await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    while not service.num_cancelled:
        await asyncio.sleep(0)
    assert service.num_cancelled == 1


async def test_closing_ends_what_waits_and_what_is_under_way() -> None:
    service = Service()
    service.may_answer.clear()
    one = batcher(service, window_ms=10_000, size=2)
    tasks = [asyncio.create_task(one.add_request(number)) for number in (1, 2, 3)]
    while not service.calls:
        await asyncio.sleep(0)
    await one.close()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(error) for error in ended] == [ProviderUnavailable] * 3
    with pytest.raises(ProviderUnavailable):
        await one.add_request(4)


@pytest.mark.parametrize(("window", "size"), [(-1, 10), (50, 0)])
def test_bounds_that_make_no_sense_are_refused(window: float, size: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        CloudRequestBatcher[int, int](window, size, send=Service())
