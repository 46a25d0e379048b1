"""An LLMRequest becomes a body that Anthropic's reference allows, or is refused with the field's name."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from anthropic.types.message_create_params import MessageCreateParams
from anthropic_reference import Violation, check_count, check_messages
from pydantic import TypeAdapter

from autobot_llm.dialects.anthropic.models import facts_about
from autobot_llm.dialects.anthropic.requests import write_count, write_request
from autobot_llm.errors import InvalidRequestError, UnsupportedError
from autobot_llm.types import ChatMessage, LLMRequest

MODEL = "claude-opus-5-5"
SDK_SHAPE = TypeAdapter(MessageCreateParams)


def request(*messages: ChatMessage, **fields: Any) -> LLMRequest:
    return LLMRequest(messages=list(messages) or [ChatMessage(role="user", content="Hi")], **fields)


def body_of(*messages: ChatMessage, model: str = MODEL, **fields: Any) -> dict[str, Any]:
    """The body, checked against the reference and against the types of Anthropic's own package."""
    body = write_request(request(*messages, **fields), model).body
    check_messages(body)
    SDK_SHAPE.validate_python(body)
    assert msgspec.json.decode(msgspec.json.encode(body)) == body
    return body


def text(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **more}


def test_the_checker_itself_refuses_what_the_reference_does() -> None:
    good = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]}
    check_messages(good)
    call = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
    bad: list[dict[str, Any]] = [
        {"max_tokens": 0},
        {"seed": 1},
        {"messages": []},
        {"messages": [{"role": "user", "content": ""}]},
        {"messages": [{"role": "assistant", "content": [call]}, {"role": "user", "content": "no result"}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://a"}}]}]},
        {"tools": [{"name": "a b", "input_schema": {"type": "object"}}]},
        {"system": [text(str(i), cache_control={"type": "ephemeral"}) for i in range(5)]},
    ]
    for fields in bad:
        with pytest.raises(Violation):
            check_messages(good | fields)


def test_system_messages_are_lifted_out_and_turns_of_one_role_are_merged() -> None:
    body = body_of(
        ChatMessage(role="system", content="One."),
        ChatMessage(role="developer", content=[text("Two.")]),
        ChatMessage(role="user", content="a"),
        ChatMessage(role="user", content=[text("b"), text("")]),
        ChatMessage(role="assistant", content=""),
        ChatMessage(role="user", content="c"),
        ChatMessage(role="assistant", content="d"),
        ChatMessage(role="system", content="Three."),
        ChatMessage(role="user", content="e"),
    )
    assert body["system"] == [text("One."), text("Two."), text("Three.")]
    assert body["messages"] == [
        {"role": "user", "content": [text("a"), text("b"), text("c")]},
        {"role": "assistant", "content": [text("d")]},
        {"role": "user", "content": [text("e")]},
    ]


@pytest.mark.parametrize(("model", "stays"), [("claude-opus-4-8", True), ("claude-opus-4-7", False), ("other", False)])
def test_a_system_message_after_a_user_turn_stays_where_the_model_allows_it(model: str, stays: bool) -> None:
    body = body_of(ChatMessage(role="user", content="a"), ChatMessage(role="system", content="b"), model=model)
    assert ("system" not in body) == stays
    assert [turn["role"] for turn in body["messages"]] == (["user", "system"] if stays else ["user"])


def test_calls_and_their_results_keep_order_and_identity() -> None:
    body = body_of(
        ChatMessage(role="user", content="Weather?"),
        ChatMessage(
            role="assistant",
            content=None,
            tool_calls=[
                {"id": "functions.get:0", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
                {"id": "c2", "type": "function", "function": {"name": "g", "arguments": ""}},
            ],
        ),
        ChatMessage(role="tool", content="12", tool_call_id="functions.get:0", name="f"),
        ChatMessage(role="tool", content=[text("no", is_error=True)], tool_call_id="c2"),
        ChatMessage(role="user", content="And now?"),
        tools=[{"type": "function", "function": {"name": "f"}}],
    )
    assert body["messages"][1:] == [
        {
            "role": "assistant",
            "content": [
                {"type": "tool_use", "id": "functions_get_0", "name": "f", "input": {"a": 1}},
                {"type": "tool_use", "id": "c2", "name": "g", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "functions_get_0", "content": [text("12")]},
                {"type": "tool_result", "tool_use_id": "c2", "is_error": True, "content": [text("no")]},
                text("And now?"),
            ],
        },
    ]
    assert body["tools"] == [{"name": "f", "input_schema": {"type": "object", "properties": {}}}]


def test_images_become_sources_and_other_media_are_refused() -> None:
    url = {"type": "image_url", "image_url": {"url": "https://example.com/a.png", "detail": "high"}}
    data = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    body = body_of(ChatMessage(role="user", content=[url, data]))
    assert [block["source"] for block in body["messages"][0]["content"]] == [
        {"type": "url", "url": "https://example.com/a.png"},
        {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="},
    ]


FUNCTION = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("choice", "parallel", "expected"),
    [
        (None, None, None),
        ("auto", None, {"type": "auto"}),
        ("none", False, {"type": "none"}),
        ("required", None, {"type": "any"}),
        ({"type": "function", "function": {"name": "f"}}, None, {"type": "tool", "name": "f"}),
        (None, False, {"type": "auto", "disable_parallel_tool_use": True}),
        ("required", False, {"type": "any", "disable_parallel_tool_use": True}),
        ("auto", True, {"type": "auto"}),
    ],
)
def test_a_tool_choice_keeps_its_meaning(choice: Any, parallel: bool | None, expected: object) -> None:
    extra = {} if parallel is None else {"parallel_tool_calls": parallel}
    body = body_of(tools=[FUNCTION], tool_choice=choice, extra_body=extra)
    assert body.get("tool_choice") == expected
    assert body["tools"] == [{"name": "f", "input_schema": {"type": "object"}, "description": "d"}]


def test_a_schema_and_an_effort_share_the_output_config() -> None:
    schema = {"type": "object", "additionalProperties": False}
    body = body_of(
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        extra_body={"reasoning_effort": "high"},
    )
    assert body["output_config"] == {"effort": "high", "format": {"type": "json_schema", "schema": schema}}
    assert "output_config" not in body_of(response_format={"type": "text"})
    assert body_of(extra_body={"reasoning_effort": "none"})["thinking"] == {"type": "disabled"}


def test_sampling_fields_go_out_under_the_last_version_that_has_them() -> None:
    plain = write_request(request(temperature=1.0, top_p=1.0, top_k=-1), MODEL)
    assert plain.headers == {"anthropic-version": "2026-10-21"}
    assert not {"temperature", "top_p", "top_k"} & plain.body.keys()
    sampled = write_request(request(temperature=0.0, top_p=0.5, top_k=3), "claude-sonnet-4-6")
    assert sampled.headers == {"anthropic-version": "2023-06-01"}
    assert (sampled.body["temperature"], sampled.body["top_p"], sampled.body["top_k"]) == (0.0, 0.5, 3)


def test_a_beta_header_comes_only_with_the_field_that_needs_it() -> None:
    assert (
        write_request(request(extra_body={"speed": "fast"}), MODEL).headers["anthropic-beta"] == "fast-mode-2026-02-01"
    )
    assert "anthropic-beta" not in write_request(request(), MODEL).headers


@pytest.mark.parametrize(
    ("model", "limit"),
    [
        ("claude-opus-5-5", 128_000),
        ("claude-haiku-5-5", 128_000),
        ("claude-fable-5-2", 128_000),
        ("claude-opus-4-6", 128_000),
        ("claude-opus-4-5-20251101", 64_000),
        ("claude-sonnet-4-5-20250929", 64_000),
        ("claude-opus-4-20250514", 32_000),
        ("anthropic.claude-sonnet-4-6", 64_000),
        ("claude-3-haiku-20240307", 8_192),
        ("minimax-m2", 8_192),
    ],
)
def test_an_answer_may_be_as_long_as_the_model_can_make_it(model: str, limit: int) -> None:
    assert body_of(model=model)["max_tokens"] == facts_about(model).max_output_tokens == limit
    assert body_of(model=model, max_tokens=7)["max_tokens"] == 7
    assert write_request(request(), model, max_output_tokens=99).body["max_tokens"] == 99


@pytest.mark.parametrize(
    ("fields", "is_stream"),
    [
        ({"max_tokens": 21_333}, False),
        ({"max_tokens": 21_334}, True),
        ({}, True),
        ({"max_tokens": 5, "stream": True}, True),
    ],
)
def test_a_long_answer_is_a_stream_even_if_nobody_reads_it_as_one(fields: dict[str, Any], is_stream: bool) -> None:
    assert body_of(**fields)["stream"] is is_stream


def test_stops_users_and_anthropics_own_fields_are_passed_on() -> None:
    thinking = {"type": "adaptive"}
    body = body_of(
        stop=["END"], metadata={"user_id": "u", "run": "7"}, extra_body={"thinking": thinking, "prompt_caching": False}
    )
    assert (body["stop_sequences"], body["metadata"], body["thinking"]) == (["END"], {"user_id": "u"}, thinking)
    assert "prompt_caching" not in body


def test_counting_sends_the_prompt_alone() -> None:
    call = write_count(request(tools=[FUNCTION], max_tokens=5, stop=["x"], temperature=0.5), MODEL)
    check_count(call.body)
    assert call.body.keys() == {"model", "messages", "tools"}


def content(*parts: dict[str, Any], role: Any = "user") -> dict[str, Any]:
    return {"messages": [ChatMessage(role=role, content=list(parts))]}


def call(arguments: str) -> dict[str, Any]:
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}]
    return {"messages": [ChatMessage(role="assistant", tool_calls=calls)]}


REFUSED = [
    ({"prompt": "Once" * 100, "messages": None}, "prompt"),
    ({"seed": 7}, "seed"),
    ({"n": 2}, "n"),
    ({"logprobs": 0}, "logprobs"),
    ({"logit_bias": {1: 1.0}}, "logit_bias"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"repetition_penalty": 1.1}, "repetition_penalty"),
    ({"min_p": 0.1}, "min_p"),
    ({"min_tokens": 1}, "min_tokens"),
    ({"stop_token_ids": [1]}, "stop_token_ids"),
    ({"ignore_eos": True}, "ignore_eos"),
    ({"priority": 1}, "priority"),
    ({"temperature": 1.5}, "temperature"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"extra_body": {"reasoning_effort": "minimal"}}, "reasoning_effort"),
    ({"extra_body": {"model": "other"}}, "model"),
    ({"extra_body": {"output_config": "x"}}, "output_config"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    ({"tools": [FUNCTION], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    ({"messages": [ChatMessage(role="user", content="Hi", name="Ann")]}, "messages[0].name"),
    ({"messages": [ChatMessage(role="user", content="")]}, "messages[0].content"),
    ({"messages": [ChatMessage(role="system", content="Hi")]}, "messages"),
    ({"messages": [ChatMessage(role="tool", content="Hi")]}, "messages[0].tool_call_id"),
    (call("[1]"), "messages[0].tool_calls[0].function.arguments"),
    (call("{"), "messages[0].tool_calls[0].function.arguments"),
    (content({"type": "input_audio"}), "messages[0].content[0].type"),
    (content({"type": "image_url", "image_url": {"url": "http://a"}}), "messages[0].content[0].image_url.url"),
    (content({"type": "image_url", "image_url": {"url": "data:image/tiff;base64,AA"}}),
     "messages[0].content[0].image_url.url"),
    (content({"type": "image_url", "image_url": {"url": "https://a", "detail": "low"}}),
     "messages[0].content[0].image_url.detail"),
    (content({"type": "document", "citations": {"enabled": True}}), "messages[0].content[0].citations"),
    (content({"type": "image_url", "image_url": {"url": "https://a"}}, role="system"), "messages[0].content"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[f"{param}-{i}" for i, (_, param) in enumerate(REFUSED)])
def test_what_anthropic_cannot_honour_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    asked = LLMRequest(**({"messages": [ChatMessage(role="user", content="Hi")]} | fields))
    with pytest.raises(InvalidRequestError) as caught:
        write_request(asked, MODEL)
    assert caught.value.param == param
    assert len(caught.value.message) < 200
    assert isinstance(caught.value, UnsupportedError) or param in caught.value.message
