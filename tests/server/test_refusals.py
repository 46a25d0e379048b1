"""What is wrong with a request is said with the right status, in OpenAI's shape, and never with a traceback."""

from __future__ import annotations

import asyncio
import logging

import msgspec
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_harness import PATIENCE, QUESTION, parse_reply, request_bytes, running_server, sse_events

from autobot_llm.dialects.openai.bodies import read_chat, read_completion
from autobot_llm.errors import (
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    LLMError,
    OverloadedError,
    RequestTimeout,
    UnsupportedError,
)
from autobot_llm.types import LLMRequest, Start

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

BAD_CHATS: list[tuple[dict[str, object], str | None]] = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"content": "no role"}]}, "messages[0].role"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [*QUESTION, {"role": "user", "content": 5}]}, "messages[1].content"),
    ({"messages": [{"role": "assistant", "content": "x", "audio": {"id": "1"}}]}, "messages[0].audio"),
    ({"messages": QUESTION, "max_tokens": "ten"}, "max_tokens"),
    ({"messages": QUESTION, "max_tokens": 1.5}, "max_tokens"),
    ({"messages": QUESTION, "max_tokens": 0}, "max_tokens"),
    ({"messages": QUESTION, "max_tokens": True}, "max_tokens"),
    ({"messages": QUESTION, "max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
    ({"messages": QUESTION, "temperature": -1}, "temperature"),
    ({"messages": QUESTION, "temperature": "NaN"}, "temperature"),
    ({"messages": QUESTION, "top_p": 2}, "top_p"),
    ({"messages": QUESTION, "n": 0}, "n"),
    ({"messages": QUESTION, "n": 10**30}, "n"),
    ({"messages": QUESTION, "seed": 10**40}, "seed"),
    ({"messages": QUESTION, "stop": [1]}, "stop[0]"),
    ({"messages": QUESTION, "stop": [""]}, "stop"),
    ({"messages": QUESTION, "logit_bias": {"x": 1}}, "logit_bias"),
    ({"messages": QUESTION, "top_logprobs": 2}, "top_logprobs"),
    ({"messages": QUESTION, "logprobs": True, "top_logprobs": 21}, "logprobs"),
    ({"messages": QUESTION, "stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": QUESTION, "stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"messages": QUESTION, "user": 5}, "user"),
]


async def test_a_wrong_chat_field_is_named() -> None:
    async with running_server() as server:
        for body, param in BAD_CHATS:
            reply = await server.post(CHAT, body)
            error = reply.json["error"]
            assert (reply.status, error["param"], error["type"]) == (400, param, "invalid_request_error"), (body, error)
            assert param.split("[")[0] in error["message"]
    assert server.provider.requests == []


BAD_COMPLETIONS: list[tuple[dict[str, object], str]] = [
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [[1, "a"]]}, "prompt[0][1]"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [[1], [True]]}, "prompt[1][0]"),
    ({"prompt": "a", "echo": True}, "echo"),
    ({"prompt": "a", "best_of": 3}, "best_of"),
    ({"prompt": ["a"] * 9}, "prompt"),
    ({"prompt": ["a", "b"], "n": 5}, "prompt"),
]


async def test_a_wrong_completion_field_is_named() -> None:
    async with running_server(max_queued_requests=8) as server:
        for body, param in BAD_COMPLETIONS:
            reply = await server.post(COMPLETIONS, body)
            assert (reply.status, reply.json["error"]["param"]) == (400, param), (body, reply.json)
    assert server.provider.requests == []


async def test_an_unknown_role_is_answered_with_the_known_ones() -> None:
    async with running_server() as server:
        reply = await server.post(CHAT, {"messages": [{"role": "robot", "content": "x"}]})
    message = reply.json["error"]["message"]
    assert "robot" in message
    assert "system, developer, user, assistant, tool" in message


BROKEN_BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b'{"messages": NaN}',
    b'{"temperature": 1e999}',
    b'{"seed": ' + b"9" * 6000 + b"}",
    b'{"messages": "\xff\xfe"}',
    b'{"messages": "\\ud800"}',
    b'{"messages": [], }',
    b"[" * 200_000,
    b'{"a":' * 100_000,
    b'{"tools": ' + b"[" * 500 + b"]" * 500 + b"}",
    b"\x00\x01\x02",
]


