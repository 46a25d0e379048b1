"""Workers and hosts keep within a provider's limits together, through a real Redis, and go on without it."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from limited_upstream import LimitedProvider, Worker
from raw_server import raw_server
from redis.asyncio import Redis
from universal.real_redis import RealRedis, needs_redis, real_redis

from autobot_llm import LLMInterface
from autobot_llm.cloud.guarded_redis import PATIENCE, GuardedRedis
from autobot_llm.cloud.limit_script import SCRIPT
from autobot_llm.cloud.rate_limits import OwnLimits
from autobot_llm.cloud.shared_limits import SharedRateLimiter
from autobot_llm.dialects.rate_limits import RateLimit, RateLimits
from autobot_llm.errors import OverloadedError
from autobot_llm.settings import Settings

pytestmark = needs_redis
HELLO = [{"role": "user", "content": "hello"}]


def told(remaining: int, limit: int, per_second: float) -> RateLimits:
    missing = limit - remaining
    reset = missing / per_second if missing else None
    return RateLimits(requests=RateLimit(limit=limit, remaining=remaining, reset_seconds=reset), tokens=None)


@asynccontextmanager
async def guarded(redis: RealRedis, patience: float = 0.5) -> AsyncIterator[GuardedRedis]:
    one = GuardedRedis(redis.url, SCRIPT, without="each has its share", patience=patience)
    await one.start()
    try:
        yield one
    finally:
        await one.close()


def limiter(redis: GuardedRedis, worker: str, *, max_queued: int = 100, **own: int) -> SharedRateLimiter:
    limits = OwnLimits(**own) if own else None
    return SharedRateLimiter("p", max_queued=max_queued, own=limits, redis=redis, key="p:m", worker=worker)


async def told_to_all(one: SharedRateLimiter, limits: RateLimits) -> None:
    one.observe(limits)
    await one.close()


def settings(url: str, redis: RealRedis | None, **more: Any) -> dict[str, Any]:
    given = {
        "provider": "openai", "openai_endpoint": f"{url}/v1", "openai_api_key": "sk-key", "default_model": "m",
        "cache_enabled": False, "timeout": 30.0,
    }  # fmt: skip
    return given | ({"redis_url": redis.url} if redis is not None else {}) | more


async def asked_by_two(is_shared: bool) -> tuple[LimitedProvider, int, bool]:
    """What two processes asked of a provider, how many answers they got, and whether the Redis was ever late."""
    provider = LimitedProvider(limit=20, per_second=25, leeway=1.0)
    async with real_redis() as redis, raw_server(provider.play) as server:
        async with LLMInterface(Settings(**settings(server.url, redis))) as llm:
            await llm.chat_completion(HELLO)  # from here on the limits are known to whoever looks
        given = settings(server.url, redis if is_shared else None)
        workers = [Worker(settings=given, num_requests=40, at_once=16, request={}) for _ in range(2)]
        try:
            results = [await worker.result() for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
    was_late = any(result["figures"]["openai"].get("num_shared_limit_failures") for result in results)
    return provider, sum(result["ended"].get("answered", 0) for result in results), was_late


async def test_two_processes_never_ask_for_more_than_the_limit_together() -> None:
    for _ in range(3):
        provider, num_answered, was_late = await asked_by_two(is_shared=True)
        if not was_late:
            break
    else:
        pytest.skip("this machine is too busy: the Redis was late, so each worker had its share for a while")
    assert num_answered == 80
    assert provider.num_refused == 0


async def test_without_a_redis_they_do() -> None:
    provider, _, _ = await asked_by_two(is_shared=False)
    assert provider.num_refused > 0


async def test_what_one_worker_learned_or_took_counts_for_the_others() -> None:
    async with real_redis() as redis, guarded(redis) as one, guarded(redis) as other:
        first, second = limiter(one, "1"), limiter(other, "2")
        await told_to_all(first, told(4, 10, per_second=0.1))
        for _ in range(2):
            assert await first.acquire("", 0, longest=0.0) == 0.0
            assert await second.acquire("", 0, longest=0.0) == 0.0
        for late in (first, second):
            with pytest.raises(OverloadedError) as raised:
                await late.acquire("", 0, longest=1.0)
            assert raised.value.code == "rate_limit_wait"


async def test_tokens_count_too_and_what_was_not_used_comes_back_for_all() -> None:
    async with real_redis() as redis, guarded(redis) as one, guarded(redis) as other:
        first, second = limiter(one, "1", tokens=6000), limiter(other, "2", tokens=6000)
        await first.acquire("", 5900, longest=0.0)
        with pytest.raises(OverloadedError):
            await second.acquire("", 3000, longest=1.0)
        first.correct(5000)
        await first.close()
        assert await second.acquire("", 3000, longest=1.0) == 0.0


async def test_places_go_in_the_order_of_asking_over_all_workers_and_no_worker_starves() -> None:
    async with real_redis() as redis, guarded(redis) as one, guarded(redis) as other:
        limiters = [limiter(one, "1"), limiter(other, "2")]
        await told_to_all(limiters[0], told(0, 20, per_second=50))
        served: list[int] = []

        async def ask(number: int) -> None:
            await limiters[number].acquire("", 0, longest=None)
            served.append(number)

        await asyncio.gather(*(ask(number % 2) for number in range(30)))
    assert abs(served[:15].count(0) - served[:15].count(1)) <= 3


async def test_a_caller_that_leaves_gives_its_reserved_place_to_the_next_one() -> None:
    async with real_redis() as redis, guarded(redis) as one:
        limits = limiter(one, "1")
        await told_to_all(limits, told(0, 10, per_second=2))
        first, second = (asyncio.create_task(limits.acquire("", 0, longest=None)) for _ in range(2))
        await asyncio.sleep(0.1)
        began = time.monotonic()
        first.cancel()
        assert await second > 0
        assert time.monotonic() - began < 0.8, "it did not wait for the place of the one who left, too"
        await asyncio.gather(first, return_exceptions=True)
        assert limits.num_queued == 0


async def test_a_place_granted_to_one_who_has_left_goes_back_to_everybody() -> None:
    async with real_redis() as redis, guarded(redis) as one, guarded(redis) as other:
        limits = limiter(one, "1")
        await told_to_all(limits, told(1, 10, per_second=0.001))
        task = asyncio.create_task(limits.acquire("", 0, longest=None))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.3)
        assert await limiter(other, "2").acquire("", 0, longest=0.0) == 0.0


async def test_no_more_than_may_wait_do() -> None:
    async with real_redis() as redis, guarded(redis) as one:
        limits = limiter(one, "1", max_queued=3)
        await told_to_all(limits, told(2, 10, per_second=0.01))
        waiting = [asyncio.create_task(limits.acquire("", 0, longest=None)) for _ in range(9)]
        await asyncio.sleep(0.2)
        ended = [task for task in waiting if task.done()]
        assert sum(task.exception() is None for task in ended) == 2
        codes = [error.code for task in ended if isinstance(error := task.exception(), OverloadedError)]
        assert codes == ["queue_full"] * 4
        assert limits.num_queued == 3
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await limits.close()


async def test_a_pause_that_the_provider_asks_one_worker_for_holds_for_the_others() -> None:
    async with real_redis() as redis, guarded(redis) as one, guarded(redis) as other:
        first, second = limiter(one, "1"), limiter(other, "2")
        first.pause(0.4)
        await first.close()
        assert 0.2 < await second.acquire("", 0, longest=5.0) < 3.0


async def seconds_of(one: SharedRateLimiter) -> float:
    began = time.monotonic()
    await one.acquire("", 0, longest=None)
    return time.monotonic() - began


@pytest.mark.parametrize("way", ["kill", "stop"])
async def test_a_redis_that_dies_or_hangs_costs_a_few_milliseconds_and_leaves_each_worker_its_share(
    way: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with real_redis() as redis, guarded(redis, PATIENCE) as one, guarded(redis) as other:
        limiters = [limiter(one, "1"), limiter(other, "2")]
        await told_to_all(limiters[0], told(999, 1000, per_second=0.001))
        for each in (*limiters, *limiters):
            await seconds_of(each)
        if way == "kill":
            redis.kill()
        else:
            redis.send(signal.SIGSTOP)
        with caplog.at_level(logging.WARNING, logger="autobot_llm.cloud"):
            took = sorted([await seconds_of(limiters[0]) for _ in range(300)])
            assert took[150] < 0.001, "most do not notice"
            assert sum(took) < 1.0
            await asyncio.sleep(2.5)
            for _ in range(3):
                await seconds_of(limiters[0])
        assert len([one for one in caplog.records if "cannot be used" in one.message]) == 1
        num_more = 0
        with pytest.raises(OverloadedError):
            while num_more < 1000:
                await limiters[0].acquire("", 0, longest=1.0)
                num_more += 1
        assert 150 < num_more <= 200, "half of what was left was its share"
        if way == "stop":
            redis.send(signal.SIGCONT)
        else:
            await redis.start()
        async with asyncio.timeout(15):
            while not one.is_usable:
                await asyncio.sleep(0.05)
        other_again = limiter(other, "2")
        async with asyncio.timeout(15):
            while not other.is_usable:
                await asyncio.sleep(0.05)
        await limiters[0].close()  # tells what was taken meanwhile
        left = 0
        with pytest.raises(OverloadedError):
            while left < 1000:
                await other_again.acquire("", 0, longest=1.0)
                left += 1
        assert left <= 500, "what the other one took meanwhile counts"


async def test_a_key_of_another_type_nonsense_in_it_or_an_emptied_redis_is_mended_with_what_is_known() -> None:
    async with real_redis() as redis, guarded(redis) as one, Redis.from_url(redis.url) as client:
        limits = limiter(one, "1")
        await told_to_all(limits, told(4, 10, per_second=0.001))
        key = "autobot:limit:{p:m}"
        assert await limits.acquire("", 0, longest=0.0) == 0.0
        await client.set(key, "a string")
        await client.set(f"{key}:workers", "another")
        assert await limits.acquire("", 0, longest=0.0) == 0.0
        await client.hset(key, mapping={"rc": "nan", "rr": "x", "rl": "inf", "at": "-", "pause": "nan"})
        assert await limits.acquire("", 0, longest=0.0) == 0.0
        await client.flushall()
        await client.script_flush()
        assert await limits.acquire("", 0, longest=0.0) == 0.0
        with pytest.raises(OverloadedError):
            await limits.acquire("", 0, longest=1.0)
        assert one.is_usable
        assert 0 < await client.pttl(key) <= 86_400_000


async def test_a_redis_that_takes_no_writes_is_left_alone_until_it_does() -> None:
    async with real_redis() as redis, guarded(redis) as one, Redis.from_url(redis.url) as client:
        limits = limiter(one, "1", requests=600)
        await limits.acquire("", 0, longest=0.0)
        await client.replicaof("127.0.0.1", 1)  # READONLY from here on
        for _ in range(5):
            assert await limits.acquire("", 0, longest=1.0) < 1.0
        assert not one.is_usable
        await client.replicaof("NO", "ONE")
        async with asyncio.timeout(15):
            while not one.is_usable:
                await asyncio.sleep(0.05)
                await limits.acquire("", 0, longest=1.0)
        assert await client.exists("autobot:limit:{p:m}")


async def test_the_clocks_of_the_workers_do_not_matter() -> None:
    """Each event loop's clock has a zero of its own; the Redis is told no time at all."""
    async with real_redis() as redis, guarded(redis) as one, Redis.from_url(redis.url) as client:
        limits = limiter(one, "1", requests=60)
        for _ in range(60):
            await limits.acquire("", 0, longest=0.0)
        seconds, _ = await client.time()
        at = float(await client.hget("autobot:limit:{p:m}", "at"))
        assert abs(at - seconds) < 5
        await client.hset("autobot:limit:{p:m}", "at", str(seconds + 3600))  # the Redis's own clock was put back
        with pytest.raises(OverloadedError) as raised:
            await limits.acquire("", 0, longest=0.0)
        assert raised.value.retry_after is not None and raised.value.retry_after <= 2.0


