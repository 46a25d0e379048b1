"""uvicorn's HTTP/1.1 connection with its gaps closed. Knows the connection; knows nothing of the application."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from autobot_llm.server.asgi import DEPARTURE
from autobot_llm.server.gathering import GatheringTransport

MAX_HEADER_BYTES = 64 * 1024
MAX_PIPELINED = 8  # requests queued on a connection beyond which it is not read further


class _Departure:
    """Tells one listener that the client of a request has left before it had its answer."""

    __slots__ = ("_cycle", "_listener")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle: RequestResponseCycle | None = cycle
        self._listener: Callable[[], None] | None = None

    def listen(self, listener: Callable[[], None]) -> None:
        """To be used when the body has been read. Has the connection read on, or its end would not be noticed."""
        cycle = self._cycle
        if cycle is None:
            return
        self._listener = listener
        if cycle.disconnected:
            listener()
        else:
            cycle.flow.resume_reading()

    def is_over(self) -> bool:
        """Whether the request has its answer. What this holds leads back to it: left to the collector of garbage, it
        would cost each request a tenth of its time."""
        if self._cycle is not None and self._cycle.response_complete:
            self._cycle = self._listener = None
        return self._cycle is None

    def tell(self) -> None:
        assert self._cycle is not None, "only a request without an answer has a client to lose"
        self._cycle.disconnected = True
        self._cycle.message_event.set()
        if self._listener is not None:
            self._listener()


class BoundedHttpProtocol(HttpToolsProtocol):
    """Bounds a request's head, and tells a running request that its client left even if others are queued behind it.

    httptools keeps an endless header in memory. uvicorn 0.54 stops reading once a client pipelines a second request,
    and so is blind to its leaving, and then tells only the newest request: the first one would run on for nobody.
    What one turn of the event loop writes is sent with one call. A request's scope has a `DEPARTURE` among its
    extensions, so that no task is needed to wait for the client's leaving.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_head_bytes = 0
        self._is_reading_head = True
        self._departures: list[_Departure] = []  # of requests without an answer so far

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(GatheringTransport(transport))

    def data_received(self, data: bytes) -> None:
        if self._is_reading_head:
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self._is_reading_head and self._num_head_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The request's head is larger than {MAX_HEADER_BYTES} bytes.")

    def on_headers_complete(self) -> None:
        self._is_reading_head = False
        super().on_headers_complete()
        departure = _Departure(self.cycle)
        self.cycle.scope["extensions"] = {DEPARTURE: {"listen": departure.listen}}
        self._departures.append(departure)
        if len(self.pipeline) <= MAX_PIPELINED:
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        self._departures = [departure for departure in self._departures if not departure.is_over()]
        super().on_response_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._is_reading_head = True
        self._num_head_bytes = 0

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        departures, self._departures = self._departures, []
        for departure in departures:
            if not departure.is_over():
                departure.tell()
