"""OpenAI's provider asks exactly what OpenAI publishes, reads what servers really send, and survives what they do."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from openai_upstream import LAST, VLLM_FIELDS, Json, Upstream, chunk, hello, openai_upstream, vector, whole
from raw_server import Asked, Wire, raw_server

from autobot_llm.collect import collect
from autobot_llm.dialects.openai.answers import UNKNOWN_TOKEN
from autobot_llm.dialects.openai.requests import AZURE, COMPATIBLE, OPENAI, Flavour
from autobot_llm.errors import (
    ConfigurationError,
    InvalidRequestError,
    LLMError,
    OverloadedError,
    ProviderError,
    ProviderUnavailable,
    UnsupportedError,
)
from autobot_llm.interface import LLMInterface
from autobot_llm.providers.openai import Endpoint, OpenAIProvider
from autobot_llm.providers.openai.endpoint import endpoint_at
from autobot_llm.settings import CloudSettings, Settings
from autobot_llm.types import (
    ChatMessage,
    ChoiceEnd,
    EmbeddingRequest,
    Event,
    Finish,
    LLMRequest,
    LLMResponse,
    ReasoningDelta,
    Start,
    TextDelta,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)

KEY = "sk-very-secret"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Now", "parameters": PARAMETERS}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
CONVERSATION = [
    ChatMessage("developer", "Be brief."),
    ChatMessage("user", [{"type": "text", "text": "What is it?"},
                         {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}]),
    ChatMessage("assistant", None, tool_calls=[CALL], reasoning_content="Let me look."),
    ChatMessage("tool", "Rain", tool_call_id="call_1"),
    ChatMessage("user", "Sure?", name="ann"),
]  # fmt: skip


@contextlib.asynccontextmanager
async def provider_at(
    url: str, flavour: Flavour = COMPATIBLE, *, model: str | None = "m-1", **values: Any
) -> AsyncIterator[OpenAIProvider]:
    settings = Settings(**({"provider": "openai", "default_model": model or "tiny"} | values))
    provider = OpenAIProvider(settings, name="openai", endpoint=Endpoint(base_url=url, flavour=flavour, api_key=KEY))
    await provider.start()
    try:
        yield provider
    finally:
        await provider.close()


def asking(text: str = "Why is the sky blue?", **fields: Any) -> LLMRequest:
    return LLMRequest(messages=[ChatMessage("user", text)], **fields)


async def ask(provider: OpenAIProvider, request: LLMRequest | None = None) -> LLMResponse:
    return await collect(provider.stream(request or asking()))


async def events_of(provider: OpenAIProvider, request: LLMRequest) -> list[Event]:
    return [event async for event in provider.stream(request)]


# What is asked


EVERY_FIELD: Json = {
    "temperature": 0.5, "top_p": 0.9, "max_tokens": 50, "stop": ["END", "\n\n"], "seed": 7, "presence_penalty": 0.5,
    "frequency_penalty": -0.5, "logit_bias": {50256: -100.0}, "n": 2, "logprobs": 3, "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "weather"}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS, "strict": True}},
    "service_options": {"user": "u", "store": True, "service_tier": "flex", "safety_identifier": "s"},
    "metadata": {"run": "1"},
    "extra_body": {"parallel_tool_calls": False, "reasoning_effort": "low", "verbosity": "low",
                   "prediction": {"type": "content", "content": "x"}},
}  # fmt: skip


@pytest.mark.parametrize("flavour", [OPENAI, AZURE], ids=lambda flavour: flavour.name)
@pytest.mark.parametrize("stream", [True, False])
async def test_every_field_is_sent_in_the_published_shape(flavour: Flavour, stream: bool) -> None:
    async with openai_upstream(lambda body: two_choices(body)) as upstream, provider_at(upstream.url, flavour) as one:
        await ask(one, LLMRequest(messages=CONVERSATION, stream=stream, **EVERY_FIELD))
    assert upstream.complaints == []
    body = upstream.bodies[0]
    key = body.pop("prompt_cache_key", None)
    assert (key is not None) == (flavour is OPENAI)
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": CONVERSATION[1].content},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "Rain", "tool_call_id": "call_1"},
        {"role": "user", "content": "Sure?", "name": "ann"},
    ]
    assert body == {
        "model": "m-1", "messages": messages, "temperature": 0.5, "top_p": 0.9, "max_completion_tokens": 50,
        "stop": ["END", "\n\n"], "seed": 7, "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "logit_bias": {"50256": -100}, "n": 2, "logprobs": True, "top_logprobs": 3, "tools": [TOOL],
        "tool_choice": EVERY_FIELD["tool_choice"], "response_format": EVERY_FIELD["response_format"],
        "metadata": {"run": "1"}, **EVERY_FIELD["service_options"], **EVERY_FIELD["extra_body"],
        **({"stream": True, "stream_options": {"include_usage": True}} if stream else {}),
    }  # fmt: skip
    headers = upstream.server.asked[0].headers
    assert headers["content-type"] == "application/json"
    assert headers.get("api-key" if flavour is AZURE else "authorization") in (KEY, f"Bearer {KEY}")


def two_choices(body: Json) -> Json | list[Json]:
    if not body.get("stream"):
        answer = whole({"content": "a"})
        answer["choices"].append(whole({"content": "b"})["choices"][0] | {"index": 1})
        return answer
    ends = [chunk({}, finish="stop", index=index) for index in (1, 0)]
    return [chunk({"content": "b"}, index=1), chunk({"content": "a"}), *ends, LAST]


async def test_a_request_with_nothing_set_sends_nothing_but_the_question() -> None:
    async with openai_upstream() as upstream, provider_at(upstream.url, OPENAI) as one:
        await ask(one, asking("Hi", metadata={"mine": 1}))
    assert upstream.bodies == [{"model": "m-1", "messages": [{"role": "user", "content": "Hi"}]}]


async def test_compatible_servers_get_their_own_fields_and_words() -> None:
    fields = {"top_k": 5, "min_p": 0.1, "min_tokens": 2, "stop_token_ids": [3], "ignore_eos": True,
              "repetition_penalty": 1.1, "priority": 4}  # fmt: skip
    async with (
        openai_upstream(extra_fields=VLLM_FIELDS | {"messages": list[Any]}) as upstream,
        provider_at(upstream.url) as one,
    ):
        await ask(one, LLMRequest(messages=CONVERSATION, max_tokens=9, **fields))
    assert upstream.complaints == []
    body = upstream.bodies[0]
    assert {name: body[name] for name in fields} == fields
    assert body["max_tokens"] == 9
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "tool", "user"]
    assert body["messages"][2]["reasoning_content"] == "Let me look."


@pytest.mark.parametrize(
    "fields",
    [{"top_k": 5}, {"min_p": 0.1}, {"min_tokens": 1}, {"stop_token_ids": [1]}, {"ignore_eos": True},
     {"repetition_penalty": 1.1}, {"priority": 1}],
)  # fmt: skip
async def test_what_openai_has_no_field_for_is_refused_by_name(fields: Json) -> None:
    async with openai_upstream() as upstream, provider_at(upstream.url, OPENAI) as one:
        with pytest.raises(UnsupportedError, match="OpenAI has no such field") as caught:
            await ask(one, asking(**fields))
        assert caught.value.param in fields
        with pytest.raises(InvalidRequestError, match="has a place of its own") as reserved:
            await ask(one, asking(extra_body={"stream": True}))
    assert reserved.value.param == "stream"
    assert upstream.bodies == []


async def test_a_prompt_goes_to_the_older_endpoint() -> None:
    def script(body: Json) -> Json | list[Json]:
        logprobs = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5, "b": -1.0}],
                    "text_offset": [0]}  # fmt: skip
        choice = {"index": 0, "text": "a", "logprobs": logprobs, "finish_reason": "length"}
        answer = {"id": "1", "object": "text_completion", "created": 1, "model": "m-1", "choices": [choice]}
        return [answer, LAST] if body.get("stream") else answer | {"usage": LAST["usage"]}

    async with openai_upstream(script) as upstream, provider_at(upstream.url, OPENAI) as one:
        for stream in (True, False):
            answer = await ask(one, LLMRequest(prompt=[1, 2], max_tokens=1, logprobs=2, stream=stream))
            assert (answer.content, answer.finish_reason, answer.usage.prompt_tokens) == ("a", "length", 12)
            top = ((UNKNOWN_TOKEN, "a", -0.5), (UNKNOWN_TOKEN, "b", -1.0))
            assert answer.choices[0].logprobs == (TokenLogprob(UNKNOWN_TOKEN, "a", -0.5, top),)
        with pytest.raises(UnsupportedError, match="tools: only with messages"):
            await ask(one, LLMRequest(prompt="x", tools=[TOOL]))
    assert upstream.complaints == []
    assert upstream.bodies[1] == {"model": "m-1", "prompt": [1, 2], "max_tokens": 1, "logprobs": 2}


async def test_requests_that_begin_alike_have_one_cache_key_and_each_tenant_its_own() -> None:
    system = ChatMessage("system", "You are a pirate.")

    async def key_of(one: OpenAIProvider, upstream: Upstream, request: LLMRequest) -> object:
        await ask(one, request)
        return upstream.bodies[-1].get("prompt_cache_key")

    async with openai_upstream() as upstream, provider_at(upstream.url, OPENAI) as one:
        first = await key_of(one, upstream, LLMRequest(messages=[system, ChatMessage("user", "a")]))
        same = await key_of(one, upstream, LLMRequest(messages=[system, ChatMessage("user", "b")]))
        other_tenant = await key_of(one, upstream, LLMRequest(messages=[system, ChatMessage("user", "a")], tenant="t"))
        tools = await key_of(one, upstream, asking(tools=[TOOL]))
        nothing = await key_of(one, upstream, asking())
        own = LLMRequest(messages=[system, ChatMessage("user", "a")], service_options={"prompt_cache_key": "mine"})
        assert await key_of(one, upstream, own) == "mine"
    assert first == same
    assert len({first, other_tenant, tools, nothing}) == 4
    assert nothing is None


# What is answered


async def test_an_answer_has_its_text_model_usage_and_report() -> None:
    async with openai_upstream() as upstream, provider_at(upstream.url) as one:
        answers = [await ask(one, asking(stream=stream, request_id="r-1")) for stream in (False, True)]
        pieces = await events_of(one, asking(stream=True))
    for answer in answers:
        assert (answer.content, answer.model, answer.provider) == ("Hello, world", "m-1", "openai")
        assert (answer.request_id, answer.finish_reason) == ("r-1", "stop")
        assert answer.usage == Usage(prompt_tokens=12, completion_tokens=5, cached_tokens=8, reasoning_tokens=2)
        assert answer.timings.total is not None
    reports = [{line.name: line for line in answer.optimizations} for answer in answers]
    assert [report["connection_pooling"].applied for report in reports] == [False, True]
    assert reports[0]["prompt_caching"].tokens_saved == 8
    assert [type(event) for event in pieces] == [Start, TextDelta, TextDelta, ChoiceEnd, Finish]
    assert upstream.server.num_accepted == 1


def streamed(*pieces: Json) -> Callable[[Json], list[Json]]:
    return lambda body: [*pieces, LAST]


def call(index: int | None, arguments: str, **fields: Any) -> Json:
    function = {"arguments": arguments} | ({"name": fields.pop("name")} if "name" in fields else {})
    return ({} if index is None else {"index": index}) | fields | {"function": function}


async def test_tool_calls_come_in_pieces_side_by_side() -> None:
    script = streamed(
        chunk({"role": "assistant", "content": None}),
        chunk({"tool_calls": [call(0, "", id="c0", type="function", name="weather")]}),
        chunk({"tool_calls": [call(0, '{"city": ')]}),
        chunk({"tool_calls": [call(0, '"Paris"}'), call(1, "", id="c1", type="function", name="time")]}),
        chunk({"tool_calls": [call(1, "{}")]}),
        chunk({}, finish="tool_calls"),
    )
    async with openai_upstream(script) as upstream, provider_at(upstream.url) as one:
        answer = await ask(one, asking(tools=[TOOL], stream=True))
        pieces = await events_of(one, asking(tools=[TOOL], stream=True))
    assert answer.tool_calls == (
        ToolCall(id="c0", name="weather", arguments='{"city": "Paris"}'), ToolCall(id="c1", name="time", arguments="{}")
    )  # fmt: skip
    assert answer.finish_reason == "tool_calls"
    deltas = [event for event in pieces if isinstance(event, ToolCallDelta)]
    assert [(delta.position, delta.call_id, delta.name) for delta in deltas] == [
        (0, "c0", "weather"), (0, None, None), (0, None, None), (1, "c1", "time"), (1, None, None)
    ]  # fmt: skip


async def test_tool_calls_without_an_index_or_an_id_are_told_apart() -> None:
    script = streamed(
        chunk({"tool_calls": [call(None, '{"a":1}', id="x", name="f")]}),
        chunk({"tool_calls": [call(None, '{"b":2}', id="y", name="g"), call(2, "{}", name="h")]}),
        chunk({}, finish="stop"),
    )
    async with openai_upstream(script) as upstream, provider_at(upstream.url) as one:
        calls = (await ask(one, asking(tools=[TOOL], stream=True))).tool_calls
    assert [(one.name, one.arguments) for one in calls] == [("f", '{"a":1}'), ("g", '{"b":2}'), ("h", "{}")]
    assert calls[2].id.startswith("call_")


@pytest.mark.parametrize(
    "thought",
    [{"reasoning_content": "Hm."}, {"reasoning": "Hm."},
     {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}]}],
)  # fmt: skip
async def test_reasoning_is_understood_under_every_name(thought: Json) -> None:
    script = streamed(chunk(thought), chunk({"content": [{"type": "text", "text": "Yes"}]}), chunk({}, finish="stop"))
    async with openai_upstream(script) as upstream, provider_at(upstream.url) as one:
        pieces = await events_of(one, asking(stream=True))
        upstream.script = lambda body: whole({"content": "Yes"} | thought) if "content" not in thought else hello(body)
        answer = await ask(one)
    assert pieces[1:3] == [ReasoningDelta("Hm."), TextDelta("Yes")]
    assert answer.reasoning == ("Hm." if "content" not in thought else "")


async def test_refusals_stop_strings_logprobs_and_odd_finish_reasons_are_kept() -> None:
    token = {"token": "No", "logprob": -0.25, "bytes": [78, 111]}
    logprobs = {"content": [token | {"top_logprobs": [token]}], "refusal": None}
    script = streamed(
        chunk({"content": "No"}, logprobs=logprobs),
        chunk({"refusal": "I cannot."}),
        chunk({}, finish="eos", stop_reason="END"),
    )
    async with openai_upstream(script) as upstream, provider_at(upstream.url) as one:
        choice = (await ask(one, asking(stream=True, logprobs=1))).choices[0]
        upstream.script = lambda body: whole({"refusal": "I cannot."}, "content_filter")
        refused = (await ask(one)).choices[0]
    assert (choice.refusal, choice.stop_sequence, choice.finish_reason) == ("I cannot.", "END", "stop")
    best = (UNKNOWN_TOKEN, "No", -0.25)
    assert choice.logprobs == (TokenLogprob(*best, (best,)),)
    assert (refused.content, refused.refusal, refused.finish_reason) == ("", "I cannot.", "content_filter")


async def test_a_server_that_does_not_stream_or_streams_without_usage_or_end_is_understood() -> None:
    ending = chunk({"content": "x"}, finish="stop")

    async def play(wire: Wire, asked: Asked) -> None:
        if asked.path.startswith("/whole"):
            await wire.reply(json.dumps(whole({"content": "x"})).encode(), content_type="application/json")
        else:
            await wire.begin_stream()
            await wire.piece(b": comment\r\n\r\nevent: x\r\ndata: " + json.dumps(ending).encode() + b"\r\n\r\n")
            await wire.end_stream()

    async with raw_server(play) as server:
        for path, tokens in (("/whole", 12), ("/no-done", 0)):
            async with provider_at(server.url + path) as one:
                answer = await ask(one, asking(stream=True))
            assert (answer.content, answer.usage.prompt_tokens) == ("x", tokens)


# What goes wrong


def reply(body: object, status: int = 200, kind: str = "application/json", **headers: str) -> Callable[..., Any]:
    async def play(wire: Wire, asked: Asked) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        await wire.reply(data, status=status, content_type=kind, **headers)

    return play


def stream(*pieces: bytes, then: str = "end") -> Callable[..., Any]:
    async def play(wire: Wire, asked: Asked) -> None:
        await wire.begin_stream()
        for piece in pieces:
            await wire.piece(piece)
        if then == "reset":
            await asyncio.sleep(0.01)
            wire.reset()
            raise ConnectionError
        if then == "silence":
            await wire.until_gone()
        await wire.end_stream()

    return play


def sse(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


HALF = sse(chunk({"content": "half"}))
MISBEHAVING: list[tuple[Callable[..., Any], type[LLMError], str]] = [
    (reply({"error": {"message": "Slow down", "code": "rate_limit_exceeded"}}, 429, retry_after="7"),
     OverloadedError, "openai: Slow down"),
    (reply({"error": {"message": "Oops"}}, 500), ProviderError, "openai: Oops (status 500)"),
    (reply({"error": {"message": f"bad key {KEY}"}}, 401), ProviderError, "was not accepted"),
    (reply({"error": {"message": "no", "param": "seed"}}, 400), InvalidRequestError, "openai: no"),
    (reply(b"<html>hello</html>", kind="text/html"), ProviderError, "answered with 'text/html'"),
    (reply(b"{"), ProviderError, "no answer of OpenAI's form"),
    (reply({"choices": []}), ProviderError, "before it was complete"),
    (reply({"choices": 7}), ProviderError, "no answer of OpenAI's form"),
    (reply(b"\xff\xfe"), ProviderError, "no answer of OpenAI's form"),
    (reply(b"[" * 100_000), ProviderError, "no answer of OpenAI's form"),
    (reply(gzip.compress(bytes(100 * 2**20)), content_encoding="gzip"), ProviderError, "more than 67108864 bytes"),
    (stream(HALF), ProviderError, "before it was complete"),
    (stream(HALF, b"data: {\"choices\": [{\"del"), ProviderError, "before it was complete"),
    (stream(HALF, then="reset"), ProviderError, "broke its answer off"),
    (stream(b"data: [DONE]\n\n"), ProviderError, "without a choice"),
    (stream(HALF, b"data: nonsense\n\n"), ProviderError, "no answer of OpenAI's form"),
    (stream(HALF, sse({"error": {"message": "GPU fell over", "code": 503}})), ProviderUnavailable, "GPU fell over"),
    (stream(HALF, sse({"error": {"message": "moderated", "code": "400"}})), InvalidRequestError, "moderated"),
    (stream(HALF, sse({"error": "plain words"})), ProviderError, "plain words"),
    (stream(HALF, sse(chunk({}, finish="abort"))), ProviderError, "ended the answer with 'abort'"),
]  # fmt: skip


@pytest.mark.parametrize(("play", "kind", "words"), MISBEHAVING, ids=[words for _, _, words in MISBEHAVING])
async def test_what_a_server_does_wrong_is_an_error_and_never_an_answer(
    play: Callable[[Wire, Asked], Awaitable[None]], kind: type[LLMError], words: str
) -> None:
    async with raw_server(play) as server, provider_at(server.url) as one:
        with pytest.raises(kind) as caught:
            await ask(one, asking(stream=True))
        assert words in caught.value.message
        assert KEY not in caught.value.message
        assert one.metrics()["num_running"] == 0
        told = "" if isinstance(caught.value, InvalidRequestError) else caught.value.message
        assert one.status().message == told
    assert server.num_open == 0


@pytest.mark.parametrize("streams", [True, False])
async def test_a_server_that_overlooks_n_is_found_out(streams: bool) -> None:
    async with openai_upstream() as upstream, provider_at(upstream.url) as one:
        with pytest.raises(ProviderError, match="1 of 2 choices missing"):
            await ask(one, asking(n=2, stream=streams))


async def test_a_hundred_megabytes_of_stream_are_cut_off() -> None:
    async def play(wire: Wire, asked: Asked) -> None:
        await wire.begin_stream()
        await wire.piece(b"data: ")
        while True:
            await wire.piece(b"x" * 2**20)

    async with raw_server(play) as server, provider_at(server.url) as one:
        with pytest.raises(ProviderError, match="an event larger than"):
            await ask(one, asking(stream=True))
        await server.until(lambda seen: seen.num_open == 0)


async def test_an_error_after_the_first_piece_comes_after_the_first_piece() -> None:
    async with raw_server(stream(HALF, then="reset")) as server, provider_at(server.url) as one:
        seen: list[Event] = []
        with pytest.raises(ProviderError, match="broke its answer off"):
            async for event in one.stream(asking(stream=True)):
                seen.append(event)  # noqa: PERF401
        assert seen[1:] == [TextDelta("half")]


async def test_slow_headers_meet_the_requests_own_deadline_and_free_the_connection() -> None:
    async def play(wire: Wire, asked: Asked) -> None:
        await wire.until_gone()

    async with raw_server(play) as server:
        cloud = CloudSettings(endpoint=server.url, api_key=KEY)
        async with LLMInterface(Settings(provider="cloud", clouds={"mine": cloud}, default_model="mine/m")) as llm:
            with pytest.raises(LLMError, match="timeout of 0.05 s"):
                await llm.chat_completion([{"role": "user", "content": "x"}], timeout=0.05)
            await server.until(lambda seen: len(seen.asked) == 1 and seen.num_open == 0)


@pytest.mark.parametrize("play", [stream(HALF, then="silence"), stream(then="silence")])
async def test_cancelling_a_request_closes_it_upstream(play: Callable[[Wire, Asked], Awaitable[None]]) -> None:
    async with raw_server(play) as server, provider_at(server.url) as one:
        task = asyncio.create_task(ask(one, asking(stream=True)))
        await server.until(lambda seen: len(seen.asked) == 1)
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.until(lambda seen: seen.num_open == 0)
        assert one.metrics()["num_running"] == one.metrics()["num_connections"] == 0


# Models, embeddings, endpoints, life


async def test_embeddings_come_back_in_order_and_exact() -> None:
    async with openai_upstream() as upstream, provider_at(upstream.url, OPENAI) as one:
        response = await one.embed(EmbeddingRequest(inputs=["a", "b"], dimensions=4, request_id="r"))
        ids = await one.embed(EmbeddingRequest(inputs=[[1, 2, 3]], model="e"))
    assert [list(one) for one in response.vectors] == [vector("a", 4), vector("b", 4)]
    assert (response.model, response.usage.prompt_tokens, len(ids.vectors)) == ("e-1", 3, 1)
    assert isinstance(response.vectors[0], array)
    assert upstream.bodies[0] == {"model": "m-1", "input": ["a", "b"], "encoding_format": "base64", "dimensions": 4}
    assert upstream.complaints == []


@pytest.mark.parametrize(
    "answer",
    [
        {"data": [{"index": 0, "embedding": [0.5]}]},
        {"data": [{"index": 0, "embedding": [0.5]}, {"index": 0, "embedding": [0.5]}]},
        {"data": [{"index": 0, "embedding": "AAA="}, {"index": 1, "embedding": "!"}]},
        {"data": "x"},
    ],
)
async def test_embeddings_that_do_not_fit_the_inputs_are_an_error(answer: Json) -> None:
    async with raw_server(reply(answer)) as server, provider_at(server.url) as one:
        with pytest.raises(ProviderError, match="for 2 inputs|no embeddings of OpenAI's form"):
            await one.embed(EmbeddingRequest(inputs=["a", "b"]))


async def test_models_are_discovered_and_a_servers_only_model_is_its_default() -> None:
    async with openai_upstream() as upstream, provider_at(upstream.url, model=None) as one:
        assert [(info.id, info.created) for info in await one.models()] == [("m-1", 5), ("m-2", 5)]
        with pytest.raises(InvalidRequestError, match="has no default; name a model: m-1, m-2"):
            await ask(one)
        upstream.models = ["only"]
        assert (await ask(one)).content == "Hello, world"
        assert upstream.bodies[-1]["model"] == "only"
        await ask(one, asking(model="other"))
        assert upstream.bodies[-1]["model"] == "other"


@pytest.mark.parametrize(
    ("address", "flavour", "base_url", "deployment"),
    [
        ("https://api.openai.com/v1", OPENAI, "https://api.openai.com/v1", None),
        ("https://eu.api.openai.com", OPENAI, "https://eu.api.openai.com/v1", None),
        ("http://127.0.0.1:8000", COMPATIBLE, "http://127.0.0.1:8000/v1", None),
        ("https://openrouter.ai/api/v1", COMPATIBLE, "https://openrouter.ai/api/v1", None),
        ("https://evil-api.openai.com.test/v1", COMPATIBLE, "https://evil-api.openai.com.test/v1", None),
        ("https://x.openai.azure.com", AZURE, "https://x.openai.azure.com/openai/v1", None),
        ("https://x.openai.azure.com/openai/v1?api-version=preview", AZURE,
         "https://x.openai.azure.com/openai/v1?api-version=preview", None),
        ("https://x.openai.azure.com/openai/deployments/gpt/chat/completions?api-version=2024-10-21", AZURE,
         "https://x.openai.azure.com/openai/deployments/gpt?api-version=2024-10-21", "gpt"),
    ],
)  # fmt: skip
def test_the_form_of_an_address_tells_who_is_there(
    address: str, flavour: Flavour, base_url: str, deployment: str | None
) -> None:
    endpoint = endpoint_at(address, KEY)
    assert (endpoint.flavour, endpoint.base_url, endpoint.deployment) == (flavour, base_url, deployment)
    assert KEY not in repr(endpoint)


async def test_an_azure_deployment_is_asked_at_its_own_path_with_its_version() -> None:
    with pytest.raises(ConfigurationError, match="expected \\?api-version="):
        endpoint_at("https://x.openai.azure.com/openai/deployments/gpt", KEY)

    async def play(wire: Wire, asked: Asked) -> None:
        await wire.reply(json.dumps(whole({"content": "x"})).encode(), content_type="application/json")

    async with raw_server(play) as server:
        url = f"{server.url}/openai/deployments/gpt?api-version=7"
        endpoint = Endpoint(base_url=url, flavour=AZURE, api_key=KEY, deployment="gpt")
        one = OpenAIProvider(Settings(), name="openai", endpoint=endpoint)
        await one.start()
        await ask(one)
        assert [info.id for info in await one.models()] == ["gpt"]
        assert one.status().details["endpoint"] == f"{server.url}/openai/deployments/gpt"
        await one.close()
    asked = server.asked[0]
    assert asked.path == "/openai/deployments/gpt/chat/completions?api-version=7"
    assert (asked.headers["api-key"], "authorization" in asked.headers) == (KEY, False)


async def test_status_tells_state_failures_and_what_is_left_of_the_limits() -> None:
    headers = {"x_ratelimit_remaining_requests": "99", "x_ratelimit_limit_requests": "100",
               "x_ratelimit_reset_requests": "6m0s", "x_ratelimit_remaining_tokens": "5000"}  # fmt: skip
    async with openai_upstream(headers=headers) as upstream:
        async with provider_at(upstream.url) as one:
            await ask(one)
            status = one.status()
            assert (status.state, status.message) == ("ready", "")
            assert status.details == {
                "endpoint": upstream.url, "model": "m-1", "remaining_requests": 99, "remaining_tokens": 5000
            }  # fmt: skip
        assert one.status().state == "stopped"
        with pytest.raises(ProviderUnavailable, match="not started"):
            await ask(one)
        assert KEY not in repr(one) + str(status)
    with pytest.raises(ConfigurationError, match="needs a key: set OPENAI_API_KEY"):
        await OpenAIProvider(Settings(), name="openai", endpoint=endpoint_at("https://api.openai.com", None)).start()


async def test_a_named_cloud_is_asked_by_its_name() -> None:
    async with openai_upstream() as upstream:
        clouds = {"mine": CloudSettings(endpoint=upstream.url, api_key=KEY)}
        async with LLMInterface(Settings(provider="cloud", clouds=clouds)) as llm:
            answer = await llm.chat_completion([{"role": "user", "content": "x"}], model="mine/org/model")
            assert (answer.provider, answer.content) == ("mine", "Hello, world")
            assert upstream.bodies[-1]["model"] == "org/model"
            assert llm.default_provider == "mine"
            assert len((await llm.embed("a", model="mine/e")).vectors) == 1
            vectors = (await llm.embed(["a", "b"], model="e")).vectors
            assert len(vectors) == 2
