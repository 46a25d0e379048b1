"""One answer of a provider, read as it comes. Knows time limits, sizes and codings; the pool knows the connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from autobot_llm.errors import ProviderError, ProviderTimeout, ProviderUnavailable
from autobot_llm.transport.content import BadContent, Inflater, inflater_for
from autobot_llm.transport.exchange import BrokenConnection, Exchange, Request, Silence
from autobot_llm.transport.upload import FileBody

if TYPE_CHECKING:
    from autobot_llm.transport.pool import HttpPool

MAX_ERROR_BYTES = 64 * 1024
_END_GRACE = 0.1  # seconds that the framing's end may take after the answer's, so that the connection is kept
_MOST_REPEATS = 3  # of a request that a server does not take


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long each part of an answer may take, in seconds: the connection, the first byte of the answer, and the
    silence between two pieces of it. The whole has a limit of its own, the request's. None waits for ever.
    """

    connect: float = 10.0
    first_token: float | None = 300.0
    read: float | None = 300.0


DEFAULT_TIMEOUTS = Timeouts()


class HttpStream:
    """One answer as it comes. `status` and `headers` (lower-case names) are there within the `async with` block.

    `is_reused` tells whether it came over a connection that was open before.
    """

    __slots__ = (
        "_exchange",
        "_inflated",
        "_inflater",
        "_is_first",
        "_may_repeat",
        "_num_bytes",
        "_pool",
        "_request",
        "_timeouts",
        "headers",
        "is_reused",
        "status",
    )

    def __init__(self, pool: HttpPool, request: Request, timeouts: Timeouts, *, may_repeat: bool) -> None:
        self._pool = pool
        self._request: Request | None = request
        self._timeouts = timeouts
        self._exchange: Exchange | None = None
        self._is_first = True
        self._may_repeat = may_repeat
        self._inflater: Inflater | None = None
        self._inflated: Iterator[bytes] | None = None
        self._num_bytes = 0
        self.is_reused = False
        self.status = 0
        self.headers: Mapping[str, str] = {}

    async def __aenter__(self) -> HttpStream:
        pool, timeouts = self._pool, self._timeouts
        request = self._request
        assert request is not None, "entered once"
        newer_than = 0.0
        num_repeats = 0
        while True:
            exchange = await pool.acquire(timeouts, newer_than=newer_than)
            self.is_reused = exchange.is_reused
            try:
                await self._send(exchange, request)
                await exchange.head()
                break
            except BrokenConnection as exc:
                pool.release(exchange)
                if num_repeats == _MOST_REPEATS or not self._may_be_sent_again(exc):
                    may_have_begun = not exc.is_unprocessed
                    message = f"{pool.name} gave no answer: {exc}"
                    raise ProviderUnavailable(message, may_have_begun=may_have_begun) from exc
                if exc.is_stale:
                    newer_than = asyncio.get_running_loop().time()
                num_repeats += 1
            except Silence as exc:
                pool.release(exchange)
                raise ProviderTimeout(f"{pool.name} did not begin to answer within {exc.seconds:g} s") from exc
            except BaseException:
                pool.release(exchange)
                raise
        self._exchange = exchange
        self._request = None  # it may be large, and the answer long
        self.status, self.headers = exchange.status, exchange.headers
        if self.status >= 300:
            try:
                body = await self._error_body()
            finally:
                self._leave()
            raise pool.error_from(self.status, self.headers, body)
        return self

    async def _send(self, exchange: Exchange, request: Request) -> None:
        patience = self._timeouts.first_token
        if isinstance(request.body, FileBody):
            exchange.send(request, None)
            async with aclosing(request.body.pieces()) as pieces:
                await exchange.send_pieces(pieces, patience)
        else:
            exchange.send(request, patience)

    def _may_be_sent_again(self, failure: BrokenConnection) -> bool:
        """The server has not looked at it, or closed an idle connection just as it went out, before any answer."""
        return failure.is_unprocessed or (failure.is_stale and self.is_reused and self._may_repeat)

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            self._pool.release(exchange)

    async def read(self) -> bytes:
        """More of the decoded body, all that has come since the last call; b"" at its end.

        Raises ProviderTimeout for a silence longer than allowed, and ProviderError for an answer that breaks off, is
        too large or is not encoded as it says.
        """
        exchange, pool = self._exchange, self._pool
        assert exchange is not None, "read within the `async with` block"
        try:
            while True:
                if self._inflated is not None and (piece := next(self._inflated, b"")):
                    break
                piece = await exchange.read()
                if self._is_first:
                    self._is_first = False
                    exchange.set_patience(self._timeouts.read)
                    self._inflater = inflater_for(self.headers.get("content-encoding", ""))
                if self._inflater is None or not piece:
                    break
                self._inflated = self._inflater.pieces(piece)
        except Silence as exc:
            raise ProviderTimeout(f"{pool.name} fell silent for {exc.seconds:g} s within its answer") from exc
        except BrokenConnection as exc:
            raise ProviderError(f"{pool.name} broke its answer off: {exc}") from exc
        except BadContent as exc:
            raise ProviderError(f"{pool.name}: {exc}") from exc
        self._num_bytes += len(piece)
        if self._num_bytes > pool.limits.max_stream_bytes:
            raise ProviderError(f"{pool.name} sent more than {pool.limits.max_stream_bytes} bytes")
        return piece

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """What `read` returns, until the end."""
        while piece := await self.read():
            yield piece

    async def body(self, max_bytes: int) -> bytes:
        """The rest of the body. Raises ProviderError when it is larger than `max_bytes`."""
        parts: list[bytes] = []
        num_bytes = 0
        while piece := await self.read():
            num_bytes += len(piece)
            if num_bytes > max_bytes:
                raise ProviderError(f"{self._pool.name} sent an answer of more than {max_bytes} bytes")
            parts.append(piece)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def end(self) -> None:
        """Say that the answer is complete though the body may not be: what follows is awaited for a moment only.

        Called after the last event of a stream, so that its connection can serve another request.
        """
        exchange = self._exchange
        assert exchange is not None, "ended within the `async with` block"
        try:
            async with asyncio.timeout(_END_GRACE):
                while await exchange.read():
                    pass
        except (TimeoutError, BrokenConnection, Silence):
            pass  # the answer is complete; the connection is closed instead of being kept

    async def _error_body(self) -> bytes:
        """What the provider says about its refusal, as much of it as comes soon and is worth reading."""
        said = b""
        try:
            async with asyncio.timeout(10):
                while len(said) <= MAX_ERROR_BYTES and (piece := await self.read()):
                    said += piece
        except (TimeoutError, ProviderError):
            pass  # the status says what there is to say
        return said
