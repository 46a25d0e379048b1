"""Send requests within the provider's rate limits. Knows requests and what providers tell; the limiter knows how."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from autobot_llm.cloud.guarded_redis import GuardedRedis
from autobot_llm.cloud.limit_script import SCRIPT
from autobot_llm.cloud.limiters import Limiters
from autobot_llm.cloud.rate_limits import RateLimiter
from autobot_llm.errors import OverloadedError
from autobot_llm.providers.base import Embedder, Link, Provider, Streamer, TellsRateLimits
from autobot_llm.report import OptimizationOutcome
from autobot_llm.settings import Settings
from autobot_llm.types import EmbeddingRequest, EmbeddingResponse, Event, Finish, LLMRequest, MergedRequest

NAME = "rate_limit_handling"
CHARACTERS_PER_TOKEN = 4

_NO_LIMITS = OptimizationOutcome(name=NAME, applied=False, reason="the provider tells no rate limits")
_NO_WAIT = OptimizationOutcome(name=NAME, applied=False, reason="the request was within the provider's rate limits")


class RateLimitLink(Link):
    """Puts `RateLimited` in front of every provider over HTTP."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._worker = secrets.token_hex(8)
        self._limited: dict[str, RateLimited] = {}
        self._redis: GuardedRedis | None = None
        if settings.redis_url is not None:
            self._redis = GuardedRedis(
                settings.redis_url, SCRIPT, without="each worker keeps within its share of rate limits"
            )

    async def start(self) -> None:
        if self._redis is not None:
            await self._redis.start()

    async def close(self) -> None:
        await asyncio.gather(*(limited.limiters.close() for limited in self._limited.values()))
        if self._redis is not None:
            await self._redis.close()

    def wrap(self, chain: Streamer, provider: Provider) -> Streamer:
        tells: object = provider
        is_limited = isinstance(tells, TellsRateLimits) or bool(self._settings.cloud_rate_limits)
        limiters = Limiters(provider.name, self._settings, self._redis if is_limited else None, self._worker)
        limited = RateLimited(chain, provider, limiters, default_timeout=self._settings.timeout)
        self._limited[provider.name] = limited
        return limited

    def wrap_embedder(self, embedder: Embedder, provider: Provider) -> Embedder:
        return RateLimitedEmbedder(embedder, self._limited[provider.name])

    def metrics_of(self, provider: str) -> dict[str, float]:
        limited = self._limited.get(provider)
        figures = limited.metrics() if limited is not None else {}
        if self._redis is None:
            return figures
        return figures | {
            "shared_limits_up": float(self._redis.is_usable),
            "num_shared_limit_failures": self._redis.num_failures,
        }


class RateLimited:
    """`inner`, which ends in `provider`, asked no faster than its answers allow. Each model has limits of its own.

    `default_timeout` (seconds) is that of requests without one.
    """

    def __init__(
        self, inner: Streamer, provider: Provider, limiters: Limiters, *, default_timeout: float | None
    ) -> None:
        self.limiters = limiters
        self._inner = inner
        self._default_timeout = default_timeout
        teller: object = provider
        self._teller = teller if isinstance(teller, TellsRateLimits) else None

    async def stream(self, request: LLMRequest, *, may_wait: bool = True) -> AsyncGenerator[Event, None]:
        """The answer, once there is a place for it. Raises OverloadedError where that would take too long, and where
        it would take any time unless it `may_wait`.
        """
        limiter = self.limiters.get(request.model)
        outcome, num_reserved = _NO_LIMITS, 0.0
        if limiter is not None:
            num_reserved = estimated_tokens(request) if limiter.counts_tokens else 0.0
            timeout = request.timeout if may_wait else 0.0
            waited = await self.place(limiter, request.tenant, num_reserved, timeout)
            if waited:
                outcome = _waited(waited)
            elif limiter.knows_limits:
                outcome = _NO_WAIT
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

    def makes_wait(self, model: str | None) -> bool:
        """Whether one more call of `model` would have to wait for its place now."""
        limiter = self.limiters.get(model)
        return limiter is not None and limiter.makes_wait

    def metrics(self) -> dict[str, float]:
        return {
            "num_rate_limit_queued": sum(limiter.num_queued for limiter in self.limiters),
            "num_rate_limit_waits": sum(limiter.num_waits for limiter in self.limiters),
            "rate_limit_wait_seconds": sum(limiter.seconds_waited for limiter in self.limiters),
        }

    # For RateLimitedEmbedder too

    async def place(self, limiter: RateLimiter, tenant: str, num_tokens: float, timeout: float | None) -> float:  # noqa: ASYNC109  # for waits
        longest = timeout if timeout is not None else self._default_timeout
        return await limiter.acquire(tenant, num_tokens, longest=longest)

    def pause(self, model: str | None, error: OverloadedError) -> None:
        if error.retry_after is not None:
            self.limiters.make(model).pause(error.retry_after)

    def learn(self, model: str | None) -> None:
        if self._teller is not None and (told := self._teller.rate_limits_of(model)) is not None:
            self.limiters.make(model).observe(told)


class RateLimitedEmbedder:
    """`inner`, asked no faster than its answers allow; `limited` knows the limits, which chats share."""

    def __init__(self, inner: Embedder, limited: RateLimited) -> None:
        self._inner = inner
        self._limited = limited

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResponse:
        """As `Embedder.embed`. Raises OverloadedError where waiting for a place would take too long."""
        limited = self._limited
        if (limiter := limited.limiters.get(request.model)) is not None:
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
    return estimated_prompt_tokens(request) + (request.max_tokens or 0) * request.num_choices


def estimated_prompt_tokens(request: LLMRequest) -> float:
    """About how many tokens the prompt has, by the length of its text."""
    if isinstance(request, MergedRequest):
        lengths = (len(one) / CHARACTERS_PER_TOKEN if isinstance(one, str) else len(one) for one in request.prompts)
        return float(sum(lengths))
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
