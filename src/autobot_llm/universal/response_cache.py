"""Give an answer again that was given before. Knows which answers may be kept and for how long; knows no provider.

A lookup goes through this process's memory, then through the store that processes share; what is found there is kept in
memory too. An answer is kept when its Finish has come, and given again in the pieces in which it came.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

import msgspec

from autobot_llm.errors import NotCached, ProviderUnavailable
from autobot_llm.providers.base import Link, Provider, Streamer
from autobot_llm.report import RESPONSE_CACHING, OptimizationOutcome, dollars_worth, reused_from
from autobot_llm.settings import Settings
from autobot_llm.types import CacheControl, Event, Finish, LLMRequest
from autobot_llm.universal.entries import Entry, num_bytes_of, seal, unseal
from autobot_llm.universal.kept_answer import KeptAnswer, exact_line
from autobot_llm.universal.request_key import AnswerKeys, may_be_shared
from autobot_llm.universal.second_level import SecondLevel
from autobot_llm.universal.stores.base import SharedStore
from autobot_llm.universal.stores.choice import open_store
from autobot_llm.universal.stores.memory import MemoryStore

MAX_L1_BYTES = 64 * 2**20
MAX_ENTRY_BYTES = 4 * 2**20

_DEFAULT = CacheControl()
_BYPASSED = OptimizationOutcome(name=RESPONSE_CACHING, applied=False, reason="the request bypasses it")
_DRAWN = OptimizationOutcome(
    name=RESPONSE_CACHING, applied=False, reason="the answer is drawn at random: no temperature 0, no seed"
)
_MISSED = OptimizationOutcome(name=RESPONSE_CACHING, applied=False, reason="it was not there")
_REFRESHED = OptimizationOutcome(name=RESPONSE_CACHING, applied=False, reason="the request wants a new answer")

_IN_MEMORY = "found in memory"
_IN_THE_STORE = "found in the shared store"


class CacheMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """What the cache has done since it was made, and what it holds in memory. `hit_rate` is a share of the lookups.

    `l2` names the shared store, `l2_usable` says whether it is asked at present.
    """

    enabled: bool
    num_lookups: int
    num_l1_hits: int
    num_l2_hits: int
    hit_rate: float
    num_stored: int
    l1_entries: int
    l1_bytes: int
    num_l1_evictions: int
    l2: str
    l2_usable: bool
    num_l2_failures: int
    num_l2_dropped: int
    seconds_saved: float


def response_cache(settings: Settings) -> ResponseCache | None:
    """The cache that the settings ask for."""
    return ResponseCache(settings, open_store(settings)) if settings.cache_enabled else None


class ResponseCache(Link):
    """The answers of all providers of an interface, in two levels."""

    def __init__(self, settings: Settings, store: SharedStore, *, max_l1_bytes: int = MAX_L1_BYTES) -> None:
        self._settings = settings
        self._store_name = store.name
        self.ttl = settings.cache_l2_ttl
        self.l1: MemoryStore[Entry] = MemoryStore(settings.cache_l1_size, max_l1_bytes)
        self.l2 = SecondLevel(store, seal, unseal)
        self._counts: dict[str, LookupCounts] = {}
        self.num_stored = 0
        self.milliseconds_saved = 0.0

    async def start(self) -> None:
        await self.l2.start()

    async def close(self) -> None:
        await self.l2.close()

    def wrap(self, chain: Streamer, provider: Provider) -> Streamer:
        counts = self._counts.setdefault(provider.name, LookupCounts())
        return _CachedChain(self, chain, AnswerKeys(self._settings, provider), counts)

    async def clear(self, *, l1: bool, l2: bool) -> dict[str, int]:
        """Remove the answers of each level asked for, of all tenants and models, and return their numbers.

        Raises ProviderUnavailable where the shared store cannot be cleared.
        """
        removed = {"l1": self.l1.clear()} if l1 else {}
        if l2:
            try:
                removed["l2"] = await self.l2.clear()
            except Exception as exc:
                raise ProviderUnavailable(f"{self._store_name} cannot be cleared: {exc}", code="cache_error") from exc
        return removed

    def figures(self) -> CacheMetrics:
        num_l1_hits = sum(counts.num_l1_hits for counts in self._counts.values())
        num_l2_hits = sum(counts.num_l2_hits for counts in self._counts.values())
        num_hits = num_l1_hits + num_l2_hits
        num_lookups = num_hits + sum(counts.num_misses for counts in self._counts.values())
        return CacheMetrics(
            enabled=True,
            num_lookups=num_lookups,
            num_l1_hits=num_l1_hits,
            num_l2_hits=num_l2_hits,
            hit_rate=num_hits / max(1, num_lookups),
            num_stored=self.num_stored,
            l1_entries=len(self.l1),
            l1_bytes=self.l1.num_bytes,
            num_l1_evictions=self.l1.num_evicted,
            l2=self._store_name,
            l2_usable=self.l2.is_usable,
            num_l2_failures=self.l2.num_failures,
            num_l2_dropped=self.l2.num_dropped,
            seconds_saved=self.milliseconds_saved / 1000,
        )

    def metrics_of(self, provider: str) -> dict[str, float]:
        counts = self._counts.get(provider, LookupCounts())
        return {
            "num_l1_hits": counts.num_l1_hits,
            "num_l2_hits": counts.num_l2_hits,
            "num_cache_misses": counts.num_misses,
        }

    def count_savings(self, kept: KeptAnswer) -> None:
        self.milliseconds_saved += kept.line.milliseconds_saved or 0.0

    async def find(self, key: bytes, control: CacheControl, counts: LookupCounts) -> tuple[Entry, str] | None:
        """A kept answer that is young enough for `control`, and where it was."""
        now = time.time()
        oldest = 0.0 if control.max_age is None else now - control.max_age
        entry = self.l1.get(key, now)
        if entry is not None and entry.created >= oldest:
            counts.num_l1_hits += 1
            return entry, _IN_MEMORY
        entry = await self.l2.get(key)
        if entry is None or entry.expires <= now or entry.created < oldest:
            # While the store was asked, the answer may have been made: then memory has it by now.
            entry = self.l1.get(key, now)
            if entry is None or entry.created < oldest:
                counts.num_misses += 1
                return None
            counts.num_l1_hits += 1
            return entry, _IN_MEMORY
        self.l1.put(key, entry)
        counts.num_l2_hits += 1
        return entry, _IN_THE_STORE

    def keep(self, key: bytes, events: list[Event], control: CacheControl, began: float, num_bytes: int) -> None:
        """Keep a complete answer that was begun at `began`, unless one was kept since: many may have shared it."""
        now = time.time()
        kept = self.l1.get(key, now)
        if kept is not None and kept.created >= began:
            return
        ttl = self.ttl if control.ttl is None else control.ttl
        entry = Entry(
            events=tuple(events),
            created=now,
            expires=now + ttl,
            milliseconds=(now - began) * 1000,
            num_bytes=num_bytes,
        )
        self.l1.put(key, entry)
        self.l2.put(key, entry)
        self.num_stored += 1


class LookupCounts:
    """What became of the lookups of one provider's answers."""

    __slots__ = ("num_l1_hits", "num_l2_hits", "num_misses")

    def __init__(self) -> None:
        self.num_l1_hits = self.num_l2_hits = self.num_misses = 0


