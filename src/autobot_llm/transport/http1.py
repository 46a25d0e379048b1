"""One HTTP/1.1 connection to a provider: a request out, its answer in. Knows framing; knows no pool and no model.

httptools (llhttp) parses; this adds what it leaves to its user: bounds, deadlines, back-pressure, and the end of an
answer that only the end of the connection delimits. Specification: RFC 9112.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import cast

import httptools

MAX_HEAD_BYTES = 256 * 1024
HIGH_WATER = 256 * 1024  # bytes that may wait for a slow reader before the server is held back


class BrokenConnection(Exception):
    """The connection was lost, or what came over it is no HTTP.

    `is_stale`: before a single byte of an answer. `is_unsent`: before the request was sent.
    """

    def __init__(self, reason: str, *, is_stale: bool = False, is_unsent: bool = False) -> None:
        super().__init__(reason)
        self.is_stale = is_stale
        self.is_unsent = is_unsent


class Silence(Exception):
    """Nothing came for `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"nothing came for {seconds:g} s")
        self.seconds = seconds


class Connection(asyncio.Protocol):
    """A connection that carries one exchange at a time.

    `send`, then `head`, then `read` until it returns b"". After that `is_reusable` tells whether another exchange
    may follow. `close` may be called at any time, and gives up what is under way. `on_lost` is called when the
    connection ends, whoever ends it.
    """

    def __init__(self, on_lost: Callable[[Connection], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_lost = on_lost
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._failure: Exception | None = None
        self._transport: asyncio.Transport | None = None
        self._is_idle = True
        self._is_full = False  # what was written waits for the server to take it
        self._begin()
        self.is_lost = False
        self.num_exchanges = 0
        self._idle_since = 0.0

    def _begin(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._num_head_bytes = 0
        self._has_head = False
        self._is_complete = False
        self._keeps_open = False
        self._was_cut = False
        self._is_paused = False
        self._parts: list[bytes] = []
        self._num_waiting = 0

    # The exchange

    def send(self, request: bytes, patience: float | None) -> None:
        """Write a whole request. Silence of more than `patience` seconds from now on ends the exchange."""
        transport = self._transport
        if transport is None or transport.is_closing():
            raise BrokenConnection("the connection was closed while it was idle", is_stale=True, is_unsent=True)
        self._begin()
        self._is_idle = False
        self.num_exchanges += 1
        self.set_patience(patience)
        transport.write(request)

    async def send_rest(self, pieces: AsyncIterator[bytes], patience: float | None) -> None:
        """Write more of the request, no faster than the server takes it; `patience` bounds each wait for that.

        Given up once the server answers, for it has then seen enough. Raises BrokenConnection and Silence.
        """
        async for piece in pieces:
            if self._failure is not None:
                raise self._failure
            if self._has_head:
                self._was_cut = True  # what it expects next is the rest of the body
                return
            assert self._transport is not None, "written after `send`"
            self._transport.write(piece)
            try:
                async with asyncio.timeout(patience):
                    while self._is_full and self._failure is None and not self._has_head:
                        await self._wait()
            except TimeoutError as exc:
                raise Silence(patience or 0.0) from exc
        self.set_patience(patience)

    def set_patience(self, seconds: float | None) -> None:
        """How long the server may be silent, counted from the last time that it was not, or from now."""
        self._patience = seconds
        self._heard_at = self._loop.time()
        self._stop_timer()
        if seconds is not None:
            self._timer = self._loop.call_later(seconds, self._check_patience)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def head(self) -> None:
        """Wait for the answer's status and headers. Raises BrokenConnection and Silence."""
        while not self._has_head:
            await self._wait()

    async def read(self) -> bytes:
        """Everything that has come since, at least one byte, or b"" at the end. Raises BrokenConnection, Silence."""
        while not self._parts:
            if self._is_complete:
                self._end()
                return b""
            await self._wait()
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts = []
        self._num_waiting = 0
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._heard_at = self._loop.time()
            self._transport.resume_reading()
        return data

    def _end(self) -> None:
        self._is_idle = True
        self._idle_since = self._loop.time()
        self._stop_timer()

    @property
    def idle_seconds(self) -> float:
        """How long ago the last exchange was completed."""
        return self._loop.time() - self._idle_since

    @property
    def is_reusable(self) -> bool:
        """Whether the last exchange is complete and the server keeps the connection open."""
        return self._is_idle and self._keeps_open and self._failure is None and not self._was_cut

    def close(self) -> None:
        """Close at once. What the server still sends meets a closed connection, which tells it to stop."""
        self._stop_timer()
        # Not `transport.close`, which over TLS waits for the server's reply to the farewell.
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, failure: Exception) -> None:
        if self._failure is None:
            self._failure = failure
        self._wake()
        self.close()

    def _check_patience(self) -> None:
        self._timer = None
        if self._patience is None or self._is_idle:
            return
        waited = self._loop.time() - self._heard_at
        if waited >= self._patience and not self._is_paused:
            self._fail(Silence(self._patience))
        else:
            remaining = self._patience - waited if waited < self._patience else self._patience
            self._timer = self._loop.call_later(remaining, self._check_patience)

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
            self._fail(BrokenConnection("the server sent something unasked"))
            return
        self._heard_at = self._loop.time()
        if not self._has_head:
            self._num_head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            cause = exc.__context__ if isinstance(exc, httptools.HttpParserCallbackError) else None
            self._fail(cause if isinstance(cause, BrokenConnection) else BrokenConnection(f"no valid HTTP: {exc}"))
            return
        if not self._has_head and self._num_head_bytes > MAX_HEAD_BYTES:
            self._fail(BrokenConnection(f"the answer's head is larger than {MAX_HEAD_BYTES} bytes"))
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
