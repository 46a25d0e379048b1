"""Keep chosen prompt beginnings in the KV cache, computed before anybody asks. Knows texts, tenants and pinned blocks;
knows nothing of settings or requests.

Every prefix is cached by itself as soon as somebody sends it, and overwritten when others are used more recently
(block_pool.py). What is added here is for system prompts that are worth their memory even when nobody has come for a
while: they are computed once at the start and pinned. A tenant finds its own only, so each tenant costs its own blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

from autobot_llm.engine.engine import Engine
from autobot_llm.engine.kv_cache.block_pool import PrefixBlock
from autobot_llm.engine.request import EngineRequest, RequestStats
from autobot_llm.engine.sequence import SamplingParams
from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.errors import ConfigurationError, InvalidRequestError

log = logging.getLogger(__name__)

CACHED_PREFIXES: tuple[str, ...] = ()
"""System prompts that are pinned where none are named. There are none: they belong to an application and not to an
engine. AUTOBOT_CACHED_PREFIXES names them."""

MAX_PINNED_SHARE = 0.5
_SWITCHED_OFF = ("AUTOBOT_PREFIX_CACHING is false", "true")
_REQUEST_ID = -1  # no request of a service has it
_ENDINGS = ("a", "1")  # what a user may begin with


@dataclass(frozen=True, slots=True)
class WarmedPrefix:
    """A pinned prefix of one tenant. `num_tokens` stay in the cache: whole blocks of it, fewer after a failed step."""

    text: str
    salt: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class PrefixCacheConfig:
    """What prefix caching does here, and what it has done. `hit_rate` is of all prompt tokens so far, 0 to 1.

    `num_cache_tokens` is the capacity of the whole cache, `max_pinned_tokens` the part that may be pinned. With
    `is_salted` a tenant finds only what was computed for itself.
    """

    enabled: bool
    is_salted: bool
    block_size: int
    num_cache_tokens: int
    max_pinned_tokens: int
    num_pinned_tokens: int
    hit_rate: float
    prefixes: tuple[str, ...]
    warmed: tuple[WarmedPrefix, ...]


@dataclass(frozen=True, slots=True)
class _Pinned:
    text: str
    salt: str
    entries: list[PrefixBlock]


class PrefixCacheManager:
    """Computes prefixes and keeps them in an engine's cache. Belongs to the thread that owns the engine.

    `prefixes` are system prompts, or, where the model has no chat template, beginnings of plain prompts. Raises
    ConfigurationError where there are some and the engine does not cache prefixes.
    """

    CACHED_PREFIXES: ClassVar[tuple[str, ...]] = CACHED_PREFIXES

    def __init__(self, engine: Engine, prefixes: Sequence[str] = CACHED_PREFIXES) -> None:
        self._engine = engine
        self._pool = engine.scheduler.block_pool
        self._prefixes = tuple(dict.fromkeys(prefixes))
        self._pinned: list[_Pinned] = []
        if self._prefixes and not self._pool.prefix_caching:
            policy = engine.scheduler.retention.policy
            off, on = ("AUTOBOT_KV_HEAVY_HITTERS is set", "0") if policy.heavy_hitters else _SWITCHED_OFF
            raise ConfigurationError(
                f"AUTOBOT_CACHED_PREFIXES names {len(self._prefixes)} prefixes and {off}: expected {on}, or no prefixes"
            )

    @property
    def max_pinned_blocks(self) -> int:
        """At most half of the cache, and never so much that a sequence of full length does not fit beside it."""
        num_for_a_sequence = self._engine.scheduler.blocks_per_sequence
        return min(int(self._pool.num_blocks * MAX_PINNED_SHARE), self._pool.num_blocks - num_for_a_sequence)

    def warm(self, salts: Iterable[str] = ("",)) -> int:
        """Compute and pin every prefix for these tenants; returns the number of tokens that were pinned.

        To be called while the engine has no requests. What is pinned already is left alone. Raises ConfigurationError
        where a prefix does not fit, before anything is computed, and what computing raises.
        """
        assert not self._engine.has_work, "the engine is warmed before it serves, or between requests"
        wanted = [(text, salt) for salt in dict.fromkeys(salts) for text in self._prefixes]
        self._drop_dead()
        present = {(one.text, one.salt) for one in self._pinned}
        token_ids = {text: self._whole_blocks(text) for text in self._prefixes}
        missing = [(text, salt) for text, salt in wanted if (text, salt) not in present]
        num_blocks = _num_distinct_blocks([(salt, token_ids[text]) for text, salt in missing], self._pool.block_size)
        self._refuse_too_much(num_blocks, num_salts=len({salt for _, salt in missing}))
        num_before = self._pool.num_pinned
        for text, salt in missing:
            self._compute(token_ids[text], salt)
            entries = self._pool.pin(token_ids[text], salt)
            assert len(entries) * self._pool.block_size == len(token_ids[text]), "what was computed is published"
            self._pinned.append(_Pinned(text, salt, entries))
        return (self._pool.num_pinned - num_before) * self._pool.block_size

    def unpin(self, text: str | None = None) -> None:
        """Let a prefix, or all of them, be overwritten again when the cache needs room. An unknown one is ignored."""
        for one in self._pinned:
            if text in (None, one.text):
                self._pool.unpin(one.entries)
        self._pinned = [one for one in self._pinned if text not in (None, one.text)]

    def get_prefix_cache_config(self) -> PrefixCacheConfig:
        """What is on, how large it is, and what is pinned now; may be asked from any thread."""
        pool = self._pool
        size = pool.block_size
        return PrefixCacheConfig(
            enabled=pool.prefix_caching,
            is_salted=True,
            block_size=size,
            num_cache_tokens=pool.num_blocks * size,
            max_pinned_tokens=self.max_pinned_blocks * size,
            num_pinned_tokens=pool.num_pinned * size,
            hit_rate=pool.hit_rate,
            prefixes=self._prefixes,
            warmed=tuple(
                WarmedPrefix(one.text, one.salt, size * sum(entry.is_live for entry in one.entries))
                for one in self._pinned
            ),
        )

    def _whole_blocks(self, text: str) -> list[int]:
        token_ids = prefix_ids(self._engine.tokenizer, text)
        if len(token_ids) >= self._engine.scheduler.max_model_len:
            raise ConfigurationError(
                f"AUTOBOT_CACHED_PREFIXES: {_shown(text)} has {len(token_ids):,} tokens: expected fewer than the "
                f"context of {self._engine.scheduler.max_model_len:,}"
            )
        num_tokens = len(token_ids) // self._pool.block_size * self._pool.block_size
        if num_tokens == 0:
            log.warning(
                "AUTOBOT_CACHED_PREFIXES: %s has %d tokens, less than a block of %d: there is nothing to keep",
                _shown(text),
                len(token_ids),
                self._pool.block_size,
            )
        return token_ids[:num_tokens]

    def _refuse_too_much(self, num_blocks: int, num_salts: int) -> None:
        size, limit = self._pool.block_size, self.max_pinned_blocks
        num_needed = self._pool.num_pinned + num_blocks
        if num_needed > limit:
            raise ConfigurationError(
                f"AUTOBOT_CACHED_PREFIXES: {num_needed * size:,} tokens would stay in the KV cache (each of "
                f"{num_salts} tenants has its own copy); of its {self._pool.num_blocks * size:,} at most "
                f"{limit * size:,} may: name fewer or shorter ones, or set AUTOBOT_KV_CACHE_MEMORY higher"
            )

    def _compute(self, token_ids: list[int], salt: str) -> None:
        """Answer the prefix with one token that nobody reads: what it leaves in the cache is what is wanted."""
        if not token_ids:
            return
        pool = self._pool
        counted = pool.num_query_tokens, pool.num_hit_tokens
        params = SamplingParams(max_tokens=1, temperature=0.0)
        self._engine.add(_REQUEST_ID, EngineRequest(token_ids, (params,), salt=salt), RequestStats())
        try:
            while self._engine.has_work:
                for output in self._engine.step():
                    if output.error is not None:
                        raise output.error
        finally:
            self._engine.abort(_REQUEST_ID)
            pool.num_query_tokens, pool.num_hit_tokens = counted  # nobody asked for it, so it neither hit nor missed

    def _drop_dead(self) -> None:
        """Forget pins that the pool has dropped, in whole or in part, because their content was suspect."""
        for one in self._pinned:
            if not all(entry.is_live for entry in one.entries):
                self._pool.unpin(one.entries)
        self._pinned = [one for one in self._pinned if all(entry.is_live for entry in one.entries)]


@dataclass(frozen=True, slots=True)
class _Turn:
    """A message as chat templates want it."""

    role: str
    content: str
    name: None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: None = None
    reasoning_content: None = None


def prefix_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids that every conversation with the system prompt `text` begins with.

    They are what two conversations have in common, so a template may put anything before the text and after it. Raises
    ConfigurationError where the template has no place for a system prompt.
    """
    if not tokenizer.has_chat_template:
        return _common(*(tokenizer.encode(text + ending) for ending in _ENDINGS))
    try:
        return _common(*(tokenizer.encode_chat([_Turn("system", text), _Turn("user", e)]) for e in _ENDINGS))
    except InvalidRequestError as error:
        raise ConfigurationError(f"AUTOBOT_CACHED_PREFIXES: {_shown(text)}: {error.message}") from error


def _common(first: list[int], second: list[int]) -> list[int]:
    return [a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))]


def _num_distinct_blocks(prefixes: Iterable[tuple[str, list[int]]], block_size: int) -> int:
    """How many blocks these prefixes take together, each with its salt; equal beginnings share theirs."""
    nodes: dict[tuple[str | int, tuple[int, ...]], int] = {}
    for salt, token_ids in prefixes:
        node: str | int = salt
        for start in range(0, len(token_ids), block_size):
            node = nodes.setdefault((node, tuple(token_ids[start : start + block_size])), len(nodes))
    return len(nodes)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
