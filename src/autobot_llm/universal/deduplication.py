"""Let equal requests that are under way at once share one call. Knows events and who waits; knows no provider.

A call runs in a task of its own, into a buffer that each caller reads at his own pace: who leaves disturbs nobody, and
who comes late gets what was there before. The last one to leave ends the call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from autobot_llm.errors import ProviderError
from autobot_llm.providers.base import Link, Provider, Streamer
from autobot_llm.report import SHARING, OptimizationOutcome, dollars_worth, without_costs
from autobot_llm.settings import Settings
from autobot_llm.types import Event, Finish, LLMRequest, Start
from autobot_llm.universal.entries import num_bytes_of
from autobot_llm.universal.request_key import AnswerKeys, may_be_shared

NAME = SHARING
REPLAY_BYTES = 4 * 2**20  # of one answer, kept for late callers and slow readers

_ALONE = OptimizationOutcome(name=NAME, applied=False, reason="no equal request was under way")
_NOT_SHARED = OptimizationOutcome(name=NAME, applied=False, reason="the answer is this request's own")


def deduplication(settings: Settings) -> Deduplication:
    """The link of one interface."""
    return Deduplication(settings)


class Deduplication(Link):
    """The calls under way at all providers of an interface."""

    def __init__(self, settings: Settings, *, replay_bytes: int = REPLAY_BYTES) -> None:
        self._settings = settings
        self.replay_bytes = replay_bytes
        self.calls: dict[tuple[bytes, bool, int], _Call] = {}
        self._num_joined_at: dict[str, int] = {}

    def wrap(self, chain: Streamer, provider: Provider) -> Streamer:
        return _SharedChain(self, chain, AnswerKeys(self._settings, provider), provider.name)

    @property
    def num_joined(self) -> int:
        """How many requests shared another one's call."""
        return sum(self._num_joined_at.values())

    def count_joined(self, provider: str) -> None:
        self._num_joined_at[provider] = self._num_joined_at.get(provider, 0) + 1

    def metrics_of(self, provider: str) -> dict[str, float]:
        return {"num_joined": self._num_joined_at.get(provider, 0)}


class _SharedChain:
    """Deduplication in front of one provider's chain."""

    def __init__(self, shared: Deduplication, inner: Streamer, keys: AnswerKeys, provider: str) -> None:
        self._provider = provider
        self._shared = shared
        self._inner = inner
        self._keys = keys

    async def stream(self, request: LLMRequest) -> AsyncGenerator[Event, None]:
        key = self._keys.key(request) if may_be_shared(request) else None
        if key is None:
            async with aclosing(self._inner.stream(request)) as events:
                async for event in events:
                    yield event if type(event) is not Finish else _with(_NOT_SHARED, event)
            return
        # Who waits for pieces shares no call that brings all of it at the end, nor an urgent request a patient one's.
        name = (key, request.stream, request.priority)
        call = self._shared.calls.get(name)
        joins = call is not None and call.can_be_joined
        if call is None or not joins:
            call = self._shared.calls[name] = _Call(self._inner, request, self._shared.replay_bytes)
        else:
            self._shared.count_joined(self._provider)
        reader = call.join()
        try:
            while (read := await call.next(reader)) is not None:
                if type(read) is Start and joins and request.request_id is not None:
                    yield Start(request_id=request.request_id, model=read.model, provider=read.provider)
                elif type(read) is Finish:
                    yield _joined(read) if joins else _with(_ALONE, read)
                else:
                    yield read
        finally:
            if call.leave(reader):
                if self._shared.calls.get(name) is call:
                    del self._shared.calls[name]
                await call.end()


def _with(line: OptimizationOutcome, finish: Finish) -> Finish:
    return msgspec.structs.replace(finish, optimizations=(*finish.optimizations, line))


def _joined(finish: Finish) -> Finish:
    line = OptimizationOutcome(
        name=NAME,
        applied=True,
        reason="an equal request was under way",
        tokens_saved=finish.usage.total_tokens,
        dollars_saved=dollars_worth(finish.optimizations),
    )
    return msgspec.structs.replace(finish, optimizations=(*without_costs(finish.optimizations), line))


class _Reader:
    """One caller: how many of the call's events he has read, and what he waits for."""

    __slots__ = ("position", "waiting")

    def __init__(self) -> None:
        self.position = 0
        self.waiting: asyncio.Future[None] | None = None


class _Call:
    """One call of the inner chain, and the events that have come of it.

    Until `replay_bytes` have come, every event is kept and anyone may join. After that, what all have read is dropped,
    nobody may join, and the call pauses while the slowest reader is that far behind.
    """

    def __init__(self, inner: Streamer, request: LLMRequest, replay_bytes: int) -> None:
        self._inner = inner
        # Each caller has a time limit of his own, in front of this.
        self._request = msgspec.structs.replace(request, timeout=None)
        self._replay_bytes = replay_bytes
        self._events: list[Event] = []
        self._first = 0  # the position of the first event that is kept
        self._num_bytes = 0
        self._readers: set[_Reader] = set()
        self._room: asyncio.Future[None] | None = None
        self._error: BaseException | None = None
        self._is_over = False
        self.can_be_joined = True
        self._task = asyncio.create_task(self._run())

    def join(self) -> _Reader:
        reader = _Reader()
        self._readers.add(reader)
        return reader

    def leave(self, reader: _Reader) -> bool:
        """Whether nobody is left."""
        self._readers.discard(reader)
        self._make_room()
        return not self._readers

    async def end(self) -> None:
        """Give the call up, if it is not over, and wait until what it held is free."""
        self.can_be_joined = False
        self._task.cancel()
        await asyncio.wait((self._task,))

    async def next(self, reader: _Reader) -> Event | None:
        """The reader's next event; None at the end. Raises what the call raised."""
        while reader.position - self._first >= len(self._events):
            if self._error is not None:
                raise self._error.with_traceback(None)
            if self._is_over:
                return None
            reader.waiting = asyncio.get_running_loop().create_future()
            await reader.waiting
        event = self._events[reader.position - self._first]
        reader.position += 1
        if not self.can_be_joined:
            self._make_room()
        return event

    async def _run(self) -> None:
        try:
            async with aclosing(self._inner.stream(self._request)) as events:
                async for event in events:
                    self._events.append(event)
                    self._num_bytes += num_bytes_of(event)
                    self._wake()
                    if self._num_bytes > self._replay_bytes:
                        await self._wait_for_room()
        except Exception as exc:
            self._error = exc
        except asyncio.CancelledError:
            if self._readers:  # somebody else than the last reader ended it
                self._error = ProviderError("the call that this request shared was given up")
            raise
        finally:
            self._is_over = True
            self._wake()

    def _wake(self) -> None:
        for reader in self._readers:
            if reader.waiting is not None and not reader.waiting.done():
                reader.waiting.set_result(None)

    async def _wait_for_room(self) -> None:
        self.can_be_joined = False
        self._make_room()
        while self._num_bytes > self._replay_bytes:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    def _make_room(self) -> None:
        """Drop the events that every reader has read, once nobody may join."""
        if self.can_be_joined or not self._readers:
            return
        slowest = min(reader.position for reader in self._readers)
        if (num_read := slowest - self._first) > 0:
            self._num_bytes -= sum(map(num_bytes_of, self._events[:num_read]))
            del self._events[:num_read]
            self._first = slowest
        if self._room is not None and not self._room.done() and self._num_bytes <= self._replay_bytes:
            self._room.set_result(None)
