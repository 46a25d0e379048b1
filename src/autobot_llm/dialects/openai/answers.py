"""Read what a server that speaks OpenAI's language answers, whole or in chunks. Knows the wire; knows no connection.

Only the fields that become events are decoded. Servers differ in details; what several of them send is understood:
reasoning as `reasoning_content` (vLLM to 0.10, DeepSeek), as `reasoning` (vLLM since, OpenRouter) or as parts of the
content (Mistral), tool calls without an index (Gemini), a stream without its usage or without `[DONE]`.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec

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
    TokenLogprob,
    ToolCallDelta,
    Usage,
)

DONE = b"[DONE]"
UNKNOWN_TOKEN = -1  # the id of a token whose server tells its text only

_FINISH_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
    "eos": "stop",
    "max_tokens": "length",
}


class _Details(msgspec.Struct):
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None
    reasoning_tokens: int | None = None


class UsageFields(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    prompt_cache_hit_tokens: int | None = None  # DeepSeek

    def read(self) -> Usage:
        prompt = self.prompt_tokens_details or _Details()
        completion = self.completion_tokens_details or _Details()
        return Usage(
            prompt_tokens=self.prompt_tokens or 0,
            completion_tokens=self.completion_tokens or 0,
            cached_tokens=prompt.cached_tokens or self.prompt_cache_hit_tokens or 0,
            cache_write_tokens=prompt.cache_write_tokens or 0,
            reasoning_tokens=completion.reasoning_tokens or 0,
        )


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | dict[str, Any] | None = None


class _ToolCall(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Message(msgspec.Struct):
    content: str | list[dict[str, Any]] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Token(msgspec.Struct):
    token: str
    logprob: float
    top_logprobs: list[_Token] | None = None


class _ChatLogprobs(msgspec.Struct):
    content: list[_Token] | None = None


class _ChatChoice(msgspec.Struct):
    index: int = 0
    delta: _Message | None = None
    message: _Message | None = None
    logprobs: _ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class _TextLogprobs(msgspec.Struct):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class _TextChoice(msgspec.Struct):
    index: int = 0
    text: str | None = None
    logprobs: _TextLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


ChoiceT = TypeVar("ChoiceT", _ChatChoice, _TextChoice)


class _Answer(msgspec.Struct, Generic[ChoiceT]):
    model: str | None = None
    choices: list[ChoiceT] | None = None
    usage: UsageFields | None = None
    error: msgspec.Raw = msgspec.Raw()


_read_chat = msgspec.json.Decoder(_Answer[_ChatChoice]).decode
_read_text = msgspec.json.Decoder(_Answer[_TextChoice]).decode


class _Reader(ABC, Generic[ChoiceT]):
    """Makes events of one answer, given whole or chunk by chunk. `usage` is known at the end."""

    def __init__(self, request_id: str, provider: str, model: str, num_choices: int = 1) -> None:
        self._request_id = request_id
        self._provider = provider
        self._model = model
        self._num_choices = num_choices
        self._has_started = False
        self._open: set[int] = set()  # choices that have begun and not ended
        self._ended: set[int] = set()
        self._is_done = False
        self.usage = Usage(prompt_tokens=0, completion_tokens=0)

    @property
    def is_done(self) -> bool:
        """The server said that nothing follows."""
        return self._is_done

    @property
    def num_missing(self) -> int:
        """How many of the choices asked for have not ended; an answer is complete when none is missing."""
        return self._num_choices - len(self._ended)

    def read(self, data: bytes) -> list[Event]:
        """The events of a whole body or of one chunk's data. Raises ErrorInStream, and ProviderError for nonsense."""
        if data == DONE:
            self._is_done = True
            if not self._has_started:
                raise ProviderError(f"{self._provider} sent an answer without a choice", code="malformed_answer")
            return [self._end(index, "stop", None) for index in sorted(self._open)]
        try:
            answer = self._decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            raise ProviderError(
                f"{self._provider} sent what is no answer of OpenAI's form: {exc}", code="malformed_answer"
            ) from exc
        error = bytes(answer.error)
        if error and error != b"null":
            raise _error_chunk(error)
        events: list[Event] = []
        if answer.usage is not None:
            self.usage = answer.usage.read()
        if not answer.choices:
            return events
        if not self._has_started:
            self._has_started = True
            model = answer.model or self._model
            events.append(Start(request_id=self._request_id, model=model, provider=self._provider))
        for choice in answer.choices:
            index = choice.index
            if index in self._ended:
                continue
            self._open.add(index)
            self._add_pieces(events, choice)
            if choice.finish_reason:
                stop = choice.stop_reason if isinstance(choice.stop_reason, str) else None
                events.append(self._end(index, choice.finish_reason, stop))
        return events

    def _end(self, index: int, reason: str, stop_sequence: str | None) -> ChoiceEnd:
        if reason in ("error", "abort"):
            raise ProviderError(f"{self._provider} ended the answer with {reason!r}", code="truncated_answer")
        self._open.discard(index)
        self._ended.add(index)
        finish_reason = _FINISH_REASONS.get(reason, "stop")
        return ChoiceEnd(finish_reason=finish_reason, index=index, stop_sequence=stop_sequence)

    @abstractmethod
    def _decode(self, data: bytes) -> _Answer[ChoiceT]: ...

    @abstractmethod
    def _add_pieces(self, events: list[Event], choice: ChoiceT) -> None: ...


