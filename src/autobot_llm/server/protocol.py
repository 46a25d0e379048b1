"""uvicorn's HTTP/1.1 connection with its gaps closed. Knows the connection; knows nothing of the application."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from autobot_llm.server.gathering import GatheringTransport

MAX_HEADER_BYTES = 64 * 1024
MAX_PIPELINED = 8  # requests queued on a connection beyond which it is not read further


class BoundedHttpProtocol(HttpToolsProtocol):
    """Bounds a request's head, and tells a running request that its client left even if others are queued behind it.

    httptools keeps an endless header in memory. uvicorn 0.54 stops reading once a client pipelines a second request,
    and so is blind to its leaving, and then tells only the newest request: the first one would run on for nobody.
    What one turn of the event loop writes is sent with one call.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_head_bytes = 0
        self._is_reading_head = True
        self._unfinished: set[RequestResponseCycle] = set()

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
        self._unfinished = {cycle for cycle in self._unfinished if not cycle.response_complete} | {self.cycle}
        if len(self.pipeline) <= MAX_PIPELINED:
            self.flow.resume_reading()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._is_reading_head = True
        self._num_head_bytes = 0

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for cycle in self._unfinished:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self._unfinished = set()
