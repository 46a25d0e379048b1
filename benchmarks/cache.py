"""What a kept answer costs, through the library and through the server, and the call that it replaces.

The calls are the embedded model's: 32 tokens, greedy. Hits from memory are counted in processor time; hits from the
shared store (SQLite, the first level emptied each time) in time, since a thread does half of the work. The server runs
in a process of its own with one worker; 32 connections ask it without a pause, and its processor time is divided by the
answers. So it is with a bare ASGI application of the same server that answers with the same number of bytes: the floor.
Medians of five runs; one JSON line at the end.

    python benchmarks/cache.py
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import psutil
import uvloop

from autobot_llm.interface import LLMInterface
from autobot_llm.providers.base import Link, Provider, Streamer
from autobot_llm.providers.scripted import ScriptedProvider
from autobot_llm.settings import Settings
from autobot_llm.types import ChatMessage, LLMRequest
from autobot_llm.universal.response_cache import ResponseCache, response_cache

NUM_RUNS = 5
NUM_HITS = 2000
NUM_L2_HITS = 300
NUM_CONNECTIONS = 32
SERVED_SECONDS = 2.0
NUM_TOKENS = 32
QUESTION = "Tell me a story about a fox and a lantern."
REQUEST = LLMRequest(
    messages=[ChatMessage("user", QUESTION)], temperature=0, max_tokens=NUM_TOKENS, provider="native", request_id="r"
)
BODY = json.dumps(
    {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": NUM_TOKENS}
).encode()
BARS = {
    "chain_l1_us": 15,
    "chat_completion_l1_us": 15,
    "server_l1_cpu_us": 120,
    "l2_us": 300,
    "hit_share_of_call": 0.05,
}


async def microseconds(work: Callable[[], Awaitable[object]], repeats: int, clock: Callable[[], float]) -> float:
    """The median over the runs of what one `work` takes."""
    runs = []
    for _ in range(NUM_RUNS):
        began = clock()
        for _ in range(repeats):
            await work()
        runs.append((clock() - began) / repeats * 1e6)
    return statistics.median(runs)


async def through_the_library(folder: Path) -> dict[str, float]:
    async with LLMInterface(Settings(cache_dir=folder)) as llm:
        began = time.perf_counter()
        made = await llm.chat_completion(REQUEST)
        call_us = (time.perf_counter() - began) * 1e6
        cache = llm._caches.answers
        assert cache is not None and not made.cached

        async def hit() -> None:
            assert (await llm.chat_completion(REQUEST)).cached

        async def events() -> None:
            async for _ in llm.events(REQUEST):
                pass

        figures = {
            "call_us": call_us,
            "chat_completion_l1_us": await microseconds(hit, NUM_HITS, time.process_time),
            "events_l1_us": await microseconds(events, NUM_HITS, time.process_time),
        }
        await asyncio.sleep(0.2)  # the answer is written behind
        hits_before = cache.figures().num_l2_hits

        async def from_the_store() -> None:
            cache.l1.clear()
            await llm.chat_completion(REQUEST)

        figures["l2_us"] = await microseconds(from_the_store, NUM_L2_HITS, time.perf_counter)
        figures["l2_hit_share"] = (cache.figures().num_l2_hits - hits_before) / (NUM_RUNS * NUM_L2_HITS)
    return figures


async def through_the_chain(folder: Path, num_pieces: int) -> float:
    """The cache alone, as one link in front of a provider."""
    provider = ScriptedProvider(["word "] * num_pieces, name="native", models=("tiny",))
    await provider.start()
    cache = response_cache(Settings(cache_dir=folder))
    assert isinstance(cache, ResponseCache)
    chain = wrapped(cache, provider)

    async def hit() -> None:
        async for _ in chain.stream(REQUEST):
            pass

    await hit()
    taken = await microseconds(hit, NUM_HITS, time.process_time)
    assert len(provider.requests) == 1
    return taken


def wrapped(link: Link, provider: Provider) -> Streamer:
    return link.wrap(provider, provider)


SERVE = "import sys; from autobot_llm.cli.main import main; sys.exit(main(['serve']))"
BARE = """
import os, uvicorn
from autobot_llm.server.protocol import BoundedHttpProtocol

body = b" " * int(os.environ["NUM_BYTES"])
headers = [
    (b"content-type", b"application/json"), (b"x-request-id", b"0" * 32), (b"request-id", b"0" * 32),
    (b"x-autobot-optimizations", b"response_caching;tokens_saved=64;ms_saved=77.1"),
    (b"content-length", b"%d" % len(body)),
]

async def app(scope, receive, send):
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})

uvicorn.run(app, port=int(os.environ["AUTOBOT_PORT"]), http=BoundedHttpProtocol, ws="none", lifespan="off",
            log_config=None, access_log=False, proxy_headers=False, server_header=False)
