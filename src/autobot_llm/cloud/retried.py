"""Ask a provider again after a failure that passes, and not at all while it is out of order. Knows the events of an
answer; when to try again and when not to ask, `retry` and `circuit_breaker` know.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

import msgspec

from autobot_llm.cloud.circuit_breaker import BreakerState, CircuitBreaker
from autobot_llm.cloud.retry import Retries, RetryPolicy
from autobot_llm.errors import InvalidRequestError, LLMError, ProviderError, ProviderUnavailable
from autobot_llm.providers.base import Embedder, Link, Provider, Streamer
from autobot_llm.report import OptimizationOutcome
from autobot_llm.settings import Settings
from autobot_llm.types import EmbeddingRequest, EmbeddingResponse, Event, Finish, LLMRequest, Start

T = TypeVar("T")

logger = logging.getLogger("autobot_llm.cloud")

NAME = "retry_with_backoff"
_FIRST_TRY = OptimizationOutcome(name=NAME, applied=False, reason="the first call succeeded")
_OF_OUR_CONFIGURATION = frozenset({"provider_authentication_error", "provider_not_found"})
_NO_ANSWER = "there was no answer within the request's timeout"
_AT_THE_DEADLINE = 0.05  # seconds: the interface's clock for a request starts a little before ours


class RetryLink(Link):
    """Puts `Retried` in front of every provider over HTTP; each has a retry budget and a circuit breaker of its own."""

    def __init__(self, settings: Settings) -> None:
        self._policy = RetryPolicy(max_retries=settings.cloud_retry_max_attempts)
        self._default_timeout = settings.timeout
        self._retried: dict[str, Retried] = {}

    def wrap(self, chain: Streamer, provider: Provider) -> Streamer:
        self._retried[provider.name] = retried = Retried(
            chain, name=provider.name, retries=Retries(self._policy), breaker=CircuitBreaker(),
            default_timeout=self._default_timeout,
        )  # fmt: skip
        return retried

    def wrap_embedder(self, embedder: Embedder, provider: Provider) -> Embedder:
        return RetriedEmbedder(embedder, self._retried[provider.name])

    def metrics_of(self, provider: str) -> dict[str, float]:
        retried = self._retried.get(provider)
        return retried.metrics() if retried is not None else {}


class Retried:
    """`inner`, asked again while nothing of its answer has reached the caller. `name` is the provider.

    Start is held back until the event that follows it, so that a call that fails in between can still be made again.
    `default_timeout` (seconds) is that of requests without one.
    """

    def __init__(
        self, inner: Streamer, *, name: str, retries: Retries, breaker: CircuitBreaker, default_timeout: float | None
    ) -> None:
        self._inner = inner
        self._name = name
        self._retries = retries
        self._breaker = breaker
        self._default_timeout = default_timeout
        self._last_failure = ""

    async def stream(self, request: LLMRequest) -> AsyncGenerator[Event, None]:
        """The answer of the first call that succeeds. Raises the last error where none does in time."""
        loop = asyncio.get_running_loop()
        timeout = request.timeout if request.timeout is not None else self._default_timeout
        deadline = None if timeout is None else loop.time() + timeout
        may_repeat = not request.has_side_effects
        self._retries.note_call()
        failure: LLMError | None = None
        num_failures = 0
        while True:
            has_begun = False
            try:
                async with aclosing(self._attempt(request, deadline, failure)) as events:
                    async for event in events:
                        has_begun = True
                        if failure is not None and type(event) is Finish:
                            event = _reported(event, num_failures, failure)
                        yield event
                return
            except LLMError as error:
                num_failures += 1
                wait = None if has_begun else self._retries.wait_after(
                    error, num_failures=num_failures, deadline=deadline, may_repeat=may_repeat
                )  # fmt: skip
                if wait is None:
                    raise
                failure = error
            await asyncio.sleep(wait)
            if deadline is not None:
                request = msgspec.structs.replace(request, timeout=max(0.001, deadline - loop.time()))

    async def call(self, make: Callable[[], Awaitable[T]], timeout: float | None) -> T:  # noqa: ASYNC109  # for waits
        """What `make()` returns, called again as `stream` asks again. `timeout` (seconds) bounds the waiting."""
        loop = asyncio.get_running_loop()
        timeout = timeout if timeout is not None else self._default_timeout
        deadline = None if timeout is None else loop.time() + timeout
        self._retries.note_call()
        failure: LLMError | None = None
        num_failures = 0
        while True:
            ticket = self._breaker.admit()
            if ticket is None:
                raise self._refusal() from failure
            succeeded: bool | None = None
            try:
                answer = await make()
                succeeded = True
                return answer
            except LLMError as error:
                succeeded, self._last_failure = _tells(error), error.message
                num_failures += 1
                wait = self._retries.wait_after(error, num_failures=num_failures, deadline=deadline)
                if wait is None:
                    raise
                failure = error
            except asyncio.CancelledError:
                if _is_over(deadline):
                    succeeded, self._last_failure = False, _NO_ANSWER
                raise
            finally:
                self._note(ticket, succeeded)
            await asyncio.sleep(wait)

    async def _attempt(
        self, request: LLMRequest, deadline: float | None, failure: LLMError | None
    ) -> AsyncGenerator[Event, None]:
        """One call, whose outcome the breaker learns. `failure` is that of the call before."""
        ticket = self._breaker.admit()
        if ticket is None:
            raise self._refusal() from failure
        start: Start | None = None
        has_begun = False
        succeeded: bool | None = None  # what ends the call without our knowing why tells nothing
        try:
            async with aclosing(self._inner.stream(request)) as events:
                async for event in events:
                    if not has_begun:
                        if type(event) is Start:
                            start = event
                            continue
                        has_begun = True
                        self._breaker.record(ticket, succeeded=True)
                        if start is not None:
                            yield start
                    if type(event) is Finish and failure is None:
                        event = msgspec.structs.replace(event, optimizations=(*event.optimizations, _FIRST_TRY))
                    yield event
        except LLMError as error:
            succeeded = _tells(error)
            self._last_failure = error.message
            raise
        except asyncio.CancelledError:
            if not has_begun and _is_over(deadline):
                succeeded, self._last_failure = False, _NO_ANSWER
            raise
        finally:
            if succeeded is not None or not has_begun:
                self._note(ticket, succeeded)

    def metrics(self) -> dict[str, float]:
        return {
            "num_retries": self._retries.num_retries,
            "retry_wait_seconds": self._retries.seconds_waited,
            "circuit_open": float(self._breaker.state is not BreakerState.CLOSED),
            "num_circuit_openings": self._breaker.num_openings,
        }

    def _note(self, ticket: int, succeeded: bool | None) -> None:
        before = self._breaker.num_openings
        self._breaker.record(ticket, succeeded=succeeded)
        if self._breaker.num_openings > before:
            logger.warning(
                "%s keeps failing and is not asked for %.0f s; the last failure: %s",
                self._name, self._breaker.seconds_left(), self._last_failure,
            )  # fmt: skip

    def _refusal(self) -> ProviderUnavailable:
        seconds = self._breaker.seconds_left()
        return ProviderUnavailable(
            f"{self._name} is not asked for {seconds:.1f} s more because its latest calls failed: {self._last_failure}",
            code="circuit_open", retry_after=seconds, may_have_begun=False,
        )  # fmt: skip


class RetriedEmbedder:
    """`inner`, asked again as `retried` asks again, whose retry budget and circuit breaker it shares."""

    def __init__(self, inner: Embedder, retried: Retried) -> None:
        self._inner = inner
        self._retried = retried

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResponse:
        return await self._retried.call(lambda: self._inner.embed(request), request.timeout)


def _tells(error: LLMError) -> bool | None:
    """What an error says of the provider's health: that it is well, that it is not, or nothing."""
    if isinstance(error, ProviderError):
        return None if error.code in _OF_OUR_CONFIGURATION else False
    return True if isinstance(error, InvalidRequestError) else None


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and asyncio.get_running_loop().time() >= deadline - _AT_THE_DEADLINE


def _reported(finish: Finish, num_failures: int, failure: LLMError) -> Finish:
    times = "once" if num_failures == 1 else f"{num_failures} times"
    outcome = OptimizationOutcome(
        name=NAME, applied=True, reason=f"the call failed {times} before it succeeded: {failure.message}"
    )
    return msgspec.structs.replace(finish, optimizations=(*finish.optimizations, outcome))
