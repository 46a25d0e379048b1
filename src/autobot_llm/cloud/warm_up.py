"""Connect to the providers before the first request, where that is asked for. Knows who is set up only.

It runs beside the start and delays nothing: a request that comes meanwhile connects, or shares what is being made.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from autobot_llm.errors import LLMError
from autobot_llm.providers.base import ConnectsAhead, Provider
from autobot_llm.settings import Settings

logger = logging.getLogger("autobot_llm.cloud")

WARM_UP_SECONDS = 10.0  # that connecting to one provider may take


class Started(Protocol):
    """What starting a provider gives."""

    @property
    def provider(self) -> Provider: ...


class WarmUp:
    """Connects to the default provider, the declared clouds, and those of OpenAI and Anthropic that have a key."""

    def __init__(self, settings: Settings, known: Sequence[str]) -> None:
        keys = {"openai": settings.openai_api_key, "anthropic": settings.anthropic_api_key}
        self._is_wanted = settings.cloud_warm_up
        self._names = [name for name in known if name in settings.clouds or keys.get(name)]
        self._warming: asyncio.Task[None] | None = None

    def begin(self, default: str, start: Callable[[str], Awaitable[Started]]) -> None:
        """Start each provider with `start` and connect it, beside the caller. Called again, it does nothing."""
        if self._is_wanted and self._warming is None:
            names = dict.fromkeys((default, *self._names))
            self._warming = asyncio.create_task(self._warm_all(list(names), start))

    async def close(self) -> None:
        """Give up what is not connected yet."""
        warming, self._warming = self._warming, None
        if warming is not None:
            warming.cancel()
            await asyncio.wait([warming])

    async def _warm_all(self, names: Sequence[str], start: Callable[[str], Awaitable[Started]]) -> None:
        await asyncio.gather(*(self._warm(name, start) for name in names))

    async def _warm(self, name: str, start: Callable[[str], Awaitable[Started]]) -> None:
        try:
            provider = (await start(name)).provider
            if isinstance(provider, ConnectsAhead):
                await provider.warm(WARM_UP_SECONDS)
        except LLMError as exc:
            logger.warning("%s is not connected ahead of its first request: %s", name, exc)