async def test_a_redis_that_is_not_there_at_the_start_does_not_hold_it_up() -> None:
    began = time.monotonic()
    async with LLMInterface(Settings(**settings("http://127.0.0.1:9", None, redis_url="unix:///nowhere"))):
        pass
    assert time.monotonic() - began < 3.0


async def test_limits_of_our_own_hold_for_a_provider_that_tells_none() -> None:
    provider = LimitedProvider(limit=1000, per_second=1000, tells=False)
    async with real_redis() as redis, raw_server(provider.play) as server:
        given = Settings(**settings(server.url, redis, cloud_rate_limits=("openai/m 5rpm",), timeout=1.0))
        async with LLMInterface(given) as llm, LLMInterface(given) as other:
            asked = [one.chat_completion(HELLO) for one in (llm, other) for _ in range(5)]
            ended = await asyncio.gather(*asked, return_exceptions=True)
            figures = [one.get_metrics()["openai"] for one in (llm, other)]
    if any(one["num_shared_limit_failures"] for one in figures):
        pytest.skip("this machine is too busy: the Redis answered late, so each worker had its share for a while")
    assert all(one["shared_limits_up"] == 1.0 for one in figures)
    assert provider.num_answered == 5
    assert sum(isinstance(one, OverloadedError) for one in ended) == 5
