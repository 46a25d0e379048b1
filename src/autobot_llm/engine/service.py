"""A thread that owns the engine, and the bridge from asyncio to it. Knows queues and event loops; knows no tensors.

Requests go in as commands that the thread reads between steps. Outputs come back once per step and event loop, into
each handle's own buffer: a reader that is slow, or gone, costs memory for its own text and delays nobody.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeVar

from autobot_llm.engine.engine import Engine
from autobot_llm.engine.request import EngineRequest, Output, RequestStats
from autobot_llm.errors import EngineError, LLMError, OverloadedError, ProviderUnavailable

log = logging.getLogger(__name__)

# A step that fails is answered with errors and an empty cache; this many in a row, and the engine itself is broken.
MAX_CONSECUTIVE_FAILURES = 3

State = Literal["stopped", "starting", "ready", "failed"]
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class _Submit:
    handle: RequestHandle
    request: EngineRequest


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: int


@dataclass(frozen=True, slots=True)
class _Work:
    """Something to be done with the engine between two steps; whoever waits for it waits for `result`."""

    do: Callable[[Engine], Any]
    loop: asyncio.AbstractEventLoop
    result: asyncio.Future[Any]

    def tell(self, value: object, error: BaseException | None) -> None:
        def resolve() -> None:
            if not self.result.done():  # else nobody waits any more
                self.result.set_exception(error) if error else self.result.set_result(value)

        _call(self.loop, resolve)


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Command = _Submit | _Abort | _Work | _Stop


class RequestHandle:
    """One request's outputs, read with `await next_outputs()` from the event loop that submitted it.

    Use it as a context manager: leaving it early gives the request up, and its blocks are free within one step.
    """

    def __init__(self, service: EngineService, request_id: int, num_choices: int) -> None:
        self.id = request_id
        self.stats = RequestStats()
        self.loop = asyncio.get_running_loop()
        self._service = service
        self._num_open = num_choices
        self.num_unfinished = num_choices  # counted by the device thread
        self._pending: list[Output] = []
        self._arrived = asyncio.Event()
        self._failure: LLMError | None = None

    def __enter__(self) -> RequestHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._num_open:
            self._num_open = 0
            self._service._abort(self)

    @property
    def is_open(self) -> bool:
        """Whether more outputs will come."""
        return self._num_open > 0 or bool(self._pending)

    async def next_outputs(self) -> list[Output]:
        """Everything that arrived since the last call; waits for at least one. Raises what ended the request."""
        while not self._pending:
            if self._failure is not None:
                raise _again(self._failure)
            await self._arrived.wait()
        outputs, self._pending = self._pending, []
        self._arrived.clear()
        for output in outputs:
            if output.error is not None:
                raise output.error
            if output.end is not None:
                self._num_open -= 1
        return outputs

    def _deliver(self, output: Output) -> None:
        self._pending.append(output)
        self._arrived.set()

    def _fail(self, error: LLMError) -> None:
        self._failure = error  # the handle stays open until its reader has been told
        self._arrived.set()


class EngineService:
    """Starts the device thread, hands requests to it and brings outputs back.

    `build` runs on the device thread, because a device's memory belongs to the thread that uses it.
    `max_queued_requests` bounds the requests that wait for their first step.
    """

    def __init__(self, build: Callable[[], Engine], *, max_queued_requests: int) -> None:
        self._build = build
        self._max_queued_requests = max_queued_requests
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._handles: dict[int, RequestHandle] = {}
        self._ids = itertools.count()
        self._lock = threading.Lock()  # guards _handles and state against a submit while the thread ends
        self._thread: threading.Thread | None = None
        self._finish_times: list[float] = []
        self.engine: Engine | None = None
        self.state: State = "stopped"
        self.failure: LLMError | None = None

    async def start(self) -> None:
        """Build the engine. Raises what building raised. Starting a service that runs does nothing."""
        if self._thread is not None:
            return
        loop = asyncio.get_running_loop()
        started: asyncio.Future[None] = loop.create_future()
        self.state, self.failure = "starting", None
        self._commands = queue.SimpleQueue()  # an earlier thread may have left commands unread

        def report(error: BaseException | None) -> None:
            def resolve() -> None:
                if not started.done():
                    started.set_exception(error) if error else started.set_result(None)

            _call(loop, resolve)

        self._thread = threading.Thread(target=self._run, args=(report,), name="autobot-engine", daemon=True)
        self._thread.start()
        try:
            await started
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Stop the thread and free the device. Requests under way end with ProviderUnavailable."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._commands.put(_Stop())
        await asyncio.to_thread(thread.join)

    def submit(self, request: EngineRequest) -> RequestHandle:
        """Queue a request. Raises OverloadedError when the queue is full, ProviderUnavailable when not running."""
        with self._lock:
            if self.state != "ready" or self.engine is None:
                raise _again(self.failure or ProviderUnavailable(f"the engine is {self.state}"))
            num_queued = self.engine.scheduler.num_waiting + self._commands.qsize()
            if num_queued >= self._max_queued_requests:
                raise OverloadedError(
                    f"{num_queued} requests are waiting for the engine, the limit is {self._max_queued_requests}",
                    retry_after=self._seconds_until_room(),
                )
            handle = RequestHandle(self, next(self._ids), len(request.params))
            self._handles[handle.id] = handle
        self._commands.put(_Submit(handle, request))
        return handle

    async def run(self, work: Callable[[Engine], _Result]) -> _Result:
        """What `work` returns or raises, called with the engine on its own thread, between two steps.

        Raises ProviderUnavailable where the engine does not run, or stops before it comes to it.
        """
        result: _Result = await self.post(work)
        return result

    def post(self, work: Callable[[Engine], Any]) -> asyncio.Future[Any]:
        """As `run`, for those who need not wait. Raises ProviderUnavailable where the engine does not run."""
        loop = asyncio.get_running_loop()
        command = _Work(work, loop, loop.create_future())
        with self._lock:
            if self.state != "ready" or self.engine is None:
                raise _again(self.failure or ProviderUnavailable(f"the engine is {self.state}"))
            self._commands.put(command)
        return command.result

    def _seconds_until_room(self) -> float:
        """How long a tenth of the queue takes at the recent rate of finishing; 1 s where nothing finished yet."""
        recent = self._finish_times
        if len(recent) < 2:
            return 1.0
        seconds_each = (recent[-1] - recent[0]) / (len(recent) - 1)
        return min(60.0, max(1.0, seconds_each * self._max_queued_requests / 10))

    def _abort(self, handle: RequestHandle) -> None:
        with self._lock:
            if self._handles.pop(handle.id, None) is not None:
                self._commands.put(_Abort(handle.id))

    # --- below here: the device thread ---

    def _run(self, report: Callable[[BaseException | None], None]) -> None:
        try:
            self.engine = engine = self._build()
        except BaseException as error:
            log.debug("the engine could not be built", exc_info=True)
            self._end("failed", error if isinstance(error, LLMError) else EngineError(f"cannot start: {error!r}"))
            report(error)
            return
        self.state = "ready"
        report(None)
        try:
            self._loop(engine)
        except BaseException as error:
            log.exception("the engine thread failed")
            failure = EngineError(f"the engine failed and has stopped: {error!r}")
            failure.__cause__ = error
            self._end("failed", failure)
        else:
            self._end("stopped", ProviderUnavailable("the engine was stopped"))
        finally:
            engine.close()

    def _loop(self, engine: Engine) -> None:
        num_failures = 0
        while True:
            while not engine.has_work or not self._commands.empty():
                command = self._commands.get()
                if isinstance(command, _Stop):
                    return
                self._obey(engine, command)
            try:
                outputs = engine.step()
                num_failures = 0
            except Exception as error:
                log.exception("a step failed: its requests end with an error, the cache is emptied")
                num_failures += 1
                outputs = engine.fail_all(f"the engine failed on this request: {error!r}", error)
                if num_failures >= MAX_CONSECUTIVE_FAILURES:
                    self._deliver(outputs)
                    raise
            self._deliver(outputs)

    def _obey(self, engine: Engine, command: _Submit | _Abort | _Work) -> None:
        if isinstance(command, _Work):
            self._work(engine, command)
        elif isinstance(command, _Abort):
            engine.abort(command.request_id)
        elif command.handle.id in self._handles:  # else it was given up before it was read
            engine.add(command.handle.id, command.request, command.handle.stats)

    def _work(self, engine: Engine, work: _Work) -> None:
        if work.result.cancelled():
            return
        try:
            outputs = engine.settle()
        except Exception as error:
            log.exception("a step failed: its requests end with an error, the cache is emptied")
            outputs = engine.fail_all(f"the engine failed on this request: {error!r}", error)
        self._deliver(outputs)
        try:
            value = work.do(engine)
        except Exception as error:
            work.tell(None, error)
        else:
            work.tell(value, None)

    def _deliver(self, outputs: list[Output]) -> None:
        """Wake each event loop once per step, with everything for it."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[RequestHandle, Output]]] = {}
        for output in outputs:
            handle = self._handles.get(output.request_id)
            if handle is None:
                continue
            by_loop.setdefault(handle.loop, []).append((handle, output))
            if output.end is not None or output.error is not None:
                self._note_end(handle)
        for loop, parts in by_loop.items():
            _call(loop, _deliver_all, parts)

    def _note_end(self, handle: RequestHandle) -> None:
        handle.num_unfinished -= 1
        if handle.num_unfinished == 0:
            self._handles.pop(handle.id, None)
            self._finish_times = [*self._finish_times[-63:], time.monotonic()]

    def _end(self, state: State, failure: LLMError) -> None:
        """Tell everyone who waits, and everyone who comes later, that no more will be answered."""
        with self._lock:
            self.state, self.failure = state, failure
            handles = list(self._handles.values())
            self._handles.clear()
            unread = list(iter(self._next_unread, None))
        for command in unread:
            if isinstance(command, _Work):
                command.tell(None, _again(failure))
        for handle in handles:
            _call(handle.loop, handle._fail, failure)

    def _next_unread(self) -> _Command | None:
        try:
            return self._commands.get_nowait()
        except queue.Empty:
            return None


def _again(error: LLMError) -> LLMError:
    """A new exception for each caller: one that is raised over and over grows a longer traceback each time."""
    copy = type(error)(error.message)
    copy.__cause__ = error.__cause__
    return copy


def _deliver_all(parts: list[tuple[RequestHandle, Output]]) -> None:
    for handle, output in parts:
        handle._deliver(output)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:  # that loop is closed: nobody is left there to be told
        log.debug("an event loop was closed before its outputs arrived")