"""  # fmt: skip


async def through_the_server(folder: Path) -> dict[str, float]:
    cpu, rate, num_bytes = await served(folder, SERVE, 0)
    floor, _, _ = await served(folder, BARE, num_bytes)
    return {"server_l1_cpu_us": cpu, "server_floor_cpu_us": floor, "server_l1_hits_per_second": rate}


async def served(folder: Path, code: str, num_bytes: int) -> tuple[float, float, int]:
    """Processor time an answer in microseconds, answers a second, and the bytes of an answer's body."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AUTOBOT_")}
    environment |= {"AUTOBOT_CACHE_DIR": str(folder), "AUTOBOT_PORT": str(port), "AUTOBOT_LOG_LEVEL": "error"}
    server = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", code],
        env=environment | {"NUM_BYTES": str(num_bytes)},
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        await answered(port)
        length = (await ask_until(port, 0.0))[1]
        process = psutil.Process(server.pid)
        runs, rates = [], []
        for _ in range(NUM_RUNS):
            before, began = sum(process.cpu_times()[:2]), time.perf_counter()
            ends = began + SERVED_SECONDS
            asked = await asyncio.gather(*(ask_until(port, ends) for _ in range(NUM_CONNECTIONS)))
            num_answers = sum(count for count, _ in asked)
            runs.append((sum(process.cpu_times()[:2]) - before) / num_answers * 1e6)
            rates.append(num_answers / (time.perf_counter() - began))
        return statistics.median(runs), statistics.median(rates), length
    finally:
        server.terminate()
        server.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


async def answered(port: int) -> None:
    """Wait for the server, and have the answer made that is then asked for again."""
    async with asyncio.timeout(60):
        while True:
            try:
                await ask_until(port, 0.0)
                return
            except OSError:
                await asyncio.sleep(0.1)


class Asking(asyncio.Protocol):
    """One connection that asks again as soon as it has an answer; it must cost less than the server."""

    def __init__(self, ends: float, done: asyncio.Future[tuple[int, int]]) -> None:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(BODY)}\r\n\r\n"
        self._request = head.encode() + BODY
        self._ends = ends
        self._done = done
        self._data = b""
        self._num_answers = 0
        self._length = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, found, body = self._data.partition(b"\r\n\r\n")
        length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if not found or len(body) < int(length):
            return
        assert head.startswith(b"HTTP/1.1 200"), self._data
        self._data = b""
        self._length = int(length)
        self._num_answers += 1
        if time.perf_counter() < self._ends:
            self._transport.write(self._request)
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_result((self._num_answers, self._length))


async def ask_until(port: int, ends: float) -> tuple[int, int]:
    """Ask on one connection again and again, at least once; the number of answers, and the length of the last one."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[tuple[int, int]] = loop.create_future()
    await loop.create_connection(lambda: Asking(ends, done), "127.0.0.1", port)
    return await done


async def main() -> None:
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures["chain_l1_us"] = await through_the_chain(folder / "a", 1)
        figures["chain_l1_100_pieces_us"] = await through_the_chain(folder / "b", 100)
        figures |= await through_the_library(folder / "c")
        (folder / "d").mkdir()
        figures |= await through_the_server(folder / "d")
    figures["hit_share_of_call"] = figures["chat_completion_l1_us"] / figures["call_us"]
    figures["l2_hit_share_of_call"] = figures["l2_us"] / figures["call_us"]
    rows = [
        ("the call: 32 tokens of the embedded model, us", "call_us"),
        ("L1 hit, the cache as a link, us of CPU", "chain_l1_us"),
        ("L1 hit, the same, an answer of 100 pieces, us of CPU", "chain_l1_100_pieces_us"),
        ("L1 hit, LLMInterface.events, us of CPU", "events_l1_us"),
        ("L1 hit, LLMInterface.chat_completion, us of CPU", "chat_completion_l1_us"),
        ("L2 hit (SQLite), LLMInterface.chat_completion, us", "l2_us"),
        ("... share of these lookups that the store answered in time", "l2_hit_share"),
        ("L1 hit, server, 32 connections, us of CPU", "server_l1_cpu_us"),
        ("... of which a bare application of the same server takes", "server_floor_cpu_us"),
        ("... hits a second", "server_l1_hits_per_second"),
        ("an L1 hit's time as a share of the call's", "hit_share_of_call"),
        ("an L2 hit's time as a share of the call's", "l2_hit_share_of_call"),
    ]
    for title, field in rows:
        bar = f"   (bar {BARS[field]:g})" if field in BARS else ""
        print(f"{title:62} {figures[field]:12.5g}{bar}")
    machine = {"python": platform.python_version(), "processors": os.cpu_count(), "runs": NUM_RUNS}
    print(json.dumps({"benchmark": "cache", **machine, **{name: round(value, 5) for name, value in figures.items()}}))


if __name__ == "__main__":
    uvloop.run(main())
