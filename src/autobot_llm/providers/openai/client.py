"""A client of one server that speaks OpenAI's language. Knows when to read what; shapes are the dialect's."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Mapping

from autobot_llm.dialects.error_in_stream import ErrorInStream
from autobot_llm.dialects.openai import answers, embeddings, requests
from autobot_llm.dialects.openai.answers import ChatReader, TextReader
from autobot_llm.dialects.openai.rate_limits import read_rate_limits
from autobot_llm.dialects.rate_limits import RateLimits
from autobot_llm.errors import ProviderError
from autobot_llm.providers.openai.endpoint import Endpoint
from autobot_llm.report import OptimizationOutcome
from autobot_llm.transport.pool import HttpPool, HttpStream, Network, PoolLimits, Timeouts
from autobot_llm.transport.reuse import connection_pooling
from autobot_llm.transport.sse import SseParser
from autobot_llm.types import (
    EmbeddingRequest,
    EmbeddingResponse,
    Event,
    Finish,
    LLMRequest,
    ModelInfo,
    Start,
    Timings,
    Usage,
)

MODELS = "/models"
EMBEDDING_SECONDS = 120.0

_EVENTS = "text/event-stream"
_JSON = "application/json"
# A whole answer begins when it is complete, so its first byte has no time limit but the request's own.
_WHOLE = Timeouts(first_token=None)
_STREAMED = Timeouts()


class OpenAIClient:
    """Asks the server at `endpoint`; `name` is the provider in events and errors. Connects when first asked."""

    def __init__(self, endpoint: Endpoint, *, name: str, limits: PoolLimits, network: Network) -> None:
        self.endpoint = endpoint
        self._name = name
        self._pool = HttpPool(endpoint.base_url, headers=endpoint.headers, limits=limits, network=network, name=name)
        self.rate_limits: RateLimits | None = None  # as the latest answer told
        self._rate_limits_of: dict[str, RateLimits] = {}  # each model has its own

    async def close(self) -> None:
        await self._pool.close()

    async def warm(self, seconds: float) -> None:
        """Have a connection ready. Raises what `HttpPool.warm` does."""
        await self._pool.warm(seconds)

    def rate_limits_of(self, model: str) -> RateLimits | None:
        """What the server said of its limits with its latest answer of `model`."""
        return self._rate_limits_of.get(model)

    def metrics(self) -> dict[str, float]:
        return self._pool.metrics()

    async def models(self) -> list[ModelInfo]:
        """What the server serves. Raises the errors of `HttpPool.request`."""
        if self.endpoint.deployment is not None:
            return [ModelInfo(id=self.endpoint.deployment, provider=self._name)]
        answer = await self._pool.request("GET", MODELS)
        return answers.read_models(answer.body, self._name)

    async def embed(self, request: EmbeddingRequest, model: str) -> EmbeddingResponse:
        """One vector for each input. Raises the errors of `HttpPool.request`."""
        body = requests.write_embedding(request, model)
        timeout = request.timeout or EMBEDDING_SECONDS
        answer = await self._pool.request("POST", requests.EMBEDDINGS, body=body, timeout=timeout)
        self._note_rate_limits(model, answer.headers)
        return embeddings.read_embeddings(answer.body, request, provider=self._name, model=model)

    async def stream(self, request: LLMRequest, model: str) -> AsyncGenerator[Event, None]:
        """The answer's events. `request.stream` decides whether the server sends it in pieces or as a whole.

        Raises UnsupportedError and InvalidRequestError before anything is sent, then the errors of `HttpPool.stream`.
        """
        request_id = request.request_id or f"req-{secrets.token_hex(12)}"
        reader: ChatReader | TextReader
        if request.messages is not None:
            path, body = requests.CHAT, requests.write_chat(request, model, self.endpoint.flavour)
            reader = ChatReader(request_id, self._name, model, request.n)
        else:
            path, body = requests.COMPLETIONS, requests.write_completion(request, model, self.endpoint.flavour)
            reader = TextReader(request_id, self._name, model, request.num_choices)
        began = time.perf_counter()
        first: float | None = None
        timeouts = _STREAMED if request.stream else _WHOLE
        may_repeat = not request.has_side_effects
        async with self._pool.stream("POST", path, body=body, timeouts=timeouts, may_repeat=may_repeat) as answer:
            self._note_rate_limits(model, answer.headers)
            parser = self._parser(answer)
            if parser is None:
                data = await answer.body(self._pool.limits.max_body_bytes)
                for event in self._events(reader, data):
                    yield event
            while parser is not None and not reader.is_done and (piece := await answer.read()):
                for sent in parser.feed(piece):
                    for event in self._events(reader, sent.data):
                        if first is None and type(event) is not Start:
                            first = time.perf_counter()
                        yield event
            if missing := reader.num_missing:
                raise ProviderError(
                    f"{self._name} ended its answer before it was complete: {missing} of {request.num_choices} choices "
                    "missing",
                    code="truncated_answer",
                )
            if reader.is_done:
                await answer.end()
        now = time.perf_counter()
        yield Finish(
            usage=reader.usage,
            timings=Timings(time_to_first_token=(first or now) - began, total=now - began),
            optimizations=(connection_pooling(is_reused=answer.is_reused), prompt_caching(reader.usage)),
        )

    def _note_rate_limits(self, model: str, headers: Mapping[str, str]) -> None:
        self.rate_limits = limits = read_rate_limits(headers)
        if limits is not None:
            self._rate_limits_of[model] = limits
        else:
            self._rate_limits_of.pop(model, None)

    def _parser(self, answer: HttpStream) -> SseParser | None:
        """What cuts the answer into events; None for a whole one, which a server may send though asked to stream."""
        kind = answer.headers.get("content-type", "")
        if kind.startswith(_EVENTS):
            return SseParser()
        if kind.startswith(_JSON) or not kind:
            return None
        raise ProviderError(
            f"{self._name} answered with {kind!r}: expected {_JSON} or {_EVENTS}", code="malformed_answer"
        )

    def _events(self, reader: ChatReader | TextReader, data: bytes) -> list[Event]:
        try:
            return reader.read(data)
        except ErrorInStream as exc:
            raise self._pool.error_from(exc.status, {}, exc.body) from exc


def prompt_caching(usage: Usage) -> OptimizationOutcome:
    """What the server says that it did not compute again."""
    cached = usage.cached_tokens
    return OptimizationOutcome(
        name="prompt_caching",
        applied=cached > 0,
        reason=f"the provider found {cached:,} of {usage.prompt_tokens:,} prompt tokens in its cache",
        tokens_saved=cached or None,
    )
