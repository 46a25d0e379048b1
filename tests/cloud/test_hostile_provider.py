"""A provider that fails in every way three times in ten, over real connections: each request still ends well, in time.

AUTOBOT_HOSTILE_REQUESTS sets how many requests are made. Once with what is on by default, and once with everything that
can be switched on in front of a provider.
"""

from __future__ import annotations

import asyncio
import collections
import json
import os
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from openai_upstream import LAST, chunk, whole
from raw_server import Asked, Wire, raw_server
from universal.real_redis import needs_redis, real_redis

from autobot_llm import LLMInterface, Settings
from autobot_llm.errors import LLMError
from autobot_llm.types import ChatMessage, LLMRequest, LLMResponse

NUM_REQUESTS = int(os.environ.get("AUTOBOT_HOSTILE_REQUESTS", "2000"))
AT_ONCE = 64
TIMEOUT = 6.0
SLACK = 1.0  # for the scheduling of a busy machine
MOST_CALLS_PER_REQUEST = 1.5
PIECES = ("The answer to ", "{} is ", "yes.")
ERROR = json.dumps({"error": {"message": "not now", "type": "server_error", "code": None}}).encode()

Trouble = Callable[["Provider", Wire, dict[str, Any]], Awaitable[None]]


def text_of(question: str) -> str:
    return "".join(PIECES).format(question)


