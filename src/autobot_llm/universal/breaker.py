"""Leave alone for a while what does not work. Knows successes and failures; knows nothing of what fails."""

from __future__ import annotations

STRIKES = 3
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0


class StoreBreaker:
    """Open after three failures in a row, or one grave one; `pause` (seconds) doubles each time that a trial fails."""

    def __init__(self, *, is_open: bool = False) -> None:
        self.is_open = is_open
        self.pause = FIRST_PAUSE
        self._num_failures = 0

    def failed(self, *, gravely: bool = False) -> None:
        if self.is_open:
            self.pause = min(2 * self.pause, LONGEST_PAUSE)
        self._num_failures += 1
        self.is_open = self.is_open or gravely or self._num_failures >= STRIKES

    def succeeded(self) -> None:
        self.is_open = False
        self.pause = FIRST_PAUSE
        self._num_failures = 0
