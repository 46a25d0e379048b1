"""A second call where the first is slow to begin: the tail falls, few calls more, nothing mixed, nothing left over."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from limited_upstream import BUSY
from openai_upstream import LAST, chunk, whole
from raw_server import Asked, RawServer, Wire, raw_server

from autobot_llm import LLMInterface, Settings
from autobot_llm.cloud.hedged import LEAST_SAMPLES
from autobot_llm.cloud.ledger import FILE_NAME, read_spending
from autobot_llm.errors import LLMError
from autobot_llm.types import LLMResponse

HELLO = [{"role": "user", "content": "hello"}]
SLOW = 0.6
EVERY = 30  # calls, one of which is slow to begin


class SlowTail:
    """Numbers its calls, says its number in every piece of the answer, and is slow now and then."""

    def __init__(self, *, every: int = EVERY, fails_when_slow: bool = False) -> None:
        self.num_calls = 0
        self.num_given_up = 0
        self.is_limited = False
        self._every = every
        self._fails_when_slow = fails_when_slow

    async def play(self, wire: Wire, asked: Asked) -> None:
        self.num_calls += 1
        number = self.num_calls
        body = json.loads(asked.body)
        headers = {}
        if self.is_limited:
            headers = {"x_ratelimit_limit_requests": "1000", "x_ratelimit_remaining_requests": "0",
                       "x_ratelimit_reset_requests": "1000s"}  # fmt: skip
        if number % self._every == 0:
            gone = asyncio.create_task(wire.until_gone())
            await asyncio.wait((gone,), timeout=SLOW)
            if gone.done():
                self.num_given_up += 1
                return
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone
            if self._fails_when_slow:
                await wire.reply(BUSY, status=500, content_type="application/json")
                return
        if not body.get("stream"):
            data = json.dumps(whole({"content": f"{number} {number} {number}"})).encode()
            await wire.reply(data, content_type="application/json", **headers)
            return
        await wire.begin_stream(**headers)
        for one in (*(chunk({"content": f"{number} "}) for _ in range(3)), chunk({}, finish="stop"), LAST):
            await wire.piece(b"data: " + json.dumps(one).encode() + b"\n\n")
        await wire.piece(b"data: [DONE]\n\n")
        await wire.end_stream()


@contextlib.asynccontextmanager
async def in_front_of(upstream: SlowTail, **more: Any) -> AsyncIterator[tuple[LLMInterface, RawServer]]:
    async with raw_server(upstream.play) as server:
        settings = Settings(
            provider="openai", openai_endpoint=f"{server.url}/v1", openai_api_key="sk-key", default_model="gpt-4o",
            cache_enabled=False, **{"cloud_hedging": "deterministic", "cloud_retry_max_attempts": 0, **more},
        )  # fmt: skip
        async with LLMInterface(settings) as llm:
            yield llm, server


async def ask(llm: LLMInterface, **options: Any) -> tuple[LLMResponse, float]:
    began = time.monotonic()
    response = await llm.chat_completion(HELLO, **{"temperature": 0, "stream": True, "model": "gpt-4o", **options})
    return response, time.monotonic() - began


def line_of(response: LLMResponse) -> Any:
    return next(line for line in response.optimizations if line.name == "hedging")


@pytest.mark.parametrize("streams", [True, False])
async def test_the_tail_falls_with_five_percent_more_calls_at_most_and_no_answer_is_mixed(
    streams: bool, tmp_path: Path
) -> None:
    upstream = SlowTail()
    num_requests = 300
    async with in_front_of(upstream, cache_dir=tmp_path) as (llm, server):
        tasks_before = len(asyncio.all_tasks())
        ended = [await ask(llm, stream=streams) for _ in range(num_requests)]
        await server.until(lambda seen: upstream.num_given_up >= hedges_won(llm) and seen.num_open <= 2)
        # What is left is the server's: a task for each of the two connections that are open and idle.
        await server.until(lambda seen: len(asyncio.all_tasks()) <= tasks_before + seen.num_open)
        figures = llm.get_metrics()["openai"]
    for response, _ in ended:
        assert len(set(response.content.split())) == 1, "one call gave the whole answer"
    late = sorted(seconds for _, seconds in ended[2 * EVERY :])
    assert late[-3] < SLOW / 2, "99 of 100 begin soon"
    assert 5 <= figures["num_hedges_won"] <= figures["num_hedges"] <= 0.05 * num_requests
    num_extra = upstream.num_calls - num_requests
    assert figures["num_hedges_won"] <= num_extra <= figures["num_hedges"], "some are given up before they are sent"
    marked = [response for response, _ in ended if line_of(response).applied]
    assert len(marked) == figures["num_hedges"]
    paid_twice = (4 * 2.5 + 8 * 1.25 + 5 * 10 + 12 * 2.5) / 1e6
    for one in marked:
        assert sum(line.dollars_spent or 0 for line in one.optimizations) == pytest.approx(paid_twice), (
            "the prompt twice"
        )
    (account,) = read_spending(tmp_path / FILE_NAME, "2000")
    assert account.num_requests == num_requests + figures["num_hedges"]


def hedges_won(llm: LLMInterface) -> float:
    return llm.get_metrics()["openai"]["num_hedges_won"]


async def test_without_it_the_same_tail_is_slow() -> None:
    async with in_front_of(SlowTail(), cloud_hedging="off") as (llm, _):
        ended = [await ask(llm) for _ in range(2 * EVERY)]
    assert max(seconds for _, seconds in ended) >= SLOW


async def learned(llm: LLMInterface, **options: Any) -> None:
    for _ in range(LEAST_SAMPLES + 1):
        await ask(llm, **options)


async def one_slow(llm: LLMInterface, upstream: SlowTail, **options: Any) -> LLMResponse:
    while (upstream.num_calls + 1) % EVERY:
        await ask(llm, **options)
    return (await ask(llm, **options))[0]


async def one_hedged(llm: LLMInterface, upstream: SlowTail, **options: Any) -> LLMResponse | None:
    """The answer to a slow call that got a second one. A busy machine may spend what is allowed on a call that was
    late by itself: then the next slow one has to do."""
    for _ in range(5):
        response = await one_slow(llm, upstream, **options)
        if line_of(response).applied:
            return response
    return None


@pytest.mark.parametrize(
    ("options", "why"),
    [({"temperature": 1}, "drawn at random"), ({"service_options": {"store": True}}, "side effects")],
)
async def test_a_request_that_may_not_be_made_twice_is_not(options: dict[str, Any], why: str) -> None:
    upstream = SlowTail()
    async with in_front_of(upstream) as (llm, _):
        await learned(llm)
        response = await one_slow(llm, upstream, **options)
        assert not line_of(response).applied
        assert why in line_of(response).reason
        assert llm.get_metrics()["openai"]["num_hedges"] == 0


async def test_drawn_answers_too_where_the_settings_say_all() -> None:
    upstream = SlowTail()
    async with in_front_of(upstream, cloud_hedging="all") as (llm, _):
        await learned(llm, temperature=1)
        assert await one_hedged(llm, upstream, temperature=1)


async def test_no_second_call_while_the_rate_limit_makes_others_wait() -> None:
    upstream = SlowTail()
    async with in_front_of(upstream) as (llm, _):
        await learned(llm)
        while (upstream.num_calls + 2) % EVERY:
            await ask(llm)
        upstream.is_limited = True
        await ask(llm)  # tells that nothing is left
        response, _ = await ask(llm)
        assert not line_of(response).applied
        assert upstream.num_calls % EVERY == 0


async def test_where_the_slow_call_would_fail_the_second_one_answers() -> None:
    upstream = SlowTail(fails_when_slow=True)
    async with in_front_of(upstream) as (llm, _):
        await learned(llm)
        upstream.num_calls = 0
        response = await one_hedged(llm, upstream)
        assert response is not None and len(set(response.content.split())) == 1


async def test_leaving_gives_both_calls_up() -> None:
    upstream = SlowTail()
    async with in_front_of(upstream) as (llm, server):
        await learned(llm)
        while (upstream.num_calls + 1) % EVERY:
            await ask(llm)
        upstream._every = 1  # both are slow
        task = asyncio.create_task(ask(llm))
        await server.until(lambda seen: upstream.num_calls >= EVERY + 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await server.until(lambda seen: upstream.num_given_up == 2)
        with pytest.raises(LLMError):
            await llm.chat_completion(HELLO, temperature=0, stream=True, timeout=0.1)
        await server.until(lambda seen: upstream.num_given_up >= 3)
