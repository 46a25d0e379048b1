"""Keep within a provider's rate limits: wait for a place instead of being refused. Knows numbers and clocks; knows
no headers.

Token buckets whose size and pace are what the provider tells with its answers, and a queue in front of them that is
bounded, and fair between tenants.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from dataclasses import dataclass

from autobot_llm.dialects.rate_limits import RateLimit, RateLimits
from autobot_llm.errors import OverloadedError

LONGEST_PAUSE = 60.0  # seconds that a provider may ask for; for longer, its refusal is everybody's answer
_MINUTE = 60.0
_ALMOST = 1e-9  # a place is free in spite of the rounding of sums


class TokenBucket:
    """One limit as the provider last told it, carried on since. `now` is in seconds of any one clock.

    Before the first `observe` there is no limit.
    """

    def __init__(self) -> None:
        self._capacity = float("inf")
        self._rate = float("inf")
        self._level = float("inf")
        self._at = 0.0

    @property
    def is_known(self) -> bool:
        return self._rate != float("inf")

    def observe(self, told: RateLimit, now: float) -> None:
        """Take over what the provider told.

        The pace follows from it: what is missing comes back within `reset_seconds`. Where it tells no such time, the
        limit is one per minute. Calls that were sent since the provider counted are not in its figure, so the smaller
        of its count and ours holds.
        """
        capacity = max(told.limit if told.limit is not None else told.remaining, 1)
        missing = capacity - told.remaining
        if told.reset_seconds and missing > 0:
            self._refill(now)
            self._rate = missing / told.reset_seconds
        elif not self.is_known or capacity != self._capacity:
            self._refill(now)
            self._rate = capacity / _MINUTE
        else:
            self._refill(now)
        self._capacity = capacity
        self._level = min(self._level, told.remaining)
        self._at = now

    def level(self, now: float) -> float:
        """How much may be taken now."""
        self._refill(now)
        return self._level

    def seconds_until(self, amount: float, now: float) -> float:
        """How long until `amount` may be taken, or the whole limit where that is less."""
        self._refill(now)
        missing = min(amount, self._capacity) - self._level
        return missing / self._rate if missing > _ALMOST * self._capacity else 0.0

    def seconds_for(self, amount: float, now: float) -> float:
        """How long until `amount`, which may be more than the limit, has been taken by one call after the other."""
        self._refill(now)
        return max(0.0, amount - self._level) / self._rate

    def take(self, amount: float, now: float) -> None:
        self._refill(now)
        self._level -= min(amount, self._capacity)

    def give_back(self, amount: float, now: float) -> None:
        """Undo a part of what was taken; a negative amount takes more."""
        self._refill(now)
        self._level = min(self._capacity, self._level + amount)

    def _refill(self, now: float) -> None:
        if self.is_known and now > self._at:
            self._level = min(self._capacity, self._level + (now - self._at) * self._rate)
            self._at = now


@dataclass(eq=False, slots=True)
class Waiter:
    """A call that waits for its place."""

    num_tokens: float
    granted: asyncio.Future[None]


class FairQueue:
    """First come, first served within a tenant; the tenants take turns."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[Waiter]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, tenant: str, waiter: Waiter) -> None:
        self._lines.setdefault(tenant, deque()).append(waiter)
        self._length += 1

    def peek(self) -> Waiter:
        """Whose turn it is. There must be somebody."""
        return next(iter(self._lines.values()))[0]

    def pop(self) -> Waiter:
        tenant, line = next(iter(self._lines.items()))
        waiter = line.popleft()
        self._length -= 1
        if line:
            self._lines.move_to_end(tenant)
        else:
            del self._lines[tenant]
        return waiter

    def remove(self, tenant: str, waiter: Waiter) -> None:
        line = self._lines[tenant]
        line.remove(waiter)
        self._length -= 1
        if not line:
            del self._lines[tenant]

    def num_tokens(self) -> float:
        """The tokens that all who wait will take."""
        return sum(waiter.num_tokens for line in self._lines.values() for waiter in line)


