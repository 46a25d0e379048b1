"""Send answers while they are made, and give the work up when nobody waits. Knows events and HTTP; knows no dialect."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from autobot_llm.collect import collect
from autobot_llm.errors import ProviderError, ProviderUnavailable
from autobot_llm.interface import LLMInterface
from autobot_llm.observability.metrics import Metrics, RequestRecord
from autobot_llm.report import OptimizationOutcome
from autobot_llm.server.asgi import ClientDisconnected, Exchange, Header
from autobot_llm.server.cache_control import FIELD, with_cache_control
from autobot_llm.server.merge import merge_streams
from autobot_llm.server.report_headers import report_headers, reused_headers
from autobot_llm.settings import Settings
from autobot_llm.types import ChoiceEnd, Event, Finish, LLMRequest, LLMResponse, Start
from autobot_llm.universal.kept_answer import KeptAnswer

_STREAM_HEADERS: tuple[Header, ...] = (
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy that gathers the stream up would undo it
)
MOST_AT_ONCE = 64 * 1024  # bytes of a kept stream that are written together


class StreamEncoder(Protocol):
    """Turns the events of one answer into bytes for the wire; `b""` where an event has none.

    What it makes of Finish is the end of the stream, and is not empty.
    """

    content_type: bytes

    def encode(self, event: Event) -> bytes: ...


class Reply(Protocol):
    """Writes one whole answer. `lasting` makes of an answer what is the same in every reply of this `form` with it."""

    @property
    def form(self) -> str: ...

    def lasting(self, response: LLMResponse) -> bytes: ...

    def body(self, lasting: bytes, response: LLMResponse) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Service:
    """What the handlers of every API work with."""

    llm: LLMInterface
    settings: Settings
    metrics: Metrics
    answers: Answers


class Answers:
    """The answers that are being made. `begin_drain`, `wait_idle` and `abort` are for whoever stops the server."""

    def __init__(self, llm: LLMInterface, settings: Settings) -> None:
        self._llm = llm
        self._max_body_bytes = settings.max_body_bytes
        self._running: set[Exchange] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.is_draining = False

    # Stopping

    def begin_drain(self) -> None:
        """Refuse new work from now on; what runs goes on."""
        self.is_draining = True

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

    # Answering

    async def body(self, exchange: Exchange) -> bytes:
        """The body of a request for work, bounded in size. Errors: those of `Exchange.body`, ProviderUnavailable."""
        if self.is_draining:
            raise ProviderUnavailable("the server is shutting down and takes no new requests", code="shutting_down")
        return await exchange.body(self._max_body_bytes)

    async def stream(
        self, exchange: Exchange, record: RequestRecord, requests: Sequence[LLMRequest], encoder: StreamEncoder
    ) -> None:
        """Answer `requests`, alike but for their prompts, as one stream."""
        requests = _with_cache_control(exchange, requests)
        if len(requests) == 1 and (kept := self.kept(record, requests[0])) is not None:
            events = kept.events()
            await self.watch(exchange, _send_kept(exchange, events, encoder))
        else:
            await self.watch(exchange, _send_stream(exchange, self._events(record, requests), encoder))

    async def whole(
        self, exchange: Exchange, record: RequestRecord, requests: Sequence[LLMRequest], reply: Reply
    ) -> None:
        """Answer `requests`, alike but for their prompts, with one body that `reply` makes of the complete answer."""
        requests = _with_cache_control(exchange, requests)
        if len(requests) == 1 and (kept := self.kept(record, requests[0])) is not None:
            response = kept.response()
            lasting = kept.written(reply.form, reply.lasting)
            await send_body(exchange, reply.body(lasting, response), response.optimizations)
        else:
            await self.watch(exchange, _send_whole(exchange, self._events(record, requests), reply))

    def kept(self, record: RequestRecord, request: LLMRequest) -> KeptAnswer | None:
        """The answer to `request` if it can be given at once, which needs no `watch`; it is then in the record."""
        kept = self._llm.kept(request)
        if kept is not None:
            record.replay(kept.model, kept.usage, *kept.num_pieces)
        return kept

    async def watch(self, exchange: Exchange, work: Coroutine[object, object, None]) -> None:
        """Do `work`, which replies, while watching for the client's leaving, which gives the work up at once."""
        exchange.task = asyncio.current_task()
        self._running.add(exchange)
        self._idle.clear()
        is_told = exchange.listen_for_disconnect(partial(exchange.cancel, "client"))
        watcher = None if is_told else asyncio.create_task(_cancel_on_disconnect(exchange))
        try:
            await work
        except asyncio.CancelledError:
            if exchange.ended_by is None:
                raise
            raise _reason_of_end(exchange) from None
        finally:
            if watcher is not None:
                watcher.cancel()
            exchange.task = None  # what follows, as the reply that tells an error, is not given up
            self._running.discard(exchange)
            if not self._running:
                self._idle.set()

    def _events(self, record: RequestRecord, requests: Sequence[LLMRequest]) -> AsyncGenerator[Event, None]:
        if len(requests) == 1:
            return record.observe(self._llm.events(requests[0], ask_memory=False))
        return record.observe(merge_streams([self._llm.events(request) for request in requests], requests[0].n))


