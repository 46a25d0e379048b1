"""Turn a provider's refusal into an error of ours, keeping its words. Knows statuses and the shapes of error bodies.

The shapes: {"error": {"message", "type", "param", "code"}} (OpenAI, vLLM, Anthropic), {"error": "text"} (Ollama),
{"message": ...} and {"detail": ...} (servers made with FastAPI), or no JSON at all.
"""

from __future__ import annotations

import email.utils
import time
from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from autobot_llm.errors import (
    ContextLengthError,
    InvalidRequestError,
    LLMError,
    ModelNotFoundError,
    OverloadedError,
    ProviderError,
    ProviderTimeout,
    ProviderUnavailable,
    RequestTooLarge,
)

MAX_SHOWN = 1000  # characters of a provider's message that are passed on
DEFAULT_RETRY_AFTER = 1.0  # seconds, where an overloaded provider does not say when to come back
MASK = "********"
_CONTEXT_CODES = frozenset({"context_length_exceeded", "string_above_max_length"})
_CONTEXT_WORDS = ("maximum context length", "context length exceeded", "prompt is too long", "exceeds the context")


def error_from(
    status: int, headers: Mapping[str, str], body: bytes, provider: str, *, secrets: Collection[str] = ()
) -> LLMError:
    """The error for an answer with `status` of 300 and more; `headers` have lower-case names.

    A fault in the request is the caller's (400, 404, 413), too much of it is his to repeat later (429), and
    everything else is the provider's: a refused key too, for it is ours and none of the caller's. `secrets` are
    taken out of the provider's words.
    """
    said = _Said(body)
    words = said.message
    for secret in secrets:
        words = words.replace(secret, MASK)
    message = f"{provider}: {words}" if words else f"{provider} answered with status {status}"
    code = said.code
    if status < 400:
        return ProviderError(
            f"{provider} answered with status {status}, a redirection, which is not followed: its endpoint's address "
            f"is perhaps {headers.get('location', 'another one')}"
        )
    if status in (401, 403):
        return ProviderError(f"{message} (status {status}; the API key that is set for {provider} was not accepted)",
                             code="provider_authentication_error")  # fmt: skip
    if status == 404:
        return _not_found(message, said)
    if status == 407:
        return ProviderError(
            f"{provider}: the proxy asks for a user and a password: HTTP_PROXY=http://user:password@..."
        )
    if status == 413:
        return RequestTooLarge(message, param=said.param)
    if status == 429:
        return OverloadedError(message, retry_after=retry_after(headers) or DEFAULT_RETRY_AFTER, code=code)
    if status in (408, 504):
        return ProviderTimeout(message)
    if status in (503, 529):
        # 529 is Anthropic's for an overload. A 503 can be a proxy's word for an answer that broke off.
        return ProviderUnavailable(
            f"{message} (status {status})", retry_after=retry_after(headers), may_have_begun=status == 503
        )
    if status >= 500:
        return ProviderError(f"{message} (status {status})", retry_after=retry_after(headers))
    lowered = words.lower()
    if code in _CONTEXT_CODES or any(hint in lowered for hint in _CONTEXT_WORDS):
        return ContextLengthError(message, param=said.param)
    return InvalidRequestError(message, param=said.param, code=code)


def _not_found(message: str, said: _Said) -> LLMError:
    if said.is_json and "model" in said.message.lower():
        return ModelNotFoundError(message, param=said.param or "model")
    return ProviderError(f"{message} (status 404; is the endpoint's address right?)", code="provider_not_found")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds until a repetition is welcome, by `retry-after-ms` or `retry-after` (seconds or a date, RFC 9110)."""
    milliseconds = _number(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after", "")
    if (seconds := _number(text)) is not None:
        return seconds
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None


class _Said:
    """What the body of a refusal says, whatever shape it has."""

    def __init__(self, body: bytes) -> None:
        self.message = ""
        self.param: str | None = None
        self.code: str | None = None
        self.is_json = True
        try:
            self._read(msgspec.json.decode(body))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self.is_json = False
            self.message = "" if b"<html" in body[:1000].lower() else body.decode("utf-8", "replace")
        self.message = " ".join(self.message.split())[:MAX_SHOWN]

    def _read(self, said: Any) -> None:
        if isinstance(said, list) and said:  # Google's compatible endpoint wraps its error in a list
            said = said[0]
        inner = said.get("error", said) if isinstance(said, dict) else said
        if not isinstance(inner, dict):
            self.message = inner if isinstance(inner, str) else msgspec.json.encode(inner).decode()
            return
        found = next((inner[name] for name in ("message", "detail") if inner.get(name)), None)
        self.message = found if isinstance(found, str) else msgspec.json.encode(found or inner).decode()
        param, code = inner.get("param"), inner.get("code") or inner.get("type")
        self.param = param if isinstance(param, str) else None
        self.code = code if isinstance(code, str) else None
