"""Send requests within the provider's rate limits. Knows requests and what providers tell; the limiter knows how."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from autobot_llm.cloud.rate_limits import RateLimiter
from autobot_llm.errors import OverloadedError
from autobot_llm.providers.base import Embedder, Link, Provider, Streamer, TellsRateLimits
from autobot_llm.report import OptimizationOutcome
from autobot_llm.settings import Settings
from autobot_llm.types import EmbeddingRequest, EmbeddingResponse, Event, Finish, LLMRequest

NAME = "rate_limit_handling"
CHARACTERS_PER_TOKEN = 4
_MOST_MODELS = 1000  # whose limits are remembered

_NO_LIMITS = OptimizationOutcome(name=NAME, applied=False, reason="the provider tells no rate limits")
_NO_WAIT = OptimizationOutcome(name=NAME, applied=False, reason="the request was within the provider's rate limits")


class RateLimitLink(Link):
    """Puts `RateLimited` in front of every provider over HTTP."""

    def __init__(self, settings: Settings) -> None:
        self._max_queued = settings.cloud_max_queued_requests
        self._default_timeout = settings.timeout
        self._limited: dict[str, RateLimited] = {}

    def wrap(self, chain: Streamer, provider: Provider) -> Streamer:
        self._limited[provider.name] = limited = RateLimited(
            chain, provider, max_queued=self._max_queued, default_timeout=self._default_timeout
        )
        return limited

    def wrap_embedder(self, embedder: Embedder, provider: Provider) -> Embedder:
        return RateLimitedEmbedder(embedder, self._limited[provider.name])

    def metrics_of(self, provider: str) -> dict[str, float]:
        limited = self._limited.get(provider)
        return limited.metrics() if limited is not None else {}


class RateLimited:
    """`inner`, which ends in `provider`, asked no faster than its answers allow. Each model has limits of its own.

    `max_queued` requests may wait for one model; `default_timeout` (seconds) is that of requests without one.
    """

    def __init__(self, inner: Streamer, provider: Provider, *, max_queued: int, default_timeout: float | None) -> None:
        self._inner = inner
        self._name = provider.name
        self._max_queued = max_queued
        self._default_timeout = default_timeout
        self._limiters: dict[str | None, RateLimiter] = {}
        teller: object = provider
        self._teller = teller if isinstance(teller, TellsRateLimits) else None

    async def stream(self, request: LLMRequest) -> AsyncGenerator[Event, None]:
        """The answer, once there is a place for it. Raises OverloadedError where that would take too long."""
        limiter = self._limiters.get(request.model)
        outcome, num_reserved = _NO_LIMITS, 0.0
        if limiter is not None:
            num_reserved = estimated_tokens(request) if limiter.counts_tokens else 0.0
            waited = await self.place(limiter, request.tenant, num_reserved, request.timeout)
            outcome = _NO_WAIT if not waited else _waited(waited)
        is_first = True
        try:
            async with aclosing(self._inner.stream(request)) as events:
                async for event in events:
                    if is_first:
                        is_first = False
                        self.learn(request.model)
                    if type(event) is Finish:
                        if num_reserved and limiter is not None:
                            limiter.correct(num_reserved - event.usage.total_tokens)
                        event = msgspec.structs.replace(event, optimizations=(*event.optimizations, outcome))
                    yield event
        except OverloadedError as error:
            self.pause(request.model, error)
            raise

    def metrics(self) -> dict[str, float]:
        limiters = self._limiters.values()
        return {
            "num_rate_limit_queued": sum(limiter.num_queued for limiter in limiters),
            "num_rate_limit_waits": sum(limiter.num_waits for limiter in limiters),
            "rate_limit_wait_seconds": sum(limiter.seconds_waited for limiter in limiters),
        }

    # For RateLimitedEmbedder too

    def limiter_of(self, model: str | None) -> RateLimiter | None:
        return self._limiters.get(model)

    async def place(self, limiter: RateLimiter, tenant: str, num_tokens: float, timeout: float | None) -> float:  # noqa: ASYNC109  # for waits
        longest = timeout if timeout is not None else self._default_timeout
        return await limiter.acquire(tenant, num_tokens, longest=longest)

    def pause(self, model: str | None, error: OverloadedError) -> None:
        if error.retry_after is not None:
            self._limiter(model).pause(error.retry_after)

    def learn(self, model: str | None) -> None:
        if self._teller is not None and (told := self._teller.rate_limits_of(model)) is not None:
            self._limiter(model).observe(told)

    def _limiter(self, model: str | None) -> RateLimiter:
        if (known := self._limiters.get(model)) is not None:
            return known
        if len(self._limiters) >= _MOST_MODELS:
            idle = next((key for key, one in self._limiters.items() if not one.num_queued), None)
            self._limiters.pop(idle, None)
        self._limiters[model] = limiter = RateLimiter(self._name, max_queued=self._max_queued)
        return limiter


class RateLimitedEmbedder:
    """`inner`, asked no faster than its answers allow; `limited` knows the limits, which chats share."""

    def __init__(self, inner: Embedder, limited: RateLimited) -> None:
        self._inner = inner
        self._limited = limited

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResponse:
        """As `Embedder.embed`. Raises OverloadedError where waiting for a place would take too long."""
        limited = self._limited
        if (limiter := limited.limiter_of(request.model)) is not None:
            num_tokens = sum(map(len, request.inputs)) / CHARACTERS_PER_TOKEN
            await limited.place(limiter, request.tenant, num_tokens, request.timeout)
        try:
            response = await self._inner.embed(request)
        except OverloadedError as error:
            limited.pause(request.model, error)
            raise
        limited.learn(request.model)
        return response


def _waited(seconds: float) -> OptimizationOutcome:
    return OptimizationOutcome(
        name=NAME, applied=True, reason=f"waited {seconds:.2f} s for a place within the provider's rate limits"
    )


def estimated_tokens(request: LLMRequest) -> float:
    """About how many tokens the request takes, by its length and by the most that it lets be generated."""
    return estimated_prompt_tokens(request) + (request.max_tokens or 0) * request.n


def estimated_prompt_tokens(request: LLMRequest) -> float:
    """About how many tokens the prompt has, by the length of its text."""
    prompt = request.prompt
    if prompt is None:
        length = sum(map(_length, (message.content for message in request.messages or ())))
        return length / CHARACTERS_PER_TOKEN
    return len(prompt) / CHARACTERS_PER_TOKEN if isinstance(prompt, str) else float(len(prompt))


def _length(content: object) -> int:
    """The characters of a message's text; pictures and the like are not counted."""
    if isinstance(content, str):
        return len(content)
    if not isinstance(content, list):
        return 0
    return sum(len(part["text"]) for part in content if isinstance(part.get("text"), str))
