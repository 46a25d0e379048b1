"""Choose the provider and the model of a request, and form the chain that runs in front of the provider.

Knows the kinds of providers, what can apply to each, and the order of the chain; knows nothing of how any of it works.
"""

from __future__ import annotations

import enum
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import msgspec

from autobot_llm.cloud.batching import BatchingLink
from autobot_llm.cloud.costed import CostLink
from autobot_llm.cloud.hedged import hedging
from autobot_llm.cloud.rate_limited import RateLimitLink
from autobot_llm.cloud.retried import RetryLink
from autobot_llm.errors import ConfigurationError, ModelNotFoundError
from autobot_llm.providers.base import Embedder, Link, OnProgress, Provider, Streamer
from autobot_llm.settings import Settings
from autobot_llm.tuning.knobs import accepts, facts_of
from autobot_llm.types import EmbeddingRequest, LLMRequest
from autobot_llm.universal.deduplication import deduplication
from autobot_llm.universal.embedding_cache import embedding_cache
from autobot_llm.universal.prompt_compression import prompt_compression
from autobot_llm.universal.response_cache import response_cache
from autobot_llm.universal.semantic.cache import semantic_cache

RequestT = TypeVar("RequestT", LLMRequest, EmbeddingRequest)


class ProviderType(enum.StrEnum):
    """The kinds of providers."""

    LOCAL_NATIVE = "native"
    LOCAL_VLLM = "vllm"
    LOCAL_OLLAMA = "ollama"
    CLOUD_OPENAI = "openai"
    CLOUD_ANTHROPIC = "anthropic"
    CLOUD_OTHER = "cloud"


LOCAL_OPTIMIZATIONS = (
    "speculative_decoding",
    "flash_attention",
    "cuda_graphs",
    "medusa_heads",
    "quantization",
    "kv_cache_optimization",
    "continuous_batching",
    "prefix_caching",
)
_OVER_HTTP = ("request_batching", "connection_pooling", "retry_with_backoff", "rate_limit_handling")
_EVERYWHERE = ("response_caching", "prompt_compression", "request_deduplication")
OPTIMIZATIONS = (*LOCAL_OPTIMIZATIONS, *_OVER_HTTP, *_EVERYWHERE)

# Ollama drafts only with a model that its own package attaches, and its graphs are its own; it does run flash
# attention, a quantized KV cache, parallel slots and prompt reuse when told to.
_COULD_APPLY: Mapping[ProviderType, frozenset[str]] = {
    ProviderType.LOCAL_NATIVE: frozenset(LOCAL_OPTIMIZATIONS + _EVERYWHERE),
    ProviderType.LOCAL_VLLM: frozenset(LOCAL_OPTIMIZATIONS + _OVER_HTTP + _EVERYWHERE),
    ProviderType.LOCAL_OLLAMA: frozenset(LOCAL_OPTIMIZATIONS + _OVER_HTTP + _EVERYWHERE)
    - {"speculative_decoding", "cuda_graphs", "medusa_heads"},
    ProviderType.CLOUD_OPENAI: frozenset(_OVER_HTTP + _EVERYWHERE),
    ProviderType.CLOUD_ANTHROPIC: frozenset(_OVER_HTTP + _EVERYWHERE),
    ProviderType.CLOUD_OTHER: frozenset(_OVER_HTTP + _EVERYWHERE),
}


# What an engine's release must take for an optimization to be possible there: an argument and a value of it.
ARGUMENTS_OF: Mapping[ProviderType, Mapping[str, tuple[str, object]]] = {
    ProviderType.LOCAL_VLLM: {
        "speculative_decoding": ("speculative_config.method", "ngram"),
        "medusa_heads": ("speculative_config.method", "medusa"),
        "quantization": ("quantization", "fp8"),
        "kv_cache_optimization": ("kv_cache_dtype", "fp8"),
        "prefix_caching": ("enable_prefix_caching", True),
    }
}


class OptimizationRouter:
    """What could apply to a kind of provider. What does run, the running provider and the report of a request say."""

    @classmethod
    def get_optimizations(cls, provider_type: ProviderType, version: str | None = None) -> dict[str, bool]:
        """Every optimization by name, True where this kind of provider could use it.

        `version` is the detected one of the engine behind it; None stands for today's.
        """
        return {name: cls.should_apply(name, provider_type, version) for name in OPTIMIZATIONS}

    @classmethod
    def should_apply(cls, name: str, provider_type: ProviderType, version: str | None = None) -> bool:
        """Whether this kind of provider, of that version, could use the optimization; an unknown name is False."""
        kind = ProviderType(provider_type)
        if name not in _COULD_APPLY[kind]:
            return False
        needed = ARGUMENTS_OF.get(kind, {}).get(name)
        return needed is None or accepts(kind, version or facts_of(kind).read[-1], *needed)


