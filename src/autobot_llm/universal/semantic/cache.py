"""Answer a question with the kept answer to the same question in other words. Lossy, and therefore off by default.

AUTOBOT_SEMANTIC_CACHE_THRESHOLD switches it on. Knows requests, kept answers and vectors; what a question means,
meaning.py knows. Everything but the text of the last turn must be equal exactly: model, tools, format, system prompt,
conversation, sampling, tenant. Of the texts, meaning.py first says which kept ones could mean the same; only where
there is one is it embedded, and compared. So a request that finds nothing waits for nobody.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from autobot_llm.providers.base import Link, Provider, Streamer
from autobot_llm.report import SEMANTIC_CACHING, OptimizationOutcome
from autobot_llm.settings import Settings
from autobot_llm.types import CacheControl, EmbeddingRequest, EmbeddingResponse, Event, Finish, LLMRequest
from autobot_llm.universal.breaker import StoreBreaker
from autobot_llm.universal.entries import Entry
from autobot_llm.universal.kept_answer import KeptAnswer, with_savings
from autobot_llm.universal.request_key import AnswerKeys, may_be_shared
from autobot_llm.universal.response_cache import LookupCounts, ResponseCache
from autobot_llm.universal.semantic.meaning import Meaning, meaning_of
from autobot_llm.universal.semantic.questions import Question, Questions, Vector

logger = logging.getLogger("autobot_llm.cache")

NAME = SEMANTIC_CACHING
PATIENCE = 0.5  # seconds that a request waits for vectors
MAX_SHOWN = 200  # characters of the question that matched

Embed = Callable[[EmbeddingRequest], Awaitable[EmbeddingResponse]]

_DEFAULT = CacheControl()


def _not(reason: str) -> OptimizationOutcome:
    return OptimizationOutcome(name=NAME, applied=False, reason=reason)


_UNWANTED = _not("the request wants no other question's answer")
_UNSHARED = _not("the answer is drawn at random, or does more than answer")
_UNJUDGED = _not("the last turn is not the text of a user, short enough to be judged")
_REFRESHED = _not("the request wants a new answer")
_UNKNOWN = _not("no kept question means the same")
_GONE = _not("a question that means the same has no kept answer any more")
_UNREACHABLE = _not("there were no vectors to compare questions by")


def semantic_cache(settings: Settings) -> SemanticCache | None:
    """The link of one interface; None unless the settings give a threshold, and keep answers."""
    threshold = settings.semantic_cache_threshold
    if threshold is None:
        return None
    if not settings.cache_enabled:
        logger.warning("AUTOBOT_SEMANTIC_CACHE_THRESHOLD has no effect: AUTOBOT_CACHE_ENABLED is false")
        return None
    return SemanticCache(settings, threshold)


class SemanticCache(Link):
    """The questions of all providers of an interface. Kept in this process's memory; their answers are the cache's."""

    def __init__(self, settings: Settings, threshold: float, *, patience: float = PATIENCE) -> None:
        self.threshold = threshold
        self.questions = Questions()
        self._settings = settings
        self._patience = patience
        self._answers: ResponseCache | None = None
        self._embed: Embed | None = None
        self._under_way: set[asyncio.Future[EmbeddingResponse]] = set()
        self._breaker = StoreBreaker()
        self._try_again_at = 0.0
        self._has_warned = False
        self._counts: dict[str, Counter[str]] = {}
        self._lookups = LookupCounts()  # of answers whose question was found; not shown beside the exact ones
        self.num_failures = 0
        self.milliseconds_saved = 0.0

    def connect(self, answers: ResponseCache, embed: Embed) -> None:
        """Whose answers it gives again, and who makes vectors."""
        self._answers, self._embed = answers, embed

    async def close(self) -> None:
        under_way = list(self._under_way)
        for making in under_way:
            making.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)

    def wrap(self, chain: Streamer, provider: Provider) -> Streamer:
        counts = self._counts.setdefault(provider.name, Counter())
        return _SemanticChain(self, chain, AnswerKeys(self._settings, provider), counts)

    def state(self) -> tuple[bool, str]:
        return True, f"answers to the same question in other words, from a similarity of {self.threshold:g}; lossy"

    def metrics_of(self, provider: str) -> dict[str, float]:
        counts = self._counts.get(provider, Counter())
        return {"num_semantic_hits": counts["hit"], "num_semantic_misses": counts["missed"]}

    def figures(self) -> dict[str, int | float | bool]:
        """What it has done since it was made, and what it holds."""
        total: Counter[str] = sum(self._counts.values(), Counter())
        return {
            "num_hits": total["hit"],
            "num_misses": total["missed"],
            "num_questions": self.questions.num_questions,
            "num_embedding_failures": self.num_failures,
            "embeddings_usable": not self._breaker.is_open,
            "seconds_saved": self.milliseconds_saved / 1000,
        }

    async def find(
        self, asked: Asked, control: CacheControl
    ) -> tuple[Entry, OptimizationOutcome] | OptimizationOutcome:
        """The kept answer to the same question, and the report's line about it; only a line where there is none."""
        assert self._answers is not None, "it was connected"
        alike = self.questions.alike(asked.partition, asked.meaning)
        if not alike:
            return _UNKNOWN
        similarities = await self._similarities(asked, alike)
        if not similarities:
            return _UNREACHABLE
        nearest = max(similarities.values())
        line = _not(f"the nearest kept question has a similarity of {nearest:.4f}, less than {self.threshold:g}")
        for place, similarity in sorted(similarities.items(), key=lambda one: -one[1]):
            if similarity < self.threshold:
                break
            question = alike[place]
            found = await self._answers.find(question.answer, control, self._lookups)
            if found is not None:
                return found[0], OptimizationOutcome(
                    name=NAME,
                    applied=True,
                    lossy=True,
                    reason=f"the kept answer to the same question in other words, similarity {similarity:.4f}",
                    similarity=similarity,
                    matched_question=question.text[:MAX_SHOWN],
                )
            if control.max_age is None:
                self.questions.drop(asked.partition, asked.meaning, question)
            line = _GONE
        return line

    async def _similarities(self, asked: Asked, alike: list[Question]) -> dict[int, float]:
        """How similar the question is to each of `alike`, by place; empty where that cannot be found out soon."""
        new = [question for question in alike if question.vector is None]
        vectors = await self._vectors([asked.text, *(question.text for question in new)], asked.tenant)
        if vectors is None or (own := vectors[0]) is None:
            return {}
        asked.vector = own
        for question, vector in zip(new, vectors[1:], strict=True):
            question.vector = vector
        similarities = {}
        for place, question in enumerate(alike):
            similarity = None if question.vector is None else own.similarity(question.vector)
            if similarity is None:
                question.vector = None  # another model's: made anew the next time
            else:
                similarities[place] = similarity
        return similarities

    async def _vectors(self, texts: list[str], tenant: str) -> list[Vector | None] | None:
        assert self._embed is not None, "it was connected"
        if self._breaker.is_open:
            if time.monotonic() < self._try_again_at:
                return None
            self._breaker.admit()
        # Not given up with the request's patience: it may be starting the provider that makes vectors.
        making = asyncio.ensure_future(
            self._embed(EmbeddingRequest(inputs=[*texts], tenant=tenant, timeout=self._patience))
        )
        self._under_way.add(making)
        making.add_done_callback(self._done)
        try:
            async with asyncio.timeout(self._patience):
                response = await asyncio.shield(making)
        except Exception as exc:
            self._failed(exc)
            return None
        self._breaker.succeeded()
        if self._has_warned:
            self._has_warned = False
            logger.info("there are embeddings again; the semantic cache is back")
        return [Vector.of(one, provider=response.provider, model=response.model) for one in response.vectors]

    def _done(self, making: asyncio.Future[EmbeddingResponse]) -> None:
        self._under_way.discard(making)
        if not making.cancelled():
            making.exception()  # nobody may be waiting for it any more

    def _failed(self, exc: Exception) -> None:
        self.num_failures += 1
        self._breaker.failed(gravely=True)
        self._try_again_at = time.monotonic() + self._breaker.pause
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the semantic cache is left out until there are embeddings again (%s); AUTOBOT_EMBEDDING_MODEL says "
                "who makes them",
                f"none within {self._patience:g} s" if isinstance(exc, TimeoutError) else exc,
            )

    def keep(self, asked: Asked, answer: bytes) -> None:
        self.questions.keep(asked.partition, asked.meaning, Question(asked.text, answer, asked.vector))


