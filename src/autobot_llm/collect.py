"""Make a stream of events one answer. Knows the order events come in; knows nothing of who sends them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from autobot_llm.errors import ProviderError
from autobot_llm.report import RESPONSE_CACHING, SEMANTIC_CACHING
from autobot_llm.types import (
    Choice,
    ChoiceEnd,
    Event,
    Finish,
    FinishReason,
    LLMResponse,
    ReasoningDelta,
    RefusalDelta,
    Start,
    TextDelta,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
)


class _OpenChoice:
    """One of the `n` answers while it grows."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.tool_calls: dict[int, list[ToolCallDelta]] = {}
        self.reasoning: list[str] = []
        self.reasoning_signature: str | None = None
        self.refusal: list[str] = []
        self.finish_reason: FinishReason | None = None
        self.stop_sequence: str | None = None

    def close(self, index: int) -> Choice:
        if self.finish_reason is None:
            raise ProviderError(f"the provider finished the answer without ending choice {index}")
        return Choice(
            index=index,
            content="".join(self.texts),
            finish_reason=self.finish_reason,
            tool_calls=tuple(_joined(self.tool_calls[position]) for position in sorted(self.tool_calls)),
            logprobs=tuple(self.logprobs),
            reasoning="".join(self.reasoning),
            reasoning_signature=self.reasoning_signature,
            refusal="".join(self.refusal),
            stop_sequence=self.stop_sequence,
        )


def _joined(pieces: list[ToolCallDelta]) -> ToolCall:
    call_id = next((piece.call_id for piece in pieces if piece.call_id), None)
    name = next((piece.name for piece in pieces if piece.name), None)
    if call_id is None or name is None:
        raise ProviderError("the provider sent a tool call without an id or a name")
    return ToolCall(id=call_id, name=name, arguments="".join(piece.arguments for piece in pieces))


async def collect(events: AsyncIterator[Event]) -> LLMResponse:
    """Read `events` to the end and return the answer.

    `processing_time` and `time_to_first_token` are measured here, from the call to the end and to the first delta.
    Raises what the stream raises, and ProviderError when it ends without Finish: half an answer is no answer.
    """
    began = time.perf_counter()
    first_delta: float | None = None
    start: Start | None = None
    choices: dict[int, _OpenChoice] = {}
    async for event in events:
        match event:
            case TextDelta():
                first_delta = first_delta or time.perf_counter()
                choice = choices.setdefault(event.index, _OpenChoice())
                choice.texts.append(event.text)
                choice.logprobs.extend(event.logprobs)
            case ToolCallDelta():
                first_delta = first_delta or time.perf_counter()
                pieces = choices.setdefault(event.index, _OpenChoice()).tool_calls
                pieces.setdefault(event.position, []).append(event)
            case ReasoningDelta():
                first_delta = first_delta or time.perf_counter()
                choice = choices.setdefault(event.index, _OpenChoice())
                choice.reasoning.append(event.text)
                choice.reasoning_signature = event.signature or choice.reasoning_signature
            case RefusalDelta():
                first_delta = first_delta or time.perf_counter()
                choices.setdefault(event.index, _OpenChoice()).refusal.append(event.text)
            case ChoiceEnd():
                choice = choices.setdefault(event.index, _OpenChoice())
                choice.finish_reason = event.finish_reason
                choice.stop_sequence = event.stop_sequence
            case Start():
                start = event
            case Finish():
                return _response(start, choices, event, began, first_delta)
    raise ProviderError("the answer was cut short: the provider's stream ended without a Finish event")


def _response(
    start: Start | None, choices: dict[int, _OpenChoice], finish: Finish, began: float, first_delta: float | None
) -> LLMResponse:
    if start is None or not choices:
        raise ProviderError("the provider finished an answer that it had not started")
    closed = tuple(choices[index].close(index) for index in sorted(choices))
    first = closed[0]
    return LLMResponse(
        content=first.content,
        model=start.model,
        provider=start.provider,
        usage=finish.usage,
        finish_reason=first.finish_reason,
        choices=closed,
        request_id=start.request_id,
        tool_calls=first.tool_calls,
        reasoning=first.reasoning,
        processing_time=time.perf_counter() - began,
        time_to_first_token=None if first_delta is None else first_delta - began,
        cached=any(line.applied and line.name in (RESPONSE_CACHING, SEMANTIC_CACHING) for line in finish.optimizations),
        fallback_used=finish.fallback_used,
        timings=finish.timings,
        optimizations=finish.optimizations,
    )
