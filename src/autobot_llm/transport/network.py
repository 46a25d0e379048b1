"""How servers are reached: which HTTP over TLS, through which proxies, and who resolves names. Knows values only."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from autobot_llm.settings import Settings
from autobot_llm.transport.proxy import Proxies, read_proxy

HttpVersion = Literal["auto", "1.1", "2"]
# family, type, protocol, canonical name, address: as `socket.getaddrinfo` has them
AddressInfo = tuple[int, int, int, str, tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]]


class Resolver(Protocol):
    """Turns a name into addresses, the preferred first. Raises OSError."""

    async def __call__(self, host: str, port: int) -> Sequence[AddressInfo]: ...


async def system_addresses(host: str, port: int) -> Sequence[AddressInfo]:
    """What the system says, which follows its own settings and caches."""
    return await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """What a pool holds at most: connections in all and idle ones, and bytes of a decoded answer (whole, streamed).

    More than `max_idle` may be idle for `surplus_seconds`: requests that come in waves find their connections again.
    A connection older than `max_age_seconds` (None: no limit) is replaced by one that is made anew, name resolution
    included, so that a changed address is followed; what is under way on it is not disturbed.
    """

    max_connections: int = 100
    max_idle: int = 20
    idle_seconds: float = 60.0
    surplus_seconds: float = 2.0
    max_age_seconds: float | None = 300.0
    max_body_bytes: int = 64 * 2**20
    max_stream_bytes: int = 512 * 2**20

    @property
    def next_try_seconds(self) -> float:
        """How long an aged connection serves on, where no new one could be made, until that is tried again."""
        return min(30.0, self.max_age_seconds or 30.0)


@dataclass(frozen=True, slots=True)
class Network:
    """How a pool reaches its server.

    `http_version` counts over TLS: "auto" offers HTTP/2 and HTTP/1.1, the server chooses; "2" accepts nothing else.
    Without TLS it is always HTTP/1.1.
    """

    http_version: HttpVersion = "auto"
    proxies: Proxies = field(default_factory=Proxies)
    resolve: Resolver = system_addresses

    @classmethod
    def of(cls, settings: Settings) -> Network:
        """As the settings have it. Raises ConfigurationError for a proxy's address that is none."""
        return cls(
            http_version=settings.cloud_http_version,
            proxies=Proxies(
                https=read_proxy(settings.https_proxy) if settings.https_proxy else None,
                http=read_proxy(settings.http_proxy) if settings.http_proxy else None,
                passed_by=settings.no_proxy,
            ),
        )


DEFAULT_LIMITS = PoolLimits()
DEFAULT_NETWORK = Network()


def limits_of(settings: Settings) -> PoolLimits:
    """The limits of the pool of one provider."""
    return PoolLimits(
        max_connections=settings.cloud_connection_pool_size, max_age_seconds=settings.cloud_connection_max_age
    )
