"""`LLMInterface`: ask a model, whoever serves it. The only place where everything is put together.

Knows settings and routing; knows nothing of HTTP servers or of how an answer is computed.
There is one path: `stream()`; every other way to ask collects it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from autobot_llm.call_shapes import MessagesLike, make_request
from autobot_llm.cloud.fallback import FallbackTable, WithFallbacks
from autobot_llm.cloud.warm_up import WarmUp
from autobot_llm.collect import collect
from autobot_llm.counts import Counts, summed
from autobot_llm.deadline import Deadline
from autobot_llm.errors import (
    ConfigurationError,
    LLMError,
    ModelNotFoundError,
    ProviderError,
    RequestTimeout,
    UnsupportedError,
)
from autobot_llm.optimization_matrix import ProviderRow, optimization_matrix
from autobot_llm.providers.base import (
    ModelInfo,
    ModelLoader,
    OnProgress,
    Provider,
    ProviderStatus,
    Streamer,
    TokenCounter,
)
from autobot_llm.providers_in_use import InUse, ProvidersInUse
from autobot_llm.routing import (
    Route,
    build_provider,
    choose_route,
    default_provider,
    known_providers,
    make_links,
    unknown_provider,
)
from autobot_llm.settings import Settings, load_settings
from autobot_llm.types import (
    ChatMessage,
    EmbeddingRequest,
    EmbeddingResponse,
    Event,
    Finish,
    LLMRequest,
    LLMResponse,
)
from autobot_llm.universal.caches import Caches
from autobot_llm.universal.kept_answer import KeptAnswer
from autobot_llm.validation import validate_embedding, validate_request


class LLMInterface:
    """One async interface in front of every provider; `async with LLMInterface.from_env() as llm: ...`.

    `settings` None reads the environment and `.env`. `providers` replaces the built-in ones, by name; the default is
    then the one that settings name, else the first. `on_progress` hears how far a provider is that loads a
    model. Belongs to one event loop. Every method that asks a provider raises the errors of `autobot_llm.errors`.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        providers: Mapping[str, Provider] | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.settings = load_settings() if settings is None else settings
        given = dict(providers) if providers is not None else None
        self._known = tuple(given) if given is not None else known_providers(self.settings)
        if not self._known:
            raise ConfigurationError("providers is empty: expected at least one")
        self._default = default_provider(self.settings, self._known)
        self._links = make_links(self.settings)
        self._caches = Caches(self._links, self._embedded)
        self._fallbacks = FallbackTable(self.settings.fallbacks)
        self._warm_up = WarmUp(self.settings, self._known)
        make = partial(build_provider, self.settings, on_progress=on_progress)
        self._in_use = ProvidersInUse(make if given is None else given.__getitem__, self._links)
        self._counts = Counts()

    @classmethod
    def from_env(
        cls, *, environ: Mapping[str, str] | None = None, env_file: Path | None = Path(".env")
    ) -> LLMInterface:
        """An interface with the settings of the environment and of `env_file`. Raises ConfigurationError."""
        return cls(load_settings(environ=environ, env_file=env_file))

    async def __aenter__(self) -> LLMInterface:
        await self.initialize()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def initialize(self) -> None:
        """Start the default provider. Called again, it does nothing; after `aclose`, it starts anew."""
        self._in_use.is_closed = False
        await self._in_use.started(self._default)
        self._warm_up.begin(self._default, self._in_use.started)

    async def aclose(self) -> None:
        """Stop every provider; answers that are still running end with ProviderUnavailable. May be called again."""
        self._in_use.is_closed = True
        await self._warm_up.close()
        await self._in_use.close()

    async def cleanup(self) -> None:
        """The older name of `aclose`."""
        await self.aclose()

    def stream(
        self,
        messages: LLMRequest | MessagesLike | None = None,
        llm_type: str = "general",
        *,
        model: str | None = None,
        provider: str | None = None,
        **options: Any,
    ) -> AsyncGenerator[Event, None]:
        """Ask, and read the answer as it comes: Start, TextDelta and ToolCallDelta, ChoiceEnd, Finish.

        `messages` is a list of dicts or ChatMessages, or a whole LLMRequest; `options` are LLMRequest's fields, and
        those that are given replace the request's own. Closing the generator, or cancelling the task that reads it,
        cancels the work at the provider. Raises RequestTimeout when the timeout (seconds; the request's own, else
        the settings') passes before the answer is complete, and ProviderError when the provider cuts it short.
        """
        request = _asked(messages, llm_type, {**options, "model": model, "provider": provider})
        return self.events(msgspec.structs.replace(request, stream=True))

    async def events(self, request: LLMRequest, *, ask_memory: bool = True) -> AsyncGenerator[Event, None]:
        """Answer `request` as `stream` does, but as a whole unless `request.stream` is set.

        A provider may then send the answer in one piece, which costs less. Raises what `stream` raises. `ask_memory`
        False is for a caller who has just asked `kept`.
        """
        if ask_memory and (kept := self.kept(request)) is not None:
            for event in kept.events():
                yield event
            return
        with self._counts.asked() as asked:
            timeout = request.timeout if request.timeout is not None else self.settings.timeout
            validate_request(request)
            with Deadline(timeout) as deadline:
                chain, request = await self._reached(request)
                if alternatives := self._fallbacks.of(request.provider or "", request.model):
                    chain = WithFallbacks(chain, alternatives, self._reached, default_timeout=self.settings.timeout)
                async with aclosing(chain.stream(request)) as events:
                    async for event in events:
                        deadline.pause()
                        if type(event) is Finish:
                            asked.complete(event.usage)
                            yield event
                            return
                        yield event
                        deadline.resume()
            raise ProviderError("the answer was cut short: the provider's stream ended without a Finish event")

    def kept(self, request: LLMRequest) -> KeptAnswer | None:
        """The answer to `request` if memory has it, as `events` would give it, counted as given; else None.

        None, too, for what is wrong with the request: `events` says it.
        """
        if request.temperature != 0 and request.seed is None and request.cache is None:
            return None  # drawn at random, as most are: nothing is kept
        try:
            validate_request(request)
            route = self.route(request)
        except LLMError:
            return None
        one = self._in_use.get(route.provider)
        if one is None or one.at_once is None:
            return None
        kept = one.at_once.kept(route.taken_by(request))
        if kept is not None:
            with self._counts.asked() as asked:
                asked.complete(kept.usage)
        return kept

    async def chat_completion(
        self,
        messages: LLMRequest | MessagesLike | None = None,
        llm_type: str = "general",
        *,
        model: str | None = None,
        provider: str | None = None,
        **options: Any,
    ) -> LLMResponse:
        """Ask as `stream` does, and return the complete answer. An error is raised, never told in the content.

        The answer may be made in one piece: its first token's time then tells little. `stream=True` has it come in
        pieces.
        """
        request = _asked(messages, llm_type, {**options, "model": model, "provider": provider})
        if (kept := self.kept(request)) is not None:
            return kept.response()
        async with aclosing(self.events(request, ask_memory=False)) as events:
            return await collect(events)

    async def generate_response(self, prompt: str, **options: Any) -> LLMResponse:
        """The answer to `prompt` as one user message. For raw continuation: `chat_completion(prompt=...)`."""
        return await self.chat_completion([ChatMessage(role="user", content=prompt)], **options)

    async def embed(
        self,
        inputs: EmbeddingRequest | str | Sequence[str | list[int]],
        *,
        model: str | None = None,
        provider: str | None = None,
        dimensions: int | None = None,
    ) -> EmbeddingResponse:
        """One vector for each input: texts or lists of token ids, or a whole EmbeddingRequest.

        The model is the one asked for, else AUTOBOT_EMBEDDING_MODEL, else the provider's default. Raises
        UnsupportedError where the provider makes no embeddings, and RequestTimeout.
        """
        if not isinstance(inputs, EmbeddingRequest):
            texts: list[str | list[int]] = [inputs] if isinstance(inputs, str) else list(inputs)
            inputs = EmbeddingRequest(inputs=texts, model=model, provider=provider, dimensions=dimensions)
        request = inputs
        timeout = request.timeout if request.timeout is not None else self.settings.timeout
        with self._counts.asked() as asked:
            validate_embedding(request)
            try:
                async with asyncio.timeout(timeout):
                    response = await self._embedded(request)
            except TimeoutError as exc:
                message = f"there was no answer after its timeout of {timeout:g} s"
                raise RequestTimeout(message, param="timeout") from exc
            asked.complete(response.usage)
            return response

    async def _embedded(self, request: EmbeddingRequest) -> EmbeddingResponse:
        route = self.route(LLMRequest(model=request.model, provider=request.provider, llm_type="embedding"))
        embedder = (await self._usable(route.provider)).embedder
        if embedder is None:
            raise UnsupportedError(f"provider '{route.provider}' makes no embeddings", param="model")
        self._caches.refuse_if_off(request.cache)
        return await embedder.embed(route.taken_by(request))

    @property
    def default_provider(self) -> str:
        """The name of the provider that answers where a request names none."""
        return self._default

    async def switch_provider(self, name: str) -> None:
        """Start the provider `name` and make it the default; the one before stays, for those that name it.

        Raises ModelNotFoundError for an unknown name and ConfigurationError for one that cannot be used; the
        default is then what it was.
        """
        if name not in self._known:
            raise unknown_provider(name, self._known)
        await self._in_use.started(name)
        self._default = name

    async def get_available_models(self) -> list[ModelInfo]:
        """The models of every provider in use, the default provider's first.

        Another provider that cannot tell its models now has none here; its status says why.
        """
        default = await self._in_use.started(self._default)
        others = [one.provider for _, one in self._in_use if one is not default]
        listed = await asyncio.gather(
            default.provider.models(), *(provider.models() for provider in others), return_exceptions=True
        )
        for provider, models in zip((default.provider, *others), listed, strict=True):
            if isinstance(models, BaseException) and (provider is default.provider or not isinstance(models, LLMError)):
                raise models
        return [model for models in listed if not isinstance(models, BaseException) for model in models]

    def route(self, request: LLMRequest) -> Route:
        """Who would answer `request`. Raises ModelNotFoundError for an unknown provider."""
        return choose_route(request, self.settings, default=self._default, known=self._known)

    async def load_model(
        self, model: str | None = None, *, keep_alive: str | float | None = None, num_ctx: int | None = None
    ) -> None:
        """Have a model in memory, where its provider can do that; else only make sure that it is served.

        `keep_alive` is as Ollama has it: for how long after its last use, 0 taking it out of memory at once.
        Raises UnsupportedError where that is asked of a provider that keeps its models in memory.
        """
        route = self.route(LLMRequest(model=model))
        provider = (await self._usable(route.provider)).provider
        if isinstance(provider, ModelLoader):
            await provider.load(route.model, keep_alive=keep_alive, num_ctx=num_ctx)
            return
        served = [info.id for info in await provider.models()]
        if route.model is not None and route.model not in served:
            raise ModelNotFoundError(
                f"model {route.model!r} is not served here; served are {', '.join(served)}", param="model"
            )
        if keep_alive == 0:
            raise UnsupportedError(f"provider '{route.provider}' keeps its models in memory", param="keep_alive")

    async def count_tokens(self, request: LLMRequest) -> int:
        """The number of tokens of the request's prompt, as the provider that would answer it counts them.

        Raises UnsupportedError where that provider cannot count.
        """
        validate_request(request)
        route = self.route(request)
        provider = (await self._usable(route.provider)).provider
        if not isinstance(provider, TokenCounter):
            raise UnsupportedError(f"provider '{route.provider}' cannot count a prompt's tokens", param="provider")
        return await provider.count_tokens(msgspec.structs.replace(request, provider=route.provider, model=route.model))

    def get_all_provider_status(self) -> dict[str, ProviderStatus]:
        """The state of every provider in use and of the default one, by name."""
        not_started = ProviderStatus(name=self._default, state="stopped", message="not started")
        return {self._default: not_started} | {name: one.provider.status() for name, one in self._in_use}

    def get_metrics(self) -> dict[str, dict[str, float]]:
        """Figures since the interface was made: its own under "interface", each provider's under its name."""
        figures = {"interface": self._counts.figures()}
        for name, one in self._in_use:
            links = (link.metrics_of(name) for link in self._links.values())
            figures[name] = summed(one.provider.metrics(), *links)
        return figures

    def get_optimizations(self) -> list[ProviderRow]:
        """For every provider and optimization: whether it could apply, whether it runs now, and why."""
        return optimization_matrix(self._known, {name: one.provider for name, one in self._in_use}, self._links)

    def get_cache_metrics(self) -> dict[str, bool | int | float | str]:
        """What the caches have done since the interface was made, and hold; see `Caches.figures`."""
        return self._caches.figures()

    async def clear_cache(self, l1: bool = True, l2: bool = True) -> dict[str, int]:
        """Remove every kept answer and vector, in memory (l1) and in the shared store (l2); see `Caches.clear`."""
        return await self._caches.clear(l1=l1, l2=l2)

    async def _reached(self, request: LLMRequest) -> tuple[Streamer, LLMRequest]:
        """The chain that answers, and the request as the chain gets it."""
        route = self.route(request)
        chosen = await self._usable(route.provider)
        self._caches.refuse_if_off(request.cache)
        return chosen.chain, route.taken_by(request)

    async def _usable(self, name: str) -> InUse:
        """The started provider; one that a request names and that cannot be used is the request's error."""
        try:
            return await self._in_use.started(name)
        except ConfigurationError as exc:
            if name == self._default:
                raise
            raise ModelNotFoundError(f"provider '{name}' cannot be used: {exc}", param="provider") from exc


def _asked(messages: LLMRequest | MessagesLike | None, llm_type: str, options: dict[str, Any]) -> LLMRequest:
    if llm_type != "general":
        options["llm_type"] = llm_type
    return make_request(messages, options)