class Wrapper(msgspec.Struct, frozen=True):
    """One link of the chain: its optimization's name, and what makes it; None where settings switch it off."""

    optimization: str
    make: Callable[[Settings], Link | None]


# Links that are not in the table of what could apply, and the kinds of providers that they stand in front of.
_OTHER_LINKS: Mapping[str, frozenset[ProviderType]] = {
    "cost": frozenset({ProviderType.CLOUD_OPENAI, ProviderType.CLOUD_ANTHROPIC, ProviderType.CLOUD_OTHER}),
    "hedging": frozenset(ProviderType) - {ProviderType.LOCAL_NATIVE},
    "semantic_caching": frozenset(ProviderType),
    "embedding_caching": frozenset(ProviderType),
}


# From the caller inwards. An optimization joins the chain by one line here.
WRAPPERS: tuple[Wrapper, ...] = (
    Wrapper("response_caching", response_cache),
    Wrapper("semantic_caching", semantic_cache),
    Wrapper("embedding_caching", embedding_cache),
    Wrapper("request_deduplication", deduplication),
    Wrapper("prompt_compression", prompt_compression),
    Wrapper("request_batching", BatchingLink),
    Wrapper("cost", CostLink),
    Wrapper("retry_with_backoff", RetryLink),
    Wrapper("hedging", hedging),
    Wrapper("rate_limit_handling", RateLimitLink),
)


def make_links(settings: Settings, wrappers: Sequence[Wrapper] = WRAPPERS) -> dict[str, Link]:
    """The links that one interface's providers share, by optimization, the outermost first; not started."""
    made = ((wrapper.optimization, wrapper.make(settings)) for wrapper in wrappers)
    return {name: link for name, link in made if link is not None}


def build_chain(provider: Provider, links: Mapping[str, Link]) -> Streamer:
    """`provider` behind every link that could apply to its kind, the first of `links` outermost."""
    kind = kind_of(provider.name)
    chain: Streamer = provider
    for optimization, link in reversed(tuple(links.items())):
        if _stands_before(optimization, kind):
            chain = link.wrap(chain, provider)
    return chain


def build_embedder(provider: Provider, links: Mapping[str, Link]) -> Embedder | None:
    """What `build_chain` is for answers, for embeddings; None where the provider makes none."""
    embedder: object = provider
    if not isinstance(embedder, Embedder):
        return None
    kind = kind_of(provider.name)
    for optimization, link in reversed(tuple(links.items())):
        if _stands_before(optimization, kind):
            embedder = link.wrap_embedder(embedder, provider)
    return embedder


def _stands_before(link: str, kind: ProviderType) -> bool:
    return OptimizationRouter.should_apply(link, kind) or kind in _OTHER_LINKS.get(link, ())


def kind_of(name: str) -> ProviderType:
    """A provider with a name of its own is one more OpenAI-compatible cloud."""
    return ProviderType(name) if name in _COULD_APPLY else ProviderType.CLOUD_OTHER


def _anthropic(settings: Settings) -> Provider:
    from autobot_llm.providers.anthropic import AnthropicProvider

    return AnthropicProvider(settings)


def _ollama(settings: Settings) -> Provider:
    from autobot_llm.providers.ollama import OllamaProvider

    return OllamaProvider(settings)


def _vllm(settings: Settings) -> Provider:
    from autobot_llm.providers.vllm import vllm_provider

    return vllm_provider(settings)


def _openai(settings: Settings) -> Provider:
    from autobot_llm.providers.openai.provider import openai_provider

    return openai_provider(settings)


def _cloud(settings: Settings) -> Provider:
    from autobot_llm.providers.openai.provider import cloud_provider

    return cloud_provider(settings, the_cloud(settings))


# Providers over HTTP, imported when they are asked for: `import autobot_llm` has no need of a client.
_CLIENTS: Mapping[str, Callable[[Settings], Provider]] = {
    ProviderType.CLOUD_OPENAI: _openai,
    ProviderType.CLOUD_OTHER: _cloud,
    ProviderType.CLOUD_ANTHROPIC: _anthropic,
    ProviderType.LOCAL_OLLAMA: _ollama,
    ProviderType.LOCAL_VLLM: _vllm,
}


