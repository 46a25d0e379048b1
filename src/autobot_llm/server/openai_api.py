"""OpenAI's API: chat, completions, embeddings and models. Knows which function of the dialect does what."""

from __future__ import annotations

import time

from autobot_llm.dialects.bodies import encode
from autobot_llm.dialects.openai import chunks, replies
from autobot_llm.dialects.openai.bodies import read_chat, read_completion
from autobot_llm.dialects.openai.embeddings import embedding_reply, read_embedding_body
from autobot_llm.observability.metrics import RequestRecord
from autobot_llm.server.answers import Service
from autobot_llm.server.asgi import Exchange
from autobot_llm.server.cache_control import with_vector_control
from autobot_llm.server.models import find_model, name_for
from autobot_llm.server.report_headers import report_headers
from autobot_llm.server.routes import GET, POST, Api, ErrorFormat, Route

MODELS = "/v1/models"


def openai_api(service: Service) -> Api:
    """The routes of OpenAI's API. Its errors are also those of every path that no other API claims."""
    handlers = _Handlers(service)
    return Api(
        routes=(
            Route("/v1/chat/completions", POST, handlers.chat),
            Route("/v1/completions", POST, handlers.complete),
            Route("/v1/embeddings", POST, handlers.embed),
            Route(MODELS, GET, handlers.list_models),
            Route(MODELS + "/{id}", GET, handlers.show_model),
        ),
        errors=ErrorFormat(replies.error_body, chunks.error_event),
        prefix="",
    )


class _Handlers:
    def __init__(self, service: Service) -> None:
        self._answers = service.answers
        self._llm = service.llm
        self._max_choices = service.settings.max_queued_requests

    async def chat(self, exchange: Exchange, record: RequestRecord) -> None:
        data = await self._answers.body(exchange)
        call = read_chat(data, request_id=exchange.request_id, tenant=exchange.tenant)
        created = int(time.time())
        if call.stream:
            encoder = chunks.ChatChunks(exchange.request_id, created, call.num_choices, call.include_usage)
            await self._answers.stream(exchange, record, call.requests, encoder)
        else:
            reply = replies.ChatReply(exchange.request_id, created)
            await self._answers.whole(exchange, record, call.requests, reply)

    async def complete(self, exchange: Exchange, record: RequestRecord) -> None:
        data = await self._answers.body(exchange)
        call = read_completion(
            data, request_id=exchange.request_id, tenant=exchange.tenant, max_choices=self._max_choices
        )
        created = int(time.time())
        if call.stream:
            encoder = chunks.CompletionChunks(exchange.request_id, created, call.num_choices, call.include_usage)
            await self._answers.stream(exchange, record, call.requests, encoder)
        else:
            reply = replies.CompletionReply(exchange.request_id, created)
            await self._answers.whole(exchange, record, call.requests, reply)

    async def embed(self, exchange: Exchange, record: RequestRecord) -> None:
        data = await self._answers.body(exchange)
        request, encoding = read_embedding_body(data, request_id=exchange.request_id, tenant=exchange.tenant)

        request = with_vector_control(request, exchange.header(b"cache-control"))

        async def work() -> None:
            response = await self._llm.embed(request)
            record.count(response.model, response.usage)
            headers = report_headers(response.optimizations)
            await exchange.reply(200, embedding_reply(response, encoding), headers=headers)

        await self._answers.watch(exchange, work())

    async def list_models(self, exchange: Exchange, record: RequestRecord) -> None:
        models = await self._llm.get_available_models()
        default = self._llm.default_provider
        data = [replies.model_fields(model) | {"id": name_for(model, default)} for model in models]
        await exchange.reply(200, encode({"object": "list", "data": data}))

    async def show_model(self, exchange: Exchange, record: RequestRecord) -> None:
        model = find_model(await self._llm.get_available_models(), exchange.path.removeprefix(MODELS + "/"))
        await exchange.reply(200, encode(replies.model_fields(model)))
