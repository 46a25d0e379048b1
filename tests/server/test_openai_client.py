"""The official openai package, pointed at the server, works as it does with OpenAI."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise

import openai
import pytest
from server_harness import QUESTION, running_server, sse_events

from autobot_llm.providers.scripted import Script
from autobot_llm.report import OptimizationOutcome
from autobot_llm.types import (
    ChoiceEnd,
    Finish,
    LLMRequest,
    TextDelta,
    Timings,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)

PIECES = ["Because ", "of ", "Rayleigh ", "scattering: blau 蓝 🟦", "."]
ANSWER = "".join(PIECES)


async def test_a_chat_completion_has_the_answer_its_usage_and_its_identity() -> None:
    async with running_server(PIECES) as server, server.client() as client:
        completion = await client.chat.completions.create(model="tiny", messages=QUESTION)
    assert completion.choices[0].message.content == ANSWER
    assert completion.choices[0].message.role == "assistant"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.model == "tiny"
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (5, len(PIECES))
    assert completion.usage.total_tokens == 5 + len(PIECES)
    assert completion.id == f"chatcmpl-{server.provider.requests[0].request_id}"


async def test_a_streamed_chat_gives_the_same_text_in_the_same_pieces() -> None:
    async with running_server(PIECES) as server, server.client() as client:
        stream = await client.chat.completions.create(model="tiny", messages=QUESTION, stream=True)
        received = [chunk async for chunk in stream]
    assert received[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content for chunk in received if chunk.choices[0].delta.content]
    assert pieces == PIECES
    assert [chunk.choices[0].finish_reason for chunk in received if chunk.choices[0].finish_reason] == ["stop"]
    assert all(chunk.usage is None for chunk in received)
    assert len({chunk.id for chunk in received}) == 1


async def test_a_stream_ends_with_its_usage_where_that_is_asked_for() -> None:
    body = {"messages": QUESTION, "stream": True, "stream_options": {"include_usage": True}}
    async with running_server(PIECES) as server:
        reply = await server.post("/v1/chat/completions", body)
    *others, last, done = sse_events(reply.body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(PIECES)
    assert all(chunk["usage"] is None for chunk in others)


async def test_the_synchronous_client_works_too() -> None:
    def ask(url: str) -> str:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            stream = client.chat.completions.create(model="tiny", messages=QUESTION, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    async with running_server(PIECES) as server:
        assert await asyncio.to_thread(ask, server.url) == ANSWER


async def test_models_are_listed_and_shown_by_name() -> None:
    async with running_server() as server, server.client() as client:
        assert [model.id async for model in await client.models.list()] == ["tiny", "other"]
        shown = await client.models.retrieve("other")
        assert (shown.id, shown.object, shown.owned_by) == ("other", "model", "native")
        with pytest.raises(openai.NotFoundError, match="tiny"):
            await client.models.retrieve("no/such model")


async def test_a_text_completion_answers_a_text_or_token_ids() -> None:
    async with running_server(PIECES) as server, server.client() as client:
        for prompt in ("Once upon", [1, 5, 9], [[1, 5, 9]], ["Once upon"]):
            completion = await client.completions.create(model="tiny", prompt=prompt)
            assert completion.choices[0].text == ANSWER
    assert [request.prompt for request in server.provider.requests] == ["Once upon", [1, 5, 9], [1, 5, 9], "Once upon"]
    assert {request.max_tokens for request in server.provider.requests} == {16}  # as OpenAI's endpoint has it


def echo(request: LLMRequest) -> Script:
    return [TextDelta(f"{request.prompt}/{index}", index) for index in range(request.n)]


async def test_several_prompts_with_several_choices_each_come_back_in_order() -> None:
    async with running_server(echo) as server, server.client() as client:
        completion = await client.completions.create(model="tiny", prompt=["a", "b", "c"], n=2)
    texts = ["a/0", "a/1", "b/0", "b/1", "c/0", "c/1"]
    assert [choice.text for choice in completion.choices] == texts
    assert [choice.index for choice in completion.choices] == list(range(6))
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (3, 6)
    assert len({request.request_id for request in server.provider.requests}) == 3


async def test_several_prompts_stream_together_each_under_its_own_index() -> None:
    async with running_server(echo) as server, server.client() as client:
        stream = await client.completions.create(model="tiny", prompt=["a", "b"], n=2, stream=True)
        texts = dict.fromkeys(range(4), "")
        reasons = {}
        async for chunk in stream:
            choice = chunk.choices[0]
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == {0: "a/0", 1: "a/1", 2: "b/0", 3: "b/1"}
    assert reasons == dict.fromkeys(range(4), "stop")


async def test_the_choices_of_a_streamed_chat_interleave_by_index() -> None:
    script = [TextDelta(text, index) for text in ("x", "y", "z") for index in (0, 1)]
    async with (
        running_server([*script, ChoiceEnd(finish_reason="length", index=1)]) as server,
        server.client() as client,
    ):
        stream = await client.chat.completions.create(model="tiny", messages=QUESTION, n=2, stream=True)
        received = [chunk.choices[0] async for chunk in stream]
    roles = [choice.index for choice in received if choice.delta.role]
    texts = [(choice.index, choice.delta.content) for choice in received if choice.delta.content]
    reasons = {choice.index: choice.finish_reason for choice in received if choice.finish_reason}
    assert roles == [0, 1]
    assert texts == [(0, "x"), (1, "x"), (0, "y"), (1, "y"), (0, "z"), (1, "z")]
    assert reasons == {0: "stop", 1: "length"}


LOGPROBS = [
    TextDelta("blue", logprobs=(TokenLogprob(7, "bl", -0.25, ((7, "bl", -0.25), (8, "re", -1.5))),)),
    TextDelta("", logprobs=(TokenLogprob(9, "ue", float("-inf"), ((9, "ue", float("-inf")),)),)),
]


async def test_chat_logprobs_have_openais_shape() -> None:
    async with running_server(LOGPROBS) as server, server.client() as client:
        whole = await client.chat.completions.create(model="tiny", messages=QUESTION, logprobs=True, top_logprobs=2)
        stream = await client.chat.completions.create(
            model="tiny", messages=QUESTION, logprobs=True, top_logprobs=2, stream=True
        )
        streamed = [token async for chunk in stream for token in (chunk.choices[0].logprobs or NO_LOGPROBS).content]
    tokens = whole.choices[0].logprobs.content
    assert [(token.token, token.logprob, bytes(token.bytes)) for token in tokens] == [
        ("bl", -0.25, b"bl"),
        ("ue", -9999.0, b"ue"),
    ]
    assert [(best.token, best.logprob) for best in tokens[0].top_logprobs] == [("bl", -0.25), ("re", -1.5)]
    assert streamed == tokens
    assert {request.logprobs for request in server.provider.requests} == {2}


class NO_LOGPROBS:  # noqa: N801  stands in for the null of chunks without tokens
    content: tuple[()] = ()


async def test_completion_logprobs_come_in_columns_with_running_offsets() -> None:
    async with running_server(LOGPROBS) as server, server.client() as client:
        whole = await client.completions.create(model="tiny", prompt="The sky is", logprobs=2)
        stream = await client.completions.create(model="tiny", prompt="The sky is", logprobs=2, stream=True)
        streamed = [chunk.choices[0].logprobs async for chunk in stream if chunk.choices[0].logprobs]
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset) == (["bl", "ue"], [-0.25, -9999.0], [0, 2])
    assert logprobs.top_logprobs == [{"bl": -0.25, "re": -1.5}, {"ue": -9999.0}]
    assert [offset for part in streamed for offset in part.text_offset or ()] == [0, 2]


TOOL_CALL = [
    ToolCallDelta(position=0, call_id="call_1", name="weather", arguments='{"city":'),
    ToolCallDelta(position=0, arguments='"Riga"}'),
    ChoiceEnd(finish_reason="tool_calls"),
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


async def test_a_tool_call_arrives_whole_and_streamed() -> None:
    async with running_server(TOOL_CALL) as server, server.client() as client:
        whole = await client.chat.completions.create(model="tiny", messages=QUESTION, tools=TOOLS)
        async with client.chat.completions.stream(model="tiny", messages=QUESTION, tools=TOOLS) as stream:
            streamed = await stream.get_final_completion()
    for completion in (whole, streamed):
        choice = completion.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls is not None
        call = choice.message.tool_calls[0]
        assert call.type == "function"
        assert (call.id, call.function.name, call.function.arguments) == ("call_1", "weather", '{"city":"Riga"}')
    assert whole.choices[0].message.content is None
    assert server.provider.requests[0].tools == TOOLS


async def test_an_answer_given_back_as_history_is_accepted() -> None:
    async with running_server(PIECES) as server, server.client() as client:
        first = await client.chat.completions.create(model="tiny", messages=QUESTION)
        history = [*QUESTION, first.choices[0].message, {"role": "user", "content": "Go on."}]
        await client.chat.completions.create(model="tiny", messages=history)
    messages = server.provider.requests[1].messages
    assert messages is not None
    assert [(turn.role, turn.content) for turn in messages][1:] == [("assistant", ANSWER), ("user", "Go on.")]


async def test_every_sampling_field_reaches_the_provider() -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "min_tokens": 2,
        "priority": -3,
        "seed": 7,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
        "stop_token_ids": [3, 4],
        "ignore_eos": True,
        "n": 1,
    }
    same = {"metadata": {"run": "1"}, "response_format": {"type": "json_object"}}
    renamed = {"max_completion_tokens": 9, "stop": "END", "logit_bias": {"5": -2}}
    async with running_server() as server:
        reply = await server.post("/v1/chat/completions", {"messages": QUESTION, **fields, **same, **renamed})
    assert reply.status == 200
    request = server.provider.requests[0]
    assert {name: getattr(request, name) for name in {**fields, **same}} == {**fields, **same}
    assert (request.max_tokens, request.stop, request.logit_bias) == (9, ["END"], {5: -2.0})
    assert request.extra_body == {}


async def test_null_means_not_given_and_bookkeeping_changes_nothing() -> None:
    nulls = dict.fromkeys(("temperature", "top_p", "n", "stop", "logit_bias", "tools", "max_tokens", "functions"))
    notes = {"user": "u", "store": True, "service_tier": "flex", "parallel_tool_calls": True, "modalities": ["text"]}
    async with running_server() as server:
        plain = await server.post("/v1/chat/completions", {"messages": QUESTION})
        noted = await server.post("/v1/chat/completions", {"messages": QUESTION, **nulls, **notes})
    assert (plain.status, noted.status) == (200, 200)
    first, second = server.provider.requests
    same = {name: getattr(first, name) for name in LLMRequest.__struct_fields__ if name != "request_id"}
    del same["service_options"]  # notes to OpenAI's own service, which are for that alone
    assert same == {name: getattr(second, name) for name in same}
    assert second.service_options == {"user": "u", "store": True, "service_tier": "flex"}


async def test_a_field_that_nobody_here_knows_goes_to_the_provider_to_decide() -> None:
    async with running_server() as server:
        await server.post("/v1/chat/completions", {"messages": QUESTION, "verbosity": "low", "guided_regex": "a+"})
        await server.post("/v1/completions", {"prompt": "a", "suffix": "z"})
    assert server.provider.requests[0].extra_body == {"verbosity": "low", "guided_regex": "a+"}
    assert server.provider.requests[1].extra_body == {"suffix": "z"}


OUTCOMES = (
    OptimizationOutcome(name="prefix_cache", applied=True, reason="96 tokens found", tokens_saved=96),
    OptimizationOutcome(name="response cache\r\nx: y", applied=True, reason="hit", milliseconds_saved=12.34),
    OptimizationOutcome(name="speculation", applied=False, reason="off"),
)
REPORTED = [
    "ok",
    ChoiceEnd(finish_reason="stop"),
    Finish(
        usage=Usage(prompt_tokens=100, completion_tokens=1, cached_tokens=96),
        timings=Timings(queued=0.25, queue_position=3),
        optimizations=OUTCOMES,
    ),
]


async def test_the_report_comes_with_the_answer_in_the_body_and_in_one_header() -> None:
    async with running_server(REPORTED) as server:
        reply = await server.post("/v1/chat/completions", {"messages": QUESTION})
    report = reply.json["autobot"]
    names = [outcome["name"] for outcome in report["optimizations"]]
    assert names == [*(outcome.name for outcome in OUTCOMES), "request_deduplication", "response_caching"]
    assert (report["timings"]["queued"], report["timings"]["queue_position"]) == (0.25, 3)
    assert reply.json["usage"]["prompt_tokens_details"] == {"cached_tokens": 96}
    header = reply.headers["x-autobot-optimizations"]
    assert header == "prefix_cache;tokens_saved=96, response_cache_x:_y;ms_saved=12.3"
    assert reply.headers["x-request-id"] == server.provider.requests[0].request_id


async def test_the_report_of_a_stream_comes_with_its_usage() -> None:
    async with running_server(REPORTED) as server, server.client() as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=QUESTION, stream=True, stream_options={"include_usage": True}
        )
        last = [chunk async for chunk in stream][-1]
    assert last.usage.prompt_tokens_details.cached_tokens == 96
    assert last.model_extra["autobot"]["optimizations"][0]["tokens_saved"] == 96


async def test_pieces_reach_the_client_as_they_are_made() -> None:
    async with running_server(["one ", "two ", "three"], delay=0.05) as server, server.client() as client:
        loop = asyncio.get_running_loop()
        stream = await client.chat.completions.create(model="tiny", messages=QUESTION, stream=True)
        arrivals = [loop.time() async for chunk in stream if chunk.choices[0].delta.content]
    assert len(arrivals) == 3
    assert all(later - earlier > 0.02 for earlier, later in pairwise(arrivals))


async def test_half_a_surrogate_pair_from_a_model_does_not_break_the_answer() -> None:
    async with running_server(["a\ud83d", "b"]) as server:
        whole = await server.post("/v1/chat/completions", {"messages": QUESTION})
        streamed = await server.post("/v1/chat/completions", {"messages": QUESTION, "stream": True})
    assert whole.json["choices"][0]["message"]["content"] == "a?b"
    assert json.dumps(sse_events(streamed.body)).count("a?") == 1
