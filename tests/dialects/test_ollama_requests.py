"""Ollama's requests: read and written again they say the same, and what nobody can honour is refused by name."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobot_llm.dialects.ollama.bodies import (
    Call,
    parse_duration,
    read_chat,
    read_embed,
    read_generate,
    read_model,
)
from autobot_llm.dialects.ollama.options import LOAD_TIME, read_options, write_options
from autobot_llm.dialects.ollama.requests import write_request
from autobot_llm.errors import InvalidRequestError, LLMError, UnsupportedError
from autobot_llm.types import ChatMessage, LLMRequest
from autobot_llm.validation import validate_request

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(8)).decode()
USER = [{"role": "user", "content": "hi"}]
FLOATS = st.floats(0.01, 1, allow_nan=False)
SAMPLING = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0, 2),
        "top_k": st.integers(0, 1000),
        "top_p": FLOATS,
        "min_p": st.floats(0, 1),
        "seed": st.integers(0, 2**31 - 1),
        "stop": st.lists(st.text(min_size=1), min_size=1, max_size=4),
        "num_predict": st.integers(1, 10**6),
        "repeat_penalty": st.floats(0.1, 2),
        "presence_penalty": FLOATS,
        "frequency_penalty": FLOATS,
    },
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
OPTION_NAMES = st.sampled_from(["temperature", "top_k", "seed", "stop", "num_predict", "num_ctx", *LOAD_TIME, "other"])


def chat(body: dict[str, Any]) -> Call:
    return read_chat(json.dumps({"model": "m", "messages": USER} | body).encode(), request_id="r", tenant="t")


def generate(body: dict[str, Any]) -> Call:
    return read_generate(json.dumps({"model": "m", "prompt": "p"} | body).encode(), request_id="r", tenant="t")


def requested(call: Call) -> LLMRequest:
    assert call.request is not None
    return call.request


# Options


@given(SAMPLING)
def test_options_read_and_written_again_are_the_same(options: dict[str, Any]) -> None:
    read = read_options(options)
    request = LLMRequest(prompt="x", **read.fields)
    validate_request(request)
    assert write_options(request) == options
    assert (read.extra, read.num_ctx) == ({}, None)


@given(st.dictionaries(OPTION_NAMES, JSON))
def test_whatever_options_hold_they_are_read_or_refused_by_name(options: dict[str, Any]) -> None:
    try:
        read = read_options(options)
    except InvalidRequestError as refusal:
        assert refusal.param is not None
        assert refusal.param.removeprefix("options.") in options
    else:
        given_ones = {name for name, value in options.items() if value is not None}
        assert read.extra.keys() <= given_ones
        assert not read.extra.keys() & LOAD_TIME.keys()


@given(st.integers(-(2**63), 2**64 - 1))
def test_every_seed_fits_ollama_and_none_becomes_random(seed: int) -> None:
    written = write_options(LLMRequest(prompt="x", seed=seed))["seed"]
    assert 0 <= written < 2**31
    assert written == write_options(LLMRequest(prompt="x", seed=seed))["seed"]
    assert written == seed or not 0 <= seed < 2**31


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"num_predict": -1}, {}),
        ({"num_predict": -2}, {}),
        ({"seed": -1}, {}),
        ({"seed": 0}, {"seed": 0}),
        ({"top_k": 40.0}, {"top_k": 40}),
        ({"stop": "END"}, {"stop": ["END"]}),
        ({"num_gpu": -1, "num_batch": 512, "use_mlock": False, "f16_kv": True, "num_thread": 0}, {}),
        ({"mirostat": 0, "tfs_z": 1.0, "typical_p": 1}, {}),
        ({"temperature": None}, {}),
    ],
)
def test_values_that_change_nothing_are_left_out(options: dict[str, Any], fields: dict[str, Any]) -> None:
    read = read_options(options)
    assert (read.fields, read.extra) == (fields, {})


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("num_gpu", 1, UnsupportedError),
        ("use_mmap", True, UnsupportedError),
        ("num_thread", 8, UnsupportedError),
        ("num_predict", 0, InvalidRequestError),
        ("num_predict", "9", InvalidRequestError),
        ("num_ctx", 0, InvalidRequestError),
        ("temperature", True, InvalidRequestError),
        ("top_k", 1.5, InvalidRequestError),
        ("stop", [1], InvalidRequestError),
        ("seed", 2**64, InvalidRequestError),
    ],
)
def test_an_option_that_cannot_be_honoured_is_refused(name: str, value: object, kind: type[LLMError]) -> None:
    with pytest.raises(kind) as refusal:
        chat({"options": {name: value}})
    assert refusal.value.param == f"options.{name}"


# Bodies


@given(st.dictionaries(st.sampled_from(["messages", "options", "format", "think", "tools", "prompt", "context", "raw",
                                        "images", "keep_alive", "logprobs", "model", "input"]), JSON))  # fmt: skip
def test_whatever_a_body_holds_it_is_read_or_refused(fields: dict[str, Any]) -> None:
    data = json.dumps({"model": "m"} | fields).encode()
    for read in (read_chat, read_generate, read_embed):
        try:
            read(data, request_id="r", tenant="t")
        except InvalidRequestError as refusal:
            assert refusal.message


@given(
    SAMPLING, st.sampled_from([None, "json", {"type": "object"}]), st.sampled_from([None, True, False, "low", "high"])
)
def test_a_chat_that_passes_through_says_the_same(
    options: dict[str, Any], wanted: str | dict[str, Any] | None, think: bool | str | None
) -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u", "images": [PNG]},
        {"role": "assistant", "content": "", "thinking": "t",
         "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {"a": [1, None]}}}]},
        {"role": "tool", "content": "r", "tool_name": "f", "tool_call_id": "c"},
    ]  # fmt: skip
    sent = {"model": "m", "messages": messages, "tools": tools, "options": options}
    sent |= {name: value for name, value in (("format", wanted), ("think", think)) if value is not None}
    path, body = write_request(requested(chat(sent)), model="m")
    assert path == "/api/chat"
    assert body == {**sent, "stream": True, "truncate": False}


def test_what_anthropics_conversations_have_besides_is_carried_or_refused() -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": ""}, **mark}
    thought = {"type": "thinking", "thinking": "t", "signature": "s"}
    messages = [
        ChatMessage(role="user", content=[{"type": "text", "text": "u", **mark}]),
        ChatMessage(role="assistant", content=[thought, {"type": "text", "text": "a"}], tool_calls=[call]),
        ChatMessage(role="tool", content=[{"type": "text", "text": "no file", "is_error": True}], tool_call_id="c"),
        ChatMessage(role="tool", content=[{"type": "text", "text": "Error 5", "is_error": True}], tool_call_id="c"),
    ]
    tools = [{"type": "function", "function": {"name": "f", "strict": False}, **mark}]
    _, body = write_request(LLMRequest(messages=messages, tools=tools), model="m")
    user, assistant, failed, told = body["messages"]
    assert user == {"role": "user", "content": "u"}
    assert (assistant["content"], assistant["thinking"]) == ("a", "t")
    assert assistant["tool_calls"] == [{"id": "c", "function": {"name": "f", "arguments": {}}}]
    assert (failed["content"], told["content"]) == ("Error: no file", "Error 5")
    assert body["tools"] == [{"type": "function", "function": {"name": "f"}}]
    for kind in ("redacted_thinking", "document", "search_result"):
        with pytest.raises(UnsupportedError, match=kind) as refusal:
            write_request(LLMRequest(messages=[ChatMessage(role="user", content=[{"type": kind}])]), model="m")
        assert refusal.value.param == "messages[0].content[0].type"


def test_a_prompt_that_passes_through_says_the_same() -> None:
    path, body = write_request(requested(generate({"raw": True, "options": {"top_k": 3}})), model="m")
    assert (path, body["prompt"], body["raw"], body["options"]) == ("/api/generate", "p", True, {"top_k": 3})
    _, body = write_request(requested(generate({"suffix": "s"})), model="m")
    assert (body["prompt"], body["suffix"]) == ("p", "s")


def test_results_without_ids_belong_to_the_next_open_call_of_their_tool() -> None:
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("a", "b", "a")]
    results = [{"role": "tool", "content": str(i), "tool_name": name} for i, name in enumerate(("b", "a", "a"))]
    request = requested(chat({"messages": [*USER, {"role": "assistant", "tool_calls": calls}, *results]}))
    assert request.messages is not None
    assert [turn.tool_call_id for turn in request.messages[2:]] == ["call_1_1", "call_1_0", "call_1_2"]
    _, body = write_request(request, model="m")
    assert [message["tool_name"] for message in body["messages"][2:]] == ["b", "a", "a"]
    alone = requested(chat({"messages": [{"role": "tool", "content": "x", "tool_name": "a"}]}))
    assert alone.messages is not None
    assert (alone.messages[0].tool_call_id, alone.messages[0].name) == (None, "a")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"context": [1, 2]}, "context"),
        ({"template": "{{ .System }} {{ .Prompt }}"}, "template"),
        ({"template": "{{ .Prompt }}", "system": "s"}, "system"),
        ({"raw": True, "system": "s"}, "system"),
        ({"raw": True, "template": "{{ .Prompt }}"}, "template"),
        ({"raw": True, "images": [PNG]}, "images"),
        ({"raw": True, "suffix": "s"}, "suffix"),
        ({"images": ["no base64!"]}, "images[0]"),
        ({"images": [base64.b64encode(b"%PDF-1.4").decode()]}, "images[0]"),
        ({"format": "xml"}, "format"),
        ({"think": "very"}, "think"),
        ({"keep_alive": "5"}, "keep_alive"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
        ({"prompt": 5}, "prompt"),
    ],
)
def test_what_a_prompt_cannot_have_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        generate(fields)
    assert refusal.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user", "content": "x", "colour": "red"}]}, "messages[0]"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
         "messages[0].tool_calls[0].function.arguments"),
        ({"messages": [{"role": "user", "content": "x", "images": ["?"]}]}, "messages[0].images[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ],
)  # fmt: skip
def test_what_a_chat_cannot_have_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        chat(fields)
    assert refusal.value.param == param


def test_an_image_of_each_kind_is_known_by_its_first_bytes() -> None:
    kinds = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff\xe0", "gif": b"GIF89a", "webp": b"RIFF\0\0\0\0WEBP", "bmp": b"BM"}  # fmt: skip  # noqa: E501
    for kind, begin in kinds.items():
        image = base64.b64encode(begin + bytes(20)).decode()
        for sent in (image, f"data:image/{kind};base64,{image}"):
            request = requested(generate({"images": [sent]}))
            assert request.messages is not None
            content = request.messages[0].content
            assert isinstance(content, list)
            assert content[0]["image_url"]["url"] == f"data:image/{kind};base64,{image}"


def test_a_template_that_is_the_prompt_itself_makes_it_raw() -> None:
    assert requested(generate({"template": " {{- .Prompt -}} "})).prompt == "p"


def test_hints_are_kept_apart_and_unknown_fields_go_to_the_provider() -> None:
    call = chat({"options": {"num_ctx": 8192, "new_option": 1}, "keep_alive": "1h", "truncate": False, "new_field": 2})
    hints = {"num_ctx": 8192, "keep_alive": "1h", "truncate": False, "options": {"new_option": 1}}
    assert call.hints.for_ollama() == hints
    assert requested(call).extra_body == {"new_field": 2}


def test_an_empty_prompt_asks_for_a_load_only() -> None:
    for call in (generate({"prompt": ""}), generate({"prompt": None}), chat({"messages": []})):
        assert call.request is None
        assert not call.hints.unloads
    assert generate({"prompt": "", "keep_alive": "0s"}).hints.unloads


def test_embeddings_take_a_text_or_several_under_either_name() -> None:
    def inputs(**fields: Any) -> list[Any] | None:
        request = read_embed(json.dumps({"model": "m"} | fields).encode(), request_id="r", tenant="t").request
        return None if request is None else request.inputs

    assert inputs(input="a") == inputs(prompt="a") == ["a"]
    assert inputs(input=["a", "b"]) == ["a", "b"]
    assert inputs() is inputs(input="") is inputs(input=[]) is None
    with pytest.raises(UnsupportedError, match=r"options\.temperature"):
        inputs(input="a", options={"temperature": 1})


def test_a_model_is_named_under_its_older_name_too() -> None:
    assert read_model(b'{"model": "a:latest"}') == read_model(b'{"name": "a"}') == "a"
    with pytest.raises(InvalidRequestError, match="model"):
        read_model(b"{}")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(0, 0), ("0", 0), ("0s", 0), (300, 300), ("5m", 300), ("1h30m", 5400), ("1.5h", 5400), ("300ms", 0.3),
     (-1, math.inf), ("-1m", math.inf), ("-1s", math.inf)],
)  # fmt: skip
def test_durations_are_read_as_go_writes_them(value: str | float, seconds: float) -> None:
    assert parse_duration(value) == pytest.approx(seconds)


@pytest.mark.parametrize("value", ["", "5", "m", "5 m", "1h-30m", "5x", "infinity"])
def test_what_is_no_duration_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequestError, match="keep_alive"):
        parse_duration(value)
