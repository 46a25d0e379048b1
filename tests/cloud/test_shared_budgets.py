"""Workers and hosts keep within one budget together, through a real Redis, and reconcile after it was away."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from limited_upstream import LimitedProvider, Worker
from raw_server import raw_server
from redis.asyncio import Redis
from universal.real_redis import RealRedis, needs_redis, real_redis

from autobot_llm.cloud.budgets import Budgets
from autobot_llm.cloud.guarded_redis import GuardedRedis
from autobot_llm.cloud.ledger import FILE_NAME, Ledger, read_spending
from autobot_llm.cloud.shared_spending import FileSpending, RedisSpending, SharedSpending
from autobot_llm.cloud.spending_script import SCRIPT
from autobot_llm.errors import BudgetExceededError
from autobot_llm.types import Usage

pytestmark = needs_redis
USAGE = Usage(prompt_tokens=1, completion_tokens=1)


@asynccontextmanager
async def budgets(redis: RealRedis | None, path: Path, per_day: float) -> AsyncIterator[tuple[Budgets, Ledger]]:
    ledger = Ledger(path / FILE_NAME)
    shared: SharedSpending = FileSpending(path / FILE_NAME)
    if redis is not None:
        shared = RedisSpending(GuardedRedis(redis.url, SCRIPT, without="each host by itself", patience=0.5))
    one = Budgets(ledger, per_day, None, shared)
    await ledger.start()
    await one.start()
    try:
        yield one, ledger
    finally:
        await ledger.close()
        await one.close()


async def spend(one: Budgets, ledger: Ledger, dollars: float, *, estimate: float | None = None) -> None:
    estimate = dollars if estimate is None else estimate
    await one.reserve(estimate)
    ledger.add("p", "m", "t", USAGE, spent=dollars, saved=0.0)
    one.release(estimate)


@pytest.mark.parametrize("is_shared", [True, False])
async def test_two_hosts_cannot_spend_the_budget_twice(is_shared: bool, tmp_path: Path) -> None:
    """Each has a file of its own, as on two machines."""
    provider = LimitedProvider(limit=10_000, per_second=10_000, tells=False)
    async with asyncio.timeout(50), real_redis() as redis, raw_server(provider.play) as server:
        settings = {
            "provider": "openai", "openai_endpoint": f"{server.url}/v1", "openai_api_key": "sk-key",
            "default_model": "gpt-4o", "cache_enabled": False, "cloud_budget_per_day": 0.004,
        } | ({"redis_url": redis.url} if is_shared else {})  # fmt: skip
        request = {"model": "gpt-4o", "max_tokens": 50}
        workers = [
            Worker(settings=settings | {"cache_dir": str(tmp_path / name)}, num_requests=80, at_once=2, request=request)
            for name in "ab"
        ]
        results = [await worker.result() for worker in workers]
    if is_shared and any(result["figures"]["openai"]["num_shared_budget_failures"] for result in results):
        pytest.skip("this machine is too busy: the Redis answered late")
    spent = sum(line.dollars_spent for name in "ab" for line in read_spending(tmp_path / name / FILE_NAME, "2000"))
    assert sum(result["ended"].get("answered", 0) for result in results) == provider.num_answered > 20
    assert all(result["ended"].get("budget_exceeded") for result in results)
    if is_shared:
        assert spent <= 0.004
    else:
        assert spent > 0.004, "the test could not fail"


async def test_what_is_set_aside_counts_for_all_until_it_is_settled(tmp_path: Path) -> None:
    async with (
        real_redis() as redis,
        budgets(redis, tmp_path / "a", 1.0) as (one, _),
        budgets(redis, tmp_path / "b", 1.0) as (other, _),
    ):
        await one.reserve(0.7)
        with pytest.raises(BudgetExceededError, match="0.7000 are set aside"):
            await other.reserve(0.4)
        await other.reserve(0.3)
        one.release(0.7)
        async with asyncio.timeout(5):
            while True:
                try:
                    await other.reserve(0.4)
                    break
                except BudgetExceededError:
                    await asyncio.sleep(0.05)


async def test_two_processes_of_one_host_share_a_budget_without_a_redis(tmp_path: Path) -> None:
    async with budgets(None, tmp_path, 1.0) as (one, first), budgets(None, tmp_path, 1.0) as (other, _):
        await one.reserve(0.7)
        with pytest.raises(BudgetExceededError):
            await other.reserve(0.4)
        first.add("p", "m", "t", USAGE, spent=0.2, saved=0.0)
        one.release(0.7)
        async with asyncio.timeout(5):
            while True:
                with contextlib.suppress(BudgetExceededError):
                    await other.reserve(0.75)
                    break
                await asyncio.sleep(0.05)
        with pytest.raises(BudgetExceededError):
            await one.reserve(0.1)
        asked = [each.reserve(0.01) for _ in range(20) for each in (one, other)]
        ended = await asyncio.gather(*asked, return_exceptions=True)
    assert 4 <= ended.count(None) <= 5
    assert all(error is None or isinstance(error, BudgetExceededError) for error in ended)


async def test_a_file_that_somebody_else_has_locked_holds_nobody_up(tmp_path: Path) -> None:
    async with budgets(None, tmp_path, 1.0) as (one, ledger):
        await spend(one, ledger, 0.1)
        await asyncio.sleep(1.0)
        with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as file:
            file.execute("BEGIN IMMEDIATE")
            began = time.monotonic()
            await one.reserve(0.1)
            assert time.monotonic() - began < 1.0
            with pytest.raises(BudgetExceededError):
                await one.reserve(0.9)


async def test_many_at_once_get_no_more_than_there_is(tmp_path: Path) -> None:
    async with (
        real_redis() as redis,
        budgets(redis, tmp_path / "a", 1.0) as (one, _),
        budgets(redis, tmp_path / "b", 1.0) as (other, _),
    ):
        asked = [each.reserve(0.1) for _ in range(30) for each in (one, other)]
        ended = await asyncio.gather(*asked, return_exceptions=True)
    assert ended.count(None) == 10 or ended.count(None) == 9, "sums of tenths are not exact"
    assert all(error is None or isinstance(error, BudgetExceededError) for error in ended)


async def test_what_a_caller_that_leaves_had_asked_for_is_not_kept(tmp_path: Path) -> None:
    async with real_redis() as redis, budgets(redis, tmp_path / "a", 1.0) as (one, _):
        for _ in range(20):
            task = asyncio.create_task(one.reserve(0.9))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await one.reserve(0.9)


async def test_spending_goes_on_without_the_redis_and_is_made_up_for_even_in_an_empty_one(tmp_path: Path) -> None:
    async with (
        real_redis() as redis,
        budgets(redis, tmp_path / "a", 1.0) as (one, first),
        budgets(redis, tmp_path / "b", 1.0) as (other, second),
    ):
        await spend(one, first, 0.2)
        async with asyncio.timeout(10), Redis.from_url(redis.url) as client:
            while not await client.hlen(f"{{autobot:spending}}:{first.today()}"):
                await asyncio.sleep(0.05)
        await spend(other, second, 0.1)
        redis.kill()
        await spend(one, first, 0.3)
        with pytest.raises(BudgetExceededError):
            await other.reserve(0.8), "it had heard of the other host's 0.2"
        with pytest.raises(BudgetExceededError):
            await one.reserve(0.6), "its own 0.5"
        await redis.start()  # and knows nothing
        async with asyncio.timeout(20):
            while True:
                try:
                    await other.reserve(0.45)
                    other.release(0.45)
                except BudgetExceededError:
                    break
                await asyncio.sleep(0.1)
        await other.reserve(0.35)


async def test_what_a_killed_worker_had_set_aside_comes_back(tmp_path: Path) -> None:
    async with (
        real_redis() as redis,
        Redis.from_url(redis.url) as client,
        budgets(redis, tmp_path / "b", 1.0) as (other, _),
    ):
        await client.hset("{autobot:spending}:held", "killed", "0.9")
        seconds, _ = await client.time()
        await client.zadd("{autobot:spending}:seen", {"killed": seconds - 10})
        with pytest.raises(BudgetExceededError):
            await other.reserve(0.5)
        await client.zadd("{autobot:spending}:seen", {"killed": seconds - 100})
        await other.reserve(0.5)
        for key in ("{autobot:spending}:held", "{autobot:spending}:seen"):
            await client.set(key, "of another type")
        await other.reserve(0.4)
        with pytest.raises(BudgetExceededError):
            await other.reserve(0.4)
