"""The HTTP application: routes, keys, and errors in the dialect of the route. Knows HTTP; knows no wire format.

A raw ASGI application, so that a request passes through no framework on its way.
"""

from __future__ import annotations

import hmac
import logging
import math
import secrets
from collections.abc import Callable

import msgspec

from autobot_llm.errors import AuthenticationError, LLMError
from autobot_llm.interface import LLMInterface
from autobot_llm.observability.metrics import CONTENT_TYPE, Metrics, RequestRecord
from autobot_llm.server.answers import Answers, Service
from autobot_llm.server.anthropic_api import anthropic_api
from autobot_llm.server.asgi import ClientDisconnected, Exchange, Header, Receive, Scope, Send
from autobot_llm.server.ollama_api import ollama_api
from autobot_llm.server.openai_api import openai_api
from autobot_llm.server.routes import (
    GET,
    Api,
    ErrorFormat,
    MethodNotAllowed,
    PathNotFound,
    Route,
    RouteTable,
)
from autobot_llm.settings import Settings, tenant_of

logger = logging.getLogger("autobot_llm.server")

CLIENT_CLOSED_REQUEST = 499  # nginx's number for a client that left; no client ever sees it
LONGEST_MESSAGE = 2000  # characters of an error: it repeats what the client sent, who knows that already
UNHEALTHY = ("failed", "stopped", "starting")  # worst first

# Every dialect the server speaks, one line each.
APIS: tuple[Callable[[Service], Api], ...] = (
    openai_api,
    anthropic_api,
    ollama_api,
)


def create_app(llm: LLMInterface, settings: Settings, metrics: Metrics) -> App:
    """Put the HTTP APIs in front of `llm`: an ASGI application. `llm` must be initialized by the caller."""
    metrics.watch_providers(llm.get_metrics)
    return App(llm, settings, metrics)


class App:
    """The ASGI application; `answers` are for whoever stops the server."""

    def __init__(self, llm: LLMInterface, settings: Settings, metrics: Metrics) -> None:
        self.answers = Answers(llm, settings)
        self._llm = llm
        self._metrics = metrics
        self._tenants = {key.encode(): tenant_of(key) for key in settings.api_keys}
        service = Service(llm, settings, metrics, self.answers)
        apis = [make_api(service) for make_api in APIS]
        apis.append(self._own_api(apis[0].errors))
        self._table = RouteTable(apis, unknown=Route("unknown", (), self._nothing_here))

    def _own_api(self, errors: ErrorFormat) -> Api:
        return Api(
            routes=(
                Route("/health", GET, self._health, needs_key=False),
                Route("/metrics", GET, self._show_metrics),
                Route("/v1/optimizations", GET, self._show_optimizations),
                Route("/", GET, self._index),
            ),
            errors=errors,
            prefix="",
        )

    # One request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"This application serves http, not {scope['type']!r}.")
        exchange = Exchange(scope, receive, send, secrets.token_hex(16))
        route, errors = self._table.find(exchange)
        record = self._metrics.begin(route.path)
        try:
            self._check(exchange, route)
            await route.handler(exchange, record)
        except ClientDisconnected:
            exchange.status = CLIENT_CLOSED_REQUEST
        except LLMError as error:
            await self._fail(exchange, error, errors)
        except Exception:
            logger.exception("request %s failed unexpectedly", exchange.request_id)
            message = f"the server failed unexpectedly; its log has the details under request {exchange.request_id}"
            await self._fail(exchange, LLMError(message, code="internal_error"), errors)
        finally:
            record.end(exchange.status, exchange.error_code)

    def _check(self, exchange: Exchange, route: Route) -> None:
        if self._tenants and route.needs_key:
            exchange.tenant = self._tenant(exchange)
        if route.methods and exchange.method not in route.methods:
            raise MethodNotAllowed(exchange.method, exchange.path, route.methods)

    def _tenant(self, exchange: Exchange) -> str:
        """Whose key it is. Every key is compared, each in constant time, so that timing tells nothing about them."""
        key = _sent_key(exchange)
        if not key:
            raise AuthenticationError(
                "this server wants an API key: send the header Authorization: Bearer <key>, or x-api-key: <key>"
            )
        matches = [tenant for known, tenant in self._tenants.items() if hmac.compare_digest(known, key)]
        if not matches:
            raise AuthenticationError("the API key is not one of this server's")
        return matches[0]

    async def _fail(self, exchange: Exchange, error: LLMError, errors: ErrorFormat) -> None:
        exchange.error_code = error.code or error.type
        error.message, error.param = _shortened(error.message), error.param and _shortened(error.param)
        if exchange.complete:
            logger.warning("request %s failed after its answer was complete: %s", exchange.request_id, error.message)
        elif exchange.started:
            exchange.status = error.status
            await exchange.write(errors.event(error), more=False)
        else:
            await exchange.reply(error.status, errors.body(error), headers=self._error_headers(error))

    def _error_headers(self, error: LLMError) -> list[Header]:
        headers: list[Header] = []
        if error.retry_after is not None:
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after))))
        if error.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if isinstance(error, MethodNotAllowed):
            headers.append((b"allow", error.allowed.encode()))
        if error.status in (408, 413) or self.answers.is_draining:
            headers.append((b"connection", b"close"))
        return headers

    # What belongs to no dialect

    async def _health(self, exchange: Exchange, record: RequestRecord) -> None:
        statuses = self._llm.get_all_provider_status()
        states = {status.state for status in statuses.values()}
        state = "draining" if self.answers.is_draining else next((s for s in UNHEALTHY if s in states), "ready")
        body = {"status": state, "num_running": self.answers.num_running, "providers": statuses}
        await exchange.reply(200 if state == "ready" else 503, msgspec.json.encode(body))

    async def _show_metrics(self, exchange: Exchange, record: RequestRecord) -> None:
        await exchange.reply(200, self._metrics.page(), content_type=CONTENT_TYPE.encode())

    async def _show_optimizations(self, exchange: Exchange, record: RequestRecord) -> None:
        body = {"object": "list", "data": self._llm.get_optimizations()}
        await exchange.reply(200, msgspec.json.encode(body))

    async def _index(self, exchange: Exchange, record: RequestRecord) -> None:
        body = {"name": "autobot_llm", "api": "/v1", "endpoints": self._table.paths}
        await exchange.reply(200, msgspec.json.encode(body))

    async def _nothing_here(self, exchange: Exchange, record: RequestRecord) -> None:
        raise PathNotFound(f"there is nothing at {exchange.path}; GET / lists what there is")


def _shortened(text: str) -> str:
    """Both ends of a text that is too long: an error begins with the field and ends with what is accepted."""
    half = LONGEST_MESSAGE // 2
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:half]} ... {text[-half:]}"


def _sent_key(exchange: Exchange) -> bytes:
    """The API key of a request, from whichever header its client uses; empty where there is none."""
    scheme, _, key = (exchange.header(b"authorization") or b"").partition(b" ")
    if scheme.lower() == b"bearer" and key.strip():
        return key.strip()
    return (exchange.header(b"x-api-key") or b"").strip()
