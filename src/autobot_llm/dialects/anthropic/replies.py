"""Write answers in Anthropic's shapes: whole messages, errors, models, counts. Knows the wire; knows no connections."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec

from autobot_llm.dialects.anthropic.blocks import REDACTED, THINKING
from autobot_llm.dialects.bodies import encode, one_line
from autobot_llm.errors import LLMError, ProviderError
from autobot_llm.report import OptimizationOutcome
from autobot_llm.types import (
    ChoiceEnd,
    Event,
    Finish,
    FinishReason,
    ModelInfo,
    ReasoningDelta,
    RefusalDelta,
    Start,
    TextDelta,
    Timings,
    ToolCallDelta,
    Usage,
)

# https://platform.claude.com/docs/en/api/errors; another 4xx is an invalid request, another 5xx an error of the API.
# Anthropic has no 503: a provider that cannot be reached now is for its clients what an overloaded one is.
_ERROR_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_STOP_REASONS: dict[FinishReason, str] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}
# Reasoning without text whose proof begins like this is a block of redacted thinking; the rest is its data.
REDACTED_MARK = REDACTED + ":"


def error_fields(error: LLMError) -> dict[str, object]:
    """The message names the field, since this format has no place of its own for it; `details` carries our code."""
    kind = _ERROR_TYPES.get(error.status) or ("invalid_request_error" if error.status < 500 else "api_error")
    message = error.message
    if error.param is not None and error.param not in message:
        message = f"{error.param}: {message}"
    fields: dict[str, object] = {"type": kind, "message": message}
    if error.code is not None:
        fields["details"] = {"error_code": error.code}
    return {"type": "error", "error": fields}


def error_body(error: LLMError) -> bytes:
    """The JSON of an error, as Anthropic's clients read it."""
    return encode(error_fields(error))


def error_event(error: LLMError) -> bytes:
    """An error after the stream began: an event of its own, and no `message_stop` follows."""
    return b"event: error\ndata: " + one_line(error_body(error)) + b"\n\n"


def usage_fields(usage: Usage) -> dict[str, object]:
    """Anthropic counts apart what OpenAI counts within the prompt: tokens read from the cache and written to it."""
    fields: dict[str, object] = {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens - usage.cache_write_tokens,
        "cache_creation_input_tokens": usage.cache_write_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
    if usage.reasoning_tokens:
        fields["output_tokens_details"] = {"thinking_tokens": usage.reasoning_tokens}
    return fields


def stop_fields(end: ChoiceEnd) -> dict[str, object]:
    if end.finish_reason == "stop" and end.stop_sequence is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": end.stop_sequence}
    return {"stop_reason": _STOP_REASONS[end.finish_reason], "stop_sequence": None}


def report_fields(timings: Timings, optimizations: tuple[OptimizationOutcome, ...]) -> dict[str, object]:
    """What we add to Anthropic's shape, under the key "autobot": times in seconds, and the report."""
    return {"timings": timings, "optimizations": optimizations}


def message_id(request_id: str) -> str:
    return f"msg_{request_id}"


class MessageBuilder:
    """Gathers the events of one answer into a whole message, its blocks in the order in which they came."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._model = ""
        self._blocks: list[dict[str, Any]] = []
        self._arguments: dict[int, tuple[dict[str, Any], list[str]]] = {}
        self._end: ChoiceEnd | None = None

    def add(self, event: Event) -> None:
        """Add an event that is not Finish."""
        match event:
            case TextDelta() | RefusalDelta():
                if event.text:
                    self._grow("text", "text", event.text)
            case ReasoningDelta():
                self._add_reasoning(event)
            case ToolCallDelta():
                self._add_call(event)
            case Start():
                self._model = event.model
            case ChoiceEnd():
                self._end = event

    def body(self, finish: Finish) -> bytes:
        """The body of the reply. Errors: ProviderError for an answer that was not ended, or a call that is no JSON."""
        if self._end is None:
            raise ProviderError("the provider finished the answer without ending it")
        for block, pieces in self._arguments.values():
            block["input"] = _arguments("".join(pieces), block["name"], self._end)
        fields = message_fields(self._request_id, self._model)
        fields |= {"content": self._blocks, **stop_fields(self._end), "usage": usage_fields(finish.usage)}
        fields["autobot"] = report_fields(finish.timings, finish.optimizations)
        return encode(fields)

    def _grow(self, kind: str, field: str, text: str) -> None:
        if not self._blocks or self._blocks[-1]["type"] != kind or self._blocks[-1].get("signature"):
            empty = new_thinking() if kind == THINKING else {"type": kind, field: ""}
            self._blocks.append(empty)
        self._blocks[-1][field] += text

    def _add_reasoning(self, event: ReasoningDelta) -> None:
        if event.signature is not None and event.signature.startswith(REDACTED_MARK):
            self._blocks.append({"type": REDACTED, "data": event.signature.removeprefix(REDACTED_MARK)})
            return
        if event.text or event.signature:
            self._grow(THINKING, "thinking", event.text)
            self._blocks[-1]["signature"] = event.signature or ""

    def _add_call(self, event: ToolCallDelta) -> None:
        if event.position not in self._arguments:
            block = new_call(event)
            self._blocks.append(block)
            self._arguments[event.position] = (block, [])
        self._arguments[event.position][1].append(event.arguments)


def message_fields(request_id: str, model: str) -> dict[str, object]:
    """What a message begins with; the rest is not known before its end."""
    return {"id": message_id(request_id), "type": "message", "role": "assistant", "model": model}


def new_thinking() -> dict[str, Any]:
    return {"type": THINKING, "thinking": "", "signature": ""}


def new_call(event: ToolCallDelta) -> dict[str, Any]:
    if event.call_id is None or event.name is None:
        raise ProviderError("the provider sent a tool call without an id or a name")
    return {"type": "tool_use", "id": event.call_id, "name": event.name, "input": {}}


def _arguments(text: str, name: str, end: ChoiceEnd) -> dict[str, Any]:
    """This format has no place for arguments that are no object. Of a call that max_tokens cut, nothing is kept."""
    try:
        arguments = msgspec.json.decode(text) if text else {}
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError):
        arguments = None
    if isinstance(arguments, dict):
        return arguments
    if end.finish_reason == "length":
        return {}
    raise ProviderError(
        f"the model's arguments for the tool {name!r} are not a JSON object: {text[:200]}", code="malformed_tool_call"
    )


def model_fields(model: ModelInfo) -> dict[str, object]:
    fields: dict[str, object] = {
        "type": "model",
        "id": model.id,
        "display_name": model.id,
        "created_at": datetime.fromtimestamp(model.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
    }
    if model.context_length is not None:
        fields["max_input_tokens"] = model.context_length
    return fields


def model_body(model: ModelInfo) -> bytes:
    return encode(model_fields(model))


def models_body(models: list[ModelInfo]) -> bytes:
    """All models, on one page."""
    data = [model_fields(model) for model in models]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return encode({"data": data, "has_more": False, "first_id": first, "last_id": last})


def count_body(num_tokens: int) -> bytes:
    return encode({"input_tokens": num_tokens})
