"""Read Ollama request bodies into requests of ours. Knows the wire's fields; knows nothing of connections or providers.

What only Ollama has a meaning for is kept apart as `Hints`: whoever knows the provider hands them on to another Ollama,
or sees that they change nothing. Any other field travels in `extra_body`, where the provider honours or refuses it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from autobot_llm.dialects.bodies import convert, read_object
from autobot_llm.dialects.ollama.messages import (
    WireMessage,
    read_content,
    read_format,
    read_messages,
    read_think,
    read_tools,
)
from autobot_llm.dialects.ollama.options import read_options
from autobot_llm.errors import InvalidRequestError, UnsupportedError
from autobot_llm.types import ChatMessage, EmbeddingRequest, LLMRequest

DEFAULT_TAG = ":latest"  # "name" and "name:latest" are one model
_PLAIN_TEMPLATE = re.compile(r"\{\{-?\s*\.Prompt\s*-?\}\}")
_DURATION_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Hints:
    """What a request says about the model's stay in memory, about a prompt that does not fit, and in `options` that no
    other provider has.

    `keep_alive` is as it was sent. `for_ollama` is all of it, for another Ollama's request.
    """

    num_ctx: int | None = None
    keep_alive: str | float | None = None
    truncate: bool | None = None
    shift: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def for_ollama(self) -> dict[str, Any]:
        fields = ("num_ctx", "keep_alive", "truncate", "shift")
        hints = {name: value for name in fields if (value := getattr(self, name)) is not None}
        return hints | ({"options": dict(self.options)} if self.options else {})

    @property
    def stay(self) -> str | float | None:
        """`keep_alive`, each way to write "not at all" being 0."""
        return 0 if self.unloads else self.keep_alive

    @property
    def unloads(self) -> bool:
        """Whether the model is to leave the memory at once."""
        return self.keep_alive is not None and parse_duration(self.keep_alive) == 0


@dataclass(frozen=True, slots=True)
class Call:
    """What one HTTP request asks for; `request` None only has the model loaded, or unloaded."""

    model: str
    request: LLMRequest | None
    stream: bool
    hints: Hints


@dataclass(frozen=True, slots=True)
class EmbedCall:
    """What one HTTP request for embeddings asks for; `request` None, an empty input, only has the model loaded."""

    model: str
    request: EmbeddingRequest | None
    hints: Hints = field(default_factory=Hints)


class SharedFields(msgspec.Struct, kw_only=True):
    """What both endpoints take."""

    model: str
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    think: bool | str | None = None
    keep_alive: str | float | None = None
    truncate: bool | None = None
    shift: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class ChatBody(SharedFields, kw_only=True):
    messages: list[WireMessage] | None = None
    tools: list[dict[str, Any]] | None = None


class GenerateBody(SharedFields, kw_only=True):
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    images: list[str] | None = None


class EmbedBody(msgspec.Struct, kw_only=True):
    model: str
    input: str | list[str] | None = None
    prompt: str | None = None
    truncate: bool | None = None
    dimensions: int | None = None
    keep_alive: str | float | None = None
    options: dict[str, Any] | None = None


BodyT = TypeVar("BodyT", ChatBody, GenerateBody, EmbedBody)


def read_chat(data: bytes, *, request_id: str, tenant: str) -> Call:
    """Read the body of `POST /api/chat`. Errors: InvalidRequestError with the field in `param`."""
    body, extra = _read(data, ChatBody)
    shared, hints = _shared(body, extra)
    request = None
    if body.messages:
        messages = read_messages(body.messages)
        tools = read_tools(body.tools)
        request = LLMRequest(messages=messages, tools=tools, request_id=request_id, tenant=tenant, **shared)
    return Call(model_name(body.model), request, body.stream is not False, hints)


def read_generate(data: bytes, *, request_id: str, tenant: str) -> Call:
    """Read the body of `POST /api/generate`. Errors: InvalidRequestError with the field in `param`.

    A prompt is one user message, unless it is `raw`, has a `suffix`, or has the template that is the prompt itself.
    """
    body, extra = _read(data, GenerateBody)
    _refuse_in_generate(body)
    if body.suffix:
        extra["suffix"] = body.suffix
    shared, hints = _shared(body, extra)
    request = None
    if body.prompt:
        asked = _asked(body, body.prompt)
        request = LLMRequest(request_id=request_id, tenant=tenant, **asked, **shared)
    return Call(model_name(body.model), request, body.stream is not False, hints)


def _refuse_in_generate(body: GenerateBody) -> None:
    if body.context:
        raise UnsupportedError(
            "context: the token ids of an earlier answer belong to the model that wrote them, and are not kept here; "
            "send the conversation as messages to /api/chat",
            param="context",
        )
    if body.template and not _PLAIN_TEMPLATE.fullmatch(body.template.strip()):
        raise UnsupportedError(
            "template: a model's own template is used here; expected {{ .Prompt }}, or raw=true and the prompt "
            "written out",
            param="template",
        )
    if body.raw and (body.template or body.system):
        param = "template" if body.template else "system"
        raise InvalidRequestError(f"{param}: raw=true sends the prompt as it is, without {param}", param=param)
    if body.images and (body.raw or body.template or body.suffix):
        raise UnsupportedError("images: only together with a prompt that is templated", param="images")
    if body.suffix and (body.raw or body.system):
        raise UnsupportedError("suffix: not together with raw or system", param="suffix")


def _asked(body: GenerateBody, prompt: str) -> dict[str, Any]:
    if body.raw or body.suffix or (body.template and not body.system):
        return {"prompt": prompt}
    if body.template:
        raise UnsupportedError("template: {{ .Prompt }} has no place for system", param="system")
    user = ChatMessage(role="user", content=read_content(prompt, body.images, "images"))
    return {"messages": [ChatMessage(role="system", content=body.system), user] if body.system else [user]}


def read_embed(data: bytes, *, request_id: str, tenant: str) -> EmbedCall:
    """Read the body of `POST /api/embed`, or of the older `/api/embeddings`, which has `prompt` for `input`.

    Errors: InvalidRequestError with the field in `param`.
    """
    body, extra = _read(data, EmbedBody)
    options = read_options(body.options or {})
    if options.fields:
        name = min(body.options or {})
        raise UnsupportedError(f"options.{name}: embeddings are not sampled", param=f"options.{name}")
    if body.keep_alive is not None:
        parse_duration(body.keep_alive)
    given = body.prompt if body.input is None else body.input
    texts = [given] if isinstance(given, str) and given else given or []
    hints = Hints(options.num_ctx, body.keep_alive, body.truncate, options=options.extra)
    if not texts:
        return EmbedCall(model_name(body.model), None, hints)
    request = EmbeddingRequest(
        inputs=list(texts),
        model=model_name(body.model),
        dimensions=body.dimensions,
        tenant=tenant,
        request_id=request_id,
        extra_body=extra,
    )
    return EmbedCall(model_name(body.model), request, hints)


def read_model(data: bytes) -> str:
    """The model that the body of `POST /api/show` names, under its older name too. Errors: InvalidRequestError."""
    fields = read_object(data)
    name = fields.get("model") or fields.get("name")
    if not isinstance(name, str):
        raise InvalidRequestError("model: this field is required", param="model")
    return model_name(name)


def model_name(name: str) -> str:
    """The name without the tag that is the default one."""
    return name.removesuffix(DEFAULT_TAG)


def _read(data: bytes, kind: type[BodyT]) -> tuple[BodyT, dict[str, Any]]:
    """The body, and its fields that nobody here knows."""
    fields = read_object(data)
    body = convert(fields, kind)
    if not body.model:
        raise InvalidRequestError("model: expected a name that is not empty", param="model")
    extra = {name: value for name, value in fields.items() if name not in body.__struct_fields__ and value is not None}
    return body, extra


def _shared(body: SharedFields, extra: Mapping[str, Any]) -> tuple[dict[str, Any], Hints]:
    """The fields of `LLMRequest` that both endpoints give, and the hints."""
    options = read_options(body.options or {})
    if body.keep_alive is not None:
        parse_duration(body.keep_alive)
    thinking = {} if body.think is None else {"reasoning_effort": read_think(body.think)}
    fields = options.fields | {
        "model": model_name(body.model),
        "stream": body.stream is not False,
        "response_format": read_format(body.format),
        "logprobs": _logprobs(body),
        "extra_body": {**extra, **thinking},
    }
    return fields, Hints(options.num_ctx, body.keep_alive, body.truncate, body.shift, options.extra)


def _logprobs(body: SharedFields) -> int | None:
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequestError("top_logprobs: only allowed together with logprobs: true", param="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def parse_duration(value: str | float) -> float:
    """Seconds of a `keep_alive`, a number of them or text as Go writes durations ("5m", "1h30m"); negative: for ever.

    Errors: InvalidRequestError.
    """
    seconds = float(value) if not isinstance(value, str) else _parse_text(value)
    if math.isnan(seconds):
        raise InvalidRequestError(
            f'keep_alive={value!r}: expected a number of seconds or a duration such as "5m" or "1h30m"',
            param="keep_alive",
        )
    return math.inf if seconds < 0 else seconds


def _parse_text(text: str) -> float:
    sign, digits = (-1.0, text[1:]) if text.startswith("-") else (1.0, text.removeprefix("+"))
    if digits == "0":
        return 0.0
    parts = _DURATION_PART.findall(digits)
    if not parts or "".join(number + unit for number, unit in parts) != digits:
        return math.nan
    return sign * sum(float(number) * _SECONDS[unit] for number, unit in parts)
