"""Show that something slow is going on, and how far it is. Knows terminals and bytes; knows nothing of what is slow."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

PATIENCE = 1.0  # seconds; quicker work is not worth a word
_IN_BYTES = ("weights", "layers")


class Progress:
    """A context in which a message appears on stderr after `PATIENCE`, and goes away at its end.

    On a terminal it moves, and has a bar with figures from the first `advance` of a phase until all of it is there;
    otherwise it is one line. It has a thread of its own, so that it also moves while the caller's thread is busy.
    `stop` may be called before the context ends, and more than once.
    """

    def __init__(self, message: str) -> None:
        self._message = message
        self._shown: tuple[Bar, TaskID] | None = None
        self._phase = ""
        self._begun = 0.0  # when the phase's first bytes were counted
        self._num_before = 0  # those that had come by then
        self._timer = threading.Timer(PATIENCE, self._show)
        self._timer.daemon = True

    def _show(self) -> None:
        if not sys.stderr.isatty():
            print(f"{self._message} ...", file=sys.stderr, flush=True)  # noqa: T201
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        text, figures = TextColumn("{task.description} ...", markup=False), TextColumn("{task.fields[figures]}")
        bar = Progress(SpinnerColumn(), text, BarColumn(), figures, console=Console(stderr=True), transient=True)
        self._shown = bar, self._add_task(bar)
        bar.start()

    def _add_task(self, bar: Bar) -> TaskID:
        """A line without a measure."""
        return bar.add_task(self._message, total=None, figures="")

    def advance(self, phase: str, num_done: int, num_total: int) -> None:
        """Say how much of a phase is done: bytes of "weights" or "layers", else pieces. `num_total` 0: nobody knows.

        May be called from any thread.
        """
        if phase != self._phase:
            self._phase, self._begun, self._num_before = phase, time.perf_counter(), num_done
        if self._shown is None:
            return
        bar, task = self._shown
        if num_done >= num_total:  # what comes after it has no measure
            bar.remove_task(task)
            self._shown = bar, self._add_task(bar)
            if num_total == 0:
                bar.update(self._shown[1], figures=phase)
            return
        figures = self._in_bytes(num_done, num_total) if phase in _IN_BYTES else f"{num_done} of {num_total} {phase}"
        bar.update(task, completed=num_done, total=num_total, figures=figures)

    def _in_bytes(self, num_done: int, num_total: int) -> str:
        seconds = time.perf_counter() - self._begun
        rate = f"  {(num_done - self._num_before) / seconds / 1e9:.1f} GB/s" if seconds else ""
        return f"{num_done / 1e9:.1f} of {num_total / 1e9:.1f} GB{rate}"

    def say(self, message: str) -> None:
        """Show another message; where nothing moves, only the first one is printed."""
        self._message = message
        if self._shown is not None:
            bar, task = self._shown
            bar.update(task, description=message)

    def stop(self) -> None:
        self._timer.cancel()
        self._timer.join()
        if self._shown is not None:
            bar, _ = self._shown
            self._shown = None
            bar.stop()

    def __enter__(self) -> Progress:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
