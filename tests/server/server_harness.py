"""A real server on a free port in front of a scripted provider, and a raw HTTP client. For the tests of this folder."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from openai import AsyncOpenAI

from autobot_llm.interface import LLMInterface
from autobot_llm.providers.base import Provider
from autobot_llm.providers.scripted import Script, ScriptedProvider
from autobot_llm.server.lifecycle import serve
from autobot_llm.settings import Settings
from autobot_llm.types import LLMRequest

ProviderT = TypeVar("ProviderT", bound=Provider)

QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]
PATIENCE = 5.0  # seconds within which everything these tests wait for has happened


@dataclass(frozen=True)
class Reply:
    """A whole HTTP reply."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Server(Generic[ProviderT]):
    """A running server, the provider behind it and the task that serves."""

    url: str
    provider: ProviderT
    task: asyncio.Task[None]
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def client(self, api_key: str = "any") -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A raw connection, closed at the latest with the server."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        return reader, writer

    async def get(self, path: str, **headers: str) -> Reply:
        return await self.exchange("GET", path, b"", headers)

    async def post(self, path: str, body: object, **headers: str) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.exchange("POST", path, data, headers)

    async def exchange(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Reply:
        reader, writer = await self.connect()
        try:
            writer.write(request_bytes(method, path, body, headers | {"connection": "close"}))
            return parse_reply(await asyncio.wait_for(reader.read(), PATIENCE))
        finally:
            writer.close()


def request_bytes(method: str, path: str, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: test", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def parse_reply(data: bytes) -> Reply:
    head, _, body = data.partition(b"\r\n\r\n")
    status_line, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = _unchunked(body)
    return Reply(int(status_line.split()[1]), headers, body)


def _unchunked(data: bytes) -> bytes:
    parts = []
    while data:
        size, _, rest = data.partition(b"\r\n")
        num_bytes = int(size, 16)
        parts.append(rest[:num_bytes])
        data = rest[num_bytes + 2 :]
    return b"".join(parts)


def sse_events(body: bytes) -> list[Any]:
    """The data of every server-sent event: parsed JSON, or the text "[DONE]"."""
    texts = [event.removeprefix("data: ") for event in body.decode().split("\n\n") if event]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]


@contextlib.asynccontextmanager
async def running_server(
    script: Script | Callable[[LLMRequest], Script] = ("The ", "answer", "."), *, delay: float = 0.0, **values: Any
) -> AsyncIterator[Server[ScriptedProvider]]:
    """Serve `script` on a free port; `values` are settings."""
    provider = ScriptedProvider(script, name="native", models=["tiny", "other"], delay=delay)
    settings = Settings(**({"port": 0} | values))
    async with serving(settings, LLMInterface(settings, providers={"native": provider}), provider) as server:
        yield server


@contextlib.asynccontextmanager
async def serving(settings: Settings, llm: LLMInterface, provider: ProviderT) -> AsyncIterator[Server[ProviderT]]:
    """Serve `llm`, which asks `provider`."""
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(settings, on_ready=address.set_result, llm=llm))
    await asyncio.wait((task, address), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    server = Server(address.result(), provider, task)
    try:
        yield server
    finally:
        for writer in server.writers:
            writer.close()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], bool]) -> None:
    """Wait for `condition`; fails after `PATIENCE` seconds."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)
