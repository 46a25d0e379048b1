"""A chunk is one line of valid JSON whatever the text, and several prompts merge into one well-formed stream."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobot_llm.collect import collect
from autobot_llm.dialects.openai.chunks import ChatChunks, CompletionChunks, error_event
from autobot_llm.dialects.openai.replies import ChatReply
from autobot_llm.errors import EngineError, ProviderError
from autobot_llm.report import OptimizationOutcome
from autobot_llm.server.merge import merge_streams
from autobot_llm.types import (
    ChoiceEnd,
    Event,
    Finish,
    LLMResponse,
    ReasoningDelta,
    RefusalDelta,
    Start,
    TextDelta,
    Timings,
    ToolCallDelta,
    Usage,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
START = Start(request_id="r", model='a "model"', provider="p")
FINISH = Finish(usage=Usage(prompt_tokens=1, completion_tokens=2))


def whole_body(answer: LLMResponse) -> bytes:
    reply = ChatReply("r", 1)
    return reply.body(reply.lasting(answer), answer)


@given(TEXT.filter(bool), st.booleans())
def test_any_text_makes_one_line_of_json_that_says_the_same(text: str, include_usage: bool) -> None:
    chat, completion = (kind("r", 1, 1, include_usage) for kind in (ChatChunks, CompletionChunks))
    for encoder, path in ((chat, ("delta", "content")), (completion, ("text",))):
        encoder.encode(START)
        line, *rest = encoder.encode(TextDelta(text)).decode().splitlines()
        assert rest == [""]
        value = json.loads(line.removeprefix("data: "))["choices"][0]
        for key in path:
            value = value[key]
        assert value == text


@given(TEXT)
def test_tool_arguments_and_error_messages_stay_on_one_line(text: str) -> None:
    chat = ChatChunks("r", 1, 1, False)
    chat.encode(START)
    call = chat.encode(ToolCallDelta(position=0, arguments=text)).decode().splitlines()
    error = error_event(EngineError(text)).decode().splitlines()
    assert (len(call), len(error)) == (2, 2)
    delta = json.loads(call[0].removeprefix("data: "))["choices"][0]["delta"]
    assert delta["tool_calls"][0]["function"]["arguments"] == text
    assert json.loads(error[0].removeprefix("data: "))["error"]["message"] == text


async def play(*events: Event | Exception) -> AsyncGenerator[Event, None]:
    for event in events:
        if isinstance(event, Exception):
            raise event
        yield event


def outcome(tokens_saved: int | None) -> OptimizationOutcome:
    return OptimizationOutcome(name="prefix_cache", applied=True, reason="hit", tokens_saved=tokens_saved)


async def test_merged_streams_have_one_start_and_one_finish_with_the_sums() -> None:
    streams = [
        play(
            START,
            TextDelta(text),
            ChoiceEnd(finish_reason="stop"),
            Finish(
                usage=Usage(prompt_tokens=2, completion_tokens=3, cached_tokens=1),
                timings=Timings(queued=queued),
                optimizations=(outcome(5),),
            ),
        )
        for text, queued in (("a", 0.5), ("b", None))
    ]
    events = [event async for event in merge_streams(streams, 1)]
    finish = events[-1]
    assert isinstance(finish, Finish)
    assert [type(event) for event in events].count(Start) == 1
    assert {event.index: event.text for event in events if isinstance(event, TextDelta)} == {0: "a", 1: "b"}
    assert sorted(event.index for event in events if isinstance(event, ChoiceEnd)) == [0, 1]
    assert finish.usage == Usage(prompt_tokens=4, completion_tokens=6, cached_tokens=2)
    assert finish.timings == Timings(queued=0.5)
    assert finish.optimizations == (outcome(10),)


async def test_a_merged_stream_without_its_finish_is_an_error_and_not_a_wait() -> None:
    with pytest.raises(ProviderError, match="without its finish"):
        _ = [event async for event in merge_streams([play(START, FINISH), play(START, TextDelta("x"))], 1)]


EVERY_KIND: tuple[Event, ...] = (
    START,
    ReasoningDelta("Hm"),
    ReasoningDelta(", so.", signature="proof"),
    TextDelta("Yes"),
    RefusalDelta("but no"),
    ChoiceEnd(finish_reason="stop", stop_sequence="END"),
    Finish(usage=Usage(prompt_tokens=1, completion_tokens=9, cached_tokens=1, reasoning_tokens=4)),
)


async def test_reasoning_refusals_and_the_stop_string_reach_a_streaming_client() -> None:
    encoder = ChatChunks("r", 1, 1, include_usage=True)
    text = b"".join(encoder.encode(event) for event in EVERY_KIND).decode()
    chunks = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta] == ["Hm", ", so."]
    assert [delta["refusal"] for delta in deltas if delta.get("refusal")] == ["but no"]
    assert chunks[-2]["choices"][0]["stop_reason"] == "END"
    assert chunks[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}


async def test_reasoning_refusals_and_the_stop_string_are_part_of_the_whole_answer() -> None:
    answer = await collect(play(*EVERY_KIND))
    choice = answer.choices[0]
    assert (answer.content, answer.reasoning) == ("Yes", "Hm, so.")
    assert (choice.reasoning_signature, choice.refusal, choice.stop_sequence) == ("proof", "but no", "END")
    body = json.loads(whole_body(answer))
    message = body["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"], message["refusal"]) == ("Yes", "Hm, so.", "but no")
    assert body["choices"][0]["stop_reason"] == "END"
