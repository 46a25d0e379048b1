"""Open SQLite files whose writes are on the disk when they return. Knows SQLite; knows nothing of what is written."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

_PAUSE = 0.02  # seconds


def open_durable(path: Path, patience: float) -> sqlite3.Connection:
    """The file at `path`, in WAL mode with synchronous=FULL; `patience` (seconds) is for others who write to it.

    Raises sqlite3.Error.
    """
    file = sqlite3.connect(path, timeout=patience)
    try:
        deadline = time.monotonic() + patience
        while True:
            try:
                file.execute("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError:
                # Two processes that make the file at the same moment: this one statement does not wait by itself.
                if time.monotonic() > deadline:
                    raise
                time.sleep(_PAUSE)
        file.execute("PRAGMA synchronous=FULL")
    except BaseException:
        file.close()
        raise
    return file