def _with_cache_control(exchange: Exchange, requests: Sequence[LLMRequest]) -> Sequence[LLMRequest]:
    header = exchange.header(b"cache-control")
    if header is None and FIELD not in requests[0].extra_body:
        return requests
    return [with_cache_control(request, header) for request in requests]


async def _cancel_on_disconnect(exchange: Exchange) -> None:
    await exchange.wait_for_disconnect()
    exchange.cancel("client")


def _reason_of_end(exchange: Exchange) -> Exception:
    """Take back our own cancellation of the task, so that it can still reply, and say what it was for."""
    assert exchange.task is not None
    exchange.task.uncancel()
    if exchange.ended_by == "client":
        return ClientDisconnected()
    return ProviderUnavailable("the server shut down before the answer was complete", code="shutting_down")


async def _send_whole(exchange: Exchange, events: AsyncGenerator[Event, None], reply: Reply) -> None:
    async with aclosing(events):
        response = await collect(events)
    await send_body(exchange, reply.body(reply.lasting(response), response), response.optimizations)


async def send_body(exchange: Exchange, body: bytes, optimizations: tuple[OptimizationOutcome, ...]) -> None:
    """Reply with a complete answer, and what was done for it in a header."""
    await exchange.reply(200, body, headers=report_headers(optimizations))


class _Pieces:
    """The bytes to be sent of each event. `encoder`'s of an event that another is sure to follow wait for that one.

    So the role goes with the first piece, and the finish reason with the end, which saves writes.
    """

    __slots__ = ("_encode", "_waiting")

    def __init__(self, encoder: StreamEncoder) -> None:
        self._encode = encoder.encode
        self._waiting = b""

    def of(self, event: Event) -> bytes:
        data = self._waiting + self._encode(event)
        kind = type(event)
        if kind is Start or kind is ChoiceEnd:
            self._waiting = data
            return b""
        self._waiting = b""
        return data


async def _send_stream(exchange: Exchange, events: AsyncGenerator[Event, None], encoder: StreamEncoder) -> None:
    """Send the events as they come. Nothing is sent before the first piece of the answer.

    So everything that goes wrong until then still gets its own status code.
    """
    pieces = _Pieces(encoder)
    headers = _STREAM_HEADERS
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Start) and event.reused is not None:
                headers = (*_STREAM_HEADERS, *reused_headers(event.reused))
            if data := pieces.of(event):
                last = type(event) is Finish
                await _send_piece(exchange, data, encoder, headers, last=last)
                if last:
                    return
    raise ProviderError("the provider's answer ended without its finish", code="truncated_answer")


async def _send_kept(exchange: Exchange, events: Sequence[Event], encoder: StreamEncoder) -> None:
    """`_send_stream` for events that are all there: the same bytes with fewer writes."""
    pieces, gathered, num_bytes = _Pieces(encoder), list[bytes](), 0
    try:
        for event in events:
            data = pieces.of(event)
            gathered.append(data)
            num_bytes += len(data)
            if num_bytes >= MOST_AT_ONCE:
                await _send_piece(exchange, b"".join(gathered), encoder, last=type(event) is Finish)
                gathered, num_bytes = [], 0
    except Exception:
        if num_bytes:
            await _send_piece(exchange, b"".join(gathered), encoder, last=False)
        raise
    if num_bytes:
        await _send_piece(exchange, b"".join(gathered), encoder, last=True)


async def _send_piece(
    exchange: Exchange,
    data: bytes,
    encoder: StreamEncoder,
    headers: Sequence[Header] = _STREAM_HEADERS,
    *,
    last: bool,
) -> None:
    if not exchange.started:
        await exchange.start_stream(encoder.content_type, headers)
    await exchange.write(data, more=not last)
