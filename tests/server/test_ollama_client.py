"""The official ollama package, pointed at the server, works as it does with Ollama."""

from __future__ import annotations

import asyncio
import base64
import json
from datetime import datetime

import ollama
import pytest
from server_harness import QUESTION, Reply, Server, running_server

from autobot_llm.errors import ProviderError
from autobot_llm.types import (
    ChoiceEnd,
    Finish,
    ReasoningDelta,
    TextDelta,
    Timings,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)

PIECES = ["Because ", "of ", "Rayleigh\u2028scattering: blau \x85 蓝 🟦", "."]
ANSWER = "".join(PIECES)
PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


def client(server: Server) -> ollama.AsyncClient:
    return ollama.AsyncClient(host=server.url)


def lines(reply: Reply) -> list[dict[str, object]]:
    return [json.loads(line) for line in reply.body.decode().split("\n") if line]


async def test_a_chat_has_the_answer_its_counts_and_its_times() -> None:
    async with running_server(PIECES) as server, client(server) as asked:
        answer = await asked.chat(model="tiny", messages=QUESTION)
    assert (answer.message.role, answer.message.content) == ("assistant", ANSWER)
    assert (answer.model, answer.done, answer.done_reason) == ("tiny", True, "stop")
    assert (answer.prompt_eval_count, answer.eval_count) == (5, len(PIECES))
    assert answer.total_duration > 0
    assert datetime.fromisoformat(answer.created_at).tzinfo is not None


async def test_a_streamed_chat_gives_the_same_text_in_the_same_pieces() -> None:
    async with running_server(PIECES) as server, client(server) as asked:
        received = [part async for part in await asked.chat(model="tiny", messages=QUESTION, stream=True)]
    *pieces, last = received
    assert [part.message.content for part in pieces] == PIECES
    assert not any(part.done for part in pieces)
    assert (last.done, last.done_reason, last.message.content, last.eval_count) == (True, "stop", "", len(PIECES))


async def test_an_answer_is_a_stream_unless_it_is_asked_whole() -> None:
    async with running_server(PIECES) as server:
        for path, fields in (("/api/chat", {"messages": QUESTION}), ("/api/generate", {"prompt": "Why?"})):
            streamed = await server.post(path, {"model": "tiny", **fields})
            whole = await server.post(path, {"model": "tiny", "stream": False, **fields})
            assert streamed.headers["content-type"] == "application/x-ndjson"
            assert len(lines(streamed)) == len(PIECES) + 1
            assert whole.json["done"] is True
    assert [request.stream for request in server.provider.requests] == [True, False] * 2


async def test_a_prompt_is_generated_from_whole_and_streamed() -> None:
    async with running_server(PIECES) as server, client(server) as asked:
        whole = await asked.generate(model="tiny", prompt="Why?", system="Be brief.")
        streamed = [part async for part in await asked.generate(model="tiny", prompt="Why?", raw=True, stream=True)]
    assert (whole.response, whole.done_reason) == (ANSWER, "stop")
    assert "".join(part.response for part in streamed) == ANSWER
    first, second = server.provider.requests
    assert first.messages is not None
    assert [(turn.role, turn.content) for turn in first.messages] == [("system", "Be brief."), ("user", "Why?")]
    assert (second.prompt, second.messages) == ("Why?", None)


async def test_the_synchronous_client_works_too() -> None:
    def ask(url: str) -> str:
        with ollama.Client(host=url) as asked:
            return "".join(part.message.content for part in asked.chat("tiny", QUESTION, stream=True))

    async with running_server(PIECES) as server:
        assert await asyncio.to_thread(ask, server.url) == ANSWER


CALLS = [
    TextDelta("Let me look. "),
    ToolCallDelta(position=0, call_id="call_1", name="weather", arguments='{"city":'),
    ToolCallDelta(position=0, arguments='"Riga"}'),
    ToolCallDelta(position=1, call_id="call_2", name="time"),
    ChoiceEnd(finish_reason="tool_calls"),
]


def weather(city: str) -> str:
    """The weather of a city.

    Args:
      city: its name
    """
    return f"rain in {city}"


async def test_calls_arrive_whole_with_their_arguments_as_objects() -> None:
    async with running_server(CALLS) as server, client(server) as asked:
        whole = await asked.chat("tiny", QUESTION, tools=[weather])
        parts = [part async for part in await asked.chat("tiny", QUESTION, tools=[weather], stream=True)]
    for calls in (whole.message.tool_calls, [call for part in parts for call in part.message.tool_calls or ()]):
        assert [(call.function.name, call.function.arguments) for call in calls] == [
            ("weather", {"city": "Riga"}),
            ("time", {}),
        ]
    assert whole.message.content == "Let me look. "
    assert (whole.done_reason, parts[-1].done_reason) == ("stop", "stop")
    tool = server.provider.requests[0].tools[0]
    assert (tool["type"], tool["function"]["name"]) == ("function", "weather")
    assert tool["function"]["parameters"]["required"] == ["city"]


