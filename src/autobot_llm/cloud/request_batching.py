"""Gather requests that come at about the same time into one call. Knows time and numbers; knows nothing of requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from autobot_llm.errors import ProviderError, ProviderUnavailable

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")

Send = Callable[[Sequence[RequestT]], Awaitable[Sequence[ResponseT | Exception]]]


class CloudRequestBatcher(Generic[RequestT, ResponseT]):
    """A batch is sent `batch_window_ms` after its first request, or at once when it has `max_batch_size` of them.

    `send` makes one call of a batch and returns what became of each request, in their order: a response, or an
    exception, which is raised for that request alone. What `send` raises is raised for all of them. Belongs to one
    event loop.
    """

    def __init__(
        self, batch_window_ms: float = 50, max_batch_size: int = 10, *, send: Send[RequestT, ResponseT]
    ) -> None:
        if batch_window_ms < 0 or max_batch_size < 1:
            raise ValueError("expected batch_window_ms of at least 0 and max_batch_size of at least 1")
        self._window = batch_window_ms / 1000
        self._max_size = max_batch_size
        self._send = send
        self._open: _Batch[RequestT, ResponseT] | None = None
        self._under_way: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self.num_batches = 0
        self.num_requests = 0

    async def add_request(self, request: RequestT) -> ResponseT:
        """The response to `request`, sent together with others.

        Cancelled before its batch is sent, it is taken out of it; a call for which nobody waits any more is cancelled.
        """
        if self._is_closed:
            raise ProviderUnavailable("the batcher is closed")
        loop = asyncio.get_running_loop()
        batch = self._open
        if batch is None:
            batch = self._open = _Batch()
            batch.timer = loop.call_later(self._window, self._dispatch, batch)
        answer: asyncio.Future[ResponseT] = loop.create_future()
        batch.waiting[answer] = request
        if len(batch.waiting) >= self._max_size:
            self._dispatch(batch)
        try:
            return await answer
        except asyncio.CancelledError:
            self._leave(batch, answer)
            raise

    async def close(self) -> None:
        """Give up what waits and what is under way, which ends with ProviderUnavailable. May be called again."""
        self._is_closed = True
        batch, self._open = self._open, None
        if batch is not None:
            batch.stop_timer()
            batch.fail(ProviderUnavailable("the batcher was closed"))
        tasks = list(self._under_way)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _dispatch(self, batch: _Batch[RequestT, ResponseT]) -> None:
        batch.stop_timer()
        if self._open is batch:
            self._open = None
        self.num_batches += 1
        self.num_requests += len(batch.waiting)
        batch.call = asyncio.get_running_loop().create_task(self._call(batch))
        self._under_way.add(batch.call)
        batch.call.add_done_callback(self._under_way.discard)

    async def _call(self, batch: _Batch[RequestT, ResponseT]) -> None:
        answers, requests = list(batch.waiting), list(batch.waiting.values())
        try:
            responses = await self._send(requests)
        except asyncio.CancelledError:
            batch.fail(ProviderUnavailable("the call that the request was part of was given up"))
            raise
        except Exception as exc:
            batch.fail(exc)
            return
        if len(responses) != len(requests):
            batch.fail(ProviderError(f"{len(requests)} requests were sent together and {len(responses)} answered"))
            return
        for answer, response in zip(answers, responses, strict=True):
            if answer.done():
                continue  # its caller has left
            if isinstance(response, Exception):
                answer.set_exception(response)
            else:
                answer.set_result(response)

    def _leave(self, batch: _Batch[RequestT, ResponseT], answer: asyncio.Future[ResponseT]) -> None:
        if not answer.cancelled():
            answer.exception()  # it came just before the cancellation, and nobody will look at it
        if batch.call is None:
            batch.waiting.pop(answer, None)
            if not batch.waiting:
                batch.stop_timer()
                if self._open is batch:
                    self._open = None
        elif all(one.done() for one in batch.waiting):
            batch.call.cancel()


class _Batch(Generic[RequestT, ResponseT]):
    """Requests that go together, by the future that each one's caller waits for."""

    def __init__(self) -> None:
        self.waiting: dict[asyncio.Future[ResponseT], RequestT] = {}
        self.timer: asyncio.TimerHandle | None = None
        self.call: asyncio.Task[None] | None = None

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def fail(self, error: Exception) -> None:
        for answer in self.waiting:
            if not answer.done():
                answer.set_exception(error)
