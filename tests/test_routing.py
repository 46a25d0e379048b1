"""Routing: what could apply to a provider, who answers a request, and the chain in front of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncGenerator

import pytest

from autobot_llm.errors import ConfigurationError, ModelNotFoundError
from autobot_llm.providers.base import Link, Provider, Streamer
from autobot_llm.providers.scripted import ScriptedProvider
from autobot_llm.routing import (
    OPTIMIZATIONS,
    OptimizationRouter,
    ProviderType,
    Route,
    Wrapper,
    build_chain,
    build_provider,
    choose_route,
    default_provider,
    known_providers,
    make_links,
    the_cloud,
)
from autobot_llm.settings import CloudSettings, Settings
from autobot_llm.types import Event, LLMRequest, TextDelta

KNOWN = ["native", "openai", "ollama"]
OVER_HTTP = {"request_batching", "connection_pooling", "retry_with_backoff", "rate_limit_handling"}
EVERYWHERE = {"response_caching", "prompt_compression", "request_deduplication"}


def could_apply(kind: ProviderType) -> set[str]:
    return {name for name, could in OptimizationRouter.get_optimizations(kind).items() if could}


def test_every_kind_answers_for_every_optimization() -> None:
    for kind in ProviderType:
        table = OptimizationRouter.get_optimizations(kind)
        assert list(table) == list(OPTIMIZATIONS)
        assert len(table) == 15
        assert {name for name in table if OptimizationRouter.should_apply(name, kind)} == could_apply(kind)
        assert could_apply(kind) >= EVERYWHERE


def test_http_optimizations_apply_to_every_provider_over_http_and_to_no_other() -> None:
    for kind in ProviderType:
        assert could_apply(kind) & OVER_HTTP == (set() if kind is ProviderType.LOCAL_NATIVE else OVER_HTTP)


def test_clouds_take_no_optimization_of_weights_and_kernels() -> None:
    for kind in (ProviderType.CLOUD_OPENAI, ProviderType.CLOUD_ANTHROPIC, ProviderType.CLOUD_OTHER):
        assert could_apply(kind) == OVER_HTTP | EVERYWHERE


def test_what_a_provider_cannot_do_is_never_reported() -> None:
    assert {"medusa_heads", "cuda_graphs", "speculative_decoding"}.isdisjoint(could_apply(ProviderType.LOCAL_OLLAMA))
    assert "medusa_heads" not in could_apply(ProviderType.LOCAL_VLLM)
    assert "medusa_heads" in could_apply(ProviderType.LOCAL_NATIVE)


def test_an_unknown_optimization_applies_nowhere() -> None:
    assert not any(OptimizationRouter.should_apply("teleportation", kind) for kind in ProviderType)


@pytest.mark.parametrize(
    ("asked", "route"),
    [
        ({}, Route("native", None)),
        ({"model": "tiny"}, Route("native", "tiny")),
        ({"model": "native/tiny"}, Route("native", "tiny")),
        ({"model": "openai/gpt-x"}, Route("openai", "gpt-x")),
        ({"model": "meta-llama/Llama-3.2-1B"}, Route("native", "meta-llama/Llama-3.2-1B")),
        ({"model": "openai/gpt-x", "provider": "native"}, Route("native", "openai/gpt-x")),
        ({"model": "native/tiny", "provider": "native"}, Route("native", "tiny")),
        ({"model": "/models/a/b"}, Route("native", "/models/a/b")),
        ({"model": "native/"}, Route("native", "native/")),
        ({"provider": "ollama"}, Route("ollama", None)),
        ({"llm_type": "chat"}, Route("native", "small")),
        ({"llm_type": "My-Task"}, Route("ollama", "m:7b")),
        ({"llm_type": "chat", "provider": "openai"}, Route("openai", None)),
        ({"llm_type": "my_task", "provider": "ollama"}, Route("ollama", "m:7b")),
        ({"llm_type": "chat", "model": "tiny"}, Route("native", "tiny")),
        ({"llm_type": "never heard of"}, Route("native", None)),
    ],
)
def test_a_request_goes_where_it_says_then_where_its_type_says(asked: dict[str, str], route: Route) -> None:
    settings = Settings(models={"chat": "small", "my_task": "ollama/m:7b"})
    request = LLMRequest(prompt="x", **asked)  # type: ignore[arg-type]
    assert choose_route(request, settings, default="native", known=KNOWN) == route


def test_an_unknown_provider_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ModelNotFoundError, match="'nativ'; known are native, openai, ollama") as refusal:
        choose_route(LLMRequest(prompt="x", provider="nativ"), Settings(), default="native", known=KNOWN)
    assert refusal.value.param == "provider"


def test_every_provider_is_built_by_its_name_and_a_cloud_by_its_own() -> None:
    clouds = {"groq": CloudSettings(endpoint="https://groq.test/v1", api_key="k")}
    settings = Settings(clouds=clouds)
    for name in ("native", "openai", "anthropic", "ollama", "groq"):
        assert build_provider(settings, name).name == name
    assert build_provider(settings, "cloud").name == "groq"
    with pytest.raises(ModelNotFoundError, match="no provider is called 'x'"):
        build_provider(Settings(), "x")


def test_without_the_engine_installed_the_native_provider_says_how_to_get_it() -> None:
    program = """
