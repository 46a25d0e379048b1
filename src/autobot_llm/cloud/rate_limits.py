"""Keep within a provider's rate limits: wait for a place instead of being refused. Knows numbers and clocks; knows
no headers.

Token buckets whose size and pace are what the provider tells with its answers, and a queue in front of them that is
bounded, and fair between tenants.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from dataclasses import dataclass

import msgspec

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

    @property
    def capacity(self) -> float:
        return self._capacity

    @property
    def rate(self) -> float:
        """What comes back in a second."""
        return self._rate

    def become(self, capacity: float, rate: float, level: float, now: float) -> None:
        """Be as somebody else knows it to be."""
        self._capacity, self._rate, self._level, self._at = capacity, rate, level, now

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
    tenant: str = ""
    deadline: float | None = None  # by the event loop's clock, for one whose wait is known only later


class FairQueue:
    """First come, first served within a tenant; the tenants take turns."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[Waiter]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, tenant: str, waiter: Waiter) -> None:
        waiter.tenant = tenant
        self._lines.setdefault(tenant, deque()).append(waiter)
        self._length += 1

    def put_back(self, waiter: Waiter) -> None:
        """Undo `pop`; of several, the last one first."""
        self._lines.setdefault(waiter.tenant, deque()).appendleft(waiter)
        self._lines.move_to_end(waiter.tenant, last=False)
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


class OwnLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits per minute that settings name; None leaves it to the provider to tell."""

    requests: int | None = None
    tokens: int | None = None


class RateLimiter:
    """The limits of one model at one provider. Belongs to one event loop; needs no closing once nobody waits.

    Where `own` has a limit, that is what it is, and the provider only tells how much of it is left.
    """

    def __init__(self, name: str, *, max_queued: int, own: OwnLimits | None = None) -> None:
        self._name = name
        self._max_queued = max_queued
        self._requests = TokenBucket()
        self._tokens = TokenBucket()
        self._own = own or OwnLimits()
        for bucket, limit in ((self._requests, self._own.requests), (self._tokens, self._own.tokens)):
            if limit is not None:
                bucket.become(limit, limit / _MINUTE, limit, 0.0)
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
    def knows_limits(self) -> bool:
        return self._requests.is_known or self._tokens.is_known

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def makes_wait(self) -> bool:
        """Whether one more call would have to wait, by what is known here."""
        return self.num_queued > 0 or self._wait(0.0, clock()) > 0

    def observe(self, told: RateLimits) -> None:
        """Learn from an answer."""
        self._learn(self._buckets(), self._fitted(told))
        self._serve()

    def _buckets(self) -> tuple[TokenBucket, TokenBucket]:
        return self._requests, self._tokens

    def _fitted(self, told: RateLimits) -> RateLimits:
        """What was told, within our own limits."""
        return RateLimits(
            requests=_within(told.requests, self._own.requests), tokens=_within(told.tokens, self._own.tokens)
        )

    @staticmethod
    def _learn(buckets: tuple[TokenBucket, TokenBucket], told: RateLimits) -> None:
        for bucket, limit in zip(buckets, (told.requests, told.tokens), strict=True):
            if limit is not None:
                bucket.observe(limit, clock())

    def pause(self, seconds: float) -> None:
        """The provider refuses calls for so long: nobody sends one until then."""
        self._paused_until = max(self._paused_until, clock() + seconds)
        self._serve()

    def correct(self, num_tokens: float) -> None:
        """A call took `num_tokens` fewer than were reserved; more, if negative."""
        if self._tokens.is_known:
            self._tokens.give_back(num_tokens, clock())
            self._serve()

    async def acquire(self, tenant: str, num_tokens: float, *, longest: float | None) -> float:
        """Wait until a call with `num_tokens` tokens is within the limits; returns the seconds that took.

        Raises OverloadedError at once where too many wait already, the wait would take more than `longest` seconds, or
        the provider asked for a pause of more than LONGEST_PAUSE. Cancelled, it leaves nothing behind.
        """
        now = clock()
        if self._grants_at_once(num_tokens, now):
            return 0.0
        self._refuse_if_hopeless(num_tokens, now, longest)
        deadline = None if longest is None else now + longest
        waiter = Waiter(num_tokens, asyncio.get_running_loop().create_future(), deadline=deadline)
        self._queue.add(tenant, waiter)
        self._serve()
        try:
            await waiter.granted
        except asyncio.CancelledError:
            if waiter.granted.cancelled():
                self._forget(waiter)
            elif waiter.granted.exception() is None:  # the place came just before the cancellation
                self._give_back(num_tokens)
            self._serve()
            raise
        return self._counted(clock() - now)

    def _grants_at_once(self, num_tokens: float, now: float) -> bool:
        """Whether a call need not wait; it is then counted."""
        if self._queue or self._wait(num_tokens, now) > 0:
            return False
        self._take(num_tokens, now)
        return True

    def _forget(self, waiter: Waiter) -> None:
        """Its caller has left the queue."""
        self._queue.remove(waiter.tenant, waiter)

    def _counted(self, waited: float) -> float:
        self.num_waits += 1
        self.seconds_waited += waited
        return waited

    def _refuse_if_hopeless(self, num_tokens: float, now: float, longest: float | None) -> None:
        if self.num_queued >= self._max_queued:
            raise self._queue_full(num_tokens)
        expected = self._expected_wait(num_tokens, now)
        is_long_pause = self._paused_until - now > LONGEST_PAUSE
        if is_long_pause or (longest is not None and expected > longest):
            raise self._too_long(expected, is_long_pause)

    def _queue_full(self, num_tokens: float) -> OverloadedError:
        return OverloadedError(
            f"{self.num_queued} requests wait for {self._name}'s rate limit, which is the most that may",
            retry_after=max(1.0, self._expected_wait(num_tokens, clock())), code="queue_full",
        )  # fmt: skip

    def _too_long(self, expected: float, is_long_pause: bool) -> OverloadedError:
        than = "which is too long to wait" if is_long_pause else "later than its timeout"
        return OverloadedError(
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
        now = clock()
        if self._requests.is_known:
            self._requests.give_back(1, now)
        if self._tokens.is_known:
            self._tokens.give_back(num_tokens, now)

    def _serve(self) -> None:
        """Let everybody go whose turn it is, and come back when the next one's is."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = clock()
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


def _within(told: RateLimit | None, own: int | None) -> RateLimit | None:
    if told is None or own is None:
        return told
    return RateLimit(limit=own, remaining=min(told.remaining, own), reset_seconds=None)


def clock() -> float:
    """By the running event loop's clock, in seconds."""
    return asyncio.get_running_loop().time()
