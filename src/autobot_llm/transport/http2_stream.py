"""One of the exchanges that share an HTTP/2 connection. Knows its own window; frames are the connection's.

Imported when a server has chosen HTTP/2, not before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hpack import HeaderTuple, NeverIndexedHeaderTuple

from autobot_llm.transport.exchange import BrokenConnection, Exchange, Request

if TYPE_CHECKING:
    from autobot_llm.transport.http2 import Connection

STREAM_WINDOW = 512 * 1024  # bytes that may wait for a slow reader of one stream before the server is held back

_HOP_BY_HOP = frozenset({"host", "connection", "transfer-encoding", "keep-alive", "proxy-connection", "upgrade"})
_SECRET = frozenset({"authorization", "x-api-key", "api-key", "proxy-authorization"})


class Stream(Exchange):
    """One exchange of a connection that others use too. Giving it up leaves the connection as it is."""

    is_shared = True

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection
        self._num_uncredited = 0
        self.id = 0
        self.unsent: memoryview | None = None  # what is left of the request's body, or of the piece that was written
        self.is_last_piece = False  # whether the body ends with it
        self.is_sent = False  # the request has been said to be complete
        self.has_begun = False  # the server has answered something
        self.is_ended = False  # the server has said everything

    @property
    def connection(self) -> Connection:
        return self._connection

    def send(self, request: Request, patience: float | None) -> None:
        self._connection.begin(self, request)
        self._is_idle = False
        self.set_patience(patience)

    def leave(self) -> None:
        """Say that nothing more is wanted of it."""
        self._stop_timer()
        self._connection.leave(self)

    async def read(self) -> bytes:
        data = await super().read()
        self._num_uncredited += len(data)
        if self._num_uncredited >= STREAM_WINDOW // 2:
            self._connection.credit(self, self._num_uncredited)
            self._num_uncredited = 0
        return data

    def _write(self, piece: bytes) -> None:
        self._is_full = True
        self._connection.send_body(self, piece, is_last=False)

    def _end_body(self, *, is_whole: bool) -> None:
        if is_whole:  # else the stream is reset when the answer has been read
            self._connection.end_body(self)

    def _resume(self) -> None:
        pass  # the window that `read` opens does it

    def _give_up(self) -> None:
        self._stop_timer()
        self._connection.reset(self)

    # For Connection

    def hear(self, now: float) -> None:
        self._heard_at = now

    def sent(self) -> None:
        """All that was written has gone out."""
        self.is_sent = self.is_last_piece
        self._is_full = False
        self._wake()

    def take_head(self, headers: Iterable[tuple[bytes, bytes]], now: float) -> None:
        self._heard_at = now
        self.has_begun = True
        for name, value in headers:
            key, text = name.decode("latin-1"), value.decode("latin-1")
            if key != ":status":
                self.headers[key] = f"{self.headers[key]}, {text}" if key in self.headers else text
            elif text.isdigit():
                self.status = int(text)
        if not self.status:
            self.fail(BrokenConnection("no valid HTTP: the answer has no status"))
            return
        self._has_head = True
        self._wake()

    def take_data(self, data: bytes, num_controlled: int, now: float) -> None:
        self._heard_at = now
        self._num_uncredited += num_controlled - len(data)  # padding is read when it comes
        if data:
            self._parts.append(bytes(data))
            self._num_waiting += len(data)
            self._is_paused = self._num_waiting >= STREAM_WINDOW // 2
            self._wake()

    def take_end(self) -> None:
        self.is_ended = True
        self._is_complete = True
        self._wake()


def head_of(request: Request) -> list[HeaderTuple]:
    """The request's headers as HTTP/2 has them."""
    common = request.common.headers
    pairs = [
        HeaderTuple(":method", request.method),
        HeaderTuple(":scheme", "https"),
        HeaderTuple(":authority", common["host"]),
        HeaderTuple(":path", request.target),
    ]
    for headers in (common, request.headers or {}):
        for name, value in headers.items():
            key = name.lower()
            if key not in _HOP_BY_HOP:  # a key is never put into a table that answers could be compared with
                pairs.append((NeverIndexedHeaderTuple if key in _SECRET else HeaderTuple)(key, value))
    num_bytes = request.num_body_bytes
    if num_bytes is not None:
        pairs.append(HeaderTuple("content-length", str(num_bytes)))
    return pairs
