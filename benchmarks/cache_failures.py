"""What a shared store that is out of order adds to a request, at the 99th percentile after the first one.

Each way to be out of order is a real one: a Redis that was killed, that is stopped (SIGSTOP), that answers after 20 ms
(through a relay), whose keys hold something of a wrong type, or that was never there; a file of SQLite's that another
connection has locked, that is damaged, or whose disk is full (RLIMIT_FSIZE). Every request is a new question, so that
memory never answers it, to an interface with the cache and to one without in turn: both meet the same busy moments of
the machine. What is added is the difference of the two percentiles; of five batches, the median. The provider is a
script and costs nothing. One JSON line at the end.

    python benchmarks/cache_failures.py                # needs redis-server for the rows about it
    python benchmarks/cache_failures.py --requests 200 # does it all run?
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import platform
import resource
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import uvloop

from autobot_llm.interface import LLMInterface
from autobot_llm.providers.scripted import ScriptedProvider
from autobot_llm.settings import Settings
from autobot_llm.types import LLMRequest
from autobot_llm.universal.stores.choice import store_path
from autobot_llm.universal.stores.redis import ANSWERS

BAR_MS = 5.0
NUM_BATCHES = 5
SLOW_SECONDS = 0.02
FULL_AT = 200_000  # bytes that a file may have where the disk is "full"
REDIS_SERVER = shutil.which("redis-server")


@dataclass(frozen=True)
class Row:
    """Milliseconds. `first` is the request that meets the fault; the others are medians of the batches after it."""

    fault: str
    first: float
    p50: float
    p99: float
    p99_without: float
    added: float


@dataclass(frozen=True)
class Fault:
    """A store that is in order until `strike`, or was never; `redis_url` is None for a file in `folder`."""

    folder: Path
    redis_url: str | None = None
    strike: Callable[[], Awaitable[None]] | None = None


Making = Callable[[Path], contextlib.AbstractAsyncContextManager[Fault]]


# --- faults of a file -------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def in_order(folder: Path) -> AsyncIterator[Fault]:
    yield Fault(folder)


@contextlib.asynccontextmanager
async def locked(folder: Path) -> AsyncIterator[Fault]:
    async with LLMInterface(Settings(cache_dir=folder), providers={"native": scripted()}) as llm:
        await ask(llm, "makes the file")
    with contextlib.closing(sqlite3.connect(store_path(Settings(cache_dir=folder)), isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        yield Fault(folder)


@contextlib.asynccontextmanager
async def damaged(folder: Path) -> AsyncIterator[Fault]:
    write_nonsense(store_path(Settings(cache_dir=folder)))
    yield Fault(folder)


def write_nonsense(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"this is no database" * 10_000)


@contextlib.asynccontextmanager
async def full(folder: Path) -> AsyncIterator[Fault]:
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)

    async def strike() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_AT, hard))

    try:
        yield Fault(folder, strike=strike)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- faults of a Redis ------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def redis_server() -> AsyncIterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A Redis of our own: its socket and its process."""
    assert REDIS_SERVER is not None
    with tempfile.TemporaryDirectory() as name:
        socket = Path(name) / "redis.sock"
        options = ["--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", name]
        process = subprocess.Popen([REDIS_SERVER, *options], stdout=subprocess.DEVNULL)  # noqa: ASYNC220
        try:
            async with asyncio.timeout(10):
                while not socket.exists():  # noqa: ASYNC110  # it is another process that makes it
                    await asyncio.sleep(0.01)
            yield socket, process
        finally:
            process.kill()
            process.wait()


@contextlib.asynccontextmanager
async def redis_in_order(folder: Path) -> AsyncIterator[Fault]:
    async with redis_server() as (socket, _):
        yield Fault(folder, f"unix://{socket}")


@contextlib.asynccontextmanager
async def redis_killed(folder: Path) -> AsyncIterator[Fault]:
    async with redis_server() as (socket, process):

        async def strike() -> None:
            process.kill()
            process.wait()

        yield Fault(folder, f"unix://{socket}", strike)


@contextlib.asynccontextmanager
async def redis_stopped(folder: Path) -> AsyncIterator[Fault]:
    async with redis_server() as (socket, process):

        async def strike() -> None:
            os.kill(process.pid, signal.SIGSTOP)

        yield Fault(folder, f"unix://{socket}", strike)


@contextlib.asynccontextmanager
async def redis_slow(folder: Path) -> AsyncIterator[Fault]:
    """A relay in front of it passes every answer on after SLOW_SECONDS."""
    async with redis_server() as (socket, _):
        relayed = socket.with_name("slow.sock")
        is_slow = False

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there_reader, there_writer = await asyncio.open_unix_connection(str(socket))
            back = asyncio.create_task(passed_on(there_reader, writer, lambda: SLOW_SECONDS * is_slow))
            await passed_on(reader, there_writer, lambda: 0.0)
            await back

        async def strike() -> None:
            nonlocal is_slow
            is_slow = True

        async with await asyncio.start_unix_server(relay, str(relayed)):
            yield Fault(folder, f"unix://{relayed}", strike)


