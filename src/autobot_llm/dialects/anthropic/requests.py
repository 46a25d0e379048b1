"""Write an `LLMRequest` as the body of `POST /v1/messages`. Knows both sides' fields; knows nothing of connections.

Format: https://platform.claude.com/docs/en/api/messages/create.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autobot_llm.dialects.anthropic.bodies import API_VERSIONS, CLIENT_TOOLS, TOOL_NOTES
from autobot_llm.dialects.anthropic.models import facts_about
from autobot_llm.dialects.anthropic.turns import write_conversation
from autobot_llm.errors import InvalidRequestError, UnsupportedError
from autobot_llm.types import LLMRequest

SAMPLING_VERSION, NEWEST_VERSION = API_VERSIONS  # the newest version has no sampling fields: they need the older one
# Above this Anthropic's own clients insist on a stream: at 128,000 tokens an hour it takes more than ten minutes.
LONGEST_WHOLE_ANSWER = 21_333
PROMPT_CACHING = "prompt_caching"  # the field of extra_body with which a request opts out of automatic marks

# Fields of `LLMRequest` that Anthropic has no counterpart for, with the values that ask for nothing.
_UNSUPPORTED: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("prompt", (None,)),
    ("min_p", (None, 0)),
    ("min_tokens", (0,)),
    ("stop_token_ids", ([],)),
    ("ignore_eos", (False,)),
    ("seed", (None,)),
    ("presence_penalty", (0,)),
    ("frequency_penalty", (0,)),
    ("repetition_penalty", (None, 1)),
    ("logit_bias", ({},)),
    ("n", (1,)),
    ("logprobs", (None,)),
    ("priority", (0,)),
)
# Sampling fields with the values that leave the choice as it is without the field.
_SAMPLING: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("temperature", (None, 1)),
    ("top_p", (None, 1)),
    ("top_k", (None, 0, -1)),
)
_BETAS = {"context_management": "context-management-2025-06-27", "speed": "fast-mode-2026-02-01"}
_EFFORTS = ("low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True, slots=True)
class MessagesCall:
    """The body, still to be encoded, and the headers that it needs. `max_tokens` not asked for is the model's most."""

    body: dict[str, Any]
    headers: dict[str, str]


def write_request(request: LLMRequest, model: str, *, max_output_tokens: int | None = None) -> MessagesCall:
    """`request` for `model`; `max_output_tokens` is the model's limit, where its provider told it.

    It asks for a stream where `request.stream` does, and where a whole answer might take longer than a connection
    without a sign of life lasts. Errors: UnsupportedError for a field that Anthropic cannot honour,
    InvalidRequestError for one that is malformed.
    """
    max_tokens = request.max_tokens or max_output_tokens or facts_about(model).max_output_tokens
    body: dict[str, Any] = {"model": model, "max_tokens": max_tokens}
    headers = {"anthropic-version": NEWEST_VERSION}
    extra = dict(request.extra_body)
    body |= _prompt(request, model, extra)
    if sampling := _sampling(request):
        body |= sampling
        headers["anthropic-version"] = SAMPLING_VERSION
    if request.stop:
        body["stop_sequences"] = request.stop
    if "user_id" in request.metadata:
        body["metadata"] = {"user_id": request.metadata["user_id"]}
    body["stream"] = request.stream or max_tokens > LONGEST_WHOLE_ANSWER
    _add_extra(body, extra)
    if betas := [beta for field, beta in _BETAS.items() if field in body]:
        headers["anthropic-beta"] = ",".join(betas)
    return MessagesCall(body, headers)


def write_count(request: LLMRequest, model: str) -> MessagesCall:
    """`request`'s prompt as the body of `POST /v1/messages/count_tokens`. Errors: those of `write_request`."""
    extra = dict(request.extra_body)
    body = {"model": model, **_prompt(request, model, extra)}
    _add_extra(body, extra)
    return MessagesCall(body, {"anthropic-version": NEWEST_VERSION})