def build_provider(settings: Settings, name: str, on_progress: OnProgress | None = None) -> Provider:
    """The provider called `name`, not yet started. Imports the engine, torch with it, only for "native".

    Raises ConfigurationError where a part that it needs is not installed, and ModelNotFoundError where there is no such
    provider.
    """
    if name in settings.clouds:
        from autobot_llm.providers.openai.provider import cloud_provider

        return cloud_provider(settings, name)
    if name not in _COULD_APPLY:
        raise unknown_provider(name, known_providers(settings))
    if (make := _CLIENTS.get(name)) is not None:
        return make(settings)
    try:
        from autobot_llm.providers.native import NativeProvider
    except ModuleNotFoundError as exc:
        if (exc.name or "").startswith("autobot_llm"):
            raise
        raise ConfigurationError(
            f"provider 'native' needs {exc.name}, which is not installed: pip install \"autobot_llm[engine]\""
        ) from exc
    return NativeProvider(settings, on_progress=on_progress)


def known_providers(settings: Settings) -> tuple[str, ...]:
    """Every provider by name: one of each kind, and each cloud that settings declare. Raises ConfigurationError."""
    for name in settings.clouds:
        if name in _COULD_APPLY:
            raise ConfigurationError(f"AUTOBOT_CLOUD_{name.upper()}_ENDPOINT: '{name}' is a provider of its own")
    return (*ProviderType, *settings.clouds)


def the_cloud(settings: Settings) -> str:
    """Which of the declared clouds the provider "cloud" is: the default model's, else the only one.

    Raises ConfigurationError where that leaves none or several.
    """
    prefix = settings.default_model.partition("/")[0]
    if prefix in settings.clouds:
        return prefix
    if len(settings.clouds) == 1:
        return next(iter(settings.clouds))
    if not settings.clouds:
        raise ConfigurationError("provider 'cloud': declare one with AUTOBOT_CLOUD_<NAME>_ENDPOINT")
    raise ConfigurationError(
        f"provider 'cloud': several are declared; AUTOBOT_DEFAULT_LLM_MODEL=<name>/<model> chooses among "
        f"{', '.join(settings.clouds)}"
    )


def default_provider(settings: Settings, known: Sequence[str]) -> str:
    """Who answers where a request names nobody: the one that settings name, else the first of `known`."""
    wanted = settings.provider
    if wanted == str(ProviderType.CLOUD_OTHER) and settings.clouds and the_cloud(settings) in known:
        return the_cloud(settings)
    return wanted if wanted in known else known[0]


def unknown_provider(name: str, known: Sequence[str]) -> ModelNotFoundError:
    return ModelNotFoundError(f"no provider is called '{name}'; known are {', '.join(known)}", param="provider")


class Route(msgspec.Struct, frozen=True):
    """Who answers. `model` None is the provider's own default, which it knows from the settings."""

    provider: str
    model: str | None

    def taken_by(self, request: RequestT) -> RequestT:
        """`request` for this provider and model, with an id if it has none."""
        request_id = request.request_id or f"req-{secrets.token_hex(12)}"
        return msgspec.structs.replace(request, provider=self.provider, model=self.model, request_id=request_id)


def choose_route(request: LLMRequest, settings: Settings, *, default: str, known: Sequence[str]) -> Route:
    """The provider and model for `request`: its own, else its `llm_type`'s, else the default ones.

    A model may name its provider: "native/tiny". Only a known provider's name is taken for one, so that the names of
    model hubs ("meta-llama/Llama-3.2-1B") stay whole; an explicit `provider` is obeyed before a prefix.
    Raises ModelNotFoundError for an unknown provider; whether it serves the model, the provider itself says.
    """
    if request.provider is not None and request.provider not in known:
        raise unknown_provider(request.provider, known)
    if request.model is not None:
        return _split(request.model, request.provider, default, known)
    if (model := settings.models.get(_type_key(request.llm_type))) is not None:
        route = _split(model, None, default, known)
        if request.provider in (None, route.provider):
            return route
    return Route(request.provider or default, None)


def _split(model: str, provider: str | None, default: str, known: Sequence[str]) -> Route:
    prefix, slash, rest = model.partition("/")
    if slash and rest and prefix in known and provider in (None, prefix):
        return Route(prefix, rest)
    return Route(provider or default, model)


def _type_key(llm_type: str) -> str:
    return llm_type.lower().replace("-", "_").replace(" ", "_")
