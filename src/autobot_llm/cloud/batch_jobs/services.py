"""Which providers have batches, and their services by name. Knows settings; asks nobody."""

from __future__ import annotations

from urllib.parse import urlsplit

from autobot_llm.cloud.batch_jobs.service import BatchService, sizes_of
from autobot_llm.dialects.openai.requests import OPENAI
from autobot_llm.errors import ConfigurationError
from autobot_llm.settings import Settings
from autobot_llm.transport.network import Network, limits_of

_PUBLIC_ANTHROPIC = "api.anthropic.com"
_EMBEDDED_MODEL = "tiny"  # what the setting says unless it was set


def known_services(settings: Settings) -> tuple[str, ...]:
    """The names of the providers that have batches."""
    return ("openai", "anthropic", *settings.clouds)


def account_name(settings: Settings) -> str:
    """The provider where nobody names one: the default model's, else the default one."""
    known = known_services(settings)
    prefix = settings.default_model.partition("/")[0]
    if prefix in known:
        return prefix
    if settings.provider == "cloud" and len(settings.clouds) == 1:
        return next(iter(settings.clouds))
    return settings.provider


def default_model(settings: Settings, name: str) -> str | None:
    """The default model, where it is one of the provider's."""
    prefix, slash, rest = settings.default_model.partition("/")
    if slash and prefix == name:
        return rest
    is_meant = account_name(settings) == name and settings.default_model != _EMBEDDED_MODEL
    return settings.default_model if is_meant else None


def batch_service(settings: Settings, name: str) -> BatchService:
    """The service of the provider `name`, one of `known_services`. Raises ConfigurationError where it has no key.

    It reaches its server as the provider does: HTTP version, proxies, age and number of connections.
    """
    sizes, network = sizes_of(limits_of(settings)), Network.of(settings)
    if name == "anthropic":
        from autobot_llm.cloud.batch_jobs.anthropic_service import AnthropicBatches

        key = settings.anthropic_api_key
        if key is None and urlsplit(settings.anthropic_endpoint).hostname == _PUBLIC_ANTHROPIC:
            raise ConfigurationError("provider 'anthropic' needs a key: set ANTHROPIC_API_KEY")
        return AnthropicBatches(settings.anthropic_endpoint, key, sizes=sizes, network=network)
    from autobot_llm.cloud.batch_jobs.openai_service import OpenAIBatches
    from autobot_llm.providers.openai.endpoint import endpoint_at

    if name not in settings.clouds and name != "openai":
        known = ", ".join(known_services(settings))
        raise ConfigurationError(f"provider '{name}' is not there any more, or has no batch jobs: expected {known}")
    if name in settings.clouds:
        cloud = settings.clouds[name]
        endpoint = endpoint_at(cloud.endpoint, cloud.api_key)
        return OpenAIBatches(endpoint, name=name, sizes=sizes, network=network)
    endpoint = endpoint_at(settings.openai_endpoint, settings.openai_api_key)
    if endpoint.api_key is None and endpoint.flavour is OPENAI:
        raise ConfigurationError("provider 'openai' needs a key: set OPENAI_API_KEY")
    return OpenAIBatches(endpoint, name=name, sizes=sizes, network=network)
