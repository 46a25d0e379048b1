"""Start servers, each on its core, ask what they use, and end them. Knows processes; knows nothing of their work."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from gateways import wire

START_TIMEOUT = 120.0
STOP_TIMEOUT = 5.0
BENCHMARKS = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Cores:
    """Where the gateway runs, and where its upstream and its clients do. None where nothing can be pinned."""

    gateway: int | None = None
    others: int | None = None

    @property
    def shown(self) -> str:
        if self.gateway is None:
            return "not pinned: this machine has one core, or its system cannot"
        return f"gateway on core {self.gateway}, upstream and load generator on core {self.others}"


def cores() -> Cores:
    if not hasattr(os, "sched_getaffinity") or len(usable := sorted(os.sched_getaffinity(0))) < 2:
        return Cores()
    return Cores(gateway=usable[-1], others=usable[0])


@contextlib.contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """This process, and those it starts within, on one core. They stay there; this one goes back."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass(frozen=True, slots=True)
class Command:
    """How a gateway is started. `{port}` in its arguments and environment stands for where it is to listen."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    headers: Mapping[str, str]


class Server:
    """A running server. `start_seconds` is from the start of its process to its first answer."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.name = name
        self.port = port
        self.log = log
        self.headers: Mapping[str, str] = {}
        self.start_seconds = 0.0
        self._process = process
        self.root = psutil.Process(process.pid)

    def cpu_seconds(self) -> float:
        """Of the whole tree of processes, in user and kernel mode."""
        times = [process.cpu_times() for process in self._tree()]
        return float(sum(each.user + each.system for each in times))

    def memory_mb(self) -> float:
        """Resident memory of the whole tree."""
        return float(sum(process.memory_info().rss for process in self._tree())) / 1e6

    def has_loaded(self, library: str) -> bool:
        """Whether a file with this in its name is mapped into the process."""
        return any(library in mapping.path for mapping in self.root.memory_maps())

    def _tree(self) -> list[psutil.Process]:
        return [self.root, *self.root.children(recursive=True)]

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def stop(self) -> None:
        """End it, politely first, and whatever it has started."""
        tree = self._tree() if not self.has_ended else []
        for sign in (signal.SIGTERM, signal.SIGKILL):
            for process in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(sign)
            _, tree = psutil.wait_procs(tree, timeout=STOP_TIMEOUT)
            if not tree:
                break
        self._process.wait()


def clean_environment() -> dict[str, str]:
    """This process's environment without what sets up a gateway, and with compiled bytecode kept, as is the default."""
    own = ("AUTOBOT_", "OPENAI_", "ANTHROPIC_", "LITELLM_", "PYTHON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return {name: value for name, value in kept.items() if not name.lower().endswith("_proxy")}


@contextlib.contextmanager
def upstream(folder: Path, core: int | None) -> Iterator[Server]:
    log = folder / "upstream.log"
    with pinned(core), log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateways.upstream"],
            env=clean_environment() | {"PYTHONPATH": str(BENCHMARKS)},
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
    assert process.stdout is not None
    with process.stdout:
        line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the upstream did not start: {log.read_text()}")
    server = Server("direct", process, int(line), log)
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def started(command: Command, folder: Path, core: int | None) -> Iterator[Server]:
    """The gateway, once it has answered a request through its upstream. It ends with the block."""
    port = free_port()
    log = folder / f"{command.name}-{port}.log"
    arguments = [argument.replace("{port}", str(port)) for argument in command.arguments]
    own = {name: value.replace("{port}", str(port)) for name, value in command.environment.items()}
    with log.open("wb") as output:
        began = time.perf_counter()
        with pinned(core):
            process = subprocess.Popen(
                arguments,
                env=clean_environment() | own,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    server = Server(command.name, process, port, log)
    server.headers = command.headers
    try:
        _await_answer(server, began)
        server.start_seconds = time.perf_counter() - began
        yield server
    finally:
        server.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _await_answer(server: Server, began: float) -> None:
    while not _answers(server):
        if server.has_ended:
            raise RuntimeError(f"{server.name} ended before it answered:\n{server.last_words()}")
        if time.perf_counter() - began > START_TIMEOUT:
            raise RuntimeError(f"{server.name} did not answer within {START_TIMEOUT:g} s:\n{server.last_words()}")
        time.sleep(0.005)


def _answers(server: Server) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    body = json.dumps({"model": wire.MODEL, "messages": wire.prompt(0)})
    try:
        connection.request("POST", wire.PATH, body, {"content-type": "application/json", **server.headers})
        answer = connection.getresponse()
        return answer.status == 200 and wire.ANSWER_TEXT.encode() in answer.read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
