"""Answers in Anthropic's format: what we write is what its clients read, and what we read is what it sent."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from anthropic.types import Message
from hypothesis import given
from hypothesis import strategies as st

from autobot_llm.dialects.anthropic.answers import AnswerReader, ModelsPage
from autobot_llm.dialects.anthropic.rate_limits import read_rate_limits
from autobot_llm.dialects.anthropic.replies import (
    MessageBuilder,
    error_body,
    error_event,
    model_fields,
    models_body,
    stop_fields,
    usage_fields,
)
from autobot_llm.dialects.anthropic.stream import MessageEvents
from autobot_llm.dialects.error_in_stream import ErrorInStream
from autobot_llm.dialects.rate_limits import RateLimit, RateLimits
from autobot_llm.errors import (
    AuthenticationError,
    InvalidRequestError,
    LLMError,
    ModelNotFoundError,
    OverloadedError,
    ProviderError,
    ProviderTimeout,
    RequestTooLarge,
)
from autobot_llm.types import (
    ChoiceEnd,
    Event,
    Finish,
    FinishReason,
    ReasoningDelta,
    RefusalDelta,
    Start,
    TextDelta,
    ToolCallDelta,
    Usage,
)

START = Start(request_id="r", model="m", provider="anthropic")
STOP = ChoiceEnd(finish_reason="stop")
USAGE = Usage(prompt_tokens=100, completion_tokens=7, cached_tokens=60, cache_write_tokens=30, reasoning_tokens=2)
FINISH = Finish(usage=USAGE)


def streamed(events: Iterable[Event]) -> bytes:
    encoder = MessageEvents("r")
    return b"".join(encoder.encode(event) for event in events)


def sse(data: bytes) -> list[tuple[str, Any]]:
    """(event, data) of each; the data is one line, as clients that cut at any line end need it."""
    parsed = []
    for block in data.decode().split("\n\n")[:-1]:
        name, content = block.splitlines()
        parsed.append((name.removeprefix("event: "), json.loads(content.removeprefix("data: "))))
    return parsed


def whole(events: Sequence[Event]) -> dict[str, Any]:
    builder = MessageBuilder("r")
    for event in events[:-1]:
        builder.add(event)
    finish = events[-1]
    assert isinstance(finish, Finish)
    message: dict[str, Any] = json.loads(builder.body(finish))
    return message


def read_stream(data: bytes) -> list[Event]:
    reader = AnswerReader("r", "anthropic")
    events = [event for _, fields in sse(data) for event in reader.read_event(json.dumps(fields).encode())]
    assert reader.is_complete
    return [*events, Finish(usage=reader.usage)]


def read_whole(message: dict[str, Any]) -> list[Event]:
    reader = AnswerReader("r", "anthropic")
    events = list(reader.read_message(json.dumps(message).encode()))
    assert reader.is_complete
    return [*events, Finish(usage=reader.usage)]


ANSWER: list[Event] = [
    START,
    ReasoningDelta("Let me "),
    ReasoningDelta("see."),
    ReasoningDelta("", signature="sig"),
    ReasoningDelta("", signature="redacted_thinking:blob"),
    TextDelta("Looking"),
    TextDelta(" it up."),
    ToolCallDelta(position=0, call_id="c0", name="weather", arguments='{"city":'),
    ToolCallDelta(position=0, arguments='"Rīga"}'),
    ToolCallDelta(position=1, call_id="c1", name="now", arguments=""),
    ChoiceEnd(finish_reason="tool_calls"),
    FINISH,
]
BLOCKS = [
    {"type": "thinking", "thinking": "Let me see.", "signature": "sig"},
    {"type": "redacted_thinking", "data": "blob"},
    {"type": "text", "text": "Looking it up."},
    {"type": "tool_use", "id": "c0", "name": "weather", "input": {"city": "Rīga"}},
    {"type": "tool_use", "id": "c1", "name": "now", "input": {}},
]


def test_a_whole_message_has_every_block_in_its_order() -> None:
    message = whole(ANSWER)
    assert message["content"] == BLOCKS
    assert (message["id"], message["type"], message["role"], message["model"]) == ("msg_r", "message", "assistant", "m")
    assert (message["stop_reason"], message["stop_sequence"]) == ("tool_use", None)
    Message.model_validate(message)


def test_a_stream_has_the_documented_sequence_of_events() -> None:
    names = [name for name, _ in sse(streamed(ANSWER))]
    start, delta, stop = "content_block_start", "content_block_delta", "content_block_stop"
    assert names == [
        "message_start",
        *(start, delta, delta, delta, stop),
        *(start, stop),
        *(start, delta, delta, stop),
        *(start, delta, delta, stop),
        *(start, stop),
        "message_delta",
        "message_stop",
    ]
    assert all(name == fields["type"] for name, fields in sse(streamed(ANSWER)))
    indexes = [fields["index"] for name, fields in sse(streamed(ANSWER)) if name == "content_block_start"]
    assert indexes == [0, 1, 2, 3, 4]


def test_what_is_streamed_reads_back_as_what_was_sent() -> None:
    assert whole(read_stream(streamed(ANSWER))) == whole(ANSWER)
    assert whole(read_whole(whole(ANSWER))) == whole(ANSWER)


def test_usage_is_counted_apart_on_the_wire_and_together_here() -> None:
    fields = usage_fields(USAGE)
    assert fields == {
        "input_tokens": 10,
        "cache_read_input_tokens": 60,
        "cache_creation_input_tokens": 30,
        "output_tokens": 7,
        "output_tokens_details": {"thinking_tokens": 2},
    }
    finish = read_stream(streamed(ANSWER))[-1]
    assert isinstance(finish, Finish)
    assert finish.usage == USAGE


@pytest.mark.parametrize(
    ("end", "reason", "sequence"),
    [
        (STOP, "end_turn", None),
        (ChoiceEnd(finish_reason="stop", stop_sequence="END"), "stop_sequence", "END"),
        (ChoiceEnd(finish_reason="length"), "max_tokens", None),
        (ChoiceEnd(finish_reason="tool_calls"), "tool_use", None),
        (ChoiceEnd(finish_reason="content_filter"), "refusal", None),
    ],
)
def test_every_way_to_end_has_its_stop_reason_and_reads_back(end: ChoiceEnd, reason: str, sequence: str | None) -> None:
    assert stop_fields(end) == {"stop_reason": reason, "stop_sequence": sequence}
    assert read_stream(streamed([START, TextDelta("a"), end, FINISH]))[-2] == end


def test_a_refusal_is_text_with_a_reason_and_its_explanation_is_read() -> None:
    events = [START, RefusalDelta("I will not."), ChoiceEnd(finish_reason="content_filter"), FINISH]
    message = whole(events)
    assert (message["content"], message["stop_reason"]) == ([{"type": "text", "text": "I will not."}], "refusal")
    refused = message | {"content": [], "stop_details": {"type": "refusal", "category": "cyber", "explanation": "No."}}
    assert read_whole(refused)[1:3] == [RefusalDelta("No."), ChoiceEnd(finish_reason="content_filter")]


def test_an_empty_answer_is_a_message_without_blocks() -> None:
    events = [START, TextDelta(""), ReasoningDelta(""), STOP, FINISH]
    assert whole(events)["content"] == []
    assert [name for name, _ in sse(streamed(events))] == ["message_start", "message_delta", "message_stop"]


def test_a_call_cut_by_max_tokens_is_kept_without_arguments_and_any_other_is_an_error() -> None:
    call = ToolCallDelta(position=0, call_id="c", name="f", arguments='{"a": ')
    cut = whole([START, call, ChoiceEnd(finish_reason="length"), FINISH])
    assert (cut["content"][0]["input"], cut["stop_reason"]) == ({}, "max_tokens")
    for arguments in ('{"a": ', "[1]", "\ud83d"):
        call = ToolCallDelta(position=0, call_id="c", name="f", arguments=arguments)
        with pytest.raises(ProviderError, match="not a JSON object"):
            whole([START, call, ChoiceEnd(finish_reason="tool_calls"), FINISH])


def test_events_that_make_no_message_are_errors() -> None:
    nameless = ToolCallDelta(position=0, arguments="{}")
    first = ToolCallDelta(position=0, call_id="c", name="f")
    second = ToolCallDelta(position=1, call_id="d", name="g")
    for events in (
        [START, nameless],
        [START, FINISH],
        [START, first, second, ToolCallDelta(position=0, arguments="{}")],
    ):
        with pytest.raises(ProviderError):
            streamed(events)
    for events in ([START, nameless, STOP, FINISH], [START, FINISH]):
        with pytest.raises(ProviderError):
            whole(events)


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
WORDS = TEXT.filter(bool)
KEYS = st.text("abc", min_size=1, max_size=3)
REASONS: list[FinishReason] = ["stop", "length", "tool_calls", "content_filter"]


@st.composite
def answers(draw: st.DrawFn) -> list[Event]:
    """Answers as a provider may send them: blocks in any order, each in any number of pieces."""
    events: list[Event] = [START]
    num_calls = 0
    for kind in draw(st.lists(st.sampled_from(["text", "thinking", "redacted", "call"]), max_size=6)):
        pieces = draw(st.lists(TEXT, max_size=4))
        if kind == "text":
            events += [TextDelta(piece) for piece in pieces]
        elif kind == "thinking":
            events += [ReasoningDelta(piece) for piece in pieces]
            events.append(ReasoningDelta("", signature=draw(WORDS)))
        elif kind == "redacted":
            events.append(ReasoningDelta("", signature="redacted_thinking:" + draw(TEXT)))
        else:
            text = json.dumps(draw(st.dictionaries(KEYS, TEXT | st.integers(-5, 5), max_size=2)))
            cut = draw(st.integers(0, len(text)))
            events.append(ToolCallDelta(position=num_calls, call_id=f"c{num_calls}", name="f", arguments=text[:cut]))
            events.append(ToolCallDelta(position=num_calls, arguments=text[cut:]))
            num_calls += 1
    cached, written, fresh = (draw(st.integers(0, 1000)) for _ in range(3))
    usage = Usage(
        prompt_tokens=cached + written + fresh,
        completion_tokens=draw(st.integers(0, 1000)),
        cached_tokens=cached,
        cache_write_tokens=written,
    )
    end = ChoiceEnd(finish_reason=draw(st.sampled_from(REASONS)))
    return [*events, end, Finish(usage=usage)]


@given(answers())
def test_any_answer_is_the_same_streamed_and_whole_and_read_back(events: list[Event]) -> None:
    message = whole(events)
    assert whole(read_stream(streamed(events))) == message
    assert whole(read_whole(message)) == message
    Message.model_validate(message)


# What Anthropic may send


def raw(*events: dict[str, Any]) -> list[Event]:
    reader = AnswerReader("r", "anthropic")
    return [event for fields in events for event in reader.read_event(json.dumps(fields).encode())]


MESSAGE_START = {"type": "message_start", "message": {"model": "m", "usage": {"input_tokens": 3, "output_tokens": 1}}}


def block_start(index: int = 0, **block: Any) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": block}


def block_delta(index: int = 0, **delta: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": delta}


def test_pings_and_kinds_of_events_that_are_not_known_are_skipped() -> None:
    assert raw({"type": "ping"}, MESSAGE_START, {"type": "ping"}, {"type": "something_new", "index": "x"})[0] == START


def test_text_or_input_that_comes_with_a_blocks_beginning_is_not_lost() -> None:
    events = raw(
        MESSAGE_START,
        block_start(0, type="text", text="Hi"),
        block_start(1, type="tool_use", id="c", name="f", input={"a": 1}),
        {"type": "content_block_stop", "index": 1},
    )
    assert events[1:] == [TextDelta("Hi"), ToolCallDelta(position=0, call_id="c", name="f", arguments='{"a":1}')]


def test_later_counts_replace_earlier_ones_and_those_left_out_stay() -> None:
    reader = AnswerReader("r", "anthropic")
    usage = {"input_tokens": 5, "cache_read_input_tokens": 90, "cache_creation_input_tokens": 5, "output_tokens": 1}
    start = {"type": "message_start", "message": {"model": "m", "usage": usage}}
    delta = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 9}}
    for fields in (start, delta):
        reader.read_event(json.dumps(fields).encode())
    assert reader.usage == Usage(prompt_tokens=100, completion_tokens=9, cached_tokens=90, cache_write_tokens=5)


END = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}}
NONSENSE: list[list[dict[str, Any]]] = [
    [{"type": "message_start"}],
    [MESSAGE_START, MESSAGE_START],
    [block_start(0, type="text")],
    [MESSAGE_START, block_start(0, type="text"), block_start(0, type="text")],
    [MESSAGE_START, block_start(0, type="server_tool_use", id="s", name="web_search")],
    [MESSAGE_START, block_delta(0, type="text_delta", text="a")],
    [MESSAGE_START, block_delta(0, type="newer_delta", partial_json="a")],
    [MESSAGE_START, block_start(0, type="text"), block_delta(0, type="input_json_delta", partial_json="{")],
    [MESSAGE_START, block_start(0, type="text"), block_delta(0, type="citations_delta")],
    [MESSAGE_START, block_start(0, type="text"), {"type": "content_block_delta", "index": 0}],
    [END],
    [MESSAGE_START, END, END],
    [MESSAGE_START, {"type": "message_delta", "delta": {"stop_reason": "pause_turn"}}],
    [MESSAGE_START, {"type": "message_stop"}],
    [{"type": 5}],
]


@pytest.mark.parametrize("events", NONSENSE, ids=range(len(NONSENSE)))
def test_a_stream_that_makes_no_sense_is_an_error_that_shows_it(events: list[dict[str, Any]]) -> None:
    with pytest.raises(ProviderError, match="anthropic sent"):
        raw(*events)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"\xff", b'"x"', b"[" * 100_000, b'{"type": "message_start", "message": 1}']
)
def test_hostile_json_is_an_error(data: bytes) -> None:
    reader = AnswerReader("r", "anthropic")
    with pytest.raises(ProviderError):
        reader.read_event(data)
    with pytest.raises(ProviderError):
        reader.read_message(data)


@pytest.mark.parametrize(
    ("kind", "status"), [("overloaded_error", 529), ("rate_limit_error", 429), ("api_error", 500), ("unheard_of", 500)]
)
def test_an_error_within_the_stream_has_the_status_of_its_type(kind: str, status: int) -> None:
    data = json.dumps({"type": "error", "error": {"type": kind, "message": "Overloaded"}}).encode()
    with pytest.raises(ErrorInStream, match="Overloaded") as caught:
        AnswerReader("r", "anthropic").read_event(data)
    assert (caught.value.status, caught.value.body) == (status, data)


def test_models_are_read_and_written_with_their_limits() -> None:
    listed = {"id": "claude-opus-5-5", "created_at": "2026-09-01T00:00:00Z", "max_input_tokens": 9, "max_tokens": 5}
    page = ModelsPage(data=[], has_more=False)
    assert page.infos("anthropic") == []
    page = msgspec.convert({"data": [listed, {"id": "b"}], "has_more": True, "last_id": "b"}, ModelsPage)
    infos = page.infos("anthropic")
    assert [(info.id, info.context_length, info.created) for info in infos] == [
        ("claude-opus-5-5", 9, 1788220800),
        ("b", None, 0),
    ]
    assert page.output_limits() == {"claude-opus-5-5": 5}
    assert model_fields(infos[0])["created_at"] == "2026-09-01T00:00:00Z"
    assert json.loads(models_body(infos))["last_id"] == "b"
    assert json.loads(models_body([])) == {"data": [], "has_more": False, "first_id": None, "last_id": None}


NOW = datetime(2026, 11, 25, 12, 0, 0, tzinfo=UTC)


def test_rate_limits_are_read_with_the_seconds_until_they_are_whole_again() -> None:
    headers = {
        "anthropic-ratelimit-requests-limit": "50",
        "anthropic-ratelimit-requests-remaining": "49",
        "anthropic-ratelimit-requests-reset": "2026-11-25T12:00:01.5Z",
        "anthropic-ratelimit-tokens-remaining": "39000",
        "anthropic-ratelimit-tokens-reset": "2026-11-25T11:00:00Z",
    }
    assert read_rate_limits(headers, NOW) == RateLimits(
        requests=RateLimit(limit=50, remaining=49, reset_seconds=1.5),
        tokens=RateLimit(limit=None, remaining=39_000, reset_seconds=0.0),
    )


@pytest.mark.parametrize("value", ["", "x", "-1", "1.5", "٣"])
def test_rate_limits_that_are_none_are_left_out(value: str) -> None:
    assert read_rate_limits({}) is None
    assert read_rate_limits({"anthropic-ratelimit-requests-remaining": value}) is None
    reset = {"anthropic-ratelimit-requests-remaining": "1", "anthropic-ratelimit-requests-reset": value}
    limits = read_rate_limits(reset)
    assert limits is not None
    assert limits.requests == RateLimit(limit=None, remaining=1, reset_seconds=None)


class Teapot(LLMError):
    status = 418


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequestError("top_k: no", param="top_k"), "invalid_request_error"),
        (AuthenticationError("no key"), "authentication_error"),
        (ModelNotFoundError("none", param="model"), "not_found_error"),
        (RequestTooLarge("big"), "request_too_large"),
        (OverloadedError("busy", retry_after=1), "rate_limit_error"),
        (ProviderTimeout("late"), "timeout_error"),
        (ProviderError("bad"), "api_error"),
        (Teapot("short and stout"), "invalid_request_error"),
    ],
)
def test_an_error_has_anthropics_type_for_its_status_and_our_code(error: LLMError, kind: str) -> None:
    body = json.loads(error_body(error))
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert error.message in body["error"]["message"]
    assert body["error"].get("details", {}).get("error_code") == error.code
    assert sse(error_event(error)) == [("error", body)]


def test_an_error_names_its_field_even_where_its_message_does_not() -> None:
    error = InvalidRequestError("expected a number", param="top_k")
    assert json.loads(error_body(error))["error"]["message"] == "top_k: expected a number"


def test_line_ends_of_unicode_do_not_cut_an_event() -> None:
    events = [START, TextDelta("a\u2028b\x85c\r\nd"), STOP, FINISH]
    assert whole(read_stream(streamed(events)))["content"] == [{"type": "text", "text": "a\u2028b\x85c\r\nd"}]
