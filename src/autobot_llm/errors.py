"""Every error a caller can meet, as one tree. Knows HTTP status codes; knows nothing of who raises.

LLMError
├── ConfigurationError          a setting or a command-line value is wrong
│   └── ModelLoadError          a model folder is missing, malformed or not supported
├── InvalidRequestError    400  the request is wrong; `param` names the field
│   ├── ContextLengthError 400  prompt and answer do not fit the model's context
│   ├── UnsupportedError   400  this provider cannot do what the field asks
│   ├── ModelNotFoundError 404  no such model, or no such provider
│   └── RequestTooLarge    413  the body is over the limit
├── AuthenticationError    401  no API key, or a wrong one
├── BudgetExceededError    402  the money for the day or the month is spent
├── OverloadedError        429  try again after `retry_after` seconds
├── RequestTimeout         408  the request's own deadline passed
├── NotCached              504  only a kept answer was wanted, and there is none
└── ProviderError          502  the provider failed
    ├── ProviderTimeout    504  it did not answer in time
    ├── ProviderUnavailable 503 it cannot be reached, or is shutting down
    └── EngineError        500  our engine failed on this request
"""

from __future__ import annotations


class LLMError(Exception):
    """The root. `status` is the HTTP status the server answers with; `code` is a stable machine-readable name.

    `retry_after` is in seconds, None where nobody said when to come back. `may_have_begun` is False where the
    provider surely did nothing for the request.
    """

    status: int = 500
    type: str = "server_error"
    code: str | None = None
    retry_after: float | None = None
    may_have_begun: bool = True

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class ConfigurationError(LLMError):
    """A setting, a command-line value or a file it points to cannot be used."""

    code = "configuration_error"


class ModelLoadError(ConfigurationError):
    """A model folder is missing, malformed, truncated or of a kind the engine does not know."""

    code = "model_load_error"


class InvalidRequestError(LLMError):
    """The caller's mistake: the message names the value and the accepted ones, `param` the field."""

    status = 400
    type = "invalid_request_error"


class ContextLengthError(InvalidRequestError):
    """The prompt, or the prompt with the answer asked for, is longer than the model's context."""

    code = "context_length_exceeded"


class UnsupportedError(InvalidRequestError):
    """The field is valid, and this provider cannot honour it. It is refused and never dropped in silence."""

    code = "unsupported_parameter"


class ModelNotFoundError(InvalidRequestError):
    """No provider serves a model of this name."""

    status = 404
    code = "model_not_found"


class RequestTooLarge(InvalidRequestError):
    """The request's body is over the server's limit."""

    status = 413
    code = "request_too_large"


class AuthenticationError(LLMError):
    """The API key is missing or wrong."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class BudgetExceededError(LLMError):
    """The request could cost more than is left of a budget. `retry_after` (seconds) says when there is a new one."""

    status = 402
    type = "billing_error"
    code = "budget_exceeded"
    may_have_begun = False

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class OverloadedError(LLMError):
    """Too much is asked at once. `retry_after` (seconds) says when to come back."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"
    may_have_begun = False

    def __init__(self, message: str, *, retry_after: float, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class RequestTimeout(LLMError):
    """The request's own `timeout` passed before the answer was complete."""

    status = 408
    type = "timeout_error"
    code = "request_timeout"


class NotCached(LLMError):
    """The request wants a kept answer or none (`only-if-cached`), and there is none. The status is RFC 9111's."""

    status = 504
    type = "not_cached_error"
    code = "not_cached"


class ProviderError(LLMError):
    """The provider failed; its own message is kept, and `__cause__` is the original exception."""

    status = 502
    type = "provider_error"
    code = "provider_error"

    def __init__(self, message: str, *, code: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class ProviderTimeout(ProviderError):
    """The provider did not answer in time."""

    status = 504
    code = "provider_timeout"


class ProviderUnavailable(ProviderError):
    """The provider cannot be reached, has stopped or is shutting down."""

    status = 503
    code = "provider_unavailable"

    def __init__(
        self, message: str, *, code: str | None = None, retry_after: float | None = None, may_have_begun: bool = True
    ) -> None:
        super().__init__(message, code=code, retry_after=retry_after)
        self.may_have_begun = may_have_begun


class EngineError(ProviderError):
    """Our own engine failed while it worked on this request."""

    status = 500
    type = "server_error"
    code = "engine_error"
