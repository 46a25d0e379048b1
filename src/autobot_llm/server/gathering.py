"""A transport that sends what is written in one turn of the event loop with one call. Knows bytes only.

uvloop calls the system for each write at once. Pieces of several tokens that have come together, or the head and the
body of a reply, then cost a system call each: half the CPU time of a proxied piece (docs/results/gateway.md).
"""

from __future__ import annotations

import asyncio
from typing import Any

MOST_GATHERED = 64 * 1024  # bytes; the transport underneath tells a slow reader from there on


class GatheringTransport(asyncio.Transport):
    """Passes everything to `transport`: writes at the next turn of the loop, or when there are MOST_GATHERED bytes."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._gathered: list[bytes] = []
        self._num_bytes = 0

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if not self._gathered:
            self._loop.call_soon(self._flush)
        self._gathered.append(bytes(data))
        self._num_bytes += len(data)
        if self._num_bytes >= MOST_GATHERED:
            self._flush()

    def _flush(self) -> None:
        gathered = self._gathered
        if not gathered:  # it has been flushed since this was called for
            return
        self._gathered = []
        self._num_bytes = 0
        if not self._transport.is_closing():
            self._transport.write(gathered[0] if len(gathered) == 1 else b"".join(gathered))

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        self._gathered = []
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()
