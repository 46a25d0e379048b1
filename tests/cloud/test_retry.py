"""What is tried again, when, and how often."""

from __future__ import annotations

import asyncio
import email.utils
import itertools
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobot_llm.cloud.retry import (
    RateLimitHandler,
    Retries,
    RetryBudget,
    RetryPolicy,
    is_transient,
)
from autobot_llm.errors import (
    AuthenticationError,
    InvalidRequestError,
    LLMError,
    OverloadedError,
    ProviderError,
    ProviderTimeout,
    ProviderUnavailable,
    RequestTimeout,
)
from autobot_llm.transport.failures import error_from
from autobot_llm.types import LLMRequest

ALMOST_ONE = 1 - 1e-9


def retries(draw: float = ALMOST_ONE, now: float = 0.0, **policy: Any) -> Retries:
    return Retries(RetryPolicy(**policy), clock=lambda: now, draw=lambda: draw)


def error_of(status: int, **headers: str) -> LLMError:
    return error_from(status, {name.replace("_", "-"): value for name, value in headers.items()}, b"", "p")


@given(st.integers(1, 10_000), st.floats(0, ALMOST_ONE))
def test_a_wait_is_within_an_exponential_ceiling_that_has_a_limit(num_failures: int, draw: float) -> None:
    policy = RetryPolicy(base=0.5, max_backoff=8.0)
    wait = policy.backoff(num_failures, lambda: draw)
    assert 0 <= wait <= min(8.0, 0.5 * 2 ** min(num_failures - 1, 20))
    assert wait == pytest.approx(draw * policy.backoff(num_failures, lambda: 1.0)), "the jitter covers all of it"


def test_what_may_pass_is_tried_again_and_what_will_not_is_not() -> None:
    passing = [error_of(status) for status in (408, 429, 500, 502, 503, 504, 529)]
    passing += [ProviderUnavailable("reset"), ProviderTimeout("silent"), ProviderError("cut", code="truncated_answer")]
    assert all(map(is_transient, passing))
    lasting: list[LLMError] = [error_of(status) for status in (400, 401, 403, 404, 413, 422)]
    lasting += [InvalidRequestError("x"), AuthenticationError("x"), RequestTimeout("x")]
    lasting += [OverloadedError("no money", retry_after=1, code="insufficient_quota")]
    assert not any(map(is_transient, lasting))


def test_retry_after_is_waited_for_in_full_and_jitter_comes_on_top() -> None:
    wait = retries(draw=0.5).wait_after(error_of(429, retry_after="7"), num_failures=1)
    assert wait == pytest.approx(7.25)
    wait = retries(draw=0.0).wait_after(error_of(503, retry_after_ms="1500"), num_failures=1)
    assert wait == pytest.approx(1.5)


def test_retry_after_may_be_a_date() -> None:
    date = email.utils.formatdate(time.time() + 20, usegmt=True)
    wait = retries(draw=0.0).wait_after(error_of(429, retry_after=date), num_failures=1)
    assert wait is not None
    assert 18 < wait <= 20


def test_a_wait_that_would_end_after_the_deadline_is_not_begun() -> None:
    error = error_of(429, retry_after="3")
    assert retries(now=10).wait_after(error, num_failures=1, deadline=13.4) is None
    assert retries(now=10).wait_after(error, num_failures=1, deadline=13.6) is not None
    assert retries().wait_after(error_of(429, retry_after="3600"), num_failures=1) is None, "no deadline is no licence"


def test_there_are_no_more_retries_than_allowed() -> None:
    one = retries(max_retries=3)
    waits = [one.wait_after(error_of(500), num_failures=number) for number in range(1, 6)]
    assert [wait is not None for wait in waits] == [True, True, True, False, False]
    assert one.num_retries == 3


