"""A real redis-server of a test's own, on a socket of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

SERVER = shutil.which("redis-server")
needs_redis = pytest.mark.skipif(
    SERVER is None and "CI" not in os.environ, reason="redis-server is not installed: apt-get install redis-server"
)


class RealRedis:
    """`url` leads to it. It can be stopped, gone on with, killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "redis.sock"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"unix://{self._socket}"

    async def start(self) -> None:
        assert SERVER is not None, "CI runs these tests, and has no redis-server"
        options = ["--port", "0", "--unixsocket", str(self._socket), "--save", "", "--dir", str(self._folder)]
        self._process = subprocess.Popen([SERVER, *options], stdout=subprocess.DEVNULL)  # noqa: ASYNC220
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_unix_connection(str(self._socket))
                    writer.close()
                    await writer.wait_closed()
                    return
                await asyncio.sleep(0.01)

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._socket.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def real_redis() -> AsyncIterator[RealRedis]:
    with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
        redis = RealRedis(Path(folder))
        await redis.start()
        try:
            yield redis
        finally:
            redis.kill()
