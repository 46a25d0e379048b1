"""Write an answer as lines of JSON while it grows. Knows Ollama's lines; knows nothing of connections."""

from __future__ import annotations

import time
from typing import Protocol

from autobot_llm.dialects.bodies import encode, one_line
from autobot_llm.dialects.ollama.replies import ending, logprobs, now, tool_calls
from autobot_llm.types import (
    ChoiceEnd,
    Event,
    Finish,
    FinishReason,
    ReasoningDelta,
    RefusalDelta,
    Start,
    TextDelta,
    ToolCall,
    ToolCallDelta,
)

CONTENT_TYPE = b"application/x-ndjson"


class _Shape(Protocol):
    """How an endpoint's line carries a piece of text, of thought, and whole calls."""

    def text(self, text: bytes) -> bytes: ...

    def thinking(self, text: bytes) -> bytes: ...

    def calls(self, calls: bytes) -> bytes: ...


class _ChatShape:
    def text(self, text: bytes) -> bytes:
        return b'"message":{"role":"assistant","content":' + text + b"}"

    def thinking(self, text: bytes) -> bytes:
        return b'"message":{"role":"assistant","content":"","thinking":' + text + b"}"

    def calls(self, calls: bytes) -> bytes:
        return b'"message":{"role":"assistant","content":"","tool_calls":' + calls + b"}"


class _GenerateShape:
    def text(self, text: bytes) -> bytes:
        return b'"response":' + text

    def thinking(self, text: bytes) -> bytes:
        return b'"response":"","thinking":' + text

    def calls(self, calls: bytes) -> bytes:
        return b'"response":"","tool_calls":' + calls


class _Lines:
    """The lines of one answer. A call's pieces are gathered, because a line carries calls whole."""

    content_type = CONTENT_TYPE
    _shape: _Shape

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._head = b""
        self._calls: dict[int, list[ToolCallDelta]] = {}
        self._reason: FinishReason = "stop"

    def encode(self, event: Event) -> bytes:
        """Bytes for the wire; `b""` where an event has none."""
        if isinstance(event, TextDelta):
            return self._text(event)
        if isinstance(event, ReasoningDelta):
            return self._line(self._shape.thinking(encode(event.text))) if event.text else b""
        if isinstance(event, RefusalDelta):
            return self._line(self._shape.text(encode(event.text)))
        if isinstance(event, ToolCallDelta):
            self._calls.setdefault(event.position, []).append(event)
            return b""
        if isinstance(event, ChoiceEnd):
            self._reason = event.finish_reason
            return self._gathered_calls(event.finish_reason)
        if isinstance(event, Start):
            self._head = one_line(b'{"model":' + encode(event.model) + b',"created_at":"')
            return b""
        return self._finish(event)

    def _text(self, event: TextDelta) -> bytes:
        piece = self._shape.text(encode(event.text))
        if event.logprobs:
            return self._line(piece + b',"logprobs":' + encode(logprobs(event.logprobs)))
        return self._line(piece) if event.text else b""

    def _line(self, piece: bytes) -> bytes:
        return self._head + now().encode() + b'",' + one_line(piece) + b',"done":false}\n'

    def _gathered_calls(self, reason: FinishReason) -> bytes:
        if not self._calls:
            return b""
        calls = tool_calls([_joined(pieces) for _, pieces in sorted(self._calls.items())], reason)
        return self._line(self._shape.calls(encode(calls))) if calls else b""

    def _finish(self, finish: Finish) -> bytes:
        fields = ending(self._reason, finish.usage, finish.timings, time.perf_counter() - self._began)
        fields["autobot"] = {"timings": finish.timings, "optimizations": finish.optimizations}
        rest = one_line(encode(fields))[1:]
        return self._head + now().encode() + b'",' + self._shape.text(b'""') + b"," + rest + b"\n"


def _joined(pieces: list[ToolCallDelta]) -> ToolCall:
    return ToolCall(
        id=next((piece.call_id for piece in pieces if piece.call_id), ""),
        name=next((piece.name for piece in pieces if piece.name), ""),
        arguments="".join(piece.arguments for piece in pieces),
    )


class ChatLines(_Lines):
    """The stream of `/api/chat`."""

    _shape = _ChatShape()


class GenerateLines(_Lines):
    """The stream of `/api/generate`."""

    _shape = _GenerateShape()
