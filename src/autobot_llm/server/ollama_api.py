"""Ollama's API: chat, generate, embeddings and the listings. Knows who answers and what then becomes of the hints."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import msgspec

from autobot_llm.dialects.ollama import lines, replies
from autobot_llm.dialects.ollama.bodies import Call, EmbedCall, Hints, read_chat, read_embed, read_generate, read_model
from autobot_llm.errors import LLMError, ModelNotFoundError, UnsupportedError
from autobot_llm.observability.metrics import RequestRecord
from autobot_llm.routing import ProviderType
from autobot_llm.routing import Route as Answerer
from autobot_llm.server.answers import Reply, Service, StreamEncoder
from autobot_llm.server.asgi import Exchange
from autobot_llm.server.cache_control import with_vector_control
from autobot_llm.server.report_headers import report_headers
from autobot_llm.server.routes import GET, POST, Api, ErrorFormat, Route
from autobot_llm.types import EmbeddingResponse, LLMRequest, ModelInfo

CONTEXT_LENGTHS_FRESH = 60.0  # seconds; a model's context changes only when it is served anew


def ollama_api(service: Service) -> Api:
    """The routes of Ollama's API, and its errors for every path below /api/."""
    handlers = _Handlers(service)
    return Api(
        routes=(
            Route("/api/chat", POST, handlers.chat),
            Route("/api/generate", POST, handlers.generate),
            Route("/api/embed", POST, handlers.embed),
            Route("/api/embeddings", POST, handlers.embeddings),
            Route("/api/tags", GET, handlers.tags),
            Route("/api/show", POST, handlers.show),
            Route("/api/ps", GET, handlers.ps),
            Route("/api/version", GET, handlers.version),
        ),
        errors=ErrorFormat(replies.error_body, replies.error_line),
        prefix="/api/",
    )


class _Read(Protocol):
    def __call__(self, data: bytes, *, request_id: str, tenant: str) -> Call: ...


@dataclass(frozen=True, slots=True)
class _Endpoint:
    """What tells /api/chat from /api/generate: how a body is read, and an answer written, as a stream or whole."""

    read: _Read
    lines: Callable[[], StreamEncoder]
    reply: Reply


_CHAT = _Endpoint(read_chat, lines.ChatLines, replies.ChatReply())
_GENERATE = _Endpoint(read_generate, lines.GenerateLines, replies.GenerateReply())


