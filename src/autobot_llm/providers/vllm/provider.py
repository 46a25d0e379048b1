"""Running vLLM servers as one provider: each request goes to the replica whose cache knows its beginning.

Knows replicas, health and when another one may be tried; knows nothing of how vLLM is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Literal

from autobot_llm.errors import (
    ConfigurationError,
    InvalidRequestError,
    LLMError,
    ModelNotFoundError,
    OverloadedError,
    ProviderError,
    ProviderTimeout,
    ProviderUnavailable,
)
from autobot_llm.providers.base import ModelInfo, ProviderStatus
from autobot_llm.providers.vllm.balancing import Balancer, affinity_key
from autobot_llm.providers.vllm.fields import in_words_of
from autobot_llm.providers.vllm.replica import Replica
from autobot_llm.providers.vllm.report import server_outcomes, with_report
from autobot_llm.providers.vllm.scrape import combined
from autobot_llm.report import OptimizationOutcome
from autobot_llm.settings import Settings
from autobot_llm.transport.network import Network, limits_of
from autobot_llm.tuning.knobs.versions import is_before
from autobot_llm.types import EmbeddingRequest, EmbeddingResponse, Event, Finish, LLMRequest, SecondCall

logger = logging.getLogger("autobot_llm.vllm")

WATCH_SECONDS = 5.0  # between two looks at the servers
LEAST_SECONDS = 0.25  # between two looks, however many requests fail
_EMBEDDED_MODEL = "tiny"  # what the setting says unless it was set
# A failure of the server and not of the request: another server may do better.
_OF_THE_SERVER = (ProviderError, OverloadedError)
_TOO_LATE = ProviderTimeout  # the time for another one is gone
_HOPELESS_CODES = frozenset({"provider_authentication_error", "provider_not_found", "malformed_answer"})


class VllmProvider:
    """Answers from the servers in AUTOBOT_VLLM_ENDPOINTS, which are looked at every `watch_seconds`.

    A server that is down at the start is no error: it is used from the moment it is up. A request goes to one replica,
    and to another one if that fails before it has begun to answer.
    """

    name = "vllm"
    takes_prompt_lists: Literal[True] = True

    def __init__(self, settings: Settings, *, watch_seconds: float = WATCH_SECONDS) -> None:
        self._addresses = settings.vllm_endpoints
        self._api_key = settings.vllm_api_key
        self._default_model = _default_model(settings)
        self._limits = limits_of(settings)
        self._network = Network.of(settings)
        self._watch_seconds = watch_seconds
        self._replicas: dict[str, Replica] = {}
        self._balancer = Balancer(())
        self._watching: asyncio.Task[None] | None = None
        self._look_now = asyncio.Event()
        self._num_retries = 0

    async def start(self) -> None:
        """Look at the servers once, then keep watching. Raises ConfigurationError where none are named."""
        if not self._addresses:
            raise ConfigurationError(
                "provider 'vllm' has no server: set AUTOBOT_VLLM_ENDPOINTS, or start one with "
                "autobot-llm serve --provider vllm --launch --model MODEL"
            )
        if self._watching is not None:
            return
        replicas = [
            Replica(address, self._limits, self._network, self._api_key) for address in dict.fromkeys(self._addresses)
        ]
        self._replicas = {replica.address: replica for replica in replicas}
        self._balancer = Balancer(list(self._replicas))
        await self._look()
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        watching, self._watching = self._watching, None
        if watching is not None:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
        replicas, self._replicas = self._replicas, {}
        for replica in replicas.values():
            await replica.close()

    async def models(self) -> list[ModelInfo]:
        """What the servers that are up serve, each model once. Raises ProviderUnavailable where none is up."""
        up = self._up()
        await asyncio.gather(*(replica.look_at_models() for replica in up))
        return list({info.id: info for replica in up for info in replica.models}.values())

    def status(self) -> ProviderStatus:
        """Ready as long as one server is up; `details` has a line for each."""
        if not self._replicas:
            return ProviderStatus(name=self.name, state="stopped", message="not started")
        details: dict[str, float | int | str] = {}
        for number, replica in enumerate(self._replicas.values(), start=1):
            version = replica.version or "of unknown version"
            details[f"server_{number}"] = f"{replica.address}  " + (
                f"vLLM {version}: {', '.join(info.id for info in replica.models)}" if replica.is_up else replica.failure
            )
        is_ready = any(replica.is_up for replica in self._replicas.values())
        message = "" if is_ready else "no server can be reached"
        return ProviderStatus(name=self.name, state="ready" if is_ready else "failed", message=message, details=details)

    def metrics(self) -> dict[str, float]:
        """The servers' own figures together, and the client's; see observability/metrics.py for the names."""
        replicas = list(self._replicas.values())
        figures = combined(replica.figures() for replica in replicas)
        for replica in replicas:
            for name, value in replica.client.metrics().items():
                figures[name] = figures.get(name, 0.0) + value
        num_blocks = [replica.facts.num_blocks for replica in replicas if replica.is_up and replica.facts.num_blocks]
        if num_blocks and "kv_cache_usage" in figures:
            figures["num_blocks"] = sum(num_blocks)
            figures["num_free_blocks"] = round(sum(num_blocks) * (1 - figures["kv_cache_usage"]))
        return figures | {
            "num_replicas": len(replicas),
            "num_replicas_up": sum(bool(replica.is_up) for replica in replicas),
            "num_in_flight": sum(self._balancer.loads.values()),
            "num_retries": self._num_retries,
        }

    def engine_version(self) -> str | None:
        """The oldest version among the servers that are up."""
        versions = [replica.version for replica in self._replicas.values() if replica.is_up and replica.version]
        oldest: str | None = None
        for version in versions:
            if oldest is None or is_before(version, oldest):
                oldest = version
        return oldest

    def optimizations(self) -> list[OptimizationOutcome]:
        up = [replica for replica in self._replicas.values() if replica.is_up]
        return server_outcomes([replica.facts for replica in up], self.metrics()) if up else []

    async def stream(self, request: LLMRequest) -> AsyncGenerator[Event, None]:
        """Ask the best replica, and the next one as long as none has begun to answer.

        What vLLM cannot honour is refused by name before anything is sent. Raises the last replica's error.
        """
        model = request.model or self._only_model()
        key = affinity_key(request)
        serving = await self._serving(model)
        order = self._order(key, serving)
        home = self._replicas[self._balancer.home(key, {replica.address for replica in serving})]
        if isinstance(request, SecondCall):  # the first one waits there
            order.sort(key=lambda replica: replica is home)
        for num_failed, replica in enumerate(order):
            asked = in_words_of(request, replica.version)
            has_begun = False
            try:
                with self._balancer.under_way(replica.address):
                    async with aclosing(replica.client.stream(asked, model)) as events:
                        async for event in events:
                            has_begun = True
                            if type(event) is Finish:
                                event = with_report(event, replica, home, num_failed, len(self._replicas))
                            yield event
                return
            except LLMError as error:
                self._note(error)
                if has_begun or replica is order[-1] or not _may_try_another(error):
                    raise
                self._num_retries += 1

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResponse:
        """One vector for each input, from the least busy replica that serves the model, else from another one."""
        model = request.model or self._only_model()
        loads = self._balancer.loads
        order = sorted(await self._serving(model), key=lambda replica: loads[replica.address])
        for replica in order:
            try:
                with self._balancer.under_way(replica.address):
                    return await replica.client.embed(request, model)
            except LLMError as error:
                self._note(error)
                if replica is order[-1] or not _may_try_another(error):
                    raise
                self._num_retries += 1
        raise AssertionError("the last replica answers or raises")

    def _order(self, key: bytes, serving: Sequence[Replica]) -> list[Replica]:
        names = self._balancer.order(key, {replica.address for replica in serving})
        return [self._replicas[name] for name in names]

    async def _serving(self, model: str) -> list[Replica]:
        """The replicas that serve the model; they are asked anew where none is known to."""
        up = self._up()
        serving = [replica for replica in up if replica.serves(model)]
        if not serving:
            await asyncio.gather(*(replica.look_at_models() for replica in up))
            serving = [replica for replica in up if replica.serves(model)]
        if not serving:
            served = sorted({info.id for replica in up for info in replica.models})
            raise ModelNotFoundError(
                f"model {model!r} is not served by vllm; served are {', '.join(served) or 'none'}", param="model"
            )
        return serving

    def _up(self) -> list[Replica]:
        if self._watching is None:
            raise ProviderUnavailable("provider 'vllm' is not started")
        up = [replica for replica in self._replicas.values() if replica.is_up]
        if not up:
            failures = "; ".join(f"{one.address}: {one.failure}" for one in self._replicas.values())
            raise ProviderUnavailable(f"no vllm server can be reached: {failures}")
        return up

    def _only_model(self) -> str:
        if self._default_model is not None:
            return self._default_model
        served = sorted({info.id for replica in self._up() for info in replica.models})
        if len(served) != 1:
            raise InvalidRequestError(
                f"model: vllm serves {', '.join(served) or 'none'}; name one, or set "
                "AUTOBOT_DEFAULT_LLM_MODEL=vllm/...",
                param="model",
            )
        return served[0]

    def _note(self, error: LLMError) -> None:
        """Whether a server is down or only has too much to do (vLLM says 503 to both), a look at it will tell."""
        if isinstance(error, ProviderUnavailable):
            self._look_now.set()

    async def _look(self) -> None:
        await asyncio.gather(*(replica.look() for replica in self._replicas.values()))

    async def _watch(self) -> None:
        """Look at the servers regularly, and soon after one has failed."""
        while True:
            await asyncio.sleep(min(LEAST_SECONDS, self._watch_seconds))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._watch_seconds):
                    await self._look_now.wait()
            self._look_now.clear()
            try:
                await self._look()
            except Exception:
                logger.exception("looking at the vllm servers failed unexpectedly")


def _may_try_another(error: LLMError) -> bool:
    return isinstance(error, _OF_THE_SERVER) and not isinstance(error, _TOO_LATE) and error.code not in _HOPELESS_CODES


def _default_model(settings: Settings) -> str | None:
    prefix, slash, rest = settings.default_model.partition("/")
    if slash and prefix == VllmProvider.name:
        return rest
    is_meant = settings.provider == VllmProvider.name and settings.default_model != _EMBEDDED_MODEL
    return settings.default_model if is_meant else None


def vllm_provider(settings: Settings) -> VllmProvider:
    """The provider "vllm": the servers at AUTOBOT_VLLM_ENDPOINTS."""
    return VllmProvider(settings)
