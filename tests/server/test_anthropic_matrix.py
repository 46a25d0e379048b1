"""Every cell of the Anthropic tables in docs/dialects.md: what it says is what happens."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from dialect_tables import PROVIDERS, expected_param, table, to_anthropic
from server_harness import serving

from autobot_llm.dialects.anthropic.bodies import read_messages
from autobot_llm.dialects.ollama.bodies import read_chat as read_ollama_chat
from autobot_llm.dialects.ollama.bodies import read_generate
from autobot_llm.dialects.openai.bodies import read_chat, read_completion
from autobot_llm.errors import InvalidRequestError
from autobot_llm.interface import LLMInterface
from autobot_llm.providers.native import NativeProvider
from autobot_llm.settings import Settings
from autobot_llm.types import LLMRequest

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(8)).decode()
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
MARK = {"cache_control": {"type": "ephemeral"}}
USER = {"role": "user", "content": "Tell me a story about a fox."}
AS_IT_IS = "as it is"

# A client speaks Anthropic's dialect

TOOL = {"name": "f", "description": "d", "input_schema": SCHEMA}
TOOL_USE = {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"a": True}}]}
TOOL_RESULT = {
    "role": "user",
    "content": [{"type": "tool_result", "tool_use_id": "c", "content": "r", "is_error": True}],
}


def shown(**block: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [block]}]}


def thought(**block: Any) -> dict[str, Any]:
    answer = {"role": "assistant", "content": [block, {"type": "text", "text": "a"}]}
    return {"messages": [USER, answer, USER]}


IN_ANTHROPICS: dict[str, dict[str, Any]] = {
    "chat": {"system": "s"},
    "stream": {"stream": True},
    "tools": {"tools": [TOOL]},
    "tool results": {"tools": [TOOL], "messages": [USER, TOOL_USE, TOOL_RESULT]},
    "tool_choice any": {"tools": [TOOL], "tool_choice": {"type": "any"}},
    "one call at a time": {"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
    "JSON schema": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    "images": shown(type="image", source={"type": "base64", "media_type": "image/png", "data": PNG}),
    "image by address": shown(type="image", source={"type": "url", "url": "https://x.org/a.png"}),
    "documents": shown(type="document", source={"type": "text", "media_type": "text/plain", "data": "x"}),
    "usage": {},
    "stop": {"stop_sequences": ["END"]},
    "temperature, top_p": {"temperature": 0.5, "top_p": 0.9},
    "top_k": {"top_k": 5},
    "thinking": {"thinking": {"type": "adaptive"}},
    "effort": {"output_config": {"effort": "low"}},
    "past thinking": thought(type="thinking", thinking="x", signature="s"),
    "past encrypted thinking": thought(type="redacted_thinking", data="d"),
    "cache marks": {"system": [{"type": "text", "text": "s", **MARK}], "tools": [TOOL | MARK], **MARK},
    "system in the conversation": {"messages": [USER, {"role": "system", "content": "s"}]},
}
ASKED = table("A client speaks Anthropic's dialect")


def anthropic_body(feature: str) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 8, "messages": [USER]} | IN_ANTHROPICS[feature]


def asked_in_anthropics_dialect(feature: str) -> LLMRequest:
    return read_messages(json.dumps(anthropic_body(feature)).encode(), request_id="r", tenant="")


def test_the_page_has_every_feature_and_provider() -> None:
    rows = (*IN_ANTHROPICS, "token counts")
    assert ASKED.keys() == {(feature, provider) for feature in rows for provider in ("native", *PROVIDERS)}


OTHERS = [cell for cell in ASKED if cell[1] != "native" and cell[0] != "token counts"]


@pytest.mark.parametrize(("feature", "provider"), OTHERS)
def test_what_a_client_of_anthropics_asks_reaches_the_provider_or_is_refused(feature: str, provider: str) -> None:
    request = asked_in_anthropics_dialect(feature)
    cell = ASKED[feature, provider]
    if cell == AS_IT_IS:
        field = next(iter(IN_ANTHROPICS[feature]))
        assert PROVIDERS[provider](request)[field] == IN_ANTHROPICS[feature][field]
        return
    param = expected_param(cell)
    if param is None:
        body = PROVIDERS[provider](request)
        assert body
        assert provider == "anthropic" or "cache_control" not in json.dumps(body)
        assert provider != "anthropic" or ("cache_control" in json.dumps(body)) is (feature == "cache marks")
        return
    with pytest.raises(InvalidRequestError) as refusal:
        PROVIDERS[provider](request)
    assert refusal.value.param == param


async def test_what_a_client_of_anthropics_asks_of_our_own_engine_is_answered_or_refused() -> None:
    settings = Settings(port=0)
    provider = NativeProvider(settings)
    async with serving(settings, LLMInterface(settings, providers={"native": provider}), provider) as server:
        for feature in IN_ANTHROPICS:
            reply = await server.post("/v1/messages", anthropic_body(feature))
            param = expected_param(ASKED[feature, "native"])
            if param is not None:
                assert (feature, reply.status, param in reply.json["error"]["message"]) == (feature, 400, True)
            elif feature == "stream":
                assert reply.body.endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')
            else:
                assert (feature, reply.status, reply.json.get("type")) == (feature, 200, "message")
                assert reply.json["usage"]["input_tokens"] + reply.json["usage"]["cache_read_input_tokens"] > 0
        counted = await server.post("/v1/messages/count_tokens", {"model": "tiny", "messages": [USER]})
        assert (expected_param(ASKED["token counts", "native"]), counted.status) == (None, 200)


# Anthropic answers

FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": true}'}}
OLLAMA_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "f", "arguments": {"a": True}}}],
}
IN_OPENAIS: dict[str, dict[str, Any]] = {
    "chat": {},
    "stream": {"stream": True},
    "tools": {"tools": TOOLS, "tool_choice": "auto"},
    "tool results": {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                                  {"role": "tool", "content": "r", "tool_call_id": "c"}]},
    "tool_choice required": {"tools": TOOLS, "tool_choice": "required"},
    "one call at a time": {"tools": TOOLS, "parallel_tool_calls": False},
    "JSON object": {"response_format": {"type": "json_object"}},
    "JSON schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    "images": {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}]}]},
    "image by address": {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}]}]},
    "usage": {"stream": True, "stream_options": {"include_usage": True}},
    "stop": {"stop": "END"},
    "temperature, top_p": {"temperature": 0.5, "top_p": 0.9},
    "temperature above 1": {"temperature": 1.5},
    "top_k": {"top_k": 5},
    "reasoning": {"reasoning_effort": "high"},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "several choices": {"n": 2},
    "seed": {"seed": 3},
    "penalties": {"presence_penalty": 0.5},
    "logit_bias": {"logit_bias": {"5": 1}},
    "min_p": {"min_p": 0.1},
    "raw prompt": {"prompt": "Once upon a time"},
    "names": {"messages": [USER | {"name": "Ann"}]},
}  # fmt: skip
IN_OLLAMAS: dict[str, dict[str, Any]] = {
    "chat": {"stream": False},
    "stream": {},
    "tools": {"tools": TOOLS},
    "tool results": {
        "tools": TOOLS,
        "messages": [USER, OLLAMA_CALL, {"role": "tool", "content": "r", "tool_name": "f"}],
    },
    "JSON object": {"format": "json"},
    "JSON schema": {"format": SCHEMA},
    "images": {"messages": [USER | {"images": [PNG]}]},
    "usage": {},
    "stop": {"options": {"stop": ["END"]}},
    "temperature, top_p": {"options": {"temperature": 0.5, "top_p": 0.9}},
    "temperature above 1": {"options": {"temperature": 1.5}},
    "top_k": {"options": {"top_k": 5}},
    "reasoning": {"think": True},
    "logprobs": {"logprobs": True},
    "seed": {"options": {"seed": 3}},
    "penalties": {"options": {"presence_penalty": 0.5}},
    "min_p": {"options": {"min_p": 0.1}},
    "raw prompt": {"prompt": "Once upon a time", "raw": True},
}


def asked_in_openais_dialect(feature: str) -> LLMRequest:
    fields = IN_OPENAIS[feature]
    if "prompt" in fields:
        data = json.dumps({"model": "m", **fields}).encode()
        return read_completion(data, request_id="r", tenant="", max_choices=9).requests[0]
    data = json.dumps({"model": "m", "messages": [USER]} | fields).encode()
    return read_chat(data, request_id="r", tenant="").requests[0]


def asked_in_ollamas_dialect(feature: str) -> LLMRequest:
    fields = IN_OLLAMAS[feature]
    read = read_generate if "prompt" in fields else read_ollama_chat
    plain = {} if "prompt" in fields else {"messages": [USER]}
    request = read(json.dumps({"model": "m", **plain, **fields}).encode(), request_id="r", tenant="").request
    assert request is not None
    return request


DIALECTS: dict[str, Callable[[str], LLMRequest]] = {
    "openai": asked_in_openais_dialect,
    "ollama": asked_in_ollamas_dialect,
}
ANSWERED = table("Anthropic answers")


def test_the_page_has_every_feature_of_every_dialect() -> None:
    filled = {cell for cell, text in ANSWERED.items() if text}
    assert filled == {(feature, "openai") for feature in IN_OPENAIS} | {(feature, "ollama") for feature in IN_OLLAMAS}


@pytest.mark.parametrize(("feature", "dialect"), [cell for cell, text in ANSWERED.items() if text])
def test_what_a_client_asks_is_asked_of_anthropic_or_refused(feature: str, dialect: str) -> None:
    request = DIALECTS[dialect](feature)
    param = expected_param(ANSWERED[feature, dialect])
    if param is None:
        assert to_anthropic(request)
    else:
        with pytest.raises(InvalidRequestError) as refusal:
            to_anthropic(request)
        assert refusal.value.param == param
