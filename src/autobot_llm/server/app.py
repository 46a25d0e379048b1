"""The HTTP application: routes, keys, errors, cancellation, draining. Knows HTTP; knows nothing of how answers arise.

A raw ASGI application, so that a request passes through no framework on its way.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from uuid import uuid4

from autobot_llm.collect import collect
from autobot_llm.dialects.openai import chunks, replies
from autobot_llm.dialects.openai.bodies import Call, read_chat, read_completion
from autobot_llm.dialects.openai.chunks import ChatChunks, ChunkEncoder, CompletionChunks
from autobot_llm.errors import (
    AuthenticationError,
    InvalidRequestError,
    LLMError,
    ModelNotFoundError,
    OverloadedError,
    ProviderError,
    ProviderUnavailable,
)
from autobot_llm.interface import LLMInterface
from autobot_llm.observability import metrics as metrics_module
from autobot_llm.observability.metrics import Metrics, RequestRecord
from autobot_llm.server.asgi import ClientDisconnected, Exchange, Header, Receive, Scope, Send
from autobot_llm.server.merge import merge_streams
from autobot_llm.settings import Settings, tenant_of
from autobot_llm.types import ChoiceEnd, Event, Finish, Start

logger = logging.getLogger("autobot_llm.server")

CLIENT_CLOSED_REQUEST = 499  # nginx's number for a client that left; no client ever sees it
MODELS = "/v1/models"
SSE_HEADERS: tuple[Header, ...] = (
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy that gathers the stream up would undo it
)

UNHEALTHY = ("failed", "stopped", "starting")  # worst first

Handler = Callable[[Exchange, RequestRecord], Awaitable[None]]


class PathNotFound(InvalidRequestError):
    """The path leads nowhere."""

    status = 404
    code = "not_found"


class MethodNotAllowed(InvalidRequestError):
    """The path exists, for other methods; `allowed` names them."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, method: str, path: str, methods: tuple[str, ...]) -> None:
        self.allowed = ", ".join(methods)
        super().__init__(f"{method} is not allowed on {path}; use {self.allowed}")


@dataclass(frozen=True, slots=True)
class Route:
    """Where requests to one path go. `name` labels them in the metrics."""

    name: str
    methods: tuple[str, ...]
    handler: Handler
    needs_key: bool = True


def create_app(llm: LLMInterface, settings: Settings, metrics: Metrics) -> App:
    """Put the HTTP API in front of `llm`: an ASGI application. `llm` must be initialized by the caller."""
    metrics.watch_providers(llm.get_metrics)
    return App(llm, settings, metrics)