import sys
sys.modules["torch"] = None  # as Python itself marks a module that cannot be imported
from autobot_llm import ConfigurationError, Settings
from autobot_llm.routing import build_provider
try:
    build_provider(Settings(), "native")
except ConfigurationError as exc:
    print(exc)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "needs torch, which is not installed" in result.stdout
    assert "autobot_llm[engine]" in result.stdout


class Marking:
    """A link that leaves its mark before the rest of the chain speaks."""

    def __init__(self, inner: Streamer, mark: str) -> None:
        self.inner = inner
        self.mark = mark

    async def stream(self, request: LLMRequest) -> AsyncGenerator[Event, None]:
        yield TextDelta(self.mark)
        async for event in self.inner.stream(request):
            yield event


class MarkingLink(Link):
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def wrap(self, chain: Streamer, provider: Provider) -> Streamer:
        return Marking(chain, self.mark)


def marking(optimization: str, mark: str) -> Wrapper:
    return Wrapper(optimization, lambda settings: MarkingLink(f"{mark}{settings.port}"))


async def marks_in_front_of(name: str) -> list[str]:
    provider = ScriptedProvider(name=name)
    await provider.start()
    wrappers = (
        marking("response_caching", "a"),
        marking("connection_pooling", "b"),
        marking("prompt_compression", "c"),
    )
    chain = build_chain(provider, make_links(Settings(port=1), wrappers))
    return [event.text async for event in chain.stream(LLMRequest(prompt="x")) if isinstance(event, TextDelta)]


async def test_the_chain_has_the_links_that_could_apply_the_first_outermost() -> None:
    assert await marks_in_front_of("native") == ["a1", "c1"]
    assert await marks_in_front_of("openai") == ["a1", "b1", "c1"]
    assert await marks_in_front_of("a cloud of mine") == ["a1", "b1", "c1"]


def test_without_links_the_chain_is_the_provider_itself() -> None:
    provider = ScriptedProvider(name="native")
    assert build_chain(provider, make_links(Settings(), ())) is provider


def test_a_link_that_the_settings_switch_off_is_not_in_the_chain() -> None:
    wrappers = (Wrapper("response_caching", lambda settings: None), marking("prompt_compression", "c"))
    assert list(make_links(Settings(), wrappers)) == ["prompt_compression"]


def test_declared_clouds_are_providers_and_cloud_is_the_one_that_is_meant() -> None:
    one, other = (CloudSettings(endpoint=f"https://{name}.test/v1") for name in ("one", "other"))
    both = {"one": one, "other": other}
    known = known_providers(Settings(clouds=both))
    assert known == (*ProviderType, "one", "other")
    assert the_cloud(Settings(clouds=both, default_model="other/m")) == "other"
    assert default_provider(Settings(provider="cloud", clouds={"one": one}), known) == "one"
    with pytest.raises(ConfigurationError, match="chooses among one, other"):
        default_provider(Settings(provider="cloud", clouds=both), known)
    with pytest.raises(ConfigurationError, match="declare one with AUTOBOT_CLOUD_<NAME>_ENDPOINT"):
        build_provider(Settings(), "cloud")
    with pytest.raises(ConfigurationError, match="AUTOBOT_CLOUD_OLLAMA_ENDPOINT: 'ollama' is a provider of its own"):
        known_providers(Settings(clouds={"ollama": one}))
    request = LLMRequest(prompt="x", model="other/meta-llama/x")
    assert choose_route(request, Settings(), default="native", known=known) == Route("other", "meta-llama/x")
