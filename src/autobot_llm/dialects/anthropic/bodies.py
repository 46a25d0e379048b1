"""Read Anthropic request bodies into `LLMRequest`s. Knows the wire's fields; knows nothing of connections or providers.

A field that `LLMRequest` has no place for travels in `extra_body`, where the provider honours or refuses it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from autobot_llm.dialects.anthropic.blocks import mark_last_block
from autobot_llm.dialects.anthropic.conversation import read_conversation
from autobot_llm.dialects.bodies import convert, read_object
from autobot_llm.errors import InvalidRequestError, UnsupportedError
from autobot_llm.types import LLMRequest

API_VERSIONS = ("2023-06-01", "2026-10-21")
# Anthropic's own tools that the caller runs: their calls come as those of any other tool. They travel as they are.
CLIENT_TOOLS = ("bash_", "memory_", "text_editor_")

# Fields of a tool that change no answer: they travel beside its function, for Anthropic alone.
TOOL_NOTES = ("cache_control", "eager_input_streaming")

_TOOL_FIELDS = frozenset({"type", "name", "description", "input_schema", "strict", *TOOL_NOTES})


class Turn(msgspec.Struct):
    role: str
    content: str | list[dict[str, Any]]


class CountBody(msgspec.Struct, kw_only=True):
    """What `POST /v1/messages/count_tokens` takes, which is all that becomes part of the prompt."""

    messages: list[Turn]
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


class MessagesBody(CountBody, kw_only=True):
    max_tokens: int
    metadata: dict[str, Any] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    # Gone from API version 2026-10-21. Other providers have them, so they are taken under every version.
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


def read_messages(data: bytes, *, request_id: str, tenant: str) -> LLMRequest:
    """Read the body of `POST /v1/messages`. Errors: `InvalidRequestError` with the field in `param`."""
    fields = read_object(data)
    body = convert(fields, MessagesBody)
    user_id = (body.metadata or {}).get("user_id")
    return LLMRequest(
        **_shared(fields, body),
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        stop=body.stop_sequences or [],
        stream=bool(body.stream),
        metadata={} if user_id is None else {"user_id": user_id},
        request_id=request_id,
        tenant=tenant,
    )


def read_count(data: bytes, *, request_id: str, tenant: str) -> LLMRequest:
    """Read the body of `POST /v1/messages/count_tokens`. Errors: `InvalidRequestError` with the field in `param`."""
    fields = read_object(data)
    return LLMRequest(**_shared(fields, convert(fields, CountBody)), request_id=request_id, tenant=tenant)


def check_version(version: str | None) -> None:
    """Refuse a value of the header `anthropic-version` whose rules are not known here."""
    if version is not None and version not in API_VERSIONS:
        raise InvalidRequestError(
            f"anthropic-version: {version!r}: expected {' or '.join(API_VERSIONS)}", param="anthropic-version"
        )


def _shared(fields: dict[str, Any], body: CountBody) -> dict[str, Any]:
    messages = read_conversation(body.system, [(turn.role, turn.content) for turn in body.messages])
    if body.cache_control is not None:
        mark_last_block(messages, body.cache_control)
    extra = {name: value for name, value in fields.items() if name not in body.__struct_fields__ and value is not None}
    options: dict[str, Any] = {"messages": messages, "model": body.model, "extra_body": extra}
    if body.tools:
        options["tools"] = [_tool(f"tools[{i}]", tool) for i, tool in enumerate(body.tools)]
    if body.tool_choice is not None:
        options["tool_choice"] = _tool_choice(body.tool_choice, extra)
    if body.output_config is not None:
        options["response_format"] = _response_format(body.output_config, extra)
    return options


def _tool(place: str, tool: dict[str, Any]) -> dict[str, Any]:
    kind = tool.get("type") or "custom"
    if kind != "custom":
        if not isinstance(kind, str) or not kind.startswith(CLIENT_TOOLS):
            raise UnsupportedError(
                f"{place}.type: {kind!r} runs on Anthropic's servers; expected custom, or one of the caller's own: "
                f"{', '.join(prefix + 'VERSION' for prefix in CLIENT_TOOLS)}",
                param=f"{place}.type",
            )
        return tool
    for name in tool.keys() - _TOOL_FIELDS:
        if tool[name] is not None:
            raise UnsupportedError(f"{place}.{name}: this field is not supported", param=f"{place}.{name}")
    if not isinstance(tool.get("name"), str):
        raise InvalidRequestError(f"{place}.name: expected a text", param=f"{place}.name")
    if not isinstance(tool.get("input_schema"), dict):
        raise InvalidRequestError(f"{place}.input_schema: expected a JSON schema", param=f"{place}.input_schema")
    function = {"name": tool["name"], "parameters": tool["input_schema"]}
    function |= {name: tool[name] for name in ("description", "strict") if tool.get(name) is not None}
    notes = {name: tool[name] for name in TOOL_NOTES if tool.get(name) is not None}
    return {"type": "function", "function": function, **notes}


def _tool_choice(choice: dict[str, Any], extra: dict[str, Any]) -> str | dict[str, Any]:
    if choice.get("disable_parallel_tool_use"):
        extra["parallel_tool_calls"] = False
    match choice.get("type"):
        case "auto" | "none" as same:
            return str(same)
        case "any":
            return "required"
        case "tool" if isinstance(choice.get("name"), str):
            return {"type": "function", "function": {"name": choice["name"]}}
        case "tool":
            raise InvalidRequestError("tool_choice.name: this field is required", param="tool_choice.name")
        case other:
            raise InvalidRequestError(
                f"tool_choice.type: {other!r}: expected auto, any, tool or none", param="tool_choice.type"
            )


def _response_format(config: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any] | None:
    """`effort` gets the name that OpenAI gave it, which more providers know; what else there is travels as it is."""
    rest = {name: value for name, value in config.items() if name not in ("effort", "format") and value is not None}
    if rest:
        extra["output_config"] = rest
    if config.get("effort") is not None:
        extra["reasoning_effort"] = config["effort"]
    wanted = config.get("format")
    if wanted is None:
        return None
    if (
        not isinstance(wanted, dict)
        or wanted.get("type") != "json_schema"
        or not isinstance(wanted.get("schema"), dict)
    ):
        raise InvalidRequestError(
            "output_config.format: expected an object with type json_schema and a schema", param="output_config.format"
        )
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted["schema"], "strict": True}}
