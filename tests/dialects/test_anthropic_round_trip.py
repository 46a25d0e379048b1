"""A conversation that Anthropic's format can hold is the same after it has been written in it and read back."""

from __future__ import annotations

from typing import Any

import msgspec
from anthropic_reference import check_messages
from hypothesis import given
from hypothesis import strategies as st

from autobot_llm.dialects.anthropic.bodies import read_messages
from autobot_llm.dialects.anthropic.conversation import read_conversation
from autobot_llm.dialects.anthropic.requests import write_request
from autobot_llm.dialects.anthropic.turns import write_conversation
from autobot_llm.types import ChatMessage, LLMRequest

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
MARKS = st.sampled_from([{}, {"cache_control": {"type": "ephemeral"}}])
URLS = st.sampled_from(["https://example.com/a.png", "data:image/png;base64,iVBORw0KGgo="])
TEXTS = st.builds(lambda text, mark: {"type": "text", "text": text, **mark}, TEXT, MARKS)
IMAGES = st.builds(lambda url, mark: {"type": "image_url", "image_url": {"url": url}, **mark}, URLS, MARKS)
THOUGHTS = st.builds(lambda text, proof: {"type": "thinking", "thinking": text, "signature": proof}, TEXT, TEXT)
ENCRYPTED = st.builds(lambda data: {"type": "redacted_thinking", "data": data}, TEXT)
ARGUMENTS = st.dictionaries(TEXT, TEXT | st.integers(-(2**53), 2**53) | st.booleans() | st.none() | st.lists(TEXT))


def joined(parts: list[dict[str, Any]]) -> Any:
    """A single text that says nothing else is a string, in either format."""
    return parts[0]["text"] if len(parts) == 1 and parts[0].keys() == {"type", "text"} else parts


def content(*kinds: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[Any]:
    return st.lists(st.one_of(*kinds), min_size=1, max_size=3).map(joined)


@st.composite
def exchanges(draw: st.DrawFn, number: int) -> list[ChatMessage]:
    """An answer, with the results of the calls in it, and what the user then says."""
    num_calls = draw(st.integers(0, 2))
    ids = [f"call_{number}-{i}" for i in range(num_calls)]
    calls = [
        {
            "id": call_id,
            "type": "function",
            "function": {"name": "f", "arguments": msgspec.json.encode(draw(ARGUMENTS)).decode()},
            **draw(MARKS),
        }
        for call_id in ids
    ]
    is_silent = bool(calls) and draw(st.booleans())
    said = None if is_silent else draw(content(TEXTS, THOUGHTS, ENCRYPTED))
    messages = [ChatMessage(role="assistant", content=said, tool_calls=calls or None)]
    for call_id in ids:
        parts = draw(st.lists(TEXTS | IMAGES, max_size=2)) or [{"type": "text", "text": ""}]
        inner = [{name: value for name, value in part.items() if name != "cache_control"} for part in parts[:-1]]
        last = parts[-1] | ({"is_error": True} if draw(st.booleans()) else {})
        messages.append(ChatMessage(role="tool", content=joined([*inner, last]), tool_call_id=call_id))
    if not calls or draw(st.booleans()):
        messages.append(ChatMessage(role="user", content=draw(content(TEXTS, IMAGES))))
    return messages


@st.composite
def conversations(draw: st.DrawFn) -> list[ChatMessage]:
    messages = [ChatMessage(role="system", content=draw(content(TEXTS)))] if draw(st.booleans()) else []
    messages.append(ChatMessage(role="user", content=draw(content(TEXTS, IMAGES))))
    for number in range(draw(st.integers(0, 3))):
        messages += draw(exchanges(number))
    return messages


@given(conversations())
def test_written_and_read_back_it_is_the_same_conversation(messages: list[ChatMessage]) -> None:
    system, turns = write_conversation(messages, system_turns=False)
    assert read_conversation(system, [(turn["role"], turn["content"]) for turn in turns]) == messages


@given(conversations())
def test_a_whole_request_survives_the_wire(messages: list[ChatMessage]) -> None:
    tool = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
    asked = LLMRequest(
        messages=messages,
        model="claude-sonnet-4-6",
        max_tokens=9,
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        stop=["END"],
        tools=[{"type": "function", "function": tool, "eager_input_streaming": True}],
        tool_choice="required",
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": {}, "strict": True}},
        metadata={"user_id": "u"},
        extra_body={"parallel_tool_calls": False, "reasoning_effort": "low", "service_tier": "auto"},
        request_id="r",
        tenant="t",
    )
    body = write_request(asked, "claude-sonnet-4-6").body
    if msgspec.json.encode(body).count(b'"cache_control"') <= 4:
        check_messages(body)
    assert read_messages(msgspec.json.encode(body), request_id="r", tenant="t") == asked
