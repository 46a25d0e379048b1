"""Ask a server from several connections at once and take the times. Knows just enough HTTP to tell an answer's end.

Closed loop: each connection asks again as soon as it has its answer. Every answer is looked at: one that is not what
the upstream sends ends the measurement with an error.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from gateways import wire

PATIENCE = 60.0  # seconds without a single answer
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_ANSWER = wire.ANSWER_TEXT.encode()
_numbers = itertools.count()  # no two prompts of a run are alike, whichever measurement sends them


class WrongAnswer(Exception):
    """A server did not send what the upstream sent it."""


@dataclass(slots=True)
class Answers:
    """What a load has got: seconds of each answer and of each first piece, pieces in all, and how long it took."""

    seconds: float = 0.0
    durations: list[float] = field(default_factory=list)
    first_pieces: list[float] = field(default_factory=list)
    num_pieces: int = 0


Check = Callable[[int, bytes], None]  # gets the status and everything that came, head included


def check_whole(status: int, data: bytes) -> None:
    if status != 200 or _ANSWER not in data:
        raise WrongAnswer(f"status {status}: {data[:600].decode('latin-1')}")


def check_whole_or_failed(status: int, data: bytes) -> None:
    if status not in (500, 502):  # the upstream's own, or a gateway's word for it
        check_whole(status, data)


def check_stream(num_pieces: int) -> Check:
    def check(status: int, data: bytes) -> None:
        if status != 200 or (got := data.count(wire.QUOTED_WORD)) != num_pieces:
            shown = f"{got} of {num_pieces} pieces" if status == 200 else f"status {status}"
            raise WrongAnswer(f"{shown}: {data[:400].decode('latin-1')} ... {data[-400:].decode('latin-1')}")

    return check


class Connection(asyncio.Protocol):
    """Sends what `take` gives until it gives None, and hands each answer to `got` with its times."""

    def __init__(
        self,
        take: Callable[[], bytes | None],
        got: Callable[[float, float | None, int, bytes], None],
        ended: Callable[[Exception | None], None],
    ) -> None:
        self._take, self._got, self._ended = take, got, ended
        self._parts: list[bytes] = []
        self._is_waiting = False
        self._failure: Exception | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._ask()

    def _ask(self) -> None:
        request = self._take()
        self._is_waiting = request is not None
        if request is None:
            self._transport.close()
            return
        self._parts = []
        self._num_bytes = 0
        self._wanted: int | None = None  # bytes of the whole answer, once the head tells
        self._is_chunked = False
        self._first_piece: float | None = None
        self._began = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._parts.append(data)
        self._num_bytes += len(data)
        if self._first_piece is None and wire.QUOTED_WORD in data:
            self._first_piece = time.perf_counter() - self._began
        if self._wanted is None and not self._is_chunked and not self._read_head():
            return
        if self._is_chunked:
            tail = data if len(data) >= len(_LAST_CHUNK) else b"".join(self._parts[-8:])
            is_complete = tail.endswith(_LAST_CHUNK)
        else:
            is_complete = self._wanted is not None and self._num_bytes >= self._wanted
        if is_complete:
            self._finish()

    def _read_head(self) -> bool:
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return False
        if (length := _LENGTH.search(data, 0, end)) is not None:
            self._wanted = end + 4 + int(length[1])
        elif _CHUNKED.search(data, 0, end) is not None:
            self._is_chunked = True
        else:
            self._fail(WrongAnswer(f"an answer without a length: {data[:300].decode('latin-1')}"))
            return False
        return True

    def _finish(self) -> None:
        took = time.perf_counter() - self._began
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        try:
            self._got(took, self._first_piece, int(data[9:12]), data)
        except WrongAnswer as error:
            self._fail(error)
            return
        self._ask()

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._failure is None and self._is_waiting:
            self._failure = WrongAnswer("the connection was closed within an answer")
        self._ended(self._failure or exc)


async def run(
    port: int,
    make: Callable[[int], bytes],
    check: Check,
    *,
    num_connections: int,
    seconds: float | None = None,
    num_requests: int | None = None,
    pieces: int = 0,
) -> Answers:
    """Ask for `seconds`, or `num_requests` times, over `num_connections`; what has begun is awaited.

    Raises WrongAnswer for an answer that `check` refuses, and TimeoutError where nothing comes.
    """
    loop = asyncio.get_running_loop()
    answers = Answers()
    all_ended = loop.create_future()
    num_open, num_sent = num_connections, 0
    began = time.perf_counter()
    until = began + seconds if seconds is not None else None

    def take() -> bytes | None:
        nonlocal num_sent
        if until is not None and time.perf_counter() >= until:
            return None
        if num_requests is not None and num_sent >= num_requests:
            return None
        num_sent += 1
        return make(next(_numbers))

    def got(took: float, first_piece: float | None, status: int, data: bytes) -> None:
        check(status, data)
        answers.durations.append(took)
        answers.seconds = time.perf_counter() - began
        if first_piece is not None:
            answers.first_pieces.append(first_piece)
            answers.num_pieces += pieces

    def ended(failure: Exception | None) -> None:
        nonlocal num_open
        num_open -= 1
        if failure is not None and not all_ended.done():
            all_ended.set_exception(failure)
        elif num_open == 0 and not all_ended.done():
            all_ended.set_result(None)

    transports: list[asyncio.Transport] = []
    try:
        for _ in range(num_connections):
            transport, _ = await loop.create_connection(lambda: Connection(take, got, ended), "127.0.0.1", port)
            transports.append(transport)
        async with asyncio.timeout((seconds or 0) + PATIENCE if num_requests is None else None):
            await all_ended
    finally:
        for transport in transports:
            transport.close()
    return answers
