"""The official anthropic package, pointed at the server, works as it does with Anthropic."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic
from anthropic.types import Message, TextBlock, ThinkingBlock, ToolUseBlock
from pydantic import BaseModel
from server_harness import Server, running_server, serving, until

from autobot_llm.errors import (
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    LLMError,
    OverloadedError,
    ProviderError,
    ProviderTimeout,
    ProviderUnavailable,
    RequestTimeout,
    UnsupportedError,
)
from autobot_llm.interface import LLMInterface
from autobot_llm.providers.native import NativeProvider
from autobot_llm.providers.scripted import Script, ScriptedProvider
from autobot_llm.report import OptimizationOutcome
from autobot_llm.settings import Settings
from autobot_llm.types import (
    ChatMessage,
    ChoiceEnd,
    Finish,
    LLMRequest,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    Usage,
)

PIECES = ["Because ", "of ", "Rayleigh ", "scattering: blau 蓝 🟦", "."]
ANSWER = "".join(PIECES)
ASKED: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "Why is the sky blue?"}],
}
MESSAGES = "/v1/messages"


def client_of(server: Server[Any], api_key: str = "any") -> AsyncAnthropic:
    return AsyncAnthropic(base_url=server.url, api_key=api_key, max_retries=0)


def text_of(message: Message) -> str:
    return "".join(block.text for block in message.content if isinstance(block, TextBlock))


async def test_a_message_has_the_answer_its_usage_and_its_identity() -> None:
    async with running_server(PIECES) as server, client_of(server) as client:
        message = await client.messages.create(**ASKED)
    assert text_of(message) == ANSWER
    assert (message.role, message.type, message.model) == ("assistant", "message", "tiny")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert (message.usage.input_tokens, message.usage.output_tokens) == (5, len(PIECES))
    request_id = server.provider.requests[0].request_id
    assert (message.id, message._request_id) == (f"msg_{request_id}", request_id)


async def test_a_streamed_message_comes_in_the_same_pieces_and_ends_as_the_whole_one() -> None:
    async with (
        running_server(PIECES) as server,
        client_of(server) as client,
        client.messages.stream(**ASKED) as stream,
    ):
        pieces = [text async for text in stream.text_stream]
        final = await stream.get_final_message()
    assert pieces == PIECES
    assert text_of(final) == ANSWER
    assert final.stop_reason == "end_turn"
    assert (final.usage.input_tokens, final.usage.output_tokens) == (5, len(PIECES))


async def test_the_events_of_a_stream_are_the_documented_ones() -> None:
    async with running_server(["a", "b"]) as server, client_of(server) as client:
        kinds = [event.type async for event in await client.messages.create(**ASKED, stream=True)]
    assert kinds == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


async def test_the_synchronous_client_works_too() -> None:
    def ask(url: str) -> str:
        with (
            anthropic.Anthropic(base_url=url, api_key="any", max_retries=0) as client,
            client.messages.stream(**ASKED) as stream,
        ):
            return "".join(stream.text_stream)

    async with running_server(PIECES) as server:
        assert await asyncio.to_thread(ask, server.url) == ANSWER


async def test_the_beta_client_works_too() -> None:
    async with running_server(PIECES) as server, client_of(server) as client:
        message = await client.beta.messages.create(**ASKED, betas=["context-1m-2025-08-07"])
    assert message.content[0].type == "text"
    assert server.provider.requests[0].extra_body == {}


async def test_what_the_request_says_reaches_the_provider() -> None:
    async with running_server() as server, client_of(server) as client:
        await client.messages.create(
            **ASKED,
            system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            stop_sequences=["END"],
            metadata={"user_id": "u"},
            extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 40},
        )
    request = server.provider.requests[0]
    assert request.messages is not None
    assert request.messages[0] == ChatMessage(
        role="system", content=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    )
    assert (request.temperature, request.top_p, request.top_k, request.max_tokens) == (0.5, 0.9, 40, 100)
    assert (request.stop, request.metadata, request.extra_body) == (["END"], {"user_id": "u"}, {})


TOOL: Any = {"name": "weather", "description": "d", "input_schema": {"type": "object", "properties": {}}}
CALLS = [
    TextDelta("I look."),
    ToolCallDelta(position=0, call_id="c0", name="weather", arguments='{"city":'),
    ToolCallDelta(position=0, arguments='"Riga"}'),
    ToolCallDelta(position=1, call_id="c1", name="weather", arguments="{}"),
    ChoiceEnd(finish_reason="tool_calls"),
]


def weather(request: LLMRequest) -> Script:
    assert request.messages is not None
    return ["12 °C."] if request.messages[-1].role == "tool" else CALLS


async def test_a_conversation_with_tools_goes_round() -> None:
    async with running_server(weather) as server, client_of(server) as client:
        first = await client.messages.create(**ASKED, tools=[TOOL], tool_choice={"type": "any"})
        calls = [block for block in first.content if isinstance(block, ToolUseBlock)]
        results: Any = [{"type": "tool_result", "tool_use_id": call.id, "content": "12"} for call in calls]
        history = [*ASKED["messages"], first.to_param(), {"role": "user", "content": results}]
        second = await client.messages.create(**ASKED | {"messages": history}, tools=[TOOL])
    assert first.stop_reason == "tool_use"
    assert [(call.id, call.name, call.input) for call in calls] == [
        ("c0", "weather", {"city": "Riga"}),
        ("c1", "weather", {}),
    ]
    assert text_of(second) == "12 °C."
    asked, continued = server.provider.requests
    assert asked.tool_choice == "required"
    assert asked.tools is not None
    assert asked.tools[0]["function"]["name"] == "weather"
    assert continued.messages is not None
    assert [message.role for message in continued.messages] == ["user", "assistant", "tool", "tool"]
    assert continued.messages[1].content == "I look."


async def test_streamed_calls_arrive_whole() -> None:
    async with (
        running_server(CALLS) as server,
        client_of(server) as client,
        client.messages.stream(**ASKED, tools=[TOOL]) as stream,
    ):
        final = await stream.get_final_message()
    assert [block.type for block in final.content] == ["text", "tool_use", "tool_use"]
    assert isinstance(final.content[1], ToolUseBlock)
    assert final.content[1].input == {"city": "Riga"}


THINKING = [
    ReasoningDelta("hm, "),
    ReasoningDelta("well", signature="sig"),
    TextDelta("Blue."),
    ReasoningDelta("again"),
    TextDelta("!"),
]
THOUGHTS = [("thinking", "hm, well"), ("text", "Blue."), ("thinking", "again"), ("text", "!")]


def thoughts(message: Message) -> list[tuple[str, str]]:
    return [
        (block.type, block.thinking if isinstance(block, ThinkingBlock) else getattr(block, "text", ""))
        for block in message.content
    ]


async def test_reasoning_comes_in_blocks_of_its_own_with_its_signature() -> None:
    async with running_server(THINKING) as server, client_of(server) as client:
        whole = await client.messages.create(**ASKED)
        async with client.messages.stream(**ASKED) as stream:
            streamed = await stream.get_final_message()
        history = [*ASKED["messages"], whole.to_param(), {"role": "user", "content": "And now?"}]
        await client.messages.create(**ASKED | {"messages": history})
    assert thoughts(whole) == thoughts(streamed) == THOUGHTS
    assert isinstance(whole.content[0], ThinkingBlock)
    assert whole.content[0].signature == "sig"
    messages = server.provider.requests[-1].messages
    assert messages is not None
    assert messages[1].reasoning_content == "again"  # unsigned, and so nobody's but ours
    assert messages[1].content == [
        {"type": "thinking", "thinking": "hm, well", "signature": "sig"},
        {"type": "text", "text": "Blue."},
        {"type": "text", "text": "!"},
    ]


async def test_a_stop_sequence_is_named() -> None:
    script = ["one", ChoiceEnd(finish_reason="stop", stop_sequence="END")]
    async with running_server(script) as server, client_of(server) as client:
        message = await client.messages.create(**ASKED, stop_sequences=["END"])
        async with client.messages.stream(**ASKED, stop_sequences=["END"]) as stream:
            streamed = await stream.get_final_message()
    for ended in (message, streamed):
        assert (ended.stop_reason, ended.stop_sequence) == ("stop_sequence", "END")


class Colour(BaseModel):
    name: str


async def test_structured_output_goes_there_and_back() -> None:
    async with running_server(['{"name": ', '"blue"}']) as server, client_of(server) as client:
        message = await client.messages.parse(**ASKED, output_format=Colour)
    assert message.parsed_output == Colour(name="blue")
    wanted = server.provider.requests[0].response_format
    assert wanted is not None
    assert wanted["json_schema"]["schema"]["properties"] == {"name": {"type": "string", "title": "Name"}}


async def test_an_image_reaches_the_provider() -> None:
    source: Any = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
    content: Any = [{"type": "image", "source": source}, {"type": "text", "text": "What is this?"}]
    async with running_server() as server, client_of(server) as client:
        await client.messages.create(**ASKED | {"messages": [{"role": "user", "content": content}]})
    messages = server.provider.requests[0].messages
    assert messages is not None
    assert isinstance(messages[0].content, list)
    assert messages[0].content[0]["image_url"]["url"] == "data:image/png;base64,iVBORw0KGgo="


REPORTED = [
    "ok",
    ChoiceEnd(finish_reason="stop"),
    Finish(
        usage=Usage(
            prompt_tokens=100, completion_tokens=5, cached_tokens=60, cache_write_tokens=30, reasoning_tokens=4
        ),
        optimizations=(OptimizationOutcome(name="prompt_caching", applied=True, reason="r", tokens_saved=60),),
    ),
]


async def test_cached_tokens_are_counted_apart_and_the_report_comes_along() -> None:
    async with running_server(REPORTED) as server, client_of(server) as client:
        raw = await client.messages.with_raw_response.create(**ASKED)
        whole = await raw.parse()
        async with client.messages.stream(**ASKED) as stream:
            streamed = await stream.get_final_message()
    for usage in (whole.usage, streamed.usage):
        assert (usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (10, 60, 30)
        assert usage.output_tokens == 5
        assert usage.output_tokens_details is not None
        assert usage.output_tokens_details.thinking_tokens == 4
    assert raw.headers["x-autobot-optimizations"] == "prompt_caching;tokens_saved=60"
    assert whole.model_extra is not None
    assert whole.model_extra["autobot"]["optimizations"][0]["name"] == "prompt_caching"


async def test_models_are_listed_and_shown_in_anthropics_shape() -> None:
    async with running_server() as server, client_of(server) as client:
        listed = [model async for model in await client.models.list()]
        shown = await client.models.retrieve("other")
        with pytest.raises(anthropic.NotFoundError, match="tiny, other"):
            await client.models.retrieve("none")
        async with server.client() as openai_client:
            assert [model.id async for model in await openai_client.models.list()] == ["tiny", "other"]
    assert [model.id for model in listed] == ["tiny", "other"]
    assert (shown.id, shown.type, shown.lifecycle) == ("other", "model", "active")


ERRORS = [
    (InvalidRequestError("top_k: no", param="top_k"), anthropic.BadRequestError, "invalid_request_error"),
    (UnsupportedError("tools: no", param="tools"), anthropic.BadRequestError, "invalid_request_error"),
    (ContextLengthError("too long"), anthropic.BadRequestError, "invalid_request_error"),
    (OverloadedError("busy", retry_after=7), anthropic.RateLimitError, "rate_limit_error"),
    (RequestTimeout("late"), anthropic.RequestTimeoutError, "timeout_error"),
    (ProviderError("bad"), anthropic.InternalServerError, "api_error"),
    (ProviderTimeout("late"), anthropic.GatewayTimeoutError, "timeout_error"),
    (ProviderUnavailable("gone"), anthropic.ServiceUnavailableError, "overloaded_error"),
    (EngineError("broke"), anthropic.InternalServerError, "api_error"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "expected", "kind"), ERRORS, ids=[type(error).__name__ for error, *_ in ERRORS])
async def test_an_error_before_the_answer_has_its_class(
    error: LLMError, expected: type[anthropic.APIStatusError], kind: str, stream: bool
) -> None:
    async with running_server([error]) as server, client_of(server) as client:
        with pytest.raises(expected, match=error.message) as caught:
            await client.messages.create(**ASKED, stream=stream)
    assert (caught.value.status_code, caught.value.type, caught.value.error_code) == (error.status, kind, error.code)
    assert caught.value.request_id == server.provider.requests[0].request_id
    if isinstance(error, OverloadedError):
        assert caught.value.response.headers["retry-after"] == "7"


async def test_an_error_within_the_stream_is_raised_where_it_happens() -> None:
    async with running_server(["half", ProviderUnavailable("gone")]) as server, client_of(server) as client:
        with pytest.raises(anthropic.APIStatusError, match="gone") as caught:
            async with client.messages.stream(**ASKED) as stream:
                pieces = [text async for text in stream.text_stream]
                assert pieces == ["half"]
    assert caught.value.type == "overloaded_error"


async def test_wrong_models_bodies_and_paths_are_refused_in_anthropics_shape() -> None:
    async with running_server(max_body_bytes=1000) as server, client_of(server) as client:
        with pytest.raises(anthropic.NotFoundError, match="'none' is not served here"):
            await client.messages.create(**ASKED | {"model": "none"})
        with pytest.raises(anthropic.ContentTooLargeError, match="AUTOBOT_MAX_BODY_BYTES"):
            await client.messages.create(**ASKED | {"messages": [{"role": "user", "content": "x" * 1000}]})
        with pytest.raises(anthropic.NotFoundError, match="nothing at /v1/messages/batches"):
            await client.messages.batches.list()
        with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\].type"):
            await client.messages.create(
                **ASKED | {"messages": [{"role": "user", "content": [{"type": "container_upload", "file_id": "f"}]}]}
            )
        other_method = await server.get(MESSAGES)
        not_json = await server.post(MESSAGES, b"{")
        old_version = await server.post(MESSAGES, ASKED, **{"anthropic-version": "2022-01-01"})
        no_limit = await server.post(MESSAGES, {"messages": ASKED["messages"]})
    assert (other_method.status, other_method.headers["allow"]) == (405, "POST")
    for reply, words in (
        (other_method, "POST"),
        (not_json, "JSON"),
        (old_version, "2026-10-21"),
        (no_limit, "max_tokens"),
    ):
        assert reply.json["type"] == "error"
        assert reply.json["error"]["type"] == "invalid_request_error"
        assert words in reply.json["error"]["message"]


async def test_keys_are_taken_in_both_headers() -> None:
    async with running_server(api_keys=("secret",)) as server:
        async with client_of(server, "secret") as client:
            await client.messages.create(**ASKED)
        assert (await server.post(MESSAGES, ASKED, **{"x-api-key": "secret"})).status == 200
        async with client_of(server, "guess") as client:
            with pytest.raises(anthropic.AuthenticationError, match="not one of this server's") as caught:
                await client.messages.create(**ASKED)
    assert caught.value.type == "authentication_error"
    assert len({request.tenant for request in server.provider.requests}) == 1


async def test_a_provider_that_cannot_count_says_so() -> None:
    async with running_server() as server, client_of(server) as client:
        with pytest.raises(anthropic.BadRequestError, match="cannot count"):
            await client.messages.count_tokens(model="tiny", messages=ASKED["messages"])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_the_work(stream: bool) -> None:
    async with running_server(["one"] + ["more"] * 1000, delay=0.01) as server:
        _, writer = await server.connect()
        body = json.dumps(ASKED | {"stream": stream}).encode()
        writer.write(b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        await until(lambda: server.provider.num_open_streams == 1)
        writer.close()
        await until(lambda: server.provider.num_closed_streams == 1)


async def test_an_answer_without_its_finish_is_an_error() -> None:
    settings = Settings(port=0)
    provider = ScriptedProvider(["half"], name="native", models=["tiny"], complete=False)
    llm = LLMInterface(settings, providers={"native": provider})
    async with serving(settings, llm, provider) as server, client_of(server) as client:
        with pytest.raises(anthropic.InternalServerError, match="cut short"):
            await client.messages.create(**ASKED)
        with pytest.raises(anthropic.APIStatusError, match="cut short"):
            async with client.messages.stream(**ASKED) as stream:
                await stream.get_final_message()


# Our own engine behind it


async def test_the_embedded_model_answers_in_this_format_too() -> None:
    settings = Settings(port=0)
    provider = NativeProvider(settings)
    city = {"type": "object", "properties": {"city": {"enum": ["Riga"]}}, "required": ["city"]}
    tool: Any = TOOL | {"input_schema": city | {"additionalProperties": False}}
    asked = ASKED | {"max_tokens": 4, "extra_body": {"temperature": 0}}
    async with (
        serving(settings, LLMInterface(settings, providers={"native": provider}), provider) as server,
        client_of(server) as client,
    ):
        whole = await client.messages.create(**asked)
        async with client.messages.stream(**asked) as stream:
            streamed = await stream.get_final_message()
        word = text_of(whole)[-3:]
        stopped = await client.messages.create(**asked, stop_sequences=[word])
        counted = await client.messages.count_tokens(model="tiny", messages=ASKED["messages"])
        forced = await client.messages.create(
            **asked | {"max_tokens": 60}, tools=[tool], tool_choice={"type": "tool", "name": "weather"}
        )
        image: Any = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
        with pytest.raises(anthropic.BadRequestError, match="image_url"):
            await client.messages.create(**asked | {"messages": [{"role": "user", "content": [image]}]})
        with pytest.raises(anthropic.BadRequestError, match="thinking"):
            await client.messages.create(**asked, thinking={"type": "adaptive"})
        with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
            await client.messages.create(**asked | {"max_tokens": 20_000})
    assert text_of(whole) == text_of(streamed) != ""
    assert (whole.stop_reason, whole.usage.output_tokens) == ("max_tokens", 4)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)
    assert text_of(stopped) + word == text_of(whole)
    total = whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    assert counted.input_tokens == total > 0
    assert streamed.usage.cache_read_input_tokens == total // 16 * 16  # the blocks of the first answer's prompt
    assert forced.stop_reason == "tool_use"
    call = forced.content[-1]
    assert isinstance(call, ToolUseBlock)
    assert (call.name, call.input) == ("weather", {"city": "Riga"})
