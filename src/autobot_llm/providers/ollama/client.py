"""Ask an Ollama server. Knows its paths and how its errors read; knows nothing of what to ask."""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

from autobot_llm.dialects.bodies import encode
from autobot_llm.dialects.ollama import models
from autobot_llm.dialects.ollama.answers import AnswerReader, better_error, error_of
from autobot_llm.dialects.ollama.requests import EMBED, GENERATE
from autobot_llm.errors import LLMError, ProviderError
from autobot_llm.transport import ndjson
from autobot_llm.transport.pool import HttpPool, Network, PoolLimits, Timeouts
from autobot_llm.types import Event

PATIENCE = 10.0  # seconds for what a server knows without loading a model
LOAD_PATIENCE = 600.0  # a large model from a slow disk; Ollama itself gives up after OLLAMA_LOAD_TIMEOUT, 5 minutes
_JSON = {"content-type": "application/json"}
_ANSWER = Timeouts(first_token=LOAD_PATIENCE)
_PULL = Timeouts(first_token=LOAD_PATIENCE, read=LOAD_PATIENCE)


class OllamaClient:
    """One server; a user and a password in its address are for a proxy in front of it.

    Every method raises the errors of `HttpPool.request`, in Ollama's words, and ProviderError.
    """

    def __init__(self, endpoint: str, *, limits: PoolLimits, network: Network) -> None:
        headers = _authorization(endpoint)
        self.pool = HttpPool(without_user(endpoint), headers=headers, limits=limits, network=network, name="ollama")

    async def close(self) -> None:
        await self.pool.close()

    async def version(self) -> str:
        return models.read_version((await self.pool.request("GET", "/api/version", timeout=PATIENCE)).body)

    async def tags(self) -> list[models.Tag]:
        return models.read_tags((await self.pool.request("GET", "/api/tags", timeout=PATIENCE)).body)

    async def processes(self) -> list[models.Running]:
        """The models that are in memory."""
        return models.read_processes((await self.pool.request("GET", "/api/ps", timeout=PATIENCE)).body)

    async def show(self, model: str) -> models.Shown:
        return models.read_shown(await self._post("/api/show", {"model": model}, model, PATIENCE))

    async def load(self, model: str, fields: Mapping[str, Any]) -> None:
        """Load or unload `model`: a request without a prompt."""
        await self._post(GENERATE, {"model": model, "stream": False, **fields}, model, LOAD_PATIENCE)

    async def embed(self, body: Mapping[str, Any], patience: float | None) -> bytes:
        return await self._post(EMBED, body, str(body["model"]), patience)

    async def answer(self, path: str, body: Mapping[str, Any], reader: AnswerReader) -> AsyncGenerator[Event, None]:
        """The events that `reader` makes of a streamed answer. Closing the generator ends the work at the server."""
        parser = ndjson.LineParser()
        with _in_ollamas_words(str(body["model"])):
            async with (
                self.pool.stream("POST", path, body=encode(body), headers=_JSON, timeouts=_ANSWER) as answer,
                aclosing(answer.chunks()) as chunks,
            ):
                async for chunk in chunks:
                    for line in parser.feed(chunk):
                        for event in reader.events(line):
                            yield event
                    if reader.ending is not None:
                        await answer.end()
                        return
            if last := parser.last():
                for event in reader.events(last):
                    yield event
            if reader.ending is None:
                raise ProviderError("ollama broke its answer off before the end", code="truncated_answer")

    async def pull(self, model: str) -> AsyncGenerator[models.Progress, None]:
        """Have the server fetch `model`; it tells how far it is. Closing the generator stops that."""
        body = encode({"model": model, "stream": True})
        with _in_ollamas_words(model):
            async with (
                self.pool.stream("POST", "/api/pull", body=body, headers=_JSON, timeouts=_PULL) as answer,
                aclosing(answer.chunks()) as chunks,
                aclosing(ndjson.lines(chunks)) as lines,
            ):
                async for line in lines:
                    progress = models.read_progress(line)
                    if progress.error is not None:
                        raise error_of(502, progress.error, model)
                    yield progress

    async def _post(self, path: str, body: Mapping[str, Any], model: str, patience: float | None) -> bytes:
        with _in_ollamas_words(model):
            answer = await self.pool.request("POST", path, body=encode(body), headers=_JSON, timeout=patience)
        return answer.body


def without_user(endpoint: str) -> str:
    """The address without a user and a password, as it may be shown."""
    return re.sub(r"://[^@/]*@", "://", endpoint)


def _authorization(endpoint: str) -> dict[str, str]:
    url = urlsplit(endpoint)
    if url.username is None:
        return {}
    pair = f"{unquote(url.username)}:{unquote(url.password or '')}"
    return {"authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


@contextmanager
def _in_ollamas_words(model: str) -> Iterator[None]:
    try:
        yield
    except LLMError as error:
        better = better_error(error, model)
        if better is error:
            raise
        raise better from error
