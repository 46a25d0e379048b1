"""Read the answers of an Ollama server as events, and its errors. Knows its lines; knows nothing of connections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from autobot_llm.errors import (
    ContextLengthError,
    InvalidRequestError,
    LLMError,
    ModelNotFoundError,
    OverloadedError,
    ProviderError,
    UnsupportedError,
)
from autobot_llm.types import (
    ChoiceEnd,
    EmbeddingResponse,
    Event,
    FinishReason,
    ReasoningDelta,
    TextDelta,
    Timings,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)

UNKNOWN_ID = -1  # Ollama tells tokens as text, without their ids
BUSY_FOR = 1.0  # seconds after which a full queue is worth another try; Ollama does not say


class WireToken(msgspec.Struct):
    token: str = ""
    logprob: float = 0.0
    top_logprobs: list[WireToken] | None = None


class WireFunction(msgspec.Struct):
    name: str
    arguments: dict[str, Any] = msgspec.field(default_factory=dict)


class WireToolCall(msgspec.Struct):
    function: WireFunction
    id: str = ""


class WireMessage(msgspec.Struct):
    content: str = ""
    thinking: str = ""
    tool_calls: list[WireToolCall] | None = None


class WireLine(msgspec.Struct):
    """One line of an answer of /api/chat (`message`) or /api/generate (`response`); durations in nanoseconds."""

    message: WireMessage | None = None
    response: str = ""
    thinking: str = ""
    done: bool = False
    done_reason: str = ""
    error: str | None = None
    status: int = 500
    logprobs: list[WireToken] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_cached_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None


_LINE = msgspec.json.Decoder(WireLine)
_FINISH_REASONS: dict[str, FinishReason] = {"length": "length", "content_filter": "content_filter"}


class AnswerReader:
    """Turns one answer's lines into events; after the last one, `ending` holds its counts and times."""

    def __init__(self, request_id: str, model: str) -> None:
        self.ending: WireLine | None = None
        self._request_id = request_id
        self._model = model
        self._num_calls = 0

    def events(self, data: bytes) -> Iterator[Event]:
        """The events of one line. Errors: ProviderError for what is no line of Ollama's, or that of an error line."""
        try:
            line = _LINE.decode(data)
        except msgspec.MsgspecError as exc:
            raise ProviderError(
                f"Ollama sent a line that is not of its API: {exc}: {_shown(data)}", code="bad_answer"
            ) from exc
        if line.error is not None:
            raise error_of(line.status, line.error, self._model)
        message = line.message
        thinking, text = (line.thinking, line.response) if message is None else (message.thinking, message.content)
        if thinking:
            yield ReasoningDelta(thinking)
        if text or line.logprobs:
            yield TextDelta(text, logprobs=tuple(map(_token, line.logprobs or ())))
        for call in (message and message.tool_calls) or ():
            yield self._call(call)
        if line.done:
            self.ending = line
            reason = "tool_calls" if self._num_calls else _FINISH_REASONS.get(line.done_reason, "stop")
            yield ChoiceEnd(finish_reason="length" if line.done_reason == "length" else reason)

    def _call(self, call: WireToolCall) -> ToolCallDelta:
        position = self._num_calls
        self._num_calls += 1
        return ToolCallDelta(
            position=position,
            call_id=call.id or f"call_{self._request_id}_{position}",
            name=call.function.name,
            arguments=msgspec.json.encode(call.function.arguments).decode(),
        )


def _shown(data: bytes) -> str:
    return repr(data[:80].decode("utf-8", "replace"))


def _token(token: WireToken) -> TokenLogprob:
    top = tuple((UNKNOWN_ID, other.token, other.logprob) for other in token.top_logprobs or ())
    return TokenLogprob(UNKNOWN_ID, token.token, token.logprob, top)


def usage_of(line: WireLine) -> Usage:
    """The counts of an answer. An older server leaves the prompt's count out where all of it was cached."""
    return Usage(
        prompt_tokens=line.prompt_eval_count or 0,
        completion_tokens=line.eval_count or 0,
        cached_tokens=line.prompt_eval_cached_count or 0,
    )


def timings_of(line: WireLine, time_to_first_token: float | None) -> Timings:
    """The times of an answer in seconds; the first token's is our own clock's."""
    return Timings(
        time_to_first_token=time_to_first_token,
        total=_seconds(line.total_duration),
        load=_seconds(line.load_duration),
        prefill=_seconds(line.prompt_eval_duration),
        decode=_seconds(line.eval_duration),
    )


def _seconds(nanoseconds: int | None) -> float | None:
    return None if nanoseconds is None else nanoseconds / 1e9


class WireEmbeddings(msgspec.Struct):
    embeddings: list[list[float]]
    prompt_eval_count: int = 0


def read_embeddings(data: bytes, *, num_inputs: int, model: str, provider: str, request_id: str) -> EmbeddingResponse:
    """The answer of `/api/embed`. Errors: ProviderError where it is none, or has not one vector for each input."""
    try:
        answer = msgspec.json.decode(data, type=WireEmbeddings)
    except msgspec.MsgspecError as exc:
        raise ProviderError(f"Ollama's answer has no embeddings: {exc}: {_shown(data)}", code="bad_answer") from exc
    if len(answer.embeddings) != num_inputs:
        raise ProviderError(f"Ollama sent {len(answer.embeddings)} embeddings for {num_inputs} inputs")
    return EmbeddingResponse(
        vectors=tuple(answer.embeddings),
        model=model,
        provider=provider,
        usage=Usage(prompt_tokens=answer.prompt_eval_count, completion_tokens=0),
        request_id=request_id,
    )


# What Ollama's sentences mean, beyond their status; found in its server's sources.
_UNSUPPORTED = (
    ("does not support tools", "tools"),
    ("does not support thinking", "reasoning_effort"),
    ("does not support insert", "suffix"),
    ("does not support", "model"),
)
_TOO_LONG = ("exceeds the context length", "exceed_context_size", "exceeds maximum context", "context length exceeded")
_BUSY = "maximum pending requests"
_OUT_OF_MEMORY = "system memory"


def error_of(status: int, message: str, model: str) -> LLMError:
    """The error that a line of an answer tells, its own sentence kept; `model` is what was asked for."""
    text = f"ollama: {message}"
    if status == 404:
        return ModelNotFoundError(text + _pull(model), param="model")
    kind = InvalidRequestError if status == 400 else ProviderError
    return better_error(kind(text), model)


def better_error(error: LLMError, model: str) -> LLMError:
    """`error` as Ollama's sentence has it, or itself; with the remedy where there is one."""
    message = error.message
    for sentence, param in _UNSUPPORTED:
        if sentence in message:
            return UnsupportedError(message, param=param)
    if any(sentence in message for sentence in _TOO_LONG):
        return ContextLengthError(message, param="messages")
    if _BUSY in message:
        return OverloadedError(message, retry_after=BUSY_FOR)
    if isinstance(error, ModelNotFoundError):
        return ModelNotFoundError(message + _pull(model), param="model")
    if _OUT_OF_MEMORY in message:
        return ProviderError(f"{message}; a smaller quantization such as q4_K_M, or a smaller context, needs less")
    return error


def _pull(model: str) -> str:
    return f"; `ollama pull {model}` fetches it"
