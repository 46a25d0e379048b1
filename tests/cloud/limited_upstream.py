"""A provider that keeps to its limits and tells them, and a worker that asks it from a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai_upstream import whole
from raw_server import Asked, Wire

BUSY = json.dumps({"error": {"message": "slow down", "code": "rate_limit_exceeded"}}).encode()


@dataclass
class LimitedProvider:
    """Takes `limit` calls at once and `per_second` more; refuses others with 429. Tells both with each answer.

    A call that comes `leeway` calls too early is let through, as the ways to a provider are not equally long.
    """

    limit: int
    per_second: float
    leeway: float = 0.0
    tells: bool = True
    num_answered: int = 0
    num_refused: int = 0
    times: list[float] = field(default_factory=list)
    _level: float = 0.0
    _at: float | None = None

    async def play(self, wire: Wire, asked: Asked) -> None:
        now = time.monotonic()
        came_back = self.limit if self._at is None else (now - self._at) * self.per_second
        self._level, self._at = min(self.limit, self._level + came_back), now
        if self._level + self.leeway < 1:
            self.num_refused += 1
            await wire.reply(BUSY, status=429, content_type="application/json", retry_after_ms="50")
            return
        self._level -= 1
        self.num_answered += 1
        self.times.append(now)
        remaining = max(0, int(self._level))
        told = {
            "x_ratelimit_limit_requests": str(self.limit),
            "x_ratelimit_remaining_requests": str(remaining),
            "x_ratelimit_reset_requests": f"{(self.limit - remaining) / self.per_second:.3f}s",
        }
        headers = told if self.tells else {}
        await wire.reply(json.dumps(whole({"content": "yes"})).encode(), content_type="application/json", **headers)


class Worker:
    """A process that makes `num_requests` requests, `at_once` at a time, and says what became of them."""

    def __init__(self, **options: Any) -> None:
        folder = Path(__file__).parent
        path = os.pathsep.join(str(one) for one in (folder.parent, folder.parent / "transport", folder))
        self._process = subprocess.Popen(
            [sys.executable, str(folder / "limited_worker.py"), json.dumps(options)],
            stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip

    async def result(self) -> dict[str, Any]:
        """Its last line; fails where it failed."""
        output, _ = await asyncio.to_thread(self._process.communicate, timeout=60)
        assert self._process.returncode == 0
        last: dict[str, Any] = json.loads(output.splitlines()[-1])
        return last

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()
