"""What an API is made of: its routes, and how it writes its errors. Knows HTTP; knows no wire format."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from autobot_llm.errors import InvalidRequestError, LLMError
from autobot_llm.observability.metrics import RequestRecord
from autobot_llm.server.asgi import Exchange

GET = ("GET", "HEAD")
POST = ("POST",)

Handler = Callable[[Exchange, RequestRecord], Awaitable[None]]


class PathNotFound(InvalidRequestError):
    """The path leads nowhere."""

    status = 404
    code = "not_found"


class MethodNotAllowed(InvalidRequestError):
    """The path exists, for other methods; `allowed` names them."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, method: str, path: str, methods: tuple[str, ...]) -> None:
        self.allowed = ", ".join(methods)
        super().__init__(f"{method} is not allowed on {path}; use {self.allowed}")


@dataclass(frozen=True, slots=True)
class Route:
    """Where requests to one path go; the path also labels them in the metrics.

    A path that ends in "{name}" stands for every path that begins like it. Where several APIs have the same path,
    one that names a lower-case header `only_with` gets the requests that carry it.
    """

    path: str
    methods: tuple[str, ...]
    handler: Handler
    needs_key: bool = True
    only_with: bytes | None = None


@dataclass(frozen=True, slots=True)
class ErrorFormat:
    """How a dialect writes an error: as the body of a reply, and as the last words of a stream that has begun."""

    body: Callable[[LLMError], bytes]
    event: Callable[[LLMError], bytes]


@dataclass(frozen=True, slots=True)
class Api:
    """The routes of one dialect. Errors on its routes, and on unknown paths that begin with `prefix`, are its own."""

    routes: Sequence[Route]
    errors: ErrorFormat
    prefix: str


class RouteTable:
    """Finds the route of a request, and the format of its errors. Where prefixes overlap, the longest one counts."""

    def __init__(self, apis: Sequence[Api], unknown: Route) -> None:
        self._exact: dict[str, list[tuple[Route, ErrorFormat]]] = {}
        self._begins: dict[str, list[tuple[Route, ErrorFormat]]] = {}
        for api in apis:
            for route in api.routes:
                begin, brace, _ = route.path.partition("{")
                table = self._begins if brace else self._exact
                table.setdefault(begin, []).append((route, api.errors))
        for same_path in (*self._exact.values(), *self._begins.values()):
            same_path.sort(key=lambda pair: pair[0].only_with is None)
        self._prefixes = sorted(((api.prefix, api.errors) for api in apis), key=lambda pair: -len(pair[0]))
        self._unknown = unknown

    @property
    def paths(self) -> list[str]:
        """Every path once, in the order of the APIs."""
        routes = [route for same in (*self._exact.values(), *self._begins.values()) for route, _ in same]
        return list(dict.fromkeys(route.path for route in routes))

    def find(self, exchange: Exchange) -> tuple[Route, ErrorFormat]:
        path = exchange.path
        candidates = self._exact.get(path)
        if candidates is None:
            candidates = next((same for begin, same in self._begins.items() if path.startswith(begin)), [])
        for route, errors in candidates:
            if route.only_with is None or exchange.header(route.only_with) is not None:
                return route, errors
        return self._unknown, next(errors for prefix, errors in self._prefixes if path.startswith(prefix))