async def test_a_body_that_is_no_proper_json_is_a_bad_request() -> None:
    async with running_server() as server:
        for body in BROKEN_BODIES:
            reply = await server.post(CHAT, body)
            assert reply.status == 400, (body[:40], reply)
            assert reply.json["error"]["message"], body[:40]
        assert (await server.post(CHAT, {"messages": QUESTION})).status == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(["messages", "prompt", "n", "stop", "logit_bias", "stream_options", "tools", "seed", "x"])
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "tool"]), "content": JSON}, optional={"name": JSON})


@given(st.dictionaries(FIELDS, JSON | st.lists(MESSAGE, max_size=2)))
def test_any_json_is_either_read_or_refused_by_name(fields: dict[str, object]) -> None:
    data = msgspec.json.encode(fields)
    for read in (
        lambda: read_chat(data, request_id="r", tenant=""),
        lambda: read_completion(data, request_id="r", tenant="", max_choices=8),
    ):
        try:
            call = read()
        except InvalidRequestError as error:
            assert error.message
        else:
            assert all(isinstance(request, LLMRequest) for request in call.requests)


@given(st.binary(max_size=64))
def test_any_bytes_are_either_read_or_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        read_chat(data, request_id="r", tenant="")


async def test_a_body_over_the_limit_is_refused_and_one_at_the_limit_is_not() -> None:
    limit = 1000
    fits = b'{"messages": [{"role": "user", "content": "' + b"x" * (limit - 47) + b'"}]}'
    assert len(fits) == limit
    async with running_server(max_body_bytes=limit) as server:
        assert (await server.post(CHAT, fits)).status == 200
        reply = await server.post(CHAT, fits + b" ")
        assert (reply.status, reply.json["error"]["code"]) == (413, "request_too_large")
        assert str(limit) in reply.json["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/api/chat"])
async def test_an_error_repeats_no_more_of_a_request_than_anybody_reads(path: str) -> None:
    long = "x" * 1_000_000
    async with running_server() as server:
        for wrong in ({"messages": [{"role": long, "content": "x"}]}, {"model": long}):
            reply = await server.post(path, {"model": "tiny", "messages": QUESTION, "max_tokens": 5} | wrong)
            assert reply.status in (400, 404)
            assert b"xxx ... xxx" in reply.body and len(reply.body) < 10_000


async def test_a_declared_length_far_over_the_limit_is_refused_before_the_body_is_sent() -> None:
    async with running_server(max_body_bytes=1000) as server:
        reader, writer = await server.connect()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 99999999999999\r\n\r\n")
        reply = parse_reply(await asyncio.wait_for(reader.read(), PATIENCE))
        writer.close()
    assert (reply.status, reply.headers["connection"]) == (413, "close")


