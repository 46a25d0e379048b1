"""`compression` in the body of a request, in each dialect."""

from __future__ import annotations

from typing import Any

import pytest
from server_harness import running_server

from autobot_llm.types import LLMRequest

SYSTEM = "You are a helpful assistant. Please note that you answer in English."
SHORT = "Assistant. You answer in English."
USER = {"role": "user", "content": "Please note that I ask."}
WITH_SYSTEM = [{"role": "system", "content": SYSTEM}, USER]
CALLS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": WITH_SYSTEM},
    "/v1/messages": {"model": "tiny", "max_tokens": 9, "system": SYSTEM, "messages": [USER]},
    "/api/chat": {"model": "tiny", "messages": WITH_SYSTEM, "stream": False},
}


def texts(request: LLMRequest) -> list[object]:
    return [message.content for message in request.messages or ()]


@pytest.mark.parametrize("path", CALLS)
async def test_a_body_may_ask_for_compression_whatever_its_dialect(path: str) -> None:
    async with running_server() as server:
        plain = await server.post(path, CALLS[path])
        asked = await server.post(path, CALLS[path] | {"compression": {"mode": "rules"}})
        wrong = await server.post(path, CALLS[path] | {"compression": {"mode": "zip"}})
    assert (plain.status, asked.status, wrong.status) == (200, 200, 400), (plain.body, asked.body, wrong.body)
    first, second = server.provider.requests
    assert texts(first)[0] in (SYSTEM, [{"type": "text", "text": SYSTEM}])
    assert texts(second)[0] in (SHORT, [{"type": "text", "text": SHORT}])
    assert texts(first)[1:] == texts(second)[1:]
    assert "compression" in str(wrong.json["error"])


async def test_a_server_with_compression_on_says_so_and_lets_a_request_out_of_it() -> None:
    path = "/v1/chat/completions"
    async with running_server(prompt_compression_enabled=True) as server:
        await server.post(path, CALLS[path])
        await server.post(path, CALLS[path] | {"compression": "off"})
        (row,) = (await server.get("/v1/optimizations")).json["data"]
    assert [texts(request)[0] for request in server.provider.requests] == [SHORT, SYSTEM]
    (state,) = [one for one in row["optimizations"] if one["name"] == "prompt_compression"]
    assert state["runs"] and "lossy" in state["reason"]