async def passed_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: Callable[[], float]) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            await asyncio.sleep(delay())
            writer.write(data)
    writer.close()


@contextlib.asynccontextmanager
async def redis_of_wrong_types(folder: Path) -> AsyncIterator[Fault]:
    """Whatever is written becomes a list at once."""
    from redis.asyncio import Redis

    async with redis_server() as (socket, _), Redis.from_url(f"unix://{socket}") as client:

        async def spoil() -> None:
            while True:
                names = [name async for name in client.scan_iter(ANSWERS + b"*", count=1000)]
                for name in names:
                    if await client.type(name) == b"string":
                        await client.delete(name)
                        await client.rpush(name, "a", "list")
                await asyncio.sleep(0.05)

        spoiling = asyncio.create_task(spoil())
        try:
            yield Fault(folder, f"unix://{socket}")
        finally:
            spoiling.cancel()
            await asyncio.wait((spoiling,))


@contextlib.asynccontextmanager
async def redis_nowhere(folder: Path) -> AsyncIterator[Fault]:
    yield Fault(folder, "redis://127.0.0.1:1/0")


FILE_FAULTS: dict[str, Making] = {
    "SQLite, in order": in_order,
    "SQLite, locked by another": locked,
    "SQLite, damaged": damaged,
    "SQLite, disk full": full,
    "Redis that was never there": redis_nowhere,
}
REDIS_FAULTS: dict[str, Making] = {
    "Redis, in order": redis_in_order,
    "Redis, killed": redis_killed,
    "Redis, stopped": redis_stopped,
    f"Redis, answers after {SLOW_SECONDS * 1000:g} ms": redis_slow,
    "Redis, keys of a wrong type": redis_of_wrong_types,
}


# --- measuring --------------------------------------------------------------------------------------------------------


def scripted() -> ScriptedProvider:
    return ScriptedProvider(["word " * 200], name="native", models=("tiny",))


async def ask(llm: LLMInterface, question: str) -> float:
    """Seconds until the whole answer, which must be right, was there."""
    began = time.perf_counter()
    response = await llm.chat_completion(LLMRequest(prompt=question, temperature=0))
    took = time.perf_counter() - began
    assert len(response.content) == 1000
    return took


async def measured(name: str, make: Making, folder: Path, num_requests: int) -> Row:
    async with make(folder) as fault, contextlib.AsyncExitStack() as opened:
        settings = Settings(cache_dir=fault.folder, redis_url=fault.redis_url)
        cached = await opened.enter_async_context(LLMInterface(settings, providers={"native": scripted()}))
        plain = await opened.enter_async_context(
            LLMInterface(Settings(cache_dir=folder, cache_enabled=False), providers={"native": scripted()})
        )
        for number in range(20):  # until all is loaded and connected
            await ask(cached, f"warm {number}")
            await ask(plain, f"warm {number}")
        if fault.strike is not None:
            await fault.strike()
        first = await ask(cached, "the first to meet it")
        batches = []
        for batch in range(NUM_BATCHES):
            with_cache, without = [], []
            for number in range(max(1, num_requests // NUM_BATCHES)):
                with_cache.append(await ask(cached, f"new {batch} {number}"))
                without.append(await ask(plain, f"new {batch} {number}"))
            p99, plain_p99 = percentile(with_cache, 99), percentile(without, 99)
            batches.append((percentile(with_cache, 50), p99, plain_p99, p99 - plain_p99))
    return Row(name, 1000 * first, *(statistics.median(column) for column in zip(*batches, strict=True)))


def percentile(seconds: list[float], percent: int) -> float:
    """In milliseconds."""
    return 1000 * sorted(seconds)[max(0, -(-percent * len(seconds) // 100) - 1)]


async def main(num_requests: int) -> None:
    logging.getLogger("autobot_llm.cache").setLevel(logging.ERROR)  # the one warning of each is tested elsewhere
    faults = FILE_FAULTS | (REDIS_FAULTS if REDIS_SERVER is not None else {})
    if REDIS_SERVER is None:
        print("redis-server is not installed: its rows are left out", file=sys.stderr)
    rows = []
    print(
        f"{'the shared store':34} {'first':>8} {'p50':>8} {'p99':>8} {'without':>8} {'added':>8}   ms (bar {BAR_MS:g})"
    )
    for name, make in faults.items():
        with tempfile.TemporaryDirectory() as folder:
            row = await measured(name, make, Path(folder) / "cache", num_requests)
        rows.append(row)
        cells = (row.first, row.p50, row.p99, row.p99_without, row.added)
        verdict = "" if row.added < BAR_MS else "  missed"
        print(f"{row.fault:34}", *(f"{cell:8.2f}" for cell in cells), verdict, flush=True)
    machine = {"python": platform.python_version(), "processors": os.cpu_count(), "requests": num_requests}
    figures = {row.fault: {"first": row.first, "p50": row.p50, "p99": row.p99, "added": row.added} for row in rows}
    print(json.dumps({"benchmark": "cache_failures", **machine, "milliseconds": figures}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, metavar="N", help="for each way (default 1,000)")
    uvloop.run(main(parser.parse_args().requests))
