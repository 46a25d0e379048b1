"""Have embeddings that are asked for side by side made in one call. Knows embedding requests; when they go together,
the batcher knows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from autobot_llm.cloud.request_batching import CloudRequestBatcher
from autobot_llm.errors import InvalidRequestError
from autobot_llm.providers.base import Embedder
from autobot_llm.types import EmbeddingRequest, EmbeddingResponse, Usage

# What is larger gains little from company, and ten of these stay within what providers take in one call (OpenAI: 2,048
# texts and 300,000 tokens).
MOST_INPUTS = 200
MOST_CHARACTERS = 60_000

Key = tuple[str | None, int | None, str, bytes]


class BatchedEmbedder:
    """`inner`, asked for several requests at a time while it is busy.

    A request that finds no other one of its kind under way is sent at once: it would gain nothing by waiting. Where a
    shared call is refused, each request is sent alone, so that one that is wrong does not fail the others.
    """

    def __init__(self, inner: Embedder, window_ms: float, max_size: int) -> None:
        self._inner = inner
        self._window_ms = window_ms
        self._max_size = max_size
        self._num_under_way: dict[Key, int] = {}
        self._batchers: dict[Key, CloudRequestBatcher[EmbeddingRequest, EmbeddingResponse]] = {}
        self._num_shared_calls = 0
        self._num_shared_requests = 0

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResponse:
        """As `Embedder.embed`. The usage of a shared call is divided by the length of what was sent."""
        if len(request.inputs) > MOST_INPUTS or _length(request) > MOST_CHARACTERS:
            return await self._inner.embed(request)
        key = (request.model, request.dimensions, request.tenant, msgspec.json.encode(request.extra_body))
        num_others = self._num_under_way.get(key, 0)
        self._num_under_way[key] = num_others + 1
        try:
            if not num_others:
                return await self._inner.embed(request)
            if (batcher := self._batchers.get(key)) is None:
                batcher = CloudRequestBatcher(self._window_ms, self._max_size, send=self._send)
                self._batchers[key] = batcher
            return await batcher.add_request(request)
        finally:
            self._num_under_way[key] -= 1
            if not self._num_under_way[key]:  # nobody of this kind is left
                del self._num_under_way[key]
                self._batchers.pop(key, None)

    async def close(self) -> None:
        """Give up what is under way. May be called again."""
        await asyncio.gather(*(batcher.close() for batcher in self._batchers.values()))

    def metrics(self) -> dict[str, float]:
        return {"num_shared_calls": self._num_shared_calls, "num_requests_in_shared_calls": self._num_shared_requests}

    async def _send(self, requests: Sequence[EmbeddingRequest]) -> Sequence[EmbeddingResponse | Exception]:
        if len(requests) == 1:
            return [await self._inner.embed(requests[0])]
        timeouts = [request.timeout for request in requests]
        together = msgspec.structs.replace(
            requests[0],
            inputs=[one for request in requests for one in request.inputs],
            timeout=None if None in timeouts else max(timeout for timeout in timeouts if timeout is not None),
        )
        try:
            response = await self._inner.embed(together)
        except InvalidRequestError:
            alone = await asyncio.gather(*map(self._inner.embed, requests), return_exceptions=True)
            return [_raised_unless_ours(one) for one in alone]
        self._num_shared_calls += 1
        self._num_shared_requests += len(requests)
        return _divided(response, requests)


def _raised_unless_ours(outcome: EmbeddingResponse | BaseException) -> EmbeddingResponse | Exception:
    if isinstance(outcome, BaseException) and not isinstance(outcome, Exception):
        raise outcome
    return outcome


def _length(request: EmbeddingRequest) -> int:
    return sum(map(len, request.inputs))


def _divided(response: EmbeddingResponse, requests: Sequence[EmbeddingRequest]) -> list[EmbeddingResponse]:
    """Each request's part of the vectors and of the tokens, which add up to what was counted."""
    total_length = sum(map(_length, requests)) or 1
    responses = []
    first = length = num_told = 0
    for request in requests:
        end = first + len(request.inputs)
        length += _length(request)
        num_until_here = response.usage.prompt_tokens * length // total_length
        responses.append(
            EmbeddingResponse(
                vectors=response.vectors[first:end],
                model=response.model,
                provider=response.provider,
                usage=Usage(prompt_tokens=num_until_here - num_told, completion_tokens=0),
                request_id=request.request_id or response.request_id,
            )
        )
        first, num_told = end, num_until_here
    return responses
