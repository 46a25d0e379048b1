"""The stores that processes share, with real parts: what they keep, and what becomes of requests when they fail."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from universal.gated import until
from universal.real_redis import needs_redis, real_redis

from autobot_llm.errors import ProviderUnavailable
from autobot_llm.interface import LLMInterface
from autobot_llm.providers.scripted import ScriptedProvider
from autobot_llm.settings import Settings
from autobot_llm.types import LLMRequest
from autobot_llm.universal.entries import seal, unseal
from autobot_llm.universal.second_level import PATIENCE, SecondLevel
from autobot_llm.universal.stores.base import Kept, SharedStore
from autobot_llm.universal.stores.choice import store_path
from autobot_llm.universal.stores.redis import ANSWERS, RedisStore
from autobot_llm.universal.stores.sqlite import SqliteStore

KEYS = [bytes([number]) * 16 for number in range(5)]
SOON = 1000.0
ADDED = 0.005  # seconds that a store that is out of order may add to a request


@contextlib.asynccontextmanager
async def open_store(kind: str, folder: Path) -> AsyncIterator[SharedStore]:
    async with contextlib.AsyncExitStack() as stack:
        store: SharedStore
        if kind == "sqlite":
            store = SqliteStore(folder / "deep" / "answers.sqlite3")
        else:
            store = RedisStore((await stack.enter_async_context(real_redis())).url)
        try:
            yield store
        finally:
            await store.close()


BOTH = ["sqlite", pytest.param("redis", marks=needs_redis)]


@pytest.mark.parametrize("kind", BOTH)
async def test_a_store_gives_back_what_it_was_given_until_it_expires(kind: str, tmp_path: Path) -> None:
    now = time.time()
    async with open_store(kind, tmp_path) as store:
        await store.ping()
        await store.put_many([Kept(key, now + SOON, key * 1000) for key in KEYS[:3]])
        await store.put_many([Kept(KEYS[0], now + SOON, b"new"), Kept(KEYS[4], now - 1, b"old")])
        assert await store.get_many(KEYS) == {KEYS[0]: b"new", KEYS[1]: KEYS[1] * 1000, KEYS[2]: KEYS[2] * 1000}
        assert await store.get_many(KEYS[:1]) == {KEYS[0]: b"new"}
        assert await store.get_many(KEYS[3:4]) == {}
        stats = await store.stats()
        assert (stats.num_entries, stats.num_bytes) == (3, 32_003)
        some = await store.some(2)
        assert len(some) == 2
        assert all(abs(one.expires - now - SOON) < 1 for one in some)
        assert await store.clear() >= 3
        assert (await store.get_many(KEYS), (await store.stats()).num_entries) == ({}, 0)


async def test_the_file_is_its_owners_alone_and_is_shared_by_processes(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "answers.sqlite3"
    one, other = SqliteStore(path), SqliteStore(path)
    await one.put_many([Kept(KEYS[0], time.time() + SOON, b"x")])
    assert await other.get_many(KEYS) == {KEYS[0]: b"x"}
    assert [stat.S_IMODE(file.stat().st_mode) & 0o077 for file in path.parent.iterdir()] == [0] * 3
    await asyncio.gather(one.close(), other.close())


async def test_the_file_stays_within_its_bound(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "answers.sqlite3", max_bytes=300_000)
    now = time.time()
    for number in range(200):
        await store.put_many([Kept(number.to_bytes(16, "big"), now + SOON + number, os.urandom(5000))])
    stats = await store.stats()
    assert 0 < stats.num_bytes < 300_000 + 65 * 5000
    (newest,) = await store.some(1)
    assert newest.key == (199).to_bytes(16, "big")
    await store.close()


# What becomes of requests


@contextlib.asynccontextmanager
async def asking(folder: Path, **values: Any) -> AsyncIterator[tuple[LLMInterface, ScriptedProvider]]:
    provider = ScriptedProvider(["a", "b"], name="native", models=("tiny",))
    settings = Settings(cache_dir=folder, cache_l1_size=1000, **values)
    async with LLMInterface(settings, providers={"native": provider}) as llm:
        yield llm, provider


async def ask(llm: LLMInterface, text: str) -> bool:
    """Whether the answer, which must be right, was a kept one."""
    response = await llm.chat_completion(LLMRequest(prompt=text, temperature=0))
    assert response.content == "ab"
    return response.cached


async def times_of(llm: LLMInterface, num_requests: int = 200) -> list[float]:
    """Seconds that each of so many new questions took, in rising order."""
    times = []
    for number in range(num_requests):
        began = time.perf_counter()
        await ask(llm, f"new {began} {number}")
        times.append(time.perf_counter() - began)
    return sorted(times)


async def added(llm: LLMInterface, folder: Path) -> float:
    """Seconds that the cache adds at the 99th percentile, against an interface that has none, in the same minute."""
    async with asking(folder, cache_enabled=False) as (plain, _):
        without = await times_of(plain)
    return (await times_of(llm))[197] - without[197]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    told = [record for record in caplog.records if record.name == "autobot_llm.cache"]
    return [record.getMessage() for record in told if record.levelno >= logging.WARNING]


async def test_a_file_that_somebody_else_has_locked_delays_and_fails_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = store_path(Settings(cache_dir=tmp_path))
    store = SqliteStore(path)
    await store.ping()
    await store.close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        async with asking(tmp_path) as (llm, _):
            assert await added(llm, tmp_path) < ADDED
            assert not await ask(llm, "x")
            assert await ask(llm, "x")  # memory goes on
            await until(lambda: len(warnings_of(caplog)) == 1)
            assert "locked" in warnings_of(caplog)[0]


@pytest.mark.parametrize("damage", ["not a database", "a damaged page"])
async def test_a_damaged_file_is_put_aside_and_begun_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    path = store_path(Settings(cache_dir=tmp_path))
    async with asking(tmp_path) as (llm, _):
        for number in range(300):
            await ask(llm, str(number))
    if damage == "not a database":
        path.write_bytes(b"this is something else" * 1000)
    else:
        data = path.read_bytes()
        path.write_bytes(data[:4096] + os.urandom(len(data) - 4096))
    async with asking(tmp_path) as (llm, _):
        for number in range(20):
            await ask(llm, str(number))
        await until(lambda: bool(llm.get_cache_metrics()["l2_usable"]))
        await ask(llm, "afterwards")
    assert path.with_suffix(".damaged").exists()
    async with asking(tmp_path) as (llm, _):
        assert await ask(llm, "afterwards")
    assert len(warnings_of(caplog)) <= 1


FULL_DISK = """
import asyncio, logging, resource, sys
from pathlib import Path
from autobot_llm.interface import LLMInterface
from autobot_llm.providers.scripted import ScriptedProvider
from autobot_llm.settings import Settings
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")

