"""Whatever stands in a body's place for a field: it is read, or refused by name, and what was read can be sent on or
is refused by name, too. Never anything else, which would be a status of 500."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from model_folders import TINY

from autobot_llm.dialects.anthropic import bodies as anthropic
from autobot_llm.dialects.anthropic.requests import write_request as write_to_anthropic
from autobot_llm.dialects.ollama import bodies as ollama
from autobot_llm.dialects.ollama.requests import write_request as write_to_ollama
from autobot_llm.dialects.openai import bodies as openai
from autobot_llm.dialects.openai.embeddings import read_embedding_body
from autobot_llm.dialects.openai.requests import COMPATIBLE, OPENAI, write_chat, write_completion
from autobot_llm.dialects.plain import plain_messages, plain_tools
from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.engine.tool_calls.untrained import in_words
from autobot_llm.errors import InvalidRequestError
from autobot_llm.providers.native.answer_shape import answer_shape
from autobot_llm.types import LLMRequest
from autobot_llm.validation import validate_request

Body = dict[str, Any]

# JSON texts: what a decoder or a careless reader may stumble on
HOSTILE = [
    "null", "true", "0", "-1", "1.5", "1e400", "NaN", "9" * 400, "18446744073709551616", '""', '"x"', '"\\u0000"',
    '"\\ud800"', "[]", "{}", "[null]", "[[]]", "[{}]", '[{"type":[]}]', '{"":""}', '{"type":"x"}', '{"type":{}}',
    '{"function":5}', '{"$ref":"#"}', "[" * 100 + "]" * 100, "[" * 100_000 + "]" * 100_000, f'"{"[" * 100_000}"',
]  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
OPENAI_CHAT: Body = {
    "model": "tiny", "max_tokens": 2, "temperature": 0.5, "n": 1, "seed": 1, "stop": ["x"], "logit_bias": {"5": 1},
    "logprobs": True, "top_logprobs": 2, "tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": True,
    "stream": True, "stream_options": {"include_usage": True}, "user": "u", "metadata": {"a": "b"},
    "reasoning_effort": "low", "cache": {"ttl": 1}, "response_format": {"type": "json_schema", "json_schema": {
        "name": "n", "schema": {"type": "object"}}},
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [
            {"type": "text", "text": "Hi"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "auto"}}]},
        {"role": "assistant", "content": "x", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "r"},
    ],
}  # fmt: skip
COMPLETION: Body = {"prompt": [[5, 6], [7]], "max_tokens": 2, "logprobs": 1, "echo": False, "suffix": "s", "stop": "x"}
EMBEDDING: Body = {"model": "m", "input": ["a", [1, 2]], "encoding_format": "float", "dimensions": 8}
ANTHROPIC: Body = {
    "model": "tiny", "max_tokens": 2, "temperature": 0.5, "top_k": 5, "stop_sequences": ["x"],
    "metadata": {"user_id": "u"}, "thinking": {"type": "enabled", "budget_tokens": 1024},
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {}}},
    "cache_control": {"type": "ephemeral"},
    "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
    "tools": [{"type": "custom", "name": "f", "description": "d", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "messages": [
        {"role": "user", "content": [
            {"type": "text", "text": "Hi"},
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}]},
        {"role": "user", "content": [
            {"type": "document", "source": {"type": "url", "url": "https://h/a"}, "citations": {"enabled": False}}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "t", "signature": "s"},
            {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": "b"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "r"}]}]},
    ],
}  # fmt: skip
OLLAMA_CHAT: Body = {
    "model": "tiny", "stream": False, "format": {"type": "object"}, "keep_alive": "5m", "tools": [TOOL], "think": False,
    "options": {"num_predict": 2, "temperature": 0.5, "seed": 1, "stop": ["x"], "num_ctx": 512},
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "Hi", "images": ["iVBORw0KGgo="]},
        {"role": "assistant", "content": "", "thinking": "t", "tool_calls": [{"function": {
            "name": "f", "arguments": {"a": "b"}}}]},
        {"role": "tool", "content": "r", "tool_name": "f"},
    ],
}  # fmt: skip
OLLAMA_GENERATE: Body = {"model": "tiny", "prompt": "Hi", "suffix": "x", "system": "s", "raw": False, "format": "json"}
OLLAMA_EMBED: Body = {"model": "tiny", "input": ["a"], "truncate": True, "dimensions": 8, "keep_alive": 5}

WHO = {"request_id": "r", "tenant": ""}
READERS: dict[str, tuple[Body, Callable[[bytes], Any]]] = {
    "OpenAI chat": (OPENAI_CHAT, functools.partial(openai.read_chat, **WHO)),
    "OpenAI completions": (COMPLETION, functools.partial(openai.read_completion, max_choices=8, **WHO)),
    "OpenAI embeddings": (EMBEDDING, functools.partial(read_embedding_body, **WHO)),
    "Anthropic": (ANTHROPIC, functools.partial(anthropic.read_messages, **WHO)),
    "Anthropic count": ({k: ANTHROPIC[k] for k in ("model", "messages", "system", "tools")},
                        functools.partial(anthropic.read_count, **WHO)),
    "Ollama chat": (OLLAMA_CHAT, functools.partial(ollama.read_chat, **WHO)),
    "Ollama generate": (OLLAMA_GENERATE, functools.partial(ollama.read_generate, **WHO)),
    "Ollama embed": (OLLAMA_EMBED, functools.partial(ollama.read_embed, **WHO)),
}  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def with_text_at(value: Any, path: tuple[Any, ...], text: str) -> str:
    """`value` as JSON, with `text` in the place of what is at `path`."""
    if not path:
        return text
    key, *rest = path
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    items = [(k, with_text_at(item, tuple(rest), text) if k == key else json.dumps(item)) for k, item in pairs]
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{item}" for k, item in items) + "}"
    return "[" + ",".join(item for _, item in items) + "]"


def requests_of(call: Any) -> list[LLMRequest]:
    if isinstance(call, LLMRequest):
        return [call]
    found = getattr(call, "requests", None) or [getattr(call, "request", None)]
    return [request for request in found if isinstance(request, LLMRequest)]


def send_on(request: LLMRequest, tokenizer: Tokenizer) -> None:
    """Have every dialect write the request, and our own engine its prompt."""
    writers: list[Callable[[LLMRequest], object]] = [
        lambda request: write_to_anthropic(request, "m"),
        lambda request: write_to_ollama(request, model="m"),
        *(lambda request, f=f: (write_chat if request.messages else write_completion)(request, "m", f)
          for f in (OPENAI, COMPATIBLE)),
    ]  # fmt: skip
    if request.messages is not None:
        writers.append(lambda request: our_prompt(request, tokenizer))
    bare = LLMRequest(
        messages=request.messages, prompt=request.prompt, tools=request.tools, tool_choice=request.tool_choice
    )
    for one in (request, bare):  # what a provider has no field for it refuses first
        for write in writers:
            try:
                write(one)
            except InvalidRequestError as error:
                assert error.message


def our_prompt(request: LLMRequest, tokenizer: Tokenizer) -> str:
    """As our own engine has it for a model that was not trained for tools."""
    request = msgspec.structs.replace(request, extra_body={}, response_format=None)
    tools = plain_tools(request.tools) or [] if answer_shape(request, tokenizer).tools is not None else []
    return tokenizer.render_chat(in_words(plain_messages(request.messages or []), tools))


@pytest.mark.parametrize("name", READERS)
def test_every_field_takes_or_refuses_whatever_it_is_given(name: str) -> None:
    body, read = READERS[name]
    tokenizer, num_read = Tokenizer.from_folder(TINY), 0
    for path in places(body):
        for text in HOSTILE:
            data = with_text_at(body, path, text).encode()
            try:
                call = read(data)
                for request in requests_of(call):
                    validate_request(request)
            except InvalidRequestError as error:
                assert error.message
                continue
            num_read += 1
            for request in requests_of(call):
                send_on(request, tokenizer)
    assert num_read
