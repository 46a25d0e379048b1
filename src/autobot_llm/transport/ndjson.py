"""Cut a byte stream into lines of JSON. Knows line ends; knows nothing of what a line says.

Format: one JSON text per line, https://github.com/ndjson/ndjson-spec.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

from autobot_llm.errors import ProviderError

MAX_LINE_BYTES = 16 * 2**20


class LineParser:
    """Takes bytes cut at any place and gives whole lines, without their ends; empty ones are skipped."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._num_bytes = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """The lines that `chunk` completes. Raises ProviderError for one larger than MAX_LINE_BYTES."""
        self._pieces.append(chunk)
        self._num_bytes += len(chunk)
        lines: list[bytes] = []
        if b"\n" in chunk:
            *lines, rest = b"".join(self._pieces).split(b"\n")
            self._pieces = [rest]
            self._num_bytes = len(rest)
        if self._num_bytes > MAX_LINE_BYTES:
            raise ProviderError(f"the provider sent a line larger than {MAX_LINE_BYTES} bytes")
        return [line for line in map(bytes.strip, lines) if line]

    def last(self) -> bytes:
        """What came after the last line end: the last line, where the stream ends without one."""
        return b"".join(self._pieces).strip()


async def lines(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The lines of a stream of bytes, the last one also without its end. Raises ProviderError for one too long."""
    parser = LineParser()
    async for chunk in chunks:
        for line in parser.feed(chunk):
            yield line
    if last := parser.last():
        yield last
