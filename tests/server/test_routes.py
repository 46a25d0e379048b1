"""Each path is answered, and refused, in the dialect that it belongs to."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from autobot_llm.observability.metrics import RequestRecord
from autobot_llm.server.asgi import Exchange, Message
from autobot_llm.server.routes import GET, Api, ErrorFormat, Route, RouteTable


async def handler(exchange: Exchange, record: RequestRecord) -> None:
    raise NotImplementedError


def errors(name: bytes) -> ErrorFormat:
    return ErrorFormat(lambda error: name, lambda error: name)


ONE, TWO, UNKNOWN = errors(b"one"), errors(b"two"), Route("unknown", (), handler)
TABLE = RouteTable(
    (
        Api((Route("/v1/models", GET, handler), Route("/v1/models/{id}", GET, handler)), ONE, prefix=""),
        Api((Route("/v1/models", GET, handler, only_with=b"two-version"),), TWO, prefix="/two/"),
    ),
    UNKNOWN,
)


def exchange(path: str, *headers: tuple[bytes, bytes]) -> Exchange:
    async def receive() -> Message:
        raise NotImplementedError

    async def send(message: Message) -> None:
        raise NotImplementedError

    return Exchange({"method": "GET", "path": path, "headers": headers}, receive, send, "r")


@pytest.mark.parametrize(
    ("path", "headers", "route", "format"),
    [
        ("/v1/models", (), "/v1/models", ONE),
        ("/v1/models", ((b"two-version", b"1"),), "/v1/models", TWO),
        ("/v1/models/a/b", (), "/v1/models/{id}", ONE),
        ("/v2/models", (), "unknown", ONE),
        ("/two/nothing", (), "unknown", TWO),
    ],
)
def test_a_path_leads_to_its_route_and_to_the_errors_of_its_dialect(
    path: str, headers: Sequence[tuple[bytes, bytes]], route: str, format: ErrorFormat
) -> None:
    found, found_format = TABLE.find(exchange(path, *headers))
    assert (found.path, found_format) == (route, format)


def test_the_table_lists_every_path_once() -> None:
    assert TABLE.paths == ["/v1/models", "/v1/models/{id}"]
