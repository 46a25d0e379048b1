"""Write requests to a server that speaks OpenAI's language. Knows which server takes which field; knows no connection.

Format: https://platform.openai.com/docs/api-reference (chat, completions, embeddings). Three flavours of server speak
it: OpenAI's own, Azure's, and the compatible ones, which take vLLM's additions (top_k, min_p, ...).
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from autobot_llm.dialects.bodies import encode
from autobot_llm.dialects.plain import plain_messages, plain_tools
from autobot_llm.errors import InvalidRequestError, UnsupportedError
from autobot_llm.types import ChatMessage, EmbeddingRequest, LLMRequest, MergedRequest

CHAT = "/chat/completions"
COMPLETIONS = "/completions"
EMBEDDINGS = "/embeddings"

_ADDITIONS = (
    "top_k",
    "min_p",
    "min_tokens",
    "stop_token_ids",
    "ignore_eos",
    "repetition_penalty",
    "priority",
)


class Flavour(msgspec.Struct, frozen=True, kw_only=True):
    """What tells the servers of one kind from the others.

    `token_limit` is the field for `max_tokens`: OpenAI's reasoning models take the newer name only, and many
    compatible servers the older one only. `takes_reasoning` says whether a past turn's reasoning may be sent back.
    """

    name: str
    token_limit: str
    takes_additions: bool
    takes_reasoning: bool
    takes_developer: bool
    takes_cache_key: bool


OPENAI = Flavour(
    name="OpenAI",
    token_limit="max_completion_tokens",
    takes_additions=False,
    takes_reasoning=False,
    takes_developer=True,
    takes_cache_key=True,
)
AZURE = Flavour(
    name="Azure OpenAI",
    token_limit="max_completion_tokens",
    takes_additions=False,
    takes_reasoning=False,
    takes_developer=True,
    takes_cache_key=False,
)
COMPATIBLE = Flavour(
    name="a compatible server",
    token_limit="max_tokens",
    takes_additions=True,
    takes_reasoning=True,
    takes_developer=False,
    takes_cache_key=False,
)

_SAME_NAME = ("temperature", "top_p", "seed")
_WITH_DEFAULT = ("presence_penalty", "frequency_penalty", "stop")
_RESERVED = frozenset({"model", "messages", "prompt", "input", "stream", "stream_options"})


def write_chat(request: LLMRequest, model: str, flavour: Flavour) -> bytes:
    """The body of `POST /chat/completions`. Raises UnsupportedError and InvalidRequestError with the field."""
    assert request.messages is not None, "a request without messages goes to /completions"
    body: dict[str, Any] = {"model": model, "messages": _messages(request.messages, flavour)}
    _add_shared(body, request, flavour)
    if request.max_tokens is not None:
        body[flavour.token_limit] = request.max_tokens
    if request.logprobs is not None:
        body["logprobs"] = True
        if request.logprobs:
            body["top_logprobs"] = request.logprobs
    if request.tools:
        body["tools"] = plain_tools(request.tools)
    if request.tool_choice is not None and (request.tools or request.tool_choice != "none"):
        body["tool_choice"] = request.tool_choice
    if request.response_format is not None:
        body["response_format"] = request.response_format
    if flavour.takes_cache_key and (key := _cache_key(request)) is not None:
        body["prompt_cache_key"] = key  # unless the request has its own, which is added below
    return _finished(body, request)


def write_completion(request: LLMRequest, model: str, flavour: Flavour) -> bytes:
    """The body of `POST /completions`, the older way, for a prompt that goes through no chat template."""
    for field in ("tools", "response_format"):
        value = getattr(request, field)
        if value and not (field == "response_format" and (flavour.takes_additions or value.get("type") == "text")):
            raise UnsupportedError(f"{field}: only with messages; {flavour.name} takes none with a prompt", param=field)
    prompt = request.prompts if isinstance(request, MergedRequest) else request.prompt
    body: dict[str, Any] = {"model": model, "prompt": prompt}
    _add_shared(body, request, flavour)
    if request.max_tokens is not None:
        body["max_tokens"] = request.max_tokens
    if request.logprobs is not None:
        body["logprobs"] = request.logprobs
    if request.response_format is not None and flavour.takes_additions:
        body["response_format"] = request.response_format
    return _finished(body, request)


def write_embedding(request: EmbeddingRequest, model: str) -> bytes:
    """The body of `POST /embeddings`. The vectors come as base64: a quarter of the bytes, and no digits to parse."""
    body: dict[str, Any] = {"model": model, "input": request.inputs, "encoding_format": "base64"}
    if request.dimensions is not None:
        body["dimensions"] = request.dimensions
    return _with_extra(body, request.extra_body)


def _add_shared(body: dict[str, Any], request: LLMRequest, flavour: Flavour) -> None:
    for field in _SAME_NAME:
        if (value := getattr(request, field)) is not None:
            body[field] = value
    for field in _WITH_DEFAULT:
        if value := getattr(request, field):
            body[field] = value
    if request.logit_bias:
        # OpenAI's type for a bias is a whole number.
        biases = request.logit_bias.items()
        body["logit_bias"] = {token: int(bias) if bias == int(bias) else bias for token, bias in biases}
    for field in _ADDITIONS:
        if value := getattr(request, field):
            if not flavour.takes_additions:
                raise UnsupportedError(f"{field}={value!r}: {flavour.name} has no such field", param=field)
            body[field] = value
    if request.n != 1:
        body["n"] = request.n
    if request.stream:
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}


def _finished(body: dict[str, Any], request: LLMRequest) -> bytes:
    body |= request.service_options
    # OpenAI takes metadata for what it stores only; elsewhere it is the caller's own note.
    if request.metadata and request.service_options.get("store"):
        body["metadata"] = request.metadata
    return _with_extra(body, request.extra_body)


def _with_extra(body: dict[str, Any], extra: dict[str, Any]) -> bytes:
    if extra:
        for name in extra.keys() & _RESERVED:
            raise InvalidRequestError(f"extra_body.{name}: this field has a place of its own", param=name)
        body |= extra
    return encode(body)


def _messages(messages: list[ChatMessage], flavour: Flavour) -> list[ChatMessage]:
    """The conversation as it is, but for what this flavour of server has another word for, or no place."""
    messages = plain_messages(messages)
    if flavour.takes_developer and flavour.takes_reasoning:
        return messages
    return [_fitting(message, flavour) for message in messages]


def _fitting(message: ChatMessage, flavour: Flavour) -> ChatMessage:
    if message.role == "developer" and not flavour.takes_developer:
        return msgspec.structs.replace(message, role="system")
    if message.reasoning_content is not None and not flavour.takes_reasoning:
        return msgspec.structs.replace(message, reasoning_content=None)
    return message


def _cache_key(request: LLMRequest) -> str | None:
    """One key for all requests that begin alike: OpenAI sends them to the machine that has their prefix cached.

    The beginning is what stays the same from request to request: the tools and the system prompt. The tenant is part
    of it, so that the traffic of one does not push the prefix of another out.
    """
    assert request.messages is not None
    first = request.messages[0]
    if first.role not in ("system", "developer") and not request.tools:
        return None
    beginning = (request.tenant, request.tools, first.content if first.role in ("system", "developer") else None)
    return hashlib.blake2b(encode(beginning), digest_size=12).hexdigest()
