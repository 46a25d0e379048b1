"""Clients of every dialect to Anthropic, and Anthropic's to OpenAI: what is said arrives, what is answered returns."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import openai
import pytest
from anthropic import AsyncAnthropic
from anthropic.types import ThinkingBlock, ToolUseBlock
from anthropic_upstream import MODEL, Script, answer, ending, error, event, message_start, text_block, upstream
from openai_upstream import LAST, Json, chunk, hello, openai_upstream
from openai_upstream import whole as openai_whole
from raw_server import Asked, RawServer, Wire
from server_harness import Server, serving

from autobot_llm.interface import LLMInterface
from autobot_llm.providers.anthropic import AnthropicProvider
from autobot_llm.routing import build_provider
from autobot_llm.settings import Settings

QUESTION: Any = [{"role": "user", "content": "Why is the sky blue?"}]
ASKED: dict[str, Any] = {"model": MODEL, "max_tokens": 100, "messages": QUESTION}
MARK: Any = {"type": "ephemeral", "ttl": "1h"}


@contextlib.asynccontextmanager
async def gateway(script: Script) -> AsyncIterator[tuple[Server[AnthropicProvider], RawServer]]:
    """Our server with the Anthropic provider behind it, and the upstream that this one asks."""
    settings = Settings(port=0, provider="anthropic", cloud_retry_max_attempts=0)
    async with (
        upstream(script) as (asked, provider),
        serving(settings, LLMInterface(settings, providers={"anthropic": provider}), provider) as server,
    ):
        yield server, asked


def anthropic_client(server: Server[AnthropicProvider]) -> AsyncAnthropic:
    return AsyncAnthropic(base_url=server.url, api_key="any", max_retries=0)


def sent(asked: RawServer, place: int = -1) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(asked.asked[place].body)
    return body


def block(index: int, start: dict[str, Any], *deltas: dict[str, Any]) -> list[bytes]:
    return [
        event("content_block_start", index=index, content_block=start),
        *(event("content_block_delta", index=index, delta=delta) for delta in deltas),
        event("content_block_stop", index=index),
    ]


CONSIDERED = [
    message_start(),
    *block(
        0,
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "thinking_delta", "thinking": "hm"},
        {"type": "signature_delta", "signature": "sig=="},
    ),
    *block(1, {"type": "redacted_thinking", "data": "blob=="}),
    *text_block("I look.", index=2),
    *block(
        3,
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}},
        {"type": "input_json_delta", "partial_json": '{"city": "R'},
        {"type": "input_json_delta", "partial_json": 'īga"}'},
    ),
    *ending("tool_use"),
]
BLOCKS = [
    {"type": "thinking", "thinking": "hm", "signature": "sig=="},
    {"type": "redacted_thinking", "data": "blob=="},
    {"type": "text", "text": "I look."},
    {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rīga"}},
]
TOOL: Any = {"name": "weather", "description": "d", "input_schema": {"type": "object", "properties": {}}}


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_turn_of_anthropics_goes_through_and_back_again_unchanged(is_stream: bool) -> None:
    async with gateway(CONSIDERED) as (server, asked), anthropic_client(server) as client:
        if is_stream:
            async with client.messages.stream(**ASKED, tools=[TOOL], thinking={"type": "adaptive"}) as stream:
                message: Any = await stream.get_final_message()
        else:
            message = await client.messages.create(**ASKED, tools=[TOOL], thinking={"type": "adaptive"})
        result: Any = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "12", "is_error": False}
        history = [*QUESTION, message.to_param(), {"role": "user", "content": [result]}]
        await client.messages.create(**ASKED | {"messages": history}, tools=[TOOL])
    assert isinstance(message.content[0], ThinkingBlock)
    assert isinstance(message.content[3], ToolUseBlock)
    assert (message.stop_reason, message.usage.input_tokens, message.usage.output_tokens) == ("tool_use", 12, 3)
    assert sent(asked, 0)["thinking"] == {"type": "adaptive"}
    assert sent(asked)["messages"][1] == {"role": "assistant", "content": BLOCKS}


async def test_cache_marks_and_documents_of_the_callers_own_arrive_as_they_are() -> None:
    system: Any = [{"type": "text", "text": "Be brief.", "cache_control": MARK}]
    document: Any = {
        "type": "document",
        "source": {"type": "text", "media_type": "text/plain", "data": "x"},
        "title": "t",
        "cache_control": MARK,
    }
    asked_for = {"messages": [{"role": "user", "content": [document, {"type": "text", "text": "Why?"}]}]}
    async with (
        gateway(answer("Hello", cache_creation_input_tokens=500)) as (server, asked),
        anthropic_client(server) as client,
    ):
        message = await client.messages.create(
            **ASKED | asked_for, system=system, tools=[TOOL | {"cache_control": MARK}]
        )
    body = sent(asked)
    assert body["system"] == system
    assert body["messages"][0]["content"] == [document, {"type": "text", "text": "Why?"}]
    assert body["tools"][0]["cache_control"] == MARK
    assert message.usage.cache_creation_input_tokens == 500


async def test_tokens_and_models_are_asked_of_anthropic() -> None:
    async def play(wire: Wire, asked: Asked) -> None:
        page = {"data": [{"id": MODEL, "max_input_tokens": 1_000_000}], "has_more": False, "last_id": MODEL}
        reply = {"input_tokens": 2095} if asked.method == "POST" else page
        await wire.reply(json.dumps(reply).encode(), content_type="application/json")

    async with gateway(play) as (server, _), anthropic_client(server) as client:
        counted = await client.messages.count_tokens(model=MODEL, messages=QUESTION, tools=[TOOL])
        models = [model async for model in await client.models.list()]
    assert counted.input_tokens == 2095
    assert [(model.id, model.max_input_tokens) for model in models] == [(MODEL, 1_000_000)]


ERRORS = [
    (400, "invalid_request_error", anthropic.BadRequestError, openai.BadRequestError),
    (404, "not_found_error", anthropic.NotFoundError, openai.NotFoundError),
    (413, "request_too_large", anthropic.ContentTooLargeError, openai.APIStatusError),
    (429, "rate_limit_error", anthropic.RateLimitError, openai.RateLimitError),
    (500, "api_error", anthropic.InternalServerError, openai.InternalServerError),
    (529, "overloaded_error", anthropic.ServiceUnavailableError, openai.InternalServerError),
]


@pytest.mark.parametrize(
    ("status", "kind", "for_anthropics", "for_openais"), ERRORS, ids=[kind for _, kind, *_ in ERRORS]
)
async def test_what_anthropic_refuses_is_raised_in_the_clients_own_class(
    status: int, kind: str, for_anthropics: type[anthropic.APIError], for_openais: type[openai.APIError]
) -> None:
    async def refuse(wire: Wire, asked: Asked) -> None:
        body = error(kind, "words about the model")
        await wire.reply(body, status=status, content_type="application/json", retry_after="3")

    async with gateway(refuse) as (server, _), anthropic_client(server) as client, server.client() as openai_client:
        with pytest.raises(for_anthropics, match="words about the model"):
            await client.messages.create(**ASKED)
        with pytest.raises(for_openais, match="words about the model"):
            await openai_client.chat.completions.create(model=MODEL, messages=QUESTION)


async def test_an_overload_in_the_middle_of_the_stream_reaches_the_client_as_an_error_event() -> None:
    script = [*answer("Hel")[:4], b"event: error\ndata: " + error("overloaded_error", "Overloaded") + b"\n\n"]
    async with gateway(script) as (server, _), anthropic_client(server) as client:
        with pytest.raises(anthropic.APIStatusError, match="Overloaded") as caught:
            async with client.messages.stream(**ASKED) as stream:
                await stream.get_final_message()
        assert caught.value.type == "overloaded_error"


# Clients of OpenAI's


async def test_a_client_of_openais_chats_with_anthropic() -> None:
    script = answer("Hello", " there", cache_read_input_tokens=80, cache_creation_input_tokens=8)
    messages: Any = [{"role": "system", "content": "Be brief."}, *QUESTION]
    async with gateway(script) as (server, asked), server.client() as client:
        whole = await client.chat.completions.create(
            model=f"anthropic/{MODEL}", messages=messages, max_completion_tokens=50, stop="END", user="u"
        )
        stream = await client.chat.completions.create(
            model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert whole.choices[0].message.content == "Hello there"
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (100, 3)
    assert whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.cached_tokens == 80
    assert [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content] == [
        "Hello",
        " there",
    ]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == 100
    assert (sent(asked, 0)["max_tokens"], sent(asked, 0)["stop_sequences"]) == (50, ["END"])
    assert sent(asked, 0)["system"] == [{"type": "text", "text": "Be brief."}]
    assert (sent(asked, 0)["stream"], sent(asked, 1)["stream"]) == (False, True)


async def test_a_client_of_openais_calls_tools_and_shows_pictures_to_anthropic() -> None:
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    picture: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "Where is this?"}, picture]}]
    async with gateway(CONSIDERED) as (server, asked), server.client() as client:
        first = await client.chat.completions.create(
            model=MODEL, messages=messages, tools=tools, tool_choice="required", parallel_tool_calls=False
        )
        reply = first.choices[0].message
        assert reply.tool_calls is not None
        call: Any = reply.tool_calls[0]
        history = [*messages, reply, {"role": "tool", "tool_call_id": call.id, "content": "12 °C"}]
        await client.chat.completions.create(model=MODEL, messages=history, tools=tools)
        stream = await client.chat.completions.create(model=MODEL, messages=messages, tools=tools, stream=True)
        pieces = [
            piece.function.arguments
            async for chunk in stream
            for piece in (chunk.choices[0].delta.tool_calls or ())
            if piece.function
        ]
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Rīga"}')
    assert first.choices[0].finish_reason == "tool_calls"
    assert reply.model_extra is not None
    assert reply.model_extra["reasoning_content"] == "hm"
    assert pieces == ["", '{"city": "R', 'īga"}']
    assert sent(asked, 0)["tool_choice"] == {"type": "any", "disable_parallel_tool_use": True}
    assert sent(asked, 0)["messages"][0]["content"][1]["source"]["media_type"] == "image/png"
    assert sent(asked, 1)["messages"][1]["content"] == BLOCKS[2:]  # unsigned reasoning is nothing to Anthropic
    assert sent(asked, 1)["messages"][2]["content"][0]["tool_use_id"] == "toolu_1"


async def test_a_client_of_openais_gets_json_by_schema_and_a_refusal_of_what_anthropic_has_not() -> None:
    schema: Any = {"type": "object", "properties": {}, "additionalProperties": False}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    async with gateway(answer("{}")) as (server, asked), server.client() as client:
        done = await client.chat.completions.create(model=MODEL, messages=QUESTION, response_format=wanted)
        for fields in ({"logprobs": True}, {"n": 2}, {"seed": 1}, {"response_format": {"type": "json_object"}}):
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(model=MODEL, messages=QUESTION, extra_body=fields)
            assert caught.value.param == next(iter(fields))
        assert len(asked.asked) == 1
    assert done.choices[0].message.content == "{}"
    assert sent(asked)["output_config"] == {"format": {"type": "json_schema", "schema": schema}}


# Clients of Ollama's


async def test_a_client_of_ollamas_chats_with_anthropic() -> None:
    async with gateway(CONSIDERED) as (server, _):
        body = {"model": MODEL, "messages": QUESTION, "stream": False}
        reply = await server.post("/api/chat", body)
        streamed = await server.post("/api/chat", body | {"stream": True})
    message = reply.json["message"]
    assert (message["content"], message["thinking"]) == ("I look.", "hm")
    assert message["tool_calls"][0]["function"]["arguments"] == {"city": "Rīga"}
    assert (reply.json["prompt_eval_count"], reply.json["eval_count"]) == (12, 3)
    lines = [json.loads(line) for line in streamed.body.splitlines()]
    assert "".join(line["message"]["content"] for line in lines) == "I look."
    assert lines[-1]["done"]


# Clients of Anthropic's, to a server that speaks OpenAI's language

OPENAI_CALL = {
    "index": 0,
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Riga"}'},
}


def weather(body: Json) -> Json | list[Json]:
    """Calls the tool first, and answers once it has the result."""
    if body["messages"][-1]["role"] == "tool":
        return hello(body)
    if not body.get("stream"):
        return openai_whole({"tool_calls": [OPENAI_CALL]}, finish="tool_calls")
    return [chunk({"tool_calls": [OPENAI_CALL]}), chunk({}, finish="tool_calls"), LAST]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_of_anthropics_goes_round_with_a_server_of_openais(is_stream: bool) -> None:
    async def ask(client: AsyncAnthropic, messages: Any) -> Any:
        options: Any = ASKED | {
            "model": "m-1",
            "messages": messages,
            "system": [{"type": "text", "text": "Be brief.", "cache_control": MARK}],
            "tools": [TOOL | {"cache_control": MARK}],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
            "stop_sequences": ["END"],
        }
        if not is_stream:
            return await client.messages.create(**options)
        async with client.messages.stream(**options) as stream:
            return await stream.get_final_message()

    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
    asked_for: Any = [{"role": "user", "content": [picture, {"type": "text", "text": "Where?", "cache_control": MARK}]}]
    async with openai_upstream(weather, extra_fields={"messages": list[Any]}) as upstream:  # reasoning is no OpenAI's
        settings = Settings(port=0, provider="openai", openai_endpoint=upstream.url, openai_api_key="sk-secret")
        provider = build_provider(settings, "openai")
        async with (
            serving(settings, LLMInterface(settings, providers={"openai": provider}), provider) as server,
            AsyncAnthropic(base_url=server.url, api_key="any", max_retries=0) as client,
        ):
            first = await ask(client, asked_for)
            past = [{"type": "thinking", "thinking": "hm", "signature": "s"}, *first.to_param()["content"]]
            result = {"type": "tool_result", "tool_use_id": "call_1", "content": "12", "is_error": True}
            history = [*asked_for, {"role": "assistant", "content": past}, {"role": "user", "content": [result]}]
            second = await ask(client, history)
    assert upstream.complaints == []
    assert (first.stop_reason, first.content[0].name, first.content[0].input) == (
        "tool_use",
        "weather",
        {"city": "Riga"},
    )
    assert (first.usage.input_tokens, first.usage.cache_read_input_tokens, first.usage.output_tokens) == (4, 8, 5)
    assert (second.stop_reason, second.content[0].text) == ("end_turn", "Hello, world")
    asked, continued = upstream.bodies
    assert (asked["tool_choice"], asked["parallel_tool_calls"], asked["stop"]) == ("required", False, ["END"])
    assert asked["messages"][1]["content"][0]["image_url"]["url"] == "data:image/png;base64,iVBORw0KGgo="
    assert continued["messages"][3] == {
        "role": "tool",
        "content": [{"type": "text", "text": "12"}],
        "tool_call_id": "call_1",
    }
    assert continued["messages"][2]["reasoning_content"] == "hm"
    assert "cache_control" not in json.dumps(upstream.bodies)
