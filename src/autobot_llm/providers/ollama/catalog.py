"""What an Ollama server has: its version, its models, those in memory. Knows how long each is worth believing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from autobot_llm.dialects.ollama.models import Running, Shown, Tag, version_numbers
from autobot_llm.errors import LLMError
from autobot_llm.providers.ollama.client import OllamaClient
from autobot_llm.providers.ollama.variants import full_name
from autobot_llm.types import ModelInfo

PROCESSES_FRESH = 2.0  # seconds; others may have a model loaded or unloaded meanwhile
MODELS_FRESH = 60.0
MOST_ASKED_AT_ONCE = 8

ValueT = TypeVar("ValueT")


class _Remembered(Generic[ValueT]):
    """A value that is asked for again when it is older than `seconds`; together askers ask once."""

    def __init__(self, seconds: float, ask: Callable[[], Awaitable[ValueT]]) -> None:
        self._seconds = seconds
        self._ask = ask
        self._value: ValueT | None = None
        self._asked_at: float | None = None
        self._lock = asyncio.Lock()

    async def get(self) -> ValueT:
        if not self.is_fresh:
            async with self._lock:
                if not self.is_fresh:
                    asked_at = time.monotonic()
                    self._value = await self._ask()
                    self._asked_at = asked_at
        return self._value  # type: ignore[return-value]  # it was just asked for

    def forget(self) -> None:
        self._asked_at = None

    @property
    def is_fresh(self) -> bool:
        return self._asked_at is not None and time.monotonic() - self._asked_at < self._seconds


class Version(NamedTuple):
    """A server's version as it writes it, and its numbers; None for a build that has none."""

    text: str
    numbers: tuple[int, ...] | None


class Catalog:
    """What one server has. Methods raise the client's errors."""

    def __init__(self, client: OllamaClient) -> None:
        self._client = client
        self._version = _Remembered(MODELS_FRESH, client.version)
        self._tags = _Remembered(MODELS_FRESH, client.tags)
        self._processes = _Remembered(PROCESSES_FRESH, client.processes)
        self._shown: dict[str, _Remembered[Shown]] = {}

    async def version(self) -> Version:
        text = await self._version.get()
        return Version(text, version_numbers(text))

    async def tags(self) -> list[Tag]:
        return await self._tags.get()

    async def shown(self, model: str) -> Shown:
        """What the server tells of a model. Raises ModelNotFoundError where it has none of that name."""
        name = full_name(model)
        remembered = self._shown.get(name) or _Remembered(MODELS_FRESH, lambda: self._client.show(model))
        shown = await remembered.get()
        self._shown[name] = remembered  # only now: names that do not exist are not kept
        return shown

    async def about(self, model: str) -> tuple[Shown, Running | None]:
        """What the server tells of a model, and the model as it is in memory now; None where it is not."""
        if self._processes.is_fresh:
            shown = await self.shown(model)
        else:
            shown, _ = await asyncio.gather(self.shown(model), self._processes.get())
        name = full_name(model).lower()
        running = (one for one in await self._processes.get() if full_name(one.name).lower() == name)
        return shown, next(running, None)

    def forget_processes(self) -> None:
        """Ask again: something was loaded or unloaded."""
        self._processes.forget()

    def forget_models(self) -> None:
        """Ask again: a model came or went, or the server is another one."""
        self._version.forget()
        self._tags.forget()
        self._shown.clear()

    async def models(self, provider: str) -> list[ModelInfo]:
        """Every model that the server has on disk, with what it tells of each."""
        self._tags.forget()
        tags, processes = await asyncio.gather(self.tags(), self._processes.get())
        running = {full_name(one.name).lower(): one for one in processes}
        at_once = asyncio.Semaphore(MOST_ASKED_AT_ONCE)

        async def described(tag: Tag) -> ModelInfo:
            shown = None
            async with at_once:
                with suppress(LLMError):  # one that cannot be described is listed all the same
                    shown = await self.shown(tag.name)
            return _info(provider, tag, shown, running.get(full_name(tag.name).lower()))

        return list(await asyncio.gather(*map(described, tags)))


def _info(provider: str, tag: Tag, shown: Shown | None, running: Running | None) -> ModelInfo:
    details: dict[str, Any] = {"size": tag.size, "digest": tag.digest, "modified_at": tag.modified_at}
    details |= msgspec.to_builtins(tag.details)
    if shown is not None:
        told = ("model_info", "capabilities", "parameters", "template", "license", "modelfile")
        details |= {name: value for name in told if (value := getattr(shown, name))}
    if running is not None:
        details |= {"size_vram": running.size_vram, "expires_at": running.expires_at}
        details |= {"loaded_context_length": running.context_length} if running.context_length else {}
    return ModelInfo(
        id=tag.name,
        provider=provider,
        context_length=shown.context_length if shown is not None else None,
        created=_timestamp(tag.modified_at),
        is_loaded=running is not None,
        details=details,
    )


def _timestamp(text: str) -> int:
    with suppress(ValueError):
        return int(datetime.fromisoformat(text).timestamp())
    return 0
