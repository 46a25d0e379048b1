"""Write an answer as Anthropic's server-sent events while it grows. Knows the wire; knows nothing of connections.

Format: https://platform.claude.com/docs/en/build-with-claude/streaming. Everything in a delta but its text is the same
for a whole block, so it is encoded once.
"""

from __future__ import annotations

from typing import Any

from autobot_llm.dialects.anthropic.blocks import REDACTED, THINKING
from autobot_llm.dialects.anthropic.replies import (
    REDACTED_MARK,
    message_fields,
    new_call,
    new_thinking,
    report_fields,
    stop_fields,
    usage_fields,
)
from autobot_llm.dialects.bodies import encode, one_line
from autobot_llm.errors import ProviderError
from autobot_llm.types import (
    ChoiceEnd,
    Event,
    Finish,
    ReasoningDelta,
    RefusalDelta,
    Start,
    TextDelta,
    ToolCallDelta,
    Usage,
)

_NO_USAGE = usage_fields(Usage(prompt_tokens=0, completion_tokens=0))


def _event(name: str, fields: dict[str, object]) -> bytes:
    data = one_line(encode({"type": name, **fields}))
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"


class MessageEvents:
    """`message_start`, the blocks one after the other, `message_delta` with reason and usage, `message_stop`.

    How long the prompt is, a provider tells at the end: `message_start` counts zero, and `message_delta`, whose counts
    replace those before, has all of them.
    """

    content_type = b"text/event-stream; charset=utf-8"

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._num_blocks = 0
        self._open: tuple[str, int] | None = None  # the open block: its kind, and a tool call's position
        self._delta_begins: dict[str, bytes] = {}  # type of delta -> what stands before its text in the open block
        self._ended_calls: set[int] = set()
        self._end: ChoiceEnd | None = None

    def encode(self, event: Event) -> bytes:
        """The event's bytes; `b""` where it has none. Errors: ProviderError for events that make no message."""
        match event:
            case TextDelta() | RefusalDelta():
                return self._text(event.text) if event.text else b""
            case ReasoningDelta():
                return self._reasoning(event)
            case ToolCallDelta():
                return self._call(event)
            case Start():
                return self._start(event)
            case ChoiceEnd():
                self._end = event
                return self._close()
            case Finish():
                return self._finish(event)

    def _start(self, event: Start) -> bytes:
        message = message_fields(self._request_id, event.model)
        message |= {"content": [], "stop_reason": None, "stop_sequence": None, "usage": _NO_USAGE}
        return _event("message_start", {"message": message})

    def _text(self, text: str) -> bytes:
        opening = b"" if self._open == ("text", 0) else self._begin(("text", 0), {"type": "text", "text": ""})
        return opening + self._delta("text_delta", "text", text)

    def _reasoning(self, event: ReasoningDelta) -> bytes:
        signature = event.signature
        if signature is not None and signature.startswith(REDACTED_MARK):
            block = {"type": REDACTED, "data": signature.removeprefix(REDACTED_MARK)}
            return self._begin((REDACTED, 0), block) + self._close()
        if not event.text and not signature:
            return b""
        data = b"" if self._open == (THINKING, 0) else self._begin((THINKING, 0), new_thinking())
        if event.text:
            data += self._delta("thinking_delta", "thinking", event.text)
        if signature:  # it covers the block so far, which ends with it
            data += self._delta("signature_delta", "signature", signature) + self._close()
        return data

    def _call(self, event: ToolCallDelta) -> bytes:
        key = ("tool_use", event.position)
        opening = b""
        if self._open != key:
            if event.position in self._ended_calls:
                raise ProviderError(
                    f"the provider went back to tool call {event.position}: in this format calls follow each other"
                )
            opening = self._begin(key, new_call(event))
            self._ended_calls.add(event.position)
        if not event.arguments:
            return opening
        return opening + self._delta("input_json_delta", "partial_json", event.arguments)

    def _begin(self, key: tuple[str, int], block: dict[str, Any]) -> bytes:
        closing = self._close()
        self._open = key
        return closing + _event("content_block_start", {"index": self._num_blocks, "content_block": block})

    def _delta(self, kind: str, field: str, text: str) -> bytes:
        begin = self._delta_begins.get(kind)
        if begin is None:
            begin = (
                b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":'
                % self._num_blocks
            )
            begin += b'{"type":"%b","%b":' % (kind.encode(), field.encode())
            self._delta_begins[kind] = begin
        return begin + one_line(encode(text)) + b"}}\n\n"

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        closing = _event("content_block_stop", {"index": self._num_blocks})
        self._open = None
        self._num_blocks += 1
        self._delta_begins = {}
        return closing

    def _finish(self, finish: Finish) -> bytes:
        if self._end is None:
            raise ProviderError("the provider finished the answer without ending it")
        report = report_fields(finish.timings, finish.optimizations)
        usage = usage_fields(finish.usage)
        ending = _event("message_delta", {"delta": stop_fields(self._end), "usage": usage, "autobot": report})
        return ending + _event("message_stop", {})
