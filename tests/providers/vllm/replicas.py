"""vLLM servers that behave as told, on free ports of this machine. For the tests of the provider."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from raw_server import Asked, RawServer, Wire, raw_server

from autobot_llm.providers.vllm import VllmProvider
from autobot_llm.settings import Settings

PATIENCE = 5.0  # seconds within which everything these tests wait for has happened
METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 77.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 1000.0
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 600.0
vllm:num_preemptions_total{engine="0",model_name="m"} 1.0
vllm:generation_tokens_total{engine="0",model_name="m"} 500.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 200.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 150.0
vllm:cache_config_info{block_size="16",cache_dtype="fp8",enable_prefix_caching="True",num_gpu_blocks="1000"} 1.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.1",model_name="m"} 1.0
"""


@dataclass
class FakeReplica:
    """One server. `fail` answers a request for work in place of the server's own words."""

    models: list[str] = field(default_factory=lambda: ["m"])
    version: str | None = "0.33.0"
    metrics: str = METRICS
    is_well: bool = True
    pieces: tuple[str, ...] = ("Hello", " world")
    cached_tokens: int | None = None
    fail: Callable[[Wire], Any] | None = None
    gate: asyncio.Event | None = None  # work goes on after the first piece once it is set
    bodies: list[dict[str, Any]] = field(default_factory=list)
    server: RawServer | None = None
    num_waiting: int = 0

    @property
    def url(self) -> str:
        assert self.server is not None
        return self.server.url

    async def play(self, wire: Wire, asked: Asked) -> None:
        if asked.method == "POST":
            await self._work(wire, asked)
        elif asked.path == "/health":
            await wire.reply(b"", status=200 if self.is_well else 503)
        elif asked.path == "/metrics":
            await wire.reply(self.metrics.encode(), content_type="text/plain; version=0.0.4")
        elif asked.path == "/version" and self.version is not None:
            await wire.reply(json.dumps({"version": self.version}).encode(), content_type="application/json")
        elif asked.path == "/v1/models":
            data = [{"id": name, "object": "model", "created": 1, "max_model_len": 4096} for name in self.models]
            body = json.dumps({"object": "list", "data": data}).encode()
            await wire.reply(body, content_type="application/json")
        else:
            await wire.reply(b'{"detail": "Not Found"}', status=404, content_type="application/json")

    async def _work(self, wire: Wire, asked: Asked) -> None:
        body = json.loads(asked.body)
        self.bodies.append(body)
        if self.fail is not None:
            await self.fail(wire)
            return
        if asked.path == "/v1/embeddings":
            data = [{"object": "embedding", "index": 0, "embedding": "AACAPw=="}]
            answer = {"object": "list", "data": data, "model": "m", "usage": {"prompt_tokens": 1, "total_tokens": 1}}
            await wire.reply(json.dumps(answer).encode(), content_type="application/json")
            return
        await wire.begin_stream()
        for number, piece in enumerate(self.pieces):
            await wire.piece(_chunk(body["model"], {"content": piece}))
            if number == 0 and self.gate is not None:
                self.num_waiting += 1
                await self.gate.wait()
        details = None if self.cached_tokens is None else {"cached_tokens": self.cached_tokens}
        usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11, "prompt_tokens_details": details}
        await wire.piece(_chunk(body["model"], {}, finish_reason="stop"))
        await wire.piece(_chunk(body["model"], None, usage=usage) + b"data: [DONE]\n\n")
        await wire.end_stream()


def _chunk(model: str, delta: dict[str, Any] | None, *, finish_reason: str | None = None, usage: Any = None) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": model, "choices": choices}
    return b"data: " + json.dumps(chunk | ({} if usage is None else {"usage": usage})).encode() + b"\n\n"


@contextlib.asynccontextmanager
async def serving(*replicas: FakeReplica, watch_seconds: float = 60.0, **settings: Any) -> AsyncIterator[VllmProvider]:
    """A started provider in front of the replicas."""
    async with contextlib.AsyncExitStack() as stack:
        for replica in replicas:
            replica.server = await stack.enter_async_context(raw_server(replica.play))
        endpoints = tuple(replica.url for replica in replicas)
        provider = VllmProvider(Settings(vllm_endpoints=endpoints, **settings), watch_seconds=watch_seconds)
        await provider.start()
        stack.push_async_callback(provider.close)
        yield provider


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.002)


def refuses(status: int, sentence: str = "no", **headers: str) -> Callable[[Wire], Any]:
    """A failure: a reply with that status."""

    async def fail(wire: Wire) -> None:
        body = json.dumps({"error": {"message": sentence, "type": "x", "param": None, "code": status}}).encode()
        await wire.reply(body, status=status, content_type="application/json", **headers)

    return fail
