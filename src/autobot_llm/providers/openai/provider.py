"""OpenAI, Azure OpenAI and every compatible cloud as providers. Knows settings and models; the client asks."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Literal

from autobot_llm.dialects.openai.requests import OPENAI
from autobot_llm.dialects.rate_limits import RateLimits
from autobot_llm.errors import ConfigurationError, InvalidRequestError, LLMError, ProviderUnavailable
from autobot_llm.providers.base import ModelInfo, ProviderStatus
from autobot_llm.providers.openai.client import OpenAIClient
from autobot_llm.providers.openai.endpoint import Endpoint, endpoint_at
from autobot_llm.settings import Settings
from autobot_llm.transport.network import Network, limits_of
from autobot_llm.types import EmbeddingRequest, EmbeddingResponse, Event, Finish, LLMRequest

_EMBEDDED_MODEL = "tiny"  # what the setting says unless it was set
_MOST_SHOWN = 8


class OpenAIProvider:
    """Answers from one server. Nothing is asked at the start; `close` ends what is under way.

    A request names its model, unless there is a default: AUTOBOT_DEFAULT_LLM_MODEL where it is meant for this
    provider (it begins with the provider's name, or this is the default provider), else the only model of the server.
    """

    takes_prompt_lists: Literal[True] = True

    def __init__(self, settings: Settings, *, name: str, endpoint: Endpoint) -> None:
        self.name = name
        self._endpoint = endpoint
        self._limits = limits_of(settings)
        self._network = Network.of(settings)
        self._default_model = endpoint.deployment or _default_model(settings, name)
        self._client: OpenAIClient | None = None
        self._failure = ""
        self._num_running = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0

    async def start(self) -> None:
        """Make the client. Raises ConfigurationError where OpenAI's own address is asked without a key."""
        if self._endpoint.api_key is None and self._endpoint.flavour is OPENAI:
            raise ConfigurationError(f"provider '{self.name}' needs a key: set OPENAI_API_KEY")
        if self._client is None:
            self._client = OpenAIClient(self._endpoint, name=self.name, limits=self._limits, network=self._network)

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def warm(self, seconds: float) -> None:
        await self._started().warm(seconds)

    async def models(self) -> list[ModelInfo]:
        return await self._started().models()

    def status(self) -> ProviderStatus:
        """Ready once started: whether the server answers, the last request tells, in `message` if it failed."""
        if self._client is None:
            return ProviderStatus(name=self.name, state="stopped", message="not started")
        details: dict[str, float | int | str] = {"endpoint": self._endpoint.shown}
        if self._default_model is not None:
            details["model"] = self._default_model
        limits = self._client.rate_limits
        for kind in ("requests", "tokens"):
            limit = getattr(limits, kind, None)
            if limit is not None:
                details[f"remaining_{kind}"] = limit.remaining
        return ProviderStatus(name=self.name, state="ready", message=self._failure, details=details)

    def rate_limits_of(self, model: str | None) -> RateLimits | None:
        """What the server said of its limits with its latest answer of `model`."""
        known = model or self._default_model
        return self._client.rate_limits_of(known) if self._client is not None and known is not None else None

    def metrics(self) -> dict[str, float]:
        figures = self._client.metrics() if self._client is not None else {}
        return figures | {
            "num_running": self._num_running,
            "prefix_cache_hit_rate": self._num_cached_tokens / max(1, self._num_prompt_tokens),
        }

    async def stream(self, request: LLMRequest) -> AsyncGenerator[Event, None]:
        """Ask the server. What its flavour cannot honour is refused by name before anything is sent."""
        client = self._started()
        model = request.model or await self._only_model(client)
        self._num_running += 1
        try:
            async with aclosing(client.stream(request, model)) as events:
                async for event in events:
                    if type(event) is Finish:
                        self._failure = ""
                        self._num_prompt_tokens += event.usage.prompt_tokens
                        self._num_cached_tokens += event.usage.cached_tokens
                    yield event
        except LLMError as error:
            self._note(error)
            raise
        finally:
            self._num_running -= 1

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResponse:
        client = self._started()
        model = request.model or await self._only_model(client)
        try:
            return await client.embed(request, model)
        except LLMError as error:
            self._note(error)
            raise

    def _note(self, error: LLMError) -> None:
        if not isinstance(error, InvalidRequestError):  # the caller's own mistake says nothing about the server
            self._failure = error.message

    def _started(self) -> OpenAIClient:
        if self._client is None:
            raise ProviderUnavailable(f"provider '{self.name}' is not started")
        return self._client

    async def _only_model(self, client: OpenAIClient) -> str:
        """The default model; where there is none, the model of a server that has but one, which is then kept."""
        if self._default_model is None:
            models = [] if self._endpoint.flavour is OPENAI else await client.models()
            if len(models) != 1:
                some = ", ".join(model.id for model in models[:_MOST_SHOWN])
                raise InvalidRequestError(
                    f"model: provider '{self.name}' has no default; name a model{': ' if some else ''}{some}, "
                    f"or set AUTOBOT_DEFAULT_LLM_MODEL={self.name}/...",
                    param="model",
                )
            self._default_model = models[0].id
        return self._default_model


def openai_provider(settings: Settings) -> OpenAIProvider:
    """The provider "openai": OpenAI's own service, or Azure's or another server at AUTOBOT_OPENAI_ENDPOINT."""
    endpoint = endpoint_at(settings.openai_endpoint, settings.openai_api_key)
    return OpenAIProvider(settings, name="openai", endpoint=endpoint)


def cloud_provider(settings: Settings, name: str) -> OpenAIProvider:
    """The provider of the cloud that settings declare as `name`."""
    cloud = settings.clouds[name]
    return OpenAIProvider(settings, name=name, endpoint=endpoint_at(cloud.endpoint, cloud.api_key))


def _default_model(settings: Settings, name: str) -> str | None:
    prefix, slash, rest = settings.default_model.partition("/")
    if slash and prefix == name:
        return rest
    is_default = settings.provider == name or (settings.provider == "cloud" and [name] == list(settings.clouds))
    return settings.default_model if is_default and settings.default_model != _EMBEDDED_MODEL else None
