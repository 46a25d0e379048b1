"""A crowd that asks the server one thing at once: one call, and whoever stays gets its answer, whoever leaves."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Iterator

import pytest
from server.server_harness import QUESTION, request_bytes, serving, until
from universal.gated import GatedProvider

from autobot_llm.interface import LLMInterface
from autobot_llm.settings import Settings

CROWD = 1000


@pytest.fixture(autouse=True)
def _room_for_a_crowd() -> Iterator[None]:
    """Both ends of every connection are this process's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * CROWD + 500
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"only {hard} open files are allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("caches", [True, False])
async def test_a_thousand_equal_requests_make_one_call_though_half_of_their_clients_leave(caches: bool) -> None:
    provider = GatedProvider(["one ", "two ", "three"])
    settings = Settings(port=0, cache_enabled=caches)
    llm = LLMInterface(settings, providers={"native": provider})
    body = json.dumps({"messages": QUESTION, "temperature": 0, "stream": True}).encode()
    asking = request_bytes("POST", "/v1/chat/completions", body, {"connection": "close"})
    async with serving(settings, llm, provider) as server:
        connections = [await server.connect() for _ in range(CROWD)]
        for _, writer in connections:
            writer.write(asking)
        provider.release()
        await until(lambda: provider.num_calls == 1 and llm.get_metrics()["native"]["num_joined"] == CROWD - 1)
        for _, writer in connections[::2]:  # the one that began the call among them
            writer.close()
        await until(lambda: llm.get_metrics()["interface"]["num_cancelled"] == CROWD // 2)
        provider.release(2)
        async with asyncio.timeout(30):
            answers = await asyncio.gather(*(reader.read() for reader, _ in connections[1::2]))
        for answer in answers:
            assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"0\r\n\r\n")
            assert all(piece in answer for piece in (b'"one "', b'"two "', b'"three"', b"[DONE]"))
        assert provider.num_calls == 1
        assert provider.num_open_streams == 0
        figures = llm.get_metrics()["interface"]
        assert (figures["num_completed"], figures["num_in_flight"]) == (CROWD // 2, 0)
        if caches:
            body = json.dumps({"messages": QUESTION, "temperature": 0}).encode()
            assert (await server.post("/v1/chat/completions", body)).json["choices"][0]["message"]["content"] == (
                "one two three"
            )
            assert provider.num_calls == 1, "what the crowd made was kept"
