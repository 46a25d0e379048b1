"""What clients of the server see of retries, rate limits, fallbacks and budgets at the provider behind it."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from openai_upstream import hello
from raw_server import Asked, RawServer, Wire, raw_server
from server_harness import QUESTION, Server, serving

from autobot_llm.interface import LLMInterface
from autobot_llm.settings import CloudSettings, Settings

CHAT = "/v1/chat/completions"
BUSY = json.dumps({"error": {"message": "Slow down", "code": "rate_limit_exceeded"}}).encode()


async def answer(wire: Wire, asked: Asked, **headers: str) -> None:
    reply = hello(json.loads(asked.body))
    if isinstance(reply, dict):
        await wire.reply(json.dumps(reply).encode(), content_type="application/json", **headers)
        return
    await wire.begin_stream(**headers)
    for one in reply:
        await wire.piece(b"data: " + json.dumps(one).encode() + b"\n\n")
    await wire.piece(b"data: [DONE]\n\n")
    await wire.end_stream()


class Upstream:
    """Refuses its first `num_refused` calls with `status`, and every call for the model "down"."""

    def __init__(self, num_refused: int = 0, status: int = 429, **headers: str) -> None:
        self.num_refused = num_refused
        self._status = status
        self._headers = headers

    async def __call__(self, wire: Wire, asked: Asked) -> None:
        if self.num_refused or json.loads(asked.body)["model"] == "down":
            self.num_refused = max(0, self.num_refused - 1)
            await wire.reply(BUSY, status=self._status, content_type="application/json", **self._headers)
            return
        await answer(wire, asked)


@contextlib.asynccontextmanager
async def in_front_of(upstream: Upstream, **settings: Any) -> AsyncIterator[tuple[Server[Any], RawServer]]:
    async with raw_server(upstream) as behind:
        clouds = {"up": CloudSettings(endpoint=behind.url)}
        given = Settings(port=0, provider="cloud", clouds=clouds, default_model="up/m", **settings)
        async with serving(given, LLMInterface(given), None) as server:  # type: ignore[type-var]
            yield server, behind


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": QUESTION, **fields}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_that_passes_is_never_seen_by_the_client(stream: bool) -> None:
    async with in_front_of(Upstream(2, retry_after_ms="20")) as (server, behind):
        reply = await server.post(CHAT, body(stream=stream))
        metrics = await server.get("/metrics")
    assert reply.status == 200
    assert b"world" in reply.body
    assert len(behind.asked) == 3
    assert b'autobot_llm_retries_total{provider="up"} 2.0' in metrics.body


async def test_a_refusal_that_lasts_is_passed_on_with_its_retry_after() -> None:
    async with in_front_of(Upstream(9, retry_after="120")) as (server, behind):
        reply = await server.post(CHAT, body())
    assert (reply.status, reply.headers["retry-after"]) == (429, "120")
    assert "Slow down" in reply.json["error"]["message"]
    assert len(behind.asked) == 1


async def test_another_model_answers_and_the_reply_names_it() -> None:
    async with in_front_of(
        Upstream(status=500, retry_after_ms="1"), cloud_retry_max_attempts=1, fallbacks=("up/down > up/m",)
    ) as (server, behind):
        reply = await server.post(CHAT, body(model="down"))
    assert reply.status == 200
    assert [json.loads(one.body)["model"] for one in behind.asked] == ["down", "down", "m"]
    assert "fallback" in reply.headers["x-autobot-optimizations"]


async def test_the_cost_is_in_a_header_and_a_spent_budget_is_a_402_in_each_dialect(tmp_path: Path) -> None:
    prices = tmp_path / "prices.json"
    prices.write_text('{"up/m": {"input": 1000, "output": 1000, "dated": "2026-11-20"},'
                      ' "up/m-1": {"input": 1000, "output": 1000, "dated": "2026-11-20"}}')  # fmt: skip
    settings = {"cloud_prices": prices, "cache_dir": tmp_path, "cloud_budget_per_day": 0.02}
    async with in_front_of(Upstream(), **settings) as (server, behind):
        first = await server.post(CHAT, body())
        spent = re.search(r"cost;dollars_spent=([\d.]+)", first.headers["x-autobot-optimizations"])
        assert spent and float(spent[1]) == pytest.approx(0.017)  # of 12 and 5 tokens
        refused = await server.post(CHAT, body())
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="any", max_retries=0) as client:
            with pytest.raises(anthropic.APIStatusError) as raised:
                await client.messages.create(model="m", messages=QUESTION, max_tokens=10)  # type: ignore[arg-type]
    assert (refused.status, refused.json["error"]["code"]) == (402, "budget_exceeded")
    assert "AUTOBOT_CLOUD_BUDGET_PER_DAY" in refused.json["error"]["message"]
    assert 0 < int(refused.headers["retry-after"]) <= 24 * 3600
    assert (raised.value.status_code, raised.value.body["error"]["type"]) == (402, "billing_error")  # type: ignore[index]
    assert len(behind.asked) == 1
