"""Where a server is and which flavour of OpenAI's language it speaks. Knows addresses; asks nobody.

Azure's two forms: https://NAME.openai.azure.com/openai/v1, where the model is a deployment's name, and
https://NAME.openai.azure.com/openai/deployments/DEPLOYMENT?api-version=VERSION, which serves that one.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit, urlunsplit

import msgspec

from autobot_llm.dialects.openai.requests import AZURE, COMPATIBLE, OPENAI, Flavour
from autobot_llm.errors import ConfigurationError

_OPENAI_HOST = re.compile(r"(.+\.)?api\.openai\.com")
_AZURE_HOST = re.compile(r".+\.(openai\.azure\.com|cognitiveservices\.azure\.com|services\.ai\.azure\.com)")
_DEPLOYMENT = re.compile(r"/openai/deployments/([^/]+)")


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One server. `deployment` is the only model of an address that names one."""

    base_url: str
    flavour: Flavour
    api_key: str | None = None
    deployment: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries: the form of its body, and the key in the header that the flavour wants."""
        headers = {"content-type": "application/json"}
        if self.api_key is not None and self.flavour is AZURE:
            headers["api-key"] = self.api_key
        elif self.api_key is not None:
            headers["authorization"] = f"Bearer {self.api_key}"
        return headers

    @property
    def shown(self) -> str:
        """The address as it may be shown: without a password or a query."""
        url = urlsplit(self.base_url)
        return urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path, "", ""))

    def __repr__(self) -> str:
        return f"Endpoint({self.shown!r})"


def endpoint_at(address: str, api_key: str | None) -> Endpoint:
    """The endpoint at `address`. Where it has no path, the custom is followed: /v1, for Azure /openai/v1.

    Raises ConfigurationError for Azure's older form without its version.
    """
    url = urlsplit(address)
    host = url.hostname or ""
    if _AZURE_HOST.fullmatch(host):
        return _azure(address, api_key)
    if url.path in ("", "/"):
        address = urlunsplit(url._replace(path="/v1"))
    return Endpoint(base_url=address, flavour=OPENAI if _OPENAI_HOST.fullmatch(host) else COMPATIBLE, api_key=api_key)


def _azure(address: str, api_key: str | None) -> Endpoint:
    url = urlsplit(address)
    if url.path in ("", "/", "/openai", "/openai/"):
        address = urlunsplit(url._replace(path="/openai/v1"))
    deployment = _DEPLOYMENT.match(url.path)
    if deployment is None:
        return Endpoint(base_url=address, flavour=AZURE, api_key=api_key)
    if "api-version=" not in url.query:
        raise ConfigurationError(f"{address}: expected ?api-version=... at the end of a deployment's address")
    path = url.path[: deployment.end()]
    return Endpoint(
        base_url=urlunsplit(url._replace(path=path)), flavour=AZURE, api_key=api_key, deployment=deployment[1]
    )
