"""Run a server as a child process: wait until it is ready, start it again when it dies, stop all of it in the end.

Knows processes, signals and time; knows nothing of what the server does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, STDOUT, Process
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Literal

from autobot_llm.errors import ProviderUnavailable
from autobot_llm.providers.vllm.log_file import BoundedLog

logger = logging.getLogger("autobot_llm.vllm")

GUARD = Path(__file__).with_name("guard.py")
NUM_SHOWN_LINES = 12
LAST_WORDS = 1.0  # seconds for what a dead process had printed to arrive
State = Literal["stopped", "starting", "ready", "restarting", "failed"]


@dataclass(frozen=True, slots=True)
class Patience:
    """Times in seconds: for a start, between two looks whether it is ready, and for a stop before it is forced.

    After a death the next start waits `first_delay`, and twice as long each time up to `longest_delay`, until one has
    lived for `steady`.
    """

    start: float = 1800.0
    look: float = 0.5
    stop: float = 20.0
    first_delay: float = 1.0
    longest_delay: float = 60.0
    steady: float = 60.0


PATIENCE = Patience()


class ManagedServer:
    """A server that runs as a child until `close`, in a process group of its own.

    `is_ready` asks the server whether it can work. What it prints goes into `log`. `on_line` hears its latest line
    while it starts.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        is_ready: Callable[[], Awaitable[bool]],
        log: BoundedLog,
        patience: Patience = PATIENCE,
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        self.log = log
        self.state: State = "stopped"
        self.num_restarts = 0
        self._command = tuple(command)
        self._environment = dict(environment)
        self._is_ready = is_ready
        self._patience = patience
        self._on_line = on_line
        self._child: _Child | None = None
        self._supervision: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The server's process, while there is one."""
        return self._child.process.pid if self._child is not None else None

    async def start(self) -> None:
        """Start the server and wait until it is ready; from then on it is started again whenever it dies.

        Raises ProviderUnavailable, with the last lines that it printed, when it ends or the time is over before.
        """
        self.state = "starting"
        child = await self._spawn()
        try:
            await self._until_ready(child.process)
        except BaseException:
            self.state = "failed"
            await self._end()
            raise
        self.state = "ready"
        self._supervision = asyncio.create_task(self._supervise(child))

    async def close(self) -> None:
        """Stop the server and everything that it started. May be called again."""
        supervision, self._supervision = self._supervision, None
        if supervision is not None:
            supervision.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await supervision
        await self._end()
        if self.state != "failed":
            self.state = "stopped"
        self.log.close()

    async def _supervise(self, child: _Child) -> None:
        """Start the server again after each of its deaths, until this task is cancelled."""
        delay = self._patience.first_delay
        while True:
            began = time.monotonic()
            status = await child.process.wait()
            self.state = "restarting"
            await self._end()  # what it had started may still run
            if time.monotonic() - began > self._patience.steady:
                delay = self._patience.first_delay
            logger.warning("%s ended (%s); starting it again in %g s", self._name, _ending(status), delay)
            await asyncio.sleep(delay)
            delay = min(2 * delay, self._patience.longest_delay)
            child = await self._spawn()
            self.num_restarts += 1
            try:
                await self._until_ready(child.process)
            except ProviderUnavailable as exc:
                logger.warning("%s", exc)
                await self._end()
            else:
                self.state = "ready"
                logger.info("%s is ready again", self._name)

    @property
    def _name(self) -> str:
        return Path(self._command[0]).name

    async def _spawn(self) -> _Child:
        """Start the program. Its output has a pipe of ours: asyncio's own would put off the news of the program's death
        for as long as anything that it started holds the pipe open."""
        reading_end, writing_end = os.pipe()
        output = os.fdopen(reading_end, "rb", buffering=0)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", str(GUARD), str(os.getpid()), *self._command,
                env=self._environment, stdin=DEVNULL, stdout=writing_end, stderr=STDOUT, start_new_session=True,
            )  # fmt: skip
        except BaseException:
            output.close()
            raise
        finally:
            os.close(writing_end)
        self._child = _Child(process, asyncio.create_task(self._keep_output(output)))
        return self._child

    async def _keep_output(self, pipe: FileIO) -> None:
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, pipe)
        try:
            while data := await reader.read(65536):
                self.log.write(data)
                if self._on_line is not None and self.state == "starting":
                    self._on_line(self.log.last_line)
        finally:
            transport.close()

    async def _until_ready(self, process: Process) -> None:
        try:
            async with asyncio.timeout(self._patience.start):
                while not await self._is_ready():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._patience.look):
                            status = await process.wait()
                            raise ProviderUnavailable(self._failure(f"ended ({_ending(status)}) before it was ready"))
        except TimeoutError as exc:
            raise ProviderUnavailable(self._failure(f"was not ready within {self._patience.start:g} s")) from exc

    def _failure(self, what: str) -> str:
        lines = "\n".join(f"  {line}" for line in self.log.tail(NUM_SHOWN_LINES))
        said = f"; its last lines ({self.log.path} has more):\n{lines}" if lines else " and printed nothing"
        return f"{self._name} {what}{said}"

    async def _end(self) -> None:
        """End the child and all that it started. Shielded: a second cancellation must not leave processes behind."""
        child, self._child = self._child, None
        if child is not None:
            await asyncio.shield(asyncio.ensure_future(self._end_group(child)))

    async def _end_group(self, child: _Child) -> None:
        """End the processes, politely first, then by force."""
        process = child.process
        if process.returncode is None:
            _signal_group(process.pid, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._patience.stop):
                    await process.wait()
        _signal_group(process.pid, signal.SIGKILL)
        await process.wait()
        # A process that left the group may hold the pipe open for ever.
        await asyncio.wait((child.output,), timeout=LAST_WORDS)
        child.output.cancel()
        await asyncio.wait((child.output,))


@dataclass(frozen=True, slots=True)
class _Child:
    """One life of the server, and the task that keeps what it prints."""

    process: Process
    output: asyncio.Task[None]


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _ending(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
