"""Make a connection to one server: name, addresses, proxy, TLS, and which HTTP is spoken. Knows nothing of requests.

Several addresses are tried as RFC 8305 has it (happy eyeballs): the next one when the one before it fails, or has not
answered for a moment.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiohappyeyeballs import start_connection

from autobot_llm.errors import ProviderError, ProviderUnavailable
from autobot_llm.transport import http1
from autobot_llm.transport.network import Network
from autobot_llm.transport.proxy import open_tunnel

if TYPE_CHECKING:
    from autobot_llm.transport import http2

NEXT_ADDRESS_SECONDS = 0.25  # that an address has before the next one is tried beside it (RFC 8305: 250 ms)
_HTTP2, _HTTP1 = "h2", "http/1.1"


class Dialer:
    """Connects to `host`, directly or through the proxy that `network` has for it.

    `offers_http2` may be set to False when the server has asked for the older version. `tls`, where it is given, is
    told which protocols to offer.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        is_tls: bool,
        tls: ssl.SSLContext | None,
        network: Network,
        name: str,
        make_http1: Callable[[], http1.Connection],
        make_http2: Callable[[], http2.Connection],
    ) -> None:
        self._host = host
        self._port = port
        self._is_tls = is_tls
        self._tls = tls
        self._network = network
        self._name = name
        self._make_http1 = make_http1
        self._make_http2 = make_http2
        self.proxy = network.proxies.of(host, port, is_tls=is_tls)
        self.offers_http2 = is_tls and network.http_version != "1.1"

    async def dial(self, seconds: float) -> http1.Connection | http2.Connection:
        """A connection, within `seconds`. Raises ProviderUnavailable, and ProviderError where a proxy refuses."""
        where = f"{self._host}:{self._port}" + (f" through the proxy {self.proxy}" if self.proxy else "")
        try:
            async with asyncio.timeout(seconds):
                return await self._dialled()
        except TimeoutError as exc:
            message = f"{self._name} could not be reached at {where} within {seconds:g} s"
            raise ProviderUnavailable(message, may_have_begun=False) from exc
        except (OSError, UnicodeError) as exc:
            message = f"{self._name} cannot be reached at {where}: {exc}"
            raise ProviderUnavailable(message, may_have_begun=False) from exc

    async def _dialled(self) -> http1.Connection | http2.Connection:
        tls = await self._context() if self._is_tls else None
        proxy = self.proxy
        sock = await self._connected(*((proxy.host, proxy.port) if proxy else (self._host, self._port)))
        if proxy is not None and tls is not None:
            try:
                await open_tunnel(sock, proxy, self._host, self._port, self._name)
            except BaseException:
                sock.close()
                raise
        if tls is None:
            connection = self._make_http1()
            await self._spoken(lambda: connection, sock, connection.close)
            return connection
        choice = _Choice(self._make_http1, self._make_http2)
        await self._spoken(lambda: choice, sock, choice.close, ssl=tls, server_hostname=self._host)
        chosen = choice.chosen
        assert chosen is not None, "the handshake is over"
        if self._network.http_version == "2" and isinstance(chosen, http1.Connection):
            chosen.close()
            raise ProviderError(
                f"{self._name} does not speak HTTP/2 at {self._host}:{self._port}: AUTOBOT_CLOUD_HTTP_VERSION=2 "
                f"accepts nothing else, auto would"
            )
        return chosen

    async def _connected(self, host: str, port: int) -> socket.socket:
        addresses = await self._network.resolve(host, port)
        if not addresses:
            raise OSError(f"{host} has no address")
        return await start_connection(addresses, happy_eyeballs_delay=NEXT_ADDRESS_SECONDS, interleave=1)

    async def _spoken(
        self, factory: Callable[[], asyncio.Protocol], sock: socket.socket, give_up: Callable[[], None], **tls: Any
    ) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await asyncio.get_running_loop().create_connection(factory, sock=sock, **tls)
        except BaseException:
            give_up()  # it may have been made just before
            raise

    async def _context(self) -> ssl.SSLContext:
        protocols = (_HTTP2,) if self._network.http_version == "2" else (_HTTP2, _HTTP1)
        if not self.offers_http2:
            protocols = (_HTTP1,)
        if self._tls is None:
            return await asyncio.to_thread(_default_tls, protocols)
        self._tls.set_alpn_protocols(list(protocols))
        return self._tls


class _Choice(asyncio.Protocol):
    """Holds the place of the protocol that TLS is yet to choose, and leaves it to the one that was chosen."""

    def __init__(self, make_http1: Callable[[], http1.Connection], make_http2: Callable[[], http2.Connection]) -> None:
        self._make_http1 = make_http1
        self._make_http2 = make_http2
        self.chosen: http1.Connection | http2.Connection | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        protocol = transport.get_extra_info("ssl_object").selected_alpn_protocol()
        self.chosen = self._make_http2() if protocol == _HTTP2 else self._make_http1()
        transport.set_protocol(self.chosen)
        self.chosen.connection_made(transport)

    def close(self) -> None:
        if self.chosen is not None:
            self.chosen.close()


@functools.cache
def _default_tls(protocols: tuple[str, ...]) -> ssl.SSLContext:
    """Trusts what the system trusts, or the file that SSL_CERT_FILE names, which OpenSSL itself reads."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(list(protocols))
    return context
