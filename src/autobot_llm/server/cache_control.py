"""What an HTTP request wants of kept answers and vectors: the body's field `cache`, else Cache-Control. Keeps nothing.

The header's directives are RFC 9111's (section 5.2.1). A header alone never lets an answer be reused that was drawn at
random: clients send one without being asked. The body's field does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from autobot_llm.dialects.bodies import convert
from autobot_llm.errors import InvalidRequestError
from autobot_llm.types import CacheControl, EmbeddingRequest, LLMRequest
from autobot_llm.universal.request_key import may_be_shared

FIELD = "cache"

RequestT = TypeVar("RequestT", LLMRequest, EmbeddingRequest)


class _Body(msgspec.Struct):
    cache: CacheControl


def with_cache_control(request: LLMRequest, header: bytes | None) -> LLMRequest:
    """`request` with what its body and `header` (Cache-Control) say. Raises InvalidRequestError for a bad field."""
    if FIELD in request.extra_body:
        return _told_by_body(request)
    if header is None or request.cache is not None:
        return request
    said = _said(header.decode("latin-1"))
    if said is None or (said.mode != "only-if-cached" and not may_be_shared(request)):
        return request
    return msgspec.structs.replace(request, cache=said)


def with_vector_control(request: EmbeddingRequest, header: bytes | None) -> EmbeddingRequest:
    """As `with_cache_control`. The same text has the same vector, so a header alone may steer its reuse, too."""
    if FIELD in request.extra_body:
        return _told_by_body(request)
    return request if header is None else msgspec.structs.replace(request, cache=_said(header.decode("latin-1")))


def _told_by_body(request: RequestT) -> RequestT:
    extra = {name: value for name, value in request.extra_body.items() if name != FIELD}
    if not isinstance(request.extra_body[FIELD], Mapping):
        raise InvalidRequestError("cache: expected an object with mode, ttl, max_age and semantic", param=FIELD)
    control = convert(request.extra_body, _Body).cache
    return msgspec.structs.replace(request, extra_body=extra, cache=control)


def _said(header: str) -> CacheControl | None:
    directives: dict[str, str] = {}
    for part in header.lower().split(","):
        name, _, value = part.partition("=")
        directives[name.strip()] = value.strip().strip('"')
    if "no-store" in directives:
        return CacheControl(mode="bypass")
    age = directives.get("max-age", "")
    max_age = int(age) if age.isascii() and age.isdigit() else None
    if "only-if-cached" in directives:
        return CacheControl(mode="only-if-cached", max_age=max_age)
    if "no-cache" in directives or max_age == 0:
        return CacheControl(mode="refresh")
    return None if max_age is None else CacheControl(max_age=max_age)
