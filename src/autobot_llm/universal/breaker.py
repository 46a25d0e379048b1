"""Leave alone for a while what does not work. Knows successes and failures; knows nothing of what fails."""

from __future__ import annotations

STRIKES = 3
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0


class StoreBreaker:
    """Open after three failures in a row, or one grave one.

    After `pause` seconds its owner tries the store and calls `admit`. The next outcome decides: a success closes it
    for good, a failure opens it for twice as long.
    """

    def __init__(self, *, is_open: bool = False) -> None:
        self.is_open = is_open
        self.is_on_trial = False
        self.pause = FIRST_PAUSE
        self._num_failures = 0

    def failed(self, *, gravely: bool = False) -> None:
        self._num_failures += 1
        if self.is_open or self.is_on_trial:
            self.pause = min(2 * self.pause, LONGEST_PAUSE)
            self.is_open, self.is_on_trial = True, False
        elif gravely or self._num_failures >= STRIKES:
            self.is_open = True

    def admit(self) -> None:
        self.is_open, self.is_on_trial = False, True

    def succeeded(self) -> None:
        self.is_open = self.is_on_trial = False
        self.pause = FIRST_PAUSE
        self._num_failures = 0
