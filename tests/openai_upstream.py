"""A server that speaks OpenAI's language and is strict about it. For the tests of the provider and of the server.

Every body is held against the shapes that OpenAI publishes with its client, `openai.types`: a field that is not
there, at any depth, or a value of another type, is answered with 400 and recorded in `complaints`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import struct
import types
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import typing_extensions as typing  # the client declares its shapes with it
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming,
    CompletionCreateParamsStreaming,
)
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as TextParamsNonStreaming
from openai.types.completion_create_params import CompletionCreateParamsStreaming as TextParamsStreaming
from openai.types.embedding_create_params import EmbeddingCreateParams
from raw_server import Asked, RawServer, Wire, raw_server

Json = dict[str, Any]
Script = Callable[[Json], "Json | list[Json]"]

_SHAPES: dict[str, tuple[Any, Any]] = {  # of a streamed and of a whole answer
    "/chat/completions": (CompletionCreateParamsStreaming, CompletionCreateParamsNonStreaming),
    "/completions": (TextParamsStreaming, TextParamsNonStreaming),
    "/embeddings": (None, EmbeddingCreateParams),
}
# What vLLM adds to OpenAI's shapes, with the types that its documentation gives.
VLLM_FIELDS = {
    "top_k": int, "min_p": float, "min_tokens": int, "stop_token_ids": list[int], "ignore_eos": bool,
    "repetition_penalty": float, "priority": int,
}  # fmt: skip


def complaint(path: str, body: Json, extra: dict[str, Any]) -> str | None:
    """What the published shapes do not allow in `body`, or None; `extra` are types of more fields."""
    streaming, plain = _SHAPES[path]
    return _wrong_object(streaming if body.get("stream") else plain, body, "body", extra)


def _wrong(kind: Any, value: object, place: str) -> str | None:
    """Why `value` is not of the type `kind`, exactly, at any depth; None where it is."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in (Any, object):
        return None
    if origin in (typing.Union, types.UnionType):
        reasons = [_wrong(one, value, place) for one in arguments]
        return None if None in reasons else max(reasons, key=lambda reason: len((reason or "").partition(":")[0]))
    if origin in (typing.Required, typing.NotRequired, typing.Annotated):
        return _wrong(arguments[0], value, place)
    if origin is typing.Literal:
        return None if value in arguments else f"{place}: {value!r} is none of {arguments}"
    if typing.is_typeddict(kind):
        return _wrong_object(kind, value, place)
    if origin is dict:
        items = value.items() if isinstance(value, dict) else ()
        inner = next(filter(None, (_wrong(arguments[1], item, f"{place}.{key}") for key, item in items)), None)
        return inner if isinstance(value, dict) else f"{place}: {value!r} is no object"
    if origin is not None and issubclass(origin, Iterable):
        items = list(value) if isinstance(value, list) else []
        inner = next(filter(None, (_wrong(arguments[0], item, f"{place}[{i}]") for i, item in enumerate(items))), None)
        return inner if isinstance(value, list) else f"{place}: {value!r} is no list"
    accepted = {float: (int, float), type(None): type(None)}.get(kind, kind)
    is_right = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    return None if is_right else f"{place}: {value!r} is no {kind}"


def _wrong_object(kind: Any, value: object, place: str, extra: dict[str, Any] | None = None) -> str | None:
    if not isinstance(value, dict):
        return f"{place}: {value!r} is no object"
    hints = typing.get_type_hints(kind, include_extras=True) | (extra or {})
    if unknown := value.keys() - hints.keys():
        return f"{place}: unknown fields {sorted(unknown)}"
    # Not `__required_keys__`: it does not see the marks of classes whose annotations are strings, as these are.
    required = {name for name, hint in hints.items() if typing.get_origin(hint) is typing.Required}
    if missing := required - value.keys():
        return f"{place}: missing fields {sorted(missing)}"
    return next(filter(None, (_wrong(hints[name], item, f"{place}.{name}") for name, item in value.items())), None)


