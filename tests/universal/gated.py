"""A provider whose answers wait to be let go on, for tests of what happens meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from autobot_llm.providers.scripted import ScriptedProvider
from autobot_llm.types import ChoiceEnd, Event, Finish, LLMRequest, Start, TextDelta, Usage


class GatedProvider(ScriptedProvider):
    """Plays `pieces`, each after one `release` more; an exception among them is raised."""

    def __init__(self, pieces: Sequence[str | Exception], *, name: str = "native", fallback_used: bool = False) -> None:
        super().__init__(name=name, models=("tiny",))
        self.pieces = pieces
        self.fallback_used = fallback_used
        self._permits = asyncio.Semaphore(0)
        self.num_calls = 0

    def release(self, num_pieces: int = 1) -> None:
        for _ in range(num_pieces):
            self._permits.release()

    async def stream(self, request: LLMRequest) -> AsyncGenerator[Event, None]:
        self.num_calls += 1
        self.requests.append(request)
        self.num_open_streams += 1
        try:
            yield Start(request_id=request.request_id or "none", model=request.model or "tiny", provider=self.name)
            for piece in self.pieces:
                await self._permits.acquire()
                if isinstance(piece, Exception):
                    raise piece
                yield TextDelta(piece)
            yield ChoiceEnd(finish_reason="stop")
            usage = Usage(prompt_tokens=1, completion_tokens=len(self.pieces))
            yield Finish(usage=usage, fallback_used=self.fallback_used)
        finally:
            self.num_open_streams -= 1
            self.num_closed_streams += 1


async def until(condition: Callable[[], bool]) -> None:
    """Wait for `condition`; fails after 5 seconds."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)
