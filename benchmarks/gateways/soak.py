"""Whether a gateway is the same after many requests, a tenth of them failing or given up: memory, tasks, sockets."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gateways import commands, load, wire
from gateways.measure import Sizes, run
from gateways.processes import Command, Server, started

NUM_CONNECTIONS = 32
NUM_DESERTERS = 4
ODD_ONE_OF = 20


@dataclass(frozen=True, slots=True)
class State:
    memory_mb: float
    num_tasks: int
    num_sockets: int


@dataclass(frozen=True, slots=True)
class Soak:
    """What was asked, and what the server was before and after it."""

    num_whole: int
    num_failed: int
    num_given_up: int
    seconds: float
    before: State
    after: State

    @property
    def memory_growth(self) -> float:
        return self.after.memory_mb / self.before.memory_mb - 1

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def soak(upstream_port: int, sizes: Sizes, core: int | None) -> Soak:
    """Ask a fresh server of ours `sizes.soak` times: of twenty, one fails upstream and one is a stream given up.

    It is compared with what it was after `sizes.before_soak` requests: until then its memory grows to what it needs.
    """
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        probe = Path(folder) / "num_tasks"
        plain = commands.ours(upstream_port, probed=True)
        environment = {**plain.environment, "PROBE_FILE": str(probe)}
        command = Command(plain.name, plain.arguments, environment, plain.headers)
        with started(command, Path(folder), core) as server:
            _ask(server, sizes.before_soak)
            before = _settled(server, probe, sizes.settle_seconds, lambda state: True)
            began = time.perf_counter()
            num_given_up = _ask(server, sizes.soak)
            seconds = time.perf_counter() - began
            after = _settled(
                server,
                probe,
                sizes.settle_seconds,
                lambda state: state.num_tasks <= before.num_tasks and state.num_sockets <= before.num_sockets,
            )
    num_failed = (sizes.soak - num_given_up) // ODD_ONE_OF
    return Soak(sizes.soak - num_failed - num_given_up, num_failed, num_given_up, seconds, before, after)


def _ask(server: Server, num_requests: int) -> int:
    """Ask, all kinds at once; the number of streams that were given up."""
    host = f"127.0.0.1:{server.port}"
    each = -(-(num_requests // ODD_ONE_OF) // NUM_DESERTERS)
    whole = wire.requests(host, server.headers)
    failing = wire.failing_requests(host, server.headers)
    endless = wire.requests(host, server.headers, num_chunks=100_000, pace_ms=1)
    num_asked = num_requests - each * NUM_DESERTERS

    def one_of_them(number: int) -> bytes:
        # among the others, and not side by side: a provider that does nothing but fail is not asked any more
        return failing(number) if number % ODD_ONE_OF == 0 else whole(number)

    async def all_kinds() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(
                load.run(
                    server.port,
                    one_of_them,
                    load.check_whole_or_failed,
                    num_connections=NUM_CONNECTIONS,
                    num_requests=num_asked,
                )
            )
            for deserter in range(NUM_DESERTERS):
                numbers = range(deserter * each, (deserter + 1) * each)
                group.create_task(_desert(server.port, endless, numbers))

    run(all_kinds())
    return each * NUM_DESERTERS


async def _desert(port: int, make: Callable[[int], bytes], numbers: range) -> None:
    """Begin streams, and leave each one in its middle."""
    for number in numbers:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(make(number))
        async with asyncio.timeout(load.PATIENCE):
            said = await reader.readuntil(wire.QUOTED_WORD)
        if not said.startswith(b"HTTP/1.1 200"):
            raise load.WrongAnswer(said[:300].decode("latin-1"))
        writer.transport.abort()


def _settled(server: Server, probe: Path, seconds: float, is_settled: Callable[[State], bool]) -> State:
    """The state when the load has been gone for `seconds`; up to three times that, where it has not settled by then."""
    until = time.monotonic() + 3 * seconds
    time.sleep(seconds)
    while not is_settled(state := _state(server, probe)) and time.monotonic() < until:
        time.sleep(0.2)
    return state


def _state(server: Server, probe: Path) -> State:
    probe.unlink(missing_ok=True)
    os.kill(server.root.pid, signal.SIGUSR1)
    until = time.monotonic() + 10
    while not probe.exists():
        if server.has_ended or time.monotonic() > until:
            raise RuntimeError(f"the server does not tell its state:\n{server.last_words()}")
        time.sleep(0.01)
    sockets = _num_sockets(server.root.pid)
    return State(server.memory_mb(), int(probe.read_text()), sockets)


def _num_sockets(pid: int) -> int:
    return sum(str(link.readlink()).startswith("socket:") for link in Path(f"/proc/{pid}/fd").iterdir())
