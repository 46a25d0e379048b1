"""How a server of batches is stopped at any request, before or after it does what is asked. For tests of jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from raw_server import Asked, Wire


@dataclass
class Hold:
    """Stops at request number `at` (from 0) of those with `method` and `path` in their own.

    `mode` is "before" (nothing is done, and will not be once the client is gone), "after" (it is done, and not
    answered), "half" (half of the answer is sent) or "unrecorded" (`on_done` is called when it is done, and the answer
    sent). `is_reached` is set then.
    """

    at: int
    mode: str
    method: str = "POST"
    path: str = ""
    on_done: Callable[[], object] = lambda: None
    is_reached: asyncio.Event = field(default_factory=asyncio.Event)
    num_seen: int = 0

    def is_now(self, asked: Asked) -> bool:
        """Whether `asked` is the one; called once for each request."""
        if asked.method != self.method or self.path not in asked.path:
            return False
        self.num_seen += 1
        return self.num_seen == self.at + 1

    async def stop(self, mode: str, wire: Wire) -> None:
        """Stop here if this is where it is to stop. Raises ConnectionError when the client is gone."""
        if mode != self.mode:
            return
        if mode == "unrecorded":
            self.on_done()
        self.is_reached.set()
        if mode != "unrecorded":
            await wire.until_gone()
            raise ConnectionResetError("the client is gone")


def stopping(hold: Hold | None, asked: Asked) -> Hold:
    """`hold` where `asked` is its request, else one that stops nowhere."""
    return hold if hold is not None and hold.is_now(asked) else Hold(0, "nowhere")
