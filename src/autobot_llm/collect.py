"""Make a stream of events one answer. Knows the order events come in; knows nothing of who sends them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from autobot_llm.errors import ProviderError
from autobot_llm.report import CACHING
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


class Collected:
    """One answer while its events come in."""

    def __init__(self) -> None:
        self._start: Start | None = None
        self._choices: dict[int, _OpenChoice] = {}

    def add(self, event: Event) -> bool:
        """Take an event that is not Finish; whether it is a piece of the answer."""
        assert not isinstance(event, Finish), "Finish is what `response` is for"
        if isinstance(event, Start):
            self._start = event
            return False
        choice = self._choice(event.index)
        match event:
            case TextDelta():
                choice.texts.append(event.text)
                choice.logprobs.extend(event.logprobs)
            case ToolCallDelta():
                choice.tool_calls.setdefault(event.position, []).append(event)
            case ReasoningDelta():
                choice.reasoning.append(event.text)
                choice.reasoning_signature = event.signature or choice.reasoning_signature
            case RefusalDelta():
                choice.refusal.append(event.text)
            case ChoiceEnd():
                choice.finish_reason = event.finish_reason
                choice.stop_sequence = event.stop_sequence
                return False
        return True

    def _choice(self, index: int) -> _OpenChoice:
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = _OpenChoice()
        return choice

    def response(
        self, finish: Finish, *, processing_time: float = 0.0, time_to_first_token: float | None = None
    ) -> LLMResponse:
        """The answer that `finish` completes. Raises ProviderError where something of it is missing."""
        start = self._start
        if start is None or not self._choices:
            raise ProviderError("the provider finished an answer that it had not started")
        closed = tuple(self._choices[index].close(index) for index in sorted(self._choices))
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
            processing_time=processing_time,
            time_to_first_token=time_to_first_token,
            cached=any(line.applied and line.name in CACHING for line in finish.optimizations),
            fallback_used=finish.fallback_used,
            timings=finish.timings,
            optimizations=finish.optimizations,
        )


async def collect(events: AsyncIterator[Event]) -> LLMResponse:
    """Read `events` to the end and return the answer.

    `processing_time` and `time_to_first_token` are measured here, from the call to the end and to the first delta.
    Raises what the stream raises, and ProviderError when it ends without Finish: half an answer is no answer.
    """
    began = time.perf_counter()
    to_first: float | None = None
    answer = Collected()
    async for event in events:
        if isinstance(event, Finish):
            return answer.response(event, processing_time=time.perf_counter() - began, time_to_first_token=to_first)
        if answer.add(event) and to_first is None:
            to_first = time.perf_counter() - began
    raise ProviderError("the answer was cut short: the provider's stream ended without a Finish event")
