"""Anthropic's Messages API as a provider. Knows connections and settings; the wire format is the dialect's."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import TypeVar
from urllib.parse import quote, urlsplit

import msgspec

from autobot_llm.dialects.anthropic.answers import AnswerReader, ModelsPage
from autobot_llm.dialects.anthropic.rate_limits import read_rate_limits
from autobot_llm.dialects.anthropic.requests import NEWEST_VERSION, write_count, write_request
from autobot_llm.dialects.bodies import encode
from autobot_llm.dialects.error_in_stream import ErrorInStream
from autobot_llm.dialects.rate_limits import RateLimits
from autobot_llm.errors import ConfigurationError, InvalidRequestError, LLMError, ProviderError, ProviderUnavailable
from autobot_llm.providers.anthropic.prompt_caching import mark_prefix, outcome
from autobot_llm.providers.base import ModelInfo, ProviderStatus
from autobot_llm.settings import Settings
from autobot_llm.transport.network import Network, limits_of
from autobot_llm.transport.pool import HttpPool, HttpStream, Timeouts
from autobot_llm.transport.reuse import connection_pooling
from autobot_llm.transport.sse import SseParser
from autobot_llm.types import Event, Finish, LLMRequest, Start, Timings, Usage

MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
MODELS = "/v1/models"
COUNT_SECONDS = 60.0  # for an answer that needs no model

PUBLIC_HOST = "api.anthropic.com"
EMBEDDED_MODEL = "tiny"  # what the setting says unless it was set

_JSON = "application/json"
_EVENTS = "text/event-stream"
# A whole answer begins when it is complete, so its first byte has no time limit but the request's own.
_WHOLE = Timeouts(first_token=None)
_STREAMED = Timeouts()
_MOST_PAGES = 20


class AnthropicProvider:
    """Answers with Anthropic's models, or with those of a server that speaks its language.

    Nothing is asked at the start. `close` ends what is under way. A request names its model, unless
    AUTOBOT_DEFAULT_LLM_MODEL is one of Anthropic's: the default provider is this one, or it begins with "anthropic/".
    """

    name = "anthropic"

    def __init__(self, settings: Settings) -> None:
        self._endpoint = settings.anthropic_endpoint
        self._api_key = settings.anthropic_api_key
        self._limits = limits_of(settings)
        self._network = Network.of(settings)
        self._marks_prefixes = settings.prefix_caching
        self._default_model = _default_model(settings, self.name)
        self._output_limits: dict[str, int] = {}
        self._pool: HttpPool | None = None
        self.rate_limits: RateLimits | None = None  # as the latest answer told
        self._rate_limits_of: dict[str, RateLimits] = {}  # each model has its own
        self._failure = ""
        self._num_running = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._num_written_tokens = 0

    async def start(self) -> None:
        """Make the pool. Raises ConfigurationError where Anthropic's own address is asked without a key."""
        if self._api_key is None and urlsplit(self._endpoint).hostname == PUBLIC_HOST:
            raise ConfigurationError("provider 'anthropic' needs a key: set ANTHROPIC_API_KEY")
        if self._pool is None:
            headers = {"content-type": _JSON}
            if self._api_key is not None:
                headers["x-api-key"] = self._api_key
            self._pool = HttpPool(
                self._endpoint, headers=headers, limits=self._limits, network=self._network, name=self.name
            )

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.close()

    async def warm(self, seconds: float) -> None:
        await self._started().warm(seconds)

    async def models(self) -> list[ModelInfo]:
        """Every model that the key may use, as `GET /v1/models` lists them."""
        pool = self._started()
        infos: list[ModelInfo] = []
        after = ""
        for _ in range(_MOST_PAGES):
            path = f"{MODELS}?limit=1000{after}"
            answer = await pool.request("GET", path, headers={"anthropic-version": NEWEST_VERSION})
            page = _decoded(answer.body, ModelsPage, self.name)
            infos += page.infos(self.name)
            self._output_limits |= page.output_limits()
            if not page.has_more or not page.last_id:
                return infos
            after = f"&after_id={quote(page.last_id, safe='')}"
        raise ProviderError(f"{self.name} lists models without an end")

    def status(self) -> ProviderStatus:
        """Ready once started: whether Anthropic answers, the last request tells, in `message` if it failed."""
        if self._pool is None:
            return ProviderStatus(name=self.name, state="stopped", message="not started")
        details: dict[str, float | int | str] = {"endpoint": _shown(self._endpoint)}
        if self._default_model is not None:
            details["model"] = self._default_model
        limits = self.rate_limits
        for kind, limit in (("requests", limits.requests), ("tokens", limits.tokens)) if limits else ():
            if limit is not None:
                details[f"remaining_{kind}"] = limit.remaining
        return ProviderStatus(name=self.name, state="ready", message=self._failure, details=details)

    def rate_limits_of(self, model: str | None) -> RateLimits | None:
        """What Anthropic said of the key's limits with its latest answer of `model`."""
        return self._rate_limits_of.get(model or self._default_model or "")

    def metrics(self) -> dict[str, float]:
        figures = self._pool.metrics() if self._pool is not None else {}
        return figures | {
            "num_running": self._num_running,
            "prefix_cache_hit_rate": self._num_cached_tokens / max(1, self._num_prompt_tokens),
            "num_cached_tokens": self._num_cached_tokens,
            "num_cache_write_tokens": self._num_written_tokens,
        }

    async def count_tokens(self, request: LLMRequest) -> int:
        """How many tokens the request's prompt has, as Anthropic counts them."""
        pool = self._started()
        call = write_count(request, self._model(request))
        timeout = request.timeout or COUNT_SECONDS
        answer = await pool.request("POST", COUNT, body=encode(call.body), headers=call.headers, timeout=timeout)
        return _decoded(answer.body, _Count, self.name).input_tokens

    async def stream(self, request: LLMRequest) -> AsyncGenerator[Event, None]:
        """Ask for the answer. What Anthropic cannot honour is refused by name before anything is sent."""
        pool = self._started()
        model = self._model(request)
        call = write_request(request, model, max_output_tokens=self._output_limits.get(model))
        marking = mark_prefix(call.body, request, model, is_enabled=self._marks_prefixes)
        reader = AnswerReader(request.request_id or f"req-{secrets.token_hex(12)}", self.name)
        timeouts = _STREAMED if call.body["stream"] else _WHOLE
        began = time.perf_counter()
        first_piece: float | None = None
        self._num_running += 1
        try:
            async with (
                pool.stream(
                    "POST",
                    MESSAGES,
                    body=encode(call.body),
                    headers=call.headers,
                    timeouts=timeouts,
                    may_repeat=not request.has_side_effects,
                ) as answer,
                aclosing(_pieces(pool, answer, reader)) as pieces,
            ):
                self._note_rate_limits(model, answer.headers)
                async for events in pieces:
                    for event in events:
                        if first_piece is None and type(event) is not Start:
                            first_piece = time.perf_counter()
                        yield event
        except InvalidRequestError:
            raise  # the caller's own mistake says nothing about Anthropic
        except LLMError as error:
            self._failure = error.message
            raise
        finally:
            self._num_running -= 1
        self._failure = ""
        self._count(reader.usage)
        now = time.perf_counter()
        yield Finish(
            usage=reader.usage,
            timings=Timings(time_to_first_token=(first_piece or now) - began, total=now - began),
            optimizations=(outcome(marking, reader.usage), connection_pooling(is_reused=answer.is_reused)),
        )

    def _note_rate_limits(self, model: str, headers: Mapping[str, str]) -> None:
        self.rate_limits = limits = read_rate_limits(headers)
        if limits is not None:
            self._rate_limits_of[model] = limits
        else:
            self._rate_limits_of.pop(model, None)

    def _started(self) -> HttpPool:
        if self._pool is None:
            raise ProviderUnavailable("provider 'anthropic' is not started")
        return self._pool

    def _model(self, request: LLMRequest) -> str:
        model = request.model or self._default_model
        if model is None:
            raise InvalidRequestError(
                "model: expected one of Anthropic's, such as anthropic/claude-opus-5-5, or a default in "
                "AUTOBOT_DEFAULT_LLM_MODEL",
                param="model",
            )
        return model

    def _count(self, usage: Usage) -> None:
        self._num_prompt_tokens += usage.prompt_tokens
        self._num_cached_tokens += usage.cached_tokens
        self._num_written_tokens += usage.cache_write_tokens


