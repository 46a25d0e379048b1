"""Read a file of requests, one JSON object a line. Knows what a line may be; knows nothing of where it goes.

A line is OpenAI's (`custom_id`, `method`, `url`, `body`), or the body of a chat completion, with a `custom_id` of its
own or without one.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from autobot_llm.cloud.batch_jobs.service import BatchService, WireItem
from autobot_llm.cloud.rate_limited import CHARACTERS_PER_TOKEN, estimated_prompt_tokens
from autobot_llm.dialects.bodies import encode, read_object
from autobot_llm.dialects.openai.batches import CHAT_URL, EMBEDDINGS_URL
from autobot_llm.dialects.openai.bodies import read_chat
from autobot_llm.dialects.openai.embeddings import read_embedding_body
from autobot_llm.errors import InvalidRequestError, LLMError, UnsupportedError
from autobot_llm.types import LLMRequest, Usage
from autobot_llm.validation import validate_embedding, validate_request

MAX_ID_LENGTH = 512
_LINE_FIELDS = frozenset({"custom_id", "method", "url", "body"})
_URLS = (CHAT_URL, EMBEDDINGS_URL)


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One request that was read: its number in the file (from 1), the caller's id for it, its path and its body."""

    number: int
    custom_id: str
    url: str
    body: dict[str, Any]


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """A request as the provider takes it, the model, and about what it may use at most."""

    item: WireItem
    model: str
    most: Usage


def read_lines(lines: Iterable[bytes]) -> Iterator[Line]:
    """The requests in `lines`; empty ones are skipped.

    Errors: InvalidRequestError, which begins with the line's number and names the field.
    """
    numbers: dict[str, int] = {}
    for number, data in enumerate(lines, 1):
        data = data.removeprefix(codecs.BOM_UTF8) if number == 1 else data
        if not data.strip():
            continue
        try:
            line = _line(number, read_object(data))
        except InvalidRequestError as error:
            raise at_line(number, error) from error
        if (before := numbers.setdefault(line.custom_id, number)) != number:
            message = f"custom_id: '{line.custom_id}' is that of line {before}, too; expected one for each request"
            raise at_line(number, InvalidRequestError(message, param="custom_id"))
        yield line
    if not numbers:
        raise InvalidRequestError("there are no requests: expected one JSON object on each line")


def at_line(number: int, error: LLMError) -> InvalidRequestError:
    """`error`, found in line `number`."""
    kind = type(error) if isinstance(error, InvalidRequestError) else InvalidRequestError
    message = error.message
    if error.param is not None and not message.startswith(error.param):
        message = f"{error.param}: {message}"
    return kind(f"line {number}: {message}", param=error.param, code=error.code)


def _line(number: int, fields: dict[str, Any]) -> Line:
    custom_id = fields.get("custom_id", f"line-{number}")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_ID_LENGTH:
        raise InvalidRequestError(f"custom_id: expected a text of 1 to {MAX_ID_LENGTH} characters", param="custom_id")
    if not fields.keys() & {"body", "url", "method"}:
        if "messages" not in fields:
            raise InvalidRequestError(
                "messages: this field is required; expected a chat body, or custom_id, method, url and body",
                param="messages",
            )
        return Line(
            number=number,
            custom_id=custom_id,
            url=CHAT_URL,
            body={name: value for name, value in fields.items() if name != "custom_id"},
        )
    if unknown := sorted(fields.keys() - _LINE_FIELDS):
        raise InvalidRequestError(
            f"{unknown[0]}: unknown field; expected custom_id, method, url and body", param=unknown[0]
        )
    for name in ("custom_id", "url", "body"):
        if name not in fields:
            raise InvalidRequestError(f"{name}: this field is required", param=name)
    if (method := fields.get("method", "POST")) != "POST":
        raise InvalidRequestError(f"method: expected POST, got {method!r}", param="method")
    if (url := fields["url"]) not in _URLS:
        raise UnsupportedError(f"url: expected {' or '.join(_URLS)}, got {url!r}", param="url")
    if not isinstance(fields["body"], dict):
        raise InvalidRequestError("body: expected an object", param="body")
    return Line(number=number, custom_id=custom_id, url=url, body=fields["body"])


class RequestWriter:
    """Makes of lines what `service` takes. `model` is for those that name none; `others` are other providers' names."""

    def __init__(self, service: BatchService, model: str | None, others: Iterable[str]) -> None:
        self._service = service
        self._model = model
        self._others = frozenset(others) - {service.name}

    def write(self, custom_id: str, line: Line) -> Written:
        """The request of `line` under the id `custom_id`. Errors: InvalidRequestError that begins with its number."""
        try:
            if line.url == CHAT_URL:
                return self._chat(custom_id, line.body)
            return self._embedding(custom_id, line.body)
        except InvalidRequestError as error:
            raise at_line(line.number, error) from error

    def _chat(self, custom_id: str, body: dict[str, Any]) -> Written:
        call = read_chat(encode(body), request_id=custom_id, tenant="")
        if call.stream:
            raise UnsupportedError("stream: expected false; a batch gives whole answers", param="stream")
        request: LLMRequest = call.requests[0]
        validate_request(request)
        model = self._named(request.model)
        item = self._service.write_chat(custom_id, request, model)
        most = Usage(
            prompt_tokens=round(estimated_prompt_tokens(request)),
            completion_tokens=(request.max_tokens or 0) * request.n,
        )
        return Written(item=item, model=model, most=most)

    def _embedding(self, custom_id: str, body: dict[str, Any]) -> Written:
        data = encode(body)
        request, _ = read_embedding_body(data, request_id=custom_id, tenant="")
        validate_embedding(request)
        model = self._named(request.model)
        item = self._service.write_embedding(custom_id, data, model)
        num_tokens = round(sum(map(len, request.inputs)) / CHARACTERS_PER_TOKEN)
        return Written(item=item, model=model, most=Usage(prompt_tokens=num_tokens, completion_tokens=0))

    def _named(self, model: str | None) -> str:
        """The model's name at the provider."""
        named = model or self._model
        if named is None:
            raise InvalidRequestError("model: this field is required where no model is given for all", param="model")
        prefix, slash, rest = named.partition("/")
        if slash and rest and prefix == self._service.name:
            return rest
        if slash and prefix in self._others:
            raise InvalidRequestError(
                f"model: '{named}' is {prefix}'s, and this job goes to {self._service.name}", param="model"
            )
        return named
