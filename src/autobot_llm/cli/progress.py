"""Show that something slow is going on. Knows the terminal; knows nothing of what is slow."""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.status import Status

PATIENCE = 1.0  # seconds; quicker work is not worth a word


class Progress:
    """A context in which a message appears on stderr after `PATIENCE`, and goes away at its end.

    On a terminal it is a moving spinner, otherwise one line. It has a thread of its own, so that it also moves while
    the caller's thread is busy. `stop` may be called before the context ends, and more than once.
    """

    def __init__(self, message: str) -> None:
        self._message = message
        self._status: Status | None = None
        self._timer = threading.Timer(PATIENCE, self._show)
        self._timer.daemon = True

    def _show(self) -> None:
        if not sys.stderr.isatty():
            print(f"{self._message} ...", file=sys.stderr, flush=True)  # noqa: T201
            return
        from rich.console import Console

        self._status = Console(stderr=True).status(f"{self._message} ...")
        self._status.start()

    def advance(self, num_done: int, num_total: int) -> None:
        """Say how far the work is; may be called from any thread."""
        if (status := self._status) is not None:
            status.update(f"{self._message} ... {num_done / num_total:.0%}")

    def stop(self) -> None:
        self._timer.cancel()
        self._timer.join()
        if self._status is not None:
            self._status.stop()
            self._status = None

    def __enter__(self) -> Progress:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
