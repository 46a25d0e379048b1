"""A pool of connections to one provider. Knows how many there are and for how long; knows nothing of what is asked.

HTTP is spoken by a small client of our own (`http1`, `http2`), which costs less CPU time than the libraries that were
measured, and ends a stream when its reader is cancelled, which the fastest of them did not (docs/dependencies.md).
"""

from __future__ import annotations

import asyncio
import random
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from autobot_llm.errors import LLMError, ProviderError, ProviderTimeout, ProviderUnavailable
from autobot_llm.transport import http1
from autobot_llm.transport.dial import Dialer
from autobot_llm.transport.exchange import Exchange, Request
from autobot_llm.transport.failures import error_from
from autobot_llm.transport.network import DEFAULT_LIMITS, DEFAULT_NETWORK, Network, PoolLimits
from autobot_llm.transport.origin import header_lines, read_origin
from autobot_llm.transport.shared import SharedConnections
from autobot_llm.transport.stream import DEFAULT_TIMEOUTS, HttpStream, Timeouts
from autobot_llm.transport.upload import FileBody

if TYPE_CHECKING:
    from autobot_llm.transport import http2, http2_stream

__all__ = ["HttpAnswer", "HttpPool", "HttpStream", "Network", "PoolLimits", "Timeouts"]

_UNSAFE_TARGET = re.compile(r"[^!-~]")


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """A whole answer with a status under 300; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class HttpPool:
    """Connections to the server at `base_url`, opened when they are needed and kept for the next request.

    `base_url` may have a path, which is put before every request's, and a query, which is put after it. `name` stands
    for the provider in errors. A user and a password in the address are sent as such, unless `headers` have an
    authorization. `tls` replaces the default context, which trusts what the system trusts. `headers` go
    with every request; API keys among them are taken out of what a provider says. Belongs to one event loop.
    """

    def __init__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str] | None = None,
        limits: PoolLimits = DEFAULT_LIMITS,
        network: Network = DEFAULT_NETWORK,
        name: str,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.name = name
        self.limits = limits
        origin = read_origin(base_url, headers or {}, name)
        self._dialer = Dialer(
            origin.host,
            origin.port,
            is_tls=origin.is_tls,
            tls=tls,
            network=network,
            name=name,
            make_http1=self._http1,
            make_http2=self._http2,
        )
        self._origin = origin.asked_of(self._dialer.proxy)
        self._slots = asyncio.Semaphore(limits.max_connections)
        self._idle: list[http1.Connection] = []  # the latest used one is last
        self._open: set[http1.Connection | http2.Connection] = set()
        self._shared = SharedConnections(
            self._make_shared,
            lambda: not self._slots.locked(),
            idle_seconds=limits.idle_seconds,
            next_try_seconds=limits.next_try_seconds,
            name=name,
        )
        self._shared.is_needed = self._dialer.offers_http2
        self._dials: set[asyncio.Task[http1.Connection | http2.Connection]] = set()
        self._all_lost = asyncio.Event()
        self._surplus: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._num_waiting = 0
        self._num_connects = 0
        self._num_requests = 0

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes | FileBody | None = None,
        headers: Mapping[str, str] | None = None,
        may_repeat: bool = True,
        timeout: float | None = 30.0,  # noqa: ASYNC109  # it bounds the whole exchange, retry included
    ) -> HttpAnswer:
        """The whole answer, within `timeout` seconds (None: no limit) and the size that the pool allows.

        Raises what `failures.error_from` makes of a status of 300 and more, ProviderUnavailable, ProviderTimeout, and
        ProviderError for an answer that breaks off, is too large or is no HTTP.
        """
        patience = Timeouts(first_token=timeout, read=timeout)
        try:
            async with asyncio.timeout(timeout):
                async with self.stream(
                    method, path, body=body, headers=headers, timeouts=patience, may_repeat=may_repeat
                ) as answer:
                    data = await answer.body(self.limits.max_body_bytes)
                    return HttpAnswer(answer.status, answer.headers, data)
        except TimeoutError as exc:
            raise ProviderTimeout(f"{self.name} did not answer within {timeout:g} s") from exc

    def stream(
        self,
        method: str,
        path: str,
        *,
        body: bytes | FileBody | None = None,
        headers: Mapping[str, str] | None = None,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
        may_repeat: bool = True,
    ) -> HttpStream:
        """An answer to be read as it comes: `async with pool.stream(...) as answer`. Raises what `request` does.

        A kept connection may be closed by the server just as the request goes out over it. The request is then sent
        again over a new one, unless `may_repeat` is False: the server may as well have failed at its work.

        Leaving the block before the answer's end closes the connection at once, and so ends the work behind it.
        """
        origin = self._origin
        target = f"{origin.path}{path}{origin.query}"
        if _UNSAFE_TARGET.search(target):
            raise ProviderError(f"{self.name}: the path {target!r} cannot be asked for")
        lines = header_lines(headers) if headers else b""
        self._num_requests += 1
        request = Request(method, target, origin.common, headers, lines, body)
        return HttpStream(self, request, timeouts, may_repeat=may_repeat)

    async def warm(self, seconds: float = DEFAULT_TIMEOUTS.connect) -> None:
        """Have a connection ready before the first request, within `seconds`. Raises what `request` does."""
        if self._open or self._is_closed:
            return
        exchange = await self.acquire(Timeouts(connect=seconds), newer_than=0.0)
        if isinstance(exchange, http1.Connection):
            self._slots.release()
            self._keep(exchange)
        else:
            self.release(exchange)

    async def close(self) -> None:
        """Close every connection; answers under way end with an error. May be called again."""
        self._is_closed = True
        self._idle.clear()
        if self._surplus is not None:
            self._surplus.cancel()
            self._surplus = None
        await self._shared.close()
        if dials := tuple(self._dials):
            for dial in dials:
                dial.cancel()
            await asyncio.wait(dials)
        for connection in tuple(self._open):
            connection.close()
        if self._open:
            self._all_lost.clear()
            await self._all_lost.wait()

    def metrics(self) -> dict[str, float]:
        """Figures: requests that wait for a connection, open and idle connections, connections and requests made."""
        return {
            "num_waiting_requests": self._num_waiting,
            "num_connections": len(self._open),
            "num_idle_connections": len(self._idle) + len(self._shared.idle),
            "num_connects": self._num_connects,
            "num_http_requests": self._num_requests,
        }

    # For HttpStream

    async def acquire(self, timeouts: Timeouts, *, newer_than: float) -> Exchange:
        """An exchange to be sent, which `release` must get back.

        `newer_than` is a time of the loop's clock: a connection that failed then is not the only stale one, so above 0
        idle ones are left alone, and a shared one must have been made later.
        """
        self._num_waiting += 1
        try:
            if self._shared.is_needed:
                if self._is_closed:
                    raise self._closed()
                stream = await self._shared.open(timeouts.connect, newer_than=newer_than)
                if stream is not None:
                    return stream
            await self._slots.acquire()
        finally:
            self._num_waiting -= 1
        try:
            connection = self._reused(newer_than > 0)
            if connection is None:
                connection = await self._connected(timeouts.connect)
            elif connection.is_aged:
                connection = await self._renewed(connection, timeouts.connect)
        except BaseException:
            self._slots.release()
            raise
        if connection is not None:
            return connection
        return await self.acquire(timeouts, newer_than=newer_than)  # the server has come to speak HTTP/2

    def release(self, exchange: Exchange) -> None:
        """Keep the connection of `exchange` for another request if it can be, else close it."""
        if isinstance(exchange, http1.Connection):
            self._slots.release()
            if self._is_closed or not exchange.is_reusable:
                exchange.close()
                return
            exchange.is_reused = True
            self._idle.append(exchange)
            if len(self._idle) > self.limits.max_idle:
                self._close_surplus_later()
            return
        stream = cast("http2_stream.Stream", exchange)
        stream.leave()
        if stream.connection.needs_http1:
            self._dialer.offers_http2 = False
            self._shared.speaks_http1()
        if len(self._shared.idle) > self.limits.max_idle:
            self._close_surplus_later()

    def error_from(self, status: int, headers: Mapping[str, str], body: bytes) -> Exception:
        return error_from(status, headers, body, self.name, secrets=self._origin.secrets)

    # Making and keeping connections

    def _http1(self) -> http1.Connection:
        return http1.Connection(self._lost)

    def _http2(self) -> http2.Connection:
        from autobot_llm.transport import http2  # most servers of this kind are never asked

        return http2.Connection(self._shared.changed, self._lost_shared)

    def _reused(self, is_refused: bool) -> http1.Connection | None:
        if self._is_closed:
            raise self._closed()
        if is_refused or not self._idle:
            return None
        while self._idle and self._idle[0].idle_seconds > self.limits.idle_seconds:
            self._idle.pop(0).close()
        return self._idle.pop() if self._idle else None

    async def _connected(self, seconds: float) -> http1.Connection | None:
        """A new connection for the slot that is held; None where it became an HTTP/2 one, which has the slot now."""
        connection = await self._dialled(seconds)
        if isinstance(connection, http1.Connection):
            return connection
        self._share(connection)
        return None

    async def _renewed(self, aged: http1.Connection, seconds: float) -> http1.Connection | None:
        """A new connection instead of `aged`, which serves once more where none can be made."""
        try:
            connection = await self._connected(seconds)
        except LLMError:
            if aged.is_lost:
                raise
            aged.expires_at = asyncio.get_running_loop().time() + self.limits.next_try_seconds
            return aged
        except BaseException:
            self._keep(aged)
            raise
        aged.close()
        return connection

    async def _make_shared(self, seconds: float) -> http2.Connection | None:
        """A new HTTP/2 connection, with a slot of its own; None where it became one for a single exchange."""
        await self._slots.acquire()
        try:
            connection = await self._dialled(seconds)
        except BaseException:
            self._slots.release()
            raise
        if isinstance(connection, http1.Connection):
            self._slots.release()
            self._keep(connection, is_used=False)
            return None
        self._share(connection)
        return connection

    def _share(self, connection: http2.Connection) -> None:
        if connection.is_lost:
            self._slots.release()
        else:
            self._shared.add(connection)

    async def _dialled(self, seconds: float) -> http1.Connection | http2.Connection:
        dial = asyncio.create_task(self._dialer.dial(seconds))
        self._dials.add(dial)
        try:
            connection = await dial
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._is_closed and task is not None and not task.cancelling():
                raise self._closed() from None
            raise
        finally:
            self._dials.discard(dial)
        self._num_connects += 1
        if self.limits.max_age_seconds is not None:  # not all at once, where all were made at once
            now = asyncio.get_running_loop().time()
            connection.expires_at = now + self.limits.max_age_seconds * random.uniform(0.9, 1.0)
        if self._is_closed:
            connection.close()
            raise self._closed()
        if not connection.is_lost:
            self._open.add(connection)
        return connection

    def _keep(self, connection: http1.Connection, *, is_used: bool = True) -> None:
        if connection.is_lost:
            return
        connection.is_reused = is_used
        self._idle.append(connection)
        if len(self._idle) > self.limits.max_idle:
            self._close_surplus_later()

    def _close_surplus_later(self) -> None:
        if self._surplus is None and not self._is_closed:
            loop = asyncio.get_running_loop()
            self._surplus = loop.call_later(self.limits.surplus_seconds, self._close_surplus)

    def _close_surplus(self) -> None:
        """Close the idle connections above the limit that have not been used for long enough, the oldest first."""
        self._surplus = None
        most, patience = self.limits.max_idle, self.limits.surplus_seconds
        while len(self._idle) > most and self._idle[0].idle_seconds >= patience:
            self._idle.pop(0).close()
        shared = self._shared.idle
        for connection in shared[most:]:
            if connection.idle_seconds >= patience:
                connection.retire()
        if len(self._idle) > most or len(self._shared.idle) > most:
            self._close_surplus_later()

    def _lost(self, connection: http1.Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)
        self._forget(connection)

    def _lost_shared(self, connection: http2.Connection) -> None:
        if connection in self._open:
            self._slots.release()
        self._shared.changed(connection)
        self._forget(connection)

    def _forget(self, connection: http1.Connection | http2.Connection) -> None:
        self._open.discard(connection)
        if not self._open:
            self._all_lost.set()

    def _closed(self) -> ProviderUnavailable:
        return ProviderUnavailable(f"the connections to {self.name} are closed")
