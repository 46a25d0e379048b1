"""Read OpenAI request bodies into `LLMRequest`s. Knows the wire's fields; knows nothing of connections or providers.

A field that OpenAI or vLLM defines and `LLMRequest` has a place for is checked here for its type and in the interface
for its range. Any other field travels in `extra_body`, where the provider honours or refuses it: none is dropped in
silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from autobot_llm.dialects.bodies import convert, read_object
from autobot_llm.errors import InvalidRequestError, UnsupportedError
from autobot_llm.types import ChatMessage, LLMRequest

DEFAULT_COMPLETION_TOKENS = 16  # what OpenAI's legacy endpoint generates where nothing is said


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against eavesdroppers who measure packets; none is added


class SharedFields(msgspec.Struct, kw_only=True):
    """What both endpoints take: OpenAI's fields, then vLLM's additions to them."""

    model: str | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    max_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    ignore_eos: bool | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    priority: int | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    top_k: int | None = None
    # Notes to OpenAI's own service: passed on to it, and without meaning elsewhere. `user` is no tenant: a client
    # could name anybody.
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    user: str | None = None


class ChatBody(SharedFields, kw_only=True):
    messages: list[ChatMessage]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None


class CompletionBody(SharedFields, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """What one HTTP request asks for: one `LLMRequest` for each prompt, all alike otherwise."""

    requests: tuple[LLMRequest, ...]
    stream: bool
    include_usage: bool

    @property
    def num_choices(self) -> int:
        return sum(request.n for request in self.requests)


# Fields of `LLMRequest` that carry the same name and meaning on the wire.
SAME_NAME = (
    "model",
    "frequency_penalty",
    "logit_bias",
    "n",
    "presence_penalty",
    "seed",
    "temperature",
    "top_p",
    "ignore_eos",
    "min_p",
    "min_tokens",
    "priority",
    "repetition_penalty",
    "stop_token_ids",
    "top_k",
    "metadata",
)
SERVICE_OPTIONS = (
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
_SAME_NAME = frozenset(SAME_NAME)
_SERVICE_OPTIONS = frozenset(SERVICE_OPTIONS)
_CHAT_FIELDS = frozenset(ChatBody.__struct_fields__)
_COMPLETION_FIELDS = frozenset(CompletionBody.__struct_fields__)
MESSAGE_FIELDS = frozenset(ChatMessage.__struct_fields__)
NOTES_ON_MESSAGES = frozenset({"annotations"})  # what OpenAI's client sends back with an answer, for the reader only


def read_chat(data: bytes, *, request_id: str, tenant: str) -> Call:
    """Read the body of `POST /v1/chat/completions`. Errors: `InvalidRequestError` with the field in `param`."""
    fields = read_object(data)
    _rename_message_fields(fields.get("messages"))
    body = convert(fields, ChatBody)
    extra = _extra(fields, _CHAT_FIELDS)
    _refuse_unknown_message_fields(fields["messages"])
    if body.parallel_tool_calls is not None and body.tools:
        extra["parallel_tool_calls"] = body.parallel_tool_calls
    if body.modalities not in (None, ["text"]):
        extra["modalities"] = body.modalities
    options: dict[str, Any] = {
        "messages": body.messages,
        "max_tokens": _max_tokens(body),
        "logprobs": _chat_logprobs(body),
        "tools": body.tools,
        "tool_choice": body.tool_choice,
        "response_format": body.response_format,
    }
    request = LLMRequest(
        **_shared_options(fields, body), **options, request_id=request_id, tenant=tenant, extra_body=extra
    )
    return Call((request,), bool(body.stream), _include_usage(body))


def read_completion(data: bytes, *, request_id: str, tenant: str, max_choices: int) -> Call:
    """Read the body of `POST /v1/completions`; several prompts may ask for `max_choices` choices together.

    Errors: `InvalidRequestError` with the field in `param`.
    """
    fields = read_object(data)
    body = convert(fields, CompletionBody)
    extra = _extra(fields, _COMPLETION_FIELDS)
    if body.echo:
        raise UnsupportedError("echo=true: expected false; the prompt is not repeated in the answer", param="echo")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise UnsupportedError(f"best_of={body.best_of}: expected the value of n, here {body.n or 1}", param="best_of")
    prompts = _prompts(body.prompt)
    num_choices = len(prompts) * (body.n or 1)
    if len(prompts) > 1 and num_choices > max_choices:
        raise InvalidRequestError(
            f"prompt: expected at most {max_choices} choices for several prompts, got {num_choices}", param="prompt"
        )
    options = _shared_options(fields, body) | {
        "max_tokens": DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens,
        "logprobs": body.logprobs,
        "tenant": tenant,
        "extra_body": extra,
    }
    ids = [request_id] if len(prompts) == 1 else [f"{request_id}-{i}" for i in range(len(prompts))]
    requests = tuple(
        LLMRequest(**options, prompt=prompt, request_id=id_) for prompt, id_ in zip(prompts, ids, strict=True)
    )
    return Call(requests, bool(body.stream), _include_usage(body))


def _extra(fields: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    if fields.keys() <= known:
        return {}
    return {name: value for name, value in fields.items() if name not in known and value is not None}


def _rename_message_fields(messages: Any) -> None:
    """What other servers' answers, and OpenAI's refusals, are called when a client sends them back as history."""
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict):
            continue
        if "reasoning" in message:
            message.setdefault("reasoning_content", message.pop("reasoning"))
        if message.get("refusal") is not None and message.get("content") is None:
            message["content"] = message.pop("refusal")


def _refuse_unknown_message_fields(messages: list[dict[str, Any]]) -> None:
    for position, message in enumerate(messages):
        if message.keys() <= MESSAGE_FIELDS:
            continue
        for name in message.keys() - MESSAGE_FIELDS - NOTES_ON_MESSAGES:
            if message[name] is not None:
                param = f"messages[{position}].{name}"
                known = ", ".join(sorted(MESSAGE_FIELDS))
                raise InvalidRequestError(f"{param}: unknown field; expected {known}", param=param)


def _shared_options(fields: Mapping[str, Any], body: SharedFields) -> dict[str, Any]:
    """`body` was made of `fields`, which tell what is worth a look: a request has few of these."""
    options = {name: value for name in fields if name in _SAME_NAME and (value := getattr(body, name)) is not None}
    if not _SERVICE_OPTIONS.isdisjoint(fields):
        options["service_options"] = {
            name: value for name in SERVICE_OPTIONS if (value := getattr(body, name)) is not None
        }
    if body.stop is not None:
        options["stop"] = [body.stop] if isinstance(body.stop, str) else body.stop
    options["stream"] = bool(body.stream)
    return options


def _include_usage(body: SharedFields) -> bool:
    if body.stream_options is None:
        return False
    if not body.stream:
        raise InvalidRequestError("stream_options: only allowed together with stream: true", param="stream_options")
    return bool(body.stream_options.include_usage)


def _max_tokens(body: ChatBody) -> int | None:
    if body.max_completion_tokens is None:
        return body.max_tokens
    if body.max_tokens not in (None, body.max_completion_tokens):
        raise InvalidRequestError(
            f"max_completion_tokens: {body.max_completion_tokens} contradicts max_tokens: {body.max_tokens}; "
            "send one of them",
            param="max_completion_tokens",
        )
    return body.max_completion_tokens


def _chat_logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs: only allowed together with logprobs: true", param="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    texts = [item for item in prompt if isinstance(item, str)]
    token_ids = [item for item in prompt if isinstance(item, int)]
    token_lists = [item for item in prompt if isinstance(item, list)]
    if prompt and len(texts) == len(prompt):
        return [*texts]
    if prompt and len(token_ids) == len(prompt):
        return [token_ids]
    if prompt and len(token_lists) == len(prompt):
        return [*token_lists]
    raise InvalidRequestError(
        "prompt: expected a text, a list of texts, a list of token ids or a list of such lists; not empty, not mixed",
        param="prompt",
    )
