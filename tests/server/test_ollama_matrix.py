"""Every cell of the Ollama tables in docs/dialects.md: what it says is what happens."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from dialect_tables import PROVIDERS, expected_param, table, to_ollama
from server_harness import serving

from autobot_llm.dialects.anthropic.bodies import read_messages
from autobot_llm.dialects.ollama.bodies import read_chat, read_generate
from autobot_llm.dialects.openai import bodies as openai_bodies
from autobot_llm.errors import UnsupportedError
from autobot_llm.interface import LLMInterface
from autobot_llm.providers.native import NativeProvider
from autobot_llm.settings import Settings
from autobot_llm.types import LLMRequest

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(8)).decode()
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
USER = {"role": "user", "content": "Tell me a story about a fox."}

# A client speaks Ollama's dialect

CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
ASKED_OF_OLLAMA: dict[str, dict[str, Any]] = {
    "chat": {"stream": False},
    "stream": {},
    "tools": {"tools": TOOLS},
    "tool results": {"tools": TOOLS, "messages": [USER, CALL, {"role": "tool", "content": "r", "tool_name": "f"}]},
    "JSON object": {"format": "json"},
    "JSON schema": {"format": SCHEMA},
    "images": {"messages": [{**USER, "images": [PNG]}]},
    "usage": {},
    "stop": {"options": {"stop": ["END"]}},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "think": {"think": True},
    "seed": {"options": {"seed": 3}},
    "top_k": {"options": {"top_k": 5}},
    "min_p": {"options": {"min_p": 0.1}},
    "repeat_penalty": {"options": {"repeat_penalty": 1.1}},
    "raw prompt": {"prompt": "Once upon a time", "raw": True},
}
WHERE_ASKED = {"raw prompt": "/api/generate"}


def ollama_body(feature: str) -> dict[str, Any]:
    fields = ASKED_OF_OLLAMA[feature]
    options = {"num_predict": 8} | fields.get("options", {})
    plain = {} if feature in WHERE_ASKED else {"messages": [USER]}
    return {"model": "tiny", **plain, **fields, "options": options}


def asked_in_ollamas_dialect(feature: str) -> LLMRequest:
    read = read_generate if feature in WHERE_ASKED else read_chat
    request = read(json.dumps(ollama_body(feature)).encode(), request_id="r", tenant="").request
    assert request is not None
    return request


ASKED = table("A client speaks Ollama's dialect")


def test_the_page_has_every_feature_and_provider() -> None:
    assert ASKED.keys() == {(feature, provider) for feature in ASKED_OF_OLLAMA for provider in ("native", *PROVIDERS)}


@pytest.mark.parametrize(("feature", "provider"), [cell for cell in ASKED if cell[1] != "native"])
def test_what_a_client_of_ollamas_asks_reaches_the_provider_or_is_refused(feature: str, provider: str) -> None:
    request = asked_in_ollamas_dialect(feature)
    param = expected_param(ASKED[feature, provider])
    if param is None:
        assert PROVIDERS[provider](request)
    else:
        with pytest.raises(UnsupportedError) as refusal:
            PROVIDERS[provider](request)
        assert refusal.value.param == param


async def test_what_a_client_of_ollamas_asks_of_our_own_engine_is_answered_or_refused() -> None:
    settings = Settings(port=0)
    provider = NativeProvider(settings)
    async with serving(settings, LLMInterface(settings, providers={"native": provider}), provider) as server:
        for feature in ASKED_OF_OLLAMA:
            reply = await server.post(WHERE_ASKED.get(feature, "/api/chat"), ollama_body(feature))
            param = expected_param(ASKED[feature, "native"])
            if param is not None:
                assert (feature, reply.status, param in reply.json["error"]) == (feature, 400, True)
                continue
            last = json.loads(reply.body.splitlines()[-1])
            assert (feature, reply.status, last["done"]) == (feature, 200, True)
            assert last["prompt_eval_count"] > 0


# Ollama answers

IMAGE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
OPENAI_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
IN_OPENAIS: dict[str, dict[str, Any]] = {
    "chat": {},
    "stream": {"stream": True},
    "tools": {"tools": TOOLS, "tool_choice": "auto"},
    "tool results": {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]},
                                  {"role": "tool", "content": "r", "tool_call_id": "c"}]},
    "tool_choice required": {"tools": TOOLS, "tool_choice": "required"},
    "JSON object": {"response_format": {"type": "json_object"}},
    "JSON schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    "images": {"messages": [{"role": "user", "content": [IMAGE]}]},
    "image by address": {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}]}]},
    "usage": {"stream": True, "stream_options": {"include_usage": True}},
    "stop": {"stop": "END"},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "reasoning": {"reasoning_effort": "high"},
    "several choices": {"n": 2},
    "logit_bias": {"logit_bias": {"5": 1}},
    "token ids as prompt": {"prompt": [1, 2]},
}  # fmt: skip
TOOL_USE = {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}]}
TOOL_RESULT = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "r"}]}
IN_ANTHROPICS: dict[str, dict[str, Any]] = {
    "chat": {"system": "s"},
    "stream": {"stream": True},
    "tools": {"tools": [{"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {}}}]},
    "tool results": {"messages": [USER, TOOL_USE, TOOL_RESULT]},
    "tool_choice required": {"tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "any"}},
    "JSON schema": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    "images": {"messages": [{"role": "user", "content": [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}]}]},
    "image by address": {"messages": [{"role": "user", "content": [
        {"type": "image", "source": {"type": "url", "url": "https://x.org/a.png"}}]}]},
    "usage": {},
    "stop": {"stop_sequences": ["END"]},
    "reasoning": {"thinking": {"type": "adaptive"}},
}  # fmt: skip


def asked_in_openais_dialect(feature: str) -> LLMRequest:
    fields = IN_OPENAIS[feature]
    if "prompt" in fields:
        data = json.dumps({"model": "m", **fields}).encode()
        return openai_bodies.read_completion(data, request_id="r", tenant="", max_choices=9).requests[0]
    data = json.dumps({"model": "m", "messages": [USER]} | fields).encode()
    return openai_bodies.read_chat(data, request_id="r", tenant="").requests[0]


def asked_in_anthropics_dialect(feature: str) -> LLMRequest:
    data = json.dumps({"model": "m", "messages": [USER], "max_tokens": 9} | IN_ANTHROPICS[feature]).encode()
    return read_messages(data, request_id="r", tenant="")


DIALECTS: dict[str, Callable[[str], LLMRequest]] = {
    "openai": asked_in_openais_dialect,
    "anthropic": asked_in_anthropics_dialect,
    "ollama": lambda feature: asked_in_ollamas_dialect({"reasoning": "think"}.get(feature, feature)),
}
ANSWERED = table("Ollama answers")


def test_the_page_has_every_feature_of_every_dialect() -> None:
    filled = {cell for cell, text in ANSWERED.items() if text}
    asked = {(feature, "openai") for feature in IN_OPENAIS} | {(feature, "anthropic") for feature in IN_ANTHROPICS}
    assert {cell for cell in filled if cell[1] != "ollama"} == asked


@pytest.mark.parametrize(("feature", "dialect"), [cell for cell, text in ANSWERED.items() if text])
def test_what_a_client_asks_is_asked_of_an_ollama_or_refused(feature: str, dialect: str) -> None:
    request = DIALECTS[dialect](feature)
    param = expected_param(ANSWERED[feature, dialect])
    if param is None:
        assert to_ollama(request)
    else:
        with pytest.raises(UnsupportedError) as refusal:
            to_ollama(request)
        assert refusal.value.param == param