class _Handlers:
    def __init__(self, service: Service) -> None:
        self._answers = service.answers
        self._llm = service.llm
        self._context_lengths: dict[str, int | None] = {}
        self._contexts_read_at = -CONTEXT_LENGTHS_FRESH

    # Answers of the model

    async def chat(self, exchange: Exchange, record: RequestRecord) -> None:
        await self._answer(exchange, record, _CHAT)

    async def generate(self, exchange: Exchange, record: RequestRecord) -> None:
        await self._answer(exchange, record, _GENERATE)

    async def _answer(self, exchange: Exchange, record: RequestRecord, endpoint: _Endpoint) -> None:
        data = await self._answers.body(exchange)
        call = endpoint.read(data, request_id=exchange.request_id, tenant=exchange.tenant)
        request = call.request
        if request is None:
            await self._load(exchange, call.model, call.hints, is_chat=endpoint is _CHAT)
            return
        extra = await self._settle(call.hints, self._llm.route(request))
        if extra:
            request = msgspec.structs.replace(request, extra_body=request.extra_body | extra)
        if call.stream:
            await self._answers.stream(exchange, record, (request,), endpoint.lines())
        else:
            await self._answers.whole(exchange, record, (request,), endpoint.reply)

    async def _load(self, exchange: Exchange, model: str, hints: Hints, *, is_chat: bool) -> None:
        async def work() -> None:
            await self._llm.load_model(model, keep_alive=hints.stay, num_ctx=hints.num_ctx)
            await exchange.reply(200, replies.loaded_body(model, unloaded=hints.unloads, is_chat=is_chat))

        await self._answers.watch(exchange, work())

    async def _settle(self, hints: Hints, answerer: Answerer) -> dict[str, object]:
        """The hints that the provider gets. One that is no Ollama gets none, and must have no need of them.

        Its models stay in memory whatever `keep_alive` says, and a prompt that does not fit is refused, neither cut
        (`truncate`) nor shifted (`shift`). Errors: UnsupportedError.
        """
        if answerer.provider == ProviderType.LOCAL_OLLAMA:
            return hints.for_ollama()
        if hints.unloads:
            raise UnsupportedError(
                f"keep_alive={hints.keep_alive!r}: provider '{answerer.provider}' keeps its models in memory",
                param="keep_alive",
            )
        for name in hints.options:
            raise UnsupportedError(
                f"options.{name}: only an Ollama has this option; '{answerer.provider}' answers",
                param=f"options.{name}",
            )
        if hints.num_ctx is not None:
            context_length = await self._context_length(answerer)
            if context_length is not None and hints.num_ctx > context_length:
                raise UnsupportedError(
                    f"options.num_ctx={hints.num_ctx}: the model's context is {context_length} tokens here",
                    param="options.num_ctx",
                )
        return {}

    async def _context_length(self, answerer: Answerer) -> int | None:
        """The context of the model that answers; None where nobody tells."""
        if time.monotonic() - self._contexts_read_at > CONTEXT_LENGTHS_FRESH:
            try:
                models = await self._llm.get_available_models()
            except LLMError:  # of some other provider, perhaps; the answer itself will tell
                return None
            self._context_lengths = {f"{model.provider}/{model.id}": model.context_length for model in models}
            self._contexts_read_at = time.monotonic()
        return self._context_lengths.get(f"{answerer.provider}/{answerer.model}")

    # Embeddings

    async def embed(self, exchange: Exchange, record: RequestRecord) -> None:
        await self._embed(exchange, replies.embed_body)

    async def embeddings(self, exchange: Exchange, record: RequestRecord) -> None:
        await self._embed(exchange, replies.older_embed_body)

    async def _embed(self, exchange: Exchange, write: Callable[[str, EmbeddingResponse | None, float], bytes]) -> None:
        began = time.perf_counter()
        data = await self._answers.body(exchange)
        call = read_embed(data, request_id=exchange.request_id, tenant=exchange.tenant)
        if call.request is not None:
            request = with_vector_control(call.request, exchange.header(b"cache-control"))
            call = replace(call, request=request)

        async def work() -> None:
            response = await self._embedded(call)
            headers = report_headers(response.optimizations) if response is not None else []
            await exchange.reply(200, write(call.model, response, time.perf_counter() - began), headers=headers)

        await self._answers.watch(exchange, work())

    async def _embedded(self, call: EmbedCall) -> EmbeddingResponse | None:
        if call.request is None:
            await self._llm.load_model(call.model, keep_alive=call.hints.stay, num_ctx=call.hints.num_ctx)
            return None
        extra = await self._settle(call.hints, self._llm.route(LLMRequest(model=call.model)))
        return await self._llm.embed(msgspec.structs.replace(call.request, extra_body=call.request.extra_body | extra))

    # Listings

    async def tags(self, exchange: Exchange, record: RequestRecord) -> None:
        await exchange.reply(200, replies.tags_body(await self._models()))

    async def ps(self, exchange: Exchange, record: RequestRecord) -> None:
        await exchange.reply(200, replies.ps_body(await self._models()))

    async def show(self, exchange: Exchange, record: RequestRecord) -> None:
        wanted = read_model(await self._answers.body(exchange))
        models = await self._models()
        known = {name.removesuffix(":latest"): model for name, model in models.items()}
        if wanted not in known:
            raise ModelNotFoundError(f"model '{wanted}' not found; there are {', '.join(models) or 'none'}")
        await exchange.reply(200, replies.show_body(known[wanted]))

    async def version(self, exchange: Exchange, record: RequestRecord) -> None:
        await exchange.reply(200, replies.version_body())

    async def _models(self) -> dict[str, ModelInfo]:
        """The models under the names by which they can be asked for: those of the default provider by their own."""
        default = self._llm.default_provider
        return {
            model.id if model.provider == default else f"{model.provider}/{model.id}": model
            for model in await self._llm.get_available_models()
        }