@dataclass(slots=True)
class Asked:
    """A request's last turn: its text, what that means, its vector where it was needed; the key of all the rest."""

    text: str
    meaning: Meaning
    partition: bytes
    tenant: str
    vector: Vector | None = None


class _SemanticChain:
    """The semantic cache in front of one provider's chain."""

    def __init__(self, cache: SemanticCache, inner: Streamer, keys: AnswerKeys, counts: Counter[str]) -> None:
        self._cache = cache
        self._inner = inner
        self._keys = keys
        self._counts = counts

    async def stream(self, request: LLMRequest) -> AsyncGenerator[Event, None]:
        began = time.perf_counter()
        control = request.cache or _DEFAULT
        asked = self._asked(request, control)
        if isinstance(asked, OptimizationOutcome):
            line = asked
        elif control.mode == "refresh":
            line = _REFRESHED
        else:
            found = await self._cache.find(asked, control)
            if not isinstance(found, OptimizationOutcome):
                self._counts["hit"] += 1
                entry, line = found
                line = with_savings(line, entry, began)
                self._cache.milliseconds_saved += line.milliseconds_saved or 0.0
                for event in KeptAnswer(entry, line, request.request_id, began).events():
                    yield event
                return
            self._counts["missed"] += 1
            line = found
        async with aclosing(self._inner.stream(request)) as events:
            async for event in events:
                if type(event) is not Finish:
                    yield event
                    continue
                if isinstance(asked, Asked) and not event.fallback_used and (key := self._keys.key(request)):
                    self._cache.keep(asked, key)
                yield msgspec.structs.replace(event, optimizations=(*event.optimizations, line))

    def _asked(self, request: LLMRequest, control: CacheControl) -> Asked | OptimizationOutcome:
        if control.mode == "bypass" or not control.semantic:
            return _UNWANTED
        if not may_be_shared(request):
            return _UNSHARED
        parted = self._keys.partition(request)
        if parted is None:
            return _UNJUDGED
        partition, text = parted
        meaning = meaning_of(text)
        if meaning is None:
            return _UNJUDGED
        return Asked(text, meaning, partition, request.tenant)
