"""Name an answer before it exists: a hash of everything that can change it. Knows requests; knows nothing of stores.

Two requests have one key exactly when nothing that reaches a model differs between them. The order of a JSON object's
fields counts, because chat templates and grammars follow it. A field that `LLMRequest` gets in future is in the key
from its first day on; only those that are named here are left out.
"""

from __future__ import annotations

import sys
from hashlib import blake2b
from operator import attrgetter
from typing import Any

import msgspec

from autobot_llm.providers.base import Provider, TellsRevision
from autobot_llm.settings import Settings
from autobot_llm.settings.registry import SETTINGS
from autobot_llm.types import EmbeddingRequest, LLMRequest

FORMAT = 1  # of keys and of stored answers: entries of another format are never found
KEY_BYTES = 16

# How and for whom an answer is made, not what it says.
_NOT_IN_THE_ANSWER = frozenset(
    {"stream", "timeout", "priority", "metadata", "request_id", "service_options", "cache"}
)  # fmt: skip
_NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_APART = _NOT_IN_THE_ANSWER.union(_NUMBERS, ("logit_bias",))
_OTHERS = tuple(name for name in LLMRequest.__struct_fields__ if name not in _APART)
_numbers_of = attrgetter(*_NUMBERS)
_others_of = attrgetter(*_OTHERS)
_encode = msgspec.msgpack.Encoder().encode

# Settings by which an answer may come sooner, later or not at all, and is the same. All others are in the key.
_NOT_IN_THE_SCOPE = frozenset(
    {
        "provider", "models", "timeout", "ollama_keep_alive", "clouds", "host", "port", "api_keys", "max_body_bytes",
        "shutdown_grace", "log_level", "cpu_threads", "max_queued_requests", "workload", "max_num_seqs",
        "max_num_batched_tokens", "max_waiting_time_ms", "scheduling_policy", "preemption", "swap_memory",
        "kv_cache_memory", "gpu_memory_utilization", "prefix_caching", "cached_prefixes", "warm_prefixes",
        "cuda_graphs", "cache_dir", "batch_dir", "cloud_connection_pool_size", "cloud_batch_window_ms",
        "cloud_max_batch_size",
        "cloud_retry_max_attempts", "cloud_budget_per_day", "cloud_budget_per_month", "cache_enabled", "cache_l1_size",
        "cache_l2_ttl", "redis_url", "semantic_cache_threshold",
        "embedding_cache_size", "embedding_cache_ttl",
    }
)  # fmt: skip
# Fields of OpenAI's and Anthropic's with which a service does more than answer, or looks something up that changes.
_MORE_THAN_AN_ANSWER = frozenset({"background", "container", "mcp_servers", "plugins", "store", "web_search_options"})


class _Scope:
    """What sets one provider's answers under one set of settings apart from all others."""

    def __init__(self, settings: Settings, provider: Provider) -> None:
        scope = {
            setting.field: getattr(settings, setting.field)
            for setting in SETTINGS
            if setting.field not in _NOT_IN_THE_SCOPE and not setting.about.secret
        }
        cloud = settings.clouds.get(provider.name)
        scope["endpoint"] = None if cloud is None else cloud.endpoint
        told = msgspec.msgpack.encode([FORMAT, provider.name, scope], enc_hook=str, order="sorted")
        self._scope = blake2b(told, digest_size=KEY_BYTES).digest()
        teller: object = provider
        self._teller = teller if isinstance(teller, TellsRevision) else None

    def _revision(self, model: str | None) -> str | None:
        return None if self._teller is None else self._teller.revision(model)


class EmbeddingKeys(_Scope):
    """The keys of the vectors of one provider."""

    def keys(self, request: EmbeddingRequest) -> list[bytes | None]:
        """The key of each input's vector; None for a text that has no bytes, as half a surrogate pair."""
        asked = ("vector", sys.byteorder, request.model, request.dimensions, request.tenant, request.extra_body)
        try:
            told = _encode((self._scope, self._revision(request.model), asked))
        except (TypeError, ValueError, OverflowError, RecursionError):
            return [None] * len(request.inputs)
        return [_digest(told, one) for one in request.inputs]


def _digest(told: bytes, one: str | list[int]) -> bytes | None:
    try:
        return blake2b(_encode((told, one)), digest_size=KEY_BYTES).digest()
    except (ValueError, OverflowError):
        return None


class AnswerKeys(_Scope):
    """The keys of one provider's answers under one set of settings."""

    def key(self, request: LLMRequest) -> bytes | None:
        """The key of `request`'s answer; None where it holds something that has no bytes, as half a surrogate pair."""
        numbers = [None if number is None else number + 0.0 for number in _numbers_of(request)]  # 0, 0.0 and -0.0
        bias = [(token, value + 0.0) for token, value in sorted(request.logit_bias.items())]
        try:
            told = _encode((self._scope, self._revision(request.model), numbers, bias, _others_of(request)))
        except (TypeError, ValueError, OverflowError, RecursionError):
            return None
        return blake2b(told, digest_size=KEY_BYTES).digest()

    def partition(self, request: LLMRequest) -> tuple[bytes, str] | None:
        """The text of the last turn, and a key of everything else: two requests have one where nothing else differs.

        None where the last turn is not a user's, or has not exactly one text.
        """
        if not request.messages or request.messages[-1].role != "user":
            return None
        last = request.messages[-1]
        if isinstance(last.content, str):
            text = last.content
            rest: list[dict[str, Any]] | None = None
        else:
            parts = last.content or []
            texts = [part for part in parts if part.get("type") == "text"]
            if len(texts) != 1 or not isinstance(texts[0].get("text"), str):
                return None
            text = texts[0]["text"]
            rest = [part | {"text": None} if part is texts[0] else part for part in parts]
        turn = msgspec.structs.replace(last, content=rest)
        key = self.key(msgspec.structs.replace(request, messages=[*request.messages[:-1], turn]))
        return None if key is None else (key, text)


def may_be_shared(request: LLMRequest) -> bool:
    """Whether two callers may have one answer: it is deterministic, or the request says so by naming the cache.

    A drawn answer is one of many. Who asks for several of them, to compare them, must not get one several times.
    """
    if request.cache is not None:
        return request.cache.mode != "bypass"
    if request.temperature != 0 and request.seed is None:
        return False
    if request.tools and any(tool.get("type", "function") != "function" for tool in request.tools):
        return False
    return not _does_more(request.service_options) and not _does_more(request.extra_body)


def _does_more(fields: dict[str, Any]) -> bool:
    return bool(fields) and any(fields.get(name) for name in _MORE_THAN_AN_ANSWER & fields.keys())
