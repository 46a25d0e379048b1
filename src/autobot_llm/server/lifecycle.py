"""Run the server from its first socket to its last answer. Knows sockets and signals; knows nothing of requests.

The first SIGINT or SIGTERM drains: new requests are refused with 503, /health says "draining", running answers go on
for up to `shutdown_grace` seconds and are then ended with an error. A second signal ends them at once, and a third one
has its ordinary effect.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn

from autobot_llm.errors import ConfigurationError
from autobot_llm.interface import LLMInterface
from autobot_llm.observability.metrics import Metrics
from autobot_llm.server.answers import Answers
from autobot_llm.server.app import App, create_app
from autobot_llm.server.protocol import BoundedHttpProtocol
from autobot_llm.settings import Settings

logger = logging.getLogger("autobot_llm.server")

# Longer than clients and proxies keep idle connections, so that it is they who close: a server that closes first may
# do so just as the next request is on its way.
KEEP_ALIVE = 75  # seconds
LAST_WORDS = 5  # seconds that ended answers have to tell their clients
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


async def serve(
    settings: Settings, *, on_ready: Callable[[str], None] | None = None, llm: LLMInterface | None = None
) -> None:
    """Serve until a signal, then drain and return. Cancelling ends the running answers at once.

    `on_ready` gets the address once requests are accepted. `llm`, if given, is served in place of one made from
    `settings`, and closed at the end as well. Errors: `ConfigurationError` where the address cannot be used, or the
    provider or its model cannot.
    """
    with _bind(settings.host, settings.port) as listener:
        async with LLMInterface(settings) if llm is None else llm as llm:
            app = create_app(llm, settings, Metrics())
            await _serve_app(app, listener, settings.shutdown_grace, on_ready)


def _bind(host: str, port: int) -> socket.socket:
    """Take the address before the model is loaded, and without listening: who connects early is refused, not kept."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
    except OSError as exc:
        raise ConfigurationError(f"AUTOBOT_HOST={host!r}: this address cannot be used: {exc}") from exc
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as exc:
        listener.close()
        if exc.errno == errno.EADDRINUSE:
            reason = "another program uses it; stop that one or choose another port"
        else:
            reason = exc.strerror or str(exc)
        raise ConfigurationError(f"AUTOBOT_PORT={port} on {host}: {reason}") from exc
    listener.setblocking(False)
    return listener


async def _serve_app(app: App, listener: socket.socket, grace: float, on_ready: Callable[[str], None] | None) -> None:
    config = uvicorn.Config(
        app,
        http=BoundedHttpProtocol,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=LAST_WORDS,
    )
    server = _Server(config, lambda: on_ready(_url(listener)) if on_ready is not None else None)
    stop = _StopSwitch()
    with stop.on_signals():
        draining = asyncio.create_task(_drain(app.answers, server, stop, grace))
        try:
            await server.serve(sockets=[listener])
        except asyncio.CancelledError:
            app.answers.begin_drain()
            app.answers.abort()
            await server.shutdown([listener])
            raise
        finally:
            draining.cancel()


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn's server, which tells when it listens, and leaves the signals to us: uvicorn would cut idle connections
    off at once, so that nobody could see /health say "draining".
    """

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _StopSwitch:
    """Counts the requests to stop: one drains, the second forces."""

    def __init__(self) -> None:
        self.drain = asyncio.Event()
        self.force = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Listen to signals inside, where Python allows it: in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self._on_signal) for sig in STOP_SIGNALS}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.drain.is_set():
            for sig in STOP_SIGNALS:
                signal.signal(sig, signal.SIG_DFL)
            self._loop.call_soon_threadsafe(self.force.set)
        else:
            self._loop.call_soon_threadsafe(self.drain.set)


async def _drain(answers: Answers, server: uvicorn.Server, stop: _StopSwitch, grace: float) -> None:
    await stop.drain.wait()
    answers.begin_drain()
    if answers.num_running:
        logger.warning(
            "draining: %d answers are running and have %g seconds; a second signal ends them",
            answers.num_running,
            grace,
        )
    forced = asyncio.create_task(stop.force.wait())
    idle = asyncio.create_task(answers.wait_idle())
    try:
        await asyncio.wait((forced, idle), timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        if answers.num_running:
            logger.warning("ending %d answers that are still running", answers.num_running)
            answers.abort()
        server.should_exit = True
        await stop.force.wait()
        answers.abort()
        server.force_exit = True
    finally:
        forced.cancel()
        idle.cancel()