async def test_the_results_of_calls_given_back_find_their_calls() -> None:
    async with running_server(CALLS) as server, client(server) as asked:
        first = await asked.chat("tiny", QUESTION, tools=[weather])
        results = [
            {"role": "tool", "content": "noon", "tool_name": "time"},
            {"role": "tool", "content": "rain", "tool_name": "weather"},
        ]
        await asked.chat("tiny", [*QUESTION, first.message, *results], tools=[weather])
    history = server.provider.requests[1].messages
    assert [call["function"]["arguments"] for call in history[1].tool_calls] == ['{"city":"Riga"}', "{}"]
    first_id, second_id = (call["id"] for call in history[1].tool_calls)
    assert [(turn.content, turn.tool_call_id) for turn in history[2:]] == [("noon", second_id), ("rain", first_id)]


async def test_a_call_that_is_cut_off_is_left_out_and_one_that_is_no_object_is_an_error() -> None:
    broken = ToolCallDelta(position=0, call_id="c", name="weather", arguments='{"city":')
    for reason, status in (("length", 200), ("tool_calls", 502)):
        async with running_server([broken, ChoiceEnd(finish_reason=reason)]) as server:
            for stream in (False, True):
                reply = await server.post("/api/chat", {"model": "tiny", "messages": QUESTION, "stream": stream})
                assert reply.status == status
                answer = lines(reply)[-1]
                assert answer.get("done_reason") == ("length" if status == 200 else None)
                assert ("no JSON object" in answer.get("error", "")) is (status == 502)


async def test_thoughts_are_kept_apart_from_the_answer() -> None:
    script = [ReasoningDelta("Blue is "), ReasoningDelta("short."), TextDelta("Scattering.")]
    async with running_server(script) as server, client(server) as asked:
        whole = await asked.chat("tiny", QUESTION, think=True)
        parts = [part async for part in await asked.chat("tiny", QUESTION, think="high", stream=True)]
        generated = await asked.generate("tiny", "Why?", think=False)
    assert (whole.message.thinking, whole.message.content) == ("Blue is short.", "Scattering.")
    assert "".join(part.message.thinking or "" for part in parts) == "Blue is short."
    assert (generated.thinking, generated.response) == ("Blue is short.", "Scattering.")
    efforts = [request.extra_body["reasoning_effort"] for request in server.provider.requests]
    assert efforts == ["medium", "high", "none"]


async def test_images_and_formats_become_content_parts_and_response_formats() -> None:
    schema = {"type": "object", "properties": {"colour": {"type": "string"}}}
    async with running_server() as server, client(server) as asked:
        await asked.chat("tiny", [{"role": "user", "content": "What?", "images": [PNG]}], format="json")
        await asked.generate("tiny", "What?", images=[PNG], format=schema)
    url = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    first, second = server.provider.requests
    assert first.messages[0].content == second.messages[0].content == parts
    assert first.response_format == {"type": "json_object"}
    assert second.response_format["json_schema"]["schema"] == schema


async def test_every_option_reaches_the_provider_under_our_name() -> None:
    options = ollama.Options(
        temperature=0.5, top_k=40, top_p=0.9, seed=7, stop=["END"], num_predict=9, repeat_penalty=1.1,
        presence_penalty=0.25, frequency_penalty=-0.5, num_gpu=-1, use_mlock=False,
    )  # fmt: skip
    options = {**options.model_dump(), "min_p": 0.1}  # which the package's class does not have
    async with running_server() as server, client(server) as asked:
        await asked.chat("tiny", QUESTION, options=options, keep_alive="1h")
    request = server.provider.requests[0]
    assert (request.temperature, request.top_k, request.top_p, request.min_p) == (0.5, 40, 0.9, 0.1)
    assert (request.seed, request.stop, request.max_tokens, request.repetition_penalty) == (7, ["END"], 9, 1.1)
    assert (request.presence_penalty, request.frequency_penalty) == (0.25, -0.5)
    assert request.extra_body == {}


async def test_what_only_an_ollama_could_honour_is_refused_where_another_provider_answers() -> None:
    async with running_server() as server:
        for options, param in (({"repeat_last_n": 64}, "repeat_last_n"), ({"num_gpu": 1}, "num_gpu"), ({"x": 1}, "x")):
            reply = await server.post("/api/chat", {"model": "tiny", "messages": QUESTION, "options": options})
            assert reply.status == 400
            assert f"options.{param}" in reply.json["error"]
        for fields in ({"keep_alive": 0}, {"keep_alive": "0s"}):
            reply = await server.post("/api/chat", {"model": "tiny", "messages": QUESTION, **fields})
            assert (reply.status, "keeps its models in memory" in reply.json["error"]) == (400, True)
        fields = {"keep_alive": "5m", "truncate": True, "shift": False, "options": {"num_ctx": 10**6}}
        reply = await server.post("/api/chat", {"model": "tiny", "messages": QUESTION, **fields})
        assert reply.status == 200, "these change nothing here"
    assert [request.extra_body for request in server.provider.requests] == [{}]


