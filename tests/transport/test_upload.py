"""A body from disk is sent as it is, never held in memory, and given up when the server has heard enough."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from raw_server import Asked, Wire, raw_server

from autobot_llm.errors import InvalidRequestError, ProviderTimeout
from autobot_llm.transport.pool import HttpPool
from autobot_llm.transport.upload import PIECE_BYTES, FileBody

MEBIBYTE = 2**20


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    with path.open("wb") as file:
        for number in range(32):
            file.write(bytes([number]) * MEBIBYTE)
    return path


def digest_of(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


@contextlib.asynccontextmanager
async def server_of(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[HttpPool]:
    """A server that does with each connection what `serve` does, and a pool for it."""
    tasks: list[asyncio.Task[None]] = []

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.ensure_future(accepted(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    pool = HttpPool(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", name="p")
    try:
        yield pool
    finally:
        await pool.close()
        server.close()
        await asyncio.gather(*tasks)


async def answer(writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
    writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body))
    await writer.drain()


async def test_a_file_goes_out_as_it_is_between_what_frames_it(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * (PIECE_BYTES + 5))

    async def play(wire: Wire, asked: Asked) -> None:
        await wire.reply(asked.body[:3] + asked.body[-4:])

    async with raw_server(play) as server:
        pool = HttpPool(server.url, name="p")
        body = FileBody(path, b"<a>", b"</a>")
        for _ in range(2):  # the connection is kept, and the body can be read again
            assert (await pool.request("POST", "/", body=body)).body == b"<a></a>"
        assert server.asked[0].body == b"<a>" + path.read_bytes() + b"</a>"
        assert server.num_accepted == 1
        await pool.close()


async def test_a_large_file_is_never_in_memory(large: Path) -> None:
    digest = hashlib.sha256()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while size:
            data = await reader.read(min(size, 65536))
            digest.update(data)
            size -= len(data)
        await answer(writer, 200, b"ok")

    async with server_of(serve) as pool:
        tracemalloc.start()
        try:
            assert (await pool.request("POST", "/", body=FileBody(large))).body == b"ok"
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert digest.digest() == digest_of(large)
    assert peak < 8 * MEBIBYTE


async def test_a_server_that_refuses_before_the_end_is_heard_and_its_connection_not_used_again(large: Path) -> None:
    num_connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        await reader.readuntil(b"\r\n\r\n")
        await answer(writer, 400, b'{"error": {"message": "too much"}}')
        with contextlib.suppress(ConnectionError):
            while await reader.read(65536):
                await asyncio.sleep(0.001)

    async with server_of(serve) as pool:
        for _ in range(2):
            with pytest.raises(InvalidRequestError, match="too much"):
                await pool.request("POST", "/", body=FileBody(large))
        assert num_connections == 2


async def test_a_server_that_takes_no_more_is_waited_for_as_long_as_allowed(large: Path) -> None:
    is_over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await is_over.wait()

    async with server_of(serve) as pool:
        with pytest.raises(ProviderTimeout):
            await pool.request("POST", "/", body=FileBody(large), timeout=0.3)
        await pool.close()  # ends only when no connection is left
        is_over.set()
