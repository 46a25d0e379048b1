"""A request's body that is read from disk as it is sent. Knows bytes; knows nothing of what they mean."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

PIECE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class FileBody:
    """The file at `path` with `before` and `after` around it. It may be read more than once, and must not change."""

    path: Path
    before: bytes = b""
    after: bytes = b""

    @property
    def num_bytes(self) -> int:
        return len(self.before) + self.path.stat().st_size + len(self.after)

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body, never more of it in memory than one piece."""
        if self.before:
            yield self.before
        with self.path.open("rb") as file:
            while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
                yield piece
        if self.after:
            yield self.after
