"""One request and its answer, whatever version of HTTP carries it. Knows waiting, silence and errors; knows no bytes.

`http1.Connection` is an exchange, one after the other; `http2.Stream` is one of many on one connection. What both
promise to a reader is written here once, so that providers cannot tell them apart.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import msgspec

from autobot_llm.transport.upload import FileBody

MAX_HEAD_BYTES = 256 * 1024


class BrokenConnection(Exception):
    """The connection was lost, or what came over it is no HTTP.

    `is_stale`: before a single byte of an answer. `is_unprocessed`: the request was not sent, or the server says that
    it has not looked at it, so it may be sent again whatever it asks for.
    """

    def __init__(self, reason: str, *, is_stale: bool = False, is_unprocessed: bool = False) -> None:
        super().__init__(reason)
        self.is_stale = is_stale
        self.is_unprocessed = is_unprocessed


class Silence(Exception):
    """Nothing came for `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"nothing came for {seconds:g} s")
        self.seconds = seconds


@dataclass(frozen=True, slots=True)
class Common:
    """What every request of a pool says: its headers (lower-case names), and the same as lines of HTTP/1.1."""

    headers: Mapping[str, str]
    lines: bytes


class Request(msgspec.Struct, frozen=True, gc=False):
    """A request before it is written in either version. `target` is what the first line of HTTP/1.1 asks for."""

    method: str
    target: str
    common: Common
    headers: Mapping[str, str] | None
    lines: bytes  # the same, as HTTP/1.1 has them
    body: bytes | FileBody | None

    @property
    def num_body_bytes(self) -> int | None:
        """None where there is no body. Raises OSError for a file that is not there."""
        body = self.body
        return body.num_bytes if isinstance(body, FileBody) else None if body is None else len(body)


class Exchange(ABC):
    """`send`, `send_pieces` where the body is a file, `head`, then `read` until it returns b"".

    `status` and `headers` are there after `head`. Another task may end the exchange at any time; every wait then raises
    BrokenConnection.
    """

    is_shared: ClassVar[bool] = False  # whether other exchanges use the same connection at the same time

    def __init__(self) -> None:
        self.is_reused = False  # whether its connection was there before it was asked for; the pool's to set
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._patience: float | None = None
        self._heard_at = 0.0
        self._failure: Exception | None = None
        self._is_full = False  # what was written waits for the server to take it
        self._is_idle = True
        self._idle_since = self._loop.time()
        self._begin()

    def _begin(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._has_head = False
        self._is_complete = False
        self._is_paused = False  # the server is held back, because the reader is slow
        self._parts: list[bytes] = []
        self._num_waiting = 0  # bytes in `_parts`

    @abstractmethod
    def send(self, request: Request, patience: float | None) -> None:
        """Send a request, but of one whose body is a file the head only: `send_pieces` has to follow.

        Silence of more than `patience` seconds from now on ends the exchange. Raises BrokenConnection, and OSError for
        a file that is not there.
        """

    async def send_pieces(self, pieces: AsyncIterator[bytes], patience: float | None) -> None:
        """Send a body no faster than the server takes it; `patience` bounds its silence while it takes nothing.

        Given up once the server answers, for it has then seen enough. Raises BrokenConnection and Silence.
        """
        async for piece in pieces:
            if self._failure is not None:
                raise self._failure
            if self._has_head:
                self._end_body(is_whole=False)
                break
            self._write(piece)
            if self._is_full:
                await self._until_taken(patience)
        else:
            self._end_body(is_whole=True)
        self.set_patience(patience)

    async def _until_taken(self, patience: float | None) -> None:
        self.set_patience(patience)
        while self._is_full and not self._has_head:
            await self._wait()
        self.set_patience(None)  # what the disk takes is not the server's silence

    @abstractmethod
    def _write(self, piece: bytes) -> None:
        """Send more of the body; `_is_full` is then True until the server has taken enough of it."""

    @abstractmethod
    def _end_body(self, *, is_whole: bool) -> None:
        """Nothing more of the body follows, whether all of it was written or not."""

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
        if self._is_paused:
            self._is_paused = False
            self._heard_at = self._loop.time()
            self._resume()
        return data

    @abstractmethod
    def _resume(self) -> None:
        """Let a server go on that was held back."""

    def _end(self) -> None:
        self._is_idle = True
        self._idle_since = self._loop.time()
        self._stop_timer()

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

    def fail(self, failure: Exception) -> None:
        """End the exchange with `failure`, which its reader gets."""
        if self._failure is None:
            self._failure = failure
        self._wake()
        self._give_up()

    @abstractmethod
    def _give_up(self) -> None:
        """Tell the server to stop."""

    def _check_patience(self) -> None:
        self._timer = None
        if self._patience is None or self._is_idle:
            return
        waited = self._loop.time() - self._heard_at
        if waited >= self._patience and not self._is_paused:
            self.fail(Silence(self._patience))
        else:
            remaining = self._patience - waited if waited < self._patience else self._patience
            self._timer = self._loop.call_later(remaining, self._check_patience)
