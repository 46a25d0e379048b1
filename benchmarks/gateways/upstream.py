"""A server of fixed answers that is far cheaper than any gateway: bytes made beforehand, no HTTP library, no JSON.

It answers `POST .../chat/completions` whole, or as a stream of `max_tokens` pieces: each piece is a write of its own,
one for every running stream in turn, as an engine that decodes a batch sends them. Without a pace it writes as fast as
its readers take them. `python -m gateways.upstream` prints its port and runs until it is killed.
"""

from __future__ import annotations

import asyncio
import re
from typing import cast

import uvloop

from gateways import wire

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_STREAM = re.compile(rb'"stream": ?true')
_INCLUDE_USAGE = re.compile(rb'"include_usage": ?true')
_NUM_PIECES = re.compile(rb'"max_(?:completion_)?tokens": ?(\d+)')
_PACE = re.compile(rb"pace=(\d+)ms")

_COUNT = f"GET {wire.COUNT} ".encode()
_WHOLE = wire.whole_answer()
_FAILURE = wire.failure()
_NO_MODELS = wire.no_models()
_BEGIN = wire.stream_begin()
_PIECES = wire.stream_pieces()
_ENDS = {include_usage: wire.stream_end(include_usage) for include_usage in (False, True)}


class Decoder:
    """The streams that run at full speed: each turn of the event loop gives every one of them a piece.

    And how many answers were asked for.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._streams: set[Answerer] = set()
        self._is_due = False
        self.num_asked = 0

    def add(self, stream: Answerer) -> None:
        self._streams.add(stream)
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._step)

    def discard(self, stream: Answerer) -> None:
        self._streams.discard(stream)

    def _step(self) -> None:
        for stream in tuple(self._streams):
            stream.send_piece()
        self._is_due = bool(self._streams)
        if self._is_due:
            self._loop.call_soon(self._step)


class Answerer(asyncio.Protocol):
    """One connection, with one request at a time."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._loop = asyncio.get_running_loop()
        self._buffer = b""
        self._num_left = 0
        self._pace: float | None = None
        self._end = b""
        self._is_paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer = data = self._buffer + data if self._buffer else data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return
        length = _LENGTH.search(data, 0, end)
        if len(data) < end + 4 + (int(length[1]) if length is not None else 0):
            return
        self._buffer = b""
        if data.startswith(_COUNT):
            self._transport.write(wire.number(self._decoder.num_asked))
            return
        if not data.startswith(b"POST"):
            self._transport.write(_NO_MODELS)
            return
        self._decoder.num_asked += 1
        if _STREAM.search(data, end) is not None:
            self._begin_stream(data)
        else:
            self._transport.write(_FAILURE if wire.FAIL.encode() in data else _WHOLE)

    def _begin_stream(self, request: bytes) -> None:
        num_pieces, pace = _NUM_PIECES.search(request), _PACE.search(request)
        self._num_left = int(num_pieces[1]) if num_pieces is not None else 10
        self._pace = int(pace[1]) / 1000 if pace is not None else None
        self._end = _ENDS[_INCLUDE_USAGE.search(request) is not None]
        self._transport.write(_BEGIN)
        self._go_on()

    def _go_on(self) -> None:
        if self._pace is not None:
            self._loop.call_later(self._pace, self.send_piece)
        else:
            self._decoder.add(self)

    def send_piece(self) -> None:
        """Write the next piece, and the end after the last one."""
        if self._transport.is_closing():
            self._decoder.discard(self)
            return
        self._num_left -= 1
        if self._num_left <= 0:
            self._decoder.discard(self)
            self._transport.write(_PIECES[0] + self._end)
            return
        self._transport.write(_PIECES[self._num_left % 2])
        if self._pace is not None:
            self._go_on()

    def pause_writing(self) -> None:
        self._decoder.discard(self)

    def resume_writing(self) -> None:
        if self._num_left > 0 and self._pace is None:
            self._decoder.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._decoder.discard(self)
        self._num_left = 0


async def serve() -> None:
    decoder = Decoder()
    server = await asyncio.get_running_loop().create_server(lambda: Answerer(decoder), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve())
