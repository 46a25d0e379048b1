"""A pool of connections to one provider. Knows HTTP, time limits and sizes; knows nothing of what is asked.

The only module that knows how HTTP is spoken: by a small client of our own (`http1`), which costs less CPU time than
the libraries that were measured, and ends a stream when its reader is cancelled, which the fastest of them did not
(docs/dependencies.md).
"""

from __future__ import annotations

import asyncio
import base64
import functools
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit

from autobot_llm.errors import ConfigurationError, ProviderError, ProviderTimeout, ProviderUnavailable
from autobot_llm.transport.failures import error_from
from autobot_llm.transport.http1 import Connection
from autobot_llm.transport.stream import DEFAULT_TIMEOUTS, HttpStream, Timeouts
from autobot_llm.transport.upload import FileBody

__all__ = ["HttpAnswer", "HttpPool", "HttpStream", "PoolLimits", "Timeouts"]

_SECRET_HEADERS = ("authorization", "x-api-key", "api-key")
_SHORTEST_SECRET = 4
_UNSAFE_TARGET = re.compile(r"[^!-~]")
_UNSAFE_VALUE = re.compile(r"[\r\n\0]")


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """What a pool holds at most: connections in all and idle ones, and bytes of a decoded answer (whole, streamed).

    More than `max_idle` may be idle for `surplus_seconds`: requests that come in waves find their connections again.
    """

    max_connections: int = 100
    max_idle: int = 20
    idle_seconds: float = 60.0
    surplus_seconds: float = 2.0
    max_body_bytes: int = 64 * 2**20
    max_stream_bytes: int = 512 * 2**20


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
        limits: PoolLimits = PoolLimits(),  # frozen
        name: str,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.name = name
        self.limits = limits
        url, self._host, self._port = _parsed(base_url, name)
        self._is_tls = url.scheme == "https"
        self._tls = tls
        self._path = url.path.rstrip("/")
        self._query = f"?{url.query}" if url.query else ""
        own = {key.lower(): value for key, value in (headers or {}).items()}
        self._secrets = _secrets(own, url)
        common = {"host": url.netloc.rpartition("@")[2], "accept-encoding": "identity", "user-agent": "autobot_llm"}
        if url.username is not None:
            pair = f"{unquote(url.username)}:{unquote(url.password or '')}"
            common["authorization"] = "Basic " + base64.b64encode(pair.encode()).decode("ascii")
        self._head = _header_lines(common | own)
        self._slots = asyncio.Semaphore(limits.max_connections)
        self._idle: list[Connection] = []  # the latest used one is last
        self._open: set[Connection] = set()
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
        target = f"{self._path}{path}{self._query}"
        if _UNSAFE_TARGET.search(target):
            raise ProviderError(f"{self.name}: the path {target!r} cannot be asked for")
        parts = [f"{method} {target} HTTP/1.1\r\n".encode("ascii"), self._head]
        if headers:
            parts.append(_header_lines(headers))
        upload = body if isinstance(body, FileBody) else None
        if upload is not None:
            parts.append(b"content-length: %d\r\n\r\n" % upload.num_bytes)
        elif isinstance(body, bytes):
            parts += [b"content-length: %d\r\n\r\n" % len(body), body]
        else:
            parts.append(b"\r\n")
        return HttpStream(self, b"".join(parts), timeouts, may_repeat=may_repeat, upload=upload)

    async def close(self) -> None:
        """Close every connection; answers under way end with an error. May be called again."""
        self._is_closed = True
        self._idle.clear()
        if self._surplus is not None:
            self._surplus.cancel()
            self._surplus = None
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
            "num_idle_connections": len(self._idle),
            "num_connects": self._num_connects,
            "num_http_requests": self._num_requests,
        }

    # For HttpStream

    async def acquire(self, timeouts: Timeouts, *, fresh: bool) -> Connection:
        """A connection with nothing under way, which `release` must get back."""
        self._num_waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._num_waiting -= 1
        try:
            self._num_requests += 1
            return self._reused(fresh) or await self._connected(timeouts)
        except BaseException:
            self._slots.release()
            raise

    def release(self, connection: Connection) -> None:
        """Keep `connection` for another request if it can be, else close it."""
        self._slots.release()
        if self._is_closed or not connection.is_reusable:
            connection.close()
            return
        self._idle.append(connection)
        if len(self._idle) > self.limits.max_idle and self._surplus is None:
            loop = asyncio.get_running_loop()
            self._surplus = loop.call_later(self.limits.surplus_seconds, self._close_surplus)

    def _close_surplus(self) -> None:
        """Close the idle connections above the limit that have not been used for long enough, the oldest first."""
        self._surplus = None
        while len(self._idle) > self.limits.max_idle and self._idle[0].idle_seconds >= self.limits.surplus_seconds:
            self._idle.pop(0).close()
        if len(self._idle) > self.limits.max_idle:
            loop = asyncio.get_running_loop()
            self._surplus = loop.call_later(self.limits.surplus_seconds, self._close_surplus)

    def error_from(self, status: int, headers: Mapping[str, str], body: bytes) -> Exception:
        return error_from(status, headers, body, self.name, secrets=self._secrets)

    def _reused(self, fresh: bool) -> Connection | None:
        if self._is_closed:
            raise ProviderUnavailable(f"the connections to {self.name} are closed")
        if fresh or not self._idle:
            return None
        while self._idle and self._idle[0].idle_seconds > self.limits.idle_seconds:
            self._idle.pop(0).close()
        return self._idle.pop() if self._idle else None

    async def _connected(self, timeouts: Timeouts) -> Connection:
        loop = asyncio.get_running_loop()
        where = f"{self._host}:{self._port}"
        connection = Connection(self._lost)
        try:
            async with asyncio.timeout(timeouts.connect):
                tls = (self._tls or await asyncio.to_thread(_default_tls)) if self._is_tls else None
                await loop.create_connection(lambda: connection, self._host, self._port, ssl=tls)
        except asyncio.CancelledError:
            connection.close()  # it may have been made just before
            raise
        except TimeoutError as exc:
            connection.close()
            message = f"{self.name} could not be reached at {where} within {timeouts.connect:g} s"
            raise ProviderUnavailable(message, may_have_begun=False) from exc
        except (OSError, UnicodeError) as exc:
            raise ProviderUnavailable(f"{self.name} cannot be reached at {where}: {exc}", may_have_begun=False) from exc
        self._num_connects += 1
        if not connection.is_lost:
            self._open.add(connection)
        if self._is_closed:
            connection.close()
            raise ProviderUnavailable(f"the connections to {self.name} are closed")
        return connection

    def _lost(self, connection: Connection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if not self._open:
            self._all_lost.set()


def _parsed(base_url: str, name: str) -> tuple[SplitResult, str, int]:
    """The address, its host and its port. Raises ConfigurationError, which does not repeat a password."""
    try:
        url = urlsplit(base_url)
        port = url.port or (443 if url.scheme == "https" else 80)
    except ValueError as exc:
        raise ConfigurationError(f"{name}: the address is not valid: {exc}") from exc
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigurationError(f"{name}: the address is not of the form http(s)://host[:port][/path]")
    return url, url.hostname, port


def _secrets(headers: Mapping[str, str], url: SplitResult) -> tuple[str, ...]:
    """What must not be passed on when a provider repeats it; what is shorter than a word is no secret."""
    keys = [headers[name].removeprefix("Bearer ") for name in _SECRET_HEADERS if name in headers]
    return tuple(key for key in (*keys, unquote(url.password or "")) if len(key) >= _SHORTEST_SECRET)


def _header_lines(headers: Mapping[str, str]) -> bytes:
    for key, value in headers.items():
        if _UNSAFE_VALUE.search(key) or _UNSAFE_VALUE.search(value):
            raise ConfigurationError(f"the header {key!r} has a line end in its value")
    return "".join(f"{key}: {value}\r\n" for key, value in headers.items()).encode("utf-8")


@functools.cache
def _default_tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
