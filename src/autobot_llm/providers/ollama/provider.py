"""An Ollama server as a provider. Knows when to ask it what; shapes are the dialect's, connections the client's."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import Any
from urllib.parse import urlsplit

from autobot_llm.dialects.ollama.answers import AnswerReader, read_embeddings, timings_of, usage_of
from autobot_llm.dialects.ollama.models import Progress, Tag
from autobot_llm.dialects.ollama.requests import asked_context, refuse_too_new, write_embedding, write_request
from autobot_llm.errors import LLMError, ProviderTimeout, ProviderUnavailable
from autobot_llm.providers.base import ProviderStatus
from autobot_llm.providers.ollama import variants
from autobot_llm.providers.ollama.catalog import Catalog
from autobot_llm.providers.ollama.client import OllamaClient, without_user
from autobot_llm.providers.ollama.placement import Placed, Placement
from autobot_llm.providers.ollama.report import outcomes, running_optimizations, was_loaded
from autobot_llm.report import OptimizationOutcome
from autobot_llm.settings import SETTINGS, Settings
from autobot_llm.transport.network import Network, limits_of
from autobot_llm.types import (
    ChoiceEnd,
    EmbeddingRequest,
    EmbeddingResponse,
    Event,
    Finish,
    LLMRequest,
    ModelInfo,
    Start,
)

logger = logging.getLogger("autobot_llm.ollama")

WATCH_SECONDS = 10.0
DEFAULT_MODEL = "mistral:7b-instruct-q4_K_M"
_PACKAGE_DEFAULT = next(setting.default for setting in SETTINGS if setting.field == "default_model")


def default_model(settings: Settings) -> str:
    """The model for requests that name none: the setting where it is meant for Ollama, else `DEFAULT_MODEL`."""
    model = settings.default_model
    if model.startswith("ollama/"):
        return model.removeprefix("ollama/")
    is_set = model != _PACKAGE_DEFAULT or "AUTOBOT_DEFAULT_LLM_MODEL" in settings.sources
    return model if is_set and settings.provider == OllamaProvider.name else DEFAULT_MODEL


class OllamaProvider:
    """Answers from one Ollama server, which may be down at the start: then requests say so until it is there.

    It keeps a model in memory (`keep_alive`) and to one context (`num_ctx`), so that no request of ours has it loaded
    anew, except one whose prompt needs a larger context. `memory` is the server's, in bytes; None: this machine's, if
    the server runs on it.
    """

    name = "ollama"

    def __init__(self, settings: Settings, *, memory: int | None = None, watch_seconds: float = WATCH_SECONDS) -> None:
        self._settings = settings
        self._watch_seconds = watch_seconds
        self._default = default_model(settings)
        if memory is None and _is_here(settings.ollama_endpoint):
            memory = variants.machine_memory()
        self._memory = memory
        self._client: OllamaClient | None = None
        self._catalog: Catalog | None = None
        self._placement = Placement(settings)
        self._watching: asyncio.Task[None] | None = None
        self._tag: Tag | None = None
        self._version: str | None = None
        self._last_loads: dict[str, float] = {}
        self._failure = "not started"
        self._details: dict[str, float | int | str] = {}
        self._told_settings = False
        self._counts = dict.fromkeys(("num_model_loads", "num_generated_tokens", "num_prompt_tokens", "num_cached"), 0)

    # Life

    async def start(self) -> None:
        if self._client is None:
            limits, network = limits_of(self._settings), Network.of(self._settings)
            self._client = OllamaClient(self._settings.ollama_endpoint, limits=limits, network=network)
            self._catalog = Catalog(self._client)
            self._watching = asyncio.create_task(self._watch(self._catalog))
            await self._look(self._catalog)

    async def close(self) -> None:
        watching, self._watching = self._watching, None
        client, self._client, self._catalog = self._client, None, None
        self._failure = "closed"
        self._placement.pins.clear()
        if watching is not None:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
        if client is not None:
            await client.close()

    async def _watch(self, catalog: Catalog) -> None:
        """So that the status is true though nobody asks for an answer."""
        while True:
            await asyncio.sleep(self._watch_seconds)
            try:
                await self._look(catalog)
            except Exception:
                logger.exception("looking at the ollama server failed unexpectedly")

    async def _look(self, catalog: Catalog) -> None:
        try:
            catalog.forget_models()
            self._details = await self._describe(catalog)
            self._failure = ""
        except LLMError as exc:
            if exc.message != self._failure:
                logger.warning("%s; requests to it fail until it is there", exc.message)
            self._failure = exc.message

    async def _describe(self, catalog: Catalog) -> dict[str, float | int | str]:
        """What is worth showing, and once in the log: the version, the default model, settings that would help."""
        version = (await catalog.version()).text
        self._version = version
        self._tag = tag = variants.find_tag(await catalog.tags(), self._default)
        shown = None if tag is None else await catalog.shown(self._default)
        recommended = variants.server_settings(self._settings)
        if not self._told_settings:
            self._told_settings = True
            logger.info("settings that suit this Ollama server, if it does not have them: %s", recommended)
        return {
            "endpoint": without_user(self._settings.ollama_endpoint),
            "version": version,
            "model": self._default,
            "quantization": variants.advice(self._default, tag, shown, self._memory),
            "recommended": recommended,
        }

    # What there is

    async def models(self) -> list[ModelInfo]:
        return await self._catalog_of().models(self.name)

    def status(self) -> ProviderStatus:
        if self._client is None:
            return ProviderStatus(name=self.name, state="stopped", message=self._failure)
        details = self._details | {f"num_ctx of {model}": pin.num_ctx for model, pin in self._placement.pins.items()}
        return ProviderStatus(
            name=self.name, state="failed" if self._failure else "ready", message=self._failure, details=details
        )

    def metrics(self) -> dict[str, float]:
        counts = self._counts
        figures: dict[str, float] = {
            "num_running": sum(pin.num_in_flight for pin in self._placement.pins.values()),
            "num_model_loads": counts["num_model_loads"],
            "num_context_growths": sum(pin.num_growths for pin in self._placement.pins.values()),
            "num_generated_tokens": counts["num_generated_tokens"],
            "prefix_cache_hit_rate": counts["num_cached"] / max(1, counts["num_prompt_tokens"]),
        }
        return figures | ({} if self._client is None else self._client.pool.metrics())

    def engine_version(self) -> str | None:
        return self._version

    def optimizations(self) -> list[OptimizationOutcome]:
        return list(running_optimizations(self._tag, self.metrics()))

    # Work

    async def stream(self, request: LLMRequest) -> AsyncGenerator[Event, None]:
        """Answer with the server. Everything that can be refused is refused before `Start`."""
        client, catalog = self._client_of(), self._catalog_of()
        request_id = request.request_id or secrets.token_hex(12)
        model = await self._resolve(request.model, catalog)
        path, body = write_request(request, model=model)
        reader = AnswerReader(request_id, model)
        try:
            refuse_too_new(body, (await catalog.version()).numbers)
            placed = await self._placement.place(
                catalog, body, sized=body, max_tokens=request.max_tokens, asked=asked_context(request)
            )
        except (ProviderUnavailable, ProviderTimeout) as exc:
            self._failure = exc.message
            raise
        began, first_at, has_begun = time.perf_counter(), None, False
        placed.pin.num_in_flight += 1
        try:
            async with aclosing(client.answer(path, body, reader)) as events:
                async for event in events:
                    if not has_begun:
                        has_begun = True
                        self._failure = ""
                        yield Start(request_id=request_id, model=model, provider=self.name)
                    if first_at is None and type(event) is not ChoiceEnd:
                        first_at = time.perf_counter() - began
                    yield event
        except ProviderUnavailable as exc:
            self._failure = exc.message
            raise
        finally:
            placed.pin.num_in_flight -= 1
        yield self._finish(reader, body, placed, first_at)

    def _finish(self, reader: AnswerReader, body: Mapping[str, Any], placed: Placed, first_at: float | None) -> Finish:
        line, model = reader.ending, str(body["model"])
        assert line is not None, "the client raises where an answer has no end"
        usage, timings = usage_of(line), timings_of(line, first_at)
        report = outcomes(
            line,
            num_ctx=body["options"]["num_ctx"],
            last_load=self._last_loads.get(model),
            shown=placed.shown,
        )
        finish = Finish(usage=usage, timings=timings, optimizations=tuple(report))
        if was_loaded(line) and timings.load is not None:
            self._last_loads[model] = timings.load
            self._counts["num_model_loads"] += 1
        self._counts["num_generated_tokens"] += usage.completion_tokens
        self._counts["num_prompt_tokens"] += usage.prompt_tokens
        self._counts["num_cached"] += usage.cached_tokens
        placed.pin.learn(body, usage.prompt_tokens)
        return finish

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResponse:
        client, catalog = self._client_of(), self._catalog_of()
        model = await self._resolve(request.model, catalog)
        body = write_embedding(request, model=model)
        refuse_too_new(body, (await catalog.version()).numbers)
        longest = max((text for text in request.inputs if isinstance(text, str)), key=len, default="")
        placed = await self._placement.place(
            catalog, body, sized={"prompt": longest}, max_tokens=0, asked=asked_context(request)
        )
        placed.pin.num_in_flight += 1
        try:
            data = await client.embed(body, request.timeout)
        finally:
            placed.pin.num_in_flight -= 1
        return read_embeddings(
            data,
            num_inputs=len(request.inputs),
            model=model,
            provider=self.name,
            request_id=request.request_id or secrets.token_hex(12),
        )

    async def load(
        self, model: str | None, *, keep_alive: str | float | None = None, num_ctx: int | None = None
    ) -> None:
        """Have a model in memory, with the context that requests will have; or, with `keep_alive` 0, out of it."""
        client, catalog = self._client_of(), self._catalog_of()
        name = await self._resolve(model, catalog)
        fields: dict[str, Any] = {"model": name} if keep_alive is None else {"model": name, "keep_alive": keep_alive}
        if keep_alive != 0:
            await self._placement.place(catalog, fields, sized={"prompt": ""}, max_tokens=None, asked=num_ctx)
        await client.load(name, fields)
        catalog.forget_processes()

    async def pull(self, model: str) -> AsyncGenerator[Progress, None]:
        """Have the server fetch a model from its library, which may take long; only ever done when this is called."""
        async with aclosing(self._client_of().pull(model)) as steps:
            async for progress in steps:
                yield progress
        self._catalog_of().forget_models()

    async def _resolve(self, asked: str | None, catalog: Catalog) -> str:
        """The model that answers: what was asked for, or a quantized variant of it where those are preferred."""
        model = self._default if asked is None else asked
        if not self._settings.use_quantized_models:
            return model
        variant = variants.choose_variant(model, await catalog.tags(), self._memory)
        return model if variant is None else variant.name

    def _client_of(self) -> OllamaClient:
        if self._client is None:
            raise ProviderUnavailable(f"provider '{self.name}' is {self._failure}")
        return self._client

    def _catalog_of(self) -> Catalog:
        self._client_of()
        assert self._catalog is not None
        return self._catalog


def _is_here(endpoint: str) -> bool:
    """Whether an address is this machine's own, so that its memory is the server's."""
    host = urlsplit(endpoint).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