def chunk(delta: Json, *, finish: str | None = None, index: int = 0, **fields: Any) -> Json:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish} | fields
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m-1", "choices": [choice]}


USAGE = {
    "prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17,
    "prompt_tokens_details": {"cached_tokens": 8, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 2, "audio_tokens": 0},
}  # fmt: skip
LAST = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m-1", "choices": [],
        "usage": USAGE}  # fmt: skip


def whole(message: Json, finish: str = "stop", **fields: Any) -> Json:
    choice = {"index": 0, "message": {"role": "assistant", "content": None, "refusal": None} | message,
              "logprobs": None, "finish_reason": finish} | fields  # fmt: skip
    return {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m-1", "choices": [choice],
            "usage": USAGE, "system_fingerprint": "fp"}  # fmt: skip


def hello(body: Json) -> Json | list[Json]:
    """The same short answer, as a whole or in pieces, as the request wants it."""
    if not body.get("stream"):
        return whole({"content": "Hello, world"})
    pieces = [chunk({"role": "assistant", "content": ""}), chunk({"content": "Hello, "}), chunk({"content": "world"})]
    return [*pieces, chunk({}, finish="stop"), LAST]


def vector(text: object, size: int) -> list[float]:
    """A vector of `size` exact float32 numbers that tells its text from others."""
    return [float((hash(str(text)) >> shift) % 256) / 256 for shift in range(size)]


@dataclass
class Upstream:
    """What was asked of the server, and what was wrong with it. `script` answers what passes the check."""

    script: Script = hello
    extra_fields: dict[str, Any] = field(default_factory=dict)
    models: list[str] = field(default_factory=lambda: ["m-1", "m-2"])
    headers: dict[str, str] = field(default_factory=dict)
    bodies: list[Json] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    server: RawServer = field(default_factory=RawServer)

    @property
    def url(self) -> str:
        return f"{self.server.url}/v1"

    async def play(self, wire: Wire, asked: Asked) -> None:
        path = asked.path.partition("?")[0].removeprefix("/v1")
        if path == "/models":
            data = [{"id": model, "object": "model", "created": 5, "owned_by": "x"} for model in self.models]
            await wire.reply(json.dumps({"object": "list", "data": data}).encode(), content_type="application/json")
            return
        body = json.loads(asked.body)
        self.bodies.append(body)
        if (wrong := complaint(path, body, self.extra_fields)) is not None:
            self.complaints.append(wrong)
            error = {"message": wrong, "type": "invalid_request_error", "param": None, "code": None}
            await wire.reply(json.dumps({"error": error}).encode(), status=400, content_type="application/json")
            return
        answer = embeddings(body) if path == "/embeddings" else self.script(body)
        if isinstance(answer, dict):
            data = json.dumps(answer).encode()
            await wire.reply(data, content_type="application/json; charset=utf-8", **self.headers)
            return
        await wire.begin_stream("text/event-stream; charset=utf-8", **self.headers)
        for one in answer:
            await wire.piece(b"data: " + json.dumps(one).encode() + b"\n\n")
        await wire.piece(b"data: [DONE]\n\n")
        await wire.end_stream()


def embeddings(body: Json) -> Json:
    given = body["input"]
    inputs = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    data = []
    for index, one in enumerate(inputs):
        numbers = vector(one, body.get("dimensions", 8))
        packed = base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
        data.append({"object": "embedding", "index": index,
                     "embedding": packed if body.get("encoding_format") == "base64" else numbers})  # fmt: skip
    return {"object": "list", "data": data[::-1], "model": "e-1", "usage": {"prompt_tokens": 3, "total_tokens": 3}}


@contextlib.asynccontextmanager
async def openai_upstream(script: Script = hello, **fields: Any) -> AsyncIterator[Upstream]:
    """Serve `script` on a free port."""
    upstream = Upstream(script, **fields)
    async with raw_server(upstream.play) as server:
        upstream.server = server
        yield upstream
