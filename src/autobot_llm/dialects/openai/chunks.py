"""Write an answer as server-sent events while it grows. Knows OpenAI's chunks; knows nothing of connections.

Everything in a chunk but the text is the same for a whole choice, so it is encoded once: a chunk costs one JSON string
and one concatenation.
"""

from __future__ import annotations

from autobot_llm.dialects.bodies import encode, one_line
from autobot_llm.dialects.openai.replies import (
    chat_logprobs,
    completion_logprobs,
    error_body,
    report_fields,
    usage_fields,
)
from autobot_llm.errors import LLMError
from autobot_llm.types import (
    ChoiceEnd,
    Event,
    Finish,
    ReasoningDelta,
    RefusalDelta,
    Start,
    TextDelta,
    ToolCallDelta,
)

CONTENT_TYPE = b"text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"


def error_event(error: LLMError) -> bytes:
    """An error after the stream began: an event of its own, and no `[DONE]` follows."""
    return b"data: " + one_line(error_body(error)) + b"\n\n"


def _json(value: object) -> bytes:
    return one_line(encode(value))


class _Chunks:
    """What both endpoints' chunks share: their frame, the usage chunk and the end."""

    content_type = CONTENT_TYPE
    object_name: str
    id_prefix: str

    def __init__(self, request_id: str, created: int, num_choices: int, include_usage: bool) -> None:
        self._id = self.id_prefix + request_id
        self._created = created
        self._num_choices = num_choices
        self._include_usage = include_usage
        self._frame = b""
        self._heads: list[bytes] = []  # choice index -> everything up to the choice's own fields
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def _open(self, start: Start) -> None:
        frame = {"id": self._id, "object": self.object_name, "created": self._created, "model": start.model}
        self._frame = b"data: " + _json(frame)[:-1]
        self._heads = [self._frame + b',"choices":[{"index":%d,' % index for index in range(self._num_choices)]

    def _finish(self, finish: Finish) -> bytes:
        if not self._include_usage:
            return DONE
        usage = _json(usage_fields(finish.usage))
        report = _json(report_fields(finish.timings, finish.optimizations))
        return self._frame + b',"choices":[],"usage":' + usage + b',"autobot":' + report + b"}\n\n" + DONE


class ChatChunks(_Chunks):
    """`chat.completion.chunk` events: the role, the pieces, the finish reason, the usage if asked for, `[DONE]`."""

    object_name = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def __init__(self, request_id: str, created: int, num_choices: int, include_usage: bool) -> None:
        super().__init__(request_id, created, num_choices, include_usage)
        self._after_text = b'},"logprobs":null,"finish_reason":null}' + self._tail

    def encode(self, event: Event) -> bytes:
        if isinstance(event, TextDelta):
            return self._text(event)
        if isinstance(event, ToolCallDelta):
            delta = b'"delta":{"tool_calls":[' + _json(_tool_call_delta(event)) + b"]"
            return self._heads[event.index] + delta + self._after_text
        if isinstance(event, ReasoningDelta):
            return self._piece(event.index, b"reasoning_content", event.text)
        if isinstance(event, RefusalDelta):
            return self._piece(event.index, b"refusal", event.text)
        if isinstance(event, ChoiceEnd):
            return self._heads[event.index] + b'"delta":{},' + _ending(event) + self._tail
        if isinstance(event, Start):
            self._open(event)
            role = b'"delta":{"role":"assistant","content":"","refusal":null'
            return b"".join(head + role + self._after_text for head in self._heads)
        return self._finish(event)

    def _piece(self, index: int, field: bytes, text: str) -> bytes:
        return self._heads[index] + b'"delta":{"' + field + b'":' + _json(text) + self._after_text if text else b""

    def _text(self, event: TextDelta) -> bytes:
        begin = self._heads[event.index] + b'"delta":{"content":' + _json(event.text)
        if event.logprobs:
            logprobs = _json(chat_logprobs(event.logprobs))
            return begin + b'},"logprobs":' + logprobs + b',"finish_reason":null}' + self._tail
        return begin + self._after_text if event.text else b""


def _ending(event: ChoiceEnd) -> bytes:
    ending = b'"logprobs":null,"finish_reason":"' + event.finish_reason.encode() + b'"'
    if event.stop_sequence is not None:
        ending += b',"stop_reason":' + _json(event.stop_sequence)  # the name vLLM gives it
    return ending + b"}"


def _tool_call_delta(event: ToolCallDelta) -> dict[str, object]:
    function: dict[str, object] = {"arguments": event.arguments}
    piece: dict[str, object] = {"index": event.position, "function": function}
    if event.name is not None:
        function["name"] = event.name
    if event.call_id is not None:
        piece |= {"id": event.call_id, "type": "function"}
    return piece


class CompletionChunks(_Chunks):
    """`text_completion` events: the pieces, the finish reason, the usage if asked for, `[DONE]`."""

    object_name = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self, request_id: str, created: int, num_choices: int, include_usage: bool) -> None:
        super().__init__(request_id, created, num_choices, include_usage)
        self._after_text = b',"logprobs":null,"finish_reason":null}' + self._tail
        self._text_offsets = [0] * num_choices

    def encode(self, event: Event) -> bytes:
        if isinstance(event, TextDelta):
            return self._text(event)
        if isinstance(event, ChoiceEnd):
            return self._heads[event.index] + b'"text":"",' + _ending(event) + self._tail
        if isinstance(event, Finish):
            return self._finish(event)
        if isinstance(event, Start):
            self._open(event)
        # This older format has no place for reasoning or refusals, and no tools to be called.
        return b""

    def _text(self, event: TextDelta) -> bytes:
        begin = self._heads[event.index] + b'"text":' + _json(event.text)
        if event.logprobs:
            offset = self._text_offsets[event.index]
            self._text_offsets[event.index] = offset + sum(len(token.token) for token in event.logprobs)
            logprobs = _json(completion_logprobs(event.logprobs, text_offset=offset))
            return begin + b',"logprobs":' + logprobs + b',"finish_reason":null}' + self._tail
        return begin + self._after_text if event.text else b""
