"""Cut a byte stream into server-sent events. Knows the event stream format; knows nothing of what an event says.

Specification: https://html.spec.whatwg.org/multipage/server-sent-events.html. `id` and `retry` serve reconnecting,
which an answer in progress does not survive, and are skipped.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

import msgspec

from autobot_llm.errors import ProviderError

MAX_EVENT_BYTES = 16 * 2**20
_BOM = b"\xef\xbb\xbf"


class SseEvent(msgspec.Struct, frozen=True, gc=False):
    """One event; `event` is empty where the stream names none, `data` has its lines joined by newlines."""

    event: str
    data: bytes


class SseParser:
    """Takes bytes cut at any place and gives whole events. An event that the stream's end cuts off is never given."""

    def __init__(self) -> None:
        self._line: list[bytes] = []  # the pieces of a line that has not ended
        self._event = ""
        self._data: list[bytes] = []
        self._num_data_bytes = 0  # of the lines in `_data`, their field names included
        self._num_bytes = 0  # of the event that has not ended
        self._is_first_line = True
        self._ended_in_return = False

    def feed(self, chunk: bytes) -> list[SseEvent]:
        """The events that `chunk` completes. Raises ProviderError for one larger than MAX_EVENT_BYTES."""
        if self._ended_in_return or b"\r" in chunk:
            chunk = self._with_newlines(chunk)
        self._line.append(chunk)
        self._num_bytes += len(chunk)
        events: list[SseEvent] = []
        if b"\n" in chunk:
            *lines, rest = b"".join(self._line).split(b"\n")
            self._line = [rest]
            if self._is_first_line:
                self._is_first_line = False
                lines[0] = lines[0].removeprefix(_BOM)
            for line in lines:
                if line.startswith(b"data: "):
                    self._data.append(line[6:])
                    self._num_data_bytes += len(line)
                elif line:
                    self._take(line)
                else:
                    if self._data:
                        events.append(SseEvent(self._event, b"\n".join(self._data)))
                        self._data = []
                        self._num_data_bytes = 0
                    self._event = ""
            self._num_bytes = len(rest) + self._num_data_bytes
        if self._num_bytes > MAX_EVENT_BYTES:
            raise ProviderError(f"the provider sent an event larger than {MAX_EVENT_BYTES} bytes")
        return events

    def _with_newlines(self, chunk: bytes) -> bytes:
        """Every line end as a newline. A return ends its line at once; a newline that follows it later adds nothing."""
        if self._ended_in_return and chunk:
            self._ended_in_return = False
            chunk = chunk.removeprefix(b"\n")
        if chunk.endswith(b"\r"):
            self._ended_in_return = True
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _take(self, line: bytes) -> None:
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(value[1:] if value.startswith(b" ") else value)
            self._num_data_bytes += len(line)
        elif field == b"event":
            self._event = (value[1:] if value.startswith(b" ") else value).decode("utf-8", "replace")


async def events(chunks: AsyncIterator[bytes]) -> AsyncGenerator[SseEvent, None]:
    """The events of a stream of bytes, cut at any place. Raises ProviderError for one larger than MAX_EVENT_BYTES."""
    parser = SseParser()
    async for chunk in chunks:
        for event in parser.feed(chunk):
            yield event
