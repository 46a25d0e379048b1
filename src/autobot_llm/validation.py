"""Refuse a request whose values no provider could honour. Knows the fields' ranges; knows nothing of any model."""

from __future__ import annotations

import math
from collections.abc import Callable

from autobot_llm.errors import InvalidRequestError
from autobot_llm.types import CacheControl, ChatMessage, EmbeddingRequest, LLMRequest

MAX_STOP_STRINGS = 16
MAX_REQUEST_ID_LENGTH = 128


class _Range:
    """A number's limits, both included unless `above` is set; `whole` asks for an integer."""

    __slots__ = ("above", "high", "low", "whole")

    def __init__(self, low: float, high: float, *, above: bool = False, whole: bool = False) -> None:
        self.low = low
        self.high = high
        self.above = above
        self.whole = whole

    def accepts(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        is_writable = value < 2**64 if isinstance(value, int) else math.isfinite(value)  # no JSON encoder writes others
        return (self.low < value if self.above else self.low <= value) and value <= self.high and is_writable

    def __str__(self) -> str:
        kind = "an integer" if self.whole else "a number"
        if self.above:
            return f"{kind} above {self.low:g}" + (f", at most {self.high:g}" if math.isfinite(self.high) else "")
        return (
            f"{kind} from {self.low:g} to {self.high:g}"
            if math.isfinite(self.high)
            else f"{kind} of at least {self.low:g}"
        )


_INF = math.inf
_RANGES: tuple[tuple[str, _Range], ...] = (
    ("temperature", _Range(0, 100)),
    ("top_p", _Range(0, 1, above=True)),
    ("top_k", _Range(-1, _INF, whole=True)),
    ("min_p", _Range(0, 1)),
    ("max_tokens", _Range(1, _INF, whole=True)),
    ("seed", _Range(-(2**63), 2**64 - 1, whole=True)),
    ("logprobs", _Range(0, 20, whole=True)),
    ("repetition_penalty", _Range(0, _INF, above=True)),
    ("timeout", _Range(0, _INF, above=True)),
)
_RANGES_WITH_DEFAULT: tuple[tuple[str, _Range, object], ...] = tuple(
    (field, limits, getattr(LLMRequest(prompt="x"), field))
    for field, limits in (
        ("n", _Range(1, 128, whole=True)),
        ("min_tokens", _Range(0, _INF, whole=True)),
        ("priority", _Range(-(2**31), 2**31 - 1, whole=True)),
        ("presence_penalty", _Range(-2, 2)),
        ("frequency_penalty", _Range(-2, 2)),
    )
)
_BIAS = _Range(-100, 100)
_TOKEN_ID = _Range(0, _INF, whole=True)


def validate_request(request: LLMRequest) -> None:
    """Raise InvalidRequestError, with `param` naming the field, unless every value of `request` is acceptable.

    Checks types too: a request built in Python has not been through a decoder.
    """
    _check_input(request)
    for field, limits in _RANGES:
        value = getattr(request, field)
        if value is not None and not limits.accepts(value):
            raise _refusal(field, value, str(limits))
    for field, limits, default in _RANGES_WITH_DEFAULT:
        value = getattr(request, field)
        if value is not default and not limits.accepts(value):
            raise _refusal(field, value, str(limits))
    if request.max_tokens is not None and request.min_tokens > request.max_tokens:
        raise _refusal("min_tokens", request.min_tokens, f"at most max_tokens ({request.max_tokens})")
    for check in _CHECKS:
        check(request)


def validate_embedding(request: EmbeddingRequest) -> None:
    """Raise InvalidRequestError, with `param` naming the field, unless every value of `request` is acceptable."""
    inputs = request.inputs
    if not isinstance(inputs, list) or not inputs:
        raise _refusal("inputs", inputs, "at least one text or list of token ids")
    for place, one in enumerate(inputs):
        is_text = isinstance(one, str) and one
        is_ids = isinstance(one, list) and one and all(_TOKEN_ID.accepts(token) for token in one)
        if not is_text and not is_ids:
            raise _refusal(f"inputs[{place}]", one, "text that is not empty, or a list of token ids of at least 0")
    for field, limits in (("dimensions", _Range(1, _INF, whole=True)), ("timeout", _Range(0, _INF, above=True))):
        value = getattr(request, field)
        if value is not None and not limits.accepts(value):
            raise _refusal(field, value, str(limits))
    _check_cache(request)


def _refusal(field: str, value: object, accepted: str) -> InvalidRequestError:
    shown = repr(value)
    return InvalidRequestError(
        f"{field}={shown if len(shown) <= 80 else shown[:77] + '...'}: expected {accepted}", param=field
    )


def _check_input(request: LLMRequest) -> None:
    if request.messages is not None and request.prompt is not None:
        raise InvalidRequestError("messages and prompt are both given: expected exactly one", param="prompt")
    if request.messages is None and request.prompt is None:
        raise InvalidRequestError("neither messages nor prompt is given: expected exactly one", param="messages")
    if request.messages is not None:
        _check_messages(request.messages)
    elif isinstance(request.prompt, list):
        if not request.prompt or not all(_TOKEN_ID.accepts(token) for token in request.prompt):
            raise _refusal("prompt", request.prompt, "text that is not empty, or a list of token ids of at least 0")
    elif not isinstance(request.prompt, str) or not request.prompt:
        raise _refusal("prompt", request.prompt, "text that is not empty, or a list of token ids of at least 0")


def _check_messages(messages: list[ChatMessage]) -> None:
    if not isinstance(messages, list) or not messages:
        raise _refusal("messages", messages, "a list of at least one message")
    for place, message in enumerate(messages):
        if not isinstance(message, ChatMessage):
            raise _refusal(f"messages[{place}]", message, "a ChatMessage")
        if message.role not in ("system", "developer", "user", "assistant", "tool"):
            raise _refusal(f"messages[{place}].role", message.role, "system, developer, user, assistant or tool")
        if message.content is None and not message.tool_calls:
            raise _refusal(f"messages[{place}].content", None, "text or content parts (None only beside tool_calls)")
        for number, call in enumerate(message.tool_calls or ()):
            if not isinstance(call, dict) or not isinstance(call.get("function"), dict | None):
                raise _refusal(f"messages[{place}].tool_calls[{number}]", call, "an object whose function is one, too")


def _check_stop(request: LLMRequest) -> None:
    stop = request.stop
    acceptable = isinstance(stop, list) and all(isinstance(text, str) and text for text in stop)
    if not acceptable or len(stop) > MAX_STOP_STRINGS:
        raise _refusal("stop", stop, f"at most {MAX_STOP_STRINGS} strings, none of them empty")
    ids = request.stop_token_ids
    if not isinstance(ids, list) or not all(_TOKEN_ID.accepts(token) for token in ids):
        raise _refusal("stop_token_ids", ids, "a list of token ids of at least 0")


def _check_logit_bias(request: LLMRequest) -> None:
    if not isinstance(request.logit_bias, dict):
        raise _refusal("logit_bias", request.logit_bias, "an object of token ids and numbers")
    for token, bias in request.logit_bias.items():
        if not _TOKEN_ID.accepts(token):
            raise _refusal("logit_bias", token, "token ids of at least 0 as keys")
        if not _BIAS.accepts(bias):
            raise _refusal("logit_bias", bias, f"{_BIAS} for token {token}")


def _check_tools(request: LLMRequest) -> None:
    choice = request.tool_choice
    if choice is None:
        return
    if isinstance(choice, str) and choice not in ("none", "auto", "required"):
        raise _refusal("tool_choice", choice, "none, auto, required or an object that names a function")
    if choice != "none" and not request.tools:
        raise InvalidRequestError("tool_choice is given without tools", param="tool_choice")


def _check_response_format(request: LLMRequest) -> None:
    wanted = request.response_format
    if wanted is None:
        return
    if not isinstance(wanted, dict) or wanted.get("type") not in ("text", "json_object", "json_schema"):
        raise _refusal("response_format", wanted, "an object whose type is text, json_object or json_schema")


def _check_cache(request: LLMRequest | EmbeddingRequest) -> None:
    if request.cache is None:
        return
    if not isinstance(request.cache, CacheControl):
        raise _refusal("cache", request.cache, "a CacheControl")
    for field, limits in (("ttl", _Range(0, _INF, above=True)), ("max_age", _Range(0, _INF))):
        value = getattr(request.cache, field)
        if value is not None and not limits.accepts(value):
            raise _refusal(f"cache.{field}", value, str(limits))


def _check_names(request: LLMRequest) -> None:
    request_id = request.request_id
    if request_id is not None:
        printable = request_id.isascii() and request_id.isprintable()
        if not printable or not 1 <= len(request_id) <= MAX_REQUEST_ID_LENGTH:
            raise _refusal("request_id", request_id, f"1 to {MAX_REQUEST_ID_LENGTH} printable ASCII characters")
    for field in ("model", "provider"):
        value = getattr(request, field)
        if value is not None and (not isinstance(value, str) or not value):
            raise _refusal(field, value, "a name that is not empty")


_CHECKS: tuple[Callable[[LLMRequest], None], ...] = (
    _check_stop,
    _check_logit_bias,
    _check_tools,
    _check_response_format,
    _check_cache,
    _check_names,
)
