"""What one turn of the event loop writes is sent together, in order, whole, and without hiding a slow reader."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

from autobot_llm.server.gathering import MOST_GATHERED, GatheringTransport


class Counted(asyncio.Transport):
    """Passes writes on and counts them."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self.transport = transport
        self.writes: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))
        self.transport.write(data)

    def close(self) -> None:
        self.transport.close()

    def abort(self) -> None:
        self.transport.abort()

    def is_closing(self) -> bool:
        return self.transport.is_closing()


class Flow(asyncio.Protocol):
    def __init__(self) -> None:
        self.is_paused = False
        self.lost = asyncio.Event()

    def pause_writing(self) -> None:
        self.is_paused = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[GatheringTransport, Counted, Flow, socket.socket]]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    transport, flow = await asyncio.get_running_loop().create_connection(Flow, sock=ours)
    counted = Counted(cast(asyncio.Transport, transport))
    try:
        yield GatheringTransport(counted), counted, flow, theirs
    finally:
        transport.abort()
        await flow.lost.wait()
        theirs.close()


async def read_exactly(reader: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        data += await asyncio.get_running_loop().sock_recv(reader, num_bytes - len(data))
    return data


async def test_what_one_turn_of_the_loop_writes_is_one_write() -> None:
    async with connected() as (transport, counted, _, reader):
        for piece in (b"a", bytearray(b"b"), memoryview(b"c")):
            transport.write(piece)
        assert counted.writes == []
        assert await read_exactly(reader, 3) == b"abc"
        assert counted.writes == [b"abc"]
        transport.write(b"d")
        assert await read_exactly(reader, 1) == b"d"
        assert counted.writes == [b"abc", b"d"]


async def test_a_buffer_may_be_used_again_once_it_was_written() -> None:
    async with connected() as (transport, _, _, reader):
        buffer = bytearray(b"first")
        transport.write(buffer)
        buffer[:] = b"other"
        assert await read_exactly(reader, 5) == b"first"


async def test_much_is_not_kept_until_the_turn_ends() -> None:
    async with connected() as (transport, counted, flow, _):
        piece = b"x" * (MOST_GATHERED // 4)
        for _ in range(40):  # more than a socket takes that nobody reads
            transport.write(piece)
        assert len(counted.writes) == 10
        assert flow.is_paused


async def test_closing_sends_what_was_written_before() -> None:
    async with connected() as (transport, _, flow, reader):
        transport.write(b"last words")
        transport.close()
        assert await read_exactly(reader, 10) == b"last words"
        await flow.lost.wait()
        assert await asyncio.get_running_loop().sock_recv(reader, 1) == b""


async def test_aborting_drops_what_was_not_sent() -> None:
    async with connected() as (transport, counted, flow, _):
        transport.write(b"never sent")
        transport.abort()
        await flow.lost.wait()
        assert counted.writes == []
        transport.write(b"nor this")
        await asyncio.sleep(0)
        assert counted.writes == [] and transport.is_closing()
