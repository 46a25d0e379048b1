"""Embeddings asked for side by side through the interface share calls; everybody gets the vectors of his own texts."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from openai_upstream import embeddings, vector
from raw_server import Asked, RawServer, Wire, raw_server

from autobot_llm import LLMInterface, Settings
from autobot_llm.errors import InvalidRequestError, OverloadedError
from autobot_llm.types import EmbeddingResponse

ERROR = json.dumps({"error": {"message": "too long: poison"}}).encode()


class Upstream:
    """Makes embeddings once `go` is set, so that requests can gather before. A text "poison" is refused."""

    def __init__(self, *, status: int = 400) -> None:
        self.inputs: list[list[str]] = []
        self.go = asyncio.Event()
        self._status = status
        self.failures = 0

    async def play(self, wire: Wire, asked: Asked) -> None:
        body = json.loads(asked.body)
        given = body["input"]
        self.inputs.append(given if isinstance(given, list) else [given])
        await self.go.wait()
        if self.failures:
            self.failures -= 1
            await wire.reply(ERROR, status=503, content_type="application/json", retry_after_ms="1")
            return
        if "poison" in self.inputs[-1]:
            await wire.reply(ERROR, status=self._status, content_type="application/json")
            return
        answer = embeddings(body) | {"usage": {"prompt_tokens": 10 * len(given), "total_tokens": 10 * len(given)}}
        await wire.reply(json.dumps(answer).encode(), content_type="application/json")


def interface(server: RawServer, **settings: Any) -> LLMInterface:
    # Without the cache, which looks a text up before it asks: these tests say when a request arrives.
    given = {"cache_enabled": False, "cloud_batch_window_ms": 30.0, "models": {"embedding": "e-1"}, **settings}
    endpoint = f"{server.url}/v1"
    return LLMInterface(Settings(provider="openai", openai_endpoint=endpoint, openai_api_key="sk-key", **given))


async def gathered(
    llm: LLMInterface, upstream: Upstream, texts: list[str], **options: Any
) -> list[EmbeddingResponse | BaseException]:
    """Ask for all `texts` at once, the first one's call being under way already."""
    first = asyncio.create_task(llm.embed(texts[0], **options))
    async with asyncio.timeout(5):
        while not upstream.inputs:
            await asyncio.sleep(0.001)
    others = [asyncio.create_task(llm.embed(text, **options)) for text in texts[1:]]
    await asyncio.sleep(0)
    upstream.go.set()
    return await asyncio.gather(first, *others, return_exceptions=True)


def assert_own_vectors(texts: list[str], responses: list[EmbeddingResponse | BaseException]) -> None:
    for text, response in zip(texts, responses, strict=True):
        assert isinstance(response, EmbeddingResponse), response
        (own,) = response.vectors
        assert list(own) == vector(text, len(own))


async def test_what_comes_while_a_call_is_under_way_shares_the_next_ones() -> None:
    upstream = Upstream()
    texts = [f"text number {number}" for number in range(21)]
    async with raw_server(upstream.play) as server, interface(server) as llm:
        responses = await gathered(llm, upstream, texts)
        figures = llm.get_metrics()["openai"]
    assert_own_vectors(texts, responses)
    assert sorted(map(len, upstream.inputs)) == [1, 10, 10]
    assert sum(response.usage.prompt_tokens for response in responses if isinstance(response, EmbeddingResponse)) == 210
    assert (figures["num_shared_calls"], figures["num_requests_in_shared_calls"]) == (2, 20)


async def test_a_lone_request_does_not_wait_for_the_window() -> None:
    upstream = Upstream()
    upstream.go.set()
    async with raw_server(upstream.play) as server, interface(server, cloud_batch_window_ms=60_000.0) as llm:
        async with asyncio.timeout(5):
            for number in range(3):
                await llm.embed(f"text {number}")
    assert len(upstream.inputs) == 3


async def test_one_wrong_text_fails_its_own_request_alone() -> None:
    upstream = Upstream()
    texts = ["zero", "one", "poison", "three"]
    async with raw_server(upstream.play) as server, interface(server) as llm:
        responses = await gathered(llm, upstream, texts)
    assert isinstance(responses[2], InvalidRequestError)
    assert_own_vectors([texts[0], texts[1], texts[3]], [responses[0], responses[1], responses[3]])


async def test_what_differs_in_more_than_its_texts_never_shares_a_call() -> None:
    upstream = Upstream()
    async with raw_server(upstream.play) as server, interface(server) as llm:
        one = asyncio.create_task(gathered(llm, upstream, ["a", "b", "c"], model="e-1"))
        two = asyncio.create_task(gathered(llm, upstream, ["d", "e", "f"], model="e-1", dimensions=4))
        responses = [*await one, *await two]
    assert_own_vectors(list("abcdef"), responses)
    assert all(set(call) <= set("abc") or set(call) <= set("def") for call in upstream.inputs)


async def test_a_shared_call_that_fails_is_made_again_for_all() -> None:
    upstream = Upstream()
    texts = ["zero", "one", "two"]
    async with raw_server(upstream.play) as server, interface(server) as llm:
        upstream.failures = 2
        responses = await gathered(llm, upstream, texts)
        assert llm.get_metrics()["openai"]["num_retries"] == 2
    assert_own_vectors(texts, responses)


async def test_a_refusal_for_too_many_requests_reaches_everybody_when_retries_are_off() -> None:
    upstream = Upstream(status=429)
    async with raw_server(upstream.play) as server, interface(server, cloud_retry_max_attempts=0) as llm:
        responses = await gathered(llm, upstream, ["zero", "one", "poison"])
    assert [type(one) for one in responses[1:]] == [OverloadedError, OverloadedError]


async def test_batching_can_be_switched_off() -> None:
    upstream = Upstream()
    texts = [str(number) for number in range(5)]
    async with raw_server(upstream.play) as server, interface(server, cloud_max_batch_size=1) as llm:
        responses = await gathered(llm, upstream, texts)
    assert_own_vectors(texts, responses)
    assert list(map(len, upstream.inputs)) == [1] * 5


async def test_leaving_takes_a_text_out_of_the_shared_call() -> None:
    upstream = Upstream()
    async with raw_server(upstream.play) as server, interface(server) as llm:
        first = asyncio.create_task(llm.embed("first"))
        async with asyncio.timeout(5):
            while not upstream.inputs:
                await asyncio.sleep(0.001)
        others = [asyncio.create_task(llm.embed(f"text {number}")) for number in range(5)]
        await asyncio.sleep(0)
        others[0].cancel()
        upstream.go.set()
        await asyncio.gather(first, *others, return_exceptions=True)
    assert upstream.inputs[1:] == [[f"text {number}" for number in range(1, 5)]]
