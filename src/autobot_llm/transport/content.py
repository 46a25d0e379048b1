"""Undo a body's content coding without ever holding more than a small piece of it. Knows bytes only.

We ask for no coding at all: an answer is small, and a token's chunk is smaller than what compressing it costs. A
server that compresses all the same is understood.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

PIECE = 64 * 1024  # most bytes made of compressed ones at a time, whatever a bomb would unfold to


class BadContent(Exception):
    """The body is not what its content-encoding says, or that coding is unknown."""


class Inflater:
    """Decodes gzip and deflate, piece by piece."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)  # tells the two apart by their headers

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """What `data` adds. Raises BadContent."""
        try:
            while data and not self._inflate.eof:
                if piece := self._inflate.decompress(data, PIECE):
                    yield piece
                data = self._inflate.unconsumed_tail
        except zlib.error as exc:
            raise BadContent(f"the body is not compressed as it says: {exc}") from exc


def inflater_for(coding: str) -> Inflater | None:
    """What decodes the content-encoding `coding`; None where there is nothing to do. Raises BadContent."""
    coding = coding.strip().lower()
    if coding in ("", "identity"):
        return None
    if coding in ("gzip", "x-gzip", "deflate"):
        return Inflater()
    raise BadContent(f"the body is encoded with {coding!r}, which was not asked for")
