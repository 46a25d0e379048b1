"""A request in Anthropic's format becomes an LLMRequest, or is refused with the field's name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobot_llm.dialects.anthropic.bodies import check_version, read_count, read_messages
from autobot_llm.errors import InvalidRequestError, UnsupportedError
from autobot_llm.types import ChatMessage, LLMRequest

PNG = "iVBORw0KGgo="
MARK = {"type": "ephemeral", "ttl": "1h"}


def read(**fields: Any) -> LLMRequest:
    body = {"max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}]} | fields
    return read_messages(json.dumps(body).encode(), request_id="r", tenant="t")


def messages(*turns: dict[str, Any]) -> list[ChatMessage]:
    read_back = read(messages=list(turns)).messages
    assert read_back is not None
    return read_back


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def text(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **more}


def test_every_field_of_a_plain_request_has_its_place() -> None:
    request = read(
        model="claude-opus-5-5",
        system="Be brief.",
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        stop_sequences=["END"],
        stream=True,
        metadata={"user_id": "u"},
    )
    assert request == LLMRequest(
        messages=[ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Hi")],
        model="claude-opus-5-5",
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        stop=["END"],
        stream=True,
        metadata={"user_id": "u"},
        request_id="r",
        tenant="t",
    )


def test_text_blocks_are_text_and_keep_their_cache_marks() -> None:
    assert messages(user(text("a"))) == [ChatMessage(role="user", content="a")]
    assert messages(user(text("a", citations=None), text("b", cache_control=MARK))) == [
        ChatMessage(role="user", content=[text("a"), text("b", cache_control=MARK)])
    ]
    system = read(system=[text("a", cache_control=MARK)]).messages
    assert system is not None
    assert system[0] == ChatMessage(role="system", content=[text("a", cache_control=MARK)])


def test_an_image_becomes_an_image_url() -> None:
    here = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
    there = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}, "cache_control": MARK}
    assert messages(user(here, there))[0].content == [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}, "cache_control": MARK},
    ]


def test_a_turn_with_results_of_tools_becomes_a_message_for_each_and_one_for_the_rest() -> None:
    call = {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Rīga"}, "caller": {"type": "direct"}}
    turns = [
        assistant(text("Let me look."), call),
        user(
            {"type": "tool_result", "tool_use_id": "c1", "content": "12 °C"},
            {"type": "tool_result", "tool_use_id": "c2", "content": [text("no")], "is_error": True},
            {"type": "tool_result", "tool_use_id": "c3", "cache_control": MARK},
            text("And now?"),
        ),
    ]
    function = {"name": "weather", "arguments": '{"city":"Rīga"}'}
    assert messages(*turns) == [
        ChatMessage(
            role="assistant",
            content="Let me look.",
            tool_calls=[{"id": "c1", "type": "function", "function": function}],
        ),
        ChatMessage(role="tool", content="12 °C", tool_call_id="c1"),
        ChatMessage(role="tool", content=[text("no", is_error=True)], tool_call_id="c2"),
        ChatMessage(role="tool", content=[text("", cache_control=MARK)], tool_call_id="c3"),
        ChatMessage(role="user", content="And now?"),
    ]


def test_signed_reasoning_stays_whole_and_unsigned_reasoning_is_plain_text() -> None:
    signed = {"type": "thinking", "thinking": "hm", "signature": "s"}
    redacted = {"type": "redacted_thinking", "data": "d"}
    assert messages(assistant(signed, redacted, text("a")))[0].content == [signed, redacted, text("a")]
    unsigned = {"type": "thinking", "thinking": "hm", "signature": ""}
    assert messages(assistant(unsigned, text("a"))) == [
        ChatMessage(role="assistant", content="a", reasoning_content="hm")
    ]


def test_a_system_message_within_the_conversation_keeps_its_place() -> None:
    turns = messages({"role": "user", "content": "a"}, {"role": "system", "content": "b"})
    assert [(turn.role, turn.content) for turn in turns] == [("user", "a"), ("system", "b")]


TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object"}, "strict": True, "cache_control": MARK}
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}


def test_tools_become_functions_and_the_callers_own_kinds_travel_as_they_are() -> None:
    bash = {"type": "bash_20250124", "name": "bash"}
    tools = read(tools=[TOOL | {"eager_input_streaming": False}, bash]).tools
    notes = {"cache_control": MARK, "eager_input_streaming": False}
    assert tools == [{"type": "function", "function": FUNCTION, **notes}, bash]


@pytest.mark.parametrize(
    ("choice", "expected", "extra"),
    [
        ({"type": "auto"}, "auto", {}),
        ({"type": "none"}, "none", {}),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", {"parallel_tool_calls": False}),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}, {}),
        ({"type": "auto", "disable_parallel_tool_use": False}, "auto", {}),
    ],
)
def test_a_tool_choice_keeps_its_meaning(choice: dict[str, Any], expected: object, extra: dict[str, Any]) -> None:
    request = read(tools=[TOOL], tool_choice=choice)
    assert (request.tool_choice, request.extra_body) == (expected, extra)


def test_the_output_config_becomes_a_response_format_and_an_effort() -> None:
    schema = {"type": "object", "properties": {}}
    request = read(output_config={"effort": "low", "format": {"type": "json_schema", "schema": schema}})
    assert request.response_format is not None
    assert request.response_format["json_schema"]["schema"] == schema
    assert request.extra_body == {"reasoning_effort": "low"}


def test_what_only_anthropic_knows_travels_to_the_provider() -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    request = read(thinking=thinking, service_tier="auto", container=None)
    assert request.extra_body == {"thinking": thinking, "service_tier": "auto"}


@pytest.mark.parametrize(
    ("last", "where"),
    [
        ("Hi", lambda message: message.content[0]),
        ([text("a"), text("b")], lambda message: message.content[1]),
        ([{"type": "tool_result", "tool_use_id": "c"}], lambda message: message.content[0]),
    ],
)
def test_the_mark_of_a_whole_request_goes_onto_its_last_block(last: object, where: Any) -> None:
    request = read(messages=[{"role": "user", "content": last}], cache_control=MARK)
    assert request.messages is not None
    assert where(request.messages[-1])["cache_control"] == MARK
    assert "cache_control" not in request.extra_body


def test_the_mark_of_a_whole_request_passes_over_reasoning() -> None:
    thinking = {"type": "thinking", "thinking": "x", "signature": "s"}
    call = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
    turns = [{"role": "user", "content": "Hi"}, assistant(thinking, call), assistant(thinking)]
    request = read(messages=turns, cache_control=MARK)
    assert request.messages is not None
    assert request.messages[1].tool_calls is not None
    assert request.messages[1].tool_calls[0]["cache_control"] == MARK


REFUSED = [
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [user({"type": "video"})]}, "messages[0].content[0].type"),
    ({"messages": [user({"type": "text"})]}, "messages[0].content[0].text"),
    ({"messages": [user(text("a", citations=[{"type": "char_location"}]))]}, "messages[0].content[0].citations"),
    ({"messages": [user({"type": "image", "source": {"type": "file", "file_id": "f"}})]},
     "messages[0].content[0].source"),
    ({"messages": [user({"type": "image", "source": {"type": "base64", "media_type": "image/tiff", "data": ""}})]},
     "messages[0].content[0].source"),
    ({"messages": [user({"type": "image"})]}, "messages[0].content[0].source"),
    ({"messages": [user({"type": "tool_result"})]}, "messages[0].content[0].tool_use_id"),
    ({"messages": [user({"type": "tool_result", "tool_use_id": "c", "content": 5})]}, "messages[0].content[0].content"),
    ({"messages": [assistant({"type": "tool_use", "id": "c", "name": "f", "input": "x"})]}, "messages[0].content[0]"),
    ({"messages": [assistant({"type": "tool_use", "id": "c", "name": "f", "input": {}, "caller": {"type": "code"}})]},
     "messages[0].content[0].caller"),
    ({"messages": [assistant({"type": "thinking", "thinking": "x"})]}, "messages[0].content[0].signature"),
    ({"messages": [assistant({"type": "server_tool_use"})]}, "messages[0].content[0].type"),
    ({"system": [{"type": "text", "text": 1}]}, "system[0].text"),
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"tools": [{"type": "web_search_20260318", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[param for _, param in REFUSED])
def test_what_cannot_be_understood_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read(**fields)
    assert caught.value.param == param
    assert param in caught.value.message


def test_max_tokens_is_required() -> None:
    with pytest.raises(InvalidRequestError, match="max_tokens: this field is required"):
        read_messages(b'{"messages": [{"role": "user", "content": "Hi"}]}', request_id="r", tenant="")


def test_counting_tokens_takes_the_fields_of_the_prompt_alone() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "system": "s", "tools": [TOOL]}
    request = read_count(json.dumps(body).encode(), request_id="r", tenant="t")
    assert request.max_tokens is None
    assert request.messages == [ChatMessage(role="system", content="s"), ChatMessage(role="user", content="Hi")]


@pytest.mark.parametrize("version", [None, "2023-06-01", "2026-10-21"])
def test_known_versions_are_accepted(version: str | None) -> None:
    check_version(version)


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="2023-06-01 or 2026-10-21"):
        check_version("2022-01-01")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=12,
)
BLOCK = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "tool_use", "tool_result", "thinking", "document", "x"])},
    optional=dict.fromkeys(("text", "source", "id", "name", "input", "content", "tool_use_id", "thinking"), JSON),
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": JSON | st.lists(BLOCK)}
)
HOSTILE = st.fixed_dictionaries(
    {"max_tokens": JSON, "messages": JSON | st.lists(TURN)},
    optional=dict.fromkeys(("system", "tools", "tool_choice", "output_config", "cache_control", "metadata"), JSON),
)


@given(HOSTILE)
def test_no_body_breaks_the_reader(body: dict[str, Any]) -> None:
    try:
        read_messages(json.dumps(body).encode("utf-8", "surrogatepass"), request_id="r", tenant="")
    except InvalidRequestError as error:
        assert error.message
        assert isinstance(error, UnsupportedError) or error.status == 400
