"""Make the limiters of one provider's models, each worker's own or shared through a Redis. Knows settings and names."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Mapping

from autobot_llm.cloud.guarded_redis import GuardedRedis
from autobot_llm.cloud.rate_limits import OwnLimits, RateLimiter
from autobot_llm.cloud.shared_limits import SharedRateLimiter
from autobot_llm.settings import Settings

_MOST_MODELS = 1000  # whose limits are remembered


class Limiters:
    """The limiters of one provider by model (None: its default one). `redis` None: they are this worker's own."""

    def __init__(self, provider: str, settings: Settings, redis: GuardedRedis | None, worker: str) -> None:
        self._provider = provider
        self._max_queued = settings.cloud_max_queued_requests
        self._default_model = settings.default_model
        self._own = own_limits(settings.cloud_rate_limits)
        self._account = _account_of(provider, settings)
        self._redis = redis
        self._worker = worker
        self._by_model: dict[str | None, RateLimiter] = {}

    def __iter__(self) -> Iterator[RateLimiter]:
        return iter(self._by_model.values())

    def get(self, model: str | None) -> RateLimiter | None:
        """The limiter of `model`, where there may be a limit: told here, of our own, or learned by others."""
        known = self._by_model.get(model)
        if known is None and (self._redis is not None or self._own_of(model) is not None):
            return self.make(model)
        return known

    def make(self, model: str | None) -> RateLimiter:
        if (known := self._by_model.get(model)) is not None:
            return known
        if len(self._by_model) >= _MOST_MODELS:
            idle = next((key for key, one in self._by_model.items() if not one.num_queued), None)
            self._by_model.pop(idle, None)
        self._by_model[model] = limiter = self._made(model)
        return limiter

    async def close(self) -> None:
        shared = [one for one in self._by_model.values() if isinstance(one, SharedRateLimiter)]
        self._by_model.clear()
        await asyncio.gather(*(one.close() for one in shared))

    def _made(self, model: str | None) -> RateLimiter:
        own = self._own_of(model)
        if self._redis is None:
            return RateLimiter(self._provider, max_queued=self._max_queued, own=own)
        named = f"{self._account}\0{model or 'default:' + self._default_model}"
        return SharedRateLimiter(
            self._provider, max_queued=self._max_queued, own=own, redis=self._redis, worker=self._worker,
            key=f"{self._provider}:{hashlib.sha256(named.encode()).hexdigest()[:24]}",
        )  # fmt: skip

    def _own_of(self, model: str | None) -> OwnLimits | None:
        if not self._own:
            return None
        names = (f"{self._provider}/{model or self._default_model}", f"{self._provider}/*", "*")
        return next((self._own[name] for name in names if name in self._own), None)


def own_limits(lines: tuple[str, ...]) -> Mapping[str, OwnLimits]:
    """Limits by model, from lines such as "openai/gpt-5.4 500rpm 200000tpm"."""
    limits = {}
    for line in lines:
        model, *parts = line.split()
        by_unit = {part[-3:]: int(part[:-3]) for part in parts}
        limits[model] = OwnLimits(requests=by_unit.get("rpm"), tokens=by_unit.get("tpm"))
    return limits


def _account_of(provider: str, settings: Settings) -> str:
    """Whose limits they are: workers with other keys or addresses have others."""
    if (cloud := settings.clouds.get(provider)) is not None:
        return f"{cloud.endpoint}\0{cloud.api_key}"
    match provider:
        case "openai":
            return f"{settings.openai_endpoint}\0{settings.openai_api_key}"
        case "anthropic":
            return f"{settings.anthropic_endpoint}\0{settings.anthropic_api_key}"
        case "vllm":
            return "\0".join(sorted(settings.vllm_endpoints))
        case "ollama":
            return settings.ollama_endpoint
        case _:  # "cloud", which is one of those that are declared
            return "\0".join(f"{name}\0{one.endpoint}\0{one.api_key}" for name, one in sorted(settings.clouds.items()))
