"""Read Anthropic's answers, whole or as an event stream, as events. Knows the wire; knows nothing of connections.

Formats: https://platform.claude.com/docs/en/api/messages/create and
https://platform.claude.com/docs/en/build-with-claude/streaming. Unknown kinds of events are skipped, as Anthropic asks;
an unknown kind of content is an error, since an answer without it is another answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec

from autobot_llm.dialects.anthropic.replies import REDACTED_MARK
from autobot_llm.dialects.error_in_stream import ErrorInStream
from autobot_llm.errors import ProviderError
from autobot_llm.types import (
    ChoiceEnd,
    Event,
    FinishReason,
    ModelInfo,
    ReasoningDelta,
    RefusalDelta,
    Start,
    TextDelta,
    ToolCallDelta,
    Usage,
)

_FINISH_REASONS: dict[str, FinishReason] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
STATUS_OF_ERROR = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "conflict_error": 409,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "timeout_error": 504,
    "overloaded_error": 529,
}
_BLOCK_OF_DELTA = {
    "text_delta": "text",
    "input_json_delta": "tool_use",
    "thinking_delta": "thinking",
    "signature_delta": "thinking",
}


class _OutputDetails(msgspec.Struct):
    thinking_tokens: int = 0


class _Usage(msgspec.Struct):
    input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    output_tokens: int | None = None
    output_tokens_details: _OutputDetails | None = None


class _Block(msgspec.Struct):
    type: str
    text: str = ""
    thinking: str = ""
    signature: str | None = None
    data: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] = msgspec.field(default_factory=dict)


class _StopDetails(msgspec.Struct):
    explanation: str | None = None


class _Delta(msgspec.Struct):
    """Of a block, or of the message."""

    type: str = ""
    text: str = ""
    thinking: str = ""
    signature: str | None = None
    partial_json: str = ""
    stop_reason: str | None = None
    stop_sequence: str | None = None
    stop_details: _StopDetails | None = None


class _Message(msgspec.Struct):
    model: str
    usage: _Usage
    content: list[_Block] = msgspec.field(default_factory=list)
    stop_reason: str | None = None
    stop_sequence: str | None = None
    stop_details: _StopDetails | None = None


class _Error(msgspec.Struct):
    type: str = ""


class _StreamEvent(msgspec.Struct):
    type: str
    index: int = -1
    message: _Message | None = None
    content_block: _Block | None = None
    delta: _Delta | None = None
    usage: _Usage | None = None
    error: _Error | None = None


_EVENT = msgspec.json.Decoder(_StreamEvent)
_MESSAGE = msgspec.json.Decoder(_Message)


class AnswerReader:
    """Turns one answer into events, all but Finish: `usage` has what belongs there once `is_complete` is true."""

    def __init__(self, request_id: str, provider: str) -> None:
        self.is_complete = False
        self._request_id = request_id
        self._provider = provider
        self._usage = _Usage()
        self._calls: dict[int, int] = {}  # index of a block that is a tool call -> the call's position
        self._blocks: dict[int, str] = {}  # index of a block that has begun -> its type
        self._calls_with_input: set[int] = set()
        self._has_started = False
        self._has_ended = False

    @property
    def usage(self) -> Usage:
        """Anthropic counts the cached parts of the prompt apart; here they are within `prompt_tokens`."""
        usage = self._usage
        cached, written = usage.cache_read_input_tokens or 0, usage.cache_creation_input_tokens or 0
        return Usage(
            prompt_tokens=(usage.input_tokens or 0) + cached + written,
            completion_tokens=usage.output_tokens or 0,
            cached_tokens=cached,
            cache_write_tokens=written,
            reasoning_tokens=usage.output_tokens_details.thinking_tokens if usage.output_tokens_details else 0,
        )

    def read_event(self, data: bytes) -> Sequence[Event]:
        """The events in one server-sent event's data. Errors: ErrorInStream; ProviderError where it makes no sense."""
        try:
            event = _EVENT.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            if _is_of_unknown_kind(data):
                return ()
            raise self._nonsense(f"an event that is not Anthropic's ({exc})", data) from exc
        if event.type == "error":
            kind = event.error.type if event.error else ""
            raise ErrorInStream(STATUS_OF_ERROR.get(kind, 500), data)
        handler = _HANDLERS.get(event.type)
        return () if handler is None else handler(self, event, data)

    def read_message(self, data: bytes) -> Sequence[Event]:
        """The events of a whole message. Errors: ProviderError for anything else."""
        try:
            message = _MESSAGE.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            raise self._nonsense(f"an answer that is not a message ({exc})", data) from exc
        events = [self._start(message)]
        for index, block in enumerate(message.content):
            events += self._begin(index, block, data)
            events += self._end_block(index)
        events += self._end(message, data)
        self.is_complete = True
        return events

    # One handler for each kind of event

    def _on_message_start(self, event: _StreamEvent, data: bytes) -> Sequence[Event]:
        if event.message is None or self._has_started:
            raise self._nonsense("a message_start without its message, or twice", data)
        return (self._start(event.message),)

    def _on_block_start(self, event: _StreamEvent, data: bytes) -> Sequence[Event]:
        if event.content_block is None or event.index in self._blocks or not self._has_started:
            raise self._nonsense("a content_block_start without its block, twice or too early", data)
        return self._begin(event.index, event.content_block, data)

    def _on_block_delta(self, event: _StreamEvent, data: bytes) -> Sequence[Event]:
        kind, delta = self._blocks.get(event.index), event.delta
        if delta is None or kind is None or _BLOCK_OF_DELTA.get(delta.type) != kind:
            raise self._nonsense(f"a delta that does not fit its block of type {kind!r}", data)
        if kind == "text":
            return (TextDelta(delta.text),)
        if kind == "thinking":
            return (ReasoningDelta(delta.thinking, signature=delta.signature),)
        if not delta.partial_json:
            return ()
        self._calls_with_input.add(event.index)
        return (ToolCallDelta(position=self._calls[event.index], arguments=delta.partial_json),)

    def _on_block_stop(self, event: _StreamEvent, data: bytes) -> Sequence[Event]:
        return self._end_block(event.index)

    def _on_message_delta(self, event: _StreamEvent, data: bytes) -> Sequence[Event]:
        if event.usage is not None:
            self._count(event.usage)
        if event.delta is None or event.delta.stop_reason is None:
            return ()
        return self._end(event.delta, data)

    def _on_message_stop(self, event: _StreamEvent, data: bytes) -> Sequence[Event]:
        if not self._has_ended:
            raise self._nonsense("a message_stop before the message's stop_reason", data)
        self.is_complete = True
        return ()

    # What both forms of an answer share

    def _start(self, message: _Message) -> Event:
        self._has_started = True
        self._count(message.usage)
        return Start(request_id=self._request_id, model=message.model, provider=self._provider)

    def _begin(self, index: int, block: _Block, data: bytes) -> Sequence[Event]:
        """The events of a block's beginning, which in a stream is empty as a rule, and in a whole message all of it."""
        self._blocks[index] = block.type
        match block.type:
            case "text":
                return (TextDelta(block.text),) if block.text else ()
            case "thinking":
                is_empty = not block.thinking and not block.signature
                return () if is_empty else (ReasoningDelta(block.thinking, signature=block.signature or None),)
            case "redacted_thinking":
                return (ReasoningDelta("", signature=REDACTED_MARK + block.data),)
            case "tool_use":
                self._calls[index] = position = len(self._calls)
                arguments = msgspec.json.encode(block.input).decode() if block.input else ""
                if arguments:
                    self._calls_with_input.add(index)
                return (ToolCallDelta(position=position, call_id=block.id, name=block.name, arguments=arguments),)
        raise self._nonsense(f"content of type {block.type!r}, which has no place here", data)

    def _end_block(self, index: int) -> Sequence[Event]:
        """A call without arguments has an empty object as its arguments, and no delta ever says so."""
        if index not in self._calls or index in self._calls_with_input:
            return ()
        self._calls_with_input.add(index)
        return (ToolCallDelta(position=self._calls[index], arguments="{}"),)

    def _end(self, ending: _Delta | _Message, data: bytes) -> Sequence[Event]:
        reason = _FINISH_REASONS.get(ending.stop_reason or "")
        if reason is None or self._has_ended or not self._has_started:
            raise self._nonsense(f"stop_reason {ending.stop_reason!r}, which has no place here", data)
        self._has_ended = True
        end = ChoiceEnd(finish_reason=reason, stop_sequence=ending.stop_sequence)
        if ending.stop_details is not None and ending.stop_details.explanation:
            return (RefusalDelta(ending.stop_details.explanation), end)
        return (end,)

    def _count(self, usage: _Usage) -> None:
        """Counts are totals, so a later one replaces an earlier one; those left out stay."""
        for field in usage.__struct_fields__:
            if (value := getattr(usage, field)) is not None:
                setattr(self._usage, field, value)

    def _nonsense(self, what: str, data: bytes) -> ProviderError:
        shown = data[:200].decode("utf-8", "replace")
        return ProviderError(f"{self._provider} sent {what}: {shown}", code="malformed_answer")