class _CachedChain:
    """The cache in front of one provider's chain."""

    def __init__(self, cache: ResponseCache, inner: Streamer, keys: AnswerKeys, counts: LookupCounts) -> None:
        self._counts = counts
        self._cache = cache
        self._inner = inner
        self._keys = keys

    def kept(self, request: LLMRequest) -> KeptAnswer | None:
        """The fast twin of `stream` for what is in memory; see `AnswersAtOnce`."""
        began = time.perf_counter()
        control = request.cache or _DEFAULT
        key = self._keys.key(request) if control.mode != "refresh" and may_be_shared(request) else None
        if key is None:
            return None
        l1, now = self._cache.l1, time.time()
        entry = l1.get(key, now)
        if entry is None or (control.max_age is not None and entry.created < now - control.max_age):
            return None
        forms = l1.forms(key)
        line = exact_line(entry, _IN_MEMORY, began)
        kept = KeptAnswer(entry, line, request.request_id, began, forms, partial(l1.grow, key, forms))
        self._counts.num_l1_hits += 1
        self._cache.count_savings(kept)
        return kept

    async def stream(self, request: LLMRequest) -> AsyncGenerator[Event, None]:
        began = time.perf_counter()
        control = request.cache or _DEFAULT
        key = self._keys.key(request) if may_be_shared(request) else None
        line = _why_not(request) if key is None else _REFRESHED
        if key is not None and control.mode != "refresh":
            found = await self._cache.find(key, control, self._counts)
            if found is not None:
                entry, reason = found
                kept = KeptAnswer(entry, exact_line(entry, reason, began), request.request_id, began)
                self._cache.count_savings(kept)
                for event in kept.events():
                    yield event
                return
            line = _MISSED
        if control.mode == "only-if-cached":
            raise NotCached("there is no kept answer to this request, and no other is wanted", param="cache")
        async with aclosing(self._inner.stream(request)) as events:
            if key is None:
                async for event in events:
                    yield event if type(event) is not Finish else _with(line, event)
                return
            recording: list[Event] = []
            num_bytes, started = 0, time.time()
            async for event in events:
                num_bytes += num_bytes_of(event)
                if type(event) is not Finish:
                    if num_bytes <= MAX_ENTRY_BYTES:
                        recording.append(event)
                    yield event
                    continue
                if num_bytes <= MAX_ENTRY_BYTES and not event.fallback_used and not reused_from(event.optimizations):
                    recording.append(Finish(usage=event.usage, optimizations=_worth(event)))
                    self._cache.keep(key, recording, control, started, num_bytes)
                yield _with(line, event)


def _why_not(request: LLMRequest) -> OptimizationOutcome:
    return _BYPASSED if request.cache is not None else _DRAWN


def _with(line: OptimizationOutcome, finish: Finish) -> Finish:
    return msgspec.structs.replace(finish, optimizations=(*finish.optimizations, line))


def _worth(finish: Finish) -> tuple[OptimizationOutcome, ...]:
    """The line that tells what the answer cost, as it is kept with it."""
    dollars = dollars_worth(finish.optimizations)
    if dollars is None:
        return ()
    return (OptimizationOutcome(name="cost", applied=True, reason="", dollars_spent=dollars),)
