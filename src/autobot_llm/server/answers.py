"""Send answers while they are made, and give the work up when nobody waits. Knows events and HTTP; knows no dialect."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from autobot_llm.collect import collect
from autobot_llm.errors import ProviderError, ProviderUnavailable
from autobot_llm.interface import LLMInterface
from autobot_llm.observability.metrics import Metrics, RequestRecord
from autobot_llm.server.asgi import ClientDisconnected, Exchange, Header
from autobot_llm.server.cache_control import FIELD, with_cache_control
from autobot_llm.server.merge import merge_streams
from autobot_llm.server.report_headers import report_headers, reused_headers
from autobot_llm.settings import Settings
from autobot_llm.types import ChoiceEnd, Event, Finish, LLMRequest, LLMResponse, Start

_STREAM_HEADERS: tuple[Header, ...] = (
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy that gathers the stream up would undo it
)


class StreamEncoder(Protocol):
    """Turns the events of one answer into bytes for the wire; `b""` where an event has none.

    What it makes of Finish is the end of the stream, and is not empty.
    """

    content_type: bytes

    def encode(self, event: Event) -> bytes: ...


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
        await self.watch(exchange, _send_stream(exchange, self._events(exchange, record, requests), encoder))

    async def whole(
        self,
        exchange: Exchange,
        record: RequestRecord,
        requests: Sequence[LLMRequest],
        write: Callable[[LLMResponse], bytes],
    ) -> None:
        """Answer `requests`, alike but for their prompts, with one body that `write` makes of the complete answer."""
        await self.watch(exchange, _send_whole(exchange, self._events(exchange, record, requests), write))

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

    def _events(
        self, exchange: Exchange, record: RequestRecord, requests: Sequence[LLMRequest]
    ) -> AsyncGenerator[Event, None]:
        header = exchange.header(b"cache-control")
        if header is not None or FIELD in requests[0].extra_body:
            requests = [with_cache_control(request, header) for request in requests]
        if len(requests) == 1:
            return record.observe(self._llm.events(requests[0]))
        return record.observe(merge_streams([self._llm.events(request) for request in requests], requests[0].n))


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


async def _send_whole(
    exchange: Exchange, events: AsyncGenerator[Event, None], write: Callable[[LLMResponse], bytes]
) -> None:
    async with aclosing(events):
        response = await collect(events)
    await exchange.reply(200, write(response), headers=report_headers(response.optimizations))


async def _send_stream(exchange: Exchange, events: AsyncGenerator[Event, None], encoder: StreamEncoder) -> None:
    """Send the events as they come. Nothing is sent before the first piece of the answer.

    So everything that goes wrong until then still gets its own status code. Chunks that another event is sure to
    follow wait for it, which saves writes: the role for the first piece, the finish reason for the end.
    """
    waiting = b""
    headers = _STREAM_HEADERS
    async with aclosing(events):
        async for event in events:
            data = waiting + encoder.encode(event)
            kind = type(event)
            if kind is Start or kind is ChoiceEnd:
                waiting = data
                if isinstance(event, Start) and event.reused is not None:
                    headers = (*_STREAM_HEADERS, *reused_headers(event.reused))
                continue
            waiting = b""
            last = kind is Finish
            if not data:
                continue
            if not exchange.started:
                await exchange.start_stream(encoder.content_type, headers)
            await exchange.write(data, more=not last)
            if last:
                return
    raise ProviderError("the provider's answer ended without its finish", code="truncated_answer")
