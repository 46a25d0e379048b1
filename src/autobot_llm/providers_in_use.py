"""Start each provider once, when somebody first needs it, behind the links that all of them share; close them together.

Knows the life of providers and links; knows no request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from autobot_llm.errors import ProviderUnavailable
from autobot_llm.providers.base import Embedder, Link, Provider, Streamer
from autobot_llm.routing import build_chain, build_embedder
from autobot_llm.universal.kept_answer import AnswersAtOnce


@dataclass(frozen=True, slots=True)
class InUse:
    """A started provider, the chain in front of it, and that for embeddings, where it makes them."""

    provider: Provider
    chain: Streamer
    at_once: AnswersAtOnce | None
    embedder: Embedder | None


class ProvidersInUse:
    """By name. `make` gives a provider that is not started; `links` are started with the first one. While `is_closed`
    is set, which is the caller's to set and to take back, none is started."""

    def __init__(self, make: Callable[[str], Provider], links: Mapping[str, Link]) -> None:
        self._make = make
        self._links = links
        self._by_name: dict[str, InUse] = {}
        self._starting = asyncio.Lock()
        self._links_started = False
        self.is_closed = False

    def __iter__(self) -> Iterator[tuple[str, InUse]]:
        return iter(self._by_name.items())

    def get(self, name: str) -> InUse | None:
        """The provider, if it is started."""
        return self._by_name.get(name)

    async def started(self, name: str) -> InUse:
        """The provider, started now if it was not. Raises what its making and its start do, and ProviderUnavailable."""
        if (one := self._by_name.get(name)) is not None:
            return one
        async with self._starting:
            if self.is_closed:
                raise ProviderUnavailable("the interface is closed")
            if not self._links_started:
                await asyncio.gather(*(link.start() for link in self._links.values()))
                self._links_started = True
            if name not in self._by_name:
                provider = self._make(name)
                try:
                    await provider.start()
                except BaseException:
                    await provider.close()
                    raise
                chain = build_chain(provider, self._links)
                at_once = chain if isinstance(chain, AnswersAtOnce) else None
                self._by_name[name] = InUse(provider, chain, at_once, build_embedder(provider, self._links))
            return self._by_name[name]

    async def close(self) -> None:
        """Close every provider, then the links; the first failure is raised when all of it is done."""
        async with self._starting:
            in_use, self._by_name = list(self._by_name.values()), {}
            failures = await asyncio.gather(*(one.provider.close() for one in in_use), return_exceptions=True)
            self._links_started = False
            failures += await asyncio.gather(*(link.close() for link in self._links.values()), return_exceptions=True)
        for failure in failures:
            if isinstance(failure, BaseException):
                raise failure
