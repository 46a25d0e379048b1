"""Ollama's answers: what is written as lines and as a body is read back as the same events, cut as you like."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobot_llm.collect import collect
from autobot_llm.dialects.ollama.answers import AnswerReader, error_of, timings_of, usage_of
from autobot_llm.dialects.ollama.lines import ChatLines, GenerateLines
from autobot_llm.dialects.ollama.replies import ChatReply, GenerateReply, Reply, error_line
from autobot_llm.errors import EngineError, InvalidRequestError, ModelNotFoundError, ProviderError
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
    TokenLogprob,
    ToolCallDelta,
    Usage,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
START = Start(request_id="r", model='a "model"\u2028', provider="p")
TIMINGS = Timings(time_to_first_token=0.5, total=2.0, load=0.25, prefill=0.125, decode=1.5)
FINISH = Finish(usage=Usage(prompt_tokens=100, completion_tokens=2, cached_tokens=96), timings=TIMINGS)
DELTAS = st.lists(
    TEXT.map(TextDelta)
    | TEXT.map(ReasoningDelta)
    | st.builds(TextDelta, TEXT, logprobs=st.just((TokenLogprob(-1, "t", -0.5, ((-1, "u", -1.5),)),))),
    max_size=8,
)
ARGUMENTS = st.dictionaries(TEXT, st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT, max_size=3)
CALLS = st.lists(st.tuples(TEXT.filter(bool), ARGUMENTS), max_size=3)
REASONS = st.sampled_from(["stop", "length", "content_filter"])


def whole(reply: Reply, answer: LLMResponse) -> bytes:
    return reply.body(reply.lasting(answer), answer)


async def answer_of(events: list[Event]) -> LLMResponse:
    async def source() -> AsyncIterator[Event]:
        for event in events:
            yield event

    return await collect(source())


def read_back(lines: bytes) -> list[Event]:
    reader = AnswerReader("r", "m")
    events: list[Event] = [event for line in lines.split(b"\n") if line for event in reader.events(line)]
    assert reader.ending is not None
    return [START, *events, Finish(usage=usage_of(reader.ending), timings=timings_of(reader.ending, 0.5))]


@given(DELTAS, CALLS, REASONS)
async def test_a_chat_as_lines_and_as_a_body_is_read_back_as_the_same_answer(
    deltas: list[Event], calls: list[tuple[str, dict[str, object]]], reason: str
) -> None:
    pieces: list[Event] = []
    for position, (name, arguments) in enumerate(calls):
        text = json.dumps(arguments)
        pieces.append(ToolCallDelta(position=position, call_id=f"c{position}", name=name, arguments=text[:1]))
        pieces.append(ToolCallDelta(position=position, arguments=text[1:]))
    end = ChoiceEnd(finish_reason="tool_calls" if calls else reason)  # type: ignore[arg-type]
    events = [START, *deltas, *pieces, end, FINISH]
    encoder = ChatLines()
    lines = b"".join(encoder.encode(event) for event in events)
    assert lines.count(b"\n") == len(lines.decode().splitlines()), "one line each, whatever cuts them"
    sent = await answer_of(events)
    for received in (await answer_of(read_back(lines)), await answer_of(read_back(whole(ChatReply(), sent)))):
        assert (received.content, received.reasoning) == (sent.content, sent.reasoning)
        assert received.finish_reason == sent.finish_reason
        assert received.choices[0].logprobs == sent.choices[0].logprobs
        assert [(call.id, call.name, json.loads(call.arguments)) for call in received.tool_calls] == [
            (f"c{position}", name, arguments) for position, (name, arguments) in enumerate(calls)
        ]
        assert (received.usage, received.timings) == (FINISH.usage, TIMINGS)


@given(DELTAS, REASONS)
async def test_a_generated_answer_is_read_back_too(deltas: list[Event], reason: str) -> None:
    events = [START, *deltas, ChoiceEnd(finish_reason=reason), FINISH]  # type: ignore[arg-type]
    encoder = GenerateLines()
    sent = await answer_of(events)
    lines = b"".join(encoder.encode(event) for event in events)
    for received in (await answer_of(read_back(lines)), await answer_of(read_back(whole(GenerateReply(), sent)))):
        assert (received.content, received.reasoning) == (sent.content, sent.reasoning)
        assert received.finish_reason == sent.finish_reason


def test_a_refusal_is_part_of_the_text() -> None:
    encoder = ChatLines()
    encoder.encode(START)
    assert json.loads(encoder.encode(RefusalDelta("No.")))["message"]["content"] == "No."


def test_times_that_a_provider_does_not_tell_come_from_our_own_clock_or_not_at_all() -> None:
    encoder = GenerateLines()
    encoder.encode(START)
    last = json.loads(encoder.encode(Finish(usage=Usage(prompt_tokens=1, completion_tokens=2))))
    assert last["total_duration"] > 0
    assert not {"load_duration", "prompt_eval_duration", "eval_duration", "prompt_eval_cached_count"} & last.keys()
    timings = Timings(queued=0.5, time_to_first_token=0.75, total=2.0)
    last = json.loads(encoder.encode(Finish(usage=Usage(prompt_tokens=1, completion_tokens=2), timings=timings)))
    assert (last["prompt_eval_duration"], last["eval_duration"]) == (250_000_000, 1_250_000_000)


def test_an_error_line_says_what_went_wrong_and_is_read_as_an_error() -> None:
    line = error_line(EngineError("the disk\u2028is full"))
    assert len(line.decode().splitlines()) == 1
    with pytest.raises(ProviderError, match="ollama: the disk\u2028is full"):
        list(AnswerReader("r", "m").events(line))


@pytest.mark.parametrize(
    ("status", "kind"), [(400, InvalidRequestError), (404, ModelNotFoundError), (500, ProviderError)]
)
def test_an_error_line_has_the_kind_of_its_status(status: int, kind: type[Exception]) -> None:
    error = error_of(status, "no such thing", "m")
    assert type(error) is kind
    assert error.message.startswith("ollama: no such thing")


@given(st.binary(max_size=60))
def test_bytes_that_are_no_line_are_a_providers_error_and_nothing_else(data: bytes) -> None:
    try:
        list(AnswerReader("r", "m").events(data))
    except ProviderError as error:
        assert error.message
