"""What every request of a pool has in common: where it goes, and the headers that go with it. Knows values only."""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit

from autobot_llm.errors import ConfigurationError
from autobot_llm.transport.exchange import Common
from autobot_llm.transport.proxy import Proxy

_SECRET_HEADERS = ("authorization", "x-api-key", "api-key")
_SHORTEST_SECRET = 4
_UNSAFE_VALUE = re.compile(r"[\r\n\0]")


@dataclass(frozen=True, slots=True)
class Origin:
    """A server, and what is put before (`path`) and after (`query`) the path of each request.

    `secrets` are what must not be passed on when the server repeats it.
    """

    host: str
    port: int
    is_tls: bool
    path: str
    query: str
    common: Common
    secrets: tuple[str, ...]

    def asked_of(self, proxy: Proxy | None) -> Origin:
        """The same where `proxy` gets the requests: without TLS they tell it the whole address (RFC 9112, 3.2.2)."""
        if proxy is None or self.is_tls:
            return self
        headers = dict(self.common.headers)
        if proxy.authorization:
            headers["proxy-authorization"] = proxy.authorization
        return dataclasses.replace(
            self, path=f"http://{headers['host']}{self.path}", common=Common(headers, header_lines(headers))
        )


def read_origin(base_url: str, headers: Mapping[str, str], name: str) -> Origin:
    """The origin at `base_url`. Raises ConfigurationError, which does not repeat a password."""
    try:
        url = urlsplit(base_url)
        port = url.port or (443 if url.scheme == "https" else 80)
    except ValueError as exc:
        raise ConfigurationError(f"{name}: the address is not valid: {exc}") from exc
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigurationError(f"{name}: the address is not of the form http(s)://host[:port][/path]")
    own = {key.lower(): value for key, value in headers.items()}
    common = {"host": url.netloc.rpartition("@")[2], "accept-encoding": "identity", "user-agent": "autobot_llm"}
    if url.username is not None:
        pair = f"{unquote(url.username)}:{unquote(url.password or '')}"
        common["authorization"] = "Basic " + base64.b64encode(pair.encode()).decode("ascii")
    return Origin(
        host=url.hostname,
        port=port,
        is_tls=url.scheme == "https",
        path=url.path.rstrip("/"),
        query=f"?{url.query}" if url.query else "",
        common=Common(common | own, header_lines(common | own)),
        secrets=_secrets(own, url),
    )


def _secrets(headers: Mapping[str, str], url: SplitResult) -> tuple[str, ...]:
    """What must not be passed on when a provider repeats it; what is shorter than a word is no secret."""
    keys = [headers[name].removeprefix("Bearer ") for name in _SECRET_HEADERS if name in headers]
    return tuple(key for key in (*keys, unquote(url.password or "")) if len(key) >= _SHORTEST_SECRET)


def header_lines(headers: Mapping[str, str]) -> bytes:
    for key, value in headers.items():
        if _UNSAFE_VALUE.search(key) or _UNSAFE_VALUE.search(value):
            raise ConfigurationError(f"the header {key!r} has a line end in its value")
    return "".join(f"{key}: {value}\r\n" for key, value in headers.items()).encode("utf-8")
