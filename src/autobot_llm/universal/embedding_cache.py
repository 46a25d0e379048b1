"""Give a vector again that was made before, and have only the others made. Knows embedding requests; knows no provider.

Each input of a request is looked up by itself: in memory, then in the store that processes share, then among the calls
under way. What is left goes to the provider in one call, each text once, and comes back in the request's order. Vectors
are kept bit by bit (vector_entries.py). Those of two models never come in one answer.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from autobot_llm.errors import NotCached, ProviderUnavailable
from autobot_llm.providers.base import Embedder, Link, Provider, Streamer
from autobot_llm.report import OptimizationOutcome
from autobot_llm.settings import Settings
from autobot_llm.types import CacheControl, EmbeddingRequest, EmbeddingResponse, Usage
from autobot_llm.universal.request_key import EmbeddingKeys
from autobot_llm.universal.second_level import SecondLevel
from autobot_llm.universal.stores.base import SharedStore
from autobot_llm.universal.stores.choice import open_store
from autobot_llm.universal.stores.memory import MemoryStore
from autobot_llm.universal.vector_entries import VectorEntry, seal_vector, unseal_vector, vector_entry

NAME = "embedding_caching"
MAX_L1_BYTES = 64 * 2**20
MAX_PENDING = 4096  # vectors that wait to be written: two of the largest requests that OpenAI takes

_DEFAULT = CacheControl()
_BYPASSED = OptimizationOutcome(name=NAME, applied=False, reason="the request bypasses it")
Found = dict[bytes, VectorEntry]
Made = dict[bytes, tuple[VectorEntry, bool]]  # and whether this request had it made, not another one


def embedding_cache(settings: Settings) -> EmbeddingCache | None:
    """The cache that the settings ask for."""
    return EmbeddingCache(settings, open_store(settings, "vectors")) if settings.cache_enabled else None


class EmbeddingCache(Link):
    """The vectors of all providers of an interface, in two levels. The shared store is opened by the first request."""

    def __init__(self, settings: Settings, store: SharedStore, *, max_l1_bytes: int = MAX_L1_BYTES) -> None:
        self._settings = settings
        self._store_name = store.name
        self.l1: MemoryStore[VectorEntry] = MemoryStore(settings.embedding_cache_size, max_l1_bytes)
        self.l2 = SecondLevel(store, seal_vector, unseal_vector, what="vectors", max_pending=MAX_PENDING)
        self._counts: dict[str, Counter[str]] = {}
        self.num_tokens_reused = 0

    async def close(self) -> None:
        await self.l2.close()

    def wrap(self, chain: Streamer, provider: Provider) -> Streamer:
        return chain

    def wrap_embedder(self, embedder: Embedder, provider: Provider) -> Embedder:
        counts = self._counts.setdefault(provider.name, Counter())
        return CachedEmbedder(self, embedder, EmbeddingKeys(self._settings, provider), counts)

    async def clear(self, *, l1: bool, l2: bool) -> dict[str, int]:
        """As `ResponseCache.clear`, for vectors."""
        removed = {"l1": self.l1.clear()} if l1 else {}
        if l2:
            try:
                await self.l2.start()
                removed["l2"] = await self.l2.clear()
            except Exception as exc:
                raise ProviderUnavailable(f"{self._store_name} cannot be cleared: {exc}", code="cache_error") from exc
        return removed

    def figures(self) -> dict[str, int]:
        """What it has done since it was made, in inputs, and what it holds in memory."""
        total: Counter[str] = sum(self._counts.values(), Counter())
        return {
            "num_l1_hits": total["l1"],
            "num_l2_hits": total["l2"],
            "num_misses": total["missed"],
            "num_joined": total["joined"],
            "num_tokens_reused": self.num_tokens_reused,
            "l1_entries": len(self.l1),
            "l1_bytes": self.l1.num_bytes,
        }

    def metrics_of(self, provider: str) -> dict[str, float]:
        counts = self._counts.get(provider, Counter())
        return {
            "num_vector_l1_hits": counts["l1"],
            "num_vector_l2_hits": counts["l2"],
            "num_vector_misses": counts["missed"],
            "num_vectors_joined": counts["joined"],
        }

    async def find(self, keys: Iterable[bytes], max_age: float | None, counts: Counter[str]) -> Found:
        """The kept vectors of `keys` that are young enough, of one model only: that of the newest."""
        await self.l2.start()
        now = time.time()
        oldest = 0.0 if max_age is None else now - max_age
        wanted = set(keys)
        in_memory = {key: entry for key in wanted if (entry := self.l1.get(key, now)) and entry.created >= oldest}
        shared = {}
        if absent := [key for key in wanted if key not in in_memory]:
            told = await self.l2.get_many(absent)
            shared = {key: entry for key, entry in told.items() if entry.expires > now and entry.created >= oldest}
        found = in_memory | shared
        if found:
            model = max(found.values(), key=lambda entry: entry.created).model
            found = {key: entry for key, entry in found.items() if entry.model == model}
        for key in shared.keys() & found.keys():
            self.l1.put(key, shared[key])
        counts["l1"] += len(in_memory.keys() & found.keys())
        counts["l2"] += len(shared.keys() & found.keys())
        return found

    def keep(self, made: Found) -> None:
        for key, entry in made.items():
            self.l1.put(key, entry)
            self.l2.put(key, entry)

    def expiry(self, control: CacheControl, now: float) -> float:
        return now + (self._settings.embedding_cache_ttl if control.ttl is None else control.ttl)


class CachedEmbedder:
    """The cache in front of one provider's embeddings."""

    def __init__(self, cache: EmbeddingCache, inner: Embedder, keys: EmbeddingKeys, counts: Counter[str]) -> None:
        self._cache = cache
        self._inner = inner
        self._keys = keys
        self._counts = counts
        self._under_way: dict[bytes, _Call] = {}

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResponse:
        """As `Embedder.embed`. `usage.cached_tokens` of the whole `prompt_tokens` were reused, and not charged.

        Raises NotCached where the request wants kept vectors only, and one is not there.
        """
        control = request.cache or _DEFAULT
        keys = [] if control.mode == "bypass" else self._keys.keys(request)
        if None in keys or not keys:
            response = await self._inner.embed(request)
            return msgspec.structs.replace(response, optimizations=(*response.optimizations, _BYPASSED))
        inputs = {key: one for key, one in zip(keys, request.inputs, strict=True) if key is not None}
        found: Found = {}
        if control.mode != "refresh":
            found = await self._cache.find(inputs, control.max_age, self._counts)
        if control.mode == "only-if-cached" and len(found) < len(inputs):
            raise NotCached(
                f"{len(inputs) - len(found)} of {len(inputs)} vectors are not kept, and no others are wanted",
                param="cache",
            )
        absent = {key: one for key, one in inputs.items() if key not in found}
        made = await self._made(request, absent, control, joins=control.mode != "refresh") if absent else {}
        models = {entry.model for entry in (*found.values(), *(entry for entry, _ in made.values()))}
        if len(models) > 1:
            # The model behind the name has changed since: what was kept is another model's.
            made |= await self._made(request, {key: inputs[key] for key in found}, control, joins=False)
            found = {}
        return self._response(request, [key for key in keys if key is not None], found, made)

    async def _made(
        self,
        request: EmbeddingRequest,
        inputs: dict[bytes, str | list[int]],
        control: CacheControl,
        *,
        joins: bool,
    ) -> Made:
        """The vectors of `inputs`. Where it `joins`, those that are being made for others are waited for."""
        theirs = {key: self._under_way[key] for key in inputs if joins and key in self._under_way}
        ours = {key: one for key, one in inputs.items() if key not in theirs}
        own = self._call(request, ours, control) if ours else None
        calls = [*dict.fromkeys(theirs.values()), *([own] if own else [])]
        for call in calls:
            call.num_waiting += 1
        try:
            outcomes = await asyncio.gather(*(asyncio.shield(call.task) for call in calls), return_exceptions=True)
        finally:
            for call in calls:
                call.leave()
        made: Made = {}
        for call, outcome in zip(calls, outcomes, strict=True):
            if not isinstance(outcome, BaseException):
                made |= {key: (outcome[key], call is own) for key in inputs if key in outcome}
            elif call is own:
                raise outcome.with_traceback(None)
        self._counts["joined"] += len(made) - len(ours)
        if len(made) < len(inputs):
            # Somebody else's call failed, perhaps over a text of his own: this request asks itself.
            left = {key: one for key, one in inputs.items() if key not in made}
            made |= await self._made(request, left, control, joins=False)
        return made

    def _call(self, request: EmbeddingRequest, inputs: dict[bytes, str | list[int]], control: CacheControl) -> _Call:
        call = _Call(asyncio.create_task(self._ask(request, inputs, control)))
        self._counts["missed"] += len(inputs)
        self._under_way |= dict.fromkeys(inputs, call)

        def forget(_task: asyncio.Task[Found]) -> None:
            for key in inputs:
                if self._under_way.get(key) is call:
                    del self._under_way[key]

        call.task.add_done_callback(forget)
        return call

    async def _ask(
        self, request: EmbeddingRequest, inputs: dict[bytes, str | list[int]], control: CacheControl
    ) -> Found:
        response = await self._inner.embed(msgspec.structs.replace(request, inputs=list(inputs.values()), cache=None))
        now = time.time()
        expires = self._cache.expiry(control, now)
        lengths = shares(response.usage.prompt_tokens, [len(one) for one in inputs.values()])
        made = {
            key: vector_entry(vector, model=response.model, num_tokens=length, created=now, expires=expires)
            for key, vector, length in zip(inputs, response.vectors, lengths, strict=True)
        }
        self._cache.keep(made)
        return made

    def _response(
        self,
        request: EmbeddingRequest,
        keys: Sequence[bytes],
        found: Found,
        made: Made,
    ) -> EmbeddingResponse:
        entries = found | {key: entry for key, (entry, _) in made.items()}
        num_charged = sum(entry.num_tokens for entry, is_own in made.values() if is_own)
        num_tokens = sum(entries[key].num_tokens for key in keys)
        num_reused = num_tokens - num_charged
        self._cache.num_tokens_reused += num_reused
        num_own = sum(is_own for _, is_own in made.values())
        num_again = len(keys) - num_own
        reason = f"{num_again} of {len(keys)} vectors were there"
        if num_again:
            reason += f": {len(found)} kept, {len(made) - num_own} made for others, {len(keys) - len(entries)} repeated"
        line = OptimizationOutcome(
            name=NAME, applied=num_again > 0, reason=reason, tokens_saved=num_reused if num_again else None
        )
        return EmbeddingResponse(
            vectors=tuple(entries[key].vector() for key in keys),
            model=entries[keys[0]].model,
            provider=request.provider or "",
            usage=Usage(prompt_tokens=num_tokens, completion_tokens=0, cached_tokens=num_reused),
            request_id=request.request_id or "",
            optimizations=(line,),
        )


class _Call:
    """A call under way, and how many requests wait for it; the last to leave ends it."""

    def __init__(self, task: asyncio.Task[Found]) -> None:
        self.task = task
        self.num_waiting = 0

    def leave(self) -> None:
        self.num_waiting -= 1
        if not self.num_waiting:
            self.task.cancel()


def shares(num_tokens: int, lengths: Sequence[int]) -> list[int]:
    """`num_tokens` divided by `lengths`; the parts add up to them."""
    total = sum(lengths) or 1
    parts = []
    length = num_told = 0
    for one in lengths:
        length += one
        num_until_here = num_tokens * length // total
        parts.append(num_until_here - num_told)
        num_told = num_until_here
    return parts