class ChatReader(_Reader[_ChatChoice]):
    """Reads the answer of `POST /chat/completions`."""

    def __init__(self, request_id: str, provider: str, model: str, num_choices: int = 1) -> None:
        super().__init__(request_id, provider, model, num_choices)
        self._calls: dict[tuple[int, int], str] = {}  # (choice, position) -> id

    def _decode(self, data: bytes) -> _Answer[_ChatChoice]:
        return _read_chat(data)

    def _add_pieces(self, events: list[Event], choice: _ChatChoice) -> None:
        message = choice.delta or choice.message
        if message is None:
            return
        index = choice.index
        if reasoning := message.reasoning_content or message.reasoning:
            events.append(ReasoningDelta(reasoning, index))
        content = message.content
        if isinstance(content, list):
            content = _add_parts(events, content, index)
        logprobs = _chat_logprobs(choice.logprobs) if choice.logprobs is not None else ()
        if content or logprobs:
            events.append(TextDelta(content or "", index, logprobs))
        if message.refusal:
            events.append(RefusalDelta(message.refusal, index))
        if message.tool_calls:
            events.extend([self._call_piece(index, call) for call in message.tool_calls])

    def _call_piece(self, index: int, call: _ToolCall) -> ToolCallDelta:
        function = call.function or _Function()
        arguments = function.arguments
        if isinstance(arguments, dict):
            arguments = msgspec.json.encode(arguments).decode()
        key = (index, self._position(index, call))
        if key in self._calls:
            return ToolCallDelta(position=key[1], index=index, arguments=arguments or "")
        self._calls[key] = call_id = call.id or f"call_{secrets.token_hex(12)}"
        return ToolCallDelta(
            position=key[1], index=index, call_id=call_id, name=function.name, arguments=arguments or ""
        )

    def _position(self, index: int, call: _ToolCall) -> int:
        """Where the call stands. Without an index, an id that is new begins the next one."""
        if call.index is not None:
            return call.index
        known = {call_id: position for (choice, position), call_id in self._calls.items() if choice == index}
        if call.id is None and known:
            return max(known.values())
        return known.get(call.id or "", len(known))


class TextReader(_Reader[_TextChoice]):
    """Reads the answer of `POST /completions`."""

    def _decode(self, data: bytes) -> _Answer[_TextChoice]:
        return _read_text(data)

    def _add_pieces(self, events: list[Event], choice: _TextChoice) -> None:
        logprobs = _text_logprobs(choice.logprobs) if choice.logprobs is not None else ()
        if choice.text or logprobs:
            events.append(TextDelta(choice.text or "", choice.index, logprobs))


def _add_parts(events: list[Event], parts: Sequence[dict[str, Any]], index: int) -> str:
    """The text of content that comes in parts; what was thought becomes events of its own."""
    texts: list[str] = []
    for part in parts:
        if part.get("type") == "thinking":
            thought = part.get("thinking")
            pieces = thought if isinstance(thought, list) else [{"text": thought}]
            text = "".join(str(piece.get("text") or "") for piece in pieces if isinstance(piece, dict))
            if text:
                events.append(ReasoningDelta(text, index))
        elif isinstance(said := part.get("text"), str):
            texts.append(said)
    return "".join(texts)


def _chat_logprobs(logprobs: _ChatLogprobs) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            UNKNOWN_TOKEN,
            token.token,
            token.logprob,
            tuple((UNKNOWN_TOKEN, best.token, best.logprob) for best in token.top_logprobs or ()),
        )
        for token in logprobs.content or ()
    )


def _text_logprobs(logprobs: _TextLogprobs) -> tuple[TokenLogprob, ...]:
    tops = logprobs.top_logprobs or [None] * len(logprobs.tokens)
    return tuple(
        TokenLogprob(
            UNKNOWN_TOKEN,
            token,
            0.0 if logprob is None else logprob,  # the first token of an echoed prompt has none
            tuple((UNKNOWN_TOKEN, text, best) for text, best in (top or {}).items()),
        )
        for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, tops, strict=False)
    )


def _error_chunk(error: bytes) -> ErrorInStream:
    """The error of a chunk; some servers put an HTTP status into its `code`."""
    try:
        said = msgspec.json.decode(error)
    except (msgspec.MsgspecError, RecursionError):
        said = None
    code = said.get("code") if isinstance(said, dict) else None
    if isinstance(code, str) and code.isdecimal():
        code = int(code)
    status = code if isinstance(code, int) and 400 <= code <= 599 else 502
    return ErrorInStream(status, b'{"error":' + error + b"}")


class _Model(msgspec.Struct):
    id: str
    created: int | None = None
    max_model_len: int | None = None  # vLLM
    context_length: int | None = None  # OpenRouter, Together
    context_window: int | None = None  # Groq


class _Models(msgspec.Struct):
    data: list[_Model]


def read_models(data: bytes, provider: str) -> list[ModelInfo]:
    """The answer of `GET /models`, which some servers send as a bare list. Raises ProviderError."""
    try:
        models = msgspec.json.decode(data, type=_Models | list[_Model])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ProviderError(
            f"{provider} sent what is no list of models of OpenAI's form: {exc}", code="malformed_answer"
        ) from exc
    return [
        ModelInfo(
            id=model.id,
            provider=provider,
            context_length=model.max_model_len or model.context_length or model.context_window,
            created=model.created or 0,
        )
        for model in (models.data if isinstance(models, _Models) else models)
    ]
