"""Keep what a child process prints, within bounds. Knows files and lines; knows nothing of the process."""

from __future__ import annotations

from collections import deque
from pathlib import Path

NUM_LAST_LINES = 40
MAX_LINE = 2000  # characters of a line that are remembered; the file has them all


class BoundedLog:
    """A file of at most `max_bytes`, with one older file beside it, and the last lines in memory.

    The older half goes when the file is full: `path` is then moved to `path`.1 and begun anew.
    """

    def __init__(self, path: Path, max_bytes: int = 8 * 2**20) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._max_bytes = max_bytes // 2
        self._last: deque[str] = deque(maxlen=NUM_LAST_LINES)
        self._rest = b""
        self._rotate()

    def write(self, data: bytes) -> None:
        if self._num_bytes and self._num_bytes + len(data) > self._max_bytes:
            self._file.close()
            self._rotate()
        self._file.write(data[-self._max_bytes :])
        self._num_bytes += len(data)
        *lines, rest = (self._rest + data).replace(b"\r", b"\n").split(b"\n")
        self._rest = rest[-MAX_LINE:]
        self._last.extend(line[:MAX_LINE].decode("utf-8", "replace") for line in lines if line.strip())

    def _rotate(self) -> None:
        if self.path.exists():
            self.path.replace(self.path.with_name(self.path.name + ".1"))
        self._file = self.path.open("wb", buffering=0)
        self._num_bytes = 0

    @property
    def last_line(self) -> str:
        return self._last[-1] if self._last else ""

    def tail(self, num_lines: int) -> list[str]:
        """The last lines, the one that is not complete yet included."""
        unfinished = [self._rest.decode("utf-8", "replace")] if self._rest.strip() else []
        return [*self._last, *unfinished][-num_lines:]

    def close(self) -> None:
        self._file.close()
