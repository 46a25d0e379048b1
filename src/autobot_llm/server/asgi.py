"""One HTTP exchange over raw ASGI: read a bounded body, send a reply or a stream. Knows HTTP; knows nothing of models.

Specification: ASGI 3, https://asgi.readthedocs.io/en/latest/specs/www.html
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Literal

from autobot_llm.errors import RequestTimeout, RequestTooLarge

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]

JSON = b"application/json"
DEPARTURE = "autobot_llm.departure"  # our own server's ASGI extension: its `listen` takes who is to be told
BODY_TIMEOUT = 60.0  # seconds a client may take to send its body


class ClientDisconnected(Exception):
    """The client went away before it had its answer."""


class Exchange:
    """A request and its reply. `status` and `error_code` tell afterwards how it ended."""

    __slots__ = (
        "_receive",
        "_scope",
        "_send",
        "complete",
        "ended_by",
        "error_code",
        "method",
        "path",
        "request_id",
        "started",
        "status",
        "task",
        "tenant",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self.request_id = request_id
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.tenant = ""
        self.status = 500  # until a reply is sent
        self.error_code: str | None = None
        self.started = False
        self.complete = False
        self.ended_by: Literal["client", "shutdown"] | None = None
        self.task: asyncio.Task[Any] | None = None

    def header(self, name: bytes) -> bytes | None:
        """The first header of this lower-case name, or None."""
        headers: Iterable[Header] = self._scope["headers"]
        for key, value in headers:
            if key == name:
                return value
        return None

    async def body(self, max_bytes: int) -> bytes:
        """The whole body. Errors: `RequestTooLarge` over `max_bytes`, `RequestTimeout`, `ClientDisconnected`."""
        declared = self.header(b"content-length")
        # A body a little too long is read to its end and thrown away, so that the client, still sending, gets to
        # read the answer; one far too long is cut off.
        most_read = 2 * max_bytes
        if declared is not None and int(declared) > most_read:
            raise self._too_large(max_bytes)
        first = await self._body_part()
        if not first.get("more_body"):
            data: bytes = first["body"]
            if len(data) > max_bytes:
                raise self._too_large(max_bytes)
            return data
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                return await self._rest_of_body(first["body"], max_bytes, most_read)
        except TimeoutError as exc:
            raise RequestTimeout(f"the request's body did not arrive within {BODY_TIMEOUT:g} seconds") from exc

    async def _rest_of_body(self, first: bytes, max_bytes: int, most_read: int) -> bytes:
        parts, num_bytes, more = [first], len(first), True
        while more and num_bytes <= most_read:
            message = await self._body_part()
            part, more = message["body"], message.get("more_body", False)
            num_bytes += len(part)
            if num_bytes <= max_bytes:
                parts.append(part)
        if num_bytes > max_bytes:
            raise self._too_large(max_bytes)
        return b"".join(parts)

    async def _body_part(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        return message

    def _too_large(self, max_bytes: int) -> RequestTooLarge:
        return RequestTooLarge(f"the request's body is larger than AUTOBOT_MAX_BODY_BYTES={max_bytes}")

    def listen_for_disconnect(self, listener: Callable[[], None]) -> bool:
        """Have `listener` called when the client goes; False where only `wait_for_disconnect` tells.

        Both are to be used when the body has been read.
        """
        departure = self._scope.get("extensions", {}).get(DEPARTURE)
        if departure is None:
            return False
        departure["listen"](listener)
        return True

    async def wait_for_disconnect(self) -> None:
        """Return once the client has gone."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def cancel(self, ended_by: Literal["client", "shutdown"]) -> None:
        """Cancel the task that makes the answer, unless the answer is complete already."""
        if self.task is not None and not self.complete and self.ended_by is None:
            self.ended_by = ended_by
            self.task.cancel()

    async def reply(
        self, status: int, body: bytes, *, content_type: bytes = JSON, headers: Iterable[Header] = ()
    ) -> None:
        """Send a whole reply at once."""
        await self._start(status, content_type, (*headers, (b"content-length", b"%d" % len(body))))
        await self.write(body, more=False)

    async def start_stream(self, content_type: bytes, headers: Iterable[Header] = ()) -> None:
        """Send status 200 and the headers of a reply that `write` then sends in pieces."""
        await self._start(200, content_type, headers)

    async def _start(self, status: int, content_type: bytes, headers: Iterable[Header]) -> None:
        self.status = status
        self.started = True
        request_id = self.request_id.encode()
        # OpenAI's clients read the one name, Anthropic's the other.
        own = [(b"content-type", content_type), (b"x-request-id", request_id), (b"request-id", request_id)]
        await self._send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})

    async def write(self, data: bytes, *, more: bool) -> None:
        """Send a piece of the body, as soon as the client has room for it; `more=False` ends the reply."""
        self.complete = not more
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