class Provider:
    """Counts calls, and what it did for requests that are to be stored: that must not be done twice."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.num_calls = 0
        self.num_stored: collections.Counter[str] = collections.Counter()
        self.troubles: collections.Counter[str] = collections.Counter()

    async def play(self, wire: Wire, asked: Asked) -> None:
        self.num_calls += 1
        body = json.loads(asked.body)
        trouble = self._random.choice(TROUBLES) if self._random.random() < 0.3 else None
        if trouble is refuse or trouble is overloaded:
            await trouble(self, wire, body)
            return
        if body.get("store"):
            self.num_stored[body["messages"][0]["content"]] += 1
        if trouble is None:
            await self.answer(wire, body)
            return
        self.troubles[trouble.__name__] += 1
        await trouble(self, wire, body)

    async def answer(self, wire: Wire, body: dict[str, Any], *, pause: float = 0.0, pieces: int = 99) -> None:
        """The answer, or its first `pieces` pieces before the connection breaks."""
        question = body["messages"][0]["content"]
        if not body.get("stream"):
            data = json.dumps(whole({"content": text_of(question)})).encode()
            await asyncio.sleep(pause)
            await wire.reply(data, content_type="application/json")
            return
        await wire.begin_stream()
        for piece in PIECES[:pieces]:
            await wire.piece(b"data: " + json.dumps(chunk({"content": piece.format(question)})).encode() + b"\n\n")
            await asyncio.sleep(pause)
        if pieces < len(PIECES):
            reset(wire)
        for last in (chunk({}, finish="stop"), LAST):
            await wire.piece(b"data: " + json.dumps(last).encode() + b"\n\n")
        await wire.piece(b"data: [DONE]\n\n")
        await wire.end_stream()


def reset(wire: Wire) -> None:
    wire.reset()
    raise ConnectionError


async def refuse(provider: Provider, wire: Wire, body: dict[str, Any]) -> None:
    provider.troubles["refuse"] += 1
    await wire.reply(ERROR, status=429, content_type="application/json", retry_after_ms="30")


async def overloaded(provider: Provider, wire: Wire, body: dict[str, Any]) -> None:
    provider.troubles["overloaded"] += 1
    await wire.reply(ERROR, status=529, content_type="application/json")


async def fail(provider: Provider, wire: Wire, body: dict[str, Any]) -> None:
    await wire.reply(ERROR, status=500, content_type="application/json")


async def vanish(provider: Provider, wire: Wire, body: dict[str, Any]) -> None:
    reset(wire)


async def break_off(provider: Provider, wire: Wire, body: dict[str, Any]) -> None:
    if body.get("stream"):
        await provider.answer(wire, body, pieces=1)
    await wire.send(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{"id": ')
    reset(wire)


async def break_off_before_the_first_piece(provider: Provider, wire: Wire, body: dict[str, Any]) -> None:
    if body.get("stream"):
        await provider.answer(wire, body, pieces=0)
    reset(wire)


async def dawdle(provider: Provider, wire: Wire, body: dict[str, Any]) -> None:
    await provider.answer(wire, body, pause=0.15)


async def babble(provider: Provider, wire: Wire, body: dict[str, Any]) -> None:
    await wire.reply(b"<html>It works!</html>", content_type="text/html", status=502)


TROUBLES: tuple[Trouble, ...] = (
    refuse, overloaded, fail, vanish, break_off, break_off_before_the_first_piece, dawdle, babble
)  # fmt: skip


async def ask(llm: LLMInterface, number: int) -> tuple[LLMResponse | LLMError, float]:
    """What became of a request, and how long that took. Any other exception fails the test."""
    request = LLMRequest(
        messages=[ChatMessage(role="user", content=f"question {number}")],
        stream=number % 2 == 0,
        timeout=TIMEOUT,
        service_options={"store": True} if number % 5 == 0 else {},
    )
    outcome: LLMResponse | LLMError
    began = time.monotonic()
    try:
        outcome = await llm.chat_completion(request)
    except LLMError as error:
        outcome = error
    return outcome, time.monotonic() - began


async def test_every_request_ends_in_its_answer_or_a_documented_error_in_time_and_nothing_is_done_twice() -> None:
    figures = await asked_by_many()
    assert figures["num_retries"] > 0


@needs_redis
async def test_nor_with_hedges_shared_limits_and_shared_budgets(tmp_path: Path) -> None:
    async with real_redis() as redis:
        figures = await asked_by_many(
            redis_url=redis.url, cloud_rate_limits=("openai/m 100000rpm 100000000tpm",), cloud_hedging="all",
            cloud_budget_per_day=1000.0, cache_dir=tmp_path, cloud_prices=priced(tmp_path),
        )  # fmt: skip
    assert figures["num_retries"] > 0
    assert figures["num_hedges"] > 0
    assert figures["dollars_spent"] > 0


def priced(folder: Path) -> Path:
    path = folder / "prices.json"
    path.write_text(json.dumps({"openai/m-1": {"input": 1, "output": 2, "dated": "2026-11-20"}}))
    return path


async def asked_by_many(**more: Any) -> dict[str, float]:
    """Ask, hold every promise, and return the provider's figures."""
    provider = Provider(seed=8)
    at_once = asyncio.Semaphore(AT_ONCE)
    async with raw_server(provider.play) as server:
        settings = Settings(
            provider="openai", openai_endpoint=f"{server.url}/v1", openai_api_key="sk-key", default_model="m",
            cache_enabled=False, **more,
        )  # fmt: skip
        async with LLMInterface(settings) as llm:

            async def one(number: int) -> tuple[LLMResponse | LLMError, float]:
                async with at_once:
                    return await ask(llm, number)

            ended = await asyncio.gather(*map(one, range(NUM_REQUESTS)))
            figures = llm.get_metrics()["openai"]
    answers = [outcome for outcome, _ in ended if isinstance(outcome, LLMResponse)]
    for number, (outcome, seconds) in enumerate(ended):
        assert seconds < TIMEOUT + SLACK
        if isinstance(outcome, LLMResponse):
            assert outcome.content == text_of(f"question {number}")
    assert len(answers) > 0.85 * NUM_REQUESTS, collections.Counter(type(one).__name__ for one, _ in ended)
    assert set(provider.troubles) == {trouble.__name__ for trouble in TROUBLES}
    assert provider.num_calls <= MOST_CALLS_PER_REQUEST * NUM_REQUESTS
    assert max(provider.num_stored.values()) == 1, "what the service keeps was made twice"
    return figures
