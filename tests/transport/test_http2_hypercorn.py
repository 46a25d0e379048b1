"""A server that others wrote says that HTTP/2 was spoken, and gets and gives the same bytes."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from certificates import trusting, write_server
from hypercorn.asyncio import serve
from hypercorn.config import Config
from raw_server import PATIENCE

from autobot_llm.transport.network import Network
from autobot_llm.transport.pool import HttpPool


class App:
    """Says the version, or streams, or tells the digest of what it got."""

    def __init__(self) -> None:
        self.versions: list[str] = []
        self.clients: set[Any] = set()
        self.num_left = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        self.versions.append(scope["http_version"])
        self.clients.add(tuple(scope["client"]))
        digest = hashlib.sha256()
        while True:
            message = await receive()
            digest.update(message.get("body", b""))
            if not message.get("more_body"):
                break
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        if scope["path"] == "/endless":
            sending = asyncio.create_task(self._without_end(send))
            while (await receive())["type"] != "http.disconnect":
                pass
            sending.cancel()
            self.num_left += 1
            return
        await send({"type": "http.response.body", "body": digest.hexdigest().encode(), "more_body": True})
        for _ in range(50):
            await send({"type": "http.response.body", "body": bytes(20_000), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _without_end(self, send: Any) -> None:
        while True:
            await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def hypercorn(app: App, folder: Path) -> AsyncIterator[str]:
    write_server(folder / "certificate.pem", folder / "key.pem")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = Config()
    config.bind = [f"127.0.0.1:{port}"]
    config.certfile, config.keyfile = str(folder / "certificate.pem"), str(folder / "key.pem")
    config.alpn_protocols = ["h2", "http/1.1"]
    config.errorlog = config.accesslog = None
    over = asyncio.Event()
    serving = asyncio.create_task(serve(app, config, shutdown_trigger=over.wait))  # type: ignore[arg-type]
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(ConnectionError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                break
            await asyncio.sleep(0.01)
    try:
        yield f"https://127.0.0.1:{port}"
    finally:
        over.set()
        await serving


async def test_hypercorn_says_that_http2_was_spoken_on_one_connection(tmp_path: Path) -> None:
    app = App()
    async with hypercorn(app, tmp_path) as url:
        pool = HttpPool(url, name="test", tls=trusting())
        bodies = [bytes([n]) * 100_000 for n in range(10)] + [bytes(10 * 2**20)]
        answers = await asyncio.gather(*(pool.request("POST", "/", body=body) for body in bodies))
        for body, answer in zip(bodies, answers, strict=True):
            assert answer.body == hashlib.sha256(body).hexdigest().encode() + bytes(1_000_000)
        async with pool.stream("GET", "/endless") as stream:
            assert (await stream.read()).startswith(b"data: x")
        async with asyncio.timeout(PATIENCE):
            while not app.num_left:
                await asyncio.sleep(0.002)
        assert (set(app.versions), len(app.clients)) == ({"2"}, 1)
        await pool.close()
        old = HttpPool(url, name="test", tls=trusting(), network=Network(http_version="1.1"))
        await old.request("GET", "/")
        assert app.versions[-1] == "1.1"
        await old.close()
