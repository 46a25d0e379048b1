"""Put what gathers requests into shared calls in front of providers. Knows settings; the wrappers know when and how."""

from __future__ import annotations

import asyncio

from autobot_llm.cloud.batched_completions import BatchedCompletions
from autobot_llm.cloud.batched_embeddings import BatchedEmbedder
from autobot_llm.counts import summed
from autobot_llm.providers.base import Embedder, Link, Provider, Streamer, TakesPromptLists
from autobot_llm.settings import Settings


class BatchingLink(Link):
    """Puts `BatchedEmbedder` in front of every provider over HTTP that makes embeddings and, where settings want it,
    `BatchedCompletions` in front of those that take several prompts. Chats are left alone: no provider takes two of
    them in one call.
    """

    def __init__(self, settings: Settings) -> None:
        self._window_ms = settings.cloud_batch_window_ms
        self._max_size = settings.cloud_max_batch_size
        self._with_completions = settings.cloud_batch_completions
        self._embedders: dict[str, BatchedEmbedder] = {}
        self._completions: dict[str, BatchedCompletions] = {}

    def wrap(self, chain: Streamer, provider: Provider) -> Streamer:
        taker: object = provider
        if not self._with_completions or self._max_size == 1 or not isinstance(taker, TakesPromptLists):
            return chain
        batched = BatchedCompletions(chain, self._window_ms, self._max_size)
        self._completions[provider.name] = batched
        return batched

    def wrap_embedder(self, embedder: Embedder, provider: Provider) -> Embedder:
        if self._max_size == 1:
            return embedder
        self._embedders[provider.name] = batched = BatchedEmbedder(embedder, self._window_ms, self._max_size)
        return batched

    async def close(self) -> None:
        await asyncio.gather(*(one.close() for one in self._embedders.values()))
        await asyncio.gather(*(one.close() for one in self._completions.values()))
        self._embedders.clear()
        self._completions.clear()

    def metrics_of(self, provider: str) -> dict[str, float]:
        batched = (self._embedders.get(provider), self._completions.get(provider))
        return summed(*(one.metrics() for one in batched if one is not None))
