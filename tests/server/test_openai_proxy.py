"""OpenAI's own client, our server, our OpenAI provider and a strict upstream, one behind the other."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import psutil
import pytest
from openai_upstream import (
    LAST,
    VLLM_FIELDS,
    Json,
    Script,
    Upstream,
    chunk,
    complaint,
    hello,
    openai_upstream,
    vector,
    whole,
)
from pydantic import BaseModel
from raw_server import Asked, RawServer, Wire, raw_server
from server_harness import QUESTION, Server, serving

from autobot_llm.interface import LLMInterface
from autobot_llm.providers.scripted import ScriptedProvider
from autobot_llm.settings import CloudSettings, Settings

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris"}'}}
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


class City(BaseModel):
    name: str


@contextlib.asynccontextmanager
async def proxy(url: str) -> AsyncIterator[Server[Any]]:
    """Our server in front of the upstream at `url`."""
    clouds = {"up": CloudSettings(endpoint=url, api_key="sk-upstream")}
    settings = Settings(port=0, provider="cloud", clouds=clouds, default_model="up/m-1", cloud_retry_max_attempts=0)
    async with serving(settings, LLMInterface(settings), None) as server:  # type: ignore[type-var]
        yield server


@contextlib.asynccontextmanager
async def behind(script: Script = hello, **fields: Any) -> AsyncIterator[tuple[Server[Any], Upstream]]:
    async with openai_upstream(script, **fields) as upstream, proxy(upstream.url) as server:
        yield server, upstream
        assert upstream.complaints == []


async def test_a_chat_comes_through_whole_and_in_pieces_with_its_usage() -> None:
    async with behind() as (server, upstream), server.client() as client:
        answer = await client.chat.completions.create(model="m-1", messages=QUESTION)
        stream = await client.chat.completions.create(
            model="m-1", messages=QUESTION, stream=True, stream_options={"include_usage": True}
        )
        chunks = [one async for one in stream]
    assert answer.choices[0].message.content == "Hello, world"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert (answer.usage.total_tokens, answer.usage.prompt_tokens_details.cached_tokens) == (17, 8)
    assert [one.choices[0].delta.content for one in chunks if one.choices and one.choices[0].delta.content] == [
        "Hello, ", "world"
    ]  # fmt: skip
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5
    assert [body.get("stream", False) for body in upstream.bodies] == [False, True]


async def test_tools_schemas_and_images_reach_the_upstream_as_they_were() -> None:
    def script(body: Json) -> Json | list[Json]:
        if "response_format" in body:
            return whole({"content": '{"name": "Paris"}'})
        if not body.get("stream"):
            return whole({"tool_calls": [CALL]}, "tool_calls")
        return [chunk({"tool_calls": [{"index": 0, **CALL}]}), chunk({}, finish="tool_calls"), LAST]

    async with behind(script) as (server, upstream), server.client() as client:
        asked: Any = [{"role": "user", "content": [{"type": "text", "text": "?"}, IMAGE]}]
        answer = await client.chat.completions.create(model="m-1", messages=asked, tools=[TOOL], tool_choice="auto")
        call = answer.choices[0].message.tool_calls[0]  # type: ignore[index]
        history: Any = [*asked, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "Rain"}]
        async with client.chat.completions.stream(model="m-1", messages=history, tools=[TOOL]) as stream:
            final = await stream.get_final_completion()
        parsed = await client.chat.completions.parse(model="m-1", messages=QUESTION, response_format=City)
    assert (call.function.name, call.function.arguments) == ("weather", '{"city":"Paris"}')  # type: ignore[union-attr]
    assert final.choices[0].finish_reason == "tool_calls"
    assert parsed.choices[0].message.parsed == City(name="Paris")
    first, second, third = upstream.bodies
    assert (first["messages"], first["tools"], first["tool_choice"]) == (asked, [TOOL], "auto")
    assert second["messages"][1]["tool_calls"] == [CALL]
    assert third["response_format"]["json_schema"]["strict"] is True


async def test_embeddings_come_through_as_base64_and_as_numbers() -> None:
    async with behind() as (server, upstream), server.client() as client:
        default = await client.embeddings.create(model="e-1", input=["a", "b"], dimensions=4)
        numbers = await client.embeddings.create(model="e-1", input="a", dimensions=4, encoding_format="float")
        tokens = await client.embeddings.create(model="e-1", input=[1, 2, 3])
        with pytest.raises(openai.BadRequestError, match="input"):
            await client.embeddings.create(model="e-1", input=[])
        page = (await server.get("/metrics")).body.decode()
    assert [one.embedding for one in default.data] == [vector("a", 4), vector("b", 4)]
    assert numbers.data[0].embedding == vector("a", 4)
    assert (len(tokens.data), tokens.usage.prompt_tokens) == (1, 3)
    assert [body["input"] for body in upstream.bodies] == [["a", "b"], [[1, 2, 3]]]  # "a" had been embedded before
    # three a call, of which "a" had been one
    assert 'autobot_llm_tokens_total{kind="prompt",model="e-1"} 7.0' in page


async def test_the_older_endpoint_models_and_unknown_fields_come_through() -> None:
    def script(body: Json) -> Json:
        choice = {"index": 0, "text": "!", "logprobs": None, "finish_reason": "length"}
        return hello(body) if "messages" in body else {"model": "m-1", "choices": [choice], "usage": LAST["usage"]}  # type: ignore[return-value]

    async with behind(script, extra_fields=VLLM_FIELDS) as (server, upstream), server.client() as client:
        text = await client.completions.create(model="m-1", prompt="Say", max_tokens=1)
        models = [model.id async for model in client.models.list()]
        await client.chat.completions.create(
            model="m-1", messages=QUESTION, reasoning_effort="low", user="u", logit_bias={"5": -2},
            extra_body={"top_k": 4},
        )  # fmt: skip
    assert text.choices[0].text == "!"
    assert models == ["m-1", "m-2"]
    body = upstream.bodies[-1]
    assert (body["reasoning_effort"], body["user"], body["top_k"], body["logit_bias"]) == ("low", "u", 4, {"5": -2})


async def test_every_model_is_listed_by_a_name_that_can_be_asked_for() -> None:
    providers = {name: ScriptedProvider([name], name=name, models=["a/b"]) for name in ("native", "other")}
    settings = Settings(port=0)
    async with (
        serving(settings, LLMInterface(settings, providers=providers), None) as server,
        server.client() as client,
    ):  # type: ignore[type-var]
        await client.chat.completions.create(model="other/a/b", messages=QUESTION)
        names = [model.id async for model in client.models.list()]
        answers = [await client.chat.completions.create(model=name, messages=QUESTION) for name in names]
        shown = [await client.models.retrieve(name) for name in names]
    assert names == ["a/b", "other/a/b"]
    assert [answer.choices[0].message.content for answer in answers] == ["native", "other"]
    assert [model.owned_by for model in shown] == ["native", "other"]


async def test_an_answers_reasoning_and_refusal_may_be_sent_back_as_history() -> None:
    history: Any = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning": "Hm.", "refusal": None},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": None, "refusal": "I cannot."},
        {"role": "user", "content": "d"},
    ]
    async with behind(extra_fields={"messages": list[Any]}) as (server, upstream):
        assert (await server.post("/v1/chat/completions", {"messages": history})).status == 200
    sent = upstream.bodies[0]["messages"]
    assert sent[1] == {"role": "assistant", "content": "b", "reasoning_content": "Hm."}
    assert sent[3] == {"role": "assistant", "content": "I cannot."}


async def test_errors_keep_their_status_their_words_and_their_patience() -> None:
    answers = {
        "busy": (429, {"retry-after": "3"}, {"message": "Slow down", "code": "rate_limit_exceeded"}),
        "wrong": (400, {}, {"message": "No such thing", "param": "seed", "code": "bad"}),
        "missing": (404, {}, {"message": "The model `missing` does not exist", "code": "model_not_found"}),
        "locked": (401, {}, {"message": "Incorrect API key provided: sk-upstream"}),
        "broken": (500, {}, {"message": "Oops"}),
    }

    async def play(wire: Wire, asked: Asked) -> None:
        status, headers, error = answers[json.loads(asked.body)["model"]]
        await wire.reply(
            json.dumps({"error": error}).encode(), status=status, content_type="application/json", **headers
        )

    async with raw_server(play) as upstream, proxy(upstream.url) as server:
        replies = {
            model: await server.post("/v1/chat/completions", {"model": model, "messages": QUESTION})
            for model in answers
        }
    assert {model: reply.status for model, reply in replies.items()} == {
        "busy": 429, "wrong": 400, "missing": 404, "locked": 502, "broken": 502
    }  # fmt: skip
    errors = {model: reply.json["error"] for model, reply in replies.items()}
    assert replies["busy"].headers["retry-after"] == "3"
    assert (errors["wrong"]["message"], errors["wrong"]["param"]) == ("up: No such thing", "seed")
    assert "Oops" in errors["broken"]["message"]
    assert "sk-upstream" not in json.dumps(errors)


async def test_a_stream_that_breaks_tells_its_client_so() -> None:
    async def play(wire: Wire, asked: Asked) -> None:
        await wire.begin_stream()
        await wire.piece(b"data: " + json.dumps(chunk({"content": "half"})).encode() + b"\n\n")
        await asyncio.sleep(0.01)
        wire.reset()
        raise ConnectionError

    async with raw_server(play) as upstream, proxy(upstream.url) as server, server.client() as client:
        stream = await client.chat.completions.create(model="m", messages=QUESTION, stream=True)
        seen: list[str | None] = []
        with pytest.raises(openai.APIError, match="broke its answer off"):
            async for one in stream:
                seen.append(one.choices[0].delta.content)  # noqa: PERF401
    assert seen == ["", "half"]


async def test_a_client_that_leaves_closes_the_stream_upstream() -> None:
    async def play(wire: Wire, asked: Asked) -> None:
        await wire.begin_stream()
        await wire.piece(b"data: " + json.dumps(chunk({"content": "x"})).encode() + b"\n\n")
        await wire.until_gone()

    async with raw_server(play) as upstream, proxy(upstream.url) as server:
        async with server.client() as client:
            stream = await client.chat.completions.create(model="m", messages=QUESTION, stream=True)
            await anext(aiter(stream))
            await stream.close()
        await upstream.until(lambda seen: seen.num_open == 0)


async def test_three_hundred_requests_leave_no_socket_task_or_memory_behind() -> None:
    """A tenth of them fail upstream or are cancelled by their client, and the second half is as the first."""

    async def play(wire: Wire, asked: Asked) -> None:
        body = json.loads(asked.body)
        if body["model"] == "reset":
            wire.reset()
            raise ConnectionError
        if body["model"] == "silent":
            await wire.until_gone()
        await wire.begin_stream()
        for one in hello({"stream": True}):
            await wire.piece(b"data: " + json.dumps(one).encode() + b"\n\n")
        await wire.piece(b"data: [DONE]\n\n")
        await wire.end_stream()

    async def one_round(server: Server[Any], upstream: RawServer) -> None:
        body = {"messages": QUESTION, "stream": True}
        fine = [server.post("/v1/chat/completions", {**body, "model": "m"}) for _ in range(18)]
        failed = server.post("/v1/chat/completions", {**body, "model": "reset"})
        left = asyncio.create_task(server.post("/v1/chat/completions", {**body, "model": "silent"}))
        replies = await asyncio.gather(*fine, failed)
        assert [reply.status for reply in replies] == [200] * 18 + [503]
        await upstream.until(lambda seen: json.loads(seen.asked[-1].body)["model"] in ("m", "reset", "silent"))
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)

    process = psutil.Process()
    async with raw_server(play) as upstream, proxy(upstream.url) as server:
        measured = []
        for _ in range(3):
            for _ in range(5):
                await one_round(server, upstream)
            upstream.asked.clear()
            server.writers.clear()
            await upstream.until(lambda seen: seen.num_open <= 20)
            gc.collect()
            await asyncio.sleep(0.05)
            for _ in range(100):  # what is ending takes a moment on a busy machine; what has leaked stays
                if not measured or len(asyncio.all_tasks()) <= measured[0][0] + 2:
                    break
                await asyncio.sleep(0.05)
            measured.append((len(asyncio.all_tasks()), process.num_fds(), process.memory_info().rss))
        tasks, sockets, memory = zip(*measured, strict=True)
        assert tasks[2] <= tasks[0] + 2
        assert sockets[2] <= sockets[0] + 4
        assert memory[2] - memory[1] < 4 * 2**20
    await upstream.until(lambda seen: seen.num_open == 0)


def test_the_upstream_of_these_tests_is_strict() -> None:
    fine: Json = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    wrong: list[Json] = [
        {"messages": []}, fine | {"bogus": 1}, fine | {"temperature": "hot"}, fine | {"n": 1.5},
        fine | {"messages": [{"role": "user", "content": "x", "bogus": 1}]},
        fine | {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function"}]}]},
        fine | {"tools": [{"type": "function", "function": {"name": "f", "arguments": {}}}]},
        fine | {"stream": True, "stream_options": {"usage": True}},
    ]  # fmt: skip
    assert complaint("/chat/completions", fine, {}) is None
    for body in wrong:
        assert complaint("/chat/completions", body, {}) is not None, body
