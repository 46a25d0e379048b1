"""A strict HTTP/2 server over TLS that plays as it is told, stream by stream. Built on h2's server side.

Where HTTP/1.1 is negotiated it answers "old" to everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from certificates import served, trusting
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    PingAckReceived,
    RequestReceived,
    SettingsAcknowledged,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.exceptions import H2Error, ProtocolError
from h2.settings import SettingCodes
from hyperframe.frame import GoAwayFrame
from raw_server import PATIENCE, Asked

from autobot_llm.transport.network import Network
from autobot_llm.transport.pool import HttpPool, PoolLimits

SECRET = "sk-very-secret"


class StreamGone(Exception):
    """The client has given the stream, or the connection, up."""


class StreamWire:
    """One stream of one connection."""

    def __init__(self, peer: Peer, stream_id: int) -> None:
        self.peer = peer
        self.id = stream_id
        self.reset_by_client: ErrorCodes | int | None = None
        self.num_sent = 0
        self.body = bytearray()
        self._changed = asyncio.Event()

    def head(self, status: int = 200, *, end: bool = False, **headers: str) -> None:
        pairs = [(":status", str(status)), *((name.replace("_", "-"), value) for name, value in headers.items())]
        self.peer.h2.send_headers(self.id, pairs, end_stream=end)
        self.peer.flush()

    async def piece(self, data: bytes, *, end: bool = False) -> None:
        """Send `data` as the client's windows allow."""
        h2 = self.peer.h2
        while True:
            await self.peer.until_writable()
            if self.reset_by_client is not None or self.peer.is_gone:
                raise StreamGone
            room = min(h2.local_flow_control_window(self.id), h2.max_outbound_frame_size)
            if room >= len(data):
                break
            if room > 0:
                h2.send_data(self.id, data[:room])
                self.num_sent += room
                data = data[room:]
                self.peer.flush()
                continue
            self._changed.clear()
            await self._changed.wait()
        h2.send_data(self.id, data, end_stream=end)
        self.num_sent += len(data)
        self.peer.flush()

    async def reply(self, body: bytes, *, status: int = 200, **headers: str) -> None:
        self.head(status, content_length=str(len(body)), **headers)
        await self.piece(body, end=True)

    def trailers(self, **headers: str) -> None:
        self.peer.h2.send_headers(self.id, list(headers.items()), end_stream=True)
        self.peer.flush()

    def reset(self, code: ErrorCodes) -> None:
        self.peer.h2.reset_stream(self.id, code)
        self.peer.flush()

    async def until_gone(self) -> None:
        """Return once the client has reset the stream or closed the connection."""
        while self.reset_by_client is None and not self.peer.is_gone:
            self._changed.clear()
            await self._changed.wait()

    def wake(self) -> None:
        self._changed.set()


Play = Callable[[StreamWire, Asked], Awaitable[None]]
Take = Callable[[StreamWire, bytes, Callable[[], None]], None]  # the last is called to let as much come again


@dataclass
class Http2Server:
    """What the server has seen, and what it says of itself. `num_open` counts connections."""

    play: Play
    settings: dict[SettingCodes, int] = field(default_factory=dict)
    is_eager: bool = False  # play when the head has come, not when the request is complete
    take: Take | None = None  # gets what comes of a body, which is else kept and let go on at once
    url: str = ""
    protocols: list[str | None] = field(default_factory=list)  # negotiated, one for each connection
    asked: list[Asked] = field(default_factory=list)
    resets: list[ErrorCodes | int] = field(default_factory=list)
    peers: list[Peer] = field(default_factory=list)
    num_open: int = 0
    num_running: int = 0
    most_running: int = 0
    errors: list[BaseException] = field(default_factory=list)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def num_accepted(self) -> int:
        return len(self.peers)

    async def until(self, condition: Callable[[Http2Server], bool]) -> None:
        """Wait for `condition`; fails after `PATIENCE` seconds."""
        async with asyncio.timeout(PATIENCE):
            while not condition(self):
                await asyncio.sleep(0.002)


