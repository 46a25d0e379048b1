"""One HTTP/1.1 connection to a provider: a request out, its answer in. Knows framing; knows no pool and no model.

httptools (llhttp) parses; this adds what it leaves to its user: bounds, deadlines, back-pressure, and the end of an
answer that only the end of the connection delimits. Specification: RFC 9112.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import httptools

from autobot_llm.transport.exchange import MAX_HEAD_BYTES, BrokenConnection, Exchange, Request

HIGH_WATER = 256 * 1024  # bytes that may wait for a slow reader before the server is held back


class Connection(Exchange, asyncio.Protocol):
    """A connection that carries one exchange at a time.

    When `read` has returned b"", `is_reusable` tells whether another exchange may follow. `close` may be called at
    any time, and gives up what is under way. `on_lost` is called when the connection ends, whoever ends it.
    """

    def __init__(self, on_lost: Callable[[Connection], None]) -> None:
        super().__init__()
        self._on_lost = on_lost
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self.is_lost = False
        self.expires_at = float("inf")  # by the loop's clock; the pool's to set

    def _begin(self) -> None:
        Exchange._begin(self)
        self._num_head_bytes = 0
        self._keeps_open = False
        self._was_cut = False  # the request was, so the server still expects the rest of it

    # The exchange

    def send(self, request: Request, patience: float | None) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            raise BrokenConnection("the connection was closed while it was idle", is_stale=True, is_unprocessed=True)
        num_bytes = request.num_body_bytes
        self._begin()
        self._is_idle = False
        self.set_patience(patience)
        length = b"\r\n" if num_bytes is None else b"content-length: %d\r\n\r\n" % num_bytes
        body = request.body if isinstance(request.body, bytes) else b""
        first = f"{request.method} {request.target} HTTP/1.1\r\n".encode("ascii")
        transport.write(b"".join((first, request.common.lines, request.lines, length, body)))

    def _write(self, piece: bytes) -> None:
        assert self._transport is not None, "written after `send`"
        self._transport.write(piece)

    def _end_body(self, *, is_whole: bool) -> None:
        self._was_cut = not is_whole

    def _resume(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    @property
    def idle_seconds(self) -> float:
        """How long ago the last exchange was completed, or the connection made."""
        return self._loop.time() - self._idle_since

    @property
    def is_aged(self) -> bool:
        """Whether it should be replaced by one that is made anew."""
        return self._loop.time() >= self.expires_at

    @property
    def is_reusable(self) -> bool:
        """Whether the last exchange is complete and the server keeps the connection open."""
        is_complete = self._is_idle and not self._was_cut
        return is_complete and self._keeps_open and self._failure is None and not self.is_lost

    def close(self) -> None:
        """Close at once. What the server still sends meets a closed connection, which tells it to stop."""
        self._stop_timer()
        # Not `transport.close`, which over TLS waits for the server's reply to the farewell.
        if self._transport is not None:
            self._transport.abort()

    def _give_up(self) -> None:
        self.close()

    # Called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # a socket's: it reads and writes

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        self._wake()

    def data_received(self, data: bytes) -> None:
        if self._is_idle:  # words nobody asked for: whatever they are, they answer no request of ours
            self.fail(BrokenConnection("the server sent something unasked"))
            return
        self._heard_at = self._loop.time()
        if not self._has_head:
            self._num_head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            cause = exc.__context__ if isinstance(exc, httptools.HttpParserCallbackError) else None
            self.fail(cause if isinstance(cause, BrokenConnection) else BrokenConnection(f"no valid HTTP: {exc}"))
            return
        if not self._has_head and self._num_head_bytes > MAX_HEAD_BYTES:
            self.fail(BrokenConnection(f"the answer's head is larger than {MAX_HEAD_BYTES} bytes"))
            return
        if self._num_waiting > HIGH_WATER and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()
        if self._has_head:
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self.is_lost = True
        if not self._is_complete and self._failure is None:
            if self._has_head and self._ends_with_connection():
                self._is_complete = True
            else:
                self._failure = BrokenConnection(
                    f"the connection was lost: {exc or 'closed by the server'}", is_stale=self._num_head_bytes == 0
                )
        self._wake()
        self._on_lost(self)

    def _ends_with_connection(self) -> bool:
        return "content-length" not in self.headers and "chunked" not in self.headers.get("transfer-encoding", "")

    # Called by the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        self.headers[key] = f"{self.headers[key]}, {text}" if key in self.headers else text

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status == 101:
            raise BrokenConnection("the server switched to another protocol unasked")
        if self.status < 200:  # an announcement; the answer follows
            self.headers = {}
            return
        self._has_head = True

    def on_body(self, data: bytes) -> None:
        self._parts.append(data)
        self._num_waiting += len(data)

    def on_message_complete(self) -> None:
        if self.status < 200:
            return
        if self._is_complete:
            raise BrokenConnection("the server sent a second answer to one request")
        self._is_complete = True
        self._keeps_open = self._parser.should_keep_alive()
