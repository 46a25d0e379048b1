"""The HTTP/2 connections of a pool, each shared by many requests. Knows who waits for room; bytes are the connection's.

One connection is made at a time, and all who need it wait for the same one: the first also tells which version the
server speaks.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autobot_llm.errors import LLMError, ProviderError, ProviderUnavailable

if TYPE_CHECKING:
    from autobot_llm.transport import http2, http2_stream

logger = logging.getLogger("autobot_llm.transport")


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    """Someone who waits for room on a connection that was made after `newer_than`."""

    ticket: int
    newer_than: float
    turn: asyncio.Future[None]


class SharedConnections:
    """Gives out exchanges on as few connections as will do.

    `make` makes a connection within so many seconds, or says None: the server speaks HTTP/1.1, and `is_needed` is then
    False. `may_make` tells whether there may be one more connection now. An aged connection that cannot be replaced
    goes on, and is tried to be again after `next_try_seconds`.
    """

    def __init__(
        self,
        make: Callable[[float], Awaitable[http2.Connection | None]],
        may_make: Callable[[], bool],
        *,
        idle_seconds: float,
        next_try_seconds: float,
        name: str,
    ) -> None:
        self._name = name
        self._make = make
        self._may_make = may_make
        self._idle_seconds = idle_seconds
        self._next_try_seconds = next_try_seconds
        self._connections: list[http2.Connection] = []  # those that take requests; the first is filled first
        self._waiters: list[_Waiter] = []  # who came first is first
        self._tickets = itertools.count(1)
        self._making: asyncio.Task[None] | None = None
        self._is_renewal = False
        self._is_closed = False
        self._most_streams: int | None = None  # on one connection, as the server last said
        self.is_needed = True

    @property
    def idle(self) -> list[http2.Connection]:
        """The connections with nothing under way, the one to be kept longest first."""
        return [connection for connection in self._connections if not connection.num_open]

    async def open(self, connect_seconds: float, *, newer_than: float) -> http2_stream.Stream | None:
        """An exchange on a connection made after `newer_than` (by the loop's clock); None: ask over HTTP/1.1.

        Raises what making a connection does.
        """
        ticket = 0
        while self.is_needed:
            if self._is_closed:
                raise ProviderUnavailable(f"the connections to {self._name} are closed")
            if ticket or not self._waiters:
                connection = self._with_room(newer_than, connect_seconds)
                if connection is not None:
                    return connection.open()
            ticket = ticket or next(self._tickets)
            await self._wait(connect_seconds, newer_than, ticket)
        return None

    def add(self, connection: http2.Connection) -> None:
        self.is_needed = True
        if connection.accepts and not connection.is_lost:
            connection.expect(self._most_streams)
            self._connections.append(connection)

    def speaks_http1(self) -> None:
        """The server does not want HTTP/2: who waits for it goes another way."""
        self.is_needed = False
        self._wake_all()

    def changed(self, connection: http2.Connection) -> None:
        """There may be more room on `connection` than before, or it takes no more requests, or is lost."""
        self._most_streams = connection.most_streams
        if not connection.accepts or connection.is_lost:
            if connection in self._connections:
                self._connections.remove(connection)
                self._wake_all()
        elif self._waiters:
            for _ in range(min(len(self._waiters), connection.most_streams - connection.num_open)):
                self._wake_one()

    async def close(self) -> None:
        """Give up what is being made. Connections are the pool's to close."""
        self._is_closed = True
        making = self._making
        self._wake_all()
        if making is not None:
            making.cancel()
            await asyncio.wait([making])

    def _with_room(self, newer_than: float, connect_seconds: float) -> http2.Connection | None:
        found = None
        for connection in tuple(self._connections):
            if not connection.num_open and connection.idle_seconds > self._idle_seconds:
                connection.retire()
                self._connections.remove(connection)
            elif connection.has_room and connection.made_at > newer_than:
                found = connection
                break
        if found is not None and found.expires_at <= asyncio.get_running_loop().time():
            self._renew(found, connect_seconds)
        return found

    def _renew(self, connection: http2.Connection, connect_seconds: float) -> None:
        """Make another one beside an aged connection, which goes on until there is one."""
        if self._making is None and self._may_make():
            self._is_renewal = True
            self._making = asyncio.create_task(self._made(connect_seconds, replaced=connection))

    async def _wait(self, connect_seconds: float, newer_than: float, ticket: int) -> None:
        waiter = _Waiter(ticket, newer_than, asyncio.get_running_loop().create_future())
        bisect.insort(self._waiters, waiter, key=lambda one: one.ticket)
        if self._making is None:
            self._making = asyncio.create_task(self._made(connect_seconds))
        try:
            await waiter.turn
        except asyncio.CancelledError:
            if waiter.turn.done() and not waiter.turn.cancelled():
                self._wake_one()  # the turn that it cannot take any more
            raise
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            if not self._waiters and self._making is not None and not self._is_renewal:
                self._making.cancel()

    async def _made(self, seconds: float, replaced: http2.Connection | None = None) -> None:
        failure: LLMError | None = None
        try:
            connection = await self._make(seconds)
            if connection is None:
                self.is_needed = False
            elif replaced is not None:
                if replaced in self._connections:
                    self._connections.remove(replaced)
                replaced.retire()
        except LLMError as exc:
            failure = exc
            if replaced is not None:
                logger.warning("an aged connection could not be replaced yet: %s", exc.message)
                replaced.expires_at = asyncio.get_running_loop().time() + self._next_try_seconds
        finally:
            self._making = None
            self._is_renewal = False
            self._wake_all(failure)

    def _wake_one(self) -> None:
        while self._waiters:
            turn = self._waiters.pop(0).turn
            if not turn.done():
                turn.set_result(None)
                return

    def _wake_all(self, failure: LLMError | None = None) -> None:
        """Let all who wait look again; those whom no connection could serve later get `failure`."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if waiter.turn.done():
                continue
            if failure is None:
                waiter.turn.set_result(None)
            elif any(connection.made_at > waiter.newer_than for connection in self._connections):
                self._waiters.append(waiter)  # a stream of it will end
            else:
                waiter.turn.set_exception(_again(failure))


def _again(failure: LLMError) -> LLMError:
    """The same failure for one more of those whom it met; an exception belongs to one."""
    if isinstance(failure, ProviderUnavailable):
        copy: LLMError = ProviderUnavailable(failure.message, may_have_begun=failure.may_have_begun)
    else:
        copy = ProviderError(failure.message)
    copy.__cause__ = failure
    return copy
