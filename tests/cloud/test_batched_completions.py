"""Prompts that come together share a call, each gets its own answer, and who may not wait does not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from openai_upstream import Json, Upstream, hello, openai_upstream
from raw_server import Asked, Wire, raw_server

from autobot_llm import LLMInterface, Settings
from autobot_llm.cloud.batched_completions import _divided_number
from autobot_llm.cloud.ledger import FILE_NAME, read_spending
from autobot_llm.errors import InvalidRequestError
from autobot_llm.types import LLMResponse


def complete(body: Json) -> Json | list[Json]:
    """Repeats each prompt, the last one first, as providers may answer in any order."""
    if "messages" in body:
        return hello(body)
    given = body["prompt"]
    prompts = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    num_choices = body.get("n", 1)
    choices = [
        {"index": place * num_choices + i, "text": f"{prompt} again {i}", "logprobs": None, "finish_reason": "stop"}
        for place, prompt in enumerate(prompts)
        for i in range(num_choices)
    ]
    num_tokens = sum(len(str(prompt)) for prompt in prompts)
    usage = {"prompt_tokens": num_tokens, "completion_tokens": 7 * len(choices)}
    return {
        "id": "cmpl-1", "object": "text_completion", "created": 1, "model": body["model"], "choices": choices[::-1],
        "usage": usage | {"total_tokens": sum(usage.values())},
    }  # fmt: skip


@contextlib.asynccontextmanager
async def in_front_of(**more: Any) -> AsyncIterator[tuple[LLMInterface, Upstream]]:
    async with openai_upstream(complete) as upstream:
        given = {
            "openai_endpoint": upstream.url, "openai_api_key": "sk-key", "default_model": "gpt-4o",
            "cloud_batch_completions": True, "cache_enabled": False, "cloud_retry_max_attempts": 0,
        }  # fmt: skip
        async with LLMInterface(Settings(provider="openai", **(given | more))) as llm:
            yield llm, upstream


async def ask(llm: LLMInterface, prompt: str | list[int], **options: Any) -> LLMResponse:
    return await llm.chat_completion(prompt=prompt, **{"model": "gpt-4o", "max_tokens": 10, **options})


def batching(response: LLMResponse) -> Any:
    return next(line for line in response.optimizations if line.name == "request_batching")


async def test_prompts_within_the_window_are_one_call_and_each_gets_its_own_answer(tmp_path: Path) -> None:
    async with in_front_of(cache_dir=tmp_path) as (llm, upstream):
        prompts = [f"prompt {'x' * number}" for number in range(7)]
        answers = await asyncio.gather(*(ask(llm, prompt, request_id=f"r{i}") for i, prompt in enumerate(prompts)))
        figures = llm.get_metrics()["openai"]
    assert [one["prompt"] for one in upstream.bodies] == [prompts]
    assert not upstream.complaints
    assert [answer.content for answer in answers] == [f"{prompt} again 0" for prompt in prompts]
    assert [answer.request_id for answer in answers] == [f"r{i}" for i in range(7)]
    assert [answer.usage.prompt_tokens for answer in answers] == list(map(len, prompts))
    assert sum(answer.usage.completion_tokens for answer in answers) == 49
    assert all(batching(answer).applied and "estimate" in batching(answer).reason for answer in answers)
    assert (figures["num_shared_calls"], figures["num_requests_in_shared_calls"]) == (1, 7)
    (line,) = read_spending(tmp_path / FILE_NAME, "2000")
    told = sum(one.dollars_spent or 0 for answer in answers for one in answer.optimizations)
    assert told == pytest.approx(line.dollars_spent), "the shares add up to the bill"


async def test_a_batch_goes_when_it_is_full_or_when_the_window_ends() -> None:
    async with in_front_of(cloud_max_batch_size=10, cloud_batch_window_ms=50) as (llm, upstream):
        await asyncio.gather(*(ask(llm, f"prompt {number}") for number in range(25)))
        assert sorted(len(body["prompt"]) for body in upstream.bodies) == [5, 10, 10]
        began = time.monotonic()
        answer = await ask(llm, "alone")
        assert 0.045 < time.monotonic() - began < 1.0
    assert answer.content == "alone again 0"
    assert not batching(answer).applied


async def test_several_choices_of_several_prompts_find_their_owners() -> None:
    async with in_front_of() as (llm, upstream):
        one, other = await asyncio.gather(ask(llm, "a", n=3), ask(llm, "b", n=3))
    assert len(upstream.bodies) == 1
    assert [choice.content for choice in one.choices] == ["a again 0", "a again 1", "a again 2"]
    assert [choice.content for choice in other.choices] == ["b again 0", "b again 1", "b again 2"]
    assert [choice.index for choice in other.choices] == [0, 1, 2]


async def test_token_ids_go_with_token_ids_and_other_parameters_by_themselves() -> None:
    async with in_front_of() as (llm, upstream):
        await asyncio.gather(
            ask(llm, [1, 2]), ask(llm, [3]), ask(llm, "a"), ask(llm, "b"), ask(llm, "c", temperature=0.5),
            ask(llm, "d", tenant="other"), ask(llm, "e", seed=1), ask(llm, "f", seed=1),
        )  # fmt: skip
    prompts = sorted(str(body["prompt"]) for body in upstream.bodies)
    assert prompts == sorted(["[[1, 2], [3]]", "['a', 'b']", "c", "d", "e", "f"])


async def test_chats_and_streams_never_wait_and_nothing_does_without_the_setting() -> None:
    async with in_front_of(cloud_batch_window_ms=5000) as (llm, _):
        began = time.monotonic()
        await llm.chat_completion([{"role": "user", "content": "hello"}], model="gpt-4o")
        assert time.monotonic() - began < 2.5
    async with in_front_of(cloud_batch_window_ms=5000, cloud_batch_completions=False) as (llm, upstream):
        began = time.monotonic()
        await asyncio.gather(ask(llm, "a"), ask(llm, "b"))
        assert time.monotonic() - began < 2.5
        assert len(upstream.bodies) == 2


async def test_a_prompt_that_is_refused_fails_by_itself() -> None:
    num_calls = 0

    async def play(wire: Wire, asked: Asked) -> None:
        nonlocal num_calls
        num_calls += 1
        body = json.loads(asked.body)
        is_refused = "bad" in body["prompt"]
        answer = {"error": {"message": "no", "type": "invalid_request_error"}} if is_refused else complete(body)
        data = json.dumps(answer).encode()
        await wire.reply(data, status=400 if is_refused else 200, content_type="application/json")

    async with raw_server(play) as server, in_front_of(openai_endpoint=server.url) as (llm, _):
        asked = [ask(llm, "a"), ask(llm, "bad"), ask(llm, "b")]
        one, wrong, other = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(one, LLMResponse) and isinstance(other, LLMResponse)
    assert (one.content, other.content) == ("a again 0", "b again 0")
    assert isinstance(wrong, InvalidRequestError)
    assert num_calls == 4
    assert "sent alone" in batching(one).reason


async def test_one_who_leaves_takes_nobody_along() -> None:
    async with in_front_of() as (llm, upstream):
        tasks = [asyncio.create_task(ask(llm, prompt)) for prompt in ("a", "b", "c")]
        await asyncio.sleep(0.01)
        tasks[1].cancel()
        one, _, other = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(one, LLMResponse) and isinstance(other, LLMResponse)
    assert (one.content, other.content) == ("a again 0", "c again 0")
    assert [body["prompt"] for body in upstream.bodies] == [["a", "c"]]


def test_parts_of_a_number_add_up_to_it() -> None:
    assert _divided_number(10, [1, 1, 1]) == [3, 3, 4]
    assert _divided_number(7, [0, 0]) == [3, 4]
    assert _divided_number(0, [5]) == [0]
