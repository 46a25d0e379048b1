"""Decide whether a failed call is made again, and when. Knows errors and clocks; knows nothing of HTTP or of chains.

The waits are exponential with full jitter (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015),
and the number of retries is bounded for one call and, by a budget, for all calls together.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from autobot_llm.errors import LLMError, OverloadedError, ProviderError
from autobot_llm.transport.failures import error_from

T = TypeVar("T")

# The same call would meet the same refusal: a wrong key, a wrong address, no money, an answer in another language.
HOPELESS_CODES = frozenset(
    {
        "billing_error",
        "circuit_open",
        "insufficient_quota",
        "malformed_answer",
        "provider_authentication_error",
        "provider_not_found",
        "queue_full",
        "rate_limit_wait",
    }
)


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How often and how patiently to try again. Times are in seconds.

    The wait after the n-th failure is drawn from [0, min(max_backoff, base * 2**(n - 1))]. What the provider asks
    for (`retry_after`) comes before it, unless it is more than `longest_wait`: then there is no retry.
    """

    max_retries: int = 3
    base: float = 0.5
    max_backoff: float = 8.0
    longest_wait: float = 60.0

    def backoff(self, num_failures: int, draw: Callable[[], float]) -> float:
        """The wait after the `num_failures`-th failure in a row; `draw` returns numbers in [0, 1)."""
        ceiling = min(self.max_backoff, self.base * 2.0 ** min(num_failures - 1, 60))
        return draw() * ceiling


class RetryBudget:
    """At most `reserve` retries, and `share` of the number of calls more: an outage does not multiply the traffic.

    Unused retries add up to `most` at a time.
    """

    def __init__(self, *, reserve: float = 10.0, share: float = 0.5, most: float = 100.0) -> None:
        self._share = share
        self._most = most
        self._balance = reserve

    def note_call(self) -> None:
        self._balance = min(self._most, self._balance + self._share)

    def take(self) -> bool:
        """Whether one more retry is allowed; it is then counted."""
        if self._balance < 1.0:
            return False
        self._balance -= 1.0
        return True


def is_transient(error: LLMError) -> bool:
    """Whether the same call may well succeed later."""
    return isinstance(error, ProviderError | OverloadedError) and error.code not in HOPELESS_CODES


class Retries:
    """The decisions for all calls to one provider. `clock` is in seconds, as `time.monotonic`."""

    def __init__(
        self,
        policy: RetryPolicy,
        *,
        budget: RetryBudget | None = None,
        clock: Callable[[], float] | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.policy = policy
        self.num_retries = 0
        self.seconds_waited = 0.0
        self._budget = budget or RetryBudget()
        self._clock = clock
        self._draw = draw

    def note_call(self) -> None:
        """Count a call that is made for the first time; each earns a share of a retry."""
        self._budget.note_call()

    def wait_after(
        self, error: LLMError, *, num_failures: int, deadline: float | None = None, may_repeat: bool = True
    ) -> float | None:
        """Seconds to wait before the call is made again, or None where `error` stands.

        `num_failures` counts this failure. Where the wait would end after `deadline` there is no point in waiting. A
        call that may not be repeated is made again only if the provider surely did not begin with it.
        """
        if num_failures > self.policy.max_retries or not is_transient(error):
            return None
        if error.may_have_begun and not may_repeat:
            return None
        asked = error.retry_after or 0.0
        wait = asked + self.policy.backoff(num_failures, self._draw)
        if asked > self.policy.longest_wait or (deadline is not None and self._now() + wait >= deadline):
            return None
        if not self._budget.take():
            return None
        self.num_retries += 1
        self.seconds_waited += wait
        return wait

    def _now(self) -> float:
        return self._clock() if self._clock is not None else asyncio.get_running_loop().time()


class RateLimitHandler:
    """Make calls to a provider again when it is overloaded or out of order, by the policy that the chain has too."""

    def __init__(
        self, policy: RetryPolicy | None = None, *, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    ) -> None:
        self._policy = policy or RetryPolicy()
        self._retries: dict[int, Retries] = {}
        self._budget = RetryBudget()
        self._sleep = sleep

    @property
    def num_retries(self) -> int:
        """Calls made again so far."""
        return sum(retries.num_retries for retries in self._retries.values())

    async def execute_with_retry(
        self,
        api_call: Callable[[], Awaitable[T]],
        max_retries: int = 3,
        *,
        timeout: float | None = None,  # noqa: ASYNC109  # it bounds the waiting, not the calls
    ) -> T:
        """What `api_call()` returns, called again up to `max_retries` times while its errors are transient.

        `timeout` (seconds) bounds the waiting: a wait that would end later is not begun. Raises the last error as
        it is. Besides our own errors those of providers' clients are understood, by their `status_code` and
        `response.headers`, and ConnectionError. `api_call` must be one that may be made twice.
        """
        retries = self._retries.setdefault(max_retries, self._with(max_retries))
        deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        retries.note_call()
        num_failures = 0
        while True:
            try:
                return await api_call()
            except Exception as exc:
                num_failures += 1
                meaning = _meaning(exc)
                if meaning is None:
                    raise
                wait = retries.wait_after(meaning, num_failures=num_failures, deadline=deadline)
                if wait is None:
                    raise
            await self._sleep(wait)

    def _with(self, max_retries: int) -> Retries:
        return Retries(msgspec.structs.replace(self._policy, max_retries=max_retries), budget=self._budget)


def _meaning(exc: Exception) -> LLMError | None:
    """`exc` as an error of ours, None where it is nothing that a provider could have caused."""
    if isinstance(exc, LLMError):
        return exc
    if isinstance(exc, ConnectionError):
        return ProviderError(str(exc))
    status = getattr(exc, "status_code", None)
    if not isinstance(status, int) or status < 400:
        return None
    headers = getattr(getattr(exc, "response", None), "headers", None) or {}
    return error_from(status, {str(name).lower(): str(value) for name, value in headers.items()}, b"", "the provider")