@given(st.lists(st.booleans(), max_size=400))
def test_retries_are_bounded_by_half_of_the_calls_and_a_reserve(is_call: list[bool]) -> None:
    budget = RetryBudget(reserve=10, share=0.5)
    num_calls = num_retries = 0
    for one in is_call:
        if one:
            num_calls += 1
            budget.note_call()
        else:
            num_retries += budget.take()
        assert num_retries <= 10 + 0.5 * num_calls


REFUSED = (error_of(429), error_of(529), ProviderUnavailable("refused", may_have_begun=False))
MAYBE_BEGUN = (error_of(500), error_of(503), ProviderUnavailable("reset"), ProviderTimeout("silent"))


def test_what_has_side_effects_is_made_again_only_if_it_was_surely_not_begun() -> None:
    assert all(retries().wait_after(error, num_failures=1, may_repeat=False) is not None for error in REFUSED)
    assert all(retries().wait_after(error, num_failures=1, may_repeat=False) is None for error in MAYBE_BEGUN)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, False),
        ({"service_options": {"user": "u", "store": False}}, False),
        ({"service_options": {"store": True}}, True),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, False),
        ({"tools": [{"type": "mcp", "server_url": "https://example.com"}]}, True),
        ({"extra_body": {"mcp_servers": [{"url": "https://example.com"}]}}, True),
    ],
)
def test_side_effects_are_what_a_service_keeps_or_does_itself(fields: dict[str, Any], expected: bool) -> None:
    assert LLMRequest(prompt="x", **fields).has_side_effects is expected


class Calls:
    """A call that fails with `errors`, one after the other, and then answers."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = iter(errors)
        self.num = 0

    async def __call__(self) -> str:
        self.num += 1
        if (error := next(self._errors, None)) is not None:
            raise error
        return "answer"


class Sleeps:
    def __init__(self) -> None:
        self.waits: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.waits.append(seconds)


async def test_the_handler_calls_again_until_there_is_an_answer() -> None:
    sleeps = Sleeps()
    calls = Calls(error_of(500), error_of(429, retry_after="2"), ConnectionResetError("gone"))
    assert await RateLimitHandler(sleep=sleeps).execute_with_retry(calls) == "answer"
    assert calls.num == 4
    assert sleeps.waits[1] >= 2


async def test_the_handler_raises_the_last_error_when_its_retries_are_used_up() -> None:
    last = error_of(502)
    calls = Calls(error_of(500), error_of(500), last, error_of(500))
    with pytest.raises(ProviderError) as raised:
        await RateLimitHandler(sleep=Sleeps()).execute_with_retry(calls, max_retries=2)
    assert raised.value is last
    assert calls.num == 3


async def test_the_handler_leaves_alone_what_is_no_failure_of_a_provider() -> None:
    for error in (ValueError("ours"), error_of(400), asyncio.CancelledError()):
        calls = Calls(*itertools.repeat(error, 1))  # type: ignore[arg-type]
        with pytest.raises(type(error)):
            await RateLimitHandler(sleep=Sleeps()).execute_with_retry(calls)
        assert calls.num == 1


class ForeignError(Exception):
    """As the clients of OpenAI and Anthropic raise them."""

    def __init__(self, status: int, **headers: str) -> None:
        super().__init__("foreign")
        self.status_code = status
        self.response = type("Response", (), {"headers": headers})


async def test_the_handler_understands_the_errors_of_providers_clients() -> None:
    sleeps = Sleeps()
    headers = {"Retry-After": "4"}
    calls = Calls(ForeignError(429, **headers))
    assert await RateLimitHandler(sleep=sleeps).execute_with_retry(calls) == "answer"
    assert sleeps.waits[0] >= 4
    with pytest.raises(ForeignError):
        await RateLimitHandler(sleep=sleeps).execute_with_retry(Calls(ForeignError(401)))


async def test_the_handler_does_not_wait_past_its_timeout() -> None:
    sleeps = Sleeps()
    with pytest.raises(OverloadedError):
        await RateLimitHandler(sleep=sleeps).execute_with_retry(Calls(error_of(429, retry_after="9")), timeout=5)
    assert sleeps.waits == []
