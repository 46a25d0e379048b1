"""Calls keep within the limits that the provider tells, in a queue that is bounded and fair."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobot_llm.cloud.rate_limits import FairQueue, RateLimiter, TokenBucket, Waiter
from autobot_llm.dialects.rate_limits import RateLimit, RateLimits
from autobot_llm.errors import OverloadedError


def told(remaining: int, limit: int | None = None, reset: float | None = None) -> RateLimit:
    return RateLimit(limit=limit, remaining=remaining, reset_seconds=reset)


def test_the_pace_is_what_brings_the_missing_part_back_in_the_time_told() -> None:
    bucket = TokenBucket()
    bucket.observe(told(10, limit=60, reset=100.0), now=0.0)
    assert bucket.level(0.0) == 10
    assert bucket.level(2.0) == pytest.approx(11)
    assert bucket.seconds_until(20, now=2.0) == pytest.approx(18)
    assert bucket.level(1000.0) == 60, "it holds no more than the limit"


def test_without_a_time_the_limit_is_one_per_minute() -> None:
    bucket = TokenBucket()
    bucket.observe(told(0, limit=120), now=0.0)
    assert bucket.seconds_until(1, now=0.0) == pytest.approx(0.5)


def test_more_than_the_whole_limit_passes_when_it_is_whole() -> None:
    bucket = TokenBucket()
    bucket.observe(told(0, limit=60), now=0.0)
    assert bucket.seconds_until(1_000_000, now=0.0) == pytest.approx(60)
    bucket.take(1_000_000, now=60.0)
    assert bucket.level(60.0) == pytest.approx(0)


def test_the_smaller_of_the_providers_count_and_ours_holds() -> None:
    bucket = TokenBucket()
    bucket.observe(told(50, limit=60), now=0.0)
    for _ in range(30):
        bucket.take(1, now=0.0)
    bucket.observe(told(45, limit=60), now=0.0)
    assert bucket.level(0.0) == 20, "the provider had not counted the latest calls yet"
    bucket.observe(told(3, limit=60), now=0.0)
    assert bucket.level(0.0) == 3, "somebody else uses the key too"


@given(
    st.integers(1, 500),
    st.floats(0.01, 600),
    st.lists(st.tuples(st.floats(0, 5), st.floats(0.1, 40)), min_size=1, max_size=60),
)
def test_no_more_is_taken_in_any_time_than_the_limit_and_its_pace_allow(
    limit: int, reset: float, calls: list[tuple[float, float]]
) -> None:
    bucket = TokenBucket()
    bucket.observe(told(0, limit=limit, reset=reset), now=0.0)
    rate = limit / reset
    now = 0.0
    taken: list[tuple[float, float]] = []
    for pause, amount in calls:
        now += pause
        wait = bucket.seconds_until(amount, now)
        assert wait >= 0
        now += wait
        bucket.take(amount, now)
        taken.append((now, min(amount, limit)))
    for start, _ in taken:
        within = [(at, amount) for at, amount in taken if at >= start]
        for end, _ in within:
            total = sum(amount for at, amount in within if at <= end)
            assert total <= limit + rate * (end - start) + 1e-6 * limit * len(taken)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=60))
def test_tenants_take_turns_and_each_is_served_in_its_own_order(tenants: list[str]) -> None:
    loop = asyncio.new_event_loop()
    queue = FairQueue()
    owner: dict[int, tuple[str, int]] = {}
    for number, tenant in enumerate(tenants):
        waiter = Waiter(float(number), loop.create_future())
        owner[id(waiter)] = (tenant, number)
        queue.add(tenant, waiter)
    assert len(queue) == len(tenants)
    assert queue.num_tokens() == sum(range(len(tenants)))
    served = []
    while queue:
        first = queue.peek()
        assert queue.pop() is first
        served.append(owner[id(first)])
    loop.close()
    for tenant in "abc":
        own = [number for one, number in served if one == tenant]
        assert own == sorted(own)
    num_served = dict.fromkeys(tenants, 0)
    for tenant, _ in served:
        num_served[tenant] += 1
        waiting = [num for one, num in num_served.items() if num < tenants.count(one)]
        assert not waiting or max(waiting) - min(waiting) <= 1, "who waits has been served as often as the others"


async def test_nobody_waits_before_a_limit_is_known() -> None:
    limiter = RateLimiter("p", max_queued=0)
    assert [await limiter.acquire("", 1e9, longest=0.0) for _ in range(100)] == [0.0] * 100


def limited(remaining: int, *, per_second: float, max_queued: int = 100) -> RateLimiter:
    limiter = RateLimiter("p", max_queued=max_queued)
    limit = 1000
    limiter.observe(
        RateLimits(requests=told(remaining, limit=limit, reset=(limit - remaining) / per_second), tokens=None)
    )
    return limiter


async def test_calls_wait_for_their_place_in_the_order_they_came() -> None:
    limiter = limited(3, per_second=100)
    order: list[int] = []

    async def one(number: int) -> float:
        waited = await limiter.acquire("", 0, longest=None)
        order.append(number)
        return waited

    waits = await asyncio.gather(*map(one, range(8)))
    assert order == list(range(8))
    assert waits[:3] == [0, 0, 0]
    assert waits == sorted(waits)
    assert 0.03 < waits[-1] < 5.0
    assert limiter.num_waits == 5


async def test_one_more_than_may_wait_is_refused_and_told_when_to_come_back() -> None:
    limiter = limited(0, per_second=0.01, max_queued=2)
    waiting = [asyncio.create_task(limiter.acquire("", 0, longest=None)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError) as raised:
        await limiter.acquire("", 0, longest=None)
    assert raised.value.code == "queue_full"
    assert raised.value.retry_after == pytest.approx(300, rel=0.1)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert limiter.num_queued == 0


async def test_a_wait_longer_than_the_timeout_is_refused_at_once() -> None:
    limiter = limited(0, per_second=1)
    with pytest.raises(OverloadedError) as raised:
        await limiter.acquire("", 0, longest=0.5)
    assert raised.value.code == "rate_limit_wait"
    assert limiter.num_queued == 0


async def test_a_cancelled_wait_leaves_nothing_behind_and_the_next_one_moves_up() -> None:
    limiter = limited(0, per_second=50)
    first, second, third = (asyncio.create_task(limiter.acquire("", 0, longest=None)) for _ in range(3))
    await asyncio.sleep(0)
    first.cancel()
    second.cancel()
    assert await third < 5.0
    assert first.cancelled() or (await asyncio.gather(first, return_exceptions=True))
    assert limiter.num_queued == 0


async def test_a_place_that_comes_together_with_the_cancellation_is_given_back() -> None:
    limiter = limited(1, per_second=0.001)
    limiter.pause(0.01)
    task = asyncio.create_task(limiter.acquire("", 0, longest=None))
    await asyncio.sleep(0)
    while limiter.num_queued:
        await asyncio.sleep(0)
    assert not task.done(), "it has its place and does not know it yet"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await limiter.acquire("", 0, longest=0.0) == 0.0


async def test_a_pause_that_the_provider_asks_for_holds_for_everybody() -> None:
    limiter = RateLimiter("p", max_queued=10)
    limiter.pause(0.05)
    waits = await asyncio.gather(*(limiter.acquire("", 0, longest=1.0) for _ in range(3)))
    assert all(0.045 < wait < 5.0 for wait in waits)


async def test_a_pause_too_long_to_wait_for_is_refused_at_once_without_a_timeout_too() -> None:
    limiter = RateLimiter("p", max_queued=10)
    limiter.pause(3600)
    with pytest.raises(OverloadedError, match="too long to wait") as raised:
        await limiter.acquire("", 0, longest=None)
    assert raised.value.retry_after == pytest.approx(3600, abs=1)


async def test_tokens_count_too_and_an_estimate_is_corrected() -> None:
    limiter = RateLimiter("p", max_queued=10)
    limiter.observe(RateLimits(requests=None, tokens=told(1000, limit=6000, reset=3000.0)))
    assert limiter.counts_tokens
    assert await limiter.acquire("", 900, longest=0.0) == 0.0
    with pytest.raises(OverloadedError):
        await limiter.acquire("", 900, longest=1.0)
    limiter.correct(850)  # it took 50 of them
    assert await limiter.acquire("", 900, longest=0.0) == 0.0
