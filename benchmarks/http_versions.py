"""What HTTP/1.1 and HTTP/2 cost our client over TLS, and what connecting ahead of the first request saves.

The server is Hypercorn in a process of its own; only the client's CPU time counts, so how slow the server is does not.
Rounds alternate between the versions; medians are shown. The last part puts a relay in between that holds every
byte back for half a round trip, as a network does.

    python benchmarks/http_versions.py            # the table, and one JSON line
    python benchmarks/http_versions.py --quick    # does it all run?
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import trustme
import uvloop
from rich.console import Console
from rich.table import Table

from autobot_llm.transport.pool import HttpPool, Network

Version = Literal["1.1", "2"]
VERSIONS: tuple[Version, ...] = ("1.1", "2")
BODY = b"x" * 1024
ANSWER = b"y" * 500
CHUNK = b'data: {"choices": [{"index": 0, "delta": {"content": " token"}}]}\n\n'
ROUND_TRIP = 0.05  # seconds


@dataclass(frozen=True)
class Sizes:
    rounds: int = 5
    requests: int = 2000
    chunks: int = 200
    burst: int = 100


QUICK = Sizes(rounds=1, requests=50, chunks=20, burst=10)


# The server's process


async def app(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    if scope["path"].startswith("/stream"):
        for _ in range(int(scope["path"].rpartition("/")[2])):
            await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
            await asyncio.sleep(0.001)  # each chunk comes alone, as tokens do
        await send({"type": "http.response.body", "body": b""})
    else:
        await send({"type": "http.response.body", "body": ANSWER})


async def serve_app(folder: Path) -> None:
    """Hypercorn on a free port and the relay on another, which are printed; until it is ended."""
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    port = await _free_port()
    config = Config()
    config.bind = [f"127.0.0.1:{port}"]
    config.certfile, config.keyfile = str(folder / "certificate.pem"), str(folder / "key.pem")
    config.alpn_protocols = ["h2", "http/1.1"]
    config.h2_max_concurrent_streams = 200
    config.keep_alive_timeout = 300
    config.errorlog = None
    relay = await asyncio.start_server(lambda reader, writer: _relay(reader, writer, port), "127.0.0.1", 0)
    serving = asyncio.create_task(serve(app, config))  # type: ignore[arg-type]
    while True:
        with contextlib.suppress(ConnectionError):
            (await asyncio.open_connection("127.0.0.1", port))[1].close()
            break
        await asyncio.sleep(0.01)
    print(port, relay.sockets[0].getsockname()[1], flush=True)
    await serving


async def _free_port() -> int:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    server.close()
    return port


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    onward = await asyncio.open_connection("127.0.0.1", port)
    loop = asyncio.get_running_loop()

    async def pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                loop.call_later(ROUND_TRIP / 2, sink.write, data)
        loop.call_later(ROUND_TRIP / 2, sink.close)

    await asyncio.gather(pass_on(reader, onward[1]), pass_on(onward[0], writer))


# The client's


@dataclass
class Target:
    url: str
    delayed_url: str
    folder: Path

    def pool(self, version: Version, *, delayed: bool = False) -> HttpPool:
        tls = ssl.create_default_context(cafile=self.folder / "authority.pem")
        url = self.delayed_url if delayed else self.url
        return HttpPool(url, name="benchmark", tls=tls, network=Network(http_version=version))


@contextlib.asynccontextmanager
async def target() -> AsyncIterator[Target]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        authority = trustme.CA()
        made = authority.issue_cert("127.0.0.1")
        authority.cert_pem.write_to_path(folder / "authority.pem")
        (folder / "certificate.pem").write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        made.private_key_pem.write_to_path(folder / "key.pem")
        command = [sys.executable, __file__, "--serve", name]
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        server = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=nowhere)
        assert server.stdout is not None
        try:
            ports = (await server.stdout.readline()).decode().split()
            yield Target(f"https://127.0.0.1:{ports[0]}", f"https://127.0.0.1:{ports[1]}", folder)
        finally:
            server.terminate()
            await server.wait()


@dataclass
class Results:
    """Values of each figure and version, one for each round."""

    values: dict[str, dict[Version, list[float]]] = field(default_factory=dict)

    def add(self, figure: str, version: Version, value: float) -> None:
        self.values.setdefault(figure, {"1.1": [], "2": []})[version].append(value)

    def median(self, figure: str, version: Version) -> float:
        return statistics.median(self.values[figure][version])


async def cpu_per(count: int, work: Callable[[], Awaitable[object]]) -> float:
    """CPU microseconds of this process for each of `count` things that `work` does."""
    begin = time.process_time()
    await work()
    return (time.process_time() - begin) / count * 1e6


async def measure(sizes: Sizes, at: Target, version: Version, results: Results) -> None:
    pool = at.pool(version)

    async def ask(num_requests: int) -> None:
        for _ in range(num_requests):
            await pool.request("POST", "/", body=BODY)

    async def read() -> None:
        async with pool.stream("POST", f"/stream/{sizes.chunks}", body=BODY) as answer:
            while await answer.read():
                pass

    await ask(20)
    await asyncio.gather(*(ask(2) for _ in range(32)))
    each = sizes.requests // 4
    results.add("CPU µs a request, 1 at a time", version, await cpu_per(each, lambda: ask(each)))
    each = sizes.requests // 32 + 1
    many = await cpu_per(32 * each, lambda: asyncio.gather(*(ask(each) for _ in range(32))))
    results.add("CPU µs a request, 32 at a time", version, many)
    chunks = await cpu_per(16 * sizes.chunks, lambda: asyncio.gather(*(read() for _ in range(16))))
    results.add("CPU µs a chunk, 16 streams", version, chunks)
    await pool.close()
    pool = at.pool(version)
    begin = time.perf_counter()
    burst = await cpu_per(sizes.burst, lambda: asyncio.gather(*(ask(1) for _ in range(sizes.burst))))
    name = f"{sizes.burst} requests at once, from cold"
    results.add(f"{name}: CPU µs a request", version, burst)
    results.add(f"{name}: ms until all are answered", version, (time.perf_counter() - begin) * 1e3)
    results.add(f"{name}: connections", version, pool.metrics()["num_connects"])
    await pool.close()
    for is_warm in (False, True):
        pool = at.pool(version, delayed=True)
        if is_warm:
            await pool.warm()
        begin = time.perf_counter()
        await pool.request("POST", "/", body=BODY)
        words = "connected ahead" if is_warm else "cold"
        name = f"ms to the first answer, {ROUND_TRIP * 1e3:.0f} ms round trip, {words}"
        results.add(name, version, (time.perf_counter() - begin) * 1e3)
        await pool.close()


async def run(sizes: Sizes) -> Results:
    results = Results()
    console = Console(stderr=True)
    async with target() as at:
        for number in range(sizes.rounds):
            for version in VERSIONS:
                console.print(f"round {number + 1} of {sizes.rounds}: HTTP/{version} ...")
                await measure(sizes, at, version, results)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests, one round")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        asyncio.run(serve_app(arguments.serve))
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        results = runner.run(run(QUICK if arguments.quick else Sizes()))
    table = Table("over TLS, medians", "HTTP/1.1", "HTTP/2", "ratio")
    line = {}
    for figure in results.values:
        old, new = (results.median(figure, version) for version in VERSIONS)
        table.add_row(figure, f"{old:.1f}", f"{new:.1f}", f"{new / old:.2f}")
        line[figure] = {"http_1_1": round(old, 2), "http_2": round(new, 2)}
    Console().print(table)
    print(json.dumps({"benchmark": "http_versions", "figures": line}, ensure_ascii=False))


if __name__ == "__main__":
    main()
