"""Anthropic's API: messages, token counts, models. Knows which dialect function reads and writes what, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing

from autobot_llm.dialects.anthropic import replies
from autobot_llm.dialects.anthropic.bodies import check_version, read_count, read_messages
from autobot_llm.dialects.anthropic.stream import MessageEvents
from autobot_llm.errors import ProviderError
from autobot_llm.observability.metrics import RequestRecord
from autobot_llm.server.answers import Service, send_body
from autobot_llm.server.asgi import Exchange
from autobot_llm.server.cache_control import with_cache_control
from autobot_llm.server.models import find_model
from autobot_llm.server.routes import GET, POST, Api, ErrorFormat, Route
from autobot_llm.types import Event, Finish, LLMRequest

MESSAGES = "/v1/messages"
MODELS = "/v1/models"
VERSION_HEADER = b"anthropic-version"  # tells requests for Anthropic's models from those for OpenAI's, at one path


def anthropic_api(service: Service) -> Api:
    """The routes of Anthropic's API. Its errors are also those of unknown paths below `/v1/messages`."""
    handlers = _Handlers(service)
    return Api(
        routes=(
            Route(MESSAGES, POST, handlers.messages),
            Route(MESSAGES + "/count_tokens", POST, handlers.count_tokens),
            Route(MODELS, GET, handlers.list_models, only_with=VERSION_HEADER),
            Route(MODELS + "/{id}", GET, handlers.show_model, only_with=VERSION_HEADER),
        ),
        errors=ErrorFormat(replies.error_body, replies.error_event),
        prefix=MESSAGES,
    )


class _Handlers:
    def __init__(self, service: Service) -> None:
        self._answers = service.answers
        self._llm = service.llm

    async def messages(self, exchange: Exchange, record: RequestRecord) -> None:
        _check_version(exchange)
        data = await self._answers.body(exchange)
        request = read_messages(data, request_id=exchange.request_id, tenant=exchange.tenant)
        if request.stream:
            await self._answers.stream(exchange, record, [request], MessageEvents(exchange.request_id))
            return
        request = with_cache_control(request, exchange.header(b"cache-control"))
        if (kept := self._answers.kept(record, request)) is not None:
            await _send_kept_message(exchange, kept.events())
        else:
            await self._answers.watch(exchange, self._send_message(exchange, record, request))

    async def _send_message(self, exchange: Exchange, record: RequestRecord, request: LLMRequest) -> None:
        """A whole message keeps the order of its blocks, which a collected answer does not know."""
        builder = replies.MessageBuilder(exchange.request_id)
        async with aclosing(record.observe(self._llm.events(request, ask_memory=False))) as events:
            async for event in events:
                if isinstance(event, Finish):
                    await send_body(exchange, builder.body(event), event.optimizations)
                    return
                builder.add(event)
        raise ProviderError("the provider's answer ended without its finish", code="truncated_answer")

    async def count_tokens(self, exchange: Exchange, record: RequestRecord) -> None:
        _check_version(exchange)
        data = await self._answers.body(exchange)
        request = read_count(data, request_id=exchange.request_id, tenant=exchange.tenant)
        await self._answers.watch(exchange, self._send_count(exchange, request))

    async def _send_count(self, exchange: Exchange, request: LLMRequest) -> None:
        await exchange.reply(200, replies.count_body(await self._llm.count_tokens(request)))

    async def list_models(self, exchange: Exchange, record: RequestRecord) -> None:
        await exchange.reply(200, replies.models_body(await self._llm.get_available_models()))

    async def show_model(self, exchange: Exchange, record: RequestRecord) -> None:
        model = find_model(await self._llm.get_available_models(), exchange.path.removeprefix(MODELS + "/"))
        await exchange.reply(200, replies.model_body(model))


async def _send_kept_message(exchange: Exchange, events: Sequence[Event]) -> None:
    builder = replies.MessageBuilder(exchange.request_id)
    for event in events[:-1]:
        builder.add(event)
    finish = events[-1]
    assert isinstance(finish, Finish), "only whole answers are kept"
    await send_body(exchange, builder.body(finish), finish.optimizations)


def _check_version(exchange: Exchange) -> None:
    version = exchange.header(VERSION_HEADER)
    check_version(None if version is None else version.decode("latin-1"))