class App:
    """The ASGI application; `begin_drain`, `wait_idle` and `abort` are for whoever stops the server."""

    def __init__(self, llm: LLMInterface, settings: Settings, metrics: Metrics) -> None:
        self._llm = llm
        self._metrics = metrics
        self._max_body_bytes = settings.max_body_bytes
        self._max_choices = settings.max_queued_requests
        self._tenants = {key.encode(): tenant_of(key) for key in settings.api_keys}
        self._draining = False
        self._running: set[Exchange] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        get = ("GET", "HEAD")
        self._routes = {
            "/v1/chat/completions": Route("/v1/chat/completions", ("POST",), self._chat),
            "/v1/completions": Route("/v1/completions", ("POST",), self._complete),
            MODELS: Route(MODELS, get, self._list_models),
            "/health": Route("/health", get, self._health, needs_key=False),
            "/metrics": Route("/metrics", get, self._show_metrics),
            "/": Route("/", get, self._index),
        }
        self._model_route = Route(MODELS + "/{id}", get, self._show_model)
        self._no_route = Route("unknown", (), self._nothing_here)

    # Stopping

    def begin_drain(self) -> None:
        """Refuse new work from now on, and say so at /health; what runs goes on."""
        self._draining = True

    @property
    def num_running(self) -> int:
        """How many answers are being made."""
        return len(self._running)

    async def wait_idle(self) -> None:
        """Return when no answer is being made."""
        await self._idle.wait()

    def abort(self) -> None:
        """End every running answer with an error that says why."""
        for exchange in self._running:
            exchange.cancel("shutdown")

    # One request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"This application serves http, not {scope['type']!r}.")
        exchange = Exchange(scope, receive, send, uuid4().hex)
        route = self._route(exchange.path)
        record = self._metrics.begin(route.name)
        try:
            self._check(exchange, route)
            await route.handler(exchange, record)
        except ClientDisconnected:
            exchange.status = CLIENT_CLOSED_REQUEST
        except LLMError as error:
            await self._fail(exchange, error)
        except Exception:
            logger.exception("request %s failed unexpectedly", exchange.request_id)
            message = f"the server failed unexpectedly; its log has the details under request {exchange.request_id}"
            await self._fail(exchange, LLMError(message, code="internal_error"))
        finally:
            record.end(exchange.status, exchange.error_code)

    def _route(self, path: str) -> Route:
        route = self._routes.get(path)
        if route is not None:
            return route
        return self._model_route if path.startswith(MODELS + "/") else self._no_route

    def _check(self, exchange: Exchange, route: Route) -> None:
        if self._tenants and route.needs_key:
            exchange.tenant = self._tenant(exchange)
        if route.methods and exchange.method not in route.methods:
            raise MethodNotAllowed(exchange.method, exchange.path, route.methods)

    def _tenant(self, exchange: Exchange) -> str:
        """Whose key it is. Every key is compared, each in constant time, so that timing tells nothing about them."""
        scheme, _, key = (exchange.header(b"authorization") or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key.strip():
            raise AuthenticationError("this server wants an API key: send the header Authorization: Bearer <key>")
        matches = [tenant for known, tenant in self._tenants.items() if hmac.compare_digest(known, key.strip())]
        if not matches:
            raise AuthenticationError("the API key is not one of this server's")
        return matches[0]

    async def _fail(self, exchange: Exchange, error: LLMError) -> None:
        exchange.error_code = error.code or error.type
        if exchange.complete:
            logger.warning("request %s failed after its answer was complete: %s", exchange.request_id, error.message)
        elif exchange.started:
            exchange.status = error.status
            await exchange.write(chunks.error_event(error), more=False)
        else:
            await exchange.reply(error.status, replies.error_body(error), headers=self._error_headers(error))

    def _error_headers(self, error: LLMError) -> list[Header]:
        headers: list[Header] = []
        if isinstance(error, OverloadedError):
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after))))
        if error.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if isinstance(error, MethodNotAllowed):
            headers.append((b"allow", error.allowed.encode()))
        if error.status in (408, 413) or self._draining:
            headers.append((b"connection", b"close"))
        return headers

    # Answers of the model

    async def _chat(self, exchange: Exchange, record: RequestRecord) -> None:
        self._refuse_while_draining()
        data = await exchange.body(self._max_body_bytes)
        call = read_chat(data, request_id=exchange.request_id, tenant=exchange.tenant)
        await self._answer(exchange, record, call, ChatChunks, replies.chat_body)

    async def _complete(self, exchange: Exchange, record: RequestRecord) -> None:
        self._refuse_while_draining()
        data = await exchange.body(self._max_body_bytes)
        call = read_completion(
            data, request_id=exchange.request_id, tenant=exchange.tenant, max_choices=self._max_choices
        )
        await self._answer(exchange, record, call, CompletionChunks, replies.completion_body)

    def _refuse_while_draining(self) -> None:
        if self._draining:
            raise ProviderUnavailable("the server is shutting down and takes no new requests", code="shutting_down")

    async def _answer(
        self,
        exchange: Exchange,
        record: RequestRecord,
        call: Call,
        encoder: type[ChatChunks] | type[CompletionChunks],
        write_body: Callable[..., bytes],
    ) -> None:
        """Send the answer while watching for the client's leaving, which gives the work up at once."""
        created = int(time.time())
        watcher = asyncio.create_task(self._cancel_on_disconnect(exchange))
        exchange.task = asyncio.current_task()
        self._running.add(exchange)
        self._idle.clear()
        try:
            events = record.observe(self._events(call))
            if call.stream:
                stream = encoder(exchange.request_id, created, call.num_choices, call.include_usage)
                await self._send_stream(exchange, events, stream)
            else:
                async with aclosing(events):
                    response = await collect(events)
                body = write_body(response, exchange.request_id, created)
                header = replies.optimizations_header(response.optimizations)
                await exchange.reply(200, body, headers=[(b"x-autobot-optimizations", header)] if header else [])
        except asyncio.CancelledError:
            if exchange.ended_by is None:
                raise
            raise self._reason_of_end(exchange) from None
        finally:
            watcher.cancel()
            self._running.discard(exchange)
            if not self._running:
                self._idle.set()

    def _events(self, call: Call) -> AsyncGenerator[Event, None]:
        if len(call.requests) == 1:
            return self._llm.stream(call.requests[0])
        return merge_streams([self._llm.stream(request) for request in call.requests], call.requests[0].n)

    async def _cancel_on_disconnect(self, exchange: Exchange) -> None:
        await exchange.wait_for_disconnect()
        exchange.cancel("client")

    def _reason_of_end(self, exchange: Exchange) -> Exception:
        """Take back our own cancellation of the task, so that it can still reply, and say what it was for."""
        assert exchange.task is not None
        exchange.task.uncancel()
        if exchange.ended_by == "client":
            return ClientDisconnected()
        return ProviderUnavailable("the server shut down before the answer was complete", code="shutting_down")

    async def _send_stream(
        self, exchange: Exchange, events: AsyncGenerator[Event, None], encoder: ChunkEncoder
    ) -> None:
        """Send the events as they come. Nothing is sent before the first piece of the answer.

        So everything that goes wrong until then still gets its own status code. Chunks that another event is sure to
        follow wait for it, which saves writes: the role for the first piece, the finish reason for the end.
        """
        waiting = b""
        async with aclosing(events):
            async for event in events:
                data = waiting + encoder.encode(event)
                if isinstance(event, Start | ChoiceEnd):
                    waiting = data
                    continue
                waiting = b""
                last = isinstance(event, Finish)
                if not data:
                    continue
                if not exchange.started:
                    await exchange.start_stream(chunks.CONTENT_TYPE, SSE_HEADERS)
                await exchange.write(data, more=not last)
                if last:
                    return
        raise ProviderError("the provider's answer ended without its finish", code="truncated_answer")

    # Everything else

    async def _list_models(self, exchange: Exchange, record: RequestRecord) -> None:
        models = await self._llm.get_available_models()
        data = [replies.model_fields(model) for model in models]
        await exchange.reply(200, replies.encode({"object": "list", "data": data}))

    async def _show_model(self, exchange: Exchange, record: RequestRecord) -> None:
        wanted = exchange.path.removeprefix(MODELS + "/")
        models = await self._llm.get_available_models()
        for model in models:
            if wanted in (model.id, f"{model.provider}/{model.id}"):
                await exchange.reply(200, replies.encode(replies.model_fields(model)))
                return
        known = ", ".join(model.id for model in models) or "none"
        raise ModelNotFoundError(f"model {wanted!r} is not served here; served are {known}", param="model")

    async def _health(self, exchange: Exchange, record: RequestRecord) -> None:
        statuses = self._llm.get_all_provider_status()
        states = {status.state for status in statuses.values()}
        state = "draining" if self._draining else next((s for s in UNHEALTHY if s in states), "ready")
        body = {"status": state, "num_running": self.num_running, "providers": statuses}
        await exchange.reply(200 if state == "ready" else 503, replies.encode(body))

    async def _show_metrics(self, exchange: Exchange, record: RequestRecord) -> None:
        await exchange.reply(200, self._metrics.page(), content_type=metrics_module.CONTENT_TYPE.encode())

    async def _index(self, exchange: Exchange, record: RequestRecord) -> None:
        paths = [route.name for route in (*self._routes.values(), self._model_route)]
        await exchange.reply(200, replies.encode({"name": "autobot_llm", "api": "/v1", "endpoints": paths}))

    async def _nothing_here(self, exchange: Exchange, record: RequestRecord) -> None:
        raise PathNotFound(f"there is nothing at {exchange.path}; GET / lists what there is")
