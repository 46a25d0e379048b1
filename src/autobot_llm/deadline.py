"""A time limit for a whole stream that its reader may interrupt at any event. Knows tasks and clocks only."""

from __future__ import annotations

import asyncio
from types import TracebackType

from autobot_llm.errors import RequestTimeout


class Deadline:
    """`with Deadline(seconds) as deadline:` around the reading of a stream inside of an async generator.

    `asyncio.timeout` may not be held across a `yield`: it would cancel the generator's reader while that does
    something else. So the generator calls `pause` before each `yield` and `resume` after it, and only a wait for
    the upstream is ever cancelled. Raises RequestTimeout; `seconds` None never does.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()  # asked for once: before Python 3.12 this is a system call
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: asyncio.Task[object] | None = None
        self._cancelling_before = 0
        self._has_passed = False
        self._cancelled: asyncio.Task[object] | None = None

    def __enter__(self) -> Deadline:
        if self._seconds is not None:
            self._timer = self._loop.call_later(self._seconds, self._pass)
            self.resume()
        return self

    def pause(self) -> None:
        self._waiting = None

    def resume(self) -> None:
        if self._has_passed:
            raise self._timeout()
        if self._timer is not None:
            self._waiting = task = asyncio.current_task(self._loop)
            self._cancelling_before = task.cancelling() if task is not None else 0

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._waiting = None
        if self._timer is not None:
            self._timer.cancel()
        if self._cancelled is None:
            return
        # Take our own cancellation back. If somebody else cancels the task as well, theirs goes on.
        is_ours_alone = self._cancelled.uncancel() <= self._cancelling_before
        if is_ours_alone or not isinstance(exc, asyncio.CancelledError):
            raise self._timeout() from exc

    def _pass(self) -> None:
        self._has_passed = True
        if self._waiting is not None:
            self._cancelled = self._waiting
            self._waiting.cancel()

    def _timeout(self) -> RequestTimeout:
        return RequestTimeout(f"the answer was not complete after its timeout of {self._seconds:g} s", param="timeout")
