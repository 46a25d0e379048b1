"""The chain in front of a provider over HTTP: what it repeats, what it leaves alone, and what it says about it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from openai_upstream import chunk, hello, whole
from raw_server import Asked, RawServer, Wire, raw_server

from autobot_llm import LLMInterface, Settings
from autobot_llm.cloud.circuit_breaker import BreakerPolicy, BreakerState, CircuitBreaker
from autobot_llm.cloud.retried import Retried
from autobot_llm.cloud.retry import Retries, RetryPolicy
from autobot_llm.errors import (
    InvalidRequestError,
    LLMError,
    OverloadedError,
    ProviderError,
    ProviderUnavailable,
    RequestTimeout,
)
from autobot_llm.providers.scripted import ScriptedProvider
from autobot_llm.report import OptimizationOutcome
from autobot_llm.types import LLMRequest, LLMResponse, Start, TextDelta

ERROR = json.dumps({"error": {"message": "not now"}}).encode()
REQUEST = LLMRequest(prompt="hi", timeout=10.0)


def interface(server: RawServer, **settings: Any) -> LLMInterface:
    return LLMInterface(
        Settings(
            provider="openai", openai_endpoint=f"{server.url}/v1", openai_api_key="sk-key", default_model="m",
            cache_enabled=False, **settings,
        )
    )  # fmt: skip


async def say_hello(wire: Wire, asked: Asked, **headers: str) -> None:
    answer = hello(json.loads(asked.body))
    if isinstance(answer, dict):
        await wire.reply(json.dumps(answer).encode(), content_type="application/json", **headers)
        return
    await wire.begin_stream(**headers)
    for one in answer:
        await wire.piece(b"data: " + json.dumps(one).encode() + b"\n\n")
    await wire.piece(b"data: [DONE]\n\n")
    await wire.end_stream()


def line(response: LLMResponse, name: str) -> OptimizationOutcome:
    (found,) = (one for one in response.optimizations if one.name == name)
    return found


def failing_at_first(num: int, status: int, **headers: str) -> Callable[[Wire, Asked], Any]:
    num_calls = 0

    async def play(wire: Wire, asked: Asked) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls <= num:
            await wire.reply(ERROR, status=status, content_type="application/json", **headers)
            return
        await say_hello(wire, asked)

    return play


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_after_a_failure_is_the_answer_and_its_report_says_so(stream: bool) -> None:
    async with raw_server(failing_at_first(1, 503, retry_after_ms="10")) as server, interface(server) as llm:
        response = await llm.chat_completion([{"role": "user", "content": "hi"}], stream=stream)
        again = await llm.chat_completion([{"role": "user", "content": "hi"}], stream=stream)
        figures = llm.get_metrics()["openai"]
    assert response.content == "Hello, world"
    report = line(response, "retry_with_backoff")
    assert report.applied
    assert "not now" in report.reason
    assert not line(again, "retry_with_backoff").applied
    assert (len(server.asked), figures["num_retries"]) == (3, 1)
    assert figures["retry_wait_seconds"] >= 0.01


async def test_the_callers_own_mistakes_are_not_repeated() -> None:
    async with raw_server(failing_at_first(9, 400)) as server, interface(server) as llm:
        with pytest.raises(InvalidRequestError):
            await llm.generate_response("hi")
    assert len(server.asked) == 1


async def test_nothing_is_asked_again_once_a_piece_of_the_answer_was_handed_on() -> None:
    async def play(wire: Wire, asked: Asked) -> None:
        await wire.begin_stream()
        await wire.piece(b"data: " + json.dumps(chunk({"content": "half"})).encode() + b"\n\n")
        await server.until(lambda _: bool(seen))
        wire.reset()
        raise ConnectionError

    seen: list[str] = []
    async with raw_server(play) as server, interface(server) as llm:
        with pytest.raises(ProviderError):
            async for event in llm.stream([{"role": "user", "content": "hi"}]):
                if isinstance(event, TextDelta):
                    seen.append(event.text)  # noqa: PERF401  # the server looks at it meanwhile
    assert seen == ["half"]
    assert len(server.asked) == 1


async def test_a_request_that_only_had_its_start_is_asked_again_and_its_reader_sees_one_start() -> None:
    num_calls = 0

    async def play(wire: Wire, asked: Asked) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls > 1:
            await say_hello(wire, asked)
            return
        await wire.begin_stream()
        await wire.piece(b"data: " + json.dumps(chunk({"role": "assistant", "content": ""})).encode() + b"\n\n")
        wire.reset()
        raise ConnectionError

    async with raw_server(play) as server, interface(server) as llm:
        events = [event async for event in llm.stream([{"role": "user", "content": "hi"}])]
    assert [type(event) for event in events].count(Start) == 1
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == "Hello, world"
    assert len(server.asked) == 2


async def test_a_wait_beyond_the_timeout_is_refused_at_once_with_the_providers_own_words() -> None:
    async with raw_server(failing_at_first(9, 429, retry_after="30")) as server, interface(server) as llm:
        async with asyncio.timeout(5):
            with pytest.raises(OverloadedError, match="not now") as raised:
                await llm.generate_response("hi", timeout=20.0)
            with pytest.raises(OverloadedError, match="later than its timeout"):
                await llm.generate_response("again", timeout=20.0)
    assert raised.value.retry_after == 30
    assert len(server.asked) == 1, "the second one was not even sent"


async def test_the_timeout_holds_while_a_retry_is_waited_for() -> None:
    async with raw_server(failing_at_first(9, 500, retry_after_ms="300")) as server, interface(server) as llm:
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises((ProviderError, RequestTimeout)):
            await llm.generate_response("hi", timeout=0.5)
        assert loop.time() - began < 2
    assert 1 <= len(server.asked) <= 2


async def test_a_cancelled_wait_for_a_retry_leaves_nothing_behind() -> None:
    async with raw_server(failing_at_first(9, 503, retry_after="20")) as server, interface(server) as llm:
        tasks = {asyncio.create_task(llm.generate_response("hi")) for _ in range(5)}
        await server.until(lambda seen: len(seen.asked) == 5)
        before = asyncio.all_tasks() - tasks
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert asyncio.all_tasks() <= before
        assert llm.get_metrics()["interface"]["num_in_flight"] == 0
    assert len(server.asked) == 5


async def test_limits_that_are_told_are_kept_to_before_the_provider_has_to_refuse() -> None:
    limits = {"x_ratelimit_limit_requests": "100", "x_ratelimit_remaining_requests": "1",
              "x_ratelimit_reset_requests": "990ms"}  # fmt: skip

    async def play(wire: Wire, asked: Asked) -> None:
        told = limits if json.loads(asked.body)["model"] == "scarce" else {}
        await say_hello(wire, asked, **told)

    async with raw_server(play) as server, interface(server) as llm:
        await llm.generate_response("hi", model="scarce")
        free = await llm.generate_response("hi", model="scarce")
        waited = await asyncio.gather(*(llm.generate_response("hi", model="scarce") for _ in range(3)))
        other = await llm.generate_response("hi", model="plenty")
        figures = llm.get_metrics()["openai"]
    assert not line(free, "rate_limit_handling").applied
    assert any(line(one, "rate_limit_handling").applied for one in waited)
    assert line(other, "rate_limit_handling").reason == "the provider tells no rate limits"
    assert figures["num_rate_limit_waits"] >= 2
    assert figures["num_retries"] == 0


def retried(provider: ScriptedProvider, breaker: CircuitBreaker, max_retries: int = 0) -> Retried:
    retries = Retries(RetryPolicy(max_retries=max_retries, base=0.001))
    return Retried(provider, name="p", retries=retries, breaker=breaker, default_timeout=None)


async def outcome_of(chain: Retried) -> str:
    try:
        return "".join([event.text async for event in chain.stream(REQUEST) if isinstance(event, TextDelta)])
    except LLMError as error:
        return str(error.code)


async def test_a_provider_that_keeps_failing_is_left_alone_and_asked_again_when_a_probe_succeeds() -> None:
    is_well = False
    provider = ScriptedProvider(lambda request: ["well"] if is_well else [ProviderUnavailable("down")])
    await provider.start()
    now = 0.0
    breaker = CircuitBreaker(BreakerPolicy(least=4, window=4, cooldown=5.0), clock=lambda: now, draw=lambda: 0.0)
    chain = retried(provider, breaker)
    assert [await outcome_of(chain) for _ in range(6)] == ["provider_unavailable"] * 4 + ["circuit_open"] * 2
    assert len(provider.requests) == 4
    now = 6.0
    assert await outcome_of(chain) == "provider_unavailable"
    assert await outcome_of(chain) == "circuit_open"
    is_well, now = True, 17.0
    assert await outcome_of(chain) == "well"
    assert str(breaker.state) == BreakerState.CLOSED
    assert chain.metrics()["num_circuit_openings"] == 2


async def test_a_cancelled_probe_lets_another_one_through() -> None:
    provider = ScriptedProvider(["well"], delay=0.001)
    await provider.start()
    now = 0.0
    breaker = CircuitBreaker(BreakerPolicy(least=1, window=1, cooldown=5.0), clock=lambda: now, draw=lambda: 0.0)
    ticket = breaker.admit()
    assert ticket is not None
    breaker.record(ticket, succeeded=False)
    now = 6.0
    chain = retried(provider, breaker)
    probe = asyncio.create_task(outcome_of(chain))
    while not provider.num_open_streams:
        await asyncio.sleep(0)
    assert await outcome_of(chain) == "circuit_open"
    probe.cancel()
    await asyncio.gather(probe, return_exceptions=True)
    assert await outcome_of(chain) == "well"


async def test_a_provider_that_is_silent_until_the_deadline_has_failed() -> None:
    async def play(wire: Wire, asked: Asked) -> None:
        await wire.until_gone()

    async with raw_server(play) as server, interface(server) as llm:
        for _ in range(11):
            with pytest.raises((RequestTimeout, ProviderUnavailable)):
                await llm.generate_response("hi", timeout=0.06)
        assert llm.get_metrics()["openai"]["circuit_open"] == 1
    assert 1 <= len(server.asked) <= 10, "the eleventh was not sent"


async def test_what_the_service_keeps_is_not_asked_for_twice_unless_it_was_refused() -> None:
    async def play(wire: Wire, asked: Asked) -> None:
        if len(server.asked) == 1:
            await wire.reply(ERROR, status=429, content_type="application/json", retry_after_ms="5")
        elif len(server.asked) == 2:
            await wire.reply(json.dumps(whole({"content": "kept"})).encode(), content_type="application/json")
        else:
            wire.reset()
            raise ConnectionError

    stored: dict[str, Any] = {"service_options": {"store": True}}
    async with raw_server(play) as server, interface(server) as llm:
        assert (await llm.chat_completion([{"role": "user", "content": "a"}], **stored)).content == "kept"
        with pytest.raises(ProviderUnavailable):
            await llm.chat_completion([{"role": "user", "content": "b"}], **stored)
        assert len(server.asked) == 3, "not even over a new connection"
        with pytest.raises(ProviderUnavailable):
            await llm.chat_completion([{"role": "user", "content": "c"}], timeout=1.0)
        assert len(server.asked) > 4
