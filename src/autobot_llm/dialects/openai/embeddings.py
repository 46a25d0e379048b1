"""Embeddings on the wire, both ways: vectors as numbers or as base64 of little-endian float32. Knows no connection.

Format: https://platform.openai.com/docs/api-reference/embeddings. OpenAI's own client asks for base64 unless told
otherwise.
"""

from __future__ import annotations

import base64
import binascii
import sys
from array import array
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from autobot_llm.dialects.bodies import convert, encode, read_object
from autobot_llm.errors import InvalidRequestError, ProviderError
from autobot_llm.types import EmbeddingRequest, EmbeddingResponse, Usage

EncodingFormat = Literal["float", "base64"]


class EmbeddingBody(msgspec.Struct, kw_only=True):
    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: EncodingFormat | None = None
    dimensions: int | None = None
    user: str | None = None  # a note to OpenAI's service, without meaning here


def read_embedding_body(data: bytes, *, request_id: str, tenant: str) -> tuple[EmbeddingRequest, EncodingFormat]:
    """Read the body of `POST /v1/embeddings`. Errors: `InvalidRequestError` with the field in `param`."""
    fields = read_object(data)
    body = convert(fields, EmbeddingBody)
    known = EmbeddingBody.__struct_fields__
    request = EmbeddingRequest(
        inputs=_inputs(body.input),
        model=body.model,
        dimensions=body.dimensions,
        tenant=tenant,
        request_id=request_id,
        extra_body={name: value for name, value in fields.items() if name not in known and value is not None},
    )
    return request, body.encoding_format or "float"


def _inputs(given: str | list[str | int | list[int]]) -> list[str | list[int]]:
    if isinstance(given, str):
        return [given]
    token_ids = [item for item in given if isinstance(item, int)]
    if given and len(token_ids) == len(given):
        return [token_ids]
    inputs = [item for item in given if not isinstance(item, int)]
    if not inputs or token_ids:
        raise InvalidRequestError(
            "input: expected a text, texts, token ids or lists of token ids; not empty, not mixed",
            param="input",
        )
    return inputs


def embedding_reply(response: EmbeddingResponse, encoding: EncodingFormat) -> bytes:
    """The body of the answer to `POST /v1/embeddings`. What was not charged again is told as OpenAI does for chats."""
    usage = response.usage
    told: dict[str, Any] = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.total_tokens}
    if usage.cached_tokens:
        told["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": to_base64(vector) if encoding == "base64" else list(vector),
        }
        for index, vector in enumerate(response.vectors)
    ]
    return encode(
        {
            "object": "list",
            "data": data,
            "model": response.model,
            "usage": told,
        }
    )


def to_base64(vector: Sequence[float]) -> str:
    """float32, little-endian, in base64."""
    floats = vector if isinstance(vector, array) and vector.typecode == "f" else array("f", vector)
    return base64.b64encode(_little_endian(floats).tobytes()).decode("ascii")


def from_base64(text: str) -> array[float]:
    """The vector that `to_base64` wrote. Raises ValueError."""
    floats = array("f")
    floats.frombytes(base64.b64decode(text, validate=True))
    return _little_endian(floats)


def _little_endian(floats: array[float]) -> array[float]:
    if sys.byteorder == "big":
        floats = floats[:]
        floats.byteswap()
    return floats


class _Embedding(msgspec.Struct):
    embedding: str | list[float]
    index: int | None = None


class _EmbeddingUsage(msgspec.Struct):
    prompt_tokens: int | None = None


class _Embeddings(msgspec.Struct):
    data: list[_Embedding]
    model: str | None = None
    usage: _EmbeddingUsage | None = None


def read_embeddings(data: bytes, request: EmbeddingRequest, *, provider: str, model: str) -> EmbeddingResponse:
    """The answer of `POST /embeddings`, its vectors in the order of the inputs. Raises ProviderError."""
    try:
        answer = msgspec.json.decode(data, type=_Embeddings)
        vectors = {
            position if one.index is None else one.index: _vector(one.embedding)
            for position, one in enumerate(answer.data)
        }
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError, binascii.Error) as exc:
        raise ProviderError(f"{provider} sent no embeddings of OpenAI's form: {exc}", code="malformed_answer") from exc
    if sorted(vectors) != list(range(len(request.inputs))):
        raise ProviderError(
            f"{provider} sent {len(vectors)} vectors for {len(request.inputs)} inputs", code="malformed_answer"
        )
    usage = answer.usage or _EmbeddingUsage()
    return EmbeddingResponse(
        vectors=tuple(vectors[index] for index in range(len(vectors))),
        model=answer.model or model,
        provider=provider,
        usage=Usage(prompt_tokens=usage.prompt_tokens or 0, completion_tokens=0),
        request_id=request.request_id or "",
    )


def _vector(embedding: str | list[float]) -> Sequence[float]:
    return from_base64(embedding) if isinstance(embedding, str) else array("f", embedding)