class RateLimiter:
    """The limits of one model at one provider. Belongs to one event loop; needs no closing once nobody waits."""

    def __init__(self, name: str, *, max_queued: int) -> None:
        self._name = name
        self._max_queued = max_queued
        self._requests = TokenBucket()
        self._tokens = TokenBucket()
        self._paused_until = 0.0
        self._queue = FairQueue()
        self._timer: asyncio.TimerHandle | None = None
        self.num_waits = 0
        self.seconds_waited = 0.0

    @property
    def counts_tokens(self) -> bool:
        """Whether a limit of tokens is known, so that an estimate of a call's tokens is of use."""
        return self._tokens.is_known

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    def observe(self, told: RateLimits) -> None:
        """Learn from an answer."""
        now = _now()
        if told.requests is not None:
            self._requests.observe(told.requests, now)
        if told.tokens is not None:
            self._tokens.observe(told.tokens, now)
        self._serve()

    def pause(self, seconds: float) -> None:
        """The provider refuses calls for so long: nobody sends one until then."""
        self._paused_until = max(self._paused_until, _now() + seconds)
        self._serve()

    def correct(self, num_tokens: float) -> None:
        """A call took `num_tokens` fewer than were reserved; more, if negative."""
        if self._tokens.is_known:
            self._tokens.give_back(num_tokens, _now())
            self._serve()

    async def acquire(self, tenant: str, num_tokens: float, *, longest: float | None) -> float:
        """Wait until a call with `num_tokens` tokens is within the limits; returns the seconds that took.

        Raises OverloadedError at once where too many wait already, the wait would take more than `longest` seconds, or
        the provider asked for a pause of more than LONGEST_PAUSE. Cancelled, it leaves nothing behind.
        """
        now = _now()
        if not self._queue and self._wait(num_tokens, now) <= 0:
            self._take(num_tokens, now)
            return 0.0
        self._refuse_if_hopeless(num_tokens, now, longest)
        waiter = Waiter(num_tokens, asyncio.get_running_loop().create_future())
        self._queue.add(tenant, waiter)
        self._serve()
        try:
            await waiter.granted
        except asyncio.CancelledError:
            if waiter.granted.cancelled():
                self._queue.remove(tenant, waiter)
            else:  # the place came just before the cancellation
                self._give_back(num_tokens)
            self._serve()
            raise
        waited = _now() - now
        self.num_waits += 1
        self.seconds_waited += waited
        return waited

    def _refuse_if_hopeless(self, num_tokens: float, now: float, longest: float | None) -> None:
        expected = self._expected_wait(num_tokens, now)
        if len(self._queue) >= self._max_queued:
            raise OverloadedError(
                f"{len(self._queue)} requests wait for {self._name}'s rate limit, which is the most that may",
                retry_after=max(1.0, expected), code="queue_full",
            )  # fmt: skip
        is_long_pause = self._paused_until - now > LONGEST_PAUSE
        if is_long_pause or (longest is not None and expected > longest):
            than = "which is too long to wait" if is_long_pause else "later than its timeout"
            raise OverloadedError(
                f"{self._name}'s rate limit allows the request in {expected:.1f} s, {than}",
                retry_after=max(1.0, expected), code="rate_limit_wait",
            )  # fmt: skip

    def _expected_wait(self, num_tokens: float, now: float) -> float:
        pause = max(0.0, self._paused_until - now)
        requests = self._seconds_for(self._requests, len(self._queue) + 1.0, now)
        tokens = self._seconds_for(self._tokens, self._queue.num_tokens() + num_tokens, now)
        return max(pause, requests, tokens)

    @staticmethod
    def _seconds_for(bucket: TokenBucket, amount: float, now: float) -> float:
        return bucket.seconds_for(amount, now) if bucket.is_known else 0.0

    def _wait(self, num_tokens: float, now: float) -> float:
        wait = self._paused_until - now
        if self._requests.is_known:
            wait = max(wait, self._requests.seconds_until(1, now))
        if self._tokens.is_known:
            wait = max(wait, self._tokens.seconds_until(num_tokens, now))
        return wait

    def _take(self, num_tokens: float, now: float) -> None:
        if self._requests.is_known:
            self._requests.take(1, now)
        if self._tokens.is_known:
            self._tokens.take(num_tokens, now)

    def _give_back(self, num_tokens: float) -> None:
        now = _now()
        if self._requests.is_known:
            self._requests.give_back(1, now)
        if self._tokens.is_known:
            self._tokens.give_back(num_tokens, now)

    def _serve(self) -> None:
        """Let everybody go whose turn it is, and come back when the next one's is."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = _now()
        while self._queue:
            waiter = self._queue.peek()
            if waiter.granted.cancelled():
                return  # its task is about to take it out, and serves again
            wait = self._wait(waiter.num_tokens, now)
            if wait > 0:
                self._timer = asyncio.get_running_loop().call_later(wait, self._serve)
                return
            self._queue.pop()
            self._take(waiter.num_tokens, now)
            waiter.granted.set_result(None)


def _now() -> float:
    return asyncio.get_running_loop().time()
