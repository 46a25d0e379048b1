"""A small proxy that leads everything to one server of this machine. For the tests of this folder and of batch jobs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class RunningProxy:
    """A small HTTP proxy that leads every host to `target`, a port of this machine, or says `refusal` to everyone."""

    target: int
    refusal: bytes = b""
    url: str = ""
    asked: list[list[str]] = field(default_factory=list)  # the lines of each head
    num_open: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_open += 1
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode().split("\r\n")
            self.asked.append(lines)
            if self.refusal:
                writer.write(self.refusal)
                return
            onward = await asyncio.open_connection("127.0.0.1", self.target)
            if lines[0].startswith("CONNECT "):
                writer.write(b"HTTP/1.1 200 Connection established\r\nvia: test\r\n\r\n")
            else:
                onward[1].write(head)
            async with asyncio.TaskGroup() as both:
                both.create_task(pass_on(reader, onward[1]))
                both.create_task(pass_on(onward[0], writer))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.num_open -= 1
            writer.close()


async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def proxy_to(url: str, refusal: bytes = b"") -> AsyncIterator[RunningProxy]:
    proxy = RunningProxy(urlsplit(url).port or 80, refusal)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        async with asyncio.timeout(5):
            while proxy.num_open:
                await asyncio.sleep(0.002)
