"""Ask a Redis that may be dead, hung or slow, without anybody waiting for it. Knows scripts and clocks; knows nothing
of what they compute.

A call that takes longer than PATIENCE is answered with None and goes on by itself; while it does, and after repeated
failures, nothing is asked. A trial in the background finds out when the Redis is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from autobot_llm.errors import ConfigurationError
from autobot_llm.universal.breaker import StoreBreaker

if TYPE_CHECKING:
    from redis.commands.core import AsyncScript

T = TypeVar("T")

logger = logging.getLogger("autobot_llm.cloud")

PATIENCE = 0.005  # seconds that a request waits for an answer
START_PATIENCE = 0.25  # and the start for the connection
COMMAND_SECONDS = 1.0  # after which a silent server's connection is closed
CANCEL_AGAIN = 0.5
MAX_CONNECTIONS = 16
_GRACE_TURNS = 8  # of the event loop, for an answer that came while this process was busy


class GuardedRedis:
    """The Redis at `url` for one Lua `script`. `without` completes the warning "... cannot be used (why); ", and
    `patience` (seconds) is how long a request waits for an answer.

    Belongs to one event loop between `start` and `close`. Raises ConfigurationError where its client is not installed.
    """

    def __init__(self, url: str, script: str, *, without: str, patience: float = PATIENCE) -> None:
        try:
            from redis.asyncio import BlockingConnectionPool, Redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
        except ModuleNotFoundError as exc:
            raise ConfigurationError(
                'AUTOBOT_REDIS_URL needs redis, which is not installed: pip install "autobot_llm[redis]"'
            ) from exc
        parts = urlsplit(url)
        self.name = f"the Redis at {parts.hostname or parts.path}" + (f":{parts.port}" if parts.port else "")
        self._without = without
        self._patience = patience
        self._redis = Redis.from_pool(
            BlockingConnectionPool.from_url(
                url,
                max_connections=MAX_CONNECTIONS,
                timeout=COMMAND_SECONDS,
                socket_timeout=COMMAND_SECONDS,
                socket_connect_timeout=COMMAND_SECONDS,
                retry=Retry(NoBackoff(), 0),
            )
        )
        self._script: AsyncScript = self._redis.register_script(script)
        self._breaker = StoreBreaker(is_open=True)  # until it has been reached
        self._late: set[asyncio.Task[Any]] = set()
        self._trial: asyncio.Task[None] | None = None
        self._is_given_up = asyncio.Event()
        self._has_warned = False
        self.num_failures = 0

    @property
    def is_usable(self) -> bool:
        """Whether `run` would ask now."""
        return not self._breaker.is_open and not self._late

    async def start(self) -> None:
        """Reach it; one that cannot be reached now is tried again in the background."""
        if self._trial is not None:
            return
        reached = asyncio.Event()
        self._trial = asyncio.create_task(self._try_again(reached))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_PATIENCE):
                await reached.wait()

    async def close(self) -> None:
        """Give up what is under way. May be called again."""
        working: set[asyncio.Task[Any]] = set(self._late)
        if self._trial is not None:
            working.add(self._trial)
        self._trial = None
        self._breaker = StoreBreaker(is_open=True)
        while working:  # a client library may lose a cancellation
            for task in working:
                task.cancel()
            _, working = await asyncio.wait(working, timeout=CANCEL_AGAIN)
        with contextlib.suppress(Exception):
            async with asyncio.timeout(COMMAND_SECONDS):
                await self._redis.aclose()

    async def run(self, keys: Sequence[str], args: Sequence[str | float], read: Callable[[Any], T]) -> T | None:
        """What the script returns, as `read` (which may raise ValueError) understands it.

        None where it cannot be asked, fails or does not answer in time. What was asked and not answered may have been
        done, or be done yet.
        """
        if not self.is_usable:
            return None
        call = asyncio.create_task(self._call(keys, args))
        try:
            await asyncio.wait((call,), timeout=self._patience)
            for _ in range(_GRACE_TURNS):
                if call.done():
                    break
                await asyncio.sleep(0)
        finally:
            if not call.done():
                self._late.add(call)
                call.add_done_callback(self._came_late)
        if not call.done():
            return None
        try:
            answer = read(call.result())
        except Exception as exc:
            self._failed(exc, gravely=isinstance(exc, TimeoutError))
            return None
        self._succeeded()
        return answer

    async def _call(self, keys: Sequence[str], args: Sequence[str | float]) -> Any:
        async with asyncio.timeout(2 * COMMAND_SECONDS):
            return await self._script(keys=list(keys), args=list(args))

    def _came_late(self, call: asyncio.Task[Any]) -> None:
        self._late.discard(call)
        if call.cancelled():
            return
        exc = call.exception()
        self._failed(
            exc or TimeoutError(f"an answer took longer than {self._patience * 1000:g} ms"),
            gravely=isinstance(exc, TimeoutError | OSError) or "timeout" in type(exc).__name__.lower(),
        )

    async def _try_again(self, reached: asyncio.Event) -> None:
        """As long as this lives: whenever nothing is asked, find out whether it answers soon enough."""
        while True:
            if self._breaker.is_open:
                self._is_given_up.clear()
                try:
                    async with asyncio.timeout(COMMAND_SECONDS):
                        await self._redis.script_load(self._script.script)
                    began = time.perf_counter()
                    async with asyncio.timeout(COMMAND_SECONDS):
                        await self._redis.ping()
                    if (took := time.perf_counter() - began) > (self._patience if reached.is_set() else START_PATIENCE):
                        raise TimeoutError(f"it took {took * 1000:.1f} ms to say that it is there")
                except Exception as exc:
                    self._failed(exc)
                else:
                    self._breaker.admit() if self._has_warned else self._breaker.succeeded()
            reached.set()
            if not self._breaker.is_open:
                await self._is_given_up.wait()
            await asyncio.sleep(self._breaker.pause)

    def _failed(self, exc: BaseException, *, gravely: bool = False) -> None:
        self.num_failures += 1
        self._breaker.failed(gravely=gravely)
        if self._breaker.is_open:
            self._is_given_up.set()
        if self._breaker.is_open and not self._has_warned:
            self._has_warned = True
            why = str(exc) or type(exc).__name__
            logger.warning("%s cannot be used (%s); %s until it is back", self.name, why, self._without)

    def _succeeded(self) -> None:
        self._breaker.succeeded()
        if self._has_warned:
            self._has_warned = False
            logger.info("%s is back", self.name)