async def _pieces(pool: HttpPool, answer: HttpStream, reader: AnswerReader) -> AsyncGenerator[Sequence[Event], None]:
    """The events of each piece of the answer. Raises ProviderError where it stops before `message_stop`."""
    kind = answer.headers.get("content-type", _EVENTS)
    try:
        if kind.startswith(_JSON):
            yield reader.read_message(await answer.body(pool.limits.max_body_bytes))
            return
        if not kind.startswith(_EVENTS):
            raise ProviderError(
                f"{pool.name} answered with {kind!r}: expected {_JSON} or {_EVENTS}", code="malformed_answer"
            )
        parser = SseParser()
        while not reader.is_complete and (chunk := await answer.read()):
            for piece in parser.feed(chunk):
                if events := reader.read_event(piece.data):
                    yield events
        if not reader.is_complete:
            raise ProviderError(f"{pool.name} ended its answer before it was complete", code="truncated_answer")
        await answer.end()
    except ErrorInStream as exc:
        raise pool.error_from(exc.status, {}, exc.body) from exc


def _shown(address: str) -> str:
    """An address without what may be secret in it: a user, a password, a query."""
    url = urlsplit(address)
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"


def _default_model(settings: Settings, name: str) -> str | None:
    """The default model, where it is one of this provider's."""
    prefix, slash, rest = settings.default_model.partition("/")
    if slash and prefix == name:
        return rest
    is_meant = settings.provider == name and settings.default_model != EMBEDDED_MODEL
    return settings.default_model if is_meant else None


class _Count(msgspec.Struct):
    input_tokens: int


KindT = TypeVar("KindT")


def _decoded(data: bytes, kind: type[KindT], name: str) -> KindT:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        shown = data[:200].decode("utf-8", "replace")
        raise ProviderError(f"{name} sent an answer that is not Anthropic's ({exc}): {shown}") from exc
