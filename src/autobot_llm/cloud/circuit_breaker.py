"""Stop asking a provider that is out of order, and find out when it is back. Knows outcomes and a clock only.

The states are Nygard's ("Release It!", 2007): closed, open, and half open while one call probes.
"""

from __future__ import annotations

import enum
import random
import time
from collections import deque
from collections.abc import Callable

import msgspec


class BreakerState(enum.StrEnum):
    CLOSED = "closed"
    HALF_OPEN = "half_open"
    OPEN = "open"


class BreakerPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When to open and for how long. Of the last `window` outcomes, at least `least`, `share` must be failures.

    The first pause is `cooldown` seconds; each failed probe doubles it, up to `longest_cooldown`. Up to a fifth is
    added at random, so that many processes do not probe at once.
    """

    window: int = 20
    least: int = 10
    share: float = 0.8
    cooldown: float = 5.0
    longest_cooldown: float = 60.0


class CircuitBreaker:
    """For one provider: `admit` before each call, and `record` what became of it.

    An answer that begins well and breaks off is recorded twice. Outcomes of calls that were admitted in an earlier
    state tell nothing of this one and are ignored.
    """

    def __init__(
        self,
        policy: BreakerPolicy | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._policy = policy = policy or BreakerPolicy()
        self._clock = clock
        self._draw = draw
        self._failed: deque[bool] = deque(maxlen=policy.window)
        self._state = BreakerState.CLOSED
        self._era = 0
        self._opens_until = 0.0
        self._cooldown = policy.cooldown
        self._is_probing = False
        self.num_openings = 0

    @property
    def state(self) -> BreakerState:
        return self._state

    def seconds_left(self) -> float:
        """How long no call is admitted; 0 where one is. While a probe is under way, the shortest sensible wait."""
        if self._state is BreakerState.OPEN:
            return max(0.0, self._opens_until - self._clock())
        return min(1.0, self._policy.cooldown) if self._is_probing else 0.0

    def admit(self) -> int | None:
        """A ticket for one call, to be given to `record`; None where no call may be made now."""
        if self._state is BreakerState.CLOSED:
            return self._era
        if self._state is BreakerState.OPEN and self._clock() >= self._opens_until:
            self._enter(BreakerState.HALF_OPEN)
        if self._state is BreakerState.HALF_OPEN and not self._is_probing:
            self._is_probing = True
            return self._era
        return None

    def record(self, ticket: int, *, succeeded: bool | None) -> None:
        """What became of the call with `ticket`; None where that tells nothing of the provider."""
        if ticket != self._era:
            return
        if self._state is BreakerState.HALF_OPEN:
            self._is_probing = False
            if succeeded is not None:
                self._close() if succeeded else self._open(2 * self._cooldown)
        elif succeeded is not None:
            self._failed.append(not succeeded)
            num = len(self._failed)
            if not succeeded and num >= self._policy.least and sum(self._failed) >= self._policy.share * num:
                self._open(self._policy.cooldown)

    def _open(self, cooldown: float) -> None:
        self._cooldown = min(cooldown, self._policy.longest_cooldown)
        self._opens_until = self._clock() + self._cooldown * (1 + 0.2 * self._draw())
        self.num_openings += 1
        self._enter(BreakerState.OPEN)

    def _close(self) -> None:
        self._failed.clear()
        self._enter(BreakerState.CLOSED)

    def _enter(self, state: BreakerState) -> None:
        self._state = state
        self._era += 1
        self._is_probing = False