class Peer(asyncio.Protocol):
    """One accepted connection."""

    def __init__(self, server: Http2Server) -> None:
        self._server = server
        self.h2 = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        self.transport: asyncio.Transport = None  # type: ignore[assignment]
        self.is_gone = False
        self.num_pings_answered = 0
        self.num_settings_acknowledged = 0
        self._streams: dict[int, StreamWire] = {}
        self._heads: dict[int, Asked] = {}
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        server = self._server
        server.protocols.append(transport.get_extra_info("ssl_object").selected_alpn_protocol())
        server.peers.append(self)
        server.num_open += 1
        if server.protocols[-1] != "h2":
            return
        self.h2.initiate_connection()
        if server.settings:  # not initial values, which h2 would hold a client to that has not seen them yet
            self.h2.update_settings(server.settings)
        self.flush()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    async def until_writable(self) -> None:
        await self._writable.wait()

    def flush(self) -> None:
        if data := self.h2.data_to_send():
            self.transport.write(data)

    def go_away(self, last_stream_id: int, code: ErrorCodes = ErrorCodes.NO_ERROR, reason: bytes = b"") -> None:
        """Say GOAWAY and go on, which h2's own `close_connection` cannot."""
        frame = GoAwayFrame(0)
        frame.last_stream_id, frame.error_code, frame.additional_data = last_stream_id, code, reason
        self.flush()
        self.transport.write(frame.serialize())

    def data_received(self, data: bytes) -> None:
        if self._server.protocols[self._server.peers.index(self)] != "h2":
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nold")
            return
        try:
            events = self.h2.receive_data(data)
        except ProtocolError as exc:
            self._server.errors.append(exc)
            self.flush()
            self.transport.close()
            return
        for event in events:
            stream = self._streams.get(getattr(event, "stream_id", 0) or 0)
            if isinstance(event, RequestReceived):
                headers = dict(event.headers)
                asked = Asked(headers[":method"], headers[":path"], headers, b"")
                stream = self._streams[event.stream_id] = StreamWire(self, event.stream_id)
                self._heads[event.stream_id] = asked
                if self._server.is_eager:
                    self._begin(stream)
            elif isinstance(event, DataReceived) and stream is not None:
                let_on = functools.partial(self._let_on, event.stream_id, event.flow_controlled_length)
                if self._server.take is not None:
                    self._server.take(stream, event.data, let_on)
                else:
                    stream.body += event.data
                    let_on()
            elif isinstance(event, StreamEnded) and stream is not None and not self._server.is_eager:
                self._begin(stream)
            elif isinstance(event, StreamReset) and stream is not None:
                stream.reset_by_client = event.error_code
                self._server.resets.append(event.error_code)
                stream.wake()
            elif isinstance(event, SettingsAcknowledged):
                self.num_settings_acknowledged += 1
            elif isinstance(event, PingAckReceived):
                self.num_pings_answered += 1
            elif isinstance(event, WindowUpdated):
                for one in self._streams.values():
                    one.wake()
        self.flush()

    def _let_on(self, stream_id: int, num_bytes: int) -> None:
        if not self.is_gone:
            self.h2.acknowledge_received_data(num_bytes, stream_id)
            self.flush()

    def _begin(self, stream: StreamWire) -> None:
        head = self._heads[stream.id]
        asked = Asked(head.method, head.path, head.headers, bytes(stream.body))
        self._server.asked.append(asked)
        task = asyncio.create_task(self._played(stream, asked))
        self._server.tasks.add(task)
        task.add_done_callback(self._server.tasks.discard)

    async def _played(self, stream: StreamWire, asked: Asked) -> None:
        server = self._server
        server.num_running += 1
        server.most_running = max(server.most_running, server.num_running)
        try:
            await server.play(stream, asked)
        except (StreamGone, H2Error):
            if stream.reset_by_client is None and not self.is_gone:
                raise
        finally:
            server.num_running -= 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_gone = True
        self._server.num_open -= 1
        self._writable.set()
        for stream in self._streams.values():
            stream.wake()


@contextlib.asynccontextmanager
async def http2_server(
    play: Play,
    *,
    settings: dict[SettingCodes, int] | None = None,
    is_eager: bool = False,
    take: Take | None = None,
    tls: ssl.SSLContext | None = None,
    protocols: Sequence[str] = ("h2",),
) -> AsyncIterator[Http2Server]:
    """Serve on a free port: `play` answers each stream. Fails when a client breaks the protocol."""
    server = Http2Server(play, dict(settings or {}), is_eager, take)
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: Peer(server), "127.0.0.1", 0, ssl=tls or served(*protocols))
    server.url = f"https://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()
        tasks = list(server.tasks)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for peer in server.peers:
            peer.transport.abort()
        for failure in (*server.errors, *(result for result in results if isinstance(result, Exception))):
            raise failure


def pool_of(server: Http2Server, path: str = "", *, network: Network | None = None, **limits: float) -> HttpPool:
    return HttpPool(
        server.url + path,
        headers={"Authorization": f"Bearer {SECRET}"},
        limits=PoolLimits(**limits),  # type: ignore[arg-type]
        network=network or Network(),
        name="test",
        tls=trusting(),
    )
