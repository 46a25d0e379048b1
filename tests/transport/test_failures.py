"""A refusal becomes the right error, in the provider's own words."""

from __future__ import annotations

import email.utils
import json
import time

import pytest

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
from autobot_llm.transport.failures import DEFAULT_RETRY_AFTER, error_from, retry_after


def openai_error(message: str, param: str | None = None, code: str | None = None) -> bytes:
    return json.dumps({"error": {"message": message, "type": "t", "param": param, "code": code}}).encode()


@pytest.mark.parametrize(
    ("status", "body", "kind", "message", "param", "code"),
    [
        (400, openai_error("Bad temperature", "temperature", "invalid_value"), InvalidRequestError,
         "p: Bad temperature", "temperature", "invalid_value"),
        (400, openai_error("This model's maximum context length is 8192 tokens", "messages"), ContextLengthError,
         "p: This model's maximum context length is 8192 tokens", "messages", "context_length_exceeded"),
        (400, openai_error("too long", "messages", "context_length_exceeded"), ContextLengthError,
         "p: too long", "messages", "context_length_exceeded"),
        (404, openai_error("The model `x` does not exist", None, "model_not_found"), ModelNotFoundError,
         "p: The model `x` does not exist", "model", "model_not_found"),
        (404, b'{"error": "model \\"x\\" not found, try pulling it first"}', ModelNotFoundError,
         'p: model "x" not found, try pulling it first', "model", "model_not_found"),
        (404, b'{"detail": "Not Found"}', ProviderError,
         "p: Not Found (status 404; is the endpoint's address right?)", None, "provider_not_found"),
        (404, b"<html><body>nginx</body></html>", ProviderError,
         "p answered with status 404 (status 404; is the endpoint's address right?)", None, "provider_not_found"),
        (401, b'{"type": "error", "error": {"type": "authentication_error", "message": "invalid x-api-key"}}',
         ProviderError, "p: invalid x-api-key (status 401; the API key that is set for p was not accepted)", None,
         "provider_authentication_error"),
        (413, b'{"error": {"type": "request_too_large", "message": "Too big"}}', RequestTooLarge,
         "p: Too big", None, "request_too_large"),
        (422, b'{"detail": [{"loc": ["body", "n"], "msg": "wrong"}]}', InvalidRequestError,
         'p: [{"loc":["body","n"],"msg":"wrong"}]', None, None),
        (429, openai_error("Slow down", None, "rate_limit_exceeded"), OverloadedError,
         "p: Slow down", None, "rate_limit_exceeded"),
        (500, b"[{\"error\": {\"message\": \"oops\"}}]", ProviderError, "p: oops (status 500)", None, "provider_error"),
        (500, b"\xff\xfe half \x00", ProviderError, "p: \ufffd\ufffd half \x00 (status 500)", None, "provider_error"),
        (503, b"", ProviderUnavailable, "p answered with status 503 (status 503)", None, "provider_unavailable"),
        (529, b'{"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}',
         ProviderUnavailable, "p: Overloaded (status 529)", None, "provider_unavailable"),
        (504, b"", ProviderTimeout, "p answered with status 504", None, "provider_timeout"),
        (400, b"[" * 100_000, InvalidRequestError, "p: " + "[" * 1000, None, None),
        (400, b'{"error": {"message": {"deep": 1}, "param": 7}}', InvalidRequestError, 'p: {"deep":1}', None, None),
    ],
)  # fmt: skip
def test_a_refusal_becomes_the_error_it_means(
    status: int, body: bytes, kind: type[LLMError], message: str, param: str | None, code: str | None
) -> None:
    error = error_from(status, {}, body, "p")
    assert (type(error), error.message, error.param, error.code) == (kind, message, param, code)


def test_retry_after_is_understood_in_all_its_forms() -> None:
    in_ten_seconds = email.utils.formatdate(time.time() + 10, usegmt=True)
    assert retry_after({"retry-after": "7"}) == 7
    assert retry_after({"retry-after-ms": "1500", "retry-after": "2"}) == 1.5
    assert retry_after({"retry-after": in_ten_seconds}) == pytest.approx(10, abs=1.5)
    assert retry_after({"retry-after": email.utils.formatdate(0)}) == 0
    for nonsense in ("", "soon", "-1", "inf", "nan", "Wed, 99 Nov 2026"):
        assert retry_after({"retry-after": nonsense}) is None


def test_an_overloaded_provider_says_when_to_come_back() -> None:
    assert error_from(429, {"retry-after": "3"}, b"", "p").retry_after == 3
    assert error_from(503, {"retry-after": "4"}, b"", "p").retry_after == 4
    assert error_from(429, {}, b"", "p").retry_after == DEFAULT_RETRY_AFTER
    assert error_from(503, {}, b"", "p").retry_after is None