async def test_log_probabilities_come_with_their_pieces() -> None:
    script = [TextDelta("blue", logprobs=(TokenLogprob(7, "blue", -0.25, ((7, "blue", -0.25), (8, "red", -1.5))),))]
    async with running_server(script) as server, client(server) as asked:
        whole = await asked.chat("tiny", QUESTION, logprobs=True, top_logprobs=2)
        parts = [part async for part in await asked.generate("tiny", "x", logprobs=True, top_logprobs=2, stream=True)]
    assert [(token.token, token.logprob) for token in whole.logprobs] == [("blue", -0.25)]
    assert [other.token for other in whole.logprobs[0].top_logprobs] == ["blue", "red"]
    assert parts[0].logprobs == whole.logprobs
    assert {request.logprobs for request in server.provider.requests} == {2}


async def test_a_providers_own_times_are_told_in_nanoseconds() -> None:
    timings = Timings(time_to_first_token=0.5, total=2.0, load=0.25, prefill=0.125, decode=1.5)
    finish = Finish(usage=Usage(prompt_tokens=100, completion_tokens=1, cached_tokens=96), timings=timings)
    async with running_server(["ok", ChoiceEnd(finish_reason="length"), finish]) as server, client(server) as asked:
        answer = await asked.generate("tiny", "x")
        reply = await server.post("/api/generate", {"model": "tiny", "prompt": "x"})
    assert (answer.total_duration, answer.load_duration) == (2_000_000_000, 250_000_000)
    assert (answer.prompt_eval_duration, answer.eval_duration) == (125_000_000, 1_500_000_000)
    assert answer.done_reason == "length"
    last = lines(reply)[-1]
    assert (last["prompt_eval_count"], last["prompt_eval_cached_count"]) == (100, 96)
    assert "optimizations" in last["autobot"]


async def test_models_are_listed_shown_and_versioned() -> None:
    async with running_server() as server, client(server) as asked:
        listed = await asked.list()
        shown = await asked.show("other")
        running = await asked.ps()
        version = (await server.get("/api/version")).json["version"]
        with pytest.raises(ollama.ResponseError, match="'nothing' not found; there are tiny, other") as refusal:
            await asked.show("nothing")
    assert [model.model for model in listed.models] == ["tiny", "other"]
    assert shown.modelinfo == {"general.architecture": "native"}
    assert shown.capabilities == ["completion"]
    assert running.models == []
    assert [int(part) for part in version.split(".")] >= [0, 12, 0]
    assert refusal.value.status_code == 404


async def test_an_empty_request_only_has_the_model_loaded() -> None:
    async with running_server() as server, client(server) as asked:
        generated = await asked.generate("tiny")
        chatted = await asked.chat("tiny:latest", keep_alive=-1)
        assert (generated.done, generated.done_reason, generated.response) == (True, "load", "")
        assert (chatted.done, chatted.done_reason, chatted.message.content) == (True, "load", "")
        with pytest.raises(ollama.ResponseError, match="keeps its models in memory"):
            await asked.generate("tiny", keep_alive=0)
        with pytest.raises(ollama.ResponseError, match="'nothing' is not served here"):
            await asked.chat("nothing")
    assert server.provider.requests == []


async def test_the_default_tag_is_the_model_itself() -> None:
    async with running_server() as server, client(server) as asked:
        assert (await asked.chat("tiny:latest", QUESTION)).model == "tiny"
        assert (await asked.show("tiny:latest")).modelinfo


async def test_an_error_before_the_answer_has_its_status_and_one_after_it_is_the_last_line() -> None:
    script = ["half ", ProviderError("the graphics card caught fire")]
    async with running_server(script) as server, client(server) as asked:
        with pytest.raises(ollama.ResponseError, match="not served here") as missing:
            await asked.chat("nothing", QUESTION)
        received = []
        with pytest.raises(ollama.ResponseError, match="caught fire"):
            async for part in await asked.chat("tiny", QUESTION, stream=True):
                received += [part.message.content]
        with pytest.raises(ollama.ResponseError, match="caught fire") as failed:
            await asked.chat("tiny", QUESTION)
    assert (missing.value.status_code, failed.value.status_code) == (404, 502)
    assert received == ["half "]


async def test_unknown_paths_wrong_methods_and_missing_keys_are_told_in_ollamas_shape() -> None:
    async with running_server(api_keys=("secret",)) as server:
        keyless = await server.post("/api/chat", {"model": "tiny", "messages": QUESTION})
        key = {"authorization": "Bearer secret"}
        lost = await server.get("/api/nowhere", **key)
        wrong = await server.get("/api/chat", **key)
        right = await server.post("/api/chat", {"model": "tiny", "messages": QUESTION}, **key)
    for reply, status in ((keyless, 401), (lost, 404), (wrong, 405)):
        assert reply.status == status
        assert list(reply.json) == ["error"]
    assert right.status == 200


async def test_half_a_surrogate_pair_from_a_model_does_not_break_the_answer() -> None:
    async with running_server(["a\ud83d", "b"]) as server:
        whole = await server.post("/api/generate", {"model": "tiny", "prompt": "x", "stream": False})
        streamed = await server.post("/api/chat", {"model": "tiny", "messages": QUESTION})
    assert whole.json["response"] == "a?b"
    assert lines(streamed)[0]["message"]["content"] == "a?"
