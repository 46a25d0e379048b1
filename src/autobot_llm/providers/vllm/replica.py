"""One vLLM server: its client, whether it is up, what it serves and what its metrics say. Knows one server only."""

from __future__ import annotations

import logging
from urllib.parse import urlsplit, urlunsplit

import msgspec

from autobot_llm.dialects.openai.requests import COMPATIBLE
from autobot_llm.errors import ConfigurationError, LLMError, ProviderError, ProviderTimeout, ProviderUnavailable
from autobot_llm.providers.base import ModelInfo
from autobot_llm.providers.openai import Endpoint, OpenAIClient
from autobot_llm.providers.vllm.fields import separates_tenants
from autobot_llm.providers.vllm.scrape import Accumulated, EngineFacts, read_engine_facts, read_figures
from autobot_llm.transport.pool import HttpPool, Network, PoolLimits
from autobot_llm.tuning.knobs.versions import release_of

logger = logging.getLogger("autobot_llm.vllm")

LOOK_SECONDS = 5.0  # that a look at a server may take
VLLM = msgspec.structs.replace(COMPATIBLE, name="vLLM")


class _Version(msgspec.Struct):
    version: str


class Replica:
    """The server at `address`. `is_up` is None until it was looked at; `failure` says why it is down."""

    def __init__(self, address: str, limits: PoolLimits, network: Network, api_key: str | None = None) -> None:
        root = _root(address)
        endpoint = Endpoint(base_url=f"{root}/v1", flavour=VLLM, api_key=api_key)
        self.address = endpoint.shown.removesuffix("/v1")
        self.client = OpenAIClient(endpoint, name="vllm", limits=limits, network=network)
        self.is_up: bool | None = None
        self.failure = ""
        self.version: str | None = None
        self.models: tuple[ModelInfo, ...] = ()
        self.facts = EngineFacts()
        self._looks = HttpPool(root, name="vllm", limits=PoolLimits(max_connections=4), network=network)
        self._figures = Accumulated()

    async def close(self) -> None:
        await self.client.close()
        await self._looks.close()

    def figures(self) -> dict[str, float]:
        """What its metrics said last, by our names; counters go on over its restarts."""
        return self._figures.figures

    async def look(self) -> None:
        """Ask whether it is well, what it is if it was not up before, and how it does. Never raises LLMError."""
        try:
            await self._looks.request("GET", "/health", timeout=LOOK_SECONDS)
            if not self.is_up:
                await self._get_to_know()
        except LLMError as error:
            self.mark_down(error.message)
            return
        if self.is_up is False:
            logger.info("vllm at %s is up again", self.address)
        self.is_up, self.failure = True, ""
        try:
            page = await self._looks.request("GET", "/metrics", timeout=LOOK_SECONDS)
            self._figures.update(read_figures(page.body, self.version))
            self.facts = read_engine_facts(page.body)
        except LLMError as error:
            logger.debug("no metrics of %s: %s", self.address, error.message)

    async def look_at_models(self) -> None:
        """Ask anew what it serves. Never raises LLMError."""
        try:
            self.models = tuple(await self.client.models())
        except LLMError as error:
            self.mark_down(error.message)

    def mark_down(self, failure: str) -> None:
        """It does not answer; nothing is sent there until a look finds it well."""
        if self.is_up is not False:
            logger.warning("vllm at %s is down: %s", self.address, failure)
        self.is_up, self.failure = False, failure
        self._figures.forget_gauges()

    def serves(self, model: str) -> bool:
        return any(info.id == model for info in self.models)

    async def _get_to_know(self) -> None:
        self.models = tuple(await self.client.models())
        self.version = await self._ask_version()
        if not separates_tenants(self.version, is_chat=True):
            logger.warning("vllm %s at %s cannot keep the cached prefixes of tenants apart", self.version, self.address)

    async def _ask_version(self) -> str | None:
        """Its version; None where it has no release's, or a proxy in between does not pass that on."""
        try:
            answer = await self._looks.request("GET", "/version", timeout=LOOK_SECONDS)
            version = msgspec.json.decode(answer.body, type=_Version).version
            release_of(version)
        except (ProviderError, ConfigurationError, msgspec.MsgspecError) as error:
            if isinstance(error, ProviderUnavailable | ProviderTimeout):
                raise
            return None
        return version


def _root(address: str) -> str:
    """The server's root: health and metrics are there, its API is under /v1."""
    url = urlsplit(address)
    return urlunsplit(url._replace(path=url.path.rstrip("/").removesuffix("/v1")))
