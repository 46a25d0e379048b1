"""The server in front of our own engine: many clients get right answers, and those that leave leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import psutil
from server_harness import PATIENCE, Server, parse_reply, request_bytes, serving, sse_events, until

from autobot_llm.interface import LLMInterface
from autobot_llm.providers.native import NativeProvider
from autobot_llm.settings import Settings

PROMPTS = ["Once upon a time", "The little fox", "One day, Lily", "It was raining and", "Tom had a red"]
NUM_CLIENTS = 500


@contextlib.asynccontextmanager
async def native_server() -> AsyncIterator[Server[NativeProvider]]:
    settings = Settings(port=0)
    provider = NativeProvider(settings)
    async with serving(settings, LLMInterface(settings, providers={"native": provider}), provider) as server:
        yield server


def body(prompt: str, max_tokens: int) -> bytes:
    fields = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    return json.dumps(fields).encode()


async def answer(server: Server[NativeProvider], prompt: str) -> str:
    reader, writer = await server.connect()
    async with asyncio.timeout(60):
        writer.write(request_bytes("POST", "/v1/completions", body(prompt, 8), {"connection": "close"}))
        *chunks, done = sse_events(parse_reply(await reader.read()).body)
    writer.close()
    assert done == "[DONE]"
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


async def test_five_hundred_clients_at_once_get_the_answers_they_would_get_alone() -> None:
    async with native_server() as server:
        alone = {prompt: await answer(server, prompt) for prompt in PROMPTS}
        asked = [PROMPTS[number % len(PROMPTS)] for number in range(NUM_CLIENTS)]
        together = await asyncio.gather(*(answer(server, prompt) for prompt in asked))
    assert len(set(alone.values())) == len(PROMPTS)
    assert together == [alone[prompt] for prompt in asked]


async def test_a_hundred_clients_that_leave_in_the_middle_leave_no_block_task_or_descriptor() -> None:
    async with native_server() as server:
        await answer(server, PROMPTS[0])
        tasks, num_fds = asyncio.all_tasks(), psutil.Process().num_fds()
        connections = [await server.connect() for _ in range(100)]
        for position, (_, writer) in enumerate(connections):
            writer.write(request_bytes("POST", "/v1/completions", body(f"{position} {PROMPTS[0]}", 1500)))
        for reader, _ in connections[:10]:
            await asyncio.wait_for(reader.readuntil(b"data: "), PATIENCE)
        assert server.provider.metrics()["num_running"] > 0
        for _, writer in connections:
            writer.transport.abort()
        await until(lambda: server.provider.metrics()["num_running"] + server.provider.metrics()["num_waiting"] == 0)
        await until(lambda: asyncio.all_tasks() <= tasks)
        await until(lambda: psutil.Process().num_fds() <= num_fds)
        figures = server.provider.metrics()
        assert figures["num_free_blocks"] == figures["num_blocks"]