def _prompt(request: LLMRequest, model: str, extra: dict[str, Any]) -> dict[str, Any]:
    """All that becomes part of the prompt, in the order in which Anthropic caches it; takes what it uses from extra."""
    for field, neutral in _UNSUPPORTED:
        if (value := getattr(request, field)) not in neutral:
            raise UnsupportedError(f"{field}={_shortened(value)}: Anthropic has no such field", param=field)
    assert request.messages is not None, "validation asked for messages or a prompt"
    extra.pop(PROMPT_CACHING, None)
    parallel = extra.pop("parallel_tool_calls", None)
    system, turns = write_conversation(request.messages, system_turns=facts_about(model).takes_system_turns)
    body: dict[str, Any] = {}
    if request.tools:
        body["tools"] = [_tool(f"tools[{i}]", tool) for i, tool in enumerate(request.tools)]
        if (choice := _tool_choice(request.tool_choice, parallel)) is not None:
            body["tool_choice"] = choice
    if system:
        body["system"] = system
    body["messages"] = turns
    return body | _output(request, extra)


def _sampling(request: LLMRequest) -> dict[str, Any]:
    if request.temperature is not None and request.temperature > 1:
        raise UnsupportedError(
            f"temperature={request.temperature:g}: Anthropic's goes from 0 to 1", param="temperature"
        )
    values = ((field, getattr(request, field), neutral) for field, neutral in _SAMPLING)
    return {field: value for field, value, neutral in values if value not in neutral}


def _output(request: LLMRequest, extra: dict[str, Any]) -> dict[str, Any]:
    config = extra.pop("output_config", None) or {}
    if not isinstance(config, dict):
        raise InvalidRequestError("output_config: expected an object", param="output_config")
    config = dict(config)
    body: dict[str, Any] = {}
    match extra.pop("reasoning_effort", None):
        case None:
            pass
        case "none":
            body["thinking"] = {"type": "disabled"}
        case effort if effort in _EFFORTS:
            config["effort"] = effort
        case other:
            raise UnsupportedError(
                f"reasoning_effort={other!r}: Anthropic knows none, {', '.join(_EFFORTS)}", param="reasoning_effort"
            )
    match request.response_format:
        case None | {"type": "text"}:
            pass
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            config["format"] = {"type": "json_schema", "schema": schema}
        case {"type": "json_object"}:
            raise UnsupportedError(
                "response_format.type='json_object': Anthropic needs a schema; expected json_schema",
                param="response_format",
            )
        case _:
            raise InvalidRequestError(
                "response_format.json_schema.schema: this field is required", param="response_format"
            )
    return body | ({"output_config": config} if config else {})


def _tool(place: str, tool: dict[str, Any]) -> dict[str, Any]:
    match tool:
        case {"type": "function", "function": {"name": str(name), **rest}}:
            written = {"name": name, "input_schema": rest.get("parameters") or {"type": "object", "properties": {}}}
            written |= {field: rest[field] for field in ("description", "strict") if rest.get(field)}
            return written | {note: tool[note] for note in TOOL_NOTES if note in tool}
        case {"type": str(kind)} if kind.startswith(CLIENT_TOOLS):
            return tool
    raise UnsupportedError(f"{place}: Anthropic takes tools of type function, with a name", param=place)


def _tool_choice(choice: str | dict[str, Any] | None, parallel: bool | None) -> dict[str, Any] | None:
    match choice:
        case None | "auto":
            written: dict[str, Any] = {"type": "auto"}
        case "none":
            return {"type": "none"}
        case "required":
            written = {"type": "any"}
        case {"type": "function", "function": {"name": str(name)}}:
            written = {"type": "tool", "name": name}
        case _:
            raise UnsupportedError(
                f"tool_choice={choice!r}: Anthropic knows none, auto, required and one function by name",
                param="tool_choice",
            )
    if parallel is False:
        return written | {"disable_parallel_tool_use": True}
    return None if choice is None else written


def _shortened(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _add_extra(body: dict[str, Any], extra: dict[str, Any]) -> None:
    """Fields that only Anthropic knows go as they are: it refuses those that it does not know, by name."""
    for field in extra:
        if field in body:
            raise InvalidRequestError(f"{field}: extra_body contradicts the request's own field", param=field)
    body |= extra