_HANDLERS = {
    "message_start": AnswerReader._on_message_start,
    "content_block_start": AnswerReader._on_block_start,
    "content_block_delta": AnswerReader._on_block_delta,
    "content_block_stop": AnswerReader._on_block_stop,
    "message_delta": AnswerReader._on_message_delta,
    "message_stop": AnswerReader._on_message_stop,
}


class _Kind(msgspec.Struct):
    type: str


def _is_of_unknown_kind(data: bytes) -> bool:
    """Whether it may have fields of any shape, having a type that is not known here."""
    try:
        kind = msgspec.json.decode(data, type=_Kind).type
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return kind not in _HANDLERS and kind != "error"


class _Model(msgspec.Struct):
    id: str
    created_at: str = ""
    max_input_tokens: int | None = None
    max_tokens: int | None = None


class ModelsPage(msgspec.Struct):
    """One page of `GET /v1/models`; `last_id` asks for the next one where there are more."""

    data: list[_Model]
    has_more: bool = False
    last_id: str | None = None

    def infos(self, provider: str) -> list[ModelInfo]:
        return [
            ModelInfo(
                id=model.id,
                provider=provider,
                context_length=model.max_input_tokens,
                created=_seconds(model.created_at),
            )
            for model in self.data
        ]

    def output_limits(self) -> dict[str, int]:
        """The most tokens of one answer, by model, where Anthropic tells."""
        return {model.id: model.max_tokens for model in self.data if model.max_tokens}


def _seconds(moment: str) -> int:
    """RFC 3339 as seconds since 1970; 0 where it is missing or something else."""
    try:
        return int(datetime.fromisoformat(moment).timestamp())
    except ValueError:
        return 0