async def test_an_endless_chunked_body_is_cut_off() -> None:
    async with running_server(max_body_bytes=100_000) as server:
        _, writer = await server.connect()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n")
        num_sent = 0
        try:
            while num_sent < 100_000_000:
                writer.write(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
                await writer.drain()
                num_sent += 10_000
        except ConnectionError:
            pass
        writer.close()
        assert num_sent < 50_000_000
        assert (await server.get("/health")).status == 200


async def test_paths_and_methods_that_do_not_exist_say_so() -> None:
    async with running_server() as server:
        nowhere = await server.get("/v2/anything")
        wrong = await server.exchange("DELETE", CHAT, b"", {})
        wrong_get = await server.post("/health", b"")
        index = await server.get("/")
        head = await server.exchange("HEAD", "/health", b"", {})
    assert (nowhere.status, nowhere.json["error"]["code"]) == (404, "not_found")
    assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
    assert (wrong_get.status, wrong_get.headers["allow"]) == (405, "GET, HEAD")
    assert wrong.json["error"]["code"] == "method_not_allowed"
    assert CHAT in index.json["endpoints"]
    assert (head.status, head.body) == (200, b"")


async def test_a_key_is_demanded_where_keys_are_set_and_never_for_health() -> None:
    async with running_server(api_keys=("first-secret", "zweites-Geheimnis")) as server:
        for headers in (
            {},
            {"authorization": "Bearer "},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic x"},
            {"x-api-key": "wrong"},
            {"authorization": "Bearer wrong", "x-api-key": "first-secret"},
        ):
            reply = await server.post(CHAT, {"messages": QUESTION}, **headers)
            assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
            assert reply.json["error"]["code"] == "invalid_api_key"
        assert (await server.get("/metrics")).status == 401
        assert (await server.get("/v1/models")).status == 401
        assert (await server.get("/health")).status == 200
        assert server.provider.requests == []
        for key in ("first-secret", "zweites-Geheimnis"):
            async with server.client(key) as client:
                await client.chat.completions.create(model="tiny", messages=QUESTION, user="somebody")
        by_other_header = await server.post(CHAT, {"messages": QUESTION}, **{"x-api-key": "first-secret"})
        assert by_other_header.status == 200
        async with server.client("wrong") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
    tenants = [request.tenant for request in server.provider.requests]
    assert len(set(tenants)) == 2, "each key is a tenant of its own, whatever `user` says"
    assert not any("secret" in tenant or tenant == "" for tenant in tenants)


ERRORS: list[tuple[LLMError, int, str]] = [
    (ContextLengthError("too long", param="messages"), 400, "context_length_exceeded"),
    (UnsupportedError("no tools here", param="tools"), 400, "unsupported_parameter"),
    (OverloadedError("queue is full", retry_after=2.2), 429, "overloaded"),
    (RequestTimeout("too slow"), 408, "request_timeout"),
    (EngineError("the engine failed"), 500, "engine_error"),
]


@pytest.mark.parametrize("has_started", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_piece_has_its_own_status(stream: bool, has_started: bool) -> None:
    errors = iter(ERRORS)
    start = [Start(request_id="r", model="tiny", provider="native")] if has_started else []
    async with running_server(lambda request: [*start, next(errors)[0]]) as server:
        for error, status, code in ERRORS:
            reply = await server.post(CHAT, {"messages": QUESTION, "stream": stream})
            assert (reply.status, reply.json["error"]["code"]) == (status, code)
            assert reply.json["error"]["param"] == error.param
            assert reply.headers.get("retry-after") == ("3" if status == 429 else None)


async def test_an_error_within_a_stream_is_an_event_and_no_done_follows() -> None:
    async with running_server(["Once ", EngineError("the engine failed")]) as server, server.client() as client:
        reply = await server.post(CHAT, {"messages": QUESTION, "stream": True})
        with pytest.raises(openai.APIError, match="the engine failed"):
            async for _ in await client.chat.completions.create(model="tiny", messages=QUESTION, stream=True):
                pass
    events = sse_events(reply.body)
    assert reply.status == 200
    assert events[-2]["choices"][0]["delta"] == {"content": "Once "}
    assert events[-1]["error"]["code"] == "engine_error"


async def test_an_error_in_one_of_several_prompts_ends_them_all() -> None:
    def script(request: LLMRequest) -> list[str | Exception]:
        return [EngineError("b failed")] if request.prompt == "b" else ["x"] * 10_000

    async with running_server(script) as server:
        reply = await server.post(COMPLETIONS, {"prompt": ["a", "b", "c"]})
        assert (reply.status, reply.json["error"]["message"]) == (500, "b failed")
        assert server.provider.num_open_streams == 0


async def test_an_unexpected_failure_is_logged_and_tells_the_client_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with running_server([KeyError("a secret detail")]) as server:
        with caplog.at_level(logging.ERROR, "autobot_llm.server"):
            reply = await server.post(CHAT, {"messages": QUESTION})
    assert (reply.status, reply.json["error"]["code"]) == (500, "internal_error")
    assert b"secret" not in reply.body
    assert b"Traceback" not in reply.body
    request_id = reply.headers["x-request-id"]
    assert request_id in reply.json["error"]["message"]
    assert [request_id in record.getMessage() for record in caplog.records] == [True]
    assert "a secret detail" in caplog.text


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: t\r\n\r\n",
        b"GET /health HTTP/1.1\r\nendless: " + b"x" * 1_000_000,
        b"GET /health HTTP/1.1\r\n" + b"many: x\r\n" * 100_000,
    ],
)
async def test_bytes_that_are_no_http_are_refused_and_the_server_goes_on(garbage: bytes) -> None:
    async with running_server() as server:
        reader, writer = await server.connect()
        writer.write(garbage)
        try:
            answer = await asyncio.wait_for(reader.read(), PATIENCE)
            assert b" 400 " in answer.split(b"\r\n")[0]
        except ConnectionError:
            pass  # cut off while it still sent
        writer.close()
        assert (await server.get("/health")).status == 200


async def test_a_request_in_tiny_pieces_is_understood() -> None:
    body = b'{"messages": [{"role": "user", "content": "hi"}]}'
    async with running_server() as server:
        reader, writer = await server.connect()
        for byte in request_bytes("POST", CHAT, body, {"connection": "close"}):
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
        assert parse_reply(await asyncio.wait_for(reader.read(), PATIENCE)).status == 200
        writer.close()
