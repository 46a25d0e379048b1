"""A server of batches that can be stopped at any request, before it does what is asked or after. For tests of several
folders.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

from raw_server import Asked, Wire


@dataclass
class Hold:
    """Stops at request number `at` (from 0) of those with `method` and `path` in their own: "before" anything is done,
    "after" it is done and before the answer, or "half" way through the answer.

    `is_reached` is set then. The request goes on when `go_on` is set, unless the client is gone: what was stopped
    "before" is then never done.
    """

    at: int
    mode: str
    is_reached: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    num_seen: int = 0
    method: str = "POST"
    path: str = ""

    def is_now(self, asked: Asked) -> bool:
        """Whether `asked` is the one; called once for each request."""
        if asked.method != self.method or self.path not in asked.path:
            return False
        self.num_seen += 1
        return self.num_seen == self.at + 1

    async def wait(self, wire: Wire) -> bool:
        """Whether the client is still there when the wait is over."""
        self.is_reached.set()
        gone = asyncio.ensure_future(wire.until_gone())
        going = asyncio.ensure_future(self.go_on.wait())
        await asyncio.wait((gone, going), return_when=asyncio.FIRST_COMPLETED)
        is_there = not gone.done()
        for one in (gone, going):
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await one
        return is_there
