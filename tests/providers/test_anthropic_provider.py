"""The Anthropic provider asks as the reference says and reads what comes, in an answer's good and bad days."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from typing import Any

import pytest
from anthropic_upstream import (
    KEY,
    MODEL,
    answer,
    ending,
    error,
    event,
    message_start,
    request,
    send_events,
    text_block,
    upstream,
)
from raw_server import Asked, Wire

from autobot_llm.collect import collect
from autobot_llm.errors import (
    ConfigurationError,
    ContextLengthError,
    InvalidRequestError,
    LLMError,
    ModelNotFoundError,
    OverloadedError,
    ProviderError,
    ProviderTimeout,
    ProviderUnavailable,
    UnsupportedError,
)
from autobot_llm.interface import LLMInterface
from autobot_llm.providers.anthropic import AnthropicProvider
from autobot_llm.providers.base import TokenCounter
from autobot_llm.settings import Settings
from autobot_llm.types import (
    ChatMessage,
    ChoiceEnd,
    Event,
    Finish,
    LLMRequest,
    LLMResponse,
    ReasoningDelta,
    Start,
    TextDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)


async def ask(provider: AnthropicProvider, asked: LLMRequest) -> LLMResponse:
    async with aclosing(provider.stream(asked)) as events:
        return await collect(events)


async def events_of(provider: AnthropicProvider, asked: LLMRequest) -> list[Event]:
    async with aclosing(provider.stream(asked)) as events:
        return [event async for event in events]


def sent(asked: Asked) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(asked.body)
    return body


async def test_an_answer_comes_piece_by_piece_with_its_model_and_usage() -> None:
    async with upstream(answer("Hel", "lo ", "蓝 🟦")) as (server, provider):
        events = await events_of(provider, request())
    assert events[:-1] == [
        Start(request_id="r", model=MODEL, provider="anthropic"),
        TextDelta("Hel"),
        TextDelta("lo "),
        TextDelta("蓝 🟦"),
        ChoiceEnd(finish_reason="stop"),
    ]
    finish = events[-1]
    assert isinstance(finish, Finish)
    assert finish.usage == Usage(prompt_tokens=12, completion_tokens=3)
    assert finish.timings.time_to_first_token is not None
    assert finish.timings.total is not None
    assert 0 < finish.timings.time_to_first_token <= finish.timings.total
    assert sent(server.asked[0])["stream"] is True


async def test_everything_a_request_can_say_is_said_as_the_reference_has_it() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rīga"}'}}
    asked = request(
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(
            role="user",
            content=[
                {"type": "text", "text": "Where is this, and how is the weather?"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
            ],
        ),
        ChatMessage(
            role="assistant",
            content=[{"type": "thinking", "thinking": "Riga", "signature": "s"}, {"type": "text", "text": "Riga."}],
            tool_calls=[call],
        ),
        ChatMessage(role="tool", content="12 °C", tool_call_id="c1"),
        tools=[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}],
        tool_choice="auto",
        temperature=0.0,
        max_tokens=50,
        stop=["END"],
        metadata={"user_id": "u"},
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
        extra_body={"reasoning_effort": "low", "parallel_tool_calls": False},
        model="claude-sonnet-4-6",
    )
    async with upstream(answer("{}")) as (server, provider):
        response = await ask(provider, asked)
    assert response.content == "{}"
    body = sent(server.asked[0])
    assert body["system"] == [{"type": "text", "text": "Be brief."}]
    assert [turn["role"] for turn in body["messages"]] == ["user", "assistant", "user"]
    assert body["tool_choice"] == {"type": "auto", "disable_parallel_tool_use": True}
    assert server.asked[0].headers["anthropic-version"] == "2023-06-01"


async def test_reasoning_and_calls_come_as_their_own_events() -> None:
    def block(index: int, start: dict[str, Any], *deltas: dict[str, Any]) -> list[bytes]:
        return [
            event("content_block_start", index=index, content_block=start),
            *(event("content_block_delta", index=index, delta=delta) for delta in deltas),
            event("content_block_stop", index=index),
        ]

    script = [
        message_start(),
        *block(
            0,
            {"type": "thinking", "thinking": "", "signature": ""},
            {"type": "thinking_delta", "thinking": "hm"},
            {"type": "signature_delta", "signature": "sig"},
        ),
        *text_block("I look.", index=1),
        *block(
            2,
            {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}},
            {"type": "input_json_delta", "partial_json": ""},
            {"type": "input_json_delta", "partial_json": '{"city": "R'},
            {"type": "input_json_delta", "partial_json": 'īga"}'},
        ),
        *block(3, {"type": "tool_use", "id": "toolu_2", "name": "now", "input": {}}),
        *ending("tool_use"),
    ]
    async with upstream(script) as (_, provider):
        events = await events_of(provider, request())
        response = await ask(provider, request())
    assert events[1:3] == [ReasoningDelta("hm"), ReasoningDelta("", signature="sig")]
    assert events[4] == ToolCallDelta(position=0, call_id="toolu_1", name="weather")
    assert response.tool_calls == (
        ToolCall(id="toolu_1", name="weather", arguments='{"city": "Rīga"}'),
        ToolCall(id="toolu_2", name="now", arguments="{}"),
    )
    assert (response.reasoning, response.choices[0].reasoning_signature) == ("hm", "sig")
    assert response.finish_reason == "tool_calls"


async def test_a_stop_sequence_is_named() -> None:
    async with upstream([message_start(), *text_block("a"), *ending("stop_sequence", sequence="END")]) as (_, provider):
        response = await ask(provider, request(stop=["END"]))
    assert (response.finish_reason, response.choices[0].stop_sequence) == ("stop", "END")


async def test_any_cut_of_the_bytes_gives_the_same_answer() -> None:
    data = b"".join(answer("blau 蓝 🟦", "\u2028", "ende"))

    async def byte_by_byte(wire: Wire, asked: Asked) -> None:
        await wire.begin_stream()
        for i in range(len(data)):
            await wire.piece(data[i : i + 1])
        await wire.end_stream()

    async with upstream(byte_by_byte) as (_, provider):
        assert (await ask(provider, request())).content == "blau 蓝 🟦\u2028ende"


async def test_a_whole_answer_is_understood_too() -> None:
    message = {
        "model": MODEL,
        "content": [{"type": "text", "text": "Hello"}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 3, "output_tokens": 2},
    }

    async def whole(wire: Wire, asked: Asked) -> None:
        await wire.reply(json.dumps(message).encode(), content_type="application/json")

    async with upstream(whole) as (server, provider):
        for stream in (False, True):  # asked for, and from a server that does not stream
            response = await ask(provider, request(max_tokens=9, stream=stream))
            assert (response.content, response.usage.prompt_tokens) == ("Hello", 3)
            assert sent(server.asked[-1])["stream"] is stream


async def test_one_connection_serves_one_answer_after_the_other() -> None:
    async with upstream(answer("Hello")) as (server, provider):
        reports = [(await ask(provider, request())).optimizations for _ in range(3)]
        assert server.num_accepted == 1
        figures = provider.metrics()
    assert (figures["num_connects"], figures["num_running"]) == (1, 0)
    assert [(report[1].name, report[1].applied) for report in reports] == [
        ("connection_pooling", False),
        ("connection_pooling", True),
        ("connection_pooling", True),
    ]


# Prompt caching

LONG = "Every answer is as short as its question allows. " * 200
SYSTEM = ChatMessage(role="system", content=LONG)
QUESTION = ChatMessage(role="user", content="Hi")


def marks(asked: Asked) -> int:
    return asked.body.count(b'"cache_control"')


async def test_a_long_prefix_is_marked_and_what_was_read_is_reported() -> None:
    async with upstream(answer("Hello", cache_read_input_tokens=2500, cache_creation_input_tokens=7)) as (
        server,
        provider,
    ):
        response = await ask(provider, request(SYSTEM, QUESTION))
        figures = provider.metrics()
    assert sent(server.asked[0])["system"][-1]["cache_control"] == {"type": "ephemeral"}
    assert response.usage == Usage(prompt_tokens=2519, completion_tokens=3, cached_tokens=2500, cache_write_tokens=7)
    line = response.optimizations[0]
    assert (line.name, line.applied, line.tokens_saved) == ("prompt_caching", True, 2500)
    assert line.reason == "marked in 1 place; 2,500 of 2,519 prompt tokens read, 7 written"
    assert (figures["num_cached_tokens"], figures["num_cache_write_tokens"]) == (2500, 7)
    assert figures["prefix_cache_hit_rate"] == 2500 / 2519


@pytest.mark.parametrize(
    ("settings", "fields", "messages", "num_marks", "reason"),
    [
        ({}, {}, (QUESTION,), 0, "no stable prefix of 512 tokens"),
        ({}, {"extra_body": {"prompt_caching": False}}, (SYSTEM, QUESTION), 0, "switched off by the request"),
        ({"prefix_caching": False}, {}, (SYSTEM, QUESTION), 0, "switched off by AUTOBOT_PREFIX_CACHING"),
        (
            {},
            {},
            (
                SYSTEM,
                ChatMessage(
                    role="user", content=[{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]
                ),
            ),
            1,
            "marked by the caller",
        ),
    ],
)
async def test_nothing_is_marked_where_it_is_no_use_or_not_wanted(
    settings: dict[str, Any], fields: dict[str, Any], messages: tuple[ChatMessage, ...], num_marks: int, reason: str
) -> None:
    async with upstream(answer("Hello"), **settings) as (server, provider):
        response = await ask(provider, request(*messages, **fields))
    assert marks(server.asked[0]) == num_marks
    assert not response.optimizations[0].applied
    assert response.optimizations[0].reason.startswith(reason)


async def test_a_wish_that_is_neither_yes_nor_no_is_refused() -> None:
    async with upstream(answer("Hello")) as (server, provider):
        with pytest.raises(InvalidRequestError, match="prompt_caching='5m': expected true or false"):
            await ask(provider, request(extra_body={"prompt_caching": "5m"}))
        assert server.asked == []


# What Anthropic refuses


@pytest.mark.parametrize(
    ("status", "kind", "expected"),
    [
        (400, "invalid_request_error", InvalidRequestError),
        (401, "authentication_error", ProviderError),
        (402, "billing_error", InvalidRequestError),
        (403, "permission_error", ProviderError),
        (404, "not_found_error", ModelNotFoundError),
        (413, "request_too_large", InvalidRequestError),
        (429, "rate_limit_error", OverloadedError),
        (500, "api_error", ProviderError),
        (504, "timeout_error", ProviderTimeout),
        (529, "overloaded_error", ProviderUnavailable),
    ],
)
async def test_a_refusal_is_an_error_of_ours_with_anthropics_words(
    status: int, kind: str, expected: type[LLMError]
) -> None:
    async def refuse(wire: Wire, asked: Asked) -> None:
        body = error(kind, f"model: words about it, with {KEY} in them")
        await wire.reply(body, status=status, content_type="application/json", retry_after="7")

    async with upstream(refuse) as (_, provider):
        with pytest.raises(expected, match="words about it") as caught:
            await ask(provider, request())
        is_the_callers = issubclass(expected, InvalidRequestError)
        assert ("words about it" in provider.status().message) is not is_the_callers
    assert KEY not in str(caught.value) + repr(caught.value)
    assert caught.value.retry_after == (7 if status in (429, 500, 529) else None)


async def test_a_prompt_that_is_too_long_is_told_from_other_faults() -> None:
    async def refuse(wire: Wire, asked: Asked) -> None:
        words = "prompt is too long: 213462 tokens > 200000 maximum"
        await wire.reply(error("invalid_request_error", words), status=400, content_type="application/json")

    async with upstream(refuse) as (_, provider):
        with pytest.raises(ContextLengthError, match="213462 tokens"):
            await ask(provider, request())


async def test_what_cannot_be_said_in_this_format_is_never_sent() -> None:
    async with upstream(answer("Hello")) as (server, provider):
        with pytest.raises(UnsupportedError, match="seed=7"):
            await ask(provider, request(seed=7))
        assert server.asked == []


# Bad days


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("overloaded_error", ProviderUnavailable), ("rate_limit_error", OverloadedError), ("api_error", ProviderError)],
)
async def test_an_error_in_the_middle_of_the_stream_ends_it_as_one(kind: str, expected: type[LLMError]) -> None:
    script = [message_start(), *text_block("Hel")[:2], b"event: error\ndata: " + error(kind, "Overloaded") + b"\n\n"]
    async with upstream(script) as (_, provider):
        pieces: list[Event] = []
        with pytest.raises(expected, match="Overloaded"):
            async with aclosing(provider.stream(request())) as events:
                async for piece in events:
                    pieces.append(piece)  # noqa: PERF401  what came before the error is kept
    assert pieces[1:] == [TextDelta("Hel")]


WHOLE = answer("Hello", "!")
HALVES = {
    "before the first event": [],
    "in the middle of an event": [WHOLE[0], WHOLE[1], WHOLE[2][: len(WHOLE[2]) // 2]],
    "without the last event's blank line": [*WHOLE[:-1], WHOLE[-1].rstrip(b"\n")],
    "before message_stop": WHOLE[:-1],
    "before message_delta": WHOLE[:-2],
}


@pytest.mark.parametrize("script", HALVES.values(), ids=HALVES.keys())
async def test_a_stream_that_ends_too_early_is_an_error_and_no_answer(script: list[bytes]) -> None:
    async with upstream(script) as (_, provider):
        with pytest.raises(ProviderError, match="before it was complete") as caught:
            await ask(provider, request())
    assert caught.value.code == "truncated_answer"


async def test_a_connection_that_breaks_is_an_error() -> None:
    async def break_off(wire: Wire, asked: Asked) -> None:
        await wire.begin_stream()
        await wire.piece(b"".join(WHOLE[:4]))
        wire.reset()

    async with upstream(break_off) as (_, provider):
        with pytest.raises(ProviderError):
            await ask(provider, request())
        assert provider.metrics()["num_running"] == 0


@pytest.mark.parametrize("kind", ["text/html", "application/x-ndjson"])
async def test_an_answer_of_another_kind_is_an_error(kind: str) -> None:
    async def play(wire: Wire, asked: Asked) -> None:
        await wire.reply(b"<html>Welcome to the hotel's network</html>", content_type=kind)

    async with upstream(play) as (_, provider):
        with pytest.raises(ProviderError, match=kind):
            await ask(provider, request())


async def test_nonsense_in_the_stream_is_an_error() -> None:
    async with upstream([message_start(), b"event: x\ndata: {not json\n\n"]) as (_, provider):
        with pytest.raises(ProviderError, match="not json"):
            await ask(provider, request())


async def test_what_follows_the_end_is_not_waited_for() -> None:
    release = asyncio.Event()

    async def dawdle(wire: Wire, asked: Asked) -> None:
        await wire.begin_stream()
        for data in WHOLE:
            await wire.piece(data)
        await release.wait()

    async with upstream(dawdle) as (_, provider):
        async with asyncio.timeout(3):
            assert (await ask(provider, request())).content == "Hello!"
        release.set()


async def test_leaving_an_answer_closes_its_connection_at_once() -> None:
    gone = asyncio.Event()

    async def endless(wire: Wire, asked: Asked) -> None:
        await wire.begin_stream()
        await wire.piece(b"".join(WHOLE[:4]))
        await wire.until_gone()
        gone.set()

    async with upstream(endless) as (server, provider):
        async with aclosing(provider.stream(request())) as events:
            async for piece in events:
                if isinstance(piece, TextDelta):
                    break
        await asyncio.wait_for(gone.wait(), 3)
        await server.until(lambda seen: seen.num_open == 0)
        assert provider.metrics()["num_running"] == 0


async def test_nobody_there_is_said_with_the_address() -> None:
    provider = AnthropicProvider(Settings(anthropic_endpoint="http://127.0.0.1:9", anthropic_api_key=KEY))
    await provider.start()
    with pytest.raises(ProviderUnavailable, match=r"127\.0\.0\.1:9"):
        await ask(provider, request())
    await provider.close()


# Everything else


async def test_models_are_listed_over_all_pages_and_their_limits_kept() -> None:
    first = {
        "data": [{"id": "claude-a", "max_input_tokens": 9, "max_tokens": 77}],
        "has_more": True,
        "last_id": "claude-a",
    }
    second = {
        "data": [{"id": "claude-b", "created_at": "2026-01-01T00:00:00Z"}],
        "has_more": False,
        "last_id": "claude-b",
    }

    async def pages(wire: Wire, asked: Asked) -> None:
        if asked.method == "POST":
            await send_events(wire, WHOLE)
            return
        page = second if "after_id=claude-a" in asked.path else first
        await wire.reply(json.dumps(page).encode(), content_type="application/json")

    async with upstream(pages) as (server, provider):
        models = await provider.models()
        await ask(provider, request(model="claude-a"))
        assert sent(server.asked[-1])["max_tokens"] == 77
    assert [(model.id, model.provider, model.context_length) for model in models] == [
        ("claude-a", "anthropic", 9),
        ("claude-b", "anthropic", None),
    ]


async def test_what_is_left_of_the_rate_limits_is_shown() -> None:
    async def play(wire: Wire, asked: Asked) -> None:
        limits = {"anthropic-ratelimit-requests-remaining": "49", "anthropic-ratelimit-tokens-remaining": "39000"}
        await wire.begin_stream(**limits)
        for data in WHOLE:
            await wire.piece(data)
        await wire.end_stream()

    async with upstream(play) as (_, provider):
        assert provider.rate_limits is None
        await ask(provider, request())
        details = provider.status().details
    assert (details["remaining_requests"], details["remaining_tokens"]) == (49, 39_000)


async def test_a_list_without_an_end_is_an_error() -> None:
    page = json.dumps({"data": [], "has_more": True, "last_id": "x"}).encode()

    async def play(wire: Wire, asked: Asked) -> None:
        await wire.reply(page, content_type="application/json")

    async with upstream(play) as (_, provider):
        with pytest.raises(ProviderError, match="without an end"):
            await provider.models()


async def test_tokens_are_counted_by_anthropic() -> None:
    async def count(wire: Wire, asked: Asked) -> None:
        await wire.reply(b'{"input_tokens": 2095}', content_type="application/json")

    async with upstream(count) as (server, provider):
        assert isinstance(provider, TokenCounter)
        assert await provider.count_tokens(request(SYSTEM, QUESTION)) == 2095
        assert server.asked[0].path == "/v1/messages/count_tokens"


async def test_the_public_address_needs_a_key_and_another_one_does_not() -> None:
    with pytest.raises(ConfigurationError, match="set ANTHROPIC_API_KEY"):
        await AnthropicProvider(Settings()).start()
    elsewhere = AnthropicProvider(Settings(anthropic_endpoint="http://user:word@127.0.0.1:9/a?key=b"))
    assert elsewhere.status().state == "stopped"
    await elsewhere.start()
    await elsewhere.start()
    assert elsewhere.status().state == "ready"
    assert elsewhere.status().details["endpoint"] == "http://127.0.0.1:9/a"
    await elsewhere.close()
    await elsewhere.close()
    with pytest.raises(ProviderUnavailable, match="not started"):
        await ask(elsewhere, request())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"default_model": "anthropic/claude-x"}, "claude-x"),
        ({"default_model": "claude-x", "provider": "anthropic"}, "claude-x"),
        ({"default_model": "claude-x"}, None),
        ({"provider": "anthropic"}, None),
    ],
)
async def test_the_default_model_is_used_where_it_is_one_of_anthropics(
    values: dict[str, Any], expected: str | None
) -> None:
    async with upstream(answer("Hello"), **values) as (server, provider):
        if expected is None:
            with pytest.raises(InvalidRequestError, match="AUTOBOT_DEFAULT_LLM_MODEL"):
                await ask(provider, request(model=None))
            return
        await ask(provider, request(model=None))
        assert sent(server.asked[0])["model"] == expected


async def test_the_interface_finds_it_by_the_models_name() -> None:
    async with upstream(answer("Hello")) as (server, _):
        settings = Settings(anthropic_endpoint=server.url, anthropic_api_key=KEY)
        llm = LLMInterface(settings)
        response = await llm.chat_completion([{"role": "user", "content": "Hi"}], model=f"anthropic/{MODEL}")
        await llm.aclose()
    assert (response.content, response.provider, response.model) == ("Hello", "anthropic", MODEL)
