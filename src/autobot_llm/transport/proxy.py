"""Which proxy a server is reached through, and the tunnel through it. Knows CONNECT; knows nothing of who set what.

What is passed by is written as in curl and Go: `example.com` (its subdomains too), `.example.com` (those only),
`10.1.2.3`, `10.0.0.0/8`, each with `:port` or without, and `*`. Loopback addresses are never asked through a proxy.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from autobot_llm.errors import ConfigurationError, ProviderError, ProviderUnavailable

_MOST_HEAD_BYTES = 64 * 1024
_DEFAULT_PORT = 80


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy. `authorization` is the value of its header, empty where it needs none."""

    host: str
    port: int
    authorization: str = ""

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def __repr__(self) -> str:
        return f"Proxy({self})"


def read_proxy(address: str) -> Proxy:
    """The proxy at `http://user:password@host:port`, user and scheme optional. Raises ConfigurationError."""
    url = urlsplit(address if "://" in address else f"http://{address}")
    try:
        host, port = url.hostname, url.port or _DEFAULT_PORT
    except ValueError as exc:
        raise ConfigurationError(f"the proxy's address is not valid: {exc}") from exc
    if url.scheme != "http" or not host:
        raise ConfigurationError("the proxy's address is not of the form http://user:password@host:port")
    if url.username is None:
        return Proxy(host, port)
    pair = f"{unquote(url.username)}:{unquote(url.password or '')}"
    return Proxy(host, port, "Basic " + base64.b64encode(pair.encode()).decode("ascii"))


@dataclass(frozen=True, slots=True)
class Proxies:
    """The proxies for https and http addresses, and the hosts that are reached without one."""

    https: Proxy | None = None
    http: Proxy | None = None
    passed_by: tuple[str, ...] = ()

    def of(self, host: str, port: int, *, is_tls: bool) -> Proxy | None:
        """The proxy through which `host` is reached, None where it is reached directly."""
        proxy = self.https if is_tls else self.http
        if proxy is None or _is_loopback(host) or any(_matches(entry, host, port) for entry in self.passed_by):
            return None
        return proxy


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return address.is_loopback if address is not None else host.lower().rstrip(".") == "localhost"


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def _matches(entry: str, host: str, port: int) -> bool:
    entry, host = entry.strip().lower(), host.lower().rstrip(".")
    if entry == "*":
        return True
    if "/" in entry:
        address = _address(host)
        try:
            return address is not None and address in ipaddress.ip_network(entry, strict=False)
        except ValueError:
            return False
    if _address(entry) is None:
        name, colon, wanted = entry.rpartition(":")
        if colon and wanted.isdigit():
            if int(wanted) != port:
                return False
            entry = name
    if (own := _address(entry)) is not None:
        return own == _address(host)
    domain = entry.removeprefix("*").rstrip(".")
    if domain.startswith("."):
        return host.endswith(domain)
    return bool(domain) and (host == domain or host.endswith(f".{domain}"))


async def open_tunnel(sock: socket.socket, proxy: Proxy, host: str, port: int, name: str) -> None:
    """Have `proxy`, to which `sock` is connected, pass everything on to `host`. Raises ProviderError and OSError.

    A refusal is final (ProviderError); that the proxy cannot reach the host may pass (ProviderUnavailable).
    """
    loop = asyncio.get_running_loop()
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    authorization = f"proxy-authorization: {proxy.authorization}\r\n" if proxy.authorization else ""
    asked = f"CONNECT {authority} HTTP/1.1\r\nhost: {authority}\r\n{authorization}user-agent: autobot_llm\r\n\r\n"
    await loop.sock_sendall(sock, asked.encode("ascii"))
    head = b""
    while b"\r\n\r\n" not in head:
        piece = await loop.sock_recv(sock, 4096)
        head += piece
        if not piece or len(head) > _MOST_HEAD_BYTES:
            raise ProviderUnavailable(f"{name}: the proxy {proxy} gave no answer", may_have_begun=False)
    first = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
    if len(first) < 2 or not first[0].startswith("HTTP/1.") or not first[1].isdigit():
        raise ProviderError(f"{name}: what answers at {proxy} is no HTTP proxy")
    status = int(first[1])
    if 200 <= status < 300:
        return
    words = f"{name}: the proxy {proxy} does not reach {authority}: {' '.join(first[1:])}"
    if status == 407:
        raise ProviderError(f"{words}; it asks for a user and a password: HTTPS_PROXY=http://user:password@{proxy}")
    if status >= 500:
        raise ProviderUnavailable(words, may_have_begun=False)
    raise ProviderError(words)