async def main():
    provider = ScriptedProvider(["x" * 20000], name="native", models=("tiny",))
    async with LLMInterface(Settings(cache_dir=Path(sys.argv[1])), providers={"native": provider}) as llm:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        for number in range(100):
            response = await llm.generate_response(str(number), temperature=0)
            assert len(response.content) == 20000
            await asyncio.sleep(0.001)
        assert (await llm.generate_response("99", temperature=0)).cached
        print(len(provider.requests), llm.get_cache_metrics()["num_l2_failures"] > 0)

asyncio.run(main())
"""


def test_a_full_disk_fails_no_request_and_is_told_once(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["WARNING", "100"]
    assert lines[1] == "100 True"


async def test_a_folder_that_cannot_be_made_fails_no_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    async with asking(tmp_path / "file" / "below") as (llm, _):
        assert [await ask(llm, "x"), await ask(llm, "x")] == [False, True]
        with pytest.raises(ProviderUnavailable, match="cannot be cleared"):
            await llm.clear_cache()
    assert len(warnings_of(caplog)) == 1


@needs_redis
async def test_hosts_share_answers_through_redis(tmp_path: Path) -> None:
    async with real_redis() as redis:
        async with asking(tmp_path, redis_url=redis.url) as (llm, _):
            assert not await ask(llm, "x")
        async with asking(tmp_path, redis_url=redis.url) as (llm, provider):
            assert await ask(llm, "x")
            assert (llm.get_cache_metrics()["num_l2_hits"], provider.requests) == (1, [])
            assert await llm.clear_cache() == {"l1": 1, "l2": 1}
            assert not await ask(llm, "x")
    assert not store_path(Settings(cache_dir=tmp_path)).exists()


@needs_redis
async def test_keys_of_a_wrong_type_count_as_absent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from redis.asyncio import Redis

    async with real_redis() as redis, Redis.from_url(redis.url) as client:
        async with asking(tmp_path, redis_url=redis.url) as (llm, _):
            await ask(llm, "x")
        (name,) = [name async for name in client.scan_iter(ANSWERS + b"*")]
        await client.delete(name)
        await client.rpush(name, "a", "list")
        async with asking(tmp_path, redis_url=redis.url) as (llm, _):
            assert not await ask(llm, "x")
        assert await client.type(name) == b"string"
        await client.set(name, b"somebody else's bytes")
        async with asking(tmp_path, redis_url=redis.url) as (llm, _):
            assert not await ask(llm, "x")
    assert warnings_of(caplog) == []


@needs_redis
async def test_a_redis_that_is_killed_is_told_of_once_and_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with real_redis() as redis, asking(tmp_path, redis_url=redis.url) as (llm, _):
        await ask(llm, "x")
        redis.kill()
        assert await added(llm, tmp_path) < ADDED
        assert await ask(llm, "x")
        assert len(warnings_of(caplog)) == 1
        await redis.start()
        await until(lambda: bool(llm.get_cache_metrics()["l2_usable"]))
        assert len(warnings_of(caplog)) == 1


@needs_redis
async def test_a_redis_that_hangs_delays_nobody_for_long(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with real_redis() as redis, asking(tmp_path, redis_url=redis.url) as (llm, _):
        await ask(llm, "x")
        redis.send(signal.SIGSTOP)
        began = time.perf_counter()
        await ask(llm, "the first to meet it")
        assert time.perf_counter() - began < PATIENCE + 0.1
        assert await added(llm, tmp_path) < ADDED
        await until(lambda: len(warnings_of(caplog)) == 1)
        redis.send(signal.SIGCONT)
        await until(lambda: bool(llm.get_cache_metrics()["l2_usable"]))


async def test_a_redis_that_was_never_there_fails_no_request_and_its_password_is_not_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with asking(tmp_path, redis_url="redis://user:hunter2@127.0.0.1:1/0") as (llm, _):
        assert await added(llm, tmp_path) < ADDED
        assert await ask(llm, "x") is False
    assert len(warnings_of(caplog)) == 1
    assert "127.0.0.1:1" in caplog.text
    assert "hunter2" not in caplog.text


class LateStore(SqliteStore):
    """Answers every lookup after `delay` seconds."""

    delay = 0.02

    async def get_many(self, keys: Any) -> dict[bytes, bytes]:
        await asyncio.sleep(self.delay)
        return await super().get_many(keys)


async def test_a_store_that_is_always_late_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    level = SecondLevel(LateStore(tmp_path / "answers.sqlite3"), seal, unseal)
    await level.start()
    assert await level.get(KEYS[0]) is None  # the first one has time
    for number in range(3):
        assert level.is_usable
        began = time.perf_counter()
        assert await level.get(bytes([number]) * 16) is None
        assert time.perf_counter() - began < 0.02
        await asyncio.sleep(0.03)
    assert not level.is_usable
    assert "longer than 4 ms" in caplog.text
    await level.close()
